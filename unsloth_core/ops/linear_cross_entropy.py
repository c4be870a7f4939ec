"""Sum of the cross-entropies of ``x @ wᵀ``, without the (N, V) logits: a chunk of tokens at a time.

With z = x · wᵀ and dz_t the gradient of token t's loss (formulas: ``ops/cross_entropy.py``)::

    loss = Σ_t loss_t(z_t, target_t)        dx = g · dz · w        dw = g · dzᵀ · x

The loss is one number, so its cotangent g is one number: forward computes both gradients at g = 1 while a
chunk's logits exist (one kernel turns them into dz in place), and backward only scales by g, which stays on
the device. No logits are kept or computed twice: 2 products of 2·N·V·D operations with a frozen head, 3 with
a trainable one, 1 when nothing needs a gradient.

``rows`` picks the rows of x that carry a target, so ignored tokens cost nothing. Rows are gathered chunk by
chunk, and dx is scattered into zeros: each real row appears at most once, so there is nothing to add up.

Chunks are a function of the shapes and of ``chunk_logits`` alone: by default about 2²⁸ logits (512 MiB in bf16), at
least 4096 tokens with a trainable head, so that reading and writing the fp32 dw once per chunk hides behind its
product. The buffer's rows are padded to 16 elements, so every row is loaded 16 bytes at a time whatever V is.

Memory with a frozen head, beyond what there was before the call: a chunk's logits and dx at g = 1 in forward, dx at
g = 1 and dx in backward, never all of them. For 8192 tokens, V 128256, D 4096 in bf16::

    chunk_logits    tokens a chunk    logits       dx        forward       backward
    None (2²⁸)      2048              501 MiB      64 MiB    565 MiB       128 MiB
    2²⁶             512               125.3 MiB    64 MiB    189.3 MiB     128 MiB

(and 4 bytes per token; with ``rows``, a chunk of x on top: 4 MiB at 512 tokens). The low-memory setting is therefore
``chunk_logits=2**26``. Its price: w is read 32 times instead of 8, and dz · w of 512 tokens has only 64 tiles of
128 × 256 for the 132 multiprocessors of an H100, unless cuBLAS splits the sum over V.

A frozen head may be NF4, or a tensor on the host (pinned), which is what a small GPU has room for. It is used
HEAD_ROWS rows at a time: decoded, or copied while the block before is multiplied, once for a chunk's logits and once
for its dx, which is then summed over blocks in fp32 and rounded once.

Residuals: dx at g = 1 for the M target rows in x's dtype (M · D elements), dw at g = 1 (V · D: fp32 if summed
over several chunks, else w's dtype), ``rows`` and ``w`` by reference, and a 0-byte tensor that carries N.
Dtypes: x and w alike, fp16, bf16 or fp32. Logits and dz are rounded to it, as in PyTorch; losses, their sum
and dw over chunks are fp32; 16-bit dx is rounded once more than PyTorch's (before g and after). The sum over
tokens has a fixed order. Products are cuBLAS's (``torch.mm``): fp32 ones are exact unless the process allows tf32.
Bytes, besides x, w and the gradients: 4 or 5 passes over a chunk's logits. Unfused: 7 over (N, V).
Limits: w is a Tensor or NF4 (no adapted head); the last stride of x and w is 1.

Source: the gradient computed in forward, over chunks of tokens, is Liger Kernel's (arXiv 2410.10989).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import offload, tree
from ..autodiff import custom_vjp
from ..cost import Cost
from ..device import cdiv, launch, next_power_of_2
from ..tree import ABSENT
from ..weights import NF4, Head
from . import nf4
from .checks import check_device, check_dtype
from .cross_entropy import check_options, check_targets, forward_pass, total
from .language import cast
from .logits_row import pointer, pointer_and_stride

CHUNK_LOGITS = 2**28
TRAINABLE_ROWS = 4096
HEAD_ROWS = 8192  # a block of a head that is not a matrix on the device; of any even width whole blocks of NF4


def chunk_rows(M: int, V: int, trainable: bool, chunk_logits: int | None = None) -> int:
    """Tokens per chunk: M shared out evenly over chunks of at most (the power of two nearest) ``chunk_logits`` / V.

    None: CHUNK_LOGITS, which is 2048 for V = 128256 and 1024 for V = 262208; with a trainable head at least
    TRAINABLE_ROWS.
    """
    most = 1 << max(0, round(math.log2((chunk_logits or CHUNK_LOGITS) / V)))
    if trainable and chunk_logits is None:
        most = max(most, TRAINABLE_ROWS)
    even = cdiv(M, max(1, cdiv(M, most)))
    return min(most, M, cdiv(even, 128) * 128)


@triton.jit
def _gather_kernel(x_ptr, rows_ptr, out_ptr, N, D, stride, rows_stride, BLOCK: tl.constexpr):
    """out[i] = x[rows[i]], and 0 where rows[i] is not a row of x."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + i * rows_stride).to(tl.int64)
    found = tl.where((row >= 0) & (row < N), D, 0)
    x = tl.load(x_ptr + row * stride + at, mask=at < found, other=0.0)
    tl.store(out_ptr + i * D + at, x, mask=at < D)


