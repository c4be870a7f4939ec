"""Gemma 1, 2 and 3 (text), also the text model inside a multimodal Gemma 3.

What differs from Llama, in all: embeddings are scaled by √D; RMSNorm multiplies by 1 + w, in fp32, and rounds once; the
gate is a tanh GELU; the head is the embedding. From 2 on: what attention and MLP add to the stream is normed too
(sandwich norms), windows alternate with full attention, and the scale of scores is a number of its own. Only 2 caps
scores and logits by c·tanh(z/c). Only 3 norms every head of q and k, and turns them faster in layers with a window.
Source: the reports (arXiv 2403.08295, 2408.00118, 2503.19786); ``transformers``' modeling_gemma* for the rounding.
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
from unsloth_core.ops.qk_norm_rope import qk_norm_rope
from unsloth_core.ops.rms_norm import rms_norm
from unsloth_core.rotary import Rotary
from unsloth_core.tree import ABSENT, leaf, pytree, static
from unsloth_core.weights import Weight, blocks

from .config import ConfigReader, letters
from .decoder import AttentionSpec, heads, split_heads

# What the default policy keeps between forward and backward: the output of every product and of attention.
SAVED = ("qkv", "attn", "o", "gate_up", "down")
# Class defaults: D, F, layers, H, G, V, positions.
DEFAULTS = {
    "gemma": (3072, 24576, 28, 16, 16, 256000, 8192),
    "gemma2": (2304, 9216, 26, 8, 4, 256000, 8192),
    "gemma3_text": (2304, 9216, 26, 8, 4, 262208, 131072),
}


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
    scale: float
    rotary: Rotary
    rotary_window: Rotary  # of layers with a window
    windows: tuple[int | None, ...]
    softcap: float | None
    logit_softcap: float | None
    tie_word_embeddings: bool
    has: frozenset[str]

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "Config":
        """From the content of ``config.json``. Raises ValueError naming a field that is missing, bad or not handled."""
        read = ConfigReader(raw)
        model_type = str(raw.get("model_type"))
        D, F, L, H, G, V, P = DEFAULTS[model_type]
        read.expect("hidden_act", "gelu_pytorch_tanh", "gelu")  # legacy: means the other one too
        read.expect("hidden_activation", "gelu_pytorch_tanh")
        read.expect("attention_dropout", 0, 0.0)
        read.expect("attention_bias", False)
        read.expect("use_bidirectional_attention", False)
        for name in ("cache_implementation", "sliding_window_size"):  # how to generate; a copy of sliding_window
            read.take(name, None)
        layers = read.layers(L)
        heads, head_dim = read.size("num_attention_heads", H), read.size("head_dim", 256)
        positions = read.size("max_position_embeddings", P)
        hf = {**raw, "max_position_embeddings": positions}
        windows, scale, softcap, logit_softcap, has = (None,) * layers, head_dim**-0.5, None, None, frozenset()
        if model_type != "gemma":
            has = frozenset({"norm3", "norm4"})
            scale = read.number("query_pre_attn_scalar", 256) ** -0.5
            logit_softcap = read.number_or_null("final_logit_softcapping", 30.0 if model_type == "gemma2" else None)
        if model_type == "gemma2":
            softcap = read.number_or_null("attn_logit_softcapping", 50.0)
            windows = read.windows(read.window(4096), [i % 2 == 0 for i in range(layers)])
        if model_type == "gemma3_text":
            has |= {"q_norm", "k_norm"}
            read.expect("attn_logit_softcapping")  # transformers reads it and never uses it
            every = read.size("sliding_window_pattern", read.size("_sliding_window_pattern", 6))
            windows = read.windows(read.window(4096), [(i + 1) % every > 0 for i in range(layers)])
            rotary = Rotary.from_hf(hf, head_dim=head_dim, layer_type="full_attention")
            rotary_window = Rotary.from_hf(hf, head_dim=head_dim, layer_type="sliding_attention")
        else:
            rotary = rotary_window = Rotary.from_hf(hf, head_dim=head_dim)
        config = Config(
            hidden_size=read.size("hidden_size", D),
            intermediate_size=read.size("intermediate_size", F),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=read.kv_heads(heads, G),
            head_dim=head_dim,
            vocab_size=read.size("vocab_size", V),
            max_position_embeddings=positions,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            scale=scale,
            rotary=rotary,
            rotary_window=rotary_window,
            windows=windows,
            softcap=softcap,
            logit_softcap=logit_softcap,
            tie_word_embeddings=read.flag("tie_word_embeddings", True),
            has=has,
        )
        read.finish()
        return config

    @property
    def dims(self) -> dict[str, int]:
        """The letters of the weight declarations."""
        return letters(self)


@pytree
class Layer:
    """The weights of one layer. Gemma 1 norms in front of attention (norm1) and MLP (norm2); from 2 on norm1 and norm2
    stand before and behind attention, norm3 and norm4 before and behind the MLP."""

    norm1: Tensor = leaf("D", "input_layernorm.weight")
    qkv: Weight = leaf("Q+2R D", "self_attn.{q,k,v}_proj.weight")
    q_norm: Tensor = leaf("K", "self_attn.q_norm.weight", optional=True)  # 3
    k_norm: Tensor = leaf("K", "self_attn.k_norm.weight", optional=True)
    o: Weight = leaf("D Q", "self_attn.o_proj.weight")
    norm2: Tensor = leaf("D", "post_attention_layernorm.weight")
    norm3: Tensor = leaf("D", "pre_feedforward_layernorm.weight", optional=True)  # 2 and 3
    gate_up: Weight = leaf("2F D", "mlp.{gate,up}_proj.weight")
    down: Weight = leaf("D F", "mlp.down_proj.weight")
    norm4: Tensor = leaf("D", "post_feedforward_layernorm.weight", optional=True)


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
    window = cfg.windows[i]
    rotary = cfg.rotary if window is None else cfg.rotary_window
    return AttentionSpec(scale=cfg.scale, rope=rotary, window=window, softcap=cfg.softcap)


def norm(x: Tensor, w: Tensor, cfg: Config, name: str, add: Any = ABSENT) -> Tensor:
    """Gemma's RMSNorm, and what it is added to: one rounding for all of it."""
    return rms_norm(x, w, add, **norm_options(cfg), name=name)


