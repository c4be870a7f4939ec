"""Liger Kernel (its 0.8.5).

Its cross-entropies make the gradient in the forward pass, over the logits: compare the sum of both directions."""

from typing import Any

import torch
from liger_kernel.ops import (
    LigerCrossEntropyFunction,
    LigerFusedAddRMSNormFunction,
    LigerFusedGateUpSiLUMulFunction,
    LigerFusedLinearCrossEntropyFunction,
    LigerLayerNormFunction,
    LigerRMSNormFunction,
    LigerRopeFunction,
    LigerSoftmaxFunction,
)
from torch import Tensor

from . import Peer, fresh

DISTRIBUTION = "liger-kernel"


def add_rms_norm(x: Tensor, res: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Norm first there, sum first here."""
    y, h = LigerFusedAddRMSNormFunction.apply(x, res, w, 1e-6, 0.0, "llama", False)
    return h, y


def angles(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """Both halves of cos and sin, in q's dtype; q and k are written to."""
    return fresh(q), fresh(k), *(torch.cat([t, t], -1).to(q.dtype)[None] for t in (cos, sin))


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """(N, H, K) as a batch of one, heads before tokens."""
    out = LigerRopeFunction.apply(*(t[None].transpose(1, 2) for t in (q, k)), cos, sin)
    return tuple(t.transpose(1, 2)[0] for t in out)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses of rows; the logits become their gradient."""
    return LigerCrossEntropyFunction.apply(logits, targets, None, -100, 0.0, 0.0, "none")[0]


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """The sum of losses."""
    return LigerFusedLinearCrossEntropyFunction.apply(x, w, targets, None, None, -100, 0.0, 0.0, "sum")[0]


def layer_norm(x: Tensor, w: Tensor, b: Tensor, *_: Any) -> Tensor:
    """With weight and bias."""
    return LigerLayerNormFunction.apply(x, w, b, 1e-5)


PEERS = {
    "rms_norm": lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False),
    "add_rms_norm": add_rms_norm,
    "layer_norm": layer_norm,
    "softmax": LigerSoftmaxFunction.apply,
    "rope": Peer(rope, angles),
    "glu": LigerFusedGateUpSiLUMulFunction.apply,
    "cross_entropy": Peer(cross_entropy, lambda logits, targets: (fresh(logits), targets)),
    "linear_cross_entropy": linear_cross_entropy,
}
