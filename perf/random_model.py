"""Models of published shapes with random weights, made on the device: no network, no file.

Weights are made leaf by leaf; an NF4 matrix is quantised as soon as it exists, so the 16-bit model is never held. The
same shape and seed give the same weights on one kind of device, dense or quantised."""

import dataclasses
import re
from typing import Any

import torch
from torch import Tensor

from unsloth_core.models.decoder import Model
from unsloth_core.ops import nf4
from unsloth_core.shapes import Shape
from unsloth_core.tree import ABSENT
from unsloth_core.weights import NF4

_LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
# What config.json of these models says, as far as it shapes the computation.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": _LLAMA3, "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "rope_scaling": {**_LLAMA3, "factor": 32.0},
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "tie_word_embeddings": True,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 32000,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "num_local_experts": 8,
        "num_experts_per_tok": 2, "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "tie_word_embeddings": False,
    },
    "tiny": {  # to try the code
        "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
    },
    "tiny-experts": {
        "model_type": "qwen3_moe", "hidden_size": 64, "intermediate_size": 160, "moe_intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "num_experts": 4,
        "num_experts_per_tok": 2, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "tie_word_embeddings": False,
    },
}  # fmt: skip
STANDARD_DEVIATION = 0.02  # the initializer_range of all of them


def raw_config(shape: str) -> dict[str, Any]:
    """The content of ``config.json``; ``llama-3.1-8b-4layers`` is ``llama-3.1-8b`` cut to 4 layers.

    Raises ValueError naming the shapes there are."""
    match = re.fullmatch(r"(.+?)(?:-(\d+)layers)?", shape)
    if match is None or match[1] not in SHAPES:
        raise ValueError(f"shape {shape!r}, expected one of {sorted(SHAPES)}, or one of them with -<n>layers behind it")
    config = {"model_type": "llama", "hidden_act": "silu", **SHAPES[match[1]]}
    if match[2] is not None:
        config["num_hidden_layers"] = int(match[2])
    return config


def random_model(
    shape: str, *, device: torch.device | str, dtype: torch.dtype = torch.bfloat16, quantize: str | None = None,
    seed: int = 0, embed: str = "device", head: str = "device",
) -> tuple[Model, Any]:  # fmt: skip
    """``model, params`` as ``load`` gives them: matrices normal with standard deviation 0.02, norms 1, biases 0.

    ``embed``, ``head``: as for :func:`placed`; each is put there as it is made, so that the device never holds what a
    run does not keep on it."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)

    def make(name: str, size: tuple[int, ...]) -> Tensor:
        if len(size) == 1:
            return torch.full(size, float(not name.endswith("bias")), dtype=dtype, device=device)
        return torch.empty(size, dtype=dtype, device=device).normal_(std=STANDARD_DEVIATION, generator=generator)

    found = Shape.of(raw_config(shape))
    params = found.weights(found.layers, quantize, dtype, device=device, make=make, embed=embed, head=head)
    return Model(family=found.family, config=found.config, source=f"random {shape}"), params


PLACES = ("device", "host", "nf4")


def placed(params: Any, embed: str, head: str) -> Any:
    """The same weights with embedding and head where they are said to be: "device", "host" (pinned) or "nf4".

    A tied head is where the embedding is. Raises ValueError for anything else."""
    if embed not in PLACES or head not in PLACES:
        raise ValueError(f"embedding on {embed!r} and head on {head!r}, expected {', '.join(PLACES)}")
    device = params.norm.device
    params = dataclasses.replace(params, embed=_moved(params.embed, embed, device))
    return params if params.head is ABSENT else dataclasses.replace(params, head=_moved(params.head, head, device))


def _moved(t: Any, place: str, device: torch.device) -> Any:
    if place == "nf4":
        return t if isinstance(t, NF4) else nf4.quantize(t.to(device))
    if isinstance(t, NF4):
        raise ValueError(f"embedding or head is NF4, expected 16-bit weights to put on the {place}")
    if place == "device":
        return t.to(device)
    return t.cpu().pin_memory() if device.type == "cuda" and t.is_cuda else t


def random_ids(batch: int, seq: int, vocab: int, seed: int = 0) -> Tensor:
    """(batch, seq) int64 token ids on the CPU, the same for everybody."""
    return torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))
