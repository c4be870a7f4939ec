"""A few tokens times an NF4 matrix, without decoding it to memory: the product of cached generation.

    y = x W^T (+ bias) (+ add)        y[n, m] = sum over groups g of absmax[m, g] * sum over c in g of t[m, c] x[n, c]

x (N, C) with N <= 8, w NF4 of shape (M, C) with table entries t, bias (M,), add and y (N, M). A decoded weight that is
read once need not be written: this moves 0.516 B per weight (0.563 unless nested) where ``linear``'s other path moves
4.5 (decode to 16 bit, read again). Everything is fp32 until the one rounding of y. absmax multiplies the sum of 32
products, so a weight is not rounded to ``w.dtype`` first, as decoding does: the result is nearer to the exact product.
Not differentiable: it exists for decoding, where nothing is; ``linear`` takes its other path when x needs a gradient.

One program has a few rows of W and walks along C; a thread takes 32 codes (16 bytes) of each row in one load, and the x
they meet stays in its registers for all rows. Nothing is multiplied by a tensor core: the arithmetic of N <= 8 is less
than the table lookups. Those are one instruction each: lane i of a warp holds entry i % 16, and a shuffle fetches from
the lane that a code names (``tl.gather`` compiles to the same shuffle for a single warp, but goes through shared memory
with more). The shuffle looks at five bits only, so nibbles need a shift and no mask, and four bytes of codes stay in
the register they were loaded in. Few rows and a long sum are split along C; a second kernel adds the parts in order.
Bytes: w and x once, y once. Compiled for sm_90 by Triton 3.6.0 for one token: 4.1 instructions per weight, of which
3 are the shift, the shuffle and the multiply-add; 72 registers, no spills. Measured, large matrices take 0.26 ps per
weight beyond a start of 4 us: half the rate at which those instructions could be issued, whatever the tile, loads
ahead or not. The shuffles are what is left to blame.
Limits: C a multiple of 32; x contiguous along C and aligned to two elements; w decodes to x's dtype or to fp32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend, device, tree
from ..cost import Cost
from ..tree import ABSENT
from ..weights import NF4
from . import nf4
from .checks import check_device, check_dtype
from .language import INTERPRET, cast

TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
ROWS_OF_X = 8
GROUP = 32  # codes that a thread takes at once, 16 bytes; blocks of codes with one absmax are multiples of it


@triton.jit
def _look_up(lane_entry, code):
    """The entries that the upper and the lower nibbles of bytes name; ``lane_entry`` is what ``_hold`` returned."""
    if INTERPRET:
        index = code.to(tl.int32)
        return tl.gather(lane_entry, index >> 4, 0), tl.gather(lane_entry, index & 0xF, 0)
    else:
        upper = tl.inline_asm_elementwise(
            """{ .reg .b32 i<4>;
            shr.u32 i0, $8, 4; shr.u32 i1, $8, 12; shr.u32 i2, $8, 20; shr.u32 i3, $8, 28;
            shfl.sync.idx.b32 $0, $4, i0, 31, 0xffffffff; shfl.sync.idx.b32 $1, $4, i1, 31, 0xffffffff;
            shfl.sync.idx.b32 $2, $4, i2, 31, 0xffffffff; shfl.sync.idx.b32 $3, $4, i3, 31, 0xffffffff; }""",
            "=r,=r,=r,=r,r,r,r,r,r", [lane_entry, code], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
        lower = tl.inline_asm_elementwise(
            """{ .reg .b32 i<4>;
            shr.u32 i1, $8, 8; shr.u32 i2, $8, 16; shr.u32 i3, $8, 24;
            shfl.sync.idx.b32 $0, $4, $8, 31, 0xffffffff; shfl.sync.idx.b32 $1, $4, i1, 31, 0xffffffff;
            shfl.sync.idx.b32 $2, $4, i2, 31, 0xffffffff; shfl.sync.idx.b32 $3, $4, i3, 31, 0xffffffff; }""",
            "=r,=r,=r,=r,r,r,r,r,r", [lane_entry, code], dtype=tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
        return upper, lower


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
    rows, groups, chunk, x_n, out_n, bias_m, add_n, add_m,
    X_TYPE: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
    GROUPS_PER_BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of W, and of C the ``chunk`` groups of 32 that are this program's, STEP of them at a time."""
    first = tl.program_id(0) * ROWS
    split = tl.program_id(1)
    low = split * chunk
    high = tl.minimum(low + chunk, groups)
    entry = _hold(table)
    sums = ()
    for _ in tl.static_range(ROWS * N):
        sums = sums + (tl.zeros((STEP,), tl.float32),)
    for start in range(low, high, STEP):
        group = start + tl.arange(0, STEP)
        byte = start * 16 + tl.arange(0, STEP * 16)
        x_inside = (byte < high * 16) | EVEN  # a mask known to be true leaves 16-byte loads
        even = ()
        odd = ()
        for n in tl.static_range(N):
            pair = tl.load(x_pairs + n * x_n + byte, mask=x_inside, other=0)
            e, o = _halves(pair, X_TYPE)
            even = even + (e,)
            odd = odd + (o,)
        grown = ()
        for r in tl.static_range(ROWS):
            at = (first + r).to(tl.int64) * groups
            end = tl.where(first + r < rows, high, low)  # a row outside has no groups
            code_inside = (byte < end * 16) | EVEN
            code = tl.load(codes + at * 16 + byte, mask=code_inside, other=0)
            block = (at + group) // GROUPS_PER_BLOCK
            scale_inside = (group < end) | EVEN
            if nested_absmax is not None:
                q = tl.load(absmax + block, mask=scale_inside, other=0).to(tl.int32)
                scale = tl.load(nested_absmax + block // NESTED_BLOCK, mask=scale_inside, other=0.0)
                scale = scale * tl.load(nested_code + q) + tl.load(nested_offset)
            else:
                scale = tl.load(absmax + block, mask=scale_inside, other=0.0)
            upper, lower = _look_up(entry, code)
            for n in tl.static_range(N):
                # Each sum stays in one thread, a chain of 16 multiply-adds.
                part = tl.sum((upper * even[n]).reshape(STEP, 16), 1)
                part += tl.sum((lower * odd[n]).reshape(STEP, 16), 1)
                grown = grown + (sums[r * N + n] + part * scale,)
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
    """Launch parameters: rows of W per program, groups of 32 columns per step (a warp for 32 of them), parts of C."""

    rows: int
    step: int
    splits: int


def configuration(n: int, m: int, c: int, dtype: torch.dtype, where: torch.device) -> Config:
    """By shape, as measured on an H100 (perf/LOG.md). The more rows share one load of x the better, as long as x and
    the sums of ``n`` tokens fit into registers; single warps where there are enough of them, pairs where not."""
    groups = c // GROUP
    if device.interpreting():
        rows, step = 2, 4
    else:
        rows = 4 if n <= 4 or dtype != torch.float32 else 1
        step = 64 if n == 1 and m < 64 * device.sms(where) and groups >= 64 else 32
    programs, steps = device.cdiv(m, rows), device.cdiv(groups, step)
    splits = 1 if programs >= device.sms(where) else min(steps, device.cdiv(2 * device.sms(where), programs))
    return Config(rows, step, splits)


def takes(x_NC: Tensor, w: NF4) -> bool:
    """Whether :func:`nf4_matvec` can multiply these (whose devices and columns agree); see the limits above."""
    pairs = x_NC.shape[1] % GROUP == 0 and x_NC.stride(1) == 1 and x_NC.stride(0) % 2 == 0
    aligned = device.aligned(x_NC, 2 * x_NC.element_size())
    return 1 <= x_NC.shape[0] <= ROWS_OF_X and pairs and aligned and w.dtype in (x_NC.dtype, torch.float32)


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
    _check(x_NC, w, bias, add, out)
    if torch.is_grad_enabled() and tree.any(tree.map(lambda t: t.requires_grad, (x_NC, w, bias, add))):
        raise NotImplementedError("nf4_matvec: has no gradient; use linear")
    if backend.resolve(x_NC) == "reference":
        y = backend.reference("nf4_matvec")(x_NC, w, bias, add, dtype=x_NC.dtype if out is None else out.dtype)
        return y if out is None else out.copy_(y)
    (n, c), m, where = x_NC.shape, w.shape[0], x_NC.device
    rows, step, splits = config or configuration(n, m, c, x_NC.dtype, where)
    groups = c // GROUP
    chunk = device.cdiv(device.cdiv(groups, splits), step) * step
    splits = device.cdiv(groups, chunk)
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
        *(w.codes.reshape(-1), w.absmax),
        *((nested.absmax_P, nested.code_256, nested.offset) if nested else (None, None, None)),
        *(nf4.table(where), target, *(last if splits == 1 else (None, None))),
        *(m, groups, chunk, x_NC.stride(0) // 2, target.stride(-2), *last_strides),
        X_TYPE=TRITON_TYPES[x_NC.dtype],
        N=n,
        ROWS=rows,
        STEP=step,
        EVEN=m % rows == 0 and groups % step == 0,
        GROUPS_PER_BLOCK=w.block // GROUP,
        NESTED_BLOCK=nf4.NESTED_BLOCK,
        num_warps=max(1, step // 32),
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
            f"1 to {ROWS_OF_X} rows of whole groups of {GROUP}, contiguous, aligned to two elements, and w to decode "
            "to the same dtype or to float32"
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
