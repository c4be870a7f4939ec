"""Search better launch parameters on this CUDA machine: ``python perf/tune.py [OP ...]``.

Launch parameters are read at the moment of a launch from the globals of an op's file: a dictionary of rows, a function
of shapes that gives a tuple, or a number. ``KNOBS`` names them. For every entry that the shapes of ``perf/ops/`` use,
the search walks from today's values downhill, one number doubled, halved or (pipeline stages) moved by one at a time,
as long as that is more than 1 % faster. A candidate counts only if outputs and gradients agree with those of today's
table, in this process. At the end today's and the best entry are timed again, in turns, and the best is printed as
Python source with both times. ``--check`` says where today's entry is more than 3 % slower than the best found, and
exits with 1.

Nothing is written: an entry gets into an op's file by hand, with its test and its row from ``perf/run.py``."""

import argparse
import contextlib
import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that a plain checkout is enough

from perf import ops, run  # noqa: E402
from perf.ops import Case, Shape  # noqa: E402
from unsloth_core import prepared  # noqa: E402

# Which globals of unsloth_core/ops/<file>.py hold launch parameters, and the cases whose speed they decide.
KNOBS = {
    ("attention", "TABLE"): ("attention",),
    ("product", "CONFIGS"): ("linear", "linear_lora", "linear_lora_qkv", "linear_nf4"),
    ("low_rank", "CONFIGS"): ("linear_lora", "linear_lora_qkv"),
    ("grouped_linear", "CONFIGS"): ("grouped_linear", "grouped_linear_combine"),
    ("rms_norm", "whole_rows"): ("rms_norm", "add_rms_norm"),
    ("rms_norm", "column_tile"): ("rms_norm", "add_rms_norm"),
    ("glu", "tile_shape"): ("glu",),
    ("rope", "tile"): ("rope",),
    ("embedding", "_tile"): ("embedding",),
    ("logits_row", "ONE_PASS_LANES"): ("cross_entropy",),
    ("logits_row", "TWO_PASS_LANES"): ("linear_cross_entropy",),
    ("layer_norm", "forward_tile"): ("layer_norm",),
    ("softmax", "LANES"): ("softmax_wide",),
    ("nf4", "_WORDS"): ("nf4_dequantize",),
    ("nf4", "_QUANTIZED"): ("nf4_quantize",),
    ("nf4_matvec", "configuration"): ("nf4_matvec",),
    ("dropout", "_BLOCK"): ("dropout",),
}
STEP, CHECK = 0.01, 0.03  # gains that count for a step of the search, and for --check
NUMBER = "its number"  # the only entry of a knob that is a number


# ---- knobs


class Knob:
    """One global, and what it says while this object watches: entries are keys, arguments, or ``NUMBER``."""

    def __init__(self, file: str, name: str) -> None:
        self.file, self.name = file, name
        self.home = importlib.import_module(f"unsloth_core.ops.{file}")
        self.original = vars(self.home)[name]
        self.seen: dict[Any, Any] = {}  # entry: today's value
        self.instead: dict[Any, Any] = {}  # entry: the value to try

    def _answer(self, entry: Any, today: Callable[[], Any]) -> Any:
        if entry not in self.seen:
            self.seen[entry] = today()
        return self.instead.get(entry, self.seen[entry])

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within, ops ask this knob; every module that imported the global does."""
        value: Any
        if callable(self.original):

            def value(*args: Any, **keywords: Any) -> Any:
                return self._answer((*args, *keywords.items()), lambda: self.original(*args, **keywords))
        elif isinstance(self.original, dict):
            knob, table = self, self.original

            class Rows(dict):  # type: ignore[type-arg]
                def __getitem__(self, key: Any) -> Any:
                    return knob._answer(key, lambda: table[key])

            value = Rows(table)
        else:
            value = self._answer(NUMBER, lambda: self.original)
        modules = [m for n, m in sys.modules.items() if n.startswith("unsloth_core.ops.")]
        holders = [m for m in modules if vars(m).get(self.name) is self.original]
        for module in holders:
            setattr(module, self.name, value)
        _forget(modules)
        try:
            yield
        finally:
            for module in holders:
                setattr(module, self.name, self.original)
            _forget(modules)

    def source(self, entry: Any, value: Any) -> str:
        """The entry as Python."""
        if entry is NUMBER:
            return f"{self.name} = {value!r}"
        if not callable(self.original):
            return f"{self.name}[{entry!r}] = {value!r}"
        given = ["=".join(map(str, part)) if isinstance(part, tuple) else repr(part) for part in entry]
        return f"{self.name}({', '.join(given)}) == {value!r}"


def _forget(modules: Sequence[Any]) -> None:
    """What functions of ops have computed from the knob before."""
    prepared.forget()
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()


def neighbours(value: Any) -> Iterator[Any]:
    """Values that differ in one number."""
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", [""] * len(value))
        for i, (name, part) in enumerate(zip(fields, value)):
            for other in (part - 1, part + 1) if name == "stages" else neighbours(part):
                parts = (*value[:i], other, *value[i + 1 :])
                yield type(value)(*parts) if name else parts
    elif isinstance(value, int) and not isinstance(value, bool):
        yield from (2 * value, value // 2)


def sensible(value: Any) -> bool:
    """No zeros, no stages beyond 6."""
    if isinstance(value, tuple):
        return all(map(sensible, value)) and getattr(value, "stages", 1) <= 6
    return not isinstance(value, int) or value >= 1


# ---- search


@dataclass
class Found:
    """An entry, today's value and time, and the best ones."""

    knob: Knob
    entry: Any
    what: str
    today: Any
    today_ms: float
    best: Any
    best_ms: float

    @property
    def gain(self) -> float:
        """Of time, as a fraction of today's."""
        return 1 - self.best_ms / self.today_ms

    def __str__(self) -> str:
        times = f"{self.today_ms:.4g} -> {self.best_ms:.4g} ms, today {self.today!r}"
        return f"{self.knob.source(self.entry, self.best)}  # {self.what}: {times}"


