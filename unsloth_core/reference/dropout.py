"""Dropout in plain PyTorch, with a mask that is a function of a key and of an element's place alone."""

import torch
from torch import Tensor

from .dtypes import check_floats

_MASK = 0xFFFFFFFF


def dropout(x: Tensor, key: Tensor, *, p: float) -> Tensor:
    """``x / (1 - p)`` where the element's random word is at least ``p * 2^32``, else 0; x of any shape, key (2,) int64.

    Element i of the flattened x has word i % 4 of Philox's counter i // 4. The first number of the key is Philox's key,
    the second the upper half of the counter.
    """
    check_floats("dropout", x=x)
    if key.shape != (2,) or key.dtype != torch.int64:
        raise ValueError(f"dropout: key is {tuple(key.shape)} {key.dtype}, expected (2,) torch.int64 of random.key")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p is {p}, expected 0 to 1")
    counter = torch.arange(-(-x.numel() // 4), device=x.device)
    (k0, k1), (c2, c3) = ((word & _MASK, word >> 32 & _MASK) for word in key.unbind())
    words = torch.stack(philox(counter & _MASK, counter >> 32, c2, c3, k0, k1), dim=-1)
    keep = words.flatten()[: x.numel()].view(x.shape) >= round(p * 2**32)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.where(keep, wide * (1 / (1 - p) if p < 1 else 0.0), 0.0).to(x.dtype)


def philox(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random words from a counter of four words and a key of two, all 32 bits in int64."""
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # 64 bits: the sign is one of them, hence the masks
        c0, c1, c2, c3 = (b >> 32 & _MASK) ^ c1 ^ k0, b & _MASK, (a >> 32 & _MASK) ^ c3 ^ k1, a & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3
