"""A training step run without its numbers: what it holds and how long it takes, from shapes alone.

A step is a function of shapes. The weights that a config declares are made as meta tensors (shapes without memory), and
the real step of :mod:`unsloth_core.train` runs on them while two listen: every tensor that is made and let go moves a
meter, every op that runs is priced by its ``cost`` function. Peak and time are therefore those of the code that will
run, as it stands, for every family, quantisation and rank; nothing about them is written down twice.

Layers are alike, so models of four and five of them are run, and the rest follows: layer by layer memory grows by what
a layer has and keeps, and shrinks in backward by what it kept less its gradients. The peak is the largest of the places
where it can be: the loss, the backward pass of the last, a middle or the first layer, the update.
"""

import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import data, lora, optim, random, tree
from .autodiff import listening
from .load import QUANTIZATIONS
from .models.decoder import Model, Schedule
from .ops import linear_cross_entropy, nf4
from .prices import H100, Rates, op_file, seconds
from .shapes import Shape
from .train import OPTIMIZER_STATES, make_step

CUBLAS = 32 * 2**20  # its workspace on Hopper, from PyTorch's pool
_BLOCK = 512  # what the allocator rounds to


class Meter(TorchDispatchMode):
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
class Place:
    """A stretch of the step: "start", ("forward", layer), "loss", ("backward", layer) or "update"."""

    name: Any
    peak: int
    end: int = 0
    seconds: float = 0.0
    calls: int = 0
    away: int = 0  # bytes sent to the host
    attends: int = 0  # passes of attention, which cost more or less from layer to layer
    attends_back: int = 0


class Walk:
    """Hears a step: cuts it into places, and prices what runs in each."""

    def __init__(self, meter: Meter, layers: int, price: Callable[..., float]) -> None:
        self.meter, self.layers, self.price = meter, layers, price
        self.place = Place("start", meter.now)
        self.places: dict[Any, Place] = {"start": self.place}
        self._layer = 0  # layers that are between forward and backward
        self._backward = False

    def hear(self, phase: str, op: str, name: str, what: Any, statics: dict[str, Any], needs: Any) -> None:
        """What :func:`unsloth_core.autodiff.listening` tells."""
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
        self.place = self.places.setdefault(name, Place(name, self.meter.now))  # a second microbatch comes by again
        self.meter.peak = self.meter.now

    def finish(self) -> None:
        """The current place has ended."""
        self.place.peak = max(self.place.peak, self.meter.peak)
        self.place.end = self.meter.now


@dataclasses.dataclass(frozen=True)
class Found:
    """What a run, or two that were continued to all layers, found of a schedule; bytes and seconds."""

    peaks: dict[str, int]  # by place, in words
    weights: int
    trained: int
    kept: int
    away: int
    seconds: float


