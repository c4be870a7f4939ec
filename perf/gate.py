"""The compile gate: every kernel, in every launch configuration that the tables can pick, compiled for GPUs that are
not there, and judged by what the compiler says. This is how a machine without a GPU keeps kernels fast.

``make gate`` runs it with the installed Triton and with Triton 3.6.0: the two allocate registers differently.

*What is compiled* is not a list. The ops themselves run, forward and backward, on tensors without memory, on a device
that says it is the target, and Triton is stopped where it would call its compiler: what it was about to compile, it
would compile on that GPU, with the same specialisation of every argument. So a new kernel, a changed table or another
number of warps is seen here without being told. What runs stands in ``perf/gate_cases.py``: the cases of
``perf/ops`` and what reaches the rest of the tables; a kernel, a launch or a row of a table that nothing reached
fails the gate.

*What is asserted* of each: it compiles; nothing spills; shared memory fits the part; wgmma is not serialised, and no
product falls back from it; kernels without a product move their bytes 16 at a time. Where that is not so today, the
figure stands in ``perf/gate_budgets.json``, and for each kernel and rule a reason: it may not grow, and when it shrinks
the budget follows. ``--write`` writes the figures, never the reasons."""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that a plain checkout is enough

from perf.gate_compile import Figures, compile_all  # noqa: E402
from perf.gate_record import (  # noqa: E402
    TARGETS,
    UNREACHED,
    Launch,
    Recorder,
    Target,
    kernels,
    reached,
    unreached_rows,
    unreached_sites,
)

FIGURES = ROOT / ".gate"  # of earlier runs
BUDGETS = ROOT / "perf" / "gate_budgets.json"


# ---- judging


WIDE = 0.5  # a kernel also moves numbers of rows and statistics, and has a second copy of its loop for the last tile
WORDS = {
    "compiles": "{}",
    "stack": "{} bytes of stack (spilled registers)",
    "shared": "{} bytes of shared memory, more than the part has",
    "serialized": "wgmma is serialized",
    "fallback": "a product is mma.sync, not wgmma or tcgen05",
    "narrow": "only {:.0%} of its bytes move 16 at a time",
}
Findings = dict[str, dict[str, Any]]  # by name of the launch, then by rule


def findings(launch: Launch, figures: Figures | str) -> dict[str, Any]:
    """What speaks against a kernel, by rule."""
    if isinstance(figures, str):
        return {"compiles": figures}
    found: dict[str, Any] = {}
    if figures.stack:
        found["stack"] = figures.stack
    if figures.shared > launch.target.shared:
        found["shared"] = figures.shared
    if figures.serialized:
        found["serialized"] = True
    if "mma" in figures.products and launch.target.capability >= (9, 0):
        found["fallback"] = True  # the matrix units of the generation before, a fraction as fast
    if launch.model and not figures.products and figures.wide < WIDE:
        found["narrow"] = figures.wide
    return found


def worst(results: Iterable[tuple[Launch, Figures | str]]) -> Findings:
    """All findings; launches of one name differ in the alignment of their arguments, and the worst of them counts."""
    found: Findings = {launch.name: {} for launch, _ in results}
    for launch, figures in results:
        for rule, figure in findings(launch, figures).items():
            before = found[launch.name].get(rule, figure)
            found[launch.name][rule] = figure if _beyond(rule, figure, before) else before
    return found


def judge(found: Findings, budget: Findings, reasons: Mapping[str, str]) -> list[str]:
    """One complaint for each finding beyond its budget, each budget beyond what is found, and each missing reason.

    ``reasons`` are by kernel and rule: "attention._dq stack". Budgets of launches that did not run are let alone."""
    complaints = []
    for name, rules in found.items():
        allowed = budget.get(name, {})
        for rule, figure in rules.items():
            if rule not in allowed or _beyond(rule, figure, allowed[rule]):
                beyond = f", budget {allowed[rule]}" if rule in allowed else ""
                complaints.append(f"{name}: {WORDS[rule].format(figure)}{beyond}")
            elif not reasons.get(reason := f"{name.split()[0]} {rule}"):
                complaints.append(f"{name}: its budget has no reason, expected one under {reason!r}")
        for rule, figure in allowed.items():
            if rule not in rules or _beyond(rule, figure, rules[rule]):
                complaints.append(f"{name}: {rule} {figure} is allowed, {rules.get(rule)} is needed: lower the budget")
    return complaints


