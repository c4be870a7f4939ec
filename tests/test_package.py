"""The project installs as it is written: one package, models inside it, however it was put on the path."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def python(code: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter with one folder on the path."""
    env = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], env=env, cwd=cwd, capture_output=True, text=True)


def test_models_is_a_link_to_the_readers_entrance():
    link = ROOT / "unsloth_core" / "models"
    assert link.is_symlink() and os.readlink(link) == "../models"
    assert METADATA["tool"]["setuptools"]["package-dir"] == {"unsloth_core.models": "models"}


def test_checkout_on_the_path(tmp_path):
    done = python("import unsloth_core.models as m; print(m.__name__)", ROOT, tmp_path)
    assert (done.returncode, done.stdout) == (0, "unsloth_core.models\n"), done.stderr


def test_models_refuses_another_name(tmp_path):
    done = python("import models", ROOT, tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: models: imported as 'models', expected")


def test_versions_under_test_are_allowed_and_pinned():
    """constraints.txt has a version of every dependency, inside the range that pyproject.toml states."""
    requirements = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = [requirements.Requirement(line) for line in lines if line and line[0] != "#"]
    pins = {requirement.name: requirement.specifier for requirement in pinned}
    project = METADATA["project"]
    stated = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    for requirement in map(requirements.Requirement, stated):
        assert requirement.name in pins, f"{requirement.name} has no version in constraints.txt"
        tested = next(iter(pins[requirement.name])).version
        assert requirement.specifier.contains(tested), f"{requirement}: CI tests {tested}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what git would ship, without a network."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "unsloth_core", "models"):
        (folder / "source" / name).symlink_to(ROOT / name)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=folder / "source", check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_library_and_nothing_else(wheel):
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    library = {p.relative_to(ROOT).as_posix() for p in (ROOT / "unsloth_core").rglob("*.py")}
    families = {f"unsloth_core/models/{p.name}" for p in (ROOT / "models").glob("*.py")}
    assert inside == library | families


def test_wheel_imports_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import unsloth_core, unsloth_core.models as m; print(unsloth_core.__file__); print(m.__file__)"
    done = python(code, tmp_path / "site", tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(tmp_path)) for line in done.stdout.split())


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    text = {Path(n).name: archive.read(n).decode() for n in archive.namelist() if ".dist-info/" in n}
    assert "License-Expression: Apache-2.0" in text["METADATA"]
    assert "Requires-Python: >=3.11" in text["METADATA"]
    assert "unsloth-core = unsloth_core.cli:main" in text["entry_points.txt"]
    assert text["top_level.txt"].split() == ["unsloth_core"]
    assert text["LICENSE"].lstrip().startswith("Apache License")


def test_shipped_examples_show_one_habit():
    """Each answer of examples/captains_log.jsonl is short and its own, and opens and closes like a log."""
    lines = (ROOT / "examples" / "captains_log.jsonl").read_text("utf-8").splitlines()
    pairs = [json.loads(line)["messages"] for line in lines]
    assert len({question["content"] for question, _ in pairs}) == len(pairs) >= 100
    assert len({answer["content"] for _, answer in pairs}) == len(pairs)
    for question, answer in pairs:
        assert (question["role"], answer["role"]) == ("user", "assistant")
        text = answer["content"]
        assert text.startswith("Captain's log: ") and text.endswith(" Over and out.")
        assert 15 <= len(text.split()) <= 40, text
