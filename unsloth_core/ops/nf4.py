"""NF4: dense matrices in 4.127 bits per element, bit-exact with bitsandbytes in both directions.

    w = table[code] * absmax[i // block]                               absmax: fp32, one per 64 elements
    absmax = fp32(code_256[q] * absmax_P[block // 256]) + offset       when nested (double quantisation)

Data type and double quantisation: QLoRA (arXiv 2305.14314); the 8-bit dynamic map: Dettmers (arXiv 1511.04561); the
packing is bitsandbytes'.

Not differentiable: an NF4 weight is frozen; ``linear`` multiplies by it, and back through it.

Dequantising reads 0.516 B (nested) or 0.563 B per element and writes one element; everything is fp32 until one rounding
to ``w.dtype``. FP fusion is off: a fused multiply-add in the nested absmax, rounded once where bitsandbytes rounds
twice, changes the last bit. The kernel reads eight codes as one 32-bit word and looks them up with a gather in a
16-entry table held in registers.

Quantising reads a matrix once and writes 0.53 B per element: absmax of each block, then for each of its elements how
many of the 15 midpoints between entries lie below ``x * (1 / absmax)``, which is what bitsandbytes' search tree
counts. Double quantisation is a second, small launch over absmax minus its mean (PyTorch's mean, as in bitsandbytes:
its last bit is the order of the sum). A block with a NaN becomes NaN, one of zeros stays zeros.
Limits: contiguous tensors; block sizes that are powers of two from 32 to 4096.
"""

import dataclasses
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import backend, device
from ..cost import Cost
from ..prepared import prepared
from ..tracing import whole
from ..tree import ABSENT
from ..weights import NF4, Nested
from .checks import check_device, check_dtype
from .dynamic_map import kept, nearest, tables
from .language import cast

TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
NESTED_BLOCK = 256
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_QUANTIZED = 1024  # elements per program: 118 us for 14336 x 4096 on an H100 80GB HBM3 (Triton 3.6.0)
_WORDS = 512  # per program: 55.7 us for 14336 x 4096 on an H100 80GB HBM3, 2.70 TB/s (Triton 3.6.0)


