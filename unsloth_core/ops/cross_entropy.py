"""Cross-entropy of logits against one class per row, in one looped kernel per row.

Forward, for a row of logits l and its target y (V classes, smoothing ε, z-loss λ)::

    z     = cap · tanh(l / cap)                         (softcap; z = l without)
    lse   = ln Σ_j e^(z_j)
    loss  = (lse − z_y) − ε · mean_j(z_j − z_y) + λ · lse²

which is PyTorch's ``(1 − ε) · nll + ε · mean_j(−log p_j)`` plus the z-loss. Backward, with cotangent g::

    dz_j  = g · (p_j · (1 + 2λ · lse) − ε/V)            for j ≠ y
    dz_y  = g · ((p_y − 1) + 2λ · lse · p_y + ε − ε/V)
    dl    = dz · (1 − tanh²(l / cap))

**The target is kept apart.** ``lse − z_y`` and ``p_y − 1`` lose every digit by cancellation once the model is
sure of the target (at a margin of 20 nothing is left in fp32). The row's pass therefore sums the others only,
s_o = Σ_{j≠y} e^(z_j − m), and with e_y = e^(z_y − m), s = s_o + e_y: ``p_y − 1 = −s_o / s`` and
``lse − z_y = log1p(s_o / e_y)``, both to fp32 accuracy.

Rows whose target is ``ignore_index`` are not read: loss 0, gradient 0. A target outside [0, V) that is not
``ignore_index`` gives a NaN loss and a NaN gradient row, and nothing is read out of bounds.

Residuals: the logits and targets (the arguments themselves), m and s_o (fp32, 8 bytes per row; p is rebuilt).
Dtypes: logits fp16, bf16 or fp32; arithmetic, losses and statistics fp32; the gradient in the logits' dtype.
Bytes: forward reads the logits once; backward reads them once and writes the gradient once. Unfused PyTorch
also writes and reads an (N, V) log-softmax and its gradient.
Limits: V < 2³¹; the last stride of the logits is 1, rows lie anywhere; logits below −2e38 count as −∞.

Sources: online softmax, Milakov and Gimelshein, arXiv 1805.02867; the gradient beside the loss in one kernel,
Liger Kernel (arXiv 2410.10989); tanh near zero, Cephes' ``tanhf``; exp, Cody and Waite.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

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

# A row is walked in tiles of lanes × 16 bytes, one 16-byte load per lane. Up to 8 warps leave several rows in
# flight per multiprocessor; the kernel that reads its row twice takes 32: only one or two rows are in flight,
# and the second read hits L2.
ONE_PASS_LANES = 256
TWO_PASS_LANES = 1024


@triton.jit
def _capped(x, CAP: tl.constexpr):
    """``(CAP · tanh(x / CAP), 1 − tanh²)``, to fp32 accuracy near zero too, and where 1 − tanh² vanishes."""
    u = x * (1.0 / CAP)
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
def _exp(x, PRECISE: tl.constexpr):
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
def _log(x):
    """ln x for x > 0, to fp32 accuracy."""
    k = tl.floor(tl.log2(x))
    return k * LN2_HIGH + (_log1p(x * tl.exp2(-k) - 1.0) + k * LN2_LOW)


@triton.jit
def _row_start(row, stride, ALIGNED: tl.constexpr):
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
    m_L, s_L, d_L, base_ptr, tile, begin, end, target_at, z_y,
    MASKED: tl.constexpr, CAP: tl.constexpr, SMOOTHING: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Add a tile, without the target, to each lane's maximum, sum of exponentials, and Σ (z − z_y)."""
    PRECISE: tl.constexpr = base_ptr.dtype.element_ty == tl.float32
    at = tile * (LANES * VEC) + tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    other = at != target_at
    if MASKED:
        inside = (at >= begin) & (at < end)
        z = tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
        other = other & inside
    else:
        z = tl.load(base_ptr + at).to(tl.float32)
    if CAP is not None:
        z, _ = _capped(z, CAP)
    if SMOOTHING != 0.0:
        d_L += tl.sum(tl.where(other, z - z_y, 0.0), axis=1)
    z = tl.where(other, z, float("-inf"))
    new_L = tl.maximum(m_L, tl.max(z, axis=1))
    s_L = s_L * _exp(m_L - new_L, PRECISE) + tl.sum(_exp(z - new_L[:, None], PRECISE), axis=1)
    return new_L, s_L, d_L


