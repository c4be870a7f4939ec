"""The planner: the fastest way to run a training step in a given amount of memory, from a config alone.

A step is a function of shapes, so it can be run without its numbers. The planner makes the weights that a config
declares as meta tensors (shapes without memory), runs the real step of :mod:`unsloth_core.train` on them under one
schedule after the other, and listens: every tensor that is made and let go moves a meter, every op that runs is priced
by its ``cost`` function at rates measured on the GPU in question. Peak and time of a plan are therefore those of the
code that will run, as it stands, for every family, quantisation and rank; nothing about them is written down twice.

Layers are alike, so models of four and five of them are run, and the rest follows: layer by layer memory grows by what
a layer has and keeps, and shrinks in backward by what it kept less its gradients. The peak is the largest of the places
where it can be: the loss, the backward pass of the last, a middle or the first layer, the update.

``peak`` means ``torch.cuda.max_memory_allocated``: what tensors take, in blocks of 512 bytes, and cuBLAS's workspace.
The CUDA context (about 0.5 GiB) and what the allocator holds in reserve come on top.
"""

import dataclasses
import importlib
import math
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import backend, data, lora, optim, random, tree, weights
from .autodiff import INPUT, OFFLOAD, SAVE, listening
from .cost import Cost
from .load import PLACES, QUANTIZATIONS, read_weights
from .models import family_of
from .models.decoder import Model, Schedule
from .ops import linear_cross_entropy, nf4
from .train import OPTIMIZER_STATES, make_step
from .weights import Adapted, declared_leaves

GIB = 2**30
LARGEST_TILE = 8192
LOW_MEMORY_LOGITS = 2**26
_CUBLAS = 32 * 2**20  # its workspace on Hopper, from PyTorch's pool
_BLOCK = 512  # what the allocator rounds to
_WORTH_A_ROW = 0.95


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a GPU does in a second, measured; ``attention``: (shortest segment, forward, backward), in FLOP/s."""

    name: str
    product: float
    memory: float  # bytes of element-wise ops
    link: float  # bytes over PCIe, pinned
    decode: float  # bytes of NF4 read and 16-bit written
    attention: tuple[tuple[int, float, float], ...]
    host: float  # seconds that a call of an op takes in Python and the driver

    def attend(self, length: int, backward: bool) -> float:
        """FLOP/s of attention within segments of ``length`` rows."""
        fits = [rates for rates in self.attention if rates[0] <= length] or [self.attention[0]]
        return fits[-1][2 if backward else 1]


H100 = Rates(
    name="H100 80GB HBM3",
    product=640e12,
    memory=2.4e12,
    link=50e9,
    decode=1.8e12,
    attention=((0, 300e12, 200e12), (2048, 400e12, 280e12), (8192, 450e12, 380e12), (32768, 550e12, 450e12)),
    host=150e-6,
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run the step: predicted ``peak`` (bytes), ``seconds``, and what both are made of."""

    schedule: Schedule
    embed: str  # "device" or "host"
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
        parts += ["head in NF4"] if self.head == "nf4" else []
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
        budget = "no budget" if self.budget is None else f"budget {self.budget / GIB:.2f} GiB"
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

    ``model``: one that is loaded, or the content of a ``config.json``. ``budget``: bytes, or text such as "24GiB"; by
    default no limit. ``embed``, ``head``: where they are, as for ``load``; None lets the plan choose between device and
    host (a tied head is where the embedding is). ``step``: the keywords of :func:`predict`. A pure function of these.
    Raises ValueError for options that are not such, and if nothing fits, with the smallest budget that would."""
    for name, place, places in (("embed", embed, PLACES[:2]), ("head", head, PLACES)):
        if place not in (None, *places):
            raise ValueError(f"plan: {name} is {place!r}, expected one of {places} or None")
    limit = parse_bytes(budget) if isinstance(budget, str) else budget
    run = _Runs(model, tokens, **step)
    found: list[Candidate] = []
    with backend.using("triton"):  # whatever the user tries here: it is the GPU's step that is planned
        for schedules in run.stages():
            for schedule in schedules:
                found += run.candidates(schedule, embed, head)
            if any(limit is None or c.peak <= limit for c in found):
                break
        if limit is not None and (pair := _around(found, limit)):
            found += run.between(*pair, limit)
    fits = [c for c in found if limit is None or c.peak <= limit]
    if not fits:
        least = min(found, key=lambda c: c.peak)
        raise ValueError(
            f"plan: a step on {tokens} tokens does not fit into {(limit or 0) / GIB:.2f} GiB; the least is "
            f"{math.ceil(least.peak / GIB * 100) / 100:.2f} GiB ({least.describe()})"
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
    ``rank`` (16), ``targets`` ("all-linear"), ``optimizer_states`` ("fp32") and ``dtype`` (bfloat16) as for ``load``,
    ``lora.init`` and ``finetune``; ``accumulate`` (1), microbatches of ``tokens`` in a step; ``capture`` (False),
    whether it is a CUDA graph, which does not wait for the host; ``rates`` (H100)."""
    if schedule.policy is None:
        family = _Shape.of(model).family
        kept = dict.fromkeys(("attn",) if schedule.tile else family.SAVED, SAVE)
        schedule = dataclasses.replace(schedule, policy=kept)
    with backend.using("triton"):
        return next(_Runs(model, tokens, **step).candidates(schedule, embed, head, logits=(schedule.chunk_logits,)))


