"""Prepared calls: a function of an op's pair works out once per kind of arguments what it allocates and launches.

The contract of an op leaves nothing to chance: which tensors it allocates, which kernels it launches and which of
PyTorch's operators it calls, on which grids, with which integers, follows from its statics and from shapes, strides,
dtypes, device and alignment of its arguments. So checks, launch tables and the search for a compiled kernel give the
same again, at every step of training. Of a function under :func:`prepared` the second call with such a *kind* of
arguments is watched, and what it did is written down as a Python function of its tensors, such as

    def again(a0, a1, at_a0, at_a1):
        stream = current_stream(0)
        n2 = empty_strided_cuda((8, 64), (64, 1), bfloat16)
        at_n2 = n2.data_ptr()
        run3(1, 1, 1, stream, kernel4, ..., at_a0, at_a1, at_n2, 8, 64)
        return n2

From the third call on that runs instead. It is what a CUDA graph is for a stream, made for the host alone: addresses
are those of the call, memory is allocated anew, and streams, captures, autograd and the allocator see what they would
see otherwise. Which arguments begin at one address is part of their kind (attention gets its segments twice). What
cannot be prepared runs as ever: operators of PyTorch whose result is a number or has no fixed shape; kernels that take
what is neither an argument nor new nor :func:`device.lasting`; arguments that are fake or of a subclass. What this
saves is in perf/LOG.md."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode

from . import device, tree
from .tree import ABSENT, Tree

_F = TypeVar("_F", bound=Callable[..., Any])
_KINDS_KEPT = 4096  # per function; a run of a model has a few
_SMALL, _ALIGNED = 2**19, 512  # bytes: what PyTorch's allocator has a pool of its own for, and where its blocks begin
_SEEN, _NEVER = object(), object()
_apart: ContextVar[bool] = ContextVar("unsloth_core_apart", default=False)
_known: list[dict[Any, Any]] = []  # of each function, by kind: a _Prepared, _SEEN or _NEVER


class _Prepared:
    """What one kind of call does: ``again(*tensors, *their addresses)``, on the device with this index."""

    __slots__ = ("again", "index")

    def __init__(self, index: int, again: Callable[..., Any]) -> None:
        self.index, self.again = index, again


def prepared(f: _F) -> _F:
    """``f(*args, needs, **statics)``, forward or backward of an op (another function has no ``needs``), with all that
    is said at the head of this file.

    ``f`` may depend on nothing but what is said there; statics must be hashable. The result has ``leafwise``, for
    callers who have the leaves in their hands and want others: see :func:`_leafwise`."""
    leafwise = _leafwise()

    def plain(args: Any, needs: Any, statics: dict[str, Any]) -> Any:
        return f(*args, **statics) if needs is ABSENT else f(*args, needs=needs, **statics)

    @functools.wraps(f)
    def call(*args: Any, needs: Any = ABSENT, **statics: Any) -> Any:
        leaves, spec = tree.flatten(args)
        wanted, form = ((), None) if needs is ABSENT else tree.flatten(needs)
        return leafwise(leaves, (spec, *wanted, form, *statics.items()), plain, args, needs, statics)

    call.leafwise = _leafwise()  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


def _leafwise() -> Callable[..., Any]:
    """``(leaves, identity, plain, *about) -> plain(*about)``, which is the same for all leaves of one kind.

    ``identity``: a tuple of what else tells calls apart. ``plain`` may return any tree of tensors that it was given or
    made, and of constants."""
    kinds: dict[Any, Any] = {}
    _known.append(kinds)

    def leafwise(leaves: Sequence[Any], identity: tuple[Any, ...], plain: Callable[..., Any], *about: Any) -> Any:
        kind = [_apart.get(), *identity]
        addresses = []
        for t in leaves:
            if t.__class__ is not Tensor and t.__class__ is not Parameter:
                return plain(*about)
            address = t.data_ptr()
            addresses.append(address)
            kind += (t.shape, t.stride(), t.dtype, t.device, address & 15)
        if len({*addresses}) < len(addresses):
            kind += map(addresses.index, addresses)
        key = tuple(kind)
        found: Any = kinds.get(key)
        if found.__class__ is _Prepared and device.straight(found.index):
            return found.again(*leaves, *addresses)
        if device.noted() is not None:  # somebody else is watching
            return plain(*about)
        if found is _SEEN:
            result, kinds[key] = _watched(leaves, plain, about)
            return result
        if found is None and 0 not in addresses and all(device.launches(t) for t in leaves):
            if len(kinds) >= _KINDS_KEPT:
                kinds.clear()
            kinds[key] = _SEEN
        return plain(*about)

    return leafwise


@contextlib.contextmanager
def apart(yes: bool) -> Iterator[None]:
    """Where functions may depend on more than arguments, and say so (:func:`device.beyond_arguments`): calls inside are
    of other kinds than those outside."""
    token = _apart.set(yes)
    try:
        yield
    finally:
        _apart.reset(token)


def forget() -> None:
    """Work everything out anew: after something has changed that launches depend on and never change in a run."""
    for kinds in _known:
        kinds.clear()


# ------------------------------------------------------------------------------------------------ watching and writing


_aten = torch.ops.aten
_NEW = {  # what makes new tensors, and what makes them again
    **dict.fromkeys((_aten.empty.memory_format, _aten.empty_like.default, _aten.new_empty.default), torch.empty),
    **dict.fromkeys((_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default), torch.zeros),
    **dict.fromkeys((_aten.ones.default, _aten.ones_like.default, _aten.new_ones.default), torch.ones),
}
# What code of PyTorch's compiler allocates with, on the current device: half the time, and nothing is ever filled in.
_GUARDS: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_DIRECT = {kind: getattr(_GUARDS, f"_empty_strided_{kind}", None) for kind in ("cuda", "cpu")}
_BY_NUMBERS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Watch(TorchDispatchMode):
    """Notes every operator of PyTorch but views as ``(operator, args, keywords, result)``, None where one's result
    depends on numbers."""

    def __init__(self, noted: list[Any]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            fixed = not _BY_NUMBERS.intersection(func.tags) and all(isinstance(t, Tensor) for t in _tensors(out))
            self.noted.append((func, args, kwargs or {}, out) if fixed else None)
        return out


def _tensors(out: Any) -> Sequence[Any]:
    return out if isinstance(out, tuple | list) else (out,)


def _watched(leaves: Sequence[Tensor], plain: Callable[..., Any], about: Any) -> tuple[Any, Any]:
    """The result of a call, and how to do the same without it, or _NEVER."""
    with device.noting() as noted, _Watch(noted):
        result = plain(*about)
    writer = _Writer(leaves)
    try:
        for step in noted:
            writer.add(step)
        return result, _Prepared(writer.index, writer.finish(result))
    except KeyError:
        return result, _NEVER


class _Writer:
    """Writes a function of tensors line by line; raises KeyError for a tensor that it does not know where to find."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self.where = max(leaves, key=Tensor.get_device).device
        self.index = -1 if self.where.index is None else self.where.index
        self.held: list[Any] = []  # so that no identity is given out twice
        self.names: dict[int, str] = {}  # what tensors are called, by identity
        self.roots: dict[int, list[Tensor]] = {}  # arguments and new tensors, by their memory
        self.new: set[int] = set()  # memory that came into being here
        self.steps: list[list[str]] = []  # lines
        self.scratch: dict[str, tuple[int, int]] = {}  # what only kernels have seen so far: its step, its bytes
        self.large: dict[str, list[str]] = {}  # new tensors whose memory is to be given back early, and views of them
        self.last: dict[str, int] = {}  # the step that needed one last
        self.values: dict[str, Any] = {"current_stream": device.current_stream}
        names = [f"a{i}" for i in range(len(leaves))]
        for t, name in zip(leaves, names, strict=True):
            self._call(t, name)
        self.head = f"def again({', '.join([*names, *[f'at_{name}' for name in names]])}):"

    def add(self, step: Any) -> None:
        """One step of what was noted."""
        if step is None:
            raise KeyError(step)
        self.steps.append([])
        if isinstance(step, device.Launch):
            self._add_launch(step)
        else:
            self._add_operator(*step)

    def finish(self, result: Any) -> Callable[..., Any]:
        """The function, which returns what ``result`` is."""
        self.steps.append([])
        self.steps[-1].append(f"return {self._result(result)}")
        self._share()
        for name, also in self.large.items():
            if self.last[name] < len(self.steps) - 1:
                self.steps[self.last[name]].append(f"del {', '.join([name, *also])}")
        lines = [self.head, f"stream = current_stream({self.index})", *itertools.chain(*self.steps)]
        exec("\n    ".join(lines), self.values)  # nothing but what is here
        return self.values["again"]

    def _share(self) -> None:
        """One allocation for all that is small and seen by kernels alone."""
        small = [(name, *of) for name, of in self.scratch.items() if name not in self.large]
        if len(small) < 2:
            return
        size = 0
        for name, step, nbytes in small:
            self.steps[step] = [f"at_{name} = shared + {size}"]
            size += -(-nbytes // _ALIGNED) * _ALIGNED
        memory = self._empty((size,), (1,), torch.uint8)
        self.steps[small[0][1]][:0] = [f"memory = {memory}", "shared = memory.data_ptr()"]

    def _call(self, t: Tensor, name: str) -> None:
        self.held.append(t)
        if id(t) not in self.names:
            self.names[id(t)] = name
            self.roots.setdefault(t.untyped_storage()._cdata, []).append(t)

    def _call_new(self, t: Tensor, name: str) -> None:
        self._call(t, name)
        self.new.add(t.untyped_storage()._cdata)
        self.steps[-1].append(f"at_{name} = {name}.data_ptr()")
        if t.nbytes > _SMALL:
            self.large[name], self.last[name] = [], len(self.steps) - 1

    def _empty(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> str:
        """New memory. (``torch.empty`` takes longer.)"""
        direct, of = _DIRECT.get(self.where.type), self._value(dtype, "c")
        if direct is not None and not _filled():
            return f"{self._value(direct, 'empty')}({shape}, {strides}, {of})"
        made = self._value(torch.empty_strided, "empty_strided")
        return f"{made}({shape}, {strides}, dtype={of}, device={self._value(self.where, 'c')})"

    def _add_launch(self, step: device.Launch) -> None:
        function, words = device.again(step)
        for word in words:
            if isinstance(word, device.Memory):
                self._add_new(torch.empty, torch.empty(word.bytes, dtype=torch.uint8, device=self.where))
                words = tuple([device.Address(self.held[-1]) if w is word else w for w in words])
                self.steps.append([])
        self.steps[-1].append(f"{self._value(function, 'run')}({', '.join(self._word(word) for word in words)})")

    def _word(self, word: Any) -> str:
        """An argument of a launch. Kernels do not see shapes: a tensor is its address, if ``device.again`` says so."""
        if isinstance(word, device.Address):
            if _lasts(word.of):
                return repr(word.of.data_ptr())
            root, distance = self._root(word.of)
            return f"at_{self.names[id(root)]}" + (f" + {distance}" if distance else "")
        if isinstance(word, device.Descriptor):
            return f"{self._value(word.again, 'descriptor')}({self._tensor(word.of)})"
        if isinstance(word, Tensor):
            if id(word) in self.names or _lasts(word):
                return self._tensor(word)
            root, distance = self._root(word)
            form = distance, word.dtype, word.shape, word.stride()
            return f"{self._value(functools.partial(_seen_as, *form), 'view')}({self._tensor(root)})"
        if word is device.STREAM:
            return "stream"
        if word.__class__ is tuple:
            return f"({''.join(self._word(part) + ', ' for part in word)})"
        return self._value(word, "c")

    def _root(self, t: Tensor) -> tuple[Tensor, int]:
        """The argument or new tensor in whose memory ``t`` lies, and how many bytes behind its begin."""
        known = self.roots.get(t.untyped_storage()._cdata, [])
        at = [root for root in known if root.data_ptr() == t.data_ptr()] or known
        if len(at) != 1 and at is known:  # in the memory of which of them?
            raise KeyError(t)
        self.last[self.names[id(at[0])]] = len(self.steps) - 1
        return at[0], t.data_ptr() - at[0].data_ptr()

    def _tensor(self, t: Tensor) -> str:
        """A tensor as PyTorch sees it."""
        if _lasts(t):
            return self._value(t, "lasting")
        root, distance = self._root(t)
        self.scratch.pop(self.names[id(root)], None)
        if id(t) in self.names:
            return self.names[id(t)]
        if t.dtype != root.dtype:
            raise KeyError(t)
        of = self.names[id(root)]
        self.held.append(t)
        if (t.shape, t.stride(), distance) == (root.shape, root.stride(), 0):  # another object for the same
            self.names[id(t)] = of
            return of
        self.names[id(t)] = name = f"v{len(self.names)}"
        offset = f", {of}.storage_offset() + {distance // t.itemsize}" if distance else ""
        self.steps[-1].append(f"{name} = {of}.as_strided({(*t.shape,)}, {t.stride()}{offset})")
        self.large.get(of, []).append(name)
        return name

    def _add_operator(self, func: Any, args: Any, keywords: Any, out: Any) -> None:
        if func in _NEW and out.is_contiguous() and out.device == self.where:
            self._add_new(_NEW[func], out)
            return
        given = [self._argument(a) for a in args]
        given += [f"{name}={self._argument(a)}" for name, a in keywords.items()]
        called = f"{self._value(func, 'aten')}({', '.join(given)})"
        outs = _tensors(out)
        fresh = [id(t) not in self.names for t in outs]
        names = [f"n{len(self.names) + i}" if new else "_" for i, new in enumerate(fresh)]
        target = ", ".join(names) + ("," if isinstance(out, tuple | list) else "")
        self.steps[-1].append(f"{target} = {called}" if any(fresh) else called)
        for t, name, new in zip(outs, names, fresh, strict=True):
            if new:
                self._call_new(t, name)

    def _add_new(self, make: Any, t: Tensor) -> None:
        name = f"n{len(self.names)}"
        if make is torch.empty:
            made = self._empty((*t.shape,), t.stride(), t.dtype)
            self.scratch[name] = len(self.steps) - 1, t.nbytes
        else:
            form = f"dtype={self._value(t.dtype, 'c')}, device={self._value(self.where, 'c')}"
            made = f"{self._value(make, 'make')}({(*t.shape,)}, {form})"
        self.steps[-1].append(f"{name} = {made}")
        self._call_new(t, name)

    def _argument(self, a: Any) -> str:
        """Of an operator."""
        if isinstance(a, Tensor):
            return self._tensor(a)
        if isinstance(a, list | tuple):
            return f"[{', '.join(self._argument(part) for part in a)}]"
        return self._value(a, "c")

    def _result(self, value: Tree) -> str:
        if isinstance(value, Tensor):
            if id(value) not in self.names and value.untyped_storage()._cdata not in self.new:
                raise KeyError(value)  # a view of an argument, which an op does not return
            return self._tensor(value)
        if value.__class__ is tuple:
            return f"({''.join(self._result(part) + ', ' for part in value)})"
        if value.__class__ is list:
            return f"[{', '.join(self._result(part) for part in value)}]"
        if tree.opened(value) is None:
            return self._value(value, "c")
        leaves, spec = tree.flatten(value)
        if not leaves:
            return self._value(value, "c")
        parts = self._result(tuple(leaves))
        return f"{self._value(tree.unflatten, 'unflatten')}({parts}, {self._value(spec, 'c')})"

    def _value(self, value: Any, name: str) -> str:
        """A constant, as it is written or by a name."""
        if value is None or value.__class__ in (int, bool):
            return repr(value)
        for known, other in self.values.items():
            if other is value:
                return known
        name = f"{name}{len(self.values)}"
        self.values[name] = value
        return name


def _filled() -> bool:
    """Whether PyTorch is asked to fill what it allocates."""
    return getattr(deterministic, "fill_uninitialized_memory", True) and torch.are_deterministic_algorithms_enabled()


def _lasts(t: Tensor) -> bool:
    """Whether ``t`` is a lasting tensor or a view of one."""
    memory = t.untyped_storage()._cdata
    return any(memory == lasting.untyped_storage()._cdata for lasting in device.LASTING.values())


def _seen_as(distance: int, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...], root: Tensor) -> Tensor:
    """What lies in the memory of ``root``, so many bytes behind its begin."""
    begin = root.storage_offset() * root.itemsize + distance
    view = torch.empty(0, dtype=dtype, device=root.device)
    return view.set_(root.untyped_storage(), begin // dtype.itemsize, shape, strides)
