"""What attention's kernels share: which rows see each other, blocks of rows and how they are read, and scores.

Everything here runs inside a kernel; ``attention.py`` says why every mask is an interval.
"""

import triton
import triton.language as tl

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
    key)."""
    s = tl.zeros_like(row)  # how many segments start at or before the row; STEPS is the bit length of S
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
           B: tl.constexpr, FOLD: tl.constexpr, PER: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
           TMA: tl.constexpr):  # fmt: skip
    """The tile a program keeps: rows [row, row + B) of ``head``, or of PER heads from it on, as B × FOLD
    rows."""
    if FOLD == 1:
        source = reader(base, rows, row_stride, head_stride, HEADS, HEAD, B, WIDTH, TMA)
        return tile(source, row, rows, head, row_stride, head_stride, stride, HEAD, FIRST, B, WIDTH, True, TMA)
    else:
        r, channel = tl.arange(0, B * FOLD), FIRST + tl.arange(0, WIDTH)
        base += row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride
        local = r // FOLD * row_stride + (r % FOLD).to(tl.int64) * head_stride
        ok = (row + r // FOLD < rows) & (r % FOLD < PER)
        pointer = base + local[:, None] + (channel * stride)[None, :]
        return tl.load(pointer, mask=ok[:, None] & (channel < HEAD)[None, :], other=0.0)


@triton.jit
def put(base, offset, ok, x, HEAD: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Store fp32 ``x`` as channels [FIRST, FIRST + WIDTH) of contiguous rows."""
    channel = FIRST + tl.arange(0, WIDTH)
    pointer = base + offset[:, None] + channel[None, :]
    tl.store(pointer, cast(x, base.dtype.element_ty), mask=ok[:, None] & (channel < HEAD)[None, :])


@triton.jit
def product(a, a2, b, b2, K2: tl.constexpr):
    """a·bᵀ over the whole head, in one piece or two (96 = 64 + 32 wastes nothing, a piece of 128 would)."""
    s = dot(a, tl.trans(b), tl.zeros((a.shape[0], b.shape[0]), tl.float32))
    if K2 > 0:
        s = dot(a2, tl.trans(b2), s)
    return s


@triton.jit
def tanh(x):
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)  # e^(−2|x|), never overflows
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def probability(s, factor, lse, EXACT: tl.constexpr):
    """e^(s·factor − lse) by exp2: one multiply-add per score for 16-bit inputs, the smallest error for
    fp32."""
    if EXACT:
        return tl.exp2((s * factor - lse) * LOG2E)
    else:
        return tl.exp2(s * (factor * LOG2E) - lse * LOG2E)
