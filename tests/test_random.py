"""Keys are values: equal keys give equal numbers on every device, and derived keys have nothing in common."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import DEVICE

from unsloth_core import random

SEEDS = st.integers(-(2**70), 2**70)


def words(key):
    return tuple(key.tolist())


def draw(key, n=4096):
    return torch.rand(n, generator=random.generator(key), dtype=torch.float64)


def mixed(pair):
    """SplitMix64's finaliser in whole numbers."""
    results = []
    for word, other in (pair, pair[::-1]):
        z = (word + 0x9E3779B97F4A7C15 * other) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        results.append(z ^ z >> 31)
    return tuple(results)


def signed(pair):
    return tuple(word - 2**64 if word >= 2**63 else word for word in pair)


@given(seed=SEEDS, data=st.integers(-(2**62), 2**62))
def test_keys_are_those_of_the_definition(seed, data):
    """A run resumes to the same bits only if they never change."""
    key = mixed((seed % 2**63, ~seed % 2**63))
    assert words(random.key(seed)) == signed(key)
    step = (data + 1) * 0x9E3779B97F4A7C15
    assert words(random.fold_in(random.key(seed), data)) == signed(mixed((key[0] + step, key[1] + step)))


@given(seed=SEEDS)
def test_equal_seeds_give_equal_keys_on_every_device(seed):
    key = random.key(seed)
    assert key.dtype == torch.int64 and key.shape == (2,)
    assert words(key) == words(random.key(seed)) == words(random.key(seed, DEVICE))
    assert torch.equal(draw(key, 8), draw(random.key(seed), 8))


@given(seed=st.integers(0, 2**40), data=st.integers(-(2**62), 2**62))
def test_integers_and_device_scalars_agree(seed, data):
    key = random.key(seed)
    expected = words(random.fold_in(key, data))
    assert words(random.fold_in(key, torch.tensor(data))) == expected
    assert words(random.fold_in(key.to(DEVICE), torch.tensor(data, device=DEVICE))) == expected


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64, torch.uint8])
def test_scalars_of_any_integer_dtype(dtype):
    key = random.key(3)
    assert words(random.fold_in(key, torch.tensor(100, dtype=dtype))) == words(random.fold_in(key, 100))
    for top in (torch.iinfo(dtype).max, torch.iinfo(dtype).max - 1):
        assert words(random.fold_in(key, torch.tensor(top, dtype=dtype))) == words(random.fold_in(key, top))


def test_deriving_changes_nothing():
    key = random.key(5)
    before = words(key)
    random.split(key, 3), random.fold_in(key, 1), random.generator(key)
    state = torch.get_rng_state()
    draw(key)
    assert words(key) == before and torch.equal(torch.get_rng_state(), state)


def test_derived_keys_are_all_different():
    root = random.key(0)
    keys = [root, *random.split(root, 100), *random.split(root, 101), *(random.fold_in(root, i) for i in range(1000))]
    keys += [random.fold_in(k, i) for k in random.split(root, 10) for i in range(100)]
    keys += [random.key(seed) for seed in range(1, 1000)]
    assert len({words(k) for k in keys}) == len(keys)
    assert len({words(k)[0] for k in keys}) == len({words(k)[1] for k in keys}) == len(keys)
    first, second = random.split(root)  # two by default
    assert words(first) == words(random.split(root, 2)[0]) and words(first) != words(second)
    assert words(random.split(root, 3)[0]) != words(first)  # of another split, not a prefix of it


def test_one_bit_of_the_seed_changes_half_the_bits_of_the_key():
    def flipped(a, b):
        return sum(((x ^ y) % 2**64).bit_count() for x, y in zip(words(a), words(b), strict=True))

    counts = [flipped(random.key(s), random.key(s ^ (1 << bit))) for s in range(20) for bit in range(40)]
    counts += [flipped(random.fold_in(random.key(1), i), random.fold_in(random.key(1), i + 1)) for i in range(200)]
    assert 40 < min(counts) and max(counts) < 88 and 63 < sum(counts) / len(counts) < 65


def test_numbers_of_derived_keys_are_independent():
    streams = torch.stack([draw(k) for k in [random.key(0), *random.split(random.key(0), 15)]])
    assert (streams.mean(1) - 0.5).abs().max() < 5 * (1 / 12 / 4096) ** 0.5
    correlation = torch.corrcoef(streams) - torch.eye(16, dtype=torch.float64)
    assert correlation.abs().max() < 5 / 4096**0.5
