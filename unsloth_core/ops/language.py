"""What kernels share: rounding stores and tensor-core products that mean the same compiled and interpreted.

Triton's CPU interpreter keeps bfloat16 as bit patterns: arithmetic on it is silently wrong, and a cast to it truncates
(triton-lang/triton #4972, #10945). Kernels therefore upcast right after every load and come through here to go back.
"""

import triton
import triton.language as tl

from .. import device

INTERPRET = tl.constexpr(device.interpreting())


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Round fp32 ``x`` to ``dtype``, to nearest, ties to even. Interpreted bf16 is rounded by its bits (NaN kept)."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40
        return tl.where(x != x, quiet_nan, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """``acc + a @ b`` with fp32 accumulation; fp32 operands are multiplied exactly (no tf32)."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)
