"""Tiny random models of every family, with transformers as the judge."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from oprule import DEVICE
from torch import Tensor

from unsloth_core.load import read_weights
from unsloth_core.models import family_of
from unsloth_core.models.decoder import Model

BASE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 500000.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}



def longrope(pairs: int, original: int = 32) -> dict[str, Any]:
    """The rope fields of a long Phi whose first context was ``original``: a divisor for each of ``pairs``."""
    lists = {"short_factor": [1.0 + i / 8 for i in range(pairs)], "long_factor": [2.0 + i for i in range(pairs)]}
    fields = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": original, **lists}
    return {"rope_parameters": fields, "original_max_position_embeddings": original}


# Layers with a window and without; Gemma 3 has a rotation for either kind.
MIXED = ["sliding_attention", "full_attention"]
TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
GEMMA3 = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 3}

QWEN3_MOE = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 16}
MIXTRAL = {"num_local_experts": 4, "intermediate_size": 24}

# name -> (model_type, what differs from BASE)
VERSIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama-3": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "rms_norm_eps": 1e-5}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5}),
    "llama-3.2": ("llama", {"rope_parameters": {**LLAMA3, "factor": 32.0}, "tie_word_embeddings": True}),
    "smollm2": (
        "llama",
        {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "tinyllama": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    "yi": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}, "num_key_value_heads": 1}),
    "r1-distill-llama": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "mistral-7b-v0.1": ("mistral", {"sliding_window": 4, "rms_norm_eps": 1e-5}),
    "mistral-7b-v0.3": (
        "mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "mistral-nemo": (
        "mistral",
        {"sliding_window": None, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ),
    "ministral-8b": ("mistral", {"sliding_window": 5, "head_dim": 16, "num_key_value_heads": 1}),
    "ministral": (
        "ministral",
        {"sliding_window": 3, "head_dim": 12, "layer_types": MIXED},
    ),
    "mixtral-8x7b": ("mixtral", {**MIXTRAL, "rms_norm_eps": 1e-5}),
    "mixtral-balanced": (
        "mixtral", {**MIXTRAL, "num_local_experts": 5, "num_experts_per_tok": 3, "output_router_logits": True,
                    "router_aux_loss_coef": 0.5, "sliding_window": 5},
    ),
    "falcon-7b": ("falcon", {"ffn_hidden_size": 100}),
    "falcon-11b": ("falcon", {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False, "num_kv_heads": 2,
                              "new_decoder_architecture": True, "ffn_hidden_size": 80}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "qwen1.5": ("qwen2", {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2.5": ("qwen2", {"tie_word_embeddings": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2.5-yarn": ("qwen2", {"rope_parameters": YARN}),
    "r1-distill-qwen": ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 1}),
    "gemma-2b": ("gemma", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma-7b": ("gemma", {"head_dim": 20, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": ("gemma3_text", {**GEMMA3, "layer_types": MIXED, "rope_parameters": TWO_BASES}),
    "gemma3-270m": ("gemma3_text", {**GEMMA3, "num_key_value_heads": 1}),
    "phi-3-mini-4k": ("phi3", {"num_key_value_heads": 4, "sliding_window": 7}),
    "phi-3.5-mini": ("phi3", {"num_key_value_heads": 4, "sliding_window": 60, **longrope(6)}),
    "phi-3-medium": ("phi3", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    "phi-4": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 250000.0}}),
    "phi-4-mini": (
        "phi3",
        {"hidden_size": 64, "partial_rotary_factor": 0.75, "tie_word_embeddings": True, **longrope(6)},
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3-moe": ("qwen3_moe", {**QWEN3_MOE, "norm_topk_prob": True}),
    "qwen3-moe-mixed": (
        "qwen3_moe",
        {
            **QWEN3_MOE, "mlp_only_layers": [0], "output_router_logits": True, "router_aux_loss_coef": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-window": (
        "qwen3",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 3, "layer_types": MIXED},
    ),
}


@dataclasses.dataclass
class Checkpoint:
    """What ``open_checkpoint`` gives, from memory."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    source: str = "tiny"

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name]


OTHER_NAMES = {"falcon": ("intermediate_size", "num_key_value_heads")}  # which of BASE's it does not know


def judge(model_type: str, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """A transformers model with random weights (norms and biases too), float32 on the test device."""
    base = {k: v for k, v in BASE.items() if k not in OTHER_NAMES.get(model_type, ())}
    config = transformers.AutoConfig.for_model(model_type, **{**base, **overrides})
    torch.manual_seed(seed)
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    if model_type in EXPERT_NAMES:  # the others multiply by all experts at once, and not in float64
        hf.set_experts_implementation("eager")
    with torch.no_grad():
        for name, p in hf.named_parameters():
            if p.ndim == 1:
                p.copy_(("norm" in name and "gemma" not in model_type) + 0.3 * torch.randn(p.shape))
    return hf.to(DEVICE).eval()


# Of transformers 5, which holds all experts as one tensor: (its block, gate, up, down) in files.
EXPERT_NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def on_disk(hf: transformers.PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors, or their gradients, by the names of files."""
    if hf.config.model_type not in EXPERT_NAMES:
        return dict(tensors)
    block, gate, up, down = EXPERT_NAMES[hf.config.model_type]
    found = {}
    for name, t in tensors.items():
        layer, of_experts, what = name.partition("mlp.experts.")
        if not of_experts:
            found[name.replace("mlp.gate.", f"{block}.gate.")] = t
        for e, expert in enumerate(t) if of_experts else ():
            parts = zip((gate, up), expert.chunk(2), strict=True) if what == "gate_up_proj" else [(down, expert)]
            found |= {f"{layer}{block}.experts.{e}.{part}.weight": p for part, p in parts}
    return found


def checkpoint_of(hf: transformers.PreTrainedModel) -> Checkpoint:
    """Its config.json and tensors, as ``save_pretrained`` would write them."""
    config = json.loads(hf.config.to_json_string(use_diff=True))
    tied = hf.config.tie_word_embeddings
    tensors = {k: v.detach() for k, v in hf.state_dict().items() if not (tied and k == "lm_head.weight")}
    return Checkpoint(config, on_disk(hf, tensors))


def ours(hf: transformers.PreTrainedModel, quantize: str | None = None) -> tuple[Model, Any]:
    """The same model in this library."""
    checkpoint = checkpoint_of(hf)
    family = family_of(checkpoint.config)
    config = family.Config.from_hf(checkpoint.config)
    params = read_weights(checkpoint, family.Weights, config, device=DEVICE, dtype=torch.float32, quantize=quantize)
    return Model(family=family, config=config), params
