"""The thin sides of LoRA adapters: tokens onto ranks before a product, and the adapters' gradients after it.

    u = x a^T      a_RC: the adapters' A_i below each other
    t = dy v       v_MR: scale_i B_i on the rows and ranks of part i, else 0
    dA = t^T x     dB_i = scale_i dy_i^T u_i

x (N, C), dy (N, M), u and t (N, R); R is the sum of the ranks, padded with zeros to a multiple of 16.

:func:`packed` writes a and v in the dtype of the tokens: they are operands of these passes, which read them once for
every 32 tokens, and of the base product. From the fp32 leaves each warp would fetch twice the bytes, and round them
again; of 1 and 16 tokens that took an H100 no longer than the launch it saves. Up to FEW of them read leaves, to the
same bits, while other programs pack what the base product will read. :func:`forward` and :func:`backward` read x and
dy once for all adapters. :func:`both_sides` makes t and all dB_i from one pass over a large dy: t as fp32 sums over 256
columns, which a second kernel adds.

Blocks are ranks x tokens, or ranks x columns, with at most 32 ranks: on Hopper that makes them products of one warp
(mma.sync). Reads bound these kernels, and with 64 tokens x 16 ranks on the tensor cores of a warp group (wgmma) ptxas
12.8, which Triton 3.6 brings, made machine code that read what it should not.

:func:`gradients` makes dA and all dB_i. Few columns times many tokens are few programs, so tokens are split between
programs; partial sums lie in memory until the last program of a tile has counted its fellows (an integer) and adds
them in their order: same inputs, same bits.

Floors, reads of x and dy alone at 3 TB/s: for 4096 tokens of an 8B layer u 73 us, t 117, dA and dB 190, of them 78 for
gate_up's dy, which one pass reads for t and dB. Measured on an H100 80GB HBM3, Triton 3.6.0, in a whole step: dA and dB
100 us (gate_up), 63 (down), 43 (qkv), 29 (o); gate_up's t and dB 103 in one pass, 156 in two. What lost is in
perf/LOG.md.

Sources: LoRA (arXiv 2106.09685); the low-rank step on the accumulator of the base product, LoRAFusion (arXiv
2510.00206); summing by the last arrival, the threadFenceReduction sample of NVIDIA's CUDA samples.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..tree import ABSENT
from ..weights import Adapted, LoRA
from .language import cast, dot


@triton.jit
def _rows_of_a(a, ranks, r, C):
    """Where each rank's row of a begins, in one of the leaves, and how many ranks there are."""
    at = a[0] + r.to(tl.int64) * C
    low = 0
    for i in tl.static_range(len(a)):
        at = tl.where(r >= low, a[i] + (r - low).to(tl.int64) * C, at)
        low += ranks[i]
    return at, low


