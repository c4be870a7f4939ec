"""A run that was killed ends with the bits of one that was not; the checkpoint of another run is refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oprule import DEVICE
from safetensors.torch import load_file
from tiny import VERSIONS, judge
from tiny_run import BACKEND, RUN, Killed, assert_same_run, count_steps, kill_in, make, rows, rows_of, run, words

from unsloth_core import checkpoint, optim, train, tree
from unsloth_core.load import load

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
        [sys.executable, "-c", SCRIPT, arguments], cwd=Path(__file__).parents[2], capture_output=True, text=True,
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
