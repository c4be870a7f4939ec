"""Checkpoints that bitsandbytes stored in 4 bits: every matrix bit for bit, what was skipped as it is, and files that
lie."""

import json

import pytest
import torch
from oprule import DEVICE
from safetensors.torch import save_file
from tiny import VERSIONS, Checkpoint, checkpoint_of, judge

from unsloth_core import backend, hub, lora, random, tree, weights
from unsloth_core.autodiff import value_and_grad
from unsloth_core.data import from_tokens
from unsloth_core.four_bit import four_bit
from unsloth_core.load import named_tensors, read_weights
from unsloth_core.models import family_of
from unsloth_core.models.decoder import Model
from unsloth_core.ops import nf4
from unsloth_core.tree import ABSENT
from unsloth_core.weights import NF4, Stacked

QUANTIZATION = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "llm_int8_threshold": 6.0,
}  # fmt: skip
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@pytest.fixture(autouse=True)
def _fast():
    with backend.using(None if DEVICE.type == "cuda" else "reference"):
        yield


def stored(name, t, *, double=True, block=64, storage=torch.uint8):
    """One matrix as bitsandbytes writes it: facts of its ``QuantState.as_dict(packed=True)``."""
    node = nf4.quantize(t.to(DEVICE), double_quant=double, block=block)
    state = {"quant_type": "nf4", "blocksize": block, "dtype": DTYPES[t.dtype], "shape": list(t.shape)}
    found = {name: node.codes.view(storage).unsqueeze(1), f"{name}.absmax": node.absmax}
    found[f"{name}.quant_map"] = nf4.table(DEVICE)
    if double:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(node.nested.offset)}
        found[f"{name}.nested_absmax"], found[f"{name}.nested_quant_map"] = node.nested.absmax_P, node.nested.code_256
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    found[f"{name}.quant_state.bitsandbytes__nf4"] = text
    return {key: value.cpu() for key, value in found.items()}, node


def quantised(version, skip=(), dtype=torch.float32, **options):
    """A checkpoint whose linears are in 4 bits but for those whose name has a part of ``skip``; the nodes by name."""
    model_type, overrides = VERSIONS[version]
    whole = checkpoint_of(judge(model_type, **overrides))
    tensors, nodes = {}, {}
    for name, t in whole.tensors.items():
        linear = t.ndim == 2 and "embed" not in name and "lm_head" not in name
        if linear and not any(part in name for part in skip):
            more, nodes[name] = stored(name, t.to(dtype), **options)
            tensors |= more
        else:
            tensors[name] = t.cpu().to(dtype)
    stored_so = {**QUANTIZATION, "llm_int8_skip_modules": ["lm_head", *skip]}
    stored_so["bnb_4bit_use_double_quant"] = options.get("double", True)
    return Checkpoint({**whole.config, "quantization_config": stored_so}, tensors), nodes


def read(checkpoint, dtype=torch.float32, **options):
    family = family_of(checkpoint.config)
    config = family.Config.from_hf(checkpoint.config)
    params = read_weights(checkpoint, family.Weights, config, device=DEVICE, dtype=dtype, **options)
    return Model(family=family, config=config), params


def assert_bits(params, checkpoint, nodes):
    """What was stored is what there is: NF4 decodes to the same bits, the rest is equal."""
    named = named_tensors(params)
    assert named.keys() == set(four_bit(checkpoint).names)
    for name, t in named.items():
        expected = nf4.dequantize(nodes[name]) if name in nodes else checkpoint.tensors[name].to(DEVICE)
        assert torch.equal(t, expected), name


OPTIONS = [
    {}, {"double": False}, {"block": 128}, {"storage": torch.bfloat16}, {"dtype": torch.bfloat16},
    {"dtype": torch.float16, "double": False, "storage": torch.float32},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "plain")
