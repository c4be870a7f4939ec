"""Rotary position embedding of queries and keys, in one launch.

Formula, for channel pairs (a, b) = (x_i, x_{i+J}), i < J, of every head; c and s are the token's cos_i and sin_i:

    a' = a·c - b·s        b' = b·c + a·s        channels from 2J to K pass through (partial rotation)
Backward, the transpose, which is the same kernel with -s (c and s may carry an attention factor):
    da = da'·c + db'·s    db = db'·c - da'·s

Residuals: cos and sin (arguments); neither q nor k. No gradient flows to cos and sin.
Dtypes: q and k fp16, bf16 or fp32, each with outputs and gradients of its own dtype; cos and sin fp32. The
rotation is fp32 and rounds once; model code in 16 bits rounds q·cos, rotated q·sin and their sum.
Bytes moved per element of 2 bytes: 4, forward and backward alike. cos and sin, 8·J bytes per token, are read once
for all heads of q and k; a program per head, as usual elsewhere, reads them H + G times.
Limits: any strides (fast with a last stride of 1 and other strides divisible by 16, as in a slice of a qkv
product). Outputs are new and contiguous.

How: a program takes a few tokens with all their heads. cos and sin stay in registers while it walks over the
heads in tiles of (tokens, heads, pairs), first q's, then k's. Pair partners lie J channels apart, so both halves
load as whole vectors.

Source of the idea: RoPE, Su et al. (arXiv 2104.09864), in the half-split form of GPT-NeoX.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import cdiv, launch, next_power_of_2
from ..prepared import prepared
from ..tree import ABSENT
from .checks import check_device, check_dtype
from .language import cast

_PAIRS = 2048  # channel pairs in one tile: 16 a thread with 4 warps, two 16-byte loads of either half


# ---------------------------------------------------------------------------------------------------- kernels


@triton.jit
def turned(a, b, cos, sin):
    """The pair (a, b) turned by its angle; by the opposite one for -sin."""
    return a * cos - b * sin, b * cos + a * sin


@triton.jit
def load_angles(
    cos_ptr, sin_ptr, token, tokens, cos_token, cos_pair, sin_token, sin_pair, J: tl.constexpr, BLOCK_J: tl.constexpr
):  # fmt: skip
    """cos and sin (T, 1, BLOCK_J) of tokens (T, 1, 1) int64; 0 where there is none."""
    pair = tl.arange(0, BLOCK_J)[None, None, :].to(tl.int64)
    inside = (token < tokens) & (pair < J)
    cos = tl.load(cos_ptr + token * cos_token + pair * cos_pair, inside, other=0.0)
    return cos, tl.load(sin_ptr + token * sin_token + pair * sin_pair, inside, other=0.0)


@triton.jit
def head_numbers(first, BLOCK_H: tl.constexpr):
    """The BLOCK_H heads from ``first`` on, (1, BLOCK_H, 1) int64."""
    return (first + tl.arange(0, BLOCK_H))[None, :, None].to(tl.int64)


@triton.jit
def turn_heads(
    x_ptr, y_ptr, x_token, x_head, x_channel, y_token, y_head, token, tokens, cos, sin,
    HEADS: tl.constexpr, K: tl.constexpr, J: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of a few tokens of q or of k; ``token`` (T, 1, 1) int64, ``cos``, ``sin`` (T, 1, BLOCK_J). y may
    be x; channels from K on are left alone."""
    pair = tl.arange(0, BLOCK_J)[None, None, :].to(tl.int64)
    for first in range(0, HEADS, BLOCK_H):
        head = head_numbers(first, BLOCK_H)
        x_row = x_ptr + token * x_token + head * x_head
        y_row = y_ptr + token * y_token + head * y_head
        row_inside = (token < tokens) & (head < HEADS)
        inside = row_inside & (pair < J)
        a = tl.load(x_row + pair * x_channel, inside, other=0.0).to(tl.float32)
        b = tl.load(x_row + (pair + J) * x_channel, inside, other=0.0).to(tl.float32)
        a, b = turned(a, b, cos, sin)
        tl.store(y_row + pair, cast(a, y_ptr.dtype.element_ty), inside)
        tl.store(y_row + (pair + J), cast(b, y_ptr.dtype.element_ty), inside)
        if 2 * J < K:
            channel = 2 * J + tl.arange(0, BLOCK_REST)[None, None, :].to(tl.int64)
            rest_inside = row_inside & (channel < K)
            tl.store(y_row + channel, tl.load(x_row + channel * x_channel, rest_inside), rest_inside)


