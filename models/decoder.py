"""The decoder that all families share: embed -> layers -> norm -> head or loss, over one packed axis of tokens.

A family gives ``embed``, ``pre``, ``post``, ``final`` and ``spec``; only attention mixes tokens, so packing,
batches, remat and cached decoding are loops around the same functions."""

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from unsloth_core import backend, offload, tree
from unsloth_core.autodiff import SAVE, Policy
from unsloth_core.batch import Batch
from unsloth_core.cache import Cache
from unsloth_core.ops.attention import attention
from unsloth_core.ops.linear import linear
from unsloth_core.ops.linear_cross_entropy import linear_cross_entropy
from unsloth_core.remat import remat, tiled
from unsloth_core.rotary import Rotary
from unsloth_core.segments import Segments
from unsloth_core.tree import ABSENT

if TYPE_CHECKING:
    from unsloth_core.tokenizer import Tokenizer


class AttentionSpec(NamedTuple):
    """How one layer attends; everything but ``rope`` is handed to the attention op."""

    scale: float
    rope: Rotary
    window: int | None = None
    softcap: float | None = None

    @property
    def statics(self) -> dict[str, Any]:
        """Options of the attention op."""
        return {"scale": self.scale, "window": self.window, "softcap": self.softcap}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a training step runs, which never changes what it computes.

    ``policy``: what each layer keeps for backward (see :func:`unsloth_core.remat.remat`); None is the family's
    ``SAVED`` with kernels, and plain autograd with the reference backend. ``last``: a number of layers, counted from
    the end, and the policy that they have instead. ``tile``: run ``pre`` and ``post`` on so many
    tokens at a time; a layer's calls are then "pre", "attn" and "post", and None keeps "attn". ``decode_once``: what
    backward reads of NF4 weights it decodes once per layer, not once per product. ``chunk_logits``: how many logits
    exist at a time (see :func:`unsloth_core.ops.linear_cross_entropy`); None: its default.
    """

    policy: Policy | None = None
    last: tuple[int, Policy] | None = None
    tile: int | None = None
    decode_once: bool = True
    chunk_logits: int | None = None

    @staticmethod
    def of(policy: "Schedule | Policy | None") -> "Schedule":
        """A policy alone is a schedule that is the default otherwise. Raises ValueError for what is neither."""
        if not isinstance(policy, Schedule | Mapping | None):
            raise ValueError(f"policy is {policy!r}, expected a Schedule or a dict from names of calls to fates")
        return policy if isinstance(policy, Schedule) else Schedule(policy)


@dataclasses.dataclass(frozen=True)
class Model:
    """A family's pure functions bound to a config and a tokenizer; the weights are always an argument."""

    family: ModuleType
    config: Any
    tokenizer: "Tokenizer | None" = None
    source: str = ""  # where it was loaded from

    def logits(self, params: Any, tokens_BT: Tensor) -> Tensor:
        """(B, T) token ids -> (B, T, V) logits in the dtype of the weights, causal within each row.

        Raises ValueError for another shape or dtype; an id outside [0, V) gives NaN."""
        if tokens_BT.ndim != 2 or tokens_BT.dtype not in (torch.int64, torch.int32):
            got = f"{tokens_BT.dtype} of shape {tuple(tokens_BT.shape)}"
            raise ValueError(f"logits: tokens_BT is {got}, expected torch.int64 or torch.int32 of shape (B, T)")
        length = tokens_BT.shape[1]
        positions_N = torch.arange(length, device=tokens_BT.device).repeat(tokens_BT.shape[0])
        segments = Segments.uniform(*tokens_BT.shape, device=tokens_BT.device)
        x_ND = hidden(self.family, params, tokens_BT.flatten(), positions_N, segments, max_position=length - 1)
        return head_logits(params, x_ND).unflatten(0, tuple(tokens_BT.shape))

    def loss(
        self, params: Any, batch: Batch, *, count: Tensor | None = None, key: Tensor | None = None,
        policy: Schedule | Policy | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """``(loss, aux)``: cross-entropy summed over the batch's targets, divided by ``count``.

        ``count``: 0-d device tensor; default the batch's own number of targets. Giving the count of a larger batch
        makes gradients of microbatches add up to that batch's. ``key``: for random ops; no family has any yet.
        ``policy``: a :class:`Schedule`, or the policy of one: what each layer keeps for backward; None is the output
        of every product and of attention (the family's ``SAVED``) with kernels, and plain autograd with the reference
        backend. A batch on another device is copied to the weights'. aux: ``loss_sum`` and ``count``, 0-d fp32; of
        mixtures of experts also ``balance``, the load-balancing loss over the batch's real tokens, ``top_k`` where all
        experts work alike. The loss has ``router_aux_loss_coef`` times it added where config.json has
        ``output_router_logits``, as in ``transformers``, but weighed by ``batch.count / count``, so that microbatches
        add up to their mean. Raises ValueError for what is no batch, a key, and a policy that names no call of a layer.
        """
        if not isinstance(batch, Batch):
            raise ValueError(f"loss: batch is a {type(batch).__name__}, expected a Batch of uc.data: batches, Batch.of")
        if key is not None:
            raise ValueError(f"loss: key was given, but no op of family {self.family.__name__} is random")
        if batch.tokens_N.device != params.norm.device:
            batch = batch.to(params.norm.device)
        experts = getattr(self.config, "experts", None)
        x_ND, stats = hidden_and_stats(
            self.family, params, batch.tokens_N, batch.positions_N, batch.segments,
            max_position=batch.max_position - 1, policy=policy, valid_N=batch.valid_N if experts else ABSENT,
        )  # fmt: skip
        head_VD = params.embed if params.head is ABSENT else params.head
        total = linear_cross_entropy(
            x_ND, head_VD, batch.targets_M, batch.target_rows_M, softcap=self.config.logit_softcap,
            chunk_logits=Schedule.of(policy).chunk_logits, name="loss",
        )  # fmt: skip
        count = batch.count if count is None else count
        loss, aux = total / count, {"loss_sum": total, "count": count}
        if experts and stats is not ABSENT:
            aux["balance"] = balance(*stats, top_k=experts.top_k)
            if experts.balance_coefficient:
                loss = loss + experts.balance_coefficient * aux["balance"] * (batch.count / count)
        return loss, aux


def hidden(
    family: ModuleType, params: Any, tokens_N: Tensor, positions_N: Tensor, segments: Segments, *,
    max_position: int, policy: Schedule | Policy | None = None,
) -> Tensor:  # fmt: skip
    """The normed hidden state (N, D) of every token of a packed buffer; ``max_position``: host bound on positions."""
    return hidden_and_stats(
        family, params, tokens_N, positions_N, segments, max_position=max_position, policy=policy
    )[0]  # fmt: skip


def hidden_and_stats(
    family: ModuleType, params: Any, tokens_N: Tensor, positions_N: Tensor, segments: Segments, *,
    max_position: int, policy: Schedule | Policy | None = None, valid_N: Any = ABSENT,
) -> tuple[Tensor, Any]:  # fmt: skip
    """:func:`hidden` and what the layers' ``post`` counted, summed over layers (ABSENT: nothing).

    ``valid_N``: the tokens that count, for families that count any; ABSENT: all.
    """
    cfg = params.config
    schedule, host = Schedule.of(policy), offload.Host()
    kept: Policy | None = schedule.policy
    if kept is None and (schedule.tile or backend.resolve(tokens_N) == "triton"):
        kept = dict.fromkeys(("attn",) if schedule.tile else family.SAVED, SAVE)
    rotations = tables(family, cfg, positions_N, max_position, dtype=torch.float32)
    x_ND = family.embed(params, tokens_N, cfg)
    counted: tuple[Any, ...] = (valid_N,) if valid_N is not ABSENT else ()
    total: Any = ABSENT
    for i, w in enumerate(params.layers):
        attend = family.spec(cfg, i)
        if schedule.last and i >= len(params.layers) - schedule.last[0]:
            kept = schedule.last[1]
        run = remat(layer(family, cfg, attend, schedule), kept, host=host, decode_once=schedule.decode_once)
        x_ND, stats = run(w, x_ND, rotations[attend.rope], segments, *counted)
        if stats is not ABSENT:  # of a mixture of experts some layers may be dense
            total = stats if total is ABSENT else tree.map(torch.add, total, stats)
    return family.final(params, x_ND, cfg), total


def hidden_cached(
    family: ModuleType, params: Any, tokens_N: Tensor, positions_N: Tensor, q_segments: Segments, cache: Cache, *,
    max_position: int,
) -> tuple[Tensor, Cache]:  # fmt: skip
    """Like :func:`hidden` for new tokens of cached sequences (a prompt, or one token each); appends to the cache.

    Token i of q-segment b is stored behind what sequence b holds already. The cache is donated: use the one returned.
    """
    cfg = params.config
    rotations = tables(family, cfg, positions_N, max_position, dtype=torch.float32)
    slots_N, cache = cache.extend(q_segments, tokens_N.shape[0])
    kv_segments = cache.segments()
    x_ND = family.embed(params, tokens_N, cfg)
    for i, w in enumerate(params.layers):
        attend = family.spec(cfg, i)
        x_ND, q_NHK, k_NGK, v_NGK = family.pre(w, x_ND, rotations[attend.rope], cfg)
        k_MGK, v_MGK = cache.append(i, slots_N, k_NGK, v_NGK)
        o_NHK = attention(q_NHK, k_MGK, v_MGK, q_segments, kv_segments, name="attn", **attend.statics)
        x_ND, _ = family.post(w, x_ND, o_NHK, cfg)
    return family.final(params, x_ND, cfg), cache


def layer(
    family: ModuleType, cfg: Any, attend: AttentionSpec, schedule: Schedule = Schedule()
) -> Callable[..., tuple[Tensor, Any]]:
    """One layer as a function of its weights, the stream, the rotation and the segments: what ``remat`` takes."""

    def pre(w: Any, x_ND: Tensor, rot: tuple[Tensor, Tensor]) -> Any:
        return family.pre(w, x_ND, rot, cfg)

    def post(w: Any, x_ND: Tensor, o_NHK: Tensor, *counted: Tensor) -> tuple[Tensor, Any]:
        return family.post(w, x_ND, o_NHK, cfg, *counted)

    if schedule.tile:
        pre = tiled(pre, schedule.tile, name="pre", decode_once=schedule.decode_once)
        post = tiled(post, schedule.tile, name="post", sums=(False, True), decode_once=schedule.decode_once)

    def run(
        w: Any, x_ND: Tensor, rot: tuple[Tensor, Tensor], segments: Segments, *counted: Tensor
    ) -> tuple[Tensor, Any]:
        x_ND, q_NHK, k_NGK, v_NGK = pre(w, x_ND, rot)
        o_NHK = attention(q_NHK, k_NGK, v_NGK, segments, segments, name="attn", **attend.statics)
        return post(w, x_ND, o_NHK, *counted)

    return run


def balance(prob_sums_E: Tensor, counts_E: Tensor, *, top_k: int) -> Tensor:
    """The load-balancing loss of Switch Transformer (arXiv 2101.03961) over all rows that went through a router.

    ``E · Σ_e f_e · P_e``: the share of rows that chose expert e (they sum to ``top_k``) times its mean probability.
    Differentiable in the probabilities. Not divided by ``top_k``, as in ``transformers``: even work gives ``top_k``.
    """
    rows = counts_E.sum() / top_k
    return len(counts_E) * (counts_E / rows * (prob_sums_E / rows)).sum()


def tables(
    family: ModuleType, cfg: Any, positions_N: Tensor, max_position: int, *, dtype: torch.dtype
) -> dict[Rotary, tuple[Tensor, Tensor]]:
    """cos and sin (N, J) for every kind of rotation that the layers use; most families have one."""
    kinds = {family.spec(cfg, i).rope for i in range(cfg.num_hidden_layers)}
    return {kind: kind.table(positions_N, max_position=max_position, dtype=dtype) for kind in kinds}


def head_logits(params: Any, x_ND: Tensor) -> Tensor:
    """(N, D) normed hidden states -> (N, V) logits, capped where the family caps them."""
    logits_NV = linear(x_ND, params.embed if params.head is ABSENT else params.head, name="head")
    cap = params.config.logit_softcap
    return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)


def heads(cfg: Any) -> dict[str, int]:
    """How ``linear_rope`` is to split a stacked product."""
    return {"heads": cfg.num_attention_heads, "kv_heads": cfg.num_key_value_heads}


def split_heads(qkv: Tensor, cfg: Any) -> tuple[Tensor, Tensor, Tensor]:
    """A stacked product (N, Q + 2R) as views q (N, H, K), k (N, G, K), v (N, G, K)."""
    heads, kv_heads, size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    q, k, v = qkv.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)
    return q.unflatten(-1, (heads, size)), k.unflatten(-1, (kv_heads, size)), v.unflatten(-1, (kv_heads, size))
