"""Log-probability of one class per row, entropy and logsumexp of ``x @ wᵀ``, without the (N, V) logits: what DPO, KTO,
ORPO and GRPO are pure functions of.

With l = x · wᵀ and, in this order, a softcap and a temperature τ::

    logprob = z_y − lse;    entropy = −Σ_j p_j · ln p_j;    lse = ln Σ_j e^(z_j)
    z = cap · tanh(l / cap) / τ    (z = l / τ without softcap);    p_j = e^(z_j − lse)

Backward, with cotangents g of the log-probability, h of the entropy and k of lse, and u_j = −ln p_j::

    dz_j = (k − g) · p_j + h · p_j · (u_j − entropy)                     for j ≠ y
    dz_y = g · (1 − p_y) + k · p_y + h · p_y · (u_y − entropy)
    dl   = dz · (1 − tanh²(l / cap)) / τ           dx = dl · w           dw = dlᵀ · x

**The target is kept apart**, as in ``ops/cross_entropy.py``: 1 − p_y = s_o / s from the sum of the others, and
logprob = −log1p(s_o / e_y). The entropy is a sum of positive terms, e^(z_j − m) · (m − z_j) beside e^(z_j − m) in the
same pass, so it too is accurate when the target is certain. (When another class is, to an absolute 2^-23.)

**Frozen head, two products, any cotangents of logprob and lse.** Let a = Σ_{j≠y} p_j · (dz_j/dl_j) · w_j and
c = (dz_y/dl_y) · w_y. Then::

    dx = (g · (1 − p_y) + k · p_y) · c + (k − g) · a

so forward, while a chunk's logits exist, turns them into those of a in place and saves the product a (M, D);
backward is element-wise and reads one row of w per token. a lacks the target, so nothing cancels in it, and the
coefficients of c are exact to fp32.

**Everything else recomputes.** A trainable head needs the cotangents inside its sum over tokens, and the entropy's
cotangent weights each class differently: then forward keeps no tensor at all, and backward computes the logits again,
chunk by chunk, and from them dl in place. ``entropy_grad=True`` says beforehand that the entropy will get a cotangent;
if it gets one without, the result is the same, a was just saved in vain. Products of 2·M·V·D operations:

    forward only 1 · frozen 2 · frozen with entropy_grad 3 (4 if not announced) · trainable 4 (3 without dx)

Residuals: x, w, targets and rows (arguments); in the frozen form also a (M · D elements of x's dtype) and two fp32
coefficients per token (8 bytes).
Dtypes: x and w alike, fp16, bf16 or fp32; logits and dl are rounded to it, as in PyTorch; outputs are fp32, so is the
sum of dw over chunks. Chunks and rows are those of ``ops/linear_cross_entropy.py``.
Bytes, besides x, w and the gradients: 4 or 5 passes over a chunk's logits (6 or 7 with the recomputed ones). Unfused: a
dozen over (N, V), most of them in fp32. Memory of the frozen form at 8192 tokens, V 128256, D 4096 in bf16: 501 MiB of
logits and 64 MiB of a in forward, 64 MiB of a and 64 MiB of dx in backward.
Limits: w is a Tensor (no NF4 or adapted head); the last stride of x and w is 1.

Source: the residual that makes backward element-wise, here derived for two cotangents, is Liger Kernel's gradient in
forward (arXiv 2410.10989).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import launch
from ..tree import ABSENT
from .language import cast
from .linear_cross_entropy import by_rows, check_linear, chunk_rows, chunks_of_logits, product, scaled
from .logits_row import (
    exp,
    fill,
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
def _rows_kernel(
    logits_ptr, targets_ptr, rows_ptr, logprob_ptr, entropy_ptr, lse_ptr, own_ptr, shared_ptr, g_ptr, h_ptr, k_ptr,
    V, N, stride, target_stride, rows_stride, g_stride, h_stride, k_stride,
    IGNORE: tl.constexpr, CAP: tl.constexpr, TAU: tl.constexpr, BACKWARD: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """One row of logits: its three outputs, where there are pointers for them; and over the logits either dl (BACKWARD;
    a cotangent may be None), or, where there are pointers for the coefficients of c, what makes a."""
    row = tl.program_id(0).to(tl.int64)
    target, ignored, valid = target_of(targets_ptr, target_stride, rows_ptr, rows_stride, row, V, N, IGNORE)
    row_ptr = logits_ptr + row * stride
    if ignored | ~valid:
        nothing = tl.where(ignored, 0.0, float("nan"))
        if logprob_ptr is not None:
            tl.store(logprob_ptr + row, nothing)
            tl.store(entropy_ptr + row, nothing)
            tl.store(lse_ptr + row, nothing)
        if own_ptr is not None:
            tl.store(own_ptr + row, nothing)
            tl.store(shared_ptr + row, nothing)
        if BACKWARD or own_ptr is not None:
            fill(row_ptr, V, nothing, LANES * VEC)
    else:
        base, begin = row_start(row, stride, ALIGNED)
        z_y, slope_y = target_logit(row_ptr, target, CAP, TAU)
        ENTROPY: tl.constexpr = h_ptr is not None or logprob_ptr is not None
        m, s_o, _, t, _ = statistics(
            logits_ptr + base, None, 0, begin, V, target, z_y,
            CAP, TAU, 0.0, ENTROPY, False, "", ALIGNED, LANES, VEC,
        )  # fmt: skip
        nll, log_s = row_nll(m, s_o, z_y)
        e_y = exp(z_y - m, True)
        s = s_o + e_y
        p_y = tl.div_rn(e_y, s)
        others = tl.div_rn(s_o, s)  # 1 − p_y
        entropy = 0.0
        if ENTROPY:
            entropy = tl.div_rn(t + s_o * log_s + tl.where(e_y > 0.0, e_y * nll, 0.0), s)
        if logprob_ptr is not None:
            tl.store(logprob_ptr + row, -nll)
            tl.store(entropy_ptr + row, entropy)
            tl.store(lse_ptr + row, m + log_s)
        if own_ptr is not None:
            tl.store(own_ptr + row, others * slope_y)
            tl.store(shared_ptr + row, p_y * slope_y)
            write_gradient(
                logits_ptr + base, logits_ptr + base, None, 0, begin, V, target, m, tl.div_rn(1.0, s), None, 0.0, 0.0,
                CAP, TAU, "", ALIGNED, LANES, VEC,
            )  # fmt: skip
        if BACKWARD:
            scale = 0.0
            at_target = 0.0
            if g_ptr is not None:
                g = tl.load(g_ptr + row * g_stride).to(tl.float32)
                scale -= g
                at_target += g * others
            if k_ptr is not None:
                k = tl.load(k_ptr + row * k_stride).to(tl.float32)
                scale += k
                at_target += k * p_y
            tilt = None
            if h_ptr is not None:
                h = tl.load(h_ptr + row * h_stride).to(tl.float32)
                scale += h * (log_s - entropy)
                at_target += h * p_y * (nll - entropy)
                tilt = tl.div_rn(h, s)
            write_gradient(
                logits_ptr + base, logits_ptr + base, None, 0, begin, V, target, m, tl.div_rn(scale, s), tilt, 0.0,
                at_target, CAP, TAU, "", ALIGNED, LANES, VEC,
            )  # fmt: skip


@triton.jit
def _combine_kernel(
    a_ptr, w_ptr, targets_ptr, rows_ptr, own_ptr, shared_ptr, g_ptr, k_ptr, out_ptr,
    N, V, D, stride, target_stride, rows_stride, g_stride, k_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[rows[i]] = (g · own + k · shared) · w[y] + (k − g) · a[i], where rows[i] is a row of out."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = i
    found = D
    if rows_ptr is not None:
        row = tl.load(rows_ptr + i * rows_stride).to(tl.int64)
        found = tl.where((row >= 0) & (row < N), D, 0)
    target = tl.load(targets_ptr + i * target_stride).to(tl.int64)
    known = tl.where((target >= 0) & (target < V), found, 0)
    of_w = 0.0
    of_a = 0.0
    if g_ptr is not None:
        g = tl.load(g_ptr + i * g_stride).to(tl.float32)
        of_w += g * tl.load(own_ptr + i)
        of_a -= g
    if k_ptr is not None:
        k = tl.load(k_ptr + i * k_stride).to(tl.float32)
        of_w += k * tl.load(shared_ptr + i)
        of_a += k
    a = tl.load(a_ptr + i * D + at, mask=at < found, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + target * stride + at, mask=at < known, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + at, cast(of_w * w + of_a * a, out_ptr.dtype.element_ty), mask=at < found)


def _row_pass(
    logits: Tensor,
    targets: Tensor,
    rows: Any,
    N: int,
    *,
    outputs: tuple[Any, Any, Any] = (ABSENT, ABSENT, ABSENT),
    coefficients: tuple[Any, Any] = (ABSENT, ABSENT),
    cotangents: tuple[Any, Any, Any] = (ABSENT, ABSENT, ABSENT),
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> None:
    """Fill what is given; ``coefficients`` and ``cotangents`` also put a's weights, or dl, over the logits."""
    backward = any(t is not ABSENT for t in cotangents)
    source, source_stride = pointer_and_stride(rows)
    (g, g_stride), (h, h_stride), (k, k_stride) = (pointer_and_stride(t) for t in cotangents)
    launch(
        _rows_kernel, (logits.shape[0],), logits, targets, source,
        *(pointer(t) for t in (*outputs, *coefficients)), g, h, k,
        logits.shape[1], N, logits.stride(0), targets.stride(0), source_stride, g_stride, h_stride, k_stride,
        IGNORE=ignore_index, CAP=softcap, TAU=temperature, BACKWARD=backward,
        **tiles(logits, 2 if backward or coefficients[0] is not ABSENT else 1),
    )  # fmt: skip


