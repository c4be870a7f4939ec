"""custom_vjp, value_and_grad, vjp: pairs obey the contract whatever their arguments are."""

import inspect
import os
import subprocess
import sys
import threading

import pytest
import torch
from oprule import DEVICE

from unsloth_core import backend, ops, tree
from unsloth_core.autodiff import custom_vjp, value_and_grad, vjp
from unsloth_core.ops.glu import glu
from unsloth_core.ops.rms_norm import rms_norm
from unsloth_core.tree import ABSENT
from unsloth_core.weights import Adapted, LoRA, Stacked

CALLS = []


def affine_fwd(x, w, add=ABSENT, *, needs, factor=1.0):
    """x·w·factor + add, with the needs of every call noted."""
    CALLS.append(needs)
    y = x * w.a * factor
    return (y if add is ABSENT else y + add), (x if needs[1].a else ABSENT, w if needs[0] else ABSENT)


def affine_bwd(residuals, dy, *, needs, factor=1.0):
    x, w = residuals
    dx = dy * w.a * factor if needs[0] else ABSENT
    dw = LoRA(a=dy * x * factor, b=ABSENT, scale=1.0) if needs[1].a else ABSENT
    return dx, dw, dy if needs[2] else ABSENT


affine = custom_vjp(affine_fwd, affine_bwd)


@pytest.fixture(autouse=True)
def _kernels():
    """The pairs, not their references (affine has none), on the test device."""
    with backend.using("triton"), DEVICE:
        yield


def node(requires_grad=False):
    return LoRA(a=torch.randn(4, requires_grad=requires_grad), b=torch.randn(4), scale=1.0)


def test_needs_mirror_the_arguments():
    CALLS.clear()
    affine(torch.randn(4), node())
    affine(torch.randn(4), node(requires_grad=True))
    affine(torch.randn(4, requires_grad=True), node(), torch.randn(4))
    assert CALLS[0][0] is False and CALLS[0][1].a is False and CALLS[0][2] is ABSENT
    assert CALLS[1][0] is False and CALLS[1][1].a is True and CALLS[1][1].b is False
    assert CALLS[2][0] is True and CALLS[2][1].a is False and CALLS[2][2] is False


def test_gradients_through_a_weight_node():
    x, w, add = torch.randn(4, requires_grad=True), node(requires_grad=True), torch.randn(4, requires_grad=True)
    dx, da, dadd = torch.autograd.grad(affine(x, w, add=add, factor=3.0).sum(), [x, w.a, add])
    assert torch.equal(dx, 3 * w.a) and torch.equal(da, 3 * x) and torch.equal(dadd, torch.ones(4))


def test_argument_errors_name_the_op():
    with pytest.raises(TypeError, match=r"affine: got 1 positional arguments, expected \(x, w, add\)"):
        affine(torch.randn(4))
    with pytest.raises(TypeError, match=r"affine: got two values for argument 'w'"):
        affine(torch.randn(4), node(), w=node())
    with pytest.raises(TypeError, match=r"affine: unknown option 'facto', expected one of \['factor'\]"):
        affine(torch.randn(4), node(), facto=2.0)
    with pytest.raises(TypeError, match="affine: x is float, expected Tensor or ABSENT"):
        affine(1.0, node())
    with pytest.raises(TypeError, match="affine: add is NoneType, expected Tensor or ABSENT"):
        affine(torch.randn(4), node(), None)
    with pytest.raises(TypeError, match="affine: no argument has a tensor"):
        affine(ABSENT, ABSENT)


X, NODE = torch.zeros(4, 4), LoRA(a=torch.zeros(1, 4), b=torch.zeros(4, 1), scale=1.0)
MISFITS = {
    "rms_norm: w is NoneType, expected Tensor": (ops.rms_norm, X, None),
    "rms_norm: w is ABSENT, expected Tensor": (ops.rms_norm, X, ABSENT),
    "rms_norm: add is LoRA, expected Tensor or ABSENT": (ops.rms_norm, X, X[0], NODE),
    "embedding: w_VD is LoRA, expected Tensor or NF4": (ops.embedding, X[0].long(), NODE),
    "linear: w is LoRA, expected Tensor or NF4 or Stacked or Adapted": (ops.linear, X, NODE),
    "linear: w.parts.0 is NoneType, expected Tensor or ABSENT": (
        ops.linear,
        X,
        Adapted(base=X, parts=(None,), rows=(4,)),
    ),
    "linear_cross_entropy: w_VD is Stacked, expected Tensor or NF4": (
        ops.linear_cross_entropy,
        X,
        Stacked(parts=(X,)),
        X[0].long(),
    ),
    "attention: q_segments is Tensor, expected Segments": (ops.attention, X, X, X, X, X),
}


