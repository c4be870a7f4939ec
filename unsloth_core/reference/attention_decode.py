"""Attention of a few queries over a cache in plain PyTorch: pages are put one behind the other first."""

from typing import Any

import torch
from torch import Tensor

from ..segments import Segments
from ..tree import ABSENT
from .attention import attention
from .dtypes import check_attention


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
    """``o_NHK``, or ``(o_NHK, lse_NH)``; see :mod:`unsloth_core.ops.attention_decode`. Takes any number of queries.
    Raises ValueError for pages that are no table of enough rows."""
    segments = {"q_segments": q_segments, "kv_segments": kv_segments}
    check_attention("attention_decode", q_NHK, k_MGK, v_MGK, segments, sinks_H)
    if (pages_SP is ABSENT) != (page is None):
        raise ValueError(f"attention_decode: page is {page}, expected a size if there are pages and None if not")
    if page is not None:
        S = q_segments.starts_S.shape[0]
        if page < 1 or page & (page - 1):
            raise ValueError(f"attention_decode: page is {page}, expected a power of two")
        if pages_SP.ndim != 2 or pages_SP.shape[0] != S or pages_SP.dtype != torch.int32 or pages_SP.stride(1) != 1:
            raise ValueError(
                f"attention_decode: pages is {pages_SP.dtype} {tuple(pages_SP.shape)}, strides {pages_SP.stride()}, "
                f"expected torch.int32 (S, P) = ({S}, P) with contiguous rows"
            )
        if pages_SP.shape[1] * page < kv_segments.max_len:
            room = f"{pages_SP.shape[1]} pages of {page} rows"
            raise ValueError(f"attention_decode: {room}, expected room for {kv_segments.max_len}")
        within = torch.arange(page, device=pages_SP.device)
        rows = (pages_SP.long()[:, :, None] * page + within).flatten().clamp(0, k_MGK.shape[0] - 1)
        k_MGK, v_MGK = k_MGK[rows], v_MGK[rows]
        lengths_S = kv_segments.ends_S - kv_segments.starts_S
        room = pages_SP.shape[1] * page
        starts_S = room * torch.arange(len(lengths_S), dtype=torch.int32, device=lengths_S.device)
        kv_segments = Segments(starts_S=starts_S, ends_S=starts_S + lengths_S, max_len=kv_segments.max_len)
    return attention(q_NHK, k_MGK, v_MGK, q_segments, kv_segments, sinks_H, **statics)
