"""The planner says what a step takes before there are weights or a GPU, for every family."""

import dataclasses
import gc
import json
import sys
from pathlib import Path

import pytest
import torch
from oprule import DEVICE
from test_four_bit import quantised, read
from tiny import VERSIONS, checkpoint_of, judge
from tiny_folder import write_folder
from typer.testing import CliRunner

from perf import random_model
from perf.train_step import schedule_of
from unsloth_core import backend, cli, data, lora, optim, random, tree
from unsloth_core.autodiff import INPUT, OFFLOAD, SAVE
from unsloth_core.models.decoder import Model, Schedule
from unsloth_core.plan import _candidates, parse_bytes, plan, predict
from unsloth_core.rehearsal import CUBLAS, Rehearsal
from unsloth_core.shapes import Shape
from unsloth_core.train import make_step

ROOT = Path(__file__).parents[1]

# Llama 3.1 8B as its config.json has it.
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip


def config(version, **more):
    model_type, overrides = VERSIONS[version]
    return checkpoint_of(judge(model_type, **{**overrides, **more})).config


def runs(raw, tokens=64, **more):
    return Rehearsal(raw, tokens, **{"rank": 4, **more})


@pytest.mark.parametrize("version", sorted(VERSIONS))
def test_every_family_can_be_planned(version):
    """The calls that its ``SAVED`` names, all of them kept here, there or recomputed, and tiles; NF4 every second."""
    r = runs(config(version), quantize="nf4" if len(version) % 2 else None)
    family = r.shape.family
    policies = [dict.fromkeys(family.SAVED, fate) for fate in (SAVE, OFFLOAD)]
    all_saved, all_away, none, tiles = (
        next(_candidates(r, schedule, "device", "device"))
        for schedule in (*map(Schedule, policies), Schedule({}), Schedule({"attn": SAVE}, tile=16))
    )
    assert all_saved.kept > all_away.kept > 0 and all_saved.kept > none.kept
    assert all_away.away > 0 == none.away and none.seconds >= all_saved.seconds > 0
    for c in (all_saved, all_away, none, tiles):
        assert c.weights > 0 and c.trained > 0 and c.peak > c.weights + c.trained and c.working >= 0


def test_the_plan_of_a_family_with_sandwich_norms():
    found = plan(config("gemma2"), 64, quantize="nf4")
    assert found.best in found.candidates and found.best.peak == max(c.peak for c in found.candidates)
    assert f"{found.best.peak / 2**30:.2f} GiB" in str(found) and "alternatives" in str(found)
    assert {"o", "down"} <= set(found.schedule.policy)  # whose outputs the norms behind them need


@pytest.mark.parametrize("version", ["llama-3.1", "gemma2", "qwen3-window", "phi-3.5-mini", "mistral-nemo"])
@pytest.mark.parametrize("schedule", [Schedule({"attn": SAVE, INPUT: OFFLOAD}), Schedule(tile=16)], ids=str)
def test_layers_that_are_left_out_are_added_to_the_byte(version, schedule):
    raw = {**config(version, num_hidden_layers=2), "num_hidden_layers": 9}
    if "layer_types" in raw:
        raw["layer_types"] = [raw["layer_types"][i % 2] for i in range(9)]
    r = runs(raw)
    assert r.sizes == (4, 5)
    found, whole = r.whole(schedule), r.run(schedule, 9)
    assert found.peaks == whole.peaks
    for name in ("weights", "trained", "kept", "away"):
        assert getattr(found, name) == getattr(whole, name), name
    assert found.seconds == pytest.approx(whole.seconds, rel=1e-6)


def test_the_weights_are_those_that_a_config_declares():
    """Published: 8,030,261,248 parameters; in NF4 0.515869 bytes each of a linear, and 1,028 for a matrix's tables."""
    dense = Shape.of(LLAMA_8B).weights(32, None, torch.bfloat16)
    assert tree.nbytes(dense) == 2 * 8_030_261_248
    few = Shape.of(LLAMA_8B).weights(1, "nf4", torch.bfloat16)
    linears = 218_103_808
    assert tree.nbytes(few.layers) == linears // 2 + linears // 64 + linears // 4096 + 7 * 1028 + 2 * 2 * 4096


