"""Products of tokens with their experts' weights: one launch for all experts of a mixture.

    y_p = x_n W_e^T                           a gather: p a sorted row, n its token, e its expert
    y_n = Σ_t g_nt · x_p W_e^T + add_n        a combine: p the sorted row of the pair (n, t), g the gates
Backward:
    dx_n = Σ_t dy_p W_e                       dW_e = Σ_{p of e} dy_p^T x_n                      of a gather
    dx_p = g_nt · q_p,  q_p = dy_n W_e        dW_e = Σ_{p of e} g_nt · dy_n^T x_p               of a combine
    dg_nt = <q_p, x_p>                        dadd = dy

The two are each other's transpose: a gather reads rows of tokens by address while it multiplies, and what belongs to
one token is summed over its T slots in their order afterwards, in fp32, by a kernel of its own: no atomics. The gate's
gradient is a row sum in the epilogue of dx, so that expert outputs are not kept. W_e stands for W_e + v_e a_e when
adapted (notation and backward of the adapters: :mod:`.linear`, with a leading expert dimension).

Which tile of rows belongs to which expert is computed on the device from ``offsets`` (a small launch before each
product), never read by the host: the grid is sized for the most tiles there can be. Tiles go down GROUP row tiles
before the next columns, experts in their order, so that what an expert's tiles share stays in L2.

Residuals: x, w, plan and gates, all arguments; 0 new bytes. An adapter's skinny products are computed again.
Dtypes: fp16, bf16, fp32, gates fp32. Sums are fp32; sorted rows have x's dtype, and so has y, rounded once more in a
combine than its fp32 sum over slots. Weight gradients leave the accumulator in the leaf's dtype.
Bytes: gather 2·(P·C + E·M·C + P·M); combine writes and reads P·M once more than that, and y. Unfused, gathering is a
(P, C) copy, and PyTorch's ``index_add_`` uses atomics. Transient: an NF4 or Stacked weight is decoded once per call; a
combine has its sorted rows (P, M); dW of a combine scales x in a copy.
Limits: N·T < 2^31. NF4 has no gradient. Every row is multiplied, also those of padding tokens.

Sources: hand-ordered combining and the gate's gradient as a row sum are SonicMoE's (arXiv 2512.14080); tiles of groups
in one persistent launch, Triton's tutorial 08; the sort by expert, MegaBlocks (arXiv 2211.15841).
"""

import dataclasses
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device, tree
from ..autodiff import custom_vjp
from ..cost import Cost
from ..tree import ABSENT
from ..weights import NF4, Adapted, LoRA, Stacked, Weight
from .checks import check_device, check_dtype
from .language import cast, dot
from .linear import dense

Plan = tuple[Tensor, Tensor, Tensor]

# ---------------------------------------------------------------------------- kernels


