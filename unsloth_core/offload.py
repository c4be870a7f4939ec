"""Tensors that wait on the host between forward and backward, copied while the GPU computes.

A :class:`Host` belongs to one forward pass. Layers send parcels in their order and take them back in reverse; two
parcels at most are on the device beside the layer that is running: forward, the one whose copy out is under way;
backward, the one that is on its way in for the layer that comes next. Each layer waits for the copy that was begun
one layer before, so memory does not depend on how fast the link is, only time does. The last parcel is wanted again
at once and stays on the device until then.

Host buffers are pinned. They come from PyTorch's pool, which gives a buffer out again only when the copies that use it
have ended: steps of one shape use the same buffers over and over. Device buffers are allocated and freed on the stream
of the computation, which waits for a copy before it lets go of what the copy reads or wrote. On a CPU a parcel is a
copy; on meta tensors it is nothing but shapes.

Source of the idea: vDNN (Rhu et al. 2016, arXiv 1602.08124): offload forward, prefetch one layer ahead backward.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass
class Parcel:
    """Tensors that one layer sent; ``here`` are they as long as the device holds them."""

    away: list[Any]  # on the host; of a meta tensor (shape, strides, dtype)
    here: list[Tensor] | None
    left: Any  # event: the copy out has ended
    before: "Parcel | None"
    came: Any = None  # event: the copy in has ended


class Host:
    """What the layers of one forward pass have sent to the host."""

    def __init__(self) -> None:
        self._last: Parcel | None = None

    def send(self, tensors: Sequence[Tensor]) -> Parcel:
        """Begin to copy ``tensors`` out, of one device; their memory is free when the next parcel is sent."""
        before = self._last
        if before is not None:
            _let_go(before)
        on_gpu = bool(tensors) and tensors[0].is_cuda
        with _beside(tensors[0].device, "out") if on_gpu else contextlib.nullcontext() as stream:
            away = [_away(t) for t in tensors]
            left = stream.record_event() if stream else None
        self._last = Parcel(away, list(tensors), left, before)
        return self._last


def take(parcel: Parcel, device: torch.device) -> list[Tensor]:
    """What was sent, on ``device`` again, ready for the current stream; the parcel before it sets out now.

    May be called again: the host's copies stay as long as the parcel."""
    _fetch(parcel, device)
    if parcel.came is not None:
        torch.cuda.current_stream(device).wait_event(parcel.came)
    tensors = parcel.here or []
    if parcel.before is not None:
        _fetch(parcel.before, device)
    _let_go(parcel)
    parcel.came = None
    return tensors


def blocks(host: Tensor, rows: int, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """``(where, host[where] on device)`` of ``rows`` rows at a time, the next on its way while one is used.

    Two buffers take turns: a block is that of its turn only until the next but one is asked for."""
    starts = range(0, host.shape[0], rows)
    shape = (min(rows, host.shape[0]), *host.shape[1:])
    buffers = [torch.empty(shape, dtype=host.dtype, device=device) for _ in range(min(2, len(starts)))]
    coming: list[Any] = []

    def fetch(i: int) -> None:
        part = host[starts[i] : starts[i] + rows]
        target = buffers[i % 2][: part.shape[0]]
        if device.type != "cuda":
            coming.append((target if target.is_meta else target.copy_(part), None))
            return
        with _beside(device, "in") as stream:
            target.copy_(part, non_blocking=True)
            coming.append((target, stream.record_event()))

    for i, start in enumerate(starts):
        if i == 0:
            fetch(0)
        if i + 1 < len(starts):
            fetch(i + 1)
        block, came = coming[i]
        if came is not None:
            torch.cuda.current_stream(device).wait_event(came)
        yield slice(start, start + block.shape[0]), block


def _let_go(parcel: Parcel) -> None:
    """The device's copies may be freed: whoever reuses their memory on the current stream comes after the copy out."""
    if parcel.here and parcel.left is not None:
        torch.cuda.current_stream(parcel.here[0].device).wait_event(parcel.left)
    parcel.here = None


def _fetch(parcel: Parcel, device: torch.device) -> None:
    """Begin to copy in what is not here."""
    if parcel.here is not None:
        return
    if device.type != "cuda":
        parcel.here = [_back(t, device) for t in parcel.away]
        return
    # Allocated on the stream of the computation, whose earlier work may still use that memory: the copy waits for it.
    parcel.here = [torch.empty_like(t, device=device) for t in parcel.away]
    with _beside(device, "in") as stream:
        stream.wait_event(parcel.left)
        for t, host in zip(parcel.here, parcel.away, strict=True):
            t.copy_(host, non_blocking=True)
        parcel.came = stream.record_event()


def _away(t: Tensor) -> Any:
    if t.is_cuda:
        return _pinned(t).copy_(t, non_blocking=True)
    # A buffer of the same layout, so that it comes back as it was.
    return (t.shape, torch.empty_like(t).stride(), t.dtype) if t.is_meta else torch.empty_like(t).copy_(t)


def _pinned(like: Tensor) -> Tensor:
    """From PyTorch's pool, or what is next of those that :func:`keeping` was given."""
    kept = _kept.get()
    if kept is None:
        return torch.empty_like(like, device="cpu", pin_memory=True)
    buffers, at = kept
    i = next(at)
    if i == len(buffers):
        buffers.append(torch.empty_like(like, device="cpu", pin_memory=True))
    return buffers[i]


_kept: ContextVar["tuple[list[Tensor], Iterator[int]] | None"] = ContextVar("unsloth_core_kept", default=None)


@contextlib.contextmanager
def keeping(buffers: list[Tensor]) -> Iterator[None]:
    """Pinned buffers are those of ``buffers``, in order; what it lacks is added. So a second pass of the same shapes
    has the addresses of the first and allocates none, as a CUDA graph needs."""
    token = _kept.set((buffers, itertools.count()))
    try:
        yield
    finally:
        _kept.reset(token)


def _back(t: Any, device: torch.device) -> Tensor:
    if isinstance(t, Tensor):
        return torch.empty_like(t).copy_(t)
    shape, strides, dtype = t
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


@contextlib.contextmanager
def _beside(device: torch.device, direction: str) -> Iterator[torch.cuda.Stream]:
    """The stream of copies in one direction, as the current one, behind what the computation has queued so far."""
    stream = _stream(device.index or 0, direction)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield stream


@functools.cache
def _stream(index: int, direction: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(index)
