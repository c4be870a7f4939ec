"""Products with every weight node: dense, NF4, stacked, LoRA-adapted.

    y = x W^T + bias + add + u v^T        u = x a^T        a: the adapters' A_i below each other
    dx = dy W + t a                       t = dy v         v: scale_i B_i on the rows and ranks of part i, else 0
    dW = dy^T x      dA = t^T x           dB_i = scale_i dy_i^T u_i      dbias = sum_N dy      dadd = dy

x (..., C), W (M, C), bias (M,), add and y (..., M), a (R, C), v (M, R), u and t (N, R); R is the sum of the ranks.
``v`` is block-diagonal, so adapters on some parts of a stacked projection, with different ranks, are one more R-wide
step on the accumulator of one base product; bias and add join in the same epilogue.

Launches, of a dense frozen base with adapters: forward 3, one for a and v of all adapters, one for u
(:mod:`.low_rank`) and one :mod:`.product`; backward 4, one for a and v, one for t, the product, and one for dA and dB
of all adapters. Of few tokens the first two are one. Of a large dy, t and dB come from one pass. Without adapters one
each way. An NF4 part adds one to each that decodes it. With dropout on the adapters' inputs nothing is shared between
adapters (:mod:`.low_rank_dropout`).

Residuals: x if a dense weight or an adapter needs its gradient, and the weight node itself: arguments, 0 new bytes; and
u, N·R elements, for the gradient of a B_i, unless its input is dropped out. a and v are rebuilt in backward.
:func:`input_gradient` and :func:`weight_gradient` are the halves of backward, for ops that have x again only after dx.
Dtypes: fp16, bf16, fp32. Sums are fp32, y has x's dtype. fp32 operands are multiplied exactly by the kernels; on a GPU
such products are cuBLAS's, exact too unless the process allows tf32 (``torch.set_float32_matmul_precision``). Dense
weights, bias and add have x's dtype; NF4 decodes to its own dtype and is cast to x's; adapters (fp32 leaves) are cast,
and their gradients leave the accumulator in the leaf's dtype, as dW does in W's.
Bytes: x, W, y once (add read once). Unfused, each of bias, LoRA and add reads and writes y once more, 4 B an element.
Transient: an NF4 weight is decoded once per call, M·C elements; a Stacked weight is gathered into one such buffer. In
the backward pass of a remat layer the recomputed forward hands that buffer on to dX (``autodiff.once``). For
at most 8 tokens without gradient of x, as in cached generation, NF4 is not decoded to memory: :mod:`.nf4_matvec`.
Limits: x and add must be viewable as (N, C) and (N, M); a dy that is not is copied. NF4 has no gradient.

Sources: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314), rank-stabilised scales are :mod:`unsloth_core.lora`'s.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import device, tree
from ..autodiff import Spare, custom_vjp, once
from ..cost import Cost
from ..prepared import prepared
from ..tree import ABSENT
from ..weights import NF4, Adapted, LoRA, Stacked, Weight, shape
from . import low_rank, low_rank_dropout, nf4, nf4_matvec
from .checks import check_device, check_dtype
from .product import product


@prepared
def linear_fwd(
    x_NC: Tensor, w: Weight, bias: Tensor | Any = ABSENT, add: Tensor | Any = ABSENT, *, needs: Any
) -> tuple[Tensor, tuple[Any, Weight, Any]]:
    """``y_NM = x W^T (+ bias_M) (+ LoRA) (+ add_NM)`` for a weight ``Tensor (M, C) | NF4 | Stacked | Adapted``.

    ``x`` (..., C) and ``add`` (..., M) in any strides that a (N, C) or (N, M) view covers. Differentiable in everything
    but NF4. Raises ValueError for shapes, dtypes, devices or strides that do not fit, NotImplementedError for the
    gradient of an NF4 weight.
    """
    m, c = _check(x_NC, w, bias, add)
    x, y_shape = _matrix(x_NC, "x"), (*x_NC.shape[:-1], m)
    base, parts, _ = _open(w)
    needs_base, needs_parts, _ = _open(needs[1])
    flat = add if add is ABSENT else _matrix(add, "add")
    coded = not needs[0] and _stays_coded(x, base)
    dense_MC = ABSENT if coded else dense(base, x.dtype, again=needs[0])
    update, blocks, dropped, u_NR = ABSENT, None, False, ABSENT
    if isinstance(w, Adapted) and any(part is not ABSENT for part in parts):
        which, dropped = low_rank.adapters(w, (m, c)), isinstance(w.key, Tensor)
        if dropped:
            u_NR, v_MR = low_rank_dropout.forward(w, which, x)
        else:
            u_NR, v_MR = low_rank.forward(which, x)
        update, blocks = (u_NR, v_MR.T), which.blocks
    if coded:
        y = _product_with_codes(x, base, bias, flat, update)
    else:
        y = product(x, dense_MC.T, bias=bias, add=flat, update=update, blocks=blocks)
    wants_a, wants_b = _wanted(needs_parts, "a"), _wanted(needs_parts, "b")
    keeps_x = wants_a or wants_b or tree.any(needs_base)
    keeps_u = wants_b and not dropped
    if x_NC.ndim != 2:  # no view: PyTorch would refuse ``y += ...`` of a view that was made in here
        y = torch.ops.aten._unsafe_view(y, y_shape)
    return y, (x_NC if keeps_x else ABSENT, w, Spare(value=u_NR) if keeps_u else ABSENT)


@prepared
def linear_bwd(residuals: tuple[Any, Weight, Any], dy_NM: Tensor, *, needs: Any) -> tuple[Any, Any, Any, Any]:
    """``dx``, a gradient node shaped like ``w``, ``dbias`` and ``dadd`` (which is ``dy``); see the formulas above."""
    x_NC, w, spare = residuals
    _, needs_parts, _ = _open(needs[1])
    u_NR = ABSENT
    if isinstance(w, Adapted) and _wanted(needs_parts, "b") and not isinstance(w.key, Tensor):
        which = low_rank.adapters(w, shape(w))
        whole = all(_wanted((needs_parts[i],), "b") for i in which.index)
        if whole and low_rank.takes_both_sides(which, _rows(dy_NM)):
            u_NR = _u(which, x_NC, spare)
    dx, thin = input_gradient(w, dy_NM, needs=needs, u_NR=u_NR)
    dw, dbias = weight_gradient(w, x_NC, spare, dy_NM, thin, needs=needs)
    return dx, dw, dbias, dy_NM if needs[3] is True else ABSENT


class Thin(NamedTuple):
    """What :func:`input_gradient` made of dy and the adapters, for :func:`weight_gradient`."""

    which: Any = ABSENT  # low_rank.Adapters
    t: Any = ABSENT  # (N, R), with dropout one (N, r_i) per adapter
    how: Any = ABSENT  # low_rank.Split
    arrived: Any = ABSENT  # zeros that the last program of a tile knows itself by
    db: Any = ABSENT  # all dB_i, if they came with t


def input_gradient(w: Weight, dy_NM: Tensor, *, needs: Any, u_NR: Any = ABSENT) -> tuple[Any, Thin]:
    """The half of :func:`linear_bwd` that needs nothing of x: ``dx`` (..., C), ABSENT if not needed, and thin sides.

    With ``u_NR``, all dB_i come from the same pass over dy as t.
    """
    (m, c), dy = shape(w), _rows(dy_NM)
    base, parts, _ = _open(w)
    _, needs_parts, _ = _open(needs[1])
    wants_a, wants_b = _wanted(needs_parts, "a"), _wanted(needs_parts, "b")
    dense_MC = dense(base, dy.dtype, again=False) if needs[0] else ABSENT
    add = update = ABSENT
    thin = Thin()
    if isinstance(w, Adapted) and any(part is not ABSENT for part in parts) and (needs[0] or wants_a or wants_b):
        which = low_rank.adapters(w, (m, c))
        want_b = [_wanted((needs_parts[i],), "b") for i in which.index]
        if isinstance(w.key, Tensor):
            add, t = low_rank_dropout.input_gradient(w, which, dy, needs[0], wants_a)
            thin = Thin(which, t)
        elif u_NR is not ABSENT and (needs[0] or wants_a):
            t, a_RC, db = low_rank.both_sides(which, dy, u_NR, pack=needs[0])
            how = low_rank.cut(which, dy.shape[0], wants_a, [False for _ in want_b], dy.device)
            update, thin = (t, a_RC), Thin(which, t, how, dy.new_zeros(how.counters, dtype=torch.int32), db)
        else:
            how = low_rank.cut(which, dy.shape[0], wants_a, want_b, dy.device)
            if needs[0] or wants_a:
                t, a_RC, arrived = low_rank.backward(which, dy, how.counters, pack=needs[0])
                update = (t, a_RC)
            else:
                t, arrived = ABSENT, dy.new_zeros(how.counters, dtype=torch.int32)
            thin = Thin(which, t, how, arrived)
    if not needs[0]:
        return ABSENT, thin
    return product(dy, dense_MC, add=add, update=update).view(*dy_NM.shape[:-1], c), thin


def weight_gradient(w: Weight, x_NC: Any, spare: Any, dy_NM: Tensor, thin: Thin, *, needs: Any) -> tuple[Any, Any]:
    """The other half: a gradient node shaped like ``w`` and ``dbias``, from x and what forward had to spare: u."""
    dy = _rows(dy_NM)
    x = x_NC if x_NC is ABSENT else _matrix(x_NC, "x")
    base, parts, _ = _open(w)
    needs_base, needs_parts, _ = _open(needs[1])
    wants_a, wants_base = _wanted(needs_parts, "a"), tree.any(needs_base)
    wants_parts = wants_a or _wanted(needs_parts, "b")
    dw = d_base = dbias = ABSENT
    d_parts = tuple(ABSENT for _ in parts)
    if isinstance(w, Adapted) and wants_parts:
        which, db = thin.which, thin.db
        want_a, want_b = ([_wanted((needs_parts[i],), leaf) for i in which.index] for leaf in "ab")
        if isinstance(w.key, Tensor):
            da, db = low_rank_dropout.gradients(w, which, x, dy, thin.t, want_a, want_b)
        elif db is not ABSENT:
            da = [ABSENT for _ in which.parts]
            if wants_a:
                da, _ = low_rank.gradients(which, x, thin.t, dy, ABSENT, thin.arrived, thin.how, [False for _ in db])
        else:
            u_NR = _u(which, x_NC, spare) if any(want_b) else ABSENT
            inputs = x if wants_a else ABSENT
            da, db = low_rank.gradients(which, inputs, thin.t, dy, u_NR, thin.arrived, thin.how, want_b)
        d_parts = _adapter_gradients(which, needs_parts, da, db)
    if wants_base:
        d_base = _weight_gradient(base, needs_base, x, dy)
    if isinstance(w, Adapted) and (wants_base or wants_parts):
        dw = dataclasses.replace(w, base=d_base, parts=d_parts, key=ABSENT)
    elif wants_base:
        dw = d_base
    if needs[2] is True:
        # A row of ones that takes no memory: the sum over tokens is a product too, fp32 and in fixed order.
        one = dy.new_ones(1) if device.is_fake(dy) else _one(dy.dtype, dy.device)
        dbias = product(one.expand(1, dy.shape[0]), dy, gradient=True).view(-1)
    return dw, dbias


@functools.cache
def _one(dtype: torch.dtype, where: torch.device) -> Tensor:
    return device.lasting(torch.ones(1, dtype=dtype, device=where))


def _u(which: Any, x_NC: Tensor, spare: Any) -> Tensor:
    """u as forward kept it, or made again, to the same bits."""
    if spare is not ABSENT and spare.value is not ABSENT:
        return spare.value
    return low_rank.forward(which, _matrix(x_NC, "x"))[0]


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


def dense(w: Any, dtype: torch.dtype, *, again: bool) -> Tensor:
    """One (M, C) matrix in ``dtype``: a tensor as it is, anything else decoded or gathered into a new buffer.

    ``again``: whether the backward of this call will ask too; within a layer's backward it gets the same buffer.
    """
    return w if isinstance(w, Tensor) else once(tree.leaves(w)[0], lambda: _decode(w, dtype), again=again)


def _decode(w: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(w, NF4):
        return nf4.dequantize(w).to(dtype)
    matrix = torch.empty(shape(w), dtype=dtype, device=tree.leaves(w)[0].device)
    for part, rows in zip(w.parts, matrix.split([shape(part)[0] for part in w.parts]), strict=True):
        if isinstance(part, NF4) and part.dtype == dtype:
            nf4.dequantize(part, out=rows)
        else:
            rows.copy_(part if isinstance(part, Tensor) else nf4.dequantize(part))
    return matrix


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


def _adapter_gradients(which: Any, needs: Any, da: list[Any], db: list[Any]) -> tuple[Any, ...]:
    """A node for every part, in the leaves' dtypes, ABSENT where nothing is wanted."""
    gradients = [ABSENT for _ in needs]
    for i, part, da_i, db_i in zip(which.index, which.parts, da, db, strict=True):
        a = da_i.to(part.a.dtype) if needs[i].a else ABSENT
        b = db_i.to(part.b.dtype) if needs[i].b else ABSENT
        if a is not ABSENT or b is not ABSENT:
            gradients[i] = LoRA(a=a, b=b, scale=part.scale)
    return tuple(gradients)