def norm_options(cfg: Config) -> dict[str, Any]:
    """What makes a norm Gemma's: the stored weight is w - 1, and nothing is rounded before the end."""
    return {"eps": cfg.rms_norm_eps, "offset": 1.0, "casting_mode": "gemma"}


def embed(w: Weights, tokens_N: Tensor, cfg: Config) -> Tensor:
    """Token ids to the residual stream; the scale is rounded to the weights' dtype (√3072 is 55.5 in bf16)."""
    return embedding(tokens_N, w.embed, scale=cfg.hidden_size**0.5)


def pre(w: Layer, x_ND: Tensor, rot: tuple[Tensor, Tensor], cfg: Config) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything before attention, token-local: the stream as it came, q, k and v."""
    x_ND, n_ND = add_rms_norm(x_ND, ABSENT, w.norm1, **norm_options(cfg), name="norm1")
    if w.q_norm is ABSENT:
        return x_ND, *linear_rope(n_ND, w.qkv, *rot, **heads(cfg), name="qkv")
    # Gemma 3
    q_NHK, k_NGK, v_NGK = split_heads(linear(n_ND, w.qkv, name="qkv"), cfg)
    q_NHK, k_NGK = qk_norm_rope(q_NHK, k_NGK, w.q_norm, w.k_norm, *rot, **norm_options(cfg), name="rope")
    return x_ND, q_NHK, k_NGK, v_NGK


def post(w: Layer, x_ND: Tensor, o_NHK: Tensor, cfg: Config) -> tuple[Tensor, Any]:
    """Everything after attention; token-local. No statistics: the second value is ABSENT."""
    if w.norm3 is ABSENT:  # Gemma 1: products add to the stream
        mid_ND = linear(o_NHK.flatten(-2), w.o, add=x_ND, name="o")
        mid_ND, n_ND = add_rms_norm(mid_ND, ABSENT, w.norm2, **norm_options(cfg), name="norm2")
        return mlp(w, n_ND, add=mid_ND), ABSENT
    mid_ND = norm(linear(o_NHK.flatten(-2), w.o, name="o"), w.norm2, cfg, "norm2", add=x_ND)
    mid_ND, n_ND = add_rms_norm(mid_ND, ABSENT, w.norm3, **norm_options(cfg), name="norm3")
    return norm(mlp(w, n_ND), w.norm4, cfg, "norm4", add=mid_ND), ABSENT


def mlp(w: Layer, n_ND: Tensor, add: Any = ABSENT) -> Tensor:
    """Up, the gate, and down again."""
    return glu_linear(linear(n_ND, w.gate_up, name="gate_up"), w.down, add=add, act="gelu_tanh", name="down")


def final(w: Weights, x_ND: Tensor, cfg: Config) -> Tensor:
    """The norm before the head."""
    return norm(x_ND, w.norm, cfg, "norm")
