"""Which arithmetic runs: Triton kernels or plain PyTorch. Chosen by the device, overridden by :func:`using`.

with uc.using("reference"):     # the answer to "is it the kernels?"
    loss, grads = step(lora, batch)
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from . import device as _device

NAMES = ("triton", "reference")
_override: ContextVar[str | None] = ContextVar("unsloth_core_backend", default=None)


@contextlib.contextmanager
def using(name: str | None) -> Iterator[None]:
    """Run every op inside the block with ``"triton"`` or ``"reference"``; ``None`` restores the choice by device.

    Gradients use the backend of their forward, wherever backward is called. Raises ValueError for another name.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"using: backend {name!r}, expected one of {NAMES}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def override() -> str | None:
    """What :func:`using` has set in this context, or None."""
    return _override.get()


def resolve(where: torch.Tensor | torch.device) -> str:
    """The backend for a tensor's device: Triton on a GPU or in the interpreter, otherwise the reference. Meta tensors
    stand for a GPU's: ops run, nothing is launched.

    Raises RuntimeError when Triton was demanded for the CPU of a process that was not started with TRITON_INTERPRET=1.
    """
    name = _override.get()
    if name is None and where.__class__ is torch.Tensor and where.is_cuda:  # type: ignore[union-attr]
        return "triton"
    device = where if isinstance(where, torch.device) else where.device
    if name is None:
        return by_device(device)
    if name == "triton" and device.type not in ("cuda", "meta") and not _device.interpreting():
        raise RuntimeError(
            f"using('triton'): tensors are on {device}; Triton needs a CUDA device, or its CPU interpreter: "
            "start the process with TRITON_INTERPRET=1"
        )
    return name


def by_device(device: torch.device) -> str:
    """The choice where nobody has made one."""
    return "triton" if device.type in ("cuda", "meta") or _device.interpreting() else "reference"


@functools.cache
def reference(op: str) -> Callable[..., Any]:
    """The plain PyTorch function of an op: ``unsloth_core.reference.<op>.<op>``; ``"file.function"`` where names
    differ."""
    file, _, function = op.partition(".")
    return getattr(importlib.import_module(f"unsloth_core.reference.{file}"), function or file)
