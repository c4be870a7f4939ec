"""Attention of a few queries per sequence over a long cache, contiguous or in pages: the step of cached generation.

Formula: o = softmax(scale · q·kᵀ)·v over the visible keys: that of ``attention``, with its softcap, window and sinks.
Key j of segment s is row kv_start + j of k and v or, with pages, row pages[s, j // page] · page + j mod page.
``attention`` comes here when it has few queries, and then its own backward, which asks no more of a forward than o and
lse, makes the gradients.

What costs time is reading the cache once. The query heads that share a key head are rows of the same tile, so no key is
read twice; and the keys of a segment are split over enough programs to fill the machine, each of which writes its
normalised part of o and its lse. A second kernel merges the parts of a row in their order: the same bits in every run.
Where sequences are many, one part is the whole row (unless there are sinks) and is written as the result.
How many programs there are follows from the capacity (``kv_segments.max_len``), which is fixed; what each of them does
from the lengths, which are on the device: no step waits for the host, and none changes a shape. A block of keys reads
the last visible row again for rows behind the end, so nothing outside of a sequence is ever touched.

Residuals: none, for it exists for decoding and has no gradient. Bytes: k and v up to the lengths once; q, o once; the
parts, fp32, 8·splits·N·H·K, which is little beside the cache. Dtypes and errors are those of ``attention``.
Limits: those of ``attention``, and at most 32 rows for a key head: queries of a segment times H / G, each rounded up to
a power of two.
Source of the idea: Flash-Decoding (Dao et al. 2023); pages: vLLM (Kwon et al. 2023).
"""

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
from .attention_tiles import LN2, LOG2E, LOWEST, check, factors, pieces, probability, scores
from .checks import check_device
from .language import cast, dot

# Of a tile at most: queries of a segment x query heads of a key head. With 64 rows the products become Hopper's wgmma,
# which Triton 3.6 compiles to illegal reads for a head of 33, as it does in the forward pass of ``attention``.
ROWS = 32


@triton.jit
def _slab(base, row, head, row_stride, head_stride, stride, HEAD: tl.constexpr, FIRST: tl.constexpr,
          WIDTH: tl.constexpr):  # fmt: skip
    """Channels [FIRST, FIRST + WIDTH) of one head of rows anywhere in a cache; 0 beyond HEAD."""
    channel = FIRST + tl.arange(0, WIDTH)
    base += head.to(tl.int64) * head_stride
    pointer = base + (row * row_stride)[:, None] + (channel * stride)[None, :]
    if FIRST + WIDTH > HEAD:
        return tl.load(pointer, mask=(channel < HEAD)[None, :], other=0.0)
    else:
        return tl.load(pointer)


