"""What attention's kernels share: which rows see each other, blocks of rows and how they are read, scores, and what
is demanded of the arguments. ``attention.py`` says why every mask is an interval.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device
from ..segments import Segments
from ..tree import ABSENT
from .checks import check_device, check_dtype
from .language import cast, dot

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-2e38)  # finite, also times LOG2E: a fully masked row never computes −inf − (−inf)


@triton.jit
def partners(
    row, starts, ends, other_starts, other_ends, S, other_rows, window,
    STEPS: tl.constexpr, CAUSAL: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """``[lo, hi)``: rows of the other side that ``row`` may meet (keys a query sees, or queries that see a
    key). STEPS is the bit length of S."""
    # How many segments start at or before the row, by bisection: comparing with all starts at once waits less,
    # and took registers (head 64, dq: 137 for 128), and with them the second program of a multiprocessor.
    s = tl.zeros_like(row)
    for j in tl.static_range(STEPS):
        probe = s + (1 << (STEPS - 1 - j))
        start = tl.load(starts + probe - 1, mask=probe <= S, other=2147483647)
        s = tl.where(start <= row, probe, s)
    found = s > 0
    end = tl.load(ends + s - 1, mask=found, other=0)
    other_start = tl.load(other_starts + s - 1, mask=found, other=0)
    other_end = tl.load(other_ends + s - 1, mask=found, other=0)
    lo, hi = other_start, other_end
    diagonal = row + (other_end - end)
    if OF_KEYS:
        if CAUSAL:
            lo = tl.maximum(lo, diagonal)
        if window is not None:
            hi = tl.minimum(hi, diagonal + window)
    else:
        if CAUSAL:
            hi = tl.minimum(hi, diagonal + 1)
        if window is not None:
            lo = tl.maximum(lo, diagonal - window + 1)
    # A row behind its segment's end is in a gap: an empty interval there keeps both bounds monotone.
    inside = row < end
    lo = tl.where(inside, tl.minimum(lo, other_end), other_end)
    hi = tl.where(inside, tl.maximum(hi, other_start), other_end)
    return tl.minimum(tl.maximum(lo, 0), other_rows), tl.minimum(tl.maximum(hi, 0), other_rows)


@triton.jit
def blocks(lo, hi, begin, end, B: tl.constexpr):
    """Cut [begin, end) into blocks of B: ``full`` of them from ``first`` on, which every row of the tile sees
    whole, and ``partial``, which need the mask: ``left`` before those and the rest behind."""
    left = tl.cdiv(tl.minimum(tl.maximum(tl.max(lo, 0), begin), end) - begin, B)
    first = begin + left * B
    full = tl.maximum(tl.minimum(tl.min(hi, 0), end) - first, 0) // B
    right = tl.cdiv(tl.maximum(end - first - full * B, 0), B)
    return first, full, left, left + right


@triton.jit
def reader(base, rows, row_stride, head_stride, HEADS: tl.constexpr, HEAD: tl.constexpr,
            B: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """What :func:`tile` reads blocks of B rows from: a pointer, or a descriptor in which heads are column
    ranges."""
    if TMA:
        columns = (HEADS - 1) * head_stride + HEAD
        return tl.make_tensor_descriptor(base, [tl.maximum(rows, 1), columns], [row_stride, 1], [B, WIDTH])
    else:
        return base


@triton.jit
def tile(source, row, rows, head, row_stride, head_stride, stride, HEAD: tl.constexpr, FIRST: tl.constexpr,
          B: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Rows [row, row + B), channels [FIRST, FIRST + WIDTH) of one head; 0 beyond HEAD and, with MASK, beyond
    ``rows``."""
    if TMA:
        return source.load([row, head * head_stride + FIRST])
    else:
        local, channel = tl.arange(0, B), FIRST + tl.arange(0, WIDTH)
        base = source + row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
        pointer = base + (local * row_stride)[:, None] + (channel * stride)[None, :]
        ok = row + local < rows
        inside = (channel < HEAD)[None, :]
        if FIRST + WIDTH > HEAD:
            return tl.load(pointer, mask=(ok[:, None] & inside) if MASK else inside, other=0.0)
        elif MASK:
            return tl.load(pointer, mask=ok[:, None], other=0.0)
        else:
            return tl.load(pointer)


@triton.jit
def statistic(source, head, row, P, B: tl.constexpr, TMA: tl.constexpr):
    """Rows [row, row + B) of one head of lse or Δ. No mask: the buffers of length P go on behind the last
    row."""
    if TMA:
        return source.load([head, row]).reshape([B])
    else:
        return tl.load(source + head.to(tl.int64) * P + row + tl.arange(0, B))


@triton.jit
def held_tile(base, row, rows, head, row_stride, head_stride, stride, HEADS: tl.constexpr, HEAD: tl.constexpr,
              B: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """The tile that a program keeps."""
    source = reader(base, rows, row_stride, head_stride, HEADS, HEAD, B, WIDTH, TMA)
    return tile(source, row, rows, head, row_stride, head_stride, stride, HEAD, FIRST, B, WIDTH, True, TMA)


@triton.jit
def put(base, offset, ok, x, HEAD: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, ADD: tl.constexpr):
    """Store fp32 ``x`` as channels [FIRST, FIRST + WIDTH) of rows whose channels are contiguous, or add it to them."""
    channel = FIRST + tl.arange(0, WIDTH)
    pointer = base + offset[:, None] + channel[None, :]
    ok = ok[:, None] & (channel < HEAD)[None, :]
    if ADD:
        x += tl.load(pointer, mask=ok, other=0.0).to(tl.float32)
    tl.store(pointer, cast(x, base.dtype.element_ty), mask=ok)


@triton.jit
def product(a, a2, b, b2, K2: tl.constexpr):
    """a·bᵀ over the whole head, in one piece or two (96 = 64 + 32 wastes nothing, a piece of 128 would)."""
    s = dot(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), tl.float32))
    if K2 > 0:
        s = dot(a2, tl.trans(b2), s)
    return s


