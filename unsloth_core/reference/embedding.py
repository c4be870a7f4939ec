"""Embedding in plain PyTorch: rows of a table by id, times a scale that is rounded to the table's dtype first."""

import torch
from torch import Tensor

from ..weights import NF4
from .dtypes import check_floats
from .nf4 import dequantize


def embedding(ids_N: Tensor, w_VD: Tensor | NF4, *, scale: float = 1.0) -> Tensor:
    """``w[ids] * scale``, (N, D) in w's dtype, the product rounded once; NaN where the id is outside [0, V)."""
    if ids_N.ndim != 1:
        raise ValueError(f"embedding: ids has shape {tuple(ids_N.shape)}, expected (N,)")
    if ids_N.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"embedding: ids has dtype {ids_N.dtype}, expected int32 or int64")
    if len(w_VD.shape) != 2:
        raise ValueError(f"embedding: w has shape {tuple(w_VD.shape)}, expected (V, D)")
    if isinstance(w_VD, NF4):
        w_VD = dequantize(w_VD)
    check_floats("embedding", w=w_VD)
    inside = (ids_N >= 0) & (ids_N < w_VD.shape[0])
    rows_ND = w_VD.index_select(0, torch.where(inside, ids_N, 0))
    return torch.where(inside.unsqueeze(1), rows_ND * w_VD.new_full((), scale), torch.nan)
