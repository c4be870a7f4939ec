"""Qwen 1.5, 2, 2.5 and 3 (dense), and what shares their shape: DeepSeek-R1-Distill-Qwen.

What differs from Llama: in 1.5 to 2.5, q, k and v have biases and no other linear does; in 3 they have none, but every
head of q and k passes an RMSNorm of its own before the rotation, with one weight for all heads, and a head is as wide
as ``head_dim`` says, not as the stream divided by the heads. Layers from ``max_window_layers`` on attend through a
window if ``use_sliding_window`` is set, which in published models it is not. Source: Qwen2 (arXiv 2407.10671), Qwen2.5
(2412.15115), Qwen3 (2505.09388); q and k norms: Dehghani et al. 2023 (2302.05442); ``transformers``' modeling_qwen2 and
modeling_qwen3 for the rounding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unsloth_core.ops.embedding import embedding
from unsloth_core.ops.glu import glu
from unsloth_core.ops.linear import linear
from unsloth_core.ops.qk_norm_rope import qk_norm_rope
from unsloth_core.ops.rms_norm import rms_norm
from unsloth_core.ops.rope import rope
from unsloth_core.rotary import Rotary
from unsloth_core.tree import ABSENT, leaf, pytree, static
from unsloth_core.weights import Weight, blocks

from .config import ConfigReader, letters
from .decoder import AttentionSpec, split_heads

# What the default policy keeps between forward and backward: the output of every product and of attention.
SAVED = ("qkv", "attn", "mid", "gate_up")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shapes and constants, by their Hugging Face names. ``windows``: one a layer; ``has``: its optional leaves."""

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
    has: frozenset[str]
    logit_softcap: None = None

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "Config":
        """From the content of ``config.json``. Raises ValueError naming a field that is missing, bad or not handled."""
        read = ConfigReader(raw)
        read.expect("hidden_act", "silu")
        read.expect("attention_dropout", 0, 0.0)
        read.expect("use_mrope", False)
        qwen3 = raw.get("model_type") == "qwen3"
        if qwen3:
            read.expect("attention_bias", False)
        layers = read.size("num_hidden_layers", 32)
        window = read.window(4096)
        if not read.flag("use_sliding_window", False):
            window = None  # whatever the file says
        first = read.size("max_window_layers", 28, least=0)
        windows = read.windows(window, [window is not None and i >= first for i in range(layers)])
        heads = read.size("num_attention_heads", 32)
        width = read.size("hidden_size", 4096)
        head_dim = read.size("head_dim", 128 if qwen3 else width // heads)
        positions = read.size("max_position_embeddings", 32768)
        config = Config(
            hidden_size=width,
            intermediate_size=read.size("intermediate_size", 22016),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=read.kv_heads(heads, 32),
            head_dim=head_dim,
            vocab_size=read.size("vocab_size", 151936),
            max_position_embeddings=positions,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rotary=Rotary.from_hf({**raw, "max_position_embeddings": positions}, head_dim=head_dim),
            windows=windows,
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            has=frozenset({"q_norm", "k_norm"} if qwen3 else {"qkv_bias"}),
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
    qkv_bias: Tensor = leaf("Q+2R", "self_attn.{q,k,v}_proj.bias", optional=True)  # up to 2.5
    q_norm: Tensor = leaf("K", "self_attn.q_norm.weight", optional=True)  # from 3 on
    k_norm: Tensor = leaf("K", "self_attn.k_norm.weight", optional=True)
    o: Weight = leaf("D Q", "self_attn.o_proj.weight")
    norm2: Tensor = leaf("D", "post_attention_layernorm.weight")
    gate_up: Weight = leaf("2F D", "mlp.{gate,up}_proj.weight")
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
    return AttentionSpec(scale=cfg.head_dim**-0.5, rope=cfg.rotary, window=cfg.windows[i])


def embed(w: Weights, tokens_N: Tensor, cfg: Config) -> Tensor:
    """Token ids to the residual stream."""
    return embedding(tokens_N, w.embed)


def pre(w: Layer, x_ND: Tensor, rot: tuple[Tensor, Tensor], cfg: Config) -> tuple[Tensor, Tensor, Tensor]:
    """Everything before attention; token-local."""
    n_ND = rms_norm(x_ND, w.norm1, eps=cfg.rms_norm_eps, name="norm1")
    q_NHK, k_NGK, v_NGK = split_heads(linear(n_ND, w.qkv, w.qkv_bias, name="qkv"), cfg)
    if w.q_norm is ABSENT:
        q_NHK, k_NGK = rope(q_NHK, k_NGK, *rot, name="rope")
    else:  # Qwen 3
        q_NHK, k_NGK = qk_norm_rope(q_NHK, k_NGK, w.q_norm, w.k_norm, *rot, eps=cfg.rms_norm_eps, name="rope")
    return q_NHK, k_NGK, v_NGK


def post(w: Layer, x_ND: Tensor, o_NHK: Tensor, cfg: Config) -> tuple[Tensor, Any]:
    """Everything after attention; token-local. No statistics: the second value is ABSENT."""
    mid_ND = linear(o_NHK.flatten(-2), w.o, add=x_ND, name="mid")
    n_ND = rms_norm(mid_ND, w.norm2, eps=cfg.rms_norm_eps, name="norm2")
    h_NF = glu(linear(n_ND, w.gate_up, name="gate_up"), act="silu", name="act")
    return linear(h_NF, w.down, add=mid_ND, name="down"), ABSENT


def final(w: Weights, x_ND: Tensor, cfg: Config) -> Tensor:
    """The norm before the head."""
    return rms_norm(x_ND, w.norm, eps=cfg.rms_norm_eps, name="norm")
