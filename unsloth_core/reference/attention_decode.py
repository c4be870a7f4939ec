"""Attention of a few queries over a cache in plain PyTorch: pages are put one behind the other first."""

from typing import Any

import torch
from torch import Tensor

from ..segments import Segments
from ..tree import ABSENT
from .attention import attention


def attention_decode(
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGK: Tensor,
    q_segments: Segments,
    kv_segments: Segments,
    pages_SP: Tensor | Any = ABSENT,
    sinks_H: Tensor | Any = ABSENT,
    *,
    page: int | None = None,
    **statics: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """``o_NHK``, or ``(o_NHK, lse_NH)``; see :mod:`unsloth_core.ops.attention_decode`."""
    if pages_SP is not ABSENT and page is not None:
        within = torch.arange(page, device=pages_SP.device)
        rows = (pages_SP.long()[:, :, None] * page + within).flatten().clamp(0, k_MGK.shape[0] - 1)
        k_MGK, v_MGK = k_MGK[rows], v_MGK[rows]
        lengths_S = kv_segments.ends_S - kv_segments.starts_S
        room = pages_SP.shape[1] * page
        starts_S = room * torch.arange(len(lengths_S), dtype=torch.int32, device=lengths_S.device)
        kv_segments = Segments(starts_S=starts_S, ends_S=starts_S + lengths_S, max_len=kv_segments.max_len)
    return attention(q_NHK, k_MGK, v_MGK, q_segments, kv_segments, sinks_H, **statics)
