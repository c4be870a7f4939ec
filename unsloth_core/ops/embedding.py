"""Embedding: rows of a table by token id, with a weight gradient that is the same bits every run.

Formula: x_n = w[id_n] · s, where s is ``scale`` rounded to w's dtype (Gemma scales by √D so). A row whose id lies
outside [0, V) is NaN: no device value is read on the host, and no address outside the table is touched.
Backward: dw_v = s · Σ dx_n over the n with id_n = v; zero for rows that no token uses. Ids outside [0, V)
contribute nothing.

Residuals: ids and w (arguments; of w only shape and dtype are used).
Dtypes: w fp16, bf16 or fp32, x and dw in w's dtype; ids int32 or int64. Products and sums are fp32, rounded once.
Bytes moved with 2-byte elements: forward 4·N·D; backward 2·N·D read, 2·V·D written (the dense gradient is mostly
zeros) and at most N·D/8 of partial sums.
A table that is not trained may stay on the host, pinned: the GPU reads the rows it needs over the link. Or it is NF4:
the codes of those rows are gathered and decoded, N·D/2 bytes of transient memory.
Limits: any strides (fast with a last stride of 1 and a row stride divisible by 16); fewer than 2^30 tokens.

How the gradient is summed: ids are sorted (stable, so equal ids keep their token order), which makes the tokens
of one row of dw neighbours: a segment, whose bounds ``searchsorted`` finds on the device. A program sums up to 64
tokens of one segment, in a fixed order, and stores the row of dw once. A longer segment (a frequent token,
padding) is split from its start into chunks of 64, whose fp32 sums a second kernel adds in order. Every row has
one writer, so there are no atomics, and its bits depend on its own tokens alone. At most 64 tokens need no sorting
beforehand: a program for each finds its fellows among them, and one launch does all, zeros included, to the same bits.

Source of the idea: sorting ids and splitting long segments, the backward of PyTorch's CUDA embedding for large
batches.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tree
from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import cdiv, launch, next_power_of_2
from ..prepared import prepared
from ..tree import ABSENT
from ..weights import NF4
from . import nf4
from .checks import check_device, check_dtype
from .language import cast

_TILE = 2048  # elements a program moves at once: 16 a thread with 4 warps
_MAX_TOKENS = 2**30  # sorted positions are int32 in the kernels; offsets are int64
_CHUNK = 64  # tokens of one segment that one program sums


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
    row = tl.load(ids_ptr + token * ids_token, token < N, other=-1).to(tl.int64)
    known = (row >= 0) & (row < V)
    inside = (token < N) & (col < D)
    w = tl.load(w_ptr + row * w_row + col * w_col, known & inside, other=float("nan")).to(tl.float32)
    x = w * _rounded_scale(scale, w_ptr.dtype.element_ty)
    tl.store(x_ptr + token * D + col, cast(x, x_ptr.dtype.element_ty), inside)


@triton.jit
def _slot(first, start, CHUNK: tl.constexpr):
    """Where a chunk of a long segment keeps its sum. CHUNK positions see at most two begin: a last, a first."""
    return first // CHUNK * 2 + (first == start).to(tl.int32)


@triton.jit
def _sum_chunks(
    sorted_ptr, order_ptr, starts_ptr, ends_ptr, dx_ptr, dw_ptr, partial_ptr, D, V, dx_token, dx_col,
    scale: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns of the chunk that begins at this sorted position, if one does."""
    first = tl.program_id(0)
    row = tl.load(sorted_ptr + first).to(tl.int64)
    start = tl.load(starts_ptr + first)
    if ((first - start) % CHUNK == 0) & (row >= 0) & (row < V):
        col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]).to(tl.int64)
        end = tl.load(ends_ptr + first)
        stop = tl.minimum(end, first + CHUNK)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for at in range(first, stop, ROWS):
            position = at + tl.arange(0, ROWS)[:, None]
            token = tl.load(order_ptr + position, position < stop, other=0)
            inside = (position < stop) & (col < D)
            total += tl.load(dx_ptr + token * dx_token + col * dx_col, inside, other=0.0).to(tl.float32)
        total = tl.sum(total, axis=0, keep_dims=True)
        if end - start <= CHUNK:
            dw = total * _rounded_scale(scale, dw_ptr.dtype.element_ty)
            tl.store(dw_ptr + row * D + col, cast(dw, dw_ptr.dtype.element_ty), col < D)
        else:
            slot = _slot(first, start, CHUNK)
            tl.store(partial_ptr + slot.to(tl.int64) * D + col, total, col < D)


