"""A few queries over a long cache: the op rule over pages, lengths, windows and sinks, and what is never read."""

import importlib
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oprule import DEVICE, DTYPES, assert_both_refuse, assert_op_rule, rand

import unsloth_core.backend as backend
from unsloth_core.ops.attention_decode import TABLE, Tiles, attention_decode, cost, kind, takes
from unsloth_core.reference.attention_decode import attention_decode as reference
from unsloth_core.segments import Segments
from unsloth_core.tree import ABSENT

op = importlib.import_module("unsloth_core.ops.attention_decode")  # the package's attribute may be the op
ints = partial(torch.tensor, dtype=torch.int32, device=DEVICE)


def cache(lengths, capacity, H, G, K, T, dtype, seed, page=None):
    """Queries, a cache in which every row is filled, segments, and for a paged one its pages in no order."""
    S = len(lengths)
    q, k, v = (
        rand(s, dtype, seed=seed + i) for i, s in enumerate(((S * T, H, K), (S * capacity, G, K), (S * capacity, G, K)))
    )
    starts = ints([0 if page else s * capacity for s in range(S)])
    kv = Segments(starts_S=starts, ends_S=starts + ints(lengths), max_len=capacity)
    pages = ABSENT
    if page:
        order = torch.randperm(S * capacity // page, generator=torch.Generator().manual_seed(seed))
        pages = order.to(torch.int32).view(S, -1).to(DEVICE)
    return q, k, v, Segments.uniform(S, T, DEVICE), kv, pages


def assert_right(args, dtype, **statics):
    """The op rule, the same bits again, inputs unchanged."""
    before = [t.clone() for t in args[:3]]
    with backend.using("triton"):
        out = attention_decode(*args, **statics, return_lse=True)
        again = attention_decode(*args, **statics, return_lse=True)
    wide = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in args]
    truth = reference(*wide, **statics, return_lse=True)
    same = reference(*args, **statics, return_lse=True)
    for name, ours, theirs, repeat, t64 in zip(("o", "lse"), out, same, again, truth, strict=True):
        assert_op_rule(ours, theirs, t64, f"attention_decode {name}", 6.0 if dtype == torch.float32 else 2.5)
        assert torch.equal(ours.nan_to_num(), repeat.nan_to_num())
    assert all(torch.equal(a, b) for a, b in zip(before, args[:3], strict=True))


# No shrinking: it would interpret kernels for minutes.
@settings(max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    lengths=st.lists(st.integers(3, 64), min_size=1, max_size=3),
    T=st.sampled_from((1, 1, 3)),
    heads=st.sampled_from(((1, 1), (4, 2), (3, 1))),
    K=st.sampled_from((16, 33, 64, 80)),
    dtype=st.sampled_from(DTYPES),
    page=st.sampled_from((None, 1, 16, 32)),
    window=st.sampled_from((None, 1, 20)),
    softcap=st.sampled_from((None, 2.0)),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_contract(lengths, T, heads, K, dtype, page, window, softcap, sinks, seed):
    H, G = heads
    args = cache(lengths, 64, H, G, K, T, dtype, seed, page)
    args = (*args, rand((H,), torch.float32, seed=7) if sinks else ABSENT)
    assert_right(args, dtype, page=page, window=window, softcap=softcap, scale=-0.2 if seed % 3 == 0 else None)


def test_rows_behind_the_lengths_are_never_read():
    """Not even NaN there is seen: a cache may hold anything."""
    q, k, v, qs, kv, pages = cache([5, 40], 64, 2, 1, 16, 1, torch.float32, 0, page=16)
    with backend.using("triton"):
        o = attention_decode(q, k, v, qs, kv, pages, page=16)
        rows = torch.ones(128, dtype=torch.bool, device=DEVICE)
        for s, n in enumerate((5, 40)):
            seen = torch.arange(n, device=DEVICE)
            rows[pages[s].long()[seen // 16] * 16 + seen % 16] = False
        k[rows], v[rows] = float("nan"), float("nan")
        assert torch.equal(attention_decode(q, k, v, qs, kv, pages, page=16), o)


def test_rows_that_see_nothing():
    """More queries than keys, a segment without keys, gaps: o = 0 and lse = −inf, with a sink as without."""
    q, k, v = (rand((n, 2, 16), seed=i) for i, n in enumerate((9, 12, 12)))
    qs = Segments(starts_S=ints([1, 3, 6]), ends_S=ints([3, 6, 7]), max_len=4)
    kv = Segments(starts_S=ints([0, 4, 5]), ends_S=ints([3, 4, 7]), max_len=4)
    for sinks in (ABSENT, rand((2,), seed=5)):
        assert_right((q, k, v, qs, kv, ABSENT, sinks), torch.float32)
        with backend.using("triton"):
            o, lse = attention_decode(q, k, v, qs, kv, ABSENT, sinks, return_lse=True)
        blind = torch.tensor([0, 3, 4, 5, 7, 8], device=DEVICE)
        assert not o[blind].any() and (lse[blind] == float("-inf")).all()
    none = Segments(starts_S=ints([]), ends_S=ints([]), max_len=0)
    with backend.using("triton"):
        for keys in (k, k[:0]):
            o, lse = attention_decode(q, keys, keys, none, none, return_lse=True)
            assert not o.any() and (lse == float("-inf")).all()


def test_lengths_are_read_on_the_device():
    """A step's arguments keep their shapes: growing lengths change what is seen and nothing else."""
    q, k, v, qs, kv, _ = cache([1, 1], 64, 2, 2, 16, 1, torch.float32, 3)
    with backend.using("triton"):
        for length in (1, 31, 64):
            kv.ends_S.copy_(kv.starts_S + length)
            o = attention_decode(q, k, v, qs, kv)
            torch.testing.assert_close(o, reference(q, k, v, qs, kv), rtol=1e-5, atol=1e-6)


def test_an_extreme_sink():
    """A sink far above every score takes all weight; one far below takes none."""
    args = cache([50], 64, 2, 1, 16, 1, torch.float32, 1)
    with backend.using("triton"):
        plain = attention_decode(*args)
        assert attention_decode(*args, torch.full((2,), 1e4, device=DEVICE)).abs().max() == 0
        assert torch.equal(attention_decode(*args, torch.full((2,), -1e4, device=DEVICE)), plain)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"T": 64}, "64 queries for 2 heads per key head, expected at most 32 rows; use attention"),
        ({"page": 3}, "page is 3, expected a power of two"),
        ({"page": None}, "page is None, expected a size if there are pages and None if not"),
        ({"pages": torch.zeros(2, 4)}, "pages is torch.float32 (2, 4), strides (4, 1), expected torch.int32 (S, P)"),
        ({"pages": torch.zeros(3, 4, dtype=torch.int32)}, "expected torch.int32 (S, P) = (2, P) with contiguous rows"),
        ({"pages": torch.zeros(2, 1, dtype=torch.int32)}, "1 pages of 16 rows, expected room for 32"),
        ({"sinks": torch.zeros(3)}, "sinks has shape (3,) and strides (1,), expected (H,) = (4,), contiguous"),
    ],
)
def test_bad_input(change, message):
    T = change.get("T", 1)
    q, k = torch.zeros(2 * T, 4, 16, device=DEVICE), torch.zeros(64, 2, 16, device=DEVICE)
    kv = Segments(starts_S=ints([0, 0]), ends_S=ints([5, 9]), max_len=32)
    pages = change.get("pages", torch.zeros(2, 2, dtype=torch.int32)).to(DEVICE)
    sinks = change.get("sinks", torch.zeros(4)).to(DEVICE)
    args = (q, k, k, Segments.uniform(2, T, DEVICE), kv, pages, sinks)
    page = change.get("page", 16)
    if not {"T", "sinks"} & change.keys():  # limits of the kernels; PyTorch has its own word for sinks
        assert_both_refuse(attention_decode, *args, page=page)
    with backend.using("triton"), pytest.raises(ValueError) as error:
        attention_decode(*args, page=page)
    assert message in str(error.value) and str(error.value).startswith("attention_decode: ")


