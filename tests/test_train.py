"""Accumulated gradients are those of one batch, and a run that was killed ends with the bits of one that was not."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import DEVICE, assert_op_rule
from safetensors.torch import load_file
from tiny import VERSIONS, judge, ours

from unsloth_core import backend, capture, checkpoint, lora, optim, random, train, tree
from unsloth_core.autodiff import INPUT, OFFLOAD, SAVE, value_and_grad
from unsloth_core.data import Batch
from unsloth_core.load import load
from unsloth_core.tokenizer import Tokenizer
from unsloth_core.train import Options, finetune, make_step

BACKEND = "triton" if DEVICE.type == "cuda" else "reference"
TIMES = ("tokens_per_s", "memory_gib")
AWAY = {INPUT: OFFLOAD, "attn": OFFLOAD, "mid": OFFLOAD, "qkv": SAVE}


@pytest.fixture(autouse=True)
def _backend():
    with backend.using(BACKEND):
        yield


def words():
    """A tokenizer of 97 words, w0 to w96."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return words


@functools.cache  # training changes neither
def make():
    model_type, overrides = VERSIONS["smollm2"]
    model, params = ours(judge(model_type, **overrides))
    return dataclasses.replace(model, tokenizer=Tokenizer(words())), params


def rows(count=30):
    """Examples of different lengths."""

    def text(i, n):
        return " ".join(f"w{(7 * i + 3 * j) % 97}" for j in range(n))

    return [{"prompt": text(i, 2 + i % 3) + " ", "completion": text(i + 5, 3 + i % 7)} for i in range(count)]


# ---- the step


def gradients_only():
    """An optimizer that changes nothing: the step returns the gradients in place of the adapters."""
    return optim.Optimizer(lambda params: (), lambda grads, state, params, *, clip, donate: (grads, state))


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("policy", [None, {}], ids=["default", "recompute"])
def test_accumulated_gradients_are_those_of_one_batch(parts, policy):
    model, params = make()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (10,), generator=generator).tolist()  # microbatches with few and with many targets
    examples = [(torch.randint(0, 97, (n,), generator=generator).tolist(), None) for n in lengths]
    batch = lambda some: Batch.of(some, vocab_size=97, tokens=80, segments=12).to(DEVICE)  # noqa: E731
    adapters = tree.map(lambda t: t + 0.05, lora.init(random.key(0), params, rank=2))

    def one_batch(dtype, device=DEVICE):
        base, start = (tree.map(lambda x: x.to(device, dtype), t) for t in (params, adapters))
        with backend.using("reference"):
            found = value_and_grad(lambda t: model.loss(lora.adapt(base, t), batch(examples))[0])(start)
        return tree.map(lambda x: x.to(DEVICE), found)

    # What one fp32 run errs is made before the sum, and much of it is luck: of layer 0's down_proj.a PyTorch is 2.7 to
    # 4.5 units of its largest entry off on an H100, in whatever parts it adds, and 12 on a CPU. The worse counts.
    loss64, grads64 = one_batch(torch.float64)
    devices = {DEVICE, torch.device("cpu")}
    (loss32, grads32), *others = [one_batch(torch.float32, device) for device in devices]
    worse = lambda t64, *ways: max(ways, key=lambda t: float((t.double() - t64).abs().max()))  # noqa: E731
    loss32 = worse(loss64, loss32, *[loss for loss, _ in others])
    grads32 = tree.map(worse, grads64, grads32, *[grads for _, grads in others])
    step = make_step(model, params, gradients_only(), max_norm=None, policy=policy)
    grads, state, metrics = step(adapters, (), [batch(examples[i::parts]) for i in range(parts)])
    assert state == () and float(metrics["targets"]) == sum(lengths) - len(lengths)
    assert_op_rule(metrics["loss"], loss32, loss64, "loss")
    norm = math.sqrt(sum(float(g.square().sum()) for g in tree.leaves(grads64)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    for (path, g), g32, g64 in zip(tree.items(grads), tree.leaves(grads32), tree.leaves(grads64), strict=True):
        assert_op_rule(g, g32, g64, path)


@pytest.mark.parametrize("factor, clipped", [(0.5, True), (2.0, False), (float("inf"), False), (None, False)])
def test_clipping_by_the_norm_of_the_whole_gradient(factor, clipped):
    model, params = make()
    batch = lambda ids: Batch.of([(ids, None)], vocab_size=97, tokens=16, segments=3).to(DEVICE)  # noqa: E731
    batches = [batch([1, 5, 7, 2]), batch([9, 4, 4])]
    adapters = lora.init(random.key(0), params, rank=2)
    seen = []

    def update(grads, state, params, *, clip, donate):
        seen.append(clip)
        return params, state

    spy = optim.Optimizer(lambda params: (), update)
    _, _, metrics = make_step(model, params, spy, max_norm=None, policy=None)(adapters, (), batches)
    assert seen == [None]
    norm = float(metrics["grad_norm"])
    if factor is not None:
        make_step(model, params, spy, max_norm=factor * norm, policy=None)(adapters, (), batches)
        assert float(seen[1]) == pytest.approx(factor if clipped else 1.0, rel=1e-4)


def test_evaluation_weighs_every_target_alike():
    model, params = make()
    examples = [([1, 2, 3, 4, 5, 6, 7], None), ([9, 8], None), ([5, 5, 5], None)]
    batch = lambda some: Batch.of(some, vocab_size=97, tokens=16, segments=4).to(DEVICE)  # noqa: E731
    one = train.evaluate(model, params, [batch(examples)])
    three = train.evaluate(model, params, [batch([e]) for e in examples])
    assert isinstance(one, float) and one == pytest.approx(three, rel=1e-5)
    assert one == pytest.approx(float(model.loss(params, batch(examples))[0]), rel=1e-6)


# ---- a whole run

RUN = {
    "rank": 2, "targets": ["q_proj", "down_proj"], "tokens": 48, "steps": 7, "accumulate": 2, "lr": 1e-2, "warmup": 2,
    "eval_fraction": 0.2, "eval_every": 3, "save_every": 2, "seed": 1, "weight_decay": 0.1,
}  # fmt: skip


def run(output, model=None, examples=None, **more):
    model, params = model or make()
    return finetune(model, params, examples or rows(), progress=False, output=str(output), **{**RUN, **more})


def without_times(history):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in history]


def rows_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a, b, output_a, output_b):
    """Adapters, optimizer states and metrics, to the bit."""
    for (path, x), (_, y) in zip(tree.items(a[0]), tree.items(b[0]), strict=True):
        assert torch.equal(x, y), path
    histories = [without_times(h) for h in (a[1], b[1], rows_of(output_a), rows_of(output_b))]
    assert histories[0] == histories[1] == histories[2] == histories[3]
    files = lambda folder: {p.relative_to(folder): p for p in folder.rglob("*.safetensors")}  # noqa: E731
    assert files(output_a).keys() == files(output_b).keys() and len(files(output_a)) == 3  # the adapter, 2 checkpoints
    for name, file in files(output_a).items():
        first, second = load_file(file), load_file(output_b / name)
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole")
    with backend.using(BACKEND):
        return run(output), output


