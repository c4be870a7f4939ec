"""Cross-entropy of logits against one class per row, in plain PyTorch.

``loss = lse − (1 − ε) · z_y − ε · mean(z) + λ · lse²`` with ``z = cap · tanh(logits / cap)``: PyTorch's
``cross_entropy`` with label smoothing ε, plus a z-loss of weight λ. logsumexp and one gathered logit per row,
so no (N, V) log-softmax is made.
"""

import torch
from torch import Tensor


def cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Losses (N,) in fp32 (float64 for float64 logits): 0 where ignored, NaN for a target outside [0, V)."""
    V = logits_NV.shape[1]
    z = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse = torch.logsumexp(z, dim=1)
    losses = lse - (1 - label_smoothing) * z.gather(1, targets_N.long().clamp(0, V - 1)[:, None])[:, 0]
    if label_smoothing:
        losses = losses - label_smoothing * z.mean(dim=1)
    if z_loss:
        losses = losses + z_loss * lse.square()
    ignored = targets_N == ignore_index
    valid = ignored | ((targets_N >= 0) & (targets_N < V))
    # A factor, so that the gradient of a row without a valid target is NaN too.
    return torch.where(ignored, 0.0, losses * torch.where(valid, 1.0, float("nan")))
