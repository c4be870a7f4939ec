"""Cross-entropy of logits against one class per row, in plain PyTorch.

``loss = ω · lse − (1 − ε) · w_y · z_y − ε · mean(w · z) + λ · lse²`` with ``z = cap · tanh(logits / cap)`` and
``ω = (1 − ε) · w_y + ε · mean(w)``: PyTorch's ``cross_entropy`` with class weights w and label smoothing ε, plus a
z-loss of weight λ. logsumexp and one gathered logit per row, so no (N, V) log-softmax is made.
"""

from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from .dtypes import check_floats


def check_targets(op: str, targets: Tensor, letter: str, size: int) -> None:
    """Raises ValueError unless targets is (size,) of int32 or int64."""
    if targets.shape != (size,):
        raise ValueError(f"{op}: targets has shape {tuple(targets.shape)}, expected ({letter},) = ({size},)")
    if targets.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: targets has dtype {targets.dtype}, expected torch.int64 or torch.int32")


def check_options(op: str, label_smoothing: float, z_loss: float, softcap: float | None) -> None:
    """Raises ValueError for options that mean nothing."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}, expected 0 to 1")
    if not z_loss >= 0.0:
        raise ValueError(f"{op}: z_loss is {z_loss}, expected 0 or more")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"{op}: softcap is {softcap}, expected a positive number or None")


def cross_entropy(
    logits_NV: Tensor,
    targets_N: Tensor,
    weight_V: Any = ABSENT,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_argmax: bool = False,
) -> Any:
    """Losses (N,) in fp32 (float64 for float64 logits): 0 where ignored, NaN for a target outside [0, V).

    ``return_argmax``: -> (losses, argmax (N,) int64), −1 where the target is ignored or outside [0, V).
    Raises ValueError where PyTorch would broadcast, round targets, or take an option that means nothing.
    """
    if logits_NV.ndim != 2 or logits_NV.shape[1] == 0:
        raise ValueError(f"cross_entropy: logits has shape {tuple(logits_NV.shape)}, expected (N, V) with V > 0")
    N, V = logits_NV.shape
    check_floats("cross_entropy", logits=logits_NV, weight=weight_V)
    check_targets("cross_entropy", targets_N, "N", N)
    if weight_V is not ABSENT and weight_V.shape != (V,):
        raise ValueError(f"cross_entropy: weight has shape {tuple(weight_V.shape)}, expected (V,) = ({V},)")
    check_options("cross_entropy", label_smoothing, z_loss, softcap)
    if weight_V is not ABSENT and weight_V.requires_grad:
        raise NotImplementedError("cross_entropy: no gradient for weight; detach it")
    z = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    lse = torch.logsumexp(z, dim=1)
    index = targets_N.long().clamp(0, V - 1)
    z_y = z.gather(1, index[:, None])[:, 0]
    if weight_V is ABSENT:
        losses = lse - (1 - label_smoothing) * z_y
        if label_smoothing:
            losses = losses - label_smoothing * z.mean(dim=1)
    else:
        w = weight_V.to(z.dtype)
        losses = (1 - label_smoothing) * w[index] * (lse - z_y)
        if label_smoothing:
            losses = losses + label_smoothing * (w.mean() * lse - (w * z).mean(dim=1))
    if z_loss:
        losses = losses + z_loss * lse.square()
    ignored = targets_N == ignore_index
    valid = ignored | ((targets_N >= 0) & (targets_N < V))
    # A factor, so that the gradient of a row without a valid target is NaN too.
    losses = torch.where(ignored, 0.0, losses * torch.where(valid, 1.0, float("nan")))
    if return_argmax:
        return losses, torch.where(valid & ~ignored, z.argmax(dim=1), -1)
    return losses


def loss_and_grad(
    logits_NV: Tensor, targets_N: Tensor, weight_V: Any = ABSENT, cotangents_N: Any = ABSENT, **options: Any
) -> tuple[Tensor, Tensor]:
    """Losses (N,) and the gradient of ``Σ cotangents · losses`` with respect to the logits."""
    with torch.enable_grad():
        logits = logits_NV.detach().requires_grad_()
        losses = cross_entropy(logits, targets_N, weight_V, **options)
        g = torch.ones_like(losses) if cotangents_N is ABSENT else cotangents_N.to(losses.dtype)
        (gradient,) = torch.autograd.grad(losses, logits, g)
    return losses.detach(), gradient
