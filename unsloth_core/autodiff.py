"""Differentiation of pure functions: an op is a pair, a layer is a schedule of ops, a policy never changes the numbers.

``custom_vjp(fwd, bwd)`` makes a hand-derived pair differentiable, ``value_and_grad`` and ``vjp`` are JAX's.
:mod:`unsloth_core.remat` has the schedules; these two files alone use ``torch.autograd.Function``."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backend, prepared, tracing, tree
from .device import beyond_arguments, is_fake
from .segments import Segments
from .tree import ABSENT, Tree
from .weights import Head, Weight

SAVE = "save"
RECOMPUTE = "recompute"
OFFLOAD = "offload"
INPUT = "layer input"  # what a policy and a report call the arguments of a layer that carry a gradient
Policy = Mapping[str, str]

current_tape: ContextVar[Any] = ContextVar("unsloth_core_tape", default=None)  # of a layer that remat runs
current_report: ContextVar["list[Fate] | None"] = ContextVar("unsloth_core_report", default=None)
current_memo: ContextVar["Memo | None"] = ContextVar("unsloth_core_memo", default=None)
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
    fitting: set[tuple[type, ...]] = set()  # types of arguments that fit but for their leaves

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
        missing = () if keywords else rest.get(len(args))
        args = bind(args, keywords) if keywords or missing is None else args + missing
        if torch.compiler.is_dynamo_compiling():
            tracing.prepare()
            return tracing.call(identity, args, name, repr(keywords))
        try:
            return run(args, name, keywords)
        except RuntimeError as error:  # of PyTorch, which finds no memory, and says so in words of its own
            if not torch._C._are_functorch_transforms_active():
                raise
            raise NotImplementedError(_unsupported(op_name, "transforms of torch.func")) from error

    def run(args: tuple[Any, ...], name: str, keywords: dict[str, Any]) -> Any:
        types = tuple(map(type, args))
        spec = checked.get(types)
        if spec is None:
            leaves, spec = fit(args, types)
        else:
            leaves = args if spec.num_leaves == len(args) else [arg for arg in args if arg is not ABSENT]
        if _any_autocast() and _under_autocast(leaves):
            with torch.autocast(leaves[0].device.type, enabled=False):
                return run(args, name, keywords)
        tape = current_tape.get()
        reference = backend.reference(op_name) if backend.resolve(leaves[0]) == "reference" else None
        if reference is not None and (tape is None or tape.runs(name)):
            # Through views: each argument collects its gradient inside the op first, the order of a derived pair.
            inputs = [leaf.view_as(leaf) if leaf.requires_grad else leaf for leaf in leaves]
            out = reference(*tree.unflatten(inputs, spec), **keywords)
            if (fates := current_report.get()) is not None:
                fates.append(Fate(name, "autograd", sum(t.nbytes for t in tree.leaves(out))))
            return out
        if forward_ad._current_level >= 0 and _has_tangent(leaves):
            raise NotImplementedError(_unsupported(op_name, "forward-mode differentiation"))
        pair = (fwd, bwd) if reference is None else _derived(reference)
        call = Call(name, pair, spec, keywords, tape)
        if torch.is_grad_enabled() and _wants_gradient(leaves):
            return apply(call, *leaves)
        return call.forward(leaves, tape.needs(name, leaves) if tape else (False,) * len(leaves))[0]

    def fit(args: tuple[Any, ...], types: tuple[type, ...]) -> tuple[Sequence[Tensor], tree.Spec]:
        """Leaves and structure of arguments that are what the op takes. Raises TypeError for others."""
        leaves, spec = tree.flatten(args)
        for leaf in leaves:
            if leaf.__class__ is not Tensor and not isinstance(leaf, Tensor):
                raise TypeError(_misfit(op_name, arguments, args))
        if leaves and types in fitting:
            return leaves, spec
        for i, kind in kinds:
            if not isinstance(args[i], kind):
                raise TypeError(_misfit(op_name, arguments, args))
        if not leaves:
            raise TypeError(f"{op_name}: no argument has a tensor")
        if spec.flat:  # then their types say all there is
            checked[types] = spec
        else:
            fitting.add(types)
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


_any_autocast = torch._C._is_any_autocast_enabled


def _under_autocast(leaves: Sequence[Tensor]) -> bool:
    if leaves[0].is_cuda:
        return torch.is_autocast_enabled("cuda")
    return leaves[0].is_cpu and torch.is_autocast_enabled("cpu")


def _wants_gradient(leaves: Sequence[Tensor]) -> bool:
    for leaf in leaves:  # no generator: this is asked at every call of every op
        if leaf.requires_grad:
            return True
    return False


def _has_tangent(leaves: Sequence[Tensor]) -> bool:
    return any(forward_ad.unpack_dual(leaf).tangent is not None for leaf in leaves)


def _unsupported(op: str, what: str) -> str:
    return f"{op}: kernels do not support {what}; plain PyTorch does: unsloth_core.using('reference')"


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


class Call:
    """One call of an op: everything that forward resolved and backward must find unchanged, in whatever thread it
    runs."""

    __slots__ = ("name", "pair", "spec", "statics", "tape")

    def __init__(self, name: str, pair: Any, spec: tree.Spec, statics: dict[str, Any], tape: Any) -> None:
        self.name, self.pair, self.spec, self.statics, self.tape = name, pair, spec, statics, tape

    @property
    def op(self) -> str:
        """Name of the op."""
        return self.pair[0].__name__.removesuffix("_fwd")

    def forward(self, leaves: Sequence[Tensor], needs: tuple[bool, ...]) -> tuple[Any, Sequence[Tensor], tree.Spec]:
        """Outputs, and residuals as leaves and structure; on or off the tape of a layer."""
        if self.tape is None:
            return self._run(leaves, needs)
        return self.tape(self.name, leaves, lambda: self._run(leaves, needs))

    def _run(self, leaves: Sequence[Tensor], needs: tuple[bool, ...]) -> tuple[Any, Sequence[Tensor], tree.Spec]:
        leafwise = getattr(self.pair[0], "leafwise", None)
        if leafwise is None or _listener.get() is not None:
            return self._forward(self.pair[0], leaves, needs)
        identity = (self.spec, needs, *self.statics.items())
        return leafwise(leaves, identity, self._forward, self.pair[0].__wrapped__, leaves, needs)

    def _forward(
        self, fwd: Any, leaves: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Any, Sequence[Tensor], tree.Spec]:
        spec, statics = self.spec, self.statics
        args, tree_of_needs = tree.unflatten(leaves, spec), tree.unflatten(needs, spec)
        if (listener := _listener.get()) is not None:
            listener("forward", self.op, self.name, args, statics, tree_of_needs)
        if _any_fake(leaves):
            out, residuals = tracing.opaque(
                lambda ts: fwd(*tree.unflatten(ts, spec), needs=tree_of_needs, **statics), leaves
            )
        else:
            out, residuals = fwd(*args, needs=tree_of_needs, **statics)
        kept, form = tree.flatten(residuals)
        return out, tuple(kept), form

    def backward(
        self,
        residuals: tuple[Sequence[Tensor], tree.Spec],
        several: bool,
        cotangents: tuple[Tensor | None, ...],
        present: Sequence[Tensor],
        needs: tuple[bool, ...],
    ) -> tuple[Tensor | None, ...]:
        """None for the call, then gradients of the leaves; ``present`` are the cotangents that are there. Whether there
        are ``several`` outputs, a tuple, their number does not say."""
        leafwise = getattr(self.pair[1], "leafwise", None)
        if leafwise is None or _listener.get() is not None:
            return self._backward(self.pair[1], residuals, several, cotangents, present, needs)
        kept, spec = residuals
        gaps = [ct is None for ct in cotangents] if several else ()
        identity = (self.spec, spec, needs, several, *gaps, *self.statics.items())
        about = (self._backward, self.pair[1].__wrapped__, residuals, several, cotangents, present, needs)
        return leafwise((*kept, *present), identity, *about)

    def _backward(
        self, bwd: Any, residuals: Any, several: bool, cotangents: Any, present: Any, needs: Any
    ) -> tuple[Tensor | None, ...]:
        statics, tree_of_needs = self.statics, tree.unflatten(needs, self.spec)
        residuals = tree.unflatten(*residuals)
        cotangent = tuple([ABSENT if ct is None else ct for ct in cotangents]) if several else present[0]
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
        return (None, *[g if need and g is not ABSENT else None for g, need in zip(flat, needs, strict=True)])


def _any_fake(leaves: Sequence[Tensor]) -> bool:
    for leaf in leaves:  # no generator: this is asked at every call of every op
        if leaf.__class__ is not Tensor and is_fake(leaf):
            return True
    return False


def differentiable_once(
    refusal: str, backward: Callable[..., tuple[Tensor | None, ...]], ctx: Any, cotangents: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``backward`` that raise RuntimeError, a ``refusal``, when somebody differentiates them again.

    PyTorch's ``once_differentiable`` refuses where a cotangent has a history. That of a plain sum has none: there the
    gradient would pass as a constant, and the second derivative be missing without a word."""
    with torch.no_grad():
        gradients = backward(ctx, *cotangents)
    given = [None if g is None else g.detach().requires_grad_() for g in gradients]
    return torch._C._functions.DelayedError(refusal.encode(), len(given))(*given)  # type: ignore[attr-defined]


