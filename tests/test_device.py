"""The launcher never hands out a kernel that Triton would have compiled otherwise, and launches nothing for fakes."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from triton._C.libtriton import native_specialize_impl
from triton.backends.nvidia.compiler import CUDABackend
from triton.tools.tensor_descriptor import TensorDescriptor

from unsloth_core import device

MEMORY = torch.zeros(256, dtype=torch.uint8)


def tensor(dtype, start):
    """A tensor at an address that is ``start`` bytes beyond a multiple of 16."""
    first = (start - MEMORY.data_ptr()) % 16
    return MEMORY[first : first + 8 * dtype.itemsize].view(dtype)


def specialised(argument):
    """What Triton compiles for, if it sees this argument."""
    return native_specialize_impl(CUDABackend, argument, False, True, True)


integers = st.one_of(
    st.integers(-20, 40), st.sampled_from([2**31 - 1, 2**31, 2**31 - 16, 2**32, 2**62, 15 * 2**30, -(2**31)])
)
arguments = st.one_of(
    integers,
    st.none(),
    st.booleans(),
    st.floats(allow_nan=False),
    st.tuples(integers, integers),
    st.builds(tensor, st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), st.sampled_from([0, 8])),
)


@given(st.lists(arguments, min_size=2, max_size=12))
def test_equal_traits_compile_alike(values):
    for a, b in itertools.combinations(values, 2):
        if device._traits((a,)) == device._traits((b,)):
            assert specialised(a) == specialised(b), (a, b)


def test_traits_of_a_row_of_arguments_do_not_run_together():
    assert device._traits(((1, 64), 7)) != device._traits(((1,), 64, 7))
    assert device._traits((1, None)) != device._traits((None, 1))


class Kernel:
    """Stands for a jitted function (x, n, FLAG, EPS), and notes what is compiled and what is run."""

    params = tuple(SimpleNamespace(is_constexpr=fixed) for fixed in (False, False, True, True))
    arg_names = ("x", "n", "FLAG", "EPS")
    function = packed_metadata = None

    def __init__(self):
        self.compiled, self.ran = [], []

    def __getitem__(self, grid):
        return self._compile

    def _compile(self, x, n, *constexprs):
        self.compiled.append(constexprs)
        return SimpleNamespace(
            function=None, packed_metadata=None, run=lambda *a: self.ran.append((constexprs, a[-2:]))
        )


@pytest.mark.parametrize("constexprs", [[(True, 1e-5), (False, 1e-5)], [(True, 1e-5), (True, 1e-6)]])
def test_constexprs_by_position_are_told_apart(constexprs, monkeypatch):
    """Also those that are neither tensors nor integers, and in every call after the first, which is another path."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
    kernel = Kernel()
    for _ in range(4):
        for c in constexprs:
            device._launch(0, kernel, (1,), (MEMORY, 16, *c), {})
    assert kernel.compiled == constexprs
    assert kernel.ran == 3 * [(c, c) for c in constexprs]


def test_traits_of_descriptors_are_those_of_their_blocks():
    def descriptor(dtype, block):
        base = torch.empty(64, 64, dtype=dtype)
        return TensorDescriptor(base, [64, 64], [64, 1], block)

    several = [
        descriptor(torch.bfloat16, [16, 64]),
        descriptor(torch.float16, [16, 64]),
        descriptor(torch.float16, [64, 64]),
    ]
    traits = [tuple(device._traits((d,))) for d in several]
    assert len(set(traits)) == 3
    assert traits[0] == tuple(device._traits((descriptor(torch.bfloat16, [16, 64]),)))


@pytest.mark.parametrize("parameter", [torch.nn.Parameter, lambda t: t])
def test_fake_tensors_launch_nothing(parameter):
    real = parameter(torch.ones(3))
    assert not device.is_fake(real)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = parameter(torch.ones(3))
        assert device.is_fake(fake) and device.aligned(fake, 16)
        device.launch(None, (1,), fake)


def test_powers_and_quotients():
    for n in range(1, 70):
        assert device.next_power_of_2(n) == triton.next_power_of_2(n)
        assert device.cdiv(n, 7) == triton.cdiv(n, 7)