@triton.jit
def _statistics(
    base_ptr, begin, V, target, z_y,
    CAP: tl.constexpr, SMOOTHING: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """``(m, s_o, d)`` of a row: its maximum, Σ_{j≠y} e^(z_j − m), and Σ_j (z_j − z_y)."""
    PRECISE: tl.constexpr = base_ptr.dtype.element_ty == tl.float32
    m_L = tl.full([LANES], LOWEST, tl.float32)
    s_L = tl.zeros([LANES], tl.float32)
    d_L = tl.zeros([LANES], tl.float32)
    end = begin + V
    at = begin + target
    full = end // (LANES * VEC)
    first = 0
    if not ALIGNED:
        m_L, s_L, d_L = _fold(m_L, s_L, d_L, base_ptr, 0, begin, end, at, z_y, True, CAP, SMOOTHING, LANES, VEC)
        first = 1
    for tile in range(first, full):
        m_L, s_L, d_L = _fold(m_L, s_L, d_L, base_ptr, tile, begin, end, at, z_y, False, CAP, SMOOTHING, LANES, VEC)
    if (full >= first) & (end % (LANES * VEC) != 0):
        m_L, s_L, d_L = _fold(m_L, s_L, d_L, base_ptr, full, begin, end, at, z_y, True, CAP, SMOOTHING, LANES, VEC)
    m_o = tl.max(m_L, axis=0)
    m = tl.maximum(m_o, z_y)
    s_o = tl.sum(s_L * _exp(m_L - m_o, PRECISE), axis=0) * _exp(m_o - m, PRECISE)
    return m, s_o, tl.sum(d_L, axis=0)


@triton.jit
def _row_loss(m, s_o, d, z_y, V, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr):
    """The loss of a row from its statistics."""
    e_y = _exp(z_y - m, True)
    log_s = _log(s_o + e_y)
    likely = e_y >= s_o
    loss = tl.where(likely, _log1p(s_o / tl.where(likely, e_y, 1.0)), (m - z_y) + log_s)
    if SMOOTHING != 0.0:
        loss -= SMOOTHING * (d / V)
    if Z_LOSS != 0.0:
        loss += Z_LOSS * (m + log_s) * (m + log_s)
    return loss


@triton.jit
def _gradient_tile(
    base_ptr, out_ptr, tile, begin, end, target_at, m, scale, shift, at_target,
    MASKED: tl.constexpr, CAP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    PRECISE: tl.constexpr = base_ptr.dtype.element_ty == tl.float32
    at = tile * (LANES * VEC) + tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if MASKED:
        inside = (at >= begin) & (at < end)
        z = tl.load(base_ptr + at, mask=inside, other=0.0).to(tl.float32)
    else:
        z = tl.load(base_ptr + at).to(tl.float32)
    if CAP is not None:
        z, slope = _capped(z, CAP)
    grad = tl.where(at == target_at, at_target, _exp(z - m, PRECISE) * scale - shift)
    if CAP is not None:
        grad = grad * slope
    if MASKED:
        tl.store(out_ptr + at, cast(grad, out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(out_ptr + at, cast(grad, out_ptr.dtype.element_ty))


@triton.jit
def _gradient(
    base_ptr, out_ptr, begin, V, target, z_y, m, s_o, g,
    CAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a row (``out_ptr`` may be ``base_ptr``)."""
    e_y = _exp(z_y - m, True)
    s = s_o + e_y
    scale = tl.div_rn(g, s)
    shift = 0.0
    # p_y − (1 − ε) − ε/V, from the smaller one of p_y and 1 − p_y: no digits cancel unless the gradient itself vanishes
    p_y = tl.div_rn(e_y, s)
    at_target = tl.where(e_y >= s_o, SMOOTHING - tl.div_rn(s_o, s), p_y - (1.0 - SMOOTHING))
    if Z_LOSS != 0.0:
        pull = 2.0 * Z_LOSS * (m + _log(s))
        scale = scale * (1.0 + pull)
        at_target += pull * p_y
    if SMOOTHING != 0.0:
        shift = g * (SMOOTHING / V)
        at_target -= SMOOTHING / V
    at_target = g * at_target
    end = begin + V
    at = begin + target
    full = end // (LANES * VEC)
    first = 0
    if not ALIGNED:
        _gradient_tile(base_ptr, out_ptr, 0, begin, end, at, m, scale, shift, at_target, True, CAP, LANES, VEC)
        first = 1
    for tile in range(first, full):
        _gradient_tile(base_ptr, out_ptr, tile, begin, end, at, m, scale, shift, at_target, False, CAP, LANES, VEC)
    if (full >= first) & (end % (LANES * VEC) != 0):
        _gradient_tile(base_ptr, out_ptr, full, begin, end, at, m, scale, shift, at_target, True, CAP, LANES, VEC)


@triton.jit
def _fill(row_ptr, V, value, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(row_ptr + at, cast(tl.full([BLOCK], value, tl.float32), row_ptr.dtype.element_ty), mask=at < V)


@triton.jit
def _target(targets_ptr, target_stride, rows_ptr, rows_stride, row, V, N, IGNORE: tl.constexpr):
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
def _target_logit(row_ptr, target, CAP: tl.constexpr):
    z_y = tl.load(row_ptr + target).to(tl.float32)
    if CAP is not None:
        z_y, _ = _capped(z_y, CAP)
    return z_y


@triton.jit
def _forward_kernel(
    logits_ptr, targets_ptr, rows_ptr, losses_ptr, m_ptr, rest_ptr, V, N, stride, target_stride, rows_stride,
    IGNORE: tl.constexpr, CAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    GRADIENT: tl.constexpr, ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The loss of a row; also its m and s_o, or its gradient at unit cotangent, written over the logits."""
    row = tl.program_id(0).to(tl.int64)
    target, ignored, valid = _target(targets_ptr, target_stride, rows_ptr, rows_stride, row, V, N, IGNORE)
    row_ptr = logits_ptr + row * stride
    if ignored:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            _fill(row_ptr, V, 0.0, LANES * VEC)
    elif valid:
        base, begin = _row_start(row, stride, ALIGNED)
        z_y = _target_logit(row_ptr, target, CAP)
        m, s_o, d = _statistics(logits_ptr + base, begin, V, target, z_y, CAP, SMOOTHING, ALIGNED, LANES, VEC)
        tl.store(losses_ptr + row, _row_loss(m, s_o, d, z_y, V, SMOOTHING, Z_LOSS))
        if m_ptr is not None:
            tl.store(m_ptr + row, m)
            tl.store(rest_ptr + row, s_o)
        if GRADIENT:
            _gradient(
                logits_ptr + base, logits_ptr + base, begin, V, target, z_y, m, s_o, 1.0,
                CAP, SMOOTHING, Z_LOSS, ALIGNED, LANES, VEC,
            )  # fmt: skip
    else:
        tl.store(losses_ptr + row, float("nan"))
        if GRADIENT:
            _fill(row_ptr, V, float("nan"), LANES * VEC)


@triton.jit
def _backward_kernel(
    logits_ptr, targets_ptr, m_ptr, rest_ptr, g_ptr, out_ptr, V, stride, target_stride, g_stride,
    IGNORE: tl.constexpr, CAP: tl.constexpr, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr,
    ALIGNED: tl.constexpr, SAME: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The gradient of a row at its cotangent. SAME: its rows lie as far apart as those of the logits."""
    row = tl.program_id(0).to(tl.int64)
    target, ignored, valid = _target(targets_ptr, target_stride, None, 0, row, V, 0, IGNORE)
    if ignored:
        _fill(out_ptr + row * V, V, 0.0, LANES * VEC)
    elif valid:
        base, begin = _row_start(row, stride, ALIGNED)
        out_base = base
        if not SAME:
            out_base = row * V - begin
        z_y = _target_logit(logits_ptr + row * stride, target, CAP)
        _gradient(
            logits_ptr + base, out_ptr + out_base, begin, V, target, z_y,
            tl.load(m_ptr + row), tl.load(rest_ptr + row), tl.load(g_ptr + row * g_stride).to(tl.float32),
            CAP, SMOOTHING, Z_LOSS, ALIGNED, LANES, VEC,
        )  # fmt: skip
    else:
        _fill(out_ptr + row * V, V, float("nan"), LANES * VEC)


def _tile(logits: Tensor, most_lanes: int) -> dict[str, int | bool]:
    """Launch parameters by row length, element size and row distance."""
    VEC = 16 // logits.element_size()
    lanes = min(most_lanes, max(32, next_power_of_2(cdiv(logits.shape[1], VEC))))
    aligned = logits.stride(0) % 16 == 0
    return {
        "ALIGNED": aligned,
        "LANES": lanes,
        "VEC": VEC,
        "num_warps": lanes // 32,
        "enable_fp_fusion": True,
    }


def forward_pass(
    logits: Tensor,
    targets: Tensor,
    losses: Tensor,
    *,
    rows: Any = ABSENT,
    N: int = 0,
    statistics: Sequence[Tensor] = (),
    gradient: bool = False,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
) -> None:
    """Fill ``losses``, and ``statistics`` (m, s_o) if given; ``gradient`` puts the gradient over the logits.

    ``rows``: where each row came from; an entry equal to ``N`` is padding and counts as ignored.
    """
    m, rest = statistics or (None, None)
    source, source_stride = (None, 0) if rows is ABSENT else (rows, rows.stride(0))
    launch(
        _forward_kernel, (logits.shape[0],), logits, targets, source, losses, m, rest,
        logits.shape[1], N, logits.stride(0), targets.stride(0), source_stride,
        IGNORE=ignore_index, CAP=softcap, SMOOTHING=label_smoothing, Z_LOSS=z_loss,
        GRADIENT=gradient, **_tile(logits, TWO_PASS_LANES if gradient else ONE_PASS_LANES),
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


def cross_entropy_fwd(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    needs: tuple[Any, ...],
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Tensor, Any]:
    """logits (N, V) fp16, bf16 or fp32, targets (N,) int32 or int64 -> losses (N,) fp32, 0 where ignored.

    ``label_smoothing`` ε, ``z_loss`` λ and ``softcap`` cap: formulas below. Raises ValueError for other shapes,
    dtypes, devices or options, and for logits whose last stride is not 1.
    """
    shape, strides = tuple(logits_NV.shape), logits_NV.stride()
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"cross_entropy: logits has shape {shape}, expected (N, V) with V > 0")
    N, V = shape
    check_dtype("cross_entropy", "logits", logits_NV)
    if V > 1 and N > 0 and strides[1] != 1:
        raise ValueError(f"cross_entropy: logits has strides {strides}, expected a last stride of 1")
    check_targets("cross_entropy", targets_N, "N", N, "logits", logits_NV.device)
    check_options("cross_entropy", label_smoothing, z_loss, softcap)
    losses, *statistics = (
        torch.empty(N, dtype=torch.float32, device=logits_NV.device) for _ in range(3 if needs[0] else 1)
    )
    forward_pass(
        logits_NV, targets_N, losses, statistics=statistics,
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
    )  # fmt: skip
    return losses, (logits_NV, targets_N, *statistics) if needs[0] else ABSENT


def cross_entropy_bwd(
    residuals: tuple[Tensor, Tensor, Tensor, Tensor],
    dlosses_N: Tensor,
    *,
    needs: tuple[Any, ...],
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Any, Any]:
    """dlosses (N,), of any stride -> dlogits (N, V), contiguous, in the logits' dtype."""
    if not needs[0]:
        return ABSENT, ABSENT
    logits, targets, m, rest = residuals
    N, V = logits.shape
    dlogits = torch.empty((N, V), dtype=logits.dtype, device=logits.device)
    launch(
        _backward_kernel, (N,), logits, targets, m, rest, dlosses_N, dlogits,
        V, logits.stride(0), targets.stride(0), dlosses_N.stride(0),
        IGNORE=ignore_index, CAP=softcap, SMOOTHING=label_smoothing, Z_LOSS=z_loss,
        SAME=logits.stride(0) == V, **_tile(logits, ONE_PASS_LANES),
    )  # fmt: skip
    return dlogits, ABSENT


cross_entropy = custom_vjp(cross_entropy_fwd, cross_entropy_bwd)


def cost(N: int, V: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Forward reads the logits, backward reads them and writes their gradient; 6 operations per logit."""
    return Cost(bytes=N * V * itemsize * (2 if backward else 1) + 16 * N, flops=6 * N * V)
