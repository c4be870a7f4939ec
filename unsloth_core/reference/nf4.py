"""NF4 to dense in plain PyTorch (format: bitsandbytes; data type: QLoRA, arXiv 2305.14314)."""

import math

import torch
from torch import Tensor

from ..tree import ABSENT
from ..weights import NF4

# The 16 quantiles of a normal distribution, scaled to [-1, 1], printed in QLoRA's appendix E.
TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def dequantize(w: NF4) -> Tensor:
    """(M, C) in ``w.dtype``: ``table[code] * absmax[element // block]`` in fp32, rounded once."""
    absmax = w.absmax
    if w.nested is not ABSENT:
        block = torch.arange(absmax.numel(), device=absmax.device) // 256
        # Two statements, two roundings: bitsandbytes rounds the product before it adds the offset.
        absmax = w.nested.code_256[w.absmax.to(torch.int32)] * w.nested.absmax_P[block]
        absmax = absmax + w.nested.offset
    codes = w.codes.reshape(-1)
    nibbles = torch.stack([codes >> 4, codes & 0xF], dim=1).reshape(-1)[: math.prod(w.shape)]
    table = torch.tensor(TABLE, dtype=torch.float32, device=codes.device)
    values = table[nibbles.to(torch.int32)] * absmax.repeat_interleave(w.block)[: nibbles.numel()]
    return values.to(w.dtype).reshape(w.shape)
