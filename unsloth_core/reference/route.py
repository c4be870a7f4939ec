"""The router of a mixture of experts, and its tokens sorted by expert, in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor

from ..tree import ABSENT
from .dtypes import check_floats


def route(
    logits_NE: Tensor, valid_N: Tensor | Any = ABSENT, *, top_k: int, renormalise: bool = True
) -> tuple[Tensor, ...]:
    """``(gates_NT, experts_NT, order_P, positions_NT, offsets, prob_sums_E, counts_E)``; see ``ops/route.py``."""
    if logits_NE.ndim != 2 or logits_NE.shape[1] == 0:
        raise ValueError(f"route: logits has shape {tuple(logits_NE.shape)}, expected (N, E) with E > 0")
    check_floats("route", logits=logits_NE)
    N, E = logits_NE.shape
    if not 1 <= top_k <= E:
        raise ValueError(f"route: top_k is {top_k}, expected 1 to E = {E}")
    where = logits_NE.device
    z = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32))
    probs = torch.softmax(z, dim=-1)
    key = torch.where(z.isnan(), float("inf"), z).detach()
    experts = torch.sort(key, dim=-1, descending=True, stable=True).indices[:, :top_k]  # ties: the lowest index
    gates = probs.gather(1, experts)
    if renormalise:
        gates = gates / gates.sum(dim=-1, keepdim=True)

    flat = experts.reshape(-1)
    order = torch.argsort(flat, stable=True)
    positions = torch.argsort(order).view(N, top_k)
    chosen = flat.unsqueeze(1) == torch.arange(E, device=where)
    ends = chosen.sum(0).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])

    if valid_N is not ABSENT:
        if valid_N.shape != (N,):  # no broadcasting
            raise ValueError(f"route: valid has shape {tuple(valid_N.shape)}, expected (N,) = ({N},)")
        if valid_N.dtype != torch.bool:
            raise ValueError(f"route: valid has dtype {valid_N.dtype}, expected torch.bool")
        probs = torch.where(valid_N.unsqueeze(1), probs, 0)
        chosen = chosen & valid_N.repeat_interleave(top_k).unsqueeze(1)
    counts = chosen.sum(0)
    integers = (t.to(torch.int32) for t in (experts, order, positions, offsets))
    return gates, *integers, probs.sum(0), counts.to(torch.int32)
