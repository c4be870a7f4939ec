"""The planner: the fastest way to run a training step in a given amount of memory, from a config alone.

It rehearses the step (:mod:`unsloth_core.rehearsal`) under one schedule after the other: what layers keep, on the
device or on the host, and whether they run in tiles; with embedding and head here or there. Of what fits, the fastest;
and where a faster schedule would just not fit, the last layers have it, as many as there is room for.

``peak`` means ``torch.cuda.max_memory_allocated``: what tensors take, in blocks of 512 bytes, and cuBLAS's workspace.
The CUDA context (about 0.5 GiB) and what the allocator holds in reserve come on top.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

from . import backend, weights
from .autodiff import INPUT, OFFLOAD, SAVE, listening
from .load import PLACES
from .models.decoder import Model, Schedule
from .rehearsal import CUBLAS, Found, Rehearsal
from .shapes import Shape

GIB = 2**30
LARGEST_TILE = 8192
LOW_MEMORY_LOGITS = 2**26
_WORTH_A_ROW = 0.95


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run the step: predicted ``peak`` (bytes), ``seconds``, and what both are made of."""

    schedule: Schedule
    embed: str  # "device", "host" or "nf4"
    head: str
    peak: int
    where: str  # the place of the peak
    seconds: float
    weights: int
    trained: int  # adapters and optimizer state
    kept: int  # between forward and backward, on the device
    away: int  # the same on the host

    @property
    def working(self) -> int:
        """What is there at the peak beside all of these: gradients, and what the place itself needs."""
        return max(0, self.peak - self.weights - self.trained - self.kept)

    def describe(self) -> str:
        """What is kept, in a few words."""
        parts = _describe(self.schedule.policy or {})
        if self.schedule.last:
            parts += [f"of the last {self.schedule.last[0]} layers {' and '.join(_describe(self.schedule.last[1]))}"]
        parts += [f"tiles of {self.schedule.tile}"] if self.schedule.tile else []
        parts += ["decode twice"] if not self.schedule.decode_once else []
        parts += ["few logits"] if self.schedule.chunk_logits else []
        on_host = [name for name, place in (("embedding", self.embed), ("head", self.head)) if place == "host"]
        parts += [f"{' and '.join(on_host)} on the host"] if on_host else []
        coded = [name for name, place in (("embedding", self.embed), ("head", self.head)) if place == "nf4"]
        parts += [f"{' and '.join(coded)} in NF4"] if coded else []
        return "; ".join(parts)


def _describe(policy: Mapping[str, str]) -> list[str]:
    saved = [name for name, fate in policy.items() if fate == SAVE and name != INPUT]
    gone = [name for name, fate in policy.items() if fate == OFFLOAD]
    parts = [f"save {', '.join(saved) or 'layer inputs'}"] if saved or INPUT not in gone else []
    return parts + ([f"offload {', '.join(gone)}"] if gone else [])


@dataclasses.dataclass(frozen=True)
class Plan:
    """The candidates that are worth looking at, fastest first, and the ``best`` of those that fit."""

    title: str
    tokens: int  # of a step
    budget: int | None
    best: Candidate
    candidates: tuple[Candidate, ...]

    @property
    def schedule(self) -> Schedule:
        """What ``model.loss(..., policy=)`` and ``finetune(..., policy=)`` take."""
        return self.best.schedule

    def __str__(self) -> str:
        best, gib = self.best, lambda n: f"{n / GIB:8.2f} GiB"
        budget = "no budget" if self.budget is None else f"budget {_size(self.budget)}"
        share = f"{self.tokens / best.seconds:,.0f} tokens/s"
        lines = [
            f"{self.title}, {budget}",
            f"  {best.describe()}",
            f"  predicted: {best.peak / GIB:.2f} GiB, {best.seconds * 1e3:.0f} ms a step, {share}",
            "",
            f"  {gib(best.weights)}  weights",
            f"  {gib(best.trained)}  adapters and optimizer state",
            f"  {gib(best.kept)}  kept between forward and backward" + (f" (and {best.away / GIB:.2f} GiB on the host)"
                                                                     if best.away else ""),
            f"  {gib(best.working)}  working set, gradients included",
            f"  {gib(best.peak)}  peak: {best.where}",
            "",
            f"  {'peak GiB':>8}  {'ms':>7}  {'tokens/s':>8}  alternatives",
        ]  # fmt: skip
        for c in self.candidates:
            mark = "*" if c is best else " "
            over = "  (too large)" if self.budget is not None and c.peak > self.budget else ""
            speed = f"{self.tokens / c.seconds:8,.0f}"
            lines.append(f"{mark} {c.peak / GIB:8.2f}  {c.seconds * 1e3:7.0f}  {speed}  {c.describe()}{over}")
        return "\n".join(lines)


