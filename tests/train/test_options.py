"""Options of a run: bad ones are refused by name, and a file gives back those that were written to it."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import make, rows, run

from unsloth_core import train
from unsloth_core.train import Options, finetune

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)


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
        ({"rank": {}}, "finetune: rank is {}, expected at least 1"),
        ({"rank": {"q_proj": 8, "v_proj": 0}}, "finetune: rank is {'q_proj': 8, 'v_proj': 0}, expected at least 1"),
        ({"rank": {"nothing": 8}}, r"rank names \['nothing'\], but the model's linears are"),
        ({"rank": "8"}, r"finetune: rank is '8', expected int or dict\[str, int\]"),
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


@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            "output": TEXT, "rank": st.integers(1, 2**70) | st.dictionaries(TEXT, st.integers(1, 99), min_size=1),
            "alpha": st.none() | POSITIVE | st.integers(1, 99),
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


def test_ranks_by_name_adapt_those_alone(tmp_path):
    lora, _ = run(tmp_path, steps=2, targets="all-linear", rank={"v_proj": 3, "down_proj": 2}, alpha=6, rslora=True)
    assert {path.rpartition(".")[2]: len(one.a) for path, one in lora.items()} == {"v_proj": 3, "down_proj": 2}
    assert {one.scale for one in lora.values()} == {6 / math.sqrt(3), 6 / math.sqrt(2)}
    assert "rank = { " in (tmp_path / "run.toml").read_text()


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
