"""AdamW (Loshchilov & Hutter, 2019) as a pure function over trees, one launch per step.

    m ← m + (1 - β₁)(g - m)             v ← β₂ v + (1 - β₂) g²
    p ← (1 - lr·wd) p - lr/(1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps)

Equal to ``torch.optim.AdamW`` to an ulp of each operation. m and v are fp32; so is all arithmetic on leaves.
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
from . import multi_tensor
from .clip import clip_factor, global_norm
from .schedule import Schedule, constant

DTYPES = tuple(multi_tensor.KINDS)


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
    """``step``: int64 scalar, updates done; ``m`` and ``v``: trees like the parameters, fp32."""

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
) -> Optimizer:
    """An AdamW optimizer, equal to ``torch.optim.AdamW``.

    ``lr``: a float or a schedule ``step -> rate``; ``max_norm``: first scale the gradients so that their
    global norm is at most this.

    Leaves of params and grads are fp32, bf16 or fp16, in any mixture, on one device; a parameter whose
    gradient is ABSENT is returned as it is (and its m and v too), without decay. Raises ValueError for a leaf
    of another dtype, a gradient of another shape or device, a parameter that is not contiguous or occurs
    twice, or ``clip`` together with ``max_norm``.
    """
    _check_options(betas, eps, weight_decay, max_norm)
    schedule = lr if callable(lr) else constant(lr)

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
            m=tree.map(lambda p: torch.zeros_like(p, dtype=torch.float32, requires_grad=False), params),
            v=tree.map(lambda p: torch.zeros_like(p, dtype=torch.float32, requires_grad=False), params),
        )

    @torch.no_grad()
    def update(
        grads: Any, state: AdamWState, params: Any, *, clip: Tensor | None = None, donate: bool = False
    ) -> tuple[Any, AdamWState]:
        ps, spec = tree.flatten(params)
        gs, grads_spec = tree.flatten(grads)
        if grads_spec != spec:  # there are holes
            gs = tree.broadcast(grads, params)
        ms, vs = tree.leaves(state.m), tree.leaves(state.v)
        _check_update(params, ps, gs, ms)
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
                torch.autograd.graph.increment_version([t for group in out for t in group])
        else:
            for p, g, m, v, *targets in zip(p_in, g_in, m_in, v_in, *out, strict=True):
                for target, value in zip(targets, _step(p, g, m, v, coefficients, betas, eps), strict=True):
                    target.copy_(value)
        if donate:
            return params, state
        for leaves, new in zip((ps, ms, vs), out, strict=True):
            for i, t in zip(stepped, new, strict=True):
                leaves[i] = t
        p_tree, m_tree, v_tree = (tree.unflatten(leaves, spec) for leaves in (ps, ms, vs))
        return p_tree, AdamWState(step=step, m=m_tree, v=v_tree)

    return Optimizer(init, update)


def _like(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(t) for t in tensors]


def _coefficients(
    step: Tensor, rate: Tensor, betas: tuple[float, float], weight_decay: float, clip: Tensor | None
) -> Tensor:
    """(4,) fp32: 1 - lr·wd, lr/(1 - β₁ᵗ), √(1 - β₂ᵗ), clip; float64 until the end, for 1 - 0.999ᵗ cancels."""
    rate, t = rate.double(), step.double()
    scalars = [1 - rate * weight_decay, rate / (1 - betas[0] ** t), (1 - betas[1] ** t).sqrt()]
    scalars.append(torch.ones_like(t) if clip is None else clip.double())
    return torch.stack(scalars).float()


def _step(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, coefficients: Tensor, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference: one leaf in plain PyTorch, operation by operation as in ``torch.optim.AdamW``."""
    decay, rate, root_correction, clip = coefficients.unbind()
    g = g.float() * clip
    m = m.lerp(g, 1 - betas[0])
    v = (v * betas[1]).addcmul(g, g, value=1 - betas[1])
    denominator = v.sqrt() / root_correction + eps
    return (p.float() * decay).addcdiv(m * -rate, denominator), m, v


def _check_options(betas: tuple[float, float], eps: float, weight_decay: float, max_norm: float | None) -> None:
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


def _check_update(params: Any, ps: list[Any], gs: list[Any], ms: list[Any]) -> None:
    if len(ms) != len(ps):
        raise ValueError(f"adamw: the state has {len(ms)} leaves, expected {len(ps)}, one per parameter")
    for i, (p, g, m) in enumerate(zip(ps, gs, ms, strict=True)):
        if g is ABSENT:
            continue
        same = g.shape == p.shape == m.shape and g.device == p.device == m.device == ps[0].device
        if not (same and p.is_contiguous() and g.dtype in DTYPES and p.dtype in DTYPES):
            path = tree.items(params)[i][0]
            _check_parameter(path, p)
            raise ValueError(
                f"adamw: gradient of {path!r} is {g.dtype} {tuple(g.shape)} on {g.device}, its state "
                f"{tuple(m.shape)} on {m.device}, expected {tuple(p.shape)} on {ps[0].device}, of {DTYPES}"
            )