def test_a_run_writes_what_it_promises(whole):
    (adapters, history), output = whole
    found = sorted(p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file())
    assert found == [
        "adapter_config.json", "adapter_model.safetensors",
        *(f"checkpoints/step-0000000{n}/state.{kind}" for n in (4, 6) for kind in ("json", "safetensors")),
        "loss.png", "metrics.jsonl", "run.toml",
    ]  # fmt: skip
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert rows_of(output) == history and [row["step"] for row in history] == list(range(1, 8))
    for row in history:
        assert {"step", "loss", "lr", "grad_norm", "targets", *TIMES} == row.keys() - {"eval_loss"}
        assert all(isinstance(row[k], float) and row[k] > 0 for k in row if k != "step")
    assert [row["step"] for row in history if "eval_loss" in row] == [3, 6, 7]
    rate = optim.linear(1e-2, 7, 2)
    assert [row["lr"] for row in history] == [float(rate(torch.tensor(i))) for i in range(7)]
    assert Options(**Options.from_toml(output / "run.toml")) == Options(output=str(output), **RUN)
    _, params = make()
    for a, b in zip(tree.leaves(lora.load(output, params)), tree.leaves(adapters), strict=True):
        assert torch.equal(a, b)
    assert len(adapters) == 4 and all(v.a.shape[0] == 2 for v in adapters.values())


def test_the_same_options_give_the_same_bits_and_another_seed_others(whole, tmp_path):
    first, output = whole
    options = {**Options.from_toml(output / "run.toml"), "output": tmp_path / "a"}
    again = finetune(*make(), rows(), progress=False, **options)
    assert_same_run(first, again, output, tmp_path / "a")
    assert run(tmp_path / "b", seed=2)[1][0]["loss"] != first[1][0]["loss"]


def test_training_learns_its_examples(tmp_path):
    model, params = make()
    adapters, history = run(tmp_path, examples=rows(4), targets="all-linear", steps=20, lr=3e-2, eval_fraction=0.0)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"] and not any("eval_loss" in row for row in history)
    batch = train.data.batches(rows(4), model.tokenizer, tokens=48, device=DEVICE)[0]
    losses = [train.evaluate(model, p, [batch]) for p in (params, lora.adapt(params, adapters))]
    assert losses[1] < 0.5 * losses[0]


