"""Rotary position embedding in plain PyTorch: the rotation in at least fp32, rounded once."""

import torch
from torch import Tensor


def rope(q_NHK: Tensor, k_NGK: Tensor, cos_NJ: Tensor, sin_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """Turn channel pairs (i, i + J), i < J, of every head by its token's angles; channels from 2J on stay."""
    return _turned(q_NHK, cos_NJ, sin_NJ), _turned(k_NGK, cos_NJ, sin_NJ)


def _turned(x: Tensor, cos_NJ: Tensor, sin_NJ: Tensor) -> Tensor:
    J = cos_NJ.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos_NJ.to(wide).unsqueeze(1), sin_NJ.to(wide).unsqueeze(1)
    a, b = x[..., :J].to(wide), x[..., J : 2 * J].to(wide)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), x[..., 2 * J :]], dim=-1)
