"""What a launch would compile on a GPU that is not there, and what no launch reached. See ``perf/gate.py``."""

import ast
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
import triton.compiler
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import jit

from unsloth_core import backend, device, ops, optim  # noqa: F401  (ops and optim: all kernels are imported)

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "unsloth_core"


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


# Arguments that only count: heads, segments, steps of the search for a segment. Launches of these files that differ in
# nothing else are compiled once.
COUNTS = {"attention": {"HEADS", "GROUPS", "S", "STEPS"}}


@dataclass(frozen=True)
class Launch:
    """One thing to compile: the kernel as file.function, for which part, and the first call that led to it.

    ``facts``: its constants by name, the options, and ``dtype``, the first pointer's element type: what launch tables
    speak of. ``model``: that call has the shapes of a model, at which loads ought to be 16 bytes wide.
    ``key``: a hash of everything that determines the machine code."""

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
    _seen: set[Any] = field(default_factory=set)

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
            (torch.cuda, "current_device", lambda: -1),  # what a tensor on a CPU calls its device
            (torch._C, "_cuda_getCurrentRawStream", lambda _: 0),
            (FakeTensor, "data_ptr", _address),
            (triton.compiler, "compile", self._compile),
            (jit, "DependenciesFinder", Dependencies),
            (jit.JITCallable, "cache_key", property(_cache_key)),
        ):
            setattr(module, name, value)
        triton.runtime.driver.set_active(_Driver(self.target))  # type: ignore[arg-type]
        return FakeTensorMode(allow_non_fake_inputs=True)

    def _compile(self, source: Any, target: Any = None, options: Any = None, **_: Any) -> "_Compiled":
        if (alike := _alike(source, options)) not in self._seen:
            self._seen.add(alike)
            self.launches.append(self._describe(source, options))
            self.requests.append((source, dict(options)))
        return _Compiled(self.sites)

    def _describe(self, source: Any, options: Mapping[str, Any]) -> Launch:
        fn, names, (call, model) = source.fn, source.fn.arg_names, self._running
        pointers = [kind[1:] for kind in source.signature.values() if str(kind).startswith("*")]
        named = {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
        facts = {k: v for k, v in {**options, **named}.items() if isinstance(v, bool | int | float | str | None)}
        facts["dtype"] = (*pointers, "")[0]
        absent = [name for name, value in named.items() if value is None]
        shown = [f"{names[i]}={named[names[i]]}" for i in fn.constexprs if named.get(names[i]) is not None]
        shown += [f"without {','.join(absent)}"] if absent else []
        shown += [f"warps={options['num_warps']} stages={options['num_stages']}"]
        shown += [f"maxnreg={options['maxnreg']}"] if options["maxnreg"] else []
        name = " ".join([kernel_name(fn), self.target.name, facts["dtype"], *shown])
        chosen = sorted((k, v) for k, v in options.items() if k != "extern_libs")  # a path of this machine
        code = [source.hash(), sorted(source.constants.items(), key=str), chosen, self.target.name, triton.__version__]
        key = hashlib.sha256(str(code).encode()).hexdigest()[:32]
        return Launch(self.target, kernel_name(fn), facts, call, model, name, key)


def _alike(source: Any, options: Mapping[str, Any]) -> str:
    """What a launch has in common with those that need not be compiled beside it."""
    kernel, names = kernel_name(source.fn), source.fn.arg_names
    counts = {name for file, some in COUNTS.items() if kernel.startswith(file) for name in some}
    kinds = {name: kind for name, kind in source.signature.items() if name not in counts}
    known = [
        {path: v for path, v in d.items() if names[path[0]] not in counts} for d in (source.constants, source.attrs)
    ]
    return str((kernel, kinds, known, options))


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


class Dependencies(jit.DependenciesFinder):
    """Triton's hash of a kernel and all that it calls and names, here without comments and docstrings."""

    def __init__(self, *, src: str, **about: Any) -> None:
        (function,) = ast.parse(src).body
        assert isinstance(function, ast.FunctionDef)
        if ast.get_docstring(function):
            del function.body[0]
        super().__init__(src=ast.unparse(function), **about)


_CACHE_KEY = jit.JITCallable.cache_key


def _cache_key(fn: Any) -> str:
    """Wherever in its file the kernel stands."""
    line, fn.starting_line_number = fn.starting_line_number, 0
    try:
        return _CACHE_KEY.fget(fn)  # type: ignore[misc]
    finally:
        fn.starting_line_number = line


def _address(t: Tensor) -> int:
    return 2**20 + int(t.storage_offset()) * t.element_size()  # memory of its own starts at a round address


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
        file, code = os.path.relpath(path, ROOT), ast.parse(path.read_text("utf-8"))
        imported = [name.name for node in ast.walk(code) if isinstance(node, ast.ImportFrom) for name in node.names]
        launch = {"device.launch", *(name for name in imported if name == "launch")}
        for node in ast.walk(code):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in launch:
                lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                if not any((file, line) in sites for line in lines):
                    complaints.append(f"{file}:{node.lineno}: {UNREACHED} comes by this launch")
    return complaints


UNREACHED = "no case of perf/ops or perf/gate_cases.py"


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
        f"{row.table}: {UNREACHED} launches this row: {row.kernel} {dict(row.facts)}"
        for row in rows
        if not any(fits(launch, row.kernel, row.facts) for launch in launches)
    ]
