"""NF4 in plain PyTorch, both ways (format: bitsandbytes; data type: QLoRA, arXiv 2305.14314)."""

import math

import torch
from torch import Tensor

from ..tree import ABSENT
from ..weights import NF4, Nested

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


def quantize(t_MC: Tensor, *, double_quant: bool, block: int) -> NF4:
    """The nearest NF4 matrix, absmax of ``block`` elements; a midpoint goes to the lower entry, NaN to the highest."""
    table = torch.tensor(TABLE, dtype=torch.float32, device=t_MC.device)
    index, absmax = _nearest(t_MC.reshape(-1).float(), table, block)
    if index.numel() % 2:  # the missing low nibble of the last byte decodes to 0
        index = torch.nn.functional.pad(index, (0, 1), value=TABLE.index(0.0))
    codes = (index[0::2] << 4) | index[1::2]
    nested = ABSENT
    if double_quant:
        offset = absmax.mean()
        code_256 = _dynamic_map().to(t_MC.device)
        absmax, nested_absmax = _nearest(absmax - offset, code_256, 256)
        nested = Nested(absmax_P=nested_absmax, code_256=code_256, offset=offset)
    shape = (t_MC.shape[0], t_MC.shape[1])
    return NF4(codes=codes, absmax=absmax, nested=nested, shape=shape, dtype=t_MC.dtype, block=block)


def _nearest(x: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """uint8 indices into ascending ``code`` of ``x`` over its block's absmax, and each block's absmax (fp32)."""
    n = x.numel()
    blocks = torch.nn.functional.pad(x, (0, -n % block)).view(-1, block)
    absmax = blocks.abs().amax(1) if n else x.new_empty(0)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]  # a block of zeros encodes zeros
    midpoints = (code[:-1] + code[1:]) / 2
    return torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8).view(-1)[:n], absmax


def _dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map: seven decades, each with twice the points of the last, with both signs; 0 and 1."""
    positive = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        positive.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6))
    points = torch.cat(positive)
    return torch.cat([-points, points, torch.tensor([0.0, 1.0])]).sort().values
