"""Public test suites as judges of our ops: ``python tests/external/run.py --liger CHECKOUT --attorch CHECKOUT``.

Their tests run as they stand in a checkout of theirs; only what they test is replaced, by ours (``judge_*.py``). A test
that asks for something no op of ours has is skipped, with the name of what it asks for; the counts say so. Without a
GPU the tests run on the CPU with the reference backend, or, under TRITON_INTERPRET=1, with the kernels themselves.
Nothing of those projects is kept here, and nothing is written into their checkouts: the tests run from a copy."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SUITES = ("liger", "attorch")


def judge(suite: str, checkout: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run one suite in a process of its own; its counts, as :mod:`judging` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        root, report = Path(folder) / suite, Path(folder) / "report.json"
        _copy(checkout, root)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # Liger's tests ask PyTorch for deterministic algorithms
            "JUDGE_CHECKOUT": str(root),
            "JUDGE_REPORT": str(report),
        }
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, f"--rootdir={root}", f"--confcutdir={root}"]
        command += ["-p", f"judge_{suite}", "-p", "no:cacheprovider", "-q", "-rfE"]
        subprocess.run([*command, *arguments], env=environment, cwd=root, check=False)
        if not report.is_file():
            raise SystemExit(f"{suite}: the tests did not run to their end")
        return {"suite": suite, "commit": _commit(checkout), **json.loads(report.read_text("utf-8"))}


def _copy(checkout: Path, root: Path) -> None:
    """The Python files of a checkout: nothing is written into it, and without a GPU 'cuda' is to mean the CPU."""
    for file in checkout.rglob("*.py"):
        copy = root / file.relative_to(checkout)
        copy.parent.mkdir(parents=True, exist_ok=True)
        text = file.read_text("utf-8")
        copy.write_text(text if torch.cuda.is_available() else text.replace("'cuda'", "'cpu'"), "utf-8")


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "of unknown commit"


def summary(result: dict[str, Any]) -> str:
    """Counts by file, and why tests were skipped."""
    lines = [f"{result['suite']} {result['commit']} on {result['machine']}"]
    for file, counts in result["files"].items():
        lines.append(f"  {file}: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    lines += [f"  {n} skipped: {reason}" for reason, n in sorted(result["skipped"].items(), key=lambda item: -item[1])]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 1 if a test that ran failed."""
    parser = argparse.ArgumentParser(prog="tests/external/run.py", description="Public test suites judge our ops.")
    for suite in SUITES:
        variable = f"UNSLOTH_CORE_{suite.upper()}"
        parser.add_argument(
            f"--{suite}", type=Path, default=os.environ.get(variable), help=f"its checkout; default: ${variable}"
        )
    parser.add_argument("pytest", nargs="*", help="passed on to pytest, after --")
    options = parser.parse_args(argv)
    chosen = {suite: Path(given) for suite in SUITES if (given := getattr(options, suite))}
    if not chosen:
        parser.error("no checkout given")
    for suite, checkout in chosen.items():
        if not checkout.is_dir():
            parser.error(f"--{suite}: {checkout} is not a folder")
    results = [judge(suite, checkout, options.pytest) for suite, checkout in chosen.items()]
    print("\n\n".join(map(summary, results)))
    return int(any(outcomes.get("failed", 0) for result in results for outcomes in result["files"].values()))


if __name__ == "__main__":
    sys.exit(main())
