"""Clipping by the global norm, without the host ever seeing the norm.

    norm = (Σ g²)^½ over all elements of all leaves         factor = min(1, max_norm / (norm + 1e-6))

Not differentiable: it is of gradients. One launch over all leaves, and a second one that adds the sums of tiles in
order (multi_tensor.py). Limits: leaves fp32, bf16 or fp16, in any mixture; sums are fp32."""

from typing import Any

import torch
from torch import Tensor

from .. import tree
from ..backend import resolve
from ..cost import Cost
from ..device import is_fake
from ..tracing import whole
from . import multi_tensor


@whole
def global_norm(grads: Any) -> Tensor:
    """Euclidean norm over all leaves of a tree, accumulated in fp32: a fp32 scalar on their device.

    Leaves are fp32, bf16 or fp16, with any strides (one that is not contiguous is copied); holes count as
    zero. The order of the sum is fixed: the same gradients give the same bits. A tree without leaves gives 0, on
    the CPU. Raises ValueError for another dtype or a second device.
    """
    leaves = [leaf for leaf in tree.leaves(grads) if leaf.numel()]
    for leaf in leaves:
        if leaf.dtype not in multi_tensor.KINDS:
            expected = tuple(multi_tensor.KINDS)
            raise ValueError(f"global_norm: a leaf has dtype {leaf.dtype}, expected one of {expected}")
        if leaf.device != leaves[0].device:
            devices = f"{leaves[0].device} and {leaf.device}"
            raise ValueError(f"global_norm: leaves are on {devices}, expected one device")
    with torch.no_grad():
        if not leaves:
            return torch.zeros((), device=next((leaf.device for leaf in tree.leaves(grads)), None))
        if resolve(leaves[0]) == "triton":
            if is_fake(leaves[0]):  # being traced: it has no address
                return leaves[0].new_empty((), dtype=torch.float32)
            return multi_tensor.norm([leaf.contiguous() for leaf in leaves])
        return torch.stack([leaf.float().square().sum() for leaf in leaves]).sum().sqrt()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """``min(1, max_norm / (norm + 1e-6))``, as in ``torch.nn.utils.clip_grad_norm_``; stays on the device."""
    if not max_norm > 0:
        raise ValueError(f"clip_factor: max_norm = {max_norm}, expected > 0")
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def cost(parameters: int, *, itemsize: int = 4) -> Cost:
    """The norm of so many gradients of ``itemsize`` bytes: each read once, squared and added."""
    return Cost(bytes=parameters * itemsize, flops=2 * parameters)
