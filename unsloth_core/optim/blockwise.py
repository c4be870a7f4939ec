"""Optimizer states in 8 bits: blocks of 256, each number an entry of a dynamic map times its block's absmax.

bitsandbytes' format (Dettmers et al., arXiv 2110.02861): the signed map for first moments, the unsigned one for second
moments, absmax in fp32. Two roundings are ours to say. A first moment keeps its sign: below zero it never becomes 0 or
more (bitsandbytes' rule). A second moment above zero never becomes 0: the step divides by its root, and eps alone in
the denominator would make a step as large as m / eps of an element whose neighbours have large gradients.
This is the plain PyTorch of it; the kernel that does the same inside the optimizer's step is in multi_tensor.py.
"""

import torch
from torch import Tensor

from .. import tree
from ..ops.dynamic_map import dynamic_map

BLOCK = 256
LEAST = 4096  # a smaller leaf stays in fp32, as in bitsandbytes: there is nothing to save
ZERO = 127  # the signed map's entry that is 0; the unsigned map's is 0
LEAST_ABSMAX = 2.0**-126  # what is scaled is divided by at least this: the reciprocal stays finite


@tree.pytree
class Blockwise:
    """``codes``: uint8, shaped like the parameter; ``absmax``: fp32 (ceil(elements / 256),)."""

    codes: Tensor
    absmax: Tensor


def zeros(like: Tensor, *, signed: bool) -> Blockwise:
    """The state that decodes to zeros."""
    return Blockwise(
        codes=torch.full_like(like, ZERO if signed else 0, dtype=torch.uint8, requires_grad=False),
        absmax=like.new_zeros(-(-like.numel() // BLOCK), dtype=torch.float32, requires_grad=False),
    )


def decode(state: Blockwise, *, signed: bool) -> Tensor:
    """fp32, shaped like the parameter."""
    points = dynamic_map(state.codes.device, signed=signed)
    values = points[state.codes.reshape(-1).to(torch.int32)]
    return (values * state.absmax.repeat_interleave(BLOCK)[: values.numel()]).view(state.codes.shape)


def encode(t: Tensor, *, signed: bool) -> Blockwise:
    """The nearest state to finite fp32 ``t`` (not negative, unless ``signed``)."""
    points = dynamic_map(t.device, signed=signed)
    midpoints = (points[:-1] + points[1:]) / 2
    n = t.numel()
    blocks = torch.nn.functional.pad(t.reshape(-1), (0, -n % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax.clamp(min=LEAST_ABSMAX))[:, None]
    codes = torch.bucketize(scaled, midpoints, out_int32=True)
    codes = torch.where(blocks < 0, codes.clamp(max=ZERO - 1), codes) if signed else codes.maximum((blocks > 0).int())
    return Blockwise(codes=codes.to(torch.uint8).view(-1)[:n].view(t.shape), absmax=absmax)
