"""The 8-bit dynamic maps: 256 numbers in [-1, 1] or [0, 1], dense near 0, and the nearest of them.

Seven decades 10^-7 ... 1, each with twice the points of the one below, at equal distances within it; 0; and 1. The
signed map (NF4's double quantisation, Adam's first moment) has 127 numbers below 0, the unsigned one (Adam's second
moment) twice as many per decade. Dettmers, arXiv 1511.04561 and 2110.02861; the entries are bitsandbytes' to the bit.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import tree
from ..device import lasting


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """Call ``make(device, ...)``, which returns tables, once for each device and keep them.

    Whoever comes first may be tracing, with tensors that have no memory (torch.compile): the tables are real all the
    same, for kernels will read them."""

    @functools.cache
    @functools.wraps(make)
    def once(*args: Any) -> Any:
        with _disable_current_modes():
            return tree.map(lasting, make(*args))

    return once


def dynamic_map(where: torch.device | str = "cpu", *, signed: bool = True) -> Tensor:
    """The map, (256,) fp32 ascending."""
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i * (1 if signed else 2) + 1, dtype=torch.float32)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6))
    points = torch.cat(positive)
    negative = -points if signed else points[:0]
    # Built on the CPU: linspace may differ in the last bit between devices.
    return torch.cat([negative, points, torch.tensor([0.0, 1.0])]).sort().values.to(where)


@kept
def tables(where: torch.device, signed: bool) -> tuple[Tensor, Tensor]:
    """The map on a device, and the 255 midpoints of its neighbours: what :func:`nearest` takes."""
    points = dynamic_map(signed=signed)
    return points.to(where), ((points[:-1] + points[1:]) / 2).to(where)


@triton.jit
def place(size, SIGNED: tl.constexpr):
    """fp32 whose integer part is the entry nearest to ``size`` in [0, 1], counted from 0's, or the one before it.

    Inside a decade the index is a line in ``size``, flatter from decade to decade, so their minimum is the index to
    within one.
    """
    S: tl.constexpr = 1 if SIGNED else 2
    index = size * (1e6 * S / 0.9) + (8 / 9 * S + 0.5 - S)
    for i in tl.static_range(1, 7):
        index = tl.minimum(index, size * (1e6 * S / 0.9 * 0.2**i) + (8 / 9 * S * 2**i + 0.5 - S))
    return index


@triton.jit
def nearest(x, midpoints, SIGNED: tl.constexpr):
    """int32 index of the entry nearest to fp32 ``x``, the lower one at a midpoint; 255 for NaN: torch.bucketize's.

    One midpoint decides between the two candidates. (A search for it would read eight.)
    """
    index = tl.minimum(place(tl.abs(x), SIGNED), 254.0).to(tl.int32)  # the entry, or the one before it
    if SIGNED:
        index = tl.where(x < 0, 126 - index, 127 + index)
    index = tl.minimum(tl.maximum(index, 0), 254)
    index += (x > tl.load(midpoints + index)).to(tl.int32)
    return tl.where(x == x, index, 255)
