"""A row of logits, walked in tiles: its maximum and its sums, and its gradient; what the losses' kernels are made of.

No op: kernels of ``cross_entropy``, which ``linear_cross_entropy`` launches too, and of ``linear_logprob`` call these.
Formulas, and why the target is kept apart, stand in ``ops/cross_entropy.py``. Raw logits become z by a softcap, then a
temperature; both may be absent. A row is walked once forward for its statistics and, where a gradient is wanted, once
from its end to its start, so that what was read last is still in L2. Rows may start anywhere.

Sources: online softmax, Milakov and Gimelshein, arXiv 1805.02867; tanh near zero, Cephes' ``tanhf``; exp, Cody and
Waite.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..device import cdiv, next_power_of_2
from ..tree import ABSENT
from .language import cast

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # ln 2 in two parts; an integer up to 2^15 times the first is exact
LN2_LOW = tl.constexpr(-2.12194440e-4)
LOWEST = tl.constexpr(-2e38)  # a finite stand-in for −inf, because −inf − (−inf) is NaN
NOWHERE = tl.constexpr(2**31 - 1)  # an index beyond every row

# A row is walked in tiles of lanes × 16 bytes, one 16-byte load per lane. Up to 8 warps leave several rows in
# flight per multiprocessor; the kernel that reads its row twice takes 32: only one or two rows are in flight,
# and the second read hits L2.
ONE_PASS_LANES = 256
TWO_PASS_LANES = 1024


@triton.jit
def _capped(x, CAP: tl.constexpr):
    """``(CAP · tanh(x / CAP), 1 − tanh²)``, to fp32 accuracy near zero too, and where 1 − tanh² vanishes."""
    u = tl.div_rn(x, CAP)
    w = u * u
    near = u + u * w * (
        -3.33332819422e-1
        + w * (1.33314422036e-1 + w * (-5.37397155531e-2 + w * (2.06390887954e-2 + w * -5.70498872745e-3)))
    )
    r = 2.0 / (tl.exp2(tl.abs(u) * (2.0 * LOG2E)) + 1.0)
    small = tl.abs(u) < 0.625
    t = tl.where(small, near, tl.where(u < 0.0, r - 1.0, 1.0 - r))
    slope = tl.where(small, 1.0 - near * near, r * (2.0 - r))
    return CAP * t, slope


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    """e^x for x <= 0. ``exp2(x · log₂e)`` errs by |x| ulp; PRECISE reduces the argument first, with Cody and
    Waite's two parts of ln 2. For fp32 logits; 16-bit ones are coarser.
    """
    if PRECISE:
        x = tl.where(x < -150.0, -150.0, x)  # e^-150 is 0; −inf would make −inf + inf below
        i = tl.floor(x * LOG2E + 0.5)
        return tl.exp2(((x - i * LN2_HIGH) - i * LN2_LOW) * LOG2E) * tl.exp2(i)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def _log1p(x):
    """ln(1 + x) for 0 <= x <= 1, to fp32 accuracy: 2·atanh(t) by its series, t = x / (2 + x) <= 1/3."""
    t = x / (2.0 + x)
    w = t * t
    series = 1.0 + w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13 + w * (1 / 15)))))))
    return 2.0 * t * series


@triton.jit
def log(x):
    """ln x for x > 0, to fp32 accuracy."""
    k = tl.floor(tl.log2(x))
    return k * LN2_HIGH + (_log1p(x * tl.exp2(-k) - 1.0) + k * LN2_LOW)


@triton.jit
def _transformed(x, CAP: tl.constexpr, TAU: tl.constexpr):
    """``(z, dz/dx)`` of raw logits: the softcap, then the temperature."""
    slope = 1.0
    if CAP is not None:
        x, slope = _capped(x, CAP)
    if TAU != 1.0:
        x = tl.div_rn(x, TAU)
        slope = slope / TAU
    return x, slope


@triton.jit
def row_start(row, stride, ALIGNED: tl.constexpr):
    """``(base, begin)``: an offset divisible by 16, and the distance from it to the row's first logit.

    Loads are 16 bytes wide only where offsets are provably divisible. A row that starts elsewhere (V = 50257)
    is walked from the boundary before it, and its first few positions are masked.
    """
    offset = row * stride
    begin = 0
    if not ALIGNED:
        begin = (offset % 16).to(tl.int32)
    return tl.multiple_of(offset - begin, 16), begin


@triton.jit
def _fold(
    m_L, s_L, d_L, t_L, best_L, base_ptr, weight_ptr, weight_stride, tile, begin, end, target_at, z_y,
    MASKED: tl.constexpr, CAP: tl.constexpr, TAU: tl.constexpr, SMOOTHING: tl.constexpr, ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr, KEEP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Add a tile, without the target, to each lane's maximum m and sum s = Σ e^(z − m); and, where asked for, to
    d = Σ w (z − z_y), t = Σ e^(z − m) · (m − z), whose terms are all positive, and the first place of the maximum."""
    PRECISE: tl.constexpr = base_ptr.dtype.element_ty == tl.float32
    at = tile * (LANES * VEC) + tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    other = at != target_at
    if MASKED:
        inside = (at >= begin) & (at < end)
        z = tl.load(base_ptr + at, mask=inside, other=0.0, eviction_policy=KEEP).to(tl.float32)
        other = other & inside
    else:
        z = tl.load(base_ptr + at, eviction_policy=KEEP).to(tl.float32)
    z, _ = _transformed(z, CAP, TAU)
    if SMOOTHING != 0.0:
        apart = z - z_y
        if weight_ptr is not None:
            apart *= tl.load(weight_ptr + (at - begin) * weight_stride, mask=other, other=0.0).to(tl.float32)
        d_L += tl.sum(tl.where(other, apart, 0.0), axis=1)
    z = tl.where(other, z, float("-inf"))
    top_L = tl.max(z, axis=1)
    if ARGMAX:
        place_L = tl.min(tl.where(z == top_L[:, None], at, NOWHERE), axis=1)
        best_L = tl.where(top_L > m_L, place_L, best_L)
    new_L = tl.maximum(m_L, top_L)
    e = exp(z - new_L[:, None], PRECISE)
    down_L = exp(m_L - new_L, PRECISE)
    if ENTROPY:
        gap = tl.where(e > 0.0, new_L[:, None] - z, 0.0)  # where e is 0, z may be −inf
        t_L = down_L * (t_L + s_L * (new_L - m_L)) + tl.sum(e * gap, axis=1)
    s_L = s_L * down_L + tl.sum(e, axis=1)
    return new_L, s_L, d_L, t_L, best_L


