"""Products with every weight node: dense, NF4, stacked, LoRA-adapted.

    y = x W^T + bias + add + u v^T        u = x a^T        a: the adapters' A_i below each other
    dx = dy W + t a                       t = dy v         v: scale_i B_i on the rows and ranks of part i, else 0
    dW = dy^T x      dA = t^T x           dB_i = scale_i dy_i^T u_i      dbias = sum_N dy      dadd = dy

x (..., C), W (M, C), bias (M,), add and y (..., M), a (R, C), v (M, R), u and t (N, R); R is the sum of the ranks.
``v`` is block-diagonal, so adapters on some parts of a stacked projection, with different ranks, are one more R-wide
step on the accumulator of one base product; bias and add join in the same epilogue. All adapters together cost one
skinny product forward (u) and two backward (t, dA), and one per part (dB).

Residuals: x if a dense weight or an adapter needs its gradient, and the weight node itself: arguments, 0 new bytes.
u, a and v are rebuilt in backward (2·N·C·R FLOPs against the 2·N·C·M of the product).
Dtypes: fp16, bf16, fp32. Sums are fp32, y has x's dtype. fp32 operands are multiplied exactly by the kernels; on a GPU
such products are cuBLAS's, exact too unless the process allows tf32 (``torch.set_float32_matmul_precision``). Dense
weights, bias and add have x's dtype; NF4 decodes to its own dtype and is cast to x's; adapters (fp32 leaves) are cast,
and their gradients leave the accumulator in the leaf's dtype, as dW does in W's.
Bytes: x, W, y once (add read once). Unfused, each of bias, LoRA and add reads and writes y once more, 4 B an element.
Transient: an NF4 weight is decoded once per call, M·C elements; a Stacked weight is gathered into one such buffer. For
at most 8 tokens without gradient of x, as in cached generation, NF4 is not decoded to memory: :mod:`.nf4_matvec`.
Limits: x and add must be viewable as (N, C) and (N, M); a dy that is not is copied. NF4 has no gradient.

Sources: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314); the LoRA step on the accumulator is LoRAFusion's idea
(arXiv 2510.00206). The tile order that keeps operands in L2 and the persistent loop over tiles are those of Triton's
tutorials 03 and 09.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device, tree
from ..autodiff import custom_vjp
from ..cost import Cost
from ..tree import ABSENT
from ..weights import NF4, Adapted, LoRA, Stacked, Weight, shape
from . import nf4, nf4_matvec
from .checks import check_device, check_dtype
from .language import cast, dot


@triton.jit
def _tile(t, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Tile ``t`` of the output, GROUP tiles down before the next column, so that both operands stay in L2."""
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(cols, BLOCK_N)
    group = t // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    inside = t % (GROUP * tiles_n)
    return group * GROUP + inside % height, inside // height


@triton.jit
def _accumulate(
    acc, a, b, m, n, rows, cols, low, high, a_m, a_k, b_k, b_n, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr
):  # fmt: skip
    """``acc + a[m, low:high] @ b[low:high, n]``, operands of any strides; ``m``, ``n``: int64 index vectors."""
    k = low + tl.arange(0, BLOCK_K)
    a_tile = a + m[:, None] * a_m + k.to(tl.int64)[None, :] * a_k
    b_tile = b + k.to(tl.int64)[:, None] * b_k + n[None, :] * b_n
    m_inside = (m < rows)[:, None]
    n_inside = (n < cols)[None, :]
    block_k = tl.full((), BLOCK_K, tl.int64)
    for start in range(low, high, BLOCK_K):
        if EVEN_K:
            x = tl.load(a_tile, mask=m_inside, other=0.0)
            y = tl.load(b_tile, mask=n_inside, other=0.0)
        else:
            k_inside = start + tl.arange(0, BLOCK_K) < high
            x = tl.load(a_tile, mask=m_inside & k_inside[None, :], other=0.0)
            y = tl.load(b_tile, mask=n_inside & k_inside[:, None], other=0.0)
        acc = dot(x, y, acc)
        a_tile += block_k * a_k
        b_tile += block_k * b_k
    return acc


