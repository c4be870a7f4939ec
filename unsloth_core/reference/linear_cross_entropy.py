"""Sum of the cross-entropies of ``x @ wᵀ`` in plain PyTorch, a chunk of tokens at a time.

The logits of a chunk are computed in x's dtype. Chunks bound the temporaries (softmax and its gradient in fp32);
smaller ones would make the products slower, and those are nearly all of the time.
"""

from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from ..weights import NF4, Head
from .cross_entropy import check_options, check_targets, cross_entropy
from .dtypes import check_floats
from .nf4 import dequantize

CHUNK_LOGITS = 2**25


def check_linear(op: str, x: Tensor, w: Tensor, targets: Tensor, rows: Any, chunk_logits: int | None) -> None:
    """Raises ValueError unless x (N, D), w (V, D), targets (M,) and rows (M,), or ABSENT where M = N, fit together."""
    for name, t, letters in (("x", x, "(N, D)"), ("w", w, "(V, D)")):
        if t.ndim != 2:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {letters}")
    if w.shape[0] == 0 or w.shape[1] != x.shape[1] or x.shape[1] == 0:
        raise ValueError(f"{op}: w has shape {tuple(w.shape)}, expected (V, D) with V > 0 and D = {x.shape[1]} > 0")
    if rows is ABSENT:
        check_targets(op, targets, "N", x.shape[0])
    else:
        if targets.ndim != 1:
            raise ValueError(f"{op}: targets has shape {tuple(targets.shape)}, expected (M,)")
        check_targets(op, targets, "M", targets.shape[0])
        if rows.shape != targets.shape:
            raise ValueError(f"{op}: rows has shape {tuple(rows.shape)}, expected (M,) = ({targets.shape[0]},)")
        if rows.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{op}: rows has dtype {rows.dtype}, expected torch.int64 or torch.int32")
    if w.dtype != x.dtype:
        raise ValueError(f"{op}: w has dtype {w.dtype}, expected that of x, {x.dtype}")
    if chunk_logits is not None and not chunk_logits >= 1:
        raise ValueError(f"{op}: chunk_logits is {chunk_logits}, expected a positive number or None")
    check_floats(op, x=x)


def target_rows(x_ND: Tensor, targets_M: Tensor, rows_M: Any, V: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """``(x (M, D), targets (M,))`` of the rows that carry a target; a row that does not exist has an impossible one."""
    if rows_M is ABSENT:
        return x_ND, targets_M
    N, rows = x_ND.shape[0], rows_M.long()
    x = torch.cat([x_ND, x_ND.new_zeros(1, x_ND.shape[1])]).index_select(0, rows.clamp(0, N))  # row N: padding
    targets = torch.where(rows == N, ignore_index, targets_M)
    return x, torch.where((rows < 0) | (rows > N), V, targets)


def linear_cross_entropy(
    x_ND: Tensor,
    w_VD: Head,
    targets_M: Tensor,
    rows_M: Any = ABSENT,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_logits: int | None = None,
) -> Tensor:
    """The sum of the losses as a 0-d tensor, fp32 (float64 for float64 inputs). ``w`` is a Tensor or NF4.

    An entry of ``rows_M`` equal to N is padding. Raises ValueError where PyTorch would say less or broadcast.
    """
    if isinstance(w_VD, NF4):
        w_VD = dequantize(w_VD)
    check_linear("linear_cross_entropy", x_ND, w_VD, targets_M, rows_M, chunk_logits)
    check_options("linear_cross_entropy", label_smoothing, z_loss, softcap)
    V = w_VD.shape[0]
    x, targets = target_rows(x_ND, targets_M, rows_M, V, ignore_index)
    total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    count = max(1, (chunk_logits or CHUNK_LOGITS) // V)
    for x_part, targets_part in zip(x.split(count), targets.split(count), strict=True):
        losses = cross_entropy(
            x_part @ w_VD.t(),
            targets_part,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
        )
        total = total + losses.sum()
    return total