@pytest.mark.parametrize("double", [True, False])
def test_a_checkpoint_in_4_bits_is_planned_as_it_is_stored(double):
    skip = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp", "o_proj")
    checkpoint, nodes = quantised("qwen3", skip=skip, dtype=torch.bfloat16, double=double)
    _, params = read(checkpoint, torch.bfloat16)
    shape = Shape.of(checkpoint.config)
    facts = lambda weights: [(path, t.shape, t.dtype) for path, t in tree.items(weights)]  # noqa: E731
    assert facts(params) == facts(shape.weights(shape.layers, None, torch.bfloat16))
    found = plan(checkpoint.config, 64)
    assert found.best.weights == tree.nbytes(params) and "nf4 as stored" in found.title and len(nodes) > 4
    spared = {**checkpoint.config["quantization_config"], "llm_int8_skip_modules": ["layers.7.mlp.down_proj"]}
    raw = {**checkpoint.config, "quantization_config": spared, "num_hidden_layers": 9, "layer_types": None}
    r = runs({k: v for k, v in raw.items() if v is not None})
    found, whole = (f(*a) for f, a in ((r.whole, (Schedule({}),)), (r.run, (Schedule({}), 9))))
    assert r.sizes == (4, 5) and found.weights == whole.weights
    assert found.peaks == pytest.approx(whole.peaks, abs=8 * 512)  # other tensors are rounded up to blocks


def test_a_checkpoint_that_cannot_be_read_cannot_be_planned():
    for stored in ({"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_8bit": True}):
        with pytest.raises(NotImplementedError, match="only bitsandbytes' 4 bits can be read"):
            plan({**LLAMA_8B, "quantization_config": stored}, 64)


def test_a_smaller_budget_gives_a_smaller_and_slower_step():
    found = plan(LLAMA_8B, 4096, "7GiB", sequence=2048, quantize="nf4")
    best, last = found.candidates[0], found.best
    assert 13 * 2**30 < best.peak < 20 * 2**30
    assert last.peak < 7 * 2**30 and last.seconds > best.seconds
    for candidate in (best, last):
        assert candidate.peak == candidate.weights + candidate.trained + candidate.kept + candidate.working


def test_a_budget_is_used_up_by_letting_the_last_layers_keep_more():
    """To the byte what a run of all the layers finds."""
    raw, budget = wide(12), 900 * 2**20
    every = plan(raw, 4096, budget, quantize="nf4", capture=True)  # or the host is what all of them wait for
    found = every.best
    layers, richer = found.schedule.last
    assert 3 <= layers <= 8 and richer != found.schedule.policy and f"of the last {layers} layers" in str(every)
    assert found.peak <= budget
    assert all(c is found or c.peak > budget or c.seconds > found.seconds for c in every.candidates)
    r = runs(raw, 4096, rank=16, quantize="nf4")
    whole = r.run(dataclasses.replace(found.schedule, chunk_logits=None), 12)
    loss = r.loss(found.schedule.chunk_logits, found.head) - r.loss(None, "device")
    peaks = whole.peaks | {"the loss": whole.peaks["the loss"] + loss}
    assert max(peaks.values()) - r.gone(found.embed, found.head) + CUBLAS == found.peak
    assert (whole.kept, whole.away) == (found.kept, found.away)


def test_what_does_not_fit_is_one_line_with_the_least_that_would():
    with pytest.raises(ValueError, match=r"does not fit into 8 MiB; the least is \d+ MiB \(.*\)$") as error:
        plan(config("llama-3.1"), 64, 2**23)
    assert "\n" not in str(error.value)
    least = min(c.peak for c in plan(config("llama-3.1"), 64, quantize="nf4").candidates)
    assert plan(config("llama-3.1"), 64, least, quantize="nf4").best.peak <= least