def parse_bytes(text: str) -> int:
    """``"24GiB"``, ``"24 GB"``, ``"800MiB"`` or ``"24"`` (GiB) in bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"memory is {text!r}, expected a size such as 24GiB")
    unit = (match[2] or "Gi").lower()
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** ("kmgt".index(unit[0]) + 1))


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


# --------------------------------------------------------------------------------------------------- shapes


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A family and a config, which can be cut to fewer layers."""

    family: Any
    config: Any
    biases: bool  # of a config that does not say: see weights.declared_leaves
    name: str

    @staticmethod
    def of(model: Model | Mapping[str, Any]) -> "_Shape":
        if isinstance(model, Model):
            return _Shape(model.family, model.config, False, model.source or "model")
        family, config = family_of(dict(model)), None
        config = family.Config.from_hf(model)
        biases = any(model.get(name) for name in ("attention_bias", "mlp_bias"))
        return _Shape(family, config, biases, str(model.get("_name_or_path") or model["model_type"]))

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    def cut(self, layers: int) -> Any:
        has = self.config.has
        more = {"has": has[:layers]} if isinstance(has, tuple) else {}
        return dataclasses.replace(self.config, num_hidden_layers=layers, **more)

    @property
    def alike(self) -> bool:
        """Whether every layer has the same leaves."""
        kinds: dict[Any, Any] = {}
        for d in declared_leaves(self.family.Weights, self.config):
            if len(d.path) > 1:
                kinds.setdefault(d.path[1], []).append((d.path[2:], d.shape))
        return all(leaves == kinds[0] for leaves in kinds.values())

    def weights(self, layers: int, quantize: str | None, dtype: torch.dtype) -> Any:
        """What ``load`` would make, as meta tensors."""
        config = self.cut(layers)
        declared = declared_leaves(self.family.Weights, config)
        checkpoint = _Declared(
            {
                name: (rows, *d.rest)
                for d in declared
                if d.path != ("head",) or not config.tie_word_embeddings
                if not (d.optional and d.path != ("head",)) or self.biases
                for name, rows in zip(d.names, d.rows, strict=True)
            },
            dtype,
        )
        meta = torch.device("meta")
        return read_weights(checkpoint, self.family.Weights, config, device=meta, dtype=dtype, quantize=quantize)


@dataclasses.dataclass(frozen=True)
class _Declared:
    """A checkpoint of shapes, as ``read_weights`` reads one."""

    shapes: dict[str, tuple[int, ...]]
    kind: torch.dtype
    source: str = "config"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self.kind

    def tensor(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], dtype=self.kind, device="meta")