@triton.jit
def _dequantize_kernel(
    codes, absmax, nested_absmax, nested_code, nested_offset, table, out, elements,
    WORDS: tl.constexpr, PER_WORD: tl.constexpr, BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Words of PER_WORD codes: 8 in an int32, or 2 in a byte where a ragged end leaves no whole words."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = (word * PER_WORD < elements) | EVEN  # a mask known to be true leaves 16-byte loads
    packed = tl.load(codes + word, mask=inside, other=0).to(tl.int32)
    block = word // (BLOCK // PER_WORD)
    if nested_absmax is not None:
        q = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        scale = tl.load(nested_absmax + block // NESTED_BLOCK, mask=inside, other=0.0) * tl.load(nested_code + q)
        scale += tl.load(nested_offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    # The even element of a byte is its high nibble; a word's first byte is its lowest: shifts 4, 0, 12, 8, 20, ...
    j = tl.arange(0, PER_WORD)
    nibble = (packed[:, None] >> ((j // 2) * 8 + (1 - j % 2) * 4)[None, :]) & 0xF
    values = tl.gather(tl.load(table + tl.arange(0, 16)), nibble.reshape(WORDS * PER_WORD), 0)
    weights = values.reshape(WORDS, PER_WORD) * scale[:, None]
    element = word[:, None] * PER_WORD + j[None, :]
    tl.store(out + element, cast(weights, out.dtype.element_ty), mask=element < elements)


@triton.jit
def _over_absmax(x):
    """Rows of ``x`` times one over their largest magnitude, and that (R,); rows with a NaN become NaN."""
    broken = tl.max((x != x).to(tl.int32), 1) != 0  # a maximum would pass over a NaN
    absmax = tl.where(broken, float("nan"), tl.max(tl.where(x == x, tl.abs(x), 0.0), 1))
    divisor = tl.maximum(absmax, 1e-38).to(tl.float32)  # a constant that is subnormal in fp32 is fp64 to Triton
    reciprocal = tl.where(broken, float("nan"), tl.div_rn(1.0, divisor))
    return x * reciprocal[:, None], absmax


@triton.jit
def _above(x, midpoints):
    """How many of the 15 ascending numbers x lies above, four comparisons deep; a NaN is above all. int32."""
    m0, m1, m2, m3 = tl.load(midpoints), tl.load(midpoints + 1), tl.load(midpoints + 2), tl.load(midpoints + 3)
    m4, m5, m6, m7 = tl.load(midpoints + 4), tl.load(midpoints + 5), tl.load(midpoints + 6), tl.load(midpoints + 7)
    m8, m9, m10, m11 = tl.load(midpoints + 8), tl.load(midpoints + 9), tl.load(midpoints + 10), tl.load(midpoints + 11)
    m12, m13, m14 = tl.load(midpoints + 12), tl.load(midpoints + 13), tl.load(midpoints + 14)
    a = ~(x <= m7)
    b = ~(x <= tl.where(a, m11, m3))
    c = ~(x <= tl.where(a, tl.where(b, m13, m9), tl.where(b, m5, m1)))
    low = tl.where(b, tl.where(c, m6, m4), tl.where(c, m2, m0))
    high = tl.where(b, tl.where(c, m14, m12), tl.where(c, m10, m8))
    d = ~(x <= tl.where(a, high, low))
    return tl.where(a, 8, 0) + tl.where(b, 4, 0) + tl.where(c, 2, 0) + tl.where(d, 1, 0)


@triton.jit
def _quantize_kernel(
    x, midpoints, codes, absmax, elements,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ZERO: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """ROWS blocks to a byte for two elements, the first of them in the upper half."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (element < elements) | EVEN  # a mask known to be true leaves wide stores
    scaled, largest = _over_absmax(tl.load(x + element, mask=inside, other=0.0).to(tl.float32))
    tl.store(absmax + block, largest, mask=block * BLOCK < elements)
    code = tl.where(inside, _above(scaled, midpoints), ZERO)
    upper, lower = tl.split(code.reshape(ROWS, BLOCK // 2, 2))
    byte = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(codes + byte, (upper * 16 + lower).to(tl.uint8), mask=(byte * 2 < elements) | EVEN)


@triton.jit
def _quantize_absmax_kernel(
    absmax, offset, points, midpoints, codes, nested_absmax, nested_code, blocks,
    ROWS: tl.constexpr, NESTED_BLOCK: tl.constexpr,
):  # fmt: skip
    """``absmax - offset``, ROWS blocks of NESTED_BLOCK, to the nearest entries of the signed 8-bit map, copied too."""
    if tl.program_id(0) == 0:
        entry = tl.arange(0, 256)
        tl.store(nested_code + entry, tl.load(points + entry))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    element = row[:, None] * NESTED_BLOCK + tl.arange(0, NESTED_BLOCK)[None, :]
    inside = element < blocks
    centred = tl.load(absmax + element, mask=inside, other=0.0) - tl.load(offset)
    scaled, largest = _over_absmax(tl.where(inside, centred, 0.0))
    tl.store(nested_absmax + row, largest, mask=row * NESTED_BLOCK < blocks)
    tl.store(codes + element, nearest(scaled, midpoints, True).to(tl.uint8), mask=inside)


@whole
def dequantize(w: NF4, *, out: Tensor | None = None) -> Tensor:
    """(M, C) in ``w.dtype``, or written into a contiguous ``out`` (rows of a larger buffer) and returned.

    Raises ValueError when the tensors of ``w`` do not fit its shape or lie on different devices.
    """
    if backend.resolve(w.codes) == "triton":
        return _dequantize(w, ABSENT if out is None else out)
    check("dequantize", w)
    dense = backend.reference("nf4.dequantize")(w)
    return dense if out is None else out.copy_(dense)


@prepared
def _dequantize(w: NF4, out: Tensor | Any) -> Tensor:
    check("dequantize", w)
    if out is ABSENT:
        out = torch.empty(w.shape, dtype=w.dtype, device=w.codes.device)
    elif out.shape != w.shape or out.dtype != w.dtype or not out.is_contiguous():
        raise ValueError(
            f"dequantize: out is {out.dtype} {tuple(out.shape)}, strides {out.stride()}; "
            f"expected contiguous {w.dtype} {tuple(w.shape)}"
        )
    elements = math.prod(w.shape)
    codes = w.codes.reshape(-1)
    whole_words = elements % 8 == 0 and device.aligned(codes, 4) and codes.storage_offset() % 4 == 0
    per_word = 8 if whole_words else 2
    nested = w.nested or None
    device.launch(
        _dequantize_kernel,
        (device.cdiv(elements, _WORDS * per_word),),
        codes.view(torch.int32) if whole_words else codes,
        w.absmax,
        nested and nested.absmax_P,
        nested and nested.code_256,
        nested and nested.offset,
        table(codes.device),
        out,
        elements,
        WORDS=_WORDS,
        PER_WORD=per_word,
        EVEN=elements % (_WORDS * per_word) == 0,
        BLOCK=w.block,
        NESTED_BLOCK=NESTED_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def rows(w: NF4, start: int, stop: int) -> NF4:
    """Rows [start, stop) of ``w``, as views. Raises ValueError where one of them shares a block with another row."""
    m, c = w.shape
    unit = w.block * (1 if w.nested is ABSENT else NESTED_BLOCK)
    if start * c % unit or (stop * c % unit and stop != m):
        raise ValueError(f"nf4.rows: rows {start} to {stop} of {w.shape} begin or end in a block of {unit} elements")
    first, last = start * c, stop * c
    nested = w.nested
    if nested is not ABSENT:
        nested = dataclasses.replace(nested, absmax_P=nested.absmax_P[first // unit : device.cdiv(last, unit)])
    return dataclasses.replace(
        w, codes=w.codes.reshape(-1)[first // 2 : device.cdiv(last, 2)],
        absmax=w.absmax[first // w.block : device.cdiv(last, w.block)], nested=nested, shape=(stop - start, c),
    )  # fmt: skip


def gather(w: NF4, rows_N: Tensor) -> NF4:
    """Rows ``rows_N`` of ``w``, as a matrix of their own whose absmax is decoded; NaN for a row outside ``w``.

    Raises ValueError where a row of ``w`` shares a block with another one.
    """
    (m, c), block = w.shape, w.block
    if c % block:
        raise ValueError(f"nf4.gather: rows of {w.shape} share blocks of {block} elements, expected whole blocks")
    inside = (rows_N >= 0) & (rows_N < m)
    rows = torch.where(inside, rows_N, 0).long()
    codes = w.codes.view(m, c // 2).index_select(0, rows).view(-1)
    at = (rows[:, None] * (c // block) + torch.arange(c // block, device=rows.device)).view(-1)
    absmax = w.absmax.index_select(0, at)
    if w.nested is not ABSENT:
        absmax = w.nested.code_256.index_select(0, absmax.int())
        absmax = absmax * w.nested.absmax_P.index_select(0, at // NESTED_BLOCK)
        absmax = absmax + w.nested.offset  # a second rounding, as bitsandbytes has it
    absmax = torch.where(inside.repeat_interleave(c // block), absmax, torch.nan)
    return dataclasses.replace(w, codes=codes, absmax=absmax, nested=ABSENT, shape=(rows_N.shape[0], c))


@whole
def quantize(t_MC: Tensor, *, double_quant: bool = True, block: int = 64) -> NF4:
    """The nearest NF4 matrix: the table entry nearest to ``x * (1 / absmax)``, absmax that of its ``block`` elements.

    ``t_MC``: (M, C) fp16, bf16 or fp32, which is also what the result decodes to. A value on the midpoint of two
    entries takes the lower one. Same codes as bitsandbytes' portable backend wherever M·C is a multiple of ``block``
    (of 256 blocks, if ``double_quant``): that divides by absmax in its last ragged block, this multiplies by the
    reciprocal, as bitsandbytes' CUDA backend does.
    Raises ValueError for another shape, dtype or block size.
    """
    if backend.resolve(t_MC) == "triton":
        return _quantize(t_MC, double_quant=double_quant, block=block)
    _check_quantize(t_MC, block)
    return backend.reference("nf4.quantize")(t_MC, double_quant=double_quant, block=block)


def _check_quantize(t_MC: Tensor, block: int) -> None:
    if t_MC.ndim != 2:
        raise ValueError(f"quantize: t has shape {tuple(t_MC.shape)}, expected (M, C)")
    check_dtype("quantize", "t", t_MC)
    if block not in BLOCKS:
        raise ValueError(f"quantize: block = {block}, expected one of {BLOCKS}")


@prepared
def _quantize(t_MC: Tensor, *, double_quant: bool, block: int) -> NF4:
    _check_quantize(t_MC, block)
    where, elements = t_MC.device, t_MC.numel()
    blocks = device.cdiv(elements, block)
    absmax = torch.empty(blocks, dtype=torch.float32, device=where)
    codes = torch.empty((elements + 1) // 2, dtype=torch.uint8, device=where)
    rows = max(1, _QUANTIZED // block)
    device.launch(
        _quantize_kernel, (device.cdiv(blocks, rows),), t_MC.reshape(-1), _midpoints(where), codes, absmax, elements,
        ROWS=rows, BLOCK=block, ZERO=TABLE.index(0.0), EVEN=elements % (rows * block) == 0,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    nested = ABSENT
    if double_quant:
        offset = absmax.mean()
        q = torch.empty(blocks, dtype=torch.uint8, device=where)
        nested_absmax = torch.empty(device.cdiv(blocks, NESTED_BLOCK), dtype=torch.float32, device=where)
        code_256 = torch.empty(256, dtype=torch.float32, device=where)
        grid = (max(1, device.cdiv(blocks, 4 * NESTED_BLOCK)),)  # the map is copied of no blocks too
        device.launch(
            _quantize_absmax_kernel, grid, absmax, offset, *tables(where, True), q, nested_absmax, code_256, blocks,
            ROWS=4, NESTED_BLOCK=NESTED_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        absmax, nested = q, Nested(absmax_P=nested_absmax, code_256=code_256, offset=offset)
    return NF4(
        codes=codes, absmax=absmax, nested=nested, shape=(t_MC.shape[0], t_MC.shape[1]), dtype=t_MC.dtype, block=block
    )


def cost(w: NF4) -> Cost:
    """Dequantising ``w``: codes and absmax read once, the dense matrix written once; one FLOP per element. The other
    way round the same is written and read."""
    elements = math.prod(w.shape)
    blocks = -(-elements // w.block)
    statistics = 4 * blocks if w.nested is ABSENT else blocks + 4 * -(-blocks // NESTED_BLOCK)
    return Cost(bytes=(elements + 1) // 2 + statistics + elements * w.dtype.itemsize, flops=elements)


@kept
def table(where: torch.device) -> Tensor:
    """The 16 entries, (16,) fp32."""
    return torch.tensor(TABLE, dtype=torch.float32, device=where)


@kept
def _midpoints(where: torch.device) -> Tensor:
    """Between neighbours of the table, (15,) fp32, rounded there."""
    entries = torch.tensor(TABLE, dtype=torch.float32)
    return ((entries[:-1] + entries[1:]) / 2).to(where)


def check(op: str, w: NF4) -> None:
    """Raises ValueError when the tensors of ``w`` do not fit its shape or lie on different devices."""
    if w.block not in BLOCKS:
        raise ValueError(f"{op}: block = {w.block}, expected one of {BLOCKS}")
    elements = math.prod(w.shape)
    blocks = -(-elements // w.block)
    wanted = [("codes", w.codes, (elements + 1) // 2, torch.uint8)]
    if w.nested is ABSENT:
        wanted += [("absmax", w.absmax, blocks, torch.float32)]
    else:
        wanted += [
            ("absmax", w.absmax, blocks, torch.uint8),
            ("nested.absmax_P", w.nested.absmax_P, -(-blocks // NESTED_BLOCK), torch.float32),
            ("nested.code_256", w.nested.code_256, 256, torch.float32),
            ("nested.offset", w.nested.offset, 1, torch.float32),
        ]
    for name, tensor, numel, dtype in wanted:
        if tensor.numel() != numel or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} is {tensor.dtype} {tuple(tensor.shape)}, expected contiguous {dtype} "
                f"with {numel} elements for shape {tuple(w.shape)} in blocks of {w.block}"
            )
        check_device(op, name, tensor, "codes", w.codes.device)
