"""One launch over all leaves of a tree: the fused AdamW step and the global norm.

A model has hundreds of parameters, most of them small; one kernel per leaf would cost more in launches than
in memory traffic. Here every leaf is cut into tiles and program i does tile i of the whole tree. It finds its leaf
through three small tables:

* the *plan*, a function of sizes and dtypes only, made once and kept: the leaf of every tile, the first tile
  and the size of every leaf, the dtypes;
* the *pointers*, ``(k, L)`` int64 addresses, made at every call, because functional updates return new
  tensors. This is one small asynchronous copy from pinned memory. Under CUDA graph capture the addresses
  travel as kernel arguments instead: a captured copy would read host memory at replay that no longer exists.
  An update that donates writes where it reads, so its table has half the rows.

Bytes per parameter: AdamW reads p, g, m, v and writes p, m, v: 28 in fp32; with bf16 p and g 22, 18 if m is bf16
too, and 10.06 if m and v are 8-bit (1 for each code, 16/256 for absmax); the norm reads g once. A tile holds whole
blocks of 8-bit states, so they are decoded, stepped and encoded again without leaving the registers: a block is 2 x 128
elements, four in a row to a lane whatever their dtype, so that nothing changes lanes on the way and one warp has the
block's absmax to itself. Map and midpoints are looked up in shared memory, each once per element.
Deterministic: the tiling is a function of sizes, partial sums are added in a fixed order, there are no atomics.
Leaves may be fp32, bf16 or fp16 in any mixture; arithmetic is fp32. The idea is apex's ``multi_tensor_apply``; the
tables in device memory are ours (apex passes pointers as arguments, at most 110 per launch).
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
from ..ops.dynamic_map import place, tables
from ..ops.language import cast
from .blockwise import BLOCK, LEAST_ABSMAX, ZERO

TILE, WARPS = 2048, 8
TILE_8BIT, WARPS_8BIT = 512, 2  # of a tree with 8-bit states
ARGUMENTS = 128  # addresses per launch when they travel as kernel arguments
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MIXED = -1
EIGHT_BIT = 3  # kind of a leaf's states; 0 and 1 are that of its first moment
STATE_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: EIGHT_BIT}  # by the first moment's dtype


# ---- reading and writing a leaf by address; `kind` is a constexpr when all leaves agree, else a scalar


@triton.jit
def _pointer(address, dtype: tl.constexpr, WIDE: tl.constexpr):
    """``WIDE``: how many elements one access may take at most; 0 if some address is not a multiple of 16."""
    pointer = address.to(tl.pointer_type(dtype))
    # An address that was loaded carries no alignment: without this hint every access is one element wide.
    size: tl.constexpr = WIDE * dtype.primitive_bitwidth // 8
    return tl.multiple_of(pointer, size if size < 16 else 16) if WIDE else pointer


@triton.jit
def _read(address, kind, start, offsets, mask, WIDE: tl.constexpr):
    if kind == 0:
        x = tl.load(_pointer(address, tl.float32, WIDE) + start + offsets, mask)
    elif kind == 1:
        x = tl.load(_pointer(address, tl.bfloat16, WIDE) + start + offsets, mask).to(tl.float32)
    else:
        x = tl.load(_pointer(address, tl.float16, WIDE) + start + offsets, mask).to(tl.float32)
    return x


@triton.jit
def _write(address, kind, start, offsets, x, mask, WIDE: tl.constexpr):
    if kind == 0:
        tl.store(_pointer(address, tl.float32, WIDE) + start + offsets, x, mask)
    elif kind == 1:
        tl.store(_pointer(address, tl.bfloat16, WIDE) + start + offsets, cast(x, tl.bfloat16), mask)
    else:
        tl.store(_pointer(address, tl.float16, WIDE) + start + offsets, cast(x, tl.float16), mask)


@triton.jit
def _tile(tile_leaf, leaf_first, leaf_size, TILE: tl.constexpr):
    """(leaf, first element, size) of this program's tile."""
    tile = tl.program_id(0)
    leaf = tl.load(tile_leaf + tile)
    start = (tile - tl.load(leaf_first + leaf)).to(tl.int64) * TILE
    return leaf, start, tl.load(leaf_size + leaf)


# ---- AdamW


