"""Products of tokens with their experts' weights: one launch for all experts of a mixture.

    gather    y_p = x_n W_e^T                                 row p of the sorted rows: its token n, its expert e
    combine   y_n = Σ_t gate_nt · x_p W_e^T + add_n           p the sorted row of the pair (n, t)

Residuals: x, w, plan and gates, arguments.
"""

from typing import Any

from torch import Tensor

from ..autodiff import custom_vjp
from ..cost import Cost
from ..tree import ABSENT
from ..weights import Weight

Plan = tuple[Tensor, Tensor, Tensor]


def grouped_linear_fwd(
    x: Tensor,
    w: Weight,
    plan: Plan,
    gates_NT: Tensor | Any = ABSENT,
    add_NM: Tensor | Any = ABSENT,
    *,
    needs: Any,
) -> tuple[Tensor, tuple[Any, ...]]:
    """Without ``gates``: ``x_NC -> y_PM``, gathering tokens. With them: ``x_PC -> y_NM``, combining (and ``+ add_NM``).

    ``plan`` is ``(order_P, positions_NT, offsets)`` of :mod:`.route`; P = N·T rows sorted by expert. ``w`` is a Tensor
    (E, M, C); an NF4 of shape (E, M, C); a Stacked whose parts below each other are the (E·M, C) matrix, expert after
    expert (how quantised checkpoints come: one part for each expert's matrix); or an Adapted over one of these, whose
    ``parts`` are ``LoRA(a (E, r, C), b (E, M_i, r), scale) | ABSENT`` and ``rows`` the M_i, with sum M: gate and up are
    two parts. An expert without an adapter has zeros in b. Differentiable in x, w (not NF4), gates and add.

        h = glu(grouped_linear(x, gate_up, plan))
        y = grouped_linear(h, down, plan, gates, add=residual)
    """
    raise NotImplementedError("grouped_linear: no kernels yet")


def grouped_linear_bwd(residuals: tuple[Any, ...], dy: Tensor, *, needs: Any) -> tuple[Any, Any, Any, Any, Any]:
    """``dx``, a gradient node shaped like ``w``, nothing for the plan, ``dgates`` and ``dadd`` (which is ``dy``)."""
    raise NotImplementedError("grouped_linear: no kernels yet")


grouped_linear = custom_vjp(grouped_linear_fwd, grouped_linear_bwd)


def cost(rows: int, w: Weight, *, itemsize: int = 2) -> Cost:
    """Forward of ``rows`` sorted rows: x, w and y once, 2·P·M·C FLOPs."""
    *_, m, c = w.shape
    return Cost(bytes=(rows * (m + c) + w.numel()) * itemsize, flops=2 * rows * m * c)
