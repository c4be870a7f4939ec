"""``perf/run.py`` with tiny shapes: every op's entry works, wrong results get no row, rows are complete."""

import dataclasses
import json

import pytest
import torch
from oprule import DEVICE

from perf import ops, run
from unsloth_core import ops as uc

KEYS = {
    *("op", "impl", "direction", "shape", "dtype", "ms", "gbps", "tflops", "pct_of_ceiling", "extra_mib"),
    *("host_us", "ratio_to_best_peer", "gpu", "torch", "triton", "commit", "date"),
}
CASES = {case.op: case for case in ops.cases(DEVICE)}


@pytest.fixture(scope="module")
def machine():
    machine = run.Machine(DEVICE, smoke=True)
    machine.find_ceilings()
    return machine


def measured(machine, case):
    rows = []
    bench = run.Bench(machine, run.facts(machine, "none"), rows.append)
    bench.op(case)
    return bench, rows


def test_every_op_is_measured():
    assert set(uc.__all__) | {"softmax_wide", "linear_lora", "linear_nf4", "nf4_dequantize", "adamw"} == CASES.keys()


@pytest.mark.parametrize("op", CASES)
def test_entry(machine, op):
    bench, rows = measured(machine, CASES[op])
    assert not bench.failures
    assert {"ours", "torch"} <= {row["impl"] for row in rows}
    assert {row["direction"] for row in rows} in ({"fwd"}, {"fwd", "bwd"}, {"fwd+bwd"})
    for row in rows:
        assert row.keys() == KEYS
        assert json.loads(json.dumps(row)) == row
        assert row["op"] == op and row["shape"] == list(CASES[op].tiny)
        assert row["ms"] > 0 and row["gbps"] > 0 and row["tflops"] > 0 and row["ratio_to_best_peer"] > 0
    assert {len(shape) for shape in (*CASES[op].shapes, CASES[op].small)} == {len(CASES[op].tiny)}


@pytest.mark.parametrize(
    "wrong", [lambda y: 1.1 * y, lambda y: y * torch.nan, lambda y: y[:1], lambda y: y.detach() + 0 * y]
)
def test_a_wrong_result_or_gradient_gets_no_row(machine, wrong):
    case = dataclasses.replace(CASES["glu"], ours=lambda gate_up: wrong(uc.glu(gate_up)))
    bench, rows = measured(machine, case)
    assert rows == [] and len(bench.failures) == 1 and bench.failures[0].startswith("glu ours")


def test_a_peer_that_does_not_run_is_a_note(machine):
    def missing(gate_up):
        raise NotImplementedError("not on this machine")

    case = dataclasses.replace(CASES["glu"], peers={**CASES["glu"].peers, "missing": missing})
    bench, rows = measured(machine, case)
    assert bench.failures == [] and bench.notes == ["glu missing: NotImplementedError: not on this machine"]
    assert {row["impl"] for row in rows} == {"ours", "torch"}


def test_ratio_is_the_fastest_peers_time_over_this_one(machine):
    _, rows = measured(machine, CASES["rms_norm"])
    for direction in ("fwd", "bwd"):
        some = {row["impl"]: row for row in rows if row["direction"] == direction}
        best = min(row["ms"] for impl, row in some.items() if impl != "ours")
        assert some["ours"]["ratio_to_best_peer"] == pytest.approx(best / some["ours"]["ms"], rel=2e-3)


def test_smoke_prints_a_table_and_writes_nothing(tmp_path, capsys):
    assert run.main(["--smoke", "glu", "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("glu", "4x32", "fwd", "bwd", "ours", "GB/s"))


def test_a_failure_is_the_exit_code_and_the_others_go_on(monkeypatch, capsys):
    def broken(gate_up):
        raise RuntimeError("out of order")

    cases = [dataclasses.replace(CASES["glu"], ours=broken), CASES["rope"]]
    monkeypatch.setattr(ops, "cases", lambda device: cases)
    assert run.main(["--smoke"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED glu ours: RuntimeError: out of order" in printed and "rope  " in printed


def test_an_unknown_op_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--smoke", "convolution"])
    assert "no op 'convolution', expected some of embedding, rms_norm" in capsys.readouterr().err
