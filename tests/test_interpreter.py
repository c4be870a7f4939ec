"""The tests test kernels: without a GPU every op really walks through Triton's interpreter. And canaries of its
faults."""

import pytest
import torch
import triton
import triton.language as tl
from oprule import DEVICE, rand
from triton.runtime.interpreter import InterpretedFunction

from unsloth_core import backend, device, ops, random
from unsloth_core.device import launch
from unsloth_core.ops.language import cast
from unsloth_core.segments import Segments

interpreted_only = pytest.mark.skipif(
    DEVICE.type == "cuda", reason="says what the CPU interpreter does; kernels are compiled here"
)
N, D = 6, 16
x, w, ids = rand((N, D), seed=0), rand((24, D), seed=1), torch.arange(N, device=DEVICE)
heads = rand((N, 2, 8), seed=2)
whole = Segments.uniform(1, N, DEVICE)
CALLS = {
    "add_rms_norm": lambda: ops.add_rms_norm(x, x, w[0]),
    "attention": lambda: ops.attention(heads, heads, heads, whole, whole),
    "attention_block": lambda: ops.attention_block(heads[2:4], heads, heads, whole, start=2),
    "attention_decode": lambda: ops.attention_decode(heads[:1], heads, heads, Segments.uniform(1, 1, DEVICE), whole),
    "cross_entropy": lambda: ops.cross_entropy(x, ids),
    "dropout": lambda: ops.dropout(x, random.key(0, DEVICE), p=0.5),
    "embedding": lambda: ops.embedding(ids, w),
    "gelu": lambda: ops.gelu(x),
    "glu": lambda: ops.glu(x),
    "glu_linear": lambda: ops.glu_linear(x, w[:, : D // 2].contiguous()),
    "grouped_linear": lambda: ops.grouped_linear(x, torch.stack([w] * 3), ops.route(x[:, :3], top_k=1)[2:5]),
    "layer_norm": lambda: ops.layer_norm(x, w[0], w[1]),
    "linear": lambda: ops.linear(x, w),
    "linear_cross_entropy": lambda: ops.linear_cross_entropy(x, w, ids),
    "linear_logprob": lambda: ops.linear_logprob(x, w, ids),
    "linear_rope": lambda: ops.linear_rope(x, w, x[:, :4], x[:, 4:8], heads=1, kv_heads=1),
    "qk_norm_rope": lambda: ops.qk_norm_rope(heads, heads, w[0, :8], w[1, :8], x[:, :4], x[:, 4:8]),
    "rms_norm": lambda: ops.rms_norm(x, w[0]),
    "rope": lambda: ops.rope(heads, heads, x[:, :4], x[:, 4:8]),
    "route": lambda: ops.route(x[:, :3], top_k=2),
    "softmax": lambda: ops.softmax(x),
}


def test_every_op_is_listed_here():
    assert sorted(CALLS) == sorted(ops.__all__)


@interpreted_only
@pytest.mark.parametrize("op", CALLS)
def test_kernels_really_run(op, monkeypatch):
    """Counted where the interpreter executes a grid, under whatever name an op imported the launcher."""
    grids = []
    run = triton.runtime.interpreter.GridExecutor.__call__

    def counted(self, *args, **kwargs):
        grids.append(self.grid)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(triton.runtime.interpreter.GridExecutor, "__call__", counted)
    with backend.using("triton"):
        CALLS[op]()
    assert device.interpreting() and grids, f"{op}: no kernel ran"
    grids.clear()
    with backend.using("reference"):
        CALLS[op]()
    assert not grids, f"{op}: the reference launched a kernel"


@triton.jit
def _copy(source, target, n, BLOCK: tl.constexpr, ROUND: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(source + i, mask=i < n, other=0.0)
    tl.store(target + i, cast(v, target.dtype.element_ty) if ROUND else v.to(target.dtype.element_ty), mask=i < n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cast_rounds_as_pytorch_does(dtype):
    edge = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 3.4e38, -3.4e38, 1e-45, 65504.0, 65520.0, 1.00390625]
    values = torch.cat([torch.tensor(edge), torch.randn(1000) * torch.exp2(torch.randint(-120, 120, (1000,)).float())])
    values = values.to(DEVICE)
    got = torch.empty(len(values), dtype=dtype, device=DEVICE)
    launch(_copy, (1,), values, got, len(values), BLOCK=1024, ROUND=True)
    wanted = values.to(dtype)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(1.5), wanted.nan_to_num(1.5))


@interpreted_only
def test_canary_the_interpreter_truncates_bf16():
    """If this fails, Triton learnt to round: cast() in ops/language.py can go."""
    assert isinstance(_copy, InterpretedFunction)
    source = torch.tensor([1.00390625 + 2**-10], device=DEVICE)  # closer to the next bf16 above
    got = torch.empty(1, dtype=torch.bfloat16, device=DEVICE)
    launch(_copy, (1,), source, got, 1, BLOCK=16, ROUND=False)
    assert got.item() < source.to(torch.bfloat16).item()
