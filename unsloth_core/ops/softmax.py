"""Softmax over the last axis.

Formula, per row of D numbers, with m = max(x):

    y  = e^(x - m) / Σ e^(x - m)
Backward:
    dx = y ∘ (dy - Σ dy ∘ y)

As in PyTorch a row that is -inf throughout, or has a +inf or a NaN in it, is NaN throughout; -inf beside
anything finite is a 0.
Residuals: y (the output itself).
Dtypes: fp16, bf16 or fp32, the same in and out; everything between is fp32 and rounded once. Backward uses
the rounded y, as PyTorch does. An e^-t errs by about t/2 ulp of fp32.
Bytes moved per element of 2 bytes: forward 4 (exponential, sum and quotient apart: 14), backward 6. For 8192 rows
of 4096 in bf16 at 3.0 TB/s that is a floor of 45 and 67 µs.
Limits: last dimension of stride 1 (a cotangent may have any stride); leading dimensions that two strides can
address; fewer than 2^30 rows. A cotangent that two strides and a column stride cannot address is copied.

How: rows of up to 16384 numbers stay in registers, several rows per program when they are short. Longer ones are
walked twice: first every lane keeps the maximum of its own columns and the sum of exponentials below it, rescaled
once for its neighbours when the maximum rises, and lanes are merged at the end; then, from the end of the row back,
the result is written. Backward walks likewise. The second walk is meant to hit L2, so all warps of a multiprocessor
share one row, what is to be read again stays there longer than what is not, and results do not stay: of 128256
numbers in bf16 132 rows are 34 MB. (Backward reads two of them, 68 MB, and L2 is 50.) Compiled for sm_90 by Triton
3.6.0, in bf16 at widths of 4096 and 8192: 31 and 32 registers forward, 48 and 49 backward (walks: 50 and 57), no
spills, loads and stores of 16 bytes. Where 16 does not divide the width or the distance of rows, they are 2 bytes
wide.

Sources of ideas: online softmax, Milakov & Gimelshein (arXiv 1805.02867).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import cdiv, launch
from ..prepared import prepared
from ..tree import ABSENT
from .language import cast
from .rms_norm import (
    BACKWARD_WIDTH,
    check_row_strides,
    check_rows,
    cotangent_row_strides,
    row_offset,
    whole_rows,
)

LANES = 1024  # threads that walk a row too long for registers, 32 bytes each at a time

# ---------------------------------------------------------------------------- kernels


@triton.jit
def _forward(
    x_ptr, y_ptr, rows, D, inner, x_outer, x_inner, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS whole rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < D)
    x = tl.load(x_ptr + row_offset(row, inner, x_outer, x_inner) + col, inside, other=0.0).to(tl.float32)
    x = tl.where(col < D, x, float("-inf"))
    e = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
    y = e * tl.div_rn(1.0, tl.sum(e, axis=1, keep_dims=True))
    tl.store(y_ptr + row.to(tl.int64) * D + col, cast(y, y_ptr.dtype.element_ty), inside)


@triton.jit
def _tile(tile, LANES: tl.constexpr, VEC: tl.constexpr):
    """Columns of a tile, VEC neighbours a lane."""
    return tile * (LANES * VEC) + tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@triton.jit
def _forward_long(
    x_ptr, y_ptr, D, inner, x_outer, x_inner, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One row, walked twice: maximum and sum by lanes, then, from the end back, the result."""
    row = tl.program_id(0)
    x_ptr += row_offset(row, inner, x_outer, x_inner)
    y_ptr += row.to(tl.int64) * D
    tiles = tl.cdiv(D, LANES * VEC)
    highest = tl.full([LANES], float("-inf"), tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    for tile in range(tiles):
        col = _tile(tile, LANES, VEC)
        x = tl.load(x_ptr + col, col < D, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        raised = tl.maximum(highest, tl.max(x, axis=1))
        level = tl.where(raised == float("-inf"), 0.0, raised)  # -inf - (-inf) is NaN, and e^(-inf - 0) is 0
        sums = sums * tl.exp(highest - level) + tl.sum(tl.exp(x - level[:, None]), axis=1)
        highest = raised
    m = tl.max(highest, axis=0)
    scale = tl.div_rn(1.0, tl.sum(sums * tl.exp(highest - m), axis=0))  # NaN if m is -inf
    for back in range(tiles):
        col = _tile(tiles - 1 - back, LANES, VEC)
        x = tl.load(x_ptr + col, col < D, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
        y = cast(tl.exp(x - m) * scale, y_ptr.dtype.element_ty)
        tl.store(y_ptr + col, y, col < D, eviction_policy="evict_first")


@triton.jit
def _backward(
    y_ptr, dy_ptr, dx_ptr, rows, D, inner, y_outer, y_inner, dy_outer, dy_inner, dy_col,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS whole rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < D)
    y = tl.load(y_ptr + row_offset(row, inner, y_outer, y_inner) + col, inside, other=0.0).to(tl.float32)
    dy_offset = row_offset(row, inner, dy_outer, dy_inner) + col.to(tl.int64) * dy_col
    dy = tl.load(dy_ptr + dy_offset, inside, other=0.0).to(tl.float32)
    dx = y * (dy - tl.sum(dy * y, axis=1, keep_dims=True))
    tl.store(dx_ptr + row.to(tl.int64) * D + col, cast(dx, dx_ptr.dtype.element_ty), inside)


@triton.jit
def _backward_long(
    y_ptr, dy_ptr, dx_ptr, D, inner, y_outer, y_inner, dy_outer, dy_inner, dy_col,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One row, walked twice: Σ dy ∘ y, then, from the end back, the result."""
    row = tl.program_id(0)
    y_ptr += row_offset(row, inner, y_outer, y_inner)
    dy_ptr += row_offset(row, inner, dy_outer, dy_inner)
    dx_ptr += row.to(tl.int64) * D
    tiles = tl.cdiv(D, LANES * VEC)
    products = tl.zeros([LANES, VEC], tl.float32)
    for tile in range(tiles):
        col = _tile(tile, LANES, VEC)
        at = col.to(tl.int64) * dy_col
        y = tl.load(y_ptr + col, col < D, other=0.0, eviction_policy="evict_last").to(tl.float32)
        products += y * tl.load(dy_ptr + at, col < D, other=0.0, eviction_policy="evict_last").to(tl.float32)
    total = tl.sum(tl.sum(products, axis=1), axis=0)
    for back in range(tiles):
        col = _tile(tiles - 1 - back, LANES, VEC)
        at = col.to(tl.int64) * dy_col
        y = tl.load(y_ptr + col, col < D, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dy = tl.load(dy_ptr + at, col < D, other=0.0, eviction_policy="evict_first").to(tl.float32)
        tl.store(dx_ptr + col, cast(y * (dy - total), dx_ptr.dtype.element_ty), col < D, eviction_policy="evict_first")


# ---------------------------------------------------------------------------- op


@prepared
def softmax_fwd(x: Tensor, *, needs: Any) -> tuple[Tensor, tuple[Any]]:
    """x (..., D) -> y (..., D) in its dtype, new and contiguous: ``torch.softmax(x, -1)``.

    Raises ValueError for other shapes, dtypes or strides, NotImplementedError for 2^30 rows or more.
    """
    check_rows("softmax", x)
    inner, (x_rows,) = check_row_strides("softmax", x=x)
    D = x.shape[-1]
    rows = x.numel() // D
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if D <= BACKWARD_WIDTH:
        ROWS, BLOCK, warps = whole_rows(D)
        launch(
            _forward, (cdiv(rows, ROWS),), x, y, rows, D, inner, *x_rows,
            ROWS=ROWS, BLOCK=BLOCK, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        launch(
            _forward_long, (rows,), x, y, D, inner, *x_rows,
            LANES=LANES, VEC=32 // x.element_size(), num_warps=LANES // 32, enable_fp_fusion=True,
        )  # fmt: skip
    return y, (y if needs[0] else ABSENT,)


@prepared
def softmax_bwd(residuals: tuple[Any], dy: Tensor, *, needs: Any) -> tuple[Any]:
    """dy like y, of any strides -> dx, contiguous."""
    if not needs[0]:
        return (ABSENT,)
    (y,) = residuals
    D = y.shape[-1]
    rows = y.numel() // D
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if rows:
        (dy,), inner, (y_rows, dy_rows) = cotangent_row_strides(y, dy)
        if D <= BACKWARD_WIDTH:
            ROWS, BLOCK, warps = whole_rows(D)
            launch(
                _backward, (cdiv(rows, ROWS),), y, dy, dx, rows, D, inner, *y_rows, *dy_rows, dy.stride(-1),
                ROWS=ROWS, BLOCK=BLOCK, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
        else:
            launch(
                _backward_long, (rows,), y, dy, dx, D, inner, *y_rows, *dy_rows, dy.stride(-1),
                LANES=LANES, VEC=32 // y.element_size(), num_warps=LANES // 32, enable_fp_fusion=True,
            )  # fmt: skip
    return (dx,)


softmax = custom_vjp(softmax_fwd, softmax_bwd)


def cost(rows: int, D: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Forward: x read, y written. Backward: y and dy read, dx written."""
    n = rows * D
    return Cost(bytes=(3 if backward else 2) * n * itemsize, flops=(4 if backward else 5) * n)
