"""What mixtures of experts do beyond other families: the balance of experts, and adapters of every expert."""

import json
import math

import pytest
import torch
from oprule import DEVICE
from safetensors.torch import load_file, save_file
from tiny import VERSIONS, judge, ours

from unsloth_core import backend, lora, random, tree
from unsloth_core.autodiff import value_and_grad
from unsloth_core.data import Batch, from_tokens
from unsloth_core.models.decoder import Schedule, balance

each = pytest.mark.parametrize("version", ["mixtral-balanced", "qwen3-moe-mixed"])
LENGTHS = (9, 4, 7)


@pytest.fixture(autouse=True)
def _fast():
    with backend.using(None if DEVICE.type == "cuda" else "reference"):
        yield


def made(version, **more):
    model_type, overrides = VERSIONS[version]
    hf = judge(model_type, **{**overrides, **more})
    return hf, *ours(hf)


def examples(lengths=LENGTHS):
    g = torch.Generator().manual_seed(3)
    return [torch.randint(0, 97, (n,), generator=g).numpy() for n in lengths]


def batch_of(ids, tokens=None):
    return Batch.of([(each, None) for each in ids], vocab_size=97, tokens=tokens).to(DEVICE)


# ---- the load-balancing loss


@each
def test_the_balance_is_transformers_without_padding_and_filler(version):
    hf, model, params = made(version)
    rows, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, ids in enumerate(examples()):
        rows[i, : len(ids)], mask[i, : len(ids)] = torch.from_numpy(ids), 1
    theirs = hf(rows.to(DEVICE), attention_mask=mask.to(DEVICE)).aux_loss
    for tokens in (sum(LENGTHS), 32):
        loss, aux = model.loss(params, batch_of(examples(), tokens))
        torch.testing.assert_close(aux["balance"], theirs, rtol=1e-5, atol=1e-5)
        share = hf.config.router_aux_loss_coef * theirs
        torch.testing.assert_close(loss - share, aux["loss_sum"] / aux["count"], rtol=1e-5, atol=1e-5)


@each
def test_the_filler_changes_no_gradient(version):
    _, model, params = made(version)
    step = value_and_grad(lambda p, batch: model.loss(p, batch)[0])
    (loss, grads), (loss_f, grads_f) = (step(params, batch_of(examples(), tokens)) for tokens in (None, 32))
    torch.testing.assert_close(loss, loss_f, rtol=1e-5, atol=1e-5)
    for (path, a), (_, b) in zip(tree.items(grads), tree.items(grads_f), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=path)


def test_without_output_router_logits_the_balance_is_told_and_not_trained():
    hf, model, params = made("mixtral-balanced", output_router_logits=False)
    batch = batch_of(examples())
    loss, aux = model.loss(params, batch)
    assert torch.equal(loss, aux["loss_sum"] / aux["count"]) and 1 < aux["balance"] < 15
    assert "balance" not in ours(judge("llama"))[0].loss(ours(judge("llama"))[1], batch)[1]


def test_microbatches_weigh_their_balance_by_their_targets():
    hf, model, params = made("mixtral-balanced")
    small = [batch_of([ids]) for ids in examples()]
    count = sum(b.count for b in small)
    parts = [model.loss(params, b, count=count) for b in small]
    shares = torch.stack([b.count / count for b in small])
    balances = torch.stack([aux["balance"] for _, aux in parts])
    expected = sum(aux["loss_sum"] for _, aux in parts) / count
    expected = expected + hf.config.router_aux_loss_coef * (shares * balances).sum()
    torch.testing.assert_close(sum(loss for loss, _ in parts), expected, rtol=1e-5, atol=1e-5)


def test_even_work_is_balanced():
    counts, probs = torch.full((6,), 10), torch.full((6,), 20 / 6)
    assert balance(probs, counts, top_k=3).item() == pytest.approx(3)
    one = torch.tensor([20.0, 0, 0, 0])
    assert balance(one, one.int(), top_k=1).item() == pytest.approx(4)  # all to one of four


