"""Facts about the device, and the one way kernels are launched."""

import functools
from typing import Any

import torch
import triton
from torch import Tensor

# Read once: @triton.jit looks at the same variable when it decorates, so a later change could not take effect anyway.
_INTERPRETING = bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """True when kernels run in Triton's CPU interpreter (the process was started with ``TRITON_INTERPRET=1``)."""
    return _INTERPRETING


@functools.cache
def _properties(index: int) -> Any:
    return torch.cuda.get_device_properties(index)


def sms(device: torch.device) -> int:
    """Number of streaming multiprocessors; 4 in the interpreter, so that multi-program paths are walked there too."""
    return 4 if device.type != "cuda" else _properties(device.index or 0).multi_processor_count


def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability, (9, 0) for Hopper; the interpreter plays an (8, 0)."""
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


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on the device of the first tensor argument; an empty grid launches nothing.

    Backward runs in threads of autograd's engine, where neither the user's current device nor Triton's allocator (a
    context variable, needed by tensor descriptors made on the device) is set: both are set here, at every launch.
    """
    if 0 in grid:
        return
    if _INTERPRETING:
        kernel[grid](*args, **options)
        return
    device = next(a for a in args if isinstance(a, Tensor)).device
    triton.set_allocator(_allocate)
    if device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
    else:
        with torch.cuda.device(device):
            kernel[grid](*args, **options)


def _allocate(size: int, _alignment: int, _stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
