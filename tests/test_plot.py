"""``perf/plot.py`` shows the rows it is given, and nothing else: lengths of bars, places of points, names, caption."""

import json
import xml.etree.ElementTree as ET

import pytest

from perf import plot

ROW = {
    "op": "glu", "impl": "ours", "direction": "fwd", "shape": [8, 32], "dtype": "bfloat16",
    "ms": 1.0, "gbps": 900.0, "tflops": 1.8, "pct_of_ceiling": 90.0, "ratio_to_best_peer": 2.0,
    "gpu": "GPU", "torch": "2.0", "triton": "3.0", "commit": "abc", "date": "2026-01-02T00:00:00+00:00",
}  # fmt: skip


def row(**changes):
    return {**ROW, **changes}


ROWS = [
    row(),
    row(impl="torch", ms=4.0, gbps=225.0, tflops=0.45, pct_of_ceiling=22.5),
    row(impl="F.glu", ms=2.0, gbps=450.0, tflops=0.9, pct_of_ceiling=45.0),
    row(direction="bwd"),
    row(shape=[16, 32]),
    row(op="linear", gbps=10.0, tflops=40.0, pct_of_ceiling=80.0, shape=[4]),
]


def test_an_op_appears_at_its_first_shape_beside_its_fastest_peer_in_the_same_run():
    pairs = plot.pairs([*ROWS, row(impl="faster in another run", ms=0.5, date="2026-01-01T00:00:00+00:00")])
    assert [(p.ours["op"], p.ours["direction"], p.ours["shape"]) for p in pairs] == [
        *(("glu", "fwd", [8, 32]), ("glu", "bwd", [8, 32]), ("linear", "fwd", [4]))
    ]
    assert [p.peer and p.peer["impl"] for p in pairs] == ["F.glu", None, None]


def test_ceilings_are_those_that_the_shares_are_shares_of():
    assert plot.ceilings(ROWS) == pytest.approx((1e12, 50e12))


def test_bars_are_shares_on_an_axis_from_zero():
    forward, backward = plot.bars(ROWS).axes
    assert [bar.get_width() for bar in forward.patches] == [90.0, 45.0, 80.0]
    assert [bar.get_width() for bar in backward.patches] == [90.0]
    assert {bar.get_x() for ax in (forward, backward) for bar in ax.patches} == {0.0}
    assert forward.get_xlim() == backward.get_xlim() and forward.get_xlim()[0] == 0.0
    texts = [text.get_text() for text in forward.texts]
    assert set(texts) == {"glu", "8x32", "1 ms  2.00×", "F.glu", "linear", "4", "1 ms"}


def test_points_of_the_roofline_are_under_its_roof():
    figure = plot.roofline(ROWS)
    (ax,) = figure.axes
    roof, *drawn = ax.lines
    assert max(roof.get_ydata()) == pytest.approx(50.0)
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in drawn if len(line.get_xdata()) == 1}
    assert points == {(2.0, 1.8), (2.0, 0.9), (4000.0, 40.0)}
    assert all(y <= min(50.0, x) for x, y in points)


def test_caption_names_machine_versions_commit_and_dates():
    rows = [*ROWS, row(commit="def", date="2026-02-03T00:00:00+00:00")]
    assert plot.caption(rows) == "GPU; torch 2.0 with triton 3.0; commit abc, def; 2026-01-02 to 2026-02-03"


def written(folder, rows, *arguments):
    records = folder / "ops.jsonl"
    records.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert plot.main(["--records", str(records), "--out", str(folder), *arguments]) == 0
    return {name: (folder / f"{name}.svg").read_bytes() for name in ("ops", "roofline")}


def test_files_are_the_same_bytes_again_and_show_one_gpu(tmp_path):
    rows = [row(gpu="old", date="2025-01-01T00:00:00+00:00"), *ROWS]
    first = written(tmp_path, rows)
    assert written(tmp_path, rows) == first
    for svg in first.values():
        texts = [e.text for e in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
        assert {"glu", "linear"} <= set(texts)
        assert "GPU; torch 2.0 with triton 3.0; commit abc; 2026-01-02" in texts
    assert b"old; torch" in written(tmp_path, rows, "--gpu", "old")["ops"]


@pytest.mark.parametrize("arguments", [["--gpu", "none"], ["--records", "nothing.jsonl"]])
def test_nothing_to_draw_is_one_line(tmp_path, arguments, capsys):
    with pytest.raises(SystemExit):
        written(tmp_path, ROWS, *arguments)
    assert "has no row" in capsys.readouterr().err


def test_the_shown_figures_carry_their_caption():
    for name in ("ops", "roofline"):
        text = (plot.ROOT / "docs" / f"{name}.svg").read_text("utf-8")
        assert "; torch " in text and "; commit " in text