def test_no_gradient():
    q, k, v, qs, kv, _ = cache([5], 16, 2, 1, 16, 1, torch.float32, 0)
    with backend.using("triton"):
        o = attention_decode(q.requires_grad_(), k, v, qs, kv)
    with pytest.raises(NotImplementedError, match="attention_decode: has no gradient; use attention"):
        o.sum().backward()


def test_what_it_takes():
    one, many = Segments.uniform(2, 1, DEVICE), Segments.uniform(2, 17, DEVICE)
    assert takes(one, 32) and not takes(one, 33) and takes(many, 1) and not takes(many, 2)


def test_cost():
    assert cost(2, 1, 100, 4, 2, 16, 2).bytes == 2 * 16 * (2 * 2 * 100 * 2 + 2 * 2 * 4)
    assert cost(2, 1, 100, 4, 2, 16, 2).flops == 4 * 2 * 100 * 4 * 16


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_every_device_has_tiles(capability):
    kinds = {kind(dtype, capability) for dtype in DTYPES}
    assert all(TABLE.keys() >= {(k, 128), (k, 256)} for k in kinds)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="compiled code of every tile, which is for GPUs")
@pytest.mark.parametrize("K", [33, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", [None, 16, 256])
@pytest.mark.parametrize("T", [1, 8])
def test_every_launch_configuration(dtype, K, page, T):
    args = cache([4096, 9, 1000], 4096, 8, 2, K, T, dtype, 0, page)
    for sinks in (ABSENT, rand((8,), seed=1)):
        assert_right((*args, sinks), dtype, page=page)
        assert_right((*args, sinks), dtype, page=page, window=500, softcap=3.0)


@pytest.mark.parametrize("programs", [1, 7, 64])
def test_any_number_of_programs(programs, monkeypatch):
    """The split of the keys is a matter of speed: empty shares and a share for one alone give the same."""
    monkeypatch.setattr(op, "_tiles", lambda *_: Tiles(16, 4, 1, programs))
    assert_right((*cache([64, 3], 64, 4, 2, 16, 1, torch.float32, 2), ABSENT), torch.float32)


@pytest.mark.parametrize("K", [33, 64, 96, 128, 192, 256] if DEVICE.type == "cuda" else [16, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 3])
def test_one_program_for_all_keys_of_a_row(dtype, K, T):
    """It writes the result itself, with the bits of a single part that is merged, as it is with sinks; in gaps too."""
    q, k, v, _, kv, _ = cache([16, 2, 9], 16, 4, 2, K, T, dtype, 0)
    q = rand((3 * T + 5, 4, K), dtype, seed=4)
    starts = ints([0, T + 2, 2 * T + 3])
    args = (q, k, v, Segments(starts_S=starts, ends_S=starts + T, max_len=T), kv)
    assert_right((*args, ABSENT, ABSENT), dtype)
    no_weight = torch.full((4,), -1e4, device=DEVICE)
    with backend.using("triton"):
        once = attention_decode(*args, return_lse=True)
        merged = attention_decode(*args, ABSENT, no_weight, return_lse=True)
        assert torch.equal(attention_decode(*args), once[0])
    assert all(torch.equal(a, b) for a, b in zip(once, merged, strict=True))
    assert (once[1] == float("-inf")).all(1).sum() == 5 + max(0, T - 2)
