"""QuACK, CuTe DSL kernels for Hopper and Blackwell (its 0.6.5; nvidia-cutlass-dsl 4.8.1 with its CUDA 13 libraries).

A cross-entropy's forward keeps the logits for its backward (``inplace_backward=False``, its default)."""

import quack
from quack.rotary import apply_rotary_emb
from torch import Tensor

from . import Peer

DISTRIBUTION = "quack-kernels"


def add_rms_norm(x: Tensor, res: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Norm first there, sum first here."""
    y, h = quack.rmsnorm(x, w, residual=res, eps=1e-6, prenorm=True)
    return h, y


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """A launch each for queries and keys, as a batch of one."""
    return tuple(apply_rotary_emb(t[None], cos, sin)[0] for t in (q, k))


def linear_cross_entropy(x: Tensor, w: Tensor, targets: Tensor) -> Tensor:
    """Products of its own, which not every version of the CuTe DSL can trace: imported when it is called."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x, w, targets, reduction="sum")


PEERS = {
    "rms_norm": lambda x, w: quack.rmsnorm(x, w, eps=1e-6),
    "add_rms_norm": add_rms_norm,
    "softmax": quack.softmax,
    "softmax_wide": quack.softmax,
    "rope": Peer(rope, lambda q, k, cos, sin: (q, k, cos.to(q.dtype), sin.to(q.dtype))),
    "cross_entropy": lambda logits, targets: quack.cross_entropy(logits, targets, reduction="none"),
    "linear_cross_entropy": linear_cross_entropy,
}
