"""Chunks of attention: the op rule for one of them, and that their sum is the whole backward."""

import itertools

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oprule import DEVICE, DTYPES, assert_both_refuse, assert_op_rule, check_op, rand

import unsloth_core.backend as backend
from unsloth_core.ops.attention import cost as attention_cost
from unsloth_core.ops.attention_block import accumulate, attention_block, cost
from unsloth_core.reference.attention import attention as whole_attention
from unsloth_core.segments import Segments
from unsloth_core.tree import ABSENT

FACTOR = {torch.float32: 6.0, torch.bfloat16: 2.5, torch.float16: 2.5}  # see test_attention.py
NO = Segments(starts_S=False, ends_S=False, max_len=0)


def packed(lengths):
    """Segments one behind the other, and the number of rows."""
    cu = [0, *itertools.accumulate(lengths)]
    return Segments.packed(torch.tensor(cu, dtype=torch.int32, device=DEVICE), max_len=max(lengths)), cu[-1]


# No shrinking: it would interpret kernels for minutes.
@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    lengths=st.sampled_from(((70,), (20, 33, 1, 12), (5, 0, 40))),
    chunk=st.sampled_from((1, 17, 40)),
    start=st.integers(0, 5),
    heads=st.sampled_from(((1, 1), (4, 2))),
    K=st.sampled_from((16, 33, 80)),
    dtype=st.sampled_from(DTYPES),
    window=st.sampled_from((None, 9)),
    sinks=st.booleans(),
    return_lse=st.booleans(),
)
def test_contract(lengths, chunk, start, heads, K, dtype, window, sinks, return_lse):
    (segments, N), (H, G) = packed(lengths), heads
    start = min(7 * start + 1, N - chunk)
    args = (
        rand((chunk, H, K), dtype, seed=0),
        rand((N, G, K), dtype, seed=1),
        rand((N, G, K), dtype, seed=2),
        segments,
    )
    if sinks:
        args = (*args, rand((H,), dtype, seed=3))
    statics = {"start": start, "window": window, "return_lse": return_lse}
    check_op(attention_block, args, statics, factor=FACTOR[dtype])


@pytest.mark.parametrize("lengths", [(80,), (30, 1, 0, 37, 12)])
@pytest.mark.parametrize("statics", [{}, {"window": 20, "softcap": 3.0, "scale": -0.3}], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C", [32, 24])
def test_the_last_chunk_first_gives_the_whole_backward(lengths, statics, dtype, C):
    """dk and dv of a chunk are final when it has been done: they are overwritten with NaN, and so are its keys."""
    (segments, N), H, G, K = packed(lengths), 4, 2, 16
    q, k, v = (rand((N, heads, K), dtype, seed=i) for i, heads in enumerate((H, G, G)))
    sinks, do, dlse = rand((H,), dtype, seed=5), rand((N, H, K), dtype, seed=6), rand((N, H), seed=7)
    needs = (True, True, True, NO, True)
    o, lse, dq = torch.empty_like(q), torch.empty_like(dlse), torch.empty_like(q)
    dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    dsinks, final = torch.zeros(H, device=DEVICE), [torch.empty_like(dk), torch.empty_like(dv)]
    keys, values = k.clone(), v.clone()
    with backend.using("triton"):
        for start in reversed(range(0, N, C)):
            at = slice(start, min(start + C, N))
            out, residuals = attention_block.fwd(
                q[at], keys, values, segments, sinks, needs=needs, start=start, return_lse=True, **statics
            )
            o[at], lse[at] = out
            dq[at], dk, dv, _, dz = accumulate(
                residuals, (do[at], dlse[at]), dk, dv, needs=needs, donate=True, start=start, return_lse=True, **statics
            )
            dsinks += dz
            for total, done, used in zip((dk, dv), final, (keys, values), strict=True):
                done[at] = total[at]
                total[at], used[at] = float("nan"), float("nan")
    ours = (o, lse, dq, final[0].to(dtype), final[1].to(dtype), dsinks.to(dtype))

    def whole(*tensors):
        inputs = [t.detach().requires_grad_() for t in tensors]
        out = whole_attention(*inputs[:3], segments, segments, inputs[3], return_lse=True, **statics)
        given = [t.to(o.dtype) for t, o in zip((do, dlse), out, strict=True)]
        return [t.detach() for t in (*out, *torch.autograd.grad(out, inputs, given))]

    truth, same = whole(*(t.double() for t in (q, k, v, sinks))), whole(q, k, v, sinks)
    for name, a, b, t in zip(("o", "lse", "dq", "dk", "dv", "dsinks"), ours, same, truth, strict=True):
        assert_op_rule(a, b, t, f"attention_block {name}", FACTOR[dtype])


@pytest.mark.parametrize("name", backend.NAMES)
def test_donating_or_not(name):
    """The same sums; only with donate are they those that were given, and rows behind the chunk keep theirs."""
    segments, N = packed((40, 20))
    q, k, v = (rand((n, heads, 16), seed=heads) for n, heads in ((20, 2), (N, 1), (N, 1)))
    needs, do = (True, True, True, NO, ABSENT), rand((20, 2, 16), seed=5)
    dk, dv = rand((N, 1, 16), seed=6), rand((N, 1, 16), seed=7)
    with backend.using(name):
        _, residuals = attention_block.fwd(q, k, v, segments, ABSENT, needs=needs, start=25)
        before = dk.clone()
        kept = accumulate(residuals, do, dk, dv, needs=needs, start=25)
        assert torch.equal(dk, before) and kept[1] is not dk
        alone = attention_block.bwd(residuals, do, needs=needs, start=25)
        torch.testing.assert_close(kept[1], dk + alone[1])
        torch.testing.assert_close(kept[2], dv + alone[2])
        given = accumulate(residuals, do, dk, dv, needs=needs, donate=True, start=25)
    assert given[1] is dk and given[2] is dv
    assert all(torch.equal(a, b) for a, b in zip(kept[:3], given[:3], strict=True))
    assert torch.equal(dk[45:], before[45:]) and not torch.equal(dk[:45], before[:45])


def test_bad_input():
    segments, _ = packed((10,))
    q, k = torch.zeros(4, 2, 16, device=DEVICE), torch.zeros(10, 1, 16, device=DEVICE)
    assert_both_refuse(attention_block, q, k, k, segments, start=7)
    assert_both_refuse(attention_block, q, k, k, segments, start=-1)
    needs = (True, True, True, NO, ABSENT)
    with backend.using("triton"):
        _, residuals = attention_block.fwd(q, k, k, segments, needs=needs, start=6)
        for sums in (torch.zeros_like(k, dtype=torch.bfloat16), torch.zeros(9, 1, 16, device=DEVICE)):
            with pytest.raises(ValueError, match="attention_block: dk is .*expected torch.float32"):
                accumulate(residuals, q, sums, torch.zeros_like(k), needs=needs, start=6)


def test_cost():
    plain = attention_cost([(10, 30)], 4, 2, 16, 2, backward=True)
    assert cost([(10, 30)], 4, 2, 16, 2) == attention_cost([(10, 30)], 4, 2, 16, 2)
    assert cost([(10, 30)], 4, 2, 16, 2, backward=True).bytes == plain.bytes + 2 * 30 * 2 * 16 * 6
