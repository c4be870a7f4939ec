"""What all ops demand of their tensors alike, in one wording. The rest of an op's rules stand in its own file."""

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_dtype(op: str, name: str, t: Tensor) -> None:
    """Raises ValueError for a dtype that the kernels do not take, such as float64."""
    if t.dtype not in DTYPES:
        raise ValueError(f"{op}: {name} has dtype {t.dtype}, expected float16, bfloat16 or float32")


def check_device(op: str, name: str, t: Tensor, of: str, device: torch.device) -> None:
    """Raises ValueError for a tensor that is not on ``device``, which is that of the argument ``of``."""
    if t.device != device:
        raise ValueError(f"{op}: {name} is on {t.device}, expected {of}'s device {device}")
