"""Facts about the device, and the one way kernels are launched."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

# Read once: @triton.jit looks at the same variable when it decorates, so a later change could not take effect anyway.
_INTERPRETING = bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """True when kernels run in Triton's CPU interpreter (the process was started with ``TRITON_INTERPRET=1``)."""
    return _INTERPRETING


# A meta tensor has a shape and no memory: on it ops run as on this GPU, without launching anything (plan.py).
PLANNED_SMS, PLANNED_CAPABILITY = 132, (9, 0)


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def sms(device: torch.device) -> int:
    """Number of streaming multiprocessors; 4 in the interpreter, so that multi-program paths are walked there too."""
    if device.type == "meta":
        return PLANNED_SMS
    return 4 if device.type != "cuda" else _properties(device.index or 0).multi_processor_count


def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability, (9, 0) for Hopper; the interpreter plays an (8, 0)."""
    if device.type == "meta":
        return PLANNED_CAPABILITY
    if device.type != "cuda":
        return (8, 0)
    properties = _properties(device.index or 0)
    return (properties.major, properties.minor)


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. ``triton.cdiv`` is made for kernels and takes microseconds when the host calls it."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def is_fake(t: Tensor) -> bool:
    """True of a tensor with a shape and no memory, as torch.compile and FakeTensorMode pass around."""
    if t.__class__ is Tensor or t.__class__ is Parameter:
        return False
    from torch._subclasses import FakeTensor  # not sooner: slow to import, and seldom needed
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(t, FakeTensor | FunctionalTensor)


def aligned(t: Tensor, to: int) -> bool:
    """Whether ``t`` starts at a multiple of ``to`` bytes; a fake tensor might."""
    return is_fake(t) or t.data_ptr() % to == 0  # of a meta tensor the pointer is 0


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on the device of the first tensor argument; an empty grid launches nothing.

    ``args`` are the kernel's first parameters, in order; ``options`` the others, all constexpr, and Triton's own.
    Triton finds the compiled kernel of a call anew each time, in Python, and its launcher asks every tensor for its
    address and the driver about every address; here dictionaries do, and addresses are passed. What that saves is in
    perf/LOG.md. Backward runs in threads of autograd's engine, where neither the user's current device nor Triton's
    allocator (a context variable, needed by tensor descriptors made on the device) is set: both are set here, at every
    launch. Nothing is launched for fake and meta tensors.
    """
    first = args[0] if args[0].__class__ is Tensor else next(a for a in args if isinstance(a, Tensor))
    if 0 in grid or first.is_meta or is_fake(first):
        return
    if (noted := _noted.get()) is not None:
        noted.append(Launch(kernel, grid, args, options))
    if _INTERPRETING:
        with contextlib.nullcontext() if noted is None else _disable_current_modes():  # it works with tensors itself
            kernel[grid](*args, **options)
        return
    index = first.get_device()
    if index == torch.cuda.current_device():
        _launch(index, kernel, grid, args, options)
    else:
        with torch.cuda.device(index):
            _launch(index, kernel, grid, args, options)


def _launch(index: int, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    runtime = _RUNTIME.get(id(kernel)) or _count_runtime_parameters(kernel)
    values: list[Any] = []
    exact: list[Any] = [index, id(kernel), *options, *options.values(), *args[runtime:]]
    for a in args[:runtime]:
        if a.__class__ is Tensor or a.__class__ is Parameter:
            address = a.data_ptr()
            values.append(address)
            exact += (a.dtype, address & 15)
        else:
            values.append(a)
            exact += (a,) if a is None or a.__class__ is int else _traits((a,))
    call = tuple(exact)
    found = _CALLS.get(call) or _find(call, index, kernel, args, options)
    triton.set_allocator(_allocate)
    if found is None or _profiled():
        compiled = kernel[grid](*args, **options)
        constexprs = tuple(options[name] for name in kernel.arg_names[len(args) :])
        _COMPILED[_key(index, kernel, args, options)] = compiled, constexprs
        return
    compiled, constexprs = found
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(index)
    rest = (*values, *args[runtime:], *constexprs)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *rest)


def _profiled() -> bool:
    """Whether a profiler wants to hear of every launch from Triton."""
    return bool(_KNOBS.launch_enter_hook.calls or _KNOBS.launch_exit_hook.calls)


_TRITON = triton.__version__.rpartition(".")[0]
_KNOBS = triton.knobs.runtime
_Found = tuple[Any, tuple[Any, ...]]  # a compiled kernel, and its constexprs in order
_CALLS: dict[Any, _Found] = {}  # by a call's very integers, and dtype and alignment of its tensors: quick to ask
_COMPILED: dict[Any, _Found] = {}  # by what Triton may compile differently for
_CALLS_KEPT = 10_000
_RUNTIME: dict[int, int] = {}
_noted: ContextVar[list[Any] | None] = ContextVar("unsloth_core_launches", default=None)


class Launch(NamedTuple):
    """One call of :func:`launch`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


@contextlib.contextmanager
def noting() -> Iterator[list[Any]]:
    """A list that receives a :class:`Launch` of every launch inside."""
    noted: list[Any] = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


def noted() -> list[Any] | None:
    """The list of whoever is :func:`noting`."""
    return _noted.get()


def launches(where: Tensor) -> bool:
    """Whether kernels run on this tensor's device."""
    return where.is_cuda or (_INTERPRETING and where.is_cpu)


