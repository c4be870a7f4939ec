"""Backward of ``attention`` for Hopper (sm_90), in Gluon: one kernel and five products, where two kernels need seven.

With P = e^(S − lse) and dP = do·vᵀ, the gradients are dv = Pᵀ·do, dS = P∘(dP − Δ), dk = dSᵀ·q and dq = dS·k: two
products to rebuild S and dP, three from them. Kernels that own rows of dk and dv, or rows of dq, each have to rebuild
both. Here a program owns a block of keys and walks the tiles of queries that see it; dk and dv stay in registers, and
every step adds a tile of dq to a sum in global memory, fp32.

*The order of the sum* is fixed: block of keys n adds to a tile of queries after block n − 1 has, as a number per tile
says, its turn; nothing is added in the order of arrival. The first block writes, so nothing is cleared before.
Programs start in the order of n, and wait for smaller n only: no deadlock. All walk their queries from the last to the
first, and all query heads of a tile before the next tile, so that under a causal mask, where block n stops at its
diagonal, neighbours stay one turn apart and seldom wait. With a window neighbours start apart instead and meet a tile
at different times: there it is all tiles of a head before the next head, so that q, do and the sum are still in L2 when
the neighbour comes. A second kernel turns the sum into dq. Same inputs, same bits.

*The pipeline.* One warp copies tiles of q, do, lse and Δ into shared memory, some steps ahead. Two warpgroups compute:
S and dP are begun at once; P while dP runs; Pᵀ·do begins; dS while that runs; dS goes to shared memory, where the other
half of the keys is needed for dS·k; dSᵀ·q last, during which the tile of dq is handed over. Three more warps take these
tiles in turn: one addition by the copy engine, waited for until it is done and visible, lasts longer than a step.
S is computed transposed, K·Qᵀ, so that Pᵀ and dSᵀ are first operands from registers as they stand. A head of 256 leaves
room for 64 keys: there the warpgroups share channels instead of keys, and P and dS go through shared memory.

*Which queries meet which keys* is an interval each way (see attention.py). A small kernel writes them down first, per
key, and per tile as a range of blocks: both ends of these never decrease, so "who adds to this tile" and "what this
block meets" are the same pairs without holes. Blocks that all keys see whole need no mask.

Bytes: q, k, v, do once, lse and Δ; the sum is written, added to M / 128 times in L2, and read once: 4·N·H·K bytes of
scratch. Least work: 10·K flops per visible pair and head, five products. Measured on an H100 (bf16, causal, H32/KV8,
8192 tokens, the whole backward, TFLOP/s; cuDNN in the same run): head 128 468 to 486 (478 to 515), 64 423 (400), 80
413 (333), 256 with H16 354 (383 to 406), 64 with 71 heads on one 359 (418), or 112 if those were not divided; a window
of 4096 of 32768 tokens 504 to 526, of 1024 of 8192 377. Without turns the kernel alone does 540 at head 128, without dq
570; S, dP and dS·k read both operands from shared memory, whose bandwidth, not the matrix units, is the nearest bound.

Sources: deterministic sums by turns, FlashAttention-2 (Dao 2023) in its deterministic mode; roles of warps and
transposed scores, FlashAttention-3 (Shah et al. 2024).
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..segments import Segments
from .attention_tiles import partners, pieces
from .gluon import (
    TensorDescriptor,
    barrier,
    fence_async_shared,
    gl,
    jit,
    load,
    mbarrier,
    reduce_add,
    reinterpret,
    store,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .language import cast

LOG2E = 1.4426950408889634


class Tiles(NamedTuple):
    """One row of the launch table: a program holds ``keys`` rows of k and v and walks blocks of ``queries`` rows, of
    which q has ``slots`` in shared memory and do has ``do_slots``. ``held``: v (1), or k and v (2), are first operands
    from registers."""

    queries: int
    keys: int
    slots: int
    do_slots: int
    held: int


TABLE = {  # by head size
    64: Tiles(64, 128, 3, 2, 2),
    80: Tiles(64, 128, 3, 2, 1),
    96: Tiles(64, 128, 3, 2, 1),
    128: Tiles(64, 128, 3, 2, 0),
    256: Tiles(64, 64, 2, 1, 0),
}
# Products of channels. On an H100 two kernels of seven products took 0.32 ms instead of 0.25 at 2^33.8 (1x4096, 14
# heads of 64 on 2); below, the 10 to 30 us gained may be less than what making ten descriptors takes the host.
WORTH = 2**33
ADDERS = gl.constexpr(3)  # warps that add tiles of dq, in turn: the time of one addition is that of several steps


# ---- what the kernel is told: which blocks meet


@triton.jit
def _plan(
    LSE, TURNS, LO, HI, FIRST, LAST, q_starts, q_ends, kv_starts, kv_ends, S, N, M, P, tiles, blocks, window,
    BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """lse to base 2 and turns to 0, for BM rows of one head; and, by the programs of head 0, the queries [LO, HI) that
    see each key (none beyond M), and the blocks of keys FIRST to LAST that each tile of queries meets."""
    i, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if i < tiles:
        lse = LSE + head * P + i * BM + tl.arange(0, BM)
        tl.store(lse, tl.load(lse) * 1.4426950408889634)
        tl.store(TURNS + (head * tiles + i) * PARTS + tl.arange(0, PARTS), tl.zeros((PARTS,), tl.int32))
    if head == 0:
        if i < tiles:
            row = tl.minimum(i * BM + tl.arange(0, BM), N - 1)
            lo, hi = partners(row, q_starts, q_ends, kv_starts, kv_ends, S, M, window, STEPS, CAUSAL, False)
            # An empty range too keeps both ends monotone from tile to tile.
            tl.store(FIRST + i, tl.min(lo, 0) // BN)
            tl.store(LAST + i, tl.cdiv(tl.max(hi, 0), BN) - 1)
        if i < blocks:
            row = i * BN + tl.arange(0, BN)
            key = tl.minimum(row, M - 1)
            lo, hi = partners(key, kv_starts, kv_ends, q_starts, q_ends, S, N, window, STEPS, CAUSAL, True)
            tl.store(LO + row, tl.where(row < M, lo, 0))
            tl.store(HI + row, tl.where(row < M, hi, 0))


@triton.jit(do_not_specialize=["scale"])
def _finish(SUM, DQ, FIRST, LAST, N, tiles, dq_n, dq_h, scale,
            HEAD: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, B: tl.constexpr):  # fmt: skip
    """dq = scale · SUM, B rows of one head; 0 where no block of keys was met and nothing was ever written."""
    i, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    met = tl.load(FIRST + i * B // BM) <= tl.load(LAST + i * B // BM)
    row, channel = i * B + tl.arange(0, B), tl.arange(0, WIDTH)
    ok = (row < N)[:, None] & (channel < HEAD)[None, :]
    sums = SUM + ((head * tiles * BM + row) * HEAD)[:, None] + channel[None, :]
    dq = tl.load(sums, mask=ok & met, other=0.0) * scale
    out = DQ + head * dq_h + (row.to(tl.int64) * dq_n)[:, None] + channel[None, :]
    tl.store(out, cast(dq, DQ.dtype.element_ty), mask=ok)


# ---- turns


@jit
def _await_turn(pointer, turn):
    """Until the number there is ``turn``; all that was written before it was, is visible then."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; again: ld.acquire.gpu.global.b32 $0, [$1]; setp.ne.b32 p, $0, $2; @p bra again; }",
        "=&r,l,r", [pointer, turn], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@jit
