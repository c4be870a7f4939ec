"""Adapters against PEFT itself: files go both ways and compute the same, and whatever does not fit is named."""

import json
import math
import types
import warnings

import peft
import pytest
import torch
from oprule import DEVICE
from safetensors.torch import load_file, save_file
from tiny import VERSIONS, judge, ours

from unsloth_core import backend, lora, random, tree, weights
from unsloth_core.load import named_tensors
from unsloth_core.tree import ABSENT, leaf, pytree, static
from unsloth_core.weights import Adapted, LoRA

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def _reference():
    with backend.using("reference"):
        yield


def make(version="llama-3.1", quantize=None):
    model_type, overrides = VERSIONS[version]
    hf = judge(model_type, **overrides)
    return hf, *ours(hf, quantize=quantize)


def tokens(hf):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, hf.config.vocab_size, (2, 9), generator=generator).to(DEVICE)


def randomised(adapters, seed=0):
    """Trained adapters, as far as arithmetic can tell: no zeros in b."""
    generator = torch.Generator().manual_seed(seed)
    return tree.map(lambda t: t + 0.2 * torch.randn(t.shape, generator=generator).to(t.device), adapters)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.detach().abs().max())))


def assert_equal(a, b):
    assert list(a) == list(b)
    for path in a:
        assert torch.equal(a[path].a, b[path].a) and torch.equal(a[path].b, b[path].b), path
        assert math.isclose(a[path].scale, b[path].scale, rel_tol=1e-15), path


def in_layers(adapters, *layers):
    return {path: value for path, value in adapters.items() if int(path.split(".")[2]) in layers}


# ---- files, both ways

CHOICES = {  # name: (options of lora.init, the layers that keep theirs)
    "all-linear": ({"rank": 3, "alpha": 5}, (0, 1)),
    "attention": ({"rank": 2, "targets": "attention"}, (0, 1)),
    "list": ({"rank": 4, "alpha": 2.5, "targets": ["q_proj", "down_proj"]}, (0, 1)),
    "ranks": ({"rank": {"q_proj": 1, "v_proj": 5, "up_proj": 3}, "alpha": 7}, (0, 1)),
    "ranks, alpha as rank": ({"rank": {"k_proj": 2, "o_proj": 4}}, (0, 1)),
    "rslora": ({"rank": 3, "alpha": 5, "rslora": True}, (0, 1)),
    "rslora, ranks": ({"rank": {"q_proj": 2, "gate_proj": 3}, "alpha": 4, "rslora": True}, (0, 1)),
    "one layer": ({"rank": 3, "alpha": 6}, (1,)),
    "one layer of some": ({"rank": {"v_proj": 2, "down_proj": 4}, "alpha": 4}, (0,)),
}
each_choice = pytest.mark.parametrize("choice", CHOICES)


@each_choice
def test_peft_loads_what_we_save(choice, tmp_path):
    options, layers = CHOICES[choice]
    hf, model, params = make()
    adapters = randomised(in_layers(lora.init(random.key(0), params, **options), *layers))
    expected = model.logits(lora.adapt(params, adapters), tokens(hf))
    assert not torch.allclose(expected, model.logits(params, tokens(hf)), atol=1e-2)
    lora.save(adapters, tmp_path, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing and unexpected keys
        theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path)).eval()
    state = peft.get_peft_model_state_dict(theirs)
    assert set(state) == set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {k for k in theirs.state_dict() if "lora_" in k} == {k.replace(".weight", ".default.weight") for k in state}
    same(theirs(tokens(hf)).logits, expected)
    assert_equal(lora.load(tmp_path, params), adapters)


def test_adapters_of_some_layers_are_named_by_path_and_of_all_by_name(tmp_path):
    _, model, params = make()
    adapters = lora.init(random.key(0), params, rank=2, targets=["q_proj", "v_proj"])
    del adapters["model.layers.0.self_attn.v_proj"]
    lora.save(adapters, tmp_path, model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.v_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (2, 2, {}, {})
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        f"base_model.model.{path}.lora_{x}.weight" for path in adapters for x in "AB"
    }


