"""GELU in plain PyTorch: in at least fp32, rounded once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import check_floats


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """``x Φ(x)`` of every element; ``approximate`` as :func:`torch.nn.functional.gelu` has it."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"gelu: x has shape {tuple(x.shape)}, expected (..., F) with F >= 1")
    check_floats("gelu", x=x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate is {approximate!r}, expected one of ('none', 'tanh')")
    return F.gelu(x.to(torch.promote_types(x.dtype, torch.float32)), approximate=approximate).to(x.dtype)
