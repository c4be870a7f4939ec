"""Draw what was measured: ``python perf/plot.py`` makes docs/ops.svg and docs/roofline.svg of perf/records/ops.jsonl.

Of rows that measure the same the latest counts, and one figure shows one GPU. Each op appears at its first shape,
beside its fastest peer in the same run. A bar is the share of the machine's ceiling: the time that the least work would
take at the rates of a large copy and a large bf16 product, over the measured time. Its axis begins at 0. Colours are a
blue and a grey that differ in lightness too; text and lines read on white and on black."""

import argparse
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that a plain checkout is enough

from perf import ops  # noqa: E402
from unsloth_core.catalogue import RECORDS, Row, read_records  # noqa: E402

OURS, PEER, INK = "#3d8bd9", "#8f959c", "#727a83"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "unsloth_core",  # the same records, the same bytes
    "font.family": "sans-serif",
    "font.size": 9,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
    ),
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SAME = ("op", "direction", "shape", "dtype", "commit", "date")  # a run has one commit and one date
MARKERS = {"fwd": "o", "bwd": "^", "fwd+bwd": "s"}


@dataclass(frozen=True)
class Pair:
    """One op in one direction: our row, and that of the fastest peer in the same run if there is any."""

    ours: Row
    peer: Row | None

    @property
    def case(self) -> tuple[str, str]:
        """Op and shape."""
        return self.ours["op"], "x".join(map(str, self.ours["shape"]))


def pairs(rows: Sequence[Row]) -> list[Pair]:
    """Every op at the first shape that was measured of it, in the order of a forward pass."""
    first: dict[str, list[int]] = {}
    found = []
    order = [case.op for case in ops.cases(torch.device("cpu"))]
    peers = [row for row in rows if ops.is_peer(row["impl"])]
    for ours in (row for row in rows if row["impl"] == "ours"):
        if first.setdefault(ours["op"], ours["shape"]) != ours["shape"]:
            continue
        same = [p for p in peers if all(p[key] == ours[key] for key in SAME)]
        found.append(Pair(ours, min(same, key=lambda row: row["ms"], default=None)))
    return sorted(found, key=lambda pair: order.index(pair.ours["op"]))


def ceilings(rows: Sequence[Row]) -> tuple[float, float]:
    """Bytes and FLOPs a second that shares of the ceiling are shares of: each row reaches its share of one of them, and
    less of the other."""
    shares = [row["pct_of_ceiling"] / 100 for row in rows]
    bytes_per_s = max(1e9 * row["gbps"] / share for row, share in zip(rows, shares))
    return bytes_per_s, max(1e12 * row["tflops"] / share for row, share in zip(rows, shares))


def caption(rows: Sequence[Row]) -> str:
    """Machine, versions, commits and dates of the rows."""

    def all_of(values: Any) -> str:
        return ", ".join(sorted({str(value) for value in values}))

    versions = all_of(f"torch {row['torch']} with triton {row['triton']}" for row in rows)
    dates = sorted(row["date"][:10] for row in rows)
    span = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return f"{all_of(row['gpu'] for row in rows)}; {versions}; commit {all_of(row['commit'] for row in rows)}; {span}"


