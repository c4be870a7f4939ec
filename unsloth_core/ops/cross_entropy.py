"""Cross-entropy of logits against one class per row, in one looped kernel per row.

Forward, for a row of logits l and its target y (V classes, class weights w, smoothing ε, z-loss λ)::

    loss  = ω · (lse − z_y) − ε · mean_j(w_j · (z_j − z_y)) + λ · lse²
    lse   = ln Σ_j e^(z_j)
    z     = cap · tanh(l / cap)                         (softcap; z = l without)
    ω     = (1 − ε) · w_y + ε · mean(w)                 (1 without class weights)

which is PyTorch's ``(1 − ε) · w_y · nll + ε · mean_j(−w_j · log p_j)`` plus the z-loss. Its ``reduction="mean"``
divides by Σ w_y over the rows that count. Backward, with cotangent g::

    dz_j  = g · (p_j · (ω + 2λ · lse) − ε · w_j/V)                              for j ≠ y
    dz_y  = g · (ω · (p_y − 1) + 2λ · lse · p_y + ε · mean(w) − ε · w_y/V)
    dl    = dz · (1 − tanh²(l / cap))

**The target is kept apart.** ``lse − z_y`` and ``p_y − 1`` lose every digit by cancellation once the model is
sure of the target (at a margin of 20 nothing is left in fp32). The row's pass therefore sums the others only,
s_o = Σ_{j≠y} e^(z_j − m), and with e_y = e^(z_y − m), s = s_o + e_y: ``p_y − 1 = −s_o / s`` and
``lse − z_y = log1p(s_o / e_y)``, both to fp32 accuracy of the differences z_j − m.

Rows whose target is ``ignore_index`` are not read: loss 0, gradient 0. A target outside [0, V) that is not
``ignore_index`` gives a NaN loss and a NaN gradient row, and nothing is read out of bounds. The argmax of both is −1.

Residuals: the logits, targets and class weights (the arguments themselves), m and s_o (fp32, 8 bytes per row; p is
rebuilt), and Σ w (4 bytes) if smoothing meets class weights.
Dtypes: logits and weights fp16, bf16 or fp32; arithmetic, losses and statistics fp32; the gradient in the logits'
dtype.
Bytes: forward reads the logits once; backward reads them once and writes the gradient once: 6 bytes per bf16 logit,
because the cotangent comes only after the loss. Who knows the cotangent beforehand calls :func:`loss_and_grad`: one
kernel, the second read of a row hits L2, 4 bytes per logit. Unfused PyTorch also writes and reads an (N, V) log-softmax
and its gradient.
Limits: V < 2³¹; the last stride of the logits is 1, rows lie anywhere; logits below −2e38 count as −∞; class weights
are constants.

Sources: online softmax, Milakov and Gimelshein, arXiv 1805.02867; the gradient beside the loss in one kernel,
Liger Kernel (arXiv 2410.10989); tanh near zero, Cephes' ``tanhf``; exp, Cody and Waite.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import cdiv, launch, next_power_of_2
from ..tree import ABSENT
from .checks import check_device, check_dtype
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
def _row_loss(m, s_o, d, z_y, omega, V, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr):
    """The loss of a row from its statistics."""
    nll, log_s = row_nll(m, s_o, z_y)
    loss = omega * nll
    if SMOOTHING != 0.0:
        loss -= SMOOTHING * (d / V)
    if Z_LOSS != 0.0:
        loss += Z_LOSS * (m + log_s) * (m + log_s)
    return loss


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
def _class_weights(weight_ptr, weight_stride, weight_sum_ptr, target, V, SMOOTHING: tl.constexpr):
    """``(w_y, mean(w), ω)``; the mean is only meant to be used with smoothing."""
    w_y = 1.0
    mean = 1.0
    omega = 1.0
    if weight_ptr is not None:
        w_y = tl.load(weight_ptr + target.to(tl.int64) * weight_stride).to(tl.float32)
        omega = w_y
        if SMOOTHING != 0.0:
            mean = tl.load(weight_sum_ptr) / V
            omega = (1.0 - SMOOTHING) * w_y + SMOOTHING * mean
    return w_y, mean, omega


@triton.jit
def _gradient(
    base_ptr, out_ptr, weight_ptr, weight_stride, begin, V, target, z_y, m, s_o, w_y, mean, omega, g,
    CAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, STREAM: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a row's loss."""
    e_y = exp(z_y - m, True)
    s = s_o + e_y
    scale = tl.div_rn(g, s)
    shift = 0.0
    # ω p_y − (1 − ε) w_y, from the smaller one of p_y and 1 − p_y: no digits cancel unless the gradient itself vanishes
    p_y = tl.div_rn(e_y, s)
    at_target = tl.where(
        e_y >= s_o, SMOOTHING * mean - omega * tl.div_rn(s_o, s), omega * p_y - (1.0 - SMOOTHING) * w_y
    )
    if Z_LOSS != 0.0:
        pull = 2.0 * Z_LOSS * (m + log(s))
        scale = scale * (omega + pull)
        at_target += pull * p_y
    else:
        scale = scale * omega
    if SMOOTHING != 0.0:
        shift = g * (SMOOTHING / V)
        at_target -= SMOOTHING / V * w_y
    else:
        weight_ptr = None
    write_gradient(
        base_ptr, out_ptr, weight_ptr, weight_stride, begin, V, target, m, scale, None, shift, g * at_target,
        CAP, 1.0, STREAM, ALIGNED, LANES, VEC,
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


@triton.jit
def _forward_kernel(
    logits_ptr, targets_ptr, rows_ptr, weight_ptr, weight_sum_ptr, losses_ptr, m_ptr, rest_ptr, best_ptr,
    out_ptr, g_ptr, V, N, stride, target_stride, rows_stride, weight_stride, g_stride,
    IGNORE: tl.constexpr, CAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    SAME: tl.constexpr, KEEP: tl.constexpr, STREAM: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The loss of a row; where there is a pointer for them: m and s_o, the argmax, the gradient at cotangent g (1
    without). SAME: rows of the gradient lie as far apart as those of the logits, over which it may be written."""
    row = tl.program_id(0).to(tl.int64)
    target, ignored, valid = target_of(targets_ptr, target_stride, rows_ptr, rows_stride, row, V, N, IGNORE)
    base, begin = row_start(row, stride, ALIGNED)
    out_base = base
    if not SAME:
        out_base = row * V - begin
    if ignored | ~valid:
        nothing = tl.where(ignored, 0.0, float("nan"))
        tl.store(losses_ptr + row, nothing)
        if best_ptr is not None:
            tl.store(best_ptr + row, -1)
        if out_ptr is not None:
            fill(out_ptr + out_base + begin, V, nothing, LANES * VEC)
    else:
        z_y, _ = target_logit(logits_ptr + row * stride, target, CAP, 1.0)
        w_y, mean, omega = _class_weights(weight_ptr, weight_stride, weight_sum_ptr, target, V, SMOOTHING)
        m, s_o, d, _, best = statistics(
            logits_ptr + base, weight_ptr, weight_stride, begin, V, target, z_y,
            CAP, 1.0, SMOOTHING, False, best_ptr is not None, KEEP, ALIGNED, LANES, VEC,
        )  # fmt: skip
        tl.store(losses_ptr + row, _row_loss(m, s_o, d, z_y, omega, V, SMOOTHING, Z_LOSS))
        if m_ptr is not None:
            tl.store(m_ptr + row, m)
            tl.store(rest_ptr + row, s_o)
        if best_ptr is not None:
            tl.store(best_ptr + row, best)
        if out_ptr is not None:
            g = 1.0
            if g_ptr is not None:
                g = tl.load(g_ptr + row * g_stride).to(tl.float32)
            _gradient(
                logits_ptr + base, out_ptr + out_base, weight_ptr, weight_stride, begin, V, target, z_y, m, s_o,
                w_y, mean, omega, g, CAP, SMOOTHING, Z_LOSS, STREAM, ALIGNED, LANES, VEC,
            )  # fmt: skip


@triton.jit
def _backward_kernel(
    logits_ptr, targets_ptr, weight_ptr, weight_sum_ptr, m_ptr, rest_ptr, g_ptr, out_ptr,
    V, stride, target_stride, weight_stride, g_stride,
    IGNORE: tl.constexpr, CAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    SAME: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The gradient of a row at its cotangent. SAME: its rows lie as far apart as those of the logits."""
    row = tl.program_id(0).to(tl.int64)
    target, ignored, valid = target_of(targets_ptr, target_stride, None, 0, row, V, 0, IGNORE)
    if ignored | ~valid:
        fill(out_ptr + row * V, V, tl.where(ignored, 0.0, float("nan")), LANES * VEC)
    else:
        base, begin = row_start(row, stride, ALIGNED)
        out_base = base
        if not SAME:
            out_base = row * V - begin
        z_y, _ = target_logit(logits_ptr + row * stride, target, CAP, 1.0)
        w_y, mean, omega = _class_weights(weight_ptr, weight_stride, weight_sum_ptr, target, V, SMOOTHING)
        _gradient(
            logits_ptr + base, out_ptr + out_base, weight_ptr, weight_stride, begin, V, target, z_y,
            tl.load(m_ptr + row), tl.load(rest_ptr + row), w_y, mean, omega,
            tl.load(g_ptr + row * g_stride).to(tl.float32),
            CAP, SMOOTHING, Z_LOSS, "", ALIGNED, LANES, VEC,
        )  # fmt: skip


@triton.jit
def _total_kernel(x_ptr, out_ptr, size, stride, BLOCK: tl.constexpr):
    """One program adds everything: every lane its own in ascending order, then the lanes as a tree."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + at.to(tl.int64) * stride, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr, tl.sum(total, axis=0))


def total(x: Tensor) -> Tensor:
    """The sum of a 1-D tensor, fp32 and 0-d, in a fixed order."""
    out = torch.empty((), dtype=torch.float32, device=x.device)
    launch(_total_kernel, (1,), x, out, x.shape[0], x.stride(0), BLOCK=1024, num_warps=8, enable_fp_fusion=False)
    return out


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


def forward_pass(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    *,
    rows: Any = ABSENT,
    N: int = 0,
    weight: Any = ABSENT,
    weight_sum: Any = ABSENT,
    statistics: tuple[Any, Any] = (ABSENT, ABSENT),
    argmax: Any = ABSENT,
    gradient: Any = ABSENT,
    cotangents: Any = ABSENT,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    """Fill ``losses`` and what is given of ``statistics`` (m, s_o), ``argmax`` and ``gradient``.

    ``gradient`` is the logits themselves, to be overwritten, or a contiguous tensor like them; it is that of
    ``cotangents · losses``, ABSENT for 1. ``rows``: where each row came from; an entry equal to ``N`` is padding and
    counts as ignored.
    """
    source, source_stride = pointer_and_stride(rows)
    w, w_stride = pointer_and_stride(weight)
    g, g_stride = pointer_and_stride(cotangents)
    in_place = gradient is logits
    # Beside the rows in flight, L2 would have to hold their gradients: those, and logits on their last read, go first.
    hints = ("", "") if in_place or gradient is ABSENT else ("evict_last", "evict_first")
    launch(
        _forward_kernel, (logits.shape[0],), logits, targets, source, w, pointer(weight_sum), losses,
        *(pointer(t) for t in (*statistics, argmax, gradient)), g,
        logits.shape[1], N, logits.stride(0), targets.stride(0), source_stride, w_stride, g_stride,
        IGNORE=ignore_index, CAP=softcap, SMOOTHING=label_smoothing, Z_LOSS=z_loss,
        SAME=in_place or logits.stride(0) == logits.shape[1], KEEP=hints[0], STREAM=hints[1],
        **tiles(logits, 1 if gradient is ABSENT else 2),
    )  # fmt: skip


def check_targets(op: str, targets: Tensor, letter: str, size: int, of: str, device: torch.device) -> None:
    """Raises ValueError unless targets is (size,) of int32 or int64 on ``device``, that of the argument ``of``."""
    if targets.shape != (size,):
        raise ValueError(f"{op}: targets has shape {tuple(targets.shape)}, expected ({letter},) = ({size},)")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: targets has dtype {targets.dtype}, expected torch.int64 or torch.int32")
    check_device(op, "targets", targets, of, device)


def check_options(op: str, label_smoothing: float, z_loss: float, softcap: float | None) -> None:
    """Raises ValueError for a smoothing outside [0, 1], a negative z-loss, or a cap that is not positive."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, expected 0 to 1")
    if not z_loss >= 0.0:
        raise ValueError(f"{op}: z_loss is {z_loss}, expected 0 or more")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"{op}: softcap is {softcap}, expected a positive number or None")