@pytest.mark.parametrize("version", ["llama-3.1", "phi-4-mini", "qwen2.5"])
def test_every_matrix_bit_for_bit(version, options, tmp_path):
    checkpoint, nodes = quantised(version, **options)
    save_file({k: t.clone() for k, t in checkpoint.tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config))
    opened = hub.open_checkpoint(str(tmp_path))
    dtype = options.get("dtype", torch.float32)
    _, params = read(opened, dtype)
    assert_bits(params, checkpoint, nodes)
    for layer in params.layers:
        for leaf in (layer.qkv, layer.o, layer.down):
            for node in leaf.parts if isinstance(leaf, Stacked) else [leaf]:
                assert isinstance(node, NF4) and node.dtype == dtype and node.codes.device == DEVICE
                assert (node.nested is ABSENT) == (options.get("double") is False)


def test_what_was_skipped_is_plain_beside_what_was_not():
    """A "dynamic" upload: some matrices of a stacked leaf are spared."""
    checkpoint, nodes = quantised("qwen3", skip=("layers.0.self_attn.q_proj", "layers.1.mlp", "o_proj"))
    model, params = read(checkpoint)
    assert_bits(params, checkpoint, nodes)
    kinds = [type(part).__name__ for part in params.layers[0].qkv.parts]
    assert kinds == ["Tensor", "NF4", "NF4"] and isinstance(params.layers[1].gate_up, torch.Tensor)
    trains_like_its_decoded_self(model, params, checkpoint, nodes)


def trains_like_its_decoded_self(model, params, checkpoint, nodes):
    plain = {name: checkpoint.tensors[name] for name in four_bit(checkpoint).names}
    plain |= {name: nf4.dequantize(node).cpu() for name, node in nodes.items()}
    _, decoded = read(Checkpoint(checkpoint.config, plain))
    batch = from_tokens(torch.arange(20).view(2, 10), vocab_size=97).to(DEVICE)
    adapters = tree.map(lambda t: t + 0.05, lora.init(random.key(0), params, rank=2))
    step = lambda p: value_and_grad(lambda t: model.loss(lora.adapt(p, t), batch)[0])(adapters)  # noqa: E731
    (loss, grads), (loss_d, grads_d) = step(params), step(decoded)
    torch.testing.assert_close(loss, loss_d, rtol=1e-5, atol=1e-5)
    for (path, a), (_, b) in zip(tree.items(grads), tree.items(grads_d), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=path)


@pytest.mark.parametrize("options", [{}, {"double": False}, {"block": 128}], ids=["nested", "plain", "ragged"])
@pytest.mark.parametrize(("version", "down"), [("mixtral-8x7b", (4, 48, 24)), ("qwen3-moe-mixed", (6, 48, 20))])
def test_experts_become_one_node_and_routers_stay(version, down, options):
    checkpoint, nodes = quantised(version, skip=(".gate.",), **options)
    model, params = read(checkpoint)
    assert_bits(params, checkpoint, nodes)
    layer = params.layers[1]
    assert isinstance(layer.router, torch.Tensor)
    if down[1] * down[2] % options.get("block", 64) == 0:
        assert isinstance(layer.expert_gate_up, NF4) and layer.expert_gate_up.absmax.dtype == torch.float32
        assert weights.shape(layer.expert_down) == down
    else:  # an expert ends in the middle of a block
        assert len(layer.expert_down.parts) == down[0]
    trains_like_its_decoded_self(model, params, checkpoint, nodes)


def test_experts_of_which_some_are_plain_stay_apart():
    checkpoint, nodes = quantised("mixtral-8x7b", skip=(".gate.", "experts.2.w1", "experts.0.w2"))
    model, params = read(checkpoint)
    assert_bits(params, checkpoint, nodes)
    assert len(params.layers[0].expert_gate_up.parts) == 8
    trains_like_its_decoded_self(model, params, checkpoint, nodes)
    merged = lora.merge(params, lora.init(random.key(0), params, rank=2))
    assert merged.layers[0].expert_gate_up.shape == (4, 48, 48)


