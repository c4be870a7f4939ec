"""One optimizer step over an 8B model's adapters, and the norm of their gradients."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.adamw import adamw as torch_adamw

from unsloth_core import backend, optim, tree
from unsloth_core.cost import Cost
from unsloth_core.optim import clip
from unsloth_core.weights import LoRA

from ..peers import Peer
from .case import RANK, Case, Random


def cases() -> Iterator[Case]:
    """Those of this file."""
    yield _with("fp32")
    yield _with("8bit")

    def leaves(r: Random, L: int, rank: int, D: int, F: int) -> tuple[Any, ...]:
        return (_adapters(r, L, rank, D, F),)

    def reference(grads: Any) -> Any:
        with backend.using("reference"):
            return optim.global_norm(grads)

    yield Case(
        op="global_norm",  # layers, rank, width, ffn
        shapes=((32, RANK, 4096, 14336),),
        small=(32, RANK, 4096, 14336),
        tiny=(1, 2, 32, 48),
        make=leaves,
        ours=optim.global_norm,
        peers={"torch": reference, "get_total_norm": lambda grads: torch.nn.utils.get_total_norm(tree.leaves(grads))},
        costs=lambda args, *shape: {"fwd": clip.cost(sum(g.numel() for g in tree.leaves(args[0])))},
        dtype=torch.float32,
        compiles=False,
    )


def _adapters(r: Random, L: int, rank: int, D: int, F: int) -> dict[str, LoRA]:
    """Of all seven products."""
    matrices = {"q": (D, D), "k": (D // 4, D), "v": (D // 4, D), "o": (D, D)}
    matrices |= {"gate": (F, D), "up": (F, D), "down": (D, F)}
    return {
        f"{i}.{name}": LoRA(
            a=r.normal(rank, cols, dtype=torch.float32), b=r.normal(rows, rank, dtype=torch.float32), scale=1.0
        )
        for i in range(L)
        for name, (rows, cols) in matrices.items()
    }


def _with(states: str) -> Case:
    options = {"lr": 2e-4, "weight_decay": 0.01}
    eight = states == "8bit"
    optimizer = optim.adamw(**options, state_dtype="8bit" if eight else torch.float32)

    def make(r: Random, L: int, rank: int, D: int, F: int) -> tuple[Any, ...]:
        """Parameters, gradients, state, and the counters that PyTorch keeps per parameter."""
        params, grads, m, v = (_adapters(r, L, rank, D, F) for _ in range(4))
        step = torch.full((), 3, dtype=torch.int64, device=r.generator.device)
        counters = tuple(step.float().repeat(len(tree.leaves(params))).unbind())
        state = optim.AdamWState(step=step, m=m, v=tree.map(torch.square, v))
        if eight:  # that of a first step: codes of every size
            state = optimizer.update(m, optimizer.init(params), params)[1]
        return params, grads, state, counters

    def ours(params: Any, grads: Any, state: Any, counters: Any) -> Any:
        """In place, as training calls it and as the peers work."""
        params, state = optimizer.update(grads, state, params, donate=True)
        # Two fp32 sums that differ in the last bit may lie on two sides of a midpoint: codes are not compared.
        return params if eight else (params, state.m, state.v)

    def reference(*args: Any) -> Any:
        with backend.using("reference"):
            return ours(*args)

    def fused(params: Any, grads: Any, state: Any, counters: Any) -> Any:
        """PyTorch's one launch over all parameters."""
        torch_adamw(
            *(tree.leaves(t) for t in (params, grads, state.m, state.v)), [], list(counters), fused=True,
            amsgrad=False, beta1=0.9, beta2=0.999, eps=1e-8, maximize=False, **options,
        )  # fmt: skip
        return params, state.m, state.v

    def copies(*args: Any) -> Any:
        """For what writes into its arguments."""
        return tree.map(torch.clone, args)

    def costs(args: Any, *shape: int) -> dict[str, Cost]:
        n = sum(p.numel() for p in tree.leaves(args[0]))
        state = args[2]  # p, g, m, v read and p, m, v written
        return {"fwd": Cost(bytes=12 * n + 2 * tree.nbytes((state.m, state.v)), flops=15 * n)}

    return Case(
        op="adamw_8bit" if eight else "adamw",  # adapters of all seven products: layers, rank, width, ffn
        shapes=((32, RANK, 4096, 14336),),
        # As many leaves, for host time depends on their number; and all of them large enough for 8-bit states.
        small=(32, RANK, 1024, 3584) if eight else (32, RANK, 64, 224),
        tiny=(1, RANK, 256, 272) if eight else (1, 2, 32, 48),
        make=make,
        ours=Peer(ours, copies),
        peers={"torch": Peer(reference, copies)} | ({} if eight else {"fused": Peer(fused, copies)}),
        costs=costs,
        dtype=torch.float32,
        compiles=False,
    )