@triton.jit
def _u(
    x, a, ranks, u, N, C, R, x_n, x_c, program,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """u of some tokens, for some ranks of whatever adapters. ``a``: packed, or with ``ranks`` the leaves."""
    blocks_r = tl.cdiv(R, BLOCK_R)
    n = (program // blocks_r).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = (program % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    n_inside = (n < N)[None, :]
    x_columns = x + n[None, :] * x_n
    if ranks is None:
        a_rows, count = a + r.to(tl.int64)[:, None] * C, R
    else:
        a_begins, count = _rows_of_a(a, ranks, r, C)
        a_rows = a_begins[:, None]
    r_inside = (r < count)[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_at = x_columns + k.to(tl.int64)[:, None] * x_c
        if EVEN_K:
            x_tile = tl.load(x_at, mask=n_inside, other=0.0)
            a_tile = tl.load(a_rows + k[None, :], mask=r_inside, other=0.0)
        else:
            x_tile = tl.load(x_at, mask=n_inside & (k < C)[:, None], other=0.0)
            a_tile = tl.load(a_rows + k[None, :], mask=r_inside & (k < C)[None, :], other=0.0)
        if ranks is not None:
            a_tile = cast(a_tile.to(tl.float32), x.dtype.element_ty)
        acc = dot(a_tile, x_tile, acc)
    u_at = u + n[None, :] * R + r[:, None]
    tl.store(u_at, cast(acc, u.dtype.element_ty), mask=n_inside & (r < R)[:, None])


@triton.jit
def _u_kernel(
    x, a, u, N, C, R, x_n, x_c,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """u, of what :func:`packed` wrote."""
    _u(x, a, None, u, N, C, R, x_n, x_c, tl.program_id(0), BLOCK_N, BLOCK_K, BLOCK_R, EVEN_K)


@triton.jit
def _u_and_v_kernel(
    x, a, b, u, b_packed, scales, starts, rows, ranks, N, M, C, R, x_n, x_c, jobs,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Programs below ``jobs`` make some of u, from the leaves, the others pack some of v."""
    program = tl.program_id(0)
    if program < jobs:
        _u(x, a, ranks, u, N, C, R, x_n, x_c, program, BLOCK_N, BLOCK_K, BLOCK_R, EVEN_K)
    else:
        _pack_b(b, b_packed, scales, starts, rows, ranks, M, R, program - jobs, _PACKED_ROWS, BLOCK_R)


@triton.jit
def _t(
    dy, v, scales, t, arrived, starts, rows, ranks, N, R, dy_n, dy_m, blocks_r, tiles, program, programs,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """t of some tokens, for some ranks of one adapter, whose columns of dy alone are read. ``v``: packed, or with
    ``scales`` the leaves b."""
    which = program % len(ranks)
    block_r = (program // len(ranks)) % blocks_r
    n = (program // (len(ranks) * blocks_r)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    low, start, height, rank, end = 0, starts[0], rows[0], ranks[0], ranks[0]
    for i in tl.static_range(1, len(ranks)):
        low = tl.where(which == i, end, low)
        start = tl.where(which == i, starts[i], start)
        height = tl.where(which == i, rows[i], height)
        rank = tl.where(which == i, ranks[i], rank)
        end += ranks[i]
    past = tl.where(which == len(ranks) - 1, R - low, rank)  # the last adapter also writes the zeros of the padding
    n_inside = (n < N)[None, :]
    r_inside = (r < rank)[:, None]
    dy_columns = dy + n[None, :] * dy_n
    if scales is None:
        v_ranks, v_start, v_stride = v + (low + r)[:, None], start, R
    else:
        b, scale = v[0], scales[0]
        for i in tl.static_range(1, len(ranks)):
            b = tl.where(which == i, v[i], b)
            scale = tl.where(which == i, scales[i], scale)
        v_ranks, v_start, v_stride = b + r[:, None], 0, rank
    acc = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for first in range(0, height, BLOCK_K):
        m = first + tl.arange(0, BLOCK_K)
        dy_at = dy_columns + (start + m).to(tl.int64)[:, None] * dy_m
        dy_tile = tl.load(dy_at, mask=n_inside & (m < height)[:, None], other=0.0)
        v_at = v_ranks + (v_start + m).to(tl.int64)[None, :] * v_stride
        v_tile = tl.load(v_at, mask=r_inside & (m < height)[None, :], other=0.0)
        if scales is not None:
            v_tile = cast(v_tile.to(tl.float32) * scale, dy.dtype.element_ty)
        acc = dot(v_tile, dy_tile, acc)
    t_at = t + n[None, :] * R + (low + r)[:, None]
    tl.store(t_at, cast(acc, t.dtype.element_ty), mask=n_inside & (r < past)[:, None])
    if arrived is not None:  # for gradients: nobody has counted yet
        for first in range(program * 128, tiles, programs * 128):
            tile = first + tl.arange(0, 128)
            tl.store(arrived + tile, tl.zeros((128,), tl.int32), mask=tile < tiles)


@triton.jit
def _t_kernel(
    dy, v, t, arrived, starts, rows, ranks, N, R, dy_n, dy_m, blocks_r, tiles,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """t, of what :func:`packed` wrote."""
    _t(
        dy, v, None, t, arrived, starts, rows, ranks, N, R, dy_n, dy_m, blocks_r, tiles,
        tl.program_id(0), tl.num_programs(0), BLOCK_N, BLOCK_K, BLOCK_R,
    )  # fmt: skip


@triton.jit
def _t_and_a_kernel(
    dy, a, b, t, a_packed, arrived, scales, starts, rows, ranks, N, C, R, dy_n, dy_m, blocks_r, tiles, jobs,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Programs below ``jobs`` make some of t, from the leaves, the others pack some of a."""
    program = tl.program_id(0)
    if program < jobs:
        _t(
            dy, b, scales, t, arrived, starts, rows, ranks, N, R, dy_n, dy_m, blocks_r, tiles, program, jobs,
            BLOCK_N, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    else:
        if a_packed is not None:
            _pack_a(a, a_packed, ranks, C, program - jobs, _PACKED_COLUMNS)


@triton.jit
def _pack_a(a, packed, ranks, C, job, BLOCK: tl.constexpr):
    """Sixteen rows of a_RC; rows past the last rank are zeros."""
    blocks = tl.cdiv(C, BLOCK)
    r = (job // blocks) * 16 + tl.arange(0, 16)
    c = (job % blocks) * BLOCK + tl.arange(0, BLOCK)
    a_rows, count = _rows_of_a(a, ranks, r, C)
    c_inside = (c < C)[None, :]
    value = tl.load(a_rows[:, None] + c[None, :], mask=c_inside & (r < count)[:, None], other=0.0).to(tl.float32)
    at = packed + r.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(at, cast(value, packed.dtype.element_ty), mask=c_inside)


@triton.jit
def _pack_b(b, packed, scales, starts, rows, ranks, M, R, job, BLOCK: tl.constexpr, RANKS: tl.constexpr):
    """Some rows and ranks of v_MR."""
    blocks = tl.cdiv(R, RANKS)
    m = (job // blocks) * BLOCK + tl.arange(0, BLOCK)
    r = (job % blocks) * RANKS + tl.arange(0, RANKS)
    value = tl.zeros((BLOCK, RANKS), tl.float32)
    low = 0
    for i in tl.static_range(len(b)):
        own = m - starts[i]
        inside = ((own >= 0) & (own < rows[i]))[:, None] & ((r >= low) & (r < low + ranks[i]))[None, :]
        at = b[i] + own.to(tl.int64)[:, None] * ranks[i] + (r - low)[None, :]
        value += tl.load(at, mask=inside, other=0.0).to(tl.float32) * scales[i]
        low += ranks[i]
    at = packed + m.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(at, cast(value, packed.dtype.element_ty), mask=(m < M)[:, None] & (r < R)[None, :])


@triton.jit
def _pack_kernel(
    a, b, a_packed, b_packed, scales, starts, rows, ranks, M, C, R, jobs, RANKS: tl.constexpr
):  # fmt: skip
    """Programs below ``jobs`` write some of a, the others some of v."""
    program = tl.program_id(0)
    if program < jobs:
        _pack_a(a, a_packed, ranks, C, program, _PACKED_COLUMNS)
    else:
        _pack_b(b, b_packed, scales, starts, rows, ranks, M, R, program - jobs, _PACKED_ROWS, RANKS)


@triton.jit
def _sum_shares(
    acc, at, inside, partials, arrived, tile, split, splits, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Put down one share of a tile's sum; the last of its programs to arrive adds all of them in their order."""
    inner = tl.arange(0, BLOCK_R)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mine = partials + tile.to(tl.int64) * splits * BLOCK_C * BLOCK_R + inner
    tl.store(mine + split * BLOCK_C * BLOCK_R, acc)
    tl.debug_barrier()  # all threads have stored before one of them counts
    if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == splits - 1:
        tl.debug_barrier()
        total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for s in range(splits):
            total += tl.load(mine + s * BLOCK_C * BLOCK_R, cache_modifier=".cg")
        tl.store(at, total, mask=inside)


@triton.jit
def _gradients_kernel(
    x, t, dy, u, da, db, partials, arrived, scales, starts, rows, ranks,
    N, C, R, x_n, x_c, dy_n, dy_m, chunk, a_tiles, all_ranks,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of dA (columns of x, ranks) or of a dB_i (columns of dy, ranks of i), over ``chunk`` of the tokens."""
    tile = tl.program_id(0)
    of_a = tile < a_tiles
    # What the tile is made of: columns from ``start`` on of src, ranks from ``low`` on of thin, how many, its memory.
    src = tl.where(of_a, x, dy)
    thin = tl.where(of_a, t, u)
    src_n = tl.where(of_a, x_n, dy_n).to(tl.int64)
    src_c = tl.where(of_a, x_c, dy_m).to(tl.int64)
    start, width, low, count, local, scale = 0, C, 0, all_ranks, tile, 1.0
    out = da
    next_tile = a_tiles
    next_low = 0
    for i in tl.static_range(len(rows)):
        tiles_i = tl.cdiv(rows[i], BLOCK_C) * tl.cdiv(ranks[i], BLOCK_R)
        here = (tile >= next_tile) & (tile < next_tile + tiles_i)
        start = tl.where(here, starts[i], start)
        width = tl.where(here, rows[i], width)
        low = tl.where(here, next_low, low)
        count = tl.where(here, ranks[i], count)
        local = tl.where(here, tile - next_tile, local)
        scale = tl.where(here, scales[i], scale)
        out = tl.where(here, db[i], out)
        next_tile += tiles_i
        next_low += ranks[i]
    blocks_r = tl.cdiv(count, BLOCK_R)
    c = (local // blocks_r) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = (local % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    c_inside = (c < width)[None, :]
    r_inside = (r < count)[:, None]

    split = tl.program_id(1)
    columns = src + (start + c).to(tl.int64)[None, :] * src_c
    ranks_at = thin + (low + r)[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(split * chunk, tl.minimum(split * chunk + chunk, N), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        src_tile = tl.load(columns + n.to(tl.int64)[:, None] * src_n, mask=c_inside & (n < N)[:, None], other=0.0)
        thin_tile = tl.load(ranks_at + n.to(tl.int64)[None, :] * R, mask=r_inside & (n < N)[None, :], other=0.0)
        acc = dot(thin_tile, src_tile, acc)
    acc *= scale
    at = c.to(tl.int64)[None, :] * tl.where(of_a, 1, count) + r.to(tl.int64)[:, None] * tl.where(of_a, C, 1)
    at = out + at
    if SPLIT:
        _sum_shares(
            acc, at, c_inside & r_inside, partials, arrived, tile, split, tl.num_programs(1), BLOCK_R, BLOCK_C
        )  # fmt: skip
    else:
        tl.store(at, acc, mask=c_inside & r_inside)


@triton.jit
def _both_sides_kernel(
    dy, b, u, t_parts, out, partials, arrived, scales, starts, rows, ranks, N, R, dy_n, dy_m, chunk,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Columns of dy that belong to one adapter, over ``chunk`` of the tokens: their rows of dB_i, and what they add
    to t, which :func:`_sum_t_kernel` adds up."""
    tile = tl.program_id(0)
    split = tl.program_id(1)
    b_i, start, width, low, count, first_tile, scale = b[0], starts[0], rows[0], 0, ranks[0], 0, scales[0]
    place = tl.zeros((), tl.int64)
    next_tile = tl.cdiv(rows[0], BLOCK_C)
    next_low = ranks[0]
    next_place = (tl.zeros((), tl.int64) + rows[0]) * ranks[0]
    for i in tl.static_range(1, len(b)):
        here = tile >= next_tile
        b_i = tl.where(here, b[i], b_i)
        start = tl.where(here, starts[i], start)
        width = tl.where(here, rows[i], width)
        low = tl.where(here, next_low, low)
        count = tl.where(here, ranks[i], count)
        first_tile = tl.where(here, next_tile, first_tile)
        scale = tl.where(here, scales[i], scale)
        place = tl.where(here, next_place, place)
        next_tile += tl.cdiv(rows[i], BLOCK_C)
        next_low += ranks[i]
        next_place += (tl.zeros((), tl.int64) + rows[i]) * ranks[i]
    c = (tile - first_tile) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    c_inside = (c < width)[None, :]
    r_inside = (r < count)[:, None]
    places = c.to(tl.int64)[None, :] * count + r[:, None]
    b_tile = tl.load(b_i + places, mask=c_inside & r_inside, other=0.0).to(tl.float32) * scale
    b_tile = cast(b_tile, dy.dtype.element_ty)
    columns = dy + (start + c).to(tl.int64)[None, :] * dy_m
    ranks_at = u + (low + r)[:, None]
    t_at = t_parts + tile.to(tl.int64) * N * BLOCK_R + r[:, None]
    acc = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(split * chunk, tl.minimum(split * chunk + chunk, N), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        dy_tile = tl.load(columns + n.to(tl.int64)[:, None] * dy_n, mask=c_inside & (n < N)[:, None], other=0.0)
        u_tile = tl.load(ranks_at + n.to(tl.int64)[None, :] * R, mask=r_inside & (n < N)[None, :], other=0.0)
        acc = dot(u_tile, dy_tile, acc)
        t_tile = dot(b_tile, dy_tile.T, tl.zeros((BLOCK_R, BLOCK_N), tl.float32))
        tl.store(t_at + n.to(tl.int64)[None, :] * BLOCK_R, t_tile, mask=(n < N)[None, :])
    acc *= scale
    if SPLIT:
        _sum_shares(
            acc, out + place + places, c_inside & r_inside, partials, arrived, tile, split, tl.num_programs(1),
            BLOCK_R, BLOCK_C,
        )  # fmt: skip
    else:
        tl.store(out + place + places, acc, mask=c_inside & r_inside)


@triton.jit
def _sum_t_kernel(
    t_parts, t, a, a_packed, rows, ranks, N, C, R, jobs,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Programs below ``jobs``: some tokens' ranks of one adapter, over its tiles in their order. Others pack a."""
    program = tl.program_id(0)
    if program < jobs:
        which = program % len(ranks)
        n = (program // len(ranks)) * BLOCK_N + tl.arange(0, BLOCK_N)
        r = tl.arange(0, BLOCK_R)
        low, first, tiles, rank = 0, 0, tl.cdiv(rows[0], TILE), ranks[0]
        end, next_first = ranks[0], tl.cdiv(rows[0], TILE)
        for i in tl.static_range(1, len(ranks)):
            low = tl.where(which == i, end, low)
            first = tl.where(which == i, next_first, first)
            tiles = tl.where(which == i, tl.cdiv(rows[i], TILE), tiles)
            rank = tl.where(which == i, ranks[i], rank)
            end += ranks[i]
            next_first += tl.cdiv(rows[i], TILE)
        past = tl.where(which == len(ranks) - 1, R - low, rank)  # the last adapter also has the zeros of the padding
        inside = (n < N)[:, None]
        at = t_parts + ((tl.zeros((), tl.int64) + first) * N + n)[:, None] * BLOCK_R + r[None, :]
        tile = tl.arange(0, 8)[:, None, None]  # many loads on their way at once: they are all that takes time
        total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for begun in range(0, tiles, 8):
            eight = at[None, :, :] + (begun + tile).to(tl.int64) * N * BLOCK_R
            total += tl.sum(tl.load(eight, mask=inside[None, :, :] & (begun + tile < tiles), other=0.0), 0)
        t_at = t + n.to(tl.int64)[:, None] * R + (low + r)[None, :]
        tl.store(t_at, cast(total, t.dtype.element_ty), mask=inside & (r < past)[None, :])
    else:
        if a_packed is not None:
            _pack_a(a, a_packed, ranks, C, program - jobs, _PACKED_COLUMNS)


class Thin(NamedTuple):
    """Launch parameters: tokens and inner elements of a step, warps, pipeline stages."""

    tokens: int
    inner: int
    warps: int
    stages: int


CONFIGS = {
    "onto ranks": Thin(32, 256, 4, 4),
    "onto ranks, few tokens": Thin(16, 256, 4, 3),
    "onto ranks, fp32": Thin(32, 64, 4, 3),  # no tensor cores: longer steps spill, and fill an A100's shared memory
    "gradients": Thin(64, 64, 4, 4),  # inner: columns of a tile
    "both sides": Thin(64, 256, 8, 3),  # inner: columns of dy of a tile
    "interpreted": Thin(32, 64, 4, 2),
}
BOTH_SIDES = 1 << 25  # the fewest elements of dy for which t and dB are made in one pass over it
FEW = 256  # the most tokens whose thin passes read the leaves
_RANKS = 32  # the most that one block has
_PACKED_COLUMNS = tl.constexpr(256)  # of a, per program
_PACKED_ROWS = tl.constexpr(64)  # of v, per program


class Adapters(NamedTuple):
    """The adapters of a weight that are there: leaves, and where each stands among rows and ranks."""

    index: tuple[int, ...]  # among w.parts
    parts: tuple[LoRA, ...]
    starts: tuple[int, ...]  # first row of each
    rows: tuple[int, ...]
    ranks: tuple[int, ...]
    shape: tuple[int, int]  # (M, C)

    @property
    def width(self) -> int:
        """R: the sum of the ranks, a multiple of 16."""
        return device.cdiv(sum(self.ranks), 16) * 16

    @property
    def blocks(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Rows and ranks of v's blocks, if they cover all rows."""
        return (self.rows, self.ranks) if sum(self.rows) == self.shape[0] else None


def adapters(w: Adapted, shape: tuple[int, int]) -> Adapters:
    """Those of ``w``, whose base has this shape."""
    found, start = [], 0
    for i, (part, rows) in enumerate(zip(w.parts, w.rows, strict=True)):
        if part is not ABSENT:
            found.append((i, part, start, rows, part.a.shape[0]))
        start += rows
    return Adapters(*zip(*found, strict=True), shape=shape)


def _leaves(which: Adapters) -> tuple[Any, Any, Any]:
    """Every a, every b and every scale."""
    a, b, scales = zip(*[(p.a.contiguous(), p.b.contiguous(), float(p.scale)) for p in which.parts], strict=True)
    return a, b, scales


def _jobs_of_a(which: Adapters) -> int:
    """Programs that pack a."""
    return which.width // 16 * device.cdiv(which.shape[1], _PACKED_COLUMNS.value)


def _jobs_of_v(which: Adapters, ranks: int) -> int:
    """Programs that pack v, so many ranks each."""
    return device.cdiv(which.shape[0], _PACKED_ROWS.value) * device.cdiv(which.width, ranks)


def packed(which: Adapters, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(a_RC, v_MR)`` of the leaves, in the dtype of the tokens; zeros where no adapter is."""
    (a, b, scales), (m, c), width = _leaves(which), which.shape, which.width
    a_RC, v_MR = a[0].new_empty((width, c), dtype=dtype), a[0].new_empty((m, width), dtype=dtype)
    ranks = min(_RANKS, device.next_power_of_2(width))
    jobs = _jobs_of_a(which)
    grid = (jobs + _jobs_of_v(which, ranks),)
    device.launch(
        _pack_kernel, grid, a, b, a_RC, v_MR, scales, which.starts, which.rows, which.ranks, m, c, width, jobs,
        RANKS=ranks, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return a_RC, v_MR


@functools.cache
def _thin(tokens: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Thin, dict[str, Any]]:
    """The configuration of a pass over so many tokens, and its options."""
    if device.interpreting():
        name = "interpreted"
    elif dtype == torch.float32:
        name = "onto ranks, fp32"
    else:
        name = "onto ranks" if tokens > 16 else "onto ranks, few tokens"
    config = CONFIGS[name]
    # sm_86, sm_89 and sm_120 have 99 KiB of shared memory, where more stages would not fit.
    stages = min(config.stages, 2) if capability in ((8, 6), (8, 9), (12, 0)) else config.stages
    options = {"BLOCK_N": config.tokens, "BLOCK_K": config.inner, "num_warps": config.warps, "num_stages": stages}
    return config, {**options, "enable_fp_fusion": True}


def forward(which: Adapters, x: Tensor) -> tuple[Tensor, Tensor]:
    """``x a^T`` (N, R), and v (M, R) in x's dtype."""
    (n, c), (m, _), width = x.shape, which.shape, which.width
    config, options = _thin(n, x.dtype, device.capability(x.device))
    u, ranks = x.new_empty((n, width)), min(_RANKS, device.next_power_of_2(width))
    jobs = device.cdiv(n, config.tokens) * device.cdiv(width, ranks)
    options = {**options, "BLOCK_R": ranks, "EVEN_K": c % config.inner == 0}
    if n > FEW:
        a_RC, v_MR = packed(which, x.dtype)
        device.launch(_u_kernel, (jobs,), x, a_RC, u, n, c, width, *x.stride(), **options)
        return u, v_MR
    (a, b, scales), v_MR = _leaves(which), x.new_empty((m, width))
    device.launch(
        _u_and_v_kernel, (jobs + _jobs_of_v(which, ranks),),
        x, a, b, u, v_MR, scales, which.starts, which.rows, which.ranks, n, m, c, width, *x.stride(), jobs, **options,
    )  # fmt: skip
    return u, v_MR


def backward(which: Adapters, dy: Tensor, tiles: int, *, pack: bool) -> tuple[Tensor, Any, Any]:
    """``dy v`` (N, R), with ``pack`` a (R, C) in dy's dtype, and as many zeros as :func:`gradients` has ``tiles`` to
    count the arrivals of."""
    n, c, width, each = dy.shape[0], which.shape[1], which.width, which.ranks
    config, options = _thin(n, dy.dtype, device.capability(dy.device))
    t, arrived = dy.new_empty((n, width)), dy.new_empty((tiles,), dtype=torch.int32) if tiles else None
    ranks = min(_RANKS, device.next_power_of_2(max(16, *each)))
    blocks_r = device.cdiv(max(*each, width - sum(each[:-1])), ranks)  # the last adapter's t has the padding too
    jobs = device.cdiv(n, config.tokens) * len(each) * blocks_r
    if n > FEW:
        a_RC, v_MR = packed(which, dy.dtype)
        device.launch(
            _t_kernel, (jobs,),
            dy, v_MR, t, arrived, which.starts, which.rows, each, n, width, *dy.stride(), blocks_r, tiles,
            BLOCK_R=ranks, **options,
        )  # fmt: skip
        return t, a_RC, arrived
    (a, b, scales), a_RC = _leaves(which), dy.new_empty((width, c)) if pack else None
    device.launch(
        _t_and_a_kernel, (jobs + (_jobs_of_a(which) if pack else 0),),
        dy, a, b, t, a_RC, arrived, scales, which.starts, which.rows, each, n, c, width, *dy.stride(), blocks_r,
        tiles, jobs, BLOCK_R=ranks, **options,
    )  # fmt: skip
    return t, a_RC, arrived


class Split(NamedTuple):
    """How :func:`gradients` cuts its work: tiles of dA, of all dB_i, ranks of a tile, and shares of the tokens."""

    a_tiles: int
    b_tiles: int
    ranks: int
    splits: int
    chunk: int

    @property
    def counters(self) -> int:
        """How many tiles have several shares."""
        return self.a_tiles + self.b_tiles if self.splits > 1 else 0


def cut(which: Adapters, n: int, want_a: bool, want_b: Sequence[bool], where: torch.device) -> Split:
    """A function of shapes and device alone, so that the same inputs give the same bits."""
    return _cut(which.ranks, which.rows, which.shape[1], n, want_a, tuple(want_b), device.sms(where))


@functools.cache
def _cut(
    ranks: tuple[int, ...], rows: tuple[int, ...], c: int, n: int, want_a: bool, want_b: tuple[bool, ...], sms: int
) -> Split:  # fmt: skip
    config = CONFIGS["interpreted" if device.interpreting() else "gradients"]
    block = min(_RANKS, device.next_power_of_2(max(16, sum(ranks) if want_a else max(ranks))))
    a_tiles = device.cdiv(c, config.inner) * device.cdiv(sum(ranks), block) if want_a else 0
    of_b = [device.cdiv(m, config.inner) * device.cdiv(r, block) for m, r in zip(rows, ranks, strict=True)]
    b_tiles = sum(itertools.compress(of_b, want_b))
    return Split(a_tiles, b_tiles, block, *_shares(a_tiles + b_tiles, n, config.tokens, sms))


def _shares(tiles: int, n: int, tokens: int, sms: int) -> tuple[int, int]:
    """How many shares of the tokens, and how large: two programs per multiprocessor, but no fewer than four steps."""
    splits = max(1, min(2 * sms // max(1, tiles), n // (4 * tokens)))
    chunk = max(1, device.cdiv(device.cdiv(n, splits), tokens)) * tokens
    return max(1, device.cdiv(n, chunk)), chunk


def gradients(
    which: Adapters, x: Any, t: Any, dy: Tensor, u: Any, arrived: Any, how: Split, want_b: Sequence[bool]
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """``([dA_i], [dB_i])``, fp32, in one launch: every dA_i (without ``x`` none), those dB_i that ``want_b`` names.

    The dA_i are rows of one new tensor, each dB_i is one of its own: views take the host longer than memory."""
    config = CONFIGS["interpreted" if device.interpreting() else "gradients"]
    (_, c), n = which.shape, dy.shape[0]
    total = sum(which.ranks)
    rows = tuple(rows if want else 0 for rows, want in zip(which.rows, want_b, strict=True))
    da = dy.new_empty((total, c), dtype=torch.float32) if how.a_tiles else ABSENT
    sizes = zip(which.rows, which.ranks, strict=True)
    db = [dy.new_empty(size, dtype=torch.float32) if want else ABSENT for size, want in zip(sizes, want_b, strict=True)]
    some = next(g for g in (da, *db) if g is not ABSENT)  # stands where nothing is written
    outs = [some if g is ABSENT else g for g in (da, *db)]
    tiles, split = how.a_tiles + how.b_tiles, how.splits > 1
    partials = dy.new_empty(tiles * how.splits * config.inner * how.ranks, dtype=torch.float32) if split else None
    thin = t if u is ABSENT else u
    device.launch(
        _gradients_kernel, (tiles, how.splits),
        dy if x is ABSENT else x, thin if t is ABSENT else t, dy, thin, outs[0], tuple(outs[1:]), partials,
        arrived if split else None, tuple(float(p.scale) for p in which.parts), which.starts, rows,
        which.ranks, n, c, thin.shape[1], *(dy if x is ABSENT else x).stride(), *dy.stride(), how.chunk, how.a_tiles,
        total,
        BLOCK_C=config.inner, BLOCK_N=config.tokens, BLOCK_R=how.ranks, SPLIT=split,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return list(da.split(which.ranks)) if how.a_tiles else [ABSENT for _ in which.parts], db


def takes_both_sides(which: Adapters, dy: Tensor) -> bool:
    """Whether :func:`both_sides` takes these adapters, and dy is large enough for it to pay."""
    return dy.numel() >= BOTH_SIDES and dy.dtype != torch.float32 and _block(which) <= _RANKS


def _block(which: Adapters) -> int:
    """Ranks of a tile that holds all of any adapter, and the padding of the last."""
    return device.next_power_of_2(max(16, *which.ranks, which.width - sum(which.ranks[:-1])))


def both_sides(which: Adapters, dy: Tensor, u: Tensor, *, pack: bool) -> tuple[Tensor, Any, list[Tensor]]:
    """``(t, packed, [dB_i])`` from one pass over dy, ``packed`` a (R, C) in its dtype if wanted, dB in fp32.

    Sums over columns (t) are put down in fp32 for every ``inner`` columns: 4·R bytes for their 2·inner of dy."""
    config = CONFIGS["interpreted" if device.interpreting() else "both sides"]
    (n, _), c, block = dy.shape, which.shape[1], _block(which)
    tiles = sum(device.cdiv(m, config.inner) for m in which.rows)
    splits, chunk = _shares(tiles, n, config.tokens, device.sms(dy.device))
    sizes = [m * r for m, r in zip(which.rows, which.ranks, strict=True)]
    out, t_parts = (dy.new_empty(size, dtype=torch.float32) for size in (sum(sizes), tiles * n * block))
    partials = arrived = None
    if splits > 1:
        partials = dy.new_empty(tiles * splits * config.inner * block, dtype=torch.float32)
        arrived = dy.new_zeros(tiles, dtype=torch.int32)
    a, b, scales = _leaves(which)
    device.launch(
        _both_sides_kernel, (tiles, splits), dy, b, u, t_parts, out, partials, arrived, scales, which.starts,
        which.rows, which.ranks, n, u.shape[1], *dy.stride(), chunk,
        BLOCK_C=config.inner, BLOCK_N=config.tokens, BLOCK_R=block, SPLIT=splits > 1,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    t = dy.new_empty(n, which.width)
    packed = dy.new_empty(which.width, c) if pack else None
    jobs = device.cdiv(n, 8) * len(which.parts)
    device.launch(
        _sum_t_kernel, (jobs + (_jobs_of_a(which) if pack else 0),),
        t_parts, t, a, packed, which.rows, which.ranks, n, c, which.width, jobs,
        TILE=config.inner, BLOCK_N=8, BLOCK_R=block, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return t, packed, [g.view(m, r) for g, m, r in zip(out.split(sizes), which.rows, which.ranks, strict=True)]
