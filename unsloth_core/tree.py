"""Trees of tensors: parameters, gradients, optimizer states and batches are all the same kind of value.

A tree is a tensor, a tuple, a list, a dict, or a frozen dataclass made with :func:`pytree`. Absence is
:data:`ABSENT`, a node with no leaves; ``None`` never sits in a tree. This is the only file that knows PyTorch's
pytree registry, so trees made here are understood by ``torch.compile``, ``torch.export`` and friends too. The idea
is JAX's, the dataclass form Equinox's."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import torch.utils._pytree as pt
from torch import Tensor

Tree = Any
_T = TypeVar("_T")


class _Absent:
    """A hole in a tree: no leaves, false, and one object per process."""

    _instance = None

    def __new__(cls) -> "_Absent":
        if cls._instance is None:
            cls._instance = super().__new__(cls)
        return cls._instance

    def __repr__(self) -> str:
        return "ABSENT"

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT: Any = _Absent()


class Spec(NamedTuple):
    """The structure of a tree: its kind of node (None for a leaf), statics or keys, the structures of its children;
    ``flat`` says that it is a tuple of leaves and holes."""

    kind: type | None
    context: Any
    children: "tuple[Spec, ...]"
    num_leaves: int
    flat: bool = False

    # By identity, in no time: keys of dictionaries hold these. Two that are equal may both be kept there, as two keys.
    __hash__ = object.__hash__


_LEAF = Spec(None, None, (), 1)


class _Node(NamedTuple):
    """How one kind of node comes apart and goes together; ``keys`` are what paths call its children."""

    children: Callable[[Any], tuple[Any, ...]]
    context: Callable[[Any], Any]
    build: Callable[[list[Any], Any], Any]
    keys: Callable[[Any], Iterable[Any]]


_HOLE = Spec(_Absent, None, (), 0)

# The registry is ours, because PyTorch's takes several times as long to walk it, and every op walks its arguments.
_NODES: dict[type, _Node] = {
    _Absent: _Node(lambda _: (), lambda _: None, lambda _values, _context: ABSENT, lambda _: ()),
    tuple: _Node(lambda t: t, lambda _: None, lambda values, _: tuple(values), lambda t: range(len(t))),
    list: _Node(tuple, lambda _: None, lambda values, _: values, lambda t: range(len(t))),
    dict: _Node(
        lambda t: tuple(t.values()),
        tuple,
        lambda values, keys: dict(zip(keys, values, strict=True)),
        lambda t: t.keys(),
    ),
}
pt.register_pytree_node(
    _Absent,
    lambda _: ([], None),
    lambda _children, _context: ABSENT,
    flatten_with_keys_fn=lambda _: ([], None),
    serialized_type_name="unsloth_core.tree.ABSENT",
)


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field that is part of the structure (shapes, scales, names), not a leaf; compared when trees are matched."""
    return dataclasses.field(default=default, metadata={"static": True})