@triton.jit
def _scale_kernel(src_ptr, g_ptr, rows_ptr, out_ptr, N, D, rows_stride, BLOCK: tl.constexpr):
    """out[rows[i]] = g · src[i], where rows[i] is a row of out (``rows_ptr`` None: i itself; ``g_ptr`` None: 1)."""
    i = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = i
    found = D
    if rows_ptr is not None:
        row = tl.load(rows_ptr + i * rows_stride).to(tl.int64)
        found = tl.where((row >= 0) & (row < N), D, 0)
    y = tl.load(src_ptr + i * D + at, mask=at < found, other=0.0).to(tl.float32)
    if g_ptr is not None:
        y = y * tl.load(g_ptr).to(tl.float32)
    tl.store(out_ptr + row * D + at, cast(y, out_ptr.dtype.element_ty), mask=at < found)


def by_rows(M: int, D: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and launch parameters of a kernel that walks M rows of D elements."""
    BLOCK = min(4096, next_power_of_2(D))
    return (M, cdiv(D, BLOCK)), {
        "BLOCK": BLOCK,
        "num_warps": min(8, max(1, BLOCK // 512)),
        "enable_fp_fusion": False,
    }


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a · b (+ out), summed in fp32; ``out`` may be fp32 for 16-bit operands."""
    options: dict[str, Any] = {}
    if out.dtype != a.dtype:
        if a.is_cuda:
            options["out_dtype"] = out.dtype
        else:
            a, b = a.to(out.dtype), b.to(out.dtype)
    if add:
        torch.addmm(out, a, b, out=out, **options)
    else:
        torch.mm(a, b, out=out, **options)


def scaled(src: Tensor, g: Any, out: Tensor, rows: Any = ABSENT) -> Tensor:
    """``g · src`` (g 0-d, or ABSENT for 1) row by row into ``out``, at ``rows`` if given."""
    grid, options = by_rows(*src.shape)
    where, stride = pointer_and_stride(rows)
    launch(_scale_kernel, grid, src, pointer(g), where, out, out.shape[0], src.shape[1], stride, **options)
    return out


def head_blocks(w: Any, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``(rows, those rows of w as a matrix beside like)``, all in one where w is such a matrix."""
    if isinstance(w, NF4):
        V, D = w.shape
        step = HEAD_ROWS if HEAD_ROWS * D % (w.block * nf4.NESTED_BLOCK) == 0 else w.block * nf4.NESTED_BLOCK
        for start in range(0, V, step):
            yield slice(start, min(V, start + step)), nf4.dequantize(nf4.rows(w, start, min(V, start + step)))
    elif w.device != like.device:
        yield from offload.blocks(w, HEAD_ROWS, like.device)
    else:
        yield slice(0, w.shape[0]), w


def times_head(z: Tensor, w: Any, out: Tensor) -> None:
    """out = z · w."""
    if isinstance(w, Tensor) and w.device == z.device:
        product(z, w, out)
        return
    total = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    for part, block in head_blocks(w, z):
        product(z[:, part], block, total, add=part.start > 0)
    out.copy_(total)


def chunks_of_logits(
    x: Tensor, w: Any, rows: Any, M: int, chunk: int
) -> Iterator[tuple[slice, Any, Tensor, Tensor]]:
    """``(part, rows[part], x of those rows, its logits)``, ``chunk`` of the M target rows at a time.

    The logits are those of this chunk only until the next one is asked for.
    """
    (N, D), V = x.shape, w.shape[0]
    logits = torch.empty(chunk, cdiv(V, 16) * 16, dtype=x.dtype, device=x.device)
    for start in range(0, M, max(1, chunk)):
        part = slice(start, min(M, start + chunk))
        count = part.stop - start
        if rows is ABSENT:
            rows_part, x_part = ABSENT, x[part]
        else:
            rows_part, x_part = rows[part], torch.empty(count, D, dtype=x.dtype, device=x.device)
            grid, options = by_rows(count, D)
            launch(_gather_kernel, grid, x, rows_part, x_part, N, D, x.stride(0), rows.stride(0), **options)
        z = logits[:count, :V]
        for columns, block in head_blocks(w, x):
            product(x_part, block.t(), z[:, columns])
        yield part, rows_part, x_part, z


def check_linear(
    op: str, x: Tensor, w: Any, targets: Tensor, rows: Any, chunk_logits: int | None, *, away: bool = False
) -> None:
    """Raises ValueError unless x (N, D), w (V, D), targets (M,) and rows (M,), or ABSENT where M = N, fit together.
    ``away``: w may be pinned on the host."""
    for name, t, letters in (("x", x, "(N, D)"), ("w", w, "(V, D)")):
        if len(t.shape) != 2:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {letters}")
    if w.shape[0] == 0 or w.shape[1] != x.shape[1] or x.shape[1] == 0:
        raise ValueError(f"{op}: w has shape {tuple(w.shape)}, expected (V, D) with V > 0 and D = {x.shape[1]} > 0")
    if rows is ABSENT:
        check_targets(op, targets, "N", x.shape[0], "x", x.device)
    else:
        if targets.ndim != 1:
            raise ValueError(f"{op}: targets has shape {tuple(targets.shape)}, expected (M,)")
        check_targets(op, targets, "M", targets.shape[0], "x", x.device)
        if rows.shape != targets.shape:
            raise ValueError(f"{op}: rows has shape {tuple(rows.shape)}, expected (M,) = ({targets.shape[0]},)")
        if rows.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{op}: rows has dtype {rows.dtype}, expected torch.int64 or torch.int32")
        check_device(op, "rows", rows, "x", x.device)
    if w.dtype != x.dtype:
        raise ValueError(f"{op}: w has dtype {w.dtype}, expected that of x, {x.dtype}")
    if chunk_logits is not None and not chunk_logits >= 1:
        raise ValueError(f"{op}: chunk_logits is {chunk_logits}, expected a positive number or None")
    check_dtype(op, "x", x)
    if isinstance(w, NF4):
        nf4.check(op, w)
        check_device(op, "w", w.codes, "x", x.device)
    elif not (away and w.is_cpu and (x.is_meta or (x.is_cuda and w.is_pinned()))):
        check_device(op, "w", w, "x", x.device)
    for name, t in (("x", x), ("w", w)):
        if isinstance(t, Tensor) and t.shape[1] > 1 and t.shape[0] > 0 and t.stride(1) != 1 and not x.is_meta:
            raise ValueError(f"{op}: {name} has strides {t.stride()}, expected a last stride of 1")


def check_head(op: str, x: Tensor, w: Head, needs: Any) -> bool:
    """Whether w wants a gradient. Raises NotImplementedError if it cannot have one."""
    trainable = tree.any(needs)
    if trainable and (isinstance(w, NF4) or w.device != x.device):
        raise NotImplementedError(f"{op}: no gradient for a w that is NF4 or on another device; detach it")
    return trainable


def linear_cross_entropy_fwd(
    x_ND: Tensor,
    w_VD: Head,
    targets_M: Tensor,
    rows_M: Any = ABSENT,
    *,
    needs: tuple[Any, ...],
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_logits: int | None = None,
) -> tuple[Tensor, Any]:
    """x (N, D), w (V, D) Tensor or NF4, targets (M,), rows (M,) or ABSENT (M = N) -> the sum of the losses, fp32, 0-d.

    ``targets[i]`` belongs to row ``rows[i]`` of x. An entry of ``rows`` equal to N is padding; others appear
    at most once. Targets outside [0, V), and rows outside [0, N], make the sum NaN. ``chunk_logits``: about how many
    logits exist at a time; less memory for more time, and the same result but for the order of sums over tokens.
    Raises ValueError for other shapes, dtypes, devices, strides or options, TypeError for another weight node,
    NotImplementedError for the gradient of a head that is NF4 or on the host.
    """
    trainable = check_head("linear_cross_entropy", x_ND, w_VD, needs[1])
    check_linear("linear_cross_entropy", x_ND, w_VD, targets_M, rows_M, chunk_logits, away=True)
    check_options("linear_cross_entropy", label_smoothing, z_loss, softcap)
    (N, D), V, M = x_ND.shape, w_VD.shape[0], targets_M.shape[0]
    need_x, need_w = needs[0], trainable
    chunk = chunk_rows(M, V, need_w, chunk_logits)

    def empty(*sizes: int, dtype: torch.dtype = x_ND.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=x_ND.device)

    losses = empty(M, dtype=torch.float32)
    x_grad = empty(M, D) if need_x else ABSENT
    w_grad = empty(V, D, dtype=torch.float32 if chunk < M else x_ND.dtype) if need_w else ABSENT
    if need_w and M == 0:
        w_grad.zero_()
    for part, rows, x, z in chunks_of_logits(x_ND, w_VD, rows_M, M, chunk):
        forward_pass(
            z, targets_M[part], losses[part], rows=rows, N=N, gradient=z if need_x or need_w else ABSENT,
            ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
        )  # fmt: skip
        if need_x:
            times_head(z, w_VD, x_grad[part])
        if need_w:
            product(z.t(), x, w_grad, add=part.start > 0)
    loss = total(losses)
    if not (need_x or need_w):
        return loss, ABSENT
    carries_N = ABSENT if rows_M is ABSENT else empty(N, 0)
    return loss, (x_grad, w_grad, rows_M, w_VD, carries_N)


def linear_cross_entropy_bwd(
    residuals: tuple[Any, ...],
    dloss: Tensor,
    *,
    needs: tuple[Any, ...],
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk_logits: int | None = None,
) -> tuple[Any, Any, Any, Any]:
    """dloss 0-d -> dx (N, D) and dw (V, D), in the dtypes of x and w."""
    x_grad, w_grad, rows, w, carries_N = residuals
    dx = dw = ABSENT
    if needs[0]:
        if rows is ABSENT:
            dx = scaled(x_grad, dloss, torch.empty_like(x_grad))
        else:
            dx = scaled(x_grad, dloss, x_grad.new_zeros(carries_N.shape[0], x_grad.shape[1]), rows)
    if tree.any(needs[1]):
        dw = scaled(w_grad, dloss, torch.empty(w.shape, dtype=w.dtype, device=w.device))
    return dx, dw, ABSENT, ABSENT


linear_cross_entropy = custom_vjp(linear_cross_entropy_fwd, linear_cross_entropy_bwd)


def cost(N: int, D: int, V: int, M: int, itemsize: int, *, dx: bool = False, dw: bool = False) -> Cost:
    """Forward and backward of M target rows together: x and w read, the gradients that are wanted written."""
    moved = (M * D + V * D + (N * D if dx else 0) + (V * D if dw else 0)) * itemsize
    return Cost(bytes=moved + 16 * M, flops=2 * M * V * D * (1 + dx + dw))
