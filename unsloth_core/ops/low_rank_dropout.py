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


def backward(
    w: Adapted, which: Adapters, x: Any, dy: Tensor, want_x: bool, want_a: Sequence[bool], want_b: Sequence[bool]
) -> tuple[Any, list[Any], list[Any]]:
    """``(what the adapters add to dx, [dA_i], [dB_i])``; ABSENT where nothing is wanted, gradients in fp32."""
    dx, da, db = ABSENT, [], []
    for i, part, start, rows, _, a_wanted, b_wanted in zip(*which[:-1], want_a, want_b, strict=True):
        dy_i, a = dy[:, start : start + rows], part.a.to(dy.dtype)
        t = product(dy_i, (part.b * part.scale).to(dy.dtype)) if want_x or a_wanted else ABSENT
        dropped = _dropped(w, i, x) if a_wanted or b_wanted else ABSENT
        gradient = {"out_dtype": torch.float32, "gradient": True}
        da.append(product(t.T, dropped, **gradient) if a_wanted else ABSENT)
        db.append(product(dy_i.T, product(dropped, a.T), alpha=part.scale, **gradient) if b_wanted else ABSENT)
        if want_x:
            dx_i = _dropped(w, i, product(t, a))
            dx = dx_i if dx is ABSENT else dx.add_(dx_i)
    return dx, da, db


def _dropped(w: Adapted, i: int, x: Tensor) -> Tensor:
    """Of x, or of a gradient of it: the mask is the same."""
    return dropout_fwd(x, w.key[i], needs=(False, False), p=w.dropout)[0]