class Op(torch.autograd.Function):
    """A call as a node of PyTorch's graph."""

    @staticmethod
    def forward(ctx: Any, call: Call, *leaves: Tensor) -> Any:
        """Outputs; residuals are saved."""
        ctx.set_materialize_grads(False)
        out, kept, spec = call.forward(leaves, ctx.needs_input_grad[1:])
        ctx.save_for_backward(*kept)
        ctx.about = call, spec, out.__class__ is tuple
        if (fates := current_report.get()) is not None:
            outputs = [o for o in (out if isinstance(out, tuple) else (out,)) if not any(o is leaf for leaf in leaves)]
            fresh = [t for t in kept if not any(t is leaf for leaf in leaves)]
            extra = sum(t.nbytes for t in fresh if not any(t is o for o in outputs))
            fates.append(Fate(call.name, SAVE, sum(t.nbytes for t in outputs) + extra))
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """Gradients of the leaves."""
        if torch.is_grad_enabled():  # only with ``create_graph=True``; nodes that raise are made for nobody else
            refusal = _unsupported(ctx.about[0].op, "double backward")
            return differentiable_once(refusal, Op.backward, ctx, cotangents)
        call, spec, several = ctx.about
        present = [ct for ct in cotangents if ct is not None]
        if not present:
            return (None,) * len(ctx.needs_input_grad)
        if _any_autocast() and _under_autocast(present):  # backward was called inside it
            with torch.autocast(present[0].device.type, enabled=False):
                return Op.backward(ctx, *cotangents)
        residuals = ctx.saved_tensors, spec
        return call.backward(residuals, several, cotangents, present, ctx.needs_input_grad[1:])


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply``, but for what PyTorch does there in Python for the sake of functorch."""
    plain: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def apply(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)  # which refuses, in its own words
        return plain(*args)

    return apply


apply = applied(Op)


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
        found = gradients_of(out, [x for x, want in zip(inputs, wanted, strict=True) if want], cotangent)
        return tree.unflatten([next(found) if want else ABSENT for want in wanted], spec)

    return fwd, bwd


def gradients_of(out: Any, inputs: list[Tensor], cotangent: Any) -> Iterator[Any]:
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
        return ((value, tree.map(detach, aux)) if has_aux else value), gradients

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

    return tree.map(detach, out), pullback


def detach(value: Any) -> Any:
    """A tensor without its history; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


