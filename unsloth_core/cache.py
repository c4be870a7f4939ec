"""The keys and values of finished tokens, as a value of static capacity: decoding never changes a shape."""

import torch
from torch import Tensor

from .segments import Segments
from .tree import pytree, static


@pytree
class Cache:
    """B sequences of at most ``capacity`` tokens. ``k``, ``v``: per layer (B·capacity, G, K); ``lengths_B``: int32.

    Sequence b owns rows b·capacity to (b + 1)·capacity, of which the first ``lengths_B[b]`` are filled.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    lengths_B: Tensor
    capacity: int = static()

    @staticmethod
    def empty(
        layers: int,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Cache":
        """Room for ``batch`` sequences of ``capacity`` tokens in every layer."""

        def buffers() -> tuple[Tensor, ...]:
            shape = (batch * capacity, kv_heads, head_dim)
            return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers))

        lengths_B = torch.zeros(batch, dtype=torch.int32, device=device)
        return Cache(k=buffers(), v=buffers(), lengths_B=lengths_B, capacity=capacity)

    def segments(self) -> Segments:
        """The filled rows of every sequence, for attention's keys."""
        starts_B = self._starts()
        return Segments(starts_S=starts_B, ends_S=starts_B + self.lengths_B, max_len=self.capacity)

    def extend(self, new: Segments, rows: int) -> tuple[Tensor, "Cache"]:
        """The slot (a row of ``k`` and ``v``) of each of ``rows`` packed new tokens, and the cache with its lengths
        grown.

        Segment b of ``new`` goes behind what sequence b holds. The caller keeps within ``capacity``.
        """
        row_N = torch.arange(rows, device=self.lengths_B.device, dtype=torch.int32)
        sequence_N = torch.searchsorted(new.ends_S.contiguous(), row_N, right=True)
        first_B = self._starts() + self.lengths_B - new.starts_S  # slot of row r is r + first[its sequence]
        lengths_B = self.lengths_B + (new.ends_S - new.starts_S)
        slots_N = (row_N + first_B[sequence_N]).to(torch.int64)
        return slots_N, Cache(k=self.k, v=self.v, lengths_B=lengths_B, capacity=self.capacity)

    def append(self, layer: int, slots_N: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values into their slots, in place (the cache is donated); the layer's whole k and v."""
        self.k[layer].index_copy_(0, slots_N, k_NGK)
        self.v[layer].index_copy_(0, slots_N, v_NGK)
        return self.k[layer], self.v[layer]

    def _starts(self) -> Tensor:
        return self.capacity * torch.arange(len(self.lengths_B), dtype=torch.int32, device=self.lengths_B.device)