def plan(
    model: Model | Mapping[str, Any],
    tokens: int,
    budget: int | str | None = None,
    *,
    embed: str | None = None,
    head: str | None = None,
    **step: Any,
) -> Plan:
    """The fastest schedule of a LoRA step on ``tokens`` packed tokens whose peak is at most ``budget``.

    ``model``: one that is loaded (``quantize`` says then how its weights are stored), or the content of a
    ``config.json``, which says itself where a checkpoint is in bitsandbytes' 4 bits. ``budget``: bytes, or text such as
    "24GiB"; by default no limit. ``embed``, ``head``: where they are, as for ``load``; None lets the plan choose
    between device and host (a tied head is where the embedding is). ``step``: the keywords of :func:`predict`. A pure
    function of these.
    Raises ValueError for options that are not such, and if nothing fits, with the smallest budget that would."""
    for name, place in (("embed", embed), ("head", head)):
        if place not in (None, *PLACES):
            raise ValueError(f"plan: {name} is {place!r}, expected one of {PLACES} or None")
    limit = parse_bytes(budget) if isinstance(budget, str) else budget
    run = Rehearsal(model, tokens, **step)
    if run.shape.config.tie_word_embeddings and embed != head and embed and head:
        raise ValueError(f"plan: embed is {embed!r} and head {head!r}, but this model's head is its embedding")
    found: list[Candidate] = []
    with backend.using("triton"):  # whatever the user tries here: it is the GPU's step that is planned
        for schedules in _stages(run):
            for schedule in tqdm(schedules, desc="planning", unit="schedule", leave=False, delay=2, disable=None):
                found += _candidates(run, schedule, embed, head)
            if any(limit is None or c.peak <= limit for c in found):
                break
        if limit is not None and (pair := _around(found, limit)):
            found += _between(run, *pair, limit)
    fits = [c for c in found if limit is None or c.peak <= limit]
    if not fits:
        least = min(found, key=lambda c: c.peak)
        raise ValueError(
            f"plan: a step on {tokens} tokens does not fit into {_size(limit or 0)}; the least is "
            f"{_size(least.peak, math.ceil)} ({least.describe()})"
        )
    best = min(fits, key=lambda c: (c.seconds, c.peak))
    return Plan(run.title, tokens * run.accumulate, limit, best, tuple(_frontier(found, best)))


def predict(
    model: Model | Mapping[str, Any],
    tokens: int,
    schedule: Schedule,
    *,
    embed: str = "device",
    head: str = "device",
    **step: Any,
) -> Candidate:
    """Peak and time of a step under ``schedule``.

    ``step``: ``sequence``, length of the segments, for the price of attention (default all tokens); ``quantize``,
    ``rank`` (16), ``targets`` ("all-linear"), ``dropout`` (0), ``optimizer_states`` ("fp32") and ``dtype`` (bfloat16)
    as for ``load``, ``lora.init`` and ``finetune``; ``accumulate`` (1), microbatches of ``tokens`` in a step;
    ``capture`` (False), whether it is a CUDA graph, which does not wait for the host; ``rates`` (H100)."""
    if schedule.policy is None:
        family = Shape.of(model).family
        kept = dict.fromkeys(("attn",) if schedule.tile else family.SAVED, SAVE)
        schedule = dataclasses.replace(schedule, policy=kept)
    with backend.using("triton"):
        run = Rehearsal(model, tokens, **step)
        return next(_candidates(run, schedule, embed, head, logits=(schedule.chunk_logits,)))


