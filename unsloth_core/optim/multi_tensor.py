"""One launch over all leaves of a tree: the fused AdamW step and the global norm.

A model has hundreds of parameters, most of them small; one kernel per leaf would cost more in launches than
in memory traffic. Here every leaf is cut into tiles of ``TILE`` elements and program i does tile i of the
whole tree. It finds its leaf through three small tables:

* the *plan*, a function of sizes and dtypes only, made once and kept: the leaf of every tile, the first tile
  and the size of every leaf, the dtypes;
* the *pointers*, ``(k, L)`` int64 addresses, made at every call, because functional updates return new
  tensors. This is one small asynchronous copy from pinned memory. Under CUDA graph capture the addresses
  travel as kernel arguments instead: a captured copy would read host memory at replay that no longer exists.

Bytes per parameter: AdamW reads p, g, m, v and writes p, m, v: 28 in fp32, 22 with bf16 p and g; the norm
reads g once. Deterministic: the tiling is a function of sizes, partial sums are added in a fixed order, there
are no atomics. Leaves may be fp32, bf16 or fp16 in any mixture; arithmetic is fp32. The idea is apex's
``multi_tensor_apply``; the tables in device memory are ours (apex passes pointers as arguments, at most 110
per launch).
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import launch
from ..ops.language import cast

TILE = 2048
ARGUMENTS = 128  # addresses per launch when they travel as kernel arguments
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MIXED = -1


# ---- reading and writing a leaf by address; `kind` is a constexpr when all leaves agree, else a scalar


@triton.jit
def _pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    # An address that was loaded carries no alignment: without this hint every access is one element wide.
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _read(address, kind, offsets, size, RAGGED: tl.constexpr, ALIGNED: tl.constexpr):
    mask = offsets < size if RAGGED else None
    if kind == 0:
        x = tl.load(_pointer(address, tl.float32, ALIGNED) + offsets, mask)
    elif kind == 1:
        x = tl.load(_pointer(address, tl.bfloat16, ALIGNED) + offsets, mask).to(tl.float32)
    else:
        x = tl.load(_pointer(address, tl.float16, ALIGNED) + offsets, mask).to(tl.float32)
    return x


@triton.jit
def _write(address, kind, offsets, x, size, RAGGED: tl.constexpr, ALIGNED: tl.constexpr):
    mask = offsets < size if RAGGED else None
    if kind == 0:
        tl.store(_pointer(address, tl.float32, ALIGNED) + offsets, x, mask)
    elif kind == 1:
        tl.store(_pointer(address, tl.bfloat16, ALIGNED) + offsets, cast(x, tl.bfloat16), mask)
    else:
        tl.store(_pointer(address, tl.float16, ALIGNED) + offsets, cast(x, tl.float16), mask)


@triton.jit
def _tile(tile_leaf, leaf_first, leaf_size, TILE: tl.constexpr):
    """(leaf, first element, size) of this program's tile."""
    tile = tl.program_id(0)
    leaf = tl.load(tile_leaf + tile)
    start = (tile - tl.load(leaf_first + leaf)).to(tl.int64) * TILE
    return leaf, start, tl.load(leaf_size + leaf)


# ---- AdamW