def test_a_config_that_does_not_say_so_changes_nothing():
    checkpoint, nodes = quantised("smollm2")
    del checkpoint.config["quantization_config"]
    assert_bits(read(checkpoint)[1], checkpoint, nodes)
    plain, _ = quantised("smollm2", skip=("proj",))
    assert four_bit(plain) is plain


def test_the_rest_may_be_quantised_while_loading():
    checkpoint, nodes = quantised("smollm2", skip=("layers.1.",))
    _, params = read(checkpoint, quantize="nf4")
    assert all(isinstance(layer.down, NF4) for layer in params.layers)
    assert torch.equal(params.layers[0].down.codes, nodes["model.layers.0.mlp.down_proj.weight"].codes)


NAME = "model.layers.0.mlp.down_proj.weight"
STATE = NAME + ".quant_state.bitsandbytes__nf4"


def text(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


GOOD = {
    "quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [36, 80], "nested_blocksize": 256,
    "nested_dtype": "float32", "nested_offset": 0.5,
}  # fmt: skip
LIES = [
    ({NAME + ".absmax": None}, f"has a quant_state, but there is no {NAME}.absmax"),
    ({NAME + ".nested_absmax": None}, f"has a quant_state, but there is no {NAME}.nested_absmax"),
    ({NAME: None}, f"has a quant_state, but there is no {NAME}"),
    ({STATE: torch.ones(9, dtype=torch.uint8)}, "has a quant_state that is not a JSON object"),
    ({STATE: text([1])}, "has a quant_state that is not a JSON object"),
    ({STATE: torch.zeros(9)}, "has a quant_state that is not a JSON object"),
    ({STATE: text({**GOOD, "shape": [36, 81]})}, r"codes is torch.uint8 \(1440,\), expected .* with 1458 elements"),
    ({STATE: text({**GOOD, "shape": [-36, -80]})}, r"quant_state with shape \[-36, -80\]"),
    ({STATE: text({**GOOD, "shape": [80, 36]})}, r"has shape \(80, 36\), the config says \(36, 80\)"),
    ({STATE: text({**GOOD, "dtype": "int8"})}, "quant_state with dtype 'int8'"),
    ({STATE: text({**GOOD, "blocksize": 100})}, "block = 100, expected one of"),
    ({STATE: text({**GOOD, "blocksize": 0})}, "quant_state with blocksize 0"),
    ({STATE: text({**GOOD, "nested_blocksize": 128})}, "quant_state with nested_blocksize 128"),
    ({STATE: text({**GOOD, "nested_offset": "x"})}, "quant_state with nested_offset 'x'"),
    ({STATE: text({**GOOD, "nested_offset": float("nan")})}, "quant_state with nested_offset nan"),
    ({STATE: text({**GOOD, "quant_type": "fp4"})}, "quant_state with quant_type 'fp4'"),
    ({NAME + ".quant_map": torch.linspace(-1, 1, 16)}, "has another quant_map than NF4's 16 numbers"),
    ({NAME + ".absmax": torch.ones(45)}, "absmax is torch.float32 .45.., expected contiguous torch.uint8"),
    ({NAME + ".stray": torch.ones(3)}, f"has no place for: {NAME}.stray"),
]


@pytest.mark.parametrize(("changes", "message"), LIES, ids=range(len(LIES)))
def test_states_that_lie_are_refused(changes, message):
    checkpoint, _ = quantised("smollm2", skip=("layers.1.",))
    tensors = {**checkpoint.tensors, **changes}
    checkpoint = Checkpoint(checkpoint.config, {name: t for name, t in tensors.items() if t is not None})
    with pytest.raises(ValueError, match="^tiny: .*" + message):
        read(checkpoint)


def test_another_code_is_refused():
    checkpoint, _ = quantised("smollm2")
    checkpoint.tensors[STATE.replace("nf4", "fp4")] = checkpoint.tensors.pop(STATE)
    with pytest.raises(NotImplementedError, match=f"tiny: {NAME} is stored as fp4, supported: nf4"):
        read(checkpoint)