def linear_logprob_fwd(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_M: Tensor,
    rows_M: Any = ABSENT,
    *,
    needs: tuple[Any, ...],
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy_grad: bool = False,
    chunk_logits: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Any]:
    """x (N, D), w (V, D), targets (M,), rows (M,) or ABSENT (M = N) -> (logprob, entropy, lse), each (M,) fp32.

    ``targets[i]`` belongs to row ``rows[i]`` of x. An entry of ``rows`` equal to N is padding; others appear at most
    once. Padding and ``ignore_index``: 0, 0, 0 and no gradient. Targets outside [0, V), and rows outside [0, N]: NaN.
    All three outputs are differentiable; ``entropy_grad=True`` makes it cheaper when the entropy's is wanted (formulas
    and products: below). ``chunk_logits``: about how many logits exist at a time, None for 2²⁸.
    Raises ValueError for other shapes, dtypes, devices, strides or options, TypeError for a w that is not a Tensor.
    """
    check_linear("linear_logprob", x_ND, w_VD, targets_M, rows_M, chunk_logits)
    if not temperature > 0.0:
        raise ValueError(f"linear_logprob: temperature is {temperature}, expected a positive number")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"linear_logprob: softcap is {softcap}, expected a positive number or None")
    (N, D), V, M = x_ND.shape, w_VD.shape[0], targets_M.shape[0]

    def per_token() -> Tensor:
        return torch.empty(M, dtype=torch.float32, device=x_ND.device)

    outputs = per_token(), per_token(), per_token()
    a, coefficients = ABSENT, (ABSENT, ABSENT)
    if needs[0] and not needs[1] and not entropy_grad:
        a, coefficients = torch.empty(M, D, dtype=x_ND.dtype, device=x_ND.device), (per_token(), per_token())
    chunk = chunk_rows(M, V, False, chunk_logits)
    for part, rows, _, z in chunks_of_logits(x_ND, w_VD, rows_M, M, chunk):
        _row_pass(
            z, targets_M[part], rows, N, outputs=_cut(outputs, part), coefficients=_cut(coefficients, part),
            ignore_index=ignore_index, temperature=temperature, softcap=softcap,
        )  # fmt: skip
        if a is not ABSENT:
            product(z, w_VD, a[part])
    residuals = (x_ND, w_VD, targets_M, rows_M, a, *coefficients) if needs[0] or needs[1] else ABSENT
    return outputs, residuals