def leaf(dims: str, hf: str, *, optional: bool = False, plain: bool = False) -> Any:
    """A weight, declared once: its dimensions and its name(s) in a checkpoint.

    ``leaf("Q+2R D", "self_attn.{q,k,v}_proj.weight")`` is three parts of Q, R and R rows stored stacked;
    ``leaf("E 2F D", "mlp.experts.{e}.{gate,up}_proj.weight")`` two for every expert, {e}, stored as one (E, 2F, D).
    An optional leaf may be missing from a checkpoint (a bias, a tied head) and is ABSENT then. A plain one is never
    quantised nor adapted, though it is a matrix (a router). Read by :mod:`unsloth_core.weights`."""
    metadata = {"leaf": (dims, hf, optional, plain)}
    if optional:
        return dataclasses.field(default=ABSENT, metadata=metadata)
    return dataclasses.field(metadata=metadata)


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False, field_specifiers=(static, leaf))
def pytree(cls: type[_T]) -> type[_T]:
    """Class decorator: a frozen, keyword-only dataclass whose non-static fields are children of a tree."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)(cls)
    cls.__repr__ = lambda self: describe(self)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    children = [f.name for f in fields if not f.metadata.get("static")]
    statics = [f.name for f in fields if f.metadata.get("static")]
    names = [*children, *statics]

    def from_children(values: Iterable[Any], context: tuple[Any, ...]) -> Any:
        # Not cls(...): a tree of booleans, gradients or holes has the same shape and none of the validation.
        node = object.__new__(cls)
        fields = node.__dict__
        for name, value in zip(names, (*values, *context), strict=True):  # quicker than update
            fields[name] = value
        return node

    def to_keyed_children(node: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        keys = [pt.GetAttrKey(name) for name in children]
        return list(zip(keys, to_children(node), strict=True)), to_context(node)

    to_children, to_context = _getter(children), _getter(statics)
    _NODES[cls] = _Node(to_children, to_context, from_children, lambda _: children)
    _FLAT.clear()  # a tuple with one of these was flat until now
    pt.register_pytree_node(  # foreign code (torch.compile, torch.export) sees the same nodes
        cls,
        # In words that torch.compile can trace.
        lambda node: ([getattr(node, name) for name in children], tuple([getattr(node, name) for name in statics])),
        from_children,
        flatten_with_keys_fn=to_keyed_children,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )
    return cls


def _getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    """``node -> (node.a, node.b, ...)`` in one C call; attrgetter of one name gives no tuple, of none is refused."""
    if len(names) > 1:
        return operator.attrgetter(*names)
    if not names:
        return lambda _: ()
    one = operator.attrgetter(*names)
    return lambda node: (one(node),)


# Structures of tuples of leaves and holes, by the types of their members: what the arguments of most ops are.
_FLAT: dict[tuple[type, ...], Spec] = {}
_SPECS: dict[tuple[Any, ...], Spec] = {}  # all others, by what a walk from the top meets
_SPECS_KEPT = 1024


def flatten(tree: Tree) -> tuple[list[Any], Spec]:
    """The leaves in a fixed order, and the structure that :func:`unflatten` puts them back into."""
    if tree.__class__ is tuple:
        flat = _FLAT.get(tuple([child.__class__ for child in tree]))
        if flat is not None:
            return (list(tree) if flat.num_leaves == len(tree) else [x for x in tree if x is not ABSENT]), flat
    found: list[Any] = []
    met: list[Any] = []
    _walk((tree,), found, met)
    key = tuple(met)
    try:
        spec = _SPECS.get(key)
    except TypeError:  # a static that has no hash
        return found, _flatten(tree, [])
    if spec is None:
        spec = _flatten(tree, [])
        if spec.flat:
            _FLAT[tuple([child.__class__ for child in tree])] = spec
        else:
            if len(_SPECS) >= _SPECS_KEPT:
                _SPECS.clear()
            _SPECS[key] = spec
    return found, spec


def _walk(values: Iterable[Any], found: list[Any], met: list[Any]) -> None:
    """Leaves that are met, and what tells structures apart."""
    for value in values:
        kind = value.__class__
        if kind is Tensor:  # what there is most of
            found.append(value)
            met.append(None)
        elif (node := _NODES.get(kind)) is None:
            found.append(value)
            met.append(None)
        elif value is ABSENT:
            met.append(ABSENT)
        else:
            children = node.children(value)
            met += (kind, len(children), node.context(value))
            _walk(children, found, met)


def opened(value: Tree) -> tuple[tuple[Any, ...], Any] | None:
    """``(children, statics)`` of a node, None of a leaf."""
    node = _NODES.get(value.__class__)
    return None if node is None else (node.children(value), node.context(value))


def _flatten(tree: Tree, found: list[Any]) -> Spec:
    node = _NODES.get(type(tree))
    if node is None:
        found.append(tree)
        return _LEAF
    if tree is ABSENT:
        return _HOLE
    before = len(found)
    below = []
    for child in node.children(tree):
        if type(child) in _NODES:
            below.append(_flatten(child, found))
        else:  # not by the call below: leaves are what there is most of
            found.append(child)
            below.append(_LEAF)
    flat = type(tree) is tuple and all(spec is _LEAF or spec is _HOLE for spec in below)
    return Spec(type(tree), node.context(tree), tuple(below), len(found) - before, flat)


def unflatten(leaves_: Iterable[Any], spec: Spec) -> Tree:
    """The inverse of :func:`flatten`."""
    if not spec.flat:
        return _unflatten(spec, iter(leaves_))
    if spec.num_leaves == len(spec.children):
        return tuple(leaves_)
    rest = iter(leaves_)
    return tuple([next(rest) if child is _LEAF else ABSENT for child in spec.children])


def _unflatten(spec: Spec, leaves_: Iterator[Any]) -> Tree:
    if spec.kind is None:
        return next(leaves_)
    if spec is _HOLE:
        return ABSENT
    values = [
        next(leaves_) if below is _LEAF else ABSENT if below is _HOLE else _unflatten(below, leaves_)
        for below in spec.children
    ]
    return tuple(values) if spec.kind is tuple else _NODES[spec.kind].build(values, spec.context)


def leaves(tree: Tree) -> list[Any]:
    """All leaves, in the order of :func:`flatten`."""
    return flatten(tree)[0]


@functools.lru_cache(_SPECS_KEPT)
def places(spec: Spec, kind: type) -> tuple[int, ...]:
    """Numbers of the leaves that lie in nodes of one kind."""
    if spec.kind is kind:
        return tuple(range(spec.num_leaves))
    ends = itertools.accumulate(child.num_leaves for child in spec.children)
    return tuple([end - child.num_leaves + i for child, end in zip(spec.children, ends) for i in places(child, kind)])


def items(tree: Tree) -> list[tuple[str, Any]]:
    """``(path, leaf)`` pairs; a path joins attribute names, indices and dictionary keys with dots."""
    node = _NODES.get(type(tree))
    if node is None:
        return [("", tree)]
    found = []
    for key, child in zip(node.keys(tree), node.children(tree), strict=True):
        found += [(f"{key}.{path}" if path else str(key), leaf_) for path, leaf_ in items(child)]
    return found


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``fn`` of the corresponding leaves of one or several trees of equal structure (ValueError otherwise)."""
    first, spec = flatten(tree)
    others = []
    for other in rest:
        found, other_spec = flatten(other)
        if other_spec != spec:
            raise ValueError(
                f"tree.map: structures differ: {_brief(tree)} with {len(first)} leaves and {_brief(other)}"
            )
        others.append(found)
    return unflatten([fn(*each) for each in zip(first, *others, strict=True)], spec)


