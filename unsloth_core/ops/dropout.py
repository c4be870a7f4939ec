"""Dropout whose mask is never stored: a function of a key and of an element's place.

Formula, for element i of x, flattened, and its random word u_i of 32 bits:

    y_i = x_i / (1 - p) where u_i >= p·2^32, else 0            p = 0: y = x          p = 1: y = 0
Backward is the same call with dy:
    dx_i = dy_i / (1 - p) where u_i >= p·2^32, else 0

The words are Philox4x32-10's, four for each counter: u_i is word i % 4 of counter i // 4. The first number of the
key is Philox's key, the second the upper half of its counter. Strides, shapes and launches have no part in it: a
key and a place always give the same word, here and in the reference, and results are equal bit for bit.
A dropped element is 0 whatever it was, NaN and infinities included.

Residuals: the key (an argument, 16 bytes).
Dtypes: x fp16, bf16 or fp32, y and dx in x's dtype, the product in fp32, rounded once; key int64.
Bytes moved per element of 2 bytes: forward 4, backward 4 (with a stored mask 5 and 5, and 1 kept). For 8192 x 4096
elements in bf16 at 3.0 TB/s that is a floor of 45 µs.
Limits: x and dy of any strides that two row strides and a column stride can address (a cotangent beyond that is
copied); strided ones fewer than 2^30 rows and columns, contiguous ones any number of elements.

How: a thread makes the words of the neighbours that it loads, so that nothing is exchanged. Compiled for sm_90 by
Triton 3.6.0, in bf16: 20 instructions per element (half of what is issued while it travels), four of them products
of 64 bits; 40 registers, no spills, loads and stores of 16 bytes. Where x is strided, or 16 does not divide the
number of elements, loads are 2 bytes wide and the instructions twice as many.

Sources of ideas: Philox, Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011); the seed as the
residual, Triton's tutorial on low-memory dropout.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import cdiv, launch
from ..prepared import prepared
from ..tree import ABSENT
from .checks import check_device, check_dtype
from .language import cast
from .rms_norm import MAX_ROWS, row_offset, row_strides

_BLOCK = 4096  # elements of a program

# ---------------------------------------------------------------------------- kernels


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10. Products of 64 bits are one instruction; tl.philox takes their halves from two."""
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = b.to(tl.uint32)
        c3 = a.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _words(counter, key_ptr, key_stride):
    """Four words for each counter."""
    low, high = tl.load(key_ptr), tl.load(key_ptr + key_stride)
    return _philox(
        counter.to(tl.uint32), (counter >> 32).to(tl.uint32), high.to(tl.uint32), (high >> 32).to(tl.uint32),
        low.to(tl.uint32), (low >> 32).to(tl.uint32),
    )  # fmt: skip


@triton.jit
def random_words(first, key_ptr, key_stride, BLOCK: tl.constexpr, VEC: tl.constexpr):
    """The words of BLOCK elements from ``first`` on; a thread makes those of the VEC neighbours that it loads."""
    counter = first // 4 + tl.arange(0, BLOCK // VEC) * (VEC // 4)
    w0, w1, w2, w3 = _words(counter, key_ptr, key_stride)
    if VEC == 8:
        v0, v1, v2, v3 = _words(counter + 1, key_ptr, key_stride)
        w0, w1, w2, w3 = tl.join(w0, v0), tl.join(w1, v1), tl.join(w2, v2), tl.join(w3, v3)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])


@triton.jit
def _dropout(
    x_ptr, key_ptr, y_ptr, n, D, inner, outer_stride, inner_stride, col_stride, key_stride,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    if FLAT:
        x_ptr += at
    else:
        beside = (first % D).to(tl.int32) + tl.arange(0, BLOCK)  # of int32: a division of int64 is slow
        row = (first // D).to(tl.int32) + beside // D
        x_ptr += row_offset(row, inner, outer_stride, inner_stride) + (beside % D).to(tl.int64) * col_stride
    x = tl.load(x_ptr, at < n, other=0.0).to(tl.float32)
    keep = random_words(first, key_ptr, key_stride, BLOCK, VEC) >= THRESHOLD
    y = tl.where(keep, x * SCALE, 0.0)
    tl.store(y_ptr + at, cast(y, y_ptr.dtype.element_ty), at < n)


def _apply(x: Tensor, key: Tensor, p: float, inner: int, rows: tuple[int, int]) -> Tensor:
    """Dropout of x whose rows lie as :func:`row_strides` says; new and contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    threshold = round(p * 2**32)
    if threshold == 2**32:  # no word is that large
        return y.zero_()
    flat = x.is_contiguous()
    D, col_stride = (1, 1) if flat else (x.shape[-1], x.stride(-1))
    launch(
        _dropout, (cdiv(x.numel(), _BLOCK),), x, key, y, x.numel(), D, inner, *rows, col_stride, key.stride(0),
        THRESHOLD=threshold, SCALE=1 / (1 - p), FLAT=flat, BLOCK=_BLOCK, VEC=16 // x.element_size(),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y


# ---------------------------------------------------------------------------- op


@prepared
def dropout_fwd(x: Tensor, key: Tensor, *, needs: Any, p: float) -> tuple[Tensor, tuple[Any]]:
    """x of any shape, key (2,) int64 of :mod:`unsloth_core.random`, p in [0, 1] -> y like x, new and contiguous.

    A key is for one call: two calls with one key drop the same places. Raises ValueError for other dtypes, devices,
    keys, strides or p, NotImplementedError for 2^30 rows or columns of a strided x or more.
    """
    check_dtype("dropout", "x", x)
    if key.shape != (2,) or key.dtype != torch.int64:
        raise ValueError(f"dropout: key is {tuple(key.shape)} {key.dtype}, expected (2,) torch.int64 of random.key")
    check_device("dropout", "key", key, "x", x.device)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: p is {p}, expected 0 to 1")
    addressed = _addressed(x)
    if addressed is None:
        what = f"{tuple(x.shape)} strides {x.stride()}"
        raise ValueError(f"dropout: rows of x {what} need more than two strides; call .contiguous()")
    return _apply(x, key, p, *addressed), (key if needs[0] else ABSENT,)


@prepared
def dropout_bwd(residuals: tuple[Any], dy: Tensor, *, needs: Any, p: float) -> tuple[Any, Any]:
    """dy like y, of any strides -> dx, contiguous."""
    if not needs[0]:
        return ABSENT, ABSENT
    addressed = _addressed(dy)
    if addressed is None:
        dy, addressed = dy.contiguous(), (1, (0, 0))
    return _apply(dy, residuals[0], p, *addressed), ABSENT


def _addressed(x: Tensor) -> tuple[int, tuple[int, int]] | None:
    """``inner`` and the two row strides of x; None if two cannot reach its rows. A contiguous x needs none."""
    if x.is_contiguous():
        return 1, (0, 0)
    D = x.shape[-1]
    if max(D, x.numel() // D) >= MAX_ROWS:
        raise NotImplementedError(
            f"dropout: x has {x.numel() // D} rows of {D}, expected fewer than {MAX_ROWS} of both, or a contiguous x"
        )
    addressed = row_strides(x)
    return None if addressed is None else (addressed[0], addressed[1][0])


dropout = custom_vjp(dropout_fwd, dropout_bwd)


def cost(rows: int, D: int, itemsize: int) -> Cost:
    """Either direction: x read, y written. Philox's integer operations are not counted."""
    return Cost(bytes=2 * rows * D * itemsize, flops=rows * D)
