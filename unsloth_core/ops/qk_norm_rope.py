"""RMSNorm of every head of queries and keys, then rotary position embedding, in one launch.

Formula, for a head x of K channels, its channel pairs (a, b) = (n_i, n_{i+J}), i < J, and the token's cos_i and sin_i,
c and s:

    n = x̂ ∘ (w + offset), x̂ = x·rstd, rstd = (mean(x²) + eps)^-½
    a' = a·c - b·s        b' = b·c + a·s        n passes through from channel 2J on (partial rotation)
w is wq for the H heads of q and wk for the G heads of k; offset is 1 for Gemma, whose stored weight is w - 1.
Backward, with u = dy turned back (the same with -s) and m = u ∘ (w + offset):
    dx = rstd · (m - x̂ · mean(m ∘ x̂))          dw = Σ_tokens, heads u ∘ x̂

Residuals: the arguments, and rstd of q and k, fp32, 4 bytes per head; nothing of q if neither q nor wq wants a
gradient, nor of k.
Dtypes: q, k, wq and wk fp16, bf16 or fp32, each with gradients of its own dtype, outputs in q's and k's; cos and sin
fp32. ``casting_mode="llama"`` rounds x̂ to x's dtype before the weight (Qwen3), ``"gemma"`` does not (Gemma3). All
else is fp32 and rounds once, at the end: rms_norm and rope one after the other also round n, in between. The rounding
of x̂ counts as the identity in backward.
Bytes moved per element of 2 bytes: forward 4 (as three ops 8), backward 6 (14). cos and sin, 8·J bytes per token, are
read once.
Limits: any strides of q, k, cos, sin and cotangents (fast with a last stride of 1 and others divisible by 16, as in a
slice of a qkv product); wq and wk contiguous. Outputs are new and contiguous. No gradient flows to cos and sin.

How: a program takes a few tokens with all their heads in tiles of (tokens, heads, pairs), as in :mod:`.rope`. Both
halves of a head, and what passes through, lie in the same lanes: a head's sums stay within a warp up to K = 256. The
weight gradients are summed without atomics: a fixed set of programs walks over the tokens, adds up the tile of u ∘ x̂
in fp32 registers and writes one partial row for q and one for k; a second kernel adds the rows in order. A frozen
weight has no sums, and with both frozen each program takes one tile.

Sources of ideas: QK normalisation, Henry et al. (arXiv 2010.04245); rope, Su et al. (arXiv 2104.09864); partial rows,
see :mod:`.rms_norm`.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import cdiv, launch, next_power_of_2, sms
from ..prepared import prepared
from ..tree import ABSENT
from .language import cast
from .rms_norm import check_channels, scaled, sum_partials
from .rope import check_heads, head_numbers, load_angles, refuse_gradient_of_angles, tile, turned

_FORWARD_PAIRS = 2048  # channel pairs in one tile: 16 a thread with 4 warps, two 16-byte loads of either half
_BACKWARD_PAIRS = 1024  # half of it: beside x and dy the running sums of wq and wk live in registers
_PROGRAMS_PER_SM = 3  # of backward with sums: what its 161 registers allow at once


# ---------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _load_weight(w_ptr, K: tl.constexpr, J: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_REST: tl.constexpr):
    """w (K,) in the three parts of a head, (1, 1, BLOCK_J) twice and (1, 1, BLOCK_REST), fp32."""
    pair = tl.arange(0, BLOCK_J)[None, None, :]
    channel = 2 * J + tl.arange(0, BLOCK_REST)[None, None, :]
    w_a = tl.load(w_ptr + pair, pair < J, other=0.0).to(tl.float32)
    w_b = tl.load(w_ptr + (pair + J), pair < J, other=0.0).to(tl.float32)
    if 2 * J < K:
        return w_a, w_b, tl.load(w_ptr + channel, channel < K, other=0.0).to(tl.float32)
    else:
        return w_a, w_b, tl.zeros([1, 1, 1], tl.float32)


@triton.jit
def _load_heads(
    x_row, x_channel, row_inside,
    K: tl.constexpr, J: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Heads that begin at ``x_row`` (T, BLOCK_H, 1), in the same three parts; 0 where there is nothing."""
    pair = tl.arange(0, BLOCK_J)[None, None, :].to(tl.int64)
    inside = row_inside & (pair < J)
    a = tl.load(x_row + pair * x_channel, inside, other=0.0).to(tl.float32)
    b = tl.load(x_row + (pair + J) * x_channel, inside, other=0.0).to(tl.float32)
    if 2 * J < K:
        channel = 2 * J + tl.arange(0, BLOCK_REST)[None, None, :].to(tl.int64)
        rest = tl.load(x_row + channel * x_channel, row_inside & (channel < K), other=0.0)
        return a, b, rest.to(tl.float32)
    else:
        return a, b, tl.zeros([1, 1, 1], tl.float32)