@pytest.mark.parametrize("policy", [{}, {"qkv": SAVE, "attn": SAVE, "norm1": SAVE}])
def test_a_policy_changes_no_bits(policy, whole, tmp_path):
    model, params = make()
    result = finetune(model, params, rows(), policy=policy, progress=False, output=tmp_path, **RUN)
    assert_same_run(whole[0], result, whole[1], tmp_path)


def test_a_finished_run_is_finished_again_from_its_last_checkpoint(whole, tmp_path, monkeypatch):
    run(tmp_path)
    steps = count_steps(monkeypatch)
    assert_same_run(whole[0], run(tmp_path), whole[1], tmp_path)
    assert len(steps) == 1


def test_a_finished_run_without_a_checkpoint_is_not_replaced(tmp_path):
    first = run(tmp_path, steps=1)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"finetune: .*adapter_model.safetensors is there already, .*resume=False"):
        run(tmp_path, steps=1, lr=1e-3)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    again = run(tmp_path, steps=1, resume=False)
    assert without_times(again[1]) == without_times(first[1])


# ---- killed and resumed


class Killed(BaseException):
    """What no ``except Exception`` may swallow."""


def count_steps(monkeypatch):
    """A list that grows with every step that runs."""
    real, steps = train.make_step, []

    def counting(*args, **kwargs):
        step = real(*args, **kwargs)

        def counted(*arguments):
            steps.append(1)
            return step(*arguments)

        return counted

    monkeypatch.setattr(train, "make_step", counting)
    return steps


def kill_in(monkeypatch, name, call, after=False):
    """The call-th call of a function in train.py kills the run; ``after``: when it has done its work."""
    owner, _, attribute = name.rpartition(".")
    owner = {"": train, "checkpoint": checkpoint, "lora": lora, "json": json}[owner]
    real, calls = getattr(owner, attribute), []

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) != call:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(owner, attribute, killing)


KILLS = [  # where, at which of its calls, the steps that are left to do
    ("step", 1, 7), ("step", 2, 7), ("step", 3, 5), ("step", 4, 5), ("step", 7, 1),
    ("checkpoint.save", 1, 7), ("checkpoint.save", 2, 5),
    ("evaluate", 1, 5), ("evaluate", 3, 1), ("lora.save", 1, 1), ("plot_loss", 1, 1), ("_rewrite_metrics", 1, 7),
]  # fmt: skip


@pytest.mark.parametrize("where, call, left", KILLS)
def test_killed_and_resumed_equals_never_killed(where, call, left, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if where == "step":
            real = train.make_step
            steps = []

            def make_step(*args, **kwargs):
                step = real(*args, **kwargs)

                def killing(*arguments):
                    steps.append(1)
                    if len(steps) == call:
                        raise Killed
                    return step(*arguments)

                return killing

            patch.setattr(train, "make_step", make_step)
        else:
            kill_in(patch, where, call)
        run(tmp_path)
    steps = count_steps(monkeypatch)
    assert_same_run(whole[0], run(tmp_path), whole[1], tmp_path)
    assert len(steps) == left
    assert not list(tmp_path.rglob(".*"))  # nothing temporary is left


def test_a_run_with_8_bit_states_resumes_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(optim.blockwise, "LEAST", 1)  # so that the leaves of a tiny model are stored so
    whole = run(tmp_path / "whole", optimizer_states="8bit")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, "checkpoint.save", 2)
        run(tmp_path / "killed", optimizer_states="8bit")
    assert_same_run(whole, run(tmp_path / "killed", optimizer_states="8bit"), tmp_path / "whole", tmp_path / "killed")
    saved = load_file(next((tmp_path / "whole" / "checkpoints").iterdir()) / "state.safetensors")
    assert torch.uint8 in {t.dtype for t in saved.values()}
    with pytest.raises(ValueError, match="was made with another optimizer_states"):
        run(tmp_path / "whole", optimizer_states="fp32")


