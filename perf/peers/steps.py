"""Other libraries' whole training steps: transformers + PEFT (``hf``), the same with Liger's kernels, and Unsloth.

Each takes the setting of ``perf/train_step.py`` and gives a function from a run to its step. Policies are "default" (no
gradient checkpointing) and "recompute" (every layer; Unsloth's own kind for Unsloth). Random weights; quantised ones
are made matrix by matrix. One process runs one of them, since Liger and Unsloth patch what they import.

Ran together with torch 2.11, Triton 3.6, transformers 5.17: peft 0.21.2, bitsandbytes 0.50.2, liger-kernel 0.8.5,
unsloth and unsloth_zoo 2026.10.9 (which need trl 1.15.0, datasets 4.8.4, torchao 0.18.0 and some small packages)."""

import atexit
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perf.random_model import STANDARD_DEVIATION, random_ids, raw_config

LR = 1e-4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Step = Callable[[], Tensor]


def hf(setting: Any) -> Callable[[Any], Step]:
    """transformers with PEFT; bitsandbytes for NF4."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**raw_config(setting.shape))
    model = random_llama(config, setting.device, setting.quant)
    model = with_adapters(model, setting.rank)

    def checkpoint(on: bool) -> None:
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.enable_input_require_grads()
        else:
            model.gradient_checkpointing_disable()

    return _steps(setting, model, checkpoint)


def liger(setting: Any) -> Callable[[Any], Step]:
    """The same with Liger's norm, rotation, MLP and loss."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return hf(setting)


def unsloth(setting: Any) -> Callable[[Any], Step]:
    """Unsloth, which reads its model from a folder (made in TMPDIR) and patches classes then, but layers when they get
    adapters. So it reads one layer, which is repeated in between: 2.5 GB for an 8B and not 16."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    import unsloth  # noqa: F401 - first: it patches what is imported next
    from transformers import AutoConfig
    from unsloth import FastLanguageModel

    raw = raw_config(setting.shape)
    one = AutoConfig.for_model(**{**raw, "num_hidden_layers": 1}, bos_token_id=1, eos_token_id=2, pad_token_id=3)
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    random_llama(one, setting.device).save_pretrained(folder)
    write_tokenizer(folder)
    torch.cuda.empty_cache()
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=131072, dtype=torch.bfloat16, load_in_4bit=setting.quant == "nf4"
    )
    repeat_layer(model, raw["num_hidden_layers"])
    model = FastLanguageModel.get_peft_model(
        model, r=setting.rank, target_modules=LINEARS, lora_alpha=setting.rank, lora_dropout=0, bias="none",
        use_gradient_checkpointing="unsloth", random_state=0,
    )  # fmt: skip
    return _steps(setting, model, lambda on: FastLanguageModel.for_training(model, use_gradient_checkpointing=on))


def repeat_layer(model: Any, count: int) -> None:
    """Copies of a model's only layer until there are ``count``; the config and the rotation stay shared."""
    shared = {id(t): t for t in (model.config, model.model.rotary_emb)}
    layers = model.model.layers
    for i in range(1, count):
        layer = copy.deepcopy(layers[0], dict(shared))
        layer.self_attn.layer_idx = i
        layers.append(layer)
    model.config.num_hidden_layers = count


def with_adapters(model: Any, rank: int) -> Any:
    """PEFT adapters on every linear of the layers, in fp32, scale 1."""
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": LINEARS, "lora_dropout": 0.0, "bias": "none", "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, **options))


def random_llama(
    config: Any, device: torch.device, quant: str = "none", tensors: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16, attention: str = "sdpa",
) -> Any:  # fmt: skip
    """A transformers model on the device, one matrix after the other; with ``tensors``, by name, instead of random."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    decoder = model.model
    with torch.device(device):
        decoder.rotary_emb = type(decoder.rotary_emb)(config)  # its buffers are computed, not loaded
    generator = torch.Generator(device).manual_seed(0)

    def value(name: str, shape: torch.Size) -> Tensor:
        if tensors is not None:
            return tensors[name].to(dtype)
        if len(shape) == 1:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=STANDARD_DEVIATION, generator=generator)

    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if path == "lm_head" and config.tie_word_embeddings:
                continue
            filled = value(f"{path}.{name}", parameter.shape)
            if quant == "nf4" and isinstance(module, nn.Linear) and path != "lm_head":
                model.set_submodule(path, _quantised(filled))
            else:
                setattr(module, name, nn.Parameter(filled, requires_grad=False))
    model.tie_weights()
    model.is_loaded_in_4bit = quant == "nf4"  # what loading sets, and PEFT asks for
    model.config.use_cache = False
    return model


def _quantised(weight: Tensor) -> nn.Module:
    """bitsandbytes' linear in NF4 with double quantisation."""
    import bitsandbytes as bnb

    options = {"compress_statistics": True, "quant_type": "nf4"}
    linear = bnb.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compute_dtype=torch.bfloat16, device="meta", **options
    )
    linear.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=linear, **options).to(weight.device)
    return linear


def _steps(setting: Any, model: Any, checkpoint: Callable[[bool], Any]) -> Callable[[Any], Step]:
    """Steps of a PEFT model; ``checkpoint(on)`` switches its gradient checkpointing."""
    trained = [p for p in model.parameters() if p.requires_grad]
    cuda = setting.device.type == "cuda"

    def optimizer() -> torch.optim.Optimizer:
        if setting.optimizer == "fp32":
            return torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, fused=True)
        if setting.optimizer == "8bit":
            import bitsandbytes as bnb

            return bnb.optim.AdamW8bit(trained, lr=LR, weight_decay=0.0)
        raise ValueError(f"--optimizer {setting.optimizer}: not one of the peers'")

    def prepare(run: Any) -> Step:
        if run.policy not in ("default", "recompute"):
            raise ValueError(f"--policy {run.policy}: peers have default and recompute")
        model.train()
        checkpoint(run.policy == "recompute")
        with torch.no_grad():
            for name, p in model.named_parameters():  # every run starts where the first did
                if ".lora_B." in name:
                    p.zero_()
        adam = optimizer()
        ids = random_ids(run.batch, run.seq, model.config.vocab_size).to(setting.device)

        def step() -> Tensor:
            with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=cuda):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            adam.step()
            adam.zero_grad(set_to_none=True)
            return loss.detach()

        return step

    return prepare


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer, for a library that will not load a model without one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[], unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", model_max_length=131072, **special)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