def parse_bytes(text: str) -> int:
    """``"24GiB"``, ``"24 GB"``, ``"800MiB"`` or ``"24"`` (GiB) in bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"memory is {text!r}, expected a size such as 24GiB")
    unit = (match[2] or "Gi").lower()
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** ("kmgt".index(unit[0]) + 1))


def _size(count: int, rounded: Callable[[float], int] = round) -> str:
    """Bytes in words that :func:`parse_bytes` reads."""
    return f"{rounded(count / GIB * 100) / 100:.2f} GiB" if count >= GIB else f"{rounded(count / 2**20)} MiB"


def _around(found: Iterable[Candidate], limit: int) -> tuple[Candidate, Candidate] | None:
    """Of the mixtures of two candidates, one that fits and one that does not, those of the fastest that just fits.

    Layers that keep more are worth their memory alike, so a mixture lies on the line between the two."""
    best = None
    for a in (c for c in found if c.peak <= limit):
        for b in (c for c in found if c.peak > limit and c.seconds < a.seconds):
            if _but_for_policy(a) == _but_for_policy(b):
                seconds = a.seconds - (a.seconds - b.seconds) * (limit - a.peak) / (b.peak - a.peak)
                if best is None or seconds < best[0]:
                    best = (seconds, a, b)
    return best and best[1:]


def _but_for_policy(c: Candidate) -> Any:
    return dataclasses.replace(c.schedule, policy=None), c.embed, c.head


def _frontier(found: Iterable[Candidate], best: Candidate) -> Iterator[Candidate]:
    """Candidates that are smaller than every faster one, by enough to be looked at; and the best."""
    least = math.inf
    for c in sorted(found, key=lambda c: (c.seconds, c.peak)):
        if c.peak < _WORTH_A_ROW * least or c is best:
            least = min(least, c.peak)
            yield c


def _stages(run: Rehearsal) -> Iterator[list[Schedule]]:
    """Schedules to try, as lists; a later list only if nothing of the earlier ones fits."""
    chain, largest = _chain(run)
    whole = [Schedule(policy) for policy in _policies(chain, [name for name in chain if name != largest])]
    tiles = [tile for tile in (LARGEST_TILE >> i for i in range(6)) if 4 <= run.tokens / tile <= 16]
    tiles = tiles or [-(-run.tokens // 8)]
    tiled = [Schedule(policy, tile=tile) for tile in tiles for policy in _policies(["attn", "pre"])]
    yield whole
    yield tiled
    if run.coded:
        yield [dataclasses.replace(s, decode_once=False) for s in whole + tiled]


def _chain(run: Rehearsal) -> tuple[list[str], str]:
    """The calls that can be saved, those first whose recomputation takes longest for the bytes it saves; and the
    one with the most bytes."""
    worth: dict[str, float] = {}
    sizes: dict[str, int] = {}

    def hear(phase: str, op: str, name: str, what: Any, statics: dict[str, Any], needs: Any) -> None:
        if phase != "forward" or name not in run.shape.family.SAVED:
            return
        if op == "attention":
            sizes[name] = what[0].nbytes
            worth[name] = run.attention(statics["window"], False) / sizes[name]
        else:
            sizes[name] = what[0].shape[0] * weights.shape(what[1])[-2] * what[0].element_size()
            worth[name] = run.price(phase, op, what, needs) / sizes[name]

    model, params, _ = run.model(1)
    with torch.no_grad(), listening(hear):
        model.loss(params, run.batch)
    return sorted(worth, key=lambda name: -worth[name]), max(sizes, key=lambda name: sizes[name])


def _between(run: Rehearsal, a: Candidate, b: Candidate, limit: int) -> Iterator[Candidate]:
    """``a`` with as many of its last layers as fit having ``b``'s policy; nothing if that is none."""
    few, many, whole = 4, 3, run.shape.layers
    if whole <= few + many or not run.shape.alike or run.unlike:
        return
    policy, rich = a.schedule.policy, b.schedule.policy or {}

    def mixed(poor: int, richer: int) -> Found:
        schedule = dataclasses.replace(a.schedule, policy=policy, last=(richer, rich), chunk_logits=None)
        return run.run(schedule, poor + richer)

    base, poorer, richer = mixed(few, many), mixed(few + 1, many), mixed(few, many + 1)
    loss = run.loss(a.schedule.chunk_logits, a.head) - run.loss(None, "device")
    gone = run.gone(a.embed, a.head)

    def at(n: int, of: Callable[[Found], int]) -> int:
        more_poor, more_rich = whole - n - few, n - many
        return of(base) + more_poor * (of(poorer) - of(base)) + more_rich * (of(richer) - of(base))

    for n in range(whole - few, many - 1, -1):
        peaks = {name: at(n, lambda found, name=name: found.peaks[name]) for name in base.peaks}
        peaks["the loss"] += loss
        where = max(peaks, key=lambda name: peaks[name])
        if (peak := peaks[where] - gone + CUBLAS) <= limit:
            yield Candidate(
                dataclasses.replace(a.schedule, last=(n, rich)), a.embed, a.head, peak, where,
                a.seconds + (b.seconds - a.seconds) * n / whole, a.weights, a.trained,
                at(n, lambda found: found.kept), at(n, lambda found: found.away),
            )  # fmt: skip
            return


