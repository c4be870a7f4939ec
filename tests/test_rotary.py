"""Rotary tables against transformers' own frequencies, for every type, in both spellings of a config."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Gemma3TextConfig, LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from unsloth_core.rotary import Rotary

P = 4096  # max_position_embeddings of the configs below
FIELDS = {
    "default": {},
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "longrope": {
        "short_factor": [1.0 + i / 64 for i in range(32)],
        "long_factor": [1.0 + i / 2 for i in range(32)],
        "original_max_position_embeddings": 1024,
    },
}


def old(rope_type, theta=10000.0, **fields):
    """The spelling of transformers 4."""
    scaling = {"type": rope_type, **(FIELDS[rope_type] | fields)}
    return {"max_position_embeddings": P, "rope_theta": theta, "rope_scaling": scaling}


def new(rope_type, theta=10000.0, **fields):
    """The spelling of transformers 5."""
    parameters = {"rope_type": rope_type, "rope_theta": theta, **(FIELDS[rope_type] | fields)}
    return {"max_position_embeddings": P, "rope_parameters": parameters}


def theirs(config, head_dim=64, max_position=P - 1, embedding=LlamaRotaryEmbedding, config_class=LlamaConfig):
    """cos and sin of transformers, by the class a model would use: (N, J) each, and the positions."""
    config = json.loads(json.dumps(config))  # transformers writes into the dicts it is given
    module = embedding(
        config_class(hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, **config)
        if config_class is not Phi3Config
        else config_class(hidden_size=4 * head_dim, num_attention_heads=4, num_key_value_heads=4, **config)
    )
    positions = torch.tensor([0, 1, 17, 1023, max_position])
    cos, sin = module(torch.zeros(()), positions[None])
    J = cos.shape[-1] // 2
    return positions, cos[0, :, :J], sin[0, :, :J]


@pytest.mark.parametrize("spelling", [old, new])
@pytest.mark.parametrize("rope_type", FIELDS)
@pytest.mark.parametrize("max_position", [1023, 1024, P - 1, 3 * P])
def test_equal_to_transformers(rope_type, spelling, max_position):
    """The same operations in the same precision, so the same bits, in all but one case."""
    config = spelling(rope_type, theta=500000.0)
    positions, cos, sin = theirs(config, max_position=max_position)
    got = Rotary.from_hf(config, head_dim=64).table(positions, max_position=max_position)
    if rope_type == "dynamic" and max_position >= P:
        # Here transformers computes the stretched base in fp32: a few units in the last place of the angle.
        torch.testing.assert_close(got, (cos, sin), rtol=0, atol=max_position * 2**-22)
    else:
        assert torch.equal(got[0], cos)
        assert torch.equal(got[1], sin)


@given(
    rope_type=st.sampled_from(sorted(FIELDS)),
    theta=st.floats(100, 1e7),
    factor=st.floats(1, 64),
    pairs=st.sampled_from([2, 5, 32, 48, 64]),
    max_position=st.integers(0, 200_000),
)
def test_frequencies_of_any_config(rope_type, theta, factor, pairs, max_position):
    """Random parameters against ROPE_INIT_FUNCTIONS, given the length as a host integer: the same bits."""
    fields = {} if rope_type in ("default", "longrope") else {"factor": factor}
    if rope_type == "longrope":
        fields |= {
            "short_factor": [1.0] * pairs,
            "long_factor": [1 + factor * i / pairs for i in range(pairs)],
        }
    config = new(rope_type, theta, **fields)
    rotary = Rotary.from_hf(config, head_dim=2 * pairs)
    hf = LlamaConfig(
        hidden_size=4 * pairs, num_attention_heads=2, head_dim=2 * pairs, **new(rope_type, theta, **fields)
    )
    if rope_type == "default":
        expected, m = LlamaRotaryEmbedding.compute_default_rope_parameters(hf)
    else:
        expected, m = ROPE_INIT_FUNCTIONS[rope_type](hf, seq_len=max_position + 1)
    assert torch.equal(rotary.frequencies(max_position=max_position), expected)
    assert rotary.attention_factor == m


@pytest.mark.parametrize("head_dim, factor, counts", [(128, 8.0, (29, 6, 29)), (64, 32.0, (15, 3, 14))])
def test_llama3_check_values(head_dim, factor, counts):
    """Llama 3.1 8B and Llama 3.2 1B: how many frequencies are kept, blended and divided."""
    config = new("llama3", 5e5, factor=factor, original_max_position_embeddings=8192)
    scaled = Rotary.from_hf(config, head_dim=head_dim).frequencies(max_position=0)
    plain = Rotary(head_dim=head_dim, channels=head_dim, base=5e5).frequencies(max_position=0)
    kept, divided = (scaled == plain).sum().item(), (scaled == plain / factor).sum().item()
    assert (kept, head_dim // 2 - kept - divided, divided) == counts


def test_attention_factor_check_values():
    """Phi-3 128K: sqrt(1 + ln 32 / ln 4096). Ministral 3: equal mscales give 1."""
    phi = Rotary.from_hf(
        {
            "model_type": "phi3",
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        },
        head_dim=96,
    )
    assert phi.attention_factor == pytest.approx(1.1902381, abs=5e-8)
    ministral = new("yarn", 1e6, factor=16.0, mscale=1.0, mscale_all_dim=1.0)
    assert Rotary.from_hf(ministral, head_dim=128).attention_factor == 1.0
    cos, sin = phi.table(torch.arange(3), max_position=2)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, phi.attention_factor**2))


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_factor": 1.25},
        {"mscale": 0.707, "mscale_all_dim": 1.0},
        {"mscale": 0.707},
        {"beta_fast": 16, "beta_slow": 2},
        {"beta_fast": 0, "beta_slow": None},
        {"truncate": False},
        {"original_max_position_embeddings": 7},
        {"factor": 1.0},
    ],
)
def test_yarn_options(fields):
    config = new("yarn", 1e6, **fields)
    positions, cos, sin = theirs(config, head_dim=128)
    assert torch.equal(Rotary.from_hf(config, head_dim=128).table(positions, max_position=P - 1)[0], cos)
    assert torch.equal(Rotary.from_hf(config, head_dim=128).table(positions, max_position=P - 1)[1], sin)


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
@pytest.mark.parametrize("max_position", [4095, 4096])
def test_phi3(name, max_position):
    """Partial rotation, three names for longrope; the original length beside the dict beats the one in it."""
    scaling = {
        "type": name,
        "short_factor": [1.0 + i / 50 for i in range(12)],
        "long_factor": [1.0 + i for i in range(12)],
        "original_max_position_embeddings": 2048,
    }
    if name == "yarn":
        scaling["factor"] = 3.0
    config = {
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_theta": 10000.0,
        "rope_scaling": scaling,
    }
    positions, cos, sin = theirs(config, 32, max_position, Phi3RotaryEmbedding, Phi3Config)
    rotary = Rotary.from_hf({"model_type": "phi3", **config}, head_dim=32)
    assert (rotary.channels, rotary.rope_type) == (24, "longrope")
    got = rotary.table(positions, max_position=max_position)
    assert torch.equal(got[0], cos) and torch.equal(got[1], sin)


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_theta": 5e5,
            "rope_local_base_freq": 2e4,
        },
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
        {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": None}},
    ],
)
def test_gemma3(config, layer_type):
    """One base per layer type; flat scaling belongs to the full layers."""
    module = Gemma3RotaryEmbedding(Gemma3TextConfig(head_dim=64, **json.loads(json.dumps(config))))
    positions = torch.tensor([0, 5, 1000])
    cos, sin = module(torch.zeros(()), positions[None], layer_type)
    got = Rotary.from_hf(config, head_dim=64, layer_type=layer_type).table(positions, max_position=1000)
    assert torch.equal(got[0], cos[0, :, :32]) and torch.equal(got[1], sin[0, :, :32])


def test_precedence_and_class_defaults():
    def base(config):
        return Rotary.from_hf(config, head_dim=64).base

    assert base({}) == 10000.0
    assert base({"model_type": "mixtral"}) == 1e6
    assert base({"model_type": "mixtral", "rope_theta": 5e4}) == 5e4
    assert base({"rope_theta": 5e4, "rope_parameters": {"rope_theta": 7e4}}) == 7e4
    assert base({"rope_theta": 5e4, "rope_scaling": None, "rope_parameters": None}) == 5e4
    scaled = {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 7e4}}
    assert Rotary.from_hf(scaled, head_dim=64) == Rotary(head_dim=64, channels=64, rope_type="linear", factor=2.0)
    both = {"rope_parameters": {"type": "su", "rope_type": "linear", "factor": 2.0}}
    assert Rotary.from_hf(both, head_dim=64).rope_type == "linear"
    beside = {"original_max_position_embeddings": 512, **new("yarn")}
    assert Rotary.from_hf(beside, head_dim=64).original_max_position_embeddings == 512
    absent = {"max_position_embeddings": P, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    assert Rotary.from_hf(absent, head_dim=64).original_max_position_embeddings == P


TYPES = "('default', 'linear', 'dynamic', 'llama3', 'yarn', 'longrope')"


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"rope_scaling": {"type": "proportional"}},
            f"rotary: rope_type in rope_scaling is 'proportional', expected one of {TYPES}",
        ),
        (
            {"rope_parameters": {"rope_type": ["linear"]}},
            f"rotary: rope_type in rope_parameters is ['linear'], expected one of {TYPES}",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
            "rotary: unknown field 'mrope_section' in rope_parameters of rope_type 'default'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
            "rotary: unknown field 'beta_fast' in rope_scaling of rope_type 'linear'",
        ),
        (
            {"rope_scaling": {"type": "linear"}},
            "rotary: rope_scaling of rope_type 'linear' lacks the field 'factor'",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": True}},
            "rotary: factor is True, expected a finite number",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": math.nan}},
            "rotary: factor is nan, expected a finite number",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rotary: factor is 0.0, expected a number > 0"),
        ({"rope_theta": "1e4"}, "rotary: rope_theta is '1e4', expected a finite number"),
        ({"rope_theta": 1}, "rotary: rope_theta is 1.0, expected a number > 1"),
        ({"rope_scaling": "linear"}, "rotary: rope_scaling is 'linear', expected an object of rope fields"),
        (
            {"rope_parameters": {"full_attention": {}}},
            "rotary: rope_parameters is nested by layer type ('full_attention'), expected one dict",
        ),
        (
            {"partial_rotary_factor": 0.3},
            "rotary: 19 rotated channels, expected an even number from 2 to head_dim = 64",
        ),
        (
            {"partial_rotary_factor": 0.5, "model_type": "llama"},
            "rotary: partial_rotary_factor is 0.5, expected 1: a part of a head turns only in ('phi3',), "
            "not in 'llama'",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rotary: max_position_embeddings is None, expected a whole number",
        ),
        (
            new("llama3", high_freq_factor=1.0),
            "rotary: high_freq_factor is 1.0, expected more than low_freq_factor = 1.0",
        ),
        (
            new("yarn", original_max_position_embeddings=1),
            "rotary: original_max_position_embeddings is 1, expected a number > 1",
        ),
        (new("yarn", truncate=1), "rotary: truncate is 1, expected true or false"),
        (
            new("longrope", long_factor=[1.0] * 31),
            "rotary: long_factor has 31 entries, expected 32 positive",
        ),
        (
            new("longrope", short_factor=[1.0] * 31 + [None]),
            "rotary: short_factor has 32 entries, expected 32 positive",
        ),
        (new("longrope", short_factor="long"), "rotary: short_factor is 'long', expected a list of numbers"),
    ],
)
def test_bad_config(config, message):
    with pytest.raises(ValueError) as error:
        Rotary.from_hf(config, head_dim=64)
    assert str(error.value) == message


def test_bad_layer_type():
    with pytest.raises(ValueError) as error:
        Rotary.from_hf({}, head_dim=64, layer_type="chunked_attention")
    assert str(error.value) == (
        "rotary: layer_type is 'chunked_attention', expected one of ('full_attention', 'sliding_attention')"
    )
    with pytest.raises(ValueError) as error:
        Rotary.from_hf({"rope_parameters": {"rope_theta": 1e4}}, head_dim=64, layer_type="full_attention")
    assert str(error.value) == (
        "rotary: unknown field 'rope_theta' in rope_parameters, expected only ('full_attention', 'sliding_attention')"
    )


def test_bad_positions():
    rotary = Rotary(head_dim=64, channels=64)
    with pytest.raises(ValueError) as error:
        rotary.table(torch.zeros(1, 4, dtype=torch.int64), max_position=4)
    assert str(error.value) == "rotary: positions have shape (1, 4), expected (N,)"
    with pytest.raises(ValueError) as error:
        rotary.table(torch.zeros(4), max_position=4)
    assert str(error.value) == "rotary: positions have dtype torch.float32, expected int32 or int64"


@pytest.mark.parametrize("rope_type", FIELDS)
def test_float64_table(rope_type):
    """The fp32 table is the float64 one, up to a few units in the last place of its angle."""
    rotary = Rotary.from_hf(new(rope_type), head_dim=64)
    positions = torch.arange(0, 5000, 7, dtype=torch.int32)
    exact = rotary.table(positions, max_position=5000, dtype=torch.float64)
    for table, truth in zip(rotary.table(positions, max_position=5000), exact):
        assert table.dtype == torch.float32 and truth.dtype == torch.float64
        assert table.shape == truth.shape == (len(positions), 32)
        angles = positions[:, None] * rotary.frequencies(max_position=5000)
        assert bool(((table - truth).abs() <= (angles + 1) * 2**-21).all())


@pytest.mark.parametrize("rope_type", FIELDS)
def test_no_value_is_read(rope_type):
    """Shapes are enough, and everything is made on the device of the positions."""
    rotary = Rotary.from_hf(new(rope_type), head_dim=64)
    with FakeTensorMode(allow_non_fake_inputs=False):
        on_cpu = rotary.table(torch.empty(11, dtype=torch.int32), max_position=5000)
    on_meta = rotary.table(torch.empty(11, dtype=torch.int32, device="meta"), max_position=5000)
    for table, device in [*zip(on_cpu, ("cpu", "cpu")), *zip(on_meta, ("meta", "meta"))]:
        assert table.shape == (11, 32) and table.dtype == torch.float32 and table.device.type == device


def test_empty_and_hashable():
    rotary = Rotary.from_hf(new("longrope"), head_dim=64)
    cos, sin = rotary.table(torch.empty(0, dtype=torch.int64), max_position=0)
    assert cos.shape == sin.shape == (0, 32)
    assert len({rotary, Rotary.from_hf(new("longrope"), head_dim=64)}) == 1