PEFTS = {
    "all-linear": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "attention": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "default alpha": {"r": 4, "target_modules": ["gate_proj"]},
    "regex": {"r": 2, "target_modules": r".*\.1\.(self_attn\.[qv]|mlp\.up)_proj"},
    "layers": {"r": 2, "target_modules": ["v_proj", "down_proj"], "layers_to_transform": [1]},
    "rslora": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_rslora": True},
    "dropout": {"r": 2, "target_modules": ["q_proj"], "lora_dropout": 0.5},
    "gaussian": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "patterns": {
        "r": 2, "lora_alpha": 6, "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.v_proj": 5, "mlp.down_proj": 1},
        "alpha_pattern": {r"layers.[0-9]+.mlp.*": 3, "down_proj": 0.5, "0.self_attn.q_proj": 4},
    },
    "rslora, patterns": {
        "r": 2, "target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 5},
        "alpha_pattern": {"^model.layers.1.mlp.up_proj": 3.5},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PEFTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_load_what_peft_saves(name, dtype, tmp_path):
    hf, model, params = make()
    theirs = peft.get_peft_model(hf, peft.LoraConfig(task_type="CAUSAL_LM", **PEFTS[name])).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "lora_" in key:
                p.copy_(0.3 * torch.randn(p.shape).to(dtype))
    theirs.save_pretrained(str(tmp_path))
    if dtype is not torch.float32:
        file = tmp_path / "adapter_model.safetensors"
        save_file({k: t.to(dtype) for k, t in load_file(file).items()}, file, {"format": "pt"})
    adapters = lora.load(tmp_path, params)
    for t in tree.leaves(adapters):
        assert t.dtype == torch.float32 and t.device == params.embed.device and t.is_contiguous()
    theirs = peft.PeftModel.from_pretrained(make()[0], str(tmp_path)).eval()  # the file sorts patterns; the first wins
    same(model.logits(lora.adapt(params, adapters), tokens(hf)), theirs(tokens(hf)).logits)
    merged = theirs.merge_and_unload()
    same(model.logits(lora.merge(params, adapters), tokens(hf)), merged(tokens(hf)).logits)


@pytree
class FusedLayer:
    """Phi's names: one tensor is one part, and gets one adapter."""

    qkv: torch.Tensor = leaf("Q+2R D", "self_attn.qkv_proj.weight")
    o: torch.Tensor = leaf("D Q", "self_attn.o_proj.weight")
    gate_up: torch.Tensor = leaf("2F D", "mlp.gate_up_proj.weight")
    down: torch.Tensor = leaf("D F", "mlp.down_proj.weight")


@pytree
class Fused:
    layers: tuple[FusedLayer, ...] = weights.blocks(FusedLayer, "model.layers.{i}.")
    config: types.SimpleNamespace = static()


@pytest.mark.parametrize("targets, names", [("attention", ["o_proj", "qkv_proj"]), (["down_proj"], ["down_proj"])])
def test_fused_names(targets, names, tmp_path):
    hf = judge("phi3")
    stored = hf.state_dict()
    config = types.SimpleNamespace(dims={"D": 48, "Q": 48, "R": 24, "F": 80, "L": 2}, has=None)
    params = weights.build(Fused, config.dims, lambda d: stored[d.names[0]].clone(), config=config)
    adapters = randomised(lora.init(random.key(0), params, rank=3, alpha=2, targets=targets))
    assert sorted({path.rpartition(".")[2] for path in adapters}) == names
    model = types.SimpleNamespace(family=types.SimpleNamespace(Weights=Fused), config=config, source="phi")
    lora.save(adapters, tmp_path, model)
    assert_equal(lora.load(tmp_path, params), adapters)
    base = named_tensors(params)
    theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path)).merge_and_unload().state_dict()
    for name, merged in named_tensors(lora.merge(params, adapters)).items():
        same(merged, theirs[name])
        assert torch.equal(merged, base[name]) != (name.split(".")[-2] in names)


# ---- new adapters


