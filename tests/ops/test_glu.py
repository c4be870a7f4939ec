"""glu: the op rule for every activation, tiles of every shape, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import ABSENT, DEVICE, DTYPES, STRANGE_STRIDES, assert_both_refuse, check_op, rand, strided

import unsloth_core.backend as backend
from unsloth_core.autodiff import vjp
from unsloth_core.ops.glu import cost, glu
from unsloth_core.reference.glu import glu as reference

ACTS = ["silu", "gelu_tanh", "gelu_erf", "relu2"]


@given(
    shape=st.sampled_from([(1, 1), (5, 1), (1, 7), (37, 13), (2, 3, 65), (3, 300), (2, 1031), (130, 16)]),
    dtype=st.sampled_from(DTYPES),
    act=st.sampled_from(ACTS),
    views=st.booleans(),
    scale=st.sampled_from([1e-4, 1.0, 4.0]),
    seed=st.integers(0, 2**16),
)
def test_rule(shape, dtype, act, views, scale, seed):
    *leading, F = shape
    # Beyond 8 a gradient of gelu is too small to double exactly, as the linearity check wants it.
    x = rand((*leading, 2 * F), dtype, seed=seed, scale=scale).clamp(-8, 8)
    check_op(glu, (strided(x) if views else x,), {"act": act}, seed=seed)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("F", [3001, 4096])
def test_several_tiles_in_a_row(act, F):
    check_op(glu, (rand((3, 2 * F), torch.bfloat16, seed=F),), {"act": act})


def test_slice_of_a_product():
    """(N, E, 2F) cut from wider rows: two row strides, no copy."""
    x = rand((5, 4, 40), torch.bfloat16, seed=0)[:, 1:3, 8:38]
    check_op(glu, (x,))


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter: 2^-inf is what is meant
@pytest.mark.parametrize("act", ["silu", "gelu_tanh", "gelu_erf"])
def test_large_gates(act):
    """Far out the activation is a or 0, its slope 1 or 0, and nothing overflows on the way."""
    gate = torch.tensor([-1e18, -1e10, -1e4, -200.0, 0.0, 200.0, 1e4, 1e10, 1e18], device=DEVICE)
    x = torch.stack([gate, torch.ones_like(gate)], dim=-1)
    with backend.using("triton"):
        y, pullback = vjp(lambda x: glu(x, act=act), x)
        (d,) = pullback(torch.ones_like(y))
    assert torch.equal(y[:, 0], gate.clamp(min=0))
    assert torch.equal(d[:, 1], gate.clamp(min=0))
    assert torch.equal(d[:, 0], torch.where(gate == 0, 0.5, (gate > 0).float()))


def test_squared_relu_is_pytorchs():
    """To the bit, gradients too, at zeros of both signs, infinities and NaN."""
    gate = torch.tensor([-float("inf"), -3.0, -0.0, 0.0, 1e-30, 1.5, 1e18, float("inf"), float("nan")], device=DEVICE)
    x, dy = torch.stack([gate, torch.full_like(gate, 0.75)], dim=-1), rand((9, 1), seed=0)
    got = []
    for name in backend.NAMES:
        with backend.using(name):
            y, pullback = vjp(lambda x: glu(x, act="relu2"), x)
            got.append((y, *pullback(dy)))
    for ours, theirs in zip(*got):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_small_tail(act):
    """The left tail of the activation keeps its relative accuracy: a sigmoid does not cancel as 1 + tanh does."""
    gate = torch.linspace(-6, -0.01, 500, device=DEVICE)
    x = torch.stack([gate, torch.ones_like(gate)], dim=-1)
    with backend.using("triton"):
        y = glu(x, act=act)
    truth = reference(x.double(), act=act)
    assert (y / truth - 1).abs().max() < 5e-6


@pytest.mark.parametrize("view", STRANGE_STRIDES.values(), ids=STRANGE_STRIDES)
def test_cotangents_of_any_strides(view):
    x, dy = rand((2, 3, 34), seed=0), view(rand((2, 3, 17), seed=1))
    with backend.using("triton"):
        _, pullback = vjp(glu, x)
        assert torch.equal(pullback(dy)[0], pullback(dy.contiguous())[0])


def test_frozen():
    x = rand((2, 6), seed=0)
    with backend.using("triton"):
        y, residuals = glu.fwd(x, needs=(False,))
        assert residuals == (ABSENT,) == glu.bwd(residuals, y, needs=(False,))


def test_no_rows():
    x = rand((0, 3, 10), seed=0)
    with backend.using("triton"):
        y, pullback = vjp(glu, x)
        (d,) = pullback(y)
    assert y.shape == (0, 3, 5)
    assert d.shape == x.shape


def test_refusals():
    x = rand((2, 6), seed=0)

    def refuses(error, message, *args, **statics):
        with backend.using("triton"), pytest.raises(error) as caught:
            glu(*args, **statics)
        assert str(caught.value) == message

    refuses(ValueError, "glu: gate_up has shape (2, 5), expected (..., 2F) with F >= 1", x[:, :5])
    refuses(ValueError, "glu: gate_up has shape (2, 0), expected (..., 2F) with F >= 1", x[:, :0])
    refuses(ValueError, "glu: gate_up has shape (), expected (..., 2F) with F >= 1", x[0, 0])
    wanted = "expected float16, bfloat16 or float32"
    refuses(ValueError, f"glu: gate_up has dtype torch.float64, {wanted}", x.double())
    acts = "expected one of ('silu', 'gelu_tanh', 'gelu_erf', 'relu2')"
    refuses(ValueError, f"glu: act is 'gelu', {acts}", x, act="gelu")
    refuses(ValueError, "glu: gate_up has strides (1, 6), expected a last stride of 1", rand((2, 6), seed=0).T)
    rows = torch.empty((1, 2), device=DEVICE).expand(2**30, 2)
    refuses(NotImplementedError, "glu: gate_up has 1073741824 rows, expected fewer than 1073741824", rows)


@pytest.mark.parametrize("x, act", [((2, 5), "silu"), ((), "silu"), ((2, 4), "relu")])
def test_reference_refuses_alike(x, act):
    assert_both_refuse(glu, torch.zeros(x, device=DEVICE), act=act)


def test_cost():
    assert cost(8192, 14336, 2).bytes == 6 * 8192 * 14336
    assert cost(8192, 14336, 2, backward=True).bytes == 10 * 8192 * 14336