# ------------------------------------------------------------------------------------------------- what is kept


@dataclasses.dataclass(frozen=True)
class Fate:
    """What a forward pass keeps of one op call until backward, in bytes.

    ``fate``: "save", "offload" (the bytes are then the host's), "recompute", "dead" (not needed again), or "autograd"
    where plain PyTorch decides (the reference backend without a policy): the bytes are then those of the outputs alone.
    """

    name: str
    fate: str
    bytes: int


@tree.pytree
class Spare:
    """A residual that an op's backward can do without: ``value`` is a small tensor, or ABSENT where none was kept.

    A layer keeps it of every call that it does not run again, whatever the policy; tiles keep nothing."""

    value: Any


# ------------------------------------------------------------------------------------------------------------- memo


class Memo:
    """What the backward pass of one layer has made and will read once more."""

    def __init__(self) -> None:
        self.made: dict[tuple[int, int], Tensor] = {}
        self.hold = False  # while a loop over tiles will come by again


@contextlib.contextmanager
def remembering(memo: Memo | None) -> Iterator[None]:
    """``memo`` is what :func:`once` looks into."""
    token = current_memo.set(memo)
    try:
        with prepared.apart(memo is not None):
            yield
    finally:
        current_memo.reset(token)


def once(of: Tensor, make: Callable[[], Tensor], *, again: bool) -> Tensor:
    """``make()``; in the backward pass of a layer, what it made before of the same memory ``of``, if anything.

    For what forward and backward of an op both read: a decoded NF4 weight. ``again``: whether the op's backward will
    ask once more, after this; what nobody asks for any more is forgotten, as everything is with the layer."""
    memo = current_memo.get()
    if memo is None:
        return _made(make)
    beyond_arguments()  # whether it is made depends on the calls before
    key = (of.untyped_storage()._cdata, int(of.storage_offset()))
    value = memo.made.pop(key, None)
    if value is None:
        value = _made(make)
    if again or memo.hold:
        memo.made[key] = value
    return value


def _made(make: Callable[[], Tensor]) -> Tensor:
    value = make()
    tell("decode", "nf4", value)
    return value


def tell(phase: str, op: str, *what: Any) -> None:
    """Whoever is :func:`listening`."""
    if (listener := _listener.get()) is not None:
        beyond_arguments()
        listener(phase, op, "", what, {}, ())


@contextlib.contextmanager
def listening(hear: Callable[[str, str, str, Any, dict[str, Any], Tree], None]) -> Iterator[None]:
    """``hear(phase, op, name, what, statics, needs)`` of everything that runs inside, in this thread, as it starts.

    ``phase``: "forward" (what: the arguments), "backward" (what: residuals and cotangent), "decode" (what: the matrix
    that :func:`once` made), or "layer", of which op "forward" and "backward" begin one, "offload" (what: what it
    sends) and "end" ends it. For planning and for counting, not for changing anything."""
    token = _listener.set(hear)
    try:
        with prepared.apart(True):
            yield
    finally:
        _listener.reset(token)
