"""rope: the op rule, heads and tables of every layout, partial rotation, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import ABSENT, DEVICE, DTYPES, assert_both_refuse, check_op, rand

import unsloth_core.backend as backend
from unsloth_core.autodiff import vjp
from unsloth_core.ops.rope import cost, rope, tile
from unsloth_core.reference.rope import rope as reference


def tables(N, J, seed=0):
    """cos and sin of any angles, with an attention factor of 1.25: the transpose is not the inverse."""
    angles = rand((N, J), seed=seed, scale=100.0)
    return 1.25 * angles.cos(), 1.25 * angles.sin()


def is_table(path):
    """cos and sin get no gradient."""
    return path in ("2", "3")


def laid_out(x, layout):
    """The values of x (N, H, K) in other memory."""
    if layout == "contiguous":
        return x
    N, H, K = x.shape
    if layout == "slice":  # some heads of a stacked qkv product
        big = torch.full((N, (H + 2) * K), 7.0, dtype=x.dtype, device=x.device)
        view = big[:, K:-K].unflatten(1, (H, K))
    elif layout == "heads first":
        view = torch.empty((H, N, K), dtype=x.dtype, device=x.device).transpose(0, 1)
    else:  # no stride of 1
        view = torch.empty((K, H, 2 * N), dtype=x.dtype, device=x.device).permute(2, 1, 0)[::2]
    view.copy_(x)
    return view


LAYOUTS = ["contiguous", "slice", "heads first", "no unit stride"]


@given(
    N=st.sampled_from([1, 2, 17, 67]),
    heads=st.sampled_from([(1, 1), (2, 2), (3, 1), (9, 3), (8, 1), (14, 2)]),
    channels=st.sampled_from([(2, 1), (8, 4), (10, 3), (22, 11), (64, 32), (48, 16)]),
    dtypes=st.sampled_from([(a, a) for a in DTYPES] + [(torch.bfloat16, torch.float32)]),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_rule(N, heads, channels, dtypes, layouts, scale, seed):
    K, J = channels
    q = laid_out(rand((N, heads[0], K), dtypes[0], seed=seed, scale=scale), layouts[0])
    k = laid_out(rand((N, heads[1], K), dtypes[1], seed=seed + 1, scale=scale), layouts[1])
    check_op(rope, (q, k, *tables(N, J, seed)), seed=seed, frozen=is_table)


@pytest.mark.parametrize("H, G, K, J", [(32, 8, 128, 64), (71, 1, 64, 32), (24, 8, 128, 48), (3, 3, 512, 256)])
def test_heads_of_real_models(H, G, K, J):
    """Llama, Falcon, Phi-4-mini and a wide head: several tiles of heads, a ragged one, a rest that passes through."""
    N = 2 * tile(H, G, J)[0] + 1
    q, k = rand((N, H, K), torch.bfloat16, seed=0), rand((N, G, K), torch.bfloat16, seed=1)
    check_op(rope, (q, k, *tables(N, J)), frozen=is_table)


def test_slices_of_one_product():
    """q and k as the model has them: views of one tensor, and a table whose rows are shared or strided."""
    H, G, K, J, N = 4, 2, 16, 6, 5
    qkv = rand((N, (H + 2 * G) * K), torch.bfloat16, seed=0)
    q, k, _ = (part.unflatten(1, (-1, K)) for part in qkv.split([H * K, G * K, G * K], dim=1))
    cos, sin = tables(N, 2 * J)
    check_op(rope, (q, k, cos[:, ::2], sin[:1, :J].expand(N, J)), frozen=is_table)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_one_of_both(needs):
    """What is not needed is neither computed nor kept."""
    N, J = 3, 4
    q, k = rand((N, 2, 8), seed=0), rand((N, 1, 8), seed=1)
    cos, sin = tables(N, J)
    with backend.using("triton"):
        outs, residuals = rope.fwd(q, k, cos, sin, needs=(*needs, False, False))
        if not any(needs):
            assert residuals == (ABSENT, ABSENT)
            return
        assert residuals[0] is cos and residuals[1] is sin
        gradients = rope.bwd(residuals, outs, needs=(*needs, False, False))
        half = rope.bwd(residuals, (outs[0], ABSENT), needs=(True, True, False, False))
    assert [g is not ABSENT for g in gradients] == [*needs, False, False]
    assert half[0] is not ABSENT and half[1] is ABSENT


def test_expanded_cotangent():
    """A sum gives a cotangent of stride 0 in every dimension."""
    q, k = rand((3, 2, 8), torch.bfloat16, seed=0), rand((3, 1, 8), torch.bfloat16, seed=1)
    cos, sin = tables(3, 4)
    one = torch.ones((), dtype=torch.bfloat16, device=DEVICE)
    with backend.using("triton"):
        _, pullback = vjp(lambda q, k: rope(q, k, cos, sin), q, k)
        broadcast = pullback((one.expand(3, 2, 8), one.expand(3, 1, 8)))
        dense = pullback((one.expand(3, 2, 8).contiguous(), one.expand(3, 1, 8).contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(broadcast, dense))


def test_angle_zero_and_pass_through_are_exact():
    """cos 1, sin 0 is the identity to the bit, NaN and infinity included where nothing turns."""
    q = rand((3, 2, 10), torch.bfloat16, seed=0)
    q[0, 0, 6:] = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    one, zero = torch.ones(3, 3, device=DEVICE), torch.zeros(3, 3, device=DEVICE)
    with backend.using("triton"):
        out, _ = rope(q, q, one, zero)
    assert out.is_contiguous() and out.data_ptr() != q.data_ptr()
    assert torch.equal(out.view(torch.int16)[..., 6:], q.view(torch.int16)[..., 6:])
    assert torch.equal(out[..., :6], q[..., :6])


def test_scores_depend_on_distance_only():
    """The reason to turn: q at p + 5 and k at p score the same for every p."""
    q, k = rand((1, 1, 16), seed=0), rand((1, 1, 16), seed=1)
    frequencies = 10000.0 ** (-torch.arange(8, device=DEVICE) / 8)
    scores = []
    with backend.using("triton"):
        for p in (0, 3, 100):
            turned = []
            for x, at in ((q, p + 5), (k, p)):
                angles = (at * frequencies)[None]
                turned.append(rope(x, x, angles.cos(), angles.sin())[0])
            scores.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(torch.stack(scores), scores[0].expand(3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 1), (3, 2, 0), (0, 0, 0)])
def test_empty(shape):
    """No tokens, no key heads, nothing at all."""
    N, H, G = shape
    q, k = rand((N, H, 8), torch.bfloat16, seed=0), rand((N, G, 8), torch.bfloat16, seed=1)
    check_op(rope, (q, k, *tables(N, 4)), frozen=is_table)


X, TABLE = (2, 3, 8), (2, 4)


@pytest.mark.parametrize(
    "q, k, cos, sin, message",
    [
        ((2, 24), X, TABLE, TABLE, "rope: q has shape (2, 24), expected (N, H, K)"),
        (X, (2, 8), TABLE, TABLE, "rope: k has shape (2, 8), expected (N, G, K)"),
        (X, (1, 3, 8), TABLE, TABLE, "rope: k has shape (1, 3, 8), expected (N, G, K) = (2, G, 8)"),
        (X, (2, 3, 6), TABLE, TABLE, "rope: k has shape (2, 3, 6), expected (N, G, K) = (2, G, 8)"),
        (X, X, (1, 4), TABLE, "rope: cos has shape (1, 4), expected (N, J) = (2, 1 to 4)"),
        (X, X, TABLE, (2, 8), "rope: sin has shape (2, 8), expected (N, J) = (2, 1 to 4)"),
        (X, X, (2, 0), TABLE, "rope: cos has shape (2, 0), expected (N, J) = (2, 1 to 4)"),
        (X, X, TABLE, (2, 3), "rope: sin has shape (2, 3), expected cos's (2, 4)"),
    ],
)
def test_bad_shapes(q, k, cos, sin, message):
    args = [torch.zeros(shape, device=DEVICE) for shape in (q, k, cos, sin)]
    with backend.using("triton"), pytest.raises(ValueError) as error:
        rope(*args)
    assert str(error.value) == message
    assert_both_refuse(rope, *args)


def test_bad_dtypes_and_gradients():
    q, k, cos, sin = (torch.zeros(shape, device=DEVICE) for shape in (X, X, TABLE, TABLE))
    with backend.using("triton"):
        with pytest.raises(ValueError) as error:
            rope(q.double(), k, cos, sin)
        assert str(error.value) == "rope: q has dtype torch.float64, expected float16, bfloat16 or float32"
        with pytest.raises(ValueError) as error:
            rope(q, k, cos, sin.bfloat16())
        assert str(error.value) == "rope: sin has dtype torch.bfloat16, expected float32"
        with pytest.raises(ValueError) as error:
            rope(q, k, cos, sin.to("meta"))
        assert str(error.value) == f"rope: sin is on meta, expected q's device {q.device}"
        with pytest.raises(NotImplementedError) as unsupported:
            rope(q, k, cos.requires_grad_(), sin)
        assert str(unsupported.value) == "rope: no gradient for cos and sin; detach them"


def test_reference_gives_angles_no_gradient():
    q, k, cos, sin = (torch.ones(shape, device=DEVICE, requires_grad=True) for shape in (X, X, TABLE, TABLE))
    with backend.using("reference"):
        out, _ = rope(q, k, cos, sin)
    gradients = torch.autograd.grad(out.sum(), (q, cos, sin), allow_unused=True)
    assert [g is not None for g in gradients] == [True, False, False]


def test_reference_agrees_with_transformers():
    """The oracle itself, against the function every Llama uses."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = rand((5, 4, 16), seed=0), rand((5, 2, 16), seed=1)
    cos, sin = tables(5, 8)
    theirs = apply_rotary_pos_emb(q, k, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1), unsqueeze_dim=1)
    torch.testing.assert_close(reference(q, k, cos, sin), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (71, 1), (1, 1), (0, 8), (8, 0), (0, 0)])
def test_tile(heads):
    """Tiles fill the lanes of a program but for a quarter, whatever the head counts."""
    tokens, block_h, block_j = tile(*heads, 48)
    assert tokens * block_h * block_j == 2048
    assert sum(-(-n // block_h) * block_h for n in heads) * 3 <= 4 * sum(heads)
    assert tile(*heads, 300)[2] == 512 and tile(*heads, 300)[0] * tile(*heads, 300)[1] <= 4


def test_cost():
    """q and k of Llama-3-8B at 8192 tokens: 168 MB without the tables."""
    assert cost(8192, 32, 8, 128, 64, 2).bytes == 167_772_160 + 8192 * 64 * 8