@triton.jit
def statistics(
    base_ptr, weight_ptr, weight_stride, begin, V, target, z_y,
    CAP: tl.constexpr, TAU: tl.constexpr, SMOOTHING: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr,
    KEEP: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """``(m, s_o, d, t, best)`` of a row: its maximum, Σ_{j≠y} e^(z_j − m), Σ_j w_j (z_j − z_y),
    Σ_{j≠y} e^(z_j − m) (m − z_j), and the first class where z is m. The last three only where asked for."""
    PRECISE: tl.constexpr = base_ptr.dtype.element_ty == tl.float32
    m_L = tl.full([LANES], LOWEST, tl.float32)
    s_L = tl.zeros([LANES], tl.float32)
    d_L = tl.zeros([LANES], tl.float32)
    t_L = tl.zeros([LANES], tl.float32)
    best_L = tl.full([LANES], NOWHERE, tl.int32)
    end = begin + V
    at = begin + target
    full = end // (LANES * VEC)
    first = 0
    if not ALIGNED:
        m_L, s_L, d_L, t_L, best_L = _fold(
            m_L, s_L, d_L, t_L, best_L, base_ptr, weight_ptr, weight_stride, 0, begin, end, at, z_y,
            True, CAP, TAU, SMOOTHING, ENTROPY, ARGMAX, KEEP, LANES, VEC,
        )  # fmt: skip
        first = 1
    for tile in range(first, full):
        m_L, s_L, d_L, t_L, best_L = _fold(
            m_L, s_L, d_L, t_L, best_L, base_ptr, weight_ptr, weight_stride, tile, begin, end, at, z_y,
            False, CAP, TAU, SMOOTHING, ENTROPY, ARGMAX, KEEP, LANES, VEC,
        )  # fmt: skip
    if (full >= first) & (end % (LANES * VEC) != 0):
        m_L, s_L, d_L, t_L, best_L = _fold(
            m_L, s_L, d_L, t_L, best_L, base_ptr, weight_ptr, weight_stride, full, begin, end, at, z_y,
            True, CAP, TAU, SMOOTHING, ENTROPY, ARGMAX, KEEP, LANES, VEC,
        )  # fmt: skip
    m_o = tl.max(m_L, axis=0)
    m = tl.maximum(m_o, z_y)
    down_L = exp(m_L - m_o, PRECISE)
    down = exp(m_o - m, PRECISE)
    s = tl.sum(s_L * down_L, axis=0)
    t = 0.0
    if ENTROPY:
        t = tl.sum(down_L * (t_L + s_L * (m_o - m_L)), axis=0)
        t = down * (t + s * (m - m_o))
    best = 0
    if ARGMAX:
        best = tl.min(tl.where(m_L == m_o, best_L, NOWHERE), axis=0) - begin
        best = tl.where((z_y > m_o) | ((z_y == m_o) & (target < best)), target, best)
        best = tl.minimum(best, V - 1)
    return m, s * down, tl.sum(d_L, axis=0), t, best


@triton.jit
def row_nll(m, s_o, z_y):
    """``(lse − z_y, ln s)`` of a row, s = s_o + e^(z_y − m): both keep their digits when the target is certain."""
    e_y = exp(z_y - m, True)
    likely = e_y >= s_o  # then z_y is the maximum, and e_y is 1
    near = _log1p(s_o / tl.where(likely, e_y, 1.0))
    log_s = log(s_o + e_y)
    return tl.where(likely, near, (m - z_y) + log_s), tl.where(likely, near, log_s)


@triton.jit
def _gradient_tile(
    base_ptr, out_ptr, weight_ptr, weight_stride, tile, begin, end, target_at, m, scale, tilt, shift, at_target,
    MASKED: tl.constexpr, CAP: tl.constexpr, TAU: tl.constexpr, STREAM: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = base_ptr.dtype.element_ty == tl.float32
    at = tile * (LANES * VEC) + tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if MASKED:
        inside = (at >= begin) & (at < end)
        z = tl.load(base_ptr + at, mask=inside, other=0.0, eviction_policy=STREAM).to(tl.float32)
    else:
        z = tl.load(base_ptr + at, eviction_policy=STREAM).to(tl.float32)
    z, slope = _transformed(z, CAP, TAU)
    e = exp(z - m, PRECISE)
    grad = e * scale
    if tilt is not None:
        grad += e * (tilt * tl.where(e > 0.0, m - z, 0.0))
    if weight_ptr is None:
        grad -= shift
    elif MASKED:
        w = tl.load(weight_ptr + (at - begin) * weight_stride, mask=inside, other=0.0)
        grad -= shift * w.to(tl.float32)
    else:
        grad -= shift * tl.load(weight_ptr + (at - begin) * weight_stride).to(tl.float32)
    grad = cast(tl.where(at == target_at, at_target, grad) * slope, out_ptr.dtype.element_ty)
    if MASKED:
        tl.store(out_ptr + at, grad, mask=inside, eviction_policy=STREAM)
    else:
        tl.store(out_ptr + at, grad, eviction_policy=STREAM)


@triton.jit
def write_gradient(
    base_ptr, out_ptr, weight_ptr, weight_stride, begin, V, target, m, scale, tilt, shift, at_target,
    CAP: tl.constexpr, TAU: tl.constexpr, STREAM: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row of ``(e^(z − m) · (scale + tilt · (m − z)) − shift · w) · dz/dl``, and ``at_target · dz/dl`` at the target.

    ``out_ptr`` may be ``base_ptr``. From the end to the start: what :func:`statistics` has read last is still near.
    ``tilt`` and ``weight_ptr`` may be None.
    """
    end = begin + V
    at = begin + target
    full = end // (LANES * VEC)
    first = 0
    if not ALIGNED:
        first = 1
    if (full >= first) & (end % (LANES * VEC) != 0):
        _gradient_tile(
            base_ptr, out_ptr, weight_ptr, weight_stride, full, begin, end, at, m, scale, tilt, shift, at_target,
            True, CAP, TAU, STREAM, LANES, VEC,
        )  # fmt: skip
    for back in range(first, full):
        _gradient_tile(
            base_ptr, out_ptr, weight_ptr, weight_stride, full + first - 1 - back, begin, end, at,
            m, scale, tilt, shift, at_target, False, CAP, TAU, STREAM, LANES, VEC,
        )  # fmt: skip
    if not ALIGNED:
        _gradient_tile(
            base_ptr, out_ptr, weight_ptr, weight_stride, 0, begin, end, at, m, scale, tilt, shift, at_target,
            True, CAP, TAU, STREAM, LANES, VEC,
        )  # fmt: skip


@triton.jit
def fill(row_ptr, V, value, BLOCK: tl.constexpr):
    """A row of one value."""
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + at, cast(tl.full([BLOCK], value, tl.float32), row_ptr.dtype.element_ty), mask=at < V)


@triton.jit
def target_of(targets_ptr, target_stride, rows_ptr, rows_stride, row, V, N, IGNORE: tl.constexpr):
    """``(target, ignored, valid)``. With ``rows_ptr``, an entry equal to N is padding: ignored too."""
    target = tl.load(targets_ptr + row * target_stride).to(tl.int64)
    ignored = target == IGNORE
    valid = (target >= 0) & (target < V)
    if rows_ptr is not None:
        source = tl.load(rows_ptr + row * rows_stride).to(tl.int64)
        ignored = ignored | (source == N)
        valid = valid & (source >= 0) & (source < N)
    return target.to(tl.int32), ignored, valid


@triton.jit
def target_logit(row_ptr, target, CAP: tl.constexpr, TAU: tl.constexpr):
    """``(z_y, dz/dl)`` at the target."""
    return _transformed(tl.load(row_ptr + target).to(tl.float32), CAP, TAU)


def tiles(logits: Tensor, passes: int) -> dict[str, int | bool]:
    """Launch parameters of a kernel that walks the rows once or twice, by row length, element size and distance."""
    VEC = 16 // logits.element_size()
    most = TWO_PASS_LANES if passes == 2 else ONE_PASS_LANES
    lanes = min(most, max(32, next_power_of_2(cdiv(logits.shape[1], VEC))))
    aligned = logits.stride(0) % 16 == 0
    return {
        "ALIGNED": aligned,
        "LANES": lanes,
        "VEC": VEC,
        "num_warps": min(32, lanes // 32),
        "enable_fp_fusion": True,
    }


def pointer(t: Any) -> Any:
    """A tensor that may be ABSENT, for a kernel."""
    return None if t is ABSENT else t


def pointer_and_stride(t: Any) -> tuple[Any, int]:
    """A 1-D tensor that may be ABSENT, for a kernel."""
    return (None, 0) if t is ABSENT else (t, t.stride(0))
