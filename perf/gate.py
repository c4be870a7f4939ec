"""The compile gate: every kernel, in every launch configuration that the tables can pick, compiled for GPUs that are
not there, and judged by what the compiler says. This is how a machine without a GPU keeps kernels fast.

``make gate`` runs it with the installed Triton and with Triton 3.6.0: the two allocate registers differently.

*What is compiled* is not a list. The ops themselves run, forward and backward, on tensors without memory, on a device
that says it is the target, and Triton is stopped where it would call its compiler: what it was about to compile, it
would compile on that GPU, with the same specialisation of every argument. So a new kernel, a changed table or another
number of warps is seen here without being told. What runs stands in ``perf/gate_cases.py``: the cases of
``perf/ops.py`` and what reaches the rest of the tables; a kernel, a launch or a row of a table that nothing reached
fails the gate.

*What is asserted* of each: it compiles; nothing spills; shared memory fits the part; wgmma is not serialised, and no
product falls back from it; kernels without a product move their bytes 16 at a time. Where that is not so today, the
figure stands in ``perf/gate_budgets.json``, and for each kernel and rule a reason: it may not grow, and when it shrinks
the budget follows. ``--write`` writes the figures, never the reasons."""

import argparse
import ast
import dataclasses
import gc
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import triton
import triton.compiler
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that a plain checkout is enough

from unsloth_core import backend, device, ops, optim  # noqa: E402, F401  (ops and optim: all kernels are imported)

LIBRARY = ROOT / "unsloth_core"
FIGURES = ROOT / ".gate"  # of earlier runs
BUDGETS = ROOT / "perf" / "gate_budgets.json"


