"""Attention: the op rule over packing, caches, windows, caps and head sizes, and the promises that need no
oracle."""

import importlib
import itertools
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oprule import DEVICE, DTYPES, assert_op_rule, check_op, rand
from torch._subclasses.fake_tensor import FakeTensorMode

import unsloth_core.backend as backend
from unsloth_core.ops.attention import attention, configurations, cost
from unsloth_core.ops.attention_tiles import shares
from unsloth_core.reference.attention import attention as reference
from unsloth_core.segments import Segments
from unsloth_core.tree import ABSENT

op = importlib.import_module("unsloth_core.ops.attention")  # the package's attribute is the op

# The allowance over eager PyTorch. Flash makes two roundings that eager does not: backward takes Δ = Σ o∘do from the
# rounded o, and rebuilds P from lse, an exponential of a difference, where softmax divides. 16 bits nearly hide them.
FACTOR = {torch.float32: 6.0, torch.bfloat16: 2.5, torch.float16: 2.5}
SIZES = (1, 16, 33, 64, 80, 96)


def segments(starts, lengths, max_len=None):
    """Segments from host integers."""
    ends = [s + n for s, n in zip(starts, lengths, strict=True)]
    make = partial(torch.tensor, dtype=torch.int32, device=DEVICE)
    return Segments(
        starts_S=make(list(starts)), ends_S=make(ends), max_len=max(lengths) if max_len is None else max_len
    )


def packed(lengths, gap=0):
    """Segments one behind the other, each followed by ``gap`` rows that belong to none; and the number of
    rows."""
    starts = [0, *itertools.accumulate(n + gap for n in lengths)]
    return segments(starts[:-1], lengths), starts[-1]


def tensors(N, M, H, G, K, dtype=torch.float32, seed=0, scale=1.0):
    """q, k, v: strided views of one stacked product where queries and keys are the same rows."""
    if N != M:
        shapes = ((N, H, K), (M, G, K), (M, G, K))
        return tuple(rand(s, dtype, seed=seed + i, scale=scale) for i, s in enumerate(shapes))
    qkv = rand((N, (H + 2 * G) * K), dtype, seed=seed, scale=scale).split((H * K, G * K, G * K), -1)
    return tuple(t.unflatten(-1, (-1, K)) for t in qkv)


def run(*args, **statics):
    """The op on kernels."""
    with backend.using("triton"):
        return attention(*args, **statics)


def eager(
    q,
    k,
    v,
    q_segments,
    kv_segments,
    sinks=ABSENT,
    *,
    scale=None,
    causal=True,
    window=None,
    softcap=None,
    return_lse=False,
):
    """What transformers' eager attention does in the input's dtype: scores and probabilities rounded to it."""
    ranges = [list(zip(s.starts_S.tolist(), s.ends_S.tolist(), strict=True)) for s in (q_segments, kv_segments)]
    mask = visible(*ranges, len(q), len(k), causal, window).to(q.device)
    o, lse = eager_masked(q, k, v, mask, sinks, scale=scale, softcap=softcap)
    return (o, lse) if return_lse else o


