"""Checkpoints are whole or absent, whichever file operation fails; a wrong one is refused."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from oprule import DEVICE
from safetensors.torch import load_file, save_file

from unsloth_core import checkpoint, optim, tree
from unsloth_core.weights import LoRA


def state(value=0, rank=2):
    value = float(value)
    adapters = {
        path: LoRA(a=torch.full((rank, 3), value + i), b=torch.full((4, rank), -value), scale=0.5)
        for i, path in enumerate(("model.layers.0.q_proj", "model.layers.1.q_proj"))
    }
    adapters = tree.map(lambda t: t.to(DEVICE), adapters)
    return adapters, optim.adamw(1e-3).init(adapters)


def assert_equal(a, b):
    assert tree.flatten(a)[1] == tree.flatten(b)[1]
    for (path, x), y in zip(tree.items(a), tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.device == y.device and torch.equal(x, y), path


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path):
    folder = tmp_path / "deep" / "checkpoints"
    assert checkpoint.newest(folder) is None
    path = checkpoint.save(folder, 30, state(1.5), {"options": {"lr": 1e-3, "max_norm": float("inf")}})
    assert path == folder / "step-00000030" == checkpoint.newest(folder)
    assert names(folder) == ["step-00000030"] and names(path) == ["state.json", "state.safetensors"]
    assert checkpoint.facts(path) == {"step": 30, "options": {"lr": 1e-3, "max_norm": float("inf")}}
    assert_equal(checkpoint.load(path, state()), state(1.5))


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_who_may_read_it_is_what_the_umask_says(umask, tmp_path):
    before = os.umask(umask)
    try:
        path = checkpoint.save(tmp_path, 1, state(), {})
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask}


def test_bits_of_every_dtype_come_back(tmp_path):
    values = {
        "nan": torch.tensor([float("nan"), -0.0, 1e-42, float("inf")]),
        "half": torch.tensor([1.0, 65504.0], dtype=torch.float16),
        "bf16": torch.randn(3, 5).bfloat16().T,  # not contiguous
        "step": torch.tensor(2**60 + 1),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
        "none": torch.zeros(0, 4),
    }
    back = checkpoint.load(checkpoint.save(tmp_path, 1, values, {}), tree.map(torch.zeros_like, values))
    for name, value in values.items():
        assert back[name].dtype == value.dtype and back[name].shape == value.shape
        assert torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (back[name], value))), name


def test_only_the_newest_are_kept(tmp_path):
    for step in (5, 10, 15, 20):
        checkpoint.save(tmp_path, step, state(step), {})
    assert names(tmp_path) == ["step-00000015", "step-00000020"]
    checkpoint.save(tmp_path, 10**8, state(7.0), {}, keep=1)  # nine digits: numbers are compared, not names
    assert names(tmp_path) == ["step-100000000"] and checkpoint.newest(tmp_path) == tmp_path / "step-100000000"
    (tmp_path / "step-1").mkdir()
    (tmp_path / "notes").write_text("mine")
    checkpoint.save(tmp_path, 10**8 + 1, state(8.0), {}, keep=1)
    assert names(tmp_path) == ["notes", "step-1", "step-100000001"]


def test_a_checkpoint_is_never_overwritten(tmp_path):
    checkpoint.save(tmp_path, 5, state(1.0), {})
    with pytest.raises(FileExistsError, match="step-00000005 exists already: two runs in one folder?"):
        checkpoint.save(tmp_path, 5, state(2.0), {})
    assert_equal(checkpoint.load(tmp_path / "step-00000005", state()), state(1.0))


class Killed(BaseException):
    """What no ``except Exception`` may swallow."""


FAILURES = [  # what fails, at which of its calls
    (Path, "mkdir", 0),
    (Path, "mkdir", 1),
    (checkpoint, "save_file", 0),
    (json, "dumps", 0),
    (Path, "write_text", 0),
    (os, "fsync", 0),
    (os, "fsync", 1),
    (os, "fsync", 2),
    (os, "fsync", 3),
    (os, "rename", 0),
]


@pytest.mark.parametrize("error", [Killed, OSError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("late", [False, True], ids=["instead", "after"])
@pytest.mark.parametrize("owner, name, call", FAILURES, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_failure_anywhere_leaves_the_others_whole(owner, name, call, late, error, tmp_path, monkeypatch):
    """Each file operation fails: instead of doing anything, or after it has done it."""
    for step in (5, 10):
        checkpoint.save(tmp_path, step, state(step), {})
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    real, calls = getattr(owner, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) - 1 != call:
            return real(*args, **kwargs)
        if late:
            real(*args, **kwargs)
        raise error("now")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(error, match="now"):
            checkpoint.save(tmp_path, 15, state(15), {})
    done = (name, call) == ("fsync", 3) or (name == "rename" and late)
    assert names(tmp_path) == ["step-00000005", "step-00000010", *(["step-00000015"] if done else [])]
    assert {p: p.read_bytes() for p in before} == before
    newest = checkpoint.newest(tmp_path)
    assert newest is not None and newest.name == f"step-{15 if done else 10:08d}"
    assert_equal(checkpoint.load(newest, state()), state(15 if done else 10))
    if not done:  # and the next attempt works
        checkpoint.save(tmp_path, 15, state(15), {})
        assert names(tmp_path) == ["step-00000010", "step-00000015"]


def test_what_a_kill_left_behind_is_not_taken_for_a_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 5, state(5), {})
    shutil.copytree(tmp_path / "step-00000005", tmp_path / ".writing-step-00000010")
    (tmp_path / ".writing-step-00000010" / "state.safetensors").write_bytes(b"half")
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000005"
    checkpoint.save(tmp_path, 10, state(10), {})
    assert names(tmp_path) == ["step-00000005", "step-00000010"]
    assert_equal(checkpoint.load(tmp_path / "step-00000010", state()), state(10))


def test_a_file_system_that_cannot_wait_for_names_is_taken_as_it_is(tmp_path, monkeypatch):
    def refused(handle):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refused)
    checkpoint.save(tmp_path, 5, state(5), {})
    assert_equal(checkpoint.load(tmp_path / "step-00000005", state()), state(5))


def test_an_old_one_that_cannot_be_dropped_does_no_harm(tmp_path, monkeypatch):
    for step in (5, 10):
        checkpoint.save(tmp_path, step, state(step), {})
    monkeypatch.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no")))
    checkpoint.save(tmp_path, 15, state(15), {})
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000015"


def test_clearing(tmp_path):
    folder = tmp_path / "checkpoints"
    checkpoint.clear(folder)  # nothing there
    for step in (5, 10):
        checkpoint.save(folder, step, state(step), {})
    checkpoint.clear(folder)
    assert names(tmp_path) == [] and checkpoint.newest(folder) is None


def test_a_clearing_that_is_killed_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 5, state(5), {})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            checkpoint.clear(folder)
    checkpoint.clear(folder)
    checkpoint.save(folder, 1, state(1), {})
    assert names(folder) == ["step-00000001"]
    checkpoint.clear(folder)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "like, message",
    [
        (lambda: state(rank=3), r"model.layers.0.q_proj.a is torch.float32 \(2, 3\), expected torch.float32 \(3, 3\)"),
        (lambda: tree.map(lambda t: t.half(), state()), r"is torch.float32 \(2, 3\), expected torch.float16 \(2, 3\)"),
        (lambda: state()[0], "belongs to another run: .* tensors differ"),
        (lambda: (*state(), torch.zeros(1)), "belongs to another run: 1 tensors differ, first '2'"),
        (dict, "belongs to another run"),
    ],
)
def test_another_runs_checkpoint_is_refused(like, message, tmp_path):
    path = checkpoint.save(tmp_path, 5, state(), {})
    with pytest.raises(ValueError, match=f"^checkpoint .*step-00000005 .*{message}"):
        checkpoint.load(path, like())


def test_damaged_checkpoints_are_refused(tmp_path):
    path = checkpoint.save(tmp_path, 5, state(), {})
    file = path / "state.safetensors"
    content = file.read_bytes()
    for size in (0, 4, 100, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="^checkpoint .*step-00000005 cannot be read: "):
            checkpoint.load(path, state())
    file.unlink()
    with pytest.raises(ValueError, match="^checkpoint .*step-00000005 cannot be read: "):
        checkpoint.load(path, state())
    for text in ("", "{", "[]", "3", '{"stop": 5}', '{"step": "5"}'):
        (path / "state.json").write_text(text)
        with pytest.raises(ValueError, match="^checkpoint .*step-00000005 cannot be read: "):
            checkpoint.facts(path)
    (path / "state.json").unlink()
    with pytest.raises(ValueError, match="^checkpoint .*step-00000005 cannot be read: "):
        checkpoint.facts(path)


def test_the_tensors_are_an_ordinary_safetensors_file(tmp_path):
    tensors = load_file(checkpoint.save(tmp_path, 5, state(3.0), {}) / "state.safetensors")
    assert "0.model.layers.1.q_proj.a" in tensors and "1.step" in tensors and len(tensors) == 13
    save_file(tensors, tmp_path / "again.safetensors")
