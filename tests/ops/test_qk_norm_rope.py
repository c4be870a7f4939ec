"""qk_norm_rope: the op rule, heads and layouts of every kind, frozen weights, and what it refuses."""

import importlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import ABSENT, DEVICE, DTYPES, STRANGE_STRIDES, assert_both_refuse, assert_same_up_to_order, check_op, rand

import unsloth_core.backend as backend
from unsloth_core.autodiff import vjp
from unsloth_core.ops.qk_norm_rope import cost, qk_norm_rope
from unsloth_core.ops.rms_norm import rms_norm
from unsloth_core.ops.rope import rope
from unsloth_core.reference.qk_norm_rope import qk_norm_rope as reference


def is_table(path):
    """cos and sin get no gradient."""
    return path in ("4", "5")


def tables(N, J, seed=0):
    """cos and sin of any angles, with an attention factor of 1.25: the transpose is not the inverse."""
    angles = rand((N, J), seed=seed + 4, scale=100.0)
    return 1.25 * angles.cos(), 1.25 * angles.sin()


def arguments(N, H, G, K, J, dtype=torch.float32, seed=0):
    """All six of one dtype, the angles fp32."""
    q, k = rand((N, H, K), dtype, seed=seed), rand((N, G, K), dtype, seed=seed + 1)
    return q, k, rand((K,), dtype, seed=seed + 2), rand((K,), dtype, seed=seed + 3), *tables(N, J, seed)


def laid_out(x, layout):
    """The values of x (N, H, K) in other memory."""
    if layout == "contiguous":
        return x
    if layout == "slice":  # heads of a stacked qkv product
        view = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2]), 7.0, dtype=x.dtype, device=x.device)[:, 1:-1]
    else:  # no stride of 1
        view = torch.empty(x.shape[::-1], dtype=x.dtype, device=x.device).permute(2, 1, 0)
    view.copy_(x)
    return view


LAYOUTS = st.sampled_from(["contiguous", "slice", "no unit stride"])


@given(
    N=st.sampled_from([1, 2, 17, 23]),
    heads=st.sampled_from([(1, 1), (2, 2), (3, 1), (9, 3), (8, 1), (14, 2)]),
    channels=st.sampled_from([(2, 1), (8, 4), (10, 3), (22, 11), (64, 32), (48, 16)]),
    dtypes=st.sampled_from([(a, a) for a in DTYPES] + [(torch.bfloat16, torch.float32)]),
    w_dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    mode=st.sampled_from([("llama", 0.0), ("gemma", 1.0), ("gemma", 0.0), ("llama", 1.0)]),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 2**16),
)
def test_rule(N, heads, channels, dtypes, w_dtypes, mode, layouts, scale, seed):
    K, J = channels
    q, k = (
        laid_out(rand((N, n, K), dtype, seed=seed + i, scale=scale), layout)
        for i, (n, dtype, layout) in enumerate(zip(heads, dtypes, layouts))
    )
    wq, wk = (rand((K,), dtype, seed=seed + 2 + i) for i, dtype in enumerate(w_dtypes))
    statics = {"casting_mode": mode[0], "offset": mode[1], "eps": 1e-5}
    # Weight gradients add up to 322 terms: the interpreter one row of a tile after the other, PyTorch in pairs.
    factor = 4.0 if torch.float32 in w_dtypes else 2.0
    check_op(qk_norm_rope, (q, k, wq, wk, *tables(N, J, seed)), statics, seed=seed, frozen=is_table, factor=factor)


@pytest.mark.parametrize(
    "N, H, G, K, J, mode, frozen",
    [
        (9, 32, 8, 128, 64, "llama", ""),  # Qwen3-8B
        (9, 16, 8, 128, 64, "llama", "23"),  # Qwen3-0.6B, both weights frozen: a program takes one tile
        (5, 8, 4, 256, 128, "gemma", ""),  # Gemma3-4B
        (5, 4, 1, 256, 128, "gemma", "23"),  # Gemma3-1B
        (9, 12, 4, 128, 32, "llama", "2"),  # half of each head passes through
        (3, 2, 1, 640, 320, "gemma", "3"),  # a head as wide as a tile
    ],
)
def test_heads_of_real_models(N, H, G, K, J, mode, frozen):
    """Several tiles of heads and of tokens, a ragged last one."""
    statics = {"casting_mode": mode, "offset": 1.0 if mode == "gemma" else 0.0}
    check_op(
        qk_norm_rope, arguments(N, H, G, K, J, torch.bfloat16), statics, frozen=lambda path: path in "45" + frozen
    )  # fmt: skip


