"""Trees of tensors: parameters, gradients, optimizer states and batches are all the same kind of value.

A tree is a tensor, a tuple, a list, a dict, or a frozen dataclass made with :func:`pytree`. Absence is
:data:`ABSENT`, a node with no leaves; ``None`` never sits in a tree. This is the only file that knows PyTorch's
pytree registry, so trees made here are understood by ``torch.compile``, ``torch.export`` and friends too. The idea
is JAX's, the dataclass form Equinox's."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, dataclass_transform

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


def leaf(dims: str, hf: str, *, optional: bool = False) -> Any:
    """A weight, declared once: its dimensions and its name(s) in a checkpoint.

    ``leaf("Q+2R D", "self_attn.{q,k,v}_proj.weight")`` is three parts of Q, R and R rows stored stacked. An
    optional leaf may be missing from a checkpoint (a bias, a tied head) and is ABSENT then. Read by
    :mod:`unsloth_core.weights`."""
    metadata = {"leaf": (dims, hf, optional)}
    if optional:
        return dataclasses.field(default=ABSENT, metadata=metadata)
    return dataclasses.field(metadata=metadata)


@dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False, field_specifiers=(static, leaf))
def pytree(cls: type[_T]) -> type[_T]:
    """Class decorator: a frozen, keyword-only dataclass whose non-static fields are children of a tree."""
    cls = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    children = [f.name for f in fields if not f.metadata.get("static")]
    statics = [f.name for f in fields if f.metadata.get("static")]

    def to_children(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(node, name) for name in children], tuple(getattr(node, name) for name in statics)

    def to_keyed_children(node: Any) -> tuple[list[Any], tuple[Any, ...]]:
        values, context = to_children(node)
        return [(pt.GetAttrKey(name), value) for name, value in zip(children, values, strict=True)], context

    def from_children(values: Any, context: tuple[Any, ...]) -> Any:
        # Not cls(...): a tree of booleans, gradients or holes has the same shape and none of the validation.
        node = object.__new__(cls)
        for name, value in zip(children + statics, (*values, *context), strict=True):
            object.__setattr__(node, name, value)
        return node

    pt.register_pytree_node(
        cls,
        to_children,
        from_children,
        flatten_with_keys_fn=to_keyed_children,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )
    return cls


def flatten(tree: Tree) -> tuple[list[Any], pt.TreeSpec]:
    """The leaves in a fixed order, and the structure that :func:`unflatten` puts them back into."""
    return pt.tree_flatten(tree)


def unflatten(leaves_: list[Any], spec: pt.TreeSpec) -> Tree:
    """The inverse of :func:`flatten`."""
    return pt.tree_unflatten(leaves_, spec)


def leaves(tree: Tree) -> list[Any]:
    """All leaves, in the order of :func:`flatten`."""
    return pt.tree_leaves(tree)


def items(tree: Tree) -> list[tuple[str, Any]]:
    """``(path, leaf)`` pairs; a path joins attribute names, indices and dictionary keys with dots."""
    return [(_path(keys), value) for keys, value in pt.tree_flatten_with_path(tree)[0]]


def map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``fn`` of the corresponding leaves of one or several trees of equal structure."""
    return pt.tree_map(fn, tree, *rest)


def map_with_path(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Like :func:`map`, with ``fn(path, leaf)``."""
    return pt.tree_map_with_path(lambda keys, value: fn(_path(keys), value), tree)


def any(tree: Tree) -> bool:
    """True if any leaf is true: "does anything in here need a gradient?" """
    if tree is True or tree is False:
        return tree
    return True in pt.tree_leaves(tree)


def nbytes(tree: Tree) -> int:
    """Bytes of all tensors in a tree (a tensor that occurs twice counts twice)."""
    return sum(t.numel() * t.element_size() for t in leaves(tree) if isinstance(t, Tensor))


def partition(tree: Tree, keep: Callable[[str, Any], bool]) -> tuple[Tree, Tree]:
    """Two trees of the same nodes: leaves for which ``keep(path, leaf)`` holds, and the others; holes are ABSENT.

    ``merge(*partition(t, keep))`` is ``t`` again. Equinox's ``partition``, with the path given to the predicate.
    """
    chosen = map_with_path(lambda path, value: bool(keep(path, value)), tree)
    kept = pt.tree_map(lambda take, value: value if take else ABSENT, chosen, tree)
    rest = pt.tree_map(lambda take, value: ABSENT if take else value, chosen, tree)
    return kept, rest


def merge(a: Tree, b: Tree) -> Tree:
    """Fill the holes of ``a`` with what ``b`` has in the same place. Raises ValueError where both or neither fit."""
    if a is ABSENT:
        return b
    if b is ABSENT:
        return a
    children_a, spec_a = _one_level(a)
    children_b, spec_b = _one_level(b)
    if spec_a.is_leaf() or spec_b.is_leaf() or spec_a.type is not spec_b.type or len(children_a) != len(children_b):
        raise ValueError(f"tree.merge: both trees have a value in one place: {_brief(a)} and {_brief(b)}")
    return pt.tree_unflatten([merge(x, y) for x, y in zip(children_a, children_b, strict=True)], spec_a)


def broadcast(prefix: Tree, tree: Tree) -> list[Any]:
    """The leaves of ``prefix`` aligned with the leaves of ``tree``; an ABSENT that stands for a subtree becomes
    ABSENTs."""
    if prefix is ABSENT:
        return [ABSENT] * len(pt.tree_leaves(tree))
    children, spec = _one_level(tree)
    if spec.is_leaf():
        return [prefix]
    parts, prefix_spec = _one_level(prefix)
    if prefix_spec.type is not spec.type or len(parts) != len(children):
        raise ValueError(f"tree.broadcast: expected {_brief(tree)} or ABSENT, got {_brief(prefix)}")
    return list(itertools.chain.from_iterable(broadcast(p, c) for p, c in zip(parts, children, strict=True)))


def fields_with_leaves(cls: type) -> Iterator[tuple[str, tuple[str, str, bool]]]:
    """``(field name, (dims, hf, optional))`` of every field declared with :func:`leaf`."""
    for field in dataclasses.fields(cls):
        if "leaf" in field.metadata:
            yield field.name, field.metadata["leaf"]


def _one_level(tree: Tree) -> tuple[list[Any], pt.TreeSpec]:
    return pt.tree_flatten(tree, is_leaf=lambda node: node is not tree)


def _brief(tree: Tree) -> str:
    return f"Tensor{tuple(tree.shape)}" if isinstance(tree, Tensor) else type(tree).__name__


def _path(keys: tuple[Any, ...]) -> str:
    # GetAttrKey has .name, MappingKey .key, SequenceKey .idx
    return ".".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in keys)