def _wanted(needs: Any, leaf: str) -> bool:
    """Whether some adapter's ``leaf``, a or b, wants a gradient."""
    return any(need is not ABSENT and getattr(need, leaf) for need in needs)


def _weight_gradient(w: Any, need: Any, x: Tensor, dy: Tensor) -> Any:
    if not tree.any(need):
        return ABSENT
    if isinstance(w, NF4):
        raise NotImplementedError("linear: an NF4 weight has no gradient; freeze it, or load without quantize='nf4'")
    if isinstance(w, Stacked):
        each = zip(w.parts, need.parts, dy.split([shape(part)[0] for part in w.parts], dim=1), strict=True)
        return Stacked(parts=tuple(_weight_gradient(part, n, x, d) for part, n, d in each))
    return product(dy.T, x, out_dtype=w.dtype, gradient=True)


def _rows(t: Tensor) -> Tensor:
    """(..., M) as (N, M), copied where no view is."""
    return t if t.ndim == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


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
    if isinstance(w, Adapted) and isinstance(w.key, Tensor):
        if tuple(w.key.shape) != (len(parts), 2) or w.key.dtype != torch.int64:
            expected = f"({len(parts)}, 2) torch.int64, a key of random for each part"
            raise ValueError(f"linear: w.key is {tuple(w.key.shape)} {w.key.dtype}, expected {expected}")
        if not 0.0 <= w.dropout <= 1.0:
            raise ValueError(f"linear: w.dropout is {w.dropout}, expected 0 to 1")
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
