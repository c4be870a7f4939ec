"""LayerNorm in plain PyTorch: statistics in at least fp32, the output in the dtype of ``x``."""

from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from .dtypes import check_floats


def layer_norm(x: Tensor, w: Any = ABSENT, b: Any = ABSENT, add: Any = ABSENT, *, eps: float = 1e-5) -> Tensor:
    """``(x - mean(x)) / sqrt(var(x) + eps) * w + b (+ add)`` over the last axis, w and b where they are given.

    ``var`` is the biased one, as in ``F.layer_norm``. Raises ValueError where PyTorch would broadcast.
    """
    check_floats("layer_norm", x=x, w=w, b=b)
    for name, p in (("w", w), ("b", b)):
        if p is not ABSENT and p.shape != x.shape[-1:]:
            raise ValueError(f"layer_norm: {name} has shape {tuple(p.shape)}, expected (D,) = {tuple(x.shape[-1:])}")
    if add is not ABSENT and (add.shape != x.shape or add.dtype != x.dtype):
        got = f"{tuple(add.shape)} {add.dtype}"
        raise ValueError(f"layer_norm: add is {got}, expected x's {tuple(x.shape)} {x.dtype}")
    wide = torch.promote_types(x.dtype, torch.float32)
    centred = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if w is not ABSENT:
        y = y * w.to(wide)
    if b is not ABSENT:
        y = y + b.to(wide)
    if add is not ABSENT:
        y = y + add.to(wide)
    return y.to(x.dtype)
