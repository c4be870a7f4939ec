"""dropout: the same bits as the reference, a mask of key and place alone, its statistics, and what it refuses."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from oprule import ABSENT, DEVICE, DTYPES, STRANGE_STRIDES, assert_both_refuse, check_op, rand, strided

import unsloth_core.backend as backend
from unsloth_core import random
from unsloth_core.autodiff import vjp
from unsloth_core.device import launch
from unsloth_core.ops.dropout import cost, dropout, random_words
from unsloth_core.reference.dropout import philox

KEY = random.key(0, DEVICE)
NUMBERS = 2**17


def words(key, first, count):
    """The reference's words of elements from ``first``, a multiple of 4, on."""
    counter = torch.arange(first // 4, (first + count) // 4, device=DEVICE)
    low, high = key.unbind()
    parts = (part & 0xFFFFFFFF for part in (counter, counter >> 32, high, high >> 32, low, low >> 32))
    return torch.stack(philox(*parts), dim=-1).flatten()


def kept(shape, key, p):
    """Where the kernel keeps an element."""
    with backend.using("triton"):
        return dropout(torch.ones(shape, device=DEVICE), key, p=p) != 0


@given(
    shape=st.sampled_from([(), (1,), (5,), (2, 3), (37, 13), (3, 4096), (2, 3, 1031), (1, 4099)]),
    dtype=st.sampled_from(DTYPES),
    p=st.sampled_from([0.0, 0.1, 0.5, 0.97, 1.0]),
    views=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rule(shape, dtype, p, views, seed):
    x = rand(shape, dtype, seed=seed)
    check_op(dropout, (strided(x) if views and shape else x, random.key(seed, DEVICE)), {"p": p}, seed=seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 1 / 3, 1.0])
def test_the_same_bits_as_the_reference(dtype, p):
    x, dy = rand((3, 1701), dtype, seed=0), rand((3, 1701), dtype, seed=1)
    results = []
    for name in backend.NAMES:
        with backend.using(name):
            y, pullback = vjp(lambda x: dropout(x, KEY, p=p), x)
            results.append((y, *pullback(dy)))
    for ours, same in zip(*results):
        assert torch.equal(ours, same)


def test_philox_is_that_of_its_authors():
    """Known answers of Random123, whose words are written in hexadecimal digits of π in the last one."""
    for given_, wanted in [
        ([0x00000000] * 6, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 6, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]:
        assert [int(w) for w in philox(*(torch.tensor(g) for g in given_))] == wanted


@triton.jit
def _store_words(key_ptr, words_ptr, first, BLOCK: tl.constexpr, VEC: tl.constexpr):
    words = random_words(tl.full([], 0, tl.int64) + first, key_ptr, 1, BLOCK, VEC)
    tl.store(words_ptr + tl.arange(0, BLOCK), words.to(tl.int64))


@pytest.mark.parametrize("VEC", [4, 8])
@pytest.mark.parametrize("first", [0, 2**31 - 64, 2**32 - 64, 2**34 - 64, 2**40])
def test_words_at_any_place(first, VEC):
    """Beyond 2^32 elements, and 2^32 counters, too: the 128 words from there on."""
    got = torch.empty(128, dtype=torch.int64, device=DEVICE)
    launch(_store_words, (1,), KEY, got, first, BLOCK=128, VEC=VEC)
    assert torch.equal(got, words(KEY, first, 128))


def test_mask_is_of_key_and_place_alone():
    """Shape, length, dtype, strides and the launch have no part in it."""
    mask = kept((12288,), KEY, 0.3)
    assert torch.equal(mask, words(KEY, 0, 12288) >= 0.3 * 2**32)
    assert torch.equal(mask[:4100], kept((4100,), KEY, 0.3))
    assert torch.equal(mask, kept((3, 4096), KEY, 0.3).flatten())
    assert torch.equal(mask, kept((4096, 3), KEY, 0.3).flatten())
    for x in (
        torch.ones(96, 128, device=DEVICE).T,
        torch.ones(1, 1, device=DEVICE).expand(96, 128),
        strided(torch.ones(96, 128, device=DEVICE)),
        torch.ones(96, 4, 64, dtype=torch.bfloat16, device=DEVICE)[:, 1:3],
        torch.ones(96, 256, dtype=torch.float16, device=DEVICE)[:, ::2],
    ):
        with backend.using("triton"):
            assert torch.equal(dropout(x, KEY, p=0.3).flatten() != 0, mask)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_rate(p):
    """Within five standard deviations of p, over all and over each of the four words of a counter."""
    mask = kept((NUMBERS,), KEY, p).view(-1, 4).double()
    deviation = (p * (1 - p) / NUMBERS) ** 0.5
    assert abs(float(mask.mean()) - (1 - p)) < 5 * deviation
    assert ((mask.mean(0) - (1 - p)).abs() < 5 * 2 * deviation).all()


def test_masks_are_independent():
    """Of neighbours, and of other keys: of one seed beside the other, split, or folded in."""
    mask = kept((NUMBERS,), KEY, 0.5)
    bound = 5 * 0.5 * NUMBERS**-0.5
    for lag in (1, 2, 4, 8, 4096):
        assert abs(float((mask[lag:] == mask[:-lag]).double().mean()) - 0.5) < bound, lag
    for key in (random.key(1, DEVICE), *random.split(KEY), random.fold_in(KEY, 0), KEY.flip(0)):
        assert abs(float((mask == kept((NUMBERS,), key, 0.5)).double().mean()) - 0.5) < bound


def test_backward_has_the_mask_of_forward():
    x = torch.ones(3, 1701, device=DEVICE)
    with backend.using("triton"):
        y, pullback = vjp(lambda x: dropout(x, KEY, p=0.4), x)
        assert torch.equal(pullback(torch.ones_like(x))[0], y)


def test_the_ends():
    """p = 0 is the identity to the bit (of a NaN, GPUs keep no bits), p = 1 nothing; and what is dropped is 0 whatever
    it was."""
    x = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("nan"), 1e-45, 3.4e38], device=DEVICE)
    for name in backend.NAMES:
        with backend.using(name):
            kept = dropout(x, KEY, p=0.0)
            assert torch.equal(kept.isnan(), x.isnan())
            assert torch.equal(kept.nan_to_num().view(torch.int32), x.nan_to_num().view(torch.int32))
            for p in (1.0, 1 - 2**-40):
                assert torch.equal(dropout(x, KEY, p=p), torch.zeros_like(x))
            y = dropout(torch.full((100,), float("nan"), device=DEVICE), KEY, p=0.5)
            assert torch.equal(y == 0, words(KEY, 0, 100) < 2**31)