def _pass_turn(pointer, turn):
    """Once the copies that a thread of this warp began have arrived (not only left), the number becomes ``turn``."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; bar.warp.sync 0xffffffff; st.release.gpu.global.b32 [$1], $2; mov.b32 $0, 0;",
        "=&r,l,r", [pointer, turn], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


# ---- the roles of the warps


@jit
def _steps(lo, hi, heads, HEADS: gl.constexpr):
    """How many there are: a tile of queries and a head each. ``heads`` of them if HEADS is 0."""
    if HEADS > 0:
        return HEADS * (hi - lo)
    else:
        return heads * (hi - lo)


@jit
def _step(t, lo, hi, heads, HEADS: gl.constexpr, BY_HEAD: gl.constexpr):
    """The tile of queries that step t of a block is about, and which of its heads."""
    if BY_HEAD:
        return hi - 1 - t % (hi - lo), t // (hi - lo)
    elif HEADS > 0:
        return hi - 1 - t // HEADS, t % HEADS
    else:
        return hi - 1 - t // heads, t % heads


@jit
def _await_post(posted, x):
    """Until part x of dq has been posted, in the order of steps and parts; nothing if x is negative."""
    y = gl.maximum(x, 0)
    mbarrier.wait(posted.index(y % ADDERS), (y // ADDERS) & 1, pred=x >= 0)


@jit
def _copy(
    args,
    HEADS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr,
    PARTS: gl.constexpr, SLOTS: gl.constexpr, DO_SLOTS: gl.constexpr, BY_HEAD: gl.constexpr,
):  # fmt: skip
    """One warp: k and v, then q with lse and do with Δ of step after step, as far ahead as there are slots."""
    (q_from, q_from2, do_from, do_from2, k_from, k_from2, v_from, v_from2, lse_from, delta_from,
     q_s, q_s2, do_s, do_s2, k_s, k_s2, v_s, v_s2, lse_s, delta_s, kv_full, q_full, do_full, posted,
     n, group, head_0, heads, lo, hi, q_h, do_h, k_g, v_g) = args  # fmt: skip
    mbarrier.expect(kv_full, 4 * BN * (K1 + K2))
    load(k_from, [n * BN, group * k_g], kv_full, k_s)
    load(v_from, [n * BN, group * v_g], kv_full, v_s)
    if K2 > 0:
        load(k_from2, [n * BN, group * k_g + K1], kv_full, k_s2)
        load(v_from2, [n * BN, group * v_g + K1], kv_full, v_s2)
    for t in range(_steps(lo, hi, heads, HEADS)):
        m, member = _step(t, lo, hi, heads, HEADS, BY_HEAD)
        row, head = m * BM, head_0 + member
        i = t % SLOTS
        full = q_full.index(i)
        _await_post(posted, t - SLOTS + 1 if PARTS == 1 else 2 * (t - SLOTS) + 1)
        mbarrier.expect(full, 2 * BM * (K1 + K2) + 4 * BM)
        load(q_from, [row, head * q_h], full, q_s.index(i))
        if K2 > 0:
            load(q_from2, [row, head * q_h + K1], full, q_s2.index(i))
        load(lse_from, [head, row], full, lse_s.index(i))
        i = t % DO_SLOTS
        full = do_full.index(i)
        _await_post(posted, PARTS * (t - DO_SLOTS))
        mbarrier.expect(full, 2 * BM * (K1 + K2) + 4 * BM)
        load(do_from, [row, head * do_h], full, do_s.index(i))
        if K2 > 0:
            load(do_from2, [row, head * do_h + K1], full, do_s2.index(i))
        load(delta_from, [head, row], full, delta_s.index(i))


@jit
def _add(
    args,
    HEADS: gl.constexpr, BM: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, PARTS: gl.constexpr, W: gl.constexpr,
    BY_HEAD: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """One warp of ADDERS: every ADDERS-th part of a tile of dq goes from shared memory to the sum in global memory, by
    the copy engine, when its turn has come: written by the first block of keys, added by the others."""
    (sum_to, sum_to2, dq_s, dq_s2, posted, dq_empty, TURNS, FIRST, tiles, n, head_0, heads, lo, hi) = args  # fmt: skip
    for u in range((_steps(lo, hi, heads, HEADS) * PARTS + ADDERS - 1 - WHO) // ADDERS):
        x = u * ADDERS + WHO
        part, t = x % PARTS, x // PARTS
        m, member = _step(t, lo, hi, heads, HEADS, BY_HEAD)
        tile = (head_0 + member) * tiles + m
        place = TURNS + tile * PARTS + part
        turn = n - gl.load(FIRST + m)
        mbarrier.wait(posted.index(WHO), u & 1)
        if turn == 0:
            store(sum_to, [tile * BM, part * W], dq_s)
            if K2 > 0:
                store(sum_to2, [tile * BM, K1], dq_s2)
        else:
            _await_turn(place, turn)
            reduce_add(sum_to, [tile * BM, part * W], dq_s)
            if K2 > 0:
                reduce_add(sum_to2, [tile * BM, K1], dq_s2)
        store_wait(0)  # shared memory has been read
        mbarrier.arrive(dq_empty, count=1)
        _pass_turn(place, turn + 1)


@jit
def _scores(a, a2, b, b2, zero, K2: gl.constexpr):
    """a·bᵀ, begun: over the whole head, in one piece or in two."""
    s = warpgroup_mma(a, b.permute((1, 0)), zero, use_acc=False, is_async=True)
    if K2 > 0:
        s = warpgroup_mma(a2, b2.permute((1, 0)), s, is_async=True)
    return s


@jit
def _statistic(slot, BM: gl.constexpr, layout: gl.constexpr):
    """lse or Δ of a tile, one for each column of the transposed scores."""
    return reinterpret(slot, gl.float32, [BM], gl.SwizzledSharedLayout(1, 1, 1, [0])).load(layout)


@jit
def _weights(s, lse, inner, outer, SOFTCAP: gl.constexpr):
    """P and what dP − Δ is multiplied by to give dS, from products s and lse in base 2."""
    if not SOFTCAP:
        p = gl.exp2(s * inner - lse[None, :])
        return p, p
    else:
        e = gl.exp2(gl.abs(s * inner) * -2.8853900817779268)
        bent = (1.0 - e) / (1.0 + e)  # |tanh|
        p = gl.exp2(gl.where(s * inner < 0, -bent, bent) * outer - lse[None, :])
        return p, p * (1.0 - bent * bent)


@jit
def _visible(x, m, lo, hi, BM: gl.constexpr, layout: gl.constexpr):
    """x where the query of the column is one that sees the key of the row, else 0."""
    query = m * BM + gl.arange(0, BM, layout=layout)
    return gl.where((query[None, :] >= lo[:, None]) & (query[None, :] < hi[:, None]), x, 0.0)


@jit
def _put(x, base, row_stride, head_stride, n, group, share, M, FIRST: gl.constexpr, BN: gl.constexpr, K: gl.constexpr,
         ADD: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Rows of dk or dv, or of a share's part of them, channels [FIRST, FIRST + K)."""
    row = n * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, layout))
    channel = FIRST + gl.arange(0, K, layout=gl.SliceLayout(0, layout))
    ok = (row < M)[:, None] & (channel >= 0)[None, :]
    at = group.to(gl.int64) * head_stride + (share.to(gl.int64) * M + row) * row_stride
    pointer = base + at[:, None] + channel[None, :]
    if ADD:
        x += gl.load(pointer, mask=ok, other=0.0).to(gl.float32)
    gl.store(pointer, x.to(base.dtype.element_ty), mask=ok)


