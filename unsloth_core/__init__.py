"""Fine-tune and run open language models on one GPU with pure functions over explicit weights.

    import unsloth_core as uc
    model, params = uc.load("HuggingFaceTB/SmolLM2-135M-Instruct")
    adapters, history = uc.finetune(model, params, "train.jsonl", output="runs/first")
    print(uc.generate(model, uc.lora.adapt(params, adapters), ["Hi"])[0])

Public names only. ``uc.load``, ``uc.generate``, ``uc.plan`` and ``uc.remat`` are functions; what else their files hold
is imported from there (``from unsloth_core.load import named_tensors``).
"""

from . import data, lora, ops, optim, random, tree
from .autodiff import INPUT, OFFLOAD, RECOMPUTE, SAVE, value_and_grad, vjp
from .backend import using
from .generate import generate
from .load import load
from .plan import plan
from .remat import remat, residual_report
from .segments import Segments
from .train import finetune
from .tree import ABSENT

__version__ = "0.1.0"

__all__ = [
    "ABSENT",
    "INPUT",
    "OFFLOAD",
    "RECOMPUTE",
    "SAVE",
    "Segments",
    "__version__",
    "data",
    "finetune",
    "generate",
    "load",
    "lora",
    "ops",
    "optim",
    "plan",
    "random",
    "remat",
    "residual_report",
    "tree",
    "using",
    "value_and_grad",
    "vjp",
]
