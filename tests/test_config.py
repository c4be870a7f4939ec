"""config.json as publishers write it: read strictly, and the parameter count that follows is the published one."""

import copy
import math

import pytest
import transformers

from unsloth_core.models import FAMILIES, family_of, llama
from unsloth_core.models.config import ConfigReader
from unsloth_core.rotary import Rotary
from unsloth_core.weights import declared_leaves

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
LLAMAS = tuple(PUBLISHED)


def of(model_type, arch, d, layers, heads, kv_heads, ffn, vocab, context, eps, **more):
    """Another family's file; ``pretraining_tp`` and ``rope_scaling: null`` are Llama's."""
    raw = sizes(d, layers, heads, kv_heads, ffn, vocab, context, eps, architectures=[f"{arch}ForCausalLM"], **more)
    del raw["pretraining_tp"]
    return {**raw, "model_type": model_type, "attention_dropout": 0.0}


def mistral(*shape, eps=1e-5, **more):
    return of("mistral", "Mistral", *shape, eps, **{"sliding_window": None, **more})


def qwen2(d, layers, heads, kv_heads, ffn, vocab=152064, context=32768, eps=1e-6, **more):
    """As published with 2.5: a window that is not used."""
    more = {"rope_theta": 1000000.0, "use_sliding_window": False, "sliding_window": context, **more}
    return of(
        "qwen2", "Qwen2", d, layers, heads, kv_heads, ffn, vocab, context, eps,
        **{"max_window_layers": layers, **more},
    )


def qwen3(d, layers, heads, ffn, **more):
    return of(
        "qwen3", "Qwen3", d, layers, heads, 8, ffn, 151936, 40960, 1e-6, head_dim=128, attention_bias=False,
        rope_theta=1000000, sliding_window=None, use_sliding_window=False, max_window_layers=layers, **more,
    )


def mixtral(d, layers, heads, ffn, vocab, context, **more):
    return of(
        "mixtral", "Mixtral", d, layers, heads, 8, ffn, vocab, context, 1e-5, rope_theta=1000000.0, sliding_window=None,
        num_experts_per_tok=2, num_local_experts=8, output_router_logits=False, **more,
    )


def qwen3_moe(d, layers, heads, ffn, expert_ffn, context=40960, **more):
    raw = qwen3(d, layers, heads, ffn, decoder_sparse_step=1, mlp_only_layers=[])
    return {
        **raw, "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_key_value_heads": 4,
        "max_position_embeddings": context, "moe_intermediate_size": expert_ffn, "norm_topk_prob": True,
        "num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": False, "router_aux_loss_coef": 0.001,
        **more,
    }  # fmt: skip


def phi(d, layers, heads, kv_heads, ffn, vocab, context, **more):
    # What the publisher's own code reads, at the values that change nothing.
    extra = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_bias": False, "auto_map": {"AutoConfig": "x.Y"}}
    more = {"original_max_position_embeddings": 4096, "sliding_window": None, "rope_theta": 10000.0, **extra, **more}
    return of("phi3", "Phi3", d, layers, heads, kv_heads, ffn, vocab, context, 1e-5, **more)


def longrope(pairs):
    return {"type": "longrope", "short_factor": [1.0 + i / 9 for i in range(pairs)], "long_factor": [2.0] * pairs}


def without(raw, *names):
    return {name: value for name, value in raw.items() if name not in names}


def falcon(d, layers, heads, **more):
    return {
        "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": d, "num_hidden_layers": layers,
        "num_attention_heads": heads, "alibi": False, "apply_residual_connection_post_layernorm": False, "bias": False,
        "attention_dropout": 0.0, "hidden_dropout": 0.0, "bos_token_id": 11, "eos_token_id": 11, "use_cache": True,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "multi_query": True, "new_decoder_architecture": False,
        "parallel_attn": True, "torch_dtype": "bfloat16", "vocab_size": 65024, "auto_map": {"AutoConfig": "x.Y"},
        "transformers_version": "4.27.4", **more,
    }  # fmt: skip


def gemma(d, layers, heads, kv_heads, ffn):
    raw = of(
        "gemma", "Gemma", d, layers, heads, kv_heads, ffn, 256000, 8192, 1e-6, head_dim=256, rope_theta=10000.0,
        hidden_activation=None, attention_bias=False,
    )
    return {**without(raw, "tie_word_embeddings"), "hidden_act": "gelu_pytorch_tanh"}