def test_new_adapters_follow_pefts_distribution():
    hf, _, params = make()
    adapters = lora.init(random.key(0), params, rank=64)
    assert {path.rpartition(".")[2] for path in adapters} == set(LINEARS) and len(adapters) == 2 * len(LINEARS)
    theirs = peft.get_peft_model(hf, peft.LoraConfig(r=64, target_modules="all-linear"))
    bound = {key: p for key, p in theirs.named_parameters() if "lora_A" in key}
    for path, adapter in adapters.items():
        width = adapter.a.shape[1]
        peft_a = bound[f"base_model.model.{path}.lora_A.default.weight"]
        for a in (adapter.a, peft_a):
            assert a.shape == (64, width) and a.dtype == torch.float32
            limit = 1 / math.sqrt(width)
            assert 0.98 * limit < a.abs().max() <= limit
            assert a.mean().abs() < 5 * limit / math.sqrt(3 * a.numel())
            assert abs(a.std() / limit * math.sqrt(3) - 1) < 5 / math.sqrt(a.numel())
        assert not adapter.b.any() and adapter.scale == 1.0


def test_new_adapters_are_a_function_of_the_key_and_the_module():
    _, _, params = make()
    adapters = lora.init(random.key(0), params, rank=4)
    assert_equal(lora.init(random.key(0).to(DEVICE), params, rank=4), adapters)
    for path, alone in lora.init(random.key(0), params, rank=4, targets=["v_proj"]).items():
        assert torch.equal(alone.a, adapters[path].a)
    starts = [value.a.flatten()[:8].tolist() for value in adapters.values()]
    starts += [value.a.flatten()[:8].tolist() for value in lora.init(random.key(1), params, rank=4).values()]
    assert len({tuple(s) for s in starts}) == len(starts)


def test_scales():
    _, _, params = make()
    scale = lambda **options: {v.scale for v in lora.init(random.key(0), params, **options).values()}  # noqa: E731
    assert scale() == {1.0}
    assert scale(rank=4, alpha=8) == {2.0}
    assert scale(rank=4, alpha=8, rslora=True) == {4.0}
    assert scale(rank={"q_proj": 2, "v_proj": 8}, alpha=4) == {2.0, 0.5}
    assert scale(rank={"q_proj": 4, "v_proj": 9}, rslora=True) == {2.0, 3.0}


def test_ranks_by_name_choose_the_targets():
    _, _, params = make()
    names = ["q_proj", "v_proj", "up_proj"]
    adapters = lora.init(random.key(0), params, rank={"q_proj": 2, "up_proj": 3}, targets=names)
    assert {path.rpartition(".")[2]: v.a.shape[0] for path, v in adapters.items()} == {"q_proj": 2, "up_proj": 3}


def test_biases_are_no_targets():
    _, _, params = make("llama-biases")
    assert {path.rpartition(".")[2] for path in lora.init(random.key(0), params)} == set(LINEARS)


# ---- put on, and merged


def test_adapting_shares_the_base_and_touches_nothing():
    _, _, params = make()
    before = [t.clone() for t in tree.leaves(params)]
    adapters = lora.init(random.key(0), params, rank=2, targets=["v_proj", "o_proj"])
    adapted = lora.adapt(params, adapters)
    for old, new in zip(params.layers, adapted.layers, strict=True):
        assert isinstance(new.qkv, Adapted) and new.qkv.base is old.qkv and new.qkv.parts[:2] == (ABSENT, ABSENT)
        assert new.o.base is old.o and new.gate_up is old.gate_up and new.norm1 is old.norm1
    assert adapted.layers[1].qkv.parts[2] is adapters["model.layers.1.self_attn.v_proj"]
    assert lora.adapt(params, {}).layers[0].qkv is params.layers[0].qkv
    assert all(torch.equal(a, b) for a, b in zip(before, tree.leaves(params), strict=True))


