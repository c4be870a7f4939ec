"""LayerNorm, with or without weight and bias, optionally added to a residual stream.

Formula, per row of D channels, with μ = mean(x), rstd = (mean((x - μ)²) + eps)^-½ and x̂ = (x - μ)·rstd:

    y  = x̂ ∘ w + b (+ add)                     w = 1 and b = 0 where they are absent
Backward, with m = dy ∘ w:
    dx = rstd · (m - mean(m) - x̂ · mean(m ∘ x̂))
    dw = Σ_rows dy ∘ x̂          db = Σ_rows dy          dadd = dy

Residuals: x, w, b (arguments; of b only the dtype is used), μ and rstd in one fp32 tensor, 8 bytes per row. Without a
gradient for x or w only b, and nothing if only ``add`` wants one.
Dtypes: x fp16, bf16 or fp32; y, dx and ``add`` in x's dtype; w and b in any of the three, dw and db in theirs.
Statistics, sums and products are fp32, and y is rounded once.
Bytes moved per element of 2 bytes: forward 4 (6 with ``add``; as two ops 10), backward 6; and 8 per row. For
8192 rows of 4096 in bf16 at 3.0 TB/s that is a floor of 45 and 67 µs.
Limits: those of :mod:`.rms_norm`, whose tiles, partial rows and addressing serve here too.

How: the variance is the mean of (x - μ)² and never mean(x²) - μ², which cancels where a row lies far from zero.
A row of up to 16384 channels stays in registers and is summed twice. A longer one is walked once for its
statistics: every lane keeps the running mean of its own columns and the squares of their distances from it
(Welford), and lanes are merged at the end (Chan). Compiled for sm_90 by Triton 3.6.0, in bf16 at widths of 4096
and 8192: 48 and 80 registers forward, 116 and 117 backward, no spills, loads and stores of 16 bytes.

Sources of ideas: Layer Normalization, Ba, Kiros & Hinton (arXiv 1607.06450); Welford 1962; Chan, Golub & LeVeque
1979; the sums over rows, see :mod:`.rms_norm`.
"""

import functools
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
    FUSED_WIDTH,
    check_channels,
    check_row_strides,
    check_rows,
    column_tile,
    cotangent_row_strides,
    partial_rows,
    row_offset,
    row_strides,
    stages,
    sum_partials,
    whole_rows,
)

_WIDTH = BACKWARD_WIDTH  # channels that registers hold, in forward too: beyond, x and x - μ would spill
_WALK = 4096  # block in which longer rows are walked

# ---------------------------------------------------------------------------- kernels


@triton.jit
def _channels(p_ptr, col, D, absent: tl.constexpr):
    """A weight or bias at these columns, in fp32; ``absent`` if there is none."""
    if p_ptr is not None:
        return tl.load(p_ptr + col, col < D, other=0.0).to(tl.float32)
    else:
        return tl.full(col.shape, absent, tl.float32)


@triton.jit
def _mean(total, D):
    """Rounded once, as the plain quotient is not: an error of μ moves the whole row."""
    return tl.div_rn(total, tl.zeros_like(total) + D)


@triton.jit
def _forward(
    x_ptr, w_ptr, b_ptr, add_ptr, y_ptr, mean_ptr, rstd_ptr,
    rows, D, inner, x_outer, x_inner, add_outer, add_inner,
    eps: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS whole rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < D)
    x = tl.load(x_ptr + row_offset(row, inner, x_outer, x_inner) + col, inside, other=0.0).to(tl.float32)
    mean = _mean(tl.sum(x, axis=1, keep_dims=True), D)
    centred = tl.where(col < D, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / D + eps)
    w = _channels(w_ptr, col, D, 1.0)  # not sooner: from caches, and registers are what limits the rows in flight
    b = _channels(b_ptr, col, D, 0.0)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean, row < rows)
        tl.store(rstd_ptr + row, rstd, row < rows)
    y = centred * rstd * w + b
    if add_ptr is not None:
        add = tl.load(add_ptr + row_offset(row, inner, add_outer, add_inner) + col, inside, other=0.0)
        y += add.to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * D + col, cast(y, y_ptr.dtype.element_ty), inside)