def eager_masked(q, k, v, mask, sinks=ABSENT, *, scale=None, softcap=None):
    """The same by a mask: o and lse."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = torch.einsum("nhk,mhk->hnm", q, k) * (q.shape[2] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~(mask | empty), float("-inf"))
    if sinks is not ABSENT:  # gpt-oss: a column that is dropped after the softmax
        column = sinks.to(q.dtype)[:, None, None].expand(*scores.shape[:2], 1)
        scores = torch.cat([scores, column.masked_fill(empty, 0.0)], -1)
        v = torch.cat([v, v.new_zeros(1, *v.shape[1:])])
    p = scores.float().softmax(-1).to(q.dtype).masked_fill(empty, 0.0)
    return torch.einsum("hnm,mhk->nhk", p, v), scores.float().logsumexp(-1).T.masked_fill(empty, float("-inf"))


def visible(q_ranges, kv_ranges, N, M, causal, window):
    """The mask from its definition, one pair at a time."""
    mask = torch.zeros(N, M, dtype=torch.bool)
    for (q_start, q_end), (kv_start, kv_end) in zip(q_ranges, kv_ranges, strict=True):
        for i, j in itertools.product(range(q_start, q_end), range(kv_start, kv_end)):
            position = i - q_start + (kv_end - kv_start) - (q_end - q_start)
            key = j - kv_start
            mask[i, j] = (not causal or key <= position) and (window is None or key > position - window)
    return mask


@st.composite
def cases(draw):
    """Packed training, chunked prefill, decoding from a cache with room, or queries without enough keys."""
    kind = draw(st.sampled_from(("packed", "packed", "chunk", "decode", "free")))
    # The first segment is never trivial: where every row sees one key, gradients are exactly 0 and nothing to
    # compare with.
    count = draw(st.integers(0, 2)) + 1
    kv = [20, *draw(st.lists(st.integers(0, 45), min_size=count - 1, max_size=count - 1))]
    match kind:
        case "packed":
            q = kv
        case "chunk":
            q = [12, *(draw(st.integers(0, n)) for n in kv[1:])]
        case "decode":
            q = [1] * count
        case _:
            q = [30, *draw(st.lists(st.integers(0, 45), min_size=count - 1, max_size=count - 1))]
    q_gap = 0 if kind == "packed" else draw(st.sampled_from((0, 3)))
    kv_gap = 0 if kind == "packed" else draw(st.sampled_from((0, 5)))
    H, G = draw(st.sampled_from(((1, 1), (2, 2), (2, 1), (3, 1))))
    statics = {
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from((None, 2, 7, 1000))),
        "softcap": draw(st.sampled_from((None, 2.0))),
        "scale": draw(st.sampled_from((None, 0.3, -0.2))),
        "return_lse": draw(st.booleans()),
    }
    sinks = draw(st.sampled_from((None, *DTYPES)))
    return q, kv, q_gap, kv_gap, H, G, draw(st.sampled_from(SIZES)), draw(st.sampled_from(DTYPES)), sinks, statics


# No shrinking: it would interpret kernels for minutes.
@settings(max_examples=10, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(cases(), st.integers(0, 99))
def test_contract(case, seed):
    q, kv, q_gap, kv_gap, H, G, K, dtype, sinks, statics = case
    q_segments, N = packed(q, q_gap)
    kv_segments, M = packed(kv, kv_gap)
    args = (*tensors(N, M, H, G, K, dtype, seed), q_segments, kv_segments)
    if sinks is not None:
        args = (*args, rand((H,), sinks, seed=seed + 9))
    check_op(attention, args, statics, seed=seed, judge=eager, factor=FACTOR[dtype])


@given(cases())
def test_the_reference_masks_by_definition(case):
    q, kv, q_gap, kv_gap, H, G, K, _, sinks, statics = case
    (q_segments, N), (kv_segments, M) = packed(q, q_gap), packed(kv, kv_gap)
    qs, ks, vs = (t.double() for t in tensors(N, M, H, G, K))
    mask = visible(
        list(zip(q_segments.starts_S.tolist(), q_segments.ends_S.tolist(), strict=True)),
        list(zip(kv_segments.starts_S.tolist(), kv_segments.ends_S.tolist(), strict=True)),
        N, M, statics["causal"], statics["window"],
    ).to(DEVICE)  # fmt: skip
    scores = torch.einsum("nhk,mhk->hnm", qs, ks.repeat_interleave(H // G, 1))
    scores = scores * (K**-0.5 if statics["scale"] is None else statics["scale"])
    if statics["softcap"] is not None:
        scores = statics["softcap"] * torch.tanh(scores / statics["softcap"])
    weights = torch.where(mask, scores, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    given = ABSENT
    if sinks is not None:
        given = rand((H,), torch.float64, seed=3)
        total = torch.where(mask.any(-1, keepdim=True), total + given.exp()[:, None, None], total)
    o, lse = reference(qs, ks, vs, q_segments, kv_segments, given, **{**statics, "return_lse": True})
    p = (weights / total).nan_to_num(0.0)
    torch.testing.assert_close(o, torch.einsum("hnm,mhk->nhk", p, vs.repeat_interleave(H // G, 1)))
    torch.testing.assert_close(lse, total.log()[..., 0].T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_window_of_one_is_the_identity(dtype):
    whole, N = packed([33, 1, 20])
    q, k, v = (t.detach().requires_grad_() for t in tensors(N, N, 2, 2, 16, dtype))
    o, lse = run(q, k, v, whole, whole, window=1, scale=0.5, return_lse=True)
    assert torch.equal(o, v)
    torch.testing.assert_close(lse, 0.5 * (q.float() * k.float()).sum(-1), rtol=1e-5, atol=1e-5)
    do = rand(tuple(o.shape), dtype, seed=5)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), do)
    torch.testing.assert_close(dv, do, rtol=1e-5, atol=0)
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5


def test_packed_equals_separate():
    lengths = [37, 1, 0, 64, 5]
    together, N = packed(lengths)
    q, k, v = tensors(N, N, 2, 1, 16)
    o, lse = run(q, k, v, together, together, window=20, return_lse=True)
    for start, end in zip(together.starts_S.tolist(), together.ends_S.tolist(), strict=True):
        alone = segments([0], [end - start])
        part = run(q[start:end], k[start:end], v[start:end], alone, alone, window=20, return_lse=True)
        torch.testing.assert_close(o[start:end], part[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[start:end], part[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("new", [1, 3, 20])
@pytest.mark.parametrize("window", [None, 9])
def test_cached_rows_equal_those_of_the_full_forward(new, window):
    """The last rows of every sequence, seen from a cache of static capacity: one token, a few, a chunk of a
    prefill."""
    lengths, capacity = [40, 21, 33], 48
    whole, N = packed(lengths)
    q, k, v = tensors(N, N, 4, 2, 16)
    full = run(q, k, v, whole, whole, window=window)
    rows = torch.cat([torch.arange(end - new, end) for end in whole.ends_S.tolist()]).to(DEVICE)
    cache = torch.full((2, len(lengths) * capacity, 2, 16), 7.0, device=DEVICE)
    for s, (start, n) in enumerate(zip(whole.starts_S.tolist(), lengths, strict=True)):
        cache[0, s * capacity : s * capacity + n] = k[start : start + n]
        cache[1, s * capacity : s * capacity + n] = v[start : start + n]
    q_segments = segments([new * s for s in range(3)], [new] * 3)
    kv_segments = segments([capacity * s for s in range(3)], lengths, max_len=capacity)
    o = run(q[rows], cache[0], cache[1], q_segments, kv_segments, window=window)
    torch.testing.assert_close(o, full[rows], rtol=1e-5, atol=1e-6)


def test_a_cache_split_over_programs_merges():
    """One query and a long cache: the keys are shared among programs, some of which get none."""
    q, k, v = tensors(1, 160, 4, 2, 33)
    args = (q, k, v, segments([0], [1]), segments([3], [90], max_len=160))
    check_op(attention, args, {"return_lse": True}, judge=eager, factor=FACTOR[torch.float32])


def test_query_heads_are_divided_where_blocks_of_keys_are_few():
    """Seven heads on one, over four programs: 2, 2, 2 and 1."""
    whole, N = packed([70])
    check_op(attention, (*tensors(N, N, 7, 1, 16), whole, whole), judge=eager, factor=FACTOR[torch.float32])


@given(st.integers(0, 300), st.integers(1, 100), st.sampled_from((4, 132)))
def test_shares(programs, group, sms):
    """Every share has a head; more programs than needed to fill the machine twice come only of whole heads."""
    count = shares(programs, group, sms)
    each = -(-group // count)
    assert (count - 1) * each < group <= count * each
    assert count == 1 if programs >= sms else count == group or count * max(programs, 1) <= 2 * sms + programs


@pytest.mark.parametrize("start, length", [(4, 6), (9, 1), (0, 0)])
def test_keys_in_gaps_are_invisible(start, length):
    q, k, v = tensors(10, 30, 1, 1, 16)
    q_segments, kv_segments = segments([start], [length]), segments([5], [20])
    o = run(q, k, v, q_segments, kv_segments)
    k[:5], k[25:], v[:5], v[25:] = 1e4, -1e4, 1e30, -1e30
    assert torch.equal(o, run(q, k, v, q_segments, kv_segments))


def test_rows_that_see_nothing():
    """More queries than keys, a gap, and a segment without keys: o = 0, lse = −inf, gradients exactly 0."""
    q, k, v = (t.detach().clone().requires_grad_() for t in tensors(20, 12, 2, 1, 16))
    q_segments, kv_segments = segments([0, 9, 14], [7, 5, 6]), segments([0, 3, 3], [3, 0, 9])
    o, lse = run(q, k, v, q_segments, kv_segments, return_lse=True)
    blind = torch.tensor([0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13], device=DEVICE)
    seeing = torch.tensor([4, 5, 6, *range(14, 20)], device=DEVICE)
    assert not o[blind].any() and (lse[blind] == float("-inf")).all() and torch.isfinite(lse[seeing]).all()
    dlse = torch.ones_like(lse)
    dlse[blind] = float("nan")
    dq, dk, dv = torch.autograd.grad((o, lse), (q, k, v), (torch.ones_like(o), dlse))
    assert not dq[blind].any() and dq[seeing].any()
    assert all(torch.isfinite(d).all() for d in (dq, dk, dv))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_large_logits(dtype, softcap):
    """Logits in the thousands: softmax is one-hot; o and lse keep the op rule, gradients drown in rounding,
    not NaN."""
    whole, N = packed([40])
    q, k, v = (t.detach().requires_grad_() for t in tensors(N, N, 1, 1, 16, dtype, scale=30.0))
    statics = {"softcap": softcap, "return_lse": True}
    out = run(q, k, v, whole, whole, **statics)
    same = eager(q, k, v, whole, whole, **statics)
    truth = reference(*(t.detach().double() for t in (q, k, v)), whole, whole, **statics)
    for name, ours, theirs, t64 in zip(("o", "lse"), out, same, truth, strict=True):
        assert_op_rule(ours, theirs, t64, f"attention {name}", FACTOR[dtype])
    for d in torch.autograd.grad(out, (q, k, v), (torch.ones_like(out[0]), torch.ones_like(out[1]))):
        assert torch.isfinite(d).all()


def test_sinks_alone_get_a_gradient():
    """Frozen q, k and v: one kernel and a sum. And the sum of a head's weights is what a sink leaves of 1."""
    whole, N = packed([70, 20])
    q, k, v = tensors(N, N, 4, 2, 16)
    sinks = rand((4,), seed=8).requires_grad_()
    o, lse = run(q, k, torch.ones_like(v), whole, whole, sinks, return_lse=True)
    torch.testing.assert_close(o[..., 0], 1 - (sinks - lse).exp())
    (got,) = torch.autograd.grad((o.sum() + lse.sum()), sinks)
    wide = [t.double() for t in (q, k, torch.ones_like(v))]
    sinks64 = sinks.detach().double().requires_grad_()
    o, lse = reference(*wide, whole, whole, sinks64, return_lse=True)
    torch.testing.assert_close(got.double(), torch.autograd.grad(o.sum() + lse.sum(), sinks64)[0], rtol=1e-4, atol=1e-4)