def test_dropout_is_pefts_with_a_mask_for_every_module(tmp_path):
    """PEFT drops out each module's input; given our masks, it computes the same. Another key gives others."""
    hf, model, params = make()
    adapters = randomised(lora.init(random.key(0), params, rank=3))
    plain = model.logits(lora.adapt(params, adapters, dropout=0.4), tokens(hf))
    assert torch.equal(plain, model.logits(lora.adapt(params, adapters), tokens(hf)))
    adapted = lora.adapt(params, adapters, dropout=0.4, key=random.key(7, DEVICE))
    expected = model.logits(adapted, tokens(hf))
    other = lora.adapt(params, adapters, dropout=0.4, key=random.key(8, DEVICE))
    assert not torch.allclose(expected, plain, atol=1e-2)
    assert not torch.allclose(expected, model.logits(other, tokens(hf)), atol=1e-2)

    class Masked(torch.nn.Module):
        def __init__(self, key):
            super().__init__()
            self.key = key

        def forward(self, x):
            return backend.reference("dropout")(x, self.key, p=0.4)

    lora.save(adapters, tmp_path, model)
    theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path)).eval()
    keys = []
    for layer, ours_ in zip(theirs.base_model.model.model.layers, adapted.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        modules = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        modules += (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        own = [key for node in (ours_.qkv, ours_.o, ours_.gate_up, ours_.down) for key in node.key.unbind()]
        for module, key in zip(modules, own, strict=True):
            module.lora_dropout["default"] = Masked(key)
        keys += own
    assert len({tuple(key.tolist()) for key in keys}) == 14
    same(theirs(tokens(hf)).logits, expected)


@pytest.mark.parametrize("version", ["smollm2", "llama-biases"])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merging_equals_adapting(version, quantize):
    hf, model, params = make(version, quantize)
    some = in_layers(lora.init(random.key(0), params, rank=3, alpha=2), 1)
    del some["model.layers.1.self_attn.k_proj"]
    adapters = randomised(some)
    merged = lora.merge(params, adapters)
    expected = model.logits(lora.adapt(params, adapters), tokens(hf))
    torch.testing.assert_close(model.logits(merged, tokens(hf)), expected, rtol=1e-4, atol=1e-4)
    before, after = named_tensors(params), named_tensors(merged)
    for name in before:
        path = name.removesuffix(".weight")
        delta = adapters[path].scale * (adapters[path].b @ adapters[path].a) if path in adapters else 0.0
        same(after[name], before[name] + delta)
        assert path in adapters or torch.equal(after[name], before[name])
    # What carries no adapter stays as it was stored.
    assert merged.layers[0] is params.layers[0] and merged.embed is params.embed
    assert isinstance(merged.layers[1].qkv, torch.Tensor)


def test_merging_rounds_once_to_the_dtype_of_the_base():
    _, _, params = make()
    adapters = randomised(lora.init(random.key(0), params, rank=2))
    path = "model.layers.0.mlp.down_proj"
    low = tree.map(lambda t: t.to(torch.bfloat16), params)
    merged = lora.merge(low, adapters).layers[0].down
    product = adapters[path].b.double() @ adapters[path].a.double()
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(merged.double(), low.layers[0].down.double() + product, rtol=2**-8, atol=1e-5)


def test_saved_adapters_merge_into_a_folder_that_transformers_agrees_with(tmp_path):
    hf, model, params = make("smollm2")
    adapters = randomised(lora.init(random.key(0), params, rank=2))
    merged = named_tensors(lora.merge(params, adapters))
    hf.load_state_dict({**hf.state_dict(), **merged, "lm_head.weight": merged["model.embed_tokens.weight"]})
    same(model.logits(lora.adapt(params, adapters), tokens(hf)), hf(tokens(hf)).logits)


# ---- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"targets": "q_proj"}, "lora.init: targets is 'q_proj', expected 'all-linear', 'attention' or a list"),
        ({"targets": ["q_proj", "qqq"]}, r"targets \['qqq'\] are not among the model's linears \['down_proj'"),
        ({"targets": ["embed_tokens"]}, r"targets \['embed_tokens'\] are not among"),
        ({"targets": []}, r"targets \[\] choose none"),
        ({"rank": {}}, "choose none"),
        ({"rank": {"v_proj": 2}, "targets": ["q_proj"]}, "choose none"),
        ({"rank": {"query": 2}}, r"lora.init: rank names \['query'\], but the model's linears are"),
        ({"rank": 0}, "lora.init: rank of q_proj is 0, expected a positive integer"),
        ({"rank": -1}, "rank of q_proj is -1"),
        ({"rank": 2.0}, "rank of q_proj is 2.0"),
        ({"rank": {"v_proj": 0}}, "rank of v_proj is 0"),
    ],
)
def test_options_that_are_refused(options, message):
    _, _, params = make()
    with pytest.raises(ValueError, match=message):
        lora.init(random.key(0), params, **options)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    _, model, params = make()
    adapters = lora.init(random.key(0), params, rank=2)
    path = "model.layers.0.self_attn.q_proj"
    foreign = {"model.layers.2.self_attn.q_proj": adapters[path], **adapters}
    with pytest.raises(ValueError, match="lora.adapt: the model has no linear 'model.layers.2.self_attn.q_proj'"):
        lora.adapt(params, foreign)
    with pytest.raises(ValueError, match="lora.save: the model has no linear 'model.layers.2.self_attn.q_proj'"):
        lora.save(foreign, tmp_path / "new", model)
    a, b = adapters[path].a, adapters[path].b
    for wrong in ((a[:, 1:], b), (a, b[1:]), (a[:1], b), (b, a), (a.flatten(), b), (a, b.unsqueeze(0))):
        with pytest.raises(ValueError, match=rf"lora.adapt: {path} is \(48, 48\), but its adapter has a \("):
            lora.adapt(params, {path: LoRA(a=wrong[0], b=wrong[1], scale=1.0)})
    with pytest.raises(ValueError, match="lora.adapt: layers.0.qkv carries adapters already; merge them first"):
        lora.adapt(lora.adapt(params, adapters), {path: adapters[path]})
    lora.adapt(lora.merge(params, adapters), adapters)
    for dropout in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"lora.adapt: dropout is {dropout}, expected 0 <= dropout < 1"):
            lora.adapt(params, adapters, dropout=dropout, key=random.key(0))


