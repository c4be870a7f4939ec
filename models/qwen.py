"""Qwen 1.5, 2, 2.5 and 3, dense and with experts, and what shares their shape: DeepSeek-R1-Distill-Qwen.

What differs from Llama: in 1.5 to 2.5, q, k and v have biases and no other linear does; in 3 they have none, but every
head of q and k passes an RMSNorm of its own before the rotation, with one weight for all heads, and a head is as wide
as ``head_dim`` says, not as the stream divided by the heads. Layers from ``max_window_layers`` on attend through a
window if ``use_sliding_window`` is set, which in published models it is not. Qwen3-MoE is a Qwen 3 with many small
MLPs in a layer, its experts: a router gives a token to a few of them, and adds what they answer, weighed by its softmax
over all (``norm_topk_prob``: over those few). Any layer may be dense instead. Source: Qwen2 (arXiv 2407.10671), Qwen2.5
(2412.15115), Qwen3 (2505.09388); q and k norms: Dehghani et al. 2023 (2302.05442); ``transformers``' modeling_qwen2,
modeling_qwen3 and modeling_qwen3_moe for the rounding.
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
from unsloth_core.ops.qk_norm_rope import qk_norm_rope
from unsloth_core.ops.rms_norm import rms_norm
from unsloth_core.ops.route import route
from unsloth_core.rotary import Rotary
from unsloth_core.tree import ABSENT, leaf, pytree, static
from unsloth_core.weights import Weight, blocks

from .config import ConfigReader, Experts, letters
from .decoder import AttentionSpec, heads, split_heads

# What the default policy keeps between forward and backward: the output of every product and of attention.
SAVED = ("qkv", "attn", "mid", "gate_up")


@dataclasses.dataclass(frozen=True)
class Config:
    """Shapes and constants, by their Hugging Face names. ``windows``, ``has`` (the optional leaves): one a layer."""

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
    experts: Experts | None  # Qwen3-MoE
    expert_width: int
    has: tuple[frozenset[str], ...]
    logit_softcap: None = None

    @staticmethod
    def from_hf(raw: Mapping[str, Any]) -> "Config":
        """From the content of ``config.json``. Raises ValueError naming a field that is missing, bad or not handled."""
        read = ConfigReader(raw)
        read.expect("hidden_act", "silu")
        read.expect("attention_dropout", 0, 0.0)
        read.expect("use_mrope", False)
        moe = raw.get("model_type") == "qwen3_moe"
        qwen3 = moe or raw.get("model_type") == "qwen3"
        if qwen3:
            read.expect("attention_bias", False)
        layers = read.layers(24 if moe else 32)
        has = [{"q_norm", "k_norm"} if qwen3 else {"qkv_bias"} for _ in range(layers)]
        experts, dense, step = None, list(range(layers)), 1
        if moe:
            experts = read.experts(128, top_k=8)
            for name, value in (("shared_expert_intermediate_size", 0), ("use_qk_norm", True), ("qkv_bias", False)):
                read.expect(name, value)  # written by the publisher's own code
            dense, step = read.layers_among("mlp_only_layers", layers), read.size("decoder_sparse_step", 1)
        for i in range(layers):
            sparse = i not in dense and (i + 1) % step == 0
            has[i] |= {"router", "expert_gate_up", "expert_down"} if sparse else {"gate_up", "down"}
        window = read.window(4096)
        if not read.flag("use_sliding_window", False):
            window = None  # whatever the file says
        first = read.size("max_window_layers", 28, least=0)
        windows = read.windows(window, [window is not None and (moe or i >= first) for i in range(layers)])
        heads = read.size("num_attention_heads", 32)
        width = read.size("hidden_size", 2048 if moe else 4096)
        head_dim = read.size("head_dim", 128 if qwen3 and not moe else width // heads)
        positions = read.size("max_position_embeddings", 32768)
        config = Config(
            hidden_size=width,
            intermediate_size=read.size("intermediate_size", 6144 if moe else 22016),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=read.kv_heads(heads, 4 if moe else 32),
            head_dim=head_dim,
            vocab_size=read.size("vocab_size", 151936),
            max_position_embeddings=positions,
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rotary=Rotary.from_hf({**raw, "max_position_embeddings": positions}, head_dim=head_dim),
            windows=windows,
            tie_word_embeddings=read.flag("tie_word_embeddings", False),
            experts=experts,
            expert_width=read.size("moe_intermediate_size", 768) if moe else 0,
            has=tuple(frozenset(names) for names in has),
        )
        read.finish()
        return config

    @property
    def dims(self) -> dict[str, int]:
        """The letters of the weight declarations; I is the F of one expert."""
        return {**letters(self), "E": self.experts.count if self.experts else 0, "I": self.expert_width}


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
    gate_up: Weight = leaf("2F D", "mlp.{gate,up}_proj.weight", optional=True)
    down: Weight = leaf("D F", "mlp.down_proj.weight", optional=True)
    router: Tensor = leaf("E D", "mlp.gate.weight", optional=True, plain=True)  # Qwen3-MoE, and below
    expert_gate_up: Weight = leaf("E 2I D", "mlp.experts.{e}.{gate,up}_proj.weight", optional=True)
    expert_down: Weight = leaf("E D I", "mlp.experts.{e}.down_proj.weight", optional=True)


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
    if w.q_norm is ABSENT:
        return x_ND, *linear_rope(n_ND, w.qkv, *rot, w.qkv_bias, **heads(cfg), name="qkv")
    # Qwen 3
    q_NHK, k_NGK, v_NGK = split_heads(linear(n_ND, w.qkv, w.qkv_bias, name="qkv"), cfg)
    q_NHK, k_NGK = qk_norm_rope(q_NHK, k_NGK, w.q_norm, w.k_norm, *rot, eps=cfg.rms_norm_eps, name="rope")
    return x_ND, q_NHK, k_NGK, v_NGK


def post(w: Layer, x_ND: Tensor, o_NHK: Tensor, cfg: Config, valid_N: Any = ABSENT) -> tuple[Tensor, Any]:
    """Everything after attention; token-local.

    Statistics of a layer with experts are sums over the tokens of ``valid_N`` (ABSENT: all): of each expert's
    probability, and of the choices of it.
    """
    mid_ND = linear(o_NHK.flatten(-2), w.o, add=x_ND, name="mid")
    mid_ND, n_ND = add_rms_norm(mid_ND, ABSENT, w.norm2, eps=cfg.rms_norm_eps, name="norm2")
    if cfg.experts is None or w.router is ABSENT:
        gate_up_N2F = linear(n_ND, w.gate_up, name="gate_up")
        return glu_linear(gate_up_N2F, w.down, add=mid_ND, act="silu", name="down"), ABSENT
    # P = N · top_k rows, sorted by expert: a token stands in one row for each of its experts.
    logits_NE = linear(n_ND, w.router, name="router")
    gates_NT, _, *plan, prob_sums_E, counts_E = route(logits_NE, valid_N, **cfg.experts.routing, name="route")
    h_PI = glu(grouped_linear(n_ND, w.expert_gate_up, tuple(plan), name="gate_up"), act="silu", name="act")
    y_ND = grouped_linear(h_PI, w.expert_down, tuple(plan), gates_NT, mid_ND, name="down")
    return y_ND, (prob_sums_E, counts_E)


def final(w: Weights, x_ND: Tensor, cfg: Config) -> Tensor:
    """The norm before the head."""
    return rms_norm(x_ND, w.norm, eps=cfg.rms_norm_eps, name="norm")