@jit
def _math(
    args,
    HEADS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, K1: gl.constexpr, SLOTS: gl.constexpr,
    DO_SLOTS: gl.constexpr, ADD: gl.constexpr, SOFTCAP: gl.constexpr, HELD: gl.constexpr,
    K2: gl.constexpr, BY_HEAD: gl.constexpr,
):  # fmt: skip
    """Two warpgroups, each with half of the keys: all products of heads up to 128."""
    (q_s, q_s2, do_s, do_s2, k_s, k_s2, v_s, v_s2, lse_s, delta_s, ds_s, dq_s, dq_s2,
     kv_full, q_full, do_full, posted, dq_empty,
     DK, DV, LO, HI, M, n, group, share, heads, lo, whole_lo, whole_hi, hi, inner, outer, scale,
     dk_m, dk_g, dv_m, dv_g) = args  # fmt: skip
    dtype: gl.constexpr = q_s.dtype
    R2: gl.constexpr = K2 if K2 > 0 else 16
    DOWN: gl.constexpr = BM // 16  # a tile of dq is that many warps high
    SIDE: gl.constexpr = 8 // DOWN
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, BM, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, K1, 16])
    layout2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, R2, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [DOWN, SIDE], [16, K1 // SIDE, 16])
    dq_layout2: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [DOWN, SIDE], [16, R2 // SIDE, 16])
    column: gl.constexpr = gl.SliceLayout(0, s_layout)
    key = n * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, s_layout))
    key_lo, key_hi = gl.load(LO + key), gl.load(HI + key)

    dk, dv = gl.full([BN, K1], 0.0, gl.float32, layout), gl.full([BN, K1], 0.0, gl.float32, layout)
    dk2, dv2 = gl.full([BN, R2], 0.0, gl.float32, layout2), gl.full([BN, R2], 0.0, gl.float32, layout2)
    zero, dq_zero = gl.full([BN, BM], 0.0, gl.float32, s_layout), gl.full([BM, K1], 0.0, gl.float32, dq_layout)
    dq_zero2 = gl.full([BM, R2], 0.0, gl.float32, dq_layout2)
    PIECES: gl.constexpr = 2 if K2 > 0 else 1  # products are waited for in the order they began, piece by piece
    mbarrier.wait(kv_full, 0)
    k, k2, v, v2 = k_s, k_s2, v_s, v_s2
    if HELD >= 1:
        v = v_s.load(gl.DotOperandLayout(0, s_layout, 2))
        if K2 > 0:
            v2 = v_s2.load(gl.DotOperandLayout(0, s_layout, 2))
    if HELD == 2:
        k = k_s.load(gl.DotOperandLayout(0, s_layout, 2))
        if K2 > 0:
            k2 = k_s2.load(gl.DotOperandLayout(0, s_layout, 2))
    for t in range(_steps(lo, hi, heads, HEADS)):
        i, d = t % SLOTS, t % DO_SLOTS
        q, do, q2, do2 = q_s.index(i), do_s.index(d), q_s2.index(i), do_s2.index(d)
        m, _ = _step(t, lo, hi, heads, HEADS, BY_HEAD)
        mbarrier.wait(q_full.index(i), (t // SLOTS) & 1)
        s_begun = _scores(k, k2, q, q2, zero, K2)
        mbarrier.wait(do_full.index(d), (t // DO_SLOTS) & 1)
        dp_begun = _scores(v, v2, do, do2, zero, K2)
        lse = _statistic(lse_s.index(i), BM, column)
        s = warpgroup_mma_wait(PIECES, deps=(s_begun,))
        p, slope = _weights(s, lse, inner, outer, SOFTCAP)
        if (m < whole_lo) | (m >= whole_hi):
            p = _visible(p, m, key_lo, key_hi, BM, column)
            if SOFTCAP:
                slope = _visible(slope, m, key_lo, key_hi, BM, column)
        if not SOFTCAP:
            slope = p
        p16 = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, layout, 2))
        dv_begun = warpgroup_mma(p16, do, dv, is_async=True)
        if K2 > 0:
            p16_2 = gl.convert_layout(p16, gl.DotOperandLayout(0, layout2, 2))
            dv_begun2 = warpgroup_mma(p16_2, do2, dv2, is_async=True)
        delta = _statistic(delta_s.index(d), BM, column)
        dp = warpgroup_mma_wait(PIECES, deps=(dp_begun,))
        ds = (slope * (dp - delta[None, :])).to(dtype)
        ds_s.store(ds)
        fence_async_shared()
        barrier()
        dq_begun = warpgroup_mma(ds_s.permute((1, 0)), k_s, dq_zero, use_acc=False, is_async=True)
        if K2 > 0:
            dq_begun2 = warpgroup_mma(ds_s.permute((1, 0)), k_s2, dq_zero2, use_acc=False, is_async=True)
        ds16 = gl.convert_layout(ds, gl.DotOperandLayout(0, layout, 2))
        dk_begun = warpgroup_mma(ds16, q, dk, is_async=True)
        if K2 > 0:
            dk_begun2 = warpgroup_mma(
                gl.convert_layout(ds16, gl.DotOperandLayout(0, layout2, 2)), q2, dk2, is_async=True
            )
            dv, dv2, p16 = warpgroup_mma_wait(2 * PIECES, deps=(dv_begun, dv_begun2, p16))
            dq, dq2 = warpgroup_mma_wait(PIECES, deps=(dq_begun, dq_begun2))
        else:
            dv, p16 = warpgroup_mma_wait(2 * PIECES, deps=(dv_begun, p16))
            dq = warpgroup_mma_wait(PIECES, deps=(dq_begun,))
        mbarrier.wait(dq_empty, (t & 1) ^ 1)
        dq_s.store(dq)
        if K2 > 0:
            dq_s2.store(dq2)
        fence_async_shared()
        barrier()
        mbarrier.arrive(posted.index(t % ADDERS), count=1)
        if K2 > 0:
            dk, dk2, ds16 = warpgroup_mma_wait(0, deps=(dk_begun, dk_begun2, ds16))
        else:
            dk, ds16 = warpgroup_mma_wait(0, deps=(dk_begun, ds16))
    _put(dk * scale, DK, dk_m, dk_g, n, group, share, M, 0, BN, K1, ADD, layout)
    _put(dv, DV, dv_m, dv_g, n, group, share, M, 0, BN, K1, ADD, layout)
    if K2 > 0:
        _put(dk2 * scale, DK, dk_m, dk_g, n, group, share, M, K1, BN, K2, ADD, layout2)
        _put(dv2, DV, dv_m, dv_g, n, group, share, M, K1, BN, K2, ADD, layout2)


@jit
def _math_wide(
    args,
    HEADS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, K: gl.constexpr, SLOTS: gl.constexpr,
    DO_SLOTS: gl.constexpr, ADD: gl.constexpr, SOFTCAP: gl.constexpr, W: gl.constexpr, BY_HEAD: gl.constexpr,
):  # fmt: skip
    """Two warpgroups, each with half of the channels of dk, dv and dq, and half of the queries of a tile of scores: P
    and dS therefore change hands in shared memory. dq goes in two parts of W channels."""
    (q_s, do_s, k_s, v_s, lse_s, delta_s, p_s, ds_s, dq_s,
     kv_full, q_full, do_full, posted, dq_empty,
     DK, DV, LO, HI, M, n, group, share, heads, lo, whole_lo, whole_hi, hi, inner, outer, scale,
     dk_m, dk_g, dv_m, dv_g) = args  # fmt: skip
    dtype: gl.constexpr = q_s.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BM // 2, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, K // 2, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, W // 2, 16])
    column: gl.constexpr = gl.SliceLayout(0, s_layout)
    key = n * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, s_layout))
    key_lo, key_hi = gl.load(LO + key), gl.load(HI + key)

    dk, dv = gl.full([BN, K], 0.0, gl.float32, layout), gl.full([BN, K], 0.0, gl.float32, layout)
    zero, dq_zero = gl.full([BN, BM], 0.0, gl.float32, s_layout), gl.full([BM, W], 0.0, gl.float32, dq_layout)
    mbarrier.wait(kv_full, 0)
    for t in range(_steps(lo, hi, heads, HEADS)):
        i, d = t % SLOTS, t % DO_SLOTS
        q, do = q_s.index(i), do_s.index(d)
        m, _ = _step(t, lo, hi, heads, HEADS, BY_HEAD)
        mbarrier.wait(q_full.index(i), (t // SLOTS) & 1)
        s_begun = _scores(k_s, k_s, q, q, zero, 0)
        mbarrier.wait(do_full.index(d), (t // DO_SLOTS) & 1)
        dp_begun = _scores(v_s, v_s, do, do, zero, 0)
        lse = _statistic(lse_s.index(i), BM, column)
        s = warpgroup_mma_wait(1, deps=(s_begun,))
        p, slope = _weights(s, lse, inner, outer, SOFTCAP)
        if (m < whole_lo) | (m >= whole_hi):
            p = _visible(p, m, key_lo, key_hi, BM, column)
            if SOFTCAP:
                slope = _visible(slope, m, key_lo, key_hi, BM, column)
        if not SOFTCAP:
            slope = p
        p_s.store(p.to(dtype))
        delta = _statistic(delta_s.index(d), BM, column)
        fence_async_shared()
        barrier()
        dv_begun = warpgroup_mma(p_s, do, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp_begun,))
        ds_s.store((slope * (dp - delta[None, :])).to(dtype))
        fence_async_shared()
        barrier()
        ds_t = ds_s.permute((1, 0))
        dq_begun = warpgroup_mma(ds_t, k_s.slice(0, W, dim=1), dq_zero, use_acc=False, is_async=True)
        dk_begun = warpgroup_mma(ds_s, q, dk, is_async=True)
        dv, dq = warpgroup_mma_wait(1, deps=(dv_begun, dq_begun))
        mbarrier.wait(dq_empty, 1)
        dq_s.store(dq)
        fence_async_shared()
        barrier()
        mbarrier.arrive(posted.index(2 * t % ADDERS), count=1)
        dq_begun = warpgroup_mma(ds_t, k_s.slice(W, W, dim=1), dq_zero, use_acc=False, is_async=True)
        dk = warpgroup_mma_wait(1, deps=(dk_begun,))
        dq = warpgroup_mma_wait(0, deps=(dq_begun,))
        mbarrier.wait(dq_empty, 0)
        dq_s.store(dq)
        fence_async_shared()
        barrier()
        mbarrier.arrive(posted.index((2 * t + 1) % ADDERS), count=1)
    _put(dk * scale, DK, dk_m, dk_g, n, group, share, M, 0, BN, K, ADD, layout)
    _put(dv, DV, dv_m, dv_g, n, group, share, M, 0, BN, K, ADD, layout)


# ---- the kernel


@jit
def _tile(HEIGHT: gl.constexpr, WIDTH: gl.constexpr, dtype: gl.constexpr, slots: gl.constexpr):
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEIGHT, WIDTH], dtype)
    if slots == 0:
        return gl.allocate_shared_memory(dtype, [HEIGHT, WIDTH], layout)
    else:
        return gl.allocate_shared_memory(dtype, [slots, HEIGHT, WIDTH], layout)


@jit
def _barriers(count: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(bars.index(i), count=1)
    return bars


@jit(do_not_specialize=["tiles", "M", "GROUPS", "inner", "outer", "scale"])
def _backward(
    q_from, do_from, k_from, v_from, sum_to, lse_from, delta_from, q_from2, do_from2, k_from2, v_from2, sum_to2,
    DK, DV, LO, HI, FIRST, LAST, TURNS, tiles, M, GROUPS, q_h, do_h, k_g, v_g, dk_m, dk_g, dv_m, dv_g,
    inner, outer, scale,
    GROUP: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    SLOTS: gl.constexpr, DO_SLOTS: gl.constexpr, ADD: gl.constexpr, SOFTCAP: gl.constexpr,
    HELD: gl.constexpr, BY_HEAD: gl.constexpr, BF16: gl.constexpr, SHARES: gl.constexpr,
):  # fmt: skip
    """A block of BN keys of one key head, and all of its query heads or a share of them. The first blocks, which most
    queries see under a causal mask, go first."""
    dtype: gl.constexpr = q_from.dtype
    gl.static_assert((dtype == gl.bfloat16) == BF16)  # BF16 is for the launcher, to which all descriptors are alike
    HEAD: gl.constexpr = K1 + K2
    PARTS: gl.constexpr = 2 if HEAD > 128 else 1
    W: gl.constexpr = K1 // PARTS
    share, program = gl.program_id(0) % SHARES, gl.program_id(0) // SHARES
    group, n = program % GROUPS, program // GROUPS
    EACH: gl.constexpr = (GROUP + SHARES - 1) // SHARES
    HEADS: gl.constexpr = GROUP if SHARES == 1 else 0
    head_0 = group * GROUP + share * EACH
    heads = gl.minimum(GROUP - share * EACH, EACH)

    # The tiles of queries [lo, hi) meet this block; of these, [whole_lo, whole_hi) see all of it.
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    lo, hi = 0, 0
    for c in range(0, tiles, 1024):
        at = c + gl.arange(0, 1024, layout=flat)
        lo += gl.sum((gl.load(LAST + at, mask=at < tiles, other=2147483647) < n).to(gl.int32), 0)
        hi += gl.sum((gl.load(FIRST + at, mask=at < tiles, other=2147483647) <= n).to(gl.int32), 0)
    hi = gl.maximum(hi, lo)
    key = n * BN + gl.arange(0, BN, layout=flat)
    whole_lo = gl.minimum(gl.maximum((gl.max(gl.load(LO + key), 0) + BM - 1) // BM, lo), hi)
    whole_hi = gl.minimum(gl.maximum(gl.min(gl.load(HI + key), 0) // BM, whole_lo), hi)

    k_s, v_s = _tile(BN, K1, dtype, 0), _tile(BN, K1, dtype, 0)
    q_s, do_s = _tile(BM, K1, dtype, SLOTS), _tile(BM, K1, dtype, DO_SLOTS)
    dq_s, ds_s = _tile(BM, W, gl.float32, 0), _tile(BN, BM, dtype, 0)
    line: gl.constexpr = lse_from.layout
    lse_s = gl.allocate_shared_memory(gl.float32, [SLOTS, 1, BM], line)
    delta_s = gl.allocate_shared_memory(gl.float32, [DO_SLOTS, 1, BM], line)
    q_s2, do_s2, k_s2, v_s2, dq_s2 = q_s, do_s, k_s, v_s, dq_s
    if K2 > 0:
        k_s2, v_s2 = _tile(BN, K2, dtype, 0), _tile(BN, K2, dtype, 0)
        q_s2, do_s2, dq_s2 = _tile(BM, K2, dtype, SLOTS), _tile(BM, K2, dtype, DO_SLOTS), _tile(BM, K2, gl.float32, 0)
    else:
        q_from2, do_from2, k_from2, v_from2, sum_to2 = q_from, do_from, k_from, v_from, sum_to

    kv, dq, posted = _barriers(1), _barriers(1), _barriers(ADDERS)
    q_full, do_full = _barriers(SLOTS), _barriers(DO_SLOTS)
    kv_full, dq_empty = kv.index(0), dq.index(0)
    fence_async_shared()
    barrier()
    copy = (
        q_from, q_from2, do_from, do_from2, k_from, k_from2, v_from, v_from2, lse_from, delta_from,
        q_s, q_s2, do_s, do_s2, k_s, k_s2, v_s, v_s2, lse_s, delta_s, kv_full, q_full, do_full, posted,
        n, group, head_0, heads, lo, hi, q_h, do_h, k_g, v_g,
    )  # fmt: skip
    add = (sum_to, sum_to2, dq_s, dq_s2, posted, dq_empty, TURNS, FIRST, tiles, n, head_0, heads, lo, hi)
    math = (
        kv_full, q_full, do_full, posted, dq_empty,
        DK, DV, LO, HI, M, n, group, share, heads, lo, whole_lo, whole_hi, hi, inner, outer, scale,
        dk_m, dk_g, dv_m, dv_g,
    )  # fmt: skip
    if HEAD > 128:
        p_s = _tile(BN, BM, dtype, 0)
        wide = (q_s, do_s, k_s, v_s, lse_s, delta_s, p_s, ds_s, dq_s) + math
        gl.warp_specialize(
            [
                (_math_wide, (wide, HEADS, BM, BN, K1, SLOTS, DO_SLOTS, ADD, SOFTCAP, W, BY_HEAD)),
                (_copy, (copy, HEADS, BM, BN, K1, K2, PARTS, SLOTS, DO_SLOTS, BY_HEAD)),
                (_add, (add, HEADS, BM, K1, K2, PARTS, W, BY_HEAD, 0)),
                (_add, (add, HEADS, BM, K1, K2, PARTS, W, BY_HEAD, 1)),
                (_add, (add, HEADS, BM, K1, K2, PARTS, W, BY_HEAD, 2)),
            ],
            [1, 1, 1, 1], [24, 24, 24, 24],
        )  # fmt: skip
    else:
        narrow = (q_s, q_s2, do_s, do_s2, k_s, k_s2, v_s, v_s2, lse_s, delta_s, ds_s, dq_s, dq_s2) + math
        gl.warp_specialize(
            [
                (_math, (narrow, HEADS, BM, BN, K1, SLOTS, DO_SLOTS, ADD, SOFTCAP, HELD, K2, BY_HEAD)),
                (_copy, (copy, HEADS, BM, BN, K1, K2, PARTS, SLOTS, DO_SLOTS, BY_HEAD)),
                (_add, (add, HEADS, BM, K1, K2, PARTS, W, BY_HEAD, 0)),
                (_add, (add, HEADS, BM, K1, K2, PARTS, W, BY_HEAD, 1)),
                (_add, (add, HEADS, BM, K1, K2, PARTS, W, BY_HEAD, 2)),
            ],
            [1, 1, 1, 1], [24, 24, 24, 24],
        )  # fmt: skip


# ---- the launch


@functools.cache
def _layout(height: int, width: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    if height == 1:
        return gl.NVMMASharedLayout(0, 32, 2)
    return gl.NVMMASharedLayout.get_default_for([height, width], getattr(gl, str(dtype).removeprefix("torch.")))


def _descriptor(t: Tensor, heads: int, height: int, width: int) -> TensorDescriptor:
    """Blocks of (N, K) or (N, H, K), whose heads are ranges of columns. Made here, once, since a program takes
    a microsecond to make one."""
    columns = (heads - 1) * t.stride(1) + t.shape[-1]
    return TensorDescriptor(
        t, [t.shape[0], columns], [t.stride(0), 1], [height, width], _layout(height, width, t.dtype)
    )


def takes(
    q: Tensor, dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, q_segments: Segments, kv_segments: Segments
) -> bool:
    """Whether these gradients are for this file, if the copy engine can read q, k, v and do: all three of them, and
    enough work that a first block of keys' lead over the last is short beside it, and four launches' time too."""
    return (
        device.capability(q.device) == (9, 0)
        and not device.interpreting()
        and q.shape[2] in TABLE
        and all(t is not None for t in (dq, dk, dv))
        and q.numel() * min(kv_segments.max_len, q_segments.max_len) >= WORTH
    )


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    lse_HP: Tensor,
    delta_HP: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    q_segments: Segments,
    kv_segments: Segments,
    *,
    inner: float,
    outer: float | None,
    scale: float,
    causal: bool,
    window: int | None,
    add: bool,
    shares: int,
) -> None:
    """Writes dq (N, H, K), dk and dv (M, G, K), whose channels are contiguous, in whatever dtype they have; or, if
    the query heads of a key head are divided into ``shares``, dk and dv of each share, (shares, M, G, K).

    ``lse_HP`` (natural, +inf for rows that see nothing; changed to base 2) and ``delta_HP``: fp32, P at least N rounded
    up to 128. ``inner`` times q·k, or outer·tanh of that, are the scores. With ``add``, dk and dv are added to what is
    there."""
    (N, H, K), (M, G, _) = q.shape, k.shape
    tiles, where, P = TABLE[K], q.device, lse_HP.shape[1]
    (K1, K2), parts = pieces(K), 2 if K > 128 else 1
    rows, blocks = device.cdiv(N, tiles.queries), device.cdiv(M, tiles.keys)
    sums = torch.empty((H, rows * tiles.queries, K), dtype=torch.float32, device=where)
    sizes = [blocks * tiles.keys] * 2 + [device.cdiv(rows, 4) * 4] * 2 + [H * rows * parts]
    lo, hi, first, last, turns = torch.empty(sum(sizes), dtype=torch.int32, device=where).split(sizes)
    starts, ends, kv_starts, kv_ends = q_segments.starts_S, q_segments.ends_S, kv_segments.starts_S, kv_segments.ends_S
    S = starts.shape[0]
    device.launch(
        _plan, (max(rows, blocks), H), lse_HP, turns, lo, hi, first, last, starts, ends, kv_starts, kv_ends, S,
        N, M, P, rows, blocks, window, tiles.queries, tiles.keys, parts, S.bit_length(), causal,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    factor = LOG2E if outer is None else 1.0
    each = [(q, tiles.queries), (do, tiles.queries), (k, tiles.keys), (v, tiles.keys)]
    sum_ND = sums.flatten(0, 1)
    device.launch(
        _backward, (blocks * G * shares,), *(_descriptor(t, t.shape[1], rows, K1) for t, rows in each),
        _descriptor(sum_ND, 1, tiles.queries, K1 // parts),
        *(_descriptor(t, 1, 1, tiles.queries) for t in (lse_HP, delta_HP)),
        *((_descriptor(t, t.shape[1], rows, K2) if K2 else None) for t, rows in each),
        _descriptor(sum_ND, 1, tiles.queries, K2) if K2 else None,
        dk, dv, lo, hi, first, last, turns, rows, M, G, q.stride(1), do.stride(1), k.stride(1), v.stride(1),
        *dk.stride()[-3:-1], *dv.stride()[-3:-1], inner * factor, LOG2E * (outer or 0.0), scale,
        H // G, K1, K2, tiles.queries, tiles.keys, tiles.slots, tiles.do_slots, add,
        outer is not None, tiles.held, window is not None, q.dtype == torch.bfloat16, shares,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    device.launch(
        _finish, (device.cdiv(N, 32), H), sums, dq, first, last, N, rows, *dq.stride()[:2], scale,
        K, device.next_power_of_2(K), tiles.queries, 32, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
