"""Forward of ``attention`` for Hopper (sm_90), in Gluon: products, exponentials and copies at the same time.

DOCSTRING
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import device
from ..segments import Segments
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
ROWS = gl.constexpr(64)  # queries of one warpgroup: the height of a Hopper product
NO_TILE = gl.constexpr(2147483647)


@aggregate
class Ring:
    """Slots of shared memory that the producer fills and the consumers empty, in turn. Slot ``i % slots`` is used for
    the i-th time round when ``i // slots`` is i; a barrier's phase is the parity of that."""

    tiles: gl.shared_memory_descriptor
    rest: gl.shared_memory_descriptor  # the second piece of each head, if it has one
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    slots: gl.constexpr

    @constexpr_function
    def __init__(self, tiles, rest, full, empty, slots):  # noqa: ANN001
        self.tiles = tiles
        self.rest = rest
        self.full = full
        self.empty = empty
        self.slots = gl.constexpr(slots)

    @jit
    def await_full(self, i):
        """Consumers: until the copies into slot i have arrived."""
        mbarrier.wait(self.full.index(i % self.slots), i // self.slots & 1)

    @jit
    def await_empty(self, i):
        """Producer: until the consumers have let go of the slot's last content."""
        mbarrier.wait(self.empty.index(i % self.slots), (i // self.slots & 1) ^ 1)

    @jit
    def let_go(self, i):
        """Consumers, one arrival from each warpgroup."""
        mbarrier.arrive(self.empty.index(i % self.slots), count=1)


@jit
def _ring(dtype: gl.constexpr, B: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, slots: gl.constexpr,
          per_slot: gl.constexpr, consumers: gl.constexpr):  # fmt: skip
    """A new ring whose slots hold ``per_slot`` tiles of B rows each."""
    tiles = gl.allocate_shared_memory(dtype, [slots * per_slot, B, K1], _layout(B, K1, dtype))
    rest = tiles
    if K2 > 0:
        rest = gl.allocate_shared_memory(dtype, [slots * per_slot, B, K2], _layout(B, K2, dtype))
    full = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [slots, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(slots):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=consumers)
    return Ring(tiles, rest, full, empty, slots)


@constexpr_function
def _layout(B, K, dtype):  # noqa: ANN001, ANN202
    return gl.NVMMASharedLayout.get_default_for([B, K], dtype)


@jit
def _descriptor(base, rows, row_stride, head_stride, HEADS: gl.constexpr, K: gl.constexpr,
                B: gl.constexpr, WIDTH: gl.constexpr):  # fmt: skip
    """What the copy engine reads and writes [B, WIDTH] of: rows, in which heads are column ranges."""
    shape = [rows, (HEADS - 1) * head_stride + K]
    layout: gl.constexpr = _layout(B, WIDTH, base.dtype.element_ty)
    return make_tensor_descriptor(base, shape, [row_stride, 1], [B, WIDTH], layout)


@jit
def _visible(row, segments, window, STEPS: gl.constexpr, CAUSAL: gl.constexpr):
    """``[lo, hi)``: the keys that a query row, or each of a tensor of them, may see."""
    q_starts, q_ends, kv_starts, kv_ends, S, M = segments
    s = row * 0  # how many segments start at or before the row; STEPS is the bit length of S
    for j in gl.static_range(STEPS):
        probe = s + (1 << (STEPS - 1 - j))
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
def _place(tile, N, section, BM: gl.constexpr):
    """Head and first row of a tile. Heads vary fastest, ``section`` of them at a time, so that what runs at once
    shares keys; late rows, which see most keys under a causal mask, come first."""
    blocks = gl.cdiv(N, BM)
    within = tile % (blocks * section)
    return tile // (blocks * section) * section + within % section, (blocks - 1 - within // section) * BM


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
def _produce(q, k, v, notes, counter, q_from, k_from, v_from, segments, N, window, q_h, k_g, v_g, section, tiles,
             GROUP: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, WARPGROUPS: gl.constexpr, BN: gl.constexpr,
             STEPS: gl.constexpr, CAUSAL: gl.constexpr):  # fmt: skip
    """One warp: for tile after tile, what to do into ``notes`` and the copies of q, k and v into their rings."""
    BM: gl.constexpr = ROWS * WARPGROUPS
    one_thread: gl.constexpr = gl.BlockedLayout([8], [32], [1], [0])
    number = gl.arange(0, 8, layout=one_thread)
    block, turn = 0, 0
    tile = gl.program_id(0)
    while tile < tiles:
        head, row = _place(tile, N, section, BM)
        lo, near = _visible(row, segments, window, STEPS, CAUSAL)  # bounds never decrease: the first row
        far, hi = _visible(gl.minimum(row + BM, N) - 1, segments, window, STEPS, CAUSAL)  # and the last are enough
        left = gl.cdiv(gl.minimum(far, hi) - lo, BN)
        first = lo + left * BN
        full = gl.maximum(gl.minimum(near, hi) - first, 0) // BN
        partial = left + gl.cdiv(gl.maximum(hi - first - full * BN, 0), BN)
        # Consumers begin with a block under a mask: any, if none needs it, and an empty one, if there is none at all.
        full = gl.where(partial == 0, gl.maximum(full - 1, 0), full)
        partial = gl.maximum(partial, 1)

        q.await_empty(turn)
        x = gl.where(number == 0, tile, lo)
        x = gl.where(number == 2, first, x)
        x = gl.where(number == 3, left, x)
        x = gl.where(number == 4, partial, x)
        x = gl.where(number == 5, full, x)
        notes.index(turn % q.slots).store(x)
        _copy(q, turn, q_from, row, head * q_h, WARPGROUPS, ROWS, K1, K2)
        for j in range(partial + full):
            key = _block(j, lo, first, left, partial, full, BN)
            k.await_empty(block)
            _copy(k, block, k_from, key, head // GROUP * k_g, 1, BN, K1, K2)
            v.await_empty(block)
            _copy(v, block, v_from, key, head // GROUP * v_g, 1, BN, K1, K2)
            block += 1
        turn += 1
        tile = gl.num_programs(0) + gl.atomic_add(counter, 1)
    q.await_empty(turn)
    notes.index(turn % q.slots).store(gl.full([8], NO_TILE, gl.int32, one_thread))
    mbarrier.arrive(q.full.index(turn % q.slots), count=1)


@jit
def _copy(ring, i, source, row, column, TILES: gl.constexpr, B: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr):
    """Begin the copies of TILES × B rows into slot i of a ring; its barrier counts their bytes."""
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
    """Online softmax in base 2: probabilities of a block relative to the new maximum, and by what earlier sums decay."""
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
def _consume(WHO: gl.constexpr, q, k, v, o_tiles, o_rests, notes, o_to, L, SINKS, segments, N, inner, outer, window,
             section, tiles, HEADS: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr, WARPGROUPS: gl.constexpr,
             BN: gl.constexpr, OWN_O: gl.constexpr, STEPS: gl.constexpr, CAUSAL: gl.constexpr):  # fmt: skip
    """One warpgroup: 64 rows of each tile."""
    W2: gl.constexpr = K2 if K2 > 0 else 16
    PIECES: gl.constexpr = 2 if K2 > 0 else 1
    dtype: gl.constexpr = q.tiles.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K1, 16])
    rest_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, W2, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    p_rest_layout: gl.constexpr = gl.DotOperandLayout(0, rest_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    every_thread: gl.constexpr = gl.BlockedLayout([8], [32], [4], [0])
    block, turn = 0, 0
    q.await_full(0)
    note = notes.index(0).load(every_thread)
    tile = _note(note, 0, every_thread)
    while tile < tiles:
        begin, first, left = _note(note, 1, every_thread), _note(note, 2, every_thread), _note(note, 3, every_thread)
        partial, full = _note(note, 4, every_thread), _note(note, 5, every_thread)
        head, row0 = _place(tile, N, section, ROWS * WARPGROUPS)
        row0 += WHO * ROWS
        row = row0 + gl.arange(0, ROWS, layout=rows)
        lo, hi = _visible(gl.minimum(row, N - 1), segments, window, STEPS, CAUSAL)
        top = gl.full([ROWS], LOWEST, gl.float32, rows)
        total = gl.full([ROWS], 0.0, gl.float32, rows)
        acc = gl.full([ROWS, K1], 0.0, gl.float32, o_layout)
        rest = gl.full([ROWS, W2], 0.0, gl.float32, rest_layout)
        mine = turn % q.slots * WARPGROUPS + WHO

        k.await_full(block)
        s = _scores(q, mine, k, block, s_layout, BN, K2)
        s = warpgroup_mma_wait(0, deps=(s,))
        k.let_go(block)
        key = _block(0, begin, first, left, partial, full, BN)
        p, decay, top, total = _softmax(s, top, total, inner, outer, lo, hi, key, True, BN)
        for clear in gl.static_range(2):
            for j in range(partial if clear else 1, partial + full if clear else partial):
                block += 1
                k.await_full(block)
                s = _scores(q, mine, k, block, s_layout, BN, K2)
                v.await_full(block - 1)
                acc, rest = _weigh(p, decay, v, block - 1, acc, rest, K2)
                s = warpgroup_mma_wait(PIECES, deps=(s,))
                k.let_go(block)
                key = _block(j, begin, first, left, partial, full, BN)
                p, decay, top, total = _softmax(s, top, total, inner, outer, lo, hi, key, not clear, BN)
                v.await_full(block - 1)  # passed long ago; a branch, behind which ptxas does not move exponentials
                if K2 > 0:
                    acc, rest = warpgroup_mma_wait(0, deps=(acc, rest))
                else:
                    acc = warpgroup_mma_wait(0, deps=(acc,))
                v.let_go(block - 1)
        if OWN_O:
            q.let_go(turn)
        v.await_full(block)
        acc, rest = _weigh(p, decay, v, block, acc, rest, K2)
        empty = total == 0
        share = 1.0
        if SINKS is not None:
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
            target = WHO
            store_wait(0)  # the copies out of the last tile have read it
        else:
            target = mine
        if K2 > 0:
            acc, rest = warpgroup_mma_wait(0, deps=(acc, rest))
            _put(rest, share, o_rests.index(target), dtype)
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        v.let_go(block)
        _put(acc, share, o_tiles.index(target), dtype)
        fence_async_shared()
        pieces, rests = o_to
        store(pieces, [row0, head * (K1 + K2)], o_tiles.index(target))
        if K2 > 0:
            store(rests, [row0, head * (K1 + K2) + K1], o_rests.index(target))
        if not OWN_O:
            store_wait(0)
            q.let_go(turn)
        block += 1
        turn += 1
        q.await_full(turn)
        note = notes.index(turn % q.slots).load(every_thread)
        tile = _note(note, 0, every_thread)
    store_wait(0)


@jit
def _scores(q, mine, k, i, layout: gl.constexpr, BN: gl.constexpr, K2: gl.constexpr):
    """Begin q·kᵀ of this warpgroup's rows and block i, over one or two pieces of the head."""
    zero = gl.full([ROWS, BN], 0.0, gl.float32, layout)
    slot = i % k.slots
    s = warpgroup_mma(q.tiles.index(mine), k.tiles.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    if K2 > 0:
        s = warpgroup_mma(q.rest.index(mine), k.rest.index(slot).permute((1, 0)), s, is_async=True)
    return s


@jit
def _weigh(p, decay, v, i, acc, rest, K2: gl.constexpr):
    """Begin ``acc · decay + p·v`` of block i; p stays in registers."""
    p = p.to(v.tiles.dtype)
    layout: gl.constexpr = acc.type.layout
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, layout))[:, None]
    slot = i % v.slots
    a = warpgroup_mma(gl.convert_layout(p, gl.DotOperandLayout(0, layout, 2)), v.tiles.index(slot), acc, is_async=True)
    r = rest
    if K2 > 0:
        narrow: gl.constexpr = rest.type.layout
        rest = rest * gl.convert_layout(decay, gl.SliceLayout(1, narrow))[:, None]
        p = gl.convert_layout(p, gl.DotOperandLayout(0, narrow, 2))
        r = warpgroup_mma(p, v.rest.index(slot), rest, is_async=True)
    return a, r


@jit
def _put(acc, share, tile, dtype: gl.constexpr):
    """Rows of acc, each times its share, into shared memory."""
    tile.store((acc * gl.convert_layout(share, gl.SliceLayout(1, acc.type.layout))[:, None]).to(dtype))


@jit(do_not_specialize=["S", "N", "M", "inner", "outer", "section"])
def _forward(
    Q, K, V, O, L, SINKS, counter, q_starts, q_ends, kv_starts, kv_ends, S, N, M,
    q_n, q_h, k_m, k_g, v_m, v_g, inner, outer, window, section,
    HEADS: gl.constexpr, GROUP: gl.constexpr, K1: gl.constexpr, K2: gl.constexpr,
    WARPGROUPS: gl.constexpr, BN: gl.constexpr, Q_SLOTS: gl.constexpr, KV_SLOTS: gl.constexpr, OWN_O: gl.constexpr,
    REGISTERS: gl.constexpr, STEPS: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers and descriptors; then every warp goes about its part."""
    W2: gl.constexpr = K2 if K2 > 0 else K1
    HEAD: gl.constexpr = K1 + K2
    dtype: gl.constexpr = Q.dtype.element_ty
    q = _ring(dtype, ROWS, K1, K2, Q_SLOTS, WARPGROUPS, WARPGROUPS)
    k = _ring(dtype, BN, K1, K2, KV_SLOTS, 1, WARPGROUPS)
    v = _ring(dtype, BN, K1, K2, KV_SLOTS, 1, WARPGROUPS)
    o_tiles, o_rests = q.tiles, q.rest
    if OWN_O:
        o_tiles = gl.allocate_shared_memory(dtype, [WARPGROUPS, ROWS, K1], _layout(ROWS, K1, dtype))
        if K2 > 0:
            o_rests = gl.allocate_shared_memory(dtype, [WARPGROUPS, ROWS, K2], _layout(ROWS, K2, dtype))
    notes = gl.allocate_shared_memory(gl.int32, [Q_SLOTS, 8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    GROUPS: gl.constexpr = HEADS // GROUP
    q_from = _descriptor(Q, N, q_n, q_h, HEADS, HEAD, ROWS, K1), _descriptor(Q, N, q_n, q_h, HEADS, HEAD, ROWS, W2)
    k_from = _descriptor(K, M, k_m, k_g, GROUPS, HEAD, BN, K1), _descriptor(K, M, k_m, k_g, GROUPS, HEAD, BN, W2)
    v_from = _descriptor(V, M, v_m, v_g, GROUPS, HEAD, BN, K1), _descriptor(V, M, v_m, v_g, GROUPS, HEAD, BN, W2)
    o_to = (
        _descriptor(O, N, HEADS * HEAD, HEAD, HEADS, HEAD, ROWS, K1),
        _descriptor(O, N, HEADS * HEAD, HEAD, HEADS, HEAD, ROWS, W2),
    )
    segments = (q_starts, q_ends, kv_starts, kv_ends, S, M)
    tiles = gl.cdiv(N, ROWS * WARPGROUPS) * HEADS
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (_consume, (0, q, k, v, o_tiles, o_rests, notes, o_to, L, SINKS, segments, N, inner, outer, window, section, tiles, HEADS, K1, K2, WARPGROUPS, BN, OWN_O, STEPS, CAUSAL)),
            (_consume, (1, q, k, v, o_tiles, o_rests, notes, o_to, L, SINKS, segments, N, inner, outer, window, section, tiles, HEADS, K1, K2, WARPGROUPS, BN, OWN_O, STEPS, CAUSAL)),
            (_produce, (q, k, v, notes, counter, q_from, k_from, v_from, segments, N, window, q_h, k_g, v_g, section, tiles, GROUP, K1, K2, WARPGROUPS, BN, STEPS, CAUSAL)),
        ], [4, 1], [REGISTERS, 24])
    else:
        gl.warp_specialize([
            (_consume, (0, q, k, v, o_tiles, o_rests, notes, o_to, L, SINKS, segments, N, inner, outer, window, section, tiles, HEADS, K1, K2, WARPGROUPS, BN, OWN_O, STEPS, CAUSAL)),
            (_consume, (1, q, k, v, o_tiles, o_rests, notes, o_to, L, SINKS, segments, N, inner, outer, window, section, tiles, HEADS, K1, K2, WARPGROUPS, BN, OWN_O, STEPS, CAUSAL)),
            (_consume, (2, q, k, v, o_tiles, o_rests, notes, o_to, L, SINKS, segments, N, inner, outer, window, section, tiles, HEADS, K1, K2, WARPGROUPS, BN, OWN_O, STEPS, CAUSAL)),
            (_produce, (q, k, v, notes, counter, q_from, k_from, v_from, segments, N, window, q_h, k_g, v_g, section, tiles, GROUP, K1, K2, WARPGROUPS, BN, STEPS, CAUSAL)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, 32])


class Tiles(NamedTuple):
    """One row of the launch table."""

    warpgroups: int  # of 64 query rows each, beside the producer
    keys: int  # of a block
    q_slots: int  # how many tiles of queries shared memory holds
    kv_slots: int  # how many blocks of keys, and of values
    own_o: bool  # whether outputs have shared memory of their own, or that of their queries
    registers: int  # of each consuming thread


TABLE: dict[int, Tiles] = {  # by head size
    64: Tiles(2, 128, 2, 4, True, 240),
    96: Tiles(2, 128, 1, 2, True, 240),
    128: Tiles(2, 128, 1, 2, True, 240),
    256: Tiles(2, 64, 1, 2, False, 240),
}
PIECES = {64: (64, 0), 96: (64, 32), 128: (128, 0), 256: (256, 0)}
CACHE = 2**25  # bytes of keys and values that may be in use at a time: what stays in a Hopper's L2 cache of 50 MB


def takes(q: Tensor, scale: float | None) -> bool:
    """Whether this kernel can be launched for queries that the copy engine can read: sm_90, and a head size of the
    table. A negative scale would turn maxima into minima."""
    return (
        device.capability(q.device) == (9, 0)
        and not device.interpreting()
        and q.shape[2] in TABLE
        and q.element_size() == 2
        and (scale is None or scale > 0)
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_segments: Segments, kv_segments: Segments, sinks: Tensor | None,
    *, inner: float, outer: float | None, causal: bool, window: int | None, with_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``o_NHK`` and, ``with_lse``, ``lse_NH`` of arguments that ``attention`` has checked and :func:`takes` accepts."""
    (N, H, K), (M, G, _) = q.shape, k.shape
    tiles = TABLE[K]
    o = torch.empty((N, H, K), dtype=q.dtype, device=q.device)
    lse = torch.empty((N, H), dtype=torch.float32, device=q.device) if with_lse else None
    counter = torch.zeros((1,), dtype=torch.int32, device=q.device)  # of tiles handed out
    together = max(1, CACHE // (max(kv_segments.max_len, 1) * 4 * K))  # key heads
    together = max(n for n in range(1, G + 1) if G % n == 0 and n <= together)
    programs = min(device.cdiv(N, 64 * tiles.warpgroups) * H, device.sms(q.device))
    device.launch(
        _forward, (programs,), q, k, v, o, lse, sinks, counter,
        q_segments.starts_S, q_segments.ends_S, kv_segments.starts_S, kv_segments.ends_S, q_segments.starts_S.shape[0],
        N, M, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], inner, outer, window, together * (H // G),
        H, H // G, *PIECES[K], *tiles, q_segments.starts_S.shape[0].bit_length(), causal,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return o, lse