class Rehearsal:
    """All that is known about one step, with the runs of its schedules."""

    def __init__(
        self,
        model: Model | Mapping[str, Any],
        tokens: int,
        *,
        sequence: int | None = None,
        rank: int | Mapping[str, int] = 16,
        targets: str | Sequence[str] = "all-linear",
        dropout: float = 0.0,
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
        if sequence is not None and sequence < 1:
            raise ValueError(f"plan: sequence is {sequence}, expected at least 1")
        if accumulate < 1:
            raise ValueError(f"plan: accumulate is {accumulate}, expected at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"plan: dropout is {dropout}, expected 0 <= dropout < 1")
        if optimizer_states not in OPTIMIZER_STATES:
            expected = tuple(OPTIMIZER_STATES)
            raise ValueError(f"plan: optimizer_states is {optimizer_states!r}, expected one of {expected}")
        length = min(sequence or tokens, tokens)
        self.shape = shape = Shape.of(model)
        self.tokens, self.length, self.rates = tokens, length, rates
        self.rank, self.targets, self.quantize, self.dtype = rank, targets, quantize, dtype
        self.coded = bool(quantize or shape.stored)  # whether there is something to decode
        self.dropout = dropout
        self.states, self.accumulate, self.capture = OPTIMIZER_STATES[optimizer_states], accumulate, capture
        kind = quantize or ("nf4 as stored" if shape.stored else str(dtype).removeprefix("torch."))
        self.title = f"{shape.name}, {kind}, {tokens} tokens in segments of {length}, rank {rank}, {rates.name}"
        self.title += f", dropout {dropout}" * (dropout > 0)
        self.lengths = [length] * (tokens // length) + [tokens % length] * (tokens % length > 0)
        self.batch = data.Batch.of(
            [(np.zeros(n, np.int64), None) for n in self.lengths],
            vocab_size=shape.config.vocab_size, tokens=tokens, segments=max(8, tokens // 16, len(self.lengths)),
        ).to("meta")  # fmt: skip
        self.sizes = (shape.layers,) if shape.layers <= 5 or not shape.alike else (4, 5)
        self.unlike = self._unlike() if shape.stored and len(self.sizes) > 1 else 0
        self._models: dict[int, tuple[Model, Any, Any]] = {}
        self._losses: dict[tuple[int | None, str], int] = {}
        self._attention: dict[tuple[int | None, bool], float] = {}

    def _unlike(self) -> int:
        """Bytes that the weights of all layers take above what the first layers say: of some layers a checkpoint in 4
        bits may spare matrices."""
        few, last, whole = (
            tree.nbytes(self.shape.weights(n, self.quantize, self.dtype)) for n in (*self.sizes, self.shape.layers)
        )
        return whole - last - (self.shape.layers - self.sizes[-1]) * (last - few)

    def model(self, layers: int) -> tuple[Model, Any, Any]:
        """A model of so many layers, its weights and its adapters."""
        if layers not in self._models:
            params = self.shape.weights(layers, self.quantize, self.dtype)
            adapters = lora.init(random.key(0), params, rank=self.rank, targets=self.targets)
            model = Model(family=self.shape.family, config=self.shape.cut(layers))
            self._models[layers] = model, params, adapters
        return self._models[layers]

    def run(self, schedule: Schedule, layers: int) -> Found:
        """The step of a model of so many layers, on shapes."""
        model, params, adapters = self.model(layers)
        optimizer = optim.adamw(1e-4, state_dtype=self.states)
        state = optimizer.init(adapters)
        masks = random.key(0) if self.dropout else None
        step = make_step(
            model, params, optimizer, max_norm=1.0, policy=schedule, dropout=self.dropout, key=masks
        )  # fmt: skip
        with Meter((params, adapters, state, self.batch)) as meter:
            walk = Walk(meter, layers, self.price)
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
        return Found(
            peaks=peaks,
            weights=tree.nbytes(params),
            trained=tree.nbytes((adapters, state)),
            kept=at["forward", last].end - at["start"].end,
            away=sum(place.away for place in at.values()),
            seconds=self._seconds(at, layers),
        )

    def whole(self, schedule: Schedule) -> Found:
        """The step of the whole model: what every layer adds, it adds for each layer that was left out."""
        sizes = (self.shape.layers,) if schedule.last else self.sizes  # layers are not alike then
        *few, last = [self.run(schedule, layers) for layers in sizes]
        if not few:
            return last
        more = self.shape.layers - self.sizes[-1]

        def go_on(a: Any, b: Any) -> Any:
            return b + more * (b - a)

        numbers = {f.name: go_on(getattr(few[0], f.name), getattr(last, f.name)) for f in _NUMBERS}
        peaks = {name: go_on(few[0].peaks[name], value) + self.unlike for name, value in last.peaks.items()}
        return Found(peaks=peaks, **{**numbers, "weights": numbers["weights"] + self.unlike})

    def gone(self, embed: str, head: str) -> int:
        """Bytes that embedding and head do not take on the device."""
        config = self.shape.config
        table = config.vocab_size * config.hidden_size * self.dtype.itemsize
        places = (embed,) if config.tie_word_embeddings else (embed, head)
        return sum(table - (0 if place == "host" else tree.nbytes(self._table(place))) for place in places)

    def _table(self, place: str) -> Any:
        """An embedding or a head in its place; on the host it takes nothing here."""
        shape = (self.shape.config.vocab_size, self.shape.config.hidden_size)
        if place == "host":
            return torch.empty((), dtype=self.dtype).expand(shape)
        w = torch.empty(shape, dtype=self.dtype, device="meta")
        return nf4.quantize(w) if place == "nf4" else w

    def carrying(self, embed: str, head: str, logits: int | None) -> float:
        """Seconds that reading embedding and head over the link takes, and that fewer logits at a time take more."""
        config, carried, loss = self.shape.config, 0, op_file("linear_cross_entropy")
        D, V, M = config.hidden_size, config.vocab_size, self.batch.targets_M.shape[0]
        chunk, usual = (loss.chunk_rows(M, V, False, most) for most in (logits, None))
        if embed == "host":
            carried += self.tokens * D * self.dtype.itemsize
        if head == "host":
            carried += 2 * math.ceil(M / chunk) * V * D * self.dtype.itemsize
        cost = loss.cost(self.tokens, D, V, M, self.dtype.itemsize, dx=True, dw=False)
        whole = cost.seconds(bytes_per_s=self.rates.memory, flops_per_s=self.rates.product)
        slower = self.rates.few_logits * whole if chunk < usual else 0.0
        return self.accumulate * (carried / self.rates.link + slower)

    def loss(self, logits: int | None, head: str) -> int:
        """Bytes that the forward pass of the loss takes at most, beside its arguments."""
        if (logits, head) not in self._losses:
            config, batch = self.shape.config, self.batch
            x = torch.empty(self.tokens, config.hidden_size, dtype=self.dtype, device="meta", requires_grad=True)
            w = self._table(head)
            with Meter((x, w, batch)) as meter:
                before = meter.now
                linear_cross_entropy(x, w, batch.targets_M, batch.target_rows_M, chunk_logits=logits)
            self._losses[logits, head] = meter.peak - before
        return self._losses[logits, head]

    # ---- how long it takes

    def _seconds(self, at: dict[Any, Place], layers: int) -> float:
        """Of a step; those of the layers that did not run are like the second, but for how far attention sees."""
        config, spec = self.shape.config, self.shape.family.spec
        working = {name: place.seconds + place.calls * self.rates.call for name, place in at.items()}
        busy = sum(working[name] for name in ("start", "loss", "update"))
        share = layers / self.shape.layers  # windows come in patterns, which a few layers may not show
        for i in range(self.shape.layers):
            window = spec(config, i).window
            like = i if layers == self.shape.layers else 1
            forward = at["forward", like]
            for name in (("forward", like), ("backward", like)):
                attention = at[name].attends * self.attention(window, False)
                attention += at[name].attends_back * self.attention(window, True)
                copying = forward.away / self.rates.memory  # beside the computation, but through the same memory
                busy += share * max(working[name] + attention + copying, forward.away / self.rates.link)
        calls = 0 if self.capture else sum(place.calls for place in at.values())
        return max(busy, calls * self.rates.host) * self.accumulate / min(self.accumulate, 2)

    def attention(self, window: int | None, backward: bool) -> float:
        """Seconds of one pass of attention over the batch."""
        if (window, backward) not in self._attention:
            config = self.shape.config
            heads = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
            pairs = [(n, n) for n in self.lengths]
            cost = op_file("attention").cost(pairs, *heads, self.dtype.itemsize, window=window, backward=backward)
            rate = self.rates.attend(min(self.length, 2 * (window or self.length)), backward)
            seconds = cost.seconds(bytes_per_s=self.rates.memory, flops_per_s=rate)
            self._attention[window, backward] = seconds
        return self._attention[window, backward]

    def price(self, phase: str, op: str, what: Any, needs: Any) -> float:
        """Seconds of a call of any other op."""
        return seconds(self.rates, phase, op, what, needs)


_NUMBERS = [field for field in dataclasses.fields(Found) if field.name != "peaks"]
