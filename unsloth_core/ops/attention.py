"""Attention over packed segments: flash forward, and a deterministic backward in two kernels.

Formula, for query row i and key row j of the same segment, query head h and key head g = h // (H / G):
    S = scale · q·kᵀ;  S ← softcap · tanh(S / softcap);  lse = log Σ_visible e^S;  P = e^(S − lse);  o = P·v.
Backward:
    Δ = Σ o∘do − dlse;  dv = Pᵀ·do;  dS = P∘(do·vᵀ − Δ)∘(1 − (S / softcap)²);
    dq = scale · dS·k;  dk = scale · dSᵀ·q.
A sink is a score z of its head without a value, one more e^z in every sum: lse = log(e^z + Σ_visible e^S), so the
same P, Δ and dS hold, and dz = −Σ_rows e^(z − lse)·Δ.

Every mask is an interval. Query and key of a segment are aligned at their ends, so the key on the diagonal of
query row i is row i + (kv_end − q_end). The keys that row i sees are [lo, hi), where causal lowers hi to just
behind the diagonal and a window raises lo to W − 1 before it; and the queries that see a key row are an
interval by the same formula, mirrored. Both bounds never decrease from row to row of the packed buffer, so a
tile of rows meets one range of partners: blocks in the middle of it need no mask, blocks at its two ends do.
Causal or not, windows, packing, chunked prefill and decoding from a cache of static capacity are therefore
one code path, and each program finds its own bounds by a binary search of log2(S) steps. Rows in no segment,
or with nothing visible, give o = 0, lse = −inf and no gradient. Rows of k and v that lie in the gaps between
segments are never visible, but must be finite (0 · NaN is NaN).

Few queries per segment (decoding) go to ``attention_decode``, which splits the keys over programs.

Residuals: q, k, v, sinks and both segments (arguments; one if they are the same), o (an output), lse (an output
if asked for, else 4·N·H new bytes). Dtype: fp16, bf16 or fp32 in and out; products, softmax and sums in fp32, P and dS
rounded to the input's dtype for their products; lse fp32. fp32 inputs are multiplied exactly (no tf32),
and their dk and dv summed with compensation. Any strides,
no copies: blocks of aligned 16-bit heads go through tensor descriptors (Hopper's copy engine), all others
through pointers. d_sinks is summed from one part per 64 rows, in their order. Bytes (b per element): forward
fused (2·N·H + 2·M·G)·K·b; unfused 2·N·M·H·(4 + b) more. Backward needs 8·N·H scratch, fused on Hopper 4·N·H·K
more; where blocks of keys are too few to fill the machine, query heads are divided over several programs, which takes
8·M·G·K for each share. Limits: head size 1 to 256, the same for q, k and v; rows and channels lie less than 2^23
elements apart (a cotangent of which they do not is copied); double backward raises.

Sources of the ideas: online softmax (Milakov and Gimelshein 2018), FlashAttention-2 (Dao 2023) for the
two-kernel backward and the loop order, gpt-oss for sinks; base-2 exponentials throughout.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..autodiff import custom_vjp
from ..cost import Cost
from ..prepared import prepared
from ..segments import Segments
from ..tree import ABSENT, Tree
from . import attention_decode, attention_hopper, attention_hopper_bwd
from .attention_tiles import (
    LN2,
    LOG2E,
    LOWEST,
    blocks,
    check,
    factors,
    far_apart,
    held_tile,
    partners,
    pieces,
    probability,
    product,
    put,
    reader,
    scores,
    shares,
    statistic,
    tile,
)
from .language import cast, dot

# ---- the launch table


class Tiles(NamedTuple):
    """One row of the launch table. ``queries`` × ``keys`` is the block of scores that a program holds."""

    queries: int
    keys: int
    warps: int
    stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, int | bool]:
        """Launch options."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


class Launch(NamedTuple):
    """The tiles of all kernels for one head size, dtype and device."""

    forward: Tiles
    dkdv: Tiles
    dq: Tiles