def _check(op: str, logits: Tensor, targets: Tensor, weight: Any) -> None:
    shape, strides = tuple(logits.shape), logits.stride()
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"{op}: logits has shape {shape}, expected (N, V) with V > 0")
    N, V = shape
    check_dtype(op, "logits", logits)
    if V > 1 and N > 0 and strides[1] != 1:
        raise ValueError(f"{op}: logits has strides {strides}, expected a last stride of 1")
    check_targets(op, targets, "N", N, "logits", logits.device)
    if weight is not ABSENT:
        if weight.shape != (V,):
            raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected (V,) = ({V},)")
        check_dtype(op, "weight", weight)
        check_device(op, "weight", weight, "logits", logits.device)


def _weight_sum(weight: Any, label_smoothing: float) -> Any:
    return ABSENT if weight is ABSENT or label_smoothing == 0.0 else total(weight)


def loss_and_grad(
    logits_NV: Tensor,
    targets_N: Tensor,
    weight_V: Any = ABSENT,
    cotangents_N: Any = ABSENT,
    *,
    donate: bool = False,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``(losses (N,) fp32, dlogits (N, V))`` in one kernel, for whoever knows the losses' cotangents beforehand.

    The gradient is that of ``Σ cotangents · losses``, ``cotangents`` (N,) of any floating dtype, 1 if ABSENT: token
    weights over a count, say. ``donate=True`` writes it over the logits and returns them. Not differentiable: call
    ``logits.backward(dlogits)`` behind it. Other arguments and errors are those of :func:`cross_entropy`, for which
    autograd's cotangent comes after the loss, so that it must read the logits twice.
    """
    _check("loss_and_grad", logits_NV, targets_N, weight_V)
    check_options("loss_and_grad", label_smoothing, z_loss, softcap)
    if cotangents_N is not ABSENT:
        if cotangents_N.shape != targets_N.shape:
            shape, N = tuple(cotangents_N.shape), logits_NV.shape[0]
            raise ValueError(f"loss_and_grad: cotangents has shape {shape}, expected (N,) = ({N},)")
        check_device("loss_and_grad", "cotangents", cotangents_N, "logits", logits_NV.device)
    options = {
        "ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss, "softcap": softcap,
    }  # fmt: skip
    logits = logits_NV.detach()
    if backend.resolve(logits) == "reference":
        losses, gradient = backend.reference("cross_entropy.loss_and_grad")(
            logits, targets_N, weight_V, cotangents_N, **options
        )
        return losses, logits.copy_(gradient) if donate else gradient
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    gradient = logits if donate else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    forward_pass(
        logits, targets_N, losses, weight=weight_V, weight_sum=_weight_sum(weight_V, label_smoothing),
        gradient=gradient, cotangents=cotangents_N, **options,
    )  # fmt: skip
    return losses, gradient


def cross_entropy_fwd(
    logits_NV: Tensor,
    targets_N: Tensor,
    weight_V: Any = ABSENT,
    *,
    needs: tuple[Any, ...],
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_argmax: bool = False,
) -> tuple[Any, Any]:
    """logits (N, V) fp16, bf16 or fp32, targets (N,) int32 or int64 -> losses (N,) fp32, 0 where ignored.

    ``weight`` (V,) fp16, bf16 or fp32: class weights. ``label_smoothing`` ε, ``z_loss`` λ and ``softcap`` cap: formulas
    below. ``return_argmax``: -> (losses, argmax (N,) int64), the first class with the largest logit, from the same
    pass; −1 where the target is ignored or impossible, so that ``argmax == targets`` counts hits.
    Raises ValueError for other shapes, dtypes, devices or options, and for logits whose last stride is not 1;
    NotImplementedError if weight wants a gradient.
    """
    _check("cross_entropy", logits_NV, targets_N, weight_V)
    check_options("cross_entropy", label_smoothing, z_loss, softcap)
    if True in needs[2:]:
        raise NotImplementedError("cross_entropy: no gradient for weight; detach it")

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(logits_NV.shape[0], dtype=dtype, device=logits_NV.device)

    losses = empty(torch.float32)
    argmax = empty(torch.int64) if return_argmax else ABSENT
    statistics = (empty(torch.float32), empty(torch.float32)) if needs[0] else (ABSENT, ABSENT)
    weight_sum = _weight_sum(weight_V, label_smoothing)
    forward_pass(
        logits_NV, targets_N, losses, weight=weight_V, weight_sum=weight_sum, statistics=statistics, argmax=argmax,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
    )  # fmt: skip
    residuals = (logits_NV, targets_N, weight_V, weight_sum, *statistics) if needs[0] else ABSENT
    return (losses, argmax) if return_argmax else losses, residuals


def cross_entropy_bwd(
    residuals: tuple[Any, ...],
    dlosses_N: Any,
    *,
    needs: tuple[Any, ...],
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_argmax: bool = False,
) -> tuple[Any, Any, Any]:
    """dlosses (N,), of any stride -> dlogits (N, V), contiguous, in the logits' dtype."""
    g = dlosses_N[0] if return_argmax else dlosses_N
    if not needs[0] or g is ABSENT:
        return ABSENT, ABSENT, ABSENT
    logits, targets, weight, weight_sum, m, rest = residuals
    N, V = logits.shape
    w, w_stride = pointer_and_stride(weight)
    dlogits = torch.empty((N, V), dtype=logits.dtype, device=logits.device)
    launch(
        _backward_kernel, (N,), logits, targets, w, pointer(weight_sum), m, rest, g, dlogits,
        V, logits.stride(0), targets.stride(0), w_stride, g.stride(0),
        IGNORE=ignore_index, CAP=softcap, SMOOTHING=label_smoothing, Z_LOSS=z_loss,
        SAME=logits.stride(0) == V, **tiles(logits, 1),
    )  # fmt: skip
    return dlogits, ABSENT, ABSENT


cross_entropy = custom_vjp(cross_entropy_fwd, cross_entropy_bwd)


def cost(N: int, V: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Forward reads the logits, backward and :func:`loss_and_grad` read them and write their gradient; 6 operations
    per logit."""
    return Cost(bytes=N * V * itemsize * (2 if backward else 1) + 16 * N, flops=6 * N * V)
