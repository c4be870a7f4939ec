"""Llama 2, 3, 3.1, 3.2 and 3.3, and what shares their shape: SmolLM2, TinyLlama, Yi, DeepSeek-R1-Distill-Llama.

The plain decoder that the other families differ from: RMSNorm before each half, grouped-query attention with rotary
positions, a SwiGLU MLP, and a residual add in the epilogue of the product that makes the addend. Source: Touvron et al.
2023 (arXiv 2302.13971, 2307.09288), the Llama 3 report (2407.21783); ``transformers``' modeling_llama for the rounding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unsloth_core.ops.add_rms_norm import add_rms_norm
from unsloth_core.ops.embedding import embedding
from unsloth_core.ops.glu_linear import glu_linear
from unsloth_core.ops.linear import linear
from unsloth_core.ops.linear_rope import linear_rope
from unsloth_core.ops.rms_norm import rms_norm
from unsloth_core.rotary import Rotary
from unsloth_core.tree import ABSENT, leaf, pytree, static
from unsloth_core.weights import Weight, blocks

from .config import ConfigReader, letters
from .decoder import AttentionSpec, heads

# What the default policy keeps between forward and backward: the output of every product and of attention.
SAVED = ("qkv", "attn", "mid", "gate_up")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shapes and constants, by their Hugging Face names; ``dims`` has them by letter."""

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
    tie_word_embeddings: bool
    logit_softcap: None = None
    has: None = None  # biases are seen by their presence

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "Config":
        """From the content of ``config.json``. Raises ValueError naming a field that is missing, bad or not handled."""
        read = ConfigReader(raw)
        read.expect("hidden_act", "silu")
        read.expect("attention_dropout", 0, 0.0)
        read.expect("rope_interleaved", False)
        for name in ("attention_bias", "mlp_bias"):
            read.flag(name, False)
        heads = read.size("num_attention_heads", 32)
        width = read.size("hidden_size", 4096)
        head_dim = read.size("head_dim", width // heads)
        positions = read.size("max_position_embeddings", 2048)
        config = Config(
            hidden_size=width,
            intermediate_size=read.size("intermediate_size", 11008),
            num_hidden_layers=read.layers(32),
            num_attention_heads=heads,
            num_key_value_heads=read.kv_heads(heads, heads),
            head_dim=head_dim,
            vocab_size=read.size("vocab_size", 32000),
            max_position_embeddings=positions,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rotary=Rotary.from_hf({**raw, "max_position_embeddings": positions}, head_dim=head_dim),
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
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

    norm1: Tensor = leaf("D", "input_layernorm.weight")
    qkv: Weight = leaf("Q+2R D", "self_attn.{q,k,v}_proj.weight")
    qkv_bias: Tensor = leaf("Q+2R", "self_attn.{q,k,v}_proj.bias", optional=True)
    o: Weight = leaf("D Q", "self_attn.o_proj.weight")
    o_bias: Tensor = leaf("D", "self_attn.o_proj.bias", optional=True)
    norm2: Tensor = leaf("D", "post_attention_layernorm.weight")
    gate_up: Weight = leaf("2F D", "mlp.{gate,up}_proj.weight")
    gate_up_bias: Tensor = leaf("2F", "mlp.{gate,up}_proj.bias", optional=True)
    down: Weight = leaf("D F", "mlp.down_proj.weight")
    down_bias: Tensor = leaf("D", "mlp.down_proj.bias", optional=True)


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
    return AttentionSpec(scale=cfg.head_dim**-0.5, rope=cfg.rotary)


def embed(w: Weights, tokens_N: Tensor, cfg: Config) -> Tensor:
    """Token ids to the residual stream."""
    return embedding(tokens_N, w.embed)


def pre(w: Layer, x_ND: Tensor, rot: tuple[Tensor, Tensor], cfg: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything before attention, token-local: the stream as it came, q, k and v."""
    x_ND, n_ND = add_rms_norm(x_ND, ABSENT, w.norm1, eps=cfg.rms_norm_eps, name="norm1")
    return x_ND, *linear_rope(n_ND, w.qkv, *rot, w.qkv_bias, **heads(cfg), name="qkv")


def post(w: Layer, x_ND: Tensor, o_NHK: Tensor, cfg: Config) -> tuple[Tensor, Any]:
    """Everything after attention; token-local. No statistics: the second value is ABSENT."""
    mid_ND = linear(o_NHK.flatten(-2), w.o, w.o_bias, add=x_ND, name="mid")
    mid_ND, n_ND = add_rms_norm(mid_ND, ABSENT, w.norm2, eps=cfg.rms_norm_eps, name="norm2")
    gate_up_N2F = linear(n_ND, w.gate_up, w.gate_up_bias, name="gate_up")
    return glu_linear(gate_up_N2F, w.down, w.down_bias, add=mid_ND, act="silu", name="down"), ABSENT


def final(w: Weights, x_ND: Tensor, cfg: Config) -> Tensor:
    """The norm before the head."""
    return rms_norm(x_ND, w.norm, eps=cfg.rms_norm_eps, name="norm")
