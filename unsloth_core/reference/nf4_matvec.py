"""A few tokens times an NF4 matrix in plain PyTorch: decode, multiply, add."""

from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from ..weights import NF4
from .nf4 import dequantize


def nf4_matvec(
    x_NC: Tensor,
    w: NF4,
    bias: Tensor | Any = ABSENT,
    add: Tensor | Any = ABSENT,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``y_NM = x W^T (+ bias_M) (+ add_NM)``, summed in (at least) fp32, rounded once to ``dtype`` (default: x's)."""
    wide = torch.promote_types(x_NC.dtype, torch.float32)
    y = x_NC.to(wide) @ dequantize(w).to(wide).T
    for addend in (bias, add):
        if addend is not ABSENT:
            y = y + addend.to(wide)
    return y.to(dtype or x_NC.dtype)
