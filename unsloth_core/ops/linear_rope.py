"""The stacked projection of attention: product, split into heads, rotary position embedding of q and k.

Formula, with H query heads and G key heads of K channels, M = (H + 2G)·K:
    qkv = x Wᵀ + bias (N, M), rounded;  q, k, v = its first H, its next G and its last G heads;
    q and k turned as in :mod:`.rope`, in the buffer of the product.
Backward: dq and dk turned back and dv as it is are laid side by side as dqkv, whose product is :mod:`.linear`'s.

q, k and v are views of one new tensor (N, H + 2G, K), so a schedule that keeps them keeps the product's bytes, turned
already.
Residuals: those of linear and of rope.
Dtypes: those of linear; cos and sin fp32, without a gradient.
Bytes moved beside the product, per element of 2 bytes: forward 4 of q and k, nothing of v; backward 4 of each. As three
ops 4 of q and k forward, and again where it is replayed, and backward 8 of them and 4 of v: the split's backward is
a concatenation.
Limits: those of linear and rope; every cotangent in any strides.

Source of the idea: qkv kept as attention reads it, and its gradient written as one, as packed-qkv attention does
(FlashAttention's ``flash_attn_qkvpacked_func``).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import weights
from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import cdiv, launch, next_power_of_2
from ..prepared import prepared
from ..tree import ABSENT
from ..weights import Weight
from .linear import cost as linear_cost
from .linear import linear_bwd, linear_fwd
from .rope import check_heads, head_numbers, load_angles, refuse_gradient_of_angles, tile, turn_heads
from .rope import cost as rope_cost

# ---------------------------------------------------------------------------- kernels


@triton.jit
def _turn_qk(
    qkv_ptr, cos_ptr, sin_ptr, tokens, cos_token, cos_pair, sin_token, sin_pair,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, J: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """q and k of BLOCK_T tokens turned where they are; channels that pass through stay."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    cos, sin = load_angles(
        cos_ptr, sin_ptr, token, tokens, cos_token, cos_pair, sin_token, sin_pair, J, BLOCK_J
    )  # fmt: skip
    row: tl.constexpr = (H + 2 * G) * K
    turn_heads(
        qkv_ptr, qkv_ptr, row, K, 1, row, K, token, tokens, cos, sin, H + G, 2 * J, J, BLOCK_H, BLOCK_J, 1
    )  # fmt: skip