def test_killed_again_and_again(whole, tmp_path, monkeypatch):
    for call in (4, 3, 2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_in(patch, "json.dumps", 2 * call)  # of a row, of a checkpoint
            run(tmp_path)
    assert_same_run(whole[0], run(tmp_path), whole[1], tmp_path)


def test_half_a_row_of_metrics_does_no_harm(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, "checkpoint.save", 2, after=True)
        run(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    assert_same_run(whole[0], run(tmp_path), whole[1], tmp_path)


SCRIPT = """
import json, os, signal, sys
import torch
from unsloth_core import backend, train
from unsloth_core.load import load

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True, warn_only=True)
folder, output, device, name, options, examples = json.loads(sys.argv[1])
evaluate = train.evaluate
def killing(*args, **kwargs):
    calls.append(1)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(*args, **kwargs)
calls, train.evaluate = [], killing
with backend.using(name):
    model, params = load(folder, device=device, dtype=torch.float32)
    train.finetune(model, params, examples, progress=False, output=output, **options)
"""


def test_a_killed_process_resumes_to_the_same_bits(tmp_path):
    model_type, overrides = VERSIONS["smollm2"]
    judge(model_type, **overrides).save_pretrained(tmp_path / "model")
    words().save(str(tmp_path / "model" / "tokenizer.json"))
    folder, killed, never = str(tmp_path / "model"), tmp_path / "killed", tmp_path / "never"
    arguments = json.dumps([folder, str(killed), str(DEVICE), BACKEND, RUN, rows()])
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])},
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(rows_of(killed)) == 5 and not (killed / "adapter_config.json").exists()  # in the evaluation of step 6
    newest = checkpoint.newest(killed / "checkpoints")
    assert newest is not None and newest.name == "step-00000004"
    results = [run(output, model=load(folder, device=DEVICE, dtype=torch.float32)) for output in (killed, never)]
    assert_same_run(*results, killed, never)


# ---- other runs, and starting over


@pytest.mark.parametrize(
    "more, changed",
    [
        ({"lr": 2e-2}, "lr"),
        ({"rank": 3}, "rank"),
        ({"targets": "all-linear"}, "targets"),
        ({"steps": 8, "seed": 2}, "data and seed and steps and total_steps"),
        ({"examples": rows(29)}, "data"),
        ({"tokens": 64}, "tokens"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(more, changed, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, "checkpoint.save", 1, after=True)
        run(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=f"step-00000002 was made with another {changed}; choose another output"):
        run(tmp_path, **more)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert_same_run(whole[0], run(tmp_path), whole[1], tmp_path)


def test_the_same_tokens_cut_otherwise_are_other_data(tmp_path, monkeypatch):
    text = [{"text": " ".join(f"w{i}" for i in range(n))} for n in (8, 8)]
    joined = [{"text": " ".join(f"w{i}" for i in range(8))}, {"text": "w0 w1 w2 w3"}, {"text": "w4 w5 w6 w7"}]
    options = {"eval_fraction": 0.0, "train_on": "all", "steps": 5}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, "checkpoint.save", 1, after=True)
        run(tmp_path, examples=text, **options)
    with pytest.raises(ValueError, match="another data"):
        run(tmp_path, examples=joined, **options)


def test_another_model_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, "checkpoint.save", 1, after=True)
        run(tmp_path)
    model, params = make()
    with pytest.raises(ValueError, match="was made with another model"):
        run(tmp_path, model=(model, tree.map(lambda t: t.to(torch.bfloat16), params)))
    with pytest.raises(ValueError, match="was made with another model"):
        run(tmp_path, model=(dataclasses.replace(model, source="elsewhere"), params))


def test_a_checkpoint_without_its_metrics_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, "checkpoint.save", 1, after=True)
        run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="metrics.jsonl has 0 rows, but the checkpoint is of step 2"):
        run(tmp_path)


def test_starting_over_forgets_the_old_run(whole, tmp_path, monkeypatch):
    run(tmp_path, lr=1e-3, steps=20)  # leaves checkpoints of steps 16 and 18
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, "checkpoint.save", 2, after=True)
        run(tmp_path, resume=False)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    steps = count_steps(monkeypatch)
    assert_same_run(whole[0], run(tmp_path), whole[1], tmp_path)
    assert len(steps) == 3


# ---- options


def test_steps_follow_from_the_data(tmp_path):
    _, history = run(tmp_path / "a", steps=None, epochs=2, accumulate=1)
    _, halved = run(tmp_path / "b", steps=None, epochs=2, accumulate=2)
    assert len(history) // 2 == len(halved) > 1
    _, one = run(tmp_path / "c", steps=None, accumulate=50)  # fewer batches than a step wants: some are used again
    assert len(one) == 1


