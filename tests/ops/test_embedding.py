"""embedding: the op rule, ids of every kind, sums that repeat to the bit, and what it refuses."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import ABSENT, DEVICE, DTYPES, check_op, rand, strided

import unsloth_core.backend as backend
from unsloth_core.autodiff import vjp
from unsloth_core.ops import nf4
from unsloth_core.ops.embedding import cost, embedding


def draw_ids(N, V, dtype, seed):
    """Ids in [0, V), more often small ones, so that segments have all lengths."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(N, generator=generator).square() * V).to(dtype).to(DEVICE)


@given(
    N=st.sampled_from([1, 2, 13, 29]),
    V=st.sampled_from([1, 3, 17, 101]),
    D=st.sampled_from([1, 7, 64, 130]),
    dtype=st.sampled_from(DTYPES),
    id_dtype=st.sampled_from([torch.int32, torch.int64]),
    scale=st.sampled_from([1.0, 48.0, 130**0.5, 1e-3]),
    views=st.booleans(),
    strangers=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rule(N, V, D, dtype, id_dtype, scale, views, strangers, seed):
    ids, w = draw_ids(N, V, id_dtype, seed), rand((V, D), dtype, seed=seed)
    if strangers:  # ids outside the table: NaN out, no part in the gradient
        ids[:: max(1, N // 3)] = torch.tensor([-1, V, 2**31 - 1, -(2**31)], dtype=id_dtype, device=DEVICE)[seed % 4]
    if views:
        ids, w = ids.repeat_interleave(2)[::2] if N > 1 else ids, strided(w)
    check_op(embedding, (ids, w), {"scale": scale}, seed=seed)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("common", [0.0, 0.5, 1.0])
def test_long_segments(common, id_dtype):
    """One id many times: three chunks whose sums are added by the second kernel, beside segments of one chunk."""
    N = 150
    ids = draw_ids(N, 5, id_dtype, 0)
    ids[torch.rand(N, generator=torch.Generator().manual_seed(1)) < common] = 2
    ids[::50] = -7
    check_op(embedding, (ids, rand((5, 3), torch.bfloat16, seed=2)), {"scale": 3.3})


@pytest.mark.parametrize("length", [63, 64, 65, 128, 129])
def test_segments_of_chunk_size(length):
    """Lengths around one and two chunks, the segment in the middle: two chunks begin within 64 positions of it."""
    ids = torch.cat([torch.zeros(40), torch.full((length,), 1), torch.full((70,), 2)]).long().to(DEVICE)
    dx = rand((len(ids), 2), seed=0)
    with backend.using("triton"):
        _, pullback = vjp(lambda w: embedding(ids, w), torch.zeros(4, 2, device=DEVICE))
        (dw,) = pullback(dx)
    parts = torch.stack([part.double().sum(0) for part in dx.split([40, length, 70])])
    torch.testing.assert_close(dw[:3].double(), parts, rtol=1e-5, atol=1e-5)
    assert not dw[3].any()


@pytest.mark.parametrize("D, dtype", [(5, torch.float32), (64, torch.bfloat16), (520, torch.float16)])
def test_bits_of_a_row_depend_on_its_own_tokens_alone(D, dtype):
    """The gradient of an id does not change by a bit when other tokens come and go around it: so many that they are
    sorted, while few are summed in one launch."""
    ids = draw_ids(90, 3, torch.int64, 0)
    dx = rand((90, D), dtype, seed=1)
    w = torch.zeros(3, D, dtype=dtype, device=DEVICE)
    with backend.using("triton"):
        (together,) = vjp(lambda w: embedding(ids, w), w)[1](dx)
        for row in range(3):
            own = ids == row
            (alone,) = vjp(lambda w, own=own: embedding(ids[own], w), w)[1](dx[own])
            assert torch.equal(together[row], alone[row])


def test_small_updates_are_not_lost():
    """Sums are fp32: 1 and 129 times 2^-8 in bf16, where each of them alone would vanish beside the 1."""
    ids = torch.zeros(130, dtype=torch.int64, device=DEVICE)
    dx = torch.full((130, 1), 2**-8, dtype=torch.bfloat16, device=DEVICE)
    dx[0] = 1
    with backend.using("triton"):
        (dw,) = vjp(lambda w: embedding(ids, w), torch.zeros(1, 1, dtype=torch.bfloat16, device=DEVICE))[1](dx)
    assert dw.item() == 1.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("scale", [1.0, 130**0.5])
def test_a_table_in_nf4_is_its_decoded_self(dtype, double_quant, scale):
    """To the bit, with both backends; ids outside are NaN, and no ids are fine too."""
    w = nf4.quantize(rand((301, 128), dtype, seed=1), double_quant=double_quant)  # of absmax more than two blocks
    for id_dtype, N in ((torch.int64, 37), (torch.int32, 37), (torch.int64, 0)):
        ids = draw_ids(N, 301, id_dtype, 3)
        ids[::9], ids[1::9], ids[2::9] = -1, 301, 2**31 - 1
        for name in backend.NAMES:
            with backend.using(name):
                want = embedding(ids, nf4.dequantize(w), scale=scale)
                found = embedding(ids, w, scale=scale)
            assert found.dtype == dtype and found.is_contiguous()
            torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


def test_a_table_in_nf4_that_is_refused():
    ids, ragged = draw_ids(5, 10, torch.int64, 0), nf4.quantize(rand((10, 96), seed=0))
    with backend.using("triton"), pytest.raises(ValueError, match=r"rows of \(10, 96\) share blocks of 64 elements"):
        embedding(ids, ragged)
    w = nf4.quantize(rand((10, 64), seed=0), double_quant=False)
    w = dataclasses.replace(w, absmax=w.absmax.requires_grad_())
    with backend.using("triton"), pytest.raises(NotImplementedError, match="no gradient for a table in NF4"):
        embedding(ids, w)
    with backend.using("triton"), pytest.raises(ValueError, match="codes is torch.uint8"):
        embedding(ids, dataclasses.replace(w, shape=(12, 64)))


def test_scale_is_rounded_first():
    """Gemma-7B: √3072 = 55.43 is 55.5 in bf16, and the product with it is rounded once."""
    w = rand((4, 32), torch.bfloat16, seed=0)
    ids = torch.arange(4, device=DEVICE)
    for where in ("triton", "reference"):
        with backend.using(where):
            assert torch.equal(embedding(ids, w, scale=3072**0.5), w * 55.5)


def test_unscaled_rows_are_copies():
    """Bits of the table, infinities and NaN included; untouched rows get a zero gradient, not NaN."""
    w = rand((6, 9), torch.float16, seed=0)
    w[1, :3] = torch.tensor([float("inf"), -float("inf"), float("nan")])
    ids = torch.tensor([1, 1, 4], dtype=torch.int32, device=DEVICE)
    with backend.using("triton"):
        x, pullback = vjp(lambda w: embedding(ids, w), w)
        (dw,) = pullback(torch.ones_like(x))
    assert torch.equal(x.nan_to_num(7.0), w[ids.long()].nan_to_num(7.0))
    assert torch.equal(dw[:, 0], torch.tensor([0, 2, 0, 0, 1, 0], dtype=torch.float16, device=DEVICE))


def test_cotangent_of_any_strides():
    ids, w = draw_ids(7, 3, torch.int64, 0), torch.zeros(3, 4, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    with backend.using("triton"):
        x, pullback = vjp(lambda w: embedding(ids, w), w)
        for dx in (one.expand(7, 4), rand((4, 7), seed=0).T, rand((14, 8), seed=1)[::2, ::2]):
            assert torch.equal(pullback(dx)[0], pullback(dx.contiguous())[0])


def test_frozen_table():
    """Nothing is kept and nothing is computed for a table without gradient."""
    ids, w = draw_ids(3, 3, torch.int64, 0), rand((3, 4), seed=0)
    with backend.using("triton"):
        x, residuals = embedding.fwd(ids, w, needs=(False, False))
        assert residuals == (ABSENT, ABSENT)
        assert embedding.bwd(residuals, x, needs=(False, False)) == (ABSENT, ABSENT)


@pytest.mark.parametrize("N, D", [(0, 4), (3, 0), (0, 0)])
def test_empty(N, D):
    ids, w = torch.zeros(N, dtype=torch.int64, device=DEVICE), rand((3, D), torch.bfloat16, seed=0)
    with backend.using("triton"):
        x, pullback = vjp(lambda w: embedding(ids, w), w)
        (dw,) = pullback(x)
    assert x.shape == (N, D)
    assert torch.equal(dw, torch.zeros_like(w))


def test_empty_table():
    """Every id lies outside a table without rows."""
    with backend.using("triton"):
        x = embedding(torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.empty(0, 3, device=DEVICE))
    assert x.isnan().all() and x.shape == (2, 3)


@pytest.mark.parametrize(
    "ids, w, message",
    [
        (
            torch.zeros(1, 2, dtype=torch.int64),
            torch.zeros(3, 4),
            "embedding: ids has shape (1, 2), expected (N,)",
        ),
        (torch.zeros(2), torch.zeros(3, 4), "embedding: ids has dtype torch.float32, expected int32 or int64"),
        (
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(3),
            "embedding: w has shape (3,), expected (V, D)",
        ),
        (
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(3, 4, dtype=torch.float64),
            "embedding: w has dtype torch.float64, expected float16, bfloat16 or float32",
        ),
    ],
)
def test_bad_arguments(ids, w, message):
    with backend.using("triton"), pytest.raises(ValueError) as error:
        embedding(ids.to(DEVICE), w.to(DEVICE))
    assert str(error.value) == message


def test_bad_device():
    ids = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with backend.using("triton"), pytest.raises(ValueError) as error:
        embedding(ids, torch.zeros(3, 4, device="meta"))
    assert str(error.value) == f"embedding: ids is on {ids.device}, expected w's device meta"


def test_cost():
    """Llama-3-8B: the dense gradient of its 128,256 rows is the cost, not the 8192 tokens."""
    assert cost(8192, 128256, 4096, 2).bytes == 4 * 8192 * 4096 + 8 * 8192
    assert cost(8192, 128256, 4096, 2, backward=True).bytes == 2 * (8192 + 128256) * 4096 + 8 * 8192
