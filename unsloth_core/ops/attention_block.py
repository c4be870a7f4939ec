"""Attention of a chunk of rows over itself and all rows before it: what long-context schedules loop over.

Formula: o = attention(q_all, k, v)[start : start + C], causal, where q are the rows from ``start`` on of q_all.
Keys behind the chunk are not read. Over chunks in any order this is the whole attention; and dk and dv of a key are the
sums of what the chunks from its own on send it. Walked from the last chunk to the first, the gradients of a chunk's own
keys are complete once it has been done:

    for start in reversed(range(0, N, C)):                     # each chunk's q, o and lse are rebuilt or loaded here
        _, residuals = attention_block.fwd(q, k, v, segments, needs=needs, start=start)
        dq, dk, dv, *_ = accumulate(residuals, do, dk, dv, needs=needs, donate=True, start=start)
        ...                                                    # rows [start, start + C) of dk and dv are final

Residuals: q, k, v, segments and sinks (arguments), o (an output), lse (an output if asked for, else 4·C·H new bytes).
Kernels and dtypes are those of ``attention``, and so are Bytes and Limits; the sums are fp32, and a chunk reads and
writes those of the keys that it sees (16·K bytes per key and head), in the order of the calls and without atomics: the
same bits in every run.
Source of the idea: only attention mixes tokens, so a layer can run in chunks of queries.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..autodiff import custom_vjp
from ..cost import Cost
from ..segments import Segments
from ..tree import ABSENT, Tree
from .attention import attention_bwd, attention_fwd
from .attention import cost as attention_cost


def attention_block_fwd(
    q_CHK: Tensor,
    k_NGK: Tensor,
    v_NGK: Tensor,
    segments: Segments,
    sinks_H: Tensor | Any = ABSENT,
    *,
    needs: Tree,
    start: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Any, Tree]:
    """Rows [start, start + C) of causal attention over ``segments`` of N rows; default: the last C of them.

    ``q_CHK`` (C, H, K): the queries of these rows. ``k_NGK``, ``v_NGK`` (N, G, K): of all rows; those behind the chunk
    may hold anything. The other options, what is returned and what is raised are as for ``attention``; ValueError too
    for a chunk that is not within the N rows.
    """
    start, end = _rows(q_CHK, k_NGK, start)
    q_segments, kv_segments = _cut(segments, start, end)
    statics = {"scale": scale, "window": window, "softcap": softcap, "return_lse": return_lse}
    out, (*_, o, lse, _, _, _) = attention_fwd(
        q_CHK, k_NGK[:end], v_NGK[:end], q_segments, kv_segments, sinks_H,
        needs=(*needs[:3], needs[3], needs[3], *needs[4:]), **statics,
    )  # fmt: skip
    return out, (q_CHK, k_NGK, v_NGK, o, lse, segments, sinks_H)


def attention_block_bwd(
    residuals: Tree,
    dy: Tensor | tuple[Tensor, Tensor],
    *,
    needs: Tree,
    start: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    """``(dq, dk, dv, ABSENT, dsinks)`` of this chunk: dk and dv (N, G, K) are zero for keys that it does not see."""
    _, k, v, *_ = residuals
    statics = {"start": start, "scale": scale, "window": window, "softcap": softcap, "return_lse": return_lse}
    dk, dv = (torch.zeros_like(t) if need else ABSENT for t, need in zip((k, v), needs[1:3], strict=True))
    return _backward(residuals, dy, dk, dv, needs=needs, **statics)


attention_block = custom_vjp(attention_block_fwd, attention_block_bwd)


def accumulate(
    residuals: Tree,
    dy: Tensor | tuple[Tensor, Tensor],
    dk_NGK: Tensor,
    dv_NGK: Tensor,
    *,
    needs: Tree,
    donate: bool = False,
    **statics: Any,
) -> tuple[Any, ...]:
    """Like ``attention_block.bwd``, but dk and dv are the sums ``dk_NGK`` and ``dv_NGK`` (N, G, K; fp32, channels
    contiguous) plus this chunk's share. With ``donate`` they are written in place and returned; rows behind the chunk
    are let alone either way. Raises ValueError for sums of another shape or dtype."""
    if not isinstance(residuals, tuple):  # those of the reference
        dq, dk, dv, *rest = attention_block.bwd(residuals, dy, needs=needs, **statics)
        sums = (
            given if d is ABSENT else given.add_(d) if donate else given + d
            for given, d in ((dk_NGK, dk), (dv_NGK, dv))
        )  # fmt: skip
        return dq, *sums, *rest
    for name, t, like in (("dk", dk_NGK, residuals[1]), ("dv", dv_NGK, residuals[2])):
        if t.shape != like.shape or t.dtype != torch.float32 or t.stride(2) != 1 or t.device != like.device:
            found = f"{t.dtype} {tuple(t.shape)} with strides {t.stride()} on {t.device}"
            expected = f"torch.float32 {tuple(like.shape)}, channels contiguous, on {like.device}"
            raise ValueError(f"attention_block: {name} is {found}, expected {expected}")
    if not donate:
        dk_NGK, dv_NGK = dk_NGK.clone(), dv_NGK.clone()
    return _backward(residuals, dy, dk_NGK, dv_NGK, needs=needs, **statics)


def _backward(
    residuals: Tree,
    dy: Any,
    dk: Tensor | Any,
    dv: Tensor | Any,
    *,
    needs: Tree,
    start: int | None = None,
    **statics: Any,
) -> tuple[Any, ...]:
    """Into ``dk`` and ``dv``, whose rows up to the end of the chunk are added to."""
    q, k, v, o, lse, segments, sinks = residuals
    start, end = _rows(q, k, start)
    q_segments, kv_segments = _cut(segments, start, end)
    dk_here, dv_here = (ABSENT if d is ABSENT else d[:end] for d in (dk, dv))
    dq, _, _, _, _, dsinks = inspect.unwrap(attention_bwd)(  # not prepared: it gets buffers among its options
        (q, k[:end], v[:end], o, lse, q_segments, kv_segments, sinks), dy,
        needs=(*needs[:3], needs[3], needs[3], *needs[4:]), add=True,
        into=(ABSENT, dk_here, dv_here), **statics,
    )  # fmt: skip
    return dq, dk if needs[1] else ABSENT, dv if needs[2] else ABSENT, ABSENT, dsinks


def _cut(segments: Segments, start: int, end: int) -> tuple[Segments, Segments]:
    """Queries and keys of rows [start, end) and [0, end). A segment is aligned at its end: that is cut off in both."""
    q_starts, q_ends = (t.clamp(start, end) - start for t in (segments.starts_S, segments.ends_S))
    kv_starts, kv_ends = (t.clamp(max=end) for t in (segments.starts_S, segments.ends_S))
    queries = Segments(starts_S=q_starts, ends_S=q_ends, max_len=min(segments.max_len, end - start))
    return queries, Segments(starts_S=kv_starts, ends_S=kv_ends, max_len=min(segments.max_len, end))


def _rows(q: Tensor, k: Tensor, start: int | None) -> tuple[int, int]:
    """The first row of the chunk, and the first behind it."""
    start = k.shape[0] - q.shape[0] if start is None else start
    if not 0 <= start <= start + q.shape[0] <= k.shape[0]:
        rows = f"rows {start} to {start + q.shape[0]}"
        raise ValueError(f"attention_block: the chunk is {rows}, expected some of the {k.shape[0]} of k")
    return start, start + q.shape[0]


def cost(
    lengths: Sequence[tuple[int, int]],
    H: int,
    G: int,
    K: int,
    itemsize: int,
    *,
    window: int | None = None,
    backward: bool = False,
) -> Cost:
    """Over segments of ``(queries, keys)``: as for ``attention``, and backward reads the sums of dk and dv as well,
    in fp32."""
    work = attention_cost(lengths, H, G, K, itemsize, window=window, backward=backward)
    keys = sum(keys for _, keys in lengths) * G * K
    return Cost(bytes=work.bytes + (2 * keys * (8 - itemsize) if backward else 0), flops=work.flops)