def map_with_path(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Like :func:`map`, with ``fn(path, leaf)``."""
    return unflatten([fn(path, value) for path, value in items(tree)], flatten(tree)[1])


def any(tree: Tree) -> bool:
    """True if any leaf is true: "does anything in here need a gradient?" """
    return tree if tree is True or tree is False else True in leaves(tree)


def nbytes(tree: Tree) -> int:
    """Bytes of all tensors in a tree (a tensor that occurs twice counts twice)."""
    return sum(t.numel() * t.element_size() for t in leaves(tree) if isinstance(t, Tensor))


def partition(tree: Tree, keep: Callable[[str, Any], bool]) -> tuple[Tree, Tree]:
    """Two trees of the same nodes: leaves for which ``keep(path, leaf)`` holds, and the others; holes are ABSENT.

    ``merge(*partition(t, keep))`` is ``t`` again. Equinox's ``partition``, with the path given to the predicate.
    """
    chosen = map_with_path(lambda path, value: bool(keep(path, value)), tree)
    kept = map(lambda take, value: value if take else ABSENT, chosen, tree)
    rest = map(lambda take, value: ABSENT if take else value, chosen, tree)
    return kept, rest


def merge(a: Tree, b: Tree) -> Tree:
    """Fill the holes of ``a`` with what ``b`` has in the same place. Raises ValueError where both or neither fit."""
    if a is ABSENT:
        return b
    if b is ABSENT:
        return a
    node = _NODES.get(type(a))
    if node is None or type(b) is not type(a) or len(node.children(a)) != len(node.children(b)):
        raise ValueError(f"tree.merge: both trees have a value in one place: {_brief(a)} and {_brief(b)}")
    both = zip(node.children(a), node.children(b), strict=True)
    return node.build([merge(x, y) for x, y in both], node.context(a))


def broadcast(prefix: Tree, tree: Tree) -> list[Any]:
    """The leaves of ``prefix`` aligned with the leaves of ``tree``; an ABSENT that stands for a subtree becomes
    ABSENTs."""
    node = _NODES.get(type(tree))
    if node is None:
        return [prefix]
    if prefix is ABSENT:
        return [ABSENT] * len(leaves(tree))
    if type(prefix) is not type(tree) or len(node.children(prefix)) != len(node.children(tree)):
        raise ValueError(f"tree.broadcast: expected {_brief(tree)} or ABSENT, got {_brief(prefix)}")
    both = zip(node.children(prefix), node.children(tree), strict=True)
    return [leaf_ for part, child in both for leaf_ in broadcast(part, child)]


def describe(tree: Tree) -> str:
    """A tree in one short line: tensors as ``bfloat16[576, 576]``, equal neighbours counted, long dicts cut."""
    if isinstance(tree, Tensor):
        return f"{str(tree.dtype).removeprefix('torch.')}{list(tree.shape)}"
    if dataclasses.is_dataclass(tree) and type(tree) in _NODES:
        parts = [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
        return f"{type(tree).__name__}({', '.join(f'{name}={describe(value)}' for name, value in parts)})"
    if isinstance(tree, dict):
        shown = [f"{key!r}: {describe(value)}" for key, value in list(tree.items())[:2]]
        return "{" + ", ".join(shown + [f"... {len(tree)} in all"] * (len(tree) > 2)) + "}"
    if isinstance(tree, (tuple, list)):
        shown = [describe(value) for value in tree]
        if len(shown) > 1 and len(set(shown)) == 1:
            return f"({len(shown)} x {shown[0]})"
        return f"({', '.join(shown)})"
    return repr(tree)


def fields_with_leaves(cls: type) -> Iterator[tuple[str, tuple[str, str, bool, bool]]]:
    """``(field name, (dims, hf, optional, plain))`` of every field declared with :func:`leaf`."""
    for field in dataclasses.fields(cls):
        if "leaf" in field.metadata:
            yield field.name, field.metadata["leaf"]


def _brief(tree: Tree) -> str:
    return f"Tensor{tuple(tree.shape)}" if isinstance(tree, Tensor) else type(tree).__name__