class Search:
    """Times one case at one shape and direction."""

    def __init__(self, machine: run.Machine, case: Case, shape: Shape, direction: str) -> None:
        self.machine, self.case, self.direction = machine, case, direction
        small = case.tiny if machine.smoke else case.small
        self.small = run.arguments(case, small, machine, seed=0)
        self.truth: list[Tensor] = run.results(case, case.ours, self.small)
        first = run.arguments(case, shape, machine, seed=1)
        size = run.tree.nbytes(first) + run.tree.nbytes(case.ours(*first))
        self.sets = [first, *(run.arguments(case, shape, machine, seed=i) for i in range(2, machine.copies(size) + 1))]
        self.what = f"{case.op} {'x'.join(map(str, shape))} {direction}"

    def milliseconds(self, rounds: int = 3) -> float:
        """Median of a few calls with the knobs as they are."""
        calls = run.calls(self.case, self.case.ours, self.sets, self.direction)
        calls[0]()
        host = 0.0 if self.machine.smoke else self.machine.host_us(calls[0])
        count = 1 if self.machine.smoke else max(rounds, len(calls), 9)
        return statistics.median(self.machine.milliseconds(calls[i % len(calls)], host) for i in range(count))

    def right(self) -> bool:
        """Whether results with the knobs as they are agree with today's, and nothing raises."""
        try:
            run.check(self.case, self.case.ours, self.small, self.truth)
        except Exception:  # too much shared memory, a shape that the compiler refuses, a wrong result
            return False
        return True

    def best(self, knob: Knob, entry: Any, seconds: float) -> Found:
        """Downhill from today's value until nothing is faster or time is over."""
        today = best = knob.seen[entry]
        best_ms = self.milliseconds()
        tried, pending, ends = {today}, list(neighbours(today)), time.perf_counter() + seconds
        while pending and time.perf_counter() < ends:
            candidate = pending.pop(0)
            if candidate in tried or not sensible(candidate):
                continue
            tried.add(candidate)
            with _trying(knob, entry, candidate):
                ms = self._time_if_right()
            if ms is not None and ms < (1 - STEP) * best_ms:
                best, best_ms, pending = candidate, ms, list(neighbours(candidate))
        return Found(knob, entry, self.what, today, *self._in_turns(knob, entry, today, best))

    def _time_if_right(self) -> float | None:
        if not self.right():
            return None
        try:
            return self.milliseconds()
        except Exception:  # the large shape may take what the small one did not
            return None

    def _in_turns(self, knob: Knob, entry: Any, today: Any, best: Any) -> tuple[float, Any, float]:
        """Today's time, the winner, and its time: today's value wins unless the other one is faster again."""
        times: dict[Any, list[float]] = {today: [], best: []}
        for _ in range(1 if self.machine.smoke else 3):
            for value, ms in times.items():
                with _trying(knob, entry, value):
                    ms.append(self.milliseconds())
        medians = {value: statistics.median(ms) for value, ms in times.items()}
        winner = min(medians, key=lambda value: medians[value])
        return medians[today], winner, medians[winner]


@contextlib.contextmanager
def _trying(knob: Knob, entry: Any, value: Any) -> Iterator[None]:
    knob.instead[entry] = value
    try:
        with knob.watched():
            yield
    finally:
        del knob.instead[entry]


def tune(machine: run.Machine, cases: Sequence[Case], seconds: float) -> Iterator[Found]:
    """Every entry that the shapes of these cases use."""
    for case in cases:
        knobs = [Knob(*place) for place, names in KNOBS.items() if case.op in names]
        for shape in (case.tiny,) if machine.smoke else case.shapes:
            for direction in case.costs(run.arguments(case, shape, machine, seed=0), *shape) if knobs else ():
                search = Search(machine, case, shape, direction)
                for knob in knobs:
                    knob.seen.clear()
                    with knob.watched():
                        search.milliseconds()
                    for entry in list(knob.seen):
                        yield search.best(knob, entry, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="perf/tune.py", description="Search better launch parameters.")
    parser.add_argument("op", nargs="*", help="cases of perf/ops/; all if none is named")
    parser.add_argument("--seconds", type=float, default=60.0, help="longest search of one entry")
    parser.add_argument("--check", action="store_true", help="exit with 1 if today's table loses more than 3 %%")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on any machine: times mean nothing")
    options = parser.parse_args(argv)
    cuda = torch.cuda.is_available()
    if not cuda and not options.smoke:
        parser.error("no CUDA device; --smoke runs the same code on tiny shapes")
    machine = run.Machine(
        torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"), options.smoke
    )
    cases = {case.op: case for case in ops.cases(machine.device)}
    if unknown := set(options.op) - cases.keys():
        parser.error(f"no op {sorted(unknown)[0]!r}, expected some of {', '.join(cases)}")
    print(f"# {machine.name}, torch {torch.__version__}, triton {triton.__version__}", flush=True)
    slow = 0
    for found in tune(
        machine, [case for op, case in cases.items() if not options.op or op in options.op], options.seconds
    ):
        late = found.gain > CHECK
        slow += late
        if not options.check or late:
            print(found, flush=True)
    if options.check:
        print(f"# {slow} entries of today are more than {CHECK:.0%} slower than the best found")
    return int(options.check and slow > 0)


if __name__ == "__main__":
    sys.exit(main())