# Columns: forward, dkdv, dq. Shared memory per program: 227 KiB on sm_90 and sm_100, 163 KiB on
# sm_80, 99 KiB on sm_86, sm_89 and sm_120 ("small"). fp32 products run on scalar units, so registers bound
# their tiles. "sm_90 pointers": for heads that the copy engine cannot read. There Triton 3.6 compiles every wider
# forward tile tried (128 or 64 queries, 64 or 128 keys, 1 or 2 stages) to reads beyond shared memory at a head of
# 33, as compute-sanitizer shows; triton-lang/triton #11366 is of this kind.
# fmt: off
TABLE: dict[tuple[str, int], Launch] = {  # by device class and largest head size
    ("sm_90", 64): Launch(
        Tiles(128, 64, 8, 2, 128), Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 3)
    ),
    ("sm_90", 96): Launch(
        Tiles(128, 64, 8, 2, 128), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)
    ),
    ("sm_90", 128): Launch(
        Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)
    ),
    ("sm_90", 256): Launch(
        Tiles(128, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(128, 32, 8, 2)
    ),
    ("sm_90 pointers", 64): Launch(
        Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 3)
    ),
    ("sm_90 pointers", 128): Launch(
        Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)
    ),
    ("sm_90 pointers", 256): Launch(
        Tiles(64, 32, 4, 2), Tiles(32, 64, 8, 2), Tiles(128, 32, 8, 2)
    ),
    ("sm_80", 64): Launch(
        Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 4, 2)
    ),
    ("sm_80", 128): Launch(
        Tiles(128, 32, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)
    ),
    ("sm_80", 256): Launch(
        Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 1), Tiles(64, 32, 8, 2)
    ),
    ("small", 64): Launch(
        Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2)
    ),
    ("small", 128): Launch(
        Tiles(128, 32, 8, 2), Tiles(32, 64, 8, 2), Tiles(64, 32, 4, 2)
    ),
    ("small", 256): Launch(
        Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(64, 32, 8, 1)
    ),
    ("fp32", 64): Launch(
        Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)
    ),
    ("fp32", 128): Launch(
        Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 16, 8, 1)
    ),
    ("fp32", 256): Launch(
        Tiles(32, 16, 8, 1), Tiles(16, 32, 8, 1), Tiles(16, 16, 4, 1)
    ),
}
# fmt: on
_ROWS = 64  # of a program of _delta
_FEW = 4  # tiles of queries are not divided: what adds up shares of them would be one launch more for the host
# Unequal, and small enough that a test of a hundred tokens walks several blocks in both directions.
INTERPRETED = Launch(Tiles(64, 32, 4, 1), Tiles(32, 64, 4, 1), Tiles(64, 32, 4, 1))


def configurations(capability: tuple[int, int]) -> dict[tuple[torch.dtype, str, int], Launch]:
    """The launch table of a device by (dtype, kind, largest head size): what has to be run once on each new GPU."""
    return {
        (dtype, kind, size): launch
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for (kind, size), launch in TABLE.items()
        if kind in (_kind(dtype, capability, tma=True), _kind(dtype, capability, tma=False))
    }


def _kind(dtype: torch.dtype, capability: tuple[int, int], *, tma: bool) -> str:
    if dtype == torch.float32 or capability < (8, 0):  # before sm_80 Triton's products are scalar
        return "fp32"
    if capability[0] in (9, 10):
        return "sm_90" if tma else "sm_90 pointers"
    return "sm_80" if capability == (8, 0) else "small"


@functools.cache
def _launch(dtype: torch.dtype, size: int, capability: tuple[int, int], tma: bool) -> Launch:
    if device.interpreting():
        return INTERPRETED
    kind = _kind(dtype, capability, tma=tma)
    return TABLE[kind, min(largest for k, largest in TABLE if k == kind and largest >= size)]


# ---- forward