@triton.jit
def _sum_partials(
    sorted_ptr, starts_ptr, ends_ptr, dw_ptr, partial_ptr, N, D, V,
    scale: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns of the long segment that starts among these CHUNK positions, if one does."""
    position = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    length = tl.load(ends_ptr + position, position < N, other=0) - position
    starts_here = tl.load(starts_ptr + position, position < N, other=-1) == position
    start = tl.max(tl.where(starts_here & (length > CHUNK), position, -1), axis=0)
    if start >= 0:
        row = tl.load(sorted_ptr + start).to(tl.int64)
        if (row >= 0) & (row < V):
            col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]).to(tl.int64)
            total = tl.zeros([1, BLOCK], tl.float32)
            for first in range(start, tl.load(ends_ptr + start), CHUNK):
                slot = _slot(first, start, CHUNK)
                total += tl.load(partial_ptr + slot.to(tl.int64) * D + col, col < D, other=0.0)
            dw = total * _rounded_scale(scale, dw_ptr.dtype.element_ty)
            tl.store(dw_ptr + row * D + col, cast(dw, dw_ptr.dtype.element_ty), col < D)


@triton.jit
def _sum_few(
    ids_ptr, dx_ptr, dw_ptr, N, D, V, ids_token, dx_token, dx_col,
    scale: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns, of at most CHUNK tokens. Programs below N: the row of their token, if it is the first that
    has this row. Others: zeros for those of ROWS rows that no token has."""
    program = tl.program_id(0)
    token = tl.arange(0, CHUNK).to(tl.int64)
    ids = tl.load(ids_ptr + token * ids_token, token < N, other=-1).to(tl.int64)
    col = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]).to(tl.int64)
    if program < N:
        row = tl.load(ids_ptr + program.to(tl.int64) * ids_token).to(tl.int64)
        same = (ids == row).to(tl.int32)
        before = tl.cumsum(same, 0) - same  # a token's place in the segment of its row
        if (tl.sum(tl.where(token < program, same, 0), 0) == 0) & (row >= 0) & (row < V):
            length = tl.sum(same, 0)
            total = tl.zeros([ROWS, BLOCK], tl.float32)
            for at in range(0, length, ROWS):
                position = at + tl.arange(0, ROWS)[:, None]
                here = (before[None, :] == position) & (same[None, :] != 0)
                its = tl.sum(tl.where(here, token[None, :], 0), 1)[:, None]
                inside = (position < length) & (col < D)
                total += tl.load(dx_ptr + its * dx_token + col * dx_col, inside, other=0.0).to(tl.float32)
            total = tl.sum(total, axis=0, keep_dims=True)
            dw = total * _rounded_scale(scale, dw_ptr.dtype.element_ty)
            tl.store(dw_ptr + row * D + col, cast(dw, dw_ptr.dtype.element_ty), col < D)
    else:
        rows = (program - N).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        taken = tl.max((ids[None, :] == rows[:, None]).to(tl.int32), 1)
        zeros = tl.zeros([ROWS, BLOCK], dw_ptr.dtype.element_ty)
        tl.store(dw_ptr + rows[:, None] * D + col, zeros, ((taken == 0) & (rows < V))[:, None] & (col < D))


def _tile(D: int) -> tuple[int, int]:
    """(rows, block of columns) of a program."""
    block = min(512, next_power_of_2(max(1, D)))
    return min(16, _TILE // block), block


# ------------------------------------------------------------------------------------------------------ rules


def _check(ids_N: Tensor, w_VD: Tensor | NF4) -> None:
    if ids_N.ndim != 1:
        raise ValueError(f"embedding: ids has shape {tuple(ids_N.shape)}, expected (N,)")
    if ids_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"embedding: ids has dtype {ids_N.dtype}, expected int32 or int64")
    if len(w_VD.shape) != 2:
        raise ValueError(f"embedding: w has shape {tuple(w_VD.shape)}, expected (V, D)")
    if isinstance(w_VD, NF4):
        nf4.check("embedding", w_VD)
        check_device("embedding", "ids", ids_N, "w", w_VD.codes.device)
    else:
        check_dtype("embedding", "w", w_VD)
        if not (w_VD.is_cpu and (ids_N.is_meta or (ids_N.is_cuda and w_VD.is_pinned()))):
            check_device("embedding", "ids", ids_N, "w", w_VD.device)
    if ids_N.shape[0] >= _MAX_TOKENS:
        raise NotImplementedError(f"embedding: {ids_N.shape[0]} ids, expected fewer than {_MAX_TOKENS}")


