"""AdamW (Loshchilov & Hutter, 2019) as a pure function over trees, one launch per step.

    m ← m + (1 - β₁)(g - m)             v ← β₂ v + (1 - β₂) g²
    p ← (1 - lr·wd) p - lr/(1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps)

Equal to ``torch.optim.AdamW`` to an ulp of each operation, with m and v in fp32, as all arithmetic on leaves is.
``state_dtype`` stores them in less, at these bytes per bf16 parameter with a bf16 gradient, read and written:

    torch.float32    22       m and v fp32
    torch.bfloat16   18       m bf16. v stays fp32: (1 - β₂) v is less than half an ulp of a bf16 v, which never decayed
    "8bit"           10.06    m and v in 8 bits, in blocks of 256 (blockwise.py); leaves under 4096 elements fp32

An element of an 8-bit leaf whose new m or v would not be finite (a NaN or infinite gradient, or an infinite square)
keeps its p, and its m and v but for their rounding, for it would take its whole block with it; in fp32 and bf16 a NaN
stays, as in PyTorch.
A bf16 or fp16 parameter is read, stepped in fp32 and rounded to nearest once, so an update smaller than half
its ulp is lost: keep trained leaves in fp32 (adapters are) where that matters. What changes from step to step
(step, rate, bias corrections, clip factor) are four scalars on the device, computed in float64: nothing is
read back, and a captured CUDA graph stays right.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..backend import resolve
from ..tree import ABSENT
from . import blockwise, multi_tensor
from .blockwise import Blockwise
from .clip import clip_factor, global_norm
from .schedule import Schedule, constant

DTYPES = tuple(multi_tensor.KINDS)
STATE_DTYPES = (torch.float32, torch.bfloat16, "8bit")


@dataclass(frozen=True)
class Optimizer:
    """Two functions: ``init(params) -> state`` and ``update(grads, state, params, ...) -> (params, state)``.

    ``update(grads, state, params, *, clip=None, donate=False)`` returns new parameters (not differences, as
    in optax). With ``donate=True`` it writes into the buffers of ``params`` and ``state`` and returns those;
    otherwise its arguments are untouched. ``clip``: a scalar tensor that multiplies every gradient.
    """

    init: Callable[..., Any]
    update: Callable[..., tuple[Any, Any]]


@tree.pytree
class AdamWState:
    """``step``: int64 scalar, updates done; ``m`` and ``v``: trees like the parameters, of fp32 tensors, or as
    ``state_dtype`` says, where an 8-bit leaf is a ``Blockwise`` of two tensors."""

    step: Tensor
    m: Any
    v: Any


def adamw(
    lr: float | Schedule = 2e-4,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    max_norm: float | None = None,
    state_dtype: torch.dtype | str = torch.float32,
) -> Optimizer:
    """An AdamW optimizer, equal to ``torch.optim.AdamW``.

    ``lr``: a float or a schedule ``step -> rate``; ``max_norm``: first scale the gradients so that their
    global norm is at most this; ``state_dtype``: torch.float32, torch.bfloat16 or "8bit", how m and v are stored.

    Leaves of params and grads are fp32, bf16 or fp16, in any mixture, on one device; a parameter whose
    gradient is ABSENT is returned as it is (and its m and v too), without decay. Raises ValueError for a leaf
    of another dtype, a gradient of another shape or device, a parameter that is not contiguous or occurs
    twice, or ``clip`` together with ``max_norm``.
    """
    _check_options(betas, eps, weight_decay, max_norm, state_dtype)
    schedule = lr if callable(lr) else constant(lr)

    def zeros(p: Tensor, *, signed: bool) -> Tensor | Blockwise:
        if _in_8_bits(p, state_dtype):
            return blockwise.zeros(p, signed=signed)
        dtype = torch.bfloat16 if signed and state_dtype == torch.bfloat16 else torch.float32
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)

    def init(params: Any) -> AdamWState:
        seen: dict[tuple[int, int], str] = {}
        for path, p in tree.items(params):
            _check_parameter(path, p)
            twin = seen.setdefault((p.untyped_storage()._cdata, p.storage_offset()), path)
            if twin != path and p.numel():
                raise ValueError(f"adamw: {twin!r} and {path!r} share memory, expected separate parameters")
        leaves = tree.leaves(params)
        device = leaves[0].device if leaves else None
        return AdamWState(
            step=torch.zeros((), dtype=torch.int64, device=device),
            m=tree.map(lambda p: zeros(p, signed=True), params),
            v=tree.map(lambda p: zeros(p, signed=False), params),
        )

    @torch.no_grad()
    def update(
        grads: Any, state: AdamWState, params: Any, *, clip: Tensor | None = None, donate: bool = False
    ) -> tuple[Any, AdamWState]:
        ps, spec = tree.flatten(params)
        gs, grads_spec = tree.flatten(grads)
        if grads_spec != spec:  # there are holes
            gs = tree.broadcast(grads, params)
        ms, vs = _states(state.m, ps, state_dtype), _states(state.v, ps, state_dtype)
        _check_update(params, ps, gs, ms, vs, state_dtype)
        if max_norm is not None and clip is not None:
            raise ValueError("adamw: clip was given and max_norm is set, expected only one of them")

        stepped = [i for i, g in enumerate(gs) if g is not ABSENT and g.numel()]
        if max_norm is not None and stepped:
            clip = clip_factor(global_norm([gs[i] for i in stepped]), max_norm)
        step = state.step.add_(1) if donate else state.step + 1
        coefficients = _coefficients(step, schedule(step - 1), betas, weight_decay, clip)

        p_in, m_in, v_in = ([leaves[i] for i in stepped] for leaves in (ps, ms, vs))
        g_in = [gs[i].contiguous() for i in stepped]
        out = (p_in, m_in, v_in)
        if not donate:
            out = _like(p_in), _like(m_in), _like(v_in)
        if stepped and resolve(step) == "triton":
            multi_tensor.adamw(p_in, g_in, m_in, v_in, out, coefficients, betas=betas, eps=eps)
            if donate:  # autograd cannot see our kernel write; this makes a stale saved tensor an error
                torch.autograd.graph.increment_version(tree.leaves(out))
        else:
            for p, g, m, v, *targets in zip(p_in, g_in, m_in, v_in, *out, strict=True):
                new = _step(p, g, m, v, coefficients, betas, eps)
                for target, value in zip(tree.leaves(targets), tree.leaves(new), strict=True):
                    target.copy_(value)
        if donate:
            return params, state
        for leaves, new in zip((ps, ms, vs), out, strict=True):
            for i, t in zip(stepped, new, strict=True):
                leaves[i] = t
        p_tree = tree.unflatten(ps, spec)
        m_tree, v_tree = (tree.unflatten(ts, spec) for ts in (ms, vs))
        return p_tree, AdamWState(step=step, m=m_tree, v=v_tree)

    return Optimizer(init, update)


def _like(leaves: list[Any]) -> list[Any]:
    return tree.map(torch.empty_like, leaves)


def _in_8_bits(p: Tensor, state_dtype: torch.dtype | str) -> bool:
    return state_dtype == "8bit" and p.numel() >= blockwise.LEAST


def _states(states: Any, ps: list[Tensor], state_dtype: torch.dtype | str) -> list[Any]:
    """m or v of every parameter: a tensor or a Blockwise."""
    leaves = tree.leaves(states)
    eight = [_in_8_bits(p, state_dtype) for p in ps]
    if len(leaves) != len(ps) + sum(eight):
        expected = f"{len(ps) + sum(eight)}, one per parameter and two where it is in 8 bits"
        raise ValueError(f"adamw: the state has {len(leaves)} leaves, expected {expected}")
    each = iter(leaves)
    return [Blockwise(codes=next(each), absmax=next(each)) if two else next(each) for two in eight]


def _coefficients(
    step: Tensor, rate: Tensor, betas: tuple[float, float], weight_decay: float, clip: Tensor | None
) -> Tensor:
    """(4,) fp32: 1 - lr·wd, lr/(1 - β₁ᵗ), √(1 - β₂ᵗ), clip; float64 until the end, for 1 - 0.999ᵗ cancels."""
    rate, t = rate.double(), step.double()
    scalars = [1 - rate * weight_decay, rate / (1 - betas[0] ** t), (1 - betas[1] ** t).sqrt()]
    scalars.append(torch.ones_like(t) if clip is None else clip.double())
    return torch.stack(scalars).float()


def _step(
    p: Tensor, g: Tensor, m: Any, v: Any, coefficients: Tensor, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Any, Any]:
    """The reference: one leaf in plain PyTorch, operation by operation as in ``torch.optim.AdamW``."""
    decay, rate, root_correction, clip = coefficients.unbind()
    eight = isinstance(m, Blockwise)
    m_old = blockwise.decode(m, signed=True) if eight else m.float()
    v_old = blockwise.decode(v, signed=False) if eight else v
    g = g.float() * clip
    m_new = m_old.lerp(g, 1 - betas[0])
    v_new = (v_old * betas[1]).addcmul(g, g, value=1 - betas[1])
    denominator = v_new.sqrt() / root_correction + eps
    p_new = (p.float() * decay).addcdiv(m_new * -rate, denominator)
    if not eight:
        return p_new, m_new, v_new
    finite = m_new.isfinite() & v_new.isfinite()
    m_new, v_new = torch.where(finite, m_new, m_old), torch.where(finite, v_new, v_old)
    p_new = torch.where(finite, p_new, p.float())
    return p_new, blockwise.encode(m_new, signed=True), blockwise.encode(v_new, signed=False)


def _check_options(
    betas: tuple[float, float], eps: float, weight_decay: float, max_norm: float | None, state_dtype: Any
) -> None:
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"adamw: state_dtype = {state_dtype!r}, expected one of {STATE_DTYPES}")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"adamw: betas = {betas}, expected two numbers in [0, 1)")
    if not 0 <= eps < math.inf or not 0 <= weight_decay < math.inf:
        raise ValueError(f"adamw: eps = {eps}, weight_decay = {weight_decay}, expected finite numbers >= 0")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"adamw: max_norm = {max_norm}, expected > 0")


def _check_parameter(path: str, p: Any) -> None:
    if not isinstance(p, Tensor) or p.dtype not in DTYPES:
        got = p.dtype if isinstance(p, Tensor) else type(p).__name__
        raise ValueError(f"adamw: parameter {path!r} is {got}, expected one of {DTYPES}")
    if not p.is_contiguous():
        raise ValueError(f"adamw: parameter {path!r} has strides {p.stride()}, expected a contiguous tensor")


def _check_update(
    params: Any, ps: list[Any], gs: list[Any], ms: list[Any], vs: list[Any], state_dtype: torch.dtype | str
) -> None:
    first = torch.bfloat16 if state_dtype == torch.bfloat16 else torch.float32
    for i, (p, g, m, v) in enumerate(zip(ps, gs, ms, vs, strict=True)):
        if g is ABSENT:
            continue
        m_dtype, v_dtype = first, torch.float32
        if isinstance(m, Blockwise):
            m_dtype = v_dtype = torch.uint8
            blocks = -(-p.numel() // blockwise.BLOCK)
            fits = all(s.absmax.shape == (blocks,) and s.absmax.dtype == torch.float32 for s in (m, v))
            m, v = (m.codes, v.codes) if fits else (m.absmax, v.absmax)
        same = g.shape == p.shape == m.shape == v.shape and g.device == p.device == m.device == v.device == ps[0].device
        types = g.dtype in DTYPES and p.dtype in DTYPES and m.dtype == m_dtype and v.dtype == v_dtype
        if not (same and types and p.is_contiguous()):
            path = tree.items(params)[i][0]
            _check_parameter(path, p)
            raise ValueError(
                f"adamw: gradient of {path!r} is {g.dtype} {tuple(g.shape)} on {g.device}, its state {m.dtype} "
                f"{tuple(m.shape)} on {m.device}, expected {tuple(p.shape)} on {ps[0].device}, a gradient of {DTYPES}, "
                f"a state as state_dtype = {state_dtype} makes it"
            )
