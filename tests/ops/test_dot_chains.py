"""Products of products, tile by tile, in exact integers: what a compiler gets wrong here, no tolerance hides.

Triton from 3.4.0 to 3.7.0 miscompiles ``dot(trans(cast(dot(a, b))), c)`` on Hopper for some tiles (wrong where a block
is 64 wide: flash-linear-attention #640 and #983). The kernels of this library therefore never transpose what a dot
made; they compute the transposed product in the first place. Here is each chain they are built of, over all tiles and
numbers of warps that launch tables may pick, 20 times on a GPU. Kernels with their real loops have the same test over
their own tables: ``test_attention.test_every_launch_configuration``, ``test_attention_hopper`` and ``_bwd``,
``test_linear.test_integers_are_exact_in_every_configuration``, ``test_grouped_linear``."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from oprule import DEVICE

from unsloth_core import device
from unsloth_core.ops.language import cast, dot

TILES = [32, 64, 128]
HEAD = 64


@triton.jit
def _tile(p, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return p + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _chain(q, k, v, do, o, dv, dq, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Attention without softmax: o = (q kᵀ) v, dv = (k qᵀ) do, dq = (do vᵀ) k; scores are never transposed."""
    q_tile, do_tile = tl.load(_tile(q, M, K)), tl.load(_tile(do, M, K))
    k_tile, v_tile = tl.load(_tile(k, N, K)), tl.load(_tile(v, N, K))
    s = cast(dot(q_tile, tl.trans(k_tile), tl.zeros([M, N], tl.float32)), q.dtype.element_ty)
    tl.store(_tile(o, M, K), dot(s, v_tile, tl.zeros([M, K], tl.float32)))
    s_transposed = cast(dot(k_tile, tl.trans(q_tile), tl.zeros([N, M], tl.float32)), q.dtype.element_ty)
    tl.store(_tile(dv, N, K), dot(s_transposed, do_tile, tl.zeros([N, K], tl.float32)))
    ds = cast(dot(do_tile, tl.trans(v_tile), tl.zeros([M, N], tl.float32)), q.dtype.element_ty)
    tl.store(_tile(dq, M, K), dot(ds, k_tile, tl.zeros([M, K], tl.float32)))


def integers(rows, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, HEAD), generator=generator).to(dtype).to(DEVICE)


EVERY = list(itertools.product(TILES, TILES, [4, 8], [torch.bfloat16, torch.float16]))


@pytest.mark.parametrize("m, n, warps, dtype", EVERY if DEVICE.type == "cuda" else [(32, 64, 4, torch.bfloat16)])
def test_chains_are_exact_and_repeat(m, n, warps, dtype):
    """Sums of 64 products of -1, 0 and 1 are exact in 16 bits, and sums of 128 of those times the same in fp32."""
    for seed in range(20 if DEVICE.type == "cuda" else 2):
        q, do, k, v = (integers(rows, dtype, 4 * seed + i) for i, rows in enumerate((m, m, n, n)))
        o, dv, dq = (torch.full((rows, HEAD), float("nan"), device=DEVICE) for rows in (m, n, m))
        device.launch(_chain, (1,), q, k, v, do, o, dv, dq, M=m, N=n, K=HEAD, num_warps=warps, enable_fp_fusion=True)
        q, k, v, do = (t.double() for t in (q, k, v, do))
        for name, got, want in (("o", o, q @ k.T @ v), ("dv", dv, k @ q.T @ do), ("dq", dq, do @ v.T @ k)):
            assert torch.equal(got.double(), want), (name, seed)
