"""Residual add and RMSNorm in one pass: the residual stream and its normalised form.

Formula, per row of D channels, with ĥ = h·rstd and rstd = (mean(h²) + eps)^-½:

    h = x + res, rounded once to their dtype          y = ĥ ∘ (w + offset)          offset is 1 for Gemma
Backward, for cotangents dh and dy, with m = dy ∘ (w + offset):
    dx = dres = dh + rstd · (m - ĥ · mean(m ∘ ĥ))          dw = Σ_rows dy ∘ ĥ

Without ``res`` h is x itself: the stream passes through, so that what else becomes of it gives its gradient back here,
where it joins dx in the pass that makes it. As rms_norm beside a stream, autograd adds the two: 6 bytes more.

Residuals: h (an output, or the argument x), w (an argument) and rstd, fp32, 4 bytes per row. Neither x nor res is kept.
Dtypes: x and res alike, fp16, bf16 or fp32, and so are h, y and their gradients; w in any of the three, dw in
w's. The statistics are those of the rounded h, as two separate ops would have it; ``casting_mode`` is that of
:mod:`.rms_norm`.
Bytes moved per element of 2 bytes: forward 8 (as two ops 10), backward 8 with both cotangents (two ops 12).
Limits: those of :mod:`.rms_norm`. Its backward kernels serve here too: dh joins dx before the one rounding.
dx and dres are one tensor.

Source of the idea: the fused add and norm of vLLM and Liger Kernel.
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
    check_norm,
    check_row_strides,
    in_registers,
    norm_backward,
    norm_forward,
    row_offset,
    scaled,
    whole_rows,
)

_WALK = 4096  # block in which rows too long for registers are walked

# ---------------------------------------------------------------------------- kernels


@triton.jit
def _forward(
    x_ptr, res_ptr, w_ptr, h_ptr, y_ptr, rstd_ptr,
    rows, D, inner, x_outer, x_inner, res_outer, res_inner,
    eps: tl.constexpr, offset: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS whole rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < D)
    x_ptr += row_offset(row, inner, x_outer, x_inner)
    x = tl.load(x_ptr + col, inside, other=0.0).to(tl.float32)
    res_ptr += row_offset(row, inner, res_outer, res_inner)
    res = tl.load(res_ptr + col, inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, col < D, other=0.0).to(tl.float32)
    h_rounded = cast(x + res, h_ptr.dtype.element_ty)
    out = row.to(tl.int64) * D + col
    tl.store(h_ptr + out, h_rounded, inside)
    h = h_rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / D + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, row < rows)
    y = scaled(h, rstd, w, offset, h_ptr.dtype.element_ty, ROUND)
    tl.store(y_ptr + out, cast(y, y_ptr.dtype.element_ty), inside)


@triton.jit
def _forward_long(
    x_ptr, res_ptr, w_ptr, h_ptr, y_ptr, rstd_ptr,
    D, inner, x_outer, x_inner, res_outer, res_inner,
    eps: tl.constexpr, offset: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, walked twice; the second walk adds again rather than read what other threads just wrote."""
    row = tl.program_id(0)
    x_ptr += row_offset(row, inner, x_outer, x_inner)
    res_ptr += row_offset(row, inner, res_outer, res_inner)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, col < D, other=0.0).to(tl.float32)
        res = tl.load(res_ptr + col, col < D, other=0.0).to(tl.float32)
        h = cast(x + res, h_ptr.dtype.element_ty).to(tl.float32)
        squares += h * h
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, col < D, other=0.0).to(tl.float32)
        res = tl.load(res_ptr + col, col < D, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + col, col < D, other=0.0).to(tl.float32)
        h_rounded = cast(x + res, h_ptr.dtype.element_ty)
        out = row.to(tl.int64) * D + col
        tl.store(h_ptr + out, h_rounded, col < D)
        y = scaled(h_rounded.to(tl.float32), rstd, w, offset, h_ptr.dtype.element_ty, ROUND)
        tl.store(y_ptr + out, cast(y, y_ptr.dtype.element_ty), col < D)


# ---------------------------------------------------------------------------- op


@prepared
def add_rms_norm_fwd(
    x: Tensor,
    res: Tensor | Any,
    w: Tensor,
    *,
    needs: Any,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[tuple[Tensor, Tensor], tuple[Any, ...]]:
    """x (..., D), res (..., D) or ABSENT, w (D,) -> (h, y), both (..., D) in x's dtype, new and contiguous; without res
    h is x.

    ``casting_mode`` "llama" or "gemma", as in rms_norm. Raises ValueError for other shapes, dtypes, devices,
    strides or modes, NotImplementedError for 2^30 rows or more.
    """
    if res is ABSENT:
        check_norm("add_rms_norm", x, w, casting_mode)
        inner, (x_rows,) = check_row_strides("add_rms_norm", x=x)
        differentiated = needs[0] or needs[2]
        y, rstd = norm_forward(x, w, None, inner, x_rows, (0, 0), differentiated, eps, offset, casting_mode)
        return (x, y), (x, w, rstd) if differentiated else (ABSENT, ABSENT, ABSENT)
    check_norm("add_rms_norm", x, w, casting_mode, "res", res)
    inner, (x_rows, res_rows) = check_row_strides("add_rms_norm", x=x, res=res)
    D = x.shape[-1]
    rows = x.numel() // D
    h = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    differentiated = True in needs
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if differentiated else None
    if in_registers(x):
        ROWS, BLOCK, warps = whole_rows(D)
        launch(
            _forward, (cdiv(rows, ROWS),), x, res, w, h, y, rstd, rows, D, inner, *x_rows, *res_rows,
            eps=eps, offset=offset, ROUND=casting_mode == "llama", ROWS=ROWS, BLOCK=BLOCK,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        launch(
            _forward_long, (rows,), x, res, w, h, y, rstd, D, inner, *x_rows, *res_rows,
            eps=eps, offset=offset, ROUND=casting_mode == "llama", BLOCK=_WALK,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return (h, y), (h, w, rstd) if differentiated else (ABSENT, ABSENT, ABSENT)


@prepared
def add_rms_norm_bwd(
    residuals: tuple[Any, ...],
    cotangents: tuple[Any, Any],
    *,
    needs: Any,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Any, Any, Any]:
    """(dh, dy) like (h, y), of any strides, at most one ABSENT -> (dx, dres, dw); dx is dres."""
    h, w, rstd = residuals
    dh, dy = cotangents
    needs_h, needs_w = needs[0] or needs[1] is True, needs[2]
    if dy is ABSENT:
        d, dw = dh, ABSENT
    else:
        d, dw = norm_backward(h, w, rstd, dy, dh, needs_x=needs_h, needs_w=needs_w, offset=offset)
    return d if needs[0] else ABSENT, d if needs[1] is True else ABSENT, dw


add_rms_norm = custom_vjp(add_rms_norm_fwd, add_rms_norm_bwd)


def cost(rows: int, D: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Forward: x and res read; h, y and rstd written. Backward, with dw: h, dy and dh read, dx written."""
    n = rows * D
    if backward:
        return Cost(bytes=4 * n * itemsize + 4 * rows + 2 * D * itemsize, flops=12 * n)
    return Cost(bytes=4 * n * itemsize + 4 * rows + D * itemsize, flops=5 * n)
