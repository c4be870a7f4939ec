"""Differentiation of pure functions: an op is a pair, a layer is a schedule of ops, a policy never changes the numbers.

``custom_vjp(fwd, bwd)`` makes a hand-derived pair differentiable, ``value_and_grad`` and ``vjp`` are JAX's, and
``remat`` runs a layer so that only what a policy names is kept between forward and backward. This is the only file
that uses ``torch.autograd.Function``."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef

from . import backend, offload, tracing, tree
from .device import beyond_arguments, is_fake
from .segments import Segments
from .tree import ABSENT, Tree
from .weights import Head, Weight

SAVE = "save"
RECOMPUTE = "recompute"
OFFLOAD = "offload"
INPUT = "layer input"  # what a policy and a report call the arguments of a layer that carry a gradient
Policy = Mapping[str, str]

_tape: ContextVar["_Record | _Replay | None"] = ContextVar("unsloth_core_tape", default=None)
_report: ContextVar["list[Fate] | None"] = ContextVar("unsloth_core_report", default=None)
_memo: ContextVar["_Memo | None"] = ContextVar("unsloth_core_memo", default=None)
_listener: ContextVar["Callable[[str, str, str, Any, dict[str, Any], Tree], None] | None"] = ContextVar(
    "unsloth_core_listener", default=None
)


# ---------------------------------------------------------------------------------------------------------------- ops


def custom_vjp(fwd: Callable[..., Any], bwd: Callable[..., Any]) -> Callable[..., Any]:
    """Make the pair ``f_fwd``, ``f_bwd`` a differentiable op ``f`` (the contract: see CONTRIBUTING).

    ``fwd(*args, needs, **statics) -> (out, residuals)`` and ``bwd(residuals, cotangent, *, needs, **statics)`` ->
    one gradient per argument, ABSENT where there is none. Arguments are trees of tensors, statics are keyword-only.
    ``needs`` mirrors the arguments with booleans. The op accepts ``name=``, by which policies and reports know the
    call, and carries its pair as ``f.fwd`` and ``f.bwd`` for schedules that call them directly. With the reference
    backend the plain PyTorch function of the same name runs under PyTorch's own autograd. ``torch.compile`` keeps a
    call as two operators, forward and backward (:mod:`unsloth_core.tracing`); autocast does not reach inside."""
    op_name = fwd.__name__.removesuffix("_fwd")
    own_file = fwd.__module__ == f"unsloth_core.ops.{op_name}"
    signature = inspect.signature(fwd)
    parameters = [p for p in signature.parameters.values() if p.name != "needs"]
    arguments = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    statics = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    positions = {p.name: i for i, p in enumerate(arguments)}
    defaults = [p.default for p in arguments]
    kinds = [(i, kind) for i, p in enumerate(arguments) if (kind := _kind(p))]
    optional = [i for i, default in enumerate(defaults) if default is not inspect.Parameter.empty]
    rest = {i: tuple(defaults[i:]) for i in (*optional, len(defaults))}  # what goes behind i given arguments
    checked: dict[tuple[type, ...], tree.Spec] = {}  # structures of arguments that fit, by their types

    def bind(args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
        """Arguments in order, however they were given; what is left in ``keywords`` are the statics."""
        if keywords.keys() <= statics and (missing := rest.get(len(args))) is not None:
            return args + missing
        values = [*args, *defaults[len(args) :]]
        for key in [k for k in keywords if k in positions]:
            if positions[key] < len(args):
                raise TypeError(f"{op_name}: got two values for argument {key!r}")
            values[positions[key]] = keywords.pop(key)
        if len(values) > len(arguments) or any(value is inspect.Parameter.empty for value in values):
            wanted = ", ".join(positions)
            raise TypeError(f"{op_name}: got {len(args)} positional arguments, expected ({wanted})")
        if unknown := keywords.keys() - statics:
            raise TypeError(f"{op_name}: unknown option {sorted(unknown)[0]!r}, expected one of {sorted(statics)}")
        return tuple(values)

    def op(*args: Any, name: str = op_name, **keywords: Any) -> Any:
        args = bind(args, keywords)
        if torch.compiler.is_dynamo_compiling():
            tracing.prepare()
            return tracing.call(identity, args, name, repr(keywords))
        return run(args, name, keywords)

    def run(args: tuple[Any, ...], name: str, keywords: dict[str, Any]) -> Any:
        types = tuple([arg.__class__ for arg in args])
        spec = checked.get(types)
        if spec is None:
            leaves, spec = fit(args, types)
        else:
            leaves = args if spec.num_leaves == len(args) else [arg for arg in args if arg is not ABSENT]
        if _under_autocast(leaves):
            with torch.autocast(leaves[0].device.type, enabled=False):
                return run(args, name, keywords)
        tape = _tape.get()
        reference = backend.reference(op_name) if backend.resolve(leaves[0]) == "reference" else None
        if reference is not None and (tape is None or tape.runs(name)):
            # Through views: each argument collects its gradient inside the op first, the order of a derived pair.
            inputs = [leaf.view_as(leaf) if leaf.requires_grad else leaf for leaf in leaves]
            out = reference(*tree.unflatten(inputs, spec), **keywords)
            if (fates := _report.get()) is not None:
                fates.append(Fate(name, "autograd", sum(t.nbytes for t in tree.leaves(out))))
            return out
        pair = (fwd, bwd) if reference is None else _derived(reference)
        call = _Call(name, pair, spec, keywords, tape)
        if torch.is_grad_enabled() and _wants_gradient(leaves):
            return _apply(call, leaves)
        return call.forward(leaves, tape.needs(name, leaves) if tape else (False,) * len(leaves))[0]

    def fit(args: tuple[Any, ...], types: tuple[type, ...]) -> tuple[Sequence[Tensor], tree.Spec]:
        """Leaves and structure of arguments that are what the op takes. Raises TypeError for others."""
        leaves, spec = tree.flatten(args)
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(_misfit(op_name, arguments, args))
        for i, kind in kinds:
            if not isinstance(args[i], kind):
                raise TypeError(_misfit(op_name, arguments, args))
        if not leaves:
            raise TypeError(f"{op_name}: no argument has a tensor")
        if spec.flat:  # then their types say all there is
            checked[types] = spec
        return leaves, spec

    identity = tracing.register(run, fwd)

    def op_fwd(*args: Any, needs: Tree, **keywords: Any) -> tuple[Any, Tree]:
        leaves = tree.leaves(args)
        pair = _derived(backend.reference(op_name)) if backend.resolve(leaves[0]) == "reference" else (fwd, bwd)
        return pair[0](*args, needs=needs, **keywords)

    def op_bwd(residuals: Tree, cotangent: Any, *, needs: Tree, **keywords: Any) -> tuple[Any, ...]:
        pair = _derived(backend.reference(op_name)) if isinstance(residuals, _Rerun) else (fwd, bwd)
        return pair[1](residuals, cotangent, needs=needs, **keywords)

    shown = [*parameters, inspect.Parameter("name", inspect.Parameter.KEYWORD_ONLY, default=op_name)]
    op.__signature__ = signature.replace(parameters=shown, return_annotation=inspect.Signature.empty)  # type: ignore
    op.__name__ = op.__qualname__ = op_name
    op.__module__, op.__doc__ = fwd.__module__, fwd.__doc__
    if own_file:  # the head of the file has formula, backward, bytes, limits: help(op) shows it below the contract
        head = inspect.unwrap(fwd).__globals__["__doc__"] or ""
        op.__doc__ = f"{inspect.cleandoc(fwd.__doc__ or '')}\n\n{inspect.cleandoc(head)}"
    op.fwd, op.bwd = op_fwd, op_bwd  # type: ignore[attr-defined]
    return op


def _under_autocast(leaves: Sequence[Tensor]) -> bool:
    if leaves[0].is_cuda:
        return torch.is_autocast_enabled("cuda")
    return leaves[0].is_cpu and torch.is_autocast_enabled("cpu")


def _wants_gradient(leaves: Sequence[Tensor]) -> bool:
    for leaf in leaves:  # no generator: this is asked at every call of every op
        if leaf.requires_grad:
            return True
    return False


def _kind(p: inspect.Parameter) -> tuple[type, ...]:
    """What an argument may be; empty if anything."""
    if p.default is ABSENT:
        return (Tensor, type(ABSENT))
    return get_args(p.annotation) or (p.annotation,) if p.annotation in (Tensor, Segments, Weight, Head) else ()


def _misfit(op_name: str, parameters: Sequence[inspect.Parameter], args: Sequence[Any]) -> str:
    """What is wrong with the first argument that is of another kind than its op takes."""
    for p, arg in zip(parameters, args, strict=True):
        kinds = _kind(p)
        if kinds and not isinstance(arg, kinds):
            expected = " or ".join("ABSENT" if kind is type(ABSENT) else kind.__name__ for kind in kinds)
            return f"{op_name}: {p.name} is {'ABSENT' if arg is ABSENT else type(arg).__name__}, expected {expected}"
        for path, leaf in tree.items(arg):
            if not isinstance(leaf, Tensor):
                return f"{op_name}: {p.name}{path and '.' + path} is {type(leaf).__name__}, expected Tensor or ABSENT"
    raise AssertionError("called for arguments that fit")


class _Call:
    """One call of an op: everything that forward resolved and backward must find unchanged, in whatever thread it
    runs."""

    __slots__ = ("name", "pair", "spec", "statics", "tape")

    def __init__(self, name: str, pair: Any, spec: tree.Spec, statics: dict[str, Any], tape: Any) -> None:
        self.name, self.pair, self.spec, self.statics, self.tape = name, pair, spec, statics, tape

    @property
    def op(self) -> str:
        return self.pair[0].__name__.removesuffix("_fwd")

    def forward(self, leaves: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Any, Tree]:
        if self.tape is None:
            return self.run(leaves, needs)
        return self.tape(self.name, leaves, lambda: self.run(leaves, needs))

    def run(self, leaves: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Any, Tree]:
        fwd, spec, statics = self.pair[0], self.spec, self.statics
        args, tree_of_needs = tree.unflatten(leaves, spec), tree.unflatten(needs, spec)
        if (listener := _listener.get()) is not None:
            listener("forward", self.op, self.name, args, statics, tree_of_needs)
        if _any_fake(leaves):
            return tracing.opaque(lambda ts: fwd(*tree.unflatten(ts, spec), needs=tree_of_needs, **statics), leaves)
        return fwd(*args, needs=tree_of_needs, **statics)

    def backward(
        self, residuals: Tree, cotangent: Any, present: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the leaves; ``present`` are the tensors of the cotangent."""
        bwd, statics, tree_of_needs = self.pair[1], self.statics, tree.unflatten(needs, self.spec)
        if (listener := _listener.get()) is not None:
            listener("backward", self.op, self.name, (residuals, cotangent), statics, tree_of_needs)
        if _any_fake(present):
            given, spec = tree.flatten((residuals, cotangent))
            gradients = tracing.opaque(lambda ts: bwd(*tree.unflatten(ts, spec), needs=tree_of_needs, **statics), given)
        else:
            gradients = bwd(residuals, cotangent, needs=tree_of_needs, **statics)
        if self.spec.flat:
            flat = [g for g, need in zip(gradients, tree_of_needs, strict=True) if need is not ABSENT]
        else:
            flat = [g for one, need in zip(gradients, tree_of_needs, strict=True) for g in tree.broadcast(one, need)]
        return [g if need and g is not ABSENT else None for g, need in zip(flat, needs, strict=True)]


