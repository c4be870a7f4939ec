"""The second half of a gated MLP: the gated linear unit, and the product that takes it back to the model's width.

    h = act(gate) ∘ up (N, F), rounded;   y = h Wᵀ + bias + add            gate_up (N, 2F), gate first

h is neither kept nor made by a pass of its own in backward: the gradient of the product's input needs no h, and the
pass that turns dh into dgate_up has gate, up and act(gate) in registers, so it writes h beside, just in time for the
weights' gradients (dA = tᵀ h). As two ops :mod:`.glu` runs again, or h is kept: 2 bytes · N·F.

Formulas and dtypes: those of :mod:`.glu` and :mod:`.linear`. Limits: theirs too.
Residuals: gate_up and the weight (arguments), and what linear has to spare, N·R elements.
Bytes moved beside the product, per element of h, of 2 bytes: forward 6, backward 12 (as two ops 16, h made again).

Source of the idea: recomputing the unit inside its backward, Liger Kernel's swiglu and Unsloth's fast_lora.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import device, tree
from ..autodiff import custom_vjp
from ..cost import Cost
from ..tree import ABSENT
from ..weights import Adapted, Weight, shape
from . import low_rank
from .glu import ACTS, activation, glu_fwd
from .glu import backward as glu_backward
from .glu import cost as glu_cost
from .language import cast, dot
from .linear import cost as linear_cost
from .linear import forward, input_gradient, weight_gradient
from .low_rank import PACKED_ROWS, pack_b, rows_of_a


@triton.jit
def _glu_onto_ranks_kernel(
    gate_up, a, b, h, u, b_packed, scales, starts, rows, ranks, N, F, M, R, gate_n, jobs,
    ACT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RANKS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Programs below ``jobs``: h of some tokens and, of the same registers, their u. Others pack v."""
    program = tl.program_id(0)
    if program < jobs:
        n = program.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        r = tl.arange(0, RANKS)
        a_rows, count = rows_of_a(a, ranks, r, F)
        r_inside = (r < count)[:, None]
        n_inside = (n < N)[:, None]
        acc = tl.zeros((RANKS, BLOCK_N), tl.float32)
        for start in range(0, F, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside, a_inside = n_inside, r_inside
            if not EVEN_K:
                inside, a_inside = inside & (k < F)[None, :], a_inside & (k < F)[None, :]
            gate_at = gate_up + n[:, None] * gate_n + k[None, :]
            gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(gate_at + F, mask=inside, other=0.0).to(tl.float32)
            a_tile = tl.load(a_rows[:, None] + k[None, :], mask=a_inside, other=0.0).to(tl.float32)
            activated, _ = activation(gate, ACT)
            h_tile = cast(activated * up, h.dtype.element_ty)
            tl.store(h + n[:, None] * F + k[None, :], h_tile, mask=inside)
            acc = dot(cast(a_tile, h.dtype.element_ty), h_tile.T, acc)
        tl.store(u + n[None, :] * R + r[:, None], cast(acc, u.dtype.element_ty), mask=(n < N)[None, :])
    else:
        pack_b(b, b_packed, scales, starts, rows, ranks, M, R, program - jobs, PACKED_ROWS, RANKS)


# Tokens, columns of h, warps, stages of the pass.
_CONFIG = low_rank.Thin(32, 128, 8, 3)
_FEWEST = 1 << 22  # elements of h for which one pass over gate_up makes h and u


def _takes(gate_up: Tensor, w: Adapted) -> bool:
    """Whether h and u are made in one pass."""
    if isinstance(w.key, Tensor) or gate_up.ndim != 2 or gate_up.stride(1) != 1:
        return False
    ranks = [part.a.shape[0] for part in w.parts if part is not ABSENT]
    large = gate_up.numel() >= 2 * _FEWEST and gate_up.dtype != torch.float32
    return large and 0 < sum(ranks) <= 32 and (device.interpreting() or device.capability(gate_up.device)[0] >= 8)


def _glu_onto_ranks(gate_up: Tensor, w: Adapted, act: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """``h, (u, v)`` of a (N, 2F) gate_up."""
    (n, f), config = (gate_up.shape[0], gate_up.shape[1] // 2), _CONFIG
    if device.interpreting():
        config = low_rank.CONFIGS["interpreted"]
    which = low_rank.adapters(w, (sum(w.rows), f))
    m, width = which.shape[0], which.width
    h, u, v = gate_up.new_empty(n, f), gate_up.new_empty(n, width), gate_up.new_empty(m, width)
    jobs, packing = device.cdiv(n, config.tokens), device.cdiv(m, PACKED_ROWS.value)
    a, b, scales = zip(*[(p.a.contiguous(), p.b.contiguous(), float(p.scale)) for p in which.parts], strict=True)
    device.launch(
        _glu_onto_ranks_kernel, (jobs + packing,),
        gate_up, a, b, h, u, v, scales, which.starts, which.rows, which.ranks, n, f, m, width, gate_up.stride(0), jobs,
        ACT=act, BLOCK_N=config.tokens, BLOCK_K=config.inner, RANKS=width, EVEN_K=f % config.inner == 0,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return h, (u, v)


def glu_linear_fwd(
    gate_up_N2F: Tensor, w: Weight, bias: Tensor | Any = ABSENT, add: Tensor | Any = ABSENT, *,
    needs: Any, act: str = "silu",
) -> tuple[Tensor, tuple[Any, Weight, Any]]:  # fmt: skip
    """gate_up (..., 2F), w (M, F) of any weight node, bias (M,), add (..., M) -> y (..., M).

    ``act`` as of glu. Raises what glu and linear raise.
    """
    sides = None
    fits = gate_up_N2F.shape[-1:] == (2 * shape(w)[1],) and act in ACTS
    if isinstance(w, Adapted) and fits and _takes(gate_up_N2F, w):
        h, sides = _glu_onto_ranks(gate_up_N2F, w, act)
    else:
        h, _ = glu_fwd(gate_up_N2F, needs=(False,), act=act)
    y, (h_kept, _, spare) = forward(h, w, bias, add, needs=needs, sides=sides)
    return y, (gate_up_N2F if needs[0] or h_kept is not ABSENT else ABSENT, w, spare)


def glu_linear_bwd(
    residuals: tuple[Any, Weight, Any], dy: Tensor, *, needs: Any, act: str = "silu"
) -> tuple[Any, Any, Any, Any]:
    """``dgate_up``, a gradient node shaped like ``w``, ``dbias`` and ``dadd``, which is ``dy``."""
    gate_up, w, spare = residuals
    dgate_up = h = ABSENT
    wants_h = tree.any(needs[1])
    dh, thin = input_gradient(w, dy, needs=needs)
    if needs[0]:
        if wants_h:
            h = gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))
        dgate_up = glu_backward(gate_up, dh, act, y=h)
    elif wants_h:
        h, _ = glu_fwd(gate_up, needs=(False,), act=act)
    dw, dbias = weight_gradient(w, h, spare, dy, thin, needs=needs)
    return dgate_up, dw, dbias, dy if needs[3] is True else ABSENT


glu_linear = custom_vjp(glu_linear_fwd, glu_linear_bwd)


def cost(
    rows: int, w: Weight, F: int, *, itemsize: int = 2, bias: bool = False, add: bool = False, backward: bool = False
) -> Cost:  # fmt: skip
    """Forward: glu and the product. Backward: what glu's pass moves, h written too, and one product."""
    product = linear_cost(rows, w, itemsize=itemsize, bias=bias, add=add)
    unit = glu_cost(rows, F, itemsize, backward=backward)
    again = rows * F * itemsize if backward else 0
    return Cost(bytes=product.bytes + unit.bytes + again, flops=product.flops + unit.flops)
