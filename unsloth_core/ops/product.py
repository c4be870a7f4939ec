"""One product of matrices with all that follows it on its sum: a second, thin product, a bias, an addend.

    out = alpha (a b + c d) + bias + add

a (rows, inner), b (inner, cols), c (rows, rank), d (rank, cols), bias (cols,), add and out (rows, cols), operands of
any strides: a transposed operand is a transposed view. Sums are fp32. ``linear`` and ops like it are made of this.

Two kernels: pointers for any strides and any GPU, tensor descriptors (TMA) for aligned operands on Hopper. Long sums
with few results are split between programs and added in a fixed order. Plain products may be cuBLAS's:
:func:`choose` decides, :func:`configuration` gives the tile.

Sources: the tile order that keeps operands in L2 and the persistent loop over tiles are those of Triton's tutorials 03
and 09; the thin product on the same accumulator is LoRAFusion's idea (arXiv 2510.00206).
"""

import itertools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device, tree
from ..tree import ABSENT
from .language import cast, dot


@triton.jit
def _tile(t, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile ``t`` of the output, GROUP tiles down before the next column, so that both operands stay in L2."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(cols, BLOCK_N)
    group = t // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = t % (GROUP * tiles_n)
    return group * GROUP + inside % height, inside // height


@triton.jit
def _accumulate(
    acc, a, b, m, n, rows, cols, low, high, a_m, a_k, b_k, b_n, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    """``acc + a[m, low:high] @ b[low:high, n]``, operands of any strides; ``m``, ``n``: int64 index vectors."""
    k = low + tl.arange(0, BLOCK_K)
    a_tile = a + m[:, None] * a_m + k.to(tl.int64)[None, :] * a_k
    b_tile = b + k.to(tl.int64)[:, None] * b_k + n[None, :] * b_n
    m_inside = (m < rows)[:, None]
    n_inside = (n < cols)[None, :]
    block_k = tl.full((), BLOCK_K, tl.int64)
    for start in range(low, high, BLOCK_K):
        if EVEN_K:
            x = tl.load(a_tile, mask=m_inside, other=0.0)
            y = tl.load(b_tile, mask=n_inside, other=0.0)
        else:
            k_inside = start + tl.arange(0, BLOCK_K) < high
            x = tl.load(a_tile, mask=m_inside & k_inside[None, :], other=0.0)
            y = tl.load(b_tile, mask=n_inside & k_inside[:, None], other=0.0)
        acc = dot(x, y, acc)
        a_tile += block_k * a_k
        b_tile += block_k * b_k
    return acc


@triton.jit
def _finish(acc, bias, add, alpha, m, n, rows, cols, add_m, add_n, bias_n):
    """``alpha * acc + bias[n] + add[m, n]``."""
    acc = acc * alpha
    if bias is not None:
        acc += tl.load(bias + n * bias_n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
    if add is not None:
        inside = (m < rows)[:, None] & (n < cols)[None, :]
        acc += tl.load(add + m[:, None] * add_m + n[None, :] * add_n, mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _store(acc, out, m, n, rows, cols):
    """To ``out[m, n]``, which is row-major."""
    inside = (m < rows)[:, None] & (n < cols)[None, :]
    tl.store(out + m[:, None] * cols + n[None, :], cast(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right columns of a tile."""
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _epilogue(
    acc, out, bias, add, alpha, at_m, at_n, rows, cols, add_m, add_n, bias_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Finish the tile at (at_m, at_n). 256 columns go in halves: addends for all would not fit beside the sum."""
    m = at_m + tl.arange(0, BLOCK_M)
    if BLOCK_N < 256:
        n = at_n + tl.arange(0, BLOCK_N)
        _store(_finish(acc, bias, add, alpha, m, n, rows, cols, add_m, add_n, bias_n), out, m, n, rows, cols)
    else:
        left, right = _halves(acc, BLOCK_M, BLOCK_N)
        n = at_n + tl.arange(0, BLOCK_N // 2)
        _store(_finish(left, bias, add, alpha, m, n, rows, cols, add_m, add_n, bias_n), out, m, n, rows, cols)
        n += BLOCK_N // 2
        _store(_finish(right, bias, add, alpha, m, n, rows, cols, add_m, add_n, bias_n), out, m, n, rows, cols)


@triton.jit
def _epilogue_by_tma(
    acc, out, bias, add, alpha, at_m, at_n, rows, cols, add_m, add_n, bias_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same for a tile that the TMA unit stores, in halves, while the next sum begins."""
    m = at_m.to(tl.int64) + tl.arange(0, BLOCK_M)
    n = at_n.to(tl.int64) + tl.arange(0, BLOCK_N // 2)
    left, right = _halves(acc, BLOCK_M, BLOCK_N)
    left = _finish(left, bias, add, alpha, m, n, rows, cols, add_m, add_n, bias_n)
    out.store([at_m, at_n], cast(left, out.dtype))
    n += BLOCK_N // 2
    right = _finish(right, bias, add, alpha, m, n, rows, cols, add_m, add_n, bias_n)
    out.store([at_m, at_n + BLOCK_N // 2], cast(right, out.dtype))


@triton.jit(do_not_specialize=["alpha"])
def _product_kernel(
    a, b, c, d, out, bias, add, alpha,
    rows, cols, inner, rank, chunk,
    a_m, a_k, b_k, b_n, c_m, c_k, d_k, d_n, add_m, add_n, bias_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """out = alpha (a b + c d) + bias + add. Split s of the grid's second axis sums its ``chunk`` of the inner dimension
    into partial result s, and then there is nothing to add."""
    pm, pn = _tile(tl.program_id(0), rows, cols, BLOCK_M, BLOCK_N, GROUP)
    split = tl.program_id(1)
    at_m = pm.to(tl.int64) * BLOCK_M
    at_n = pn.to(tl.int64) * BLOCK_N
    m = at_m + tl.arange(0, BLOCK_M)
    n = at_n + tl.arange(0, BLOCK_N)
    low = split * chunk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _accumulate(
        acc, a, b, m, n, rows, cols, low, tl.minimum(low + chunk, inner), a_m, a_k, b_k, b_n, BLOCK_K, EVEN_K
    )  # fmt: skip
    if c is not None:
        acc = _accumulate(acc, c, d, m, n, rows, cols, 0, rank, c_m, c_k, d_k, d_n, BLOCK_R, False)
    partial = split.to(tl.int64) * rows * cols
    _epilogue(
        acc, out + partial, bias, add, alpha, at_m, at_n, rows, cols, add_m, add_n, bias_n, BLOCK_M, BLOCK_N
    )  # fmt: skip


@triton.jit(do_not_specialize=["alpha"])
def _descriptor_kernel(
    a, b, c, d, out, bias, add, alpha, ends, ranks,
    rows, cols, inner, rank,
    a_stride, b_stride, c_stride, d_k, d_n, add_m, add_n, bias_n,
    A_T: tl.constexpr, B_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, STORE: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The same for 16-byte aligned operands on Hopper: tiles come through the TMA unit, which also zeroes what lies
    outside, and one program per multiprocessor walks the tiles, loading the next while it stores the last. An operand
    marked _T is stored the other way around. The second product is one step of BLOCK_R ranks; where d is
    block-diagonal, columns from ``ends[i]`` on begin after the first i ``ranks``."""
    if A_T:
        a_tiles = tl.make_tensor_descriptor(a, [inner, rows], [a_stride, 1], [BLOCK_K, BLOCK_M])
    else:
        a_tiles = tl.make_tensor_descriptor(a, [rows, inner], [a_stride, 1], [BLOCK_M, BLOCK_K])
    if B_T:
        b_tiles = tl.make_tensor_descriptor(b, [cols, inner], [b_stride, 1], [BLOCK_N, BLOCK_K])
    else:
        b_tiles = tl.make_tensor_descriptor(b, [inner, cols], [b_stride, 1], [BLOCK_K, BLOCK_N])
    if c is not None:
        c_tiles = tl.make_tensor_descriptor(c, [rows, rank], [c_stride, 1], [BLOCK_M, BLOCK_R])
    if STORE:
        out = tl.make_tensor_descriptor(out, [rows, cols], [cols, 1], [BLOCK_M, BLOCK_N // 2])
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(cols, BLOCK_N)
    for t in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        pm, pn = _tile(t, rows, cols, BLOCK_M, BLOCK_N, GROUP)
        at_m, at_n = pm * BLOCK_M, pn * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.cdiv(inner, BLOCK_K)):
            if A_T:
                x = a_tiles.load([k * BLOCK_K, at_m]).T
            else:
                x = a_tiles.load([at_m, k * BLOCK_K])
            if B_T:
                y = b_tiles.load([at_n, k * BLOCK_K]).T
            else:
                y = b_tiles.load([k * BLOCK_K, at_n])
            acc = dot(x, y, acc)
        if c is not None:
            low = 0
            if ends is not None:
                for i in tl.static_range(len(ends)):
                    low += tl.where(at_n >= ends[i], ranks[i], 0)
            n = at_n.to(tl.int64) + tl.arange(0, BLOCK_N)
            # d comes through registers: its way and that of c, each as long as a step of the sum, go side by side.
            k = low + tl.arange(0, BLOCK_R)
            d_at = d + k[:, None] * d_k + n[None, :] * d_n
            d_tile = tl.load(d_at, mask=(k < rank)[:, None] & (n < cols)[None, :], other=0.0)
            acc = dot(c_tiles.load([at_m, low]), d_tile, acc)
        if STORE:
            _epilogue_by_tma(
                acc, out, bias, add, alpha, at_m, at_n, rows, cols, add_m, add_n, bias_n, BLOCK_M, BLOCK_N
            )  # fmt: skip
        else:
            _epilogue(
                acc, out, bias, add, alpha, at_m.to(tl.int64), at_n.to(tl.int64), rows, cols,
                add_m, add_n, bias_n, BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def _sum_kernel(partials, out, elements, splits, BLOCK: tl.constexpr):
    """Partial sums added in their order, so that the same shapes give the same bits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    partial = partials + i
    for _ in range(splits):
        total += tl.load(partial, mask=i < elements, other=0.0)
        partial += elements
    tl.store(out + i, cast(total, out.dtype.element_ty), mask=i < elements)


class Config(NamedTuple):
    """One row of the launch table: the tile, warps, pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8  # tiles down before the next column


# By shape class. On an H100 80GB HBM3, Triton 3.6.0, 128 x 256 x 64 was the best of nine tiles at seven shapes of an
# 8B model (descriptors with a LoRA step: 1.02 to 1.04 x cuBLAS's plain product, forward and dx; one after the other for
# half a second, at 700 W, 0.99 x; cold, in short graphs, up to 1.13 x: perf/LOG.md), and 128 x 128 x 64 of six at those
# of SmolLM2-135M. The others are chosen for occupancy and checked for spills only.
CONFIGS = {
    "large": Config(128, 256, 64, 8, 3, 16),
    "medium": Config(128, 128, 64, 8, 3),
    "small": Config(64, 64, 64, 4, 4),
    "narrow": Config(64, 16, 128, 4, 3),  # few columns: u, t, dB
    "narrow 32": Config(64, 32, 128, 4, 3),
    "narrow 64": Config(64, 64, 128, 4, 3),
    "flat": Config(16, 128, 128, 4, 3),  # few rows: dA, dbias, decoding
    "flat 32": Config(32, 128, 64, 4, 3),
    "flat 64": Config(64, 128, 64, 4, 3),
    "fp32": Config(64, 64, 16, 4, 2),
    "fp32 narrow": Config(64, 16, 32, 4, 2),
    "fp32 flat": Config(16, 64, 32, 4, 2),
    "interpreted": Config(32, 32, 32, 4, 2),  # small, so that small tests have many tiles
}
# The most ranks of a second product in the descriptor kernel, in one step: several would be loaded as far ahead as the
# steps of the sum, in more shared memory than there is.
_STEP_RANK = 64


def configuration(rows: int, cols: int, dtype: torch.dtype, where: torch.device) -> Config:
    """The row of CONFIGS for a product with ``rows`` x ``cols`` outputs."""
    if device.interpreting():
        return CONFIGS["interpreted"]
    narrow = min(rows, cols)
    if dtype == torch.float32:
        return CONFIGS["fp32" if narrow > 16 else "fp32 narrow" if cols <= rows else "fp32 flat"]
    if narrow <= 64:
        width = "" if narrow <= 16 else " 32" if narrow <= 32 else " 64"
        return CONFIGS[("narrow" if cols <= rows else "flat") + width]
    for name, busy in (("large", 1.0), ("medium", 0.5)):  # the share of multiprocessors that have a tile
        tile = CONFIGS[name]
        if device.cdiv(rows, tile.m) * device.cdiv(cols, tile.n) >= busy * device.sms(where):
            return tile
    return CONFIGS["small"]


def choose(
    rows: int, cols: int, dtype: torch.dtype, where: torch.device, *, update: bool, gradient: bool
) -> str:  # fmt: skip
    """Which product to call: "descriptors" or "pointers" (Triton), or "cublas" (``torch.mm``; any BLAS on a CPU).

    ``update``: a second product shares the accumulator. ``gradient``: a weight gradient, summed over tokens; cuBLAS may
    reduce its partial sums in 16 bit, so these are Triton's wherever Triton has tensor cores. Plain large products are
    cuBLAS's. The one place where this is decided.
    """
    if device.interpreting():
        return "pointers"
    major, _ = device.capability(where)
    if major < 8 or dtype == torch.float32:
        return "cublas"  # Triton would multiply without tensor cores
    if min(rows, cols) <= 64:
        return "pointers"
    if major == 9 and (update or gradient):
        return "descriptors"
    return "pointers" if gradient else "cublas"


def product(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | Any = ABSENT,
    add: Tensor | Any = ABSENT,
    update: tuple[Tensor, Tensor] | Any = ABSENT,
    blocks: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    alpha: float = 1.0,
    out_dtype: torch.dtype | None = None,
    gradient: bool = False,
    path: str | None = None,
    config: Config | None = None,
) -> Tensor:
    """``alpha (a b + c d) + bias + add`` with fp32 accumulation, in ``out_dtype`` (default: a's); contiguous.

    ``a`` (rows, inner) and ``b`` (inner, cols) have any strides, so a transposed operand is a transposed view;
    ``update`` is the pair c (rows, rank), d (rank, cols); ``blocks`` says of a block-diagonal d how many columns and
    ranks each of its blocks has. ``bias`` (cols,); ``add`` (rows, cols). ``path`` and ``config`` override
    :func:`choose` and :func:`configuration`. "descriptors" means "pointers" for operands that TMA cannot address
    (unaligned, or strided both ways).
    """
    (rows, inner), cols, where = a.shape, b.shape[1], a.device
    out_dtype = a.dtype if out_dtype is None else out_dtype
    path = path or choose(rows, cols, a.dtype, where, update=update is not ABSENT, gradient=gradient)
    if path == "cublas":
        return _torch_product(a, b, bias, add, update, alpha, out_dtype)
    config = config or configuration(rows, cols, a.dtype, where)
    c, d = (None, None) if update is ABSENT else update
    rank = 0 if c is None else c.shape[1]
    out = torch.empty(rows, cols, dtype=out_dtype, device=where)
    epilogue = (None if bias is ABSENT else bias, None if add is ABSENT else add, float(alpha))
    epilogue_strides = (*((0, 0) if add is ABSENT else add.stride()), 0 if bias is ABSENT else bias.stride(0))
    tiles = device.cdiv(rows, config.m) * device.cdiv(cols, config.n)
    options = {
        "BLOCK_M": config.m,
        "BLOCK_N": config.n,
        "BLOCK_K": config.k,
        "BLOCK_R": min(_STEP_RANK, device.next_power_of_2(max(16, rank))),
        "GROUP": config.group,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }

    layouts = [_layout(t) for t in (a, b, c) if t is not None] if path == "descriptors" else [None]
    ends, ranks, rank_of_tile = None, None, rank
    if blocks is not None and len(blocks[0]) > 1 and not any(n % config.n for n in blocks[0]):
        ends, ranks = tuple(itertools.accumulate(blocks[0][:-1])), blocks[1][:-1]
        rank_of_tile = max(blocks[1])
    if all(layouts) and rank_of_tile <= _STEP_RANK and (c is None or c.stride(1) == 1):
        transposed, strides = zip(*layouts, strict=True)
        programs = min(tiles, device.sms(where))
        options["BLOCK_R"] = device.next_power_of_2(max(16, rank_of_tile))
        device.launch(
            _descriptor_kernel,
            (programs,),
            *(a, b, c, d, out, *epilogue, ends, ranks, rows, cols, inner, rank),
            *(strides if c is not None else (*strides, 0)),
            *(d.stride() if d is not None else (0, 0)),
            *epilogue_strides,
            A_T=transposed[0],
            B_T=transposed[1],
            STORE=out_dtype.itemsize == 2 and cols % 8 == 0 and config.n >= 64,
            PROGRAMS=programs,
            **options,
        )
        return out

    # Few tiles and a long sum: share the sum between programs, up to one per multiprocessor.
    splits = 1
    if update is ABSENT and epilogue[:2] == (None, None):
        splits = max(1, min(device.sms(where) // max(tiles, 1), inner // (2 * config.k)))
    chunk = max(1, device.cdiv(device.cdiv(inner, splits), config.k)) * config.k
    splits = max(1, device.cdiv(inner, chunk))
    target = out if splits == 1 else torch.empty(splits, rows, cols, dtype=torch.float32, device=where)
    device.launch(
        _product_kernel,
        (tiles, splits),
        *(a, b, c, d, target, *epilogue, rows, cols, inner, rank, chunk),
        *(*a.stride(), *b.stride(), *(s for t in (c, d) for s in ((0, 0) if t is None else t.stride()))),
        *epilogue_strides,
        EVEN_K=inner % config.k == 0,
        **options,
    )
    if splits > 1:
        grid = (device.cdiv(rows * cols, 1024),)
        device.launch(_sum_kernel, grid, target, out, rows * cols, splits, BLOCK=1024, enable_fp_fusion=True)
    return out


def _layout(t: Tensor) -> tuple[bool, int] | None:
    """(stored transposed, stride of its rows) if a tensor descriptor can address this matrix, else None."""
    rows, cols = t.shape
    stride, inner = t.stride()
    transposed = inner != 1 or (stride < cols and stride == 1)
    if transposed:
        rows, cols, stride, inner = cols, rows, inner, stride
    fits = inner == 1 and stride >= cols > 0 and rows > 0
    return (transposed, stride) if fits and stride * t.itemsize % 16 == 0 and device.aligned(t, 16) else None


def _torch_product(
    a: Tensor, b: Tensor, bias: Any, add: Any, update: Any, alpha: float, out_dtype: torch.dtype
) -> Tensor:
    """The same product by PyTorch: its epilogue adds one of bias and add; every other term reads and writes the output
    once more."""
    a, b, bias, add, update = tree.map(lambda t: t.to(out_dtype), (a, b, bias, add, update))
    first = bias if add is ABSENT else add
    y = torch.mm(a, b) if first is ABSENT else torch.addmm(first, a, b, alpha=alpha)
    if first is ABSENT and alpha != 1.0:
        y *= alpha
    if update is not ABSENT:
        y.addmm_(*update, alpha=alpha)
    if bias is not ABSENT and add is not ABSENT:
        y += bias
    return y