@triton.jit
def tanh(x):
    """tanh from exp2."""
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)  # e^(−2|x|), never overflows
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def scores(a, a2, b, b2, inner, outer, K2: tl.constexpr, NEGATE: tl.constexpr):
    """``(s, factor)``: scores are s·factor. Of s, 1 − s² is what a softcap's derivative is."""
    s = product(a, a2, b, b2, K2)
    if NEGATE:
        s = -s
    factor = inner
    if outer is not None:
        s = tanh(s * inner)
        factor = outer
    return s, factor


@triton.jit
def probability(s, factor, lse, EXACT: tl.constexpr):
    """e^(s·factor − lse) by exp2: one multiply-add per score for 16-bit inputs, the smallest error for
    fp32."""
    if EXACT:
        return tl.exp2((s * factor - lse) * LOG2E)
    else:
        return tl.exp2(s * (factor * LOG2E) - lse * LOG2E)


def pieces(K: int) -> tuple[int, int]:
    """A head as one power of two, or as two if their sum is smaller: 80 = 64 + 16, 96 = 64 + 32."""
    whole = max(16, device.next_power_of_2(K))
    rest = max(16, device.next_power_of_2(max(K - whole // 2, 1)))
    return (whole // 2, rest) if K > 32 and whole // 2 + rest < whole else (whole, 0)


def shares(programs: int, group: int, sms: int) -> int:
    """Over how many programs the query heads of a key head are divided when dk and dv are computed: 1 where the
    ``programs`` that there would be fill the machine, else enough to fill it twice, or one for each head."""
    if programs >= sms:
        return 1
    each = device.cdiv(group, min(group, device.cdiv(2 * sms, max(programs, 1))))
    return device.cdiv(group, each)


def far_apart(t: Tensor) -> bool:
    """Whether rows or channels are too far apart for offsets inside a tile, which are 32-bit."""
    return any(t.shape[i] > 1 and t.stride(i) >= 2**23 for i in (0, 2))


def factors(K: int, scale: float | None, softcap: float | None) -> tuple[float, float | None, float]:
    """What turns ±q·k into S: one factor, or one inside and one outside of tanh; then the scale itself."""
    scale = float(K**-0.5 if scale is None else scale)
    if softcap is None:
        return abs(scale), None, scale
    return abs(scale) / softcap, float(softcap), scale


def check(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_segments: Segments,
    kv_segments: Segments,
    sinks: Tensor | Any,
    window: int | None,
    softcap: float | None,
) -> None:
    """Raises the errors of ``attention`` in the name of ``op``."""
    if q.ndim != 3:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}, expected (N, H, K)")
    H, K = q.shape[1:]
    if k.ndim != 3 or k.shape[2] != K:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, expected (M, G, {K})")
    if v.shape != k.shape:
        raise ValueError(f"{op}: v has shape {tuple(v.shape)}, expected that of k, {tuple(k.shape)}")
    if not 1 <= K <= 256:
        raise ValueError(f"{op}: head size is {K}, expected 1 to 256")
    if k.shape[1] == 0 or H % k.shape[1]:
        raise ValueError(f"{op}: {H} query heads, expected a multiple of the {k.shape[1]} key heads")
    check_dtype(op, "q", q)
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise ValueError(f"{op}: {name} has dtype {t.dtype}, expected that of q, {q.dtype}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_device(op, name, t, "q", q.device)
        if far_apart(t):
            raise NotImplementedError(f"{op}: {name} has strides {t.stride()}, rows and channels must be below 2**23")
    starts = q_segments.starts_S
    for name, t in (
        ("q_segments.starts_S", starts), ("q_segments.ends_S", q_segments.ends_S),
        ("kv_segments.starts_S", kv_segments.starts_S), ("kv_segments.ends_S", kv_segments.ends_S),
    ):  # fmt: skip
        if t.ndim != 1 or t.shape != starts.shape:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected (S,) = ({starts.numel()},)")
        if t.dtype != torch.int32 or not t.is_contiguous():
            raise ValueError(f"{op}: {name} has dtype {t.dtype} and stride {t.stride()}, expected torch.int32 and (1,)")
        check_device(op, name, t, "q", q.device)
    if sinks is not ABSENT:
        if tuple(sinks.shape) != (H,) or not sinks.is_contiguous():
            shape = f"shape {tuple(sinks.shape)} and strides {sinks.stride()}"
            raise ValueError(f"{op}: sinks has {shape}, expected (H,) = ({H},), contiguous")
        check_dtype(op, "sinks", sinks)
        check_device(op, "sinks", sinks, "q", q.device)
    if window is not None and not (isinstance(window, int) and 1 <= window < 2**30):
        raise ValueError(f"{op}: window is {window}, expected an integer, at least 1 and below 2**30")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{op}: softcap is {softcap}, expected a positive number")
