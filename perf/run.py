"""Measure every op on a CUDA machine: ``python perf/run.py [OP ...]``. What is measured stands in ``perf/ops/``.

An implementation is timed only if its outputs and gradients agree with the oracle (the reference in fp32 or better) in
this same process. Forward and backward apart, by CUDA events, ours and the peers' in turns, the median of all. Cold L2:
arguments and outputs rotate through more memory than L2 holds. The GPU sleeps before every call for as long as the host
needs to launch it, so that the time is the GPU's; the host's own time is another column. What only generation runs is
timed as generation runs it: one call of many in a CUDA graph.

At its power limit a GPU is as fast as the work before has left it cool, so who follows whom must not decide. Turns are
balanced: each implementation follows each other one equally often and is equally often first, second, and so on
(``rounds_of``). All sleep equally long before a call, since sleeping cools. And a turn begins with calls that are not
timed (``turn_of``), so that each is measured in the state that it brings about itself, as in a loop of its own; balance
is for what is left of its predecessor's.

Bytes and FLOPs are the op's ``cost``: what has to be moved and computed at least, whoever does it. The ceiling is what
this machine reached in this run: a copy (bytes read and written) and a bf16 product of 8192 x 8192 matrices."""

import argparse
import collections
import contextlib
import datetime
import functools
import gc
import importlib
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that a plain checkout is enough

from perf import ops, peers  # noqa: E402
from perf.ops import REFERENCE, Case, Random, Shape  # noqa: E402
from unsloth_core import tree  # noqa: E402

# Allowed relative norm of an error, for results that are rounded in this dtype a few times on the way.
BOUND = {torch.bfloat16: 2**-6, torch.float32: 2**-20}
LEAST_ROUNDS = 3
# A turn's calls before those that are timed: so long, but not more than so many. In turns of three calls of 10 ms that
# followed a hotter or a cooler kernel, medians differed by 7 %, so two calls of three felt it. Shorter calls have the
# sleep before each to cool in, and would need hundreds.
LEAD_MS, LEAD_CALLS = 25.0, 8
RATIOS = {"ratio_to_cudnn": "sdpa cudnn", "ratio_to_flash": "sdpa flash"}
Call = Callable[[], Any]


