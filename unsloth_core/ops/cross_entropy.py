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

How a row is walked: ``ops/logits_row.py``. Source of the gradient beside the loss in one kernel: Liger Kernel
(arXiv 2410.10989).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend
from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import launch
from ..prepared import prepared
from ..tracing import whole
from ..tree import ABSENT
from .checks import check_device, check_dtype
from .logits_row import (
    exp,
    fill,
    log,
    pointer,
    pointer_and_stride,
    row_nll,
    row_start,
    statistics,
    target_logit,
    target_of,
    tiles,
    write_gradient,
)


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


@whole
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


@prepared
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


@prepared
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