def test_more_of_anything_takes_more():
    raw, schedule = config("llama-3.1"), Schedule({"attn": SAVE})
    peak = lambda **more: max(runs(raw, **more).whole(schedule).peaks.values())  # noqa: E731
    assert peak() < peak(tokens=128) and peak() < peak(rank=16) and peak(targets=["q_proj"]) < peak()
    assert peak(optimizer_states="bf16") < peak() and peak() < peak(accumulate=2) and peak() < peak(dtype=torch.float32)
    seconds = lambda **more: runs(raw, **more).whole(schedule).seconds  # noqa: E731
    assert seconds(accumulate=4) == pytest.approx(2 * seconds(accumulate=2)) and seconds() < seconds(accumulate=2)


def test_dropout_costs_an_input_of_its_own_for_every_adapter():
    """Of a layer's widest projection D x is there at once with x, and the u that is otherwise kept is not; and it
    takes time, which its share does not change."""
    raw, schedule = wide(8), Schedule({})
    plain, dropped, more = (predict(raw, 4096, schedule, dropout=p, capture=True) for p in (0.0, 0.1, 0.5))
    assert (dropped.peak, dropped.seconds) == (more.peak, more.seconds)
    assert plain.peak + 4096 * raw["hidden_size"] * 2 <= dropped.peak and plain.seconds < dropped.seconds
    assert "dropout 0.1" in plan(raw, 4096, dropout=0.1).title and "dropout" not in plan(raw, 4096).title


def test_embedding_and_head_on_the_host_take_what_they_take_there():
    raw = {**LLAMA_8B, "num_hidden_layers": 1}
    table = 128256 * 4096 * 2
    here, there, both = (
        predict(raw, 2048, Schedule({}), quantize="nf4", embed=e, head=h).weights
        for e, h in (("device", "device"), ("host", "device"), ("host", "host"))
    )
    assert here - there == there - both == table
    tied = {**raw, "tie_word_embeddings": True}
    tied = predict(tied, 2048, Schedule({}), quantize="nf4", embed="host", head="host")
    assert tied.weights == both and tied.describe().endswith("embedding and head on the host")


def test_a_schedule_of_ones_own_can_be_predicted():
    raw, table = {**LLAMA_8B, "num_hidden_layers": 2}, 128256 * 4096
    default = predict(raw, 2048, Schedule(), quantize="nf4")
    saved = Schedule(dict.fromkeys(("qkv", "attn", "mid", "gate_up"), SAVE))
    assert default.peak == predict(raw, 2048, saved, quantize="nf4").peak
    some = predict(raw, 2048, Schedule({}, last=(1, saved.policy)), quantize="nf4")
    assert predict(raw, 2048, Schedule({}), quantize="nf4").kept < some.kept < default.kept
    few = predict(raw, 2048, Schedule(chunk_logits=2**24), quantize="nf4", head="nf4")
    in_nf4 = table // 2 + table // 64 + table // 4096 + 1028
    assert few.peak < default.peak and default.weights - few.weights == 2 * table - in_nf4
    assert few.schedule.chunk_logits == 2**24 and "; head in NF4" in few.describe()
    both = predict(raw, 2048, Schedule(chunk_logits=2**24), quantize="nf4", embed="nf4", head="nf4")
    assert few.weights - both.weights == 2 * table - in_nf4 and "embedding and head in NF4" in both.describe()
    tied = [predict({**raw, "tie_word_embeddings": True}, 2048, Schedule(), embed=e, head=e) for e in ("device", "nf4")]
    assert tied[0].weights - tied[1].weights == 2 * table - in_nf4


def test_for_how_long_decoded_weights_stay_is_counted_and_chosen(monkeypatch):
    """436 MB are all matrices of an 8B layer, 235 MB those of gate and up, which are one product."""
    few = {**LLAMA_8B, "vocab_size": 1024}
    with backend.using("triton"):
        for quantize, expected in (("nf4", 436_207_616 - 234_881_024), (None, 0)):
            r = runs(few, 16, quantize=quantize)  # so few that what the two peaks have of the tokens' own is nothing
            once, twice = (r.whole(Schedule({}, decode_once=o)).peaks for o in (True, False))
            place = "the backward pass of the last layer but one"
            assert once[place] - twice[place] == pytest.approx(expected, abs=1e5)
    monkeypatch.setattr(sys.modules["unsloth_core.plan"], "_policies", lambda *chains: [{INPUT: OFFLOAD}])
    raw, places = {**wide(3), "vocab_size": 64}, {"embed": "device", "head": "device"}
    least = predict(raw, 64, Schedule({INPUT: OFFLOAD}, decode_once=False), quantize="nf4", **places).peak
    found = plan(raw, 64, least, quantize="nf4", **places).best
    assert not found.schedule.decode_once and "decode twice" in found.describe() and found.peak <= least
    assert plan(raw, 64, quantize="nf4", **places).schedule.decode_once


