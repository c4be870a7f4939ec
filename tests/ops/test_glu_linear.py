"""glu_linear: the op rule, the bits of its two parts, and that backward makes h in one pass with dgate_up."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import ABSENT, DEVICE, assert_both_refuse, check_op, rand

import unsloth_core.backend as backend
from unsloth_core import tree
from unsloth_core.autodiff import vjp
from unsloth_core.ops.glu import glu
from unsloth_core.ops.linear import linear
from unsloth_core.weights import Adapted, LoRA

op = importlib.import_module("unsloth_core.ops.glu_linear")  # the file; the package's attribute is the op


def weight(M, F, dtype, adapted, seed=0):
    w = rand((M, F), dtype, seed=seed + 1, scale=F**-0.5)
    if not adapted:
        return w
    part = LoRA(a=rand((3, F), dtype, seed=seed + 2), b=rand((M, 3), dtype, seed=seed + 3), scale=0.5)
    return Adapted(base=w, parts=(part,), rows=(M,))


@given(
    shape=st.sampled_from([(1, 1, 1), (17, 13, 5), (33, 40, 24)]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    act=st.sampled_from(["silu", "gelu_tanh", "gelu_erf", "relu2"]),
    bias=st.booleans(),
    add=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_rule(shape, dtype, act, bias, add, seed):
    N, F, M = shape
    args = (
        rand((N, 2 * F), dtype, seed=seed).clamp(-8, 8), weight(M, F, dtype, False, seed),
        rand((M,), dtype, seed=3) if bias else ABSENT, rand((N, M), dtype, seed=4) if add else ABSENT,
    )  # fmt: skip
    check_op(op.glu_linear, args, {"act": act}, seed=seed)


@pytest.mark.parametrize("frozen", ["", ".base", ".a", ".b", ".parts", "0"])
@pytest.mark.parametrize("adapted", [False, True])
def test_bits_of_its_parts(adapted, frozen):
    """Those of glu and linear, one after the other, whatever is frozen."""
    N, F, M = 35, 40, 24
    args = (rand((N, 2 * F), torch.bfloat16, seed=1), weight(M, F, torch.bfloat16, adapted), ABSENT,
            rand((N, M), torch.bfloat16, seed=4))  # fmt: skip
    dy, gradients = rand((N, M), torch.bfloat16, seed=7), []
    with backend.using("triton"):
        for f in (
            lambda x, w, add: op.glu_linear(x, w, add=add, act="gelu_tanh"),
            lambda x, w, add: linear(glu(x, act="gelu_tanh"), w, add=add),
        ):
            inputs = tree.map_with_path(
                lambda path, t: t.detach().requires_grad_(not (frozen and frozen in path)), (args[0], args[1], args[3])
            )
            y = f(*inputs)
            wanted = [t for t in tree.leaves(inputs) if t.requires_grad]
            gradients.append((y, *torch.autograd.grad(y, wanted, dy)))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_h_is_made_once_in_either_direction(monkeypatch):
    """By glu's forward, and by its backward in the pass over gate_up."""
    calls = []
    for name in ("glu_fwd", "glu_backward"):
        plain = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *a, n=name, f=plain, **k: (calls.append((n, k.get("y"))), f(*a, **k))[1])
    x, w = rand((5, 16), torch.bfloat16, seed=1), weight(6, 8, torch.bfloat16, True)
    with backend.using("triton"):
        _, pullback = vjp(lambda x, w: op.glu_linear(x, w), x, w)
        pullback(rand((5, 6), torch.bfloat16, seed=2))
        assert [name for name, _ in calls] == ["glu_fwd", "glu_backward"]
        assert torch.equal(calls[1][1], glu(x))
        calls.clear()
        _, pullback = vjp(lambda x: op.glu_linear(x, w), x)  # nothing wants h
        pullback(rand((5, 6), torch.bfloat16, seed=2))
    assert [(name, y is ABSENT) for name, y in calls][1] == ("glu_backward", True)


def test_refusals():
    x, w = rand((3, 16), seed=0), rand((6, 8), seed=1)
    assert_both_refuse(op.glu_linear, x[:, :-1], w)
    assert_both_refuse(op.glu_linear, x, w, act="swish")
    with backend.using("triton"), pytest.raises(ValueError, match="linear: x has shape"):
        op.glu_linear(x, w[:, :-1])


def test_cost():
    w = torch.empty(6, 8, dtype=torch.bfloat16, device=DEVICE)
    assert op.cost(10, w, 8).bytes == 2 * (10 * 8 + 6 * 8 + 10 * 6) + 3 * 10 * 8 * 2
    assert op.cost(10, w, 8, backward=True).bytes == 2 * (10 * 8 + 6 * 8 + 10 * 6) + 6 * 10 * 8 * 2
