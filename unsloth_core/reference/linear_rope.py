"""A stacked projection split into heads, q and k turned, in plain PyTorch."""

from typing import Any

from torch import Tensor

from ..tree import ABSENT
from ..weights import Weight, shape
from .dtypes import check_angles
from .linear import linear
from .rope import rope


def linear_rope(
    x_NC: Tensor, w: Weight, cos_NJ: Tensor, sin_NJ: Tensor, bias: Tensor | Any = ABSENT, *, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``x W^T + bias`` as q (N, heads, K), k and v (N, kv_heads, K); q and k turned."""
    rows, stacked = shape(w)[0], heads + 2 * kv_heads
    if x_NC.ndim != 2 or rows % stacked:
        got = f"x has shape {tuple(x_NC.shape)} and w has {rows} rows"
        raise ValueError(f"linear_rope: {got}, expected (N, C) and a multiple of {heads} + 2 * {kv_heads} heads")
    qkv = linear(x_NC, w, bias)
    check_angles("linear_rope", cos=cos_NJ, sin=sin_NJ)
    q, k, v = qkv.unflatten(-1, (stacked, -1)).split([heads, kv_heads, kv_heads], dim=1)
    return *rope(q, k, cos_NJ, sin_NJ), v