@triton.jit(do_not_specialize=["inner", "outer"])
def _forward(
    Q, K, V, SINKS, O, L, q_starts, q_ends, kv_starts, kv_ends, S, N, M,
    q_n, q_h, q_k, k_m, k_g, k_k, v_m, v_g, v_k, inner, outer, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    CAUSAL: tl.constexpr, NEGATE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile of BM query rows of one head against the keys they see."""
    W2: tl.constexpr = K2 if K2 > 0 else 16
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    # Neighbouring programs share keys; late tokens, which see most keys under a causal mask, go first.
    program = tl.program_id(0)
    head = program % HEADS
    group = head // GROUP
    i = (tl.cdiv(N, BM) - 1 - program // HEADS) * BM
    r = tl.arange(0, BM)
    ok = i + r < N
    lo, hi = partners(
        tl.minimum(i + r, N - 1), q_starts, q_ends, kv_starts, kv_ends, S, M, window, STEPS, CAUSAL, False
    )
    begin, end = tl.min(lo, 0), tl.max(hi, 0)
    first, full, left, partial = blocks(lo, hi, begin, end, BN)

    q = held_tile(Q, i, N, head, q_n, q_h, q_k, HEADS, HEAD, BM, 0, K1, TMA)
    k_from = reader(K, end, k_m, k_g, HEADS // GROUP, HEAD, BN, K1, TMA)
    v_from = reader(V, end, v_m, v_g, HEADS // GROUP, HEAD, BN, K1, TMA)
    q2, k_from2, v_from2 = q, k_from, v_from
    if K2 > 0:
        q2 = held_tile(Q, i, N, head, q_n, q_h, q_k, HEADS, HEAD, BM, K1, K2, TMA)
        k_from2 = reader(K, end, k_m, k_g, HEADS // GROUP, HEAD, BN, K2, TMA)
        v_from2 = reader(V, end, v_m, v_g, HEADS // GROUP, HEAD, BN, K2, TMA)

    c = tl.arange(0, BN)
    m = tl.full((BM,), LOWEST, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    if SINKS is not None:  # a first score, with a weight and without a value
        m = tl.maximum(m, tl.load(SINKS + head).to(tl.float32))
        l += 1.0
    acc = tl.zeros((BM, K1), tl.float32)
    acc2 = tl.zeros((BM, W2), tl.float32)
    for masked in tl.static_range(1, -1, -1):
        for j in tl.range(0, partial if masked else full):
            n = first + j * BN
            if masked:
                n = tl.where(j < left, begin + j * BN, first + (full + j - left) * BN)
            k = tile(k_from, n, end, group, k_m, k_g, k_k, HEAD, 0, BN, K1, masked, TMA)
            k2 = k
            if K2 > 0:
                k2 = tile(k_from2, n, end, group, k_m, k_g, k_k, HEAD, K1, BN, K2, masked, TMA)
            s, factor = scores(q, q2, k, k2, inner, outer, K2, NEGATE)
            if masked:
                visible = ((n + c)[None, :] >= lo[:, None]) & ((n + c)[None, :] < hi[:, None])
                s = tl.where(visible, s * factor, float("-inf"))
                top = tl.maximum(m, tl.max(s, 1))
                p = probability(s, 1.0, top[:, None], EXACT)
            else:
                top = tl.maximum(m, tl.max(s, 1) * factor)
                p = probability(s, factor, top[:, None], EXACT)
            decay = tl.exp2((m - top) * LOG2E)
            m = top
            l = l * decay + tl.sum(p, 1)
            p = cast(p, V.dtype.element_ty)
            v = tile(v_from, n, end, group, v_m, v_g, v_k, HEAD, 0, BN, K1, masked, TMA)
            acc = dot(p, v, acc * decay[:, None])
            if K2 > 0:
                v2 = tile(v_from2, n, end, group, v_m, v_g, v_k, HEAD, K1, BN, K2, masked, TMA)
                acc2 = dot(p, v2, acc2 * decay[:, None])

    empty = (l == 0) if SINKS is None else (lo >= hi)
    l = tl.where(empty, 1.0, l)
    at = i.to(tl.int64) * HEADS + head
    if L is not None:
        tl.store(L + at + r * HEADS, tl.where(empty, float("-inf"), m + tl.log2(l) * LN2), mask=ok)
    offset = r * (HEADS * HEAD)
    put(O + at * HEAD, offset, ok, acc / l[:, None], HEAD, 0, K1, False)
    if K2 > 0:
        put(O + at * HEAD, offset, ok, acc2 / l[:, None], HEAD, K1, K2, False)


# ---- backward: Δ, dq, and dk with dv


@triton.jit
def _statistics(delta, row, ok, LSE, DLSE, SINKS, PARTS, part, parts, head, l_n, l_h, dl_n, dl_h):
    """lse and Δ of some rows, made of lse and Σ o∘do; lse is +inf for rows that see nothing, whose P = e^(S − inf) is
    then 0 whatever S is. Their share of d_sinks is stored in PARTS (H, parts)."""
    if DLSE is not None:
        delta -= tl.load(DLSE + row * dl_n + head * dl_h, mask=ok, other=0.0).to(tl.float32)
    lse = tl.load(LSE + row * l_n + head * l_h, mask=ok, other=float("-inf"))
    empty = lse == float("-inf")
    delta = tl.where(empty, 0.0, delta)
    if PARTS is not None:
        weight = tl.exp2((tl.load(SINKS + head).to(tl.float32) - tl.where(empty, 0.0, lse)) * LOG2E)
        tl.store(PARTS + head * parts + part, tl.sum(tl.where(empty, 0.0, -weight * delta), 0))
    return tl.where(empty, float("inf"), lse), delta


@triton.jit
def _delta(
    O, DO, L, DLSE, SINKS, LSE, DELTA, PARTS, N, P, o_n, o_h, o_k, do_n, do_h, do_k, l_n, l_h, dl_n, dl_h,
    HEAD: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Δ = Σ o∘do − dlse, and lse again, both (H, P) so that backward reads them in rows: where dq is not needed."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * B + tl.arange(0, B)
    ok, wide = row < N, row.to(tl.int64)
    channel = tl.arange(0, WIDTH)
    mask = ok[:, None] & (channel < HEAD)[None, :]
    o = tl.load(O + head * o_h + (wide * o_n)[:, None] + (channel * o_k)[None, :], mask=mask, other=0.0).to(tl.float32)
    do = tl.load(DO + head * do_h + (wide * do_n)[:, None] + (channel * do_k)[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    delta = tl.sum(o * do, 1)
    part, parts = tl.program_id(0), tl.num_programs(0)
    lse, delta = _statistics(delta, wide, ok, L, DLSE, SINKS, PARTS, part, parts, head, l_n, l_h, dl_n, dl_h)
    tl.store(LSE + head * P + row, lse)
    tl.store(DELTA + head * P + row, delta)


@triton.jit
def _sum_parts(PARTS, DSINKS, parts, B: tl.constexpr):
    """One element of d_sinks, from its parts in their order."""
    head = tl.program_id(0)
    total = tl.zeros((B,), tl.float32)
    for first in range(0, parts, B):
        part = first + tl.arange(0, B)
        total += tl.load(PARTS + head.to(tl.int64) * parts + part, mask=part < parts, other=0.0)
    tl.store(DSINKS + head, cast(tl.sum(total, 0), DSINKS.dtype.element_ty))


@triton.jit
def _add_product(total, lost, a, b, EXACT: tl.constexpr):
    """``total + a·b``, and with EXACT what that addition lost, which the next one starts from (Kahan 1965): fp32
    products are added term by term, and 65,536 terms cost 64 units in the last place without (dk of the first key)."""
    if EXACT:
        part = dot(a, b, lost)
        new = total + part
        return new, part - (new - total)
    else:
        return dot(a, b, total), lost


@triton.jit(do_not_specialize=["inner", "outer", "scale"])
def _dkdv(
    Q, K, V, DO, LSE, DELTA, P, DK, DV, q_starts, q_ends, kv_starts, kv_ends, S, N, M,
    q_n, q_h, q_k, k_m, k_g, k_k, v_m, v_g, v_k, do_n, do_h, do_k, dk_m, dk_g, dv_m, dv_g, inner, outer, scale, window,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    CAUSAL: tl.constexpr, NEGATE: tl.constexpr, TMA: tl.constexpr, ADD: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """dk and dv (either may be None) of BN key rows of one key head: loops over its query heads and the rows
    that see it. With ADD they are added to what is there. With SHARES the query heads are divided over that many
    programs, each of which writes a part of its own; ``_sum_shares`` adds them.

    Scores are computed transposed, K·Qᵀ, so that Pᵀ and dSᵀ are results of a product as they stand:
    transposing a result serialises Hopper's matrix units and was miscompiled by several Triton versions.
    """
    W2: tl.constexpr = K2 if K2 > 0 else 16
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    EACH: tl.constexpr = (GROUP + SHARES - 1) // SHARES
    share = tl.program_id(0) % SHARES
    program = tl.program_id(0) // SHARES
    group = program % GROUPS
    n = program // GROUPS * BN
    c = tl.arange(0, BN)
    ok = n + c < M
    lo, hi = partners(tl.minimum(n + c, M - 1), kv_starts, kv_ends, q_starts, q_ends, S, N, window, STEPS, CAUSAL, True)
    begin, end = tl.min(lo, 0) // 4 * 4, tl.max(hi, 0)  # a descriptor's columns start at multiples of 16 bytes
    first, full, left, partial = blocks(lo, hi, begin, end, BM)

    k = held_tile(K, n, M, group, k_m, k_g, k_k, GROUPS, HEAD, BN, 0, K1, TMA)
    v = held_tile(V, n, M, group, v_m, v_g, v_k, GROUPS, HEAD, BN, 0, K1, TMA)
    q_from = reader(Q, end, q_n, q_h, GROUPS * GROUP, HEAD, BM, K1, TMA)
    do_from = reader(DO, end, do_n, do_h, GROUPS * GROUP, HEAD, BM, K1, TMA)
    if TMA:
        lse_from = tl.make_tensor_descriptor(LSE, [GROUPS * GROUP, P], [P, 1], [1, BM])
        delta_from = tl.make_tensor_descriptor(DELTA, [GROUPS * GROUP, P], [P, 1], [1, BM])
    else:
        lse_from, delta_from = LSE, DELTA
    k2, v2, q_from2, do_from2 = k, v, q_from, do_from
    if K2 > 0:
        k2 = held_tile(K, n, M, group, k_m, k_g, k_k, GROUPS, HEAD, BN, K1, K2, TMA)
        v2 = held_tile(V, n, M, group, v_m, v_g, v_k, GROUPS, HEAD, BN, K1, K2, TMA)
        q_from2 = reader(Q, end, q_n, q_h, GROUPS * GROUP, HEAD, BM, K2, TMA)
        do_from2 = reader(DO, end, do_n, do_h, GROUPS * GROUP, HEAD, BM, K2, TMA)

    r = tl.arange(0, BM)
    dk, dv = tl.zeros((BN, K1), tl.float32), tl.zeros((BN, K1), tl.float32)
    dk2, dv2 = tl.zeros((BN, W2), tl.float32), tl.zeros((BN, W2), tl.float32)
    dk_lost, dv_lost, dk2_lost, dv2_lost = dk, dv, dk2, dv2
    for member in tl.range(share * EACH, tl.minimum(share * EACH + EACH, GROUP)):
        head = group * GROUP + member
        for masked in tl.static_range(1, -1, -1):
            for j in tl.range(0, partial if masked else full):
                i = first + j * BM
                if masked:
                    i = tl.where(j < left, begin + j * BM, first + (full + j - left) * BM)
                q = tile(q_from, i, end, head, q_n, q_h, q_k, HEAD, 0, BM, K1, masked, TMA)
                do = tile(do_from, i, end, head, do_n, do_h, do_k, HEAD, 0, BM, K1, masked, TMA)
                q2, do2 = q, do
                if K2 > 0:
                    q2 = tile(q_from2, i, end, head, q_n, q_h, q_k, HEAD, K1, BM, K2, masked, TMA)
                    do2 = tile(do_from2, i, end, head, do_n, do_h, do_k, HEAD, K1, BM, K2, masked, TMA)
                lse = statistic(lse_from, head, i, P, BM, TMA)
                s, factor = scores(k, k2, q, q2, inner, outer, K2, NEGATE)
                p = probability(s, factor, lse[None, :], EXACT)
                if masked:
                    p = tl.where(((i + r)[None, :] >= lo[:, None]) & ((i + r)[None, :] < hi[:, None]), p, 0.0)
                weight = cast(p, Q.dtype.element_ty)
                if outer is not None:
                    p = p * (1.0 - s * s)  # at once: s need not live on
                if DV is not None:
                    dv, dv_lost = _add_product(dv, dv_lost, weight, do, EXACT)
                    if K2 > 0:
                        dv2, dv2_lost = _add_product(dv2, dv2_lost, weight, do2, EXACT)
                if DK is not None:
                    delta = statistic(delta_from, head, i, P, BM, TMA)
                    ds = p * (product(v, v2, do, do2, K2) - delta[None, :])
                    ds = cast(ds, Q.dtype.element_ty)
                    dk, dk_lost = _add_product(dk, dk_lost, ds, q, EXACT)
                    if K2 > 0:
                        dk2, dk2_lost = _add_product(dk2, dk2_lost, ds, q2, EXACT)

    if ADD:
        ok = ok & (lo < hi)  # nothing is added to keys that no query sees
    row = n.to(tl.int64) + share.to(tl.int64) * M
    if DV is not None:
        at, offset = row * dv_m + group.to(tl.int64) * dv_g, c * dv_m
        put(DV + at, offset, ok, dv, HEAD, 0, K1, ADD)
        if K2 > 0:
            put(DV + at, offset, ok, dv2, HEAD, K1, K2, ADD)
    if DK is not None:
        at, offset = row * dk_m + group.to(tl.int64) * dk_g, c * dk_m
        put(DK + at, offset, ok, dk * scale, HEAD, 0, K1, ADD)
        if K2 > 0:
            put(DK + at, offset, ok, dk2 * scale, HEAD, K1, K2, ADD)


@triton.jit
def _sum_shares(
    PARTS, OUT, M, out_m, out_g,
    GROUPS: tl.constexpr, SHARES: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, B: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """B rows of one head of dk or dv from its parts (SHARES, M, GROUPS, HEAD), in their order."""
    n, group = tl.program_id(0).to(tl.int64) * B, tl.program_id(1).to(tl.int64)
    r, channel = tl.arange(0, B), tl.arange(0, WIDTH)
    ok = n + r < M
    total = tl.zeros((B, WIDTH), tl.float32)
    for share in tl.static_range(SHARES):
        at = ((share * M.to(tl.int64) + n) * GROUPS + group) * HEAD
        part = PARTS + at + (r * (GROUPS * HEAD))[:, None] + channel[None, :]
        total += tl.load(part, mask=ok[:, None] & (channel < HEAD)[None, :], other=0.0)
    put(OUT + n * out_m + group * out_g, r * out_m, ok, total, HEAD, 0, WIDTH, ADD)


@triton.jit(do_not_specialize=["inner", "outer", "scale"])
def _dq(
    Q, K, V, DO, O, L, DLSE, SINKS, LSE, DELTA, PARTS, P, DQ, q_starts, q_ends, kv_starts, kv_ends, S, N, M,
    q_n, q_h, q_k, k_m, k_g, k_k, v_m, v_g, v_k, do_n, do_h, do_k, o_n, o_h, o_k, l_n, l_h, dl_n, dl_h, dq_n, dq_h,
    inner, outer, scale, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    CAUSAL: tl.constexpr, NEGATE: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq of BM query rows of one head: loops over the keys they see. It has do and comes first, so Δ is made here."""
    W2: tl.constexpr = K2 if K2 > 0 else 16
    program = tl.program_id(0)
    head = program % HEADS
    group = head // GROUP
    i = (tl.cdiv(N, BM) - 1 - program // HEADS) * BM
    r = tl.arange(0, BM)
    ok = i + r < N
    lo, hi = partners(
        tl.minimum(i + r, N - 1), q_starts, q_ends, kv_starts, kv_ends, S, M, window, STEPS, CAUSAL, False
    )
    begin, end = tl.min(lo, 0), tl.max(hi, 0)
    first, full, left, partial = blocks(lo, hi, begin, end, BN)

    q = held_tile(Q, i, N, head, q_n, q_h, q_k, HEADS, HEAD, BM, 0, K1, TMA)
    do = held_tile(DO, i, N, head, do_n, do_h, do_k, HEADS, HEAD, BM, 0, K1, TMA)
    k_from = reader(K, end, k_m, k_g, HEADS // GROUP, HEAD, BN, K1, TMA)
    v_from = reader(V, end, v_m, v_g, HEADS // GROUP, HEAD, BN, K1, TMA)
    q2, do2, k_from2, v_from2 = q, do, k_from, v_from
    if K2 > 0:
        q2 = held_tile(Q, i, N, head, q_n, q_h, q_k, HEADS, HEAD, BM, K1, K2, TMA)
        do2 = held_tile(DO, i, N, head, do_n, do_h, do_k, HEADS, HEAD, BM, K1, K2, TMA)
        k_from2 = reader(K, end, k_m, k_g, HEADS // GROUP, HEAD, BN, K2, TMA)
        v_from2 = reader(V, end, v_m, v_g, HEADS // GROUP, HEAD, BN, K2, TMA)
    o = held_tile(O, i, N, head, o_n, o_h, o_k, HEADS, HEAD, BM, 0, K1, False).to(tl.float32)
    delta = tl.sum(o * do.to(tl.float32), 1)
    if K2 > 0:
        o = held_tile(O, i, N, head, o_n, o_h, o_k, HEADS, HEAD, BM, K1, K2, False).to(tl.float32)
        delta += tl.sum(o * do2.to(tl.float32), 1)
    wide = (i + r).to(tl.int64)
    lse, delta = _statistics(
        delta, wide, ok, L, DLSE, SINKS, PARTS, i // BM, tl.cdiv(N, BM), head, l_n, l_h, dl_n, dl_h
    )
    tl.store(LSE + head.to(tl.int64) * P + i + r, lse, mask=ok)
    tl.store(DELTA + head.to(tl.int64) * P + i + r, delta, mask=ok)

    c = tl.arange(0, BN)
    dq, dq2 = tl.zeros((BM, K1), tl.float32), tl.zeros((BM, W2), tl.float32)
    for masked in tl.static_range(1, -1, -1):
        for j in tl.range(0, partial if masked else full):
            n = first + j * BN
            if masked:
                n = tl.where(j < left, begin + j * BN, first + (full + j - left) * BN)
            k = tile(k_from, n, end, group, k_m, k_g, k_k, HEAD, 0, BN, K1, masked, TMA)
            v = tile(v_from, n, end, group, v_m, v_g, v_k, HEAD, 0, BN, K1, masked, TMA)
            k2, v2 = k, v
            if K2 > 0:
                k2 = tile(k_from2, n, end, group, k_m, k_g, k_k, HEAD, K1, BN, K2, masked, TMA)
                v2 = tile(v_from2, n, end, group, v_m, v_g, v_k, HEAD, K1, BN, K2, masked, TMA)
            s, factor = scores(q, q2, k, k2, inner, outer, K2, NEGATE)
            p = probability(s, factor, lse[:, None], Q.dtype.element_ty == tl.float32)
            if masked:
                p = tl.where(((n + c)[None, :] >= lo[:, None]) & ((n + c)[None, :] < hi[:, None]), p, 0.0)
            if outer is not None:
                p = p * (1.0 - s * s)
            ds = cast(p * (product(do, do2, v, v2, K2) - delta[:, None]), Q.dtype.element_ty)
            dq = dot(ds, k, dq)
            if K2 > 0:
                dq2 = dot(ds, k2, dq2)

    at, offset = i.to(tl.int64) * dq_n + head.to(tl.int64) * dq_h, r * dq_n
    put(DQ + at, offset, ok, dq * scale, HEAD, 0, K1, False)
    if K2 > 0:
        put(DQ + at, offset, ok, dq2 * scale, HEAD, K1, K2, False)


# ---- the op


@prepared
def attention_fwd(
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGK: Tensor,
    q_segments: Segments,
    kv_segments: Segments,
    sinks_H: Tensor | Any = ABSENT,
    *,
    needs: Tree,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Any, Tree]:
    """Attention of every query row over the visible keys of the segment with the same index.

    ``q_NHK`` (N, H, K), ``k_MGK`` and ``v_MGK`` (M, G, K): fp16, bf16 or fp32, any strides; H a multiple of
    G. ``sinks_H``: one learned score per head, in any of the three dtypes, that joins the softmax of every row that
    sees a key and has no value. ``scale``: default K**-0.5. A query's position counts from the end: the last query
    row of a segment stands at its last key row. ``causal``: keys up to that position. ``window`` W: only keys whose
    position is greater than the query's minus W. ``softcap`` c: scores become c·tanh(score / c). Returns ``o_NHK``
    in q's dtype, new and contiguous, and with ``return_lse`` also ``lse_NH`` (natural logarithm, fp32, the sink
    included), which takes part in the gradient. Raises ValueError for shapes, dtypes, devices or options that do not
    fit, NotImplementedError for rows 2^23 or more elements apart.
    """
    check("attention", q_NHK, k_MGK, v_MGK, q_segments, kv_segments, sinks_H, window, softcap)
    (N, H, K), (M, G, _) = q_NHK.shape, k_MGK.shape
    keep = any(needs[:3]) or (sinks_H is not ABSENT and needs[5])
    if attention_decode.takes(q_segments, H // G):
        o, lse = attention_decode.attend(
            q_NHK, k_MGK, v_MGK, q_segments, kv_segments, ABSENT, sinks_H, scale=scale, causal=causal, window=window,
            softcap=softcap, with_lse=return_lse or keep,
        )  # fmt: skip
    elif (tma := _by_tma(q_NHK, k_MGK, v_MGK)) and attention_hopper.takes(q_NHK, scale):
        inner, outer, _ = factors(K, scale, softcap)
        o, lse = attention_hopper.attend(
            q_NHK, k_MGK, v_MGK, None if sinks_H is ABSENT else sinks_H, q_segments, kv_segments,
            inner=inner, outer=outer, causal=causal, window=window, with_lse=return_lse or keep,
        )  # fmt: skip
    else:
        tiles = _launch(q_NHK.dtype, K, device.capability(q_NHK.device), tma).forward
        o = torch.empty((N, H, K), dtype=q_NHK.dtype, device=q_NHK.device)
        lse = torch.empty((N, H), dtype=torch.float32, device=q_NHK.device) if return_lse or keep else None
        device.launch(
            _forward, (device.cdiv(N, tiles.queries) * H,), q_NHK, k_MGK, v_MGK,
            None if sinks_H is ABSENT else sinks_H, o, lse,
            *_segments(q_segments, kv_segments), N, M, *q_NHK.stride(), *k_MGK.stride(), *v_MGK.stride(),
            *factors(K, scale, softcap)[:2], window, H, H // G, K, *pieces(K), tiles.queries, tiles.keys,
            q_segments.starts_S.shape[0].bit_length(), causal, scale is not None and scale < 0,
            tma, **tiles.options(),
        )  # fmt: skip
    out = (o, lse) if return_lse else o
    others = ABSENT if _same(q_segments, kv_segments) else kv_segments
    return out, (q_NHK, k_MGK, v_MGK, o, ABSENT if lse is None else lse, q_segments, others, sinks_H)


@prepared
def attention_bwd(
    residuals: Tree,
    dy: Tensor | tuple[Tensor, Tensor],
    *,
    needs: Tree,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    into: tuple[Any, Any, Any] = (ABSENT, ABSENT, ABSENT),
    add: bool = False,
) -> tuple[Any, ...]:
    """``(dq, dk, dv, ABSENT, ABSENT, dsinks)``: dq with Δ, then dk with dv; what is not needed is not computed.

    ``into``: where to write dq, dk and dv, if not into new tensors: any dtype, heads and rows of any strides,
    channels contiguous; slices of one buffer for a stacked projection. It is donated. With ``add``, dk and dv are
    added to what their buffers hold.
    """
    q, k, v, o, lse, q_segments, kv_segments, sinks = residuals
    kv_segments = q_segments if kv_segments is ABSENT else kv_segments
    (N, H, K), (M, G, _) = q.shape, k.shape
    where, group = q.device, H // G
    do, dlse = dy if isinstance(dy, tuple) else (dy, ABSENT)
    if do is ABSENT:
        do = o.new_zeros(()).expand(o.shape)
    if far_apart(do):
        do = do.contiguous()
    tma = _by_tma(q, k, v, do)
    launch = _launch(q.dtype, K, device.capability(where), tma)
    inner, outer, scale = factors(K, scale, softcap)
    segments = (*_segments(q_segments, kv_segments), N, M)
    strides = (*q.stride(), *k.stride(), *v.stride(), *do.stride())
    steps = q_segments.starts_S.shape[0].bit_length()

    dq, dk, dv = (
        None if not n else torch.empty(t.shape, dtype=t.dtype, device=where) if given is ABSENT else given
        for t, n, given in zip((q, k, v), needs[:3], into, strict=True)
    )
    P = device.cdiv(N, _ROWS) * _ROWS + 128  # a tile starts at any row and is at most 128 long
    fused = tma and attention_hopper_bwd.takes(q, dq, dk, dv, q_segments, kv_segments)
    apart = fused or dq is None  # Δ by a kernel of its own, or by that of dq
    rows = _ROWS if apart else launch.dq.queries
    parts = None
    if sinks is not ABSENT and needs[5]:
        parts = torch.empty((H, device.cdiv(P if apart else N, rows)), dtype=torch.float32, device=where)
    # What is behind the last row is multiplied by zeros, so it has to be finite.
    lse_h, delta = (torch.empty if apart else torch.zeros)((2, H, P), dtype=torch.float32, device=where).unbind()
    dlse = None if dlse is ABSENT else dlse
    of_rows = (*o.stride(), *do.stride()) if apart else o.stride()
    of_rows = (*of_rows, *lse.stride(), *((0, 0) if dlse is None else dlse.stride()))
    about_rows = (lse, dlse, None if parts is None else sinks, lse_h, delta, parts)
    if fused or dq is None:
        device.launch(
            _delta, (P // _ROWS, H), o, do, *about_rows, N, P, *of_rows,
            K, device.next_power_of_2(K), _ROWS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        tiles = launch.dq
        device.launch(
            _dq, (device.cdiv(N, tiles.queries) * H,), q, k, v, do, o, *about_rows, P, dq, *segments, *strides,
            *of_rows, *dq.stride()[:2],
            inner, outer, scale, window, H, group, K, *pieces(K), tiles.queries, tiles.keys, steps, causal, scale < 0,
            tma, **tiles.options(),
        )  # fmt: skip
    # Where blocks of keys do not fill the machine, several programs have a share of the query heads each.
    tiles = launch.dkdv
    keys = attention_hopper_bwd.TABLE[K].keys if fused else tiles.keys
    count = shares(device.cdiv(M, keys) * G, group, device.sms(where))
    if group * device.cdiv(q_segments.max_len, tiles.queries) <= _FEW:
        count = 1
    dk_to, dv_to, adds = dk, dv, add
    if count > 1:
        empty = functools.partial(torch.empty, (count, M, G, K), dtype=torch.float32, device=where)
        dk_to, dv_to, adds = None if dk is None else empty(), None if dv is None else empty(), False
    if fused:
        assert dq is not None and dk_to is not None and dv_to is not None
        attention_hopper_bwd.backward(
            q, k, v, do, lse_h, delta, dq, dk_to, dv_to, q_segments, kv_segments, inner=-inner if scale < 0 else inner,
            outer=outer, scale=scale, causal=causal, window=window, add=adds, shares=count,
        )  # fmt: skip
    elif dk is not None or dv is not None:
        device.launch(
            _dkdv, (device.cdiv(M, tiles.keys) * G * count,),
            q, k, v, do, lse_h, delta, P, dk_to, dv_to, *segments, *strides,
            *(n for d in (dk_to, dv_to) for n in ((0, 0) if d is None else d.stride()[-3:-1])),
            inner, outer, scale, window, G, group, K, *pieces(K), tiles.queries, tiles.keys, steps, causal, scale < 0,
            tma, adds, count, **tiles.options(),
        )  # fmt: skip
    for d, part in zip((dk, dv), (dk_to, dv_to), strict=True) if count > 1 else ():
        if d is not None:
            device.launch(
                _sum_shares, (device.cdiv(M, 16), G), part, d, M, *d.stride()[:2],
                G, count, K, device.next_power_of_2(K), 16, add, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    dsinks = ABSENT
    if parts is not None:
        dsinks = torch.empty_like(sinks)
        device.launch(_sum_parts, (H,), parts, dsinks, parts.shape[1], 256, num_warps=4, enable_fp_fusion=True)
    return *(ABSENT if d is None else d for d in (dq, dk, dv)), ABSENT, ABSENT, dsinks


attention = custom_vjp(attention_fwd, attention_bwd)


def cost(
    lengths: Sequence[tuple[int, int]],
    H: int,
    G: int,
    K: int,
    itemsize: int,
    *,
    causal: bool = True,
    window: int | None = None,
    backward: bool = False,
) -> Cost:
    """Over segments of ``(queries, keys)`` rows. Only visible pairs count: 2 products forward, 5 backward."""
    pairs = 0
    for queries, keys in lengths:
        ends = range(keys - queries, keys)  # positions of the queries
        seen = _triangle(ends) if causal else queries * keys
        pairs += seen - (0 if window is None else _triangle(range(ends.start - window, ends.stop - window)))
    N, M = sum(q for q, _ in lengths), sum(k for _, k in lengths)
    tensors = (N * H + M * G) * 2 * K * itemsize
    if backward:
        return Cost(bytes=2 * tensors + N * H * (2 * K * itemsize + 4), flops=10 * pairs * H * K)
    return Cost(bytes=tensors + 4 * N * H, flops=4 * pairs * H * K)


def _triangle(positions: range) -> int:
    """Σ max(0, p + 1) over a range of positions: the keys at or before each of them."""
    low, high = max(positions.start, 0), max(positions.stop, 0)
    return high * (high + 1) // 2 - low * (low + 1) // 2


def _by_tma(*tensors: Tensor) -> bool:
    """Whether Hopper's copy engine can read blocks of these: 16-bit, aligned, and heads made of whole
    pieces."""
    size = tensors[0].shape[2]
    if device.capability(tensors[0].device)[0] not in (9, 10) and not device.interpreting():
        return False  # before Hopper descriptors are pointers in disguise; for sm_120 Triton 3.6 spills with them
    return sum(pieces(size)) == size and all(
        t.element_size() == 2 and t.numel() > 0 and t.stride(2) == 1 and device.aligned(t, 16)
        and 0 < t.stride(0) < 2**31
        and t.stride(0) % 8 == 0 and t.stride(1) % 8 == 0 and t.shape[1] * t.stride(1) < 2**31
        for t in tensors
    )  # fmt: skip


def _same(q: Segments, kv: Segments) -> bool:
    return q.starts_S is kv.starts_S and q.ends_S is kv.ends_S and q.max_len == kv.max_len


def _segments(q: Segments, kv: Segments) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    return q.starts_S, q.ends_S, kv.starts_S, kv.ends_S, q.starts_S.shape[0]
