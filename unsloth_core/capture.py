"""A training step as a CUDA graph: recorded once per shape of its batches, then replayed with one launch.

A small model's step is thousands of launches of a few microseconds each, and the GPU waits for the host between them. A
graph holds the launches, their arguments and the memory in between. Recording asks of a step that it never reads a
value back and that its shapes are static; ours is such a function, and everything that changes from step to step (ids,
positions, segments, targets, count, rate, step number, clip factor) is a tensor on the device.

The first step of a shape runs as usual, on the buffers that the graph will use: it compiles and loads every kernel and
fills every table kept on the device, and pins the host memory that a policy offloads to, none of which may happen while
recording. The second is recorded and then replayed, as are all later ones. The kernels and their arguments are those of
the step itself, so are the bits of its results.

``torch.cuda.graph`` (PyTorch's documentation, "CUDA Graphs") gives the recording its own stream and memory pool, also
in the threads in which autograd runs backward; workspaces that a kernel allocates at launch come from that pool too.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import offload, tree
from .data import Batch

MOST = 16  # shapes of a run that become graphs; each holds a few MiB on the device


class Captured:
    """``step(adapters, state, microbatches) -> (adapters, state, metrics)``, replayed from a graph where it can be.

    ``step`` is such a function itself: of static shapes, without a host sync, updating ``adapters`` and ``state`` in
    place. Called like it, with the same results to the bit. Static are the tensors of adapters and state: always those
    of the first call, whose addresses are in the graphs (ValueError for others). Batches are copied into buffers. Every
    combination of their shapes and host bounds (M, ``max_len``, ``max_position``; number of microbatches) is a graph
    of its own, up to MOST of them; beyond that a new one runs as ever. The graphs share one pool of memory.

    Where it cannot be (adapters on another GPU than the current one, a step that waits for the device, no memory for a
    step beside that of graphs) an error says why; with ``strict=False`` a warning does, once, and steps run as ever.
    """

    def __init__(self, step: Callable[..., Any], *, strict: bool = True) -> None:
        self.step, self.strict = step, strict
        self._refused = False
        self._addresses: list[int] | None = None
        self._owned: tuple[Any, Any] | None = None  # adapters and state, as the step returned them
        self._recordings: dict[Any, _Recording] = {}
        self._pool: Any = None
        self._stream: Any = None

    @property
    def graphs(self) -> int:
        """How many were recorded."""
        return sum(recording.graph is not None for recording in self._recordings.values())

    def __call__(self, adapters: Any, state: Any, microbatches: Sequence[Batch]) -> tuple[Any, Any, dict[str, Tensor]]:
        """One step."""
        if not self._refused:
            try:
                return self._captured(adapters, state, microbatches)
            except _Refused as refused:
                why = str(refused)
            except torch.OutOfMemoryError:  # before the update: it allocates next to nothing
                if self.strict or not self.graphs:
                    raise
                why = "capture: no memory for a step of another shape beside the graphs of earlier ones"
            self._refused, self._pool = True, None
            self._recordings.clear()
            torch.cuda.empty_cache()
            warnings.warn(f"{why}; steps run one by one from here on", stacklevel=2)
        device = tree.leaves(adapters)[0].device
        return self.step(adapters, state, [batch.to(device) for batch in microbatches])

    def _captured(self, adapters: Any, state: Any, microbatches: Sequence[Batch]) -> tuple[Any, Any, dict[str, Tensor]]:
        device = self._check(adapters, state)
        microbatches = [batch.to(device) for batch in microbatches]
        leaves, spec = tree.flatten(microbatches)
        signature = (spec, tuple([(leaf.shape, leaf.dtype) for leaf in leaves]))
        recording = self._recordings.get(signature)
        if recording is None:
            if len(self._recordings) == MOST:
                return self._run(adapters, state, microbatches)
            buffers = [leaf.clone() for leaf in leaves]
            recording = self._recordings[signature] = _Recording(buffers, tree.unflatten(buffers, spec))
            with offload.keeping(recording.host), self._beside():
                adapters, state, metrics = self._run(adapters, state, recording.microbatches)
            return adapters, state, tree.map(torch.clone, metrics)  # on this stream: the other's memory is its own
        for buffer, leaf in zip(recording.buffers, leaves):
            buffer.copy_(leaf)
        if recording.graph is None:
            graph = torch.cuda.CUDAGraph()
            try:  # nothing that is recorded runs: after a failure adapters and state are what they were
                with offload.keeping(recording.host), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    _, _, recording.metrics = self.step(adapters, state, recording.microbatches)
            except RuntimeError as error:
                if self.strict:
                    raise
                why = str(error.__context__ or error).strip().splitlines() or ["no reason was given"]
                raise _Refused(f"capture: the step cannot be a CUDA graph ({why[0]})") from error
            recording.graph, self._pool = graph, graph.pool()
        recording.graph.replay()
        # The next replay, of any graph in the pool, writes where these are.
        return adapters, state, tree.map(torch.clone, recording.metrics)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream that records: cuBLAS keeps a workspace for every stream that it has seen."""
        self._stream = self._stream or torch.cuda.Stream()
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            yield
        here.wait_stream(self._stream)

    def _run(self, adapters: Any, state: Any, microbatches: Sequence[Batch]) -> tuple[Any, Any, dict[str, Tensor]]:
        out = self.step(adapters, state, microbatches)
        if _addresses(out[:2]) != self._addresses:
            raise ValueError("capture: the step returned new tensors for adapters or state, expected them in place")
        self._owned = out[0], out[1]
        return out

    def _check(self, adapters: Any, state: Any) -> torch.device:
        """That these are the tensors of the first call; where they are."""
        if self._owned is not None and adapters is self._owned[0] and state is self._owned[1]:
            return tree.leaves(adapters)[0].device
        leaves = tree.leaves((adapters, state))
        if away := [leaf for leaf in leaves if leaf.device.type != "cuda"]:
            raise ValueError(f"capture: adapters or state are on {away[0].device}, expected cuda: a graph is CUDA's")
        if leaves[0].device.index != torch.cuda.current_device():
            elsewhere = f"capture: adapters are on {leaves[0].device}, expected the current device"
            raise ValueError(elsewhere) if self.strict else _Refused(elsewhere)
        addresses = [leaf.data_ptr() for leaf in leaves]
        if self._addresses is None:
            self._addresses = addresses
        elif addresses != self._addresses:
            raise ValueError(
                "capture: adapters or state are not the tensors of the first step, whose addresses were recorded; "
                "copy new values into those, or make a new step"
            )
        return leaves[0].device


class _Refused(Exception):
    """No graph can be recorded; the message says why."""


class _Recording:
    """One shape: the buffers that its graph reads and writes, and the graph."""

    def __init__(self, buffers: list[Tensor], microbatches: Sequence[Batch]) -> None:
        self.buffers, self.microbatches = buffers, microbatches
        self.host: list[Tensor] = []  # pinned, for what a policy offloads
        self.graph: torch.cuda.CUDAGraph | None = None
        self.metrics: dict[str, Tensor] = {}


def _addresses(trees: Any) -> list[int]:
    return [leaf.data_ptr() for leaf in tree.leaves(trees)]
