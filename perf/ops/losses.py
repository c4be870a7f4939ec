"""Losses of logits, and of the product that makes them."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from unsloth_core import backend
from unsloth_core import ops as uc

from .case import Case, Yardstick, cost_of


def cases() -> Iterator[Case]:
    """Those of this file."""
    loss, linear_loss, logprob = map(cost_of, ("cross_entropy", "linear_cross_entropy", "linear_logprob"))
    loss_and_grad = importlib.import_module("unsloth_core.ops.cross_entropy").loss_and_grad
    yield Case(
        op="cross_entropy",  # tokens, vocabulary
        shapes=((4096, 128256),),
        small=(64, 128256),
        tiny=(4, 40),
        make=lambda r, N, V: (r.normal(N, V), r.ids(N, V)),
        wanted=lambda logits, targets: [logits],
        ours=uc.cross_entropy,
        peers={
            "torch": backend.reference("cross_entropy"),
            "F.cross_entropy": lambda logits, targets: F.cross_entropy(logits, targets, reduction="none"),
        },
        costs=lambda args, N, V: {"fwd": loss(N, V, 2), "bwd": loss(N, V, 2, backward=True)},
    )
    yield Case(
        op="cross_entropy_loss_and_grad",  # tokens, vocabulary; the cotangent is known, so one kernel gives both
        shapes=((4096, 128256),),
        small=(64, 128256),
        tiny=(4, 40),
        make=lambda r, N, V: (r.normal(N, V), r.ids(N, V)),
        ours=loss_and_grad,
        peers={"torch": backend.reference("cross_entropy.loss_and_grad")},
        costs=lambda args, N, V: {"fwd": loss(N, V, 2, backward=True)},
    )
    yield Case(
        op="linear_cross_entropy",  # tokens, vocabulary, width; the head is frozen, dx is made in the forward pass
        shapes=((8192, 128256, 4096),),
        small=(512, 128256, 4096),
        tiny=(4, 40, 32),
        make=lambda r, N, V, D: (r.normal(N, D), r.matrix(V, D), r.ids(N, V)),
        wanted=lambda x, w, targets: [x],
        ours=uc.linear_cross_entropy,
        peers={"torch": backend.reference("linear_cross_entropy"), **_chunked_of_pytorch()},
        costs=lambda args, N, V, D: {"fwd+bwd": linear_loss(N, D, V, N, 2, dx=True)},
    )
    yield Case(
        op="linear_cross_entropy_low_memory",  # the same in chunks of 512 tokens
        shapes=((8192, 128256, 4096),),
        small=(1024, 128256, 4096),
        tiny=(4, 40, 32),
        make=lambda r, N, V, D: (r.normal(N, D), r.matrix(V, D), r.ids(N, V)),
        wanted=lambda x, w, targets: [x],
        ours=lambda *args: uc.linear_cross_entropy(*args, chunk_logits=2**26),
        peers={"torch": backend.reference("linear_cross_entropy")},
        costs=lambda args, N, V, D: {"fwd+bwd": linear_loss(N, D, V, N, 2, dx=True)},
    )
    yield Case(
        op="linear_logprob",  # tokens, vocabulary, width; the head is frozen, only the log-probability gets a cotangent
        shapes=((8192, 128256, 4096),),
        small=(512, 128256, 4096),
        tiny=(4, 40, 32),
        make=lambda r, N, V, D: (r.normal(N, D), r.matrix(V, D), r.ids(N, V)),
        wanted=lambda x, w, targets: [x],
        ours=lambda *args: uc.linear_logprob(*args)[0],
        peers={"torch": lambda *args: backend.reference("linear_logprob")(*args)[0]},
        costs=lambda args, N, V, D: {"fwd+bwd": logprob(N, D, V, N, 2, dx=True)},
        yardsticks={
            "ours: linear_cross_entropy": Yardstick(
                uc.linear_cross_entropy,
                backend.reference("linear_cross_entropy"),
                lambda args, N, V, D: {"fwd+bwd": linear_loss(N, D, V, N, 2, dx=True)},
            )
        },
    )


def _chunked_of_pytorch() -> dict[str, Callable[..., Any]]:
    """PyTorch's own loss in chunks, which 2.13 has."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}
    options = torch.nn.LinearCrossEntropyOptions()
    return {
        "F.linear_cross_entropy": lambda x, w, targets: F.linear_cross_entropy(
            x, w, targets, reduction="sum", options=options
        )
    }
