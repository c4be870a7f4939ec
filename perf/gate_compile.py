"""Compiles what a recorder noted, and reads figures off the machine code. See ``perf/gate.py``."""

import dataclasses
import gc
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import triton
import triton.compiler
import triton.language as tl
from triton.compiler import ASTSource

from perf.gate_record import Launch, Recorder, Target


@dataclass(frozen=True)
class Figures:
    """What the compiler says about one kernel. ``stack``: bytes per thread of spilled registers and local arrays."""

    registers: int
    stack: int
    shared: int
    serialized: bool  # ptxas waits after every wgmma
    products: tuple[str, ...]  # of the instructions wgmma, mma and tcgen05, those that it has
    wide: float  # of the bytes that loads and stores of global memory name, the share that goes 16 at a time
    seconds: float  # of a core, to compile it


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
        file = figures_file(recorder.launches[number], cache)
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


def figures_file(launch: Launch, cache: Path) -> Path:
    """Where the figures of a launch are kept, until its machine code or what is read off it changes."""
    return cache / f"{hashlib.sha256((launch.key + _MEASURE).encode()).hexdigest()[:32]}.json"


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
        compiled = _COMPILER(source, target=target.triton, options=options)
    sys.stdout.flush()
    said = os.pread(log, 2**24, 0).decode(errors="replace")
    part = file.with_suffix(f".{os.getpid()}")
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]  # and of ptxas
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in used)
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
