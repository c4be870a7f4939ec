"""What an entry of the table is, and where its numbers come from."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from unsloth_core.cost import Cost

Shape = tuple[int, ...]
REFERENCE = "torch"  # a peer only in name: written to be exact and not to be fast; PyTorch's own calls have other names
RANK = 16


def is_peer(impl: str) -> bool:
    """Whether a row of this name is somebody else's: neither ours, nor a yardstick of ours, nor the reference."""
    return impl != REFERENCE and impl.split(":")[0] != "ours"


@dataclass(frozen=True)
class Random:
    """Numbers on one device, the same for a seed."""

    generator: torch.Generator

    @staticmethod
    def seeded(seed: int, device: torch.device) -> "Random":
        """A fresh sequence."""
        return Random(torch.Generator(device).manual_seed(seed))

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal numbers of standard deviation ``scale``."""
        where = self.generator.device
        return torch.randn(shape, generator=self.generator, device=where, dtype=dtype).mul_(scale)

    def ids(self, count: int, below: int) -> Tensor:
        """(count,) int64 in [0, below)."""
        return torch.randint(below, (count,), generator=self.generator, device=self.generator.device)

    def matrix(self, rows: int, cols: int) -> Tensor:
        """A weight that keeps the size of what it multiplies."""
        return self.normal(rows, cols, scale=cols**-0.5)


@dataclass(frozen=True)
class Yardstick:
    """Another call of ours on a case's arguments, whose time a bar of that case is relative to.

    It takes turns with the others, so that both times are of one run. It answers another question than they do: it is
    checked against a ``reference`` of its own, its work is that of its own ``costs``, and it is nobody's peer."""

    call: Callable[..., Any]
    reference: Callable[..., Any]
    costs: Callable[..., Mapping[str, Cost]]


@dataclass(frozen=True)
class Case:
    """One op.

    ``make(random, *shape)`` gives the arguments that ``ours`` and every peer take; ``wanted(*args)`` the tensors that
    get a gradient; ``costs(args, *shape)`` the directions that are measured, with the least work of each. ``small``
    runs the kernels of the large shapes and is checked against the oracle; ``tiny`` is for ``--smoke``. ``replay``: it
    is timed inside a CUDA graph. The name of a yardstick begins with "ours: "."""

    op: str
    shapes: tuple[Shape, ...]
    small: Shape
    tiny: Shape
    make: Callable[..., tuple[Any, ...]]
    ours: Callable[..., Any]
    peers: Mapping[str, Callable[..., Any]]
    costs: Callable[..., Mapping[str, Cost]]
    wanted: Callable[..., list[Tensor]] = lambda *args: []
    dtype: torch.dtype = torch.bfloat16
    compiles: bool = True
    replay: bool = False
    yardsticks: Mapping[str, Yardstick] = field(default_factory=dict)


def cost_of(op: str) -> Callable[..., Cost]:
    """``cost`` of an op file, which the package hides behind the op of the same name."""
    return importlib.import_module(f"unsloth_core.ops.{op}").cost


def angles(random: Random, N: int, J: int) -> tuple[Tensor, Tensor]:
    """cos and sin (N, J)."""
    turns = random.normal(N, J, scale=100.0, dtype=torch.float32)
    return turns.cos(), turns.sin()