ROWS = [json.loads(line) for line in (ROOT / "perf/records/train.jsonl").read_text().splitlines()]
OURS = [row for row in ROWS if row["impl"] == "ours" and row["gpu"] != "cpu"]
LAST = {
    (row["shape"], row["quant"], row["bs"], row["seq"], row["policy"], row["embed"], row["head"], row["captured"]): row
    for row in OURS
    if not row["policy"].startswith(("save ", "offload "))  # a plan, in words
}


def predicted(row):
    """By the planner as it is now, of the configuration of a row."""
    raw, quantize = random_model.raw_config(row["shape"]), None if row["quant"] == "none" else row["quant"]
    return predict(
        raw, row["bs"] * row["seq"], schedule_of(row["policy"]), embed=row["embed"], head=row["head"],
        sequence=row["seq"], rank=row["rank"], quantize=quantize, optimizer_states=row["optimizer_states"],
        capture=row["captured"],
    )  # fmt: skip


@pytest.mark.parametrize("row", LAST.values(), ids=lambda row: f"{row['quant']}-{row['bs']}x{row['seq']}")
def test_every_measured_peak_is_within_5_percent_of_the_prediction(row):
    """The last of each configuration in the records, by the planner as it is now."""
    assert predicted(row).peak / 2**30 == pytest.approx(row["peak_alloc_gib"], rel=0.05)


RECENT = [row for row in LAST.values() if row["date"] > "2026-11-22T12"]


@pytest.mark.parametrize("row", RECENT, ids=lambda row: f"{row['shape']}-{row['quant']}-{row['bs']}x{row['seq']}")
def test_measured_times_are_near_the_prediction(row):
    """Of the rows since the kernels are what they are; small models, whose GPU waits for launches, included."""
    assert 1e3 * predicted(row).seconds == pytest.approx(row["ms"], rel=0.25)


def test_few_logits_are_not_free():
    usual, few, same = (predict(LLAMA_8B, 8192, Schedule({}, chunk_logits=n)) for n in (None, 2**26, 2**28))
    assert few.peak <= usual.peak and usual.seconds == same.seconds < few.seconds < 1.01 * usual.seconds
    assert plan({**LLAMA_8B, "num_hidden_layers": 4}, 8192).schedule.chunk_logits is None


def test_a_captured_step_does_not_wait_for_the_host():
    raw = config("llama-3.1")
    assert predict(raw, 64, Schedule(), capture=True).seconds < 0.1 * predict(raw, 64, Schedule()).seconds


def test_memory_sizes():
    sizes = {"24GiB": 24 * 2**30, "24 gb": 24 * 10**9, "1.5GiB": 3 * 2**29, "8": 8 * 2**30, "800MiB": 800 * 2**20}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "lots", "-1GiB", "1e3GiB"):
        with pytest.raises(ValueError, match="memory is .*, expected a size such as 24GiB"):
            parse_bytes(text)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quantize": "int8"}, "plan: quantize is 'int8', expected one of"),
        ({"embed": "disk"}, r"plan: embed is 'disk', expected one of \('device', 'host', 'nf4'\) or None"),
        ({"optimizer_states": "4bit"}, "plan: optimizer_states is '4bit', expected one of"),
        ({"sequence": 0}, "plan: sequence is 0, expected at least 1"),
        ({"accumulate": 0}, "plan: accumulate is 0, expected at least 1"),
        ({"dropout": 1.0}, "plan: dropout is 1.0, expected 0 <= dropout < 1"),
    ],
)
def test_bad_options_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        plan(LLAMA_8B, 64, **more)


