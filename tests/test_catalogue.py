"""``unsloth-core ops``: every op describes itself completely, numbers are those of ``cost`` and of the records."""

import inspect
import json
import operator
import re

import pytest
from typer.testing import CliRunner

import unsloth_core
from unsloth_core import catalogue, cli, ops
from unsloth_core.ops.checks import check_dtype

ROW = {
    "op": "rms_norm", "impl": "ours", "direction": "fwd", "shape": [8, 32], "dtype": "bfloat16",
    "ms": 0.5, "pct_of_ceiling": 90.0, "ratio_to_best_peer": 1.25,
    "gpu": "GPU", "torch": "2", "triton": "3", "commit": "abc", "date": "2026-01-02T00:00:00+00:00",
}  # fmt: skip


@pytest.mark.parametrize("name", catalogue.NAMES)
def test_every_op_says_what_the_catalogue_prints(name):
    entry = catalogue.entry(name)
    assert re.search(" [=←] ", entry.formula) and "\n" not in entry.formula
    assert entry.residuals and entry.residuals[-1] != "."
    assert all(cost.bytes > 0 and cost.flops >= 0 for cost in entry.work.values())
    function = entry.signature.partition("(")[0]
    assert (function, entry.place) == (name, "ops") or f"{entry.place}.{function}" == catalogue.FUNCTIONS[name]
    assert ":" not in entry.signature
    whole = inspect.getdoc(operator.attrgetter(f"{entry.place}.{function}")(unsloth_core))
    assert whole and whole in entry.contract and re.split(" [=←] ", entry.formula)[0] in entry.contract


def test_what_is_read_off_an_op():
    entry = catalogue.entry("rms_norm")
    assert entry.signature == "rms_norm(x, w, add=ABSENT, *, eps=1e-06, offset=0.0, casting_mode='llama')"
    assert entry.formula == "y = x̂ ∘ (w + offset) (+ add)"
    assert entry.residuals.startswith("x, w (arguments) and rstd, fp32, 4 bytes per row;")
    assert entry.work["fwd"].bytes == 2 * 8192 * 4096 * 2 + 4 * 8192 + 4096 * 2
    assert entry.work["bwd"].flops == 11 * 8192 * 4096


@pytest.mark.parametrize(
    ("head", "formula"),
    [
        ("A.\n\n    y  = a b      where it is fast\n    z = c", "y = a b"),
        ("A.\n\nFormula: y_n = w[n], where n counts. More", "y_n = w[n]"),
        ("A.\n\n    p ← p - m / v, where\n    m  ← g", "p ← p - m / v"),
        ("A, with x = 1.\n\n    y = 2;", "y = 2"),
    ],
)
def test_formula(head, formula):
    assert catalogue._formula("f", head) == formula


@pytest.mark.parametrize(
    ("head", "residuals"),
    [
        ("A.\n\nResiduals: x, 1.5 bytes of it\nand `w`. Nothing else.", "x, 1.5 bytes of it and `w`"),
        ("A. Not differentiable?\nNot differentiable: codes are\nintegers.", "Not differentiable: codes are integers"),
    ],
)
def test_residuals(head, residuals):
    assert catalogue._residuals("f", head) == residuals


def test_a_head_that_says_too_little_is_named():
    with pytest.raises(LookupError, match="ops/f.py has no line with a formula"):
        catalogue._formula("f", "No equation: x = 1.")
    with pytest.raises(LookupError, match="ops/f.py has no line 'Residuals: ...'"):
        catalogue._residuals("f", "It has no residuals: none.")
    with pytest.raises(LookupError, match="cost of f takes 'op', which SIZES does not have"):
        catalogue._work("f", check_dtype)


def test_of_rows_that_measure_the_same_the_latest_counts():
    old = {**ROW, "ms": 0.7, "date": "2026-01-01T00:00:00+00:00"}
    other = {**ROW, "gpu": "another"}
    assert catalogue.latest([ROW, other, old]) == [ROW, other]
    assert catalogue.latest([old, ROW, other]) == [ROW, other]
    wrong = {**ROW, "date": "2026-12-31T00:00:00+00:00", "flaw": "host time"}
    assert catalogue.latest([ROW, wrong]) == [ROW] and catalogue.latest([wrong]) == []


def test_a_variant_belongs_to_its_op_and_an_op_to_itself():
    rows = [{**ROW, "op": op} for op in ("linear", "linear_nf4", "linear_cross_entropy", "adamw")]
    rows.append({**ROW, "op": "linear", "impl": "torch"})
    assert [row["op"] for row in catalogue.measured("linear", rows)] == ["linear", "linear_nf4"]
    assert [row["op"] for row in catalogue.measured("linear_cross_entropy", rows)] == ["linear_cross_entropy"]


def ops_command(*arguments):
    return CliRunner().invoke(cli.app, ["ops", *arguments])


def test_the_table_has_every_op_and_the_measurements(tmp_path, monkeypatch):
    file = tmp_path / "ops.jsonl"
    file.write_text("".join(json.dumps({**ROW, "direction": d}) + "\n" for d in ("fwd", "bwd")))
    monkeypatch.setattr(catalogue, "read_records", lambda: catalogue.latest(map(json.loads, file.open())))
    shown = ops_command()
    assert shown.exit_code == 0
    lines = shown.stdout.splitlines()
    assert [line for line in lines if line in catalogue.NAMES] == catalogue.NAMES
    assert {*ops.__all__, "nf4_quantize", "nf4_dequantize", "nf4_matvec", "adamw", "global_norm"} == {*catalogue.NAMES}
    assert max(map(len, lines)) <= 120
    flat = " ".join(shown.stdout.split())
    speed = "0.5 ms, 90 % of the ceiling, 1.25 x the fastest peer's speed"
    assert f"8x32: forward {speed}; backward {speed}" in flat
    assert flat.count("measured not yet") == len(catalogue.NAMES) - 1 and "Measured on GPU, torch 2, triton 3." in flat
    assert f"rms_norm 8x32 bfloat16, backward {speed}" in ops_command("rms_norm").stdout


def test_without_records_it_says_so(tmp_path, monkeypatch):
    assert catalogue.read_records(tmp_path / "none.jsonl") is None
    monkeypatch.setattr(catalogue, "read_records", lambda: None)
    for arguments in ((), ("rms_norm",)):
        shown = ops_command(*arguments).stdout
        assert "the installed package has none" in shown and "measured " not in shown.casefold()


def test_one_op_shows_its_whole_contract():
    shown = ops_command("glu").stdout
    assert inspect.getdoc(ops.glu) in shown and "uc.ops.glu(" in shown


def test_an_unknown_op_is_one_line():
    shown = ops_command("glue")
    assert shown.exit_code == 1 and shown.stderr.startswith("error: ops: no op 'glue', expected one of adamw, add_")
