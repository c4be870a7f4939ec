"""Prepared calls: a function of an op's pair works out once per kind of arguments what it allocates and launches.

The contract of an op leaves nothing to chance: which tensors it allocates and which kernels it launches, on which
grids, with which integers, follows from its statics and from shapes, strides, dtypes, device and alignment of its
arguments. So checks, launch tables and the search for a compiled kernel give the same again, at every step of training.
Of a function under :func:`prepared` the second call with such a *kind* of arguments is watched; from the third on its
allocations and launches are made without running it: a dictionary, ``torch.empty_strided`` and Triton's launcher.

It is what a CUDA graph is for a stream, made for the host alone: addresses are those of the call, memory is allocated
anew, and streams, captures, autograd and the allocator see what they would see otherwise. What cannot be prepared runs
as ever: a function that asks PyTorch for more than new memory and views, a kernel that takes a view beginning elsewhere
than an argument, arguments that are fake or of a subclass or that share memory. What this saves is in perf/LOG.md."""

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from . import device, tree
from .tree import ABSENT, Tree

_F = TypeVar("_F", bound=Callable[..., Any])
_KINDS_KEPT = 4096  # per function; a run of a model has a few
_CONSTANTS = (ABSENT, None)
_SEEN, _NEVER = object(), object()
_known: list[dict[Any, Any]] = []  # of each function, by kind: a _Prepared, _SEEN or _NEVER


class _Prepared:
    """What one kind of call does: ``make`` new tensors, ``launch``, take ``views``, ``pick`` the result out of all."""

    __slots__ = ("index", "launches", "makes", "pick", "views")

    def __init__(
        self, index: int, makes: list[Any], views: list[Any], launches: list[Any], pick: Callable[[Any], Any]
    ) -> None:
        self.index, self.makes, self.views, self.launches, self.pick = index, makes, views, launches, pick

    def __call__(self, given: Sequence[Any]) -> Any:
        pool = (*given, *[make() for make in self.makes], *_CONSTANTS)
        for launch in self.launches:
            launch(pool)
        if self.views:
            pool += tuple([pool[i].as_strided(*form) for i, *form in self.views])
        return self.pick(pool)


def prepared(f: _F) -> _F:
    """``f(*args, needs, **statics)``, forward or backward of an op, with all that is said at the head of this file.

    ``f`` may depend on nothing but what is said there; statics must be hashable."""
    kinds: dict[Any, Any] = {}
    _known.append(kinds)

    @functools.wraps(f)
    def call(*args: Any, needs: Any, **statics: Any) -> Any:
        given: list[Any] = []  # tensors, and nodes such as weights
        kind: list[Any] = [*statics.items()]
        left = [needs, *args[::-1]]
        while left:
            t = left.pop()
            what = t.__class__
            if what is Tensor or what is Parameter:
                given.append(t)
                kind += (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15)
            elif what is bool or t is ABSENT or t is None:
                kind.append(t)
            elif what is tuple:
                kind.append(len(t))
                left += t[::-1]
            elif (node := tree.opened(t)) is not None:
                given.append(t)
                kind += (what, node[1])
                left += node[0][::-1]
            else:
                return f(*args, needs=needs, **statics)
        key = tuple(kind)
        found: Any = kinds.get(key)
        if found.__class__ is _Prepared and device.straight(found.index):
            return found(given)
        if found is _SEEN:
            result, kinds[key] = _watched(f, args, given, needs, statics)
            return result
        if found is None and all(device.launches(t) for t in given if isinstance(t, Tensor)):
            if len(kinds) >= _KINDS_KEPT:
                kinds.clear()
            kinds[key] = _SEEN
        return f(*args, needs=needs, **statics)

    return call  # type: ignore[return-value]


def forget() -> None:
    """Work everything out anew: after something has changed that launches depend on and never change in a run."""
    for kinds in _known:
        kinds.clear()


_aten = torch.ops.aten
_NEW = {  # what makes new tensors, and what makes them again
    **dict.fromkeys((_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default), torch.empty),
    **dict.fromkeys((_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default), torch.zeros),
    **dict.fromkeys((_aten.ones.default, _aten.ones_like.default, _aten.new_ones.default), torch.ones),
}


class _Watch(TorchDispatchMode):
    """Notes the tensors that are made inside, and whether PyTorch is asked for anything else than memory and views."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.by: list[Callable[..., Tensor]] = []
        self.more = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _NEW and out.is_contiguous():
            self.made.append(out)
            self.by.append(_NEW[func])
        elif not func.is_view:
            self.more = True
        return out


def _watched(f: Any, args: Any, given: list[Any], needs: Any, statics: Any) -> tuple[Any, Any]:
    """The result of a call, and how to do the same without it, or _NEVER."""
    with _Watch() as watch, device.noting() as launches:
        result = f(*args, needs=needs, **statics)
    pool = [*given, *watch.made, *_CONSTANTS]
    places = {id(value): i for i, value in enumerate(pool)}
    starts = {t.data_ptr(): i for i, t in enumerate(pool) if isinstance(t, Tensor)}
    if watch.more or None in launches or 0 in starts or len(starts) < sum(isinstance(t, Tensor) for t in pool):
        return result, _NEVER
    # Kernels do not see shapes: a view that begins where a tensor does is that tensor.
    for t in [t for _, _, values, _ in launches for t in tree.leaves(values) if isinstance(t, Tensor)]:
        if id(t) not in places and t.data_ptr() in starts:
            places[id(t)] = starts[t.data_ptr()]
    # PyTorch may hand out another object for the same new memory, and what is returned may be a view of it.
    new = {t.untyped_storage()._cdata: i for i, t in enumerate(watch.made, len(given))}
    views = []
    for t in [t for t in tree.leaves(result) if isinstance(t, Tensor) and id(t) not in places]:
        i = new.get(t.untyped_storage()._cdata, -1)
        if i >= 0 and t.dtype == pool[i].dtype:
            places[id(t)] = i
            if (t.shape, t.stride(), t.storage_offset()) != (pool[i].shape, pool[i].stride(), 0):
                places[id(t)] = len(pool) + len(views)
                views.append((i, tuple(t.shape), t.stride(), t.storage_offset()))
    try:
        again = [device.again(kernel, grid, values, options, places) for kernel, grid, values, options in launches]
        pick = _picker(result, places)
    except KeyError:  # a tensor that is none of these, or a kernel that cannot be launched so
        return result, _NEVER
    makes = [
        functools.partial(torch.empty_strided, tuple(t.shape), t.stride(), dtype=t.dtype, device=t.device)
        if by is torch.empty  # which takes longer
        else functools.partial(by, tuple(t.shape), dtype=t.dtype, device=t.device)
        for by, t in zip(watch.by, watch.made, strict=True)
    ]
    index = next(t for t in pool if isinstance(t, Tensor)).get_device()
    return result, _Prepared(index, makes, views, again, pick)


def _picker(value: Tree, places: dict[int, int]) -> Callable[[Any], Any]:
    """``pool -> value``. Raises KeyError for a value that holds anything else."""
    if id(value) in places:
        return itemgetter(places[id(value)])
    if type(value) is not tuple:
        leaves, spec = tree.flatten(value)
        if spec.kind is None:
            raise KeyError(value)
        parts = [_picker(leaf, places) for leaf in leaves]
        return lambda pool: tree.unflatten([part(pool) for part in parts], spec)
    if len(value) > 1 and all(id(v) in places for v in value):
        return itemgetter(*[places[id(v)] for v in value])
    parts = [_picker(v, places) for v in value]
    return lambda pool: tuple([part(pool) for part in parts])
