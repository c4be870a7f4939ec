"""Weights as values: the nodes that ``linear`` can multiply by, and the one declaration that loading, saving, LoRA and
byte counts follow from. Shapes and names only; no arithmetic.

A weight is ``Tensor | NF4 | Stacked | Adapted``. A model's weights are a dataclass of leaves declared with
:func:`unsloth_core.tree.leaf` and blocks declared with :func:`blocks`; :func:`declarations` expands both into names and
shapes.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .tree import ABSENT, Tree, fields_with_leaves, pytree, static

Path = tuple[str | int, ...]


@pytree
class Nested:
    """Double quantisation of NF4's absmax: ``code_256[absmax] * absmax_P[block // 256] + offset``, all fp32."""

    absmax_P: Tensor
    code_256: Tensor
    offset: Tensor


@pytree
class NF4:
    """A (M, C) matrix in 4 bits, laid out as bitsandbytes does (QLoRA, arXiv 2305.14314).

    ``codes``: uint8 (M·C/2,), even element in the high nibble. ``absmax``: one per ``block`` elements of the flat
    matrix, fp32, or uint8 when ``nested``. ``dtype`` is what it decodes to.
    """

    codes: Tensor
    absmax: Tensor
    nested: Nested | Any = ABSENT
    shape: tuple[int, int] = static()
    dtype: torch.dtype = static()
    block: int = static(64)


@pytree
class Stacked:
    """Parts that share an input and stand below each other, when they cannot be one tensor (mixed or NF4 parts)."""

    parts: tuple[Tensor | NF4, ...]


@pytree
class LoRA:
    """A low-rank update ``scale · b @ a`` (arXiv 2106.09685); ``a`` (rank, C) and ``b`` (M, rank) are fp32 leaves."""

    a: Tensor
    b: Tensor
    scale: float = static()


@pytree
class Adapted:
    """A frozen base with one ``LoRA | ABSENT`` per declared part; part i owns ``rows[i]`` rows of the base."""

    base: Tensor | NF4 | Stacked
    parts: tuple[Any, ...]
    rows: tuple[int, ...] = static()


Weight = Tensor | NF4 | Stacked | Adapted


def shape(w: Weight) -> tuple[int, int]:
    """(M, C): rows out, columns in, of any weight node."""
    if isinstance(w, Stacked):
        shapes = [shape(part) for part in w.parts]
        return (sum(rows for rows, _ in shapes), shapes[0][1])
    if isinstance(w, Adapted):
        return shape(w.base)
    return tuple(w.shape)  # type: ignore[return-value]


def blocks(cls: type, hf: str, count: str = "L") -> Any:
    """A tuple of equal blocks, as many as dimension ``count`` says: ``layers = blocks(Layer, "model.layers.{i}.")``."""
    return dataclasses.field(metadata={"blocks": (cls, hf, count)})


