"""softmax: the op rule, rows of every width, what is not finite, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import ABSENT, DEVICE, DTYPES, STRANGE_STRIDES, assert_both_refuse, check_op, rand, strided

import unsloth_core.backend as backend
from unsloth_core.autodiff import vjp
from unsloth_core.ops.softmax import cost, softmax

INF = float("inf")


@given(
    leading=st.sampled_from([(), (1,), (5,), (37,), (2, 3), (2, 3, 2)]),
    D=st.sampled_from([1, 2, 7, 16, 64, 127, 300, 1031]),
    dtype=st.sampled_from(DTYPES),
    views=st.booleans(),
    scale=st.sampled_from([1e-4, 1.0, 8.0]),  # beyond, the smallest are subnormal and cannot be doubled exactly
    seed=st.integers(0, 2**16),
)
def test_rule(leading, D, dtype, views, scale, seed):
    x = rand((*leading, D), dtype, seed=seed, scale=scale)
    check_op(softmax, (strided(x) if views and len(leading) < 3 else x,), seed=seed)


@pytest.mark.parametrize("dtype, D", [(torch.float32, 16500), (torch.bfloat16, 16500), (torch.float16, 16500)])
def test_long_rows(dtype, D):
    """Beyond what one program holds, over several blocks, the last one ragged."""
    check_op(softmax, (rand((3, D), dtype, seed=D, scale=4.0),))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="runs every row of the launch table, which is for GPUs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [2**i for i in range(18)])
def test_every_launch_configuration(dtype, D):
    """Compiled code for whole rows of every width in the table, and for the walks beyond it."""
    check_op(softmax, (rand((37, D), dtype, seed=D, scale=4.0),))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter: the NaN is what is meant
@pytest.mark.parametrize("D", [8, 16500])
def test_what_is_not_finite_is_as_in_pytorch(D):
    """A maximum of -inf, +inf or NaN makes the row NaN; -inf elsewhere is 0, and the lowest finite number counts."""
    lowest = torch.finfo(torch.float32).min
    x = torch.zeros(7, D, device=DEVICE)
    x[0] = -INF
    x[1, 1:] = -INF
    x[2, ::3] = -INF
    x[3] = lowest
    x[4, 5] = INF
    x[5, 7] = float("nan")
    x[6, :-1] = lowest
    dy = torch.ones_like(x)
    with backend.using("triton"):
        y, pullback = vjp(softmax, x)
        (dx,) = pullback(dy)
    wide = x.double().requires_grad_()
    wanted = torch.softmax(wide, -1)
    torch.testing.assert_close(y.double(), wanted.detach(), equal_nan=True, rtol=2**-20, atol=0)
    assert torch.equal(dx.isnan(), wanted.detach().isnan())


def test_rows_sum_to_one_at_any_level():
    """The maximum is taken off first: large and small numbers alike."""
    x = rand((3, 300), seed=0)
    with backend.using("triton"):
        for level in (-1e4, 0.0, 1e4):
            torch.testing.assert_close(softmax(x + level).sum(-1), torch.ones(3, device=DEVICE), rtol=2**-20, atol=0)


def test_a_maximum_that_rises_from_block_to_block():
    """Sums so far are rescaled again and again."""
    x = torch.linspace(-20, 20, 17000, device=DEVICE)[None]
    check_op(softmax, (x,))
    check_op(softmax, (x.flip(-1),))


@pytest.mark.parametrize("rows, D, view", [*((2, 13, v) for v in STRANGE_STRIDES), (1, 17000, "permuted")])
def test_cotangents_of_any_strides(rows, D, view):
    x, dy = rand((rows, 3, D), seed=0), STRANGE_STRIDES[view](rand((rows, 3, D), seed=1))
    with backend.using("triton"):
        _, pullback = vjp(softmax, x)
        torch.testing.assert_close(pullback(dy), pullback(dy.contiguous()), rtol=2**-18, atol=2**-22)


def test_heads_of_a_slice():
    """(N, H, K) cut from wider rows: two row strides, no copy."""
    check_op(softmax, (rand((5, 64), torch.bfloat16, seed=0)[:, 16:48].unflatten(1, (2, 16)),))


def test_frozen():
    x = rand((2, 6), seed=0)
    with backend.using("triton"):
        y, residuals = softmax.fwd(x, needs=(False,))
        assert residuals == (ABSENT,) == softmax.bwd(residuals, y, needs=(False,))


def test_no_rows():
    x = rand((0, 3, 10), seed=0)
    with backend.using("triton"):
        y, pullback = vjp(softmax, x)
        (dx,) = pullback(y)
    assert y.shape == dx.shape == x.shape


def test_refusals():
    x = rand((2, 6), seed=0)

    def refuses(error, message, x):
        with backend.using("triton"), pytest.raises(error) as caught:
            softmax(x)
        assert str(caught.value) == message

    wanted = "expected float16, bfloat16 or float32"
    refuses(ValueError, f"softmax: x has dtype torch.float64, {wanted}", x.double())
    refuses(ValueError, "softmax: x has strides (1, 2), expected a last stride of 1", rand((6, 2), seed=0).T)
    rows = torch.empty((1, 2), device=DEVICE).expand(2**30, 2)
    refuses(NotImplementedError, "softmax: x has 1073741824 rows, expected fewer than 1073741824", rows)


@pytest.mark.parametrize("shape", [(), (2, 0)])
def test_reference_refuses_alike(shape):
    assert_both_refuse(softmax, torch.zeros(shape, device=DEVICE))


def test_cost():
    assert cost(8192, 4096, 2).bytes == 4 * 8192 * 4096
    assert cost(8192, 4096, 2, backward=True).bytes == 6 * 8192 * 4096