@pytest.mark.parametrize("schedule", train.SCHEDULES)
def test_schedules(schedule, tmp_path):
    _, history = run(tmp_path, schedule=schedule, steps=4, warmup=9, lr=1)  # warmup ends before the run does
    assert history[0]["lr"] == (1.0 if schedule == "constant" else pytest.approx(1 / 3))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rate": 1e-3}, "finetune: unknown option 'learning_rate', expected the fields of Options"),
        ({"schedule": "step"}, r"finetune: schedule is 'step', expected one of \('constant', 'linear', 'cosine'\)"),
        ({"rank": 0}, "finetune: rank is 0, expected at least 1"),
        ({"rank": "8"}, "finetune: rank is '8', expected int"),
        ({"rank": 8.0}, "finetune: rank is 8.0, expected int"),
        ({"rank": True}, "finetune: rank is True, expected int"),
        ({"steps": 0}, "finetune: steps is 0, expected at least 1"),
        ({"steps": "all"}, "finetune: steps is 'all', expected int or None"),
        ({"epochs": 0}, "epochs is 0, expected at least 1"),
        ({"accumulate": -1}, "accumulate is -1, expected at least 1"),
        ({"save_every": 0}, "save_every is 0, expected at least 1"),
        ({"tokens": None}, "tokens is None, expected int"),
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0, expected 0 <= eval_fraction < 1"),
        ({"max_norm": 0}, "max_norm is 0, expected more than 0"),
        ({"max_norm": float("nan")}, "max_norm is nan, expected more than 0"),
        ({"alpha": 0}, "alpha is 0, expected a number above 0"),
        ({"alpha": float("nan")}, "alpha is nan, expected a number above 0"),
        ({"warmup": -1}, "warmup is -1, expected at least 0"),
        ({"lr": "fast"}, "lr is 'fast', expected float"),
        ({"lr": -1.0}, "finetune: lr is -1.0, expected a number of at least 0"),
        ({"lr": float("nan")}, "finetune: lr is nan, expected a number of at least 0"),
        ({"optimizer_states": "4bit"}, "finetune: optimizer_states is '4bit', expected one of .'fp32'"),
        ({"weight_decay": -0.1}, "finetune: weight_decay is -0.1, expected a number of at least 0"),
        ({"tokens": 1}, "finetune: tokens is 1, expected at least 2"),
        ({"targets": 3}, r"targets is 3, expected str or list\[str\]"),
        ({"targets": ["nothing"]}, r"targets \['nothing'\] are not among the model's linears"),
        ({"train_on": "answers"}, "finetune: train_on is 'answers', expected 'responses' or 'all'"),
        ({"output": 3}, "output is 3, expected str"),
        ({"examples": [{"txt": "w1"}]}, r"example 0: fields \['txt'\], expected one of"),
    ],
)
def test_bad_options(options, message, tmp_path):
    model, params = make()
    examples = options.pop("examples", rows(5))
    with pytest.raises(ValueError, match=message):
        finetune(model, params, examples, progress=False, **{"output": str(tmp_path / "out"), **options})
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverges_stops_and_keeps_what_was_there(tmp_path, monkeypatch):
    model, params = make()
    options = {"output": str(tmp_path), "save_every": 1, "steps": 3, "progress": False}
    finetune(model, params, rows(5), **options)
    adapter = (tmp_path / "adapter_model.safetensors").read_bytes()
    norm = optim.global_norm
    calls = iter((1.0, float("nan")))
    monkeypatch.setattr(optim, "global_norm", lambda grads: norm(grads) * next(calls))
    with pytest.raises(ValueError, match=r"finetune: at step 2 the loss is \d.* the gradient's norm nan: "):
        finetune(model, params, rows(5), **options, resume=False)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == adapter
    assert [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_full_disk_leaves_the_options_of_the_last_run(tmp_path, monkeypatch):
    model, params = make()
    finetune(model, params, rows(5), output=str(tmp_path), steps=1, progress=False)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()}

    def half(self, text, encoding=None):
        self.write_bytes(text.encode()[: len(text) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        finetune(model, params, rows(5), output=str(tmp_path), steps=1, rank=2, progress=False, resume=False)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.is_file()} == before


def test_a_model_without_tokenizer_is_refused(tmp_path):
    model, params = make()
    with pytest.raises(ValueError, match="finetune: this model has no tokenizer"):
        finetune(dataclasses.replace(model, tokenizer=None), params, rows(), output=tmp_path)


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    model, params = make()
    bigger = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    bigger.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = dataclasses.replace(model, tokenizer=Tokenizer(bigger))
    with pytest.raises(ValueError, match=r"example 0: token id 150, expected an id in \[0, 97\)"):
        finetune(model, params, [{"text": "w1 w2 w150"}], progress=False, output=str(tmp_path))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)


@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "output": TEXT, "rank": st.integers(1, 2**70), "alpha": st.none() | POSITIVE | st.integers(1, 99),
            "rslora": st.booleans(), "targets": TEXT | st.lists(TEXT, max_size=3), "lr": POSITIVE | st.just(1),
            "schedule": st.sampled_from(train.SCHEDULES), "max_norm": POSITIVE | st.just(math.inf),
            "steps": st.none() | st.integers(1), "seed": st.integers(),
            "eval_fraction": st.floats(0, 1, exclude_max=True),
        },
    )
)  # fmt: skip
def test_options_survive_a_file(options, tmp_path_factory):
    file = tmp_path_factory.mktemp("toml") / "run.toml"
    made = Options(**options)
    file.write_text(made.to_toml(), "utf-8")
    read = Options.from_toml(file)
    assert Options(**read) == made
    assert read.keys() == {k for k, v in dataclasses.asdict(made).items() if v is not None}