def gemma2(d, layers, heads, kv_heads, ffn, head_dim=256, scalar=256, **more):
    raw = of(
        "gemma2", "Gemma2", d, layers, heads, kv_heads, ffn, 256000, 8192, 1e-6, head_dim=head_dim, rope_theta=10000.0,
        hidden_activation="gelu_pytorch_tanh", attention_bias=False, attn_logit_softcapping=50.0, sliding_window=4096,
        final_logit_softcapping=30.0, query_pre_attn_scalar=scalar, cache_implementation="hybrid", **more,
    )
    return {**without(raw, "tie_word_embeddings"), "hidden_act": "gelu_pytorch_tanh"}


def gemma3(d, layers, ffn, **more):
    """The small ones, whose files have everything."""
    raw = of(
        "gemma3_text", "Gemma3", d, layers, 4, 1, ffn, 262144, 32768, 1e-6, head_dim=256, rope_theta=1000000,
        rope_local_base_freq=10000, hidden_activation="gelu_pytorch_tanh", attention_bias=False, sliding_window=512,
        attn_logit_softcapping=None, final_logit_softcapping=None, query_pre_attn_scalar=256, **more,
    )
    return without(raw, "tie_word_embeddings", "hidden_act")


def gemma3_part(d, layers, ffn, **more):
    """The text_config of the multimodal ones: what equals the class default is left out."""
    return {
        "hidden_size": d, "intermediate_size": ffn, "model_type": "gemma3_text", "num_hidden_layers": layers,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024, **more,
    }


