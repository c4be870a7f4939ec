"""NF4 against bitsandbytes itself, where it is installed: its CPU code and ours make the same bits, both ways."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import rand

from unsloth_core import backend
from unsloth_core.ops import nf4
from unsloth_core.tree import ABSENT

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
functional = pytest.importorskip("bitsandbytes.functional")


@given(
    blocks=st.integers(1, 40),
    columns=st.sampled_from([1, 3]),
    block=st.sampled_from([64, 128, 256]),
    double=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-3, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
def test_codes_statistics_and_decoded_weights_are_the_same_bits(blocks, columns, block, double, dtype, scale, seed):
    t = rand((blocks * columns, block), dtype=torch.float32, seed=seed).mul(scale).to(dtype)
    codes, state = functional.quantize_4bit(
        t.cpu(), blocksize=block, compress_statistics=double, quant_type="nf4", quant_storage=torch.uint8
    )
    w = nf4.quantize(t, double_quant=double, block=block)
    assert torch.equal(w.codes.cpu(), codes.flatten())
    assert torch.equal(w.absmax.cpu(), state.absmax.flatten())
    assert (w.nested is ABSENT) is (state.state2 is None)
    if state.state2 is not None:
        assert torch.equal(w.nested.absmax_P.cpu(), state.state2.absmax)
        assert torch.equal(w.nested.code_256.cpu(), state.state2.code)
        assert torch.equal(w.nested.offset.cpu(), state.offset)
    decoded = functional.dequantize_4bit(codes, state)
    assert torch.equal(backend.reference("nf4.dequantize")(w).cpu(), decoded)
    assert torch.equal(nf4.dequantize(w).cpu(), decoded)
