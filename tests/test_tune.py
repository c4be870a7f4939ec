"""``perf/tune.py`` on tiny shapes: knobs exist, wrong candidates lose, the faster one wins, and globals come back."""

import importlib

import pytest
from oprule import DEVICE

from perf import ops, run, tune

GLU = importlib.import_module("unsloth_core.ops.glu")
TABLES = importlib.import_module("unsloth_core.ops.attention")
CASES = {case.op: case for case in ops.cases(DEVICE)}


def test_knobs_are_globals_of_ops_and_their_cases_exist():
    for (file, name), cases in tune.KNOBS.items():
        assert hasattr(importlib.import_module(f"unsloth_core.ops.{file}"), name), (file, name)
        assert set(cases) <= CASES.keys()


def test_neighbours_differ_in_one_number_and_keep_their_kind():
    tiles = TABLES.Tiles(64, 32, 4, 2)
    found = list(tune.neighbours(tiles))
    assert all(type(other) is type(tiles) for other in found) and len(set(found)) == len(found) == 8
    assert {other.stages for other in found} == {1, 2, 3}
    nested = list(tune.neighbours(TABLES.Launch(tiles, tiles, tiles)))
    assert len(nested) == 24 and all(isinstance(other.forward, TABLES.Tiles) for other in nested)
    assert list(tune.neighbours(256)) == [512, 128]
    assert not tune.sensible((1, 0)) and tune.sensible((4, 2))


def test_a_knob_says_what_was_asked_and_goes_away():
    original = GLU.tile_shape
    knob = tune.Knob("glu", "tile_shape")
    with knob.watched():
        assert GLU.tile_shape(40) == original(40) and knob.seen == {(40,): original(40)}
        knob.instead[(40,)] = (7, 64)
        assert GLU.tile_shape(40) == (7, 64)
    assert GLU.tile_shape is original and GLU.tile_shape(40) == original(40)
    assert knob.source((40,), (1, 2)) == "tile_shape(40) == (1, 2)"


def test_a_knob_hears_keywords():
    rms_norm = importlib.import_module("unsloth_core.ops.rms_norm")
    knob = tune.Knob("rms_norm", "column_tile")
    with knob.watched():
        today = rms_norm.column_tile(64, narrowest=32)
    assert knob.seen == {(64, ("narrowest", 32)): today}
    assert knob.source(*knob.seen, (1, 2)) == "column_tile(64, narrowest=32) == (1, 2)"


def search():
    return tune.Search(run.Machine(DEVICE, smoke=True), CASES["glu"], CASES["glu"].tiny, "fwd")


@pytest.fixture
def knob():
    knob = tune.Knob("glu", "tile_shape")
    with knob.watched():
        GLU.tile_shape(CASES["glu"].tiny[1])
    return knob


def test_the_faster_candidate_wins(monkeypatch, knob):
    (entry,) = knob.seen
    today = knob.seen[entry]
    monkeypatch.setattr(tune.Search, "right", lambda self: True)
    monkeypatch.setattr(tune.Search, "milliseconds", lambda self: 100 / knob.instead.get(entry, today)[0])
    monkeypatch.setattr(tune, "sensible", lambda value: 1 <= value[0] <= 64)
    found = search().best(knob, entry, seconds=20)
    assert found.best[0] == 64 and found.gain == pytest.approx(1 - today[0] / 64)


def test_a_candidate_that_computes_something_else_loses(monkeypatch, knob):
    (entry,) = knob.seen
    today = knob.seen[entry]
    monkeypatch.setattr(tune.Search, "milliseconds", lambda self: 1.0 if entry in knob.instead else 9.0)
    monkeypatch.setattr(run, "check", lambda *args: (_ for _ in ()).throw(ArithmeticError("wrong")))
    assert search().best(knob, entry, seconds=20).best == today


def test_smoke_prints_source_and_check_judges(monkeypatch, capsys):
    assert tune.main(["--smoke", "--seconds", "0", "glu"]) == 0
    printed = capsys.readouterr().out
    assert "tile_shape(32) == (" in printed and "glu 4x32 fwd" in printed and "glu 4x32 bwd" in printed
    slow = tune.Found(tune.Knob("glu", "tile_shape"), (32,), "glu", (1, 2), 1.0, (2, 2), 0.9)
    monkeypatch.setattr(tune, "tune", lambda *args: iter([slow]))
    assert tune.main(["--smoke", "--check"]) == 1
    assert "# 1 entries of today are more than 3% slower" in capsys.readouterr().out
