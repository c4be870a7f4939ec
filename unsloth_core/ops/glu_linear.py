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

from torch import Tensor

from .. import tree
from ..autodiff import custom_vjp
from ..cost import Cost
from ..prepared import prepared
from ..tree import ABSENT
from ..weights import Weight
from .glu import backward as glu_backward
from .glu import cost as glu_cost
from .glu import glu_fwd
from .linear import cost as linear_cost
from .linear import input_gradient, linear_fwd, weight_gradient


@prepared
def glu_linear_fwd(
    gate_up_N2F: Tensor, w: Weight, bias: Tensor | Any = ABSENT, add: Tensor | Any = ABSENT, *,
    needs: Any, act: str = "silu",
) -> tuple[Tensor, tuple[Any, Weight, Any]]:  # fmt: skip
    """gate_up (..., 2F), w (M, F) of any weight node, bias (M,), add (..., M) -> y (..., M).

    ``act`` as of glu. Raises what glu and linear raise.
    """
    h, _ = glu_fwd(gate_up_N2F, needs=(False,), act=act)
    y, (h_kept, _, spare) = linear_fwd(h, w, bias, add, needs=needs)
    return y, (gate_up_N2F if needs[0] or h_kept is not ABSENT else ABSENT, w, spare)


@prepared
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
