"""config.json as publishers write it: read strictly, and the parameter count that follows is the published one."""

import math

import pytest
import transformers

from unsloth_core import weights
from unsloth_core.models import family_of, llama
from unsloth_core.models.config import ConfigReader
from unsloth_core.rotary import Rotary

# What transformers 4 writes into every Llama's file, and values equal to the class defaults need not be there.
COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "initializer_range": 0.02,
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": True, "pretraining_tp": 1, "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0", "tie_word_embeddings": False, "rope_scaling": None,
}  # fmt: skip
NEWER = {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False}
LLAMA31 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
LLAMA32 = {**LLAMA31, "factor": 32.0}


def sizes(d, layers, heads, kv_heads, ffn, vocab, context, eps=1e-5, **more):
    return {
        **COMMON, "hidden_size": d, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": ffn, "vocab_size": vocab,
        "max_position_embeddings": context, "rms_norm_eps": eps, **more,
    }  # fmt: skip


# checkpoint -> (config.json, published parameters)
PUBLISHED = {
    "Llama-2-7B": (sizes(4096, 32, 32, 32, 11008, 32000, 4096, torch_dtype="float16"), 6.738e9),
    "Llama-2-70B": (sizes(8192, 80, 64, 8, 28672, 32000, 4096), 68.977e9),
    "Llama-3-8B": (sizes(4096, 32, 32, 8, 14336, 128256, 8192, rope_theta=500000.0), 8.030e9),
    "Llama-3.1-8B": (
        sizes(4096, 32, 32, 8, 14336, 128256, 131072, rope_theta=500000.0, rope_scaling=LLAMA31, **NEWER), 8.030e9,
    ),
    "Llama-3.1-405B": (
        sizes(16384, 126, 128, 8, 53248, 128256, 131072, rope_theta=500000.0, rope_scaling=LLAMA31, **NEWER), 405.85e9,
    ),
    "Llama-3.2-1B": (
        sizes(
            2048, 16, 32, 8, 8192, 128256, 131072, rope_theta=500000.0, rope_scaling=LLAMA32, head_dim=64,
            tie_word_embeddings=True, eos_token_id=[128001, 128008, 128009], **NEWER,
        ), 1.236e9,
    ),
    "Llama-3.2-3B": (
        sizes(
            3072, 28, 24, 8, 8192, 128256, 131072, rope_theta=500000.0, rope_scaling=LLAMA32, head_dim=128,
            tie_word_embeddings=True, **NEWER,
        ), 3.213e9,
    ),
    "Llama-3.3-70B": (
        sizes(8192, 80, 64, 8, 28672, 128256, 131072, rope_theta=500000.0, rope_scaling=LLAMA31, head_dim=128, **NEWER),
        70.554e9,
    ),
    "DeepSeek-R1-Distill-Llama-8B": (
        sizes(4096, 32, 32, 8, 14336, 128256, 131072, rope_theta=500000.0, rope_scaling=LLAMA31, **NEWER), 8.030e9,
    ),
    "DeepSeek-R1-Distill-Llama-70B": (
        sizes(8192, 80, 64, 8, 28672, 128256, 131072, rope_theta=500000.0, rope_scaling=LLAMA31, head_dim=128, **NEWER),
        70.554e9,
    ),
    "TinyLlama-1.1B": (sizes(2048, 22, 32, 4, 5632, 32000, 2048, attention_bias=False, rope_theta=10000.0), 1.100e9),
    "SmolLM2-135M": (
        sizes(
            576, 30, 9, 3, 1536, 49152, 8192, rope_theta=100000, rope_interleaved=False, is_llama_config=True,
            tie_word_embeddings=True, pad_token_id=2, **{"transformers.js_config": {"dtype": "q4"}}, **NEWER,
        ), 134.5e6,
    ),
    "SmolLM2-360M": (
        sizes(
            960, 32, 15, 5, 2560, 49152, 8192, rope_theta=100000, rope_interleaved=False, is_llama_config=True,
            tie_word_embeddings=True, **NEWER,
        ), 361.8e6,
    ),
    "SmolLM2-1.7B": (
        sizes(2048, 24, 32, 32, 8192, 49152, 8192, rope_theta=130000, tie_word_embeddings=True, **NEWER), 1.711e9,
    ),
    "Yi-6B": (sizes(4096, 32, 32, 4, 11008, 64000, 4096, rope_theta=5000000.0, pad_token_id=0), 6.061e9),
    "Yi-1.5-9B": (sizes(4096, 48, 32, 4, 11008, 64000, 4096, 1e-6, rope_theta=5000000.0, pad_token_id=0), 8.829e9),
    "Yi-34B": (sizes(7168, 60, 56, 8, 20480, 64000, 4096, rope_theta=5000000.0, pad_token_id=0), 34.389e9),
    "Falcon3-1B": (sizes(2048, 18, 8, 4, 8192, 131072, 8192, 1e-6, head_dim=256, rope_theta=1000042, **NEWER), 1.669e9),
    "Falcon3-7B": (
        sizes(3072, 28, 12, 4, 23040, 131072, 32768, 1e-6, head_dim=256, rope_theta=1000042, **NEWER), 7.456e9,
    ),
    "Falcon3-10B": (
        sizes(3072, 40, 12, 4, 23040, 131072, 32768, 1e-6, head_dim=256, rope_theta=1000042, **NEWER), 10.306e9,
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", PUBLISHED)


def parameters(config):
    """As a checkpoint has them: no biases, and no head where it is tied."""
    return sum(
        math.prod(d.shape)
        for d in weights.declarations(llama.Weights, config.dims)
        if not d.optional or (d.path == ("head",) and not config.tie_word_embeddings)
    )


def as_transformers_5(raw):
    """The same model, rope in ``rope_parameters``."""
    rope = {"rope_type": "default", **(raw["rope_scaling"] or {}), "rope_theta": raw.get("rope_theta", 10000.0)}
    kept = {k: v for k, v in raw.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    return {**kept, "rope_parameters": rope, "dtype": raw["torch_dtype"]}


@each
def test_published_configs_have_the_published_number_of_parameters(name):
    raw, published = PUBLISHED[name]
    assert family_of(raw) is llama
    count = parameters(llama.Config.from_hf(raw))
    unit = 1e6 if published < 1e9 else 1e9
    digits = 1 if unit == 1e6 else 2 if published > 100e9 else 3
    assert round(count / unit, digits) == round(published / unit, digits)


@each
def test_both_spellings_of_rope_are_one_config(name):
    raw, _ = PUBLISHED[name]
    config = llama.Config.from_hf(raw)
    assert llama.Config.from_hf(as_transformers_5(raw)) == config
    assert config.rotary.base == raw.get("rope_theta", 10000.0)
    assert config.rotary.rope_type == ("llama3" if raw["rope_scaling"] else "default")
    assert config.head_dim * config.num_attention_heads == config.dims["Q"]


def test_fields_arrive_where_they_belong():
    config = llama.Config.from_hf(PUBLISHED["Llama-3.2-1B"][0])
    rotary = Rotary(
        head_dim=64, channels=64, base=500000.0, rope_type="llama3", factor=32.0, low_freq_factor=1.0,
        high_freq_factor=4.0, original_max_position_embeddings=8192,
    )  # fmt: skip
    assert config == llama.Config(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        head_dim=64, vocab_size=128256, max_position_embeddings=131072, rms_norm_eps=1e-5, rotary=rotary,
        tie_word_embeddings=True,
    )  # fmt: skip
    assert config.dims == {
        "D": 2048, "F": 8192, "L": 16, "V": 128256, "H": 32, "G": 8, "K": 64, "Q": 2048, "R": 512,
    }  # fmt: skip


def test_absent_fields_have_the_defaults_of_transformers():
    theirs = transformers.LlamaConfig()
    ours = llama.Config.from_hf({"model_type": "llama"})
    same = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
    vocab_size max_position_embeddings rms_norm_eps tie_word_embeddings"""
    for name in same.split():
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.rotary.base == 10000.0
    dynamic = {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert llama.Config.from_hf(dynamic).rotary.max_position_embeddings == 2048
    nulls = dict.fromkeys(same.split() + ["hidden_act", "attention_bias", "rope_scaling", "attention_dropout"])
    assert llama.Config.from_hf({"model_type": "llama", **nulls}) == ours


REFUSED = [  # what is changed in SmolLM2's file, what the error says
    ({"sliding_window": 4096}, "fields that no one handles: sliding_window"),
    ({"num_experts": 8, "alibi": False}, "fields that no one handles: alibi, num_experts"),
    ({"hidden_act": "gelu"}, r"field 'hidden_act' is 'gelu', supported: \['silu'\]"),
    ({"attention_dropout": 0.1}, "field 'attention_dropout' is 0.1"),
    ({"rope_interleaved": True}, r"field 'rope_interleaved' is True, supported: \[False\]"),
    ({"hidden_size": 0}, "field 'hidden_size' is 0, expected a positive integer"),
    ({"hidden_size": 576.0}, "field 'hidden_size' is 576.0, expected a positive integer"),
    ({"num_hidden_layers": True}, "field 'num_hidden_layers' is True, expected a positive integer"),
    ({"vocab_size": "49152"}, "field 'vocab_size' is '49152', expected a positive integer"),
    ({"head_dim": -1}, "field 'head_dim' is -1, expected a positive integer"),
    ({"head_dim": 63}, "63 rotated channels, expected an even number"),
    ({"num_key_value_heads": 2}, "9 heads cannot share 2 key/value heads"),
    ({"rms_norm_eps": "1e-5"}, "field 'rms_norm_eps' is '1e-5', expected a number above zero"),
    ({"rms_norm_eps": [1e-5]}, r"field 'rms_norm_eps' is \[1e-05\], expected a number above zero"),
    ({"rms_norm_eps": -1e-5}, "field 'rms_norm_eps' is -1e-05, expected a number above zero"),
    ({"rms_norm_eps": math.nan}, "field 'rms_norm_eps' is nan, expected a number above zero"),
    ({"tie_word_embeddings": "false"}, "field 'tie_word_embeddings' is 'false', expected true or false"),
    ({"attention_bias": 1}, "field 'attention_bias' is 1, expected true or false"),
    ({"mlp_bias": "no"}, "field 'mlp_bias' is 'no', expected true or false"),
    ({"rope_theta": "1e5"}, "rope_theta is '1e5'"),
    ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type in rope_scaling is 'ntk'"),
    ({"rope_scaling": {"type": "linear"}}, "lacks the field 'factor'"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, expected 1"),
]


@pytest.mark.parametrize("change, message", REFUSED, ids=lambda x: None if isinstance(x, str) else "-".join(x))
def test_what_is_refused_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        llama.Config.from_hf({**PUBLISHED["SmolLM2-135M"][0], **change})


@pytest.mark.parametrize("model_type", [None, "llama4", "", 3, ["llama"]])
def test_unknown_model_types_are_refused(model_type):
    with pytest.raises(ValueError, match="model_type .*supported: .*'llama'"):
        family_of({"model_type": model_type})
    with pytest.raises(ValueError, match="model_type None"):
        family_of({})


def test_reader_hands_out_each_field_once_and_for_all():
    read = ConfigReader({"model_type": "x", "a": 1, "b": None, "c": True})
    assert (read.take("a"), read.take("b", 5), read.take("d", 6), read.flag("c")) == (1, 5, 6, True)
    for missing in ("b", "d"):
        with pytest.raises(ValueError, match=rf"config.json \(model_type 'x'\): field '{missing}' is missing"):
            read.take(missing)
    read.finish()
    with pytest.raises(ValueError, match="fields that no one handles: a, c"):
        fresh = ConfigReader({"model_type": "x", "a": 1, "c": True, "torch_dtype": "float16", "rope_theta": 1e4})
        fresh.finish()
