"""Optimizers as pairs of pure functions over trees, schedules, and clipping by the global norm."""

from .adamw import AdamWState, Optimizer, adamw
from .blockwise import Blockwise
from .clip import clip_factor, global_norm
from .schedule import Schedule, constant, cosine, linear

__all__ = [
    "AdamWState",
    "Blockwise",
    "Optimizer",
    "Schedule",
    "adamw",
    "clip_factor",
    "constant",
    "cosine",
    "global_norm",
    "linear",
]