def test_gradients_as_slices_of_one_buffer():
    """A stacked projection gets its gradient stacked: nothing is copied together afterwards."""
    whole, N = packed([33, 20])
    H, G, K = 4, 2, 16
    q, k, v = tensors(N, N, H, G, K, torch.bfloat16)
    do = rand((N, H, K), torch.bfloat16, seed=5)
    no = Segments(starts_S=False, ends_S=False, max_len=0)
    needs = (True, True, True, no, no, ABSENT)
    with backend.using("triton"):
        _, residuals = attention.fwd(q, k, v, whole, whole, needs=needs)
        want = attention.bwd(residuals, do, needs=needs)[:3]
        stacked = torch.full((N, (H + 2 * G) * K), float("nan"), dtype=torch.bfloat16, device=DEVICE)
        into = tuple(t.unflatten(-1, (-1, K)) for t in stacked.split((H * K, G * K, G * K), -1))
        got = attention.bwd(residuals, do, needs=needs, into=into)[:3]
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(got, into, want, strict=True))


def test_no_rows_at_all():
    none = segments([], [], max_len=0)
    q, k, v = (t.requires_grad_() for t in tensors(0, 8, 2, 1, 16))
    o = run(q, k, v, none, none)
    assert o.shape == (0, 2, 16)
    assert not any(d.any() for d in torch.autograd.grad(o.sum(), (q, k, v)))
    q, k, v = (t.requires_grad_() for t in tensors(5, 0, 2, 1, 16))
    o, lse = run(q, k, v, none, none, return_lse=True)
    assert not o.any() and (lse == float("-inf")).all()
    assert not any(d.any() for d in torch.autograd.grad(o.sum(), (q, k, v)))


