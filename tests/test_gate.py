"""The compile gate can fail: on a spill, on what a budget no longer needs, and on what no case reaches."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from perf import gate
from perf.gate_compile import Figures, measure
from perf.gate_record import TARGETS, Dependencies, Launch, Row, unreached_rows

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = Launch(TARGETS["sm_90"], "f._k", {"dtype": "bf16", "HEAD": 64, "num_warps": 4}, "f 1x2", True, "f._k", "key")
GOOD = Figures(64, 0, 2**10, False, (), 0.9, 1.0)


NAME, REASONS = LAUNCH.name, {f"f._k {rule}": "a test" for rule in gate.WORDS}


def complaints(figures, budget, reasons=REASONS):
    """Of one launch."""
    return gate.judge(gate.worst([(LAUNCH, figures)]), {NAME: budget} if budget else {}, reasons)


BAD = [  # a figure that breaks a rule, the rule, a budget that covers it, one that is too small, one that is too large
    (replace(GOOD, stack=16), "stack", 16, 8, 24),
    (replace(GOOD, shared=227 * 1024 + 4), "shared", 227 * 1024 + 4, 227 * 1024 + 3, 227 * 1024 + 5),
    (replace(GOOD, serialized=True), "serialized", True, None, None),
    (replace(GOOD, products=("mma",)), "fallback", True, None, None),
    (replace(GOOD, products=("wgmma", "mma")), "fallback", True, None, None),
    (replace(GOOD, wide=0.3), "narrow", 0.3, 0.4, 0.2),
    ("ptxas failed at line 3", "compiles", "ptxas failed at line 2", None, None),
]


@pytest.mark.parametrize("figures, rule, enough, small, large", BAD)
def test_a_rule_needs_a_budget_and_a_budget_a_reason(figures, rule, enough, small, large):
    assert complaints(GOOD, {}) == []
    assert len(complaints(figures, {})) == 1
    assert complaints(figures, {rule: enough}) == []
    (line,) = complaints(figures, {rule: enough}, {})
    assert "no reason" in line and f"'f._k {rule}'" in line
    (line,) = complaints(GOOD, {rule: enough})
    assert "lower the budget" in line
    if small is not None:
        (line,) = complaints(figures, {rule: small})
        assert f"budget {small}" in line
        (line,) = complaints(figures, {rule: large})
        assert "lower the budget" in line


def test_budgets_of_launches_that_did_not_run_are_let_alone():
    assert gate.judge(gate.worst([(LAUNCH, GOOD)]), {"f._k of another shape": {"stack": 8}}, {}) == []


def test_the_worst_of_one_name_counts():
    spills = [(LAUNCH, replace(GOOD, stack=n, wide=n / 100)) for n in (16, 24, 8)]
    assert gate.worst(spills) == {NAME: {"stack": 24, "narrow": 0.08}}


def test_written_budgets_are_met(tmp_path):
    file = tmp_path / "budgets.json"
    file.write_text(json.dumps({"reasons": REASONS, "figures": {gate.triton.__version__: {"f._old": {"stack": 8}}}}))
    found = gate.worst([(LAUNCH, BAD[0][0])])
    gate.write_budgets(found, file)
    (figures,) = json.loads(file.read_text())["figures"].values()
    assert figures == {"f._old": {"stack": 8}, NAME: {"stack": 16}}
    assert gate.judge(found, figures, REASONS) == []
    gate.write_budgets(gate.worst([(LAUNCH, GOOD)]), file)
    assert list(*json.loads(file.read_text())["figures"].values()) == ["f._old"]
    gate.write_budgets(found, file, everything=True)
    assert list(*json.loads(file.read_text())["figures"].values()) == [NAME]


def test_every_budget_has_its_reason():
    budgets = json.loads(gate.BUDGETS.read_text())
    needed = {
        f"{name.split()[0]} {rule}" for v in budgets["figures"].values() for name, rules in v.items() for rule in rules
    }
    assert needed == budgets["reasons"].keys()
    assert all(budgets["reasons"].values())


def test_rules_that_depend_on_the_launch():
    fallback, narrow = replace(GOOD, products=("mma",)), replace(GOOD, wide=0.1)
    assert gate.findings(replace(LAUNCH, target=TARGETS["sm_80"]), fallback) == {}
    assert gate.findings(replace(LAUNCH, model=False), narrow) == {}
    assert gate.findings(LAUNCH, replace(narrow, products=("wgmma",))) == {}


def test_a_row_that_nothing_launches_is_named():
    rows = [Row(f"T[{warps}]", "f._k", {"HEAD": range(1, 65), "num_warps": warps}) for warps in (4, 8)]
    (line,) = unreached_rows([LAUNCH], rows)
    assert line.startswith("T[8]")


def test_figures_are_read_off_the_assembly():
    ptx = """
    @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 st.global.b16 [ %rd2 + 0 ], { %rs1 };
    cp.async.cg.shared.global [ %r5 + 0 ], [ %rd3 + 0 ], 0x10, %r6;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {}, %rd4, %rd5, %p2, 1, 1, 0, 0;
    """
    said = """ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to...
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
    ptxas info    : Used 255 registers, used 1 barriers"""
    found = measure(ptx, said, 99)
    assert found == Figures(255, 8, 99, True, ("wgmma",), round(32 / 34, 3), 0.0)


def test_comments_do_not_make_another_kernel():
    def code(source):
        return Dependencies(name="k", globals={}, nonlocals={}, src=source).ret

    plain = code("def k(x):\n    x = 1\n")
    assert code('def k(x):\n    """Doc."""\n\n    x = 1  # why\n') == plain != code("def k(x):\n    x = 2\n")


TOY = """
import sys
from pathlib import Path
import torch, triton, triton.language as tl
from perf.gate import judge, worst
from perf.gate_compile import compile_all
from perf.gate_record import TARGETS, Recorder, unreached_sites
from unsloth_core import device

@triton.jit
def centred(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    row = tl.load(x + at)
    tl.store(y + at, row - tl.sum(row) / BLOCK)

@triton.jit
def broken(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))

def run(kernel, *args, **options):
    device.launch(kernel, (1,), *args, **options)

def never():
    device.launch(centred, (1,))

if __name__ == "__main__":
    recorder = Recorder(TARGETS["sm_90"])
    with recorder.pretending():
        x = torch.empty(4096)
        recorder.run("spills", lambda: run(centred, x, x, BLOCK=4096, maxnreg=32), model=True)
        recorder.run("good", lambda: run(centred, x, x, BLOCK=4096), model=True)
        recorder.run("bad", lambda: run(broken, x, BLOCK=64))
    results = compile_all(recorder, range(3), 2, Path(sys.argv[1]))
    found = [(recorder.launches[i], figures) for i, figures in results]
    print(*judge(worst(found), {}, {}), sep="\\n")
    print(*unreached_sites(recorder.sites, Path(__file__).parent), sep="\\n")
"""


def test_the_whole_way_on_kernels_that_fail(tmp_path):
    """Without the interpreter, in a process of its own, which is what the gate is."""
    (tmp_path / "toy.py").write_text(TOY.lstrip())
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, str(tmp_path / "toy.py"), str(tmp_path / "figures")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.strip().splitlines())
    assert len(lines) == 3, done.stdout
    unreached, broken, spills = lines
    line = 1 + TOY.lstrip().splitlines().index("def never():")
    assert f"toy.py:{line + 1}: no case" in unreached
    assert broken.startswith("__main__.broken sm_90")
    assert "bytes of stack (spilled registers)" in spills and "maxnreg=32" in spills