@triton.jit
def _forward_long(
    x_ptr, w_ptr, b_ptr, add_ptr, y_ptr, mean_ptr, rstd_ptr,
    D, inner, x_outer, x_inner, add_outer, add_inner, eps: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, walked twice: mean and variance by lanes, then the result."""
    row = tl.program_id(0)
    x_ptr += row_offset(row, inner, x_outer, x_inner)
    means = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, col < D, other=0.0).to(tl.float32)
        distance = tl.where(col < D, x - means, 0.0)
        means += distance * (1.0 / (start // BLOCK + 1))
        squares += distance * (x - means)
    counts = tl.cdiv(D - tl.arange(0, BLOCK), BLOCK).to(tl.float32)  # columns of each lane
    mean = _mean(tl.sum(means * counts, axis=0), D)
    apart = means - mean
    rstd = tl.rsqrt(tl.sum(squares + counts * apart * apart, axis=0) / D + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, col < D, other=0.0).to(tl.float32)
        y = (x - mean) * rstd * _channels(w_ptr, col, D, 1.0) + _channels(b_ptr, col, D, 0.0)
        if add_ptr is not None:
            add = tl.load(add_ptr + row_offset(row, inner, add_outer, add_inner) + col, col < D, other=0.0)
            y += add.to(tl.float32)
        tl.store(y_ptr + row.to(tl.int64) * D + col, cast(y, y_ptr.dtype.element_ty), col < D)


@triton.jit
def _backward(
    x_ptr, w_ptr, mean_ptr, rstd_ptr, dy_ptr, dx_ptr, dw_partial_ptr, db_partial_ptr,
    rows, D, inner, x_outer, x_inner, dy_outer, dy_inner, dy_col,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of whole rows, every num_programs-th one; dx of each, and of all of them one partial row of dw and db."""
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK)[None, :]
    w = _channels(w_ptr, col, D, 1.0)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (col < D)
        x = tl.load(x_ptr + row_offset(row, inner, x_outer, x_inner) + col, inside, other=0.0).to(tl.float32)
        dy_offset = row_offset(row, inner, dy_outer, dy_inner) + col.to(tl.int64) * dy_col
        dy = tl.load(dy_ptr + dy_offset, inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, row < rows, other=0.0)
        x_hat = (x - mean) * rstd
        m = dy * w
        along = tl.sum(m * x_hat, axis=1, keep_dims=True) / D
        dx = rstd * (m - tl.sum(m, axis=1, keep_dims=True) / D - x_hat * along)
        tl.store(dx_ptr + row.to(tl.int64) * D + col, cast(dx, dx_ptr.dtype.element_ty), inside)
        if dw_partial_ptr is not None:
            dw += dy * x_hat
        if db_partial_ptr is not None:
            db += dy
    if dw_partial_ptr is not None:
        dw = tl.sum(dw, axis=0, keep_dims=True)
        tl.store(dw_partial_ptr + program.to(tl.int64) * D + col, cast(dw, dw_partial_ptr.dtype.element_ty), col < D)
    if db_partial_ptr is not None:
        db = tl.sum(db, axis=0, keep_dims=True)
        tl.store(db_partial_ptr + program.to(tl.int64) * D + col, cast(db, db_partial_ptr.dtype.element_ty), col < D)


@triton.jit
def _backward_long(
    x_ptr, w_ptr, mean_ptr, rstd_ptr, dy_ptr, dx_ptr,
    D, inner, x_outer, x_inner, dy_outer, dy_inner, dy_col, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of one row, walked twice: both means, then the result. dw and db are :func:`_weight_partials`'s."""
    row = tl.program_id(0)
    x_ptr += row_offset(row, inner, x_outer, x_inner)
    dy_ptr += row_offset(row, inner, dy_outer, dy_inner)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    sums = tl.zeros([BLOCK], tl.float32)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, col < D, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + col.to(tl.int64) * dy_col, col < D, other=0.0).to(tl.float32)
        m = dy * _channels(w_ptr, col, D, 1.0)
        sums += m
        products += m * ((x - mean) * rstd)
    level = tl.sum(sums, axis=0) / D
    along = tl.sum(products, axis=0) / D
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, col < D, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + col.to(tl.int64) * dy_col, col < D, other=0.0).to(tl.float32)
        m = dy * _channels(w_ptr, col, D, 1.0)
        dx = rstd * (m - level - (x - mean) * rstd * along)
        tl.store(dx_ptr + row.to(tl.int64) * D + col, cast(dx, dx_ptr.dtype.element_ty), col < D)


