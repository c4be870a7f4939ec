"""``perf/train_step.py`` and ``perf/exactness.py`` with a tiny model: rows are complete, and nothing differs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oprule import DEVICE

from perf import exactness, random_model, train_step
from unsloth_core import backend, tree, weights
from unsloth_core.autodiff import OFFLOAD, SAVE
from unsloth_core.models.decoder import Schedule
from unsloth_core.ops import nf4
from unsloth_core.shapes import Shape
from unsloth_core.tree import ABSENT
from unsloth_core.weights import NF4

KEYS = {
    *("impl", "shape", "quant", "bs", "seq", "rank", "policy", "memory_cap_gib", "ms", "tok_s", "peak_alloc_gib"),
    *("peak_reserved_gib", "predicted_peak_gib", "loss_first", "loss_last", "mfu", "gpu", "torch", "triton"),
    *("commit", "date"),
}
CUDA = DEVICE.type == "cuda"


@pytest.fixture(autouse=True)
def _backend():
    """As the script runs on this machine: kernels on a GPU, plain PyTorch on a CPU."""
    with backend.using("triton" if CUDA else "reference"):
        yield


# ---- the models


def test_shapes_are_those_of_the_models():
    counts = {
        "llama-3.1-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400, "smollm2-135m": 134_515_008,
        "mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624,
    }  # fmt: skip
    for shape, expected in counts.items():
        found = Shape.of(random_model.raw_config(shape))
        assert tree.nbytes(found.weights(found.layers, None, torch.bfloat16)) == 2 * expected
    assert random_model.raw_config("llama-3.1-8b-4layers")["num_hidden_layers"] == 4
    for shape in ("llama", "llama-3.1-8b-layers", "llama-3.1-8b-4layers-2layers"):
        with pytest.raises(ValueError, match="expected one of"):
            random_model.raw_config(shape)


def test_random_weights_are_the_same_dense_and_quantised():
    _, dense = random_model.random_model("tiny", device=DEVICE)
    _, again = random_model.random_model("tiny", device=DEVICE)
    model, quantised = random_model.random_model("tiny", device=DEVICE, quantize="nf4")
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(dense), tree.leaves(again)))
    declared = weights.declarations(model.family.Weights, model.config.dims)
    for declaration in (d for d in declared if weights.get(dense, d.path) is not ABSENT):
        parts = weights.split_parts(weights.get(quantised, declaration.path), declaration.rows)
        for a, b in zip(weights.split_parts(weights.get(dense, declaration.path), declaration.rows), parts):
            in_layers = len(declaration.path) > 1 and bool(declaration.rest)
            assert isinstance(b, NF4) == in_layers
            assert torch.equal(
                nf4.dequantize(nf4.quantize(a)) if in_layers else a, nf4.dequantize(b) if in_layers else b
            )
    assert dense.embed.std().item() == pytest.approx(0.02, rel=0.05) and dense.norm.eq(1).all()


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_random_experts(quantize):
    model, params = random_model.random_model("tiny-experts", device=DEVICE, quantize=quantize)
    layer = params.layers[0]
    assert weights.shape(layer.expert_gate_up) == (4, 2 * 48, 64)
    assert isinstance(layer.expert_gate_up, NF4) == (quantize == "nf4")
    assert model.family.__name__.endswith("qwen")
    row = "--shape tiny-experts --runs 1:24:2 --smoke --warmup 1".split()
    assert train_step.main([*row, "--quant", quantize or "none"]) == 0


@pytest.mark.parametrize("head", ["host", "nf4"])
def test_embedding_and_head_are_made_where_they_will_be(head):
    """Which is what moving them later gives."""
    _, params = random_model.random_model("tiny", device=DEVICE)
    _, there = random_model.random_model("tiny", device=DEVICE, embed="host", head=head)
    for a, b in zip(tree.leaves(random_model.placed(params, "host", head)), tree.leaves(there), strict=True):
        assert a.device == b.device and torch.equal(a, b)
    assert there.embed.device.type == "cpu" and isinstance(there.head, NF4) == (head == "nf4")


# ---- the measurement


def test_runs():
    Run = train_step.Run
    assert train_step.runs_of("2:2048", 8, ["default"]) == [Run(2, 2048, 8, "default")]
    assert train_step.runs_of("1:4:2,3:5", 8, ["a", "b"]) == [
        Run(1, 4, 2, "a"), Run(1, 4, 2, "b"), Run(3, 5, 8, "a"), Run(3, 5, 8, "b"),
    ]  # fmt: skip
    for bad in ("2", "2:0", "2:x", "2:3:4:5", ""):
        with pytest.raises(ValueError, match="--runs has"):
            train_step.runs_of(bad, 8, ["default"])


def test_schedules():
    assert train_step.schedule_of("default") == Schedule()
    assert train_step.schedule_of("recompute") == Schedule({})
    assert train_step.schedule_of("attn,mid=offload") == Schedule({"attn": SAVE, "mid": OFFLOAD})
    found = train_step.schedule_of("recompute,tile=2048,chunk_logits=67108864,decode_once=0")
    assert found == Schedule({}, tile=2048, decode_once=0, chunk_logits=2**26)


def test_flops_of_the_8b():
    run = train_step.Run(2, 2048, 1, "default")
    linears = 6_979_321_856 + 128256 * 4096
    attention = 2 * 2048 * 4096 * 32
    assert train_step.model_flops("llama-3.1-8b", run) == 4096 * (4 * linears + 3.5 * attention)
    half = train_step.mfu("llama-3.1-8b", run, 1e3 * train_step.model_flops("llama-3.1-8b", run) / 989.4e12 * 2, "H100")
    active = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 2 * 14336 + 4096 * 8) + 32000 * 4096
    assert train_step.model_flops("mixtral-8x7b", run) == 4096 * (4 * active + 3.5 * attention)
    assert half == 0.5 and train_step.mfu("tiny", run, 1.0, "cpu") is None


@pytest.mark.parametrize("options", [["--quant", "nf4"], ["--optimizer", "8bit", "--rank", "4"]])
def test_a_row_for_every_run_and_policy(options, capsys, tmp_path):
    out = tmp_path / "train.jsonl"
    common = ["--shape", "tiny", "--runs", "2:24,1:32:2", "--policy", "default", "recompute", "--steps", "3"]
    assert train_step.main([*common, "--smoke", "--out", str(out), *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert not out.exists()
    assert [(r["bs"], r["seq"], r["policy"]) for r in rows] == [
        (b, s, p) for b, s in ((2, 24), (1, 32)) for p in ("default", "recompute")
    ]
    for row in rows:
        assert row.keys() == KEYS | {"optimizer_states", "embed", "head", "captured", "host_ms"}
        assert row["ms"] > 0 and row["tok_s"] == pytest.approx(row["bs"] * row["seq"] / row["ms"] * 1e3, rel=1e-2)
        assert 0 < row["loss_last"] < row["loss_first"] < 6
        assert (row["peak_alloc_gib"] > 0) == CUDA and row["impl"] == "ours" and row["predicted_peak_gib"] > 0
    assert [r["loss_last"] for r in rows[::2]] == [r["loss_last"] for r in rows[1::2]]  # a policy changes no bits


def test_a_cap_is_planned_for(capsys):
    """With a GPU the peak is the predicted one; how near is measured at real shapes."""
    common = ["--shape", "tiny-4layers", "--runs", "1:64:2", "--steps", "3", "--smoke"]
    held = ["--memory", "2", "--policy", "recompute"]
    for options in (["--memory", "1"], ["--policy", "plan", "--embed", "host"], ["--head", "nf4"], held):
        assert train_step.main([*common, *options]) == 0
    capped, without, nf4_head, own = (json.loads(r) for r in capsys.readouterr().out.splitlines() if r.startswith("{"))
    assert capped["memory_cap_gib"] == 1 and 0 < capped["predicted_peak_gib"] < 1 and capped["policy"] != "plan"
    assert (
        without["memory_cap_gib"] is None and without["embed"] == "host" and without["loss_last"] == capped["loss_last"]
    )
    assert nf4_head["head"] == "nf4" and nf4_head["policy"] == "default"
    assert nf4_head["loss_first"] == pytest.approx(capped["loss_first"], rel=1e-2)
    assert (own["memory_cap_gib"], own["policy"], own["loss_last"]) == (2, "recompute", capped["loss_last"])
    assert train_step.main([*common, "--memory", "0.0001", "--policy", "recompute"]) == int(CUDA)  # over its cap


def test_bad_input_is_one_line():
    for options in (["--shape", "llama"], ["--runs", "2"]):
        with pytest.raises(SystemExit, match="^train_step: "):
            train_step.main(["--smoke", *options])


@pytest.mark.skipif(CUDA, reason="the error of a machine without a GPU")
def test_a_measurement_needs_a_gpu():
    with pytest.raises(SystemExit, match="no CUDA device"):
        train_step.main(["--shape", "tiny"])


@pytest.mark.skipif(not CUDA, reason="CUDA graphs and profiles of the GPU's time exist on a GPU alone")
def test_captured_and_profiled(capsys):
    common = ["--shape", "tiny", "--runs", "1:32", "--steps", "4", "--smoke"]
    for options in ([], ["--capture", "--profile", "3"]):
        assert train_step.main([*common, *options]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [row["captured"] for row in rows] == [False, True] and rows[0]["loss_last"] == rows[1]["loss_last"]
    assert "ms of work in" in out


def test_transformers_and_peft_run_the_same_shapes():
    """In a process of their own, as peers do."""
    pytest.importorskip("peft")
    script = Path(train_step.__file__)
    command = [sys.executable, str(script), "--impl", "hf", "--shape", "tiny", "--runs", "1:16:1", "--warmup", "1"]
    done = subprocess.run([*command, "--smoke", "--policy", "default", "recompute"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(row["impl"], row["policy"]) for row in rows] == [("hf", "default"), ("hf", "recompute")]
    assert rows[0]["loss_first"] == pytest.approx(rows[1]["loss_first"], rel=1e-3)


# ---- the proof


def test_exactness_of_a_tiny_model(capsys, tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "rows.jsonl"
    low = "bfloat16" if CUDA else "float32"  # in bf16 transformers takes a minute on a CPU
    exactness.main(["--shape", "tiny", "--seq", "24", "--steps", "5", "--rank", "4", "--dtype", low, "--out", str(out)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [{k: v for k, v in row.items() if k in rows[i]} for i, row in enumerate(map(json.loads, open(out)))] == rows
    by = {(kind, row[kind]): row for row in rows for kind in ("gradients", "losses", "policy") if kind in row}
    exact = by["gradients", "transformers float64"]
    ours, theirs = (by["gradients", f"{who} torch.{low}"] for who in ("ours", "transformers"))
    assert exact["all"] < exactness.TRUST
    assert all(0 < ours[k] < 1.5 * theirs[k] for k in ("all", "median", "worst"))
    assert by["losses", "ours - transformers float32"]["largest"] < 1e-3
    assert by["policy", "all equal to qkv,attn,mid,gate_up"]["holds"]
    assert {row["steps"] for row in rows if "curve" in row} == {5}