@each
def test_tiles_give_the_same_loss_and_balance(version):
    _, model, params = made(version)
    batch = batch_of(examples(), 32)
    step = value_and_grad(lambda p, how: model.loss(p, batch, policy=how), has_aux=True)
    ((loss, aux), grads), ((loss_t, aux_t), grads_t) = (step(params, how) for how in (None, Schedule(tile=12)))
    torch.testing.assert_close(loss, loss_t, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(aux["balance"], aux_t["balance"], rtol=1e-5, atol=1e-5)
    for (path, a), (_, b) in zip(tree.items(grads), tree.items(grads_t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=path)


# ---- adapters


def saved(folder, version="mixtral-8x7b", rank=2, **options):
    _, model, params = made(version)
    adapters = tree.map(lambda t: t + 0.1, lora.init(random.key(0), params, rank=rank, alpha=5, **options))
    lora.save(adapters, folder, model)
    return model, params, adapters


def test_one_entry_is_the_adapter_of_every_expert(tmp_path):
    _, params, adapters = saved(tmp_path, rank={"w1": 2, "w2": 3, "q_proj": 1})
    w1 = adapters["model.layers.0.block_sparse_moe.experts.{e}.w1"]
    assert (w1.a.shape, w1.b.shape, w1.scale) == ((4, 2, 48), (4, 24, 2), 2.5)
    file = load_file(tmp_path / "adapter_model.safetensors")
    assert len(file) == 2 * 2 * (1 + 4 + 4)
    for e in range(4):
        key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{e}.w1.lora_"
        assert torch.equal(file[key + "A.weight"], w1.a[e].cpu()) and torch.equal(file[key + "B.weight"], w1.b[e].cpu())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "w1", "w2"] and config["r"] == 1
    pattern = r"model\.layers\.0\.block_sparse_moe\.experts\.\d+\.w2"
    assert config["rank_pattern"][pattern] == 3
    again = lora.load(tmp_path, params)
    assert again.keys() == adapters.keys()
    for path, mine in adapters.items():
        assert torch.equal(again[path].a, mine.a) and torch.equal(again[path].b, mine.b), path
        assert again[path].scale == mine.scale
    router = "model.layers.0.block_sparse_moe.gate"
    with pytest.raises(ValueError, match="the model has no linear"):
        lora.adapt(params, {router: lora.LoRA(a=torch.zeros(2, 48), b=torch.zeros(4, 2), scale=1.0)})


def test_some_layers_are_named_expert_by_expert(tmp_path):
    _, model, params = made("mixtral-8x7b")
    adapters = lora.init(random.key(0), params, rank=2, targets=["w2"])
    only = {path: value for path, value in adapters.items() if ".layers.1." in path}
    lora.save(only, tmp_path, model)
    names = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert names == [f"model.layers.1.block_sparse_moe.experts.{e}.w2" for e in range(4)]
    assert lora.load(tmp_path, params).keys() == only.keys()


def test_adapters_that_do_not_fit_the_experts_are_refused(tmp_path):
    _, params, adapters = saved(tmp_path, targets=["w1", "w2", "w3"])
    file = tmp_path / "adapter_model.safetensors"
    whole = load_file(file)
    first = "base_model.model.model.layers.0.block_sparse_moe.experts.1.w2.lora_"

    def refused(message, tensors):
        save_file({name: t.contiguous() for name, t in tensors.items()}, file)
        with pytest.raises(ValueError, match="lora.load: .*" + message):
            lora.load(tmp_path, params)

    refused("on all experts of .*layers.0.*w2", {k: t for k, t in whole.items() if not k.startswith(first)})
    refused("has only lora_A of .*experts.1.w2", {k: t for k, t in whole.items() if k != first + "B.weight"})
    beyond = {first.replace(".1.", ".4.") + "A.weight": torch.zeros(2, 24)}
    beyond[first.replace(".1.", ".4.") + "B.weight"] = torch.zeros(48, 2)
    refused("which is no linear of this model", {**whole, **beyond})
    fused = "base_model.model.model.layers.0.mlp.experts.lora_"
    for A, B in (((8, 48), (24, 8)), ((7, 48), (48, 7)), ((8, 47), (48, 8))):
        refused(
            f"experts of model.layers.0 A .{A[0]}, {A[1]}. and B .*, which fit none",
            {fused + "A.weight": torch.zeros(A), fused + "B.weight": torch.zeros(B)},
        )
    path = "model.layers.0.block_sparse_moe.experts.{e}.w1"
    wrong = lora.LoRA(a=adapters[path].a[:3], b=adapters[path].b, scale=1.0)
    with pytest.raises(ValueError, match=r"lora.adapt: .*w1 is .24, 48., .* expected \(4, r, 48\) and \(4, 24, r\)"):
        lora.adapt(params, {path: wrong})


@pytest.mark.parametrize("rslora", [False, True])
def test_a_fused_adapter_is_taken_apart(rslora, tmp_path):
    """PEFT's layout beside transformers 5: A (E·r, C) expert after expert, B (rows, r·E) rank after rank."""
    _, params, _ = saved(tmp_path, rank=3)
    E, r, alpha = 4, 3, 6
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(E * r, 48, generator=g), torch.randn(48, r * E, generator=g)
    name = "base_model.model.model.layers.1.mlp.experts.base_layer.lora_"
    save_file({name + "A.weight": A, name + "B.weight": B}, tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"lora_alpha": 1, "alpha_pattern": {r".*\.gate_up_proj": alpha}, "use_rslora": rslora}
    config |= {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": []}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = lora.load(tmp_path, params)
    assert [path.rpartition(".")[2] for path in found] == ["w1", "w3"]
    for e in range(E):
        whole = alpha / (math.sqrt(r) if rslora else r) * B.view(48, r, E)[:, :, e] @ A.view(E, r, 48)[e]
        parts = [one.scale * one.b[e] @ one.a[e] for one in found.values()]
        torch.testing.assert_close(torch.cat(parts).cpu(), whole, rtol=1e-6, atol=1e-6)


def test_the_router_stays_dense_and_is_trained_in_full():
    hf, model, params = made("mixtral-8x7b")
    _, quantised = ours(hf, quantize="nf4")
    assert torch.equal(quantised.layers[0].router, params.layers[0].router)
    assert quantised.layers[0].expert_gate_up.shape == (4, 48, 48)
    batch = from_tokens(torch.arange(12).view(1, 12), vocab_size=97).to(DEVICE)
    _, grads = value_and_grad(lambda p: model.loss(p, batch)[0])(params)
    assert all(layer.router.abs().max() > 0 for layer in grads.layers)
