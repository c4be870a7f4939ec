"""Log-probability of one class per row, entropy and logsumexp of ``x @ wᵀ`` in plain PyTorch, chunk by chunk.

The logits of a chunk of tokens are computed in x's dtype, the rest in fp32 (float64 for float64 inputs).
"""

from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from .linear_cross_entropy import CHUNK_LOGITS, check_linear, target_rows


def linear_logprob(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_M: Tensor,
    rows_M: Any = ABSENT,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy_grad: bool = False,
    chunk_logits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probability, entropy, logsumexp), each (M,): 0 where ignored, NaN for a target outside [0, V).

    ``entropy_grad`` only says what the kernels should save; here all three are always differentiable.
    """
    check_linear("linear_logprob", x_ND, w_VD, targets_M, rows_M, chunk_logits)
    if not temperature > 0.0:
        raise ValueError(f"linear_logprob: temperature is {temperature}, expected a positive number")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"linear_logprob: softcap is {softcap}, expected a positive number or None")
    V = w_VD.shape[0]
    x, targets = target_rows(x_ND, targets_M, rows_M, V, ignore_index)
    count = max(1, (chunk_logits or CHUNK_LOGITS) // V)
    parts = []
    for x_part, targets_part in zip(x.split(count), targets.split(count), strict=True):
        z = x_part @ w_VD.t()
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / temperature
        lse = torch.logsumexp(z, dim=1)
        logprob = z.gather(1, targets_part.long().clamp(0, V - 1)[:, None])[:, 0] - lse
        surprise = lse[:, None] - z
        entropy = (torch.exp(-surprise) * surprise).sum(dim=1)
        ignored = targets_part == ignore_index
        valid = ignored | ((targets_part >= 0) & (targets_part < V))
        # A factor, so that the gradient of a row without a valid target is NaN too.
        factor = torch.where(valid, 1.0, float("nan"))
        parts.append([torch.where(ignored, 0.0, out * factor) for out in (logprob, entropy, lse)])
    logprob, entropy, lse = (torch.cat(outs) for outs in zip(*parts, strict=True))
    return logprob, entropy, lse