@triton.jit
def _turn(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    tokens, q_token, q_head, q_channel, k_token, k_head, k_channel, cos_token, cos_pair, sin_token, sin_pair,
    H: tl.constexpr, G: tl.constexpr, K: tl.constexpr, J: tl.constexpr, BACKWARD: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens with all their heads. A tensor that is not wanted is None."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None, None]
    cos, sin = load_angles(
        cos_ptr, sin_ptr, token, tokens, cos_token, cos_pair, sin_token, sin_pair, J, BLOCK_J
    )  # fmt: skip
    if BACKWARD:
        sin = -sin
    if q_ptr is not None:
        turn_heads(
            q_ptr, q_out_ptr, q_token, q_head, q_channel, H * K, K, token, tokens, cos, sin,
            H, K, J, BLOCK_H, BLOCK_J, BLOCK_REST,
        )  # fmt: skip
    if k_ptr is not None:
        turn_heads(
            k_ptr, k_out_ptr, k_token, k_head, k_channel, G * K, K, token, tokens, cos, sin,
            G, K, J, BLOCK_H, BLOCK_J, BLOCK_REST,
        )  # fmt: skip


@functools.cache
def tile(H: int, G: int, J: int, pairs: int = _PAIRS) -> tuple[int, int, int]:
    """(tokens, heads, pairs) of a tile: the most heads that leave a quarter of the lanes idle or less."""
    block_j = next_power_of_2(J)
    block_h = next(b for b in (8, 4, 2, 1) if 3 * b * (cdiv(H, b) + cdiv(G, b)) <= 4 * (H + G))
    block_h = min(block_h, max(1, pairs // block_j))
    return max(1, pairs // (block_h * block_j)), block_h, block_j


def _launch(q: Any, k: Any, cos_NJ: Tensor, sin_NJ: Tensor, *, backward: bool) -> tuple[Any, Any]:
    """Both tensors turned, in one launch; ABSENT stays ABSENT."""
    given = [x for x in (q, k) if x is not ABSENT]
    if not given:
        return ABSENT, ABSENT
    N, _, K = given[0].shape
    J = cos_NJ.shape[1]
    outs = [x if x is ABSENT else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k)]
    strides = [(0, 0, 0) if x is ABSENT else x.stride() for x in (q, k)]
    H, G = (0 if x is ABSENT else x.shape[1] for x in (q, k))
    block_t, block_h, block_j = tile(H, G, J)
    tensors = (None if x is ABSENT else x for x in (q, k))
    launch(
        _turn, (cdiv(N, block_t),),
        *tensors, cos_NJ, sin_NJ, *(None if x is ABSENT else x for x in outs),
        N, *strides[0], *strides[1], *cos_NJ.stride(), *sin_NJ.stride(),
        H=H, G=G, K=K, J=J, BACKWARD=backward, BLOCK_T=block_t, BLOCK_H=block_h, BLOCK_J=block_j,
        BLOCK_REST=next_power_of_2(max(1, K - 2 * J)), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return outs[0], outs[1]


# ------------------------------------------------------------------------------------------------------ rules


def check_heads(op: str, q_NHK: Tensor, k_NGK: Tensor, cos_NJ: Tensor, sin_NJ: Tensor) -> None:
    """Raises ValueError unless shapes, dtypes and devices are those of :func:`rope`."""
    for name, x, dims in (("q", q_NHK, "(N, H, K)"), ("k", k_NGK, "(N, G, K)")):
        if x.ndim != 3:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {dims}")
        check_dtype(op, name, x)
    N, _, K = q_NHK.shape
    if k_NGK.shape[0] != N or k_NGK.shape[2] != K:
        raise ValueError(f"{op}: k has shape {tuple(k_NGK.shape)}, expected (N, G, K) = ({N}, G, {K})")
    for name, x in (("cos", cos_NJ), ("sin", sin_NJ)):
        if x.ndim != 2 or x.shape[0] != N or not 0 < 2 * x.shape[1] <= K:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected (N, J) = ({N}, 1 to {K // 2})")
        if x.dtype != torch.float32:
            raise ValueError(f"{op}: {name} has dtype {x.dtype}, expected float32")
    if sin_NJ.shape != cos_NJ.shape:
        raise ValueError(f"{op}: sin has shape {tuple(sin_NJ.shape)}, expected cos's {tuple(cos_NJ.shape)}")
    for name, x in (("k", k_NGK), ("cos", cos_NJ), ("sin", sin_NJ)):
        check_device(op, name, x, "q", q_NHK.device)


def refuse_gradient_of_angles(op: str, cos: bool, sin: bool) -> None:
    """Raises NotImplementedError if cos or sin want a gradient."""
    if cos or sin:
        raise NotImplementedError(f"{op}: no gradient for cos and sin; detach them")


# --------------------------------------------------------------------------------------------------------- op


@prepared
def rope_fwd(
    q_NHK: Tensor, k_NGK: Tensor, cos_NJ: Tensor, sin_NJ: Tensor, *, needs: Any
) -> tuple[tuple[Tensor, Tensor], tuple[Any, Any]]:
    """q (N, H, K), k (N, G, K), cos and sin (N, J) fp32, 2J <= K -> turned q and k, new and contiguous.

    Raises ValueError for other shapes, dtypes or devices, NotImplementedError if cos or sin want a gradient.
    """
    check_heads("rope", q_NHK, k_NGK, cos_NJ, sin_NJ)
    refuse_gradient_of_angles("rope", needs[2], needs[3])
    outs = _launch(q_NHK, k_NGK, cos_NJ, sin_NJ, backward=False)
    return outs, (cos_NJ, sin_NJ) if needs[0] or needs[1] else (ABSENT, ABSENT)


@prepared
def rope_bwd(residuals: tuple[Any, Any], dy: tuple[Any, Any], *, needs: Any) -> tuple[Any, Any, Any, Any]:
    """Cotangents like q and k, of any strides, or ABSENT -> (dq, dk, ABSENT, ABSENT)."""
    dq, dk = (d if need else ABSENT for d, need in zip(dy, needs))
    return *_launch(dq, dk, *residuals, backward=True), ABSENT, ABSENT


rope = custom_vjp(rope_fwd, rope_bwd)


def cost(N: int, H: int, G: int, K: int, J: int, itemsize: int) -> Cost:
    """Forward, or backward: q and k read and written, cos and sin read; six operations per turned pair."""
    return Cost(bytes=2 * N * (H + G) * K * itemsize + 8 * N * J, flops=6 * N * (H + G) * J)