TIED = {"tie_word_embeddings": True}
PUBLISHED |= {
    "Mistral-7B-v0.1": (
        mistral(4096, 32, 32, 8, 14336, 32000, 32768, rope_theta=10000.0, sliding_window=4096), 7.242e9,
    ),
    "Mistral-7B-v0.3": (mistral(4096, 32, 32, 8, 14336, 32768, 32768, rope_theta=1000000.0), 7.248e9),
    "Mistral-Nemo-12B": (
        mistral(5120, 40, 32, 8, 14336, 131072, 1024000, rope_theta=1000000.0, head_dim=128), 12.248e9,
    ),
    "Ministral-8B-2410": (
        mistral(4096, 36, 32, 8, 12288, 131072, 32768, rope_theta=100000000.0, head_dim=128, sliding_window=32768),
        8.020e9,
    ),
    "Mistral-Small-24B": (
        mistral(5120, 40, 32, 8, 32768, 131072, 32768, rope_theta=100000000.0, head_dim=128), 23.572e9,
    ),
    "Qwen2.5-0.5B": (qwen2(896, 24, 14, 2, 4864, 151936, max_window_layers=24, use_mrope=False, **TIED), 494.0e6),
    "Qwen2.5-1.5B": (qwen2(1536, 28, 12, 2, 8960, 151936, 131072, use_mrope=False, **TIED), 1.544e9),
    "Qwen2.5-3B": (qwen2(2048, 36, 16, 2, 11008, 151936, **TIED), 3.086e9),
    "Qwen2.5-7B": (qwen2(3584, 28, 28, 4, 18944), 7.616e9),
    "Qwen2.5-14B": (qwen2(5120, 48, 40, 8, 13824, eps=1e-5), 14.770e9),
    "Qwen2.5-32B": (qwen2(5120, 64, 40, 8, 27648, eps=1e-5), 32.764e9),
    "Qwen2.5-72B": (qwen2(8192, 80, 64, 8, 29568, eps=1e-5), 72.706e9),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        qwen2(1536, 28, 12, 2, 8960, 151936, 131072, rope_theta=10000, use_mrope=False, max_window_layers=21), 1.777e9,
    ),
    "DeepSeek-R1-Distill-Qwen-7B": (qwen2(3584, 28, 28, 4, 18944, context=131072, rope_theta=10000), 7.616e9),
    "DeepSeek-R1-Distill-Qwen-14B": (qwen2(5120, 48, 40, 8, 13824, context=131072, eps=1e-5), 14.770e9),
    "DeepSeek-R1-Distill-Qwen-32B": (qwen2(5120, 64, 40, 8, 27648, context=131072, eps=1e-5), 32.764e9),
    "Qwen3-0.6B": (qwen3(1024, 28, 16, 3072, **TIED), 596.0e6),
    "Qwen3-1.7B": (qwen3(2048, 28, 16, 6144, **TIED), 1.721e9),
    "Qwen3-4B": (qwen3(2560, 36, 32, 9728, **TIED), 4.022e9),
    "Qwen3-8B": (qwen3(4096, 36, 32, 12288), 8.191e9),
    "Qwen3-14B": (qwen3(5120, 40, 40, 17408), 14.768e9),
    "Qwen3-32B": (qwen3(5120, 64, 64, 25600), 32.762e9),
    "Mixtral-8x7B": (mixtral(4096, 32, 32, 14336, 32000, 32768, router_aux_loss_coef=0.02), 46.703e9),
    "Mixtral-8x22B": (
        mixtral(6144, 56, 48, 16384, 32000, 65536, router_aux_loss_coef=0.001, router_jitter_noise=0.0), 140.62e9,
    ),
    "Mixtral-8x22B-Instruct": (
        mixtral(6144, 56, 48, 16384, 32768, 65536, router_aux_loss_coef=0.001, router_jitter_noise=0.0), 140.63e9,
    ),
    "Qwen3-30B-A3B": (qwen3_moe(2048, 48, 32, 6144, 768), 30.532e9),
    "Qwen3-235B-A22B": (qwen3_moe(4096, 94, 64, 12288, 1536), 235.09e9),
    "Qwen3-Coder-30B-A3B": (
        qwen3_moe(
            2048, 48, 32, 5472, 768, 262144, rope_theta=10000000, max_window_layers=28, qkv_bias=False,
            router_aux_loss_coef=0.0, shared_expert_intermediate_size=0, use_qk_norm=True,
        ), 30.532e9,
    ),
    "Phi-3-mini-4k": (phi(3072, 32, 32, 32, 8192, 32064, 4096, sliding_window=2047), 3.821e9),
    "Phi-3.5-mini": (
        phi(3072, 32, 32, 32, 8192, 32064, 131072, sliding_window=262144, rope_scaling=longrope(48)), 3.821e9,
    ),
    "Phi-3-medium-4k": (phi(5120, 40, 40, 10, 17920, 32064, 4096, sliding_window=2047), 13.960e9),
    "Phi-4": (
        phi(5120, 40, 40, 10, 17920, 100352, 16384, rope_theta=250000, original_max_position_embeddings=16384),
        14.660e9,
    ),
    "Phi-4-mini": (
        phi(
            3072, 32, 24, 8, 8192, 200064, 131072, sliding_window=262144, rope_scaling=longrope(48),
            partial_rotary_factor=0.75, full_attn_mod=1, interpolate_factor=1, lm_head_bias=False, mlp_bias=False,
            **TIED,
        ), 3.836e9,
    ),
    "Falcon-7B": (falcon(4544, 32, 71), 6.922e9),
    "Falcon-11B": (
        falcon(
            4096, 60, 32, num_kv_heads=8, new_decoder_architecture=True, num_ln_in_parallel_attn=1, rope_theta=500042.0,
            ffn_hidden_size=16384, activation="gelu", max_position_embeddings=8192, tie_word_embeddings=False,
        ), 11.103e9,
    ),
    "Falcon-40B": (falcon(8192, 60, 128, num_kv_heads=8, new_decoder_architecture=True), 41.303e9),
    "Gemma-2B": (gemma(2048, 18, 8, 1, 16384), 2.506e9),
    "Gemma-7B": (gemma(3072, 28, 16, 16, 24576), 8.538e9),
    "Gemma-2-2B": (gemma2(2304, 26, 8, 4, 9216), 2.614e9),
    "Gemma-2-9B": (gemma2(3584, 42, 16, 8, 14336, sliding_window_size=4096), 9.242e9),
    "Gemma-2-27B": (gemma2(4608, 46, 32, 16, 36864, head_dim=128, scalar=144), 27.227e9),
    "Gemma-3-270M": (
        gemma3(
            640, 18, 2048, _sliding_window_pattern=6, use_bidirectional_attention=False,
            layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(18)],
        ), 268.1e6,
    ),
    "Gemma-3-1B": (gemma3(1152, 26, 6912, sliding_window_pattern=6, cache_implementation="hybrid"), 999.9e6),
    "Gemma-3-4B": (gemma3_part(2560, 34, 10240), 3.880e9),
    "Gemma-3-12B": (
        gemma3_part(3840, 48, 15360, num_attention_heads=16, num_key_value_heads=8), 11.766e9,
    ),
    "Gemma-3-27B": (
        gemma3_part(
            5376, 62, 21504, num_attention_heads=32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168,
        ), 27.009e9,
    ),
}  # fmt: skip
each = pytest.mark.parametrize("name", PUBLISHED)
each_llama = pytest.mark.parametrize("name", LLAMAS)


