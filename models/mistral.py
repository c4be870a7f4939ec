"""Mistral 7B v0.1 to v0.3, Mistral Nemo, Mistral Small, Ministral 8B, and Mixtral 8x7B and 8x22B.

What differs from Llama: a token may attend to no more than ``sliding_window`` tokens, itself included (7B v0.1 in all
layers, Ministral where ``layer_types`` says so; the others have no window); the heads together need not be as wide as
the stream (Nemo and Small: 4096 and 5120), so ``o`` is not square; no linear has a bias. Mixtral has eight MLPs in
every layer, its experts: a router gives a token to two of them, and adds what they answer, weighed by its softmax over
these two. Source: Jiang et al. 2023 (arXiv 2310.06825) and 2024 (2401.04088); the balance of experts: Fedus et al. 2021
(2101.03961); ``transformers``' modeling_mistral and modeling_mixtral for the rounding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unsloth_core.ops.add_rms_norm import add_rms_norm
from unsloth_core.ops.embedding import embedding
from unsloth_core.ops.glu import glu
from unsloth_core.ops.glu_linear import glu_linear
from unsloth_core.ops.grouped_linear import grouped_linear
from unsloth_core.ops.linear import linear
from unsloth_core.ops.linear_rope import linear_rope
from unsloth_core.ops.rms_norm import rms_norm
from unsloth_core.ops.route import route
from unsloth_core.rotary import Rotary
from unsloth_core.tree import ABSENT, leaf, pytree, static
from unsloth_core.weights import Weight, blocks

from .config import ConfigReader, Experts, letters
from .decoder import AttentionSpec, heads

# What the default policy keeps between forward and backward: the output of every product and of attention.
SAVED = ("qkv", "attn", "mid", "gate_up")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shapes and constants, by their Hugging Face names; ``windows`` has one entry for each layer."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rotary: Rotary
    windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    experts: Experts | None  # Mixtral
    has: frozenset[str]
    logit_softcap: None = None

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "Config":
        """From the content of ``config.json``. Raises ValueError naming a field that is missing, bad or not handled."""
        read = ConfigReader(raw)
        read.expect("hidden_act", "silu")
        read.expect("attention_dropout", 0, 0.0)
        layers = read.layers(32)
        mixtral = raw.get("model_type") == "mixtral"
        experts = None
        if mixtral:
            read.expect("router_jitter_noise", 0, 0.0)
            experts = read.experts(8, top_k=2, renormalise=True)
        window = read.window(None if mixtral else 4096)
        windows = (window,) * layers
        if raw.get("model_type") == "ministral":  # in "mistral" the field would say nothing: it stays unknown there
            windows = read.windows(window, [window is not None] * layers)
        heads = read.size("num_attention_heads", 32)
        width = read.size("hidden_size", 4096)
        head_dim = read.size("head_dim", width // heads)
        positions = read.size("max_position_embeddings", 131072)
        config = Config(
            hidden_size=width,
            intermediate_size=read.size("intermediate_size", 14336),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=read.kv_heads(heads, 8),
            head_dim=head_dim,
            vocab_size=read.size("vocab_size", 32000),
            max_position_embeddings=positions,
            rms_norm_eps=read.number("rms_norm_eps", 1e-5 if mixtral else 1e-6),
            rotary=Rotary.from_hf({**raw, "max_position_embeddings": positions}, head_dim=head_dim),
            windows=windows,
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            experts=experts,
            has=frozenset({"router", "expert_gate_up", "expert_down"} if mixtral else {"gate_up", "down"}),
        )
        read.finish()
        return config

    @property
    def dims(self) -> dict[str, int]:
        """The letters of the weight declarations."""
        return {**letters(self), "E": self.experts.count if self.experts else 0}


@pytree
class Layer:
    """The weights of one layer."""

    norm1: Tensor = leaf("D", "input_layernorm.weight")
    qkv: Weight = leaf("Q+2R D", "self_attn.{q,k,v}_proj.weight")
    o: Weight = leaf("D Q", "self_attn.o_proj.weight")
    norm2: Tensor = leaf("D", "post_attention_layernorm.weight")
    gate_up: Weight = leaf("2F D", "mlp.{gate,up}_proj.weight", optional=True)
    down: Weight = leaf("D F", "mlp.down_proj.weight", optional=True)
    router: Tensor = leaf("E D", "block_sparse_moe.gate.weight", optional=True, plain=True)  # Mixtral, and below
    expert_gate_up: Weight = leaf("E 2F D", "block_sparse_moe.experts.{e}.{w1,w3}.weight", optional=True)
    expert_down: Weight = leaf("E D F", "block_sparse_moe.experts.{e}.w2.weight", optional=True)


@pytree
class Weights:
    """The weights of a model, with the config that gives them their shapes."""

    embed: Tensor = leaf("V D", "model.embed_tokens.weight")
    layers: tuple[Layer, ...] = blocks(Layer, "model.layers.{i}.")
    norm: Tensor = leaf("D", "model.norm.weight")
    head: Tensor = leaf("V D", "lm_head.weight", optional=True)  # ABSENT: tied to the embedding
    config: Config = static()


def spec(cfg: Config, i: int) -> AttentionSpec:
    """How layer ``i`` attends."""
    return AttentionSpec(scale=cfg.head_dim**-0.5, rope=cfg.rotary, window=cfg.windows[i])


def embed(w: Weights, tokens_N: Tensor, cfg: Config) -> Tensor:
    """Token ids to the residual stream."""
    return embedding(tokens_N, w.embed)


def pre(w: Layer, x_ND: Tensor, rot: tuple[Tensor, Tensor], cfg: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything before attention, token-local: the stream as it came, q, k and v."""
    x_ND, n_ND = add_rms_norm(x_ND, ABSENT, w.norm1, eps=cfg.rms_norm_eps, name="norm1")
    return x_ND, *linear_rope(n_ND, w.qkv, *rot, **heads(cfg), name="qkv")


def post(w: Layer, x_ND: Tensor, o_NHK: Tensor, cfg: Config, valid_N: Any = ABSENT) -> tuple[Tensor, Any]:
    """Everything after attention; token-local.

    Mixtral's statistics are sums over the tokens of ``valid_N`` (ABSENT: all): of each expert's probability, and of the
    choices of it.
    """
    mid_ND = linear(o_NHK.flatten(-2), w.o, add=x_ND, name="mid")
    mid_ND, n_ND = add_rms_norm(mid_ND, ABSENT, w.norm2, eps=cfg.rms_norm_eps, name="norm2")
    if cfg.experts is None:
        gate_up_N2F = linear(n_ND, w.gate_up, name="gate_up")
        return glu_linear(gate_up_N2F, w.down, add=mid_ND, act="silu", name="down"), ABSENT
    # P = N · top_k rows, sorted by expert: a token stands in one row for each of its experts.
    logits_NE = linear(n_ND, w.router, name="router")
    gates_NT, _, *plan, prob_sums_E, counts_E = route(logits_NE, valid_N, **cfg.experts.routing, name="route")
    h_PF = glu(grouped_linear(n_ND, w.expert_gate_up, tuple(plan), name="gate_up"), act="silu", name="act")
    y_ND = grouped_linear(h_PF, w.expert_down, tuple(plan), gates_NT, mid_ND, name="down")
    return y_ND, (prob_sums_E, counts_E)


def final(w: Weights, x_ND: Tensor, cfg: Config) -> Tensor:
    """The norm before the head."""
    return rms_norm(x_ND, w.norm, eps=cfg.rms_norm_eps, name="norm")
