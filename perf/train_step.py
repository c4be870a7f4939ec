"""Measure a whole LoRA training step: ``python perf/train_step.py --shape llama-3.1-8b --quant nf4 --runs 2:2048``.

Random weights (``random_model.py``), adapters on every linear, AdamW, no network. A run ``bs:seq[:steps]`` repeats the
step on one batch of ``bs`` sequences of ``seq`` random ids, every token but the first of each a target. One process
measures one implementation: ours, or a peer's of ``peers/steps.py`` where it can be imported, with the same shapes,
adapters, targets and optimizer. Each run is one JSON row, printed and appended to ``records/train.jsonl``.

``ms``: median over steps, after warm-up, between CUDA events recorded in front of consecutive steps, nothing waited for
in between: what a training loop takes. ``host_ms``: until a step's call returns when the GPU was idle, an upper bound
on what the host needs (null for runs of one or two steps). Peaks are those of all steps, the first included. ``mfu``
counts 4 FLOPs for each parameter of a linear (2 forward, 2 for the gradient of its input; a frozen one has no other)
and 3.5 forward passes of causal attention, without the adapters, over the dense bf16 rate of the GPU."""

import argparse
import collections
import dataclasses
import datetime
import gc
import importlib
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that a plain checkout is enough

from perf import random_model  # noqa: E402
from unsloth_core import data, lora, optim, random  # noqa: E402
from unsloth_core.autodiff import SAVE  # noqa: E402
from unsloth_core.models.decoder import Schedule  # noqa: E402
from unsloth_core.plan import plan, predict  # noqa: E402
from unsloth_core.train import OPTIMIZER_STATES, make_step  # noqa: E402

IMPLS = ("ours", "unsloth", "hf", "liger")
LR = 1e-4
# Dense bf16 FLOP/s by name of the GPU, from NVIDIA's data sheets (SXM).
PEAK_FLOPS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}
OPTIMIZERS = tuple(OPTIMIZER_STATES)

Step = Callable[[], Tensor]  # one optimizer step; returns its loss, a tensor on the device
Prepare = Callable[["Run"], "Step | Planned"]


@dataclasses.dataclass(frozen=True)
class Run:
    """One measurement."""

    batch: int
    seq: int
    steps: int
    policy: str

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch * self.seq


