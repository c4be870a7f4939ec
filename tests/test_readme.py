"""The README tells the truth where a machine can tell: its Python runs, and the names and files in it exist."""

import ast
import builtins
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny_folder import write_folder

import unsloth_core as uc
from unsloth_core import cli

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text("utf-8")
PYTHON = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
NOTEBOOK, CONTRACT = PYTHON


def public(name: str) -> object:
    """What ``uc.a.b`` names. Raises AttributeError if there is no such thing, or it is not public."""
    first = name.split(".")[1]
    assert first in uc.__all__, f"{name}: {first} is not in unsloth_core.__all__"
    value: object = uc
    for part in name.split(".")[1:]:
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("block", PYTHON)
def test_python_parses(block):
    ast.parse(block)


def test_public_names_exist():
    names = set(re.findall(r"\buc(?:\.\w+)+", TEXT))
    assert "uc.value_and_grad" in names
    for name in names:
        public(name)


def test_names_that_do_not_exist_are_found():
    for name in ("uc.nothing", "uc.lora.nothing", "uc.backend"):
        with pytest.raises((AssertionError, AttributeError)):
            public(name)


def test_notebook_runs_as_written(tmp_path, monkeypatch):
    """Every line but the download: a tiny model stands in for what ``uc.load`` gets from the Hub."""
    folder = write_folder(tmp_path / "tiny")
    loaded = uc.load(str(folder), device="cpu", dtype=torch.float32)
    printed: list[str] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(uc, "load", lambda source: loaded)
    monkeypatch.setattr(builtins, "print", lambda *values: printed.extend(map(str, values)))
    names: dict[str, Any] = {}
    with uc.using("reference"):
        exec(compile(NOTEBOOK, "README.md", "exec"), names)
    assert len(printed) == 1
    model, params = loaded
    with uc.using("reference"):
        assert names["loss"] < 0.9 * model.loss(params, names["batch"])[0]  # of the same batch, without adapters


def test_contract_is_that_of_the_file():
    """Argument names and defaults of the shown functions are a part of the real ones, in their order."""
    source = ast.parse((ROOT / "unsloth_core" / "ops" / "rms_norm.py").read_text("utf-8"))
    real = {node.name: node.args for node in source.body if isinstance(node, ast.FunctionDef)}
    shown = [node for node in ast.parse(CONTRACT).body if isinstance(node, ast.FunctionDef)]
    assert [f.name for f in shown] == ["rms_norm_fwd", "rms_norm_bwd"]
    for f in shown:
        args, have = f.args, real[f.name]
        assert [a.arg for a in args.args] == [a.arg for a in have.args]
        assert [a.arg for a in args.kwonlyargs] == [a.arg for a in have.kwonlyargs][: len(args.kwonlyargs)]


def test_files_exist():
    links = re.findall(r"\]\((?!http)([^)]+)\)", TEXT)
    assert "docs/architecture.svg" in links
    for path in [*links, "examples/captains_log.jsonl", "constraints.txt"]:
        assert (ROOT / path).is_file(), path


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"\bmake ([a-z]+)\b", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_command_lines_parse():
    """Every command with its options exists; nothing is run."""
    lines = re.findall(r"^unsloth-core .*$", TEXT, re.MULTILINE)
    assert len(lines) == 3
    group = typer.main.get_command(cli.app)
    for line in lines:
        command, *arguments = shlex.split(line)[1:]
        group.commands[command].make_context(command, arguments)