def test_a_model_and_its_weights_are_told_apart(tmp_path):
    _, model, params = make()
    adapters = lora.init(random.key(0), params, rank=2)
    for name, call in {
        "init": lambda wrong: lora.init(random.key(0), wrong),
        "adapt": lambda wrong: lora.adapt(wrong, adapters),
        "merge": lambda wrong: lora.merge(wrong, adapters),
    }.items():
        for wrong, kind in (({}, "dict"), (model, "Model"), (None, "NoneType"), (torch.zeros(2), "Tensor")):
            with pytest.raises(ValueError, match=f"lora.{name}: params is a {kind}, expected a model's weights"):
                call(wrong)
    lora.save(adapters, tmp_path / "saved", model)
    with pytest.raises(ValueError, match="lora.load: params is a Model, expected a model's weights"):
        lora.load(tmp_path / "saved", model)
    with pytest.raises(ValueError, match="lora.save: model is a Weights, expected a Model: model, params = "):
        lora.save(adapters, tmp_path / "new", params)
    assert not (tmp_path / "new").exists()
    for key, got in ((0, "of type int"), (torch.zeros(2), r"\(2,\) torch.float32")):
        with pytest.raises(ValueError, match=f"lora.init: key is {got}, expected a .* of random.key"):
            lora.init(key, params)


def saved(folder, **changes):
    """(params, config, tensors) of a good adapter folder, its config changed."""
    _, model, params = make()
    lora.save(randomised(lora.init(random.key(0), params, rank=2)), folder, model)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return params


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3', expected 'LORA'"),
        ({"use_dora": True}, "use_dora = True, which is not supported"),
        ({"bias": "all"}, "bias = 'all', supported: 'none'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\], which is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True, which is not supported"),
        ({"lora_bias": True}, "lora_bias = True, which is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_something_new": True}, "use_something_new = True, which is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa', which changed the base weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = 'olora'"),
        ({"r": 0}, r"ranks \[0\], expected positive integers"),
        ({"r": "2"}, r"ranks \['2'\], expected positive integers"),
        ({"r": None}, r"ranks \[None\], expected positive integers"),
        ({"rank_pattern": {"q_proj": 0}}, r"ranks \[2, 0\], expected positive integers"),
        ({"rank_pattern": {"q_proj": 3}}, r"lora_A of model.layers.0.self_attn.q_proj as .*expected .* of rank 3"),
        ({"r": 4}, r"lora_A of .* as torch.float32 \(2, \d+\), expected floating point of rank 4"),
        ({"lora_alpha": "16"}, r"lora_alpha \['16'\], expected finite numbers"),
        ({"lora_alpha": math.nan}, r"lora_alpha \[nan\], expected finite numbers"),
        ({"alpha_pattern": {"q_proj": None}}, r"lora_alpha \[2, None\], expected finite numbers"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern = \['q_proj'\], expected an object"),
        ({"alpha_pattern": {"(": 2}}, r"'\(' in alpha_pattern, which is no regular expression"),
        ({"alpha_pattern": {"(a+)+$": 2}}, "too many repetitions"),
        ({"alpha_pattern": {".*.*.*.*.*x": 2}}, "too many repetitions"),
    ],
)
def test_adapter_configs_that_are_refused(changes, message, tmp_path):
    params = saved(tmp_path, **changes)
    with pytest.raises(ValueError, match="lora.load: .*" + message):
        lora.load(tmp_path, params)


