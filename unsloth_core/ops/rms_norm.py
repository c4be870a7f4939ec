"""RMSNorm, optionally added to a residual stream.

Formula, per row of D channels, with x̂ = x·rstd and rstd = (mean(x²) + eps)^-½:

    y  = x̂ ∘ (w + offset) (+ add)              offset is 1 for Gemma, whose stored weight is w - 1
Backward, with m = dy ∘ (w + offset):
    dx = rstd · (m - x̂ · mean(m ∘ x̂))          dw = Σ_rows dy ∘ x̂          dadd = dy

Residuals: x, w (arguments) and rstd, fp32, 4 bytes per row; nothing if only ``add`` wants a gradient.
Dtypes: x fp16, bf16 or fp32; y, dx and ``add`` in x's dtype; w in any of the three, dw in w's. Statistics,
sums and products are fp32. ``casting_mode="llama"`` rounds x̂ to x's dtype before the weight (Llama, Qwen,
Mistral, Phi), ``"gemma"`` rounds once, at the end; ``add`` joins before that one rounding. The rounding of x̂
counts as the identity in backward.
Bytes moved per element of 2 bytes: forward 4 (6 with ``add``; as two ops 10), backward 6.
Limits: last dimension of stride 1 (a cotangent may have any stride); leading dimensions that two strides can
address, such as the heads of a q-slice of qkv; fewer than 2^30 rows. A cotangent that two strides and a
column stride cannot address is copied.

How: rows of up to 64 KiB stay in registers, several rows per program when they are short; longer ones are
walked in blocks, the second walk hitting the L2 cache. The weight gradient is summed without atomics: a fixed
set of programs accumulates over its rows in fp32 registers and writes one partial row each, then a second
kernel adds the partial rows in order: the same bits in every run on one device.

Sources of ideas: RMSNorm, Zhang & Sennrich (arXiv 1910.07467); rstd as the residual and dw in two stages,
Triton's layer-norm tutorial; partial rows per program instead of locks, QuACK.
"""

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import capability, cdiv, launch, next_power_of_2, sms
from ..prepared import prepared
from ..tree import ABSENT
from .checks import check_device, check_dtype
from .language import cast

_CASTING_MODES = ("llama", "gemma")
MAX_ROWS = 2**30  # row numbers are int32 in the kernels; offsets are int64
_FORWARD_BYTES = 65536  # of a row of x that one program keeps in registers
BACKWARD_WIDTH = 16384  # channels: x and dy share the registers,
FUSED_WIDTH = 8192  # and here the running dw too
_STAGED_BYTES = 49152  # of shared memory for the tiles that a loop loads ahead, where any GPU has that
_WALK = 4096  # block in which longer rows are walked


# ---------------------------------------------------------------------------- kernels


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Offset of rows in a tensor whose leading dimensions form a grid (outer, inner); often inner = 1."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def scaled(x, rstd, w, offset: tl.constexpr, dtype: tl.constexpr, ROUND: tl.constexpr):
    """``x̂ ∘ (w + offset)`` in fp32, x̂ rounded to ``dtype`` on the way if ROUND."""
    x_hat = x * rstd
    if ROUND:
        x_hat = cast(x_hat, dtype).to(tl.float32)
    return x_hat * (w + offset)


@triton.jit
def _forward(
    x_ptr, w_ptr, add_ptr, y_ptr, rstd_ptr,
    rows, D, inner, x_outer, x_inner, add_outer, add_inner,
    eps: tl.constexpr, offset: tl.constexpr, ROUND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS whole rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < D)
    x = tl.load(x_ptr + row_offset(row, inner, x_outer, x_inner) + col, inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + col, col < D, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, row < rows)
    y = scaled(x, rstd, w, offset, x_ptr.dtype.element_ty, ROUND)
    if add_ptr is not None:
        add = tl.load(add_ptr + row_offset(row, inner, add_outer, add_inner) + col, inside, other=0.0)
        y += add.to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * D + col, cast(y, y_ptr.dtype.element_ty), inside)


