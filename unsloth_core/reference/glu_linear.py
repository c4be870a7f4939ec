"""A gated linear unit and the product behind it, in plain PyTorch."""

from typing import Any

from torch import Tensor

from ..tree import ABSENT
from ..weights import Weight
from .glu import glu
from .linear import linear


def glu_linear(
    gate_up_N2F: Tensor, w: Weight, bias: Tensor | Any = ABSENT, add: Tensor | Any = ABSENT, *, act: str = "silu"
) -> Tensor:
    """``(act(gate) * up) W^T + bias + add``, the unit rounded to the dtype of ``gate_up``."""
    return linear(glu(gate_up_N2F, act=act), w, bias, add)
