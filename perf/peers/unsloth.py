"""Unsloth's kernels (its 2026.10.9), where they are differentiable functions of tensors.

Importing it patches torch and transformers: rows of other libraries from the same process are to be read with that in
mind. Its cross-entropy and its rotation write into what they are given."""

import unsloth  # noqa: F401 - has to come before what it patches
from torch import Tensor
from unsloth.kernels.cross_entropy_loss import Fast_CrossEntropyLoss
from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm
from unsloth.kernels.rope_embedding import Fast_RoPE_Embedding

from . import Peer, fresh

DISTRIBUTION = "unsloth"


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """(batch, tokens, heads, channels); a launch each for queries and keys."""
    return tuple(Fast_RoPE_Embedding.apply(t[None], cos, sin)[0] for t in (q, k))


PEERS = {
    "rms_norm": lambda x, w: Fast_RMS_Layernorm.apply(x, w, 1e-6),
    "rope": Peer(rope, lambda q, k, cos, sin: (fresh(q), fresh(k), cos, sin)),
    "cross_entropy": Peer(
        lambda logits, targets: Fast_CrossEntropyLoss.apply(logits, targets, 0, 0),
        lambda logits, targets: (fresh(logits), targets),
    ),
}