def test_strides_of_every_kind():
    """Heads first, channels not contiguous, and a cotangent that was never stored (stride 0)."""
    whole, N = packed([35])
    q = rand((2, 16, N), seed=0).permute(2, 0, 1).requires_grad_()
    k, v = (rand((1, N, 16), torch.float32, seed=s).transpose(0, 1).requires_grad_() for s in (1, 2))
    got = torch.autograd.grad(run(q, k, v, whole, whole).sum(), (q, k, v))
    want = torch.autograd.grad(reference(q, k, v, whole, whole).sum(), (q, k, v))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rows_far_apart():
    """Offsets inside a tile are 32-bit: inputs are refused, a cotangent is copied, and one row may lie anywhere."""
    whole, N = packed([3])
    q, k, v = tensors(N, N, 1, 1, 16)
    far = torch.empty(2 * 2**23 + 16, device=DEVICE).as_strided((3, 1, 16), (2**23, 16, 1))
    with pytest.raises(NotImplementedError, match="rows and channels must be below"):
        run(far, k, v, whole, whole)
    far.copy_(q)
    o = run(q.requires_grad_(), k, v, whole, whole)
    assert torch.equal(*(torch.autograd.grad(o, q, do, retain_graph=True)[0] for do in (far, far.contiguous())))
    run(far[:1].as_strided((1, 1, 16), (2**30, 16, 1)), k, v, segments([0], [1]), whole)