def test_other_kinds_of_paths_and_sequences_are_taken(tmp_path):
    options = Options(output=tmp_path / "a", targets=("q_proj", "v_proj"))
    assert options == Options(output=str(tmp_path / "a"), targets=["q_proj", "v_proj"])
    assert json.loads(json.dumps(dataclasses.asdict(options)))["targets"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("ranks = 3", "unknown option 'ranks', expected one of .*'rank'"),
        ("[finetune]\nrank = 3", "unknown option 'finetune'"),
        ("rank = '3'", "rank is '3', expected int"),
        ("rank = 3.0", "rank is 3.0, expected int"),
        ("rslora = 1", "rslora is 1, expected bool"),
        ("lr = true", "lr is True, expected float"),
        ("targets = 3", r"targets is 3, expected str or list\[str\]"),
        ("rank = ", "Invalid value"),
        (b"output = '\xff'", "'utf-8' codec can't decode"),
    ],
)
def test_option_files_that_are_refused(text, message, tmp_path):
    file = tmp_path / "run.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=f"run.toml: {message}"):
        Options.from_toml(file)


def test_a_picture_of_any_history(tmp_path):
    for n, history in enumerate(
        [
            [{"step": 1, "loss": 2.0}],
            [{"step": i + 1, "loss": 3.0 - i / 100, **({"eval_loss": 1.0} if i % 9 == 0 else {})} for i in range(100)],
            [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}],
        ]
    ):
        train.plot_loss(history, tmp_path / f"{n}.png")
        assert (tmp_path / f"{n}.png").read_bytes().startswith(b"\x89PNG")


# ---- dropout of the adapters' inputs


def dropped_out(policy=None, p=0.5, seed=1, steps=2, key=True):
    """Adapters and losses after some steps of two microbatches each, all of the same tokens."""
    model, params = make()
    batch = Batch.of([(list(range(20)), None)], vocab_size=97, tokens=24, segments=2).to(DEVICE)
    adapters = tree.map(lambda t: t + 0.1, lora.init(random.key(0), params, rank=2))
    optimizer = optim.adamw(0.0)
    state = optimizer.init(adapters)
    masks = random.key(seed) if key else None
    step = make_step(model, params, optimizer, max_norm=None, policy=policy, dropout=p, key=masks)
    seen = []
    for batches in [[batch]] * steps + [[batch, batch]]:
        adapters, state, metrics = step(adapters, state, batches)
        seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return seen


def test_masks_are_those_of_key_step_and_microbatch():
    plain, seen = dropped_out(p=0.0), dropped_out()
    assert plain == dropped_out(p=0.0, key=False) and plain[0] == plain[1]
    assert len({loss for loss, _ in seen}) == 3  # another mask in every step; the parameters stay
    assert seen[2][0] != dropped_out(steps=3)[2][0]  # half of it is of another microbatch's mask
    assert seen == dropped_out() and seen != dropped_out(seed=2)
    assert seen[0] != plain[0]


@pytest.mark.parametrize("policy", [{"qkv": SAVE, "attn": SAVE}, AWAY, {}], ids=["saved", "offload", "recompute"])
def test_what_is_recomputed_has_the_same_masks(policy):
    with backend.using("triton" if DEVICE.type == "cuda" else "reference"):
        assert dropped_out(policy, steps=1) == dropped_out(dict.fromkeys(make()[0].family.SAVED, SAVE), steps=1)


def test_a_run_with_dropout_goes_on_with_the_same_masks(tmp_path):
    whole = run(tmp_path / "a", dropout=0.3)
    assert without_times(whole[1]) != without_times(run(tmp_path / "b")[1])
    folder = tmp_path / "c"
    shutil.copytree(tmp_path / "a", folder)
    last = sorted((folder / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)
    (folder / "adapter_model.safetensors").unlink()
    again = run(folder, dropout=0.3)
    for (path, x), (_, y) in zip(tree.items(whole[0]), tree.items(again[0]), strict=True):
        assert torch.equal(x, y), path


def test_dropout_is_refused_without_a_key_and_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="make_step: dropout is 0.5, but no key was given"):
        dropped_out(key=False)
    with pytest.raises(ValueError, match="finetune: dropout is 1.0, expected 0 <= dropout < 1"):
        run(tmp_path, dropout=1.0)


