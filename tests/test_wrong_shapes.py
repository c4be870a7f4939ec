"""A tensor of another shape: kernels and reference refuse the same, in one line that names op and argument. PyTorch
would broadcast some of it, so what a CPU had taken a GPU would refuse."""

import functools

import pytest
import torch
from torch import Tensor

from perf import ops as measured
from unsloth_core import backend, ops, tree

CPU, META = torch.device("cpu"), torch.device("meta")  # on a meta tensor ops run, and nothing is launched
CASES = {case.op: case for case in measured.cases(CPU) if case.op in (*ops.__all__, "linear_lora")}
CALLS = {name: case.ours for name, case in CASES.items()} | {
    "linear_rope": functools.partial(ops.linear_rope, heads=4, kv_heads=1),
    "route": functools.partial(ops.route, top_k=2),
}
OPAQUE = ("starts_S", "ends_S")  # what segments are made of


def wrong_shapes(t: Tensor):
    """The same tensor with a dimension more, less, longer, or of size 1, which would broadcast."""
    yield t[None]
    if t.ndim:
        yield t[0]
    for i, size in enumerate(t.shape):
        index = torch.arange(size + 1, device=t.device) % size
        yield t.index_select(i, index)
        if size > 1:
            yield t.index_select(i, index[:1])


def said(op, args, name):
    """What is said about these arguments; nothing if they are taken."""
    try:
        with backend.using(name), torch.no_grad():
            CALLS[op](*args)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize("op", CASES)
def test_both_refuse_the_same(op):
    args = CASES[op].make(measured.Random.seeded(1, CPU), *CASES[op].tiny)
    leaves, spec = tree.flatten(tree.map(lambda t: t.to(META), args))
    for i, (path, t) in enumerate(tree.items(args)):
        if path.endswith(OPAQUE) or (op == "grouped_linear" and path.startswith("2.")):  # a plan is route's
            continue
        for wrong in wrong_shapes(t):
            other = tree.unflatten([*leaves[:i], wrong.to(META), *leaves[i + 1 :]], spec)
            kernels, reference = (said(op, other, name) for name in ("triton", "reference"))
            what = f"argument {path} of shape {tuple(wrong.shape)}: {kernels!r}, {reference!r}"
            assert (kernels == "") == (reference == ""), what
            for text in (kernels, reference):
                assert not text or ("expected" in text and "\n" not in text and text.split(":")[0] in CASES), what
