"""What every family does beyond computing: files, generation, adapters as PEFT reads them, the text part of others."""

import dataclasses
import json
import re
import string
import warnings

import peft
import pytest
import tokenizers
import torch
import transformers
from oprule import DEVICE
from safetensors.torch import load_file, save_file
from tiny import BASE, GEMMA3, MIXED, VERSIONS, checkpoint_of, judge, longrope, ours
from torch._subclasses.fake_tensor import FakeTensorMode

from unsloth_core import backend, lora, optim, random, tree
from unsloth_core.autodiff import SAVE, value_and_grad
from unsloth_core.data import Batch, from_tokens
from unsloth_core.generate import generate, stream
from unsloth_core.load import load, named_tensors, read_weights
from unsloth_core.models import FAMILIES, family_of
from unsloth_core.ops import nf4
from unsloth_core.plan import plan
from unsloth_core.train import finetune, make_step
from unsloth_core.weights import declared_leaves

SOME = ("mistral-7b-v0.1", "mistral-nemo", "ministral", "qwen2.5", "qwen3", "phi-3-mini-4k", "phi-4-mini")
SOME += ("gemma-2b", "gemma2", "gemma3", "falcon-7b", "falcon-40b", "mixtral-8x7b", "qwen3-moe-mixed")
each = pytest.mark.parametrize("version", SOME)
# Every model type, by the first of its versions.
EVERY = {model_type: version for version, (model_type, _) in reversed(VERSIONS.items())}


@pytest.fixture(autouse=True)
def _fast():
    with backend.using(None if DEVICE.type == "cuda" else "reference"):
        yield


def make(version):
    model_type, overrides = VERSIONS[version]
    return judge(model_type, **overrides)


def tokens(batch=2, length=9):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(3)).to(DEVICE)