@pytest.mark.parametrize("view", STRANGE_STRIDES.values(), ids=STRANGE_STRIDES)
def test_cotangents_of_any_strides(view):
    x, dy = rand((2, 3, 17), seed=0), view(rand((2, 3, 17), seed=1))
    with backend.using("triton"):
        _, pullback = vjp(lambda x: dropout(x, KEY, p=0.5), x)
        assert torch.equal(pullback(dy)[0], pullback(dy.contiguous())[0])


def test_cotangent_that_must_be_copied():
    dy = rand((4, 3, 2, 8), seed=2).transpose(0, 2)
    with backend.using("triton"):
        dx, dkey = dropout.bwd((KEY,), dy, needs=(True, False), p=0.5)
        assert torch.equal(dx, dropout(dy.contiguous(), KEY, p=0.5)) and dkey is ABSENT


def test_frozen():
    x = rand((2, 6), seed=0)
    with backend.using("triton"):
        y, residuals = dropout.fwd(x, KEY, needs=(False, False), p=0.5)
        assert residuals == (ABSENT,) and dropout.bwd(residuals, y, needs=(False, False), p=0.5) == (ABSENT, ABSENT)


def test_no_rows():
    for name in backend.NAMES:
        with backend.using(name):
            y, pullback = vjp(lambda x: dropout(x, KEY, p=0.5), rand((0, 3), seed=0))
            assert y.shape == pullback(y)[0].shape == (0, 3)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="takes 9 GiB of a GPU")
@pytest.mark.parametrize("strides", ["contiguous", "expanded"])
def test_more_than_2_31_elements(strides):
    rows = 2**31 // 4096 + 2
    x = torch.ones(1, 4096, dtype=torch.bfloat16, device=DEVICE).expand(rows, 4096)
    with backend.using("triton"):
        y = dropout(x.contiguous() if strides == "contiguous" else x, KEY, p=0.5)
    for row in (0, 2**31 // 4096 - 1, rows - 1):
        assert torch.equal(y[row] != 0, words(KEY, row * 4096, 4096) >= 2**31)


def test_refusals():
    x = rand((2, 6), seed=0)

    def refuses(error, message, x, key=KEY, p=0.5):
        with backend.using("triton"), pytest.raises(error) as caught:
            dropout(x, key, p=p)
        assert str(caught.value) == message

    wanted = "expected float16, bfloat16 or float32"
    refuses(ValueError, f"dropout: x has dtype torch.float64, {wanted}", x.double())
    refuses(ValueError, f"dropout: key is on meta, expected x's device {x.device}", x, KEY.to("meta"))
    refuses(
        ValueError,
        "dropout: rows of x (2, 2, 2, 4) strides (36, 12, 4, 1) need more than two strides; call .contiguous()",
        rand((3, 3, 3, 4), seed=0)[:2, :2, :2],
    )
    like = "expected fewer than 1073741824 of both, or a contiguous x"
    one = torch.ones(1, 1, device=DEVICE)
    refuses(NotImplementedError, f"dropout: x has 1073741824 rows of 2, {like}", one.expand(2**30, 2))
    refuses(NotImplementedError, f"dropout: x has 2 rows of 1073741824, {like}", one.expand(2, 2**30))


@pytest.mark.parametrize(
    "key, p", [((3,), 0.5), ((1, 2), 0.5), ((), 0.5), ((2,), -0.1), ((2,), 1.1), ((2,), float("nan"))]
)
def test_reference_refuses_alike(key, p):
    assert_both_refuse(dropout, torch.zeros(4, device=DEVICE), torch.zeros(key, dtype=torch.int64, device=DEVICE), p=p)


def test_reference_refuses_keys_of_other_dtypes_alike():
    assert_both_refuse(dropout, torch.zeros(4, device=DEVICE), KEY.float(), p=0.5)


def test_cost():
    assert cost(8192, 4096, 2).bytes == 4 * 8192 * 4096