@dataclasses.dataclass(frozen=True)
class Planned:
    """The step of a run, and what was decided for it."""

    step: Step
    policy: str
    predicted_gib: float | None = None
    embed: str = "device"
    head: str = "device"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is the same for all runs of a process."""

    impl: str
    shape: str
    quant: str
    rank: int
    memory_gib: float | None
    optimizer: str
    capture: bool
    device: torch.device
    embed: str | None = None  # None: a plan's choice, else on the device
    head: str | None = None


def runs_of(text: str, steps: int, policies: Sequence[str]) -> list[Run]:
    """``2:2048,1:8192:2``: batch size, sequence length, and possibly the steps to measure; each with each policy."""
    runs = []
    for item in text.split(","):
        numbers = item.split(":")
        if len(numbers) not in (2, 3) or not all(n.isdecimal() and int(n) for n in numbers):
            raise ValueError(f"--runs has {item!r}, expected bs:seq or bs:seq:steps")
        batch, seq, *own = map(int, numbers)
        runs += [Run(batch, seq, own[0] if own else steps, policy) for policy in policies]
    return runs


def schedule_of(text: str) -> Schedule:
    """``default``: the library's own; ``recompute``: layer inputs only; ``attn,mid=offload``: to keep these calls.

    ``tile=``, ``chunk_logits=`` and ``decode_once=0`` among them are the other fields of the schedule."""
    policy: dict[str, str] | None = None
    others: dict[str, int] = {}
    for name, _, value in (item.partition("=") for item in text.split(",")):
        if name in ("tile", "chunk_logits", "decode_once"):
            others[name] = int(value)
        elif name != "default":
            policy = policy or {}
            if name != "recompute":
                policy[name] = value or SAVE
    return Schedule(policy, **others)


def ours(setting: Setting) -> Prepare:
    """The step of ``unsloth_core.train``."""
    quantize = None if setting.quant == "none" else setting.quant
    dtype = torch.bfloat16 if setting.device.type == "cuda" else torch.float32
    model, params = random_model.random_model(
        setting.shape, device=setting.device, dtype=dtype, quantize=quantize,
        embed=setting.embed or "device", head=setting.head or "device",
    )  # fmt: skip
    vocab = model.config.vocab_size

    def prepare(run: Run) -> Planned:
        nonlocal params
        raw = random_model.raw_config(setting.shape)
        facts = {
            "sequence": run.seq, "rank": setting.rank, "quantize": quantize, "optimizer_states": setting.optimizer,
            "dtype": dtype, "capture": setting.capture,
        }  # fmt: skip
        if run.policy == "plan":
            budget = None if setting.memory_gib is None else int(setting.memory_gib * 2**30)
            best = plan(raw, run.tokens, budget, embed=setting.embed, head=setting.head, **facts).best
            schedule, policy = best.schedule, best.describe()
        else:
            schedule, policy = schedule_of(run.policy), run.policy
            places = {"embed": setting.embed or "device", "head": setting.head or "device"}
            best = predict(raw, run.tokens, schedule, **places, **facts)
        params = random_model.placed(params, best.embed, best.head)
        adapters = lora.init(random.key(0), params, rank=setting.rank)
        optimizer = optim.adamw(LR, state_dtype=OPTIMIZER_STATES[setting.optimizer])
        state = optimizer.init(adapters)
        ids = random_model.random_ids(run.batch, run.seq, vocab)
        batch = data.from_tokens(ids, vocab_size=vocab).to(setting.device)
        step = make_step(model, params, optimizer, max_norm=None, policy=schedule, capture=setting.capture)

        def one() -> Tensor:
            nonlocal adapters, state
            adapters, state, metrics = step(adapters, state, [batch])
            return metrics["loss"]

        return Planned(one, policy, best.peak / 2**30, best.embed, best.head)

    return prepare


# ---- measuring


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one run."""

    ms: float
    wall_ms: float
    host_ms: float
    peak_alloc_gib: float
    peak_reserved_gib: float
    losses: list[float]


