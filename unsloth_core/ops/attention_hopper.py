"""Forward of ``attention`` for Hopper (sm_90), in Gluon: copies, products and exponentials at the same time.

Contract, formula and masks are those of ``attention.py``, which calls this where :func:`takes` says so: 16-bit heads of
the sizes in ``TABLE`` that the copy engine can read, a positive scale. Everything else goes to the portable kernel.

*What bounds it.* 64 queries against 128 keys with heads of 128 are 4·64·128·128 FLOP: 1,024 clocks of an SM's tensor
cores. Their 8,192 exponentials take 512 clocks of its special units, and the other five instructions per score, 320 of
its schedulers. All of that fits beside the products if it is not in their way; a program that waits for a product, then
does its softmax, then waits for the next one adds them up. At head size 64 the first number halves and the others stay:
products and exponentials are even, and no kernel known to us gets beyond half of the tensor cores' rate.

*Pipeline.* A program is 12 warps and lives as long as the kernel. One warp copies; two groups of four warps
("warpgroups", which is what issues a Hopper product) each have 64 of a tile's 128 query rows. They share keys and
values, which go through rings of slots in shared memory; each slot has a barrier that its copy completes and one on
which both warpgroups say that they are done with it.

    producer        q  k0 v0 k1 v1 k2 v2 ...  q' k0' ...          as slots become empty, on into the next tile
    group 0  tensor [S0]       [S1][P0·v0]       [S2][P1·v1]      S1 = q·k1ᵀ is begun before P0·v0, awaited alone
             scalar     [e^S0 ]    [   e^S1     ]    [ e^S2 ...   and its softmax runs under P0·v0
    group 1  tensor       [S0]       [S1][P0·v0]       [S2]...    the groups fall out of step by themselves: one's
             scalar           [e^S0 ]    [   e^S1     ]           products fill what the other's softmax leaves

P never leaves registers: the layout of a product's result is, rounded to 16 bits, that of a left operand. The sums of a
row are scaled and P is rounded while the tensor cores work on the next scores. Blocks that need a mask (the diagonal, a
window's edge, a segment's end) come first in one loop, all others in a second without it.

*Schedule.* A counter in memory hands out tiles, those of late rows first, which are the longest under a causal mask:
the programs end within one short tile of each other. Which program does a tile changes no bit of it. The heads of one
key head run at the same time, and of a long sequence only as many key heads as the L2 cache holds. The producer takes
the next tile and works out its bounds while the consumers finish the last; they find them in ``notes``. The slot of the
queries is let go of when a tile's last scores are done: the next queries arrive under its last softmax and product.

Measured on one H100 80GB HBM3, Triton 3.6.0, causal, bf16, TFLOP/s beside cuDNN's in the same run; the peak is 989:
    head 64, H32/KV8    1×8192  459, cuDNN 447
    head 80, H32/KV32   1×4096  380, 326
    head 96, H32/KV32   1×4096  450, 387
    head 128, H32/KV8   1×8192  673, 615    1×16384  679, 592    2×2048  492, 466
    head 192, H16/KV16  1×4096  547, 496
    head 256, H16/KV8   1×8192  720, 636
What lost there, at head 128 and 8192 tokens, against 653 in the same run: barriers that make the groups take turns at
the tensor cores (FlashAttention-3's ping-pong) 560; blocks of 64 keys 547; scaling before the next scores are begun
609. A second slot for queries: 381 instead of 477 at 2×2048. A third warpgroup at head 64, with blocks of 64 keys: no
change. At 16384 tokens, keys and values of 16 MiB in use at a time instead of 8: 635 instead of 679.

Sources of the ideas: FlashAttention-3 (Shah et al. 2024) for warp specialisation and the order of products; online
softmax and the rest as in ``attention.py``."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import device
from ..segments import Segments
from .attention_tiles import pieces
from .gluon import (
    aggregate,
    constexpr_function,
    fence_async_shared,
    gl,
    jit,
    load,
    make_tensor_descriptor,
    mbarrier,
    store,
    store_wait,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-2e38)  # finite: a row that has seen nothing yet never computes −inf − (−inf)
CONSUMERS = gl.constexpr(2)  # warpgroups beside the producer
ROWS = gl.constexpr(64)  # queries of each: the height of a Hopper product
TILE = gl.constexpr(128)
NO_TILE = gl.constexpr(2147483647)


@aggregate
class Ring:
    """Slots of shared memory that the producer fills and the consumers empty, in turn. Slot ``i % slots`` is in use for
    the ``i // slots``-th time; a barrier knows the parity of that."""

    tiles: gl.shared_memory_descriptor
    rest: gl.shared_memory_descriptor  # the second piece of each head, if there is one
    full: gl.shared_memory_descriptor  # barriers, one for each slot
    empty: gl.shared_memory_descriptor
    slots: gl.constexpr

    @constexpr_function
    def __init__(self, tiles, rest, full, empty, slots):
        self.tiles = tiles
        self.rest = rest
        self.full = full
        self.empty = empty
        self.slots = gl.constexpr(slots)

    @jit
    def await_full(self, i):
        """Consumers: until what was copied into the slot has arrived."""
        mbarrier.wait(self.full.index(i % self.slots), i // self.slots & 1)

    @jit
    def await_empty(self, i):
        """Producer: until both consumers have let go of what was in the slot before."""
        mbarrier.wait(self.empty.index(i % self.slots), (i // self.slots & 1) ^ 1)

    @jit
    def let_go(self, i, when=True):
        """Consumers: the slot is not read any more, if ``when``."""
        mbarrier.arrive(self.empty.index(i % self.slots), count=1, pred=when)


@jit
def _ring(dtype: gl.constexpr, B: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr,
          slots: gl.constexpr, per_slot: gl.constexpr):  # fmt: skip
    """A new ring, whose slots hold ``per_slot`` tiles of B rows each."""
    tiles = gl.allocate_shared_memory(dtype, [slots * per_slot, B, K1], _layout(B, K1, dtype))
    rest = tiles
    if K2 > 0:
        rest = gl.allocate_shared_memory(dtype, [slots * per_slot, B, K2], _layout(B, K2, dtype))
    full = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(slots):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    return Ring(tiles, rest, full, empty, slots)


@constexpr_function
def _layout(B, K, dtype):
    return gl.NVMMASharedLayout.get_default_for([B, K], dtype)


@jit
def _descriptors(base, rows, row_stride, head_stride, HEADS: gl.constexpr, B: gl.constexpr,
                 K1: gl.constexpr, K2: gl.constexpr):  # fmt: skip
    """How the copy engine finds B rows of the first and of the second piece of a head: heads are column ranges."""
    dtype: gl.constexpr = base.dtype.element_ty
    shape = [rows, (HEADS - 1) * head_stride + K1 + K2]
    first = make_tensor_descriptor(base, shape, [row_stride, 1], [B, K1], _layout(B, K1, dtype))
    second = first
    if K2 > 0:
        second = make_tensor_descriptor(base, shape, [row_stride, 1], [B, K2], _layout(B, K2, dtype))
    return first, second


@jit
def _visible(row, segments, window, CAUSAL: gl.constexpr):
    """``[lo, hi)``: the keys that a query row, or each of a tensor of them, may see."""
    q_starts, q_ends, kv_starts, kv_ends, S, steps, M = segments
    s = row * 0  # how many segments start at or before the row; ``steps`` is the bit length of S
    for j in range(steps):
        probe = s + (1 << (steps - 1 - j))
        start = gl.load(q_starts + probe - 1, mask=probe <= S, other=2147483647)
        s = gl.where(start <= row, probe, s)
    found = s > 0
    q_end = gl.load(q_ends + s - 1, mask=found, other=0)
    kv_start = gl.load(kv_starts + s - 1, mask=found, other=0)
    kv_end = gl.load(kv_ends + s - 1, mask=found, other=0)
    lo, hi = kv_start, kv_end
    diagonal = row + (kv_end - q_end)
    if CAUSAL:
        hi = gl.minimum(hi, diagonal + 1)
    if window is not None:
        lo = gl.maximum(lo, diagonal - window + 1)
    # A row behind its segment's end is in a gap: an empty interval there keeps both bounds monotone.
    inside = row < q_end
    lo = gl.where(inside, gl.minimum(lo, kv_end), kv_end)
    hi = gl.where(inside, gl.maximum(hi, kv_start), kv_end)
    return gl.minimum(gl.maximum(lo, 0), M), gl.minimum(gl.maximum(hi, 0), M)


@jit
def _place(tile, N, section):
    """Head and first row of a tile. Heads vary fastest, ``section`` of them at a time, so that what runs at once
    shares keys; late rows, which see most keys under a causal mask, come first."""
    high = gl.cdiv(N, TILE)
    within = tile % (high * section)
    return tile // (high * section) * section + within % section, (high - 1 - within // section) * TILE


@jit
def _block(j, begin, first, left, partial, full, BN: gl.constexpr):
    """First key of block j: those that need a mask first (at the left end, then at the right), then the others."""
    masked = gl.where(j < left, begin + j * BN, first + (full + j - left) * BN)
    return gl.where(j < partial, masked, first + (j - partial) * BN)


@jit
def _note(notes, i: gl.constexpr, layout: gl.constexpr):
    """Number i of a tile's notes, as a scalar: every thread reads them all."""
    return gl.sum(gl.where(gl.arange(0, 8, layout=layout) == i, notes, 0), 0)


@jit
def _produce(
    q, k, v, notes, counter, Q, K, V, segments, N, window, q_n, q_h, k_m, k_g, v_m, v_g, section, tiles,
    HEADS: gl.constexpr, GROUP: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, BN: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """One warp: for tile after tile, what is to be done into ``notes``, and q, k and v into their rings."""
    one_thread: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    number = gl.arange(0, 8, layout=one_thread)
    M = segments[6]
    q_from = _descriptors(Q, N, q_n, q_h, HEADS, ROWS, K1, K2)
    k_from = _descriptors(K, M, k_m, k_g, HEADS // GROUP, BN, K1, K2)
    v_from = _descriptors(V, M, v_m, v_g, HEADS // GROUP, BN, K1, K2)
    block, turn = 0, 0
    tile = gl.program_id(0)
    while tile < tiles:
        head, row = _place(tile, N, section)
        begin, near = _visible(row, segments, window, CAUSAL)  # bounds never decrease from row to row: the first
        far, end = _visible(gl.minimum(row + TILE, N) - 1, segments, window, CAUSAL)  # and the last are enough
        left = gl.cdiv(gl.minimum(far, end) - begin, BN)
        first = begin + left * BN
        full = gl.maximum(gl.minimum(near, end) - first, 0) // BN
        partial = left + gl.cdiv(gl.maximum(end - first - full * BN, 0), BN)
        # Consumers begin with a block under a mask: with any one, if none needs a mask, and with an empty one, if no
        # row sees a key.
        full = gl.where(partial == 0, gl.maximum(full - 1, 0), full)
        partial = gl.maximum(partial, 1)

        q.await_empty(turn)
        x = gl.where(number == 0, tile, begin)
        x = gl.where(number == 2, first, x)
        x = gl.where(number == 3, left, x)
        x = gl.where(number == 4, partial, x)
        notes.store(gl.where(number == 5, full, x))
        _copy(q, turn, q_from, row, head * q_h, CONSUMERS, ROWS, K1, K2)
        for j in range(partial + full):
            key = _block(j, begin, first, left, partial, full, BN)
            k.await_empty(block)
            _copy(k, block, k_from, key, head // GROUP * k_g, 1, BN, K1, K2)
            v.await_empty(block)
            _copy(v, block, v_from, key, head // GROUP * v_g, 1, BN, K1, K2)
            block += 1
        turn += 1
        tile = gl.num_programs(0) + gl.atomic_add(counter, 1)
    q.await_empty(turn)
    notes.store(gl.full([8], NO_TILE, gl.int32, one_thread))
    mbarrier.arrive(q.full.index(0), count=1)


@jit
def _copy(ring, i, source, row, column, TILES: gl.constexpr, B: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr):
    """Begin to copy TILES × B rows into a slot; its barrier counts their bytes."""
    slot = i % ring.slots
    full = ring.full.index(slot)
    pieces, rests = source
    mbarrier.expect(full, TILES * B * (K1 + K2) * 2)
    for t in gl.static_range(TILES):
        load(pieces, [row + t * B, column], full, ring.tiles.index(slot * TILES + t))
        if K2 > 0:
            load(rests, [row + t * B, column + K1], full, ring.rest.index(slot * TILES + t))


@jit
def _softmax(s, top, total, inner, outer, lo, hi, key, MASK: gl.constexpr, BN: gl.constexpr):
    """Online softmax in base 2: probabilities relative to the new maximum, and by what earlier sums decay."""
    factor = inner * LOG2E
    if outer is not None:
        s = s * inner
        e = gl.exp2(gl.abs(s) * (-2 * LOG2E))  # tanh |s| = (1 − e) / (1 + e), never overflows
        t = (1.0 - e) / (1.0 + e)
        s = gl.where(s < 0, -t, t)
        factor = outer * LOG2E
    if MASK:
        column = key + gl.arange(0, BN, layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where((column[None, :] >= lo[:, None]) & (column[None, :] < hi[:, None]), s, float("-inf"))
    new = gl.maximum(top, gl.max(s, 1) * factor)
    p = gl.exp2(s * factor - new[:, None])
    decay = gl.exp2(top - new)
    return p, decay, new, total * decay + gl.sum(p, 1)


@jit
def _consume(
    WHO: gl.constexpr, q, k, v, o_tiles, o_rests, notes, O, L, SINKS, segments, N, inner, outer, window, section,
    tiles, HEADS: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, BN: gl.constexpr, OWN_O: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """A warpgroup: 64 rows of every tile of this program."""
    W2: gl.constexpr = K2 if K2 > 0 else 16
    PIECES: gl.constexpr = 2 if K2 > 0 else 1
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K1, 16])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W2, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, s_layout)
    every_thread: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    o_to = _descriptors(O, N, HEADS * (K1 + K2), K1 + K2, HEADS, ROWS, K1, K2)
    block, turn = 0, 0
    q.await_full(turn)
    x = notes.load(every_thread)
    tile = _note(x, 0, every_thread)
    while tile < tiles:
        begin, first, left = _note(x, 1, every_thread), _note(x, 2, every_thread), _note(x, 3, every_thread)
        partial, full = _note(x, 4, every_thread), _note(x, 5, every_thread)
        head, row0 = _place(tile, N, section)
        row0 += WHO * ROWS
        row = row0 + gl.arange(0, ROWS, layout=by_row)
        lo, hi = _visible(gl.minimum(row, N - 1), segments, window, CAUSAL)
        top = gl.full([ROWS], LOWEST, gl.float32, by_row)
        total = gl.full([ROWS], 0.0, gl.float32, by_row)
        acc = gl.full([ROWS, K1], 0.0, gl.float32, o_layout)
        rest = gl.full([ROWS, W2], 0.0, gl.float32, rest_layout)

        k.await_full(block)
        s = warpgroup_mma_wait(0, deps=(_scores(q, WHO, k, block, s_layout, BN, K2),))
        k.let_go(block)
        if OWN_O:
            q.let_go(turn, partial + full == 1)
        key = _block(0, begin, first, left, partial, full, BN)
        p, decay, top, total = _softmax(s, top, total, inner, outer, lo, hi, key, True, BN)
        for clear in gl.static_range(2):
            for j in range(partial if clear else 1, partial + full if clear else partial):
                block += 1
                k.await_full(block)
                s = _scores(q, WHO, k, block, s_layout, BN, K2)
                v.await_full(block - 1)
                acc, rest = _weigh(p, decay, v, block - 1, acc, rest, K2)
                s = warpgroup_mma_wait(PIECES, deps=(s,))  # all but what _weigh has begun
                k.let_go(block)
                if OWN_O:  # else the slot is that of the output too
                    q.let_go(turn, j + 1 == partial + full)
                key = _block(j, begin, first, left, partial, full, BN)
                p, decay, top, total = _softmax(s, top, total, inner, outer, lo, hi, key, not clear, BN)
                acc, rest = _await(acc, rest, K2)
                v.let_go(block - 1)
        v.await_full(block)
        acc, rest = _weigh(p, decay, v, block, acc, rest, K2)

        empty = total == 0
        share = 1.0
        if SINKS is not None:  # one more score, without a value
            sink = gl.load(SINKS + head).to(gl.float32) * LOG2E
            new = gl.maximum(top, sink)
            share = gl.exp2(top - new)
            total = total * share + gl.exp2(sink - new)
            top = new
        total = gl.where(empty, 1.0, total)
        if L is not None:
            lse = gl.where(empty, float("-inf"), (top + gl.log2(total)) * LN2)
            gl.store(L + row.to(gl.int64) * HEADS + head, lse, mask=row < N)
        share = share / total
        if OWN_O:
            store_wait(0)  # the copies out of the last tile have read it
        acc, rest = _await(acc, rest, K2)
        v.let_go(block)
        _put(acc, share, o_tiles.index(WHO))
        if K2 > 0:
            _put(rest, share, o_rests.index(WHO))
        fence_async_shared()
        pieces, rests = o_to
        store(pieces, [row0, head * (K1 + K2)], o_tiles.index(WHO))
        if K2 > 0:
            store(rests, [row0, head * (K1 + K2) + K1], o_rests.index(WHO))
        if not OWN_O:
            store_wait(0)
            q.let_go(turn)
        block += 1
        turn += 1
        q.await_full(turn)
        x = notes.load(every_thread)
        tile = _note(x, 0, every_thread)
    store_wait(0)


@jit
def _scores(q, WHO: gl.constexpr, k, i, layout: gl.constexpr, BN: gl.constexpr, K2: gl.constexpr):
    """Begin q·kᵀ of a warpgroup's rows and block i, over one or two pieces of the head."""
    zero = gl.full([ROWS, BN], 0.0, gl.float32, layout)
    slot = i % k.slots
    s = warpgroup_mma(q.tiles.index(WHO), k.tiles.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    if K2 > 0:
        s = warpgroup_mma(q.rest.index(WHO), k.rest.index(slot).permute((1, 0)), s, is_async=True)
    return s


@jit
def _weigh(p, decay, v, i, acc, rest, K2: gl.constexpr):
    """Begin ``acc · decay + p·v`` of block i, over one or two pieces of the head."""
    p = p.to(v.tiles.dtype)
    slot = i % v.slots
    a, r = _weigh_piece(p, decay, v.tiles.index(slot), acc), rest
    if K2 > 0:
        r = _weigh_piece(p, decay, v.rest.index(slot), rest)
    return a, r


@jit
def _weigh_piece(p, decay, v, acc):
    layout: gl.constexpr = acc.type.layout
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, layout))[:, None]
    return warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, layout, 2)), v, acc, is_async=True)


@jit
def _await(acc, rest, K2: gl.constexpr):
    """Until all products are done."""
    if K2 > 0:
        return warpgroup_mma_wait(0, deps=(acc, rest))
    else:
        return warpgroup_mma_wait(0, deps=(acc,)), rest


@jit
def _put(acc, share, tile):
    """Rows of acc, each times its share, into shared memory."""
    share = gl.convert_layout(share, gl.SliceLayout(1, acc.type.layout))
    tile.store((acc * share[:, None]).to(tile.dtype))


@jit(do_not_specialize=["S", "steps", "N", "M", "inner", "outer", "window", "section"])
def _forward(
    Q, K, V, O, L, SINKS, counter, q_starts, q_ends, kv_starts, kv_ends, S, steps, N, M,
    q_n, q_h, k_m, k_g, v_m, v_g, inner, outer, window, section,
    HEADS: gl.constexpr, GROUP: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr,
    BN: gl.constexpr, SLOTS: gl.constexpr, OWN_O: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers and descriptors; then every warp goes about its part."""
    dtype: gl.constexpr = Q.dtype.element_ty
    q = _ring(dtype, ROWS, K1, K2, 1, CONSUMERS)
    k = _ring(dtype, BN, K1, K2, SLOTS, 1)
    v = _ring(dtype, BN, K1, K2, SLOTS, 1)
    o_tiles, o_rests = q.tiles, q.rest
    if OWN_O:
        o_tiles = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, K1], _layout(ROWS, K1, dtype))
        if K2 > 0:
            o_rests = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, K2], _layout(ROWS, K2, dtype))
    notes = gl.allocate_shared_memory(gl.int32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    segments = (q_starts, q_ends, kv_starts, kv_ends, S, steps, M)
    tiles = gl.cdiv(N, TILE) * HEADS
    gl.warp_specialize(
        [
            (_consume, (0, q, k, v, o_tiles, o_rests, notes, O, L, SINKS, segments, N, inner, outer, window, section,
                        tiles, HEADS, K1, K2, BN, OWN_O, CAUSAL)),
            (_consume, (1, q, k, v, o_tiles, o_rests, notes, O, L, SINKS, segments, N, inner, outer, window, section,
                        tiles, HEADS, K1, K2, BN, OWN_O, CAUSAL)),
            (_produce, (q, k, v, notes, counter, Q, K, V, segments, N, window, q_n, q_h, k_m, k_g, v_m, v_g, section,
                        tiles, HEADS, GROUP, K1, K2, BN, CAUSAL)),
        ],
        [4, 1], [240, 24],  # warps and registers of each part but the first, which gets what is left: 4 and 240
    )  # fmt: skip


class Tiles(NamedTuple):
    """One row of the launch table."""

    keys: int  # in a block
    slots: int  # blocks of keys, and of values, that shared memory holds
    own_o: bool  # whether outputs leave from shared memory of their own, or from that of their queries

    def bytes(self, K: int) -> int:
        """Shared memory of tiles."""
        return 2 * K * (128 * (1 + self.own_o) + 2 * self.keys * self.slots)


TABLE: dict[int, Tiles] = {  # by head size
    64: Tiles(128, 3, True),
    80: Tiles(128, 2, True),
    96: Tiles(128, 2, True),
    128: Tiles(128, 2, True),
    192: Tiles(64, 2, True),
    256: Tiles(64, 2, False),
}
CACHE = 2**23  # bytes of keys and values to be in use at a time, of an L2 cache of 50 MB


def takes(q: Tensor, scale: float | None) -> bool:
    """Whether this kernel can be launched for queries that the copy engine can read. A negative scale would turn
    maxima into minima."""
    return (
        q.shape[2] in TABLE
        and q.element_size() == 2
        and (scale is None or scale > 0)
        and device.capability(q.device) == (9, 0)
        and not device.interpreting()
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, q_segments: Segments, kv_segments: Segments,
    *, inner: float, outer: float | None, causal: bool, window: int | None, with_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``o_NHK`` and, ``with_lse``, ``lse_NH``, of arguments that ``attention`` has checked and :func:`takes` accepts.
    Scores are ``inner · q·k``, or with ``outer`` its tanh times that."""
    (N, H, K), (M, G, _) = q.shape, k.shape
    o = torch.empty((N, H, K), dtype=q.dtype, device=q.device)
    lse = torch.empty((N, H), dtype=torch.float32, device=q.device) if with_lse else None
    handed_out = torch.zeros((1,), dtype=torch.int32, device=q.device)
    fit = CACHE // (max(kv_segments.max_len, 1) * 4 * K)  # key heads
    together = max(n for n in range(1, G + 1) if G % n == 0 and n <= max(fit, 1))
    S = q_segments.starts_S.shape[0]
    device.launch(
        _forward, (min(device.cdiv(N, 128) * H, device.sms(q.device)),), q, k, v, o, lse, sinks, handed_out,
        q_segments.starts_S, q_segments.ends_S, kv_segments.starts_S, kv_segments.ends_S, S, S.bit_length(), N, M,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], inner, outer, window, together * (H // G),
        H, H // G, *pieces(K), *TABLE[K], causal, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return o, lse
