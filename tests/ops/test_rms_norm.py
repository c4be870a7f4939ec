"""rms_norm: the op rule, rows of every kind, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import (
    ABSENT,
    DEVICE,
    DTYPES,
    STRANGE_STRIDES,
    assert_both_refuse,
    assert_op_rule,
    assert_same_up_to_order,
    check_op,
    rand,
    strided,
)

import unsloth_core.backend as backend
from unsloth_core.autodiff import vjp
from unsloth_core.ops.rms_norm import cost, rms_norm, row_strides
from unsloth_core.reference.rms_norm import rms_norm as reference

DIMS = st.sampled_from([1, 2, 7, 16, 64, 127, 300, 1031])
MODES = st.sampled_from([("llama", 0.0), ("gemma", 1.0), ("gemma", 0.0), ("llama", 1.0)])


@given(
    leading=st.sampled_from([(), (1,), (5,), (37,), (2, 3), (2, 3, 2)]),
    D=DIMS,
    dtype=st.sampled_from(DTYPES),
    w_dtype=st.sampled_from(DTYPES),
    mode=MODES,
    add=st.booleans(),
    views=st.booleans(),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_rule(leading, D, dtype, w_dtype, mode, add, views, scale, seed):
    x = rand((*leading, D), dtype, seed=seed, scale=scale)
    extra = rand((*leading, D), dtype, seed=seed + 1) if add else ABSENT
    w = rand((D,), w_dtype, seed=seed + 2)
    if views and len(leading) < 3:
        x, extra = strided(x), strided(extra) if add else ABSENT
    check_op(rms_norm, (x, w, extra), {"casting_mode": mode[0], "offset": mode[1], "eps": 1e-5}, seed=seed)


@pytest.mark.parametrize("dtype, D", [(torch.bfloat16, 8200), (torch.float32, 16500), (torch.bfloat16, 33001)])
def test_long_rows(dtype, D):
    """Beyond what one program holds: dw apart from dx, then every pass walking over three blocks and more."""
    x, add = rand((2, D), dtype, seed=D), rand((2, D), dtype, seed=D + 1)
    check_op(rms_norm, (x, rand((D,), dtype, seed=D + 2), add), {"offset": 1.0})


@pytest.mark.parametrize("rows, D, frozen", [(1061, 8, ""), (131, 700, ""), (133, 700, "0")])
def test_many_rows_per_program(rows, D, frozen):
    """More rows than programs times tiles, the last tile ragged: the loop over rows and the partial sums of dw."""
    x, w = rand((rows, D), torch.bfloat16, seed=0), rand((D,), torch.float32, seed=1)
    check_op(rms_norm, (x, w), frozen=lambda path: path == frozen)


@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 3)])
def test_no_rows(rows):
    x, w = rand((*rows, 5), seed=0), rand((5,), seed=1)
    with backend.using("triton"):
        y, pullback = vjp(rms_norm, x, w)
        dx, dw = pullback(y)
    assert y.shape == dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(w))


def test_heads_of_a_slice():
    """(N, H, K) cut from the columns of qkv: two row strides, no copy."""
    qkv = rand((5, 4 * 16), torch.bfloat16, seed=0)
    q = qkv[:, 16:48].unflatten(1, (2, 16))
    assert row_strides(q) == (2, ((64, 16),))
    check_op(rms_norm, (q, rand((16,), torch.bfloat16, seed=1)))


def test_a_single_channel_of_many():
    """D = 1: the last stride is never used, whatever it is."""
    x = rand((6, 10), seed=0)[:, 3:4]
    check_op(rms_norm, (x, rand((1,), seed=1)), {"eps": 0.1})
    check_op(rms_norm, (rand((10, 6), seed=0).T[:, :1], rand((1,), seed=1)), {"eps": 0.1})


def test_row_strides():
    t = rand((2, 3, 4, 8), seed=0)
    assert row_strides(t) == (1, ((8, 0),))
    assert row_strides(t[:, :, :, :5]) == (1, ((8, 0),))
    assert row_strides(t[:, :2]) == (8, ((96, 8),))
    assert row_strides(t[:, :, :2], t[:, :, 1:3]) == (2, ((32, 8), (32, 8)))
    assert row_strides(t[:, :2, :2]) is None
    assert row_strides(t[:1, :2, :2]) == (2, ((32, 8),))
    assert row_strides(t[0, 0, 0].expand(2, 3, 4, 8)) == (1, ((0, 0),))
    assert row_strides(t[:, 0], t[:, 0].contiguous()) == (4, ((96, 8), (32, 8)))


@pytest.mark.parametrize("D", [13, 17000])
@pytest.mark.parametrize("view", STRANGE_STRIDES.values(), ids=STRANGE_STRIDES)
def test_cotangents_of_any_strides(D, view):
    """The same as from a contiguous cotangent: y.sum().backward() gives one number for everything."""
    x, w = rand((2, 3, D), seed=0), rand((D,), seed=1)
    dy = view(rand((2, 3, D), seed=2))
    with backend.using("triton"):
        _, pullback = vjp(rms_norm, x, w)
        for ours, same in zip(pullback(dy), pullback(dy.contiguous())):
            assert_same_up_to_order(ours, same)


def test_cotangent_that_must_be_copied():
    x, w = rand((2, 3, 4, 8), seed=0), rand((8,), seed=1)
    dy = rand((4, 3, 2, 8), seed=2).transpose(0, 2)
    assert row_strides(x, dy) is None
    with backend.using("triton"):
        _, pullback = vjp(rms_norm, x, w)
        for ours, same in zip(pullback(dy), pullback(dy.contiguous())):
            assert torch.equal(ours, same)


def test_add_alone_keeps_nothing():
    x, w, add = rand((3, 8), seed=0), rand((8,), seed=1), rand((3, 8), seed=2)
    with backend.using("triton"):
        _, residuals = rms_norm.fwd(x, w, add, needs=(False, False, True))
        assert residuals == (ABSENT, ABSENT, ABSENT)
        assert rms_norm.bwd(residuals, x, needs=(False, False, True)) == (ABSENT, ABSENT, x)


def test_statistics_are_fp32():
    """The mean of squares of a long bf16 row, and a row whose squares would overflow fp16."""
    x = rand((2, 4096), torch.float16, seed=0, scale=3e3)
    with backend.using("triton"):
        _, (_, _, rstd) = rms_norm.fwd(x, torch.ones(4096, device=DEVICE), needs=(True, False, ABSENT))
    truth = torch.rsqrt(x.double().square().mean(-1) + 1e-6)
    assert rstd.dtype == torch.float32
    assert_op_rule(rstd, truth.float(), truth, "rstd")


def test_casting_modes_are_those_of_the_models():
    """Llama rounds the normalised row before its weight, Gemma does not: as bf16 numbers they differ."""
    x, w = rand((64, 128), torch.bfloat16, seed=0), rand((128,), torch.bfloat16, seed=1)
    with backend.using("triton"):
        for mode in ("llama", "gemma"):
            ours = rms_norm(x, w, casting_mode=mode)
            same = (ours == reference(x, w, casting_mode=mode)).float().mean()
            other = (ours == reference(x, w, casting_mode="gemma" if mode == "llama" else "llama")).float().mean()
            assert same > 0.99 > 0.9 > other


def refuses(error, message, *args, **statics):
    with backend.using("triton"), pytest.raises(error) as caught:
        rms_norm(*args, **statics)
    assert str(caught.value) == message


def test_refusals():
    x, w = rand((2, 4), seed=0), rand((4,), seed=1)
    refuses(ValueError, "rms_norm: w has shape (1,), expected (D,) = (4,)", x, w[:1])
    refuses(ValueError, "rms_norm: w has shape (1, 4), expected (D,) = (4,)", x, w[None])
    refuses(ValueError, "rms_norm: w has stride 2, expected 1", x, rand((8,), seed=1)[::2])
    refuses(ValueError, "rms_norm: x has shape (), expected (..., D) with D >= 1", x[0, 0], w)
    refuses(ValueError, "rms_norm: x has shape (2, 0), expected (..., D) with D >= 1", x[:, :0], w[:0])
    wanted = "expected float16, bfloat16 or float32"
    refuses(ValueError, f"rms_norm: x has dtype torch.float64, {wanted}", x.double(), w)
    refuses(ValueError, f"rms_norm: w has dtype torch.int64, {wanted}", x, w.long())
    like_x = "expected x's (2, 4) torch.float32"
    refuses(ValueError, f"rms_norm: add is (4,) torch.float32, {like_x}", x, w, x[0])
    refuses(ValueError, f"rms_norm: add is (2, 4) torch.float16, {like_x}", x, w, x.half())
    refuses(ValueError, "rms_norm: w is on meta, expected x's device " + str(x.device), x, w.to("meta"))
    refuses(
        ValueError,
        "rms_norm: casting_mode is 'none', expected one of ('llama', 'gemma')",
        x,
        w,
        casting_mode="none",
    )
    refuses(ValueError, "rms_norm: x has strides (1, 2), expected a last stride of 1", rand((4, 2), seed=0).T, w)
    block = rand((3, 3, 3, 4), seed=0)[:2, :2, :2]
    refuses(
        ValueError,
        "rms_norm: rows of x (2, 2, 2, 4) strides (36, 12, 4, 1) need more than two strides; call .contiguous()",
        block,
        w,
    )
    rows = torch.empty((1, 1), device=DEVICE).expand(2**30, 1)
    refuses(NotImplementedError, "rms_norm: x has 1073741824 rows, expected fewer than 1073741824", rows, w[:1])


@pytest.mark.parametrize(
    "w, add, mode", [((1,), (2, 4), "llama"), ((1, 4), (2, 4), "llama"), ((4,), (4,), "llama"), ((4,), (2, 4), "x")]
)
def test_reference_refuses_alike(w, add, mode):
    assert_both_refuse(rms_norm, *(torch.zeros(s, device=DEVICE) for s in ((2, 4), w, add)), casting_mode=mode)


def test_cost():
    assert cost(8192, 4096, 2).bytes == 2 * 8192 * 4096 * 2 + 8192 * 4 + 4096 * 2
    assert cost(8192, 4096, 2, backward=True).bytes == 3 * 8192 * 4096 * 2 + 8192 * 4 + 2 * 4096 * 2
    assert cost(8, 4, 2, add=True).bytes == 3 * 8 * 4 * 2 + 8 * 4 + 4 * 2