def write_tokenizer(folder):
    """One letter, one token: the first 97 printable ones."""
    vocab = {c: i for i, c in enumerate(string.printable[:97])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_every_model_type_has_tiny_versions():
    assert {model_type for model_type, _ in VERSIONS.values()} == set(FAMILIES)


@each
def test_a_folder_that_transformers_wrote(version, tmp_path):
    hf = make(version)
    hf.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model, params = load(str(tmp_path), device=DEVICE, dtype=torch.float32)
    close(model.logits(params, tokens()), hf(tokens()).logits)
    model, params = load(str(tmp_path), device=DEVICE, dtype=torch.float32, quantize="nf4")
    decoded, stored = named_tensors(params), checkpoint_of(hf).tensors
    assert decoded.keys() == stored.keys()
    linears = set()
    for d in declared_leaves(type(params), params.config):
        parts = [stored[name] for name in d.names if name in stored]
        if d.linear:
            linears |= set(d.names)
            together = [torch.cat(parts)] if d.experts else parts  # all experts are one NF4 node
            parts = torch.cat([nf4.dequantize(nf4.quantize(t)) for t in together]).split(d.rows)
        assert all(torch.equal(decoded[name], part) for name, part in zip(d.names, parts)), d.path
    assert linears == {name for name in stored if re.search(r"(_proj|\.w[123]|query_key_value|dense\w*)\.weight", name)}
    assert model.logits(params, tokens()).isfinite().all()


@pytest.mark.parametrize(
    ("version", "without", "added"),
    [
        ("qwen3", "model.layers.1.self_attn.k_norm.weight", "model.layers.0.self_attn.v_proj.bias"),
        ("qwen2.5", "model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.q_norm.weight"),
        ("gemma2", "model.layers.0.post_feedforward_layernorm.weight", "model.layers.0.self_attn.q_norm.weight"),
        ("gemma-2b", "model.layers.1.input_layernorm.weight", "model.layers.1.post_feedforward_layernorm.weight"),
        ("mistral-nemo", "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_a_version_has_its_own_leaves_and_no_others(version, without, added):
    checkpoint = checkpoint_of(make(version))
    family = family_of(checkpoint.config)

    def refused(message, **tensors):
        changed = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, **tensors})
        changed.tensors = {k: v for k, v in changed.tensors.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            read_weights(
                changed, family.Weights, family.Config.from_hf(changed.config), device=DEVICE, dtype=torch.float32
            )

    refused(f"1 tensors are missing: {without}", **{without: None})
    refused(f"1 tensors that the config has no place for: {added}", **{added: torch.ones(4)})
    everywhere = {f"model.layers.{i}.{without.split('.', 3)[3]}": None for i in range(2)}
    refused("tensors are missing", **everywhere)  # an optional leaf that no layer has is missing all the same


@each
def test_greedy_equals_transformers(version, tmp_path):
    hf = make(version)
    hf.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model, params = load(str(tmp_path), device=DEVICE, dtype=torch.float32)
    prompts = ["Hello", "a", "Whyisitso"]
    texts = generate(model, params, prompts, max_new_tokens=12)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([model.tokenizer.encode(prompt)], device=DEVICE)
        out = hf.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert text == model.tokenizer.decode(out[0, ids.shape[1] :].tolist())


@pytest.mark.parametrize("version", ["phi-4-mini", "llama-3.1"])
@pytest.mark.parametrize("prompt", ["Hello", "Why?", "a"])
def test_rotations_follow_the_length_of_now(version, prompt, tmp_path):
    """Past the first context in the middle of generation, and with room for far more than is needed."""
    model_type, overrides = VERSIONS[version]
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}
    more = longrope(6, original=8) if model_type == "phi3" else {"max_position_embeddings": 8, **rope}
    judge(model_type, **{**overrides, **more}).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model, params = load(str(tmp_path), device=DEVICE, dtype=torch.float32)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)  # afresh: it remembers lengths
    ids = torch.tensor([model.tokenizer.encode(prompt)], device=DEVICE)
    # Without a cache for longrope: keys of the first list are recomputed, which older versions got wrong with one.
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": model_type != "phi3"}
    out = hf.generate(ids, max_new_tokens=20, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # longer than the context
        (text,) = generate(model, params, [prompt], max_new_tokens=20)
        pieces = "".join(stream(model, params, prompt, max_new_tokens=60))
    assert text == model.tokenizer.decode(out[0, ids.shape[1] :].tolist())
    assert pieces.startswith(text)


def test_a_filler_longer_than_the_first_context_turns_nothing():
    """longrope has another list of divisors for a batch that is longer: its examples are not."""
    model_type, overrides = VERSIONS["phi-3.5-mini"]
    model, params = ours(judge(model_type, **{**overrides, **longrope(6, original=64)}))
    examples = [(tokens()[0].tolist(), None), (tokens()[1, :5].tolist(), None)]
    batches = [Batch.of(examples, vocab_size=97, tokens=N).to(DEVICE) for N in (None, 64, 400)]
    batches.append(dataclasses.replace(batches[0], max_position=65))
    short, exact, long, other = (model.loss(params, batch)[0] for batch in batches)
    for loss in (exact, long):
        torch.testing.assert_close(loss, short, rtol=1e-5, atol=1e-5)
    assert (other - short).abs() > 1e-3


@pytest.mark.parametrize("version", [*SOME[:-1], "qwen3-moe"])  # PEFT takes no experts beside dense layers
def test_peft_reads_our_adapters_and_we_read_its(version, tmp_path):
    hf = make(version)
    model, params = ours(hf)
    adapters = lora.init(random.key(0), params, rank=3, alpha=5)
    adapters = tree.map(lambda t: t + 0.1, adapters)
    names = {path.rpartition(".")[2] for path in adapters}
    fused = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    split = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    mixtral = {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"}
    falcon = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert names == {"phi": fused, "mix": mixtral, "fal": falcon}.get(version[:3], split)
    assert {p.rpartition(".")[2] for p in lora.init(random.key(0), params, targets="attention")} == {
        name for name in names if name in lora.ATTENTION
    }
    expected = model.logits(lora.adapt(params, adapters), tokens())
    lora.save(adapters, tmp_path, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing and unexpected keys
        theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path)).eval()
    close(theirs(tokens()).logits, expected)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = lora.load(tmp_path / "theirs", params)
    assert again.keys() == adapters.keys()
    for path, mine in adapters.items():
        read = again[path]
        if "{e}" in path:  # PEFT wrote gate and up of all experts as one adapter of their ranks together
            close(read.scale * read.b @ read.a, mine.scale * mine.b @ mine.a)
        else:
            assert torch.equal(read.a, mine.a) and torch.equal(read.b, mine.b) and read.scale == mine.scale, path


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_from_a_config_to_an_answer(model_type, tmp_path):
    """All of it together: planned, loaded in 4 bits, trained as planned, saved, loaded, asked."""
    make(EVERY[model_type]).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    planned = plan(json.loads((tmp_path / "config.json").read_text()), 32, quantize="nf4", rank=3)
    model, params = load(str(tmp_path), device=DEVICE, dtype=torch.float32, quantize="nf4")
    examples = [{"text": "Thecatsatonthemat"}, {"text": "Whyisitso"}]
    options = {"tokens": 32, "rank": 3, "lr": 3e-2, "warmup": 0, "steps": 4}
    output = str(tmp_path / "run")
    adapters, history = finetune(
        model, params, examples, policy=planned.schedule, output=output, progress=False, **options
    )
    losses = [row["loss"] for row in history]
    assert losses[-1] < 0.9 * losses[0], losses
    adapted = lora.adapt(params, lora.load(output, params))
    assert torch.equal(model.logits(adapted, tokens()), model.logits(lora.adapt(params, adapters), tokens()))
    (text,) = generate(model, adapted, ["Thecat"], max_new_tokens=6)
    ids = model.tokenizer.encode("Thecat")
    for _ in range(6):  # without a cache
        ids.append(int(model.logits(adapted, torch.tensor([ids], device=DEVICE))[0, -1].argmax()))
    assert text == model.tokenizer.decode(ids[6:])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs are recorded and replayed by a GPU alone")
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_a_step_can_be_captured(model_type):
    """No op of a family, its router neither, reads a value back; and the replayed step has the same bits."""
    results = []
    for capture in (False, True):
        model, params = ours(make(EVERY[model_type]))
        adapters, optimizer = lora.init(random.key(0), params, rank=2), optim.adamw(1e-2)
        state = optimizer.init(adapters)
        step = make_step(model, params, optimizer, max_norm=1.0, policy=None, capture=capture)
        for seed in range(4):
            ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(seed))
            adapters, state, metrics = step(adapters, state, [from_tokens(ids, vocab_size=97).to(DEVICE)])
        results.append(tree.items((adapters, state, metrics)))
    assert step.graphs == 1
    for (path, a), (_, b) in zip(*results, strict=True):
        assert torch.equal(a, b), path


@each
def test_training_step_never_waits_for_the_device(version):
    hf = make(version)
    with backend.using("reference"):
        model, params = ours(hf)
        batch = from_tokens(tokens().cpu(), vocab_size=97).to(DEVICE)
        adapters = lora.init(random.key(0), params, rank=2)
        with FakeTensorMode() as mode:  # has no data: a sync or a size that depends on a value raises
            params, adapters, batch = (tree.map(mode.from_tensor, t) for t in (params, adapters, batch))
            step = value_and_grad(lambda t: model.loss(lora.adapt(params, t), batch, policy={"attn": SAVE})[0])
            loss, grads = step(adapters)
    assert loss.shape == () and [g.shape for g in tree.leaves(grads)] == [t.shape for t in tree.leaves(adapters)]


# ---- the text part of a multimodal checkpoint

SMALL = {k: v for k, v in BASE.items() if not k.endswith("_token_id")}
VISION = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def gemma3():
    text = {**SMALL, **GEMMA3, "layer_types": MIXED, "model_type": "gemma3_text"}
    config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def mistral3():
    text = {**SMALL, "sliding_window": None, "head_dim": 16, "model_type": "mistral"}
    vision = {**VISION, "model_type": "pixtral"}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    return transformers.Mistral3ForConditionalGeneration(config)


# How transformers 4 and 5 write the names.
SPELLINGS = {"4": ("language_model.model.", "language_model.lm_head."), "5": ("model.language_model.", "lm_head.")}


def respell(file, version):
    renamed = {}
    for name, t in load_file(file).items():
        for body, head in SPELLINGS.values():
            name = name.replace(body, "BODY.") if name.startswith(body) else name
            name = name.replace(head, "HEAD.") if name.startswith(head) else name
        body, head = SPELLINGS[version]
        renamed[name.replace("BODY.", body).replace("HEAD.", head)] = t
    save_file(renamed, file)
    return list(renamed)


@pytest.mark.parametrize("make", [gemma3, mistral3], ids=lambda f: f.__name__)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_text_part(make, spelling, tmp_path):
    torch.manual_seed(0)
    hf = make().to(DEVICE).eval()
    hf.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    names = respell(tmp_path / "model.safetensors", spelling)
    assert sum(name.startswith(SPELLINGS[spelling][0]) for name in names) >= 20
    assert any("vision_tower" in name for name in names)
    model, params = load(str(tmp_path), device=DEVICE, dtype=torch.float32)
    close(model.logits(params, tokens()), hf(tokens()).logits)


def test_text_part_refusals(tmp_path):
    gemma3().save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    file, config = tmp_path / "model.safetensors", json.loads((tmp_path / "config.json").read_text())

    def refused(message, **changes):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path), device="cpu")

    refused("text_config of a gemma3 model is None, expected an object", text_config=None)
    refused("model_type 'gemma4_text', supported: ", text_config={**config["text_config"], "model_type": "gemma4_text"})
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    save_file({**tensors, "model.embed_tokens.weight": tensors[name].clone()}, file)
    refused("are one tensor of the text model")
    save_file({**tensors, "audio_tower.w": torch.ones(3)}, file)
    refused("no place for: audio_tower.w")
    with pytest.raises(NotImplementedError, match="quantization_config"):
        refused("never a ValueError", quantization_config={"quant_method": "fp8"})
