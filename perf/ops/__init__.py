"""What ``perf/run.py`` measures, a file for each kind of op: shapes (of 8B models), arguments, peers and cost.

A peer computes the same from the same arguments. Every op has the peer "torch", its reference under eager autograd,
which is also the oracle; where PyTorch has a call of its own for the op, that is a peer under its own name."""

import torch

from . import adamw, attention, experts, losses, memory_bound, products
from .case import REFERENCE, Case, Random, Shape, Yardstick, is_peer

__all__ = ["REFERENCE", "Case", "Random", "Shape", "Yardstick", "cases", "is_peer"]


def cases(device: torch.device) -> list[Case]:
    """Every op, in the order of a forward pass."""
    return [
        *memory_bound.cases(),
        *losses.cases(),
        *products.cases(),
        *experts.cases(),
        *attention.cases(device),
        *adamw.cases(),
    ]