def test_several_rounds_of_tiles(monkeypatch):
    """On a device of one multiprocessor every program walks over more than four tiles; the last one is ragged."""
    monkeypatch.setattr(importlib.import_module("unsloth_core.ops.qk_norm_rope"), "sms", lambda device: 1)
    check_op(qk_norm_rope, arguments(209, 1, 1, 128, 64, torch.bfloat16), frozen=is_table)


def test_slices_of_one_product():
    """q and k as the model has them: views of one tensor, and a table whose rows are shared or strided."""
    H, G, K, J, N = 4, 2, 16, 6, 5
    qkv = rand((N, (H + 2 * G) * K), torch.bfloat16, seed=0)
    q, k, _ = (part.unflatten(1, (-1, K)) for part in qkv.split([H * K, G * K, G * K], dim=1))
    cos, sin = tables(N, 2 * J)
    wq, wk = rand((K,), torch.bfloat16, seed=1), rand((K,), torch.bfloat16, seed=2)
    check_op(qk_norm_rope, (q, k, wq, wk, cos[:, ::2], sin[:1, :J].expand(N, J)), frozen=is_table)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)))
def test_needs(needs):
    """What is not needed is neither computed nor kept: no statistics, no partial rows; arguments are kept as such."""
    args, needs = arguments(3, 2, 1, 8, 4), (*needs, False, False)
    with backend.using("triton"):
        outs, residuals = qk_norm_rope.fwd(*args, needs=needs)
        everything = qk_norm_rope.fwd(*args, needs=(True,) * 4 + (False,) * 2)[1]
        (q, wq), (k, wk), angles, rstd = residuals
        of_q, of_k = needs[0] or needs[2], needs[1] or needs[3]
        assert (q is args[0] and wq is args[2]) if of_q else q is wq is ABSENT
        assert (k is args[1] and wk is args[3]) if of_k else k is wk is ABSENT
        assert rstd.shape == (3 * (2 * of_q + of_k),) if of_q or of_k else rstd is ABSENT
        assert angles == ((ABSENT, ABSENT) if not any(needs) else angles) and (angles[0] is args[4] or not any(needs))
        gradients = qk_norm_rope.bwd(residuals, outs, needs=needs)
        of_all = qk_norm_rope.bwd(everything, outs, needs=(True,) * 4 + (False,) * 2)
        of_q = qk_norm_rope.bwd(everything, (outs[0], ABSENT), needs=needs)
        of_k = qk_norm_rope.bwd(everything, (ABSENT, outs[1]), needs=needs)
    for i, (got, want) in enumerate(zip(gradients, of_all)):
        assert (got is ABSENT) != needs[i]
        if needs[i]:
            torch.testing.assert_close(got, want)
            part, other = (of_q[i], of_k[i]) if i % 2 == 0 else (of_k[i], of_q[i])
            torch.testing.assert_close(part, want)
            assert other is ABSENT


@pytest.mark.parametrize("view", STRANGE_STRIDES.values(), ids=STRANGE_STRIDES)
def test_cotangents_of_any_strides(view):
    """The same as from a contiguous cotangent: a sum gives one number for everything."""
    args = arguments(5, 3, 2, 10, 3)
    dq, dk = view(rand((5, 3, 10), seed=5)), view(rand((5, 2, 10), seed=6))
    with backend.using("triton"):
        _, pullback = vjp(lambda *heads: qk_norm_rope(*heads, *args[4:]), *args[:4])
        for ours, same in zip(pullback((dq, dk)), pullback((dq.contiguous(), dk.contiguous()))):
            assert_same_up_to_order(ours, same)


@pytest.mark.parametrize("mode, offset", [("llama", 0.0), ("gemma", 1.0)])
def test_the_same_as_two_ops(mode, offset):
    """In fp32 what rms_norm and rope give; in bf16 nearer to the truth than they, which also round in between."""
    for dtype in (torch.float32, torch.bfloat16):
        args = arguments(33, 4, 2, 64, 32, dtype)
        statics = {"casting_mode": mode, "offset": offset}
        truth = reference(*(t.double() for t in args), **statics)
        with backend.using("triton"):
            fused = qk_norm_rope(*args, **statics)
            apart = rope(rms_norm(args[0], args[2], **statics), rms_norm(args[1], args[3], **statics), *args[4:])
        for a, b, t in zip(fused, apart, truth):
            if dtype == torch.float32:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            else:
                assert (a - t).norm() < (b - t).norm()


def test_a_head_of_zeros():
    """eps keeps its rstd finite: it stays zero, and its gradient is that of a linear map."""
    q, k, wq, wk, *angles = arguments(2, 2, 1, 8, 4)
    q[0, 1] = 0.0
    with backend.using("triton"):
        (turned, _), pullback = vjp(lambda q: qk_norm_rope(q, k, wq, wk, *angles, eps=1e-6), q)
        dq = pullback((torch.ones_like(turned), torch.zeros_like(k)))[0]
    assert not turned[0, 1].any() and turned.isfinite().all() and dq.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 2, 1), (3, 2, 0), (0, 0, 0)])
