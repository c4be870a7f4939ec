"""One launch over all leaves of a tree: the fused AdamW step and the global norm.

A model has hundreds of parameters, most of them small; one kernel per leaf would cost more in launches than
in memory traffic. Here every leaf is cut into tiles of ``TILE`` elements and program i does tile i of the
whole tree. It finds its leaf through three small tables:

* the *plan*, a function of sizes and dtypes only, made once and kept: the leaf of every tile, the first tile
  and the size of every leaf, the dtypes;
* the *pointers*, ``(k, L)`` int64 addresses, made at every call, because functional updates return new
  tensors. This is one small asynchronous copy from pinned memory. Under CUDA graph capture the addresses
  travel as kernel arguments instead: a captured copy would read host memory at replay that no longer exists.

Bytes per parameter: AdamW reads p, g, m, v and writes p, m, v: 28 in fp32; with bf16 p and g 22, 18 if m is bf16
too, and 10.06 if m and v are 8-bit (1 for each code, 16/256 for absmax); the norm reads g once. A tile holds whole
blocks of 8-bit states, so they are decoded, stepped and encoded again without leaving the registers.
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
from ..ops.dynamic_map import nearest, tables
from ..ops.language import cast
from .blockwise import BLOCK, ZERO, Blockwise

TILE = 2048
ARGUMENTS = 128  # addresses per launch when they travel as kernel arguments
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MIXED = -1
EIGHT_BIT = 3  # kind of a leaf's states; 0 and 1 are that of its first moment


State = Tensor | Blockwise


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
def _step(p, g, m, v, coefficients, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """p, m, v after a step."""
    decay = tl.load(coefficients)
    rate = tl.load(coefficients + 1)
    root_correction = tl.load(coefficients + 2)
    g = g * tl.load(coefficients + 3)
    m += (1.0 - BETA1) * (g - m)
    v = v * BETA2 + (1.0 - BETA2) * g * g
    # Correctly rounded root and quotient are free here (the kernel waits for memory) and keep us within an
    # ulp of PyTorch.
    denominator = tl.div_rn(tl.sqrt_rn(v), root_correction) + EPS
    return p * decay - tl.div_rn(m * rate, denominator), m, v


@triton.jit
def _decode(codes, absmax, points, start, offsets, size, RAGGED: tl.constexpr, ALIGNED: tl.constexpr,
            TILE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Map entries times the absmax of their block; ``codes`` and ``absmax`` are addresses."""
    mask = offsets < size if RAGGED else None
    values = tl.load(
        points + tl.load(_pointer(codes, tl.uint8, ALIGNED) + offsets, mask, 0 if RAGGED else None).to(tl.int32)
    )
    block = start // BLOCK + tl.arange(0, TILE // BLOCK)
    largest = tl.load(absmax.to(tl.pointer_type(tl.float32)) + block, block * BLOCK < size, 0.0)
    return (values.reshape(TILE // BLOCK, BLOCK) * largest[:, None]).reshape(TILE)


@triton.jit
def _encode(codes, absmax, midpoints, x, start, offsets, size, SIGNED: tl.constexpr, RAGGED: tl.constexpr,
            ALIGNED: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr):  # fmt: skip
    """The inverse; see blockwise.py for the two roundings."""
    mask = offsets < size if RAGGED else None
    if RAGGED:
        x = tl.where(offsets < size, x, 0.0)
    blocks = x.reshape(TILE // BLOCK, BLOCK)
    largest = tl.max(tl.abs(blocks), 1)
    divisor = tl.maximum(largest, 1e-38).to(tl.float32)  # a constant that is subnormal in fp32 is fp64 to Triton
    code = nearest((blocks * tl.div_rn(1.0, divisor)[:, None]).reshape(TILE), midpoints, SIGNED)
    if SIGNED:
        code = tl.where(x < 0, tl.minimum(code, ZERO - 1), code)
    else:
        code = tl.maximum(code, (x > 0).to(tl.int32))
    tl.store(_pointer(codes, tl.uint8, ALIGNED) + offsets, code.to(tl.uint8), mask)
    block = start // BLOCK + tl.arange(0, TILE // BLOCK)
    tl.store(absmax.to(tl.pointer_type(tl.float32)) + block, largest, block * BLOCK < size)


@triton.jit
def _adamw_tile(
    pointers, coefficients, maps, leaf, L, p_kind, g_kind, s_kind, start, size,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, RAGGED: tl.constexpr, ALIGNED: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """Rows of ``pointers``: p g m v, the new p m v, and of 8-bit states absmax of m and v, old and new."""
    row = pointers + leaf
    offsets = start + tl.arange(0, TILE)
    p = _read(tl.load(row), p_kind, offsets, size, RAGGED, ALIGNED)
    g = _read(tl.load(row + L), g_kind, offsets, size, RAGGED, ALIGNED)
    m_old = tl.load(row + 2 * L)
    v_old = tl.load(row + 3 * L)
    m_new = tl.load(row + 5 * L)
    v_new = tl.load(row + 6 * L)
    if s_kind == 3:
        m = _decode(m_old, tl.load(row + 7 * L), maps, start, offsets, size, RAGGED, ALIGNED, TILE, BLOCK)
        v = _decode(v_old, tl.load(row + 8 * L), maps + 512, start, offsets, size, RAGGED, ALIGNED, TILE, BLOCK)
        p_next, m_next, v_next = _step(p, g, m, v, coefficients, BETA1, BETA2, EPS)
        # One number that is not finite would be the absmax of 256: such an element skips the step.
        finite = (tl.abs(m_next) < float("inf")) & (v_next < float("inf"))
        p = tl.where(finite, p_next, p)
        m = tl.where(finite, m_next, m)
        v = tl.where(finite, v_next, v)
        _encode(m_new, tl.load(row + 9 * L), maps + 256, m, start, offsets, size, True, RAGGED, ALIGNED,
                TILE, BLOCK, ZERO)  # fmt: skip
        _encode(v_new, tl.load(row + 10 * L), maps + 768, v, start, offsets, size, False, RAGGED, ALIGNED,
                TILE, BLOCK, ZERO)  # fmt: skip
    else:
        m = _read(m_old, s_kind, offsets, size, RAGGED, ALIGNED)
        v = _read(v_old, 0, offsets, size, RAGGED, ALIGNED)
        p, m, v = _step(p, g, m, v, coefficients, BETA1, BETA2, EPS)
        _write(m_new, s_kind, offsets, m, size, RAGGED, ALIGNED)
        _write(v_new, 0, offsets, v, size, RAGGED, ALIGNED)
    _write(tl.load(row + 4 * L), p_kind, offsets, p, size, RAGGED, ALIGNED)


@triton.jit
def _adamw_kernel(
    pointers, coefficients, maps, tile_leaf, leaf_first, leaf_size, leaf_kinds, L,
    P_KIND: tl.constexpr, G_KIND: tl.constexpr, S_KIND: tl.constexpr, ALIGNED: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, ZERO: tl.constexpr,
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
        _adamw_tile(pointers, coefficients, maps, leaf, L, p_kind, g_kind, s_kind, start, size,
                    BETA1, BETA2, EPS, False, ALIGNED, TILE, BLOCK, ZERO)  # fmt: skip
    else:
        _adamw_tile(pointers, coefficients, maps, leaf, L, p_kind, g_kind, s_kind, start, size,
                    BETA1, BETA2, EPS, True, ALIGNED, TILE, BLOCK, ZERO)  # fmt: skip


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    ms: Sequence[State],
    vs: Sequence[State],
    out: tuple[Sequence[Tensor], Sequence[State], Sequence[State]],
    coefficients: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Write one AdamW step of every leaf into ``out`` = (params, ms, vs), which may be the inputs themselves.

    All tensors contiguous; ms are fp32, or bf16 throughout, or with their vs 8-bit; other vs are fp32.
    ``coefficients`` (4,) fp32 on the device: decay factor 1 - lr·wd, lr divided by the first bias correction,
    root of the second, factor on the gradient. An element of an 8-bit leaf whose new m or v is not finite keeps
    its p, m and v.
    """
    device = coefficients.device
    state_kinds = tuple([EIGHT_BIT if isinstance(m, Blockwise) else KINDS[m.dtype] for m in ms])
    plan = _plan(_sizes(params), (_kinds(params), _kinds(grads), state_kinds), device)
    groups = (params, grads, *map(_numbers, (ms, vs)), out[0], *map(_numbers, out[1:]))
    maps = coefficients  # not read
    if EIGHT_BIT in state_kinds:
        groups += tuple(map(_absmax, (ms, vs, *out[1:])))
        maps = _maps(device)
    pointers, aligned = _pointers(groups, device)
    launch(
        _adamw_kernel, (plan.tiles,), pointers, coefficients, maps,
        plan.tile_leaf, plan.leaf_first, plan.leaf_size, plan.leaf_kinds, pointers.shape[1],
        P_KIND=plan.kinds[0], G_KIND=plan.kinds[1], S_KIND=plan.kinds[2], ALIGNED=aligned,
        BETA1=betas[0], BETA2=betas[1], EPS=eps, TILE=TILE, BLOCK=BLOCK, ZERO=ZERO,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip


def _numbers(states: Sequence[State]) -> list[Tensor]:
    return [s.codes if isinstance(s, Blockwise) else s for s in states]


def _absmax(states: Sequence[State]) -> list[Tensor]:
    """Of 8-bit leaves; some address for the others, which is not read."""
    return [s.absmax if isinstance(s, Blockwise) else s for s in states]


@functools.cache
def _maps(device: torch.device) -> Tensor:
    """(4, 256) fp32: signed map and its midpoints, unsigned map and its midpoints."""
    rows = [torch.nn.functional.pad(t, (0, 256 - len(t))) for signed in (True, False) for t in tables(device, signed)]
    return torch.stack(rows)


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
        table = torch.tensor(addresses, dtype=torch.int64, device=device)
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