def _any_fake(leaves: Sequence[Tensor]) -> bool:
    for leaf in leaves:  # no generator: this is asked at every call of every op
        if leaf.__class__ is not Tensor and is_fake(leaf):
            return True
    return False


class _Op(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *leaves: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        out, residuals = call.forward(leaves, ctx.needs_input_grad[1:])
        kept, ctx.residual_spec = tree.flatten(residuals)
        ctx.save_for_backward(*kept)
        ctx.call, ctx.several = call, isinstance(out, tuple)
        if (fates := _report.get()) is not None:
            outputs = [o for o in (out if ctx.several else (out,)) if not any(o is leaf for leaf in leaves)]
            fresh = [t for t in kept if not any(t is leaf for leaf in leaves)]
            extra = sum(t.nbytes for t in fresh if not any(t is o for o in outputs))
            fates.append(Fate(call.name, SAVE, sum(t.nbytes for t in outputs) + extra))
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        # Only ``create_graph=True`` has gradients enabled here; nodes that raise are made for nobody else.
        return (_once if torch.is_grad_enabled() else _Op._backward)(ctx, *cotangents)

    @staticmethod
    def _backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        needs, present = ctx.needs_input_grad[1:], [ct for ct in cotangents if ct is not None]
        if not present:
            return (None, *[None] * len(needs))
        if _under_autocast(present):  # backward was called inside it
            with torch.autocast(present[0].device.type, enabled=False):
                return _Op._backward(ctx, *cotangents)
        cotangent = tuple([ABSENT if ct is None else ct for ct in cotangents]) if ctx.several else present[0]
        residuals = tree.unflatten(ctx.saved_tensors, ctx.residual_spec)
        return (None, *ctx.call.backward(residuals, cotangent, present, needs))


_once = once_differentiable(_Op._backward)
_apply_op = super(torch.autograd.Function, _Op).apply  # type: ignore[misc]


def _apply(call: _Call, leaves: Sequence[Tensor]) -> Any:
    """``_Op.apply``, but for what PyTorch does there in Python for the sake of functorch."""
    if torch._C._are_functorch_transforms_active():
        return _Op.apply(call, *leaves)  # which refuses, in its own words
    return _apply_op(call, *leaves)


@tree.pytree
class _Rerun:
    """Residuals of a derived pair: the arguments, from which backward runs the reference again."""

    args: tuple[Any, ...]


def _derived(reference: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A pair made of a plain PyTorch function, for schedules that need one with the reference backend."""

    def fwd(*args: Any, needs: Tree, **statics: Any) -> tuple[Any, _Rerun]:
        return reference(*args, **statics), _Rerun(args=args)

    def bwd(residuals: _Rerun, cotangent: Any, *, needs: Tree, **statics: Any) -> tuple[Any, ...]:
        leaves, spec = tree.flatten(residuals.args)
        wanted = [
            need is True for one, arg in zip(needs, residuals.args, strict=True) for need in tree.broadcast(one, arg)
        ]
        inputs = [leaf.detach().requires_grad_() if want else leaf for leaf, want in zip(leaves, wanted, strict=True)]
        with torch.enable_grad():
            out = reference(*tree.unflatten(inputs, spec), **statics)
        found = _gradients(out, [x for x, want in zip(inputs, wanted, strict=True) if want], cotangent)
        return tree.unflatten([next(found) if want else ABSENT for want in wanted], spec)

    return fwd, bwd


def _gradients(out: Any, inputs: list[Tensor], cotangent: Any) -> Iterator[Any]:
    """``torch.autograd.grad`` for outputs of which some got no cotangent; ABSENT for an input that plays no part."""
    outputs, given = (out, cotangent) if isinstance(out, tuple) else ((out,), (cotangent,))
    pairs = [(o, ct) for o, ct in zip(outputs, given, strict=True) if ct is not ABSENT and o.requires_grad]
    if not pairs or not inputs:
        return iter([ABSENT] * len(inputs))
    found = torch.autograd.grad([o for o, _ in pairs], inputs, [ct for _, ct in pairs], allow_unused=True)
    return iter([ABSENT if g is None else g for g in found])


# --------------------------------------------------------------------------------------------------- transformations


def value_and_grad(f: Callable[..., Any], has_aux: bool = False) -> Callable[..., Any]:
    """``g(params, *args) -> (value, gradients)``; with ``has_aux``, f returns (value, aux) and g ((value, aux),
    gradients).

    ``f`` returns a 0-d tensor. Gradients form a tree like ``params``, in each leaf's dtype; leaves that are not
    floating point are ABSENT, leaves that f does not use are zero. Pure: nothing is accumulated into ``.grad``."""

    def g(params: Tree, *args: Any, **keywords: Any) -> tuple[Any, Tree]:
        leaves, spec = tree.flatten(params)
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in leaves]
            result = f(tree.unflatten(inputs, spec), *args, **keywords)
            value, aux = result if has_aux else (result, None)
            if not isinstance(value, Tensor) or value.ndim != 0:
                raise ValueError(f"value_and_grad: f returned {_describe(value)}, expected a 0-d tensor")
            wanted = [x for x in inputs if x.requires_grad]
            found = iter(torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True))
        gradients = tree.unflatten([next(found) if x.requires_grad else ABSENT for x in inputs], spec)
        value = value.detach()
        return ((value, tree.map(_detach, aux)) if has_aux else value), gradients

    return g


def vjp(f: Callable[..., Any], *args: Tree) -> tuple[Any, Callable[..., tuple[Tree, ...]]]:
    """``(out, pullback)``: the value of ``f(*args)`` and a function from a cotangent to one gradient per argument.

    The pullback may be called any number of times.
    """
    leaves, spec = tree.flatten(args)
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in leaves]
        out = f(*tree.unflatten(inputs, spec))
    wanted = [x for x in inputs if x.requires_grad]

    def pullback(cotangent: Any) -> tuple[Tree, ...]:
        outputs, given = tree.leaves(out), tree.leaves(cotangent)
        found = iter(torch.autograd.grad(outputs, wanted, given, True, allow_unused=True, materialize_grads=True))
        return tree.unflatten([next(found) if x.requires_grad else ABSENT for x in inputs], spec)

    return tree.map(_detach, out), pullback


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


# ---------------------------------------------------------------------------------------------- rematerialisation


def remat(
    fn: Callable[..., Any], policy: Policy | None, *, host: offload.Host | None = None, decode_once: bool = True
) -> Callable[..., Any]:
    """Run ``fn(*args)`` so that between forward and backward only its arguments and what ``policy`` names are kept.

    ``policy`` maps op calls (their ``name=``) to SAVE, OFFLOAD or RECOMPUTE; a call that is not named is recomputed.
    SAVE keeps what the call produced: its outputs, and residuals that are not arguments; OFFLOAD keeps that on the
    host. ``"layer input"`` names the arguments that carry a gradient, which are kept anyway: SAVE or OFFLOAD.
    ``host``: where all layers of one forward pass send what is offloaded, so that backward fetches it one layer ahead.
    ``decode_once``: what backward reads twice of a weight in another form (NF4 decoded) it makes once; that takes
    memory for up to a whole layer, False for one weight at a time.

    Forward runs without autograd and records; a reverse liveness pass marks every call saved, run or dead (nobody
    needs its output again); backward replays the layer once under autograd. Gradients are bitwise those of
    ``policy=None``, which is plain autograd. ``fn`` must be a function of its arguments alone, made of ops and views: a
    closed-over tensor that wants a gradient is refused with ValueError, as is a name in the policy that no call has.
    ``torch.utils.checkpoint`` would keep the same sets, but replays dead calls."""
    if policy is None:
        return fn
    for name, fate in policy.items():
        if fate not in (SAVE, RECOMPUTE, OFFLOAD) or (name == INPUT and fate == RECOMPUTE):
            expected = (SAVE, OFFLOAD) if name == INPUT else (SAVE, OFFLOAD, RECOMPUTE)
            raise ValueError(f"remat: policy[{name!r}] is {fate!r}, expected {' or '.join(map(repr, expected))}")

    def layer(*args: Tree) -> Any:
        leaves, spec = tree.flatten(args)
        if _tape.get() is not None:
            raise ValueError("remat: called inside another remat; one layer at a time")
        if not (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)):
            return fn(*args)
        plan = _Plan(fn, spec, policy, host or offload.Host(), decode_once, backend.override())
        out = _Layer.apply(plan, *leaves)
        return tree.unflatten(list(out) if isinstance(out, tuple) else [out], plan.out_spec)

    return layer


@dataclasses.dataclass(frozen=True)
class Fate:
    """What a forward pass keeps of one op call until backward, in bytes.

    ``fate``: "save", "offload" (the bytes are then the host's), "recompute", "dead" (not needed again), or "autograd"
    where plain PyTorch decides (the reference backend without a policy): the bytes are then those of the outputs alone.
    """

    name: str
    fate: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class ResidualReport:
    """Rows in the order of the calls; ``str()`` is a table summed over calls of one name."""

    rows: tuple[Fate, ...]

    @property
    def bytes(self) -> int:
        """All that is kept on the device."""
        return sum(row.bytes for row in self.rows if row.fate != OFFLOAD)

    def __str__(self) -> str:
        groups: dict[tuple[str, str], tuple[int, int]] = {}
        for row in self.rows:
            calls, total = groups.get((row.name, row.fate), (0, 0))
            groups[row.name, row.fate] = (calls + 1, total + row.bytes)
        lines = [f"{'call':<24}{'fate':<12}{'calls':>6}{'MiB kept':>12}"]
        for (name, fate), (calls, total) in groups.items():
            lines.append(f"{name:<24}{fate:<12}{calls:>6}{total / 2**20:>12.2f}")
        lines.append(f"{'total on the device':<42}{self.bytes / 2**20:>12.2f}")
        return "\n".join(lines)


def residual_report(fn: Callable[..., Any], *args: Tree) -> ResidualReport:
    """What ``fn(*args)`` keeps until backward, call by call; "layer input" are the inputs that carry a gradient.

    Runs the forward pass once, with gradients for every floating-point leaf of the first argument.
    """
    leaves, spec = tree.flatten(args[0])
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in leaves]
    rows: list[Fate] = []
    token = _report.set(rows)
    try:
        with torch.enable_grad():
            fn(tree.unflatten(inputs, spec), *args[1:])
    finally:
        _report.reset(token)
    return ResidualReport(tuple(rows))


@dataclasses.dataclass
class _Plan:
    fn: Callable[..., Any]
    spec: Any
    policy: Policy
    host: offload.Host
    decode_once: bool
    backend: str | None
    out_spec: Any = None


@tree.pytree
class Spare:
    """A residual that an op's backward can do without: ``value`` is a small tensor, or ABSENT where none was kept.

    A layer keeps it of every call that it does not run again, whatever the policy; tiles keep nothing."""

    value: Any


@dataclasses.dataclass
class _Entry:
    """One recorded call. ``residuals`` codes each leaf as ("arg", i), ("out", i), ("none", 0) or the fresh tensor;
    ``outputs`` each one as ("arg", i), ("lost", (shape, dtype)) or the tensor. What is kept becomes ("kept", i)."""

    name: str
    keep: bool
    several: bool
    outputs: list[Any]
    residuals: list[Any] | None  # None: they must be rebuilt by running the call
    residual_spec: Any
    reads: set[int]  # storages of the arguments, of other outputs, of residuals that are arguments
    makes: set[int]
    needs: set[int]
    fate: str = "run"


class _Record:
    """The tape of a layer's forward pass: notes what every op call read and made, and keeps what the policy names."""

    def __init__(self, policy: Policy, frozen: Sequence[Tensor], *, spares: bool = True) -> None:
        self.policy, self.spares = policy, spares
        self.entries: list[_Entry] = []
        self._seen: dict[int, StorageWeakRef] = {}
        self._frozen = self._storages(frozen)

    def runs(self, name: str) -> bool:
        return False

    def needs(self, name: str, leaves: Sequence[Tensor]) -> list[bool]:
        """Any argument may want a gradient, except the layer's own frozen ones."""
        for leaf in leaves:
            if leaf.requires_grad:
                raise ValueError(
                    f"remat: op {name!r} got a tensor that wants a gradient through a closure; pass it as an argument"
                )
        return [leaf.is_floating_point() and self._storage(leaf) not in self._frozen for leaf in leaves]

    def __call__(self, name: str, leaves: Sequence[Tensor], run: Callable[[], tuple[Any, Tree]]) -> tuple[Any, Tree]:
        out, residuals = run()
        outputs = list(out) if isinstance(out, tuple) else [out]
        kept, spec = tree.flatten(residuals)
        codes = [_code(t, leaves, outputs) for t in kept]
        keep = self.policy.get(name) in (SAVE, OFFLOAD)
        parts = residuals if isinstance(residuals, tuple) else ()
        spare = [t for part in parts if isinstance(part, Spare) for t in tree.leaves(part)]
        if spare and not self.spares:
            codes = [("none", 0) if any(t is s for s in spare) else code for t, code in zip(kept, codes, strict=True)]
        fresh = [code for code in codes if isinstance(code, Tensor) and not any(code is s for s in spare)]
        rebuilt = bool(fresh) or any(not isinstance(code, Tensor) and code[0] == "out" for code in codes)
        made = [_code(o, leaves, ()) for o in outputs]
        self.entries.append(
            _Entry(
                name=name,
                keep=keep,
                several=isinstance(out, tuple),
                outputs=[("lost", (o.shape, o.dtype)) if isinstance(o, Tensor) and not keep else o for o in made],
                residuals=codes if keep or not rebuilt else None,
                residual_spec=spec,
                reads=self._storages(leaves),
                makes=self._storages([o for o in made if isinstance(o, Tensor)]),
                needs=self._storages([leaves[c[1]] for c in codes if not isinstance(c, Tensor) and c[0] == "arg"]),
            )
        )
        return out, residuals

    def _storages(self, tensors: Sequence[Tensor]) -> set[int]:
        """Identities of storages. A weak reference to each is held, so that none is given out twice while we record."""
        return {self._storage(t) for t in tensors}

    def _storage(self, t: Tensor) -> int:
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = StorageWeakRef(storage)
        return key

    def finish(self, final: Sequence[Tensor]) -> list[_Entry]:
        """Reverse liveness: a call runs again only if somebody reads what it makes, or its own backward needs it."""
        names = {entry.name for entry in self.entries}
        if unknown := sorted(set(self.policy) - names - {INPUT}):
            raise ValueError(f"remat: policy names {unknown}, but the calls of this layer are {sorted(names)}")
        seen_by_ops = set().union(*(entry.reads for entry in self.entries)) if self.entries else set()
        returned = self._storages(final)
        wanted: set[int] = set()
        for entry in reversed(self.entries):
            read_outside_ops = not (entry.makes & seen_by_ops) and not (entry.makes & returned)
            if entry.keep:
                entry.fate = "saved"
            elif entry.makes & wanted or read_outside_ops or entry.residuals is None:
                entry.fate, entry.residuals = "run", None
                wanted |= entry.reads
            else:
                entry.fate = "dead"
            wanted |= entry.needs
        return self.entries


def _code(residual: Any, leaves: Sequence[Tensor], outputs: Sequence[Tensor]) -> Any:
    for kind, pool in (("arg", leaves), ("out", outputs)):
        for i, t in enumerate(pool):
            if t is residual:
                return (kind, i)
    return residual


class _Replay:
    """The tape of a layer's backward pass: hands out what was saved, runs the rest, in the recorded order."""

    def __init__(self, entries: Sequence[_Entry], tensors: Sequence[Tensor]) -> None:
        self.entries, self.tensors, self.at = entries, tensors, 0

    def _next(self, name: str) -> _Entry:
        if self.at == len(self.entries) or self.entries[self.at].name != name:
            recorded = self.entries[self.at].name if self.at < len(self.entries) else "the end"
            raise RuntimeError(f"remat: replay diverged, forward recorded {recorded!r} where backward calls {name!r}")
        self.at += 1
        return self.entries[self.at - 1]

    def runs(self, name: str) -> bool:
        """For the reference backend: take this call off the tape if it is to be run by plain autograd."""
        run = self.at < len(self.entries) and self.entries[self.at].fate == "run"
        if run:
            self._next(name)
        return run

    def needs(self, name: str, leaves: Sequence[Tensor]) -> list[bool]:
        return [False] * len(leaves)

    def __call__(self, name: str, leaves: Sequence[Tensor], run: Callable[[], tuple[Any, Tree]]) -> tuple[Any, Tree]:
        entry = self._next(name)
        if entry.fate == "run":
            return run()
        outputs: list[Tensor] = []
        for kind, what in entry.outputs:
            if kind == "lost":  # never read; NaN in case that is wrong
                (shape, dtype), where = what, leaves[0].device
                value = float("nan") if dtype.is_floating_point else 0
                outputs.append(torch.full((), value, dtype=dtype, device=where).expand(shape))
            else:
                outputs.append(leaves[what] if kind == "arg" else self.tensors[what].detach())
        pools = {"arg": leaves, "out": outputs, "kept": self.tensors, "none": (ABSENT,)}
        residuals = tree.unflatten([pools[kind][i] for kind, i in entry.residuals or ()], entry.residual_spec)
        return (tuple(outputs) if entry.several else outputs[0]), residuals


@contextlib.contextmanager
def _taping(tape: _Record | _Replay) -> Iterator[None]:
    token = _tape.set(tape)
    try:
        yield
    finally:
        _tape.reset(token)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *leaves: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[1:]
        _tell("layer", "forward")
        frozen = [leaf for leaf, need in zip(leaves, needs, strict=True) if not need]
        tape = _Record(plan.policy, frozen)
        with _taping(tape):
            out = plan.fn(*tree.unflatten([leaf.detach() for leaf in leaves], plan.spec))
        outputs, plan.out_spec = tree.flatten(out)
        entries = tape.finish(outputs)
        # What is kept: the arguments, then of every saved call its outputs and fresh residuals.
        kept = list(leaves)
        moving = [i for i, (leaf, need) in enumerate(zip(leaves, needs, strict=True)) if need and not leaf.is_leaf]
        away = set(moving) if plan.policy.get(INPUT) == OFFLOAD else set()

        def keep(t: Tensor, name: str) -> int:
            kept.append(t)
            if plan.policy.get(name) == OFFLOAD:
                away.add(len(kept) - 1)
            return len(kept) - 1

        for entry in entries:
            if entry.fate == "saved":
                entry.outputs = [("kept", keep(o, entry.name)) if isinstance(o, Tensor) else o for o in entry.outputs]
            if entry.residuals is not None:
                codes = [("kept", keep(c, entry.name)) if isinstance(c, Tensor) else c for c in entry.residuals]
                entry.residuals = codes
        ctx.plan, ctx.entries, ctx.inputs, ctx.away = plan, entries, len(leaves), sorted(away)
        ctx.save_for_backward(*[t for i, t in enumerate(kept) if i not in away])
        ctx.device, ctx.parcel = outputs[0].device, None
        if away:
            _tell("layer", "offload", *[kept[i] for i in ctx.away])
            ctx.parcel = plan.host.send([kept[i] for i in ctx.away])
        if (fates := _report.get()) is not None:
            fate = plan.policy.get(INPUT, SAVE)
            fates.append(Fate(INPUT, fate, sum(leaves[i].nbytes for i in moving)))
            for entry in entries:
                slots = [i for kind, i in (*(entry.residuals or ()), *entry.outputs) if kind == "kept"]
                size = sum(kept[slot].nbytes for slot in slots)
                fate = {"run": RECOMPUTE, "saved": plan.policy.get(entry.name)}.get(entry.fate, entry.fate)
                fates.append(Fate(entry.name, str(fate), size))
        _tell("layer", "end")
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        _tell("layer", "backward")
        plan, here = ctx.plan, iter(ctx.saved_tensors)
        back = iter(offload.take(ctx.parcel, ctx.device) if ctx.away else ())
        kept = [next(back if i in ctx.away else here) for i in range(len(ctx.saved_tensors) + len(ctx.away))]
        needs = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(need) for x, need in zip(kept[: ctx.inputs], needs, strict=True)]
        given = tuple(ABSENT if ct is None else ct for ct in cotangents)
        # The engine's threads do not see the user's context: the backend of forward is set again here.
        with backend.using(plan.backend), _remembering(_Memo() if plan.decode_once else None):
            with torch.enable_grad(), _taping(_Replay(ctx.entries, kept)):
                out = plan.fn(*tree.unflatten(inputs, plan.spec))
            del kept
            found = _gradients(tuple(tree.leaves(out)), [x for x in inputs if x.requires_grad], given)
        gradients = [next(found) if need else ABSENT for need in needs]
        _tell("layer", "end")
        return (None, *[None if g is ABSENT else g for g in gradients])


# ------------------------------------------------------------------------------------------------------------- memo


class _Memo:
    """What the backward pass of one layer has made and will read once more."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, int], Tensor] = {}
        self.hold = False  # while a loop over tiles will come by again


@contextlib.contextmanager
def _remembering(memo: _Memo | None) -> Iterator[None]:
    token = _memo.set(memo)
    try:
        yield
    finally:
        _memo.reset(token)


def once(of: Tensor, make: Callable[[], Tensor], *, again: bool) -> Tensor:
    """``make()``; in the backward pass of a layer, what it made before of the same memory ``of``, if anything.

    For what forward and backward of an op both read: a decoded NF4 weight. ``again``: whether the op's backward will
    ask once more, after this; what nobody asks for any more is forgotten, as everything is with the layer."""
    beyond_arguments()  # whether it is made depends on the calls before
    memo = _memo.get()
    if memo is None:
        return _made(make)
    key = (of.untyped_storage()._cdata, int(of.storage_offset()))
    value = memo.made.pop(key, None)
    if value is None:
        value = _made(make)
    if again or memo.hold:
        memo.made[key] = value
    return value


def _made(make: Callable[[], Tensor]) -> Tensor:
    value = make()
    _tell("decode", "nf4", value)
    return value


def _tell(phase: str, op: str, *what: Any) -> None:
    if (listener := _listener.get()) is not None:
        listener(phase, op, "", what, {}, ())


@contextlib.contextmanager
def listening(hear: Callable[[str, str, str, Any, dict[str, Any], Tree], None]) -> Iterator[None]:
    """``hear(phase, op, name, what, statics, needs)`` of everything that runs inside, in this thread, as it starts.

    ``phase``: "forward" (what: the arguments), "backward" (what: residuals and cotangent), "decode" (what: the matrix
    that :func:`once` made), or "layer", of which op "forward" and "backward" begin one, "offload" (what: what it
    sends) and "end" ends it. For planning and for counting, not for changing anything."""
    token = _listener.set(hear)
    try:
        yield
    finally:
        _listener.reset(token)


# ------------------------------------------------------------------------------------------------------------- tiles


def tiled(
    fn: Callable[..., Any], size: int, *, name: str, sums: tuple[bool, ...] = (), decode_once: bool = True
) -> Callable[..., Any]:
    """``fn(w, *rows)`` run on ``size`` rows at a time: one call ``name`` to a policy, which keeps its arguments alone.

    ``fn`` is made of ops and views, and every leaf of ``rows`` and of what it returns has the rows as its first
    dimension, each depending on no other: a token-local function. Rows that it returns as they came are not copied.
    ``sums``, where given, says of each entry of the tuple that ``fn`` returns whether it is a sum over rows instead.
    What is alive in the middle of ``fn``, forward and backward, is that of one tile. Gradients of ``w`` are added up
    over tiles in fp32, in order; those of rows are as without tiles, as far as the products inside give a row the same
    bits among fewer others.
    Backward replays a tile under autograd, but for what nobody needs again (see :func:`remat`). ``decode_once`` as
    there, here for the span of all tiles. Raises ValueError for a size below 1 or an output without the rows."""
    if size < 1:
        raise ValueError(f"tiled: size is {size}, expected at least 1")
    tiles = _Tiles(fn, size, name, sums, decode_once)

    def call(w: Tree, *rows: Tree) -> Any:
        leaves, spec = tree.flatten((w, rows))
        tape, tiles.backend = _tape.get(), backend.override()
        op_call = _Call(name, (tiles.tiled_fwd, tiles.tiled_bwd), spec, {}, tape)
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            out = _apply(op_call, leaves)
        else:
            out = op_call.forward(leaves, tape.needs(name, leaves) if tape else [False] * len(leaves))[0]
        return tree.unflatten(out, tiles.out_spec)

    return call


class _Tiles:
    """The pair of a tiled function. What it learns in forward (structure, no tensors) is the same in every run."""

    def __init__(self, fn: Callable[..., Any], size: int, name: str, sums: tuple[bool, ...], decode_once: bool) -> None:
        self.fn, self.size, self.name, self.sums, self.decode_once = fn, size, name, sums, decode_once
        self.backend: str | None = None
        self.added: list[bool] = []  # of each tensor that comes out: is it a sum over rows?
        self.passed: list[int | None] = []  # and which one of the rows it is, if any
        self.entries: dict[int, list[_Entry]] = {}  # rows of a tile -> its calls
        self.out_spec: Any = None

    def _tiles(self, rows: Tree) -> Iterator[tuple[slice, Tree]]:
        count = tree.leaves(rows)[0].shape[0]
        for start in range(0, max(count, 1), self.size):
            here = slice(start, min(start + self.size, count))
            yield here, tree.map(lambda t, here=here: t[here].detach(), rows)

    def tiled_fwd(self, w: Tree, rows: Tree, *, needs: Tree) -> tuple[tuple[Tensor, ...], Tree]:
        both = zip(tree.leaves((w, rows)), tree.leaves(needs), strict=True)
        frozen = [leaf for leaf, need in both if need is not True]
        still, whole = tree.map(_detach, w), []
        memo = _Memo() if self.decode_once else None
        if memo is not None:
            memo.hold = True
        with torch.no_grad(), _remembering(memo):
            for here, part in self._tiles(rows):
                tape = _Record({}, frozen, spares=False)
                with _taping(tape):
                    out = self.fn(still, *part)
                found, self.out_spec = tree.flatten(out)
                self.entries[here.stop - here.start] = tape.finish(found)
                if not whole:
                    self.added, whole = self._begin(out, part, here.stop, tree.leaves(rows))
                for target, t, added, passed in zip(whole, found, self.added, self.passed, strict=True):
                    if added:
                        target.add_(t)
                    elif passed is None:
                        target[here] = t
                del out, found, part
        return tuple(whole), (w, rows)

    def _begin(
        self, out: Any, part: Tree, rows: int, given: Sequence[Tensor]
    ) -> tuple[list[bool], list[Tensor]]:  # fmt: skip
        """Room for all rows of what ``part``, ``rows`` of them, gave, and which of it is a sum."""
        of_entries = [(entry, False) for entry in (out if isinstance(out, tuple) else (out,))]
        if self.sums:
            of_entries = list(zip(out, self.sums, strict=True))
        leaves = [(t, added) for entry, added in of_entries for t in tree.leaves(entry)]
        for t, added in leaves:
            if not added and (t.ndim == 0 or t.shape[0] != rows):
                got = f"a tensor of shape {tuple(t.shape)} for {rows} rows"
                raise ValueError(f"tiled: {self.name} returns {got}, expected (rows, ...)")
        parts, count = tree.leaves(part), given[0].shape[0]
        self.passed = [next((i for i, p in enumerate(parts) if p is t), None) for t, _ in leaves]
        whole = [
            given[i] if i is not None else torch.zeros_like(t) if added else t.new_empty((count, *t.shape[1:]))
            for (t, added), i in zip(leaves, self.passed, strict=True)
        ]
        return [added for _, added in leaves], whole

    def tiled_bwd(self, residuals: Tree, cotangents: tuple[Any, ...], *, needs: Tree) -> tuple[Any, Any]:
        (w, rows), (needs_w, needs_rows) = residuals, (tree.leaves(part) for part in needs)
        w_leaves, w_spec = tree.flatten(w)
        dw: list[Any] = [ABSENT] * len(w_leaves)
        row_leaves, row_spec = tree.flatten(rows)
        d_rows = [torch.zeros_like(t) if n is True else ABSENT for t, n in zip(row_leaves, needs_rows, strict=True)]
        count = row_leaves[0].shape[0]
        memo = _memo.get() or (_Memo() if self.decode_once else None)
        with backend.using(self.backend), _remembering(memo):
            for here, part in self._tiles(rows):
                if memo is not None:
                    memo.hold = here.stop < count
                still = [t.detach().requires_grad_(n is True) for t, n in zip(w_leaves, needs_w, strict=True)]
                moving, part_spec = tree.flatten(part)
                for t, need in zip(moving, needs_rows, strict=True):
                    t.requires_grad_(need is True)
                entries = self.entries[here.stop - here.start]
                with torch.enable_grad(), _taping(_Replay(entries, ())):
                    out = self.fn(tree.unflatten(still, w_spec), *tree.unflatten(moving, part_spec))
                both = zip(cotangents, self.added, strict=True)
                given = tuple([ct if ct is ABSENT or added else ct[here] for ct, added in both])
                found = _gradients(tuple(tree.leaves(out)), [t for t in (*still, *moving) if t.requires_grad], given)
                del out
                for i, t in enumerate(still):
                    if t.requires_grad and (g := next(found)) is not ABSENT:
                        dw[i] = g.to(torch.float32, copy=True) if dw[i] is ABSENT else dw[i].add_(g)
                for t, d in zip(moving, d_rows, strict=True):
                    if t.requires_grad and (g := next(found)) is not ABSENT:
                        d[here] = g
        dw = [d if d is ABSENT else d.to(t.dtype) for d, t in zip(dw, w_leaves, strict=True)]
        return tree.unflatten(dw, w_spec), tree.unflatten(d_rows, row_spec)