# ------------------------------------------------------------------------------------------ running a step on shapes


class _Meter(TorchDispatchMode):
    """Bytes of the meta tensors that are alive, as the CUDA allocator would count them."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {}
        for t in tree.leaves(known):
            self._see(t)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and t.is_meta:
                self._see(t)
        return out

    def _see(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // _BLOCK) * _BLOCK
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclasses.dataclass
class _Place:
    """A stretch of the step: "start", ("forward", layer), "loss", ("backward", layer) or "update"."""

    name: Any
    peak: int
    end: int = 0
    seconds: float = 0.0
    calls: int = 0
    away: int = 0  # bytes sent to the host
    attends: int = 0  # passes of attention, which cost more or less from layer to layer
    attends_back: int = 0


class _Walk:
    """Hears a step: cuts it into places, and prices what runs in each."""

    def __init__(self, meter: _Meter, layers: int, price: Callable[..., float]) -> None:
        self.meter, self.layers, self.price = meter, layers, price
        self.place = _Place("start", meter.now)
        self.places: dict[Any, _Place] = {"start": self.place}
        self._layer = 0  # layers that are between forward and backward
        self._backward = False

    def hear(self, phase: str, op: str, name: str, what: Any, statics: dict[str, Any], needs: Any) -> None:
        if phase == "layer":
            self._turn(op, what)
        elif op == "attention":
            self.place.attends += phase == "forward"
            self.place.attends_back += phase == "backward"
            self.place.calls += 1
        elif op != "tiled":  # what runs inside is heard too
            self.place.seconds += self.price(phase, op, what, needs)
            self.place.calls += phase != "decode"

    def _turn(self, kind: str, what: Any) -> None:
        if kind == "offload":
            self.place.away += tree.nbytes(what)
        elif kind == "forward":
            self._backward = False
            self._go(("forward", self._layer))
            self._layer += 1
        elif kind == "backward":
            self._backward = True
            self._layer -= 1
            self._go(("backward", self._layer))
        elif not self._backward and self._layer == self.layers:
            self._go("loss")
        elif self._backward and self._layer == 0:
            self._go("update")

    def _go(self, name: Any) -> None:
        self.finish()
        self.place = self.places.setdefault(name, _Place(name, self.meter.now))  # a second microbatch comes by again
        self.meter.peak = self.meter.now

    def finish(self) -> None:
        """The current place has ended."""
        self.place.peak = max(self.place.peak, self.meter.peak)
        self.place.end = self.meter.now


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a run, or two that were continued to all layers, found of a schedule; bytes and seconds."""

    peaks: dict[str, int]  # by place, in words
    weights: int
    trained: int
    kept: int
    away: int
    seconds: float


