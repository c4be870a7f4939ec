"""The router of a mixture of experts: the best experts of every token, their weights, and the tokens sorted by expert.

    p = softmax(z)        gate_t = p_(e_t) / s        s = Σ_t p_(e_t) if renormalised, else 1
Backward:
    dp = dprob_sums + [(dgate_t - r) / s at e_t]      r = Σ_t dgate_t·gate_t if renormalised, else 0
    dz = p ∘ (dp - Σ p ∘ dp)

z (N, E) logits, e_1 ... e_T the experts of the T = ``top_k`` largest logits of a token, largest first; of equal logits
the lower expert, and a NaN is larger than any number. A pair (token n, slot t) has the number n·T + t; sorted by
expert, and by token within one, the P = N·T pairs are the rows of every product of :mod:`.grouped_linear`.

Two launches. The first gives each program a run of tokens: softmax, top-k, and how many of its tokens each expert got.
In the second, a program adds up what the programs before it counted, which is where its tokens go among each expert's:
a counting sort, stable, without atomics, and nothing is read by the host. The sums over tokens for the load-balancing
loss come from the same two launches, in a fixed order.

Residuals: logits and valid, arguments; gates and experts, outputs. Probabilities are computed again.
Dtypes: logits fp16, bf16 or fp32; gates and prob_sums fp32 (softmax and sums are), dlogits like logits.
Bytes moved: logits once, and 16 bytes a pair. Unfused, softmax, top-k, renormalising, a sort, its inverse and a
histogram are a dozen launches.
Limits: N·T < 2^31; at most 1024 experts. A cotangent may have any strides.

Sources: softmax before top-k with renormalisation, Mixtral (arXiv 2401.04088); the balancing loss, Switch Transformer
(arXiv 2101.03961).
"""

import math
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

_LOG2E = tl.constexpr(1 / math.log(2))
_PROGRAMS = 256  # each of the second launch reads the counts of all
_TILE = 2048  # logits at a time


@triton.jit
def _softmax(z, is_expert):
    """Of each row over the experts there are; NaN if one of them is."""
    largest = tl.max(tl.where(is_expert, z, float("-inf")), 1)
    powers = tl.where(is_expert, tl.exp2((z - largest[:, None]) * _LOG2E), 0.0)
    return powers / tl.sum(powers, 1)[:, None]


