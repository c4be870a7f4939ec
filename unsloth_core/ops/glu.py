"""Gated linear unit: the activation of the gate times the up projection (SwiGLU, GeGLU, squared ReLU).

Formula, with a and b the first and last F columns of ``gate_up`` (..., 2F):

    y  = act(a) ∘ b
Backward:
    da = dy ∘ b ∘ act'(a)          db = dy ∘ act(a)          stacked like gate_up, so that dX is one product

    silu        act(a) = a·σ(a)                               act'(a) = σ + a·σ·(1 - σ)
    gelu_tanh   act(a) = a·σ(2u), u = √(2/π)(a + 0.044715a³)  act'(a) = σ + a·σ·(1 - σ)·2u'(a), σ at 2u
    gelu_erf    act(a) = a·Φ(a), Φ = ½(1 + erf(a/√2))         act'(a) = Φ + a·exp(-a²/2)/√(2π)
    relu2       act(a) = max(a, 0)²                           act'(a) = 2·max(a, 0)

½(1 + tanh u) is written σ(2u): the same function, without the cancellation at negative a.
Residuals: gate_up (an argument), nothing else; the activation is computed again.
Dtypes: fp16, bf16 or fp32, the same in and out; everything between is fp32 and rounded once.
Bytes moved per element of y, of 2 bytes: forward 6 (activation and product apart: 10), backward 10 (as
separate ops of autograd with its concatenation: 24), 12 where it also makes y again, for the op that follows.
Limits: last dimension of stride 1 (a cotangent may have any stride); leading dimensions that two strides can
address; fewer than 2^30 rows. A cotangent that two strides and a column stride cannot address is copied.

No reduction, so there is no order to fix. A program takes a tile of at most 1024 columns of one or several
rows, not whole rows: F = 11008 would leave a third of a padded row idle.

Sources of ideas: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202); the squared ReLU, So et al., Primer
(arXiv 2109.08668); recomputing the activation in backward, Liger Kernel.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import cdiv, launch, next_power_of_2
from ..prepared import prepared
from ..tree import ABSENT
from .checks import check_dtype
from .language import cast
from .rms_norm import MAX_ROWS, check_row_strides, cotangent_row_strides, row_offset

_ACTS = ("silu", "gelu_tanh", "gelu_erf", "relu2")
_TILE = 2048  # elements of y per program

# In kernels these stand right of their tensor: the interpreter cannot multiply the other way round.
_LOG2E = tl.constexpr(1 / math.log(2))
_HALF_LOG2E = tl.constexpr(0.5 / math.log(2))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_RSQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
_U1 = tl.constexpr(2 * math.sqrt(2 / math.pi))  # 2u = U1·a + U3·a³, u' likewise
_U1_LOG2E = tl.constexpr(2 * math.sqrt(2 / math.pi) / math.log(2))
_U3_LOG2E = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715 / math.log(2))
_DU3 = tl.constexpr(6 * math.sqrt(2 / math.pi) * 0.044715)

# ---------------------------------------------------------------------------- kernels


@triton.jit
def _sigmoid(z):
    """s = 1 / (1 + 2^-z) and s·(1 - s), from 2^-|z|: nothing overflows and nothing cancels."""
    e = tl.exp2(-tl.abs(z))
    r = 1.0 / (1.0 + e)
    return tl.where(z >= 0.0, r, e * r), e * r * r


@triton.jit
def activation(a, ACT: tl.constexpr):
    """act(a) and act'(a)."""
    if ACT == "silu":
        g, spread = _sigmoid(a * _LOG2E)
        return a * g, g + a * spread
    elif ACT == "gelu_tanh":
        g, spread = _sigmoid(a * (a * a * _U3_LOG2E + _U1_LOG2E))
        return a * g, g + a * spread * (a * a * _DU3 + _U1)
    elif ACT == "gelu_erf":
        g = 0.5 + 0.5 * tl.erf(a * _SQRT_HALF)
        return a * g, g + a * tl.exp2(-a * a * _HALF_LOG2E) * _RSQRT_2PI
    else:
        positive = tl.where(a < 0.0, 0.0, a)  # tl.maximum would drop a NaN
        return positive * positive, 2.0 * positive


