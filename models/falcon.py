"""Falcon 7B, 11B, 40B and 180B: model type ``falcon``. (Falcon 3 is of Llama's architecture; see there.)

What differs from Llama: attention and MLP are parallel. Both read the same stream, each through its norm, and both add
to it, so ``post`` norms its input once more instead of the sum: the stream stays all that crosses a boundary. The norms
are LayerNorms with a bias, two in 40B and 180B, one for both sides in 7B and 11B. The MLP has two matrices and a GELU
between, no gate. Queries, keys and values come out of one matrix, whose rows are grouped: the queries that share a key,
the key, the value, then the next group; 7B is one group of 71 queries. The first Falcons of 1B and 7B (``rw``) know
positions by ALiBi, and are refused. Source: Almazrouei et al. 2023 (arXiv 2311.16867); parallel layers: Wang &
Komatsuzaki, GPT-J, 2021; ``transformers``' modeling_falcon for the rounding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unsloth_core.ops.embedding import embedding
from unsloth_core.ops.gelu import gelu
from unsloth_core.ops.layer_norm import layer_norm
from unsloth_core.ops.linear import linear
from unsloth_core.ops.rope import rope
from unsloth_core.rotary import Rotary
from unsloth_core.tree import ABSENT, leaf, pytree, static
from unsloth_core.weights import Weight, blocks

from .config import ConfigReader, letters
from .decoder import AttentionSpec

# What the default policy keeps between forward and backward: the output of every product and of attention.
SAVED = ("qkv", "attn", "mid", "up")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shapes and constants, by their Hugging Face names, or those that other families have for them."""

    hidden_size: int
    intermediate_size: int  # ffn_hidden_size
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    layer_norm_epsilon: float
    rotary: Rotary
    tie_word_embeddings: bool
    has: frozenset[str]
    logit_softcap: None = None

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "Config":
        """From the content of ``config.json``. Raises ValueError naming a field that is missing, bad or not handled."""
        read = ConfigReader(raw)
        read.expect("activation", "gelu")
        for name in ("attention_dropout", "hidden_dropout"):
            read.expect(name, 0, 0.0)
        for name in ("alibi", "bias", "apply_residual_connection_post_layernorm"):
            read.expect(name, False)
        read.expect("parallel_attn", True)
        heads = read.size("num_attention_heads", 71)
        width = read.size("hidden_size", 4544)
        positions = read.size("max_position_embeddings", 2048)
        new = read.flag("new_decoder_architecture", False)  # 40B and later
        read.expect("num_ln_in_parallel_attn", *((1, 2) if new else (1,)))
        norms = ("norm1", "norm2") if new and read.take("num_ln_in_parallel_attn", 2) == 2 else ("norm",)
        multi_query = read.flag("multi_query", True)
        kv_heads = read.kv_heads(heads, heads, name="num_kv_heads")
        if not new:  # one key for all queries, or one for each
            kv_heads = 1 if multi_query else heads
        config = Config(
            hidden_size=width,
            intermediate_size=read.size("ffn_hidden_size", 4 * width),
            num_hidden_layers=read.layers(32),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=width // heads,
            vocab_size=read.size("vocab_size", 65024),
            max_position_embeddings=positions,
            layer_norm_epsilon=read.number("layer_norm_epsilon", 1e-5),
            rotary=Rotary.from_hf({**raw, "max_position_embeddings": positions}, head_dim=width // heads),
            tie_word_embeddings=read.flag("tie_word_embeddings", True),
            has=frozenset(f"{norm}{part}" for norm in norms for part in ("", "_bias")),
        )
        read.finish()
        return config

    @property
    def dims(self) -> dict[str, int]:
        """The letters of the weight declarations."""
        return letters(self)


@pytree
class Layer:
    """The weights of one layer."""

    norm: Tensor = leaf("D", "input_layernorm.weight", optional=True)  # 7B, 11B: for both sides
    norm_bias: Tensor = leaf("D", "input_layernorm.bias", optional=True)
    norm1: Tensor = leaf("D", "ln_attn.weight", optional=True)  # 40B, 180B: one for each
    norm1_bias: Tensor = leaf("D", "ln_attn.bias", optional=True)
    norm2: Tensor = leaf("D", "ln_mlp.weight", optional=True)
    norm2_bias: Tensor = leaf("D", "ln_mlp.bias", optional=True)
    qkv: Weight = leaf("Q+2R D", "self_attention.query_key_value.weight")
    o: Weight = leaf("D Q", "self_attention.dense.weight")
    up: Weight = leaf("F D", "mlp.dense_h_to_4h.weight")
    down: Weight = leaf("D F", "mlp.dense_4h_to_h.weight")


@pytree
class Weights:
    """The weights of a model, with the config that gives them their shapes."""

    embed: Tensor = leaf("V D", "transformer.word_embeddings.weight")
    layers: tuple[Layer, ...] = blocks(Layer, "transformer.h.{i}.")
    norm: Tensor = leaf("D", "transformer.ln_f.weight")
    norm_bias: Tensor = leaf("D", "transformer.ln_f.bias")
    head: Tensor = leaf("V D", "lm_head.weight", optional=True)  # ABSENT: tied to the embedding
    config: Config = static()


def spec(cfg: Config, i: int) -> AttentionSpec:
    """How layer ``i`` attends."""
    return AttentionSpec(scale=cfg.head_dim**-0.5, rope=cfg.rotary)


def embed(w: Weights, tokens_N: Tensor, cfg: Config) -> Tensor:
    """Token ids to the residual stream."""
    return embedding(tokens_N, w.embed)


def pre(w: Layer, x_ND: Tensor, rot: tuple[Tensor, Tensor], cfg: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything before attention, token-local: the stream as it came, q, k and v."""
    norm = (w.norm, w.norm_bias) if w.norm1 is ABSENT else (w.norm1, w.norm1_bias)
    n_ND = layer_norm(x_ND, *norm, eps=cfg.layer_norm_epsilon, name="norm1")
    groups, shared = cfg.num_key_value_heads, cfg.num_attention_heads // cfg.num_key_value_heads
    qkv = linear(n_ND, w.qkv, name="qkv").unflatten(-1, (groups, shared + 2, cfg.head_dim))
    q_NGHK, k_NG1K, v_NG1K = qkv.split([shared, 1, 1], dim=2)
    # Between the queries of two groups lie a key and a value: with more than one group, flattening copies.
    q_NHK, k_NGK = rope(q_NGHK.flatten(1, 2), k_NG1K.squeeze(2), *rot, name="rope")
    return x_ND, q_NHK, k_NGK, v_NG1K.squeeze(2)


def post(w: Layer, x_ND: Tensor, o_NHK: Tensor, cfg: Config) -> tuple[Tensor, Any]:
    """Everything after attention; token-local. No statistics: the second value is ABSENT."""
    mid_ND = linear(o_NHK.flatten(-2), w.o, add=x_ND, name="mid")
    norm = (w.norm, w.norm_bias) if w.norm2 is ABSENT else (w.norm2, w.norm2_bias)
    n_ND = layer_norm(x_ND, *norm, eps=cfg.layer_norm_epsilon, name="norm2")  # of x, not of mid
    h_NF = gelu(linear(n_ND, w.up, name="up"), name="act")
    return linear(h_NF, w.down, add=mid_ND, name="down"), ABSENT


def final(w: Weights, x_ND: Tensor, cfg: Config) -> Tensor:
    """The norm before the head."""
    return layer_norm(x_ND, w.norm, w.norm_bias, eps=cfg.layer_norm_epsilon, name="norm")