@dataclasses.dataclass(frozen=True)
class Declaration:
    """One leaf of a model: where it sits in the tree, the checkpoint names of its parts, and their rows.

    The stacked leaf has shape ``(sum(rows), *rest)``; part i is ``names[i]`` with shape ``(rows[i], *rest)``.
    """

    path: Path
    names: tuple[str, ...]
    rows: tuple[int, ...]
    rest: tuple[int, ...]
    optional: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stacked leaf."""
        return (sum(self.rows), *self.rest)


def declarations(cls: type, dims: Mapping[str, int]) -> list[Declaration]:
    """Every leaf of a weights class, with the letters of its declaration replaced by ``dims``."""
    found = []
    for field in dataclasses.fields(cls):
        if "blocks" in field.metadata:
            block, hf, count = field.metadata["blocks"]
            for i in range(dims[count]):
                prefix = hf.replace("{i}", str(i))
                for inner in declarations(block, dims):
                    names = tuple(prefix + name for name in inner.names)
                    found.append(dataclasses.replace(inner, path=(field.name, i, *inner.path), names=names))
    for name, (letters, hf, optional) in fields_with_leaves(cls):
        names = _names(hf)
        first, *rest = letters.split()
        found.append(
            Declaration(
                path=(name,),
                names=names,
                rows=_rows(first, dims, len(names)),
                rest=tuple(_size(term, dims) for term in rest),
                optional=optional,
            )
        )
    return found


def build(cls: type, dims: Mapping[str, int], make: Callable[[Declaration], Any], **statics: Any) -> Any:
    """An instance of a weights class whose leaves are ``make(declaration)`` (ABSENT for a missing optional one)."""
    return _build(cls, dims, {d.path: make(d) for d in declarations(cls, dims)}, statics)


def get(tree: Tree, path: Path) -> Any:
    """The node at a path of attribute names and indices."""
    for key in path:
        tree = tree[key] if isinstance(key, int) else getattr(tree, key)
    return tree


def replace(tree: Tree, values: Mapping[Path, Any]) -> Tree:
    """A copy of a weights tree with other nodes at the given paths; everything else is the same object."""
    by_head: dict[str | int, dict[Path, Any]] = {}
    for path, value in values.items():
        if not path:
            return value
        by_head.setdefault(path[0], {})[path[1:]] = value
    if isinstance(tree, tuple):
        if beyond := [i for i in by_head if not (isinstance(i, int) and 0 <= i < len(tree))]:
            raise ValueError(f"replace: no entry {beyond[0]!r} in a tuple of {len(tree)}")
        return tuple(replace(item, by_head[i]) if i in by_head else item for i, item in enumerate(tree))
    return dataclasses.replace(tree, **{str(h): replace(getattr(tree, str(h)), sub) for h, sub in by_head.items()})


def split_parts(w: Weight, rows: tuple[int, ...]) -> list[Any]:
    """The parts of a weight as views (dense) or nodes; an adapted weight gives its base's parts."""
    if isinstance(w, Adapted):
        return split_parts(w.base, rows)
    if isinstance(w, Stacked):
        return list(w.parts)
    return [w] if len(rows) == 1 else list(w.split(rows))  # type: ignore[union-attr]


def _build(cls: type, dims: Mapping[str, int], values: Mapping[Path, Any], statics: Mapping[str, Any]) -> Any:
    fields: dict[str, Any] = dict(statics)
    for field in dataclasses.fields(cls):
        if "blocks" in field.metadata:
            block, _, count = field.metadata["blocks"]
            below = [{p[2:]: v for p, v in values.items() if p[:2] == (field.name, i)} for i in range(dims[count])]
            fields[field.name] = tuple(_build(block, dims, sub, {}) for sub in below)
        elif "leaf" in field.metadata:
            fields[field.name] = values[(field.name,)]
    return cls(**fields)


def _names(hf: str) -> tuple[str, ...]:
    """``a.{q,k}_proj`` is ``a.q_proj`` and ``a.k_proj``."""
    match = re.search(r"\{([a-z0-9_,]+)\}", hf)
    if match is None:
        return (hf,)
    return tuple(hf[: match.start()] + part + hf[match.end() :] for part in match[1].split(","))


def _rows(letters: str, dims: Mapping[str, int], parts: int) -> tuple[int, ...]:
    """``Q+2R`` over three names is (Q, R, R); over one name it is their sum."""
    rows: list[int] = []
    for term in letters.split("+"):
        count, size = _term(term, dims)
        rows += [size] * count
    if parts == 1:
        return (sum(rows),)
    if len(rows) != parts:
        raise ValueError(f"leaf: {letters!r} has {len(rows)} parts, but its name has {parts}")
    return tuple(rows)


def _size(term: str, dims: Mapping[str, int]) -> int:
    count, size = _term(term, dims)
    return count * size


def _term(term: str, dims: Mapping[str, int]) -> tuple[int, int]:
    """``2F`` is (2, dims["F"])."""
    match = re.fullmatch(r"(\d*)([A-Z])", term)
    if match is None:
        raise ValueError(f"leaf: dimension {term!r}, expected a letter with an optional factor, such as 2F")
    if match[2] not in dims:
        raise ValueError(f"leaf: dimension {term!r}, expected one of the config's letters {sorted(dims)}")
    return int(match[1] or 1), dims[match[2]]
