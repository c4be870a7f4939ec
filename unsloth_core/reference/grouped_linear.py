"""Products of sorted rows with their experts' weights, in plain PyTorch: every expert multiplies every row."""

from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from ..weights import NF4, Adapted, Stacked, Weight
from .dtypes import check_floats
from .nf4 import dequantize


def grouped_linear(
    x: Tensor,
    w: Weight,
    plan: tuple[Tensor, Tensor, Tensor],
    gates_NT: Tensor | Any = ABSENT,
    add_NM: Tensor | Any = ABSENT,
) -> Tensor:
    """Gather (``x_ND -> y_PM``) without gates, combine (``x_PC -> y_NM``) with them; see ``ops/grouped_linear.py``.

    Sums are made in (at least) fp32 and rounded once, in a combine too.
    """
    check_floats("grouped_linear", x=x)
    order_P, positions_NT, offsets = plan
    if positions_NT.ndim != 2 or order_P.shape != (positions_NT.numel(),) or offsets.ndim != 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in plan)
        raise ValueError(f"grouped_linear: plan has shapes {shapes}, expected (N·T,), (N, T) with T > 0 and (E+1,)")
    for name, t in zip(("order", "positions", "offsets"), plan, strict=True):
        if t.dtype != torch.int32:
            got = f"{t.dtype} with strides {t.stride()}"
            raise ValueError(f"grouped_linear: plan's {name} is {got}, expected contiguous int32")
    (N, T), E = positions_NT.shape, offsets.shape[0] - 1
    wide = torch.promote_types(x.dtype, torch.float32)
    expert_P = torch.searchsorted(
        offsets[1:], torch.arange(N * T, dtype=offsets.dtype, device=x.device), right=True
    ).unsqueeze(1)
    base, parts, rows = (w.base, w.parts, w.rows) if isinstance(w, Adapted) else (w, (), ())
    if isinstance(w, Adapted) and isinstance(w.key, Tensor):
        raise NotImplementedError("grouped_linear: w.key is given, but adapters of experts have no dropout")
    if not isinstance(base, Stacked) and (len(base.shape) != 3 or base.shape[0] != E):
        raise ValueError(f"grouped_linear: w has shape {tuple(base.shape)}, expected (E, M, C) with E = {E}")
    base_EMC = _dense(base, E, x.dtype).to(wide)
    rows_of_x, letters = (N, "N") if gates_NT is ABSENT else (N * T, "P = N·T")
    if x.shape != (rows_of_x, base_EMC.shape[2]):
        wanted = f"({letters}, C) = ({rows_of_x}, {base_EMC.shape[2]})"
        raise ValueError(f"grouped_linear: x has shape {tuple(x.shape)}, expected {wanted}")
    x_PC = x.to(wide) if gates_NT is not ABSENT else x.to(wide)[order_P.to(torch.int64) // T]
    y_PM = x_PC.new_zeros(N * T, base_EMC.shape[1])
    for e in range(E):
        y = x_PC @ base_EMC[e].T
        if any(part is not ABSENT for part in parts):
            y = y + torch.cat([_update(x_PC, part, e, m, x.dtype) for part, m in zip(parts, rows, strict=True)], dim=-1)
        y_PM = torch.where(expert_P == e, y, y_PM)
    if gates_NT is ABSENT:
        return y_PM.to(x.dtype)
    if gates_NT.shape != (N, T):  # no broadcasting
        raise ValueError(f"grouped_linear: gates has shape {tuple(gates_NT.shape)}, expected {(N, T)}")
    y_NM = (gates_NT.to(wide).unsqueeze(2) * y_PM[positions_NT.to(torch.int64)]).sum(1)
    if add_NM is not ABSENT:
        if add_NM.shape != y_NM.shape:
            raise ValueError(f"grouped_linear: add has shape {tuple(add_NM.shape)}, expected {tuple(y_NM.shape)}")
        y_NM = y_NM + add_NM.to(wide)
    return y_NM.to(x.dtype)


def _dense(w: Tensor | NF4 | Stacked, experts: int, dtype: torch.dtype) -> Tensor:
    """(E, M, C) of any base."""
    if isinstance(w, Stacked):
        matrix = torch.cat([dequantize(part) if isinstance(part, NF4) else part for part in w.parts])
        return matrix.to(dtype).view(experts, -1, matrix.shape[-1])
    if isinstance(w, NF4):
        return dequantize(w).to(dtype)
    if w.dtype != dtype:  # no promotion
        raise ValueError(f"grouped_linear: w has dtype {w.dtype}, expected {dtype}")
    return w


def _update(x: Tensor, part: Any, e: int, rows: int, dtype: torch.dtype) -> Tensor:
    """The adapter of expert e, rounded to the dtype of the product like every operand."""
    if part is ABSENT:
        return x.new_zeros(x.shape[0], rows)
    a, b = (t[e].to(dtype).to(x.dtype) for t in (part.a, part.b))
    return part.scale * ((x @ a.T) @ b.T)
