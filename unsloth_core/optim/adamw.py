"""AdamW (Loshchilov & Hutter, 2019) as a pure function over trees, one launch per step.

    p ← (1 - lr·wd) p - lr/(1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps), where
    m ← m + (1 - β₁)(g - m)             v ← β₂ v + (1 - β₂) g²

Equal to ``torch.optim.AdamW`` to an ulp of each operation, with m and v in fp32, as all arithmetic on leaves is.
``state_dtype`` stores them in less, at these bytes per bf16 parameter with a bf16 gradient, read and written:

    torch.float32    22       m and v fp32
    torch.bfloat16   18       m bf16. v stays fp32: (1 - β₂) v is less than half an ulp of a bf16 v, which never decayed
    "8bit"           10.06    m and v in 8 bits, in blocks of 256 (blockwise.py); leaves under 4096 elements fp32.
                              Root and quotient of the others are within two ulps instead of half of one

An element of an 8-bit leaf whose new m or v would not be finite (a NaN or infinite gradient, or an infinite square)
keeps its p, and its m and v but for their rounding, for it would take its whole block with it; in fp32 and bf16 a NaN
stays, as in PyTorch.
A bf16 or fp16 parameter is read, stepped in fp32 and rounded to nearest once, so an update smaller than half
its ulp is lost: keep trained leaves in fp32 (adapters are) where that matters.

Not differentiable: it is a step. What changes from step to step (step, rate, bias corrections, clip factor) are
four scalars on the device, computed in float64: nothing is read back, and a captured CUDA graph stays right.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..backend import resolve
from ..cost import Cost
from ..tree import ABSENT
from . import blockwise, multi_tensor
from .blockwise import Blockwise
from .clip import clip_factor, global_norm
from .multi_tensor import Leaves
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
        eight = [_in_8_bits(p, state_dtype) for p in ps]
        (m_flat, m_spec), (v_flat, v_spec) = tree.flatten(state.m), tree.flatten(state.v)
        (m, m_absmax), (v, v_absmax) = _by_parameter(m_flat, eight), _by_parameter(v_flat, eight)
        given = [i for i, g in enumerate(gs) if g is not ABSENT]
        _check_update(params, given, (ps, gs, m, v, m_absmax, v_absmax), eight, state_dtype)
        if max_norm is not None and clip is not None:
            raise ValueError("adamw: clip was given and max_norm is set, expected only one of them")

        stepped = [i for i in given if gs[i].numel()]
        if max_norm is not None and stepped:
            clip = clip_factor(global_norm([gs[i] for i in stepped]), max_norm)
        rate = schedule(state.step).double()
        step = state.step.add_(1) if donate else state.step + 1
        coefficients = _coefficients(step, rate, betas, weight_decay, clip)

        take = _taker(stepped, len(ps))
        two = take(eight)
        old = Leaves(take(ps), take(m), take(v), (take(m_absmax), take(v_absmax)) if any(two) else ())
        new = old if donate else _like(old, two)
        g_in = [g.contiguous() for g in take(gs)]
        if stepped and resolve(step) == "triton":
            multi_tensor.adamw(old, g_in, new, coefficients, betas=betas, eps=eps)
            if donate:  # autograd cannot see our kernel write; this makes a stale saved tensor an error
                torch.autograd.graph.increment_version([*old.p, *old.m, *old.v, *itertools.chain(*old.absmax)])
        else:
            _reference(old, g_in, new, two, coefficients, betas, eps)
        if donate:
            return params, state
        for all_of_them, ones in (
            (ps, new.p), (m, new.m), (v, new.v), *zip((m_absmax, v_absmax), new.absmax, strict=False)
        ):  # fmt: skip
            for i, t in zip(stepped, ones, strict=True):
                all_of_them[i] = t
        m_tree = tree.unflatten(_flat(m, m_absmax, eight), m_spec)
        v_tree = tree.unflatten(_flat(v, v_absmax, eight), v_spec)
        return tree.unflatten(ps, spec), AdamWState(step=step, m=m_tree, v=v_tree)

    return Optimizer(init, update)


def cost(parameters: int, *, itemsize: int = 4, state_dtype: torch.dtype | str = torch.float32) -> Cost:
    """A step of so many parameters, they and their gradients of ``itemsize`` bytes: p, g, m and v read, p, m and v
    written; adapters are fp32."""
    states = {torch.float32: 8.0, torch.bfloat16: 6.0, "8bit": 2 * (1 + 4 / blockwise.BLOCK)}[state_dtype]
    return Cost(bytes=round(parameters * (3 * itemsize + 2 * states)), flops=15 * parameters)


def _taker(chosen: list[int], of: int) -> Callable[[list[Any]], list[Any]]:
    """``list -> its chosen entries``; the list itself if that is all ``of`` them."""
    return (lambda ts: ts) if len(chosen) == of else (lambda ts: [ts[i] for i in chosen])


def _like(leaves: Leaves, eight: list[bool]) -> Leaves:
    """Memory for what a step writes."""
    p, m, v = ([torch.empty_like(t) for t in ts] for ts in (leaves.p, leaves.m, leaves.v))
    absmax = [
        [torch.empty_like(a) if two else t for a, t, two in zip(most, ts, eight, strict=True)]
        for most, ts in zip(leaves.absmax, (m, v), strict=False)
    ]
    return Leaves(p, m, v, tuple(absmax))


def _in_8_bits(p: Tensor, state_dtype: torch.dtype | str) -> bool:
    return state_dtype == "8bit" and p.numel() >= blockwise.LEAST


def _by_parameter(flat: list[Any], eight: list[bool]) -> tuple[list[Any], list[Any]]:
    """The leaves of m or v as two lists with an entry per parameter: codes and absmax, or a tensor twice."""
    if len(flat) != len(eight) + sum(eight):
        expected = f"{len(eight) + sum(eight)}, one per parameter and two where it is in 8 bits"
        raise ValueError(f"adamw: the state has {len(flat)} leaves, expected {expected}")
    if all(eight):
        return flat[::2], flat[1::2]
    if not any(eight):
        return flat, flat
    ends = list(itertools.accumulate(2 if two else 1 for two in eight))
    return [flat[end - 1 - two] for end, two in zip(ends, eight, strict=True)], [flat[end - 1] for end in ends]


def _flat(ts: list[Any], absmax: list[Any], eight: list[bool]) -> list[Any]:
    """The inverse."""
    if not any(eight):
        return ts
    return [leaf for t, most, two in zip(ts, absmax, eight, strict=True) for leaf in ((t, most) if two else (t,))]


def _coefficients(
    step: Tensor, rate: Tensor, betas: tuple[float, float], weight_decay: float, clip: Tensor | None
) -> Tensor:
    """(4,) fp32: 1 - lr·wd, lr/(1 - β₁ᵗ), √(1 - β₂ᵗ), clip; float64 until the end, for 1 - 0.999ᵗ cancels.

    In few operations: each is a launch of some 3 us, a hundredth of a step over 42 M parameters.
    """
    made = torch.ones(4, dtype=torch.float32, device=step.device)
    both = torch.linspace(*betas, 2, dtype=torch.float64, device=step.device)  # no copy from the host: it is captured
    corrections = 1 - both**step
    if weight_decay:
        made[0].sub_(rate, alpha=weight_decay)
    torch.div(rate, corrections[0], out=made[1])
    torch.sqrt(corrections[1], out=made[2])
    if clip is not None:
        made[3].copy_(clip)
    return made


def _reference(
    old: Leaves, grads: list[Tensor], new: Leaves, eight: list[bool],
    coefficients: Tensor, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """What :func:`multi_tensor.adamw` does, in plain PyTorch, operation by operation as in ``torch.optim.AdamW``."""
    decay, rate, root_correction, clip = coefficients.unbind()
    for i, (p, g, m, v, two) in enumerate(zip(old.p, grads, old.m, old.v, eight, strict=True)):
        if two:
            m_absmax, v_absmax = (absmax[i] for absmax in old.absmax)
            m = blockwise.decode(Blockwise(codes=m, absmax=m_absmax), signed=True)
            v = blockwise.decode(Blockwise(codes=v, absmax=v_absmax), signed=False)
        g = g.float() * clip
        m_new = m.float().lerp(g, 1 - betas[0])
        v_new = (v * betas[1]).addcmul(g, g, value=1 - betas[1])
        denominator = v_new.sqrt() / root_correction + eps
        p_new = (p.float() * decay).addcdiv(m_new * -rate, denominator)
        if two:
            finite = m_new.isfinite() & v_new.isfinite()
            new.p[i].copy_(torch.where(finite, p_new, p.float()))
            m = blockwise.encode(torch.where(finite, m_new, m), signed=True)
            v = blockwise.encode(torch.where(finite, v_new, v), signed=False)
            m_new, v_new = m.codes, v.codes
            for target, absmax in zip(new.absmax, (m.absmax, v.absmax), strict=True):
                target[i].copy_(absmax)
        else:
            new.p[i].copy_(p_new)
        new.m[i].copy_(m_new)
        new.v[i].copy_(v_new)


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
    params: Any, given: list[int], columns: tuple[list[Any], ...], eight: list[bool], state_dtype: torch.dtype | str
) -> None:
    """Compared list by list, for there are hundreds of parameters; what is wrong is looked for when something is."""
    take = _taker(given, len(eight))
    ps, gs, m, v, m_absmax, v_absmax = map(take, columns)
    two = take(eight)
    if not given:
        return
    device, yes = columns[0][0].device, [True] * len(ps)
    first = torch.bfloat16 if state_dtype == torch.bfloat16 else torch.float32
    shapes = [p.shape for p in ps]
    facts: list[tuple[list[Any], list[Any]]] = [([p.is_contiguous() for p in ps], yes)]
    facts += [([t.dtype in DTYPES for t in ts], yes) for ts in (ps, gs)]
    facts.append(([p.device == device for p in ps], yes))
    for ts in (gs, m, v):
        facts += [([t.shape for t in ts], shapes), ([t.device == device for t in ts], yes)]
    for ts, dtype in ((m, first), (v, torch.float32)):
        facts.append(([t.dtype for t in ts], [torch.uint8 if byte else dtype for byte in two]))
    if any(two):
        blocks = [(-(-p.numel() // blockwise.BLOCK),) if byte else p.shape for p, byte in zip(ps, two, strict=True)]
        for ts, dtype in ((m_absmax, first), (v_absmax, torch.float32)):
            facts += [([t.shape for t in ts], blocks), ([t.dtype for t in ts], [dtype] * len(ts))]
            facts.append(([t.device == device for t in ts], yes))
    bad = [i for got, wanted in facts if got != wanted for i in range(len(ps)) if got[i] != wanted[i]]
    if not bad:
        return
    i = min(bad)
    p, g, m, v = ps[i], gs[i], m[i], v[i]
    if two[i] and m.dtype == v.dtype == torch.uint8 and m.shape == v.shape == p.shape:
        m, v = m_absmax[i], v_absmax[i]
    path = tree.items(params)[given[i]][0]
    _check_parameter(path, p)
    raise ValueError(
        f"adamw: gradient of {path!r} is {g.dtype} {tuple(g.shape)} on {g.device}, its state {m.dtype} "
        f"{tuple(m.shape)} on {m.device}, expected {tuple(p.shape)} on {device}, a gradient of {DTYPES}, "
        f"a state as state_dtype = {state_dtype} makes it"
    )