@triton.jit
def _forward_long(
    x_ptr, w_ptr, add_ptr, y_ptr, rstd_ptr,
    D, inner, x_outer, x_inner, add_outer, add_inner,
    eps: tl.constexpr, offset: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, walked twice: sum of squares, then the result."""
    row = tl.program_id(0)
    x_ptr += row_offset(row, inner, x_outer, x_inner)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, col < D, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, col < D, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + col, col < D, other=0.0).to(tl.float32)
        y = scaled(x, rstd, w, offset, x_ptr.dtype.element_ty, ROUND)
        if add_ptr is not None:
            add = tl.load(add_ptr + row_offset(row, inner, add_outer, add_inner) + col, col < D, other=0.0)
            y += add.to(tl.float32)
        tl.store(y_ptr + row.to(tl.int64) * D + col, cast(y, y_ptr.dtype.element_ty), col < D)


@triton.jit
def _backward(
    x_ptr, w_ptr, rstd_ptr, dy_ptr, dh_ptr, dx_ptr, partial_ptr,
    rows, D, inner, x_outer, x_inner, dy_outer, dy_inner, dy_col, dh_outer, dh_inner, dh_col,
    offset: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of whole rows, every num_programs-th one; dx of each, and dw of all of them as one partial row.

    ``dh`` is a second cotangent that goes straight to x (the residual stream of add_rms_norm).
    """
    program = tl.program_id(0)
    col = tl.arange(0, BLOCK)[None, :]
    w = tl.load(w_ptr + col, col < D, other=0.0).to(tl.float32) + offset
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (col < D)
        x = tl.load(x_ptr + row_offset(row, inner, x_outer, x_inner) + col, inside, other=0.0).to(tl.float32)
        dy_offset = row_offset(row, inner, dy_outer, dy_inner) + col.to(tl.int64) * dy_col
        dy = tl.load(dy_ptr + dy_offset, inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, row < rows, other=0.0)
        x_hat = x * rstd
        m = dy * w
        dx = rstd * (m - x_hat * (tl.sum(m * x_hat, axis=1, keep_dims=True) / D))
        if dh_ptr is not None:
            dh_offset = row_offset(row, inner, dh_outer, dh_inner) + col.to(tl.int64) * dh_col
            dx += tl.load(dh_ptr + dh_offset, inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row.to(tl.int64) * D + col, cast(dx, dx_ptr.dtype.element_ty), inside)
        if partial_ptr is not None:
            dw += dy * x_hat
    if partial_ptr is not None:
        total = tl.sum(dw, axis=0, keep_dims=True)
        tl.store(partial_ptr + program.to(tl.int64) * D + col, cast(total, partial_ptr.dtype.element_ty), col < D)


@triton.jit
def _backward_long(
    x_ptr, w_ptr, rstd_ptr, dy_ptr, dh_ptr, dx_ptr,
    D, inner, x_outer, x_inner, dy_outer, dy_inner, dy_col, dh_outer, dh_inner, dh_col,
    offset: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of one row, walked twice: mean(m ∘ x̂), then the result. dw is :func:`_weight_partials`'s."""
    row = tl.program_id(0)
    x_ptr += row_offset(row, inner, x_outer, x_inner)
    dy_ptr += row_offset(row, inner, dy_outer, dy_inner)
    rstd = tl.load(rstd_ptr + row)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, col < D, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + col.to(tl.int64) * dy_col, col < D, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + col, col < D, other=0.0).to(tl.float32) + offset
        products += dy * w * (x * rstd)
    mean = tl.sum(products, axis=0) / D
    for start in range(0, D, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + col, col < D, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + col.to(tl.int64) * dy_col, col < D, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + col, col < D, other=0.0).to(tl.float32) + offset
        dx = rstd * (dy * w - x * rstd * mean)
        if dh_ptr is not None:
            dh_offset = row_offset(row, inner, dh_outer, dh_inner) + col.to(tl.int64) * dh_col
            dx += tl.load(dh_ptr + dh_offset, col < D, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row.to(tl.int64) * D + col, cast(dx, dx_ptr.dtype.element_ty), col < D)


@triton.jit
def _weight_partials(
    x_ptr, rstd_ptr, dy_ptr, partial_ptr,
    rows, D, inner, x_outer, x_inner, dy_outer, dy_inner, dy_col,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial rows of dw alone, a block of columns per program: no row is summed, so any D will do."""
    program = tl.program_id(1)
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (col < D)
        x = tl.load(x_ptr + row_offset(row, inner, x_outer, x_inner) + col, inside, other=0.0).to(tl.float32)
        dy_offset = row_offset(row, inner, dy_outer, dy_inner) + col.to(tl.int64) * dy_col
        dy = tl.load(dy_ptr + dy_offset, inside, other=0.0).to(tl.float32)
        dw += dy * (x * tl.load(rstd_ptr + row, row < rows, other=0.0))
    total = tl.sum(dw, axis=0, keep_dims=True)
    tl.store(partial_ptr + program.to(tl.int64) * D + col, cast(total, partial_ptr.dtype.element_ty), col < D)


@triton.jit
def _sum_partials(partial_ptr, out_ptr, P, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the P partial rows, always in the same order, rounded once to the weight's dtype."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, P, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial_ptr + row.to(tl.int64) * D + col, (row < P) & (col < D), other=0.0)
    out = tl.sum(total, axis=0, keep_dims=True)
    tl.store(out_ptr + col, cast(out, out_ptr.dtype.element_ty), col < D)


# ---------------------------------------------------------------------------- addressing of rows


def row_strides(*tensors: Tensor) -> tuple[int, tuple[tuple[int, int], ...]] | None:
    """How kernels reach the rows of tensors (..., D) of equal leading dimensions; None if two strides cannot.

    Returns ``inner`` and one ``(outer stride, inner stride)`` per tensor: row r lies at
    ``(r // inner) * outer + (r % inner) * inner_stride``. ``inner`` is 1 where one stride is enough for all.
    """
    if all(t.is_contiguous() for t in tensors):
        return 1, tuple((t.shape[-1], 0) for t in tensors)
    return _row_strides(tensors[0].shape[:-1], *[t.stride()[:-1] for t in tensors])


@functools.lru_cache(maxsize=256)
def _row_strides(
    sizes: tuple[int, ...], *strides: tuple[int, ...]
) -> tuple[int, tuple[tuple[int, int], ...]] | None:
    for split in range(len(sizes), -1, -1):
        outer = [_one_stride(sizes[:split], s[:split]) for s in strides]
        inner = [_one_stride(sizes[split:], s[split:]) for s in strides]
        if None not in outer and None not in inner:
            return math.prod(sizes[split:]), tuple(zip(outer, inner))  # type: ignore[return-value]
    return None


def _one_stride(sizes: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The stride that walks all these dimensions as one, or None."""
    single = expected = None
    for size, stride in zip(reversed(sizes), reversed(strides)):
        if size == 1:
            continue
        if single is None:
            single = stride
        elif stride != expected:
            return None
        expected = stride * size
    return 0 if single is None else single


def check_row_strides(op: str, **named: Tensor) -> tuple[int, tuple[tuple[int, int], ...]]:
    """:func:`row_strides` of arguments. Raises ValueError for a last stride other than 1, or too many."""
    addressed = row_strides(*named.values())
    for name, t in named.items():
        if t.stride(-1) != 1 and t.shape[-1] > 1 and not t.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {t.stride()}, expected a last stride of 1")
    if addressed is None:
        what = " and ".join(f"{name} {tuple(t.shape)} strides {t.stride()}" for name, t in named.items())
        raise ValueError(f"{op}: rows of {what} need more than two strides; call .contiguous()")
    return addressed


def cotangent_row_strides(
    x: Tensor, *cotangents: Tensor
) -> tuple[tuple[Tensor, ...], int, tuple[tuple[int, int], ...]]:
    """Cotangents (whatever strides autograd gave them), addressable together with the rows of ``x``.

    One that two strides and a column stride cannot reach is copied: the only case in which anything is.
    """
    addressed = row_strides(x, *cotangents)
    if addressed is None:
        cotangents = tuple(c.contiguous() for c in cotangents)
        addressed = row_strides(x, *cotangents)
        assert addressed is not None  # x was checked in forward, and contiguous rows follow any split
    return cotangents, *addressed


# ---------------------------------------------------------------------------- launch tables


def in_registers(x: Tensor) -> bool:
    """Whether a forward kernel can keep a whole row of ``x`` in registers."""
    return x.shape[-1] * x.element_size() <= _FORWARD_BYTES


@functools.cache
def whole_rows(D: int) -> tuple[int, int, int]:
    """(rows per program, block of columns, warps) of a kernel that keeps whole rows in registers."""
    block = next_power_of_2(D)
    rows = min(32, 4096 // block) if block <= 1024 else 1
    return rows, block, min(32, max(4, block // 512))


@functools.cache
def column_tile(D: int, narrowest: int) -> tuple[int, int]:
    """(rows, columns) of a tile of kernels that add up columns: narrow enough for many programs across."""
    block = min(512, max(narrowest, next_power_of_2(D) // 128))
    return 4096 // block, block


def partial_rows(x: Tensor, rows: int, ROWS: int, programs_per_sm: int, out: Tensor) -> Tensor:
    """Where programs leave their sums for dw, one row each; four tiles per program keep it small beside x. A single
    row is ``out`` itself, and nothing is left to add."""
    programs = min(cdiv(rows, 4 * ROWS), programs_per_sm * sms(x.device))
    if programs == 1:
        return out.view(1, -1)
    return torch.empty((programs, x.shape[-1]), dtype=torch.float32, device=x.device)


def stages(tile_bytes: int, where: torch.device | None = None) -> int:
    """Tiles of the loop in flight: up to two are loaded ahead, within the shared memory of any GPU. ``where`` a single
    program is to keep a multiprocessor busy: up to three, if the GPU has twice the memory."""
    if where is not None and capability(where) in ((8, 0), (9, 0), (10, 0)):
        return 1 + min(3, 2 * _STAGED_BYTES // tile_bytes)
    return 1 + min(2, _STAGED_BYTES // tile_bytes)


# ---------------------------------------------------------------------------- rules


def check_rows(op: str, x: Tensor, name: str = "", like_x: Any = ABSENT) -> None:
    """Raises ValueError unless x is (..., D) and ``like_x``, the argument ``name``, is like x."""
    shape, dtype, device = x.shape, x.dtype, x.device
    if not shape or shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(shape)}, expected (..., D) with D >= 1")
    check_dtype(op, "x", x)
    if like_x is not ABSENT:
        if like_x.shape != shape or like_x.dtype != dtype:
            got = f"{tuple(like_x.shape)} {like_x.dtype}"
            raise ValueError(f"{op}: {name} is {got}, expected x's {tuple(shape)} {dtype}")
        check_device(op, name, like_x, "x", device)
    if x.numel() // shape[-1] >= MAX_ROWS:
        raise NotImplementedError(f"{op}: x has {x.numel() // shape[-1]} rows, expected fewer than {MAX_ROWS}")


def check_channels(op: str, name: str, w: Tensor, x: Tensor) -> None:
    """Raises ValueError unless ``w``, the argument ``name``, has one number for each channel of x (..., D)."""
    D = x.shape[-1]
    if w.shape != (D,):
        raise ValueError(f"{op}: {name} has shape {tuple(w.shape)}, expected (D,) = ({D},)")
    if not w.is_contiguous():
        raise ValueError(f"{op}: {name} has stride {w.stride(0)}, expected 1")
    check_dtype(op, name, w)
    check_device(op, name, w, "x", x.device)


def check_norm(op: str, x: Tensor, w: Tensor, casting_mode: str, name: str = "", like_x: Any = ABSENT) -> None:
    """Raises ValueError unless x is (..., D), w is (D,), and ``like_x``, the argument ``name``, is like x."""
    check_rows(op, x, name, like_x)
    check_channels(op, "w", w, x)
    if casting_mode not in _CASTING_MODES:
        raise ValueError(f"{op}: casting_mode is {casting_mode!r}, expected one of {_CASTING_MODES}")


def sum_partials(partial: Tensor, out: Tensor) -> None:
    """Fill ``out`` (D,) with the sum of the fp32 rows of ``partial`` (P, D)."""
    P, D = partial.shape
    ROWS, BLOCK = column_tile(D, narrowest=32)
    launch(
        _sum_partials, (cdiv(D, BLOCK),), partial, out, P, D,
        ROWS=ROWS, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def norm_forward(
    x: Tensor, w: Tensor, add: Any, inner: int, x_rows: tuple[int, ...], add_rows: tuple[int, ...],
    differentiated: bool, eps: float, offset: float, casting_mode: str,
) -> tuple[Tensor, Any]:  # fmt: skip
    """``(y, rstd)`` of arguments that were checked; ``add`` may be None, rstd is None where nobody asks for it."""
    D = x.shape[-1]
    rows = x.numel() // D
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) if differentiated else None
    if in_registers(x):
        ROWS, BLOCK, warps = whole_rows(D)
        launch(
            _forward, (cdiv(rows, ROWS),), x, w, add, y, rstd, rows, D, inner, *x_rows, *add_rows,
            eps=eps, offset=offset, ROUND=casting_mode == "llama", ROWS=ROWS, BLOCK=BLOCK,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        launch(
            _forward_long, (rows,), x, w, add, y, rstd, D, inner, *x_rows, *add_rows,
            eps=eps, offset=offset, ROUND=casting_mode == "llama", BLOCK=_WALK,
            num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return y, rstd


def norm_backward(
    x: Tensor, w: Tensor, rstd: Tensor, dy: Tensor, dh: Any, *, needs_x: bool, needs_w: bool, offset: float
) -> tuple[Any, Any]:
    """``(dx (+ dh), dw)``, ABSENT where not needed. ``dh``: a further cotangent of x, or ABSENT."""
    D = x.shape[-1]
    rows = x.numel() // D
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else ABSENT
    dw = torch.empty(w.shape, dtype=w.dtype, device=w.device) if needs_w else ABSENT
    if rows == 0:
        return dx, dw.zero_() if needs_w else ABSENT
    extra = () if dh is ABSENT else (dh,)
    (dy, *extra), inner, strides = cotangent_row_strides(x, dy, *extra)
    x_rows, dy_rows = strides[0], (*strides[1], dy.stride(-1))
    dh, dh_rows = (extra[0], (*strides[2], extra[0].stride(-1))) if extra else (None, (0, 0, 1))
    fused, partial = needs_x and needs_w and D <= FUSED_WIDTH, None
    if fused:
        ROWS, BLOCK, warps = whole_rows(D)
        partial = partial_rows(x, rows, ROWS, programs_per_sm=1, out=dw)
        launch(
            _backward, (partial.shape[0],), x, w, rstd, dy, dh, dx, partial,
            rows, D, inner, *x_rows, *dy_rows, *dh_rows, offset=offset, ROWS=ROWS, BLOCK=BLOCK,
            STAGES=stages(ROWS * BLOCK * sum(t.element_size() for t in (x, dy, *extra)), x.device),
            num_warps=max(8, warps), enable_fp_fusion=True,
        )  # fmt: skip
    elif needs_w:
        ROWS, BLOCK = column_tile(D, narrowest=128)
        columns = cdiv(D, BLOCK)
        partial = partial_rows(x, rows, ROWS, programs_per_sm=cdiv(8, columns), out=dw)
        launch(
            _weight_partials, (columns, partial.shape[0]), x, rstd, dy, partial,
            rows, D, inner, *x_rows, *dy_rows, ROWS=ROWS, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    if partial is not None and partial.shape[0] > 1:
        sum_partials(partial, dw)
    if needs_x and not fused and D <= BACKWARD_WIDTH:
        ROWS, BLOCK, warps = whole_rows(D)
        launch(
            _backward, (cdiv(rows, ROWS),), x, w, rstd, dy, dh, dx, None,
            rows, D, inner, *x_rows, *dy_rows, *dh_rows, offset=offset, ROWS=ROWS, BLOCK=BLOCK, STAGES=1,
            num_warps=warps, enable_fp_fusion=True,
        )  # fmt: skip
    elif needs_x and not fused:
        launch(
            _backward_long, (rows,), x, w, rstd, dy, dh, dx, D, inner, *x_rows, *dy_rows, *dh_rows,
            offset=offset, BLOCK=_WALK, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, dw


# ---------------------------------------------------------------------------- op


@prepared
def rms_norm_fwd(
    x: Tensor,
    w: Tensor,
    add: Any = ABSENT,
    *,
    needs: Any,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Tensor, tuple[Any, ...]]:
    """x (..., D), w (D,), add (..., D) or ABSENT -> y (..., D) in x's dtype, new and contiguous.

    ``casting_mode`` "llama" or "gemma": where it rounds, see below. Raises ValueError for other shapes, dtypes,
    devices, strides or modes, NotImplementedError for 2^30 rows or more.
    """
    if add is ABSENT:
        check_norm("rms_norm", x, w, casting_mode)
        inner, (x_rows,) = check_row_strides("rms_norm", x=x)
        add, add_rows = None, (0, 0)
    else:
        check_norm("rms_norm", x, w, casting_mode, "add", add)
        inner, (x_rows, add_rows) = check_row_strides("rms_norm", x=x, add=add)
    differentiated = needs[0] or needs[1]
    y, rstd = norm_forward(x, w, add, inner, x_rows, add_rows, differentiated, eps, offset, casting_mode)
    return y, (x, w, rstd) if differentiated else (ABSENT, ABSENT, ABSENT)


@prepared
def rms_norm_bwd(
    residuals: tuple[Any, ...],
    dy: Tensor,
    *,
    needs: Any,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
) -> tuple[Any, Any, Any]:
    """dy like y, of any strides -> (dx, dw, dadd); dadd is dy itself."""
    x, w, rstd = residuals
    dx = dw = ABSENT
    if needs[0] or needs[1]:
        dx, dw = norm_backward(x, w, rstd, dy, ABSENT, needs_x=needs[0], needs_w=needs[1], offset=offset)
    return dx, dw, dy if needs[2] else ABSENT


rms_norm = custom_vjp(rms_norm_fwd, rms_norm_bwd)


def cost(rows: int, D: int, itemsize: int, *, add: bool = False, backward: bool = False) -> Cost:
    """Forward: x (and ``add``) read, y and rstd written. Backward, with dw: x and dy read, dx written."""
    n = rows * D
    if backward:
        return Cost(bytes=3 * n * itemsize + 4 * rows + 2 * D * itemsize, flops=11 * n)
    return Cost(bytes=(3 if add else 2) * n * itemsize + 4 * rows + D * itemsize, flops=(5 if add else 4) * n)