@triton.jit
def _tiles_kernel(
    offsets, tiles, experts, bound, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Expert, first row and end of the expert's rows of each row tile: three lists of ``bound`` entries. Behind them,
    how many tiles there are."""
    e = tl.arange(0, EXPERTS)
    start = tl.load(offsets + e, mask=e < experts, other=0)
    end = tl.load(offsets + e + 1, mask=e < experts, other=0)
    count = (end - start + BLOCK_M - 1) // BLOCK_M
    after = tl.cumsum(count, 0)
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.sum((after[None, :] <= t[:, None]).to(tl.int32), 1)
    own = e[None, :] == expert[:, None]
    first = start - (after - count) * BLOCK_M
    inside = t < bound
    tl.store(tiles + t, expert, mask=inside)
    tl.store(tiles + bound + t, tl.sum(tl.where(own, first[None, :], 0), 1) + t * BLOCK_M, mask=inside)
    tl.store(tiles + 2 * bound + t, tl.sum(tl.where(own, end[None, :], 0), 1), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(tiles + 3 * bound, tl.sum(count, 0))


@triton.jit
def _finish(
    acc, out, dots, other, scale, p, at_n, inside_p, cols, out_m, other_m, other_n,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Store ``scale_p · acc`` at rows p and columns at_n ...; the row sums of ``acc * other`` are added to ``dots``.
    At most MOST columns at a time: addends for all would not fit beside the sum."""
    if WIDTH > MOST:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, WIDTH // 2)), (0, 2, 1)))
        dots = _finish(
            left, out, dots, other, scale, p, at_n, inside_p, cols, out_m, other_m, other_n, BLOCK_M, WIDTH // 2, MOST
        )  # fmt: skip
        dots = _finish(
            right, out, dots, other, scale, p, at_n + WIDTH // 2, inside_p, cols, out_m, other_m, other_n,
            BLOCK_M, WIDTH // 2, MOST,
        )  # fmt: skip
    else:
        n = at_n + tl.arange(0, WIDTH)
        inside = inside_p[:, None] & (n < cols)[None, :]
        n = n.to(tl.int64)
        if other is not None:
            y = tl.load(other + p[:, None] * other_m + n[None, :] * other_n, mask=inside, other=0.0).to(tl.float32)
            dots += tl.sum(tl.where(inside, acc * y, 0.0), 1)
        if out is not None:
            if scale is not None:
                acc = acc * scale[:, None]
            tl.store(out + p[:, None] * out_m + n[None, :], cast(acc, out.dtype.element_ty), mask=inside)
    return dots


@triton.jit
def _rows_kernel(
    x, w, u, v, out, other, dots, gates, order, tiles,
    rows, cols, inner, w_rows, bound,
    x_m, x_k, w_e, w_k, w_n, v_e, v_k, v_n, out_m, other_m, other_n, gates_n, gates_t,
    GATHER: tl.constexpr, SLOTS: tl.constexpr, X_TMA: tl.constexpr, W_TMA: tl.constexpr, W_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """``out[p] = gate_p · (x[row of p] w[e] + u[p] v[e])`` over all sorted rows p, and ``dots[:, p]``, the parts of
    <that sum, other[p]> by column tile. Row of p: its token if GATHER, else p. ``w[e]`` (inner, cols) lies as W_T
    (cols, inner) or as it is; TMA: tiles of it (of x, too) come through descriptors, which zero what lies outside."""
    if X_TMA:
        x_tiles = tl.make_tensor_descriptor(x, [rows, inner], [x_m, 1], [BLOCK_M, BLOCK_K])
    if W_TMA:
        if W_T:
            w_tiles = tl.make_tensor_descriptor(w, [w_rows, inner], [w_n, 1], [BLOCK_N, BLOCK_K])
        else:
            w_tiles = tl.make_tensor_descriptor(w, [w_rows, cols], [w_k, 1], [BLOCK_K, BLOCK_N])
    block_k = tl.full((), BLOCK_K, tl.int64)
    tiles_m = tl.load(tiles + 3 * bound)
    tiles_n = tl.cdiv(cols, BLOCK_N)
    for t in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        group = t // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - group * GROUP, GROUP)
        inside_group = t % (GROUP * tiles_n)
        pm = group * GROUP + inside_group % height
        at_n = inside_group // height * BLOCK_N
        expert = tl.load(tiles + pm)
        first = tl.load(tiles + bound + pm)
        end = tl.load(tiles + 2 * bound + pm)
        p = first + tl.arange(0, BLOCK_M)
        inside_p = p < end
        n = at_n + tl.arange(0, BLOCK_N)
        if GATHER:
            row = tl.load(order + p, mask=inside_p, other=0) // SLOTS
        else:
            row = tl.minimum(p, rows - 1)
        k = tl.arange(0, BLOCK_K)
        if not X_TMA:
            x_tile = x + row.to(tl.int64)[:, None] * x_m + k.to(tl.int64)[None, :] * x_k
        if not W_TMA:
            n_safe = tl.where(n < cols, n, 0).to(tl.int64)
            w_tile = w + expert.to(tl.int64) * w_e + k.to(tl.int64)[:, None] * w_k + n_safe[None, :] * w_n
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in range(tl.cdiv(inner, BLOCK_K)):
            at_k = i * BLOCK_K
            wide_k = i * block_k
            if X_TMA:
                a = x_tiles.load([first, at_k])
            elif EVEN_K:
                a = tl.load(x_tile + wide_k * x_k)
            else:
                a = tl.load(x_tile + wide_k * x_k, mask=(at_k + k < inner)[None, :], other=0.0)
            if W_TMA:
                if W_T:
                    b = w_tiles.load([expert * cols + at_n, at_k]).T
                else:
                    b = w_tiles.load([expert * inner + at_k, at_n])
            elif EVEN_K:
                b = tl.load(w_tile + wide_k * w_k)
            else:
                b = tl.load(w_tile + wide_k * w_k, mask=(at_k + k < inner)[:, None], other=0.0)
            acc = dot(a, b, acc)
        wide_p = p.to(tl.int64)
        if u is not None:
            for step in tl.static_range(RANK // BLOCK_R):
                r = step * BLOCK_R + tl.arange(0, BLOCK_R)
                a = tl.load(u + wide_p[:, None] * RANK + r[None, :], mask=inside_p[:, None], other=0.0)
                v_tile = v + expert.to(tl.int64) * v_e + r.to(tl.int64)[:, None] * v_k + n.to(tl.int64)[None, :] * v_n
                b = tl.load(v_tile, mask=(n < cols)[None, :], other=0.0)
                acc = dot(a, b, acc)
        scale = None
        if gates is not None:
            pair = tl.load(order + p, mask=inside_p, other=0)
            gate = gates + (pair // SLOTS).to(tl.int64) * gates_n + pair % SLOTS * gates_t
            scale = tl.load(gate, mask=inside_p, other=0.0)
        sums = tl.zeros((BLOCK_M,), tl.float32)
        sums = _finish(
            acc, out, sums, other, scale, wide_p, at_n, inside_p, cols, out_m, other_m, other_n,
            BLOCK_M, BLOCK_N, 128 if other is None else 64,
        )  # fmt: skip
        if other is not None:
            tl.store(dots + (at_n // BLOCK_N).to(tl.int64) * rows + wide_p, sums, mask=inside_p)


@triton.jit(do_not_specialize=["alpha"])
def _weight_kernel(
    a, b, out, order, offsets, alpha, rows, cols, a_p, a_m, b_p, b_n,
    A_GATHER: tl.constexpr, B_GATHER: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``out[e] = alpha Σ_{p of e} a[row of p]^T b[row of p]`` (rows, cols); an expert without rows gets zeros."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N)
    t = tl.program_id(0) % (tiles_m * tiles_n)
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    group = t // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside_group = t % (GROUP * tiles_n)
    m = ((group * GROUP + inside_group % height) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (inside_group // height * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    start = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for at in range(start, end, BLOCK_K):
        p = at + tl.arange(0, BLOCK_K)
        inside = p < end
        a_row = p
        b_row = p
        if A_GATHER:
            a_row = tl.load(order + p, mask=inside, other=0) // SLOTS
        if B_GATHER:
            b_row = tl.load(order + p, mask=inside, other=0) // SLOTS
        a_tile = a + m[:, None] * a_m + a_row.to(tl.int64)[None, :] * a_p
        b_tile = b + b_row.to(tl.int64)[:, None] * b_p + n[None, :] * b_n
        x = tl.load(a_tile, mask=(m < rows)[:, None] & inside[None, :], other=0.0)
        y = tl.load(b_tile, mask=(n < cols)[None, :] & inside[:, None], other=0.0)
        acc = dot(x, y, acc)
    at_out = out + expert.to(tl.int64) * rows * cols + m[:, None] * cols + n[None, :]
    tl.store(at_out, cast(acc * alpha, out.dtype.element_ty), mask=(m < rows)[:, None] & (n < cols)[None, :])


@triton.jit
def _combine_kernel(
    z, gates, positions, add, out, tokens, cols, z_m, add_m, add_n, gates_n, gates_t,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``out[n] = Σ_t gate_nt · z[position of (n, t)] + add[n]``, slot after slot."""
    across = tl.cdiv(cols, BLOCK)
    n = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    c = (tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    is_token = n < tokens
    wide_n = n.to(tl.int64)
    inside = is_token[:, None] & (c < cols)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for t in tl.static_range(SLOTS):
        p = tl.load(positions + wide_n * SLOTS + t, mask=is_token, other=0).to(tl.int64)
        y = tl.load(z + p[:, None] * z_m + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if gates is not None:
            y = y * tl.load(gates + wide_n * gates_n + t * gates_t, mask=is_token, other=0.0)[:, None]
        total += y
    if add is not None:
        total += tl.load(add + wide_n[:, None] * add_m + c[None, :] * add_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + wide_n[:, None] * cols + c[None, :], cast(total, out.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(
    x, gates, order, out, cols, x_m, x_n, gates_n, gates_t, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``out[p] = gate of p · x[p]``."""
    p = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    y = tl.load(x + p * x_m + c * x_n, mask=c < cols, other=0.0).to(tl.float32)
    pair = tl.load(order + p)
    gate = tl.load(gates + (pair // SLOTS).to(tl.int64) * gates_n + pair % SLOTS * gates_t)
    tl.store(out + p * cols + c, cast(y * gate, out.dtype.element_ty), mask=c < cols)


@triton.jit
def _slots_kernel(dots, positions, out, pairs, parts, BLOCK: tl.constexpr):
    """``out[s] = Σ of dots[:, position of pair s]``, part after part."""
    s = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    p = tl.load(positions + s, mask=s < pairs, other=0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(dots + p, mask=s < pairs, other=0.0)
        p += pairs
    tl.store(out + s, total, mask=s < pairs)


# ---------------------------------------------------------------------------- launch tables


class Config(NamedTuple):
    """One row of the launch table: the tile, warps, pipeline stages, programs for each multiprocessor."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int = 1


# "large" is the fastest of six tiles in each product of Mixtral's and Qwen3-30B-A3B's shapes on an H100 80GB HBM3 with
# Triton 3.6.0 (perf/LOG.md), also from 64 rows for each expert; of ten "decode" is at 4 to 12 and "few" at 16 to 31,
# within 2 %. The others are chosen for occupancy and checked for spills.
CONFIGS = {
    "large": Config(128, 256, 64, 8, 3),  # Hopper; fits no other part's shared memory
    "medium": Config(128, 128, 64, 8, 3, 2),
    "portable": Config(128, 128, 32, 8, 4, 2),
    "few": Config(64, 128, 128, 4, 4),  # rows for each expert; Hopper
    "few ragged": Config(64, 128, 64, 4, 4, 2),
    "portable few": Config(64, 64, 64, 4, 3, 2),
    "decode": Config(16, 64, 128, 4, 3, 4),
    # Few columns, the adapters' products. 128 rows and 4 warps gave wrong sums of a second product on an H100.
    "narrow": Config(64, 16, 128, 4, 3, 2),
    "narrow 32": Config(64, 32, 128, 4, 3, 2),
    "narrow 64": Config(64, 64, 64, 4, 4, 2),
    "fp32": Config(64, 64, 16, 4, 2, 2),
    "fp32 few": Config(16, 64, 32, 4, 2, 4),
    "interpreted": Config(16, 32, 32, 4, 2, 2),
}
WEIGHT_CONFIGS = {
    "large": Config(128, 256, 64, 8, 3),
    "medium": Config(128, 128, 64, 8, 3),
    "portable": Config(128, 128, 32, 8, 4),
    "narrow": Config(128, 16, 64, 4, 3),  # dB: few columns
    "narrow 32": Config(128, 32, 64, 4, 3),
    "narrow 64": Config(128, 64, 64, 4, 3),
    "flat": Config(16, 128, 64, 4, 3),  # dA: few rows
    "flat 32": Config(32, 128, 64, 4, 3),
    "flat 64": Config(64, 128, 64, 4, 3),
    "fp32": Config(64, 64, 16, 4, 2),
    "interpreted": Config(32, 32, 32, 4, 2),
}
_GROUP, _GROUP_OF_LARGE = 8, 32  # row tiles before the next columns: more where an expert's weight is not kept in L2
_LARGE = 2**25  # bytes. Gathering 4096 columns for 28672: 724 TFLOP/s with 32, 689 with 8; 2048 for 1536: 655 and 672
_STEP_RANK = 64


def configuration(
    rows: int, experts: int, cols: int, inner: int, dtype: torch.dtype, where: torch.device
) -> Config:  # fmt: skip
    """The row of CONFIGS for ``rows`` sorted rows of ``experts`` experts, ``cols`` outputs of each summed over
    ``inner``."""
    if device.interpreting():
        return CONFIGS["interpreted"]
    each = rows / experts
    if dtype == torch.float32:
        return CONFIGS["fp32" if each > 16 else "fp32 few"]
    if each <= 12:
        return CONFIGS["decode"]
    if cols <= 64:
        return CONFIGS["narrow" if cols <= 16 else "narrow 32" if cols <= 32 else "narrow 64"]
    if device.capability(where)[0] != 9:
        return CONFIGS["portable few" if each <= 96 else "portable"]
    # Otherwise addresses of single elements, for which "few" and "large" have no registers.
    if each <= 48 and not (cols % 16 or inner % 128):
        return CONFIGS["few"]
    if each > 48 and cols > 128 and not (cols % 16 or inner % 64):
        return CONFIGS["large"]
    return CONFIGS["few ragged" if each <= 96 else "medium"]


def weight_configuration(rows: int, cols: int, dtype: torch.dtype, where: torch.device) -> Config:
    """The row of WEIGHT_CONFIGS for gradients of (rows, cols)."""
    if device.interpreting():
        return WEIGHT_CONFIGS["interpreted"]
    if dtype == torch.float32:
        return WEIGHT_CONFIGS["fp32"]
    narrow = min(rows, cols)
    if narrow <= 64:
        width = "" if narrow <= 16 else " 32" if narrow <= 32 else " 64"
        return WEIGHT_CONFIGS[("narrow" if cols <= rows else "flat") + width]
    if device.capability(where)[0] != 9:
        return WEIGHT_CONFIGS["portable"]
    return WEIGHT_CONFIGS["large" if cols > 128 and not (rows % 16 or cols % 16) else "medium"]


# ---------------------------------------------------------------------------- launches


def rows_product(
    x: Tensor,
    w: Tensor,
    plan: Plan,
    *,
    gather: bool,
    update: tuple[Tensor, Tensor] | Any = ABSENT,
    gates: Tensor | Any = ABSENT,
    other: Tensor | Any = ABSENT,
    out: bool = True,
    config: Config | None = None,
    tma: bool | None = None,
) -> tuple[Any, Any]:
    """``(y, dots)``: ``y_p = g_p · (x_(row of p) w_e + u_p v_e)`` and the parts of <what is in brackets, other_p>.

    ``x`` (N, inner) if ``gather``, else (P, inner); ``w`` (E, inner, cols) of any strides; ``update`` u (P, R) and v
    (E, R, cols), R a multiple of 16. ``y`` is ABSENT unless ``out``, ``dots`` (column tiles, P) unless ``other``.
    """
    order, positions, offsets = plan
    (experts, inner, cols), where = w.shape, x.device
    rows, slots = positions.numel(), positions.shape[1]
    config = config or configuration(rows, experts, cols, inner, x.dtype, where)
    bound = max(1, min(rows, rows // config.m + min(experts, rows)))
    tiles = torch.empty(3 * bound + 1, dtype=torch.int32, device=where)
    device.launch(
        _tiles_kernel, (device.cdiv(bound, 64),), offsets, tiles, experts, bound,
        BLOCK_M=config.m, EXPERTS=device.next_power_of_2(experts), BLOCK=64, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    parts = device.cdiv(cols, config.n)
    y = torch.empty(rows, cols, dtype=x.dtype, device=where) if out else None
    dots = torch.empty(parts, rows, dtype=torch.float32, device=where) if other is not ABSENT else None
    u, v = (None, None) if update is ABSENT else update
    rank = 16 if u is None else u.shape[1]
    block_r = next(step for step in (64, 32, 16) if rank % step == 0)
    tma = device.capability(where)[0] == 9 and config.m >= 64 and x.dtype != torch.float32 if tma is None else tma
    w_layout = _matrix_layout(w) if tma and (inner % config.k == 0 or w.stride(1) == 1) else None
    x_tma = tma and w_layout is not None and not gather and _addressable(x)
    programs = min(bound * parts, device.sms(where) * config.programs)
    device.launch(
        _rows_kernel,
        (programs if rows else 0,),
        *(x, w, u, v, y, None if other is ABSENT else other, dots, None if gates is ABSENT else gates, order, tiles),
        *(rows, cols, inner, experts * (cols if w_layout else inner), bound),
        *(*x.stride(), *w.stride(), *((0, 0, 0) if v is None else v.stride())),
        *(cols, *_strides(other), *_strides(gates)),
        GATHER=gather,
        SLOTS=slots if gather or gates is not ABSENT else 1,
        X_TMA=x_tma,
        W_TMA=w_layout is not None,
        W_T=bool(w_layout),
        BLOCK_M=config.m,
        BLOCK_N=config.n,
        BLOCK_K=config.k,
        EVEN_K=inner % config.k == 0,
        RANK=rank,
        BLOCK_R=block_r,
        GROUP=_GROUP_OF_LARGE if gather and inner * cols * w.element_size() > _LARGE else _GROUP,
        FLATTEN=w_layout is not None,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return (y if out else ABSENT), (ABSENT if dots is None else dots)


def _strides(t: Any) -> tuple[int, int]:
    return (0, 0) if t is ABSENT else t.stride()


def _matrix_layout(w: Tensor) -> bool | None:
    """Whether each expert's matrix is stored transposed, if TMA can address all of them as one matrix; else None."""
    for transposed, stored in ((True, w.transpose(1, 2)), (False, w)):
        if _addressable(stored[0]) and stored.stride(0) == stored.shape[1] * stored.stride(1):
            return transposed
    return None


def _addressable(t: Tensor) -> bool:
    """Whether a tensor descriptor can address this matrix."""
    stride = t.stride(0)
    aligned = stride * t.element_size() % 16 == 0 and device.aligned(t, 16)
    return t.stride(1) == 1 and stride >= t.shape[1] > 0 and t.shape[0] > 0 and aligned


def weight_product(
    a: Tensor,
    b: Tensor,
    plan: Plan,
    *,
    a_gather: bool,
    b_gather: bool,
    dtype: torch.dtype,
    alpha: float = 1.0,
    config: Config | None = None,
) -> Tensor:
    """``Σ_{p of e} alpha a_p^T b_p`` for each expert, (E, columns of a, columns of b) in ``dtype``."""
    order, positions, offsets = plan
    experts, rows, cols = offsets.shape[0] - 1, a.shape[1], b.shape[1]
    config = config or weight_configuration(rows, cols, a.dtype, a.device)
    out = torch.empty(experts, rows, cols, dtype=dtype, device=a.device)
    tiles = device.cdiv(rows, config.m) * device.cdiv(cols, config.n)
    device.launch(
        _weight_kernel,
        (experts * tiles,),
        *(a, b, out, order, offsets, float(alpha), rows, cols, *a.stride(), *b.stride()),
        A_GATHER=a_gather,
        B_GATHER=b_gather,
        SLOTS=positions.shape[1],
        BLOCK_M=config.m,
        BLOCK_N=config.n,
        BLOCK_K=config.k,
        GROUP=_GROUP,
        num_warps=config.warps,
        num_stages=config.stages,
        enable_fp_fusion=True,
    )
    return out


def _combined(z_PM: Tensor, plan: Plan, gates: Any, add: Any) -> Tensor:
    """``Σ_t gate_nt · z_p + add_n`` for each token n."""
    (N, T), cols = plan[1].shape, z_PM.shape[1]
    out = torch.empty(N, cols, dtype=z_PM.dtype, device=z_PM.device)
    BLOCK = min(1024, device.next_power_of_2(cols))
    ROWS = max(1, min(16, 1024 // BLOCK))
    device.launch(
        _combine_kernel,
        (device.cdiv(N, ROWS) * device.cdiv(cols, BLOCK),),
        *(z_PM, None if gates is ABSENT else gates, plan[1], None if add is ABSENT else add, out),
        *(N, cols, z_PM.stride(0), *_strides(add), *_strides(gates)),
        SLOTS=T,
        ROWS=ROWS,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _scaled(x_PC: Tensor, plan: Plan, gates: Any) -> Tensor:
    """``gate_p · x_p``; x itself without gates."""
    if gates is ABSENT:
        return x_PC
    out = torch.empty(x_PC.shape, dtype=x_PC.dtype, device=x_PC.device)
    BLOCK = min(1024, device.next_power_of_2(x_PC.shape[1]))
    device.launch(
        _scale_kernel, (x_PC.shape[0], device.cdiv(x_PC.shape[1], BLOCK)), x_PC, gates, plan[0], out, x_PC.shape[1],
        *x_PC.stride(), *gates.stride(), SLOTS=gates.shape[1], BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


# ---------------------------------------------------------------------------- op


def grouped_linear_fwd(
    x: Tensor,
    w: Weight,
    plan: Plan,
    gates_NT: Tensor | Any = ABSENT,
    add_NM: Tensor | Any = ABSENT,
    *,
    needs: Any,
) -> tuple[Tensor, tuple[Any, ...]]:
    """Without ``gates``: ``x_NC -> y_PM``, gathering tokens. With them: ``x_PC -> y_NM``, combining (and ``+ add_NM``).

    ``plan`` is ``(order_P, positions_NT, offsets)`` of :mod:`.route`; P = N·T rows sorted by expert. ``w`` is a Tensor
    (E, M, C); an NF4 of shape (E, M, C); a Stacked whose parts below each other are the (E·M, C) matrix, expert after
    expert (how quantised checkpoints come: one part for each expert's matrix); or an Adapted over one of these, whose
    ``parts`` are ``LoRA(a (E, r, C), b (E, M_i, r), scale) | ABSENT`` and ``rows`` the M_i, with sum M: gate and up are
    two parts. An expert without an adapter has zeros in b. Differentiable in x, w (not NF4), gates and add.

        h = glu(grouped_linear(x, gate_up, plan))
        y = grouped_linear(h, down, plan, gates, add=residual)

    Raises ValueError for shapes, dtypes or devices that do not fit, NotImplementedError for the gradient of an NF4
    weight and for adapters with dropout.
    """
    _check(x, w, plan, gates_NT, add_NM)
    gather = gates_NT is ABSENT
    base, parts, _ = _open(w)
    update = ABSENT
    if any(part is not ABSENT for part in parts):
        a_ERC, v_EMR = _adapters(w, x, plan)
        u_PR, _ = rows_product(x, a_ERC.transpose(1, 2), plan, gather=gather)
        update = (u_PR, v_EMR.transpose(1, 2))
    w_EMC = _dense(base, plan, x.dtype, again=needs[0] is True or needs[3] is True)
    y, _ = rows_product(x, w_EMC.transpose(1, 2), plan, gather=gather, update=update)
    if not gather:
        y = _combined(y, plan, gates_NT, add_NM)
    needs_x = tree.any(needs[1]) or needs[3] is True
    return y, (x if needs_x else ABSENT, w, plan, gates_NT)


def grouped_linear_bwd(residuals: tuple[Any, ...], dy: Tensor, *, needs: Any) -> tuple[Any, Any, Any, Any, Any]:
    """``dx``, a gradient node shaped like ``w``, nothing for the plan, ``dgates`` and ``dadd`` (which is ``dy``)."""
    x, w, plan, gates = residuals
    needs_x, needs_w, _, needs_gates, needs_add = needs
    gather = gates is ABSENT
    base, parts, _ = _open(w)
    needs_base, needs_parts, _ = _open(needs_w)

    update = t_PR = a_ERC = ABSENT
    through = needs_x is True or needs_gates is True
    some = any(need is not ABSENT and need.a for need in needs_parts)
    if any(part is not ABSENT for part in parts) and (through or tree.any(needs_parts)):
        a_ERC, v_EMR = _adapters(w, dy, plan)
        if through or some:
            t_PR, _ = rows_product(dy, v_EMR, plan, gather=not gather)
            update = (t_PR, a_ERC)

    dx = dgates = dw = d_base = ABSENT
    if through:
        other = x if needs_gates is True else ABSENT
        w_EMC = _dense(base, plan, dy.dtype, again=False)
        dx, dots = rows_product(
            dy, w_EMC, plan, gather=not gather, update=update, gates=gates, other=other, out=needs_x is True
        )
        if gather:
            dx = _combined(dx, plan, ABSENT, ABSENT)
        if needs_gates is True:
            dgates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
            grid = (device.cdiv(gates.numel(), 256),)
            device.launch(
                _slots_kernel, grid, dots, plan[1], dgates, gates.numel(), dots.shape[0],
                BLOCK=256, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip

    if tree.any(needs_base):
        d_base = _weight_gradient(base, needs_base, x, dy, plan, gates)
    if isinstance(w, Adapted) and tree.any(needs_w):
        d_parts = _adapter_gradients(w, needs_parts, x, dy, a_ERC, t_PR, plan, gates)
        dw = dataclasses.replace(w, base=d_base, parts=tuple(d_parts), key=ABSENT)
    elif tree.any(needs_w):
        dw = d_base
    return dx, dw, ABSENT, dgates, dy if needs_add is True else ABSENT


grouped_linear = custom_vjp(grouped_linear_fwd, grouped_linear_bwd)


def cost(rows: int, w: Weight, *, itemsize: int = 2) -> Cost:
    """Forward of ``rows`` sorted rows by a weight (E, M, C): x, w and y once; 2·P·M·C FLOPs, and 2·P·r·(C + M_i) for
    each adapter. Of a combine add y_NM, and for its backward what the gates' gradient reads."""
    base, parts, part_rows = _open(w)
    *_, m, c = base.shape
    flops = 2 * rows * m * c
    for part, m_i in zip(parts, part_rows, strict=True):
        flops += 0 if part is ABSENT else 2 * rows * part.a.shape[1] * (c + m_i)
    return Cost(bytes=rows * (m + c) * itemsize + tree.nbytes(w), flops=flops)


# ---------------------------------------------------------------------------- weights


def _open(w: Any) -> tuple[Any, tuple[Any, ...], tuple[int, ...]]:
    """(base, adapters, rows of each) of a weight, or of a tree of the same shape."""
    return (w.base, w.parts, w.rows) if isinstance(w, Adapted) else (w, (), ())


def _dense(w: Any, plan: Plan, dtype: torch.dtype, *, again: bool) -> Tensor:
    """(E, M, C), dense; ``again`` as in :func:`.linear.dense`."""
    matrix = dense(w, dtype, again=again)
    return matrix.view(plan[2].shape[0] - 1, -1, matrix.shape[-1]) if isinstance(w, Stacked) else matrix


def _placed(w: Adapted) -> list[tuple[int, LoRA, slice, slice]]:
    """(index, adapter, its rows of the output, its place among the ranks) of every adapter that is there."""
    found, row, rank = [], 0, 0
    for i, (part, rows) in enumerate(zip(w.parts, w.rows, strict=True)):
        if part is not ABSENT:
            r = part.a.shape[1]
            found.append((i, part, slice(row, row + rows), slice(rank, rank + r)))
            rank += r
        row += rows
    return found


def _adapters(w: Any, like: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """``a_ERC`` and block-diagonal ``v_EMR`` (scale included) in like's dtype; R is padded with zeros to a multiple of
    16."""
    placed = _placed(w)
    experts, c = plan[2].shape[0] - 1, placed[0][1].a.shape[2]
    ranks = device.cdiv(placed[-1][3].stop, 16) * 16
    a_ERC, v_EMR = like.new_zeros(experts, ranks, c), like.new_zeros(experts, sum(w.rows), ranks)
    for _, part, rows, at in placed:
        a_ERC[:, at].copy_(part.a)
        torch.mul(part.b, part.scale, out=v_EMR[:, rows, at])
    return a_ERC, v_EMR


def _adapter_gradients(
    w: Any, needs: tuple[Any, ...], x: Any, dy: Tensor, a_ERC: Any, t_PR: Any, plan: Plan, gates: Any
) -> list[Any]:  # fmt: skip
    """In a combine the gate of a row is on the narrow operand of each product: t for dA, u for dB."""
    gradients: list[Any] = [ABSENT for _ in needs]
    gather = gates is ABSENT
    da_ERC = u_PR = ABSENT
    if any(need is not ABSENT and need.a for need in needs):
        t = _scaled(t_PR, plan, gates)
        da_ERC = weight_product(t, x, plan, a_gather=False, b_gather=gather, dtype=torch.float32)
    if any(need is not ABSENT and need.b for need in needs):
        u_PR, _ = rows_product(x, a_ERC.transpose(1, 2), plan, gather=gather, gates=gates)
    for i, part, rows, at in _placed(w):
        da = db = ABSENT
        if needs[i].a:
            da = da_ERC[:, at].to(part.a.dtype)
        if needs[i].b:
            db = weight_product(
                dy[:, rows], u_PR[:, at], plan,
                a_gather=not gather, b_gather=False, dtype=part.b.dtype, alpha=part.scale,
            )  # fmt: skip
        if needs[i].a or needs[i].b:
            gradients[i] = LoRA(a=da, b=db, scale=part.scale)
    return gradients


def _weight_gradient(w: Any, need: Any, x: Tensor, dy: Tensor, plan: Plan, gates: Any) -> Any:
    parts, needs = (w.parts, need.parts) if isinstance(w, Stacked) else ((w,), (need,))
    if any(isinstance(part, NF4) and tree.any(wanted) for part, wanted in zip(parts, needs, strict=True)):
        raise NotImplementedError("grouped_linear: an NF4 weight has no gradient; freeze it")
    gather = gates is ABSENT
    x = _scaled(x, plan, gates)
    d_EMC = weight_product(dy, x, plan, a_gather=not gather, b_gather=gather, dtype=dy.dtype)
    if isinstance(w, Tensor):
        return d_EMC
    each = d_EMC.view(-1, d_EMC.shape[2]).split([part.shape[0] for part in parts])
    return Stacked(parts=tuple(d if wanted is True else ABSENT for d, wanted in zip(each, needs, strict=True)))


# ---------------------------------------------------------------------------- checks


def _check(x: Tensor, w: Weight, plan: Plan, gates: Any, add: Any) -> None:
    """Raises ValueError for the first thing that does not fit."""
    check_dtype("grouped_linear", "x", x)
    order, positions, offsets = plan
    if positions.ndim != 2 or positions.shape[1] == 0 or order.shape != (positions.numel(),) or offsets.ndim != 1:
        shapes = ", ".join(str(tuple(t.shape)) for t in plan)
        raise ValueError(f"grouped_linear: plan has shapes {shapes}, expected (N·T,), (N, T) with T > 0 and (E+1,)")
    for name, t in zip(("order", "positions", "offsets"), plan, strict=True):
        if t.dtype != torch.int32 or not t.is_contiguous():
            raise ValueError(
                f"grouped_linear: plan's {name} is {t.dtype} with strides {t.stride()}, expected contiguous int32"
            )
        check_device("grouped_linear", f"plan's {name}", t, "x", x.device)
    (N, T), E = positions.shape, offsets.shape[0] - 1
    m, c = _check_weight(w, E, x)
    tokens, letters = (N, "N") if gates is ABSENT else (N * T, "P = N·T")
    if tuple(x.shape) != (tokens, c):
        raise ValueError(f"grouped_linear: x has shape {tuple(x.shape)}, expected ({letters}, C) = ({tokens}, {c})")
    if gates is not ABSENT:
        _agree("gates", gates, (N, T), x, torch.float32)
    if add is not ABSENT:
        if gates is ABSENT:
            raise ValueError("grouped_linear: add without gates, expected both (a combine) or neither (a gather)")
        _agree("add", add, (N, m), x, x.dtype)


def _check_weight(w: Weight, E: int, x: Tensor) -> tuple[int, int]:
    """(M, C) of each expert."""
    base, parts, rows = _open(w)
    if isinstance(base, Stacked):
        c = base.parts[0].shape[-1]
        total = sum(part.shape[0] for part in base.parts)
        for part in base.parts:
            if len(part.shape) != 2 or part.shape[1] != c:
                raise ValueError(f"grouped_linear: w has a part of shape {tuple(part.shape)}, expected (M, {c})")
        if total % E:
            raise ValueError(f"grouped_linear: w has {total} rows, expected E·M with E = {E} experts")
        m = total // E
    else:
        if len(base.shape) != 3 or base.shape[0] != E:
            raise ValueError(f"grouped_linear: w has shape {tuple(base.shape)}, expected (E, M, C) with E = {E}")
        m, c = base.shape[1:]
    for part in base.parts if isinstance(base, Stacked) else (base,):
        if isinstance(part, Tensor):
            _agree("w", part, part.shape, x, x.dtype)
        else:
            check_device("grouped_linear", "w", part.codes, "x", x.device)
    if isinstance(w, Adapted) and isinstance(w.key, Tensor):
        raise NotImplementedError("grouped_linear: w.key is given, but adapters of experts have no dropout")
    if isinstance(w, Adapted) and (len(parts) != len(rows) or sum(rows) != m):
        raise ValueError(
            f"grouped_linear: w.rows is {rows} for {len(parts)} parts, expected {len(parts)} numbers with sum {m}"
        )
    for i, (part, m_i) in enumerate(zip(parts, rows, strict=True)):
        if part is not ABSENT:
            r = part.a.shape[1] if part.a.ndim == 3 else "r"
            _agree(f"w.parts[{i}].a", part.a, (E, r, c), x, part.a.dtype)
            _agree(f"w.parts[{i}].b", part.b, (E, m_i, r), x, part.b.dtype)
    return m, c


def _agree(name: str, t: Tensor, shape: tuple[Any, ...], x: Tensor, dtype: torch.dtype) -> None:
    if tuple(t.shape) != tuple(shape):
        raise ValueError(f"grouped_linear: {name} has shape {tuple(t.shape)}, expected {tuple(shape)}")
    if t.dtype != dtype:
        raise ValueError(f"grouped_linear: {name} has dtype {t.dtype}, expected {dtype}")
    check_device("grouped_linear", name, t, "x", x.device)