@triton.jit
def _choose_kernel(
    logits, valid, gates, experts, histogram, counts, sums, N, E, chunk, z_n, z_e, valid_n,
    SLOTS: tl.constexpr, RENORMALISE: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Gates and experts of ``chunk`` tokens; how often each expert was chosen by them, by the valid ones, and the sum
    of its probability over the valid ones."""
    e = tl.arange(0, BLOCK_E)[None, :]
    slot = tl.arange(0, BLOCK_T)[None, :]
    is_expert = e < E
    start = tl.program_id(0) * chunk
    end = tl.minimum(start + chunk, N)
    chosen_by_all = tl.zeros((BLOCK_E,), tl.int32)
    chosen_by_valid = tl.zeros((BLOCK_E,), tl.int32)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for at in range(start, end, ROWS):
        n = at + tl.arange(0, ROWS)
        inside = n < end
        wide_n = n.to(tl.int64)[:, None]
        z = tl.load(logits + wide_n * z_n + e * z_e, mask=inside[:, None] & is_expert, other=0.0).to(tl.float32)
        p = _softmax(z, is_expert)
        key = tl.where(z == z, z, float("inf"))
        chosen = (e < 0) & inside[:, None]
        gate_tile = tl.zeros((ROWS, BLOCK_T), tl.float32)
        expert_tile = tl.zeros((ROWS, BLOCK_T), tl.int32)
        norm = tl.zeros((ROWS,), tl.float32)
        for t in tl.static_range(SLOTS):
            open_ = is_expert & ~chosen
            best = tl.max(tl.where(open_, key, float("-inf")), 1)
            expert = tl.min(tl.where(open_ & (key == best[:, None]), e, BLOCK_E), 1)
            own = e == expert[:, None]
            gate = tl.sum(tl.where(own, p, 0.0), 1)
            chosen = chosen | own
            norm += gate
            gate_tile = tl.where(slot == t, gate[:, None], gate_tile)
            expert_tile = tl.where(slot == t, expert[:, None], expert_tile)
        if RENORMALISE:
            gate_tile = gate_tile / norm[:, None]
        pair = wide_n * SLOTS + slot
        stored = inside[:, None] & (slot < SLOTS)
        tl.store(gates + pair, gate_tile, mask=stored)
        tl.store(experts + pair, expert_tile, mask=stored)
        chosen = chosen & inside[:, None]
        chosen_by_all += tl.sum(chosen.to(tl.int32), 0)
        counted = inside
        if valid is not None:
            counted = inside & (tl.load(valid + n.to(tl.int64) * valid_n, mask=inside, other=0) != 0)
            chosen_by_valid += tl.sum((chosen & counted[:, None]).to(tl.int32), 0)
        total += tl.sum(tl.where(counted[:, None], p, 0.0), 0)
    at_out = tl.program_id(0) * E + tl.arange(0, BLOCK_E)
    stored_e = tl.arange(0, BLOCK_E) < E
    tl.store(histogram + at_out, chosen_by_all, mask=stored_e)
    if valid is not None:
        tl.store(counts + at_out, chosen_by_valid, mask=stored_e)
    tl.store(sums + at_out, total, mask=stored_e)


@triton.jit
def _sort_kernel(
    experts, histogram, counts, sums, order, positions, offsets, prob_sums, total_counts, N, E, chunk, programs,
    SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """The sorted row of each pair of ``chunk`` tokens. Program 0 also adds up what the programs of the first launch
    found."""
    e = tl.arange(0, BLOCK_E)
    is_expert = e < E
    own = tl.program_id(0)
    total = tl.zeros((BLOCK_E,), tl.int32)
    before = tl.zeros((BLOCK_E,), tl.int32)
    for at in range(0, programs, BLOCK_B):
        b = at + tl.arange(0, BLOCK_B)
        found = tl.load(
            histogram + b[:, None] * E + e[None, :], mask=(b < programs)[:, None] & is_expert[None, :], other=0
        )
        total += tl.sum(found, 0)
        before += tl.sum(tl.where((b < own)[:, None], found, 0), 0)
    ends = tl.cumsum(total, 0)
    next_row = ends - total + before
    if own == 0:
        tl.store(offsets + e, ends - total, mask=is_expert)
        tl.store(offsets + E, tl.sum(total, 0))
        if counts is not None:
            total = tl.zeros((BLOCK_E,), tl.int32)
        total_sums = tl.zeros((BLOCK_E,), tl.float32)
        for at in range(0, programs, BLOCK_B):
            b = at + tl.arange(0, BLOCK_B)
            inside = (b < programs)[:, None] & is_expert[None, :]
            total_sums += tl.sum(tl.load(sums + b[:, None] * E + e[None, :], mask=inside, other=0.0), 0)
            if counts is not None:
                total += tl.sum(tl.load(counts + b[:, None] * E + e[None, :], mask=inside, other=0), 0)
        tl.store(total_counts + e, total, mask=is_expert)
        tl.store(prob_sums + e, total_sums, mask=is_expert)
    start = own * chunk
    end = tl.minimum(start + chunk, N)
    for at in range(start, end, ROWS):
        n = at + tl.arange(0, ROWS)
        inside = n < end
        wide_n = n.to(tl.int64)
        chosen = tl.zeros((ROWS, BLOCK_E), tl.int32)
        for t in tl.static_range(SLOTS):
            expert = tl.load(experts + wide_n * SLOTS + t, mask=inside, other=BLOCK_E)
            chosen += (expert[:, None] == e[None, :]).to(tl.int32)
        row = next_row[None, :] + tl.cumsum(chosen, 0) - chosen
        for t in tl.static_range(SLOTS):
            expert = tl.load(experts + wide_n * SLOTS + t, mask=inside, other=BLOCK_E)
            p = tl.sum(tl.where(expert[:, None] == e[None, :], row, 0), 1)
            tl.store(positions + wide_n * SLOTS + t, p, mask=inside)
            tl.store(order + p, n * SLOTS + t, mask=inside)
        next_row += tl.sum(chosen, 0)


@triton.jit
def _backward_kernel(
    logits, valid, gates, experts, dgates, dprob_sums, dlogits, N, E, z_n, z_e, valid_n, dg_n, dg_t, ds_e,
    SLOTS: tl.constexpr, RENORMALISE: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    e = tl.arange(0, BLOCK_E)[None, :]
    is_expert = e < E
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = n < N
    stored = inside[:, None] & is_expert
    z = tl.load(logits + n[:, None] * z_n + e * z_e, mask=stored, other=0.0).to(tl.float32)
    p = _softmax(z, is_expert)
    dp = tl.zeros((ROWS, BLOCK_E), tl.float32)
    if dprob_sums is not None:
        ds = tl.load(dprob_sums + e * ds_e, mask=is_expert, other=0.0).to(tl.float32)
        counted = inside
        if valid is not None:
            counted = inside & (tl.load(valid + n * valid_n, mask=inside, other=0) != 0)
        dp += tl.where(counted[:, None], ds, 0.0)
    if dgates is not None:
        norm = tl.full((ROWS,), 1.0, tl.float32)
        r = tl.zeros((ROWS,), tl.float32)
        if RENORMALISE:
            norm = tl.zeros((ROWS,), tl.float32)
            for t in tl.static_range(SLOTS):
                expert = tl.load(experts + n * SLOTS + t, mask=inside, other=0)
                norm += tl.sum(tl.where(e == expert[:, None], p, 0.0), 1)
                dg = tl.load(dgates + n * dg_n + t * dg_t, mask=inside, other=0.0)
                r += dg * tl.load(gates + n * SLOTS + t, mask=inside, other=0.0)
        for t in tl.static_range(SLOTS):
            expert = tl.load(experts + n * SLOTS + t, mask=inside, other=0)
            dg = tl.load(dgates + n * dg_n + t * dg_t, mask=inside, other=0.0)
            dp += tl.where(e == expert[:, None], ((dg - r) / norm)[:, None], 0.0)
    dz = p * (dp - tl.sum(p * dp, 1)[:, None])
    tl.store(dlogits + n[:, None] * E + e, cast(dz, dlogits.dtype.element_ty), mask=stored)


def route_fwd(
    logits_NE: Tensor, valid_N: Tensor | Any = ABSENT, *, needs: Any, top_k: int, renormalise: bool = True
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """``(gates_NT, experts_NT, order_P, positions_NT, offsets, prob_sums_E, counts_E)``.

    ``gates_NT`` fp32 and ``experts_NT`` int32: weight and expert of each slot. The plan of the grouped products, int32:
    ``order_P``, the pair n·T + t in each sorted row; ``positions_NT``, the sorted row of each pair; ``offsets`` (E+1,),
    the rows of expert e are ``offsets[e] .. offsets[e+1]``. ``prob_sums_E`` fp32 and ``counts_E`` int32: sums over
    tokens (those of ``valid_N``, bool, if given) of the probabilities and of the choices, for the load-balancing loss
    E · Σ_e counts_e/n · prob_sums_e/n. Gates and prob_sums are differentiable in the logits; every token is routed.

        gates, experts, *plan, prob_sums, counts = route(logits, top_k=2)

    Raises ValueError for other shapes, dtypes, devices or a top_k outside 1 .. E, NotImplementedError beyond limits.
    """
    if logits_NE.ndim != 2 or logits_NE.shape[1] == 0:
        raise ValueError(f"route: logits has shape {tuple(logits_NE.shape)}, expected (N, E) with E > 0")
    check_dtype("route", "logits", logits_NE)
    (N, E), where = logits_NE.shape, logits_NE.device
    if not 1 <= top_k <= E:
        raise ValueError(f"route: top_k is {top_k}, expected 1 to E = {E}")
    if valid_N is not ABSENT:
        if valid_N.shape != (N,):
            raise ValueError(f"route: valid has shape {tuple(valid_N.shape)}, expected (N,) = ({N},)")
        if valid_N.dtype != torch.bool:
            raise ValueError(f"route: valid has dtype {valid_N.dtype}, expected torch.bool")
        check_device("route", "valid", valid_N, "logits", where)
    if E > 1024 or N * top_k >= 2**31:
        raise NotImplementedError(f"route: {N} tokens in {top_k} of {E} experts, expected N·T < 2^31 and E <= 1024")

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=where)

    gates, experts = empty(N, top_k, dtype=torch.float32), empty(N, top_k)
    order, positions, offsets = empty(N * top_k), empty(N, top_k), empty(E + 1)
    prob_sums, counts = empty(E, dtype=torch.float32), empty(E)
    BLOCK_E, ROWS = _tile(E)
    chunk = max(1, cdiv(cdiv(N, _PROGRAMS), ROWS)) * ROWS
    programs = cdiv(N, chunk)
    histogram, sums = empty(programs, E), empty(programs, E, dtype=torch.float32)
    valid, valid_counts, valid_stride = None, None, 0
    if valid_N is not ABSENT:
        valid, valid_counts, valid_stride = valid_N, empty(programs, E), valid_N.stride(0)
    launch(
        _choose_kernel,
        (programs,),
        *(logits_NE, valid, gates, experts, histogram, valid_counts, sums, N, E, chunk),
        *(*logits_NE.stride(), valid_stride),
        SLOTS=top_k,
        RENORMALISE=renormalise,
        ROWS=ROWS,
        BLOCK_E=BLOCK_E,
        BLOCK_T=next_power_of_2(top_k),
        num_warps=4,
        enable_fp_fusion=True,
    )
    launch(
        _sort_kernel,
        (max(1, programs),),
        *(experts, histogram, valid_counts, sums, order, positions, offsets, prob_sums, counts, N, E, chunk, programs),
        SLOTS=top_k,
        ROWS=ROWS,
        BLOCK_E=BLOCK_E,
        BLOCK_B=max(1, 2 * _TILE // BLOCK_E),
        num_warps=4,
        enable_fp_fusion=True,
    )
    out = (gates, experts, order, positions, offsets, prob_sums, counts)
    return out, (logits_NE, valid_N, gates, experts) if needs[0] else ABSENT


def route_bwd(
    residuals: tuple[Any, ...], cotangents: tuple[Any, ...], *, needs: Any, top_k: int, renormalise: bool = True
) -> tuple[Any, Any]:
    """Gradients of gates and prob_sums, of any strides -> dlogits, contiguous."""
    dgates, *_, dprob_sums, _ = cotangents
    if not needs[0] or (dgates is ABSENT and dprob_sums is ABSENT):
        return ABSENT, ABSENT
    logits, valid, gates, experts = residuals
    N, E = logits.shape
    dlogits = torch.empty(N, E, dtype=logits.dtype, device=logits.device)
    BLOCK_E, ROWS = _tile(E)
    launch(
        _backward_kernel,
        (cdiv(N, ROWS),),
        *(logits, None if valid is ABSENT else valid, gates, experts),
        *(None if dgates is ABSENT else dgates, None if dprob_sums is ABSENT else dprob_sums, dlogits, N, E),
        *(*logits.stride(), 0 if valid is ABSENT else valid.stride(0)),
        *((0, 0) if dgates is ABSENT else dgates.stride()),
        0 if dprob_sums is ABSENT else dprob_sums.stride(0),
        SLOTS=top_k,
        RENORMALISE=renormalise,
        ROWS=ROWS,
        BLOCK_E=BLOCK_E,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dlogits, ABSENT


route = custom_vjp(route_fwd, route_bwd)


def cost(N: int, E: int, itemsize: int, *, top_k: int = 2, backward: bool = False) -> Cost:
    """Forward: logits read; gates, experts, order and positions written. Backward: logits, gates, experts and dgates
    read, dlogits written."""
    small = (12 if backward else 16) * N * top_k
    return Cost(bytes=N * E * itemsize * (2 if backward else 1) + small, flops=(8 if backward else 6 + top_k) * N * E)


def _tile(E: int) -> tuple[int, int]:
    """Columns, padded, and rows of logits that a program holds at a time."""
    block = next_power_of_2(E)
    return block, max(1, min(64, _TILE // block))
