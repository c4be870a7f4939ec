"""Weights as values: the nodes that ``linear`` can multiply by, and the one declaration that loading, saving, LoRA and
byte counts follow from. Shapes and names only; no arithmetic.

A weight is ``Tensor | NF4 | Stacked | Adapted``. A model's weights are a dataclass of leaves declared with
:func:`unsloth_core.tree.leaf` and blocks declared with :func:`blocks`; :func:`declarations` expands both into names and
shapes.
"""

import dataclasses
import functools
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
    """A (M, C) matrix, or one of every expert (E, M, C), in 4 bits, laid out as bitsandbytes does (QLoRA, arXiv
    2305.14314).

    ``codes``: uint8 (M·C/2,), even element in the high nibble. ``absmax``: one per ``block`` elements of the flat
    matrix, fp32, or uint8 when ``nested``. ``dtype`` is what it decodes to.
    """

    codes: Tensor
    absmax: Tensor
    nested: Nested | Any = ABSENT
    shape: tuple[int, ...] = static()
    dtype: torch.dtype = static()
    block: int = static(64)


@pytree
class Stacked:
    """Parts that share an input and stand below each other, when they cannot be one tensor (mixed or NF4 parts)."""

    parts: tuple[Tensor | NF4, ...]


@pytree
class LoRA:
    """A low-rank update ``scale · b @ a`` (arXiv 2106.09685); ``a`` (rank, C) and ``b`` (M, rank) are fp32 leaves.

    Of experts: ``a`` (E, rank, C) and ``b`` (E, M, rank), one update for each.
    """

    a: Tensor
    b: Tensor
    scale: float = static()


@pytree
class Adapted:
    """A frozen base with one ``LoRA | ABSENT`` per declared part; part i owns ``rows[i]`` rows of the base.

    ``key`` (parts, 2): each adapter's input is dropped out with probability ``dropout`` and its own key of
    :mod:`.random`. Empty (which torch.compile can trace, unlike ABSENT): nothing is.
    """

    base: Tensor | NF4 | Stacked
    parts: tuple[Any, ...]
    key: Tensor | tuple[()] = ()
    rows: tuple[int, ...] = static()
    dropout: float = static(0.0)


