"""Gated linear unit in plain PyTorch: activation and product in at least fp32, rounded once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .dtypes import check_floats


def glu(gate_up: Tensor, *, act: str = "silu") -> Tensor:
    """``act(gate) * up``; the gate is the first F columns of ``gate_up`` (..., 2F), ``up`` the others."""
    if gate_up.ndim == 0 or gate_up.shape[-1] == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"glu: gate_up has shape {tuple(gate_up.shape)}, expected (..., 2F) with F >= 1")
    check_floats("glu", gate_up=gate_up)
    if act not in ("silu", "gelu_tanh", "gelu_erf", "relu2"):
        raise ValueError(f"glu: act is {act!r}, expected one of ('silu', 'gelu_tanh', 'gelu_erf', 'relu2')")
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    if act == "silu":
        activated = F.silu(gate)
    elif act == "relu2":
        activated = F.relu(gate).square()
    else:
        activated = F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none")
    return (activated * up).to(gate_up.dtype)