def test_only_what_is_needed():
    whole, N = packed([20])
    args = (*tensors(N, N, 1, 1, 16), whole, whole)
    no = Segments(starts_S=False, ends_S=False, max_len=0)
    with backend.using("triton"):
        out, residuals = attention.fwd(*args, needs=(False, False, False, no, no, ABSENT))
        assert residuals[4] is ABSENT
        out, residuals = attention.fwd(*args, needs=(True, True, True, no, no, ABSENT))
        for needs in itertools.product((False, True), repeat=3):
            got = attention.bwd(residuals, out, needs=(*needs, no, no, ABSENT))
            assert [d is not ABSENT for d in got] == [*needs, False, False, False]


def test_the_reference_runs_on_fake_tensors():
    """No data-dependent shape and no sync: a whole step can be captured."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        whole = Segments.uniform(2, 8)
        q, k, v = (torch.randn(16, n, 16, requires_grad=True) for n in (4, 2, 2))
        o, lse = reference(q, k, v, whole, whole, window=3, softcap=5.0, return_lse=True)
        torch.autograd.grad((o.sum() + lse.sum()), (q, k, v))


Q, K_, S1 = (8, 4, 16), (8, 2, 16), segments([0], [8])
BAD = [
    ({"q": torch.zeros(8, 16)}, "attention: q has shape (8, 16), expected (N, H, K)"),
    ({"k": torch.zeros(8, 2, 8)}, "attention: k has shape (8, 2, 8), expected (M, G, 16)"),
    ({"v": torch.zeros(9, 2, 16)}, "attention: v has shape (9, 2, 16), expected that of k, (8, 2, 16)"),
    (
        {"k": torch.zeros(8, 3, 16), "v": torch.zeros(8, 3, 16)},
        "attention: 4 query heads, expected a multiple of the 3 key heads",
    ),
    (
        {"q": torch.zeros(8, 4, 257), "k": torch.zeros(8, 2, 257), "v": torch.zeros(8, 2, 257)},
        "attention: head size is 257, expected 1 to 256",
    ),
    (
        {"q": torch.zeros(Q, dtype=torch.float64)},
        "attention: q has dtype torch.float64, expected float16, bfloat16 or float32",
    ),
    (
        {"k": torch.zeros(K_, dtype=torch.float16)},
        "attention: k has dtype torch.float16, expected that of q, torch.float32",
    ),
    (
        {"kv_segments": segments([0, 8], [8, 0])},
        "attention: kv_segments.starts_S has shape (2,), expected (S,) = (1,)",
    ),
    (
        {"q_segments": Segments(starts_S=S1.starts_S.long(), ends_S=S1.ends_S, max_len=8)},
        "attention: q_segments.starts_S has dtype torch.int64 and stride (1,), expected torch.int32 and (1,)",
    ),
    ({"window": 0}, "attention: window is 0, expected an integer, at least 1 and below 2**30"),
    ({"window": 2.0}, "attention: window is 2.0, expected an integer, at least 1 and below 2**30"),
    ({"softcap": -1.0}, "attention: softcap is -1.0, expected a positive number"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[message.partition(": ")[2][:24] for _, message in BAD])
def test_bad_input(change, message):
    good = {"q": torch.zeros(Q), "k": torch.zeros(K_), "v": torch.zeros(K_), "q_segments": S1, "kv_segments": S1}
    args = [change.get(name, value) for name, value in good.items()]
    args = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]
    with pytest.raises(ValueError) as error:
        run(*args, **{name: value for name, value in change.items() if name not in good})
    assert str(error.value) == message


@pytest.mark.parametrize("change, message", [case for case in BAD if set(case[0]) <= {"window", "softcap"}])
def test_the_reference_refuses_what_means_nothing(change, message):
    q, k = torch.zeros(Q, device=DEVICE), torch.zeros(K_, device=DEVICE)
    with backend.using("reference"), pytest.raises(ValueError) as error:
        attention(q, k, k, S1, S1, **change)
    assert str(error.value) == message
    with backend.using("reference"), pytest.raises(ValueError, match="4 query heads, expected a multiple of the 3"):
        attention(q, *[torch.zeros(Q[0], 3, Q[2], device=DEVICE)] * 2, S1, S1)


@given(st.integers(0, 9), st.integers(0, 9), st.booleans(), st.sampled_from((None, 1, 4)))
def test_cost_counts_visible_pairs(queries, keys, causal, window):
    pairs = int(visible([(0, queries)], [(0, keys)], queries, keys, causal, window).sum())
    forward = cost([(queries, keys)], 4, 2, 16, 2, causal=causal, window=window)
    assert forward.flops == 4 * 4 * 16 * pairs
    assert forward.bytes == 2 * 2 * 16 * (4 * queries + 2 * keys) + 4 * 4 * queries
    backward = cost([(queries, keys)], 4, 2, 16, 2, causal=causal, window=window, backward=True)
    assert backward.flops == 2.5 * forward.flops


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_device_has_tiles_for_every_head_size(capability):
    table = configurations(capability)
    assert {dtype for dtype, _, _ in table} == set(DTYPES)
    assert all((dtype, kind, 256) in table for dtype, kind, _ in table)
    powers = {2**i for i in range(4, 9)}
    tiles = [t for launch in table.values() for t in launch]
    assert all({t.queries, t.keys} <= powers and t.queries <= 128 for t in tiles)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="hours in the interpreter: 32,768 rows are 537 million scores a head")
@pytest.mark.parametrize("statics", [{}, {"softcap": 20.0}, {"window": 4096}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["logits of 1", "logits of 64"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_at_32k_tokens(dtype, scale, statics):
    """Sums of many terms, against float64 taken a thousand queries at a time. PyTorch is its fused attention where that
    computes the same; where not, eager attention in the same dtype, also by thousands."""
    N, H, G, K = 32768, 2, 1, 64
    whole, _ = packed([N])
    q, k, v = (
        rand((N, heads, K), dtype, seed=i, scale=s) for i, (heads, s) in enumerate(((H, scale), (G, scale), (G, 1)))
    )
    do = rand((N, H, K), torch.bfloat16, seed=5).to(dtype)

    def by_chunks(f, *tensors):
        """Like a whole call, but each thousand rows are a call of their own, over the keys up to them."""
        inputs, o, grads = [t.detach().requires_grad_() for t in tensors], [], None
        for a in range(0, N, 1024):
            one = f(inputs[0][a : a + 1024], *(t[: a + 1024] for t in inputs[1:]))
            got = torch.autograd.grad(one, inputs, do[a : a + 1024].to(one.dtype))
            got = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in got]
            grads = got if grads is None else [x + y for x, y in zip(grads, got, strict=True)]
            o.append(one.detach())
        return [torch.cat(o), *grads]

    def plain(q, k, v):
        return reference(q, k, v, segments([0], [len(q)]), segments([0], [len(k)]), **statics)

    def rounded(q, k, v):
        i, j = (torch.arange(end - len(t), end, device=DEVICE) for t, end in ((q, len(k)), (k, len(k))))
        mask = (j <= i[:, None]) & (j > i[:, None] - statics.get("window", N))
        return eager_masked(q, k, v, mask, softcap=statics.get("softcap"))[0]

    def sdpa(q, k, v):
        batched = [t.transpose(0, 1)[None] for t in (q, k, v)]
        return torch.nn.functional.scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True)[0].transpose(
            0, 1
        )

    truth = by_chunks(plain, *(t.double() for t in (q, k, v)))
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    if statics:
        same = by_chunks(rounded, q, k, v)
    else:
        o = sdpa(*inputs)
        same = [o.detach(), *torch.autograd.grad(o, inputs, do)]
    o = run(*inputs, whole, whole, **statics)
    ours = [o.detach(), *torch.autograd.grad(o, inputs, do)]
    for name, a, b, t64 in zip(("o", "dq", "dk", "dv"), ours, same, truth, strict=True):
        assert_op_rule(a, b.to(dtype), t64, f"attention {name}", FACTOR[dtype])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="runs every row of the launch table, which is for GPUs")
@pytest.mark.parametrize("K", [33, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ["aligned", "ragged", "decode", "pointers"])
def test_every_launch_configuration(dtype, K, rows, monkeypatch):
    """Compiled code of every tile against float64, and 20 repeats to the same bits (a race would show)."""
    match rows:
        case "aligned":
            monkeypatch.setattr(op, "shares", lambda *_: 1)  # as for many keys
            (q_segments, N), (kv_segments, M) = packed([512, 256]), packed([512, 256])
        case "ragged":
            (q_segments, N), (kv_segments, M) = packed([389, 1, 0, 253], 3), packed([401, 7, 64, 253], 5)
        case "decode":
            (q_segments, N), (kv_segments, M) = packed([1, 1, 1]), packed([700, 1, 333], 50)
        case _:  # heads that start off a boundary of 16 bytes: no descriptors
            (q_segments, N), (kv_segments, M) = packed([389, 253]), packed([389, 253])
    q, k, v = tensors(N, M, 8, 2, K + (rows == "pointers"), dtype)
    q, k, v = (t[..., t.shape[-1] - K :].detach().requires_grad_() for t in (q, k, v))
    for statics in ({}, {"causal": False}, {"window": 100, "softcap": 3.0}):
        wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
        truth = reference(*wide, q_segments, kv_segments, **statics, return_lse=True)
        seeing = torch.isfinite(truth[1])
        cotangents = [rand(tuple(t.shape), torch.bfloat16, seed=i).double() for i, t in enumerate(truth)]
        cotangents[1] = cotangents[1] * seeing
        lse = truth[1].masked_fill(~seeing, 0.0)
        grads64 = torch.autograd.grad((truth[0], lse), wide, cotangents)
        first = None
        for _ in range(20):
            out = run(q, k, v, q_segments, kv_segments, **statics, return_lse=True)
            given_ = [c.to(o.dtype) for c, o in zip(cotangents, out, strict=True)]
            grads = torch.autograd.grad(out, (q, k, v), given_)
            now = [t.detach().clone() for t in (*out, *grads)]
            first = first or now
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, now, strict=True))
        eps, names = torch.finfo(dtype).eps, ("o", "lse", "dq", "dk", "dv")
        wanted = [t.detach() for t in (*truth, *grads64)]
        for name, ours, t64 in zip(names, first, wanted, strict=True):
            good = torch.isfinite(t64)
            assert torch.equal(torch.isfinite(ours), good), name
            error = float((ours.double() - t64)[good].norm() / t64[good].norm())
            assert error < (2 * eps if dtype != torch.float32 else 5e-6), f"{name} {statics}: {error:.2e}"