@triton.jit
def _weight_partials(
    x_ptr, mean_ptr, rstd_ptr, dy_ptr, dw_partial_ptr, db_partial_ptr,
    rows, D, inner, x_outer, x_inner, dy_outer, dy_inner, dy_col,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial rows of dw and db alone, a block of columns per program: no row is summed, so any D will do."""
    program = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (col < D)
        dy_offset = row_offset(row, inner, dy_outer, dy_inner) + col.to(tl.int64) * dy_col
        dy = tl.load(dy_ptr + dy_offset, inside, other=0.0).to(tl.float32)
        if dw_partial_ptr is not None:
            x = tl.load(x_ptr + row_offset(row, inner, x_outer, x_inner) + col, inside, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + row, row < rows, other=0.0)
            dw += dy * ((x - mean) * tl.load(rstd_ptr + row, row < rows, other=0.0))
        if db_partial_ptr is not None:
            db += dy
    if dw_partial_ptr is not None:
        dw = tl.sum(dw, axis=0, keep_dims=True)
        tl.store(dw_partial_ptr + program.to(tl.int64) * D + col, cast(dw, dw_partial_ptr.dtype.element_ty), col < D)
    if db_partial_ptr is not None:
        db = tl.sum(db, axis=0, keep_dims=True)
        tl.store(db_partial_ptr + program.to(tl.int64) * D + col, cast(db, db_partial_ptr.dtype.element_ty), col < D)


@functools.cache
def forward_tile(D: int) -> tuple[int, int, int]:
    """(rows per program, block of columns, warps) of forward: from 8192 channels half of what rms_norm takes."""
    rows, block, warps = whole_rows(D)
    return rows, block, min(warps, max(8, block // 1024))


def _partials(
    x: Tensor, rows: int, ROWS: int, programs_per_sm: int, dw: Any, db: Any
) -> tuple[int, tuple[Tensor | None, ...]]:
    """How many programs leave partial rows, and where: one tensor for dw and one for db, None where not needed."""
    wanted = [None if out is ABSENT else partial_rows(x, rows, ROWS, programs_per_sm, out) for out in (dw, db)]
    return next(partial.shape[0] for partial in wanted if partial is not None), tuple(wanted)


# ---------------------------------------------------------------------------- op


@prepared
def layer_norm_fwd(
    x: Tensor,
    w: Any = ABSENT,
    b: Any = ABSENT,
    add: Any = ABSENT,
    *,
    needs: Any,
    eps: float = 1e-5,
) -> tuple[Tensor, tuple[Any, ...]]:
    """x (..., D), w (D,), b (D,) and add (..., D) or ABSENT -> y (..., D) in x's dtype, new and contiguous.

    ``F.layer_norm(x, (D,), w, b, eps) + add``, rounded once. Raises ValueError for other shapes, dtypes, devices or
    strides, NotImplementedError for 2^30 rows or more.
    """
    check_rows("layer_norm", x, "add", add)
    for name, p in (("w", w), ("b", b)):
        if p is not ABSENT:
            check_channels("layer_norm", name, p, x)
    if add is ABSENT:
        inner, (x_rows,) = check_row_strides("layer_norm", x=x)
        add_rows = (0, 0)
    else:
        inner, (x_rows, add_rows) = check_row_strides("layer_norm", x=x, add=add)
    D = x.shape[-1]
    rows = x.numel() // D
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    stats = mean = rstd = None
    if needs[0] or needs[1]:
        stats = torch.empty((2, rows), dtype=torch.float32, device=x.device)
        mean, rstd = stats.unbind()
    w_, b_, add_ = (None if p is ABSENT else p for p in (w, b, add))
    if D <= _WIDTH:
        ROWS, BLOCK, warps = forward_tile(D)
        launch(
            _forward, (cdiv(rows, ROWS),), x, w_, b_, add_, y, mean, rstd, rows, D, inner, *x_rows, *add_rows,
            eps=eps, ROWS=ROWS, BLOCK=BLOCK, num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        launch(
            _forward_long, (rows,), x, w_, b_, add_, y, mean, rstd, D, inner, *x_rows, *add_rows,
            eps=eps, BLOCK=_WALK, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    kept = (ABSENT, ABSENT, ABSENT) if stats is None else (x, w, stats)
    return y, (*kept, b if needs[2] else ABSENT)


@prepared
def layer_norm_bwd(
    residuals: tuple[Any, ...], dy: Tensor, *, needs: Any, eps: float = 1e-5
) -> tuple[Any, Any, Any, Any]:
    """dy like y, of any strides -> (dx, dw, db, dadd); dadd is dy itself."""
    x, w, stats, b = residuals
    needs_x, needs_w, needs_b, needs_add = needs
    dadd = dy if needs_add else ABSENT
    D = dy.shape[-1]
    rows = dy.numel() // D
    dx, dw, db = (
        torch.empty(p.shape, dtype=p.dtype, device=p.device) if need else ABSENT
        for p, need in ((x, needs_x), (w, needs_w), (b, needs_b))
    )
    if rows == 0:
        return dx, dw.zero_() if needs_w else ABSENT, db.zero_() if needs_b else ABSENT, dadd
    if x is ABSENT:  # db alone reads no x
        x = dy = dy if row_strides(dy) is not None else dy.contiguous()
    (dy,), inner, (x_rows, dy_rows) = cotangent_row_strides(x, dy)
    w = None if w is ABSENT else w
    mean, rstd = (None, None) if stats is ABSENT else stats.unbind()
    fused = needs_x and (needs_w or needs_b) and D <= FUSED_WIDTH
    programs, partials = 0, (None, None)
    if fused:
        ROWS, BLOCK, warps = whole_rows(D)
        programs, partials = _partials(x, rows, ROWS, 1, dw, db)
        launch(
            _backward, (programs,), x, w, mean, rstd, dy, dx, *partials,
            rows, D, inner, *x_rows, *dy_rows, dy.stride(-1), ROWS=ROWS, BLOCK=BLOCK,
            STAGES=stages(ROWS * BLOCK * (x.element_size() + dy.element_size()), x.device),
            num_warps=max(8, warps), enable_fp_fusion=True,
        )  # fmt: skip
    elif needs_w or needs_b:
        ROWS, BLOCK = column_tile(D, narrowest=128)
        columns = cdiv(D, BLOCK)
        programs, partials = _partials(x, rows, ROWS, cdiv(8, columns), dw, db)
        launch(
            _weight_partials, (columns, programs), x, mean, rstd, dy, *partials,
            rows, D, inner, *x_rows, *dy_rows, dy.stride(-1),
            ROWS=ROWS, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    for partial, out in zip(partials, (dw, db)):
        if partial is not None and programs > 1:
            sum_partials(partial, out)
    if needs_x and not fused and D <= _WIDTH:
        ROWS, BLOCK, warps = whole_rows(D)
        launch(
            _backward, (cdiv(rows, ROWS),), x, w, mean, rstd, dy, dx, None, None,
            rows, D, inner, *x_rows, *dy_rows, dy.stride(-1), ROWS=ROWS, BLOCK=BLOCK, STAGES=1,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    elif needs_x and not fused:
        launch(
            _backward_long, (rows,), x, w, mean, rstd, dy, dx, D, inner, *x_rows, *dy_rows, dy.stride(-1),
            BLOCK=_WALK, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, dw, db, dadd


layer_norm = custom_vjp(layer_norm_fwd, layer_norm_bwd)


def cost(rows: int, D: int, itemsize: int, *, add: bool = False, backward: bool = False) -> Cost:
    """With weight and bias. Forward: x (and ``add``) read, y, μ and rstd written. Backward, with dw and db: x and dy
    read, dx written."""
    n = rows * D
    if backward:
        return Cost(bytes=3 * n * itemsize + 8 * rows + 3 * D * itemsize, flops=14 * n)
    return Cost(bytes=(3 if add else 2) * n * itemsize + 8 * rows + 2 * D * itemsize, flops=(8 if add else 7) * n)
