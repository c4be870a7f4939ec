"""Random keys, as values: equal keys give equal numbers, whatever ran before and on whatever device.

A key is an int64 tensor of two words (JAX's idea); ``split`` and ``fold_in`` derive new ones by SplitMix64's mixing on
the host or device without a sync, so a key may change from step to step inside a captured graph.
"""

import torch
from torch import Tensor

_MASK = (1 << 63) - 1
# SplitMix64's odd constants (Steele, Lea, Flood 2014), as signed 64-bit integers.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def key(seed: int, device: torch.device | str | None = None) -> Tensor:
    """A (2,) int64 key from an integer seed."""
    return _mix(torch.tensor([seed & _MASK, ~seed & _MASK], dtype=torch.int64, device=device))


def check(where: str, key: Tensor) -> None:
    """Raises ValueError for anything but a key, such as the seed of one."""
    if not (isinstance(key, Tensor) and key.shape == (2,) and key.dtype == torch.int64):
        got = f"{tuple(key.shape)} {key.dtype}" if isinstance(key, Tensor) else f"of type {type(key).__name__}"
        raise ValueError(f"{where}: key is {got}, expected a (2,) torch.int64 of random.key(seed)")


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key from a key and an integer (a step, a layer), which may be a 0-d device tensor; n keys of an (n, 1)."""
    step = (data.to(torch.int64) + 1) * _GOLDEN if isinstance(data, Tensor) else _wrap((data + 1) * _GOLDEN)
    return _mix(key + step)


def split(key: Tensor, count: int = 2) -> tuple[Tensor, ...]:
    """``count`` independent keys."""
    return tuple(fold_in(fold_in(key, i), count) for i in range(count))


def generator(key: Tensor) -> torch.Generator:
    """A CPU generator seeded by the key, for initial values drawn on the host."""
    return torch.Generator().manual_seed(int(key[0] ^ key[1]) & _MASK)


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's finaliser on each word, the words crossed first; int64 arithmetic wraps, as wanted."""
    z = words + _GOLDEN * words.flip(-1)
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _wrap(value: int) -> int:
    """A Python integer as a signed 64-bit one."""
    return ((value + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical, on a signed type
