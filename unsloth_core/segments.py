"""Which rows of a packed buffer belong together: the one description of packing, batches and caches.

A (B, T) batch is B equal segments, a packed batch has segments of any length, and a key/value cache of static
capacity is B segments with a gap behind each. Attention takes two of these, one for queries and one for keys."""

import torch
from torch import Tensor

from .tree import pytree, static


@pytree
class Segments:
    """Row ``i`` belongs to segment ``s`` iff ``starts_S[s] <= i < ends_S[s]``; starts ascend, segments do not overlap.

    ``starts_S``, ``ends_S``: (S,) int32 on the device; empty segments (start == end) are allowed. ``max_len``: a
    host bound on the length of a segment (in rows). All lie within the rows of the tensors that they describe: the
    device alone knows the values, so no op can refuse others."""

    starts_S: Tensor
    ends_S: Tensor
    max_len: int = static()

    @staticmethod
    def packed(cu_seqlens: Tensor, max_len: int) -> "Segments":
        """From cumulative lengths (S + 1,), the form other libraries use: segment s is rows cu[s] to cu[s + 1].

        Raises ValueError for another shape or dtype than int32."""
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"Segments.packed: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected (S + 1,)")
        if cu_seqlens.dtype != torch.int32:
            raise ValueError(f"Segments.packed: cu_seqlens has dtype {cu_seqlens.dtype}, expected torch.int32")
        return Segments(starts_S=cu_seqlens[:-1], ends_S=cu_seqlens[1:], max_len=max_len)

    @staticmethod
    def uniform(batch: int, length: int, device: torch.device | str | None = None) -> "Segments":
        """``batch`` equal segments of ``length`` rows: an ordinary (B, T) batch seen as packed."""
        return Segments.packed(length * torch.arange(batch + 1, dtype=torch.int32, device=device), max_len=length)
