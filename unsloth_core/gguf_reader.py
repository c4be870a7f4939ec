"""Reading GGUF, llama.cpp's one-file format, as if it were a folder of safetensors.

A file holds metadata, tensors (quantised in blocks, under names of its own) and the tokenizer. Here they
become what the rest of the library knows: a Hugging Face config, names and row order, dequantised tensors. The bytes
are taken apart in `gguf_file.py`.

What differs between architectures is data: `ARCHITECTURES`. For `llama` (Mistral's too) the converter had reordered
the rows of the q and k projections (rotary pairs side by side); that is undone on the quantised rows, before decoding.
And it had replaced Llama 3's rope scaling by a tensor of divisors, from which the numbers are recovered. For `gemma` it
had added 1 to the weights of norms, which is taken off again. Gemma's scale of attention scores is in no file: the rule
for it, by the number of layers, is llama.cpp's. All experts of a layer are one tensor, of which each gets its rows; a
`llama` with experts is Mixtral.

Names and conversions are those of llama.cpp's `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .gguf_file import PLAIN, StoredTensor, parse
from .tokenizer import Tokenizer

__all__ = ["GGUFCheckpoint", "open_gguf"]

QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K")


KEYS = {
    "embedding_length": ("hidden_size", int),
    "feed_forward_length": ("intermediate_size", int),
    "block_count": ("num_hidden_layers", int),
    "attention.head_count": ("num_attention_heads", int),
    "attention.head_count_kv": ("num_key_value_heads", int),
    "attention.key_length": ("head_dim", int),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float),
    "context_length": ("max_position_embeddings", int),
    "rope.freq_base": ("rope_theta", float),
}
TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
WINDOW = {"attention.sliding_window": ("sliding_window", int)}
EXPERTS = {"expert_count": ("num_local_experts", int), "expert_used_count": ("num_experts_per_tok", int)}
CAP = {"final_logit_softcapping": ("final_logit_softcapping", float)}


@dataclass(frozen=True)
class Architecture:
    """How one `general.architecture` maps to Hugging Face."""

    config: Mapping[str, Any]  # fields that follow from the architecture alone
    layers: Mapping[str, str]  # tensor of a layer -> Hugging Face name, without prefix and ".weight" or ".bias"
    keys: Mapping[str, tuple[str, type]] = field(default_factory=lambda: KEYS)  # metadata key -> config field, type
    optional: Mapping[str, tuple[str, type]] = field(default_factory=dict)  # the same; what is absent or 0 stays out
    ignored: frozenset[str] = frozenset({"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"})
    tensors: Mapping[str, str] = field(default_factory=lambda: TENSORS)  # tensor outside the layers -> name
    permuted: Mapping[str, str] = field(default_factory=dict)  # tensors with reordered rows -> field of their heads
    divisors: tuple[str, ...] = ()  # tensors of rotary divisors, which become fields
    norms_plus_one: bool = False
    layers_of_27b: int = 0  # the Gemma whose scores are scaled by the width of the stream over the number of heads


def _gemma(model_type: str, arch: str) -> dict[str, Any]:
    fields = {"model_type": model_type, "architectures": [arch], "hidden_activation": "gelu_pytorch_tanh"}
    return {"config": fields, "norms_plus_one": True}


ARCHITECTURES = {
    "llama": Architecture(
        config={"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"},
        layers=LAYERS
        | {
            "ffn_gate_inp": "block_sparse_moe.gate",
            "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
            "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
            "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
        },
        optional=WINDOW | EXPERTS,
        permuted={"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"},
        divisors=("rope_freqs.weight",),
    ),
    "qwen2": Architecture(
        config={"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu"}, layers=LAYERS
    ),
    "qwen3": Architecture(
        config={"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"},
        layers=LAYERS | HEAD_NORMS,
    ),
    "qwen3moe": Architecture(
        config={
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "hidden_act": "silu",
            "norm_topk_prob": True,  # as llama.cpp computes it
        },
        layers=LAYERS
        | HEAD_NORMS
        | {
            "ffn_gate_inp": "mlp.gate",
            "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
            "ffn_up_exps": "mlp.experts.{e}.up_proj",
            "ffn_down_exps": "mlp.experts.{e}.down_proj",
        },
        keys=KEYS | EXPERTS | {"expert_feed_forward_length": ("moe_intermediate_size", int)},
    ),
    "phi3": Architecture(
        config={"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "hidden_act": "silu"},
        layers={
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        keys=KEYS | WINDOW,
        divisors=("rope_factors_long.weight", "rope_factors_short.weight"),
    ),
    "gemma": Architecture(**_gemma("gemma", "GemmaForCausalLM"), layers=LAYERS),
    "gemma2": Architecture(
        **_gemma("gemma2", "Gemma2ForCausalLM"),
        layers=LAYERS | SANDWICH,
        optional=WINDOW | CAP | {"attn_logit_softcapping": ("attn_logit_softcapping", float)},
        layers_of_27b=46,
    ),
    "gemma3": Architecture(
        **_gemma("gemma3_text", "Gemma3ForCausalLM"),
        layers=LAYERS | SANDWICH | HEAD_NORMS,
        keys=KEYS | WINDOW,
        optional=CAP
        | {
            "rope.freq_base_swa": ("rope_local_base_freq", float),
            "attention.sliding_window_pattern": ("sliding_window_pattern", int),
        },
        layers_of_27b=62,
    ),
}


@dataclass(frozen=True)
class _Entry:
    """A tensor and what the converter did to it: reordered the rows of so many heads, added 1."""

    tensor: StoredTensor
    heads: int = 0
    plus_one: bool = False


@dataclass(frozen=True)
class GGUFCheckpoint:
    """A .gguf file behind the interface of `hub.Checkpoint`."""

    source: str
    metadata: Mapping[str, Any]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    entries: Mapping[str, _Entry]  # by Hugging Face name

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._entry(name).tensor.shape

    def dtype(self, name: str) -> torch.dtype:
        """Data type of `tensor(name)`: fp32 for quantised tensors and for norms that 1 was added to."""
        entry = self._entry(name)
        return torch.float32 if entry.plus_one else PLAIN.get(entry.tensor.type, torch.float32)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, dequantised; a view of the file if it is stored plainly and in order."""
        entry = self._entry(name)
        rows = entry.tensor.rows
        decoded = entry.tensor.decode(_rotate_half_order(rows, entry.heads) if entry.heads else rows)
        return decoded.float() - 1 if entry.plus_one else decoded

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, rebuilt from the metadata."""
        return Tokenizer.from_gguf(self.metadata, source=self.source)

    def _entry(self, name: str) -> _Entry:
        if name not in self.entries:
            raise ValueError(f"{self.source}: no tensor {name!r} among {len(self.entries)}")
        return self.entries[name]


def open_gguf(path: str | Path) -> GGUFCheckpoint:
    """Open a .gguf file.

    Raises FileNotFoundError if there is none; ValueError if it is malformed, truncated or big-endian, or
    holds a key or tensor whose meaning for the model is unknown; NotImplementedError for an architecture or
    a block type that is not supported.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    metadata, tensors = parse(path)
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise NotImplementedError(f"{path}: general.architecture is {name!r}, supported: {supported}")
    for tensor_name, tensor in tensors.items():
        if tensor.type not in PLAIN and tensor.type not in QUANTISED:
            raise NotImplementedError(
                f"{path}: tensor {tensor_name!r} has type {tensor.type}, supported: {', '.join([*PLAIN, *QUANTISED])}"
            )
    config = _config(path, name, ARCHITECTURES[name], metadata, tensors)
    ids = {
        key: metadata[f"tokenizer.ggml.{key}"]
        for key in ("bos_token_id", "eos_token_id")
        if type(metadata.get(f"tokenizer.ggml.{key}")) is int
    }
    return GGUFCheckpoint(
        source=str(path),
        metadata=metadata,
        config={**config, **ids},
        generation_config=ids,
        entries=_entries(path, ARCHITECTURES[name], config, tensors),
    )


