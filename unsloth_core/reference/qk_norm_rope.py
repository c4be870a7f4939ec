"""RMSNorm of every head of queries and keys, then rope, in plain PyTorch: at least fp32 in between."""

import torch
from torch import Tensor

from .dtypes import check_floats
from .rope import check_heads, turned


def qk_norm_rope(
    q_NHK: Tensor,
    k_NGK: Tensor,
    wq_K: Tensor,
    wk_K: Tensor,
    cos_NJ: Tensor,
    sin_NJ: Tensor,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Tensor, Tensor]:
    """Every head normalised over its K channels, times its weight, and turned by its token's angles.

    ``"llama"`` also rounds the normalised head to its dtype before the weight, ``"gemma"`` only the result. No
    gradient flows to cos and sin. Raises ValueError where PyTorch would broadcast.
    """
    check_heads("qk_norm_rope", q_NHK, k_NGK, cos_NJ, sin_NJ)
    check_floats("qk_norm_rope", wq=wq_K, wk=wk_K)
    K = q_NHK.shape[2]
    for name, w in (("wq", wq_K), ("wk", wk_K)):
        if w.shape != (K,):
            raise ValueError(f"qk_norm_rope: {name} has shape {tuple(w.shape)}, expected (K,) = ({K},)")
    if casting_mode not in ("llama", "gemma"):
        raise ValueError(f"qk_norm_rope: casting_mode is {casting_mode!r}, expected one of ('llama', 'gemma')")

    def heads(x: Tensor, w: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        x_hat = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
        if casting_mode == "llama":
            x_hat = x_hat.to(x.dtype).to(wide)
        return turned(x_hat * (w.to(wide) + offset), cos_NJ.detach(), sin_NJ.detach()).to(x.dtype)

    return heads(q_NHK, wq_K), heads(k_NGK, wk_K)
