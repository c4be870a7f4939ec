"""``x W^T + bias + LoRA + add`` over every weight node, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from ..weights import NF4, Adapted, Stacked, Weight
from .dropout import dropout
from .dtypes import check_floats
from .nf4 import dequantize


def linear(x_NC: Tensor, w: Weight, bias: Tensor | Any = ABSENT, add: Tensor | Any = ABSENT) -> Tensor:
    """``y_NM = x W^T (+ bias_M) (+ scale (x A^T) B^T on the rows of each adapted part) (+ add_NM)``.

    The sum is made in (at least) fp32 and rounded once. Rounded to bf16 first, ``x W^T`` swallows the update of a young
    adapter, which is smaller than half a unit of it, and training starts late. With keys, each adapter's input
    is dropped out, with its own.
    """
    check_floats("linear", x=x_NC)
    _check(x_NC, w)
    base, parts, rows = (w.base, w.parts, w.rows) if isinstance(w, Adapted) else (w, (), ())
    wide = torch.promote_types(x_NC.dtype, torch.float32)
    x = x_NC.to(wide)
    y = x @ _dense(base, x_NC.dtype).to(wide).T
    for what, value, shape in (("bias", bias, y.shape[-1:]), ("add", add, y.shape)):
        if value is not ABSENT and value.shape != shape:  # no broadcasting
            raise ValueError(f"linear: {what} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        if value is not ABSENT and value.dtype != x_NC.dtype:  # no promotion
            raise ValueError(f"linear: {what} has dtype {value.dtype}, expected {x_NC.dtype} like x")
    if bias is not ABSENT:
        y = y + bias.to(wide)
    if isinstance(w, Adapted) and any(part is not ABSENT for part in parts):
        inputs = [x for _ in parts]
        if isinstance(w.key, Tensor):
            inputs = [dropout(x_NC, key, p=w.dropout).to(wide) for key in w.key.unbind()]
        updates = [_update(x_i, part, m, x_NC.dtype) for x_i, part, m in zip(inputs, parts, rows, strict=True)]
        y = y + torch.cat(updates, dim=-1)
    return (y if add is ABSENT else y + add.to(wide)).to(x_NC.dtype)


def _check(x: Tensor, w: Weight) -> None:
    """Raises ValueError where PyTorch would broadcast or promote, or speak for itself."""
    base = w.base if isinstance(w, Adapted) else w
    stack = base.parts if isinstance(base, Stacked) else (base,)
    for part in stack:
        if len(part.shape) != 2 or part.shape[1] != stack[0].shape[-1]:
            expected = f"(M, {stack[0].shape[-1]})" if isinstance(base, Stacked) else "(M, C)"
            raise ValueError(f"linear: w has shape {tuple(part.shape)}, expected {expected}")
        if isinstance(part, Tensor) and part.dtype != x.dtype:
            raise ValueError(f"linear: w has dtype {part.dtype}, expected {x.dtype} like x")
    m, c = sum(part.shape[0] for part in stack), stack[0].shape[1]
    if x.ndim == 0 or x.shape[-1] != c:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, expected (..., C) with C = {c}")
    if not isinstance(w, Adapted):
        return
    if len(w.parts) != len(w.rows) or sum(w.rows) != m:
        count = len(w.parts)
        raise ValueError(f"linear: w.rows is {w.rows} for {count} parts, expected {count} numbers with sum {m}")
    for i, (part, m_i) in enumerate(zip(w.parts, w.rows, strict=True)):
        if part is not ABSENT:
            for leaf, t, shape in (("a", part.a, (part.a.shape[0], c)), ("b", part.b, (m_i, part.a.shape[0]))):
                if t.shape != shape:
                    got = f"w.parts[{i}].{leaf} has shape {tuple(t.shape)}"
                    raise ValueError(f"linear: {got}, expected {tuple(shape)}")


def _dense(w: Tensor | NF4 | Stacked, dtype: torch.dtype) -> Tensor:
    if isinstance(w, Stacked):
        return torch.cat([_dense(part, dtype) for part in w.parts])
    return dequantize(w).to(dtype) if isinstance(w, NF4) else w


def _update(x: Tensor, part: Any, rows: int, dtype: torch.dtype) -> Tensor:
    """The adapter is rounded to the dtype of the product, like every operand; what comes of it is not."""
    if part is ABSENT:
        return x.new_zeros((*x.shape[:-1], rows))
    a, b = (t.to(dtype).to(x.dtype) for t in (part.a, part.b))
    return part.scale * ((x @ a.T) @ b.T)