@dataclass(frozen=True)
class Target:
    """A GPU: its compute capability, and the two facts that launch tables look at."""

    capability: tuple[int, int]
    sms: int
    shared: int  # bytes that one program may have

    @property
    def name(self) -> str:
        """sm_90 and so on."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def triton(self) -> GPUTarget:
        """What Triton calls it."""
        return GPUTarget("cuda", 10 * self.capability[0] + self.capability[1], 32)


TARGETS = {
    target.name: target
    for target in (
        Target((8, 0), 108, 163 * 1024),  # A100
        Target((8, 9), 128, 99 * 1024),  # RTX 4090
        Target((9, 0), 132, 227 * 1024),  # H100
        Target((10, 0), 148, 227 * 1024),  # B200
    )
}


# ---- what a launch would compile


@dataclass(frozen=True)
class Launch:
    """One thing to compile: the kernel as file.function, for which part, and the first call that led to it.

    ``facts``: its constants by name, the options, and ``dtype``, the first pointer's element type: what launch tables
    speak of. ``model``: that call has the shapes of a model, at which loads ought to be 16 bytes wide.
    ``key``: a hash of everything that determines the machine code and what is read off it."""

    target: Target
    kernel: str
    facts: Mapping[str, Any]
    call: str
    model: bool
    name: str
    key: str


@dataclass
class Recorder:
    """Runs calls on a device that says it is ``target``, and notes what Triton would compile and which lines launch.

    For a process of its own: nothing that it replaces is put back, and no cache has seen another device."""

    target: Target
    launches: list[Launch] = field(default_factory=list)
    requests: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)  # what the compiler is handed, for each
    sites: set[tuple[str, int]] = field(default_factory=set)  # (file, line) of a launch
    _running: tuple[str, bool] = ("", False)

    def run(self, call: str, fn: Callable[[], Any], *, model: bool = False) -> None:
        """Note what ``fn()`` launches. Tensors are made in the context of :meth:`pretending`."""
        self._running = (call, model)
        fn()

    def pretending(self) -> FakeTensorMode:
        """The device, and the context in which tensors have no memory."""
        for module, name, value in (
            *_everywhere(device.capability, lambda _: self.target.capability),
            *_everywhere(device.sms, lambda _: self.target.sms),
            *_everywhere(device.is_fake, lambda _: False),  # or nothing would be launched
            (backend, "by_device", lambda _: "triton"),
            (torch.cuda, "current_device", lambda: None),  # which is the index of torch.device("cpu")
            (FakeTensor, "data_ptr", _address),
            (triton.compiler, "compile", self._compile),
        ):
            setattr(module, name, value)
        triton.runtime.driver.set_active(_Driver(self.target))  # type: ignore[arg-type]
        return FakeTensorMode(allow_non_fake_inputs=True)

    def _compile(self, source: Any, target: Any = None, options: Any = None, **_: Any) -> "_Compiled":
        fn, names, constants = source.fn, source.fn.arg_names, source.constants
        pointers = [kind[1:] for kind in source.signature.values() if str(kind).startswith("*")]
        named = {names[path[0]]: value for path, value in constants.items() if len(path) == 1}
        facts = {k: v for k, v in {**options, **named}.items() if isinstance(v, bool | int | float | str | None)}
        facts["dtype"] = (*pointers, "")[0]
        absent = [name for name, value in named.items() if value is None]
        shown = [f"{names[i]}={named[names[i]]}" for i in fn.constexprs if named.get(names[i]) is not None]
        shown += [f"without {','.join(absent)}"] if absent else []
        shown += [f"warps={options['num_warps']} stages={options['num_stages']}"]
        shown += [f"maxnreg={options['maxnreg']}"] if options["maxnreg"] else []
        call, model = self._running
        kernel = kernel_name(fn)
        code = [source.hash(), sorted(constants.items(), key=str), sorted(options.items(), key=str)]
        key = hashlib.sha256(str([*code, self.target.name, triton.__version__, _MEASURE]).encode()).hexdigest()[:32]
        name = " ".join([kernel, self.target.name, facts["dtype"], *shown])
        self.launches.append(Launch(self.target, kernel, facts, call, model, name, key))
        self.requests.append((source, dict(options)))
        return _Compiled(self.sites)


@dataclass
class _Compiled:
    """What stands where Triton expects a compiled kernel: to run it is to note who launched it."""

    sites: set[tuple[str, int]]
    function: Any = None
    packed_metadata: Any = None

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        frame = sys._getframe()
        while frame.f_back and frame.f_code is not device.launch.__code__:
            frame = frame.f_back
        caller = frame.f_back or frame
        self.sites.add((os.path.relpath(caller.f_code.co_filename, ROOT), caller.f_lineno))


@dataclass
class _Driver:
    """What Triton asks about the GPU that it believes to have."""

    target: Target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target.triton


def _address(t: Tensor) -> int:
    return 2**20 + t.storage_offset() * t.element_size()  # memory of its own starts at a round address


def _modules() -> list[Any]:
    return [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "unsloth_core"]


def _everywhere(old: Any, new: Any) -> list[tuple[Any, str, Any]]:
    """``new`` in every module that has imported ``old`` by name."""
    return [(module, name, new) for module in _modules() for name, value in vars(module).items() if value is old]


# ---- what nothing reached


def kernel_name(fn: Any) -> str:
    """file.function of a jitted function."""
    return f"{fn.__module__.split('.')[-1]}.{fn.__name__}"


def kernels() -> dict[str, Any]:
    """Every jitted function of the library, by name."""
    found = [v for m in _modules() for v in vars(m).values() if isinstance(v, triton.JITFunction)]
    return {kernel_name(fn): fn for fn in found if fn.__module__.startswith("unsloth_core.")}


def reached(launched: Iterable[Any]) -> set[str]:
    """Names of the jitted functions that were launched, and of those that they call."""
    names: set[str] = set()
    pending = list(launched)
    while pending:
        fn = pending.pop()
        if (name := kernel_name(fn)) not in names:
            names.add(name)
            called = {node.id for node in ast.walk(fn.parse()) if isinstance(node, ast.Name)}
            pending += [v for k in called if isinstance(v := fn.__globals__.get(k), triton.JITFunction)]
    return names


def unreached_sites(sites: set[tuple[str, int]], folder: Path = LIBRARY) -> list[str]:
    """Lines that launch a kernel and never ran."""
    complaints = []
    for path in sorted(folder.rglob("*.py")):
        file = os.path.relpath(path, ROOT)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "launch":
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                if not any((file, line) in sites for line in lines):
                    complaints.append(f"{file}:{node.lineno}: {_UNREACHED} comes by this launch")
    return complaints


_UNREACHED = "no case of perf/ops.py or perf/gate_cases.py"


@dataclass(frozen=True)
class Row:
    """A row of a launch table: some launch of ``kernel`` has to have these facts (a container: one of them)."""

    table: str
    kernel: str
    facts: Mapping[str, Any]


def fits(launch: Launch, kernel: str, facts: Mapping[str, Any]) -> bool:
    """Whether this is a launch of ``kernel`` with these facts."""

    def agrees(name: str, wanted: Any) -> bool:
        value = launch.facts.get(name, ...)
        return value in wanted if isinstance(wanted, range | tuple) else value == wanted

    return launch.kernel == kernel and all(agrees(*item) for item in facts.items())


def unreached_rows(launches: Sequence[Launch], rows: Iterable[Row]) -> list[str]:
    """Rows of launch tables that no launch has used."""
    return [
        f"{row.table}: {_UNREACHED} launches this row: {row.kernel} {dict(row.facts)}"
        for row in rows
        if not any(fits(launch, row.kernel, row.facts) for launch in launches)
    ]


# ---- compiling


@dataclass(frozen=True)
class Figures:
    """What the compiler says about one kernel. ``stack``: bytes per thread of spilled registers and local arrays."""

    registers: int
    stack: int
    shared: int
    serialized: bool  # ptxas waits after every wgmma
    products: tuple[str, ...]  # of the instructions wgmma, mma and tcgen05, those that it has
    wide: float  # of the bytes that loads and stores of global memory name, the share that goes 16 at a time
    seconds: float


def compile_all(
    recorder: Recorder, chosen: Sequence[int], jobs: int, cache: Path
) -> Iterator[tuple[int, Figures | str]]:
    """The chosen requests by number, with figures or with what went wrong, in the order of completion.

    A process per kernel: the compiler aborts on some input, and that must cost one kernel, not the run. Figures of
    earlier runs are in ``cache``."""
    context = multiprocessing.get_context("fork")
    cache.mkdir(exist_ok=True)
    _warm_up(recorder.target)
    running: dict[Any, tuple[int, Any, Path, Any]] = {}

    def finished() -> Iterator[tuple[int, Figures | str]]:
        for sentinel in wait(list(running)):
            number, process, file, log = running.pop(sentinel)
            process.join()
            said = os.pread(log.fileno(), 2**24, 0).decode(errors="replace")
            log.close()
            yield number, _read(file) or _cause(said, process.exitcode)

    for number in chosen:
        file = cache / f"{recorder.launches[number].key}.json"
        if figures := _read(file):
            yield number, figures
            continue
        log = tempfile.TemporaryFile()
        arguments = (recorder.target, *recorder.requests[number], file, log.fileno())
        process = context.Process(target=_compile, args=arguments)
        process.start()
        running[process.sentinel] = (number, process, file, log)
        if len(running) == jobs:
            yield from finished()
    while running:
        yield from finished()


def _read(file: Path) -> Figures | None:
    if not file.exists():
        return None
    figures = json.loads(file.read_text())
    return Figures(**{**figures, "products": tuple(figures["products"])})


def _cause(said: str, exitcode: int | None) -> str:
    """What a log names as the error."""
    lines = said.strip().splitlines()
    named = [line for line in lines if re.search("error|assert|abort|terminate", line, re.IGNORECASE)]
    return " | ".join((named or lines)[-2:])[:400] or f"the compiler ended with {exitcode}"


_COMPILER = triton.compiler.compile


@triton.jit
def _nothing(x):
    tl.store(x, 0)


def _warm_up(target: Target) -> None:
    """Before forking: the first compilation of a process costs half a second more than the others."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        _COMPILER(ASTSource(_nothing, {"x": "*i32"}), target=target.triton)
    gc.freeze()  # or every fork would copy the pages that its first collection touches


