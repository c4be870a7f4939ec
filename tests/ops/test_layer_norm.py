"""layer_norm: the op rule with and without weight and bias, rows of every kind, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oprule import (
    ABSENT,
    DEVICE,
    DTYPES,
    STRANGE_STRIDES,
    assert_both_refuse,
    assert_same_up_to_order,
    check_op,
    rand,
    strided,
)

import unsloth_core.backend as backend
from unsloth_core.autodiff import vjp
from unsloth_core.ops.layer_norm import cost, layer_norm
from unsloth_core.reference.layer_norm import layer_norm as reference


@given(
    leading=st.sampled_from([(), (1,), (5,), (37,), (2, 3), (2, 3, 2)]),
    D=st.sampled_from([1, 3, 7, 16, 64, 127, 300, 1031]),
    dtype=st.sampled_from(DTYPES),
    w_dtype=st.sampled_from([ABSENT, *DTYPES]),
    b_dtype=st.sampled_from([ABSENT, *DTYPES]),
    add=st.booleans(),
    views=st.booleans(),
    level=st.sampled_from([0.0, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_rule(leading, D, dtype, w_dtype, b_dtype, add, views, level, seed):
    x = (rand((*leading, D), torch.float32, seed=seed) + level).to(dtype)
    w, b = (d if d is ABSENT else rand((D,), d, seed=seed + i) for i, d in ((1, w_dtype), (2, b_dtype)))
    extra = rand((*leading, D), dtype, seed=seed + 3) if add else ABSENT
    if views and len(leading) < 3:
        x, extra = strided(x), strided(extra) if add else ABSENT
    check_op(layer_norm, (x, w, b, extra), {"eps": 1e-3}, seed=seed)


@pytest.mark.parametrize("dtype, D", [(torch.bfloat16, 8200), (torch.float32, 16500)])
def test_long_rows(dtype, D):
    """Beyond what one program holds: dw and db apart from dx, then every pass walking over three blocks and more."""
    x, add = rand((2, D), dtype, seed=D), rand((2, D), dtype, seed=D + 1)
    check_op(layer_norm, (x, rand((D,), dtype, seed=D + 2), rand((D,), dtype, seed=D + 3), add))


@pytest.mark.parametrize("rows, D, frozen", [(1061, 8, ""), (131, 700, "1"), (131, 700, "2"), (133, 700, "0")])
def test_many_rows_per_program(rows, D, frozen):
    """More rows than programs times tiles, the last tile ragged: the loop over rows and the partial sums."""
    x, w, b = rand((rows, D), torch.bfloat16, seed=0), rand((D,), seed=1), rand((D,), torch.bfloat16, seed=2)
    check_op(layer_norm, (x, w, b), frozen=lambda path: path == frozen)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="runs every row of the launch table, which is for GPUs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [2**i for i in range(2, 18)])
def test_every_launch_configuration(dtype, D):
    """Compiled code for whole rows of every width in the table, and for the walks beyond it."""
    check_op(layer_norm, (rand((37, D), dtype, seed=D), rand((D,), seed=1), rand((D,), seed=2)))
    check_op(layer_norm, (rand((37, D), dtype, seed=D), ABSENT, ABSENT))


@pytest.mark.parametrize("given", ["wb", "w", "b", ""])
def test_is_that_of_pytorch(given):
    x, w, b = rand((5, 33), seed=0).double(), rand((33,), seed=1).double(), rand((33,), seed=2).double()
    ours = reference(x, w if "w" in given else ABSENT, b if "b" in given else ABSENT, eps=1e-5)
    theirs = F.layer_norm(x, (33,), w if "w" in given else None, b if "b" in given else None)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("D", [300, 17000])
def test_variance_of_rows_far_from_zero(D):
    """At a level of 1000 mean(x²) - μ² has no digit of a variance of 1 left in fp32; walked rows included."""
    x = (rand((3, D), torch.float64, seed=D) + 1000).float()
    with backend.using("triton"):
        _, (_, _, (mean, rstd), _) = layer_norm.fwd(x, needs=(True, ABSENT, ABSENT, ABSENT), eps=1e-12)
    wide = x.double()
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), wide.mean(-1), rtol=2**-21, atol=0)
    torch.testing.assert_close(rstd.double(), wide.var(-1, correction=0).rsqrt(), rtol=2**-19, atol=0)


@pytest.mark.parametrize("rows", [(0,), (2, 0), (0, 3)])
def test_no_rows(rows):
    x, w, b = rand((*rows, 5), seed=0), rand((5,), seed=1), rand((5,), seed=2)
    with backend.using("triton"):
        y, pullback = vjp(layer_norm, x, w, b)
        dx, dw, db = pullback(y)
    assert y.shape == dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(w)) and torch.equal(db, torch.zeros_like(b))


def test_heads_of_a_slice():
    """(N, H, K) cut from the columns of qkv: two row strides, no copy."""
    q = rand((5, 4 * 16), torch.bfloat16, seed=0)[:, 16:48].unflatten(1, (2, 16))
    check_op(layer_norm, (q, rand((16,), torch.bfloat16, seed=1), ABSENT))


def test_two_channels():
    """x̂ is ±1, but for eps: a gradient of x that is small beside its terms, in PyTorch too."""
    check_op(layer_norm, (rand((9, 2), seed=0), rand((2,), seed=1), rand((2,), seed=2)), {"eps": 1.0})


def test_a_single_channel_of_many():
    """D = 1: the last stride is never used, whatever it is; and y is b."""
    x, w, b = rand((10, 6), seed=0).T[:, :1], rand((1,), seed=1), rand((1,), seed=2)
    with backend.using("triton"):
        assert torch.equal(layer_norm(x, w, b), b.expand(6, 1))


@pytest.mark.parametrize("rows, D, view", [*((2, 13, v) for v in STRANGE_STRIDES), (1, 17000, "permuted")])
def test_cotangents_of_any_strides(rows, D, view):
    """The same as from a contiguous cotangent: y.sum().backward() gives one number for everything."""
    args = rand((rows, 3, D), seed=0), rand((D,), seed=1), rand((D,), seed=2)
    dy = STRANGE_STRIDES[view](rand((rows, 3, D), seed=3))
    with backend.using("triton"):
        _, pullback = vjp(layer_norm, *args)
        for ours, same in zip(pullback(dy), pullback(dy.contiguous())):
            assert_same_up_to_order(ours, same)


@pytest.mark.parametrize("needs", [(True, True, True, ABSENT), (False, False, True, ABSENT)])
def test_cotangent_that_must_be_copied(needs):
    x, w, b = rand((2, 3, 4, 8), seed=0), rand((8,), seed=1), rand((8,), seed=2)
    dy = rand((4, 3, 2, 8), seed=3).transpose(0, 2)
    with backend.using("triton"):
        _, residuals = layer_norm.fwd(x, w, b, needs=needs)
        ours = layer_norm.bwd(residuals, dy, needs=needs)
        same = layer_norm.bwd(residuals, dy.contiguous(), needs=needs)
    for one, other, need in zip(ours, same, needs):
        assert torch.equal(one, other) if need else one is other is ABSENT


def test_what_nobody_needs_is_not_kept():
    x, w, b = rand((3, 8), seed=0), rand((8,), seed=1), rand((8,), seed=2)
    with backend.using("triton"):
        _, residuals = layer_norm.fwd(x, w, b, x, needs=(False, False, False, True))
        assert residuals == (ABSENT,) * 4
        assert layer_norm.bwd(residuals, x, needs=(False, False, False, True)) == (ABSENT, ABSENT, ABSENT, x)
        _, residuals = layer_norm.fwd(x, w, b, needs=(False, False, True, ABSENT))
        assert residuals[:3] == (ABSENT,) * 3 and residuals[3] is b


def refuses(error, message, *args, **statics):
    with backend.using("triton"), pytest.raises(error) as caught:
        layer_norm(*args, **statics)
    assert str(caught.value) == message


def test_refusals():
    x, w = rand((2, 4), seed=0), rand((4,), seed=1)
    refuses(ValueError, "layer_norm: w has shape (1,), expected (D,) = (4,)", x, w[:1])
    refuses(ValueError, "layer_norm: b has shape (1, 4), expected (D,) = (4,)", x, w, w[None])
    refuses(ValueError, "layer_norm: b has stride 2, expected 1", x, w, rand((8,), seed=1)[::2])
    refuses(ValueError, "layer_norm: x has shape (), expected (..., D) with D >= 1", x[0, 0])
    refuses(ValueError, "layer_norm: x has shape (2, 0), expected (..., D) with D >= 1", x[:, :0])
    wanted = "expected float16, bfloat16 or float32"
    refuses(ValueError, f"layer_norm: x has dtype torch.float64, {wanted}", x.double(), w)
    refuses(ValueError, f"layer_norm: b has dtype torch.int64, {wanted}", x, w, w.long())
    like_x = "expected x's (2, 4) torch.float32"
    refuses(ValueError, f"layer_norm: add is (4,) torch.float32, {like_x}", x, w, w, x[0])
    refuses(ValueError, f"layer_norm: add is (2, 4) torch.float16, {like_x}", x, w, w, x.half())
    refuses(ValueError, f"layer_norm: b is on meta, expected x's device {x.device}", x, w, w.to("meta"))
    refuses(ValueError, "layer_norm: x has strides (1, 2), expected a last stride of 1", rand((4, 2), seed=0).T, w)
    rows = torch.empty((1, 1), device=DEVICE).expand(2**30, 1)
    refuses(NotImplementedError, "layer_norm: x has 1073741824 rows, expected fewer than 1073741824", rows, w[:1])


@pytest.mark.parametrize("w, b, add", [((1,), (4,), (2, 4)), ((4,), (1, 4), (2, 4)), ((4,), (4,), (4,))])
def test_reference_refuses_alike(w, b, add):
    assert_both_refuse(layer_norm, *(torch.zeros(s, device=DEVICE) for s in ((2, 4), w, b, add)))


def test_cost():
    assert cost(8192, 4096, 2).bytes == 2 * 8192 * 4096 * 2 + 8192 * 8 + 2 * 4096 * 2
    assert cost(8192, 4096, 2, backward=True).bytes == 3 * 8192 * 4096 * 2 + 8192 * 8 + 3 * 4096 * 2
    assert cost(8, 4, 2, add=True).bytes == 3 * 8 * 4 * 2 + 8 * 8 + 2 * 4 * 2