def bars(rows: Sequence[Row]) -> Figure:
    """Share of the ceiling, ours and the fastest peer's: forward on the left, backward on the right."""
    shown = pairs(rows)
    cases = list(dict.fromkeys(pair.case for pair in shown))
    height = 0.42 * len(cases) + 1.3
    figure = Figure(figsize=(9.8, height))
    for ax, title, kinds in zip(figure.subplots(1, 2), ("forward", "backward"), (("fwd",), ("bwd", "fwd+bwd"))):
        ax.set_title(title, loc="left", fontsize=10)
        for pair in (pair for pair in shown if pair.ours["direction"] in kinds):
            _bar_pair(ax, cases.index(pair.case), pair)
        ax.axvline(100, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        ax.set_xlim(0, 178)
        ax.set_xticks(range(0, 101, 25), [f"{share} %" for share in range(0, 101, 25)])
        ax.set_xlabel("of the machine's ceiling", loc="left")
        ax.set_yticks([])
        ax.set_ylim(len(cases) - 0.4, -0.6)
        if title == "forward":
            for at, (op, shape) in enumerate(cases):
                ax.text(-3, at - 0.2, op, ha="right", va="center")
                ax.text(-3, at + 0.2, shape, ha="right", va="center", fontsize=7.5)
    figure.legend(
        [Patch(color=OURS), Patch(color=PEER)],
        ["unsloth_core: time, and speed beside the fastest peer's", "the fastest peer, by name"],
        loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False,
    )  # fmt: skip
    figure.text(0.01, 0.09 / height, caption([pair.ours for pair in shown]), fontsize=7.5)
    figure.subplots_adjust(left=0.26, right=0.995, top=1 - 0.62 / height, bottom=0.68 / height, wspace=0.05)
    return figure


def _bar_pair(ax: Axes, at: int, pair: Pair) -> None:
    """Two bars; what there is to say about them stands in a column behind 100 %."""
    ours, peer = pair.ours, pair.peer
    speed = "" if peer is None else f"  {peer['ms'] / ours['ms']:.2f}×"
    both = "  both" if ours["direction"] == "fwd+bwd" else ""
    ax.barh(at - 0.2, ours["pct_of_ceiling"], 0.38, color=OURS)
    ax.text(107, at - 0.2, f"{ours['ms']:.3g} ms{speed}{both}", va="center", fontsize=7.5)
    if peer is not None:
        ax.barh(at + 0.2, peer["pct_of_ceiling"], 0.38, color=PEER)
        ax.text(107, at + 0.2, peer["impl"], va="center", fontsize=7.5)


def roofline(rows: Sequence[Row]) -> Figure:
    """Attained FLOP/s over arithmetic intensity, under the roof of the machine; log scales."""
    shown = pairs(rows)
    bytes_per_s, flops_per_s = ceilings(rows)
    ridge, peak = flops_per_s / bytes_per_s, flops_per_s / 1e12
    figure = Figure(figsize=(9.8, 6.2))
    ax = figure.subplots()
    ax.set_xscale("log")
    ax.set_yscale("log")
    intensities = [_intensity(pair.ours) for pair in shown]
    low, high = min(intensities) / 2, max(*intensities, ridge) * 60
    ax.plot([low, ridge, high], [low * bytes_per_s / 1e12, peak, peak], color=INK, linewidth=1)
    ax.text(high, 1.15 * peak, f"bf16 product: {peak:.3g} TFLOP/s", ha="right")
    ax.text(ridge / 1.4, peak, f"copy: {bytes_per_s / 1e9:,.0f} GB/s", ha="right")
    for pair in shown:
        marker, x = MARKERS[pair.ours["direction"]], _intensity(pair.ours)
        if pair.peer is not None:
            ax.plot([x, x], [pair.peer["tflops"], pair.ours["tflops"]], color=PEER, linewidth=0.7, zorder=1)
            ax.plot(x, pair.peer["tflops"], marker, color=PEER, markersize=4.5, fillstyle="none", zorder=2)
        ax.plot(x, pair.ours["tflops"], marker, color=OURS, markersize=4.5, zorder=3)
    named = [pair for pair in shown if pair.ours["direction"] != "bwd"]
    _names(ax, [pair for pair in named if _intensity(pair.ours) < ridge], at=9.0, top=peak / 60)
    _names(ax, [pair for pair in named if _intensity(pair.ours) >= ridge], at=high / 50, top=peak / 1.7)
    kinds = [("unsloth_core", OURS, "full"), ("fastest peer", PEER, "none")]
    ax.legend(
        [Line2D([], [], color=color, marker="o", linestyle="", fillstyle=fill) for _, color, fill in kinds]
        + [Line2D([], [], color=INK, marker=marker, linestyle="", fillstyle="none") for marker in MARKERS.values()],
        [name for name, _, _ in kinds] + ["forward", "backward", "both together"],
        loc="lower right", frameon=False,
    )  # fmt: skip
    ax.set_xlabel("least FLOPs per byte that has to move")
    ax.set_ylabel("TFLOP/s")
    figure.text(0.01, 0.015, caption([pair.ours for pair in shown]), fontsize=7.5)
    figure.subplots_adjust(left=0.075, right=0.985, top=0.97, bottom=0.14)
    return figure


def _intensity(row: Row) -> float:
    return 1e3 * row["tflops"] / row["gbps"]


def _names(ax: Axes, named: Sequence[Pair], at: float, top: float) -> None:
    """A column of names from ``top`` down, each with a line to its point."""
    line = {"arrowstyle": "-", "color": INK, "linewidth": 0.4, "shrinkA": 2, "shrinkB": 3, "relpos": (0, 0.5)}
    for i, pair in enumerate(sorted(named, key=lambda pair: -pair.ours["tflops"])):
        point, place = (_intensity(pair.ours), pair.ours["tflops"]), (at, top / 1.4**i)
        ax.annotate(pair.ours["op"], point, place, ha="left", va="center", fontsize=8, arrowprops=line)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="perf/plot.py", description="Draw the records of perf/run.py.")
    parser.add_argument("--records", type=Path, default=RECORDS, help="rows that perf/run.py wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the figures")
    parser.add_argument("--gpu", help="its name in the records; default: the one of the latest row")
    options = parser.parse_args(argv)
    rows = read_records(options.records)
    if not rows:
        parser.error(f"{options.records} has no rows; perf/run.py writes them")
    gpu = options.gpu or max(rows, key=lambda row: row["date"])["gpu"]
    if not (rows := [row for row in rows if row["gpu"] == gpu]):
        parser.error(f"{options.records} has no row of {gpu!r}")
    with mpl.rc_context(STYLE):
        for name, draw in (("ops", bars), ("roofline", roofline)):
            file = options.out / f"{name}.svg"
            text = inspect.cleandoc(draw.__doc__ or "")
            draw(rows).savefig(file, transparent=True, metadata={"Date": None, "Title": f"unsloth_core. {text}"})
            print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
