"""Adapters whose inputs are dropped out, each with a mask of its own, as PEFT's ``lora_dropout`` does.

    y += sum_i scale_i (D_i x) A_i^T B_i^T on the rows of part i       D_i: :mod:`.dropout` with key i

Nothing is shared between adapters then: every one reads an input of its own, and what comes back to x passes its own
mask, so that it cannot join the accumulator of dx but is an addend of it, in x's dtype. Masks are made again in
backward. Transient: one D_i x at a time, and the addend, N·C elements each.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from ..weights import Adapted
from .dropout import dropout_fwd
from .low_rank import Adapters
from .product import product


def forward(w: Adapted, which: Adapters, x: Tensor) -> tuple[Tensor, Tensor]:
    """``(u_NR, v_MR)``, whose product belongs on the accumulator of the base product."""
    u, v = x.new_zeros(x.shape[0], which.width), x.new_zeros(which.shape[0], which.width)
    low = 0
    for i, part, start, rows, rank in zip(*which[:-1], strict=True):
        ranks = slice(low, low := low + rank)
        u[:, ranks] = product(_dropped(w, i, x), part.a.to(x.dtype).T)
        torch.mul(part.b, part.scale, out=v[start : start + rows, ranks])
    return u, v


def input_gradient(w: Adapted, which: Adapters, dy: Tensor, want_x: bool, want_a: bool) -> tuple[Any, list[Any]]:
    """``(what the adapters add to dx, [t_i])``; ABSENT where nothing is wanted."""
    dx, ts = ABSENT, []
    for i, part, start, rows, _ in zip(*which[:-1], strict=True):
        wanted = want_x or want_a
        t = product(dy[:, start : start + rows], (part.b * part.scale).to(dy.dtype)) if wanted else ABSENT
        ts.append(t)
        if want_x:
            dx_i = _dropped(w, i, product(t, part.a.to(dy.dtype)))
            dx = dx_i if dx is ABSENT else dx.add_(dx_i)
    return dx, ts


def gradients(
    w: Adapted, which: Adapters, x: Tensor, dy: Tensor, ts: list[Any], want_a: Sequence[bool], want_b: Sequence[bool]
) -> tuple[list[Any], list[Any]]:
    """``([dA_i], [dB_i])``, fp32; ABSENT where nothing is wanted."""
    da, db = [], []
    for i, part, start, rows, _, t, a_wanted, b_wanted in zip(*which[:-1], ts, want_a, want_b, strict=True):
        dy_i, gradient = dy[:, start : start + rows], {"out_dtype": torch.float32, "gradient": True}
        dropped = _dropped(w, i, x) if a_wanted or b_wanted else ABSENT
        da.append(product(t.T, dropped, **gradient) if a_wanted else ABSENT)
        u = product(dropped, part.a.to(dy.dtype).T) if b_wanted else ABSENT
        db.append(product(dy_i.T, u, alpha=part.scale, **gradient) if b_wanted else ABSENT)
    return da, db


def _dropped(w: Adapted, i: int, x: Tensor) -> Tensor:
    """Of x, or of a gradient of it: the mask is the same."""
    return dropout_fwd(x, w.key[i], needs=(False, False), p=w.dropout)[0]