def measure(step: Step, run: Run, device: torch.device, warmup: int) -> Measured:
    """Time and memory of ``warmup + run.steps`` steps; see the head of this file."""
    cuda = device.type == "cuda"
    losses = [step() for _ in range(warmup)]
    _wait(device)
    marks: list[Any] = []

    def mark() -> None:
        if cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(time.perf_counter())

    begun = time.perf_counter()
    for _ in range(run.steps):
        mark()
        losses.append(step())
    mark()
    _wait(device)
    wall = (time.perf_counter() - begun) / run.steps
    times = [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in zip(marks, marks[1:])]
    host = math.nan
    if run.steps > 2:  # else a step is long, and what the host needs does not matter
        begun = time.perf_counter()
        losses.append(step())
        host = time.perf_counter() - begun
        _wait(device)
    return Measured(
        ms=statistics.median(times),
        wall_ms=1e3 * wall,
        host_ms=1e3 * host,
        peak_alloc_gib=torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0,
        peak_reserved_gib=torch.cuda.max_memory_reserved(device) / 2**30 if cuda else 0.0,
        losses=[float(loss) for loss in losses],
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def model_flops(shape: str, run: Run) -> float:
    """FLOPs of a step as ``mfu`` counts them."""
    c = random_model.raw_config(shape)
    d, f, size = (c[name] for name in ("hidden_size", "intermediate_size", "head_dim"))
    heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
    experts = c.get("num_local_experts") or c.get("num_experts") or 0
    if experts:  # a token goes through a few of them, and through the router
        f = c["num_experts_per_tok"] * c.get("moe_intermediate_size", f)
    layer = d * (2 * heads + 2 * kv) * size + 3 * d * f + d * experts
    linears = c["num_hidden_layers"] * layer + c["vocab_size"] * d
    attention = c["num_hidden_layers"] * 2 * run.seq * heads * size  # forward, causal: half of 4 S H D
    return run.tokens * (4 * linears + 3.5 * attention)


def mfu(shape: str, run: Run, ms: float, gpu: str) -> float | None:
    """Share of the GPU's dense bf16 rate; None where that is not known."""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    return None if peak is None else round(model_flops(shape, run) / (ms * 1e-3) / peak, 4)


def profile(step: Step, top: int) -> str:
    """Where the GPU's time of one step goes, by kernel and grid; and the share of the step in which it works."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not work:
        return "profile: no kernel was seen"
    groups: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for event in work:
        grid = "x".join(map(str, event["args"].get("grid", ["-"])))
        groups[event["name"], grid].append(event["dur"] / 1e3)
    total = sum(map(sum, groups.values()))
    span = (max(e["ts"] + e["dur"] for e in work) - min(e["ts"] for e in work)) / 1e3
    lines = [
        f"profile: {len(work)} kernels, {total:.1f} ms of work in {span:.1f} ms: "
        f"the GPU waits for the host {100 * max(0.0, 1 - total / span):.1f} % of the time",
        f"{'ms':>9} {'%':>5} {'calls':>6} {'us each':>8}  {'grid':<14} kernel",
    ]
    by_time = sorted(groups.items(), key=lambda item: -sum(item[1]))
    for (name, grid), times in by_time[:top]:
        ms = sum(times)
        lines.append(
            f"{ms:9.2f} {100 * ms / total:5.1f} {len(times):6} {1e3 * ms / len(times):8.1f}  {grid:<14} {name[:110]}"
        )
    rest = sum(sum(times) for _, times in by_time[top:])
    return "\n".join([*lines, f"{rest:9.2f} {100 * rest / total:5.1f}         the other {max(0, len(by_time) - top)}"])


# ---- the command line


def facts(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Without these a number means nothing; ``commit``: None asks git."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def row_of(setting: Setting, run: Run, made: Planned, found: Measured, about: dict[str, Any]) -> dict[str, Any]:
    """One line of records/train.jsonl."""
    return {
        "impl": setting.impl,
        "shape": setting.shape,
        "quant": setting.quant,
        "bs": run.batch,
        "seq": run.seq,
        "rank": setting.rank,
        "policy": made.policy,
        "memory_cap_gib": setting.memory_gib,
        "ms": round(found.ms, 3),
        "tok_s": round(run.tokens / found.ms * 1e3, 1),
        "peak_alloc_gib": round(found.peak_alloc_gib, 3),
        "peak_reserved_gib": round(found.peak_reserved_gib, 3),
        "predicted_peak_gib": None if made.predicted_gib is None else round(made.predicted_gib, 3),
        "loss_first": round(found.losses[0], 5),
        "loss_last": round(found.losses[-1], 5),
        "mfu": mfu(setting.shape, run, found.ms, about["gpu"]),
        **about,
        "optimizer_states": setting.optimizer,
        "embed": made.embed,
        "head": made.head,
        "captured": setting.capture,
        "host_ms": None if math.isnan(found.host_ms) else round(found.host_ms, 3),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="perf/train_step.py", description="Measure a LoRA training step.")
    parser.add_argument("--impl", choices=IMPLS, default="ours")
    parser.add_argument("--shape", default="llama-3.1-8b", help="a model of random_model.py, -<n>layers cuts it")
    parser.add_argument("--quant", choices=("none", "nf4"), default="none", help="of the frozen linears")
    parser.add_argument("--runs", default="2:2048", help="bs:seq[:steps], separated by commas")
    parser.add_argument(
        "--memory",
        type=float,
        help="cap on the peak in GiB, for which the policy is planned; beside --policy it is what the run is held to",
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--policy",
        nargs="+",
        help="each is measured: plan (what fits into --memory, the default with it), default (the default without), "
        "recompute, or calls to keep such as attn,mid=offload,tile=2048 (peers: default, recompute)",
    )
    parser.add_argument("--embed", choices=random_model.PLACES, help="where it is, or that it is NF4; a plan chooses")
    parser.add_argument("--head", choices=random_model.PLACES, help="where the head is, or that it is NF4")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="fp32", help="how AdamW stores its moments")
    parser.add_argument("--capture", action="store_true", help="the step as a CUDA graph (ours)")
    parser.add_argument("--steps", type=int, default=8, help="that are measured")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="then print the N longest kernels")
    parser.add_argument("--out", type=Path, default=ROOT / "perf/records/train.jsonl", help="rows are appended here")
    parser.add_argument("--commit", help="what was measured, where git cannot say")
    parser.add_argument("--smoke", action="store_true", help="run anywhere; nothing is written")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """One row for each run; the exit code is 1 if one failed."""
    o = arguments(argv)
    cuda = torch.cuda.is_available()
    if not cuda and not o.smoke:
        raise SystemExit("train_step: no CUDA device; --smoke runs the same code anywhere, with --shape tiny")
    try:
        runs = runs_of(o.runs, o.steps, o.policy or ["default" if o.memory is None else "plan"])
        random_model.raw_config(o.shape)
    except ValueError as error:
        raise SystemExit(f"train_step: {error}") from None
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    setting = Setting(o.impl, o.shape, o.quant, o.rank, o.memory, o.optimizer, o.capture, device, o.embed, o.head)
    about = facts(device, o.commit)
    begun = time.perf_counter()
    build = ours if o.impl == "ours" else getattr(importlib.import_module("perf.peers.steps"), o.impl)
    prepare = build(setting)
    _wait(device)
    print(f"# {o.impl} {o.shape} {o.quant}: weights made in {time.perf_counter() - begun:.1f} s", flush=True)
    failed = False
    for run in runs:
        gc.collect()
        if cuda:
            torch._C._cuda_clearCublasWorkspaces()  # one for every stream of the run before, 32 MiB each on Hopper
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        try:
            begun = time.perf_counter()
            made = prepare(run)
            made = made if isinstance(made, Planned) else Planned(made, run.policy)
            found = measure(made.step, run, device, o.warmup)
            row = row_of(setting, run, made, found, about)
        except (torch.OutOfMemoryError, ValueError) as error:  # the latter: no plan fits, no such policy
            print(f"# {run.batch}:{run.seq} {run.policy}: {' '.join(str(error).split())[:300]}", flush=True)
            failed, made = True, None
            continue
        print(json.dumps(row), flush=True)
        took = time.perf_counter() - begun
        share = 100 * found.host_ms / found.ms
        print(
            f"# {run.batch}:{run.seq} policy {row['policy']}: {row['tok_s']:.0f} tok/s, {found.ms:.1f} ms (wall "
            f"{found.wall_ms:.1f}, host {found.host_ms:.1f} = {share:.0f} %), peak {found.peak_alloc_gib:.2f} GiB "
            f"(predicted {row['predicted_peak_gib']}, reserved {found.peak_reserved_gib:.2f}), "
            f"loss {found.losses[0]:.4f} -> {found.losses[-1]:.4f}; all of it took {took:.1f} s",
            flush=True,
        )
        if o.memory is not None and row["peak_alloc_gib"] > o.memory:
            print(f"# {run.batch}:{run.seq}: peak {row['peak_alloc_gib']} GiB, over --memory {o.memory}", flush=True)
            failed = True
        if not o.smoke:
            o.out.parent.mkdir(parents=True, exist_ok=True)
            with o.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if o.profile and cuda:
            print(profile(made.step, o.profile), flush=True)
        del made
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
