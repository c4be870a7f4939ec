"""The fused backward for Hopper: which blocks meet, on every machine; the kernel itself on sm_90 alone."""

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import DEVICE, rand

from unsloth_core import device
from unsloth_core.ops.attention_tiles import factors
from unsloth_core.segments import Segments

hopper = importlib.import_module("unsloth_core.ops.attention_hopper_bwd")
reference = importlib.import_module("unsloth_core.reference.attention").attention

on_hopper = pytest.mark.skipif(
    DEVICE.type != "cuda" or device.capability(DEVICE) != (9, 0),
    reason="a Gluon kernel: it is not interpreted and runs on sm_90 alone; perf/gate.py compiles it everywhere",
)
runs_triton = pytest.mark.skipif(
    DEVICE.type != "cuda" and not device.interpreting(), reason="kernels run on a GPU or in Triton's interpreter"
)


def packed(lengths: list[int], gap: int = 0) -> tuple[Segments, int]:
    """Segments with ``gap`` rows of none behind each, and the number of rows."""
    starts = [sum(lengths[:i]) + gap * i for i in range(len(lengths))]
    ends = [s + n for s, n in zip(starts, lengths, strict=True)]
    starts_S, ends_S = (torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in (starts, ends))
    return Segments(starts_S=starts_S, ends_S=ends_S, max_len=max(lengths)), ends[-1] + gap


def visible(qs: Segments, ks: Segments, N: int, M: int, causal: bool, window: int | None) -> torch.Tensor:
    """Which query sees which key, by the definition."""
    seen = torch.zeros(N, M, dtype=torch.bool)
    for q0, q1, k0, k1 in zip(*(t.tolist() for t in (qs.starts_S, qs.ends_S, ks.starts_S, ks.ends_S)), strict=True):
        position = torch.arange(q0, q1)[:, None] - q0 + (k1 - k0) - (q1 - q0)
        key = torch.arange(k1 - k0)[None, :]
        ok = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        if causal:
            ok &= key <= position
        if window is not None:
            ok &= key > position - window
        seen[q0:q1, k0:k1] = ok
    return seen