# ---- the step as a CUDA graph

needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs are recorded and replayed by a GPU alone")


def some_batches(count):
    """Microbatches of two or three static shapes: few and many targets, short and long segments."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        lengths = [2, 3, 2] if i % 3 == 1 else [9, 7, 8, 6, 5]
        examples = [(torch.randint(0, 97, (n,), generator=generator).tolist(), None) for n in lengths]
        found.append(Batch.of(examples, vocab_size=97, tokens=40, segments=8).to(DEVICE))
    return found


def train_on(groups, *, capture, policy=None, quantize=None, state_dtype=torch.float32):
    """Adapters, states and metrics after a step per group of microbatches; the step itself."""
    model_type, overrides = VERSIONS["smollm2"]
    model, params = ours(judge(model_type, **overrides), quantize=quantize)
    adapters = tree.map(lambda t: t + 0.02, lora.init(random.key(0), params, rank=2))
    optimizer = optim.adamw(optim.cosine(1e-2, 20, 3), weight_decay=0.1, state_dtype=state_dtype)
    state = optimizer.init(adapters)
    step = make_step(model, params, optimizer, max_norm=0.5, policy=policy, capture=capture)
    metrics = []
    for group in groups:
        adapters, state, found = step(adapters, state, group)
        metrics.append(found)
    return (adapters, state, metrics), step


@needs_cuda
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("policy", [None, {}, AWAY], ids=["default", "recompute", "offload"])
@pytest.mark.parametrize("state_dtype", [torch.float32, "8bit"], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_captured_step_gives_the_same_bits(accumulate, state_dtype, policy, quantize, monkeypatch):
    monkeypatch.setattr(optim.blockwise, "LEAST", 1)
    batches = some_batches(14)
    groups = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    options = {"policy": policy, "quantize": quantize, "state_dtype": state_dtype}
    plain, _ = train_on(groups, capture=False, **options)
    captured, step = train_on(groups, capture=True, **options)
    assert step.graphs >= 2
    for (path, a), (_, b) in zip(tree.items(captured), tree.items(plain), strict=True):
        assert torch.equal(a, b), path


@pytest.mark.skipif(DEVICE.type != "cuda", reason="PyTorch counts the memory of a GPU alone")
@pytest.mark.parametrize("captured", [False, True])
def test_memory_does_not_grow_from_step_to_step(captured):
    batches = some_batches(9)
    model_type, overrides = VERSIONS["smollm2"]
    model, params = ours(judge(model_type, **overrides))
    adapters = lora.init(random.key(0), params, rank=2)
    optimizer = optim.adamw(1e-3)
    state = optimizer.init(adapters)
    step = make_step(model, params, optimizer, max_norm=1.0, policy=None, capture=captured)
    seen = []
    for _ in range(4):
        for batch in batches:
            adapters, state, _ = step(adapters, state, [batch])
        torch.cuda.synchronize()
        time.sleep(0.05)  # autograd's thread hands its result over before it lets go of the last gradients
        stats = torch.cuda.memory_stats()
        names = ("allocated_bytes.all.current", "reserved_bytes.all.current", "allocated_bytes.all.peak")
        seen.append([stats[name] for name in names])
    assert seen[1] == seen[2] == seen[3]


@needs_cuda
def test_a_captured_run_is_an_uncaptured_one(whole, tmp_path):
    assert_same_run(whole[0], run(tmp_path, capture=False), whole[1], tmp_path)


@needs_cuda
def test_a_captured_step_refuses_other_tensors():
    batch = some_batches(1)
    (adapters, state, _), step = train_on([batch, batch], capture=True)
    with pytest.raises(ValueError, match="capture: adapters or state are not the tensors of the first step"):
        step(tree.map(torch.clone, adapters), state, batch)


class Recorded:
    """In place of a CUDA graph, where there is none: replaying runs the step again."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1

    def pool(self):
        return "pool"


class Counter:
    """A step that adds up what it sees, in place."""

    def __init__(self):
        self.calls = 0

    def __call__(self, adapters, state, microbatches):
        self.calls += 1
        state += sum(batch.tokens_N.sum() for batch in microbatches)
        return adapters, state, {"targets": sum(batch.count for batch in microbatches)}