def _candidates(
    run: Rehearsal, schedule: Schedule, embed: str | None, head: str | None,
    logits: Sequence[int | None] = (None, LOW_MEMORY_LOGITS),
) -> Iterator[Candidate]:  # fmt: skip
    """The schedule, with each number of logits, and embedding and head where they may be."""
    found = run.whole(schedule)
    for chunk in logits:
        for places in _placements(embed, head, run.shape.config.tie_word_embeddings):
            loss = run.loss(chunk, places[1]) - run.loss(schedule.chunk_logits, "device")
            peaks = found.peaks | {"the loss": found.peaks["the loss"] + loss}
            where = max(peaks, key=lambda name: peaks[name])
            gone = run.gone(*places)
            yield Candidate(
                dataclasses.replace(schedule, chunk_logits=chunk), *places, peaks[where] - gone + CUBLAS, where,
                found.seconds + run.carrying(*places, chunk),
                found.weights - gone, found.trained, found.kept, found.away,
            )  # fmt: skip


def _policies(*chains: Sequence[str]) -> list[dict[str, str]]:
    """Of each chain a prefix is kept: on the device, or but for the layer input there, or all of it on the host."""
    found: list[dict[str, str]] = []
    for chain in chains:
        for kept in range(len(chain) + 1):
            names = [INPUT, *chain[:kept]]
            for away in sorted({0, 1, len(names)}):
                policy = {name: OFFLOAD if i < away else SAVE for i, name in enumerate(names)}
                policy = {name: fate for name, fate in policy.items() if (name, fate) != (INPUT, SAVE)}
                if policy not in found:
                    found.append(policy)
    return found


def _placements(embed: str | None, head: str | None, tied: bool) -> Iterator[tuple[str, str]]:
    """Where embedding and head may be; with both open, the head goes to the host after the embedding."""
    if tied:
        given = embed or head
        yield from ((place, place) for place in ((given,) if given else PLACES[:2]))
        return
    for e in (embed,) if embed else PLACES[:2]:
        for h in (head,) if head else PLACES[:2]:
            if embed or head or (e, h) != ("device", "host"):
                yield e, h
