"""linear_rope: the op rule over weight nodes, heads and layouts, the bits of its three parts, and what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import ABSENT, DEVICE, assert_both_refuse, check_op, rand

import unsloth_core.backend as backend
from unsloth_core.autodiff import vjp
from unsloth_core.ops.linear import linear
from unsloth_core.ops.linear_rope import cost, linear_rope
from unsloth_core.ops.rope import rope
from unsloth_core.weights import Adapted, LoRA


def tables(N, J, seed=0):
    """cos and sin of any angles, with an attention factor of 1.25: the transpose is not the inverse."""
    angles = rand((N, J), seed=seed, scale=100.0)
    return 1.25 * angles.cos(), 1.25 * angles.sin()


def inputs(N, C, H, G, K, J, dtype=torch.bfloat16, seed=0, adapted=False, bias=False):
    M = (H + 2 * G) * K
    w = rand((M, C), dtype, seed=seed + 1, scale=C**-0.5)
    if adapted:  # q and v alone, with different ranks
        rows = (H * K, G * K, G * K)
        # Leaves in x's dtype, as in the tests of linear: a fp32 leaf would allow no rounding.
        lora = [LoRA(a=rand((r, C), dtype, seed=seed + r), b=rand((m, r), dtype, seed=seed + 9), scale=0.5)
                for r, m in ((3, rows[0]), (2, rows[2]))]  # fmt: skip
        w = Adapted(base=w, parts=(lora[0], ABSENT, lora[1]), rows=rows)
    return (rand((N, C), dtype, seed=seed), w, *tables(N, J, seed), rand((M,), dtype, seed=5) if bias else ABSENT)


def is_table(path):
    """cos and sin get no gradient."""
    return path in ("2", "3")


@given(
    N=st.sampled_from([1, 9, 33]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    channels=st.sampled_from([(2, 1), (10, 3), (16, 8), (24, 8)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rule(N, heads, channels, dtype, bias, seed):
    args = inputs(N, 16, *heads, *channels, dtype, seed, bias=bias)
    check_op(linear_rope, args, {"heads": heads[0], "kv_heads": heads[1]}, seed=seed, frozen=is_table)


@pytest.mark.parametrize("H, G, K, J", [(9, 3, 64, 32), (12, 4, 64, 24)])
def test_adapters(H, G, K, J):
    """SmolLM2, and half of Phi-4-mini: several tiles of heads, a rest that passes through."""
    args = inputs(5, 32, H, G, K, J, adapted=True)
    check_op(linear_rope, args, {"heads": H, "kv_heads": G}, frozen=is_table)


@pytest.mark.parametrize("missing", [(), (0,), (1, 2), (0, 1)])
def test_bits_of_its_parts(missing):
    """Those of linear, split and rope, one after the other; a cotangent that is missing counts as zeros."""
    H, G, K, J, N = 4, 2, 16, 6, 9
    x, w, cos, sin, bias = inputs(N, 32, H, G, K, J, bias=True)
    statics = {"heads": H, "kv_heads": G}
    split = lambda qkv: qkv.unflatten(1, (-1, K)).split([H, G, G], dim=1)  # noqa: E731

    def parts(x, w, bias):
        q, k, v = split(linear(x, w, bias))
        return (*rope(q, k, cos, sin), v)

    with backend.using("triton"):
        one, back = vjp(lambda x, w, bias: linear_rope(x, w, cos, sin, bias, **statics), x, w, bias)
        three, back_parts = vjp(parts, x, w, bias)
        cotangents = [rand(t.shape, t.dtype, seed=i) for i, t in enumerate(one)]
        given = tuple(torch.zeros_like(d) if i in missing else d for i, d in enumerate(cotangents))
        for a, b in zip(one, three, strict=True):
            assert torch.equal(a, b)
        assert len({t.untyped_storage().data_ptr() for t in one}) == 1
        for a, b in zip(back(given), back_parts(given), strict=True):
            assert torch.equal(a, b)
        out, residuals = linear_rope.fwd(x, w, cos, sin, bias, needs=(True, True, False, False, True), **statics)
        sparse = tuple(ABSENT if i in missing else d for i, d in enumerate(cotangents))
        found = linear_rope.bwd(residuals, sparse, needs=(True, True, False, False, True), **statics)
    for a, b in zip((found[0], found[1], found[4]), back(given), strict=True):
        assert torch.equal(a, b)
    assert out[0].shape == (N, H, K) and found[2] is ABSENT and found[3] is ABSENT


def test_cotangents_of_any_strides():
    H, G, K, J, N = 3, 1, 8, 4, 5
    args = inputs(N, 16, H, G, K, J)
    statics, needs = {"heads": H, "kv_heads": G}, (True, True, False, False, ABSENT)
    with backend.using("triton"):
        out, residuals = linear_rope.fwd(*args, needs=needs, **statics)
        dy = tuple(rand((K, n, 2 * N), torch.bfloat16, seed=n).permute(2, 1, 0)[::2] for n in (H, G, G))
        strange = linear_rope.bwd(residuals, dy, needs=needs, **statics)
        plain = linear_rope.bwd(residuals, tuple(d.contiguous() for d in dy), needs=needs, **statics)
    assert torch.equal(strange[0], plain[0]) and torch.equal(strange[1], plain[1])


def test_refusals():
    x, w, cos, sin, _ = inputs(3, 8, 2, 1, 4, 2)
    statics = {"heads": 2, "kv_heads": 1}
    assert_both_refuse(linear_rope, x, w[:-1], cos, sin, **statics)
    assert_both_refuse(linear_rope, x[None], w, cos, sin, **statics)
    with pytest.raises(ValueError, match="linear_rope: cos has shape"), backend.using("triton"):
        linear_rope(x, w, cos[:2], sin, **statics)
    with backend.using("triton"), pytest.raises(NotImplementedError, match="linear_rope: no gradient for cos and sin"):
        linear_rope(x.requires_grad_(), w, cos.requires_grad_(), sin, **statics)


def test_cost():
    w = torch.empty(48, 16, dtype=torch.bfloat16, device=DEVICE)
    found = cost(10, w, 4, 1, 4)
    assert found.bytes == 2 * (10 * 16 + 48 * 16 + 10 * 48) + 2 * 10 * 5 * 8 * 2 + 8 * 10 * 4
    assert found.flops == 2 * 10 * 48 * 16 + 6 * 10 * 5 * 4
