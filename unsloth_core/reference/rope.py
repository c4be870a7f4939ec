"""Rotary position embedding in plain PyTorch: the rotation in at least fp32, rounded once."""

import torch
from torch import Tensor

from .dtypes import check_angles, check_floats


def rope(q_NHK: Tensor, k_NGK: Tensor, cos_NJ: Tensor, sin_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """Turn channel pairs (i, i + J), i < J, of every head by its token's angles; channels from 2J on stay.

    No gradient flows to cos and sin. Raises ValueError where PyTorch would broadcast.
    """
    check_heads("rope", q_NHK, k_NGK, cos_NJ, sin_NJ)
    cos_NJ, sin_NJ = cos_NJ.detach(), sin_NJ.detach()
    return turned(q_NHK, cos_NJ, sin_NJ).to(q_NHK.dtype), turned(k_NGK, cos_NJ, sin_NJ).to(k_NGK.dtype)


def turned(x: Tensor, cos_NJ: Tensor, sin_NJ: Tensor) -> Tensor:
    """The heads of x (N, heads, K) turned, in at least fp32."""
    J = cos_NJ.shape[-1]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos_NJ.to(x.dtype).unsqueeze(1), sin_NJ.to(x.dtype).unsqueeze(1)
    a, b = x[..., :J], x[..., J : 2 * J]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., 2 * J :]], dim=-1)


def check_heads(op: str, q_NHK: Tensor, k_NGK: Tensor, cos_NJ: Tensor, sin_NJ: Tensor) -> None:
    """Raises ValueError unless shapes are those that the names say, and dtypes those of the kernels."""
    for name, x, dims in (("q", q_NHK, "(N, H, K)"), ("k", k_NGK, "(N, G, K)")):
        if x.ndim != 3:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected {dims}")
    check_floats(op, q=q_NHK, k=k_NGK)
    N, _, K = q_NHK.shape
    if k_NGK.shape[0] != N or k_NGK.shape[2] != K:
        raise ValueError(f"{op}: k has shape {tuple(k_NGK.shape)}, expected (N, G, K) = ({N}, G, {K})")
    for name, x in (("cos", cos_NJ), ("sin", sin_NJ)):
        if x.ndim != 2 or x.shape[0] != N or not 0 < 2 * x.shape[1] <= K:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, expected (N, J) = ({N}, 1 to {K // 2})")
    if sin_NJ.shape != cos_NJ.shape:
        raise ValueError(f"{op}: sin has shape {tuple(sin_NJ.shape)}, expected cos's {tuple(cos_NJ.shape)}")
    check_angles(op, cos=cos_NJ, sin=sin_NJ)