def without(tensors, key):
    return {k: t for k, t in tensors.items() if key not in k}


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
DAMAGED = [
    (lambda t: without(t, f"{Q0}.lora_B"), "has only lora_A of model.layers.0.self_attn.q_proj, expected A and B"),
    (lambda t: without(t, f"{Q0}.lora_A"), "has only lora_B of model.layers.0.self_attn.q_proj, expected A and B"),
    (lambda t: {**t, f"{Q0}.lora_magnitude_vector": torch.ones(48)}, "lora_magnitude_vector', which is no linear"),
    (lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(97, 48)}, "lm_head.weight', which is no linear"),
    (lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}, "which is no linear of this model"),
    (lambda t: {k.removeprefix("base_model."): v for k, v in t.items()}, "which is no linear of this model"),
    (lambda t: {**t, f"{Q0}.lora_A.weight": torch.ones(2, 47)}, r"q_proj is \(48, 48\), but .* has a \(2, 47\)"),
    (lambda t: {**t, f"{Q0}.lora_B.weight": torch.ones(40, 2)}, r"q_proj is \(48, 48\), but .*and b \(40, 2\)"),
    (lambda t: {**t, f"{Q0}.lora_A.weight": torch.ones(())}, r"lora_A of .* as torch.float32 \(\), expected"),
    (lambda t: {**t, f"{Q0}.lora_B.weight": torch.ones(48)}, r"lora_B of .* as torch.float32 \(48,\), expected"),
    (lambda t: {**t, f"{Q0}.lora_A.weight": torch.ones(0, 48)}, r"lora_A of .* \(0, 48\), expected .* of rank 2"),
    (lambda t: {**t, f"{Q0}.lora_A.weight": torch.ones(2, 48).int()}, "as torch.int32 .*expected floating point"),
]


@pytest.mark.parametrize("change, message", DAMAGED)
def test_adapter_tensors_that_are_refused(change, message, tmp_path):
    params = saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match="lora.*" + message):
        lora.load(tmp_path, params)


def test_files_that_are_refused(tmp_path):
    params = saved(tmp_path)
    config, file = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    content = file.read_bytes()
    for size in (0, 7, 100, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"lora.load: .*adapter_model.safetensors is damaged"):
            lora.load(tmp_path, params)
    file.write_bytes(content)
    for text in ("{", "", "[" * 100000, "\ud83d".encode("utf-8", "surrogatepass")):
        config.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match="lora.load: .*adapter_config.json is not JSON"):
            lora.load(tmp_path, params)
    for text in ("[]", "3", "{}"):
        config.write_text(text)
        with pytest.raises(ValueError, match="lora.load: .*expected 'LORA'"):
            lora.load(tmp_path, params)
    for missing in (config, file):
        missing.unlink()
        with pytest.raises(ValueError, match=f"lora.load: .*{missing.name} does not exist, expected PEFT's two files"):
            lora.load(tmp_path, params)
        missing.write_bytes(content)


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    _, model, params = make()
    adapters = lora.init(random.key(0), params, rank=2)
    lora.save(adapters, tmp_path, model)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1  # safetensors alone would hide its file from others

    def full(*_, **__):
        raise OSError("disk full")

    for name in ("save_file", "json.dumps", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"unsloth_core.lora.{name}", full)
            with pytest.raises(OSError, match="disk full"):
                lora.save(randomised(adapters), tmp_path, model)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_rows_of_adapters_are_those_of_the_declarations():
    _, _, params = make()
    declared = {d.path: d for d in weights.declarations(type(params), params.config.dims)}
    adapted = lora.adapt(params, lora.init(random.key(0), params, rank=2))
    for i, layer in enumerate(adapted.layers):
        for name in ("qkv", "o", "gate_up", "down"):
            node = getattr(layer, name)
            assert node.rows == declared["layers", i, name].rows == tuple(part.b.shape[0] for part in node.parts)
