"""What ``torch.compile`` sees of an op: one operator forward, one backward, whose kernels run as in eager code.

Dynamo leaves the call of an op alone (:func:`unsloth_core.autodiff.custom_vjp` marks it with ``nonstrict_trace``), and
AOTAutograd walks through it in plain Python, with tensors that have a shape and no memory. There each half of an op's
pair becomes a node ``unsloth_core::run(tensors, number)``. A PyTorch operator returns a flat list of new tensors, but a
pair returns trees in which arguments stand as residuals; :func:`opaque` takes them apart and puts them together again.
"""

import ast
import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import tree
from .device import is_fake
from .tree import Tree

_OPS: dict[str, Callable[[tuple[Any, ...], str, dict[str, Any]], Any]] = {}
_FUNCTIONS: list["_Function"] = []


def register(run: Callable[[tuple[Any, ...], str, dict[str, Any]], Any], fwd: Callable[..., Any]) -> str:
    """Make ``run(args, name, statics)`` reachable for :data:`call`, by the name that is returned."""
    identity = f"{fwd.__module__}.{fwd.__qualname__}"
    _OPS[identity] = run
    return identity


def _call(identity: str, args: tuple[Any, ...], name: str, statics: str) -> Any:
    return _OPS[identity](args, name, ast.literal_eval(statics))


call: Any = _call  # the same, marked, once somebody compiles


def prepare() -> bool:
    """Mark :data:`call` as one that Dynamo leaves alone. Dynamo runs this function itself, while it compiles."""
    global call
    if call is _call:
        import torch._dynamo  # not sooner: it takes a second or more

        call = torch._dynamo.nonstrict_trace(_call)
    return True


prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, unimported


class _Function:
    """``f(tensors) -> tree`` as one that returns its new tensors only; ``places`` says where each leaf came from, and
    ``views`` how it lies in a tensor that it shares with others: returned tensors must not."""

    def __init__(self, f: Callable[[list[Tensor]], Tree]) -> None:
        self.f, self.number = f, len(_FUNCTIONS)
        self.spec: Any = None
        self.places: list[tuple[bool, int]] = []  # (is it new?, index)
        self.views: list[tuple[Any, ...] | None] = []  # (shape, strides, offset)
        _FUNCTIONS.append(self)

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        leaves, self.spec = tree.flatten(self.f(tensors))
        given = {id(t): (False, i) for i, t in enumerate(tensors)}
        fresh = {id(t): t for t in leaves if id(t) not in given}
        memories = collections.Counter(t.untyped_storage()._cdata for t in fresh.values())
        flat: dict[int, Tensor] = {}  # what several of them lie in
        for key, t in fresh.items():
            if memories[memory := t.untyped_storage()._cdata] > 1:
                size = t.untyped_storage().nbytes() // t.element_size()
                fresh[key] = flat.setdefault(memory, t.as_strided((size,), (1,), 0))
        new = list({id(t): t for t in fresh.values()}.values())
        at = {id(t): (True, i) for i, t in enumerate(new)}
        self.places = [given[id(t)] if id(t) in given else at[id(fresh[id(t)])] for t in leaves]
        self.views = [None if fresh.get(id(t), t) is t else (t.shape, t.stride(), t.storage_offset()) for t in leaves]
        return new


@torch.library.custom_op("unsloth_core::run", mutates_args=())
def _run(tensors: list[Tensor], number: int) -> list[Tensor]:
    return _FUNCTIONS[number](tensors)


@_run.register_fake
def _(tensors: list[Tensor], number: int) -> list[Tensor]:
    return _FUNCTIONS[number](tensors)  # launches of kernels do nothing for such tensors


def opaque(f: Callable[[list[Tensor]], Tree], tensors: Sequence[Tensor]) -> Tree:
    """``f(tensors)`` as one node of the graph that is being traced. ``f`` reads no other tensors and writes to none."""
    function = _Function(f)
    given = list(tensors)
    new = torch.ops.unsloth_core.run(given, function.number)
    whole = [(new if fresh else given)[i] for fresh, i in function.places]
    leaves = [t if view is None else t.as_strided(*view) for t, view in zip(whole, function.views, strict=True)]
    return tree.unflatten(leaves, function.spec)


def whole(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``f(*trees, **statics) -> tree``, which has no gradient, one node of a graph that is being traced.

    It may take some of its trees by name; but nothing that it writes to (``out=``) while it is traced."""

    def run(args: tuple[Any, ...], name: str, statics: dict[str, Any]) -> Any:
        leaves, spec = tree.flatten(args)

        def call_it(tensors: Sequence[Tensor]) -> Any:
            positional, named = tree.unflatten(tensors, spec)
            return f(*positional, **named, **statics)

        return opaque(call_it, leaves) if any(is_fake(leaf) for leaf in leaves) else call_it(leaves)

    identity = register(run, f)

    @functools.wraps(f)
    def called(*args: Any, **keywords: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return f(*args, **keywords)
        named = {key: value for key, value in keywords.items() if isinstance(value, Tensor)}
        if "out" in named:
            raise NotImplementedError(f"{f.__name__}: out= is not supported under torch.compile")
        statics = {key: value for key, value in keywords.items() if key not in named}
        prepare()
        return call(identity, (args, named), f.__name__, repr(statics))

    return called