def parsed(raw):
    return family_of(raw).Config.from_hf(raw)


def parameters(family, config):
    """As a checkpoint has them: the optional leaves of this version (of Llama: none), and no head where it is tied."""
    return sum(
        math.prod(d.shape)
        for d in declared_leaves(family.Weights, config)
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
    count = parameters(family_of(raw), parsed(raw))
    unit = 1e6 if published < 1e9 else 1e9
    digits = 1 if unit == 1e6 else 2 if published > 100e9 else 3
    assert round(count / unit, digits) == round(published / unit, digits)


@each_llama
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


SAME = """hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size
max_position_embeddings rms_norm_eps tie_word_embeddings""".split()
FALCON_NAMES = {
    "intermediate_size": "ffn_hidden_size", "num_key_value_heads": "num_kv_heads", "rms_norm_eps": "layer_norm_epsilon",
}  # fmt: skip


def assert_as_transformers_reads_it(raw):
    """Sizes, windows, bases, scales and caps are those of transformers' own config class."""
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(raw))  # it writes into the dict of rope
    ours = parsed(raw)
    falcon = raw["model_type"] == "falcon"
    if falcon and theirs.multi_query and not theirs.new_decoder_architecture:
        theirs.num_kv_heads = 1  # what the model says to itself
    for name in SAME:
        other = FALCON_NAMES.get(name, name) if falcon else name
        assert getattr(ours, "layer_norm_epsilon" if other == "layer_norm_epsilon" else name) == getattr(theirs, other)
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_dim == head_dim
    layers = range(ours.num_hidden_layers)
    specs = [family_of(raw).spec(ours, i) for i in layers]
    window = getattr(theirs, "sliding_window", None)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(layers)
    assert [spec.window for spec in specs] == [window if kind == "sliding_attention" else None for kind in kinds]
    for spec, kind in zip(specs, kinds, strict=True):
        rope = theirs.rope_parameters.get(kind, theirs.rope_parameters)
        assert (spec.rope.base, spec.rope.rope_type) == (rope["rope_theta"], rope["rope_type"])
        assert spec.rope.channels == int(head_dim * rope.get("partial_rotary_factor", 1.0))
        assert spec.scale == getattr(theirs, "query_pre_attn_scalar", head_dim) ** -0.5
        assert spec.softcap == getattr(theirs, "attn_logit_softcapping", None)
    if experts := getattr(ours, "experts", None):
        assert (experts.count, experts.top_k) == (theirs.num_local_experts, theirs.num_experts_per_tok)
        assert experts.renormalise == getattr(theirs, "norm_topk_prob", True)
        assert experts.balance_coefficient == theirs.router_aux_loss_coef * theirs.output_router_logits
    assert ours.logit_softcap == getattr(theirs, "final_logit_softcapping", None)


@each
def test_as_transformers_reads_it(name):
    assert_as_transformers_reads_it(PUBLISHED[name][0])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_fields_have_the_defaults_of_transformers(model_type):
    if model_type != "ministral":  # whose class in transformers cannot do without head_dim
        assert_as_transformers_reads_it({"model_type": model_type})