def _beyond(rule: str, figure: Any, allowed: Any) -> bool:
    if rule == "compiles":  # the message may change with its line numbers
        return False
    return figure < allowed if rule == "narrow" else figure > allowed


def write_budgets(found: Findings, file: Path = BUDGETS, *, everything: bool = False) -> None:
    """What was found becomes the budget of this Triton, for the launches that ran; of ``everything``, the only one."""
    budgets = json.loads(file.read_text())
    mine = found if everything else {**budgets["figures"].get(triton.__version__, {}), **found}
    budgets["figures"][triton.__version__] = {name: mine[name] for name in sorted(mine) if mine[name]}
    file.write_text(json.dumps(budgets, indent=1) + "\n")


# ---- the command line


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 if there is no complaint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help="only these, as in 'attention' or 'attention._dq'")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this GPU; can be given several times")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time (default: the cores)")
    parser.add_argument("--figures", action="store_true", help="print the figures of every kernel")
    parser.add_argument("--write", action="store_true", help=f"make what is found the budget, in {BUDGETS.name}")
    chosen = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing would be compiled")

    started = time.perf_counter()
    results: list[tuple[Launch, Figures | str]] = []
    complaints: list[str] = []
    names: set[str] = set()
    sites: set[tuple[str, int]] = set()
    for target in (TARGETS[name] for name in chosen.target or TARGETS):
        parts = _in_a_process(_survey, target, chosen.kernels, chosen.jobs)
        wanted, target_names, target_sites, unreached = next(parts)
        names |= target_names
        sites |= target_sites
        complaints += [f"{target.name}: {line}" for line in unreached]
        title = f"Triton {triton.__version__}, {target.name}"
        for launch, figures in tqdm(parts, title, total=wanted, disable=None):
            results.append((launch, figures))
            if chosen.figures:
                print(figures, f"{launch.name} ({launch.call})", flush=True)
    if not chosen.target:  # a part alone need not reach what others do
        complaints += [f"{name}: {UNREACHED} launches it" for name in sorted(kernels().keys() - names)]
        complaints += unreached_sites(sites)
    found = worst(results)
    if chosen.write:
        write_budgets(found, everything=not (chosen.target or chosen.kernels))
    budgets = json.loads(BUDGETS.read_text())
    complaints += judge(found, budgets["figures"].get(triton.__version__, {}), budgets["reasons"])
    print(*complaints, sep="\n")
    took = time.perf_counter() - started
    print(f"Triton {triton.__version__}: {len(results)} kernels in {took:.0f} s, {len(complaints)} complaints")
    return 1 if complaints else 0


def _survey(target: Target, wanted: Sequence[str], jobs: int) -> Iterator[Any]:
    """Of one target: how many are to be compiled, the kernels and lines that were reached, the rows that were not; then
    every launch with its figures."""
    from perf import gate_cases

    recorder = Recorder(target)
    with recorder.pretending():
        gate_cases.run(recorder)
    names = [launch.kernel for launch in recorder.launches]
    chosen = [i for i, name in enumerate(names) if not wanted or name.startswith(tuple(wanted))]
    launched = {source.fn for source, _ in recorder.requests}
    rows = unreached_rows(recorder.launches, gate_cases.rows(target))
    yield len(chosen), reached(launched), recorder.sites, rows
    for number, figures in compile_all(recorder, chosen, jobs, FIGURES):
        yield recorder.launches[number], figures


def _in_a_process(generator: Callable[..., Iterator[Any]], *args: Any) -> Iterator[Any]:
    """What ``generator(*args)`` yields in a fork of this process."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def send(sender: Connection) -> None:
        for value in generator(*args):
            sender.send(value)

    process = context.Process(target=send, args=(sender,))
    process.start()
    sender.close()  # or this process would wait for itself
    while True:
        try:
            yield receiver.recv()
        except EOFError:
            break
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{generator.__name__}{args[:1]}: ended with {process.exitcode}, see above")


if __name__ == "__main__":
    sys.exit(main())