@triton.jit(do_not_specialize=["inner", "outer"])
def _attend(
    Q, K, V, PAGES, PO, PL, q_starts, q_ends, kv_starts, kv_ends, N, M,
    q_n, q_h, q_k, k_m, k_g, k_k, v_m, v_g, v_k, pages_s, splits, inner, outer, window,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    BM: tl.constexpr, FOLD: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    CAUSAL: tl.constexpr, NEGATE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """All query rows of one segment, for the heads of one key head, against one share of the keys. WHOLE: that is all
    of them, and what is written is the result, in its dtype and also where no row sees anything."""
    W2: tl.constexpr = K2 if K2 > 0 else 16
    EXACT: tl.constexpr = Q.dtype.element_ty == tl.float32
    program = tl.program_id(0)
    group = program % GROUPS
    split = program // GROUPS % splits
    segment = program // (GROUPS * splits)
    q_start, q_end = tl.load(q_starts + segment), tl.load(q_ends + segment)
    kv_start, kv_end = tl.load(kv_starts + segment), tl.load(kv_ends + segment)
    r = tl.arange(0, BM)
    row, member = q_start + r // FOLD, r % FOLD
    head = group * GROUP + member
    ok = (row < tl.minimum(q_end, N)) & (member < GROUP)
    # Keys are counted from the start of the segment: row i sees [lo, hi).
    length = kv_end - kv_start
    diagonal = r // FOLD + length - (q_end - q_start)
    lo, hi = tl.zeros((BM,), tl.int32), tl.zeros((BM,), tl.int32) + length
    if CAUSAL:
        hi = tl.minimum(hi, diagonal + 1)
    if window is not None:
        lo = tl.maximum(lo, diagonal - window + 1)
    hi = tl.where(ok, hi, 0)
    begin, end = tl.min(tl.where(ok, lo, length), 0) // BN * BN, tl.max(hi, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BN), splits) * BN
    begin = tl.minimum(begin + split * share, end)
    end = tl.minimum(begin + share, end)
    last = end - 1

    q_at = row.to(tl.int64) * q_n + head.to(tl.int64) * q_h
    channel = tl.arange(0, K1)
    q = tl.load(Q + q_at[:, None] + (channel * q_k)[None, :], mask=ok[:, None] & (channel < HEAD)[None, :], other=0.0)
    q2 = q
    if K2 > 0:
        channel = K1 + tl.arange(0, K2)
        q2 = tl.load(
            Q + q_at[:, None] + (channel * q_k)[None, :], mask=ok[:, None] & (channel < HEAD)[None, :], other=0.0
        )

    c = tl.arange(0, BN)
    m = tl.full((BM,), LOWEST, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, K1), tl.float32)
    acc2 = tl.zeros((BM, W2), tl.float32)
    for n in tl.range(begin, end, BN):
        near = tl.minimum(n + c, last)
        if PAGE > 0:
            at = tl.load(PAGES + segment.to(tl.int64) * pages_s + near // PAGE).to(tl.int64) * PAGE + near % PAGE
        else:
            at = (kv_start + near).to(tl.int64)
        at = tl.minimum(tl.maximum(at, 0), M - 1)
        k = _slab(K, at, group, k_m, k_g, k_k, HEAD, 0, K1)
        k2 = k
        if K2 > 0:
            k2 = _slab(K, at, group, k_m, k_g, k_k, HEAD, K1, K2)
        s, factor = scores(q, q2, k, k2, inner, outer, K2, NEGATE)
        visible = ((n + c)[None, :] >= lo[:, None]) & ((n + c)[None, :] < tl.minimum(hi, end)[:, None])
        s = tl.where(visible, s * factor, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        p = probability(s, 1.0, top[:, None], EXACT)
        decay = tl.exp2((m - top) * LOG2E)
        m = top
        l = l * decay + tl.sum(p, 1)
        p = cast(p, V.dtype.element_ty)
        v = _slab(V, at, group, v_m, v_g, v_k, HEAD, 0, K1)
        acc = dot(p, v, acc * decay[:, None])
        if K2 > 0:
            v2 = _slab(V, at, group, v_m, v_g, v_k, HEAD, K1, K2)
            acc2 = dot(p, v2, acc2 * decay[:, None])

    empty = l == 0
    l = tl.where(empty, 1.0, l)
    to = (split.to(tl.int64) * N + row) * (GROUPS * GROUP) + head
    if PL is not None:
        tl.store(PL + to, tl.where(empty, float("-inf"), m + tl.log2(l) * LN2), mask=ok)
    channel = tl.arange(0, K1)
    inside = ok[:, None] & (channel < HEAD)[None, :]
    tl.store(PO + to[:, None] * HEAD + channel[None, :], cast(acc / l[:, None], PO.dtype.element_ty), mask=inside)
    if K2 > 0:
        channel = K1 + tl.arange(0, K2)
        inside = ok[:, None] & (channel < HEAD)[None, :]
        tl.store(PO + to[:, None] * HEAD + channel[None, :], cast(acc2 / l[:, None], PO.dtype.element_ty), mask=inside)
    if WHOLE:
        WIDTH: tl.constexpr = 2 * K1 if K2 > 0 else K1
        for each in range(GROUP):
            _clear_around(
                PO, PL, q_starts, q_ends, segment, tl.num_programs(0) // GROUPS, N, group * GROUP + each,
                GROUPS * GROUP, HEAD, WIDTH,
            )  # fmt: skip


@triton.jit
def _merge(
    PO, PL, SINKS, O, L, q_starts, q_ends, S, N, splits,
    HEADS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """One row of o from its normalised parts, in fixed order: L = log Σ e^(Lᵢ), o = Σ e^(Lᵢ − L)·oᵢ; the sink
    is one more Lᵢ. The first row of a segment also clears the gap before it, and that of the last the one behind."""
    program = tl.program_id(0)
    head, token, segment = program % HEADS, program // HEADS % TOKENS, program // (HEADS * TOKENS)
    start, end = tl.load(q_starts + segment), tl.minimum(tl.load(q_ends + segment), N)
    if start + token < end:
        part, channel = tl.arange(0, PARTS), tl.arange(0, WIDTH)
        row = (start + token).to(tl.int64) * HEADS + head
        at = part.to(tl.int64) * N * HEADS + row
        lse = tl.load(PL + at, mask=part < splits, other=float("-inf"))
        top = tl.maximum(tl.max(lse, 0), LOWEST)
        empty = top == LOWEST
        if SINKS is not None:
            sink = tl.load(SINKS + head).to(tl.float32)
            top = tl.maximum(top, sink)
        weight = tl.exp2((lse - top) * LOG2E)
        total = tl.sum(weight, 0)
        if SINKS is not None:
            total += tl.exp2((sink - top) * LOG2E)
        total = tl.where(empty, 1.0, total)
        mask = (part < splits)[:, None] & (channel < HEAD)[None, :]
        o = tl.load(PO + at[:, None] * HEAD + channel[None, :], mask=mask, other=0.0)
        o = tl.sum(o * tl.where(empty, 0.0, weight / total)[:, None], 0)
        tl.store(O + row * HEAD + channel, cast(o, O.dtype.element_ty), mask=channel < HEAD)
        if L is not None:
            tl.store(L + row, tl.where(empty, float("-inf"), top + tl.log2(total) * LN2))
    if token == 0:
        _clear_around(O, L, q_starts, q_ends, segment, S, N, head, HEADS, HEAD, WIDTH)


@triton.jit
def _clear_around(
    O, L, q_starts, q_ends, segment, S, N, head, HEADS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr
):
    """Rows in the gap before a segment and, behind the last one, to the end."""
    start, end = tl.load(q_starts + segment), tl.minimum(tl.load(q_ends + segment), N)
    before = tl.load(q_ends + segment - 1, mask=segment > 0, other=0)
    behind = tl.where(segment == S - 1, N, end)
    for gap in range(before, start):
        _clear(O, L, gap, head, HEADS, HEAD, WIDTH)
    for gap in range(end, behind):
        _clear(O, L, gap, head, HEADS, HEAD, WIDTH)


@triton.jit
def _clear(O, L, n, head, HEADS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """A row that sees nothing."""
    channel = tl.arange(0, WIDTH)
    row = (tl.zeros((WIDTH,), tl.int64) + n) * HEADS + head
    zero = tl.zeros((WIDTH,), tl.float32)
    tl.store(O + row * HEAD + channel, cast(zero, O.dtype.element_ty), mask=channel < HEAD)
    if L is not None:
        tl.store(L + row, zero + float("-inf"), mask=channel == 0)


class Tiles(NamedTuple):
    """Launch parameters: ``keys`` of a block, and how many programs there should be per multiprocessor."""

    keys: int
    warps: int
    stages: int
    programs: int


# By device class and largest head size. Bytes in flight are what counts: keys x stages x programs.
TABLE: dict[tuple[str, int], Tiles] = {
    ("sm_80", 128): Tiles(64, 4, 3, 1),
    ("sm_80", 256): Tiles(64, 4, 2, 1),
    ("small", 128): Tiles(64, 4, 2, 2),
    ("small", 256): Tiles(32, 4, 2, 2),
    ("fp32", 128): Tiles(32, 4, 1, 2),
    ("fp32", 256): Tiles(16, 4, 1, 2),
}
INTERPRETED = Tiles(16, 4, 1, 2)


def kind(dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """The device class: by the shared memory of a multiprocessor, and whether its matrix units take the dtype."""
    if dtype == torch.float32 or capability < (8, 0):
        return "fp32"
    return "sm_80" if capability == (8, 0) or capability[0] in (9, 10) else "small"


def _tiles(dtype: torch.dtype, size: int, capability: tuple[int, int]) -> Tiles:
    if device.interpreting():
        return INTERPRETED
    return TABLE[kind(dtype, capability), 128 if size <= 128 else 256]


def _splits(rows: int, programs: int, blocks: int) -> int:
    """Over how many programs the ``blocks`` of keys of each of ``rows`` tiles are split: at least two blocks each, and
    as many ``programs`` together as there should be, or a few more rather than many less."""
    fewer = max(programs // max(rows, 1), 1)
    wanted = fewer if 4 * fewer * rows >= 3 * programs else fewer + 1
    return max(1, min(wanted, blocks // 2, 256))


def takes(q_segments: Segments, group: int) -> bool:
    """Whether the queries of a segment, times the ``group`` of heads that share keys, are few enough for one tile."""
    return device.next_power_of_2(max(q_segments.max_len, 1)) * device.next_power_of_2(group) <= ROWS


@prepared
def attention_decode_fwd(
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGK: Tensor,
    q_segments: Segments,
    kv_segments: Segments,
    pages_SP: Tensor | Any = ABSENT,
    sinks_H: Tensor | Any = ABSENT,
    *,
    needs: Tree,
    page: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Any, Tree]:
    """``o_NHK``, or ``(o_NHK, lse_NH)``, of a few queries per segment; arguments as for ``attention``.

    ``pages_SP`` (S, P) int32, with ``page`` (a power of two): rows of k and v are pages of that many, and those of
    segment s are pages_SP[s], in order; ``kv_segments`` then gives lengths only (ends − starts), and every page that
    they reach has to exist: a number outside of the cache reads some row of it. Raises ValueError for what does not
    fit, and in backward NotImplementedError.
    """
    check("attention_decode", q_NHK, k_MGK, v_MGK, q_segments, kv_segments, sinks_H, window, softcap)
    H, G = q_NHK.shape[1], k_MGK.shape[1]
    if not takes(q_segments, H // G):
        rows = f"{q_segments.max_len} queries for {H // G} heads"
        raise ValueError(f"attention_decode: {rows} per key head, expected at most {ROWS} rows; use attention")
    if (pages_SP is ABSENT) != (page is None):
        raise ValueError(f"attention_decode: page is {page}, expected a size if there are pages and None if not")
    if page is not None:
        S = q_segments.starts_S.shape[0]
        if page < 1 or page & (page - 1):
            raise ValueError(f"attention_decode: page is {page}, expected a power of two")
        if pages_SP.ndim != 2 or pages_SP.shape[0] != S or pages_SP.dtype != torch.int32 or pages_SP.stride(1) != 1:
            raise ValueError(
                f"attention_decode: pages is {pages_SP.dtype} {tuple(pages_SP.shape)}, strides {pages_SP.stride()}, "
                f"expected torch.int32 (S, P) = ({S}, P) with contiguous rows"
            )
        if pages_SP.shape[1] * page < kv_segments.max_len:
            room = f"{pages_SP.shape[1]} pages of {page} rows"
            raise ValueError(f"attention_decode: {room}, expected room for {kv_segments.max_len}")
        check_device("attention_decode", "pages", pages_SP, "q", q_NHK.device)
    o, lse = attend(
        q_NHK, k_MGK, v_MGK, q_segments, kv_segments, pages_SP, sinks_H,
        page=page or 0, scale=scale, causal=causal, window=window, softcap=softcap, with_lse=return_lse,
    )  # fmt: skip
    return (o if lse is None else (o, lse)), ()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segments: Segments,
    kv_segments: Segments,
    pages: Tensor | Any,
    sinks: Tensor | Any,
    *,
    page: int = 0,
    scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Both launches, for arguments that were checked; the first alone where one program has all keys of a row."""
    (N, H, K), (M, G, _), where = q.shape, k.shape, q.device
    S, group = q_segments.starts_S.shape[0], H // G
    tiles = _tiles(q.dtype, K, device.capability(where))
    tokens = device.next_power_of_2(max(q_segments.max_len, 1))
    fold = max(device.next_power_of_2(group), 16 // tokens)  # products take 16 rows at least
    splits = _splits(S * G, tiles.programs * device.sms(where), device.cdiv(kv_segments.max_len, tiles.keys))
    o = torch.empty((N, H, K), dtype=q.dtype, device=where)
    lse = torch.empty((N, H), dtype=torch.float32, device=where) if with_lse else None
    if M == 0 or S == 0:  # no row sees anything
        return o.zero_(), None if lse is None else lse.fill_(float("-inf"))
    whole = splits == 1 and sinks is ABSENT
    parts = o if whole else torch.empty((splits, N, H, K), dtype=torch.float32, device=where)
    parts_lse = lse if whole else torch.empty((splits, N, H), dtype=torch.float32, device=where)
    device.launch(
        _attend, (S * G * splits,), q, k, v, None if pages is ABSENT else pages, parts, parts_lse,
        q_segments.starts_S, q_segments.ends_S, kv_segments.starts_S, kv_segments.ends_S, N, M,
        *q.stride(), *k.stride(), *v.stride(), 0 if pages is ABSENT else pages.stride(0),
        splits, *factors(K, scale, softcap)[:2], window, G, group, K, *pieces(K), tokens * fold, fold, tiles.keys, page,
        causal, scale is not None and scale < 0, whole,
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=True,
    )  # fmt: skip
    if not whole:
        device.launch(
            _merge, (S * tokens * H,), parts, parts_lse, None if sinks is ABSENT else sinks, o, lse,
            q_segments.starts_S, q_segments.ends_S, S, N, splits,
            H, K, device.next_power_of_2(K), tokens, device.next_power_of_2(splits),
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return o, lse


def attention_decode_bwd(residuals: Tree, dy: Any, *, needs: Tree, **statics: Any) -> Tree:
    """Raises NotImplementedError."""
    raise NotImplementedError("attention_decode: has no gradient; use attention")


attention_decode = custom_vjp(attention_decode_fwd, attention_decode_bwd)


def cost(S: int, T: int, keys: int, H: int, G: int, K: int, itemsize: int) -> Cost:
    """S segments of T queries over ``keys`` keys each: the cache, q and o once; 2 products."""
    return Cost(bytes=(2 * S * keys * G + 2 * S * T * H) * K * itemsize, flops=4 * S * T * keys * H * K)
