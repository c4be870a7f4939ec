"""Sum of the cross-entropies of ``x @ wᵀ`` in plain PyTorch, a chunk of tokens at a time.

The logits of a chunk are computed in x's dtype. Chunks bound the temporaries (softmax and its gradient in fp32);
smaller ones would make the products slower, and those are nearly all of the time.
"""

from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from .cross_entropy import cross_entropy

CHUNK_LOGITS = 2**25


def linear_cross_entropy(
    x_ND: Tensor,
    w_VD: Tensor,
    targets_M: Tensor,
    rows_M: Any = ABSENT,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """The sum of the losses as a 0-d tensor, fp32 (float64 for float64 inputs).

    An entry of ``rows_M`` equal to N is padding.
    """
    N, V = x_ND.shape[0], w_VD.shape[0]
    x, targets = x_ND, targets_M
    if rows_M is not ABSENT:
        rows = rows_M.long()
        x = torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, rows.clamp(0, N))  # row N: padding
        targets = torch.where(rows == N, ignore_index, targets)
        # A row that does not exist has no valid target.
        targets = torch.where((rows < 0) | (rows > N), V, targets)
    total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
    count = max(1, CHUNK_LOGITS // V)
    for x_part, targets_part in zip(x.split(count), targets.split(count), strict=True):
        losses = cross_entropy(
            x_part @ w_VD.t(),
            targets_part,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
        )
        total = total + losses.sum()
    return total
