"""NF4 against bitsandbytes itself, where it is installed: its codes and ours are the same bits, both ways.

What two of its own backends disagree about is no bit to be exact with, and is taken from one of them. Double
quantisation subtracts a mean, whose last bit is the order of its sum: a CPU's and a GPU's differ, so it is PyTorch's
mean on the device of the weight, as in bitsandbytes. Its CPU library looks numbers up in a table of 65536 cells, which
misses the nearest entry of the 8-bit map for 2 numbers in 1000; its portable code finds it. And where there is a GPU,
the library that it loads rounds halves to fp16 away from zero on the CPU, elsewhere to even: decoded weights are
compared in fp32, rounded once by PyTorch.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import DEVICE, rand

from unsloth_core import backend
from unsloth_core.ops import nf4
from unsloth_core.tree import ABSENT
from unsloth_core.weights import NF4, Nested

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
functional = pytest.importorskip("bitsandbytes.functional")

each_matrix = given(
    blocks=st.integers(1, 40),
    columns=st.sampled_from([1, 3, 11]),
    block=st.sampled_from([64, 128, 256]),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 99),
)


def matrix(blocks, columns, block, dtype, scale, seed):
    return rand((blocks * columns, block), dtype=torch.float32, seed=seed).mul(scale).to(dtype)


def by_bitsandbytes(t, block, double):
    return functional.quantize_4bit(t.cpu(), blocksize=block, compress_statistics=double, quant_type="nf4")


def to_8_bit(x):
    """Codes and absmax by the portable code, of whole blocks: it divides in a ragged one and multiplies in the rest."""
    whole = torch.nn.functional.pad(x, (0, -len(x) % 256))
    portable = torch._C.DispatchKey.CompositeExplicitAutograd
    op = torch.ops.bitsandbytes.quantize_blockwise.default
    codes, absmax = op._op_dk(portable, whole, functional.create_dynamic_map(), 256)
    return codes[: len(x)], absmax


def assert_decodes_alike(w, codes, state):
    state.dtype = torch.float32
    decoded = functional.dequantize_4bit(codes, state).to(w.dtype)
    assert torch.equal(backend.reference("nf4.dequantize")(w).cpu(), decoded)
    assert torch.equal(nf4.dequantize(w).cpu(), decoded)


@each_matrix
def test_codes_statistics_and_decoded_weights_are_the_same_bits(blocks, columns, block, double, dtype, scale, seed):
    t = matrix(blocks, columns, block, dtype, scale, seed)
    codes, state = by_bitsandbytes(t, block, double)
    single = by_bitsandbytes(t, block, double=False)[1].absmax
    w = nf4.quantize(t, double_quant=double, block=block)
    assert torch.equal(w.codes.cpu(), codes.flatten())
    assert (w.nested is not ABSENT) is double
    if not double:
        assert torch.equal(w.absmax.cpu(), single)
    else:
        offset = w.nested.offset.cpu()
        assert torch.equal(offset, single.to(DEVICE).mean().cpu())
        # Two orders of one sum of n positive numbers: each errs by n - 1 half units at most, and dividing by one more.
        assert abs(float(offset - state.offset)) <= len(single) * 2**-23 * float(state.offset)
        state.offset = offset
        state.absmax, state.state2.absmax = to_8_bit(single - offset)
        assert torch.equal(w.absmax.cpu(), state.absmax)
        assert torch.equal(w.nested.absmax_P.cpu(), state.state2.absmax)
        assert torch.equal(w.nested.code_256.cpu(), state.state2.code)
    assert_decodes_alike(w, codes, state)


@each_matrix
def test_what_bitsandbytes_stored_decodes_to_the_same_bits(blocks, columns, block, double, dtype, scale, seed):
    t = matrix(blocks, columns, block, dtype, scale, seed)
    codes, state = by_bitsandbytes(t, block, double)
    nested = ABSENT
    if double:
        of_absmax = (state.state2.absmax, state.state2.code, state.offset)
        absmax_P, code_256, offset = (x.to(DEVICE) for x in of_absmax)
        nested = Nested(absmax_P=absmax_P, code_256=code_256, offset=offset)
    stored = codes.flatten().to(DEVICE), state.absmax.to(DEVICE)
    w = NF4(codes=stored[0], absmax=stored[1], nested=nested, shape=tuple(t.shape), dtype=dtype, block=block)
    assert_decodes_alike(w, codes, state)
