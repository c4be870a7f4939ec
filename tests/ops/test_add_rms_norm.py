"""add_rms_norm: the op rule, equality with its two halves, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import ABSENT, DEVICE, DTYPES, assert_both_refuse, assert_same_up_to_order, check_op, rand, strided

import unsloth_core.backend as backend
from unsloth_core.autodiff import vjp
from unsloth_core.ops.add_rms_norm import add_rms_norm, cost
from unsloth_core.ops.rms_norm import rms_norm


@given(
    leading=st.sampled_from([(), (1,), (5,), (37,), (2, 3)]),
    D=st.sampled_from([1, 2, 7, 16, 64, 127, 300, 1031]),
    dtype=st.sampled_from(DTYPES),
    w_dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from([("llama", 0.0), ("gemma", 1.0)]),
    views=st.booleans(),
    scale=st.sampled_from([1e-4, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_rule(leading, D, dtype, w_dtype, mode, views, scale, seed):
    x, res = (rand((*leading, D), dtype, seed=seed + i, scale=scale) for i in range(2))
    if views:
        x, res = strided(x), strided(res)
    statics = {"casting_mode": mode[0], "offset": mode[1], "eps": 1e-5}
    check_op(add_rms_norm, (x, res, rand((D,), w_dtype, seed=seed + 2)), statics, seed=seed)


@pytest.mark.parametrize("dtype, D", [(torch.float16, 7), (torch.bfloat16, 300), (torch.float32, 16500)])
@pytest.mark.parametrize("mode", [("llama", 0.0), ("gemma", 1.0)])
def test_a_stream_that_passes_through(dtype, D, mode):
    """Without res h is x itself, y is rms_norm's to the bit, and both cotangents meet before dx is rounded."""
    x, w = rand((5, D), dtype, seed=0), rand((D,), dtype, seed=1)
    statics = {"casting_mode": mode[0], "offset": mode[1]}
    check_op(add_rms_norm, (x, ABSENT, w), statics)
    with backend.using("triton"):
        (h, y), (kept, _, _) = add_rms_norm.fwd(x, ABSENT, w, needs=(True, ABSENT, True), **statics)
        assert h is x and kept is x
        assert torch.equal(y, rms_norm(x, w, **statics))


@pytest.mark.parametrize("dtype, D", [(torch.bfloat16, 8200), (torch.float32, 16500), (torch.bfloat16, 33001)])
def test_long_rows(dtype, D):
    """Beyond what one program holds: dw apart from dx, then every pass walking over three blocks and more."""
    x, res = rand((2, D), dtype, seed=D), rand((2, D), dtype, seed=D + 1)
    check_op(add_rms_norm, (x, res, rand((D,), dtype, seed=D + 2)))


def test_many_rows_per_program():
    x, res = rand((131, 700), torch.bfloat16, seed=0), rand((131, 700), torch.bfloat16, seed=1)
    check_op(add_rms_norm, (x, res, rand((700,), torch.bfloat16, seed=2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["llama", "gemma"])
def test_the_same_bits_as_two_ops(dtype, mode):
    """h is rounded before its statistics are taken, so the fused forward is the sum and then the norm, bit by bit."""
    x, res, w = (rand(shape, dtype, seed=i) for i, shape in enumerate([(9, 130), (9, 130), (130,)]))
    with backend.using("triton"):
        h, y = add_rms_norm(x, res, w, casting_mode=mode)
        assert torch.equal(h, x + res)
        assert torch.equal(y, rms_norm(h, w, casting_mode=mode))


@pytest.mark.parametrize("D", [13, 9000])
def test_one_cotangent(D):
    """The next layer may use only h, or only y: the other cotangent is absent, not zeros."""
    x, res, w = rand((3, D), seed=0), rand((3, D), seed=1), rand((D,), seed=2)
    d = rand((3, D), seed=3)
    needs = (True, True, True)
    with backend.using("triton"):
        (h, y), residuals = add_rms_norm.fwd(x, res, w, needs=needs)
        dx, dres, dw = add_rms_norm.bwd(residuals, (d, ABSENT), needs=needs)
        assert dx is d
        assert dres is d
        assert dw is ABSENT
        alone = add_rms_norm.bwd(residuals, (ABSENT, d), needs=needs)
        both = add_rms_norm.bwd(residuals, (torch.zeros_like(d), d), needs=needs)
    for a, b in zip(alone, both):
        assert torch.equal(a, b)


@pytest.mark.parametrize("D", [13, 17000])
def test_cotangents_of_any_strides(D):
    x, res, w = rand((2, 3, D), seed=0), rand((2, 3, D), seed=1), rand((D,), seed=2)
    dh = rand((2, D, 3), seed=3).transpose(1, 2)
    dy = rand((), seed=4).expand(2, 3, D)
    with backend.using("triton"):
        _, pullback = vjp(add_rms_norm, x, res, w)
        for ours, same in zip(pullback((dh, dy)), pullback((dh.contiguous(), dy.contiguous()))):
            assert_same_up_to_order(ours, same)


def test_residuals_are_h_and_rstd():
    x, res, w = rand((3, 8), seed=0), rand((3, 8), seed=1), rand((8,), seed=2)
    with backend.using("triton"):
        (h, _), residuals = add_rms_norm.fwd(x, res, w, needs=(True, False, True))
        _, nothing = add_rms_norm.fwd(x, res, w, needs=(False, False, False))
    assert residuals[0] is h
    assert residuals[1] is w
    assert residuals[2].shape == (3,)
    assert residuals[2].dtype == torch.float32
    assert nothing == (ABSENT, ABSENT, ABSENT)


def test_no_rows():
    x, w = rand((0, 5), seed=0), rand((5,), seed=1)
    with backend.using("triton"):
        (h, y), pullback = vjp(add_rms_norm, x, x, w)
        dx, dres, dw = pullback((h, y))
    assert h.shape == y.shape == dx.shape == dres.shape == (0, 5)
    assert torch.equal(dw, torch.zeros_like(w))


def test_refusals():
    x, w = rand((2, 4), seed=0), rand((4,), seed=1)

    def refuses(message, *args, **statics):
        with backend.using("triton"), pytest.raises(ValueError) as caught:
            add_rms_norm(*args, **statics)
        assert str(caught.value) == message

    refuses("add_rms_norm: w has shape (1,), expected (D,) = (4,)", x, x, w[:1])
    refuses("add_rms_norm: res is (4,) torch.float32, expected x's (2, 4) torch.float32", x, x[0], w)
    refuses("add_rms_norm: res is (2, 4) torch.float16, expected x's (2, 4) torch.float32", x, x.half(), w)
    refuses("add_rms_norm: res has strides (1, 2), expected a last stride of 1", x, rand((4, 2), seed=0).T, w)
    wanted = "expected one of ('llama', 'gemma')"
    refuses(f"add_rms_norm: casting_mode is None, {wanted}", x, x, w, casting_mode=None)


@pytest.mark.parametrize("res, w, mode", [((2, 4), (1,), "llama"), ((4,), (4,), "llama"), ((2, 4), (4,), "x")])
def test_reference_refuses_alike(res, w, mode):
    assert_both_refuse(add_rms_norm, *(torch.zeros(s, device=DEVICE) for s in ((2, 4), res, w)), casting_mode=mode)


def test_cost():
    assert cost(8192, 4096, 2).bytes == 4 * 8192 * 4096 * 2 + 8192 * 4 + 4096 * 2
    assert cost(8192, 4096, 2, backward=True).bytes == 4 * 8192 * 4096 * 2 + 8192 * 4 + 2 * 4096 * 2
