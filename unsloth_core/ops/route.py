"""The router of a mixture of experts: the best experts of every token, their weights, and the tokens sorted by expert.

    p = softmax(z)        gate_t = p_(e_t) / s        s = Σ_t p_(e_t) if renormalised, else 1
Backward:
    dp = dprob_sums + [(dgate_t - r) / s at e_t]      r = Σ_t dgate_t·gate_t if renormalised, else 0
    dz = p ∘ (dp - Σ p ∘ dp)

z (N, E) logits, e_1 ... e_T the experts of the T = ``top_k`` largest logits of a token, largest first; of equal logits
the lower expert. A pair (token n, slot t) has the number n·T + t; sorted by expert, and by token within one, the
P = N·T pairs are the rows of every product of :mod:`.grouped_linear`.

Residuals: logits and valid, arguments; gates and experts, outputs. Probabilities are computed again.
"""

from typing import Any

from torch import Tensor

from ..autodiff import custom_vjp
from ..cost import Cost
from ..tree import ABSENT


def route_fwd(
    logits_NE: Tensor, valid_N: Tensor | Any = ABSENT, *, needs: Any, top_k: int, renormalise: bool = True
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """``(gates_NT, experts_NT, order_P, positions_NT, offsets, prob_sums_E, counts_E)``.

    ``gates_NT`` fp32 and ``experts_NT`` int32: weight and expert of each slot. The plan of the grouped products, int32:
    ``order_P``, the pair n·T + t in each sorted row; ``positions_NT``, the sorted row of each pair; ``offsets`` (E+1,),
    the rows of expert e are ``offsets[e] .. offsets[e+1]``. ``prob_sums_E`` fp32 and ``counts_E`` int32: sums over
    tokens (those of ``valid_N``, bool, if given) of the probabilities and of the choices, for the load-balancing loss
    E · Σ_e counts_e/n · prob_sums_e/n. Gates and prob_sums are differentiable in the logits; every token is routed.

        gates, experts, *plan, prob_sums, counts = route(logits, top_k=2)
    """
    raise NotImplementedError("route: no kernels yet")


def route_bwd(
    residuals: tuple[Any, ...], cotangents: tuple[Any, ...], *, needs: Any, top_k: int, renormalise: bool = True
) -> tuple[Any, Any]:
    """Gradients of gates and prob_sums -> dlogits."""
    raise NotImplementedError("route: no kernels yet")


route = custom_vjp(route_fwd, route_bwd)


def cost(N: int, E: int, itemsize: int, *, top_k: int = 2, backward: bool = False) -> Cost:
    """Forward: logits read; gates, experts, order and positions written. Backward: logits, gates, experts and dgates
    read, dlogits written."""
    small = 16 * N * top_k if not backward else 12 * N * top_k
    return Cost(bytes=N * E * itemsize * (2 if backward else 1) + small, flops=(8 if backward else 6 + top_k) * N * E)