@triton.jit
def _step(p, g, m, v, coefficients, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, ROUNDED: tl.constexpr):
    """p, m, v after a step."""
    decay = tl.load(coefficients)
    rate = tl.load(coefficients + 1)
    root_correction = tl.load(coefficients + 2)
    g = g * tl.load(coefficients + 3)
    m += (1.0 - BETA1) * (g - m)
    v = v * BETA2 + (1.0 - BETA2) * g * g
    if ROUNDED:
        # Correctly rounded root and quotient are free here (the kernel waits for memory) and keep us within an
        # ulp of PyTorch.
        update = tl.div_rn(m * rate, tl.div_rn(tl.sqrt_rn(v), root_correction) + EPS)
    else:
        # Between decoding and encoding they are not: each has a branch. These are off by an ulp or two.
        update = m * rate / (tl.sqrt(v) * tl.div_rn(1.0, root_correction) + EPS)
    return p * decay - update, m, v


@triton.jit
def _within_blocks(TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets (TILE / BLOCK, 2, BLOCK / 2) of the elements of a tile: a warp's lanes lie along the last axis."""
    half: tl.constexpr = BLOCK // 2
    rows = tl.arange(0, TILE // BLOCK)[:, None, None] * BLOCK + tl.arange(0, 2)[None, :, None] * half
    return rows + tl.arange(0, half)[None, None, :]


@triton.jit
def _entry(table, index):
    """``table[index]`` of a table of 256, through shared memory."""
    return tl.gather(tl.load(table + tl.arange(0, 256)), index.reshape(index.numel), 0).reshape(index.shape)


@triton.jit
def _encode(codes, absmax, midpoints, x, start, offsets, left, SIGNED: tl.constexpr, RAGGED: tl.constexpr,
            WIDE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr, LEAST: tl.constexpr,
            ):  # fmt: skip
    """The inverse of decoding; see blockwise.py for the two roundings, and :func:`_maps` for the midpoints' order."""
    mask = offsets < left if RAGGED else None
    if RAGGED:
        x = tl.where(mask, x, 0.0)
    largest = tl.max(tl.max(tl.abs(x), 1), 1)
    scaled = x * tl.div_rn(1.0, tl.maximum(largest, LEAST))[:, None, None]
    index = place(tl.abs(scaled), SIGNED).to(tl.int32)
    if SIGNED:
        index ^= tl.where(x < 0, 255, 0)
        code = index + ZERO + (scaled > _entry(midpoints, index)).to(tl.int32)  # of which the lowest 8 bits count
    else:
        code = tl.maximum(index + (scaled > _entry(midpoints, index)).to(tl.int32), (x > 0).to(tl.int32))
    tl.store(_pointer(codes, tl.uint8, WIDE) + start + offsets, code.to(tl.uint8), mask)
    block = tl.arange(0, TILE // BLOCK)
    some = block * BLOCK < left if RAGGED else None
    tl.store(absmax.to(tl.pointer_type(tl.float32)) + start // BLOCK + block, largest, some)


@triton.jit
def _adamw_tile_8bit(
    pointers, targets, coefficients, maps, leaf, L, p_kind, g_kind, start, left,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    offsets = _within_blocks(TILE, BLOCK)
    mask = offsets < left if RAGGED else None
    block = tl.arange(0, TILE // BLOCK)
    some = block * BLOCK < left if RAGGED else None
    row = pointers + leaf
    to = targets + leaf
    # All that comes from far is asked for before the first lookup, which the warps of a program do together.
    p = _read(tl.load(row), p_kind, start, offsets, mask, WIDE)
    g = _read(tl.load(row + 3 * L), g_kind, start, offsets, mask, WIDE)
    m_code = tl.load(_pointer(tl.load(row + L), tl.uint8, WIDE) + start + offsets, mask, 0 if RAGGED else None)
    v_code = tl.load(_pointer(tl.load(row + 2 * L), tl.uint8, WIDE) + start + offsets, mask, 0 if RAGGED else None)
    first = start // BLOCK
    m_most = tl.load(tl.load(row + 4 * L).to(tl.pointer_type(tl.float32)) + first + block, some)[:, None, None]
    v_most = tl.load(tl.load(row + 5 * L).to(tl.pointer_type(tl.float32)) + first + block, some)[:, None, None]
    m = _entry(maps, m_code.to(tl.int32)) * m_most
    v = _entry(maps + 512, v_code.to(tl.int32)) * v_most
    p_next, m_next, v_next = _step(p, g, m, v, coefficients, BETA1, BETA2, EPS, False)
    # One number that is not finite would be the absmax of 256: such an element skips the step.
    finite = (tl.abs(m_next) < float("inf")) & (v_next < float("inf"))
    _write(tl.load(to), p_kind, start, offsets, tl.where(finite, p_next, p), mask, WIDE)
    m = tl.where(finite, m_next, m)
    v = tl.where(finite, v_next, v)
    _encode(tl.load(to + L), tl.load(to + 4 * L), maps + 256, m, start, offsets, left, True, RAGGED, WIDE,
            TILE, BLOCK, ZERO, LEAST)  # fmt: skip
    _encode(tl.load(to + 2 * L), tl.load(to + 5 * L), maps + 768, v, start, offsets, left, False, RAGGED, WIDE,
            TILE, BLOCK, ZERO, LEAST)  # fmt: skip


@triton.jit
def _adamw_tile(
    pointers, targets, coefficients, maps, leaf, L, p_kind, g_kind, s_kind, start, size,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, RAGGED: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """Rows of ``pointers``: p m v g, and of 8-bit states absmax of m and v; of ``targets`` the same but for g."""
    left = tl.minimum(size - start, TILE).to(tl.int32)
    if s_kind == 3:
        _adamw_tile_8bit(pointers, targets, coefficients, maps, leaf, L, p_kind, g_kind, start, left,
                         BETA1, BETA2, EPS, RAGGED, 4 if ALIGNED else 0, TILE, BLOCK, ZERO, LEAST)  # fmt: skip
    else:
        wide: tl.constexpr = 8 if ALIGNED else 0
        row = pointers + leaf
        to = targets + leaf
        offsets = tl.arange(0, TILE)
        mask = offsets < left if RAGGED else None
        p = _read(tl.load(row), p_kind, start, offsets, mask, wide)
        g = _read(tl.load(row + 3 * L), g_kind, start, offsets, mask, wide)
        m = _read(tl.load(row + L), s_kind, start, offsets, mask, wide)
        v = _read(tl.load(row + 2 * L), 0, start, offsets, mask, wide)
        p, m, v = _step(p, g, m, v, coefficients, BETA1, BETA2, EPS, True)
        _write(tl.load(to), p_kind, start, offsets, p, mask, wide)
        _write(tl.load(to + L), s_kind, start, offsets, m, mask, wide)
        _write(tl.load(to + 2 * L), 0, start, offsets, v, mask, wide)


@triton.jit
def _adamw_kernel(
    pointers, targets, coefficients, maps, tile_leaf, leaf_first, leaf_size, leaf_kinds, L,
    P_KIND: tl.constexpr, G_KIND: tl.constexpr, S_KIND: tl.constexpr, ALIGNED: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, ZERO: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    leaf, start, size = _tile(tile_leaf, leaf_first, leaf_size, TILE)
    if P_KIND == -1:
        p_kind = tl.load(leaf_kinds + leaf)
    else:
        p_kind: tl.constexpr = P_KIND
    if G_KIND == -1:
        g_kind = tl.load(leaf_kinds + L + leaf)
    else:
        g_kind: tl.constexpr = G_KIND
    if S_KIND == -1:
        s_kind = tl.load(leaf_kinds + 2 * L + leaf)
    else:
        s_kind: tl.constexpr = S_KIND
    # Full tiles go unmasked: a mask against a loaded size would make every access one element wide.
    if start + TILE <= size:
        _adamw_tile(pointers, targets, coefficients, maps, leaf, L, p_kind, g_kind, s_kind, start, size,
                    BETA1, BETA2, EPS, False, ALIGNED, TILE, BLOCK, ZERO, LEAST)  # fmt: skip
    else:
        _adamw_tile(pointers, targets, coefficients, maps, leaf, L, p_kind, g_kind, s_kind, start, size,
                    BETA1, BETA2, EPS, True, ALIGNED, TILE, BLOCK, ZERO, LEAST)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Leaves:
    """What a step reads or writes, as lists with an entry per parameter, all contiguous.

    ``m`` and ``v``: fp32 (m also bf16), or the codes of 8-bit states, with ``absmax`` of both: fp32, and any tensor
    where a leaf's states are not of 8 bits. ``absmax`` is () if no leaf's are."""

    p: Sequence[Tensor]
    m: Sequence[Tensor]
    v: Sequence[Tensor]
    absmax: tuple[Sequence[Tensor], ...] = ()


def adamw(
    old: Leaves, grads: Sequence[Tensor], new: Leaves, coefficients: Tensor, *, betas: tuple[float, float], eps: float
) -> None:
    """Write one AdamW step of every leaf into ``new``, which may be ``old`` itself.

    ``coefficients`` (4,) fp32 on the device: decay factor 1 - lr·wd, lr divided by the first bias correction,
    root of the second, factor on the gradient. An element of an 8-bit leaf whose new m or v is not finite keeps
    its p, m and v.
    """
    device = coefficients.device
    tile, warps = (TILE_8BIT, WARPS_8BIT) if old.absmax else (TILE, WARPS)
    state_kinds = tuple([STATE_KINDS[m.dtype] for m in old.m])
    plan = _plan(_sizes(old.p), (_kinds(old.p), _kinds(grads), state_kinds), device, tile)
    read = [old.p, old.m, old.v, grads, *old.absmax]
    write = [] if new is old else [new.p, new.m, new.v]
    if write and new.absmax:
        write += [new.p, *new.absmax]  # some address where the gradient's stands
    pointers, aligned = _pointers(read + write, device)
    launch(
        _adamw_kernel, (plan.tiles,), pointers, pointers[len(read) if write else 0 :], coefficients,
        _maps(device) if old.absmax else coefficients,
        plan.tile_leaf, plan.leaf_first, plan.leaf_size, plan.leaf_kinds, pointers.shape[1],
        P_KIND=plan.kinds[0], G_KIND=plan.kinds[1], S_KIND=plan.kinds[2], ALIGNED=aligned,
        BETA1=betas[0], BETA2=betas[1], EPS=eps, TILE=tile, BLOCK=BLOCK, ZERO=ZERO, LEAST=LEAST_ABSMAX,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip


@functools.cache
def _maps(device: torch.device) -> Tensor:
    """(4, 256) fp32: the signed map and the midpoints that encode it, the unsigned map and its midpoints.

    The midpoint above entry i of the unsigned map stands at i. Of the signed map, index i < 128 is the one above
    entry ZERO + i, and index 255 - i the one above entry ZERO - 1 - i: in both halves the entry is then ZERO + index
    modulo 256. Two of them are not midpoints: 0 keeps what is negative below zero, and -inf, beyond the lowest entry,
    puts what is there into it.
    """
    (signed, middle), (unsigned, above) = tables(device, True), tables(device, False)
    least, zero, beyond = middle.new_full((1,), -torch.inf), middle.new_zeros(1), above.new_full((1,), torch.inf)
    middle = torch.cat([middle[ZERO:], least, middle[: ZERO - 1], zero])
    return torch.stack([signed, middle, unsigned, torch.cat([above, beyond])])


# ---- global norm


@triton.jit
def _square_kernel(
    pointers, partials, tile_leaf, leaf_first, leaf_size, leaf_kinds,
    KIND: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    leaf, start, size = _tile(tile_leaf, leaf_first, leaf_size, TILE)
    offsets = tl.arange(0, TILE)
    wide: tl.constexpr = 8 if ALIGNED else 0
    if KIND == -1:
        kind = tl.load(leaf_kinds + leaf)
    else:
        kind: tl.constexpr = KIND
    if start + TILE <= size:
        x = _read(tl.load(pointers + leaf), kind, start, offsets, None, wide)
    else:
        mask = offsets < (size - start).to(tl.int32)
        x = tl.where(mask, _read(tl.load(pointers + leaf), kind, start, offsets, mask, wide), 0.0)
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
    plan = _plan(_sizes(leaves), (_kinds(leaves),), device, TILE)
    pointers, aligned = _pointers((leaves,), device)
    partials = torch.empty(plan.tiles, dtype=torch.float32, device=device)
    out = torch.empty((), dtype=torch.float32, device=device)
    launch(
        _square_kernel, (plan.tiles,), pointers, partials,
        plan.tile_leaf, plan.leaf_first, plan.leaf_size, plan.leaf_kinds,
        KIND=plan.kinds[0], ALIGNED=aligned, TILE=TILE, num_warps=WARPS, enable_fp_fusion=True,
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
def _plan(sizes: tuple[int, ...], kinds: tuple[tuple[int, ...], ...], device: torch.device, tile: int) -> _Plan:
    counts = np.array([-(-size // tile) for size in sizes], dtype=np.int64)
    firsts = np.cumsum(counts) - counts
    tiles = int(counts.sum())
    if tiles >= 2**31:
        raise NotImplementedError(f"multi_tensor: {tiles} tiles of {tile}, expected fewer than 2^31")

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
    addresses = np.array([t.data_ptr() for group in groups for t in group], dtype=np.int64)
    aligned = not bool((addresses & 15).any())
    if device.type != "cuda":
        table = torch.from_numpy(addresses).to(device)
    elif torch.cuda.is_current_stream_capturing():
        table = _table_by_arguments(addresses.tolist(), device)
    else:
        _load_argument_kernel(device)
        pinned = torch.empty(len(addresses), dtype=torch.int64, pin_memory=True)
        pinned.numpy()[:] = addresses
        table = pinned.to(device, non_blocking=True)
    return table.view(len(groups), -1), aligned


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
