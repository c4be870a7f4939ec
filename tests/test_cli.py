"""The command line from end to end on a tiny model: files, resuming to the same bits, streaming, one-line errors."""

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_folder import write_folder
from typer.testing import CliRunner

import unsloth_core as uc
from unsloth_core import checkpoint, cli
from unsloth_core.train import Options

ROOT = Path(__file__).parents[1]
SMALL = ("--rank", "2", "--tokens", "128", "--lr", "0.01", "--save-every", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    file = tmp_path_factory.mktemp("examples") / "train.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]}
        for i in range(12)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def whole(model, examples, tmp_path_factory):
    """The output of a run of seven steps that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    done = finetune(model, examples, "--steps", 7, "--output", output)
    assert done.exit_code == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def loaded(model):
    return uc.load(model, device="cpu", dtype=torch.float32)


def unsloth_core(*arguments, stdin=None):
    with uc.using("reference"):
        return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)


def finetune(model, examples, *arguments):
    return unsloth_core("finetune", model, examples, "--device", "cpu", *SMALL, *arguments)


def generate(model, *arguments, stdin=None):
    return unsloth_core("generate", model, "--device", "cpu", "--max-new-tokens", 12, *arguments, stdin=stdin)


def adapter_bytes(output):
    return (Path(output) / "adapter_model.safetensors").read_bytes()


def metrics(output):
    return [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]


def losses(output):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(output)]


def assert_one_line(done, *fragments):
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.exit_code == 1, (done.output, done.exception)
    assert len(errors) == 1 and errors[0] == done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.output
    for fragment in fragments:
        assert str(fragment) in errors[0]


# ---- finetune


def test_run_writes_its_files(whole, model, loaded):
    names = {"adapter_config.json", "adapter_model.safetensors", "checkpoints", "loss.png", "metrics.jsonl", "run.toml"}
    assert {p.name for p in whole.iterdir()} == names
    assert [p.name for p in sorted((whole / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]
    assert (whole / "loss.png").read_bytes()[:4] == b"\x89PNG"
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 8))
    assert {"loss", "lr", "grad_norm", "targets", "tokens_per_s", "memory_gib"} <= rows[0].keys()
    assert rows[-1]["loss"] < rows[0]["loss"]
    adapters = uc.lora.load(whole, loaded[1])
    assert len(adapters) == 14 and all(bool(adapter.b.any()) for adapter in adapters.values())


def test_config_round_trip(whole, model, examples, tmp_path):
    """run.toml gives the same bits again, and what is said on the command line wins over it."""
    common = ("finetune", model, examples, "--device", "cpu", "--config", whole / "run.toml")
    done = unsloth_core(*common, "--output", tmp_path / "again")
    assert done.exit_code == 0, done.stderr
    assert adapter_bytes(tmp_path / "again") == adapter_bytes(whole)
    done = unsloth_core(*common, "--output", tmp_path / "short", "--steps", 1, "--targets", "q_proj, down_proj")
    assert done.exit_code == 0, done.stderr
    assert len(metrics(tmp_path / "short")) == 1
    config = json.loads((tmp_path / "short" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"] and config["r"] == 2


def test_every_option_of_adapters_and_places_at_once(model, examples, loaded, tmp_path):
    """Ranks by name, rsLoRA, dropout, NF4 linears, embedding and head in NF4, resumed from its own run.toml."""
    common = ("finetune", model, examples, "--device", "cpu", "--quantize", "nf4", "--embed", "nf4", "--head", "nf4")
    named = ("--rank", "q_proj=2,v_proj=5", "--rslora", "--dropout", "0.3", "--tokens", 128, "--save-every", 1)
    done = unsloth_core(*common, *named, "--steps", 2, "--output", tmp_path / "a")
    assert done.exit_code == 0, done.stderr
    adapters = uc.lora.load(tmp_path / "a", loaded[1])
    assert {(path.rpartition(".")[2], len(one.a)) for path, one in adapters.items()} == {("q_proj", 2), ("v_proj", 5)}
    assert {round(one.scale**2, 4) for one in adapters.values()} == {2, 5}  # rank / sqrt(rank)
    again = unsloth_core(*common, "--config", tmp_path / "a" / "run.toml", "--output", tmp_path / "b")
    assert again.exit_code == 0, again.stderr
    assert adapter_bytes(tmp_path / "a") == adapter_bytes(tmp_path / "b")
    other = unsloth_core(*common[:-2], "--config", tmp_path / "a" / "run.toml")  # the head in 16 bits: other weights
    assert_one_line(other, "was made with another model")


def test_a_tied_head_is_where_the_embedding_is(examples, tmp_path):
    tied = write_folder(tmp_path / "tied", tie_word_embeddings=True)
    done = finetune(tied, examples, "--head", "nf4", "--output", tmp_path / "out")
    assert_one_line(done, "--head is nf4, but the head of", "is its embedding: --embed says where that is")
    done = unsloth_core("plan", tied, "--tokens", 64, "--embed", "nf4", "--head", "host")
    assert_one_line(done, "plan: embed is 'nf4' and head 'host', but this model's head is its embedding")
    for places in (("--embed", "nf4"), ("--embed", "nf4", "--head", "nf4"), ("--head", "nf4", "--memory", "1GiB")):
        done = finetune(tied, examples, *places, "--steps", 1, "--no-resume", "--output", tmp_path / "out")
        assert done.exit_code == 0, done.stderr


@pytest.mark.parametrize("text", ["x", "q_proj=", "q_proj=2,v_proj", "0", "v_proj=0", "nothing=3"])
def test_ranks_that_are_none_are_refused(text, model, examples, tmp_path):
    done = finetune(model, examples, "--rank", text, "--output", tmp_path / "out")
    assert_one_line(done, "rank")
    assert not (tmp_path / "out").exists()


def test_options_round_trip_through_toml(tmp_path):
    odd = Options(output='runs/"ü😀"', alpha=1e-5, rslora=True, targets=["q_proj"], max_norm=float("inf"), steps=3)
    for options in (Options(), odd):
        (tmp_path / "run.toml").write_text(options.to_toml(), "utf-8")
        assert Options(**Options.from_toml(tmp_path / "run.toml")) == options


def test_every_option_is_on_the_command_line():
    assert list(cli.OPTION_HELP) == [field.name for field in dataclasses.fields(Options)]
    text = unsloth_core("finetune", "--help").stdout
    for name in cli.OPTION_HELP:
        assert f"--{name.replace('_', '-')}" in text
    assert "unsloth-core finetune " in text and "unsloth-core generate " in unsloth_core("generate", "--help").stdout


def test_interrupted_run_goes_on_to_the_same_bits(whole, model, examples, tmp_path, monkeypatch):
    run = ("--steps", 7, "--output", tmp_path)
    save = checkpoint.save

    def save_then_stop(*arguments, **keywords):
        save(*arguments, **keywords)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_then_stop)
        done = finetune(model, examples, *run)
    assert done.exit_code == 130 and str(tmp_path / "checkpoints" / "step-00000002") in done.stderr
    assert not (tmp_path / "adapter_model.safetensors").exists()
    with (tmp_path / "metrics.jsonl").open("a") as log:
        log.write('{"step": 3, "lo')  # a kill in the middle of a line
    done = finetune(model, examples, *run)
    assert done.exit_code == 0 and "Going on from" in done.stderr
    assert adapter_bytes(tmp_path) == adapter_bytes(whole)
    assert losses(tmp_path) == losses(whole)


def test_interrupted_before_the_first_checkpoint(model, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    done = finetune(model, examples, "--steps", 7, "--output", tmp_path)
    assert done.exit_code == 130 and "no checkpoint yet" in done.stderr


def test_killed_run_goes_on_to_the_same_bits(model, examples, tmp_path):
    run = ["finetune", model, examples, "--device", "cpu", *SMALL, "--steps", "40", "--save-every", "1"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-m", "unsloth_core", *run, "--output", str(tmp_path / "killed")]
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while checkpoint.newest(tmp_path / "killed" / "checkpoints") is None:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    for output in ("killed", "never"):
        done = unsloth_core(*run, "--output", tmp_path / output)
        assert done.exit_code == 0, done.stderr
        assert ("Going on from" in done.stderr) == (output == "killed")
    assert adapter_bytes(tmp_path / "killed") == adapter_bytes(tmp_path / "never")
    assert losses(tmp_path / "killed") == losses(tmp_path / "never")


def test_full_disk_leaves_the_older_checkpoint_whole(whole, model, examples, tmp_path, monkeypatch):
    """The second checkpoint meets a limit of the operating system on the size of files."""
    run = ("--steps", 7, "--output", tmp_path)
    save_file, limits, calls = checkpoint.save_file, resource.getrlimit(resource.RLIMIT_FSIZE), []

    def save_file_on_a_full_disk(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        save_file(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", save_file_on_a_full_disk)
        try:
            done = finetune(model, examples, *run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(done, "step-00000004 cannot be written")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    done = finetune(model, examples, *run)
    assert done.exit_code == 0, done.stderr
    assert adapter_bytes(tmp_path) == adapter_bytes(whole)


def test_checkpoint_of_another_run_is_refused(whole, model, examples, tmp_path):
    before = adapter_bytes(whole)
    assert_one_line(finetune(model, examples, "--steps", 7, "--output", whole, "--lr", 0.02), whole, "another lr")
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join(Path(examples).read_text().splitlines(keepends=True)[:8]))
    assert_one_line(finetune(model, fewer, "--steps", 7, "--output", whole), whole, "another data")
    assert_one_line(
        finetune(model, examples, "--steps", 7, "--output", whole, "--dtype", "bfloat16"), whole, "another model"
    )
    assert adapter_bytes(whole) == before
    assert finetune(model, fewer, "--steps", 1, "--output", tmp_path / "new", "--no-resume").exit_code == 0


# ---- generate


def test_streamed_text_is_the_generated_text(whole, model, loaded):
    bound, params = loaded
    chat = [{"role": "user", "content": "3?"}]
    adapted = uc.lora.adapt(params, uc.lora.load(whole, params))
    key = uc.random.fold_in(uc.random.key(5), 0)
    drawn = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}
    arguments = [x for name, value in drawn.items() for x in (f"--{name.replace('_', '-')}", value)]
    with uc.using("reference"):
        for weights, prompt, sampling, given in (
            (params, chat, {}, ["3?"]),
            (params, "3?", {}, ["3?", "--raw"]),
            (params, [{"role": "system", "content": "Be brief."}, *chat], {}, ["3?", "--system", "Be brief."]),
            (params, chat, {**drawn, "key": key}, ["3?", "--seed", 5, *arguments]),
            (adapted, chat, {}, ["3?", "--adapter", whole]),
        ):
            expected = uc.generate(bound, weights, [prompt], max_new_tokens=12, **sampling)[0]
            done = generate(model, *given)
            assert done.exit_code == 0, done.stderr
            assert done.stdout_bytes.decode() == expected + "\n"
    assert generate(model, stdin="3?\n").stdout_bytes == generate(model, "3?").stdout_bytes


def test_chat_on_a_terminal_remembers(model, loaded, monkeypatch):
    bound, params = loaded
    monkeypatch.setattr(cli, "_on_a_terminal", lambda: True)
    done = generate(model, stdin="one\n\ntwo\n")
    assert done.exit_code == 0, done.stderr
    chat = []
    with uc.using("reference"):
        for text in ("one", "two"):
            chat.append({"role": "user", "content": text})
            reply = uc.generate(bound, params, [chat], max_new_tokens=12)[0]
            chat.append({"role": "assistant", "content": reply})
            assert reply in done.stdout_bytes.decode()


def test_a_model_without_a_template_continues_the_prompt(tmp_path):
    plain = write_folder(tmp_path / "plain", template=None)
    assert generate(plain, "abc").stdout_bytes == generate(plain, "abc", "--raw").stdout_bytes
    assert_one_line(generate(plain, "abc", "--chat"), "chat template")
    assert_one_line(generate(plain, "abc", "--system", "x"), "--system")


# ---- errors


def test_bad_examples(model, examples, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(Path(examples).read_text() + '{"messages": [\n')
    assert_one_line(finetune(model, bad), f"{bad}:13", "not valid JSON")
    bad.write_text(Path(examples).read_text() + '{"question": "?"}\n')
    assert_one_line(finetune(model, bad, "--output", tmp_path / "run"), f"{bad}:13", "question")
    assert_one_line(finetune(model, tmp_path / "none.jsonl"), tmp_path / "none.jsonl", "No such file")
    assert_one_line(finetune(model, tmp_path / "train.csv"), ".jsonl")
    assert not (tmp_path / "run").exists()


def test_bad_options(model, examples, tmp_path):
    config = tmp_path / "run.toml"
    for text, fragment in (
        ("learning_rate = 1", "unknown option 'learning_rate'"),
        ('lr = "high"', "lr is 'high'"),
        ("rslora = 1", "rslora is 1"),
        ("lr = ", "run.toml"),
    ):
        config.write_text(text)
        assert_one_line(finetune(model, examples, "--config", config), fragment)
    assert_one_line(finetune(model, examples, "--config", tmp_path / "none.toml"), tmp_path / "none.toml")
    for arguments, fragment in (
        (("--steps", 0), "steps is 0"),
        (("--schedule", "sine"), "'sine'"),
        (("--max-norm", 0), "max_norm is 0"),
        (("--targets", "z_proj"), "z_proj"),
        (("--train-on", "nothing"), "nothing"),
        (("--eval-fraction", 1.5), "eval_fraction is 1.5"),
    ):
        assert_one_line(finetune(model, examples, "--output", tmp_path / "run", *arguments), fragment)
    assert not (tmp_path / "run").exists()


def test_bad_models_adapters_and_devices(model, whole, tmp_path):
    other = write_folder(tmp_path / "other", hidden_size=32)
    assert_one_line(generate(other, "x", "--adapter", whole), "adapter")
    assert_one_line(generate(model, "x", "--adapter", tmp_path), "adapter_config.json")
    assert_one_line(generate(tmp_path / "none", "x"), tmp_path / "none")
    assert_one_line(unsloth_core("generate", model, "x", "--device", "cuda:99"), "cuda:99")
    assert_one_line(unsloth_core("generate", model, "x", "--device", "toaster"), "toaster")
    assert_one_line(unsloth_core("generate", model, "x", "--device", "meta"), "'meta'", "expected cuda")
    assert_one_line(generate(model, "x", "--temperature", -1), "temperature is -1")
    assert_one_line(generate(model, "--raw", stdin=""), "has no tokens")
    assert generate(model, "x", "--dtype", "int3").exit_code == 2


def test_full_memory_is_one_line(model, monkeypatch):
    def stream(*arguments, **keywords):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9600000002016 bytes.")

    monkeypatch.setattr(cli, "stream", stream)
    assert_one_line(generate(model, "x"), "memory is full", "--max-new-tokens")
    monkeypatch.setattr(cli, "stream", lambda *arguments, **keywords: 1 / 0)
    assert isinstance(generate(model, "x").exception, ZeroDivisionError)  # a bug keeps its traceback


def test_debug_shows_where(model):
    done = generate(model, "x", "--temperature", -1, "--debug")
    assert isinstance(done.exception, ValueError)


# ---- the package


def test_importing_is_light():
    """`python -m unsloth_core`, and no library that only tests, plots or peers need."""
    code = (
        "import contextlib, runpy, sys; sys.argv = ['unsloth-core', '--help']\n"
        "with contextlib.suppress(SystemExit): runpy.run_module('unsloth_core', run_name='__main__')\n"
        "print(sorted({'matplotlib', 'transformers', 'peft', 'pandas'} & sys.modules.keys()))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "finetune" in done.stdout and "generate" in done.stdout and done.stdout.endswith("[]\n")


def test_public_names_are_there():
    for name in uc.__all__:
        assert getattr(uc, name) is not None