def _compile(target: Target, source: Any, options: dict[str, Any], file: Path, log: int) -> None:
    """In a process of its own: compile, and leave the figures in ``file``."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w")
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir, triton.knobs.nvidia.dump_ptxas_log = folder, True
        started = time.perf_counter()
        compiled = _COMPILER(source, target=target.triton, options=options)
        seconds = time.perf_counter() - started
    sys.stdout.flush()
    said = os.pread(log, 2**24, 0).decode(errors="replace")
    part = file.with_suffix(f".{os.getpid()}")
    figures = measure(compiled.asm["ptx"], said, compiled.metadata.shared, seconds)
    part.write_text(json.dumps(dataclasses.asdict(figures)))
    part.rename(file)


_ACCESS = re.compile(r"\b(?:ld|st)\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b")  # as in ld.global.v4.b32: 16 bytes
_CP_ASYNC = re.compile(r"cp\.async\.c[ag]\.shared\.global\S*\s*\[[^]]*\],\s*\[[^]]*\],\s*(0x[0-9a-f]+|\d+)")


def measure(ptx: str, said: str, shared: int, seconds: float = 0.0) -> Figures:
    """Figures from the assembly and from what ``ptxas -v`` said."""
    moved = [int(lanes or 1) * int(bits) // 8 for lanes, bits in _ACCESS.findall(ptx)]
    moved += [int(size, 0) for size in _CP_ASYNC.findall(ptx)]
    products = [name for name in ("tcgen05.mma", "wgmma.mma_async", "mma.sync") if re.search(rf"\b{name}", ptx)]
    return Figures(
        registers=max(map(int, re.findall(r"Used (\d+) registers", said)), default=0),
        stack=max(map(int, re.findall(r"(\d+) bytes stack frame", said)), default=0),
        shared=shared,
        serialized="serialized" in said,
        products=tuple(name.split(".")[0] for name in products),
        wide=round(sum(n for n in moved if n >= 16) / max(1, sum(moved)), 3),
        seconds=round(seconds, 2),
    )


_MEASURE = inspect.getsource(measure) + _ACCESS.pattern + _CP_ASYNC.pattern  # figures are of use only while it is so


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


def write_budgets(found: Findings, file: Path = BUDGETS) -> None:
    """What was found becomes the budget of this Triton, for the launches that ran."""
    budgets = json.loads(file.read_text())
    mine = {**budgets["figures"].get(triton.__version__, {}), **found}
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
        complaints += [f"{name}: {_UNREACHED} launches it" for name in sorted(kernels().keys() - names)]
        complaints += unreached_sites(sites)
    found = worst(results)
    if chosen.write:
        write_budgets(found)
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
    from perf import gate  # once: what perf/gate_cases.py imports is this module too

    sys.exit(gate.main())