def test_null_is_absent_but_for_windows_and_caps():
    dynamic = {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert llama.Config.from_hf(dynamic).rotary.max_position_embeddings == 2048
    common = ["head_dim", "hidden_act", "rope_scaling", "attention_dropout", *SAME]
    for model_type in FAMILIES:
        nulls = dict.fromkeys(common)
        if model_type == "falcon":
            names = {FALCON_NAMES.get(name, name) for name in SAME}
            nulls = dict.fromkeys(names | {"rope_scaling", "attention_dropout", "activation"})
        assert parsed({"model_type": model_type, **nulls}) == parsed({"model_type": model_type}), model_type
    assert set(parsed({"model_type": "mistral"}).windows) == {4096}
    assert set(parsed({"model_type": "mistral", "sliding_window": None}).windows) == {None}
    assert set(parsed({"model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 0}).windows) == {None}
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    gemma2 = parsed({"model_type": "gemma2", **caps})
    assert (gemma2.softcap, gemma2.logit_softcap) == (None, None)


REFUSED = [  # what is changed in SmolLM2's file, what the error says
    ({"sliding_window": 4096}, "fields that no one handles: sliding_window"),
    ({"num_experts": 8, "alibi": False}, "fields that no one handles: alibi, num_experts"),
    ({"hidden_act": "gelu"}, r"field 'hidden_act' is 'gelu', supported: \['silu'\]"),
    ({"attention_dropout": 0.1}, "field 'attention_dropout' is 0.1"),
    ({"rope_interleaved": True}, r"field 'rope_interleaved' is True, supported: \[False\]"),
    ({"hidden_size": 0}, "field 'hidden_size' is 0, expected a positive integer"),
    ({"hidden_size": 576.0}, "field 'hidden_size' is 576.0, expected a positive integer"),
    ({"num_hidden_layers": True}, "field 'num_hidden_layers' is True, expected a positive integer"),
    ({"num_hidden_layers": 2**40}, "field 'num_hidden_layers' is 1099511627776, expected at most 1024"),
    ({"hidden_size": 2**40}, "field 'hidden_size' is 1099511627776, expected at most 2147483647"),
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


SLIDING = ["sliding_attention"]
REFUSED_BY_OTHERS = [
    ("Mistral-7B-v0.1", {"layer_types": SLIDING * 32}, "fields that no one handles: layer_types"),
    ("Mistral-7B-v0.1", {"sliding_window": 0}, "field 'sliding_window' is 0, expected a positive integer"),
    ("Mistral-7B-v0.1", {"sliding_window": True}, "field 'sliding_window' is True, expected a positive integer"),
    ("Mistral-7B-v0.1", {"attention_bias": False}, "fields that no one handles: attention_bias"),
    ("Mistral-7B-v0.1", {"num_key_value_heads": 5}, "32 heads cannot share 5 key/value heads"),
    ("Mistral-7B-v0.1", {"model_type": "ministral", "layer_types": SLIDING}, "'layer_types' is .*expected 32 entries"),
    ("Mistral-7B-v0.3", {"model_type": "ministral", "layer_types": SLIDING * 32}, "there is no sliding_window"),
    ("Mistral-7B-v0.3", {"model_type": "ministral", "layer_types": 32}, "field 'layer_types' is 32, expected 32 ent"),
    ("Mistral-7B-v0.3", {"model_type": "ministral", "layer_types": [[]] * 32}, "field 'layer_types' is .*expected 32"),
    ("Qwen2.5-7B", {"use_mrope": True}, r"field 'use_mrope' is True, supported: \[False\]"),
    ("Qwen2.5-7B", {"use_sliding_window": 1}, "field 'use_sliding_window' is 1, expected true or false"),
    ("Qwen2.5-7B", {"max_window_layers": -1}, "field 'max_window_layers' is -1, expected an integer of at least 0"),
    ("Qwen2.5-7B", {"layer_types": SLIDING * 28}, "there is no sliding_window"),
    ("Qwen2.5-7B", {"attention_bias": True}, "fields that no one handles: attention_bias"),
    ("Qwen3-8B", {"attention_bias": True}, r"field 'attention_bias' is True, supported: \[False\]"),
    ("Qwen3-8B", {"num_experts": 128}, "fields that no one handles: num_experts"),
    ("Mixtral-8x7B", {"router_jitter_noise": 0.1}, "field 'router_jitter_noise' is 0.1"),
    ("Mixtral-8x7B", {"num_experts_per_tok": 9}, "9 experts per token of 8"),
    ("Mixtral-8x7B", {"num_local_experts": 0}, "field 'num_local_experts' is 0, expected a positive integer"),
    ("Mixtral-8x7B", {"num_experts": 8}, "fields that no one handles: num_experts"),
    ("Mixtral-8x7B", {"norm_topk_prob": True}, "fields that no one handles: norm_topk_prob"),
    ("Mixtral-8x7B", {"num_local_experts": 2**20}, "field 'num_local_experts' is 1048576, expected at most 1024"),
    ("Mistral-7B-v0.3", {"num_local_experts": 8}, "fields that no one handles: num_local_experts"),
    ("Qwen3-30B-A3B", {"mlp_only_layers": [48]}, r"field 'mlp_only_layers' is \[48\], expected indices of 48 layers"),
    ("Qwen3-30B-A3B", {"decoder_sparse_step": 0}, "field 'decoder_sparse_step' is 0, expected a positive integer"),
    ("Qwen3-30B-A3B", {"shared_expert_intermediate_size": 4}, "field 'shared_expert_intermediate_size' is 4"),
    ("Qwen3-30B-A3B", {"router_aux_loss_coef": -1}, "field 'router_aux_loss_coef' is -1, expected a number above zero"),
    ("Falcon-7B", {"alibi": True}, r"field 'alibi' is True, supported: \[False\]"),
    ("Falcon-7B", {"bias": True}, r"field 'bias' is True, supported: \[False\]"),
    ("Falcon-7B", {"parallel_attn": False}, r"field 'parallel_attn' is False, supported: \[True\]"),
    ("Falcon-7B", {"num_ln_in_parallel_attn": 2}, r"field 'num_ln_in_parallel_attn' is 2, supported: \[1\]"),
    ("Falcon-7B", {"model_type": "RefinedWebModel"}, "model_type 'RefinedWebModel', supported: .*'falcon'"),
    ("Falcon-40B", {"num_kv_heads": 7}, "128 heads cannot share 7 key/value heads"),
    ("Falcon-40B", {"activation": "relu"}, r"field 'activation' is 'relu', supported: \['gelu'\]"),
    ("Phi-4-mini", {"resid_pdrop": 0.1}, "field 'resid_pdrop' is 0.1"),
    ("Phi-4-mini", {"lm_head_bias": True}, "field 'lm_head_bias' is True"),
    ("Phi-4-mini", {"full_attn_mod": 2}, "field 'full_attn_mod' is 2"),
    ("Phi-4-mini", {"partial_rotary_factor": 1.0}, "short_factor has 48 entries, expected 64"),
    ("Phi-4-mini", {"original_max_position_embeddings": "4096"}, "expected a whole number"),
    ("Gemma-7B", {"hidden_act": "silu"}, "field 'hidden_act' is 'silu'"),
    ("Gemma-7B", {"hidden_activation": "gelu"}, "field 'hidden_activation' is 'gelu'"),
    ("Gemma-7B", {"sliding_window": 4096}, "fields that no one handles: sliding_window"),
    ("Gemma-2-9B", {"attention_bias": True}, "field 'attention_bias' is True"),
    ("Gemma-2-9B", {"sliding_window": None}, "there is no sliding_window"),
    ("Gemma-2-9B", {"final_logit_softcapping": -30}, "'final_logit_softcapping' is -30, expected a number above zero"),
    ("Gemma-2-9B", {"query_pre_attn_scalar": 0}, "field 'query_pre_attn_scalar' is 0, expected a number above zero"),
    ("Gemma-3-1B", {"attn_logit_softcapping": 50.0}, r"field 'attn_logit_softcapping' is 50.0, supported: \[\]"),
    ("Gemma-3-1B", {"use_bidirectional_attention": True}, "field 'use_bidirectional_attention' is True"),
    ("Gemma-3-1B", {"sliding_window_pattern": 0}, "field 'sliding_window_pattern' is 0, expected a positive integer"),
    ("Gemma-3-1B", {"rope_parameters": {"global": {}}}, "unknown field 'global' in rope_parameters"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED_BY_OTHERS)
def test_what_other_families_refuse_is_named(name, change, message):
    with pytest.raises(ValueError, match=message):
        parsed({**PUBLISHED[name][0], **change})


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