def beyond_arguments() -> None:
    """Said by what depends on more than its arguments: what is being noted is not to be made again."""
    if (noted := _noted.get()) is not None:
        noted.append(None)


def straight(index: int) -> bool:
    """Whether :func:`again` may be used now: the device is the current one, and nobody wants to hear of launches."""
    if _noted.get() is not None:
        return False
    return _INTERPRETING or (index == _current() and not _profiled())


# PyTorch's own, without asking whether CUDA has begun: an argument is there already.
_current: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0)


LASTING: dict[int, Tensor] = {}


def lasting(t: Tensor) -> Tensor:
    """``t``, a table that stays where it is as long as the process lives: prepared calls may know its address."""
    LASTING[id(t)] = t
    return t


class Address(NamedTuple):
    """Stands for the address of a tensor among the arguments of a function."""

    of: Tensor


class Descriptor(NamedTuple):
    """Stands for a descriptor for the copy engine, of a tensor among the arguments of a function: ``again(of)``."""

    of: Tensor
    again: Callable[[Tensor], Any]


class Memory(NamedTuple):
    """Stands for the address of so much new memory."""

    bytes: int


STREAM = object()  # stands for the current stream


def again(step: Launch) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """A launch that was made, to be made again: a function and its arguments, some of which are :class:`Address` (in
    the interpreter tensors), :class:`Descriptor`, :class:`Memory` and :data:`STREAM`; they also stand in tuples.

    Triton's launcher allocates what a kernel asks for and calls the function that launches. In the Triton whose form of
    that function is known it is called here at once."""
    kernel, grid, args, options = step
    if _INTERPRETING:
        return functools.partial(_interpret, kernel, grid, options), args
    index = next(a for a in args if isinstance(a, Tensor)).get_device()
    compiled, constexprs = _COMPILED[_key(index, kernel, args, options)]
    values = (*_addresses(args), *constexprs)
    run, packed, metadata = compiled.run, compiled.packed_metadata, compiled.metadata
    first = (*(*grid, 1, 1)[:3], STREAM, compiled.function)
    none = (None, None, None)  # what hooks get, and the hooks
    if _TRITON == "3.6" and not metadata.profile_scratch_size:
        size = math.prod(grid) * metadata.num_ctas * metadata.global_scratch_size
        flags = (run.launch_cooperative_grid, run.launch_pdl, Memory(size) if size else None, None)
        return run.launch, (*first, *flags, packed, *none, *values)
    if metadata.global_scratch_size > 0:
        return functools.partial(_with_memory, run), (*first, packed, *none, *values)
    return run, (*first, packed, *none, *values)


def _interpret(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], *args: Any) -> None:
    kernel[grid](*args, **options)


def _with_memory(run: Any, *args: Any) -> None:
    triton.set_allocator(_allocate)
    run(*args)


def _addresses(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple([_stand_in(a) for a in args])


def _stand_in(a: Any) -> Any:
    if isinstance(a, Tensor):
        return Address(a)
    if hasattr(a, "block_shape"):
        return Descriptor(a.base, functools.partial(_with_base, a.__class__, {**vars(a), "base": None}))
    return _addresses(a) if a.__class__ is tuple else a


def _with_base(kind: type, fields: dict[str, Any], base: Tensor) -> Any:
    """A descriptor like one that was checked, of another tensor."""
    descriptor = object.__new__(kind)
    vars(descriptor).update(fields, base=base)
    return descriptor


def _find(call: Any, index: int, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> _Found | None:
    """The compiled kernel of a call not seen before, if another has compiled it."""
    found = _COMPILED.get(_key(index, kernel, args, options))
    if found is not None:
        if len(_CALLS) >= _CALLS_KEPT:
            _CALLS.clear()
        _CALLS[call] = found
    return found


def _key(index: int, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    runtime = _RUNTIME.get(id(kernel)) or _count_runtime_parameters(kernel)
    return (index, id(kernel), *_traits(args[:runtime]), *args[runtime:], *options.items())


def _count_runtime_parameters(kernel: Any) -> int:
    """Parameters before the first constexpr one."""
    fixed = [p.is_constexpr for p in kernel.params]
    count = _RUNTIME[id(kernel)] = fixed.index(True) if True in fixed else len(fixed)
    assert all(fixed[count:]), f"{kernel.__name__}: constexpr parameters come last"
    return count


def _traits(args: tuple[Any, ...]) -> list[Any]:
    """What Triton may compile differently for, of each argument: at least as fine as its own specialisation."""
    found: list[Any] = []
    for a in args:
        if isinstance(a, Tensor):
            found += (a.dtype, a.data_ptr() & 15)
        elif a.__class__ is int:
            found.append(a if a < 2 else (a & 15 == 0, a > 0x7FFFFFFF))
        elif a.__class__ is tuple:
            found += (len(a), *_traits(a))
        elif hasattr(a, "block_shape"):  # a descriptor for the copy engine
            found += (a.__class__, a.base.dtype, *a.block_shape, getattr(a, "layout", None), a.padding)
        else:
            found.append(a if a is None else a.__class__)
    return found


def _allocate(size: int, _alignment: int, _stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
