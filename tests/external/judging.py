"""What the judges share: a stand-in for what no op of ours does, and the counts at the end."""

import collections
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch

from unsloth_core import ops
from unsloth_core.device import interpreting

CHECKOUT = Path(os.environ["JUDGE_CHECKOUT"])
REPORT = Path(os.environ["JUDGE_REPORT"])
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MOST_ELEMENTS = 2**40 if DEVICE == "cuda" else 2**14 if interpreting() else 2**23


def skip(what: str) -> NoReturn:
    """The running test asks for ``what``, which is no op of ours."""
    pytest.skip(f"asks for {what}")


def fits(elements: int) -> None:
    """Skip the running test if a CPU would take too long for a tensor of this size."""
    if elements > MOST_ELEMENTS:
        pytest.skip(f"a tensor of more than {MOST_ELEMENTS} elements takes too long on this machine")


def op(name: str) -> Any:
    """An op of ours, when a test needs it."""
    return getattr(ops, name) if name in ops.__all__ else Absent(f"an op {name}")


class Absent:
    """Imports like anything, and skips the test that uses it."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, *args: Any, **keywords: Any) -> NoReturn:
        skip(self.what)

    def __getitem__(self, grid: Any) -> NoReturn:
        skip(f"the kernel {self.what}")

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class Replaced(ModuleType):
    """A module with our names; every other name is :class:`Absent`."""

    def __init__(self, name: str, names: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__path__ = []
        vars(self).update(names)

    def __getattr__(self, name: str) -> Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent(name)


class Counts:
    """A pytest plugin: outcomes by file, reasons of skips."""

    def __init__(self) -> None:
        self.files: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.skipped: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest for setup, call and teardown of a test."""
        if report.when == "call" or report.outcome != "passed":
            outcome = "expected to fail" if hasattr(report, "wasxfail") else report.outcome
            self.files[report.nodeid.partition("::")[0].rpartition("/")[2]][outcome] += 1
            if outcome == "skipped":
                reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
                self.skipped[reason.removeprefix("Skipped: ")] += 1

    def pytest_sessionfinish(self) -> None:
        """Called by pytest at the end."""
        where = torch.cuda.get_device_name() if DEVICE == "cuda" else "a CPU, "
        where += "" if DEVICE == "cuda" else "in the interpreter" if interpreting() else "with the reference backend"
        found = {"machine": f"{where}, torch {torch.__version__}", "files": self.files, "skipped": self.skipped}
        REPORT.write_text(json.dumps(found), "utf-8")