@triton.jit
def _adamw_tile(
    pointers, coefficients, leaf, L, p_kind, g_kind, offsets, size,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, RAGGED: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = pointers + leaf
    decay = tl.load(coefficients)
    rate = tl.load(coefficients + 1)
    root_correction = tl.load(coefficients + 2)
    clip = tl.load(coefficients + 3)
    p = _read(tl.load(row), p_kind, offsets, size, RAGGED, ALIGNED)
    g = _read(tl.load(row + L), g_kind, offsets, size, RAGGED, ALIGNED) * clip
    m = _read(tl.load(row + 2 * L), 0, offsets, size, RAGGED, ALIGNED)
    v = _read(tl.load(row + 3 * L), 0, offsets, size, RAGGED, ALIGNED)
    m += (1.0 - BETA1) * (g - m)
    v = v * BETA2 + (1.0 - BETA2) * g * g
    # Correctly rounded root and quotient are free here (the kernel waits for memory) and keep us within an
    # ulp of PyTorch.
    denominator = tl.div_rn(tl.sqrt_rn(v), root_correction) + EPS
    p = p * decay - tl.div_rn(m * rate, denominator)
    _write(tl.load(row + 4 * L), p_kind, offsets, p, size, RAGGED, ALIGNED)
    _write(tl.load(row + 5 * L), 0, offsets, m, size, RAGGED, ALIGNED)
    _write(tl.load(row + 6 * L), 0, offsets, v, size, RAGGED, ALIGNED)


@triton.jit
def _adamw_kernel(
    pointers, coefficients, tile_leaf, leaf_first, leaf_size, leaf_kinds, L,
    P_KIND: tl.constexpr, G_KIND: tl.constexpr, ALIGNED: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    leaf, start, size = _tile(tile_leaf, leaf_first, leaf_size, TILE)
    offsets = start + tl.arange(0, TILE)
    if P_KIND == -1:
        p_kind = tl.load(leaf_kinds + leaf)
    else:
        p_kind: tl.constexpr = P_KIND
    if G_KIND == -1:
        g_kind = tl.load(leaf_kinds + L + leaf)
    else:
        g_kind: tl.constexpr = G_KIND
    # Full tiles go unmasked: a mask against a loaded size would make every access one element wide.
    if start + TILE <= size:
        _adamw_tile(pointers, coefficients, leaf, L, p_kind, g_kind, offsets, size, BETA1, BETA2, EPS, False, ALIGNED)
    else:
        _adamw_tile(pointers, coefficients, leaf, L, p_kind, g_kind, offsets, size, BETA1, BETA2, EPS, True, ALIGNED)


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    ms: Sequence[Tensor],
    vs: Sequence[Tensor],
    out: tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]],
    coefficients: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Write one AdamW step of every leaf into ``out`` = (params, ms, vs), which may be the inputs themselves.

    All tensors contiguous, ms and vs fp32; ``coefficients`` (4,) fp32 on the device: decay factor 1 - lr·wd,
    lr divided by the first bias correction, root of the second, factor on the gradient.
    """
    plan = _plan(_sizes(params), (_kinds(params), _kinds(grads)), coefficients.device)
    pointers, aligned = _pointers((params, grads, ms, vs, *out), coefficients.device)
    launch(
        _adamw_kernel, (plan.tiles,), pointers, coefficients,
        plan.tile_leaf, plan.leaf_first, plan.leaf_size, plan.leaf_kinds, pointers.shape[1],
        P_KIND=plan.kinds[0], G_KIND=plan.kinds[1], ALIGNED=aligned,
        BETA1=betas[0], BETA2=betas[1], EPS=eps, TILE=TILE, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


# ---- global norm


@triton.jit
def _square_kernel(
    pointers, partials, tile_leaf, leaf_first, leaf_size, leaf_kinds,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    leaf, start, size = _tile(tile_leaf, leaf_first, leaf_size, TILE)
    offsets = start + tl.arange(0, TILE)
    if KIND == -1:
        kind = tl.load(leaf_kinds + leaf)
    else:
        kind: tl.constexpr = KIND
    if start + TILE <= size:
        x = _read(tl.load(pointers + leaf), kind, offsets, size, False, ALIGNED)
    else:
        x = tl.where(offsets < size, _read(tl.load(pointers + leaf), kind, offsets, size, True, ALIGNED), 0.0)
    tl.store(partials + tl.program_id(0), tl.sum(x * x))


@triton.jit
def _root_kernel(partials, out, count, BLOCK: tl.constexpr):
    """sqrt of the sum: lane i adds partials i, i + BLOCK, ... in order, then one tree over the lanes."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        total += tl.load(partials + start + lane, start + lane < count, 0.0)
    tl.store(out, tl.sqrt_rn(tl.sum(total)))


