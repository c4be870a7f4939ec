"""Kernels and reference refuse the same dtypes in the same words, so that what runs on a CPU runs on a GPU too."""

import pytest
import torch
from torch import Tensor

from perf import ops as measured
from unsloth_core import backend, ops, tree

META = torch.device("meta")  # ops run, nothing is launched
CASES = {case.op: case for case in measured.cases(torch.device("cpu")) if case.op in ops.__all__}
DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.int32, torch.bool,
    torch.complex64,
)  # fmt: skip
each_op = pytest.mark.parametrize("op", ops.__all__)


def arguments(op):
    """Those of the smallest measurement, as leaves without memory, and how they belong together."""
    args = CASES[op].make(measured.Random.seeded(1, torch.device("cpu")), *CASES[op].tiny)
    return tree.flatten(tree.map(lambda t: t.to(META), args))


def said(op, leaves, spec, name):
    """The error, or nothing."""
    try:
        with backend.using(name), torch.no_grad():
            CASES[op].ours(*tree.unflatten(leaves, spec))
    except ValueError as error:
        return str(error)
    return ""


@each_op
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_refused(op, dtype):
    """One argument of another dtype, and all floating-point ones of it."""
    leaves, spec = arguments(op)
    floats = [i for i, t in enumerate(leaves) if t.is_floating_point()]
    for chosen in [floats, *([i] for i, t in enumerate(leaves) if isinstance(t, Tensor))]:
        other = [t.to(dtype) if i in chosen else t for i, t in enumerate(leaves)]
        assert said(op, other, spec, "triton") == said(op, other, spec, "reference"), chosen


@each_op
def test_float64_is_for_the_reference_alone(op):
    leaves, spec = arguments(op)
    doubles = [t.double() if t.is_floating_point() else t for t in leaves]
    assert said(op, doubles, spec, "reference") == ""
    assert "torch.float64" in said(op, doubles, spec, "triton")
