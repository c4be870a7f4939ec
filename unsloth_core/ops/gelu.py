"""GELU, the plain activation of an MLP without a gate.

Formula, with Φ the normal distribution's cumulative function:

    y  = x · Φ(x)                                          "none": Φ(x) = ½(1 + erf(x/√2))
Backward:
    dx = dy · (Φ + x·exp(-x²/2)/√(2π))

"tanh" is the approximation of Φ by a sigmoid; both, with their slopes, are the activations of :mod:`.glu`.
Residuals: x (an argument), nothing else; Φ is computed again.
Dtypes: fp16, bf16 or fp32, the same in and out; everything between is fp32 and rounded once.
Bytes moved per element of 2 bytes: forward 4, backward 6.
Limits: last dimension of stride 1 (a cotangent may have any stride); leading dimensions that two strides can
address; fewer than 2^30 rows. A cotangent that two strides and a column stride cannot address is copied.

No reduction, so there is no order to fix; the tiles are those of :mod:`.glu`.

Source of the idea: Hendrycks & Gimpel 2016 (arXiv 1606.08415).
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
from .checks import check_dtype
from .glu import activation, tile, tile_shape
from .language import cast
from .rms_norm import MAX_ROWS, check_row_strides, cotangent_row_strides, row_offset

_ACTS = {"none": "gelu_erf", "tanh": "gelu_tanh"}

# ---------------------------------------------------------------------------- kernels


@triton.jit
def _forward(
    x_ptr, y_ptr, rows, F, inner, x_outer, x_inner, ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, col, inside = tile(rows, F, ROWS, BLOCK)
    x = tl.load(x_ptr + row_offset(row, inner, x_outer, x_inner) + col, inside, other=0.0).to(tl.float32)
    y, _ = activation(x, ACT)
    tl.store(y_ptr + row.to(tl.int64) * F + col, cast(y, y_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(
    x_ptr, dy_ptr, dx_ptr, rows, F, inner, x_outer, x_inner, dy_outer, dy_inner, dy_col,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, inside = tile(rows, F, ROWS, BLOCK)
    x = tl.load(x_ptr + row_offset(row, inner, x_outer, x_inner) + col, inside, other=0.0).to(tl.float32)
    dy_offset = row_offset(row, inner, dy_outer, dy_inner) + col.to(tl.int64) * dy_col
    dy = tl.load(dy_ptr + dy_offset, inside, other=0.0).to(tl.float32)
    _, slope = activation(x, ACT)
    tl.store(dx_ptr + row.to(tl.int64) * F + col, cast(dy * slope, dx_ptr.dtype.element_ty), inside)


# ---------------------------------------------------------------------------- op


@prepared
def gelu_fwd(x: Tensor, *, needs: Any, approximate: str = "none") -> tuple[Tensor, tuple[Any]]:
    """x (..., F) -> y of its shape and dtype, new and contiguous; ``approximate`` "none" or "tanh", as PyTorch's.

    Raises ValueError for other shapes, dtypes, strides or approximations, NotImplementedError for 2^30 rows or more.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"gelu: x has shape {tuple(x.shape)}, expected (..., F) with F >= 1")
    check_dtype("gelu", "x", x)
    if approximate not in _ACTS:
        raise ValueError(f"gelu: approximate is {approximate!r}, expected one of {tuple(_ACTS)}")
    F = x.shape[-1]
    rows = x.numel() // F
    if rows >= MAX_ROWS:
        raise NotImplementedError(f"gelu: x has {rows} rows, expected fewer than {MAX_ROWS}")
    inner, (strides,) = check_row_strides("gelu", x=x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ROWS, BLOCK = tile_shape(F)
    launch(
        _forward, (cdiv(rows, ROWS) * cdiv(F, BLOCK),), x, y, rows, F, inner, *strides,
        ACT=_ACTS[approximate], ROWS=ROWS, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y, (x if needs[0] else ABSENT,)


@prepared
def gelu_bwd(residuals: tuple[Any], dy: Tensor, *, needs: Any, approximate: str = "none") -> tuple[Any]:
    """dy like y, of any strides -> dx, contiguous."""
    if not needs[0]:
        return (ABSENT,)
    (x,) = residuals
    F = x.shape[-1]
    rows = x.numel() // F
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows:
        (dy,), inner, (strides, dy_strides) = cotangent_row_strides(x, dy)
        ROWS, BLOCK = tile_shape(F)
        launch(
            _backward, (cdiv(rows, ROWS) * cdiv(F, BLOCK),),
            x, dy, dx, rows, F, inner, *strides, *dy_strides, dy.stride(-1),
            ACT=_ACTS[approximate], ROWS=ROWS, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return (dx,)


gelu = custom_vjp(gelu_fwd, gelu_bwd)


def cost(rows: int, F: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Forward: x read, y written. Backward: x and dy read, dx written."""
    n = rows * F
    return Cost(bytes=(3 if backward else 2) * n * itemsize, flops=(11 if backward else 5) * n)
