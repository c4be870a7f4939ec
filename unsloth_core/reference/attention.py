"""Attention in plain PyTorch: explicit scores, a dense mask and a softmax that survives rows without visible
keys."""

from typing import Any

import torch
from torch import Tensor

from ..segments import Segments
from ..tree import ABSENT
from .dtypes import check_attention


def attention(
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGK: Tensor,
    q_segments: Segments,
    kv_segments: Segments,
    sinks_H: Tensor | Any = ABSENT,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``o_NHK`` in q's dtype, and ``lse_NH`` in (at least) fp32 if asked; see
    :mod:`unsloth_core.ops.attention`. ``sinks_H`` joins the softmax of rows that see a key, as gpt-oss has it.

    Memory is O(H·N·M). Gradients come from autograd and are zero, never NaN, for rows that see nothing. Raises
    ValueError for shapes that do not fit, other dtypes, and a window or cap that means nothing.
    """
    segments = {"q_segments": q_segments, "kv_segments": kv_segments}
    check_attention("attention", q_NHK, k_MGK, v_MGK, segments, sinks_H)
    if window is not None and not (isinstance(window, int) and 1 <= window < 2**30):
        raise ValueError(f"attention: window is {window}, expected an integer, at least 1 and below 2**30")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap is {softcap}, expected a positive number")
    wide = torch.promote_types(q_NHK.dtype, torch.float32)
    groups, size = k_MGK.shape[1], q_NHK.shape[2]
    # The scale goes on q: on a CPU a pass over the scores costs as much as a product.
    q = q_NHK.to(wide).unflatten(1, (groups, -1)) * (size**-0.5 if scale is None else scale)
    k, v = k_MGK.to(wide), v_MGK.to(wide)

    scores = torch.einsum("ngrk,mgk->grnm", q, k)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # A row that sees nothing gets scores of 0 and is patched at the end: of -inf alone, softmax would make NaN,
    # and a NaN in the branch not taken would still reach the gradient.
    visible = _visible(q_NHK, k_MGK, q_segments, kv_segments, causal, window)
    empty_N1 = ~visible.any(-1, keepdim=True)
    scores = torch.where(visible, scores, torch.where(empty_N1, 0.0, float("-inf")).to(wide))
    if sinks_H is not ABSENT:  # one more column, that of a key whose value is 0
        sinks = sinks_H.to(wide).unflatten(0, (groups, -1))[:, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks.masked_fill(empty_N1, 0.0)], -1)
        v = torch.cat([v, v.new_zeros(1, *v.shape[1:])])
    o = torch.einsum("grnm,mgk->ngrk", scores.softmax(-1), v).flatten(1, 2)
    o = o.masked_fill(empty_N1[:, None], 0.0).to(q_NHK.dtype)
    if not return_lse:
        return o
    return o, scores.logsumexp(-1).flatten(0, 1).T.masked_fill(empty_N1, float("-inf"))


def _visible(
    q_NHK: Tensor,
    k_MGK: Tensor,
    q_segments: Segments,
    kv_segments: Segments,
    causal: bool,
    window: int | None,
) -> Tensor:
    """(N, M) bool: may query row i see key row j? From the definition, row by row, with no search."""
    i = torch.arange(q_NHK.shape[0], device=q_NHK.device)[:, None]
    j = torch.arange(k_MGK.shape[0], device=q_NHK.device)[:, None]
    in_q = (q_segments.starts_S <= i) & (i < q_segments.ends_S)  # (N, S)
    in_kv = (kv_segments.starts_S <= j) & (j < kv_segments.ends_S)  # (M, S)
    number = torch.arange(1, in_q.shape[1] + 1, device=q_NHK.device)
    segment_N, segment_M = (in_q * number).sum(1), (in_kv * number).sum(1)  # 0: in no segment

    q_len, kv_len = q_segments.ends_S - q_segments.starts_S, kv_segments.ends_S - kv_segments.starts_S
    p = i - (in_q * (q_segments.starts_S - kv_len + q_len)).sum(1)[:, None]  # aligned to the segment's end
    local = (j - (in_kv * kv_segments.starts_S).sum(1)[:, None]).T
    visible = (segment_N[:, None] == segment_M) & (segment_N[:, None] > 0)
    if causal:
        visible = visible & (local <= p)
    if window is not None:
        visible = visible & (local > p - window)
    return visible
