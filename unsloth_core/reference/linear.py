"""``x W^T + bias + LoRA + add`` over every weight node, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from ..weights import NF4, Adapted, Stacked, Weight
from .nf4 import dequantize


def linear(x_NC: Tensor, w: Weight, bias: Tensor | Any = ABSENT, add: Tensor | Any = ABSENT) -> Tensor:
    """``y_NM = x W^T (+ bias_M) (+ scale (x A^T) B^T on the rows of each adapted part) (+ add_NM)``."""
    base, parts, rows = (w.base, w.parts, w.rows) if isinstance(w, Adapted) else (w, (), ())
    y = x_NC @ _dense(base, x_NC.dtype).T
    for what, value, shape in (("bias", bias, y.shape[-1:]), ("add", add, y.shape)):
        if value is not ABSENT and value.shape != shape:  # no broadcasting
            raise ValueError(f"linear: {what} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        if value is not ABSENT and value.dtype != x_NC.dtype:  # no promotion
            raise ValueError(f"linear: {what} has dtype {value.dtype}, expected {x_NC.dtype} like x")
    if bias is not ABSENT:
        y = y + bias
    if any(part is not ABSENT for part in parts):
        y = y + torch.cat([_update(x_NC, part, m) for part, m in zip(parts, rows, strict=True)], dim=-1)
    return y if add is ABSENT else y + add


def _dense(w: Tensor | NF4 | Stacked, dtype: torch.dtype) -> Tensor:
    if isinstance(w, Stacked):
        return torch.cat([_dense(part, dtype) for part in w.parts])
    return dequantize(w).to(dtype) if isinstance(w, NF4) else w


def _update(x: Tensor, part: Any, rows: int) -> Tensor:
    if part is ABSENT:
        return x.new_zeros((*x.shape[:-1], rows))
    return part.scale * ((x @ part.a.to(x.dtype).T) @ part.b.to(x.dtype).T)
