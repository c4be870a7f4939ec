"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: model type ``phi3``, the dense ones.

What differs from Llama: the checkpoint stores q, k and v as one matrix, and gate and up as one, so each is one name to
load, to save and to adapt. The long versions choose between two lists of rotary divisors by the longest sequence of the
batch (longrope); in 4-mini only the first 96 of a head's 128 channels turn. 3-mini-4k attends through a window. Source:
the Phi-3 and Phi-4 reports (arXiv 2404.14219, 2412.08905, 2503.01743), LongRoPE (2402.13753); ``transformers``'
modeling_phi3 for the rounding.
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
    """Shapes and constants, by their Hugging Face names."""

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
    window: int | None
    tie_word_embeddings: bool
    logit_softcap: None = None
    has: frozenset[str] = frozenset()

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "Config":
        """From the content of ``config.json``. Raises ValueError naming a field that is missing, bad or not handled."""
        read = ConfigReader(raw)
        read.expect("hidden_act", "silu")
        read.expect("attention_dropout", 0, 0.0)
        for name in ("resid_pdrop", "embd_pdrop"):
            read.expect(name, 0, 0.0)
        for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
            read.expect(name, False)
        for name in ("full_attn_mod", "interpolate_factor"):  # of the publisher's own code
            read.expect(name, 1)
        read.take("original_max_position_embeddings", None)  # read with the rest of rope
        heads = read.size("num_attention_heads", 32)
        width = read.size("hidden_size", 3072)
        head_dim = read.size("head_dim", width // heads)
        positions = read.size("max_position_embeddings", 4096)
        config = Config(
            hidden_size=width,
            intermediate_size=read.size("intermediate_size", 8192),
            num_hidden_layers=read.layers(32),
            num_attention_heads=heads,
            num_key_value_heads=read.kv_heads(heads, heads),
            head_dim=head_dim,
            vocab_size=read.size("vocab_size", 32064),
            max_position_embeddings=positions,
            rms_norm_eps=read.number("rms_norm_eps", 1e-5),
            rotary=Rotary.from_hf({**raw, "max_position_embeddings": positions}, head_dim=head_dim),
            window=read.window(None),
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
    qkv: Weight = leaf("Q+2R D", "self_attn.qkv_proj.weight")
    o: Weight = leaf("D Q", "self_attn.o_proj.weight")
    norm2: Tensor = leaf("D", "post_attention_layernorm.weight")
    gate_up: Weight = leaf("2F D", "mlp.gate_up_proj.weight")
    down: Weight = leaf("D F", "mlp.down_proj.weight")


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
    return AttentionSpec(scale=cfg.head_dim**-0.5, rope=cfg.rotary, window=cfg.window)


def embed(w: Weights, tokens_N: Tensor, cfg: Config) -> Tensor:
    """Token ids to the residual stream."""
    return embedding(tokens_N, w.embed)


def pre(w: Layer, x_ND: Tensor, rot: tuple[Tensor, Tensor], cfg: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything before attention, token-local: the stream as it came, q, k and v."""
    x_ND, n_ND = add_rms_norm(x_ND, ABSENT, w.norm1, eps=cfg.rms_norm_eps, name="norm1")
    return x_ND, *linear_rope(n_ND, w.qkv, *rot, **heads(cfg), name="qkv")


def post(w: Layer, x_ND: Tensor, o_NHK: Tensor, cfg: Config) -> tuple[Tensor, Any]:
    """Everything after attention; token-local. No statistics: the second value is ABSENT."""
    mid_ND = linear(o_NHK.flatten(-2), w.o, add=x_ND, name="mid")
    mid_ND, n_ND = add_rms_norm(mid_ND, ABSENT, w.norm2, eps=cfg.rms_norm_eps, name="norm2")
    gate_up_N2F = linear(n_ND, w.gate_up, name="gate_up")
    return glu_linear(gate_up_N2F, w.down, add=mid_ND, act="silu", name="down"), ABSENT


def final(w: Weights, x_ND: Tensor, cfg: Config) -> Tensor:
    """The norm before the head."""
    return rms_norm(x_ND, w.norm, eps=cfg.rms_norm_eps, name="norm")