@triton.jit
def _finish(acc, out, bias, add, alpha, m, n, rows, cols, add_m, add_n, bias_n):
    """``out[m, n] = alpha * acc + bias[n] + add[m, n]``; out is row-major."""
    inside = (m < rows)[:, None] & (n < cols)[None, :]
    acc = acc * alpha
    if bias is not None:
        acc += tl.load(bias + n * bias_n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
    if add is not None:
        acc += tl.load(add + m[:, None] * add_m + n[None, :] * add_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + m[:, None] * cols + n[None, :], cast(acc, out.dtype.element_ty), mask=inside)


@triton.jit
def _epilogue(
    acc, out, bias, add, alpha, at_m, at_n, rows, cols, add_m, add_n, bias_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Finish the tile at (at_m, at_n). 256 columns go in halves: addends for all would not fit beside the sum."""
    m = at_m + tl.arange(0, BLOCK_M)
    if BLOCK_N < 256:
        n = at_n + tl.arange(0, BLOCK_N)
        _finish(acc, out, bias, add, alpha, m, n, rows, cols, add_m, add_n, bias_n)
    else:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        n = at_n + tl.arange(0, BLOCK_N // 2)
        _finish(left, out, bias, add, alpha, m, n, rows, cols, add_m, add_n, bias_n)
        _finish(right, out, bias, add, alpha, m, n + BLOCK_N // 2, rows, cols, add_m, add_n, bias_n)


@triton.jit(do_not_specialize=["alpha"])
def _product_kernel(
    a, b, c, d, out, bias, add, alpha,
    rows, cols, inner, rank, chunk,
    a_m, a_k, b_k, b_n, c_m, c_k, d_k, d_n, add_m, add_n, bias_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """out = alpha (a b + c d) + bias + add. Split s of the grid's second axis sums its ``chunk`` of the inner dimension
    into partial result s, and then there is nothing to add."""
    pm, pn = _tile(tl.program_id(0), rows, cols, BLOCK_M, BLOCK_N, GROUP)
    split = tl.program_id(1)
    at_m = pm.to(tl.int64) * BLOCK_M
    at_n = pn.to(tl.int64) * BLOCK_N
    m = at_m + tl.arange(0, BLOCK_M)
    n = at_n + tl.arange(0, BLOCK_N)
    low = split * chunk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _accumulate(
        acc, a, b, m, n, rows, cols, low, tl.minimum(low + chunk, inner), a_m, a_k, b_k, b_n, BLOCK_K, EVEN_K
    )  # fmt: skip
    if c is not None:
        acc = _accumulate(acc, c, d, m, n, rows, cols, 0, rank, c_m, c_k, d_k, d_n, BLOCK_R, False)
    partial = split.to(tl.int64) * rows * cols
    _epilogue(
        acc, out + partial, bias, add, alpha, at_m, at_n, rows, cols, add_m, add_n, bias_n, BLOCK_M, BLOCK_N
    )  # fmt: skip


@triton.jit(do_not_specialize=["alpha"])
def _descriptor_kernel(
    a, b, c, d, out, bias, add, alpha,
    rows, cols, inner, rank,
    a_stride, b_stride, c_stride, d_stride, add_m, add_n, bias_n,
    A_T: tl.constexpr, B_T: tl.constexpr, D_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """The same for 16-byte aligned operands on Hopper: tiles come through the TMA unit, which also zeroes what lies
    outside, and one program per multiprocessor walks the tiles, loading the next while it stores the last. An operand
    marked _T is stored the other way around. The second product is one step: rank <= BLOCK_R."""
    if A_T:
        a_tiles = tl.make_tensor_descriptor(a, [inner, rows], [a_stride, 1], [BLOCK_K, BLOCK_M])
    else:
        a_tiles = tl.make_tensor_descriptor(a, [rows, inner], [a_stride, 1], [BLOCK_M, BLOCK_K])
    if B_T:
        b_tiles = tl.make_tensor_descriptor(b, [cols, inner], [b_stride, 1], [BLOCK_N, BLOCK_K])
    else:
        b_tiles = tl.make_tensor_descriptor(b, [inner, cols], [b_stride, 1], [BLOCK_K, BLOCK_N])
    if c is not None:
        c_tiles = tl.make_tensor_descriptor(c, [rows, rank], [c_stride, 1], [BLOCK_M, BLOCK_R])
        if D_T:
            d_tiles = tl.make_tensor_descriptor(d, [cols, rank], [d_stride, 1], [BLOCK_N, BLOCK_R])
        else:
            d_tiles = tl.make_tensor_descriptor(d, [rank, cols], [d_stride, 1], [BLOCK_R, BLOCK_N])
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(cols, BLOCK_N)
    for t in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=True):
        pm, pn = _tile(t, rows, cols, BLOCK_M, BLOCK_N, GROUP)
        at_m, at_n = pm * BLOCK_M, pn * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.cdiv(inner, BLOCK_K)):
            if A_T:
                x = a_tiles.load([k * BLOCK_K, at_m]).T
            else:
                x = a_tiles.load([at_m, k * BLOCK_K])
            if B_T:
                y = b_tiles.load([at_n, k * BLOCK_K]).T
            else:
                y = b_tiles.load([k * BLOCK_K, at_n])
            acc = dot(x, y, acc)
        if c is not None:
            if D_T:
                acc = dot(c_tiles.load([at_m, 0]), d_tiles.load([at_n, 0]).T, acc)
            else:
                acc = dot(c_tiles.load([at_m, 0]), d_tiles.load([0, at_n]), acc)
        _epilogue(
            acc, out, bias, add, alpha, at_m.to(tl.int64), at_n.to(tl.int64), rows, cols,
            add_m, add_n, bias_n, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _sum_kernel(partials, out, elements, splits, BLOCK: tl.constexpr):
    """Partial sums added in their order, so that the same shapes give the same bits."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    partial = partials + i
    for _ in range(splits):
        total += tl.load(partial, mask=i < elements, other=0.0)
        partial += elements
    tl.store(out + i, cast(total, out.dtype.element_ty), mask=i < elements)


class Config(NamedTuple):
    """One row of the launch table: the tile, warps, pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# By shape class. 128 x 256 x 64 is the best of the tiles measured in a sketch on an H100 80GB HBM3 with Triton 3.6.0
# (7B shapes, descriptors: 0.92 to 1.06 x cuBLAS); the others are chosen for occupancy and checked for spills only.
CONFIGS = {
    "large": Config(128, 256, 64, 8, 3),
    "medium": Config(128, 128, 64, 8, 3),
    "small": Config(64, 64, 64, 4, 4),
    "narrow": Config(64, 16, 128, 4, 3),  # few columns: u, t, dB
    "narrow 32": Config(64, 32, 128, 4, 3),
    "narrow 64": Config(64, 64, 128, 4, 3),
    "flat": Config(16, 128, 128, 4, 3),  # few rows: dA, dbias, decoding
    "flat 32": Config(32, 128, 64, 4, 3),
    "flat 64": Config(64, 128, 64, 4, 3),
    "fp32": Config(64, 64, 16, 4, 2),
    "fp32 narrow": Config(64, 16, 32, 4, 2),
    "fp32 flat": Config(16, 64, 32, 4, 2),
    "interpreted": Config(32, 32, 32, 4, 2),  # small, so that small tests have many tiles
}
_GROUP = 8
_STEP_RANK = 64  # the widest second product that the descriptor kernel takes in one step


def configuration(rows: int, cols: int, dtype: torch.dtype, where: torch.device) -> Config:
    """The row of CONFIGS for a product with ``rows`` x ``cols`` outputs."""
    if device.interpreting():
        return CONFIGS["interpreted"]
    narrow = min(rows, cols)
    if dtype == torch.float32:
        return CONFIGS["fp32" if narrow > 16 else "fp32 narrow" if cols <= rows else "fp32 flat"]
    if narrow <= 64:
        width = "" if narrow <= 16 else " 32" if narrow <= 32 else " 64"
        return CONFIGS[("narrow" if cols <= rows else "flat") + width]
    for name in ("large", "medium"):
        tile = CONFIGS[name]
        if device.cdiv(rows, tile.m) * device.cdiv(cols, tile.n) >= device.sms(where):
            return tile
    return CONFIGS["small"]


def choose(
    rows: int, cols: int, dtype: torch.dtype, where: torch.device, *, update: bool, gradient: bool
) -> str:  # fmt: skip
    """Which product to call: "descriptors" or "pointers" (Triton), or "cublas" (``torch.mm``; any BLAS on a CPU).

    ``update``: a second product shares the accumulator. ``gradient``: a weight gradient, summed over tokens; cuBLAS may
    reduce its partial sums in 16 bit, so these are Triton's wherever Triton has tensor cores. Plain large products are
    cuBLAS's. The one place where this is decided.
    """
    if device.interpreting():
        return "pointers"
    major, _ = device.capability(where)
    if major < 8 or dtype == torch.float32:
        return "cublas"  # Triton would multiply without tensor cores
    if min(rows, cols) <= 64:
        return "pointers"
    if major == 9 and (update or gradient):
        return "descriptors"
    return "pointers" if gradient else "cublas"


def product(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | Any = ABSENT,
    add: Tensor | Any = ABSENT,
    update: tuple[Tensor, Tensor] | Any = ABSENT,
    alpha: float = 1.0,
    out_dtype: torch.dtype | None = None,
    gradient: bool = False,
    path: str | None = None,
    config: Config | None = None,
) -> Tensor:
    """``alpha (a b + c d) + bias + add`` with fp32 accumulation, in ``out_dtype`` (default: a's); contiguous.

    ``a`` (rows, inner) and ``b`` (inner, cols) have any strides, so a transposed operand is a transposed view;
    ``update`` is the pair c (rows, rank), d (rank, cols); ``bias`` (cols,); ``add`` (rows, cols). ``path`` and
    ``config`` override :func:`choose` and :func:`configuration`. "descriptors" means "pointers" for operands that TMA
    cannot address (unaligned, or strided both ways).
    """
    (rows, inner), cols, where = a.shape, b.shape[1], a.device
    out_dtype = out_dtype or a.dtype
    path = path or choose(rows, cols, a.dtype, where, update=update is not ABSENT, gradient=gradient)
    if path == "cublas":
        return _torch_product(a, b, bias, add, update, alpha, out_dtype)
    config = config or configuration(rows, cols, a.dtype, where)
    c, d = (None, None) if update is ABSENT else update
    rank = 0 if c is None else c.shape[1]
    out = torch.empty(rows, cols, dtype=out_dtype, device=where)
    epilogue = (None if bias is ABSENT else bias, None if add is ABSENT else add, float(alpha))
    epilogue_strides = (*((0, 0) if add is ABSENT else add.stride()), 0 if bias is ABSENT else bias.stride(0))
    tiles = device.cdiv(rows, config.m) * device.cdiv(cols, config.n)
    options = {
        "BLOCK_M": config.m,
        "BLOCK_N": config.n,
        "BLOCK_K": config.k,
        "BLOCK_R": min(_STEP_RANK, device.next_power_of_2(max(16, rank))),
        "GROUP": _GROUP,
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
    }

    layouts = [_layout(t) for t in (a, b, c, d) if t is not None] if path == "descriptors" else [None]
    if all(layouts) and rank <= _STEP_RANK and (c is None or c.stride(1) == 1):
        transposed, strides = zip(*layouts, strict=True)
        programs = min(tiles, device.sms(where))
        device.launch(
            _descriptor_kernel,
            (programs,),
            *(a, b, c, d, out, *epilogue, rows, cols, inner, rank),
            *(strides if c is not None else (*strides, 0, 0)),
            *epilogue_strides,
            A_T=transposed[0],
            B_T=transposed[1],
            D_T=transposed[-1],
            PROGRAMS=programs,
            **options,
        )
        return out

    # Few tiles and a long sum: share the sum between programs, up to one per multiprocessor.
    splits = 1
    if update is ABSENT and epilogue[:2] == (None, None):
        splits = max(1, min(device.sms(where) // max(tiles, 1), inner // (2 * config.k)))
    chunk = max(1, device.cdiv(device.cdiv(inner, splits), config.k)) * config.k
    splits = max(1, device.cdiv(inner, chunk))
    target = out if splits == 1 else torch.empty(splits, rows, cols, dtype=torch.float32, device=where)
    device.launch(
        _product_kernel,
        (tiles, splits),
        *(a, b, c, d, target, *epilogue, rows, cols, inner, rank, chunk),
        *(*a.stride(), *b.stride(), *(s for t in (c, d) for s in ((0, 0) if t is None else t.stride()))),
        *epilogue_strides,
        EVEN_K=inner % config.k == 0,
        **options,
    )
    if splits > 1:
        grid = (device.cdiv(rows * cols, 1024),)
        device.launch(_sum_kernel, grid, target, out, rows * cols, splits, BLOCK=1024, enable_fp_fusion=True)
    return out


def _layout(t: Tensor) -> tuple[bool, int] | None:
    """(stored transposed, stride of its rows) if a tensor descriptor can address this matrix, else None."""
    for transposed, stored in ((False, t), (True, t.T)):
        stride = stored.stride(0)
        aligned = stride * t.element_size() % 16 == 0 and device.aligned(t, 16)
        if stored.stride(1) == 1 and stride >= stored.shape[1] > 0 and stored.shape[0] > 0 and aligned:
            return transposed, stride
    return None


def _torch_product(
    a: Tensor, b: Tensor, bias: Any, add: Any, update: Any, alpha: float, out_dtype: torch.dtype
) -> Tensor:
    """The same product by ``torch.mm``; every term after the first reads and writes the output once more."""
    a, b, bias, add, update = tree.map(lambda t: t.to(out_dtype), (a, b, bias, add, update))
    y = torch.mm(a, b) if add is ABSENT else torch.addmm(add, a, b, alpha=alpha)
    if add is ABSENT and alpha != 1.0:
        y *= alpha
    if update is not ABSENT:
        y.addmm_(*update, alpha=alpha)
    if bias is not ABSENT:
        y += bias
    return y


def linear_fwd(
    x_NC: Tensor, w: Weight, bias: Tensor | Any = ABSENT, add: Tensor | Any = ABSENT, *, needs: Any
) -> tuple[Tensor, tuple[Any, Weight]]:
    """``y_NM = x W^T (+ bias_M) (+ LoRA) (+ add_NM)`` for a weight ``Tensor (M, C) | NF4 | Stacked | Adapted``.

    ``x`` (..., C) and ``add`` (..., M) in any strides that a (N, C) or (N, M) view covers. Differentiable in everything
    but NF4. Raises ValueError for shapes, dtypes, devices or strides that do not fit, NotImplementedError for the
    gradient of an NF4 weight.
    """
    m, c = _check(x_NC, w, bias, add)
    x, y_shape = _matrix(x_NC, "x"), (*x_NC.shape[:-1], m)
    base, parts, _ = _open(w)
    update = ABSENT
    if any(part is not ABSENT for part in parts):
        a_RC, v_MR = _adapters(w, x)
        update = (product(x, a_RC.T), v_MR.T)
    flat = add if add is ABSENT else _matrix(add, "add")
    if not needs[0] and _stays_coded(x, base):
        y = _product_with_codes(x, base, bias, flat, update)
    else:
        y = product(x, _dense(base, x.dtype).T, bias=bias, add=flat, update=update)
    return y.view(y_shape), (x_NC if tree.any(needs[1]) else ABSENT, w)


def linear_bwd(residuals: tuple[Any, Weight], dy_NM: Tensor, *, needs: Any) -> tuple[Any, Any, Any, Any]:
    """``dx``, a gradient node shaped like ``w``, ``dbias`` and ``dadd`` (which is ``dy``); see the formulas above."""
    x_NC, w = residuals
    needs_x, needs_w, needs_bias, needs_add = needs
    base, parts, rows = _open(w)
    needs_base, needs_parts, _ = _open(needs_w)
    m, c = shape(w)
    dy = dy_NM.reshape(math.prod(dy_NM.shape[:-1]), m)
    x = x_NC if x_NC is ABSENT else _matrix(x_NC, "x")

    dx = update = ABSENT
    d_parts = tuple(ABSENT for _ in parts)
    adapted = any(part is not ABSENT for part in parts)
    if adapted and (needs_x or tree.any(needs_parts)):
        a_RC, v_MR = _adapters(w, dy)
        t_NR = ABSENT
        if needs_x or any(need is not ABSENT and need.a for need in needs_parts):
            t_NR = product(dy, v_MR)
            update = (t_NR, a_RC)
        if tree.any(needs_parts):
            d_parts = tuple(_adapter_gradients(w, needs_parts, x, dy, a_RC, t_NR))
    if needs_x:
        dx = product(dy, _dense(base, dy.dtype), update=update).view(*dy_NM.shape[:-1], c)

    dw = d_base = ABSENT
    if tree.any(needs_base):
        d_base = _weight_gradient(base, needs_base, x, dy)
    if isinstance(w, Adapted) and tree.any(needs_w):
        dw = Adapted(base=d_base, parts=d_parts, rows=rows)
    elif tree.any(needs_w):
        dw = d_base
    dbias = ABSENT
    if needs_bias is True:
        # A row of ones that takes no memory: the sum over tokens is a product too, fp32 and in fixed order.
        dbias = product(dy.new_ones(1).expand(1, dy.shape[0]), dy, gradient=True).view(m)
    return dx, dw, dbias, dy_NM if needs_add is True else ABSENT


linear = custom_vjp(linear_fwd, linear_bwd)


def cost(rows: int, w: Weight, *, itemsize: int = 2, bias: bool = False, add: bool = False) -> Cost:
    """Forward of ``rows`` tokens: x, w, y, bias, add once; 2·N·M·C FLOPs and 2·N·r·(C + M_i) per adapter."""
    m, c = shape(w)
    elements = rows * (c + m * (2 if add else 1)) + (m if bias else 0)
    flops = 2 * rows * m * c
    _, parts, part_rows = _open(w)
    for part, m_i in zip(parts, part_rows, strict=True):
        flops += 0 if part is ABSENT else 2 * rows * part.a.shape[0] * (c + m_i)
    return Cost(bytes=elements * itemsize + tree.nbytes(w), flops=flops)


def _open(w: Any) -> tuple[Any, tuple[Any, ...], tuple[int, ...]]:
    """(base, adapters, rows of each) of a weight, or of a tree of the same shape."""
    return (w.base, w.parts, w.rows) if isinstance(w, Adapted) else (w, (), ())


def _dense(w: Any, dtype: torch.dtype) -> Tensor:
    """One (M, C) matrix: a tensor as it is, anything else decoded or gathered into a buffer."""
    if isinstance(w, Tensor):
        return w
    if isinstance(w, NF4):
        return nf4.dequantize(w).to(dtype)
    some = tree.leaves(w)[0]
    dense = torch.empty(shape(w), dtype=dtype, device=some.device)
    for part, rows in zip(w.parts, dense.split([shape(part)[0] for part in w.parts]), strict=True):
        if isinstance(part, NF4) and part.dtype == dtype:
            nf4.dequantize(part, out=rows)
        else:
            rows.copy_(_dense(part, dtype))
    return dense


def _stays_coded(x: Tensor, base: Any) -> bool:
    """Whether all of the base is NF4 and x has too few tokens to decode it to memory for."""
    return all(isinstance(part, NF4) and nf4_matvec.takes(x, part) for part in _stack(base))


def _product_with_codes(x: Tensor, base: Any, bias: Any, add: Any, update: Any) -> Tensor:
    """``x base^T + bias + add + update``; beside an update the first sum stays in fp32, so that y is rounded once."""
    m, _ = shape(base)
    dtype = x.dtype if update is ABSENT else torch.float32
    y = torch.empty(x.shape[0], m, dtype=dtype, device=x.device)
    at = 0
    for part in _stack(base):
        columns = slice(at, at := at + part.shape[0])
        of_part = (b if b is ABSENT else b[..., columns] for b in (bias, add))
        nf4_matvec.nf4_matvec(x, part, *of_part, out=y[:, columns])
    return y if update is ABSENT else product(*update, add=y, out_dtype=x.dtype)


def _stack(base: Any) -> tuple[Any, ...]:
    return base.parts if isinstance(base, Stacked) else (base,)


def _placed(w: Adapted) -> Iterator[tuple[int, LoRA, slice, slice]]:
    """(index, adapter, its rows of the output, its place among the ranks) of every adapter that is there."""
    row = rank = 0
    for i, (part, rows) in enumerate(zip(w.parts, w.rows, strict=True)):
        if part is not ABSENT:
            r = part.a.shape[0]
            yield i, part, slice(row, row + rows), slice(rank, rank + r)
            rank += r
        row += rows


def _adapters(w: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """``a_RC`` and block-diagonal ``v_MR`` (scale included) in like's dtype; R is padded with zeros to a multiple of
    16, so that any ranks make aligned operands."""
    m, c = shape(w)
    placed = list(_placed(w))
    ranks = device.cdiv(placed[-1][3].stop, 16) * 16
    a_RC, v_MR = like.new_zeros(ranks, c), like.new_zeros(m, ranks)
    for _, part, rows, at in placed:
        a_RC[at].copy_(part.a)
        torch.mul(part.b, part.scale, out=v_MR[rows, at])
    return a_RC, v_MR


def _adapter_gradients(
    w: Any, needs: tuple[Any, ...], x: Tensor, dy: Tensor, a_RC: Tensor, t_NR: Any
) -> list[Any]:  # fmt: skip
    gradients = [ABSENT for _ in needs]
    some_a = next((part.a for part, need in zip(w.parts, needs, strict=True) if need is not ABSENT and need.a), None)
    some_b = any(need is not ABSENT and need.b for need in needs)
    da_RC = ABSENT if some_a is None else product(t_NR.T, x, out_dtype=torch.float32, gradient=True)
    u_NR = product(x, a_RC.T) if some_b else ABSENT
    for i, part, rows, at in _placed(w):
        da = da_RC[at].to(part.a.dtype) if needs[i].a else ABSENT
        db = ABSENT
        if needs[i].b:
            db = product(dy[:, rows].T, u_NR[:, at], alpha=part.scale, out_dtype=part.b.dtype, gradient=True)
        if needs[i].a or needs[i].b:
            gradients[i] = LoRA(a=da, b=db, scale=part.scale)
    return gradients


def _weight_gradient(w: Any, need: Any, x: Tensor, dy: Tensor) -> Any:
    if not tree.any(need):
        return ABSENT
    if isinstance(w, NF4):
        raise NotImplementedError("linear: an NF4 weight has no gradient; freeze it, or load without quantize='nf4'")
    if isinstance(w, Stacked):
        each = zip(w.parts, need.parts, dy.split([shape(part)[0] for part in w.parts], dim=1), strict=True)
        return Stacked(parts=tuple(_weight_gradient(part, n, x, d) for part, n, d in each))
    return product(dy.T, x, out_dtype=w.dtype, gradient=True)


def _matrix(t: Tensor, name: str) -> Tensor:
    """(..., C) seen as (N, C), without a copy."""
    if t.ndim == 2:
        return t
    try:
        return t.view(math.prod(t.shape[:-1]), t.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"linear: {name} has shape {tuple(t.shape)} and strides {t.stride()}, "
            f"which no (N, {t.shape[-1]}) view covers; pass {name}.contiguous()"
        ) from None


def _check(x: Tensor, w: Weight, bias: Any, add: Any) -> tuple[int, int]:
    """Rows and columns of ``w``, or the first thing that does not fit."""
    check_dtype("linear", "x", x)
    base, parts, rows = _open(w)
    stack = _stack(base)
    for part in stack:
        if len(part.shape) != 2 or part.shape[1] != stack[0].shape[-1]:
            expected = f"(M, {stack[0].shape[-1]})" if isinstance(base, Stacked) else "(M, C)"
            raise ValueError(f"linear: w has shape {tuple(part.shape)}, expected {expected}")
        if isinstance(part, Tensor):
            _agree("w", part, part.shape, x)
        else:
            check_device("linear", "w", part.codes, "x", x.device)
    m, c = shape(w)
    if x.ndim == 0 or x.shape[-1] != c:
        raise ValueError(f"linear: x has shape {tuple(x.shape)}, expected (..., C) with C = {c}")
    if isinstance(w, Adapted) and (len(parts) != len(rows) or sum(rows) != m):
        raise ValueError(f"linear: w.rows is {rows} for {len(parts)} parts, expected {len(parts)} numbers with sum {m}")
    for i, (part, m_i) in enumerate(zip(parts, rows, strict=True)):
        if part is not ABSENT:
            r = part.a.shape[0]
            _agree(f"w.parts[{i}].a", part.a, (r, c), x, any_dtype=True)
            _agree(f"w.parts[{i}].b", part.b, (m_i, r), x, any_dtype=True)
    if bias is not ABSENT:
        _agree("bias", bias, (m,), x)
    if add is not ABSENT:
        _agree("add", add, (*x.shape[:-1], m), x)
    return m, c


def _agree(name: str, t: Tensor, shape_: tuple[int, ...], x: Tensor, *, any_dtype: bool = False) -> None:
    if tuple(t.shape) != tuple(shape_):
        raise ValueError(f"linear: {name} has shape {tuple(t.shape)}, expected {tuple(shape_)}")
    if t.dtype != x.dtype and not any_dtype:
        raise ValueError(f"linear: {name} has dtype {t.dtype}, expected {x.dtype} like x")
    check_device("linear", name, t, "x", x.device)