class _Runs:
    """All that is known about one step, with the runs of its schedules."""

    def __init__(
        self,
        model: Model | Mapping[str, Any],
        tokens: int,
        *,
        sequence: int | None = None,
        rank: int | Mapping[str, int] = 16,
        targets: str | Sequence[str] = "all-linear",
        quantize: str | None = None,
        optimizer_states: str = "fp32",
        accumulate: int = 1,
        capture: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        rates: Rates = H100,
    ) -> None:
        if quantize not in QUANTIZATIONS:
            raise ValueError(f"plan: quantize is {quantize!r}, expected one of {QUANTIZATIONS}")
        if tokens < 2:
            raise ValueError(f"plan: tokens is {tokens}, expected at least 2")
        if optimizer_states not in OPTIMIZER_STATES:
            expected = tuple(OPTIMIZER_STATES)
            raise ValueError(f"plan: optimizer_states is {optimizer_states!r}, expected one of {expected}")
        length = min(sequence or tokens, tokens)
        self.shape = shape = _Shape.of(model)
        self.tokens, self.length, self.rates = tokens, length, rates
        self.rank, self.targets, self.quantize, self.dtype = rank, targets, quantize, dtype
        self.states, self.accumulate, self.capture = OPTIMIZER_STATES[optimizer_states], accumulate, capture
        kind = quantize or str(dtype).removeprefix("torch.")
        self.title = f"{shape.name}, {kind}, {tokens} tokens in segments of {length}, rank {rank}, {rates.name}"
        self.lengths = [length] * (tokens // length) + [tokens % length] * (tokens % length > 0)
        self.batch = data.Batch.of(
            [(np.zeros(n, np.int64), None) for n in self.lengths],
            vocab_size=shape.config.vocab_size, tokens=tokens, segments=max(8, tokens // 16, len(self.lengths)),
        ).to("meta")  # fmt: skip
        self.sizes = (shape.layers,) if shape.layers <= 5 or not shape.alike else (4, 5)
        self._models: dict[int, tuple[Model, Any, Any]] = {}
        self._losses: dict[tuple[int | None, str], int] = {}
        self._attention: dict[tuple[int | None, bool], float] = {}

    # ---- what to try

    def stages(self) -> Iterator[list[Schedule]]:
        """Schedules to try, as lists; a later list only if nothing of the earlier ones fits."""
        chain, largest = self._chain()
        whole = [Schedule(policy) for policy in _policies(chain, [name for name in chain if name != largest])]
        tiles = [tile for tile in (LARGEST_TILE >> i for i in range(6)) if 4 <= self.tokens / tile <= 16]
        tiles = tiles or [-(-self.tokens // 8)]
        tiled = [Schedule(policy, tile=tile) for tile in tiles for policy in _policies(["attn", "pre"])]
        yield whole
        yield tiled
        if self.quantize:
            yield [dataclasses.replace(s, decode_once=False) for s in whole + tiled]

    def _chain(self) -> tuple[list[str], str]:
        """The calls that can be saved, those first whose recomputation takes longest for the bytes it saves; and the
        one with the most bytes."""
        worth: dict[str, float] = {}
        sizes: dict[str, int] = {}

        def hear(phase: str, op: str, name: str, what: Any, statics: dict[str, Any], needs: Any) -> None:
            if phase != "forward" or name not in self.shape.family.SAVED:
                return
            if op == "attention":
                sizes[name] = what[0].nbytes
                worth[name] = self.attention(statics["window"], False) / sizes[name]
            else:
                sizes[name] = what[0].shape[0] * weights.shape(what[1])[-2] * what[0].element_size()
                worth[name] = self.price(phase, op, what, needs) / sizes[name]

        model, params, _ = self.model(1)
        with torch.no_grad(), listening(hear):
            model.loss(params, self.batch)
        return sorted(worth, key=lambda name: -worth[name]), max(sizes, key=lambda name: sizes[name])

    # ---- running

    def model(self, layers: int) -> tuple[Model, Any, Any]:
        """A model of so many layers, its weights and its adapters."""
        if layers not in self._models:
            params = self.shape.weights(layers, self.quantize, self.dtype)
            adapters = lora.init(random.key(0), params, rank=self.rank, targets=self.targets)
            model = Model(family=self.shape.family, config=self.shape.cut(layers))
            self._models[layers] = model, params, adapters
        return self._models[layers]

    def run(self, schedule: Schedule, layers: int) -> _Found:
        """The step of a model of so many layers, on shapes."""
        model, params, adapters = self.model(layers)
        optimizer = optim.adamw(1e-4, state_dtype=self.states)
        state = optimizer.init(adapters)
        step = make_step(model, params, optimizer, max_norm=1.0, policy=schedule)
        with _Meter((params, adapters, state, self.batch)) as meter:
            walk = _Walk(meter, layers, self.price)
            with listening(walk.hear):
                step(adapters, state, [self.batch] * min(self.accumulate, 2))  # of more the peak is no higher
            walk.finish()
        at, last = walk.places, layers - 1
        peaks = {
            "the start": at["start"].peak,
            "the forward pass of the last layer": at["forward", last].peak,
            "the loss": at["loss"].peak,
            "the backward pass of the last layer": at["backward", last].peak,
            "the backward pass of the last layer but one": at["backward", max(last - 1, 0)].peak,
            "the backward pass of the second layer": at["backward", min(1, last)].peak,
            "the backward pass of the first layer": at["backward", 0].peak,
            "the update": at["update"].peak,
        }
        if schedule.last:  # between the layers that keep less and those that keep more
            first = layers - schedule.last[0]
            for i in (first - 2, first - 1, first, first + 1):
                if ("backward", i) in at:
                    peaks[f"the backward pass where policies change ({i - first:+d})"] = at["backward", i].peak
        return _Found(
            peaks=peaks,
            weights=tree.nbytes(params),
            trained=tree.nbytes((adapters, state)),
            kept=at["forward", last].end - at["start"].end,
            away=sum(place.away for place in at.values()),
            seconds=self._seconds(at, layers),
        )

    def between(self, a: Candidate, b: Candidate, limit: int) -> Iterator[Candidate]:
        """``a`` with as many of its last layers as fit having ``b``'s policy; nothing if that is none."""
        few, many, whole = 4, 3, self.shape.layers
        if whole <= few + many or not self.shape.alike:
            return
        policy, rich = a.schedule.policy, b.schedule.policy or {}

        def mixed(poor: int, richer: int) -> _Found:
            schedule = dataclasses.replace(a.schedule, policy=policy, last=(richer, rich), chunk_logits=None)
            return self.run(schedule, poor + richer)

        base, poorer, richer = mixed(few, many), mixed(few + 1, many), mixed(few, many + 1)
        loss = self._loss(a.schedule.chunk_logits, a.head) - self._loss(None, "device")
        gone = self._gone(a.embed, a.head)

        def at(n: int, of: Callable[[_Found], int]) -> int:
            more_poor, more_rich = whole - n - few, n - many
            return of(base) + more_poor * (of(poorer) - of(base)) + more_rich * (of(richer) - of(base))

        for n in range(whole - few, many - 1, -1):
            peaks = {name: at(n, lambda found, name=name: found.peaks[name]) for name in base.peaks}
            peaks["the loss"] += loss
            where = max(peaks, key=lambda name: peaks[name])
            if (peak := peaks[where] - gone + _CUBLAS) <= limit:
                yield Candidate(
                    dataclasses.replace(a.schedule, last=(n, rich)), a.embed, a.head, peak, where,
                    a.seconds + (b.seconds - a.seconds) * n / whole, a.weights, a.trained,
                    at(n, lambda found: found.kept), at(n, lambda found: found.away),
                )  # fmt: skip
                return

    def whole(self, schedule: Schedule) -> _Found:
        """The step of the whole model: what every layer adds, it adds for each layer that was left out."""
        sizes = (self.shape.layers,) if schedule.last else self.sizes  # layers are not alike then
        *few, last = [self.run(schedule, layers) for layers in sizes]
        if not few:
            return last
        more = self.shape.layers - self.sizes[-1]

        def go_on(a: Any, b: Any) -> Any:
            return b + more * (b - a)

        numbers = {f.name: go_on(getattr(few[0], f.name), getattr(last, f.name)) for f in _NUMBERS}
        peaks = {name: go_on(few[0].peaks[name], value) for name, value in last.peaks.items()}
        return _Found(peaks=peaks, **numbers)

    def candidates(
        self, schedule: Schedule, embed: str | None, head: str | None,
        logits: Sequence[int | None] = (None, LOW_MEMORY_LOGITS),
    ) -> Iterator[Candidate]:  # fmt: skip
        """The schedule, with each number of logits, and embedding and head where they may be."""
        found = self.whole(schedule)
        config = self.shape.config
        table = config.vocab_size * config.hidden_size * self.dtype.itemsize
        for chunk in logits:
            for places in _placements(embed, head, config.tie_word_embeddings):
                loss = self._loss(chunk, places[1]) - self._loss(schedule.chunk_logits, "device")
                peaks = found.peaks | {"the loss": found.peaks["the loss"] + loss}
                where = max(peaks, key=lambda name: peaks[name])
                gone = self._gone(*places)
                yield Candidate(
                    dataclasses.replace(schedule, chunk_logits=chunk), *places, peaks[where] - gone + _CUBLAS, where,
                    found.seconds + self._carrying(places, chunk, table),
                    found.weights - gone, found.trained, found.kept, found.away,
                )  # fmt: skip

    def _gone(self, embed: str, head: str) -> int:
        """Bytes that embedding and head do not take on the device."""
        config = self.shape.config
        table = config.vocab_size * config.hidden_size * self.dtype.itemsize
        gone = table if embed == "host" else 0
        if not config.tie_word_embeddings:
            gone += table - (0 if head == "host" else tree.nbytes(self._head(head)))
        return gone

    def _head(self, place: str) -> Any:
        """A head in its place; on the host it takes nothing here."""
        shape = (self.shape.config.vocab_size, self.shape.config.hidden_size)
        if place == "host":
            return torch.empty((), dtype=self.dtype).expand(shape)
        w = torch.empty(shape, dtype=self.dtype, device="meta")
        return nf4.quantize(w) if place == "nf4" else w

    def _carrying(self, places: tuple[str, str], logits: int | None, table: int) -> float:
        """Seconds that reading embedding and head over the link takes."""
        config = self.shape.config
        seconds = 0.0
        if places[0] == "host":
            seconds += self.accumulate * self.tokens * config.hidden_size * self.dtype.itemsize / self.rates.link
        if places[1] == "host":
            M = self.batch.targets_M.shape[0]
            chunk = _op("linear_cross_entropy").chunk_rows(M, config.vocab_size, False, logits)
            seconds += self.accumulate * 2 * math.ceil(M / chunk) * table / self.rates.link
        return seconds

    def _loss(self, logits: int | None, head: str) -> int:
        """Bytes that the forward pass of the loss takes at most, beside its arguments."""
        if (logits, head) not in self._losses:
            config, batch = self.shape.config, self.batch
            x = torch.empty(self.tokens, config.hidden_size, dtype=self.dtype, device="meta", requires_grad=True)
            w = self._head(head)
            with _Meter((x, w, batch)) as meter:
                before = meter.now
                linear_cross_entropy(x, w, batch.targets_M, batch.target_rows_M, chunk_logits=logits)
            self._losses[logits, head] = meter.peak - before
        return self._losses[logits, head]

    # ---- how long it takes

    def _seconds(self, at: dict[Any, _Place], layers: int) -> float:
        """Of a step; those of the layers that did not run are like the second, but for how far attention sees."""
        config, spec = self.shape.config, self.shape.family.spec
        busy = sum(at[name].seconds for name in ("start", "loss", "update"))
        share = layers / self.shape.layers  # windows come in patterns, which a few layers may not show
        for i in range(self.shape.layers):
            window = spec(config, i).window
            like = i if layers == self.shape.layers else 1
            forward, backward = at["forward", like], at["backward", like]
            for place in (forward, backward):
                attention = place.attends * self.attention(window, False)
                attention += place.attends_back * self.attention(window, True)
                copying = forward.away / self.rates.memory  # beside the computation, but through the same memory
                busy += share * max(place.seconds + attention + copying, forward.away / self.rates.link)
        calls = 0 if self.capture else sum(place.calls for place in at.values())
        return max(busy, calls * self.rates.host) * self.accumulate / min(self.accumulate, 2)

    def attention(self, window: int | None, backward: bool) -> float:
        """Seconds of one pass of attention over the batch."""
        if (window, backward) not in self._attention:
            config = self.shape.config
            heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
            pairs = [(n, n) for n in self.lengths]
            cost = _op("attention").cost(pairs, *heads, self.dtype.itemsize, window=window, backward=backward)
            rate = self.rates.attend(min(self.length, 2 * (window or self.length)), backward)
            seconds = cost.seconds(bytes_per_s=self.rates.memory, flops_per_s=rate)
            self._attention[window, backward] = seconds
        return self._attention[window, backward]

    def price(self, phase: str, op: str, what: Any, needs: Any) -> float:
        """Seconds of a call of any other op."""
        if phase == "decode":
            return _DECODED * what[0].nbytes / self.rates.decode
        rates = {"bytes_per_s": self.rates.memory, "flops_per_s": self.rates.product}
        return sum(cost.seconds(**rates) for cost in _costs(phase == "backward", op, what, needs))


_NUMBERS = [field for field in dataclasses.fields(_Found) if field.name != "peaks"]
_DECODED = 1.26  # bytes moved per byte of a decoded matrix: 4 bits are read for 16 written


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


# ------------------------------------------------------------------------------------------------ what a call costs


def _op(name: str) -> Any:
    """The file of an op; ``ops.<name>`` is the op itself."""
    return importlib.import_module(f"unsloth_core.ops.{name}")


def _costs(backward: bool, op: str, what: Any, needs: Any) -> list[Cost]:
    """The passes of one call, forward (``what``: arguments) or backward (residuals and cotangent)."""
    tensors = [t for t in tree.leaves(what) if isinstance(t, Tensor)]
    y = tree.leaves(what[1])[0] if backward else what[0]
    item, rows = y.element_size(), y.shape[0] if y.ndim else 1
    if op in ("linear", "linear_rope", "glu_linear", "grouped_linear"):
        return _products(backward, op, what, needs, item)
    if op == "linear_cross_entropy":
        if backward:
            return [Cost(bytes=2 * what[0][0].nbytes, flops=0)]
        (N, D), V, M = what[0].shape, what[1].shape[0], what[2].shape[0]
        return [_op(op).cost(N, D, V, M, item, dx=needs[0] is True, dw=needs[1] is True)]
    if op in ("rms_norm", "add_rms_norm"):
        return [_op(op).cost(math.prod(y.shape[:-1]), y.shape[-1], item, backward=backward)]
    if op == "glu":
        return [_op(op).cost(rows, y.shape[-1] // (1 if backward else 2), item, backward=backward)]
    if op == "embedding":
        return [_op(op).cost(rows, *what[1].shape, what[1].element_size())]
    # Of any other op: everything it is given read once, and as much written as its largest.
    return [Cost(bytes=sum(t.nbytes for t in tensors) + max(t.nbytes for t in tensors), flops=0)]


def _products(backward: bool, op: str, what: Any, needs: Any, item: int) -> list[Cost]:
    """The product; of adapters the narrow passes over x and dy; of a trained weight its gradient; the pass that the op
    makes over the product's output (rope) or input (glu)."""
    w = (what[0] if backward else what)[1]
    *_, m, c = weights.shape(w)
    if op == "grouped_linear":  # rows of the plan: a token has one for each of its experts
        rows = (what[0] if backward else what)[2][0].shape[0]
    elif backward:
        rows = sum(dy.numel() for dy in tree.leaves(what[1])) // m
    else:
        rows = what[0].numel() // (2 * c if op == "glu_linear" else c)
    product, narrow = _op("grouped_linear" if op == "grouped_linear" else "linear").cost(rows, w, itemsize=item), []
    if isinstance(w, Adapted):
        narrow = [Cost(bytes=rows * (2 * c + 2 * m if backward else c) * item, flops=0)]
    if op == "linear_rope":
        narrow.append(Cost(bytes=2 * rows * m * item, flops=0))
    if op == "glu_linear":
        narrow.append(_op("glu").cost(rows, c, item, backward=backward))
    if not backward:
        return [product, *narrow]
    trained = tree.any(needs[1].base if isinstance(w, Adapted) else needs[1])
    return [product] * (needs[0] is True) + [Cost(bytes=0, flops=2 * rows * m * c)] * trained + narrow
