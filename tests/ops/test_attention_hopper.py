"""Attention's forward for Hopper: against float64 and the portable kernel, on a Hopper; its table, everywhere."""

import pytest
import torch
from oprule import DEVICE, rand
from test_attention import packed, run, tensors

from unsloth_core import device
from unsloth_core.ops import attention_hopper
from unsloth_core.ops.attention_hopper import TABLE, takes
from unsloth_core.reference.attention import attention as reference

HOPPER = DEVICE.type == "cuda" and device.capability(DEVICE) == (9, 0)
on_hopper = pytest.mark.skipif(not HOPPER, reason="Gluon kernels run on Hopper (sm_90) alone, and in no interpreter")
DTYPES = (torch.bfloat16, torch.float16)

ROWS = {  # lengths of queries and of keys, and how many rows behind each segment belong to none
    "aligned": ([512, 256], [512, 256], 0),
    "ragged": ([389, 1, 0, 253], [401, 7, 64, 253], 3),
    "blind": ([300, 70], [130, 0], 0),  # more queries than keys: the first see nothing
    "chunk": ([200, 77], [900, 1300], 5),
    "short": ([1] * 40 + [100], [1] * 40 + [100], 0),
}
STATICS = ({}, {"causal": False}, {"window": 100, "softcap": 3.0}, {"window": 1}, {"scale": 2.0}, {"sinks": True})


@on_hopper
@pytest.mark.parametrize("K", sorted(TABLE))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_against_float64(rows, dtype, K, monkeypatch):
    """Values and lse; the same bits 20 times, although the tiles are handed out to other numbers of programs."""
    q_lengths, kv_lengths, gap = ROWS[rows]
    (q_segments, N), (kv_segments, M) = packed(q_lengths, gap), packed(kv_lengths, gap)
    q, k, v = tensors(N, M, 8, 2, K, dtype)
    for statics in STATICS:
        statics = dict(statics)
        args = (q, k, v, q_segments, kv_segments, *([rand((8,), dtype, seed=9)] if statics.pop("sinks", False) else []))
        assert takes(q, statics.get("scale"))
        wide = [a.double() if isinstance(a, torch.Tensor) else a for a in args]
        truth = reference(*wide, **statics, return_lse=True)
        first = None
        for repeat in range(20):
            monkeypatch.setattr(device, "sms", lambda _, n=132 - 13 * (repeat % 10): n)
            now = run(*args, **statics, return_lse=True)
            first = first or now
            assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, now, strict=True))
        limits = (2 * torch.finfo(dtype).eps, 1e-5)
        for name, ours, t64, limit in zip(("o", "lse"), first, truth, limits, strict=True):
            good = torch.isfinite(t64)
            assert torch.equal(torch.isfinite(ours), good), name
            error = float((ours.double() - t64)[good].norm() / t64[good].norm().clamp_min(1e-30))
            assert error < limit, f"{name} {statics}: {error:.2e}"


@on_hopper
@pytest.mark.parametrize("K", sorted(TABLE))
def test_like_the_portable_kernel(K, monkeypatch):
    """At a model's size, where rings go round many times and programs take many tiles; and large scores."""
    segments, N = packed([4096, 1000, 3000])
    q, k, v = (10 * t for t in tensors(N, N, 8, 2, K, torch.bfloat16))
    ours = run(q, k, v, segments, segments, return_lse=True)
    monkeypatch.setattr(attention_hopper, "takes", lambda *_: False)
    theirs = run(q, k, v, segments, segments, return_lse=True)
    assert (ours[0] - theirs[0]).float().norm() / theirs[0].float().norm() < 2**-7
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-5, atol=1e-4)


def test_what_is_taken(monkeypatch):
    """Not on this machine, unless it is a Hopper; there, heads of the table and scales that keep maxima maxima."""
    q = torch.empty(4, 2, 128, dtype=torch.bfloat16, device=DEVICE)
    assert takes(q, None) == HOPPER
    monkeypatch.setattr(device, "capability", lambda _: (9, 0))
    monkeypatch.setattr(device, "interpreting", lambda: False)
    assert takes(q, None) and takes(q, 2.0)
    assert not takes(q, -1.0) and not takes(q, 0.0)
    assert not takes(q.float(), None)
    assert not takes(q[..., :72], None)
    monkeypatch.setattr(device, "interpreting", lambda: True)
    assert not takes(q, None)


@pytest.mark.parametrize("K", sorted(TABLE))
def test_tiles_fit_a_hopper(K):
    """Shared memory of 227 KiB, with room for barriers and notes."""
    assert TABLE[K].bytes(K) + 1024 <= 227 * 1024