Weight = Tensor | NF4 | Stacked | Adapted
Head = Tensor | NF4  # what the losses that make their own logits multiply by


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

    The stacked leaf has shape ``(sum(rows), *rest)``; part i is ``names[i]`` with shape ``(rows[i], *rest)``. A leaf of
    experts has the parts of one expert after those of the other, and shape ``(experts, rows of one, *rest)``.
    """

    path: Path
    names: tuple[str, ...]
    rows: tuple[int, ...]
    rest: tuple[int, ...]
    optional: bool
    plain: bool = False
    experts: int = 0  # 0: a leaf without {e}
    per_expert: tuple[str, ...] = ()  # names of one expert's parts, its number still {e}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stacked leaf."""
        if self.experts:
            return (self.experts, sum(self.rows) // self.experts, *self.rest)
        return (sum(self.rows), *self.rest)

    @property
    def linear(self) -> bool:
        """Whether a layer multiplies by it, so that it may be quantised and adapted."""
        return len(self.path) > 1 and bool(self.rest) and not self.plain

    @functools.cached_property  # every training step asks
    def modules(self) -> dict[str, int]:
        """What an adapter may sit on: module path (of experts one for all, with {e}) and rows."""
        names = self.per_expert or self.names
        return {name.removesuffix(".weight"): rows for name, rows in zip(names, self.rows[: len(names)], strict=True)}


def declarations(cls: type, dims: Mapping[str, int]) -> list[Declaration]:
    """Every leaf of a weights class, with the letters of its declaration replaced by ``dims``."""
    return list(_declarations(cls, tuple(dims.items())))


@functools.lru_cache(64)  # a model has thousands of names, and every training step asks for them
def _declarations(cls: type, items: tuple[tuple[str, int], ...]) -> tuple[Declaration, ...]:
    dims, found = dict(items), []
    for field in dataclasses.fields(cls):
        if "blocks" in field.metadata:
            block, hf, count = field.metadata["blocks"]
            for i in range(dims[count]):
                prefix = hf.replace("{i}", str(i))
                for inner in declarations(block, dims):
                    names, per_expert = (tuple(prefix + n for n in some) for some in (inner.names, inner.per_expert))
                    path = (field.name, i, *inner.path)
                    found.append(dataclasses.replace(inner, path=path, names=names, per_expert=per_expert))
    for name, (letters, hf, optional, plain) in fields_with_leaves(cls):
        found.append(_declaration(name, letters.split(), _names(hf), dims, optional, plain))
    return tuple(found)


def declared_leaves(cls: type, config: Any) -> list[Declaration]:
    """What a checkpoint of this config holds; ``config.has`` names the optional leaves of a layer (None: see there),
    or, where layers differ, those of each."""
    declared = declarations(cls, config.dims)
    if config.has is None:
        return declared
    has = config.has if isinstance(config.has, tuple) else (config.has,) * config.num_hidden_layers
    in_layers = [d for d in declared if len(d.path) > 1 and (not d.optional or d.path[-1] in has[int(d.path[1])])]
    return [d for d in declared if len(d.path) == 1] + [dataclasses.replace(d, optional=False) for d in in_layers]


def build(cls: type, dims: Mapping[str, int], make: Callable[[Declaration], Any], **statics: Any) -> Any:
    """An instance of a weights class whose leaves are ``make(declaration)`` (ABSENT for a missing optional one)."""
    return _build(cls, dims, {d.path: make(d) for d in declarations(cls, dims)}, statics)


def get(tree: Tree, path: Path) -> Any:
    """The node at a path of attribute names and indices."""
    for key in path:
        tree = tree[key] if isinstance(key, int) else getattr(tree, key)
    return tree


def replace(tree: Tree, values: Mapping[Path, Any]) -> Tree:
    """A copy of a weights tree with other nodes at the given paths; everything else is the same object.

    Raises ValueError for an index outside a tuple."""
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
    """The parts of a weight as views (dense) or nodes; an adapted weight gives its base's parts.

    ``rows`` are a declaration's. NF4 experts are one node, which has to be decoded to be split:
    ValueError.
    """
    if isinstance(w, Adapted):
        return split_parts(w.base, rows)
    if isinstance(w, Stacked):
        return list(w.parts)
    if isinstance(w, Tensor):
        return list((w.flatten(0, 1) if w.ndim == 3 else w).split(rows))
    if len(rows) > 1:
        raise ValueError(f"split_parts: an NF4 of shape {w.shape} is one node, expected one of {len(rows)} parts")
    return [w]


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


def _declaration(
    name: str, letters: list[str], names: tuple[str, ...], dims: Mapping[str, int], optional: bool, plain: bool
) -> Declaration:
    """One field. With {e} in its names the first letter counts experts, and every other thing is one expert's."""
    experts = 0
    if of_experts := "{e}" in names[0]:
        experts = _size(letters[0], dims)
        letters = letters[1:]
    rows = _rows(letters[0], dims, len(names))
    rest = tuple(_size(term, dims) for term in letters[1:])
    per_expert = names if of_experts else ()
    if of_experts:
        names = tuple(name.replace("{e}", str(e)) for e in range(experts) for name in per_expert)
        rows *= experts
    return Declaration((name,), names, rows, rest, optional, plain, experts, per_expert)


def _names(hf: str) -> tuple[str, ...]:
    """``a.{q,k}_proj`` is ``a.q_proj`` and ``a.k_proj``; {e}, an expert's number, stays."""
    match = re.search(r"\{((?!e\})[a-z0-9_,]+)\}", hf)
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