# ---- names, row order, config ----


def _rotate_half_order(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection in Hugging Face's order: within a head of K rows, its row j * K / 2 + i is
    stored as row 2i + j (j = 0, 1 in rotary pair i). Works on rows of bytes: a quantised row stays whole."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _entries(
    path: Path, arch: Architecture, config: dict[str, Any], tensors: dict[str, StoredTensor]
) -> dict[str, _Entry]:
    """Tensors under their Hugging Face names."""
    entries: dict[str, _Entry] = {}
    for name, tensor in tensors.items():
        if name in arch.divisors:  # already in the config
            continue
        match = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,4})\.(\w+)\.(weight|bias)", name)
        heads = 0
        if name in arch.tensors:
            target = arch.tensors[name]
        elif match and match[2] in arch.layers and int(match[1]) < config["num_hidden_layers"]:
            target = f"model.layers.{match[1]}.{arch.layers[match[2]]}.{match[3]}"
            if "{e}" in target:
                entries |= _split(path, name, target, tensor, config.get("num_local_experts", 0))
                continue
            if match[2] in arch.permuted:
                heads = config[arch.permuted[match[2]]]
        else:
            raise ValueError(
                f"{path}: tensor {name!r} has no place in a {config['model_type']} model "
                f"of {config['num_hidden_layers']} layers"
            )
        if heads and match and match[3] == "bias":  # one row of bytes: cut it into elements to reorder it
            if tensor.type not in PLAIN:
                raise ValueError(f"{path}: tensor {name!r}: expected a bias of plain type, got {tensor.type}")
            tensor = StoredTensor(tensor.type, tensor.shape, tensor.rows.reshape(tensor.shape[-1], -1))
        if heads and tensor.rows.shape[0] % (2 * heads):
            raise ValueError(
                f"{path}: tensor {name!r} has {tensor.rows.shape[0]} rows, expected a multiple of 2 * {heads}"
            )
        entries[target] = _Entry(tensor, heads, arch.norms_plus_one and target.endswith("norm.weight"))
    return entries


