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
    """Losses (N,) in fp32 (float64 for float64 logits): 0 where ignored, NaN for a target outside [0, V).

    Raises ValueError where PyTorch would broadcast, round targets, or take an option that means nothing.
    """
    if logits_NV.ndim != 2 or logits_NV.shape[1] == 0:
        raise ValueError(f"cross_entropy: logits has shape {tuple(logits_NV.shape)}, expected (N, V) with V > 0")
    N, V = logits_NV.shape
    if targets_N.shape != (N,):
        raise ValueError(f"cross_entropy: targets has shape {tuple(targets_N.shape)}, expected (N,) = ({N},)")
    if targets_N.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"cross_entropy: targets has dtype {targets_N.dtype}, expected torch.int64 or torch.int32")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"cross_entropy: label_smoothing is {label_smoothing}, expected 0 to 1")
    if not z_loss >= 0.0:
        raise ValueError(f"cross_entropy: z_loss is {z_loss}, expected 0 or more")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"cross_entropy: softcap is {softcap}, expected a positive number or None")
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
