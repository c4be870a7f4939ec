"""Residual add and RMSNorm in plain PyTorch: the sum is rounded to its dtype, then normalised."""

from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from .dtypes import check_floats


def add_rms_norm(
    x: Tensor,
    res: Tensor | Any,
    w: Tensor,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Tensor, Tensor]:
    """``(h, y)``: ``h = x + res`` or x, ``y = h / sqrt(mean(h²) + eps) * (w + offset)`` over the last axis.

    ``"llama"`` rounds the normalised ``h`` to its dtype before the weight, as Llama does; ``"gemma"`` only
    rounds the result. Raises ValueError where PyTorch would broadcast.
    """
    check_floats("add_rms_norm", x=x, w=w)
    if w.shape != x.shape[-1:]:
        raise ValueError(f"add_rms_norm: w has shape {tuple(w.shape)}, expected (D,) = {tuple(x.shape[-1:])}")
    if res is not ABSENT and (res.shape != x.shape or res.dtype != x.dtype):
        got = f"{tuple(res.shape)} {res.dtype}"
        raise ValueError(f"add_rms_norm: res is {got}, expected x's {tuple(x.shape)} {x.dtype}")
    if casting_mode not in ("llama", "gemma"):
        raise ValueError(f"add_rms_norm: casting_mode is {casting_mode!r}, expected one of ('llama', 'gemma')")
    h = x if res is ABSENT else x + res
    wide = torch.promote_types(h.dtype, torch.float32)
    h_hat = h.to(wide) * torch.rsqrt(h.to(wide).square().mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        h_hat = h_hat.to(h.dtype).to(wide)
    return h, (h_hat * (w.to(wide) + offset)).to(h.dtype)