def norm(leaves: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all leaves together, a fp32 scalar on their device: two launches, fixed order."""
    device = leaves[0].device
    plan = _plan(_sizes(leaves), (_kinds(leaves),), device)
    pointers, aligned = _pointers((leaves,), device)
    partials = torch.empty(plan.tiles, dtype=torch.float32, device=device)
    out = torch.empty((), dtype=torch.float32, device=device)
    launch(
        _square_kernel, (plan.tiles,), pointers, partials,
        plan.tile_leaf, plan.leaf_first, plan.leaf_size, plan.leaf_kinds,
        KIND=plan.kinds[0], ALIGNED=aligned, TILE=TILE, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    block = min(triton.next_power_of_2(plan.tiles), 8192)
    launch(_root_kernel, (1,), partials, out, plan.tiles, BLOCK=block, num_warps=16, enable_fp_fusion=True)
    return out


# ---- tables


@dataclasses.dataclass(frozen=True)
class _Plan:
    tiles: int
    tile_leaf: Tensor  # (tiles,) int32
    leaf_first: Tensor  # (L,) int32, first tile
    leaf_size: Tensor  # (L,) int64
    leaf_kinds: Tensor  # (roles, L) int32
    kinds: tuple[int, ...]  # one per role: the common kind, or MIXED


def _sizes(leaves: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([t.numel() for t in leaves])


def _kinds(leaves: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([KINDS[t.dtype] for t in leaves])


@functools.cache  # never dropped: a captured graph reads these tables for as long as it lives
def _plan(sizes: tuple[int, ...], kinds: tuple[tuple[int, ...], ...], device: torch.device) -> _Plan:
    counts = np.array([-(-size // TILE) for size in sizes], dtype=np.int64)
    firsts = np.cumsum(counts) - counts
    tiles = int(counts.sum())
    if tiles >= 2**31:
        raise NotImplementedError(f"multi_tensor: {tiles} tiles of {TILE}, expected fewer than 2^31")

    def table(values: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(values).to(device=device, dtype=dtype)

    return _Plan(
        tiles=tiles,
        tile_leaf=table(np.repeat(np.arange(len(sizes)), counts), torch.int32),
        leaf_first=table(firsts, torch.int32),
        leaf_size=table(np.array(sizes, dtype=np.int64), torch.int64),
        leaf_kinds=table(np.array(kinds, dtype=np.int64), torch.int32),
        kinds=tuple(row[0] if len(set(row)) == 1 else MIXED for row in kinds),
    )


def _pointers(groups: Sequence[Sequence[Tensor]], device: torch.device) -> tuple[Tensor, bool]:
    """(addresses (len(groups), L) int64 on the device, whether all of them are multiples of 16 bytes)."""
    addresses = [t.data_ptr() for group in groups for t in group]
    aligned = not any(a & 15 for a in addresses)
    shape = (len(groups), len(groups[0]))
    if device.type != "cuda":
        table = torch.tensor(addresses, dtype=torch.int64)
    elif torch.cuda.is_current_stream_capturing():
        table = _table_by_arguments(addresses, device)
    else:
        _load_argument_kernel(device)
        table = torch.tensor(addresses, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
    return table.view(shape), aligned


@triton.jit
def _store_arguments(table, values):
    for i in tl.static_range(len(values)):
        tl.store(table + i, values[i] >> 1)


@functools.cache
def _load_argument_kernel(device: torch.device) -> None:
    """At the first step outside a capture: inside one, code must not be loaded."""
    _table_by_arguments([torch.empty(1, device=device).data_ptr()], device)


def _table_by_arguments(addresses: list[int], device: torch.device) -> Tensor:
    """The table written by kernels whose arguments are the addresses, so that a CUDA graph holds the values
    themselves.

    An address a is passed as 2a + 1: odd and beyond 32 bits, so Triton specialises all of them alike, to one
    kernel.
    """
    padded = addresses + [addresses[0]] * (-len(addresses) % ARGUMENTS)
    table = torch.empty(len(padded), dtype=torch.int64, device=device)
    for start in range(0, len(padded), ARGUMENTS):
        values = tuple([2 * a + 1 for a in padded[start : start + ARGUMENTS]])
        launch(_store_arguments, (1,), table[start : start + ARGUMENTS], values, num_warps=1)
    return table[: len(addresses)]
