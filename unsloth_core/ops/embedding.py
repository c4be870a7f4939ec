"""Embedding: rows of a table by token id, with a weight gradient that is the same bits every run.

Formula: x_n = w[id_n] · s, where s is ``scale`` rounded to w's dtype (Gemma scales by √D so). A row whose id lies outside
[0, V) is NaN: no device value is read on the host, and no address outside the table is touched.
Backward: dw_v = s · Σ_{n: id_n = v} dx_n, zero for rows that no token uses; ids outside [0, V) contribute nothing.

Residuals: ids and w (arguments; of w only shape and dtype are used).
Dtypes: w fp16, bf16 or fp32, x and dw in w's dtype; ids int32 or int64. The product and the sums are fp32, rounded once.
Bytes moved with 2-byte elements: forward 4·N·D; backward 2·N·D read, 2·V·D written (the dense gradient is mostly zeros).
Limits: any strides (fastest with a last stride of 1 and 16-byte rows).

How the gradient is summed: ids are sorted (stable, so equal ids keep their token order), which makes the tokens of one row
of dw neighbours: a segment. One program per sorted position and block of columns starts; the one that stands at the head
of a segment sums it in order, a few rows at a time, and stores once, the others leave. Nobody else writes that row: no
atomics. Where a segment ends is found by ``searchsorted`` on the device.

Source of the idea: the sorted, segmented backward of PyTorch's embedding; Gemma's scale as in transformers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import launch
from ..tree import ABSENT
from .language import cast

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TILE = 2048  # elements a program moves at once: 16 a thread with 4 warps


# ---------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _rounded_scale(scale: tl.constexpr, dtype: tl.constexpr):
    """``scale`` as the nearest number of ``dtype``, in fp32; shape (1, 1)."""
    return cast(tl.full([1, 1], scale, tl.float32), dtype).to(tl.float32)


@triton.jit
def _gather(
    ids_ptr, w_ptr, x_ptr, N, D, V, ids_token, w_row, w_col,
    scale: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens, one block of columns."""
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]).to(tl.int64)
    id = tl.load(ids_ptr + token * ids_token, token < N, other=-1).to(tl.int64)
    known = (id >= 0) & (id < V)
    inside = (token < N) & (col < D)
    w = tl.load(w_ptr + id * w_row + col * w_col, known & inside, other=float("nan")).to(tl.float32)
    x = w * _rounded_scale(scale, w_ptr.dtype.element_ty)
    tl.store(x_ptr + token * D + col, cast(x, x_ptr.dtype.element_ty), inside)


@triton.jit
def _sum_segments(
    sorted_ptr, order_ptr, ends_ptr, dx_ptr, dw_ptr, D, V, dx_token, dx_col,
    scale: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns of one row of dw, by the program at the head of its segment; ROWS tokens at a time."""
    first = tl.program_id(0)
    id = tl.load(sorted_ptr + first).to(tl.int64)
    before = tl.load(sorted_ptr + first - 1, first > 0, other=-1).to(tl.int64)
    # Ids below 0 come first, so -1 before the first position can only be equal to an id that is left out anyway.
    if (id != before) & (id >= 0) & (id < V):
        col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]).to(tl.int64)
        end = tl.load(ends_ptr + first)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(first, end, ROWS):
            position = start + tl.arange(0, ROWS)[:, None]
            token = tl.load(order_ptr + position, position < end, other=0)
            inside = (position < end) & (col < D)
            total += tl.load(dx_ptr + token * dx_token + col * dx_col, inside, other=0.0).to(tl.float32)
        dw = tl.sum(total, axis=0, keep_dims=True) * _rounded_scale(scale, dw_ptr.dtype.element_ty)
        tl.store(dw_ptr + id * D + col, cast(dw, dw_ptr.dtype.element_ty), col < D)


def _tile(D: int) -> tuple[int, int]:
    """(rows, block of columns) of a program."""
    block = min(512, triton.next_power_of_2(max(1, D)))
    return min(16, _TILE // block), block


# ------------------------------------------------------------------------------------------------------ rules


def _check(ids_N: Tensor, w_VD: Tensor) -> None:
    if ids_N.ndim != 1:
        raise ValueError(f"embedding: ids has shape {tuple(ids_N.shape)}, expected (N,)")
    if ids_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"embedding: ids has dtype {ids_N.dtype}, expected int32 or int64")
    if not isinstance(w_VD, Tensor):
        raise ValueError(f"embedding: w is {type(w_VD).__name__}, expected a tensor (V, D)")
    if w_VD.ndim != 2:
        raise ValueError(f"embedding: w has shape {tuple(w_VD.shape)}, expected (V, D)")
    if w_VD.dtype not in _DTYPES:
        raise ValueError(f"embedding: w has dtype {w_VD.dtype}, expected float16, bfloat16 or float32")
    if ids_N.device != w_VD.device:
        raise ValueError(f"embedding: ids is on {ids_N.device}, expected w's device {w_VD.device}")
    if ids_N.shape[0] >= 2**31:
        raise NotImplementedError(f"embedding: {ids_N.shape[0]} ids, expected fewer than 2^31")


# --------------------------------------------------------------------------------------------------------- op


def embedding_fwd(ids_N: Tensor, w_VD: Tensor, *, needs: Any, scale: float = 1.0) -> tuple[Tensor, Any]:
    """ids (N,) int32 or int64, w (V, D) -> x (N, D) in w's dtype, contiguous. Raises ValueError for anything else."""
    _check(ids_N, w_VD)
    (N,), (V, D) = ids_N.shape, w_VD.shape
    x_ND = torch.empty((N, D), dtype=w_VD.dtype, device=w_VD.device)
    rows, block = _tile(D)
    launch(
        _gather, (triton.cdiv(N, rows), triton.cdiv(D, block)), ids_N, w_VD, x_ND, N, D, V, *ids_N.stride(), *w_VD.stride(),
        scale=scale, ROWS=rows, BLOCK=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return x_ND, (ids_N, w_VD) if needs[1] else (ABSENT, ABSENT)


def embedding_bwd(residuals: Any, dx: Tensor, *, needs: Any, scale: float = 1.0) -> tuple[Any, Any]:
    """dx (N, D) of any strides -> (ABSENT, dw (V, D))."""
    if not needs[1]:
        return ABSENT, ABSENT
    ids_N, w_VD = residuals
    (N,), (V, D) = ids_N.shape, w_VD.shape
    dw_VD = torch.zeros((V, D), dtype=w_VD.dtype, device=w_VD.device)
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    ends_N = torch.searchsorted(sorted_N, sorted_N, right=True, out_int32=True)
    rows, block = _tile(D)
    launch(
        _sum_segments, (N, triton.cdiv(D, block)), sorted_N, order_N, ends_N, dx, dw_VD, D, V, *dx.stride(),
        scale=scale, ROWS=rows, BLOCK=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return ABSENT, dw_VD


embedding = custom_vjp(embedding_fwd, embedding_bwd)


def cost(N: int, V: int, D: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Forward: N rows read and written. Backward: N rows read, the dense gradient written once."""
    if backward:
        return Cost(bytes=(N + V) * D * itemsize + 8 * N, flops=N * D)
    return Cost(bytes=2 * N * D * itemsize + 8 * N, flops=N * D)