def _cut(per_token: tuple[Any, ...], part: slice) -> tuple[Any, ...]:
    return tuple(ABSENT if t is ABSENT else t[part] for t in per_token)


def linear_logprob_bwd(
    residuals: tuple[Any, ...],
    cotangents: tuple[Any, Any, Any],
    *,
    needs: tuple[Any, ...],
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy_grad: bool = False,
    chunk_logits: int | None = None,
) -> tuple[Any, Any, Any, Any]:
    """Three cotangents (M,) of any stride, or ABSENT -> dx (N, D) and dw (V, D), in the dtypes of x and w."""
    x, w, targets, rows, a, own, shared = residuals
    (N, D), V, M = x.shape, w.shape[0], targets.shape[0]
    if all(ct is ABSENT for ct in cotangents) or not (needs[0] or needs[1]):
        return ABSENT, ABSENT, ABSENT, ABSENT
    dx = dw = ABSENT
    if needs[0]:  # without rows every row is written below
        dx = (torch.empty if rows is ABSENT else torch.zeros)((N, D), dtype=x.dtype, device=x.device)
    if a is not ABSENT and cotangents[1] is ABSENT:
        (g, g_stride), (k, k_stride) = (pointer_and_stride(ct) for ct in (cotangents[0], cotangents[2]))
        source, source_stride = pointer_and_stride(rows)
        grid, options = by_rows(M, D)
        launch(
            _combine_kernel, grid, a, w, targets, source, own, shared, g, k, dx,
            N, V, D, w.stride(0), targets.stride(0), source_stride, g_stride, k_stride, **options,
        )  # fmt: skip
        return dx, ABSENT, ABSENT, ABSENT
    chunk = chunk_rows(M, V, needs[1], chunk_logits)
    if needs[1]:
        dw = torch.empty((V, D), dtype=torch.float32 if chunk < M else w.dtype, device=w.device)
        if M == 0:
            dw.zero_()
    for part, rows_part, x_part, z in chunks_of_logits(x, w, rows, M, chunk):
        _row_pass(
            z, targets[part], rows_part, N, cotangents=_cut(cotangents, part),
            ignore_index=ignore_index, temperature=temperature, softcap=softcap,
        )  # fmt: skip
        if needs[0] and rows is ABSENT:
            product(z, w, dx[part])
        elif needs[0]:
            dx_part = torch.empty_like(x_part)
            product(z, w, dx_part)
            scaled(dx_part, ABSENT, dx, rows_part)
        if needs[1]:
            product(z.t(), x_part, dw, add=part.start > 0)
    if needs[1] and dw.dtype != w.dtype:
        dw = scaled(dw, ABSENT, torch.empty((V, D), dtype=w.dtype, device=w.device))
    return dx, dw, ABSENT, ABSENT


linear_logprob = custom_vjp(linear_logprob_fwd, linear_logprob_bwd)


def cost(N: int, D: int, V: int, M: int, itemsize: int, *, dx: bool = False, dw: bool = False) -> Cost:
    """Forward and backward of M target rows together, cotangents of logprob and lse: x and w read, the gradients that
    are wanted written. A trainable head must compute its logits twice."""
    moved = (M * D + V * D + (N * D if dx else 0) + (V * D if dw else 0)) * itemsize
    return Cost(bytes=moved + 24 * M, flops=2 * M * V * D * (1 + dx + 2 * dw))