@triton.jit
def _store_heads(
    y_row, a, b, rest, row_inside,
    K: tl.constexpr, J: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """The three parts of contiguous heads, rounded."""
    pair = tl.arange(0, BLOCK_J)[None, None, :].to(tl.int64)
    inside = row_inside & (pair < J)
    dtype: tl.constexpr = y_row.dtype.element_ty
    tl.store(y_row + pair, cast(a, dtype), inside)
    tl.store(y_row + (pair + J), cast(b, dtype), inside)
    if 2 * J < K:
        channel = 2 * J + tl.arange(0, BLOCK_REST)[None, None, :].to(tl.int64)
        tl.store(y_row + channel, cast(rest, dtype), row_inside & (channel < K))


@triton.jit
def _mean(a, b, rest, K: tl.constexpr, J: tl.constexpr):
    """(T, BLOCK_H, 1): over all channels of a head."""
    total = tl.sum(a + b, axis=2, keep_dims=True)
    if 2 * J < K:
        total += tl.sum(rest, axis=2, keep_dims=True)
    return total / K


@triton.jit
def _forward_heads(
    x_ptr, w_ptr, y_ptr, rstd_ptr, x_token, x_head, x_channel, token, tokens, cos, sin,
    eps: tl.constexpr, offset: tl.constexpr, ROUND: tl.constexpr,
    HEADS: tl.constexpr, K: tl.constexpr, J: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of a few tokens of q or of k; ``token`` (T, 1, 1) int64, ``cos``, ``sin`` (T, 1, BLOCK_J)."""
    w_a, w_b, w_rest = _load_weight(w_ptr, K, J, BLOCK_J, BLOCK_REST)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    for first in range(0, HEADS, BLOCK_H):
        head = head_numbers(first, BLOCK_H)
        row_inside = (token < tokens) & (head < HEADS)
        x_row = x_ptr + token * x_token + head * x_head
        a, b, rest = _load_heads(x_row, x_channel, row_inside, K, J, BLOCK_J, BLOCK_REST)
        rstd = tl.rsqrt(_mean(a * a, b * b, rest * rest, K, J) + eps)
        if rstd_ptr is not None:
            tl.store(rstd_ptr + token * HEADS + head, rstd, row_inside)
        a = scaled(a, rstd, w_a, offset, dtype, ROUND)
        b = scaled(b, rstd, w_b, offset, dtype, ROUND)
        a, b = turned(a, b, cos, sin)
        rest = scaled(rest, rstd, w_rest, offset, dtype, ROUND)
        _store_heads(y_ptr + (token * HEADS + head) * K, a, b, rest, row_inside, K, J, BLOCK_J, BLOCK_REST)


@triton.jit
def _forward(
    q_ptr, k_ptr, wq_ptr, wk_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, q_rstd_ptr, k_rstd_ptr,
    tokens, q_token, q_head, q_channel, k_token, k_head, k_channel, cos_token, cos_pair, sin_token, sin_pair,
    eps: tl.constexpr, offset: tl.constexpr, ROUND: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, J: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens with all their heads."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    cos, sin = load_angles(
        cos_ptr, sin_ptr, token, tokens, cos_token, cos_pair, sin_token, sin_pair, J, BLOCK_J
    )  # fmt: skip
    _forward_heads(
        q_ptr, wq_ptr, q_out_ptr, q_rstd_ptr, q_token, q_head, q_channel, token, tokens, cos, sin,
        eps, offset, ROUND, H, K, J, BLOCK_H, BLOCK_J, BLOCK_REST,
    )  # fmt: skip
    _forward_heads(
        k_ptr, wk_ptr, k_out_ptr, k_rstd_ptr, k_token, k_head, k_channel, token, tokens, cos, sin,
        eps, offset, ROUND, G, K, J, BLOCK_H, BLOCK_J, BLOCK_REST,
    )  # fmt: skip


@triton.jit
def _backward_heads(
    x_ptr, w_ptr, rstd_ptr, dy_ptr, dx_ptr, x_token, x_head, x_channel, dy_token, dy_head, dy_channel,
    token, tokens, cos, sin, dw_a, dw_b, dw_rest, offset: tl.constexpr, SUM: tl.constexpr,
    HEADS: tl.constexpr, K: tl.constexpr, J: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of a few tokens of q or of k: dx; and the running tiles of u ∘ x̂ with these heads added."""
    w_a, w_b, w_rest = _load_weight(w_ptr, K, J, BLOCK_J, BLOCK_REST)
    for first in range(0, HEADS, BLOCK_H):
        head = head_numbers(first, BLOCK_H)
        row_inside = (token < tokens) & (head < HEADS)
        x_row = x_ptr + token * x_token + head * x_head
        dy_row = dy_ptr + token * dy_token + head * dy_head
        a, b, rest = _load_heads(x_row, x_channel, row_inside, K, J, BLOCK_J, BLOCK_REST)
        u_a, u_b, u_rest = _load_heads(dy_row, dy_channel, row_inside, K, J, BLOCK_J, BLOCK_REST)
        rstd = tl.load(rstd_ptr + token * HEADS + head, row_inside, other=0.0)
        a, b, rest = a * rstd, b * rstd, rest * rstd
        u_a, u_b = turned(u_a, u_b, cos, -sin)
        if SUM:
            dw_a += u_a * a
            dw_b += u_b * b
            if 2 * J < K:
                dw_rest += u_rest * rest
        if dx_ptr is not None:
            m_a, m_b, m_rest = u_a * (w_a + offset), u_b * (w_b + offset), u_rest * (w_rest + offset)
            mean = _mean(m_a * a, m_b * b, m_rest * rest, K, J)
            a, b, rest = rstd * (m_a - a * mean), rstd * (m_b - b * mean), rstd * (m_rest - rest * mean)
            _store_heads(dx_ptr + (token * HEADS + head) * K, a, b, rest, row_inside, K, J, BLOCK_J, BLOCK_REST)
    return dw_a, dw_b, dw_rest


@triton.jit
def _store_partial(
    partial_ptr, dw_a, dw_b, dw_rest,
    K: tl.constexpr, J: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """This program's row of dw: its running tiles, added up over tokens and heads."""
    row_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * K
    dtype: tl.constexpr = partial_ptr.dtype.element_ty
    pair = tl.arange(0, BLOCK_J)
    tl.store(row_ptr + pair, cast(tl.sum(tl.sum(dw_a, axis=0), axis=0), dtype), pair < J)
    tl.store(row_ptr + (pair + J), cast(tl.sum(tl.sum(dw_b, axis=0), axis=0), dtype), pair < J)
    if 2 * J < K:
        channel = 2 * J + tl.arange(0, BLOCK_REST)
        tl.store(row_ptr + channel, cast(tl.sum(tl.sum(dw_rest, axis=0), axis=0), dtype), channel < K)


@triton.jit
def _backward(
    q_ptr, wq_ptr, q_rstd_ptr, q_dy_ptr, dq_ptr, wq_partial_ptr,
    k_ptr, wk_ptr, k_rstd_ptr, k_dy_ptr, dk_ptr, wk_partial_ptr, cos_ptr, sin_ptr,
    tokens, q_token, q_head, q_channel, q_dy_token, q_dy_head, q_dy_channel,
    k_token, k_head, k_channel, k_dy_token, k_dy_head, k_dy_channel,
    cos_token, cos_pair, sin_token, sin_pair,
    offset: tl.constexpr, H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, J: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Tiles of BLOCK_T tokens with all their heads, every num_programs-th one. What is not wanted is None."""
    wq_a = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_J], tl.float32)
    wq_b, wk_a, wk_b = wq_a, wq_a, wq_a
    wq_rest = tl.zeros([BLOCK_T, BLOCK_H, BLOCK_REST], tl.float32)
    wk_rest = wq_rest
    for i in tl.range(tl.program_id(0), tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        token = (i * BLOCK_T + tl.arange(0, BLOCK_T))[:, None, None].to(tl.int64)
        cos, sin = load_angles(
            cos_ptr, sin_ptr, token, tokens, cos_token, cos_pair, sin_token, sin_pair, J, BLOCK_J
        )  # fmt: skip
        if q_ptr is not None:
            wq_a, wq_b, wq_rest = _backward_heads(
                q_ptr, wq_ptr, q_rstd_ptr, q_dy_ptr, dq_ptr,
                q_token, q_head, q_channel, q_dy_token, q_dy_head, q_dy_channel,
                token, tokens, cos, sin, wq_a, wq_b, wq_rest, offset, wq_partial_ptr is not None,
                H, K, J, BLOCK_H, BLOCK_J, BLOCK_REST,
            )  # fmt: skip
        if k_ptr is not None:
            wk_a, wk_b, wk_rest = _backward_heads(
                k_ptr, wk_ptr, k_rstd_ptr, k_dy_ptr, dk_ptr,
                k_token, k_head, k_channel, k_dy_token, k_dy_head, k_dy_channel,
                token, tokens, cos, sin, wk_a, wk_b, wk_rest, offset, wk_partial_ptr is not None,
                G, K, J, BLOCK_H, BLOCK_J, BLOCK_REST,
            )  # fmt: skip
    if wq_partial_ptr is not None:
        _store_partial(wq_partial_ptr, wq_a, wq_b, wq_rest, K, J, BLOCK_J, BLOCK_REST)
    if wk_partial_ptr is not None:
        _store_partial(wk_partial_ptr, wk_a, wk_b, wk_rest, K, J, BLOCK_J, BLOCK_REST)


# --------------------------------------------------------------------------------------------------- launches

_NO_SIDE = ((None,) * 6, (0,) * 6)


@functools.cache
def _tile(H: int, G: int, K: int, J: int, pairs: int) -> dict[str, int]:
    """The blocks of a kernel; fewer pairs where channels that pass through share the registers with them."""
    rest = next_power_of_2(max(1, K - 2 * J))
    tokens, heads, block_j = tile(H, G, J, max(1, pairs * next_power_of_2(J) // next_power_of_2(cdiv(K, 2))))
    return {"BLOCK_T": tokens, "BLOCK_H": heads, "BLOCK_J": block_j, "BLOCK_REST": rest}


def _side(residuals: Any, rstd: Tensor, dy: Tensor, needs_x: bool, needs_w: bool, programs: int) -> Any:
    """What the kernel gets of q or of k: x, w, rstd, dy, dx and the partial rows of dw; strides of x and dy. The only
    row of a single program is dw itself."""
    x, w = residuals
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    partial = None
    if needs_w:
        shape, dtype = (w.shape, w.dtype) if programs == 1 else ((programs, x.shape[2]), torch.float32)
        partial = torch.empty(shape, dtype=dtype, device=x.device)
    return (x, w, rstd, dy, dx, partial), (*x.stride(), *dy.stride())


def _gradients(side: Any) -> tuple[Any, Any]:
    """dx, and dw as the sum of its partial rows; ABSENT where there is none."""
    (_, w, _, _, dx, partial), _ = side
    dx = ABSENT if dx is None else dx
    if partial is None:
        return dx, ABSENT
    if partial.ndim == 1:
        return dx, partial
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    sum_partials(partial, dw)
    return dx, dw


# --------------------------------------------------------------------------------------------------------- op


@prepared
def qk_norm_rope_fwd(
    q_NHK: Tensor,
    k_NGK: Tensor,
    wq_K: Tensor,
    wk_K: Tensor,
    cos_NJ: Tensor,
    sin_NJ: Tensor,
    *,
    needs: Any,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[tuple[Tensor, Tensor], tuple[Any, ...]]:
    """q (N, H, K), k (N, G, K), wq and wk (K,), cos and sin (N, J) fp32, 2J <= K -> normalised and turned q and k.

    They are new, contiguous, and of the dtypes of q and k. ``casting_mode`` "llama" or "gemma": where it rounds, see
    below. Raises ValueError for other shapes, dtypes, devices or modes, and for weights that are not contiguous;
    NotImplementedError if cos or sin want a gradient.
    """
    check_heads("qk_norm_rope", q_NHK, k_NGK, cos_NJ, sin_NJ)
    N, H, K = q_NHK.shape
    for name, w in (("wq", wq_K), ("wk", wk_K)):
        if w.shape != (K,):
            raise ValueError(f"qk_norm_rope: {name} has shape {tuple(w.shape)}, expected (K,) = ({K},)")
        check_channels("qk_norm_rope", name, w, q_NHK)
    if casting_mode not in ("llama", "gemma"):
        raise ValueError(f"qk_norm_rope: casting_mode is {casting_mode!r}, expected one of ('llama', 'gemma')")
    refuse_gradient_of_angles("qk_norm_rope", needs[4], needs[5])
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_NHK, k_NGK))
    G, J = k_NGK.shape[1], cos_NJ.shape[1]
    of_q, of_k = needs[0] or needs[2], needs[1] or needs[3]
    rstd = q_rstd = k_rstd = None
    if of_q or of_k:
        rows_q, rows_k = N * H if of_q else 0, N * G if of_k else 0
        rstd = torch.empty(rows_q + rows_k, dtype=torch.float32, device=q_NHK.device)
        q_rstd, k_rstd = rstd[:rows_q] if of_q else None, rstd[rows_q:] if of_k else None
    blocks = _tile(H, G, K, J, _FORWARD_PAIRS)
    launch(
        _forward, (cdiv(N, blocks["BLOCK_T"]),),
        q_NHK, k_NGK, wq_K, wk_K, cos_NJ, sin_NJ, q_out, k_out, q_rstd, k_rstd,
        N, *q_NHK.stride(), *k_NGK.stride(), *cos_NJ.stride(), *sin_NJ.stride(),
        eps=eps, offset=offset, ROUND=casting_mode == "llama", H=H, G=G, K=K, J=J, **blocks,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    none = (ABSENT, ABSENT)
    if rstd is None:
        return (q_out, k_out), (none, none, none, ABSENT)
    heads = (q_NHK, wq_K) if of_q else none, (k_NGK, wk_K) if of_k else none
    return (q_out, k_out), (*heads, (cos_NJ, sin_NJ), rstd)


@prepared
def qk_norm_rope_bwd(
    residuals: tuple[Any, ...],
    dy: tuple[Any, Any],
    *,
    needs: Any,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Any, ...]:
    """Cotangents like q and k, of any strides, or ABSENT -> (dq, dk, dwq, dwk, ABSENT, ABSENT)."""
    *of_heads, (cos_NJ, sin_NJ), rstd = residuals
    wanted = [d is not ABSENT and (needs[i] or needs[i + 2]) for i, d in enumerate(dy)]
    if not any(wanted):
        return (ABSENT,) * 6
    (N, J), K = cos_NJ.shape, dy[wanted.index(True)].shape[2]
    H, G = (d.shape[1] if want else 0 for d, want in zip(dy, wanted))
    blocks = _tile(H, G, K, J, _BACKWARD_PAIRS)
    programs = cdiv(N, blocks["BLOCK_T"])
    if wanted[0] and needs[2] or wanted[1] and needs[3]:  # at least four tiles each keep the partial rows few
        programs = min(cdiv(programs, 4), _PROGRAMS_PER_SM * sms(cos_NJ.device))
    of_q = 0 if of_heads[0][0] is ABSENT else N * of_heads[0][0].shape[1]
    q, k = (
        _side(of, part, d, needs[i], needs[i + 2], programs) if want else _NO_SIDE
        for i, (of, part, d, want) in enumerate(zip(of_heads, (rstd[:of_q], rstd[of_q:]), dy, wanted))
    )
    launch(
        _backward, (programs,), *q[0], *k[0], cos_NJ, sin_NJ,
        N, *q[1], *k[1], *cos_NJ.stride(), *sin_NJ.stride(), offset=offset, H=H, G=G, K=K, J=J, **blocks,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    (dq, dwq), (dk, dwk) = _gradients(q), _gradients(k)
    return dq, dk, dwq, dwk, ABSENT, ABSENT


qk_norm_rope = custom_vjp(qk_norm_rope_fwd, qk_norm_rope_bwd)


def cost(N: int, H: int, G: int, K: int, J: int, itemsize: int, *, backward: bool = False) -> Cost:
    """Forward: q, k and angles read, the results and rstd written. Backward, with dwq and dwk: dy is read too."""
    heads = N * (H + G)
    small = 8 * N * J + 4 * heads + (4 if backward else 2) * K * itemsize
    flops = (11 if backward else 4) * heads * K + 6 * heads * J
    return Cost(bytes=(3 if backward else 2) * heads * K * itemsize + small, flops=flops)
