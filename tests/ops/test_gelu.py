"""gelu: the op rule, tiles of every shape, the far ends, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import ABSENT, DEVICE, DTYPES, STRANGE_STRIDES, assert_both_refuse, check_op, rand, strided

import unsloth_core.backend as backend
from unsloth_core.autodiff import vjp
from unsloth_core.ops.gelu import cost, gelu

WAYS = ["none", "tanh"]


@given(
    shape=st.sampled_from([(1, 1), (5, 1), (1, 7), (37, 13), (2, 3, 65), (3, 300), (2, 1031), (130, 16)]),
    dtype=st.sampled_from(DTYPES),
    way=st.sampled_from(WAYS),
    views=st.booleans(),
    scale=st.sampled_from([1e-4, 1.0, 4.0]),
    seed=st.integers(0, 2**16),
)
def test_rule(shape, dtype, way, views, scale, seed):
    # Beyond 8 a gradient is too small to double exactly, as the linearity check wants it.
    x = rand(shape, dtype, seed=seed, scale=scale).clamp(-8, 8)
    check_op(gelu, (strided(x) if views else x,), {"approximate": way}, seed=seed)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("F", [3001, 4096])
def test_several_tiles_in_a_row(way, F):
    check_op(gelu, (rand((3, F), torch.bfloat16, seed=F),), {"approximate": way})


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")  # of the interpreter: 2^-inf is what is meant
@pytest.mark.parametrize("way", WAYS)
def test_far_ends(way):
    """Far out y is x or 0, its slope 1 or 0, and nothing overflows on the way."""
    x = torch.tensor([-1e18, -1e10, -1e4, -200.0, 0.0, 200.0, 1e4, 1e10, 1e18], device=DEVICE)
    with backend.using("triton"):
        y, pullback = vjp(lambda x: gelu(x, approximate=way), x)
        (dx,) = pullback(torch.ones_like(y))
    assert torch.equal(y, x.clamp(min=0))
    assert torch.equal(dx, torch.where(x == 0, 0.5, (x > 0).float()))


@pytest.mark.parametrize("view", STRANGE_STRIDES.values(), ids=STRANGE_STRIDES)
def test_cotangents_of_any_strides(view):
    x, dy = rand((2, 3, 17), seed=0), view(rand((2, 3, 17), seed=1))
    with backend.using("triton"):
        _, pullback = vjp(gelu, x)
        assert torch.equal(pullback(dy)[0], pullback(dy.contiguous())[0])


def test_frozen_and_empty():
    x = rand((2, 6), seed=0)
    with backend.using("triton"):
        y, residuals = gelu.fwd(x, needs=(False,))
        assert residuals == (ABSENT,) == gelu.bwd(residuals, y, needs=(False,))
        y, pullback = vjp(gelu, x[:0])
        assert y.shape == pullback(y)[0].shape == (0, 6)


def test_refusals():
    x = rand((2, 6), seed=0)

    def refuses(error, message, *args, **statics):
        with backend.using("triton"), pytest.raises(error) as caught:
            gelu(*args, **statics)
        assert str(caught.value) == message

    refuses(ValueError, "gelu: x has dtype torch.float64, expected float16, bfloat16 or float32", x.double())
    refuses(ValueError, "gelu: approximate is 'erf', expected one of ('none', 'tanh')", x, approximate="erf")
    refuses(ValueError, "gelu: x has strides (1, 6), expected a last stride of 1", rand((2, 6), seed=0).T)
    rows = torch.empty((1, 2), device=DEVICE).expand(2**30, 2)
    refuses(NotImplementedError, "gelu: x has 1073741824 rows, expected fewer than 1073741824", rows)


@pytest.mark.parametrize("shape, way", [((), "none"), ((2, 0), "none"), ((2, 4), "erf")])
def test_reference_refuses_alike(shape, way):
    assert_both_refuse(gelu, torch.zeros(shape, device=DEVICE), approximate=way)


def test_cost():
    assert cost(8192, 18176, 2).bytes == 4 * 8192 * 18176
    assert cost(8192, 18176, 2, backward=True).bytes == 6 * 8192 * 18176
