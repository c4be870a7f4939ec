"""RMSNorm in plain PyTorch: statistics in at least fp32, the output in the dtype of ``x``."""

from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from .dtypes import check_floats


def rms_norm(
    x: Tensor,
    w: Tensor,
    add: Any = ABSENT,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> Tensor:
    """``x / sqrt(mean(x²) + eps) * (w + offset) (+ add)`` over the last axis.

    ``"llama"`` rounds the normalised ``x`` to its dtype before the weight, as Llama does; ``"gemma"`` only
    rounds the result. Raises ValueError where PyTorch would broadcast.
    """
    check_floats("rms_norm", x=x, w=w)
    if w.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: w has shape {tuple(w.shape)}, expected (D,) = {tuple(x.shape[-1:])}")
    if add is not ABSENT and (add.shape != x.shape or add.dtype != x.dtype):
        got = f"{tuple(add.shape)} {add.dtype}"
        raise ValueError(f"rms_norm: add is {got}, expected x's {tuple(x.shape)} {x.dtype}")
    if casting_mode not in ("llama", "gemma"):
        raise ValueError(f"rms_norm: casting_mode is {casting_mode!r}, expected one of ('llama', 'gemma')")
    wide = torch.promote_types(x.dtype, torch.float32)
    x_hat = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        x_hat = x_hat.to(x.dtype).to(wide)
    y = x_hat * (w.to(wide) + offset)
    if add is not ABSENT:
        y = y + add.to(wide)
    return y.to(x.dtype)