@runs_triton
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 90)), min_size=1, max_size=4),
    st.sampled_from([0, 1, 40]), st.booleans(), st.sampled_from([None, 1, 20]), st.sampled_from([(32, 16), (16, 64)]),
)  # fmt: skip
def test_the_plan_covers_what_is_visible(lengths, gap, causal, window, tile):
    """Whoever adds to a tile of dq waits for the block before it, so both sides have to agree on who meets whom: ends
    that never decrease make the blocks of a tile, and the tiles of a block, ranges without holes."""
    (qs, N), (ks, M) = packed([q for q, _ in lengths], gap), packed([k for _, k in lengths], gap)
    if N == 0 or M == 0:
        return
    BM, BN = tile
    tiles, blocks, P = device.cdiv(N, BM), device.cdiv(M, BN), device.cdiv(N, 64) * 64 + 128
    lse = torch.full((2, P), float("inf"), device=DEVICE)
    lse[:, :N] = 1.5
    turns, lo, hi, first, last = (
        torch.full((n,), -7, dtype=torch.int32, device=DEVICE)
        for n in (2 * tiles * 2, blocks * BN, blocks * BN, tiles, tiles)
    )
    S = qs.starts_S.shape[0]
    device.launch(
        hopper._plan, (max(tiles, blocks), 2), lse, turns, lo, hi, first, last, qs.starts_S, qs.ends_S, ks.starts_S,
        ks.ends_S, S, N, M, P, tiles, blocks, window, BM, BN, 2, S.bit_length(), causal, num_warps=4,
    )  # fmt: skip
    seen = visible(qs, ks, N, M, causal, window)
    lo, hi, first, last = (t.cpu() for t in (lo, hi, first, last))
    row = torch.arange(N)
    for j in range(blocks * BN):
        inside = (row >= lo[j]) & (row < hi[j])
        assert torch.equal(inside, seen[:, j] if j < M else torch.zeros(N, dtype=torch.bool)), j
    assert (first.diff() >= 0).all() and (last.diff() >= 0).all()
    i, j = seen.nonzero().unbind(1)
    assert (first[i // BM] <= j // BN).all() and (j // BN <= last[i // BM]).all()
    assert (last < blocks).all()
    assert (turns == 0).all()
    assert torch.allclose(lse[:, :N], torch.full((2, N), 1.5 * hopper.LOG2E, device=DEVICE))
    assert torch.isinf(lse[:, N:]).all()


def test_what_is_taken():
    q, (long, _) = rand((64, 2, 128), torch.bfloat16, seed=0), packed([2**30])
    assert hopper.takes(q, q, q, q, long, long) == (DEVICE.type == "cuda" and device.capability(DEVICE) == (9, 0))
    assert not hopper.takes(q, q, None, q, long, long)
    assert not hopper.takes(q[..., :72], q, q, q, long, long)
    assert not hopper.takes(q, q, q, q, long, packed([64])[0])


SHARES = {"ragged": 2, "full": 3, "softcap": 4}  # of the query heads of a key head: equal ones, unequal, one head each
CASES = {  # queries and keys of each segment, rows between segments, H, G, statics
    "causal": ([1024], [1024], 0, 8, 2, {}),
    "ragged": ([389, 1, 0, 253], [401, 7, 64, 253], 3, 8, 2, {}),
    "full": ([512, 256], [300, 700], 5, 4, 1, {"causal": False}),
    "window": ([600, 424], [600, 424], 0, 8, 2, {"window": 150}),  # all tiles of a head, then the next head
    "softcap": ([500, 12, 300], [500, 64, 900], 0, 8, 2, {"softcap": 3.0, "window": 100}),
    "negative scale": ([700], [700], 0, 4, 4, {"scale": -0.1}),
    "few queries": ([100, 3], [1000, 200], 0, 4, 2, {}),
    "nothing seen": ([64, 64], [0, 64], 3, 2, 1, {}),
}


@on_hopper
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", hopper.TABLE)
def test_every_launch_configuration(K, dtype, case):
    """Against float64, into poisoned slices of one buffer, 20 times the same bits; and added to what is there."""
    queries, keys, gap, H, G, statics = CASES[case]
    (qs, N), (ks, M) = packed(queries, gap), packed(keys, gap)
    q, k, v = (rand((n, h, K), dtype, seed=i) for i, (n, h) in enumerate(((N, H), (M, G), (M, G))))
    do = rand((N, H, K), dtype, seed=3)
    wide = [t.double().requires_grad_() for t in (q, k, v)]
    o, lse = reference(*wide, qs, ks, **statics, return_lse=True)
    wanted = torch.autograd.grad(o, wide, do.double())
    o, lse = o.detach().to(dtype), lse.detach().float()
    blind = torch.isinf(lse)
    inner, outer, scale = factors(K, statics.get("scale"), statics.get("softcap"))

    def run(dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, *, add: bool = False, shares: int = 1) -> None:
        P = device.cdiv(N, 64) * 64 + 128
        rows = [torch.full((H, P), x, device=DEVICE) for x in (float("inf"), 0.0)]
        rows[0][:, :N] = lse.masked_fill(blind, float("inf")).T
        rows[1][:, :N] = (o.float() * do.float()).sum(-1).masked_fill(blind, 0.0).T
        hopper.backward(
            q, k, v, do, *rows, dq, dk, dv, qs, ks, inner=inner if scale > 0 else -inner, outer=outer, scale=scale,
            causal=statics.get("causal", True), window=statics.get("window"), add=add,
            shares=shares,
        )  # fmt: skip

    first = None
    for _ in range(20):
        buffer = torch.full((max(N, M), H + 2 * G, K), float("nan"), dtype=dtype, device=DEVICE)
        now = [buffer[:N, :H], buffer[:M, H : H + G], buffer[:M, H + G :]]
        run(*now)
        assert first is None or all(torch.equal(a, b) for a, b in zip(first, now, strict=True)), "other bits"
        first = [t.clone() for t in now]
    sums = [torch.full((M, G, K), 2.0, device=DEVICE) for _ in range(2)]
    run(torch.empty((N, H, K), device=DEVICE), *sums, add=True)
    assert first is not None
    if shares := SHARES.get(case):
        parts = [torch.full((shares, M, G, K), float("nan"), device=DEVICE) for _ in range(2)]
        run(again := torch.empty_like(q), *parts, shares=shares)
        assert torch.equal(again, first[0])
        for ours, share in zip(first[1:], parts, strict=True):
            torch.testing.assert_close(ours, share.sum(0).to(dtype), rtol=2**-7, atol=2**-9)
    for name, ours, truth in zip(
        ("dq", "dk", "dv", "dk added", "dv added"),
        [*first, *(t - 2.0 for t in sums)],
        [*wanted, *wanted[1:]],
        strict=True,
    ):
        error = float((ours.double() - truth).norm() / truth.norm().clamp(min=1e-30))
        assert error < 2 * torch.finfo(dtype).eps, f"{name}: {error:.2e}"