@dataclass
class Machine:
    """Where the measurement runs, how a call is timed there, and the ceilings once they are known."""

    device: torch.device
    smoke: bool
    bytes_per_s: float = math.nan
    flops_per_s: float = math.nan

    @property
    def name(self) -> str:
        """Of the GPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def synchronize(self) -> None:
        """Wait for all work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def milliseconds(self, call: Call, host_us: float = 100.0, keep: Callable[[Any], Any] = lambda out: None) -> float:
        """Time of one call; ``keep(out)`` disposes of its result."""
        self.synchronize()
        if self.smoke:
            started = time.perf_counter()
            keep(call())
            self.synchronize()
            return 1e3 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(2000 * min(2 * host_us + 50, 200_000)))  # cycles, 2000 to the microsecond at most
        start.record()
        out = call()
        end.record()
        keep(out)
        end.synchronize()
        return start.elapsed_time(end)

    def replayed(self, calls: Sequence[Call]) -> list[float]:
        """Times of one call when a CUDA graph makes them all, one behind the other, as generation does."""
        calls[0]()  # what a first call allocates or compiles must not be captured
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]  # each output its own memory
        graph.replay()
        times = [self.milliseconds(graph.replay) / len(calls) for _ in range(15)]
        del kept
        return times

    def host_us(self, call: Call) -> float:
        """Median time until a call returns to the host, one after the other: of 100, or of 5 and what fits in 0.3 s.

        The GPU gets as far behind as small arguments let it, and catches up every 20 calls."""
        times: list[float] = []
        begun = time.perf_counter()
        least, most = (1, 1) if self.smoke else (5, 100)
        while len(times) < least or (len(times) < most and time.perf_counter() - begun < 0.3):
            if len(times) % 20 == 0:
                self.synchronize()
            started = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - started))
        return statistics.median(times)

    def extra_mib(self, call: Call) -> float:
        """Peak of allocated memory during a call, above what was allocated before; its results count."""
        if self.device.type != "cuda":
            return 0.0
        self.synchronize()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    def copies(self, size: int) -> int:
        """How many sets of ``size`` bytes it takes to fill L2 three times over."""
        if self.device.type != "cuda" or self.smoke:
            return 2
        return max(1, math.ceil(3 * torch.cuda.get_device_properties(self.device).L2_cache_size / max(size, 1)))

    def find_ceilings(self) -> None:
        """Measure a large copy and a large bf16 product."""
        elements, n = (2**12, 64) if self.smoke else (2**29, 8192)
        source, target = (torch.zeros(elements, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        a, b = (Random.seeded(i, self.device).normal(n, n) for i in range(2))
        seconds = [
            min(self.milliseconds(call) for _ in range(2 if self.smoke else 12)) / 1e3
            for call in (lambda: target.copy_(source), lambda: a @ b)
        ]
        self.bytes_per_s, self.flops_per_s = 2 * source.nbytes / seconds[0], 2 * n**3 / seconds[1]


# ---- who is measured when


def rounds_of(count: int) -> list[list[int]]:
    """Rounds in which each of ``count`` has one turn: within them, each follows each other one equally often, and each
    has every place equally often.

    E. J. Williams's Latin squares (1949): 0, 1, -1, 2, -2, ... modulo ``count`` has every difference once if ``count``
    is even, so its shifts have every pair of neighbours once. If ``count`` is odd, every difference comes twice or
    never, and the mirrored rounds have the others. Repeated until there are at least ``LEAST_ROUNDS``."""
    zigzag = [(place + 1) // 2 if place % 2 else -(place // 2) for place in range(count)]
    rounds = [[(each + shift) % count for each in zigzag] for shift in range(count)]
    if count % 2:
        rounds += [each[::-1] for each in rounds]
    return rounds * math.ceil(LEAST_ROUNDS / max(len(rounds), 1))


def turn_of(ms: float, turns: int) -> tuple[int, int]:
    """How many calls of ``ms`` milliseconds one of so many turns has: not timed, then timed.

    Of the latter there are 45 in all turns together, or what fits into 100 ms, but 6 at least."""
    lead = min(max(int(LEAD_MS / ms), 1), LEAD_CALLS)
    return lead, math.ceil(min(max(100 / ms, 6), 45) / turns)


# ---- one implementation of one op


def calls(case: Case, fn: Callable[..., Any], sets: Sequence[tuple[Any, ...]], direction: str) -> list[Call]:
    """One call without arguments per set of arguments."""
    return [_call(case, fn, args, direction) for args in sets]


def _call(case: Case, fn: Callable[..., Any], args: tuple[Any, ...], direction: str) -> Call:
    args = peers.prepared(fn, args)
    if direction == "fwd":
        return functools.partial(fn, *args)
    outs, wanted = tree.leaves(fn(*args)), case.wanted(*args)
    given = cotangents(outs)
    if direction == "bwd":
        return functools.partial(torch.autograd.grad, outs, wanted, given, retain_graph=True)
    return lambda: torch.autograd.grad(tree.leaves(fn(*args)), wanted, given)


def cotangents(outs: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers for outputs of any dtype: what bf16 holds."""
    random = Random.seeded(99, outs[0].device)
    return [random.normal(*o.shape).to(o.dtype) for o in outs]


def arguments(case: Case, shape: Shape, machine: Machine, seed: int) -> tuple[Any, ...]:
    """Arguments on the device, those that get a gradient marked."""
    args = case.make(Random.seeded(seed, machine.device), *shape)
    for t in case.wanted(*args):
        t.requires_grad_()
    return args


def results(case: Case, fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """Outputs and gradients; arguments are copied first, for a peer may write into them."""
    args = tree.map(lambda t: t.detach().clone(), args)
    for t in case.wanted(*args):
        t.requires_grad_()
    args = peers.prepared(fn, args)
    wanted = case.wanted(*args)
    outs = tree.leaves(fn(*args))
    gradients = torch.autograd.grad(outs, wanted, cotangents(outs)) if wanted else ()
    return [t.detach() for t in (*outs, *peers.restored(fn, gradients))]


def oracle(case: Case, reference: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """Outputs and gradients of a reference in fp32."""
    wide = tree.map(lambda t: t.detach().float() if t.is_floating_point() else t, args)
    return results(case, reference, wide)


def check(case: Case, fn: Callable[..., Any], args: tuple[Any, ...], truth: Sequence[Tensor]) -> None:
    """Raise ArithmeticError if an output or gradient is further from the truth than its dtype allows."""
    found = results(case, fn, args)
    if len(found) != len(truth):
        raise ArithmeticError(f"{len(found)} outputs and gradients, expected {len(truth)}")
    for i, (got, want) in enumerate(zip(found, truth)):
        if got.shape != want.shape:
            raise ArithmeticError(f"result {i} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        error = float((got.float() - want.float()).norm() / want.float().norm())
        if not error <= BOUND[case.dtype]:  # also for NaN
            raise ArithmeticError(f"result {i} is wrong: relative error {error:.2e}, allowed {BOUND[case.dtype]:.2e}")


# ---- one op


@dataclass
class Bench:
    """A run over ops: rows as they come, failures of ours, and notes about peers that do not run."""

    machine: Machine
    facts: dict[str, Any]  # what every row says about the machine and the code
    emit: Callable[[dict[str, Any]], None]
    with_compile: bool = False
    with_reference: bool = True
    libraries: Mapping[str, Mapping[str, Callable[..., Any]]] = field(default_factory=dict)  # peers by op and name
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def op(self, case: Case) -> None:
        """Check and measure one op at all its shapes; what goes wrong is recorded, never raised."""
        try:
            fns, host = self._checked(case)
            for shape in (case.tiny,) if self.machine.smoke else case.shapes:
                self._shape(case, shape, fns, host)
                self._free()
        except Exception as error:
            self._failed(case, "ours", error)
        self._free()

    def _checked(self, case: Case) -> tuple[dict[str, Callable[..., Any]], dict[tuple[str, str], float]]:
        """The implementations that are right, and their host times by (impl, direction)."""
        candidates = {"ours": case.ours, **case.peers, **self.libraries.get(case.op, {})}
        if self.with_compile and case.compiles:
            torch.compiler.reset()  # the number of compilations of one function is limited
            candidates["compile"] = torch.compile(plain(candidates), dynamic=False)
        shape = case.tiny if self.machine.smoke else case.small
        args = arguments(case, shape, self.machine, seed=0)
        truths = {impl: oracle(case, beside.reference, args) for impl, beside in case.yardsticks.items()}
        truth = oracle(case, case.peers[REFERENCE], args)
        if not self.with_reference:
            del candidates[REFERENCE]
        candidates |= {impl: beside.call for impl, beside in case.yardsticks.items()}
        fns, host = {}, {}
        for impl, fn in candidates.items():
            try:
                check(case, fn, args, truths.get(impl, truth))
                for direction in case.costs(args, *shape):
                    call = _call(case, fn, args, direction)
                    call()
                    host[impl, direction] = self.machine.host_us(call)
                fns[impl] = fn
            except Exception as error:
                self._failed(case, impl, error)
                if impl == "ours":
                    break
        return fns, host

    def _shape(
        self, case: Case, shape: Shape, fns: dict[str, Callable[..., Any]], host: dict[tuple[str, str], float]
    ) -> None:
        """Rows of all implementations at one shape."""
        if "ours" not in fns:
            return
        sets = [arguments(case, shape, self.machine, seed=1)]
        size = tree.nbytes(sets[0]) + tree.nbytes(fns["ours"](*sets[0]))
        sets += [arguments(case, shape, self.machine, seed=i) for i in range(2, self.machine.copies(size) + 1)]
        for direction, cost in case.costs(sets[0], *shape).items():
            ready: dict[str, list[Call]] = {}
            extra: dict[str, float] = {}
            once: dict[str, float] = {}
            for impl, fn in fns.items():
                try:
                    ready[impl] = calls(case, fn, sets, direction)
                    ready[impl][0]()  # compiles
                    extra[impl] = self.machine.extra_mib(ready[impl][0])
                    # One slow sample must not set the number of calls.
                    once[impl] = min(
                        self.machine.milliseconds(ready[impl][-1], host[impl, direction]) for _ in range(3)
                    )
                except Exception as error:
                    self._failed(case, impl, error, shape, direction)
                    ready.pop(impl, None)
                if impl not in once:
                    self._free()  # only now: until here the error held what it had allocated
            if case.replay and self.machine.device.type == "cuda":
                times = self._replayed(case, shape, direction, ready)
            else:
                times = self._in_turns(ready, once, {impl: host[impl, direction] for impl in ready})
            best = min((t for impl, t in times.items() if ops.is_peer(impl)), default=math.nan)
            own = {impl: beside.costs(sets[0], *shape)[direction] for impl, beside in case.yardsticks.items()}
            for impl, ms in times.items():
                work = own.get(impl, cost)
                seconds = work.seconds(bytes_per_s=self.machine.bytes_per_s, flops_per_s=self.machine.flops_per_s)
                row = {
                    "op": case.op,
                    "impl": impl,
                    "direction": direction,
                    "shape": list(shape),
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "ms": _round(ms),
                    "gbps": _round(work.bytes / ms / 1e6),
                    "tflops": _round(work.flops / ms / 1e9),
                    "pct_of_ceiling": _round(1e5 * seconds / ms),
                    "extra_mib": _round(extra[impl]),
                    "host_us": _round(host[impl, direction]),
                    "ratio_to_best_peer": None if math.isnan(best) or impl in own else _round(best / ms),
                }
                if case.op.startswith("attention"):  # its two yardsticks, whichever is faster
                    row |= {key: _round(times[peer] / ms) if peer in times else None for key, peer in RATIOS.items()}
                self.emit({**row, **self.facts})

    def _replayed(self, case: Case, shape: Shape, direction: str, ready: dict[str, list[Call]]) -> dict[str, float]:
        """Median milliseconds inside a CUDA graph."""
        times = {}
        for impl, calls in ready.items():
            try:
                times[impl] = statistics.median(self.machine.replayed(calls))
            except Exception as error:  # what cannot be captured
                self._failed(case, impl, error, shape, direction)
        return times

    def _in_turns(
        self, ready: dict[str, list[Call]], once: dict[str, float], host_us: dict[str, float]
    ) -> dict[str, float]:
        """Median milliseconds of implementations that take turns; see the head of this file."""
        names = list(ready)
        longest = max((us for impl, us in host_us.items() if impl != REFERENCE), default=0.0)
        rounds = [list(range(len(names)))] if self.machine.smoke else rounds_of(len(names))
        samples: dict[str, list[float]] = {impl: [] for impl in names}
        sources = {impl: itertools.cycle(calls) for impl, calls in ready.items()}
        for impl in (names[each] for row in rounds for each in row):
            lead, timed = (0, 1) if self.machine.smoke else turn_of(once[impl], len(rounds))
            kept: Any = collections.deque(maxlen=len(ready[impl]))  # outputs rotate too: freed, they would stay in L2
            rest = max(longest, host_us[impl])  # the slow reference rests longer, but nobody else for its sake
            taken = [self.machine.milliseconds(next(sources[impl]), rest, kept.append) for _ in range(lead + timed)]
            samples[impl] += taken[lead:]
        return {impl: statistics.median(ms) for impl, ms in samples.items()}

    def _failed(self, case: Case, impl: str, error: Exception, shape: Shape = (), direction: str = "") -> None:
        where = " ".join(filter(None, [case.op, impl, direction, "x".join(map(str, shape))]))
        text = f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if impl == "ours" or impl in case.yardsticks:
            self.failures.append(text)
            traceback.print_exception(error)
        else:
            self.notes.append(text)
        print(text, file=sys.stderr, flush=True)

    def _free(self) -> None:
        gc.collect()
        if self.machine.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # after an illegal access every call raises, this one too
                torch.cuda.empty_cache()


def plain(candidates: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """What a user of PyTorch would compile: eager code, else a call of PyTorch's own, else the reference."""
    best_first = ["eager", *(impl for impl in candidates if impl.startswith("F.")), REFERENCE]
    return next(candidates[impl] for impl in best_first if impl in candidates)


def _round(value: float) -> float:
    return float(f"{value:.4g}")


# ---- the table and the command line


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows for a reader."""
    heads = ("op", "shape", "dir", "impl", "ms", "GB/s", "TFLOP/s", "% ceiling", "MiB", "host us", "ratio")
    keys = ("ms", "gbps", "tflops", "pct_of_ceiling", "extra_mib", "host_us", "ratio_to_best_peer")
    lines = [list(heads)]
    for row in rows:
        numbers = ["-" if row[key] is None else f"{row[key]:.4g}" for key in keys]
        lines.append([row["op"], "x".join(map(str, row["shape"])), row["direction"], row["impl"], *numbers])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    )


def commit_of_checkout() -> str | None:
    """What git calls the state of this folder, or None without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def facts(machine: Machine, commit: str | None) -> dict[str, Any]:
    """Without these a number means nothing."""
    return {
        "gpu": machine.name,
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if an op of ours failed."""
    parser = argparse.ArgumentParser(prog="perf/run.py", description="Measure the ops on a CUDA machine.")
    parser.add_argument("op", nargs="*", help="ops to measure; all if none is named")
    parser.add_argument("--out", type=Path, default=ROOT / "perf/records/ops.jsonl", help="rows are appended here")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of eager PyTorch, as a peer")
    parser.add_argument("--no-reference", action="store_true", help="do not time our slow reference")
    parser.add_argument(
        "--peers",
        default=",".join(peers.DEFAULT),
        help=f"libraries to compare with, of {', '.join(peers.NAMES)}; '' for none",
    )
    parser.add_argument("--commit", help="what was measured, where git cannot say")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on any machine; nothing is written")
    options = parser.parse_args(argv)

    cuda = torch.cuda.is_available()
    if not cuda and not options.smoke:
        parser.error("no CUDA device; --smoke runs the same code on tiny shapes")
    commit = options.commit or commit_of_checkout()
    if commit is None and not options.smoke:
        parser.error("no git here to say what is measured; pass --commit")
    machine = Machine(torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"), options.smoke)
    cases = ops.cases(machine.device)
    if unknown := set(options.op) - {case.op for case in cases}:
        parser.error(f"no op {sorted(unknown)[0]!r}, expected some of {', '.join(case.op for case in cases)}")
    names = [name for name in options.peers.split(",") if name]
    if unknown := set(names) - set(peers.NAMES):
        parser.error(f"no peer {sorted(unknown)[0]!r}, expected some of {', '.join(peers.NAMES)}")
    libraries, missing = peers.load(names)
    if options.compile:  # a graph's backward runs many times here, so it must not reuse what it has saved
        importlib.import_module("torch._functorch.config").donated_buffer = False

    rows: list[dict[str, Any]] = []

    def emit(row: dict[str, Any]) -> None:
        rows.append(row)
        if not options.smoke:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    machine.find_ceilings()
    print(f"{machine.name}: copy {machine.bytes_per_s / 1e9:.4g} GB/s, bf16 product", end=" ")
    print(f"{machine.flops_per_s / 1e12:.4g} TFLOP/s", flush=True)
    bench = Bench(
        machine, facts(machine, commit), emit, options.compile, not options.no_reference, libraries, notes=missing
    )
    for case in cases:
        if not options.op or case.op in options.op:
            started = time.perf_counter()
            bench.op(case)
            print(f"{case.op}: {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)

    print(table(rows))
    for note in bench.notes:
        print(f"peer without a row: {note}")
    for failure in bench.failures:
        print(f"FAILED {failure}")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
