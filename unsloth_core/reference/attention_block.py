"""Attention of a chunk in plain PyTorch: the whole attention up to the chunk's end, of which its rows are kept."""

from typing import Any

import torch
from torch import Tensor

from ..segments import Segments
from ..tree import ABSENT
from .attention import attention


def attention_block(
    q_CHK: Tensor,
    k_NGK: Tensor,
    v_NGK: Tensor,
    segments: Segments,
    sinks_H: Tensor | Any = ABSENT,
    *,
    start: int | None = None,
    **statics: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Rows [start, start + C) of causal attention; see :mod:`unsloth_core.ops.attention_block`."""
    start = k_NGK.shape[0] - q_CHK.shape[0] if start is None else start
    end = start + q_CHK.shape[0]
    if not 0 <= start <= end <= k_NGK.shape[0]:
        chunk = f"rows {start} to {end}"
        raise ValueError(f"attention_block: the chunk is {chunk}, expected some of the {k_NGK.shape[0]} of k")
    starts_S, ends_S = segments.starts_S.clamp(max=end), segments.ends_S.clamp(max=end)
    segments = Segments(starts_S=starts_S, ends_S=ends_S, max_len=segments.max_len)
    q_NHK = torch.cat([q_CHK.new_zeros(start, *q_CHK.shape[1:]), q_CHK])
    out = attention(q_NHK, k_NGK[:end], v_NGK[:end], segments, segments, sinks_H, **statics)
    return (out[0][start:], out[1][start:]) if isinstance(out, tuple) else out[start:]
