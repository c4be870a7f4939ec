"""The ops, described by their own code: formula, what is kept for backward, the least work, and what was measured.

Nothing here is written by hand: formula and residuals are read off the head of an op's file, bytes and FLOPs come from
its ``cost``, and times from the rows that ``perf/run.py`` appended, if this is a checkout."""

import dataclasses
import importlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ops
from .cost import Cost
from .ops import nf4

RECORDS = Path(__file__).resolve().parents[1] / "perf" / "records" / "ops.jsonl"
SETTING = "8,192 tokens of an 8B Llama in bf16"
# Kernels without a backward of their own are functions and no pairs: where they are.
FUNCTIONS = {
    "adamw": "optim.adamw",
    "global_norm": "optim.global_norm",
    "nf4_dequantize": "ops.nf4.dequantize",
    "nf4_matvec": "ops.nf4_matvec.nf4_matvec",
    "nf4_quantize": "ops.nf4.quantize",
}
NAMES = sorted([*ops.__all__, *FUNCTIONS])
# What the parameters of every `cost` are there; the letters are those of typing.py.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("N", "M", "rows", "keys"), 8192),
    **dict.fromkeys("STn", 1),  # of attention_decode and nf4_matvec: one sequence with one query
    "parameters": 41_943_040,  # adapters of rank 16 for all seven products
    **dict.fromkeys("DC", 4096),
    "F": 14336,
    "V": 128256,
    **dict.fromkeys(("H", "heads"), 32),
    **dict.fromkeys(("G", "kv_heads"), 8),
    "E": 8,
    "K": 128,
    "J": 64,
    "itemsize": 2,
    "lengths": [(8192, 8192)],
    "w": torch.empty(14336, 4096, dtype=torch.bfloat16, device="meta"),
}
WEIGHTS = {"linear_rope": (6144, 4096), "glu_linear": (4096, 14336)}  # of ops whose w has a shape of its own
WIDTH = 110
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One op, to be found at ``place``. ``work`` is its Cost by direction at ``SETTING``; ``cost`` says what counts."""

    name: str
    place: str
    signature: str
    formula: str
    residuals: str
    work: dict[str, Cost]
    contract: str
    cost: str


def entries() -> list[Entry]:
    """Every op of ``unsloth_core.ops``, and what has no gradient, by name."""
    return [entry(name) for name in NAMES]


def entry(name: str) -> Entry:
    """One op. Raises ValueError for a name that is none, LookupError for an op file that does not say enough."""
    if name not in NAMES:
        raise ValueError(f"ops: no op {name!r}, expected one of {', '.join(NAMES)}")
    place, _, function = FUNCTIONS.get(name, f"ops.{name}").rpartition(".")
    op = getattr(importlib.import_module(f"{__package__}.{place}"), function)
    file = importlib.import_module(op.__module__)  # named like its op, which hides it in the package
    head, doc = inspect.cleandoc(file.__doc__ or ""), inspect.getdoc(op) or ""
    return Entry(
        name=name,
        place=place,
        signature=f"{function}{_short(inspect.signature(op))}",
        formula=_formula(name, head),
        residuals=_residuals(name, head),
        work=_work(name, file.cost),
        contract=doc if head in doc else f"{doc}\n\n{head}",  # a pair's help has the head of its file already
        cost=inspect.getdoc(file.cost) or "",
    )


def _short(signature: inspect.Signature) -> str:
    """Parameters and defaults; their types stand in the contract, with shapes."""
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values() if p.name != "name"]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def _formula(name: str, head: str) -> str:
    """The first line of the head that is an equation, without what stands in columns to its right."""
    for line in head.splitlines():
        stated = line.removeprefix("Formula: ")
        if re.search(" [=←] ", stated) and (stated != line or line.startswith("    ")):
            equation = re.sub(r"\s+([=←])", r" \1", stated.strip())
            return re.split(r"\s{3,}|, where\b|\. ", equation)[0].rstrip(";.")
    raise LookupError(f"catalogue: the head of ops/{name}.py has no line with a formula")


def _residuals(name: str, head: str) -> str:
    """The sentence behind "Residuals:", or the one that says why there are none."""
    found = re.search(r"^(?:Residuals: |(?=Not differentiable))(.+?)\.(?=\s|\Z)", head, re.MULTILINE | re.DOTALL)
    if found is None:
        raise LookupError(f"catalogue: the head of ops/{name}.py has no line 'Residuals: ...' nor 'Not differentiable'")
    return " ".join(found[1].split()).replace("``", "")


def _work(name: str, cost: Callable[..., Cost]) -> dict[str, Cost]:
    """The cost of each direction at ``SETTING``."""
    parameters = inspect.signature(cost).parameters
    wanted = [p for p in parameters.values() if p.default is p.empty]
    if missing := [p.name for p in wanted if p.name not in SIZES]:
        raise LookupError(f"catalogue: cost of {name} takes {missing[0]!r}, which SIZES does not have")
    w = SIZES["w"].new_empty(WEIGHTS.get(name, SIZES["w"].shape))
    sizes = {**SIZES, "w": nf4.quantize(w) if name in FUNCTIONS else w}
    positional = [sizes[p.name] for p in wanted if p.kind is not p.KEYWORD_ONLY]
    named = {p.name: sizes[p.name] for p in wanted if p.kind is p.KEYWORD_ONLY}
    work = {"fwd": cost(*positional, **named)}
    if "backward" in parameters:
        work["bwd"] = cost(*positional, **named, backward=True)
    return work


# ---- what was measured


def read_records(file: Path = RECORDS) -> list[Row] | None:
    """The latest row of each (op, impl, direction, shape, dtype, gpu), in their order; None without the file."""
    if not file.is_file():
        return None
    with file.open(encoding="utf-8") as lines:
        return latest(json.loads(line) for line in lines if line.strip())


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that measure the same, the one with the latest date; none with a ``flaw``, which says why it is wrong."""
    kept: dict[Any, Row] = {}
    for row in (row for row in rows if "flaw" not in row):
        key = (row["op"], row["impl"], row["direction"], tuple(row["shape"]), row["dtype"], row["gpu"])
        if key not in kept or kept[key]["date"] <= row["date"]:
            kept[key] = row
    return list(kept.values())


