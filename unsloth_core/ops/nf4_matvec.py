"""A few tokens times an NF4 matrix, without decoding it to memory: the product of cached generation.

    y = x W^T (+ bias) (+ add)        y[n, m] = sum over groups g of absmax[m, g] * sum over c in g of t[m, c] x[n, c]

x (N, C) with N <= 8, w NF4 of shape (M, C) with table entries t, bias (M,), add and y (N, M). A decoded weight that is
read once need not be written: this moves 0.516 B per weight (0.563 unless nested) where ``linear``'s other path moves
4.5 (decode to 16 bit, read again). Everything is fp32 until the one rounding of y. absmax multiplies the sum of 8
products, so a weight is not rounded to ``w.dtype`` first, as decoding does: the result is nearer to the exact product.
Not differentiable: it exists for decoding, where nothing is; ``linear`` takes its other path when x needs a gradient.

One program has a few rows of W and walks along C, a warp for several chunks of 256 columns at a time: a lane takes a
word of 8 codes of every chunk, so that codes and x are read as wide as a warp, and the x of a chunk stays in
registers for all rows. Nothing is multiplied by a tensor core: the arithmetic of N <= 8 is less than the table
lookups. Those are one instruction each: lane i of a warp holds entry i % 16, and a shuffle fetches from the lane that
a code names (``tl.gather`` compiles to the same shuffle for a single warp, but goes through shared memory with more).
The shuffle looks at five bits only, so nibbles need a shift and no mask. A lane decodes one absmax of a row for all
lanes and chunks, which fetch theirs by one more shuffle. Few rows and a long sum are split along C; a second kernel
adds the parts in order. Bytes: w and x once, y once.
Compiled for sm_90 by Triton 3.6.0 for one token: 4.8 instructions per weight, of which 3 are the shift, the shuffle
and the multiply-add; 64 registers, no spills. Measured, a matrix of 14336 x 4096 takes 17.0 us in a CUDA graph; 14.1
with nothing but the loads of its codes, 2.3 of the rest for shuffles, 1.2 for absmax, 0.4 for x.
Limits: C a multiple of 32; x contiguous along C and aligned to two elements, codes to 4 bytes; w decodes to x's dtype
or to fp32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend, device, tree
from ..cost import Cost
from ..prepared import prepared
from ..tracing import whole
from ..tree import ABSENT
from ..weights import NF4
from . import nf4
from .checks import check_device, check_dtype
from .language import INTERPRET, cast

TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROWS_OF_X = 8
GROUP = 32  # columns that one absmax has at least, and of which C is a multiple
WORD = 8  # codes that a lane takes at once, 4 bytes


@triton.jit
def _look_up(lane_entry, word):
    """The entries that the nibbles of a word name, in the order of columns; ``lane_entry`` is what ``_hold`` gave."""
    if INTERPRET:
        entries = ()
        for i in tl.static_range(8):
            entries = entries + (tl.gather(lane_entry, (word >> (i // 2 * 8 + (1 - i % 2) * 4)) & 0xF, 0),)
        return entries
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 i<8>;
            shr.u32 i0, $9, 4; shr.u32 i2, $9, 12; shr.u32 i3, $9, 8; shr.u32 i4, $9, 20;
            shr.u32 i5, $9, 16; shr.u32 i6, $9, 28; shr.u32 i7, $9, 24;
            shfl.sync.idx.b32 $0, $8, i0, 31, 0xffffffff; shfl.sync.idx.b32 $1, $8, $9, 31, 0xffffffff;
            shfl.sync.idx.b32 $2, $8, i2, 31, 0xffffffff; shfl.sync.idx.b32 $3, $8, i3, 31, 0xffffffff;
            shfl.sync.idx.b32 $4, $8, i4, 31, 0xffffffff; shfl.sync.idx.b32 $5, $8, i5, 31, 0xffffffff;
            shfl.sync.idx.b32 $6, $8, i6, 31, 0xffffffff; shfl.sync.idx.b32 $7, $8, i7, 31, 0xffffffff; }""",
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [lane_entry, word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _of_lane(value, lane):
    """``value`` of another lane of the own warp; one element a lane."""
    if INTERPRET:
        return tl.gather(value, tl.arange(0, value.shape[0]) // 32 * 32 + lane, 0)
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=r,r,r", [value, lane], dtype=tl.float32, is_pure=True,
            pack=1,
        )  # fmt: skip


@triton.jit
def _hold(table):
    """Compiled: entry i % 16 in lane i, a scalar to Triton, which keeps it in a register. Interpreted: the table."""
    if INTERPRET:
        return tl.load(table + tl.arange(0, 16))
    else:
        lane = tl.inline_asm_elementwise(
            "mov.u32 $0, %laneid;", "=r,r", [tl.program_id(0)], dtype=tl.int32, is_pure=True, pack=1
        )  # fmt: skip
        return tl.load(table + (lane & 0xF))


@triton.jit
def _halves(pair, X_TYPE: tl.constexpr):
    """The two neighbours that one wide integer holds, in fp32: even column, odd column."""
    if X_TYPE == tl.float32:
        return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    elif X_TYPE == tl.bfloat16:  # the upper half of an fp32
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        even = pair.to(tl.int16).to(tl.float16, bitcast=True)
        return even.to(tl.float32), (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _columns(pairs, X_TYPE: tl.constexpr, LANES: tl.constexpr):
    """Of four wide integers a lane the 8 neighbours that they hold, in fp32."""
    even, odd = tl.split(pairs.reshape(LANES, 2, 2))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    a, b = _halves(first, X_TYPE)
    c, d = _halves(second, X_TYPE)
    e, f = _halves(third, X_TYPE)
    g, h = _halves(fourth, X_TYPE)
    return a, b, c, d, e, f, g, h


@triton.jit
def _finish(y, out, bias, add, n, m, rows, out_n, bias_m, add_n, add_m):
    """``out[n, m] = y + bias[m] + add[n, m]``."""
    if bias is not None:
        y += tl.load(bias + m * bias_m, mask=m < rows, other=0.0).to(tl.float32)
    if add is not None:
        y += tl.load(add + n * add_n + m * add_m, mask=m < rows, other=0.0).to(tl.float32)
    tl.store(out + n * out_n + m, cast(y, out.dtype.element_ty), mask=m < rows)


@triton.jit
def _matvec_kernel(
    x_pairs, codes, absmax, nested_absmax, nested_code, nested_offset, table, out, bias, add,
    rows, words, part, x_n, out_n, bias_m, add_n, add_m,
    X_TYPE: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, CHUNKS: tl.constexpr,
    EVEN: tl.constexpr, WORDS_PER_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of W, and of C the ``part`` words of 8 codes that are this program's."""
    LANES: tl.constexpr = 32 * WARPS
    first = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    low = split * part
    high = tl.minimum(low + part, words)
    entry = _hold(table)
    offset = 0.0
    if nested_absmax is not None:
        offset = tl.load(nested_offset)
    lane = tl.arange(0, LANES) % 32
    own_word = tl.arange(0, LANES) // 32 * (32 * CHUNKS) + lane  # of the step's first chunk
    own_scale = tl.arange(0, LANES) // 32 * (32 * CHUNKS) + lane * CHUNKS  # the first word that has it
    pair = tl.arange(0, LANES * 4)
    pair = pair // 128 * (128 * CHUNKS) + pair % 128
    sums = ()
    for _ in tl.static_range(ROWS * N):
        sums = sums + (tl.zeros((LANES,), tl.float32),)
    for start in range(low, high, LANES * CHUNKS):
        word = ()
        scale = ()
        for r in tl.static_range(ROWS):
            at = (first + r).to(tl.int64) * words
            end = tl.where(first + r < rows, high, low)  # a row outside has no words
            for c in tl.static_range(CHUNKS):
                w = start + c * 32 + own_word
                word = word + (tl.load(codes + at + w, mask=(w < end) | EVEN, other=0),)
            block = (at + start + own_scale) // WORDS_PER_BLOCK
            inside = (start + own_scale < end) | EVEN  # a mask known to be true is none
            if nested_absmax is not None:
                q = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
                s = tl.load(nested_absmax + block // NESTED_BLOCK, mask=inside, other=0.0)
                scale = scale + (s * tl.load(nested_code + q) + offset,)
            else:
                scale = scale + (tl.load(absmax + block, mask=inside, other=0.0),)
        for c in tl.static_range(CHUNKS):
            x = ()
            for n in tl.static_range(N):
                p = (start + c * 32) * 4 + pair
                x = x + _columns(tl.load(x_pairs + n * x_n + p, mask=(p < high * 4) | EVEN, other=0), X_TYPE, LANES)
            grown = ()
            for r in tl.static_range(ROWS):
                t = _look_up(entry, word[r * CHUNKS + c])
                s = _of_lane(scale[r], c * (32 // CHUNKS) + lane // CHUNKS)
                for n in tl.static_range(N):
                    y = t[0] * x[8 * n]
                    for i in tl.static_range(1, 8):
                        y += t[i] * x[8 * n + i]
                    grown = grown + (sums[r * N + n] + y * s,)
            sums = grown
    out += split.to(tl.int64) * N * rows
    for r in tl.static_range(ROWS):
        for n in tl.static_range(N):
            y = tl.sum(sums[r * N + n], 0)
            _finish(y, out, bias, add, n, (first + r).to(tl.int64), rows, out_n, bias_m, add_n, add_m)


@triton.jit
def _combine_kernel(
    parts, out, bias, add, rows, splits, out_n, bias_m, add_n, add_m, N: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The parts (splits, N, rows) added in their order."""
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n = tl.program_id(1).to(tl.int64)
    y = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        y += tl.load(parts + (split * N + n) * rows + m, mask=m < rows, other=0.0)
    _finish(y, out, bias, add, n, m, rows, out_n, bias_m, add_n, add_m)


class Config(NamedTuple):
    """Launch parameters: rows of W per program, warps along C, chunks of 256 columns of each in a step, parts of C."""

    rows: int
    warps: int
    chunks: int
    splits: int


def configuration(n: int, m: int, c: int, dtype: torch.dtype, where: torch.device) -> Config:
    """By shape; what of this was measured stands in perf/LOG.md. The more rows share one load of x the better, as long
    as x and the sums of ``n`` tokens fit into registers (at most 96 here)."""
    if device.interpreting():
        rows, warps, chunks = 2, 1, 1
    else:
        rows = 4 if n <= 4 else 2
        chunks = 8 if n == 1 and c % (8 * 256) == 0 else 4
        warps = 2 if n == 1 and c % (16 * 256) == 0 and m < 64 * device.sms(where) else 1  # else too few are at work
    programs, steps = device.cdiv(m, rows), device.cdiv(c, 256 * warps * chunks)
    splits = 1 if programs >= device.sms(where) else min(steps, device.cdiv(2 * device.sms(where), programs))
    return Config(rows, warps, chunks, splits)


def takes(x_NC: Tensor, w: NF4) -> bool:
    """Whether :func:`nf4_matvec` can multiply these (whose devices and columns agree); see the limits above."""
    pairs = x_NC.shape[1] % GROUP == 0 and x_NC.stride(1) == 1 and x_NC.stride(0) % 2 == 0
    aligned = device.aligned(x_NC, 2 * x_NC.element_size()) and device.aligned(w.codes, 4)
    aligned = aligned and w.codes.storage_offset() % 4 == 0
    return 1 <= x_NC.shape[0] <= ROWS_OF_X and pairs and aligned and w.dtype in (x_NC.dtype, torch.float32)


@whole
def nf4_matvec(
    x_NC: Tensor,
    w: NF4,
    bias: Tensor | Any = ABSENT,
    add: Tensor | Any = ABSENT,
    *,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """``y_NM = x W^T (+ bias_M) (+ add_NM)`` for at most 8 rows of x, in x's dtype, or written into ``out`` (N, M).

    bias, add and out: fp16, bf16 or fp32; out's rows are contiguous, so it may be some columns of a larger matrix.
    Raises ValueError for shapes, dtypes, devices or strides that do not fit (:func:`takes` tells), NotImplementedError
    if a gradient is wanted.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in tree.leaves((x_NC, w, bias, add))):
        raise NotImplementedError("nf4_matvec: has no gradient; use linear")
    if backend.resolve(x_NC) == "triton":
        return _matvec(x_NC, w, bias, add, ABSENT if out is None else out, config=config)
    _check(x_NC, w, bias, add, out)
    y = backend.reference("nf4_matvec")(x_NC, w, bias, add, dtype=x_NC.dtype if out is None else out.dtype)
    return y if out is None else out.copy_(y)


@prepared
def _matvec(x_NC: Tensor, w: NF4, bias: Any, add: Any, out: Any, *, config: Config | None) -> Tensor:
    out = None if out is ABSENT else out
    _check(x_NC, w, bias, add, out)
    (n, c), m, where = x_NC.shape, w.shape[0], x_NC.device
    rows, warps, chunks, splits = config or configuration(n, m, c, x_NC.dtype, where)
    if c % 64 or w.block < 64:
        chunks = min(chunks, 4)  # 32 columns that share an absmax, as a lane takes with 4 chunks, always do
    words, step = c // WORD, 32 * warps * chunks
    part = device.cdiv(device.cdiv(words, splits), step) * step
    splits = device.cdiv(words, part)
    if out is None:
        out = torch.empty(n, m, dtype=x_NC.dtype, device=where)
    nested = w.nested or None
    last = (None if bias is ABSENT else bias, None if add is ABSENT else add)
    last_strides = (0 if bias is ABSENT else bias.stride(0), *((0, 0) if add is ABSENT else add.stride()))
    target = out if splits == 1 else torch.empty(splits, n, m, dtype=torch.float32, device=where)
    device.launch(
        _matvec_kernel,
        (device.cdiv(m, rows), splits),
        x_NC.view(torch.int64 if x_NC.dtype == torch.float32 else torch.int32),
        *(w.codes.reshape(-1).view(torch.int32), w.absmax),
        *((nested.absmax_P, nested.code_256, nested.offset) if nested else (None, None, None)),
        *(nf4.table(where), target, *(last if splits == 1 else (None, None))),
        *(m, words, part, x_NC.stride(0) // 2, target.stride(-2), *last_strides),
        X_TYPE=TRITON_TYPES[x_NC.dtype],
        N=n,
        ROWS=rows,
        WARPS=warps,
        CHUNKS=chunks,
        EVEN=m % rows == 0 and words % step == 0,
        WORDS_PER_BLOCK=w.block // WORD,
        NESTED_BLOCK=nf4.NESTED_BLOCK,
        num_warps=warps,
        enable_fp_fusion=True,
    )
    if splits > 1:
        grid = (device.cdiv(m, 256), n)
        device.launch(
            _combine_kernel, grid, target, out, *last, m, splits, out.stride(0), *last_strides,
            N=n, BLOCK=256, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def cost(n: int, w: NF4, itemsize: int = 2) -> Cost:
    """``n`` tokens: codes, absmax, x and y once; a multiply-add per weight and token."""
    m, c = w.shape
    return Cost(bytes=tree.nbytes(w) + n * (m + c) * itemsize, flops=2 * n * m * c)


def _check(x: Tensor, w: NF4, bias: Any, add: Any, out: Tensor | None) -> None:
    if x.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(f"nf4_matvec: x has shape {tuple(x.shape)}, expected (N, {w.shape[1]})")
    check_dtype("nf4_matvec", "x", x)
    nf4.check("nf4_matvec", w)
    check_device("nf4_matvec", "w", w.codes, "x", x.device)
    if not takes(x, w):
        raise ValueError(
            f"nf4_matvec: x is {x.dtype} {tuple(x.shape)}, strides {x.stride()}, and w decodes to {w.dtype}; expected "
            f"1 to {ROWS_OF_X} rows of whole groups of {GROUP}, contiguous, aligned to two elements, codes to 4 bytes, "
            "and w to decode to the same dtype or to float32"
        )
    n, m = x.shape[0], w.shape[0]
    for name, t, expected in (("bias", bias, (m,)), ("add", add, (n, m)), ("out", out, (n, m))):
        if t is None or t is ABSENT:
            continue
        if tuple(t.shape) != expected:
            raise ValueError(f"nf4_matvec: {name} has shape {tuple(t.shape)}, expected {expected}")
        check_dtype("nf4_matvec", name, t)
        check_device("nf4_matvec", name, t, "x", x.device)
    if out is not None and out.stride(1) != 1:
        raise ValueError(f"nf4_matvec: out has strides {out.stride()}, expected contiguous rows")
