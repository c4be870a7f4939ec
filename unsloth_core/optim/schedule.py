"""Learning-rate schedules: pure functions from a step to a rate, both 0-d tensors on the device.

A schedule is any callable ``step -> rate``; ``step`` is an int64 scalar, 0 for the first update. Nothing here
looks at a value, so a captured CUDA graph replays with the right rate. Rates are float64: a rate times a
weight decay must not be rounded before the optimizer rounds it once. A warmup of w steps uses peak/w,
2·peak/w, ..., peak, and a decay ends behind the last step, so no update is spent at rate zero (the usual
formulas, ``step/w`` and ``cos``, waste the first).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Schedule = Callable[[Tensor], Tensor]


def constant(rate: float) -> Schedule:
    """The same rate at every step."""
    _non_negative("constant", rate=rate)
    return lambda step: torch.full_like(step, rate, dtype=torch.float64)


def linear(peak: float, steps: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Linear warmup, then a straight line from ``peak`` to ``final`` at step ``steps``, constant after it."""
    return _warm_then("linear", peak, steps, warmup, final, lambda left: left)


def cosine(peak: float, steps: int, warmup: int = 0, final: float = 0.0) -> Schedule:
    """Linear warmup, then half a cosine from ``peak`` to ``final`` at step ``steps``, constant after it.

    The shape is from Loshchilov & Hutter, "SGDR", 2017.
    """
    return _warm_then("cosine", peak, steps, warmup, final, lambda left: (1 - torch.cos(math.pi * left)) / 2)


def _warm_then(
    name: str, peak: float, steps: int, warmup: int, final: float, shape: Callable[[Tensor], Tensor]
) -> Schedule:
    """``shape`` maps the fraction of the decay that is left (1 to 0) to the fraction of the height left."""
    _non_negative(name, peak=peak, warmup=warmup, final=final)
    if steps <= warmup:
        raise ValueError(f"{name}: steps = {steps}, expected more than warmup = {warmup}")

    def rate(step: Tensor) -> Tensor:
        step = step.double()
        left = ((steps - step) / (steps - warmup)).clamp(0.0, 1.0)
        decayed = final + (peak - final) * shape(left)
        return torch.where(step < warmup, peak * (step + 1) / max(warmup, 1), decayed)

    return rate


def _non_negative(name: str, **values: float) -> None:
    for key, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}: {key} = {value}, expected a finite number >= 0")
