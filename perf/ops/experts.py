"""Mixtures of experts: routing and grouped products."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unsloth_core import backend
from unsloth_core import ops as uc
from unsloth_core.cost import Cost

from .case import Case, Random, cost_of


def cases() -> Iterator[Case]:
    """Those of this file."""
    """A mixture of experts, in the shapes of Mixtral 8x7B (2 of 8 experts) and Qwen3-30B-A3B (8 of 128)."""
    route, grouped = map(cost_of, ("route", "grouped_linear"))

    def routed(by: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
        def chosen(logits: Tensor) -> tuple[Tensor, Tensor]:
            out = by(logits, top_k=_slots(logits.shape[1]))
            return out[0], out[5]  # what has a gradient

        return chosen

    yield Case(
        op="route",  # tokens, experts
        shapes=((8192, 8), (32768, 128)),
        small=(512, 128),
        tiny=(8, 4),
        make=lambda r, N, E: (r.normal(N, E),),
        wanted=lambda logits: [logits],
        ours=routed(uc.route),
        peers={"torch": routed(backend.reference("route")), "topk": _top_k_and_sorts},
        costs=lambda args, N, E: {
            "fwd": route(N, E, 2, top_k=_slots(E)),
            "bwd": route(N, E, 2, top_k=_slots(E), backward=True),
        },
    )

    def plan(r: Random, N: int, E: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        gates, _, *in_order, _, _ = uc.route(r.normal(N, E), top_k=_slots(E))
        return gates, tuple(in_order)

    def weight(r: Random, E: int, M: int, C: int) -> Tensor:
        return r.matrix(E * M, C).view(E, M, C)

    def make_gather(r: Random, N: int, E: int, M: int, C: int) -> tuple[Any, ...]:
        return r.normal(N, C), weight(r, E, M, C), plan(r, N, E)[1]

    def make_combine(r: Random, N: int, E: int, M: int, C: int) -> tuple[Any, ...]:
        gates, in_order = plan(r, N, E)
        return r.normal(N * _slots(E), C), weight(r, E, M, C), in_order, gates, r.normal(N, M)

    def make_layer(r: Random, N: int, E: int, D: int, F: int) -> tuple[Any, ...]:
        gates, in_order = plan(r, N, E)
        return r.normal(N, D), weight(r, E, 2 * F, D), weight(r, E, D, F), in_order, gates

    def layer(x: Tensor, gate_up: Tensor, down: Tensor, plan: Any, gates: Tensor) -> Tensor:
        return uc.grouped_linear(uc.glu(uc.grouped_linear(x, gate_up, plan)), down, plan, gates, x)

    def one(args: Any, N: int, E: int, M: int, C: int) -> dict[str, Cost]:
        return dict.fromkeys(("fwd", "bwd"), grouped(N * _slots(E), args[1]))

    def both(args: Any, N: int, E: int, D: int, F: int) -> dict[str, Cost]:
        work = grouped(N * _slots(E), args[1]) + grouped(N * _slots(E), args[2])
        return {"fwd": work, "bwd": work}

    yield Case(
        op="grouped_linear",  # gathering: tokens, experts, M, C; frozen experts
        shapes=((8192, 8, 28672, 4096), (32768, 128, 1536, 2048)),
        small=(1024, 8, 1536, 512),
        tiny=(8, 4, 16, 16),
        make=make_gather,
        wanted=lambda x, w, plan: [x],
        ours=uc.grouped_linear,
        peers={"torch": _expert_by_expert, "_grouped_mm": _grouped_mm},
        costs=one,
        compiles=False,
    )
    yield Case(
        op="grouped_linear_combine",  # tokens, experts, M, C; frozen experts, a trained router
        shapes=((8192, 8, 4096, 14336), (32768, 128, 2048, 768)),
        small=(1024, 8, 1536, 512),
        tiny=(8, 4, 16, 16),
        make=make_combine,
        wanted=lambda x, w, plan, gates, add: [x, gates],
        ours=uc.grouped_linear,
        peers={"torch": _expert_by_expert, "_grouped_mm": _grouped_mm},
        costs=one,
        compiles=False,
    )
    yield Case(
        op="grouped_linear_layer",  # gate and up, SwiGLU, down, residual: tokens, experts, width, ffn
        shapes=((8192, 8, 4096, 14336), (32768, 128, 2048, 768)),
        small=(1024, 8, 512, 768),
        tiny=(8, 4, 16, 16),
        make=make_layer,
        wanted=lambda x, gate_up, down, plan, gates: [x, gates],
        ours=layer,
        peers={"torch": _layer_by(_expert_by_expert), "_grouped_mm": _layer_by(_grouped_mm)},
        costs=both,
        compiles=False,
    )


def _slots(experts: int) -> int:
    """Experts of each token in the models that have so many."""
    return 2 if experts <= 8 else 8


def _top_k_and_sorts(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and sorted order as PyTorch's users make them; the order is dropped, the sums over tokens are kept."""
    probs = torch.softmax(logits, -1, dtype=torch.float32)
    gates, experts = probs.topk(_slots(logits.shape[1]), -1)
    order = experts.flatten().argsort(stable=True)
    order.argsort()
    F.one_hot(experts.flatten(), logits.shape[1]).sum(0).cumsum(0)
    return gates / gates.sum(-1, keepdim=True), probs.sum(0)


def _expert_by_expert(x: Tensor, w: Tensor, plan: Any, gates: Any = None, add: Any = None) -> Tensor:
    """The loop of transformers, whose bounds the host reads."""
    order, positions, offsets = plan
    if gates is None:
        x = x[order.long() // positions.shape[1]]
    bounds = offsets.tolist()
    y = torch.cat([x[low:high] @ w[e].T for e, (low, high) in enumerate(itertools.pairwise(bounds))])
    return y if gates is None else _weighted(y, plan, gates, add)


def _grouped_mm(x: Tensor, w: Tensor, plan: Any, gates: Any = None, add: Any = None) -> Tensor:
    """PyTorch's grouped product, composed by hand."""
    order, positions, offsets = plan
    if gates is None:
        x = x[order.long() // positions.shape[1]]
    y = torch._grouped_mm(x, w.transpose(1, 2), offs=offsets[1:])
    return y if gates is None else _weighted(y, plan, gates, add)


def _weighted(y: Tensor, plan: Any, gates: Tensor, add: Any) -> Tensor:
    order, positions, _ = plan
    gate = gates.flatten()[order.long()].unsqueeze(1).to(y.dtype)
    return add.index_add(0, order.long() // positions.shape[1], y * gate)


def _layer_by(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def layer(x: Tensor, gate_up: Tensor, down: Tensor, plan: Any, gates: Tensor) -> Tensor:
        gate, up = product(x, gate_up, plan).chunk(2, -1)
        return product(F.silu(gate) * up, down, plan, gates, x)

    return layer
