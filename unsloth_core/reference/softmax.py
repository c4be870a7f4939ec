"""Softmax in plain PyTorch, whose own computes 16-bit rows in fp32 and rounds once."""

import torch
from torch import Tensor

from .dtypes import check_floats


def softmax(x: Tensor) -> Tensor:
    """``e^x / Σ e^x`` over the last axis; NaN for a row of -inf."""
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"softmax: x has shape {tuple(x.shape)}, expected (..., D) with D >= 1")
    check_floats("softmax", x=x)
    return torch.softmax(x, dim=-1)