def test_command_line_from_a_config_alone(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama-3.1")))
    for source in (tmp_path, file):
        done = CliRunner().invoke(cli.app, ["plan", str(source), "--tokens", "64", "--memory", "1GiB", "--rank", "2"])
        assert done.exit_code == 0, done.output
        assert "budget 1.00 GiB" in done.output and "alternatives" in done.output
    failed = CliRunner().invoke(cli.app, ["plan", str(tmp_path), "--tokens", "64", "--memory", "1MiB"])
    assert failed.exit_code == 1 and failed.output.startswith("error: plan: a step on 64 tokens does not fit")


def test_finetune_in_so_much_memory_gives_the_same_adapters(tmp_path):
    folder = str(write_folder(tmp_path / "model"))
    examples = tmp_path / "train.jsonl"
    rows = [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(4)]
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def finetune(name, *more):
        arguments = ["finetune", folder, str(examples), "--device", "cpu", "--tokens", "64", "--steps", "2"]
        with backend.using("reference"):
            return CliRunner().invoke(cli.app, [*arguments, "--output", str(tmp_path / name), *more])

    plain, planned = finetune("plain"), finetune("planned", "--memory", "34MiB")
    assert plain.exit_code == planned.exit_code == 0, planned.output
    assert "GiB predicted; `unsloth-core plan` shows what else fits" in planned.output
    assert "predicted" not in plain.output
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("plain", "planned")]
    assert adapters[0] == adapters[1]
    failed = finetune("none", "--memory", "1MiB")
    assert failed.exit_code == 1 and "does not fit into 1 MiB; the least is" in failed.output


def wide(layers):
    """A shape in which matrices, not rounding, take the memory, and that a test can hold."""
    return {
        **LLAMA_8B, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 8192,
    }  # fmt: skip


def random_weights(raw, quantize):
    """Of the planner's structure, with numbers in it, on the test device."""
    shape = Shape.of(raw)
    params = shape.weights(shape.layers, quantize, torch.bfloat16)

    def fill(t):
        if not t.dtype.is_floating_point:
            return torch.randint(0, 256, t.shape, dtype=t.dtype, device=DEVICE)
        return torch.randn(t.shape, device=DEVICE).mul_(0.02).to(t.dtype)

    return Model(family=shape.family, config=shape.config), tree.map(fill, params)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="compares with what the CUDA allocator counts")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(
    "schedule",
    [
        Schedule({}), Schedule(dict.fromkeys(("qkv", "attn", "mid", "gate_up"), SAVE)),
        Schedule({INPUT: OFFLOAD, "attn": OFFLOAD, "mid": OFFLOAD}), Schedule({"attn": OFFLOAD}, tile=1024),
    ],
    ids=str,
)  # fmt: skip
def test_predicted_peak_is_the_measured_one(schedule, quantize, dropout):
    tokens, raw = 4096, wide(7)
    model, params = random_weights(raw, quantize)
    adapters = lora.init(random.key(0), params, rank=8)
    optimizer = optim.adamw(1e-4)
    state = optimizer.init(adapters)
    ids = torch.randint(0, 8192, (tokens,)).numpy()
    batch = data.Batch.of([(ids, None)], vocab_size=8192, tokens=tokens, segments=tokens // 16).to(DEVICE)
    masks = {"dropout": dropout, "key": random.key(0)} if dropout else {}
    step = make_step(model, params, optimizer, max_norm=1.0, policy=schedule, **masks)
    step(adapters, state, [batch])
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - tree.nbytes((params, adapters, state, batch))  # of other tests
    torch.cuda.reset_peak_memory_stats()
    step(adapters, state, [batch])
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - max(0, before)
    predicted = predict(raw, tokens, schedule, rank=8, quantize=quantize, dropout=dropout).peak
    assert abs(predicted - CUBLAS - measured) < 0.05 * measured + CUBLAS


def test_a_plan_is_a_function_of_its_arguments():
    one, other = (plan(config("gemma2"), 64, "1GiB") for _ in range(2))
    assert one == other
