"""A run writes what it promises, learns its examples, and replaces nothing that it was not told to."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import tokenizers
import torch
from oprule import DEVICE
from tiny_run import RUN, TIMES, assert_same_run, count_steps, make, rows, rows_of, run, without_times

from unsloth_core import lora, optim, train, tree
from unsloth_core.autodiff import SAVE
from unsloth_core.tokenizer import Tokenizer
from unsloth_core.train import Options, finetune


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


def test_a_warning_where_examples_pass_the_context(tmp_path):
    model, params = make()
    config = dataclasses.replace(model.config, max_position_embeddings=20)
    short = (dataclasses.replace(model, config=config), params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "a", model=short, steps=1, examples=rows(5))
    with pytest.warns(UserWarning, match=r"^finetune: examples of up to 22 tokens exceed the model's context of 20 "):
        run(tmp_path / "b", model=short, steps=1, examples=[*rows(5), {"text": "w1 " * 22}])


def test_models_that_are_none_or_have_no_tokenizer_are_refused(tmp_path):
    model, params = make()
    with pytest.raises(ValueError, match="finetune: model is a Weights, expected a Model: model, params = "):
        finetune(params, model, rows(), output=tmp_path)
    with pytest.raises(ValueError, match="finetune: this model has no tokenizer"):
        finetune(dataclasses.replace(model, tokenizer=None), params, rows(), output=tmp_path)


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    model, params = make()
    bigger = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    bigger.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model = dataclasses.replace(model, tokenizer=Tokenizer(bigger))
    with pytest.raises(ValueError, match=r"example 0: token id 150, expected an id in \[0, 97\)"):
        finetune(model, params, [{"text": "w1 w2 w150"}], progress=False, output=str(tmp_path))


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