@triton.jit
def tile(rows, F, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows and columns of this program's tile: neighbouring programs are neighbours in a row."""
    across = tl.cdiv(F, BLOCK)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, col, (row < rows) & (col < F)


@triton.jit
def _forward(
    gate_up_ptr, y_ptr, rows, F, inner, outer_stride, inner_stride,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, inside = tile(rows, F, ROWS, BLOCK)
    gate_ptr = gate_up_ptr + row_offset(row, inner, outer_stride, inner_stride) + col
    a = tl.load(gate_ptr, inside, other=0.0).to(tl.float32)
    b = tl.load(gate_ptr + F, inside, other=0.0).to(tl.float32)
    activated, _ = activation(a, ACT)
    tl.store(y_ptr + row.to(tl.int64) * F + col, cast(activated * b, y_ptr.dtype.element_ty), inside)


@triton.jit
def _backward(
    gate_up_ptr, dy_ptr, d_ptr, y_ptr, rows, F, inner, outer_stride, inner_stride, dy_outer, dy_inner, dy_col,
    ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, col, inside = tile(rows, F, ROWS, BLOCK)
    gate_ptr = gate_up_ptr + row_offset(row, inner, outer_stride, inner_stride) + col
    a = tl.load(gate_ptr, inside, other=0.0).to(tl.float32)
    b = tl.load(gate_ptr + F, inside, other=0.0).to(tl.float32)
    dy_offset = row_offset(row, inner, dy_outer, dy_inner) + col.to(tl.int64) * dy_col
    dy = tl.load(dy_ptr + dy_offset, inside, other=0.0).to(tl.float32)
    activated, slope = activation(a, ACT)
    d_gate_ptr = d_ptr + row.to(tl.int64) * 2 * F + col
    tl.store(d_gate_ptr, cast(dy * b * slope, d_ptr.dtype.element_ty), inside)
    tl.store(d_gate_ptr + F, cast(dy * activated, d_ptr.dtype.element_ty), inside)
    if y_ptr is not None:
        tl.store(y_ptr + row.to(tl.int64) * F + col, cast(activated * b, y_ptr.dtype.element_ty), inside)


@functools.cache
def tile_shape(F: int) -> tuple[int, int]:
    """Rows and columns of a tile: the widest one that idles at most an eighth of its lanes."""
    block = next((b for b in (1024, 512, 256) if cdiv(F, b) * b <= F + F // 8), 128)
    block = min(block, next_power_of_2(F))
    return min(32, _TILE // block), block


# ---------------------------------------------------------------------------- op


@prepared
def glu_fwd(gate_up: Tensor, *, needs: Any, act: str = "silu") -> tuple[Tensor, tuple[Any]]:
    """gate_up (..., 2F), gate first -> y (..., F) in its dtype, new and contiguous.

    ``act`` "silu", "gelu_tanh", "gelu_erf" or "relu2". Raises ValueError for other shapes, dtypes, strides or
    activations, NotImplementedError for 2^30 rows or more.
    """
    if gate_up.ndim == 0 or gate_up.shape[-1] == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"glu: gate_up has shape {tuple(gate_up.shape)}, expected (..., 2F) with F >= 1")
    check_dtype("glu", "gate_up", gate_up)
    if act not in _ACTS:
        raise ValueError(f"glu: act is {act!r}, expected one of {_ACTS}")
    F = gate_up.shape[-1] // 2
    rows = gate_up.numel() // (2 * F)
    if rows >= MAX_ROWS:
        raise NotImplementedError(f"glu: gate_up has {rows} rows, expected fewer than {MAX_ROWS}")
    inner, (strides,) = check_row_strides("glu", gate_up=gate_up)
    y = torch.empty((*gate_up.shape[:-1], F), dtype=gate_up.dtype, device=gate_up.device)
    ROWS, BLOCK = tile_shape(F)
    grid = (cdiv(rows, ROWS) * cdiv(F, BLOCK),)
    launch(
        _forward, grid, gate_up, y, rows, F, inner, *strides,
        ACT=act, ROWS=ROWS, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y, (gate_up if needs[0] else ABSENT,)


@prepared
def glu_bwd(residuals: tuple[Any], dy: Tensor, *, needs: Any, act: str = "silu") -> tuple[Any]:
    """dy like y, of any strides -> d gate_up, contiguous: da in its first F columns, db in the others."""
    return (backward(residuals[0], dy, act, y=ABSENT) if needs[0] else ABSENT,)


def backward(gate_up: Tensor, dy: Tensor, act: str, *, y: Any) -> Tensor:
    """d gate_up; fills ``y`` (..., F), contiguous, with forward's result in the same pass, unless it is ABSENT."""
    F = gate_up.shape[-1] // 2
    rows = gate_up.numel() // (2 * F)
    d = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        (dy,), inner, (strides, dy_strides) = cotangent_row_strides(gate_up, dy)
        ROWS, BLOCK = tile_shape(F)
        grid = (cdiv(rows, ROWS) * cdiv(F, BLOCK),)
        launch(
            _backward, grid,
            *(gate_up, dy, d, None if y is ABSENT else y), rows, F, inner, *strides, *dy_strides, dy.stride(-1),
            ACT=act, ROWS=ROWS, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return d


glu = custom_vjp(glu_fwd, glu_bwd)


def cost(rows: int, F: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Forward: gate and up read, y written. Backward: gate, up and dy read, both gradients written."""
    n = rows * F
    return Cost(bytes=(5 if backward else 3) * n * itemsize, flops=(12 if backward else 6) * n)
