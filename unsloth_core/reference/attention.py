"""Attention in plain PyTorch: explicit scores, a dense mask and a softmax that survives rows without visible
keys."""

import torch
from torch import Tensor

from ..segments import Segments


def attention(
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGK: Tensor,
    q_segments: Segments,
    kv_segments: Segments,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``o_NHK`` in q's dtype, and ``lse_NH`` in (at least) fp32 if asked; see
    :mod:`unsloth_core.ops.attention`.

    Memory is O(H·N·M). Gradients come from autograd and are zero, never NaN, for rows that see nothing.
    """
    wide = torch.promote_types(q_NHK.dtype, torch.float32)
    groups, size = k_MGK.shape[1], q_NHK.shape[2]
    # Every pass over the scores costs a CPU as much as a product: scale and sum are applied to q and o instead.
    q = q_NHK.to(wide).unflatten(1, (groups, -1)) * (size**-0.5 if scale is None else scale)
    k, v = k_MGK.to(wide), v_MGK.to(wide)

    scores = torch.einsum("ngrk,mgk->grnm", q, k)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(q_NHK, k_MGK, q_segments, kv_segments, causal, window), float("-inf"))

    # The maximum only shifts the exponent, so it carries no gradient; a row that sees nothing has sum 0 and
    # is patched before the division and the logarithm, not after: a NaN in the branch not taken would still
    # reach the gradient.
    if scores.shape[-1]:
        top = scores.detach().amax(-1, keepdim=True)
    else:
        top = scores.new_full((*scores.shape[:-1], 1), float("-inf"))
    top = top.masked_fill(top == float("-inf"), 0.0)
    p = torch.exp(scores - top)
    total = p.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    o = (torch.einsum("grnm,mgk->ngrk", p, v) / total.permute(2, 0, 1, 3)).flatten(1, 2).to(q_NHK.dtype)
    if not return_lse:
        return o
    lse = (top + total.log()).masked_fill(empty, float("-inf"))
    return o, lse.squeeze(-1).flatten(0, 1).T


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
