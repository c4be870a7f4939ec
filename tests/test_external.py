"""The judges of ``tests/external``: other people's tests reach our ops, what we do not have is skipped and counted."""

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "external"
SPEC = importlib.util.spec_from_file_location("external_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(SPEC)
sys.modules["external_run"] = run
SPEC.loader.exec_module(run)

ATTORCH = {
    "attorch/__init__.py": "raise ImportError('ours stands in for this')",
    "attorch/types.py": "Device = str",
    "tests/__init__.py": "",
    "tests/conftest.py": "",
    "tests/test_glu_layer.py": """
import pytest, torch, attorch
from attorch.types import Device
@pytest.mark.parametrize('act', ['silu', 'mish'])
def test_glu(act):
    x = torch.randn(3, 8, device='cuda')
    up, gate = x.chunk(2, -1)
    torch.testing.assert_close(attorch.GLU(act_func=act)(x), up * torch.nn.functional.silu(gate))
def test_wrong():
    x = torch.ones(1, 2, device='cuda')
    assert attorch.GLU(act_func='silu')(x) == 0
""",
}
LIGER = {
    "src/liger_kernel/__init__.py": "",
    "src/liger_kernel/utils.py": "def infer_device(): return 'cuda'",
    "src/liger_kernel/ops/__init__.py": "raise ImportError('ours stands in for this')",
    "test/__init__.py": "",
    "test/utils.py": "def supports_bfloat16(): return False",
    "test/transformers/test_cross_entropy.py": """
import torch
from liger_kernel.ops import LigerCrossEntropyFunction
from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel
from test.utils import supports_bfloat16
def test_loss():
    assert supports_bfloat16()
    x, t = torch.randn(3, 8, requires_grad=True), torch.tensor([1, -100, 7])
    loss = LigerCrossEntropyFunction.apply(x, t, None)[0]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x, t))
    loss.backward()
def test_weights():
    x, t, w = torch.randn(3, 8), torch.tensor([1, -100, 7]), torch.rand(8)
    loss, z, accuracy, best = LigerCrossEntropyFunction.apply(x, t, w, -100, 0.1, 0.2, 'mean', None, True, True, True)
    expected = torch.nn.functional.cross_entropy(x, t, w, label_smoothing=0.2)
    torch.testing.assert_close(loss - z, expected)
    torch.testing.assert_close(z, 0.1 * x.logsumexp(1)[[0, 2]].square().mean())
    assert accuracy == (x.argmax(1) == t).float().sum() / 2 and best[0] == x[0].argmax()
def test_kernel():
    liger_cross_entropy_kernel[(1,)]()
""",
}


def checkout(folder, files):
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_attorch(tmp_path):
    folder = checkout(tmp_path, ATTORCH)
    before = sorted(folder.rglob("*"))
    found = run.judge("attorch", folder, [])
    assert found["files"] == {"test_glu_layer.py": {"passed": 1, "skipped": 1, "failed": 1}}
    assert found["skipped"] == {"asks for a gated unit with an activation other than silu and gelu": 1}
    assert sorted(folder.rglob("*")) == before
    text = run.summary(found)
    assert "test_glu_layer.py: 1 passed, 1 skipped, 1 failed" in text and "1 skipped: asks for a gated" in text


def test_liger(tmp_path, capsys):
    assert run.main(["--liger", str(checkout(tmp_path, LIGER))]) == 0
    printed = capsys.readouterr().out
    assert "test_cross_entropy.py: 2 passed, 1 skipped" in printed
    assert "1 skipped: asks for the kernel liger_cross_entropy_kernel" in printed


@pytest.mark.parametrize("arguments", [[], ["--liger", "nothing-there"]])
def test_without_a_checkout_it_says_so(arguments, capsys, monkeypatch):
    for suite in run.SUITES:
        monkeypatch.delenv(f"UNSLOTH_CORE_{suite.upper()}", raising=False)
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert "no checkout given" in (text := capsys.readouterr().err) or "is not a folder" in text
