"""Every op inside other people's code: torch.compile with one whole graph, autocast, views of larger tensors,
checkpointing, hooks on what is saved, inference mode.

The results are those of the plain call, bit for bit: whatever surrounds an op, the same kernels run. What they cannot
do (double backward, forward mode, torch.func) they refuse in one line, and the reference does it."""

import contextlib
import functools
from typing import Any

import pytest
import torch
from oprule import DEVICE, assert_same_up_to_order
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from perf import ops as measured
from unsloth_core import backend, ops, optim, tree
from unsloth_core.ops import nf4

CASES = {case.op: case for case in measured.cases(DEVICE) if not case.op.startswith("adamw")}
VARIANTS = sorted(CASES.keys() - {*ops.__all__})  # other weights, other shapes, and functions without a gradient
each_op = pytest.mark.parametrize("op", ops.__all__)


def arguments(op, factor=1):
    """Those of the smallest measurement, with ``factor`` times the tokens."""
    tokens, *sizes = CASES[op].tiny
    return CASES[op].make(measured.Random.seeded(1, DEVICE), factor * tokens, *sizes)


def results(op, args, call, forward: Any = contextlib.nullcontext, backward: Any = contextlib.nullcontext):
    """Outputs and gradients of ``call(*args)``, in the contexts that are given."""
    wanted = CASES[op].wanted(*args)
    for t in wanted:
        t.requires_grad_()
    with forward():
        out = call(*args)
    outputs = [o for o in tree.leaves(out) if o.requires_grad]
    cotangents = [torch.ones_like(o) for o in outputs]
    with backward():
        gradients = torch.autograd.grad(outputs, wanted, cotangents) if wanted else ()
    return [t.detach() for t in (*tree.leaves(out), *gradients)]