# --------------------------------------------------------------------------------------------------------- op


@prepared
def embedding_fwd(ids_N: Tensor, w_VD: Tensor | NF4, *, needs: Any, scale: float = 1.0) -> tuple[Tensor, Any]:
    """ids (N,) int32 or int64, w (V, D) -> x (N, D) in w's dtype, new and contiguous; NaN rows for other ids.

    ``w`` may be pinned host memory beside ids on a GPU, or NF4 whose rows are whole blocks. Raises ValueError for other
    shapes, dtypes or devices, NotImplementedError for 2^30 tokens or more and for the gradient of a table on the host
    or in NF4.
    """
    _check(ids_N, w_VD)
    if isinstance(w_VD, NF4):
        if tree.any(needs[1]):
            raise NotImplementedError("embedding: no gradient for a table in NF4; detach it")
        x_ND = nf4.dequantize(nf4.gather(w_VD, ids_N))
        return x_ND if scale == 1.0 else x_ND.mul_(x_ND.new_full((), scale)), (ABSENT, ABSENT)
    (N,), (V, D) = ids_N.shape, w_VD.shape
    if needs[1] and w_VD.device != ids_N.device:
        raise NotImplementedError("embedding: no gradient for a table on the host; detach it")
    x_ND = torch.empty((N, D), dtype=w_VD.dtype, device=ids_N.device)
    rows, block = _tile(D)
    launch(
        _gather, (cdiv(N, rows), cdiv(D, block)),
        ids_N, w_VD, x_ND, N, D, V, *ids_N.stride(), *w_VD.stride(),
        scale=scale, ROWS=rows, BLOCK=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return x_ND, (ids_N, w_VD) if needs[1] else (ABSENT, ABSENT)


@prepared
def embedding_bwd(residuals: Any, dx: Tensor, *, needs: Any, scale: float = 1.0) -> tuple[Any, Any]:
    """dx (N, D) of any strides -> (ABSENT, dw (V, D))."""
    if not tree.any(needs[1]):
        return ABSENT, ABSENT
    ids_N, w_VD = residuals
    (N,), (V, D) = ids_N.shape, w_VD.shape
    rows, block = _tile(D)
    columns = cdiv(D, block)
    if 0 < N <= _CHUNK:
        dw_VD = torch.empty((V, D), dtype=w_VD.dtype, device=w_VD.device)
        launch(
            _sum_few, (N + cdiv(V, rows), columns), ids_N, dx, dw_VD, N, D, V, *ids_N.stride(), *dx.stride(),
            scale=scale, CHUNK=_CHUNK, ROWS=rows, BLOCK=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        return ABSENT, dw_VD
    dw_VD = torch.zeros((V, D), dtype=w_VD.dtype, device=w_VD.device)
    sorted_N, order_N = torch.sort(ids_N, stable=True)
    starts_N = torch.searchsorted(sorted_N, sorted_N, out_int32=True)
    ends_N = torch.searchsorted(sorted_N, sorted_N, right=True, out_int32=True)
    chunks = cdiv(N, _CHUNK)
    partial = torch.empty((2 * chunks, D), dtype=torch.float32, device=w_VD.device)
    launch(
        _sum_chunks, (N, columns),
        sorted_N, order_N, starts_N, ends_N, dx, dw_VD, partial, D, V, *dx.stride(),
        scale=scale, CHUNK=_CHUNK, ROWS=rows, BLOCK=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    launch(
        _sum_partials, (chunks, columns),
        sorted_N, starts_N, ends_N, dw_VD, partial, N, D, V,
        scale=scale, CHUNK=_CHUNK, BLOCK=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return ABSENT, dw_VD


embedding = custom_vjp(embedding_fwd, embedding_bwd)


def cost(N: int, V: int, D: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Forward: N rows read and written. Backward: N rows read, the dense gradient written once."""
    if backward:
        return Cost(bytes=(N + V) * D * itemsize + 8 * N, flops=N * D)
    return Cost(bytes=2 * N * D * itemsize + 8 * N, flops=N * D)