def measured(name: str, rows: Sequence[Row]) -> list[Row]:
    """Rows of ours for an op, also those of its variants: ``linear_nf4`` is ``linear``'s."""

    def op_of(case: str) -> str:
        return max((op for op in NAMES if case == op or case.startswith(f"{op}_")), key=len, default=case)

    return [row for row in rows if row["impl"] == "ours" and op_of(row["op"]) == name]


# ---- for a reader


def table(rows: Sequence[Row] | None) -> str:
    """All ops; ``rows`` from :func:`read_records`. Of the measurements those at the first shape are shown."""
    blocks = [f"Ops, with their least work for {SETTING}. `unsloth-core ops NAME` shows the whole contract."]
    for item in entries():
        work = "; ".join(_direction(d, _spell(c)) for d, c in item.work.items())
        lines = [("formula", item.formula), ("keeps", item.residuals), ("least work", work)]
        if rows is not None:
            own = [row for row in measured(item.name, rows) if row["op"] == item.name]
            first = [row for row in own if row["shape"] == own[0]["shape"]]
            times = "; ".join(_direction(row["direction"], _spell_row(row)) for row in first)
            lines.append(("measured", f"{_shape(first[0])}: {times}" if first else "not yet"))
        blocks.append("\n".join([item.name, *(_labelled(label, text) for label, text in lines)]))
    return "\n\n".join([*blocks, _caption(rows)])


def contract(name: str, rows: Sequence[Row] | None) -> str:
    """Everything about one op."""
    item = entry(name)
    work = [f"    {_direction(d, _spell(c))}" for d, c in item.work.items()]
    parts = [f"uc.{item.place}.{item.signature}", item.contract, "\n".join([f"Least work for {SETTING}:", *work])]
    parts.append(item.cost)
    if rows is not None:
        found = measured(name, rows)
        for machine in dict.fromkeys(map(_machine, found)):
            times = [
                f"    {row['op']} {_shape(row)} {row['dtype']}, {_direction(row['direction'], _spell_row(row))}"
                for row in found
                if _machine(row) == machine
            ]
            parts.append("\n".join([f"Measured on {machine}:", *times]))
        if not found:
            parts.append("Not measured yet.")
    return "\n\n".join([*parts, _caption(rows)])


def _labelled(label: str, text: str) -> str:
    indent = " " * 14
    wrapped = textwrap.wrap(text, WIDTH - len(indent), break_long_words=False)
    return f"  {label}".ljust(len(indent)) + f"\n{indent}".join(wrapped)


def _direction(direction: str, text: str) -> str:
    return f"{direction.replace('fwd', 'forward').replace('bwd', 'backward').replace('+', ' and ')} {text}"


def _spell(cost: Cost) -> str:
    return f"{cost.bytes / 1e6:,.0f} MB, {cost.flops / 1e9:,.4g} GFLOP"


def _spell_row(row: Row) -> str:
    ratio = row["ratio_to_best_peer"]
    beside = "" if ratio is None else f", {ratio:.2f} x the fastest peer's speed"
    return f"{row['ms']:.3g} ms, {row['pct_of_ceiling']:.0f} % of the ceiling{beside}"


def _shape(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def _machine(row: Row) -> str:
    return f"{row['gpu']}, torch {row['torch']}, triton {row['triton']}, commit {row['commit']}, {row['date'][:10]}"


def _caption(rows: Sequence[Row] | None) -> str:
    """What the numbers mean, and where the times are from."""
    if rows is None:
        return "Measurements are in a checkout of the project, perf/records/ops.jsonl; the installed package has none."
    machines = sorted({f"{row['gpu']}, torch {row['torch']}, triton {row['triton']}" for row in rows})
    return textwrap.fill(
        "The ceiling is the least work at the rates of a large copy and a large bf16 product on the same machine. More "
        f"than 1 x a peer's speed is faster than it. Measured on {'; '.join(machines)}. How: perf/LOG.md.",
        WIDTH,
    )