def assert_equal(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@each_op
def test_one_graph_of_torch_compile(op):
    """Between operations of the user's own, so that the graph holds more than the op; the second shape is traced with
    symbols for sizes."""
    ours = CASES[op].ours

    def foreign(*args):
        given = [a * 1 if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        out = ours(*given)
        return tuple(o * 1 for o in out) if isinstance(out, tuple) else out * 1

    torch.compiler.reset()
    compiled = torch.compile(foreign, fullgraph=True, backend="aot_eager")
    for factor in (1, 2, 3):
        args = arguments(op, factor)
        assert_equal(results(op, args, compiled), results(op, args, foreign))


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_in_one_graph_of_torch_compile(variant):
    """The first call of all is the traced one: tables that kernels keep for good must be real ones even so."""
    args = arguments(variant)
    nf4.table.cache_clear()
    nf4._midpoints.cache_clear()

    def foreign(*args):
        out = CASES[variant].ours(*args)
        return [o * 1 for o in (out if isinstance(out, tuple) else (out,))]

    def through_a_node(*args):
        return nf4.dequantize(CASES[variant].ours(*args)) * 1

    call = through_a_node if variant == "nf4_quantize" else foreign
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_equal(results(variant, args, compiled), results(variant, args, call))


def test_global_norm_in_one_graph_of_torch_compile():
    grads = {"a": torch.randn(5, 7, device=DEVICE), "b": torch.randn(3, device=DEVICE, dtype=torch.bfloat16)}

    def clipped(grads):
        return optim.clip_factor(optim.global_norm(grads), 1.0) * grads["a"]

    torch.compiler.reset()
    compiled = torch.compile(clipped, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(grads), clipped(grads))


@each_op
@pytest.mark.parametrize("name", backend.NAMES)
def test_autocast_does_not_reach_inside(op, name):
    if name == "triton" and backend.by_device(DEVICE) != "triton":
        pytest.skip("needs a GPU, or the interpreter")
    args, ours = arguments(op), CASES[op].ours
    autocast = functools.partial(torch.autocast, DEVICE.type, dtype=torch.float16)
    with backend.using(name):
        wanted = results(op, args, ours)
        assert_equal(results(op, args, ours, forward=autocast), wanted)
        if name == "triton":  # the reference's backward is PyTorch's, with its habits under autocast
            assert_equal(results(op, args, ours, forward=autocast, backward=autocast), wanted)


@each_op
def test_views_of_larger_tensors(op):
    """Rows that lie apart, at an odd offset; compiled for other strides, sums may run in another order."""
    args = arguments(op)

    def inside_larger(t):
        if not isinstance(t, Tensor) or t.ndim < 2:
            return t
        larger = torch.full([*t.shape[:-1], t.shape[-1] + 24], 7, dtype=t.dtype, device=t.device)
        return larger[..., 8 : 8 + t.shape[-1]].copy_(t)

    views = tuple(inside_larger(a) for a in args)
    for a, b in zip(results(op, views, CASES[op].ours), results(op, args, CASES[op].ours), strict=True):
        assert a.dtype == b.dtype
        assert_same_up_to_order(a.float(), b.float())


@each_op
def test_checkpointing_and_hooks_on_what_is_saved(op):
    """What runs again, or comes back from elsewhere as another tensor, gives the same bits."""
    args, ours = arguments(op), CASES[op].ours
    wanted = results(op, args, ours)
    assert_equal(results(op, args, functools.partial(checkpoint, ours, use_reentrant=False)), wanted)
    hooks = functools.partial(torch.autograd.graph.saved_tensors_hooks, torch.clone, torch.clone)
    assert_equal(results(op, args, ours, forward=hooks), wanted)


@each_op
def test_reentrant_checkpointing(op):
    """It collects in ``.grad``, which is all that it can do."""
    args, ours = arguments(op), CASES[op].ours
    trained = CASES[op].wanted(*args)
    if not trained:
        return
    grads = []
    for call in (ours, functools.partial(checkpoint, ours, use_reentrant=True)):
        for t in trained:
            t.grad = None
            t.requires_grad_()
        outputs = [o for o in tree.leaves(call(*args)) if o.requires_grad]
        torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
        grads.append([t.grad for t in trained])
    assert_equal(grads[1], grads[0])


@each_op
def test_inference_mode(op):
    """Inside it, and with tensors that were made there; more than twice, for then calls are prepared."""
    ours = CASES[op].ours
    wanted = [t.detach() for t in tree.leaves(ours(*arguments(op)))]
    with torch.inference_mode():
        made_there = arguments(op)
        assert_equal(tree.leaves(ours(*made_there)), wanted)
    for _ in range(2):
        assert_equal(tree.leaves(ours(*made_there)), wanted)


@each_op
def test_some_arguments_want_a_gradient(op):
    """Each one alone gets what it gets beside the others."""
    args, ours = arguments(op), CASES[op].ours
    trained = CASES[op].wanted(*args)
    full = results(op, args, ours)[-len(trained) :] if trained else []
    for i, t in enumerate(trained):
        for other in trained:
            other.requires_grad_(other is t)
        outputs = [o for o in tree.leaves(ours(*args)) if o.requires_grad]
        (alone,) = torch.autograd.grad(outputs, t, [torch.ones_like(o) for o in outputs])
        assert alone.dtype == full[i].dtype  # sums may run in another order before they are rounded
        torch.testing.assert_close(alone, full[i], rtol=2**-7, atol=2**-7 * float(full[i].abs().max()))


@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
def test_the_output_of_a_product_may_be_changed(shape):
    """``y = linear(x, w); y += 1`` as with PyTorch's; at every call, for the third is a prepared one."""
    x, w = torch.randn(*shape, 16, device=DEVICE, requires_grad=True), torch.randn(8, 16, device=DEVICE)
    for _ in range(4):
        y = ops.linear(x, w)
        (wanted,) = torch.autograd.grad(y.square().sum(), x)
        z = ops.linear(x, w)
        z *= y.detach()
        assert torch.equal(torch.autograd.grad(z.sum(), x)[0] * 2, wanted)


@each_op
def test_a_gradient_is_not_differentiated_again(op):
    """Also where the first cotangent has no history and PyTorch's own guard lets it pass as a constant."""
    args = arguments(op)
    trained = CASES[op].wanted(*args)
    if not trained or backend.by_device(DEVICE) == "reference":
        return
    for t in trained:
        t.requires_grad_()
    outputs = [o for o in tree.leaves(CASES[op].ours(*args)) if o.requires_grad]
    grads = torch.autograd.grad(outputs, trained, [torch.ones_like(o) for o in outputs], create_graph=True)
    plain = CASES[op].wanted(*args)[0].float().sum()
    with pytest.raises(RuntimeError, match=f"{op}: kernels do not support double backward"):
        (plain + sum(g.float().square().sum() for g in grads)).backward()


def forward_mode(f, x):
    with forward_ad.dual_level():
        forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent.sum()


TRANSFORMS = {
    "torch.func.grad": lambda f, x: torch.func.grad(f)(x),
    "torch.func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "torch.vmap": lambda f, x: torch.vmap(f)(torch.stack([x, x])),
    "forward mode": forward_mode,
}


@each_op
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_functions(op, transform):
    args, ours = arguments(op), CASES[op].ours
    i = next(i for i, t in enumerate(args) if isinstance(t, Tensor) and t.is_floating_point())

    def f(x):
        return sum(t.float().sum() for t in tree.leaves(ours(*args[:i], x, *args[i + 1 :])) if t.is_floating_point())

    with backend.using("reference"):
        TRANSFORMS[transform](f, args[i])
    if backend.by_device(DEVICE) == "triton":
        with pytest.raises(NotImplementedError, match=rf"{op}: kernels do not support .*using\('reference'\)"):
            TRANSFORMS[transform](f, args[i])