@triton.jit
def _turn_back(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, out_ptr, tokens,
    q_token, q_head, q_channel, k_token, k_head, k_channel, v_token, v_head, v_channel,
    cos_token, cos_pair, sin_token, sin_pair,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, J: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """dq and dk of BLOCK_T tokens turned back, dv copied, into one row of ``out`` each."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    cos, sin = load_angles(
        cos_ptr, sin_ptr, token, tokens, cos_token, cos_pair, sin_token, sin_pair, J, BLOCK_J
    )  # fmt: skip
    row: tl.constexpr = (H + 2 * G) * K
    turn_heads(
        dq_ptr, out_ptr, q_token, q_head, q_channel, row, K, token, tokens, cos, -sin,
        H, K, J, BLOCK_H, BLOCK_J, BLOCK_REST,
    )  # fmt: skip
    turn_heads(
        dk_ptr, out_ptr + H * K, k_token, k_head, k_channel, row, K, token, tokens, cos, -sin,
        G, K, J, BLOCK_H, BLOCK_J, BLOCK_REST,
    )  # fmt: skip
    channel = tl.arange(0, BLOCK_K)[None, None, :].to(tl.int64)
    for first in range(0, G, BLOCK_H):
        head = head_numbers(first, BLOCK_H)
        inside = (token < tokens) & (head < G) & (channel < K)
        dv = tl.load(dv_ptr + token * v_token + head * v_head + channel * v_channel, inside)
        tl.store(out_ptr + token * row + (H + G + head) * K + channel, dv, inside)


# ---------------------------------------------------------------------------- op


@prepared
def linear_rope_fwd(
    x_NC: Tensor, w: Weight, cos_NJ: Tensor, sin_NJ: Tensor, bias: Tensor | Any = ABSENT, *,
    needs: Any, heads: int, kv_heads: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Any, ...]]:  # fmt: skip
    """x (N, C), w ((H + 2G)·K, C) of any weight node, cos and sin (N, J) fp32 -> q (N, H, K), k and v (N, G, K).

    Raises ValueError for a weight whose rows are not those of ``heads`` + 2 ``kv_heads`` heads, and what linear and
    rope raise.
    """
    M = weights.shape(w)[0]
    K, rest = divmod(M, heads + 2 * kv_heads)
    if x_NC.ndim != 2 or rest:
        got = f"x has shape {tuple(x_NC.shape)} and w has {M} rows"
        raise ValueError(f"linear_rope: {got}, expected (N, C) and a multiple of {heads} + 2 * {kv_heads} heads")
    qkv, residuals = linear_fwd(x_NC, w, bias, needs=(*needs[:2], needs[4], ABSENT))
    q, k, v = qkv.view(-1, heads + 2 * kv_heads, K).split([heads, kv_heads, kv_heads], dim=1)
    check_heads("linear_rope", q, k, cos_NJ, sin_NJ)
    refuse_gradient_of_angles("linear_rope", needs[2], needs[3])
    N, J = cos_NJ.shape
    block_t, block_h, block_j = tile(heads + kv_heads, 0, J)
    launch(
        _turn_qk, (cdiv(N, block_t),), qkv, cos_NJ, sin_NJ, N, *cos_NJ.stride(), *sin_NJ.stride(),
        H=heads, G=kv_heads, K=K, J=J, BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_J=block_j,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return (q, k, v), (*residuals, cos_NJ, sin_NJ)


@prepared
def linear_rope_bwd(
    residuals: tuple[Any, ...], dy: tuple[Any, Any, Any], *, needs: Any, heads: int, kv_heads: int
) -> tuple[Any, ...]:
    """Cotangents like q, k and v, of any strides, ABSENT for zeros -> dx, dw, ABSENT, ABSENT, dbias."""
    *of_linear, cos_NJ, sin_NJ = residuals
    N, J = cos_NJ.shape
    given = next(d for d in dy if d is not ABSENT)
    K = given.shape[-1]
    each = zip(dy, (heads, kv_heads, kv_heads), strict=True)
    dq, dk, dv = (given.new_zeros(()).expand(N, n, K) if d is ABSENT else d for d, n in each)
    dqkv = torch.empty(N, (heads + 2 * kv_heads) * K, dtype=given.dtype, device=given.device)
    block_t, block_h, block_j = tile(heads, kv_heads, J)
    launch(
        _turn_back, (cdiv(N, block_t),), dq, dk, dv, cos_NJ, sin_NJ, dqkv, N,
        *dq.stride(), *dk.stride(), *dv.stride(), *cos_NJ.stride(), *sin_NJ.stride(),
        H=heads, G=kv_heads, K=K, J=J, BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_J=block_j,
        BLOCK_K=next_power_of_2(K), BLOCK_REST=next_power_of_2(max(1, K - 2 * J)), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    dx, dw, dbias, _ = linear_bwd(tuple(of_linear), dqkv, needs=(*needs[:2], needs[4], ABSENT))
    return dx, dw, ABSENT, ABSENT, dbias


linear_rope = custom_vjp(linear_rope_fwd, linear_rope_bwd)


def cost(
    rows: int, w: Weight, heads: int, kv_heads: int, J: int, *, itemsize: int = 2, bias: bool = False
) -> Cost:  # fmt: skip
    """Forward: the product, then q and k read and written once."""
    K = weights.shape(w)[0] // (heads + 2 * kv_heads)
    product = linear_cost(rows, w, itemsize=itemsize, bias=bias)
    turn = rope_cost(rows, heads, kv_heads, K, J, itemsize)
    return Cost(bytes=product.bytes + turn.bytes, flops=product.flops + turn.flops)