def test_empty(shape):
    """No tokens, no key heads, nothing at all: weight gradients of zero."""
    N, H, G = shape
    check_op(qk_norm_rope, arguments(N, H, G, 8, 4, torch.bfloat16), frozen=is_table)


X, W, TABLE = (2, 3, 8), (8,), (2, 4)


@pytest.mark.parametrize(
    "q, k, wq, wk, cos, sin, mode, message",
    [
        ((2, 24), X, W, W, TABLE, TABLE, "llama", "q has shape (2, 24), expected (N, H, K)"),
        (X, (1, 3, 8), W, W, TABLE, TABLE, "llama", "k has shape (1, 3, 8), expected (N, G, K) = (2, G, 8)"),
        (X, X, (1,), W, TABLE, TABLE, "llama", "wq has shape (1,), expected (K,) = (8,)"),
        (X, X, W, (3, 8), TABLE, TABLE, "llama", "wk has shape (3, 8), expected (K,) = (8,)"),
        (X, X, W, W, (1, 4), TABLE, "llama", "cos has shape (1, 4), expected (N, J) = (2, 1 to 4)"),
        (X, X, W, W, TABLE, (2, 1), "llama", "sin has shape (2, 1), expected cos's (2, 4)"),
        (X, X, W, W, TABLE, TABLE, "none", "casting_mode is 'none', expected one of ('llama', 'gemma')"),
    ],
)
def test_bad_shapes(q, k, wq, wk, cos, sin, mode, message):
    args = [torch.zeros(shape, device=DEVICE) for shape in (q, k, wq, wk, cos, sin)]
    with backend.using("triton"), pytest.raises(ValueError) as error:
        qk_norm_rope(*args, casting_mode=mode)
    assert str(error.value) == f"qk_norm_rope: {message}"
    assert_both_refuse(qk_norm_rope, *args, casting_mode=mode)


def test_bad_dtypes_strides_and_gradients():
    q, k, wq, wk, cos, sin = (torch.zeros(shape, device=DEVICE) for shape in (X, X, W, W, TABLE, TABLE))
    wanted = "expected float16, bfloat16 or float32"
    for args, message in [
        ((q.double(), k, wq, wk, cos, sin), f"q has dtype torch.float64, {wanted}"),
        ((q, k, wq, wk.long(), cos, sin), f"wk has dtype torch.int64, {wanted}"),
        ((q, k, wq, wk, cos, sin.bfloat16()), "sin has dtype torch.bfloat16, expected float32"),
        ((q, k, torch.zeros(16, device=DEVICE)[::2], wk, cos, sin), "wq has stride 2, expected 1"),
    ]:
        with backend.using("triton"), pytest.raises(ValueError) as error:
            qk_norm_rope(*args)
        assert str(error.value) == f"qk_norm_rope: {message}"
    with backend.using("triton"), pytest.raises(NotImplementedError) as unsupported:
        qk_norm_rope(q, k, wq, wk, cos, sin.requires_grad_())
    assert str(unsupported.value) == "qk_norm_rope: no gradient for cos and sin; detach them"


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_reference_agrees_with_transformers(family):
    """The oracle itself, against the modules of the two families that normalise queries and keys."""
    q, k, wq, wk, cos, sin = arguments(5, 4, 2, 16, 8)
    if family == "qwen3":
        from transformers.models.qwen3 import modeling_qwen3 as theirs

        norm, statics = theirs.Qwen3RMSNorm, {"casting_mode": "llama"}
    else:
        from transformers.models.gemma3 import modeling_gemma3 as theirs

        norm, statics = theirs.Gemma3RMSNorm, {"casting_mode": "gemma", "offset": 1.0}
    heads = []
    for x, w in ((q, wq), (k, wk)):
        module = norm(16, eps=1e-6).to(DEVICE)
        module.weight.data.copy_(w)
        heads.append(module(x))
    same = theirs.apply_rotary_pos_emb(*heads, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1), unsqueeze_dim=1)
    torch.testing.assert_close(reference(q, k, wq, wk, cos, sin, **statics), same, rtol=1e-5, atol=1e-5)


def test_cost():
    """Qwen3-8B at 8192 tokens: 168 MB forward without angles, statistics and weights."""
    small = 8192 * (64 * 8 + 40 * 4)
    assert cost(8192, 32, 8, 128, 64, 2).bytes == 167_772_160 + small + 2 * 128 * 2
    assert cost(8192, 32, 8, 128, 64, 2, backward=True).bytes == 251_658_240 + small + 4 * 128 * 2