def _split(path: Path, name: str, target: str, tensor: StoredTensor, experts: int) -> dict[str, _Entry]:
    """The tensor of all experts as one of each; a quantised row stays whole, so that nothing is decoded."""
    if len(tensor.shape) != 3 or tensor.shape[0] != experts:
        raise ValueError(f"{path}: tensor {name!r} has shape {tensor.shape}, expected ({experts}, rows, columns)")
    each = [StoredTensor(tensor.type, tensor.shape[1:], rows) for rows in np.split(tensor.rows, experts)]
    return {target.replace("{e}", str(e)): _Entry(one) for e, one in enumerate(each)}


def _config(
    path: Path, name: str, arch: Architecture, metadata: Mapping[str, Any], tensors: dict[str, StoredTensor]
) -> dict[str, Any]:
    """What config.json would say. Every key of the architecture is used or known to change nothing."""
    values = {key.removeprefix(f"{name}."): v for key, v in metadata.items() if key.startswith(f"{name}.")}

    def take(key: str, kind: type, *default: Any) -> Any:
        if key not in values:
            if not default:
                raise ValueError(f"{path}: {name}.{key}: expected {kind.__name__}, got none")
            return default[0]
        value = values.pop(key)
        if type(value) is not kind:
            raise ValueError(f"{path}: {name}.{key}: expected {kind.__name__}, got {type(value).__name__}")
        if kind is int and not 0 <= value < 2**31 or kind is float and not math.isfinite(value):
            raise ValueError(f"{path}: {name}.{key}: expected a size or a finite number, got {value}")
        # fp32 widened to double; the shortest decimal with the same fp32 is what config.json said.
        return float(str(np.float32(value))) if kind is float else value

    known = {**arch.keys, **arch.optional}
    for key in {**EXPERTS, **WINDOW, "expert_shared_feed_forward_length": None}:
        if key not in known and take(key, int, 0):
            raise NotImplementedError(f"{path}: {name}.{key}: not supported for this architecture")
    config: dict[str, Any] = dict(arch.config)
    heads, hidden = values.get("attention.head_count"), values.get("embedding_length")
    if type(heads) is int and type(hidden) is int and heads > 0:
        values.setdefault("attention.head_count_kv", heads)
        values.setdefault("attention.key_length", hidden // heads)
    values.setdefault("rope.freq_base", 10000.0)
    for key, (to, kind) in arch.keys.items():
        config[to] = take(key, kind)
        if config[to] <= 0 and key not in WINDOW:
            raise ValueError(f"{path}: {name}.{key}: expected more than 0, got {config[to]}")
    config |= {to: take(key, kind) for key, (to, kind) in arch.optional.items() if key in values}
    if config.get("sliding_window") == 0:  # none
        config["sliding_window"] = None
    if not config.get("num_local_experts"):
        config = {field: value for field, value in config.items() if field not in dict(EXPERTS.values())}
    width = config["head_dim"]
    turned = take("rope.dimension_count", int, width)
    if turned != width and name != "phi3":
        raise NotImplementedError(f"{path}: {name}.rope.dimension_count is {turned}, supported: the head width {width}")
    if (got := take("attention.value_length", int, width)) != width:
        raise NotImplementedError(f"{path}: {name}.attention.value_length is {got}, supported: the head width {width}")

    if (embedding := tensors.get("token_embd.weight")) is None:
        raise ValueError(f"{path}: no tensor 'token_embd.weight'")
    config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if arch.layers_of_27b:
        per_head = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = per_head if config["num_hidden_layers"] == arch.layers_of_27b else width
    if name == "llama" and "num_local_experts" in config:
        config |= {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    elif name == "llama" and config.get("sliding_window"):
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    elif name == "llama":
        config.pop("sliding_window", None)
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors

    if name == "phi3":
        config |= {"partial_rotary_factor": turned / width} | _longrope(path, take, arch, tensors, turned // 2)
    elif scaling := _rope_scaling(path, take, tensors.get("rope_freqs.weight"), config["rope_theta"], width):
        config["rope_scaling"] = scaling
    if unknown := sorted(set(values) - arch.ignored):
        raise ValueError(f"{path}: metadata key {name}.{unknown[0]} is not known for this architecture")
    return config


def _longrope(
    path: Path, take: Callable[..., Any], arch: Architecture, tensors: dict[str, StoredTensor], pairs: int
) -> dict[str, Any]:
    """Phi-3's rope fields. Its two lists are tensors; their factor of attention follows from the two contexts."""
    original = take("rope.scaling.original_context_length", int, 0)
    take("rope.scaling.attn_factor", float, 1.0)
    fields: dict[str, Any] = {"original_max_position_embeddings": original} if original else {}
    if not any(name in tensors for name in arch.divisors):
        return fields
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    for name, to in zip(arch.divisors, ("long_factor", "short_factor"), strict=True):
        if (divisors := tensors.get(name)) is None or divisors.type != "F32" or divisors.shape != (pairs,):
            got = "none" if divisors is None else f"{divisors.type} {divisors.shape}"
            raise ValueError(f"{path}: {name}: expected F32 of shape ({pairs},), got {got}")
        # The shortest decimal with the same fp32 is what config.json said.
        scaling[to] = [float(str(number)) for number in divisors.decode(divisors.rows).numpy()]
    return {**fields, "rope_scaling": scaling}


def _rope_scaling(
    path: Path, take: Callable[..., Any], divisors: StoredTensor | None, theta: float, width: int
) -> dict[str, Any] | None:
    """`rope_scaling` of config.json from the metadata or the tensor of divisors; None without scaling."""
    kind = take("rope.scaling.type", str, "none")
    factor = take("rope.scaling.factor", float, 1.0)
    original = take("rope.scaling.original_context_length", int, 0)
    if kind not in ("none", "linear", "yarn"):
        raise NotImplementedError(f"{path}: rope.scaling.type is {kind!r}, supported: none, linear, yarn")
    if divisors is not None:
        if kind != "none" or divisors.type != "F32" or divisors.shape != (width // 2,):
            raise ValueError(
                f"{path}: rope_freqs.weight: expected F32 of shape ({width // 2},) and no other scaling, "
                f"got {divisors.type} {divisors.shape}, scaling {kind!r}"
            )
        numbers = divisors.decode(divisors.rows).double().numpy()
        return _llama3_scaling(str(path), numbers, theta) if np.any(numbers != 1) else None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return None


def _llama3_divisors(theta: float, width: int, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """What Llama 3's rule divides the width / 2 rotary frequencies by: 1 for wavelengths below
    context / high, `factor` above context / low, in between 1 / ((1 - t) / factor + t) with t linear in
    the frequency."""
    turns = context / (2 * np.pi) * theta ** (-np.arange(0, width, 2) / width)  # of a pair, over the context
    t = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - t) / factor + t)


def _llama3_scaling(source: str, divisors: np.ndarray, theta: float) -> dict[str, Any]:
    """The numbers of Llama 3's rule that give these divisors.

    The rule stays the same when context, low and high are scaled together; published models have low = 1.
    With that, t is linear in the frequency, with slope context / (high - 1) and offset -1 / (high - 1).
    """
    width, factor = 2 * len(divisors), float(round(divisors.max(), 4))
    between = (divisors > 1) & (divisors < divisors.max())
    high, context = 4.0, 8192  # Llama 3.1's, should too few divisors lie between
    if between.sum() >= 2 and factor > 1:
        frequencies = theta ** (-np.arange(0, width, 2) / width) / (2 * np.pi)
        t = (1 / divisors - 1 / factor) / (1 - 1 / factor)
        slope, offset = np.polyfit(frequencies[between], t[between], 1)
        if np.isfinite(slope / offset) and offset < 0 < slope:
            high = float(round(1 - 1 / offset, 3))
            context = round(-slope / offset)
    if high <= 1 or not np.allclose(
        _llama3_divisors(theta, width, factor, 1.0, high, context), divisors, rtol=1e-4, atol=0
    ):
        raise ValueError(
            f"{source}: rope_freqs.weight: expected divisors of Llama 3's rope scaling, got {divisors[:4]}..."
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