@pytest.mark.parametrize("message", MISFITS)
@pytest.mark.parametrize("name", backend.NAMES)
def test_arguments_of_another_kind(message, name):
    op, *args = MISFITS[message]
    with backend.using(name), pytest.raises(TypeError) as error:
        op(*args)
    assert str(error.value) == message


def test_help_of_an_op_is_the_head_of_its_file():
    """Contract first, then formula, backward, residuals, bytes, limits and sources; and nothing of ``needs``."""
    for name in ops.__all__:
        op = getattr(ops, name)
        head = sys.modules[op.__module__].__doc__
        assert inspect.cleandoc(head) in op.__doc__ and not op.__doc__.startswith(head)
        for word in ("Residuals", "Bytes", "Limits", "Source"):
            assert word in op.__doc__, f"{name}: {word}"
        assert "needs" not in inspect.signature(op).parameters and "``needs``" not in op.__doc__


def test_double_backward_raises():
    x = torch.randn(3, 8, requires_grad=True)
    (g,) = torch.autograd.grad(rms_norm(x, torch.ones(8)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm: kernels do not support double backward"):
        g.sum().backward()


def test_value_and_grad_is_pure_and_handles_aux_and_unused_leaves():
    params = {"w": torch.ones(8), "unused": torch.ones(2), "ids": torch.arange(3)}
    x = torch.randn(3, 8)
    step = value_and_grad(lambda p, x: (rms_norm(x, p["w"]).square().sum(), {"mean": p["w"].mean()}), has_aux=True)
    (value, aux), grads = step(params, x)
    assert value.grad_fn is None and aux["mean"].grad_fn is None and params["w"].grad is None
    assert torch.equal(grads["unused"], torch.zeros(2)) and grads["ids"] is ABSENT
    w = params["w"].clone().requires_grad_()
    (expected,) = torch.autograd.grad(rms_norm(x, w).square().sum(), w)
    assert torch.equal(grads["w"], expected)
    with pytest.raises(ValueError, match=r"f returned a tensor of shape \(3, 8\), expected a 0-d tensor"):
        value_and_grad(lambda w: rms_norm(x, w))(params["w"])


def test_vjp_pulls_back_any_number_of_times():
    x, w = torch.randn(3, 8), torch.randn(8)
    out, pullback = vjp(rms_norm, x, w)
    dy = torch.randn(3, 8)
    first, second = pullback(dy), pullback(dy)
    assert out.grad_fn is None
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(2 * a, b) for a, b in zip(first, pullback(2 * dy), strict=True))


def test_backward_in_another_thread_uses_the_backend_of_forward():
    x = torch.randn(3, 8, requires_grad=True)
    with backend.using("reference"):
        y = glu(x)
        (expected,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.autograd.grad(y.sum(), x)[0]))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


def test_fwd_and_bwd_of_the_reference_agree_with_the_kernels():
    x, w, dy = torch.randn(5, 16), torch.randn(16), torch.randn(5, 16)
    needs = (True, True, ABSENT)
    grads = {}
    for name in backend.NAMES:
        with backend.using(name):
            _, residuals = rms_norm.fwd(x, w, ABSENT, needs=needs)
        grads[name] = rms_norm.bwd(residuals, dy, needs=needs)  # the residuals know their backend
    for a, b in zip(tree.leaves(grads["triton"]), tree.leaves(grads["reference"]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_using_refuses_other_names():
    with pytest.raises(ValueError, match="using: backend 'cuda', expected one of"), backend.using("cuda"):
        pass


COMPILED = """
import torch
from unsloth_core import ops
from unsloth_core.segments import Segments
from unsloth_core.weights import Adapted, LoRA

class Foreign(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv = torch.nn.Parameter(torch.ones(16)), torch.nn.Linear(16, 48)
        self.a, self.b = torch.nn.Parameter(torch.randn(2, 16)), torch.nn.Parameter(torch.randn(16, 2))
        self.base = torch.randn(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(ops.rms_norm(x, self.norm, eps=1e-5, name="norm")).unflatten(-1, (3, 2, 8)).unbind(1)
        o = ops.attention(q, k, v, segments, segments, window=3).flatten(1)
        w = Adapted(base=self.base, parts=(LoRA(a=self.a, b=self.b, scale=0.5),), rows=(16,))
        return ops.linear(o, w, add=x).tanh()

torch.manual_seed(0)
module, x, segments = Foreign(), torch.randn(6, 16), Segments.uniform(1, 6)
compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x), module(x))
ours, theirs = (torch.autograd.grad(f(x).sum(), list(module.parameters())) for f in (module, compiled))
torch.testing.assert_close(theirs, ours)
"""


def test_torch_compile_takes_ops_in_foreign_code_on_a_cpu():
    """One graph, gradients included; in a process of its own, because this one may run the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
