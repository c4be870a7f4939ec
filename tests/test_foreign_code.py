"""Every op inside other people's code: torch.compile with one whole graph, autocast, views of larger tensors.

The results are those of the plain call, bit for bit: whatever surrounds an op, the same kernels run."""

import contextlib
import functools
from typing import Any

import pytest
import torch
from oprule import DEVICE, assert_same_up_to_order
from torch import Tensor

from perf import ops as measured
from unsloth_core import backend, ops, tree

CASES = {case.op: case for case in measured.cases(DEVICE) if case.op in ops.__all__}
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
