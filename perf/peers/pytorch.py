"""Eager PyTorch as its users write it, in the dtype of the model: what a fused kernel has to beat."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

DISTRIBUTION = ""  # rows name the version of PyTorch anyway


def add_rms_norm(x: Tensor, res: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Two calls."""
    h = x + res
    return h, F.rms_norm(h, w.shape, w, eps=1e-6)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The half-split rotation of transformers' models."""
    cos, sin = (torch.cat([t, t], -1).to(q.dtype)[:, None] for t in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return turned(q), turned(k)


def qk_norm_rope(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Two norms, then the rotation."""
    return rope(F.rms_norm(q, wq.shape, wq, eps=1e-6), F.rms_norm(k, wk.shape, wk, eps=1e-6), cos, sin)


def glu(gate_up: Tensor) -> Tensor:
    """Activation, then product."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def linear_lora(x: Tensor, w: Any) -> Tensor:
    """One product and two for each adapter, as PEFT has them; the adapters are in the dtype of the model."""
    low = [F.linear(x, part.a.to(x.dtype)) for part in w.parts]
    updates = [part.scale * F.linear(u, part.b.to(x.dtype)) for u, part in zip(low, w.parts, strict=True)]
    return F.linear(x, w.base) + (updates[0] if len(updates) == 1 else torch.cat(updates, -1))


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """All logits at once, in fp32 for the loss."""
    return F.cross_entropy(F.linear(x, w).float(), targets, reduction="sum")


def linear_logprob(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """All logits at once, in fp32."""
    return -F.cross_entropy(F.linear(x, w).float(), targets, reduction="none")


def softmax(x: Tensor) -> Tensor:
    """PyTorch's own."""
    return torch.softmax(x, -1)


PEERS = {
    "add_rms_norm": add_rms_norm,
    "rope": rope,
    "qk_norm_rope": qk_norm_rope,
    "glu": glu,
    "linear": F.linear,
    "linear_lora": linear_lora,
    "linear_lora_qkv": linear_lora,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_cross_entropy_low_memory": linear_cross_entropy,
    "linear_logprob": linear_logprob,
    "softmax": softmax,
    "softmax_wide": softmax,
}