def counted(monkeypatch, step, **options):
    """``Captured(step)`` with graphs that hold nothing, on any device."""
    graphs = []

    @contextlib.contextmanager
    def recording(graph, pool, stream):
        assert pool == ("pool" if graphs else None)
        graphs.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(capture.Captured, "_beside", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(capture.Captured, "_check", lambda self, adapters, state: adapters.device)
    captured = capture.Captured(step, **options)
    captured._addresses = [t.data_ptr() for t in state_of(captured)]
    return captured, graphs


ADAPTERS, STATE = torch.zeros(2, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)


def state_of(_):
    return ADAPTERS, STATE


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted\nwhen capturing"), torch.OutOfMemoryError("no")]
)
def test_what_cannot_be_recorded_runs_as_ever(monkeypatch, error):
    """In the second step of a shape, which would be recorded; or, for want of memory, in the first of another shape."""
    step = Counter()
    captured, _ = counted(monkeypatch, step, strict=False)
    short, long = some_batches(2)[1], some_batches(1)[0]
    captured(ADAPTERS, STATE, [long])
    last = long
    if isinstance(error, torch.OutOfMemoryError):
        captured(ADAPTERS, STATE, [long])
        last = short

    def fails(*args):
        captured.step = step
        raise error

    captured.step, before, calls = fails, STATE.clone(), step.calls
    with pytest.warns(UserWarning, match="^capture: .*; steps run one by one from here on$"):
        captured(ADAPTERS, STATE, [last])
    captured(ADAPTERS, STATE, [long])
    assert step.calls == calls + 2 and captured.graphs == 0
    assert STATE - before == last.tokens_N.sum() + long.tokens_N.sum()
    strict, _ = counted(monkeypatch, fails)
    with pytest.raises(type(error)):
        strict(ADAPTERS, STATE, [long])


@needs_cuda
def test_a_step_that_waits_for_the_device_runs_as_ever():
    model, params = make()
    optimizer, batches = optim.adamw(1e-2), some_batches(4)
    results = []
    for strict in (None, False):
        adapters = tree.map(lambda t: t + 0.02, lora.init(random.key(0), params, rank=2))
        state = optimizer.init(adapters)
        plain = make_step(model, params, optimizer, max_norm=None, policy=None)

        def waits(adapters, state, batches, plain=plain):
            adapters, state, metrics = plain(adapters, state, batches)
            return adapters, state, {"loss": metrics["loss"] + float(metrics["loss"])}

        step = waits if strict is None else capture.Captured(waits, strict=strict)
        with (
            contextlib.nullcontext() if strict is None else pytest.warns(UserWarning, match="capture: the step cannot")
        ):
            for batch in batches:
                adapters, state, metrics = step(adapters, state, [batch])
        results.append((adapters, state, metrics))
    for (path, a), (_, b) in zip(*map(tree.items, results), strict=True):
        assert torch.equal(a, b), path


@needs_cuda
def test_a_run_is_captured_unless_it_is_told_not_to_be(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(train, "Captured", lambda step, **options: made.append(options) or step)
    run(tmp_path / "a")
    run(tmp_path / "b", capture=False)
    run(tmp_path / "c", capture=True)
    assert made == [{"strict": False}, {"strict": True}]


def test_a_graph_for_every_shape_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(capture, "MOST", 2)
    step = Counter()
    captured, graphs = counted(monkeypatch, step)
    short, long, other = some_batches(2)[1], some_batches(1)[0], some_batches(3)[2].to(DEVICE)
    other = dataclasses.replace(other, max_position=128)
    sequence = [[long], [short], [long], [long], [short], [other], [other], [other], [long]]
    for group in sequence:
        _, _, metrics = captured(ADAPTERS, STATE, group)
    # Eager once and recorded once for each of two shapes; the third has no room and runs as ever.
    assert step.calls == 4 + 3 and captured.graphs == 2 and [g.replays for g in graphs] == [3, 1]
    assert float(metrics["targets"]) == float(long.count)


def test_buffers_hold_the_batch_that_is_replayed(monkeypatch):
    captured, _ = counted(monkeypatch, Counter())
    first, second = some_batches(4)[0], some_batches(4)[3]
    for batch in (first, first, second):
        captured(ADAPTERS, STATE, [batch])
    (recording,) = captured._recordings.values()
    for (path, a), b in zip(tree.items(recording.microbatches[0]), tree.leaves(second), strict=True):
        assert torch.equal(a, b), path
    assert not torch.equal(first.tokens_N, second.tokens_N)


def test_a_step_that_is_not_in_place_is_refused(monkeypatch):
    captured, _ = counted(monkeypatch, lambda adapters, state, microbatches: (adapters + 1, state, {}))
    with pytest.raises(ValueError, match="capture: the step returned new tensors for adapters or state"):
        captured(ADAPTERS, STATE, some_batches(1))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the error of a machine without a GPU")
def test_capture_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="make_step: capture, but the weights are on cpu, expected cuda"):
        run(tmp_path / "a", capture=True)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="capture: adapters or state are on cpu, expected cuda"):
        capture.Captured(Counter())(ADAPTERS, STATE, some_batches(1))
