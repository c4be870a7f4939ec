"""Schedules of a layer: what is kept between forward and backward, what runs again, and how many rows at a time.

``remat`` runs a layer so that only what a policy names is kept, ``tiled`` runs a token-local function on some rows at a
time; neither changes the numbers. Both are functions around the ops of :mod:`unsloth_core.autodiff`, which they hear
through a tape; with that file this one alone uses ``torch.autograd.Function``."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import backend, offload, tree
from .autodiff import (
    INPUT,
    OFFLOAD,
    RECOMPUTE,
    SAVE,
    Call,
    Fate,
    Memo,
    Policy,
    Spare,
    applied,
    apply,
    current_memo,
    current_report,
    current_tape,
    detach,
    differentiable_once,
    gradients_of,
    remembering,
    tell,
)
from .tree import ABSENT, Tree

# ---------------------------------------------------------------------------------------------- rematerialisation


def remat(
    fn: Callable[..., Any], policy: Policy | None, *, host: offload.Host | None = None, decode_once: bool = True
) -> Callable[..., Any]:
    """Run ``fn(*args)`` so that between forward and backward only its arguments and what ``policy`` names are kept.

    ``policy`` maps op calls (their ``name=``) to SAVE, OFFLOAD or RECOMPUTE; a call that is not named is recomputed.
    SAVE keeps what the call produced: its outputs, and residuals that are not arguments; OFFLOAD keeps that on the
    host. ``"layer input"`` names the arguments that carry a gradient, which are kept anyway: SAVE or OFFLOAD.
    ``host``: where all layers of one forward pass send what is offloaded, so that backward fetches it one layer ahead.
    ``decode_once``: what backward reads twice of a weight in another form (NF4 decoded) it makes once; that takes
    memory for up to a whole layer, False for one weight at a time.

    Forward runs without autograd and records; a reverse liveness pass marks every call saved, run or dead (nobody
    needs its output again); backward replays the layer once under autograd. Gradients are bitwise those of
    ``policy=None``, which is plain autograd. ``fn`` must be a function of its arguments alone, made of ops and views: a
    closed-over tensor that wants a gradient is refused with ValueError, as is a name in the policy that no call has.
    ``torch.utils.checkpoint`` would keep the same sets, but replays dead calls."""
    if policy is None:
        return fn
    for name, fate in policy.items():
        if fate not in (SAVE, RECOMPUTE, OFFLOAD) or (name == INPUT and fate == RECOMPUTE):
            expected = (SAVE, OFFLOAD) if name == INPUT else (SAVE, OFFLOAD, RECOMPUTE)
            raise ValueError(f"remat: policy[{name!r}] is {fate!r}, expected {' or '.join(map(repr, expected))}")

    def layer(*args: Tree) -> Any:
        leaves, spec = tree.flatten(args)
        if current_tape.get() is not None:
            raise ValueError("remat: called inside another remat; one layer at a time")
        if not (torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)):
            return fn(*args)
        plan = _Plan(fn, spec, policy, host or offload.Host(), decode_once, backend.override())
        out = _apply_layer(plan, *leaves)
        return tree.unflatten(list(out) if isinstance(out, tuple) else [out], plan.out_spec)

    return layer


@dataclasses.dataclass(frozen=True)
class ResidualReport:
    """Rows in the order of the calls; ``str()`` is a table summed over calls of one name."""

    rows: tuple[Fate, ...]

    @property
    def bytes(self) -> int:
        """All that is kept on the device."""
        return sum(row.bytes for row in self.rows if row.fate != OFFLOAD)

    def __str__(self) -> str:
        groups: dict[tuple[str, str], tuple[int, int]] = {}
        for row in self.rows:
            calls, total = groups.get((row.name, row.fate), (0, 0))
            groups[row.name, row.fate] = (calls + 1, total + row.bytes)
        lines = [f"{'call':<24}{'fate':<12}{'calls':>6}{'MiB kept':>12}"]
        for (name, fate), (calls, total) in groups.items():
            lines.append(f"{name:<24}{fate:<12}{calls:>6}{total / 2**20:>12.2f}")
        lines.append(f"{'total on the device':<42}{self.bytes / 2**20:>12.2f}")
        return "\n".join(lines)


def residual_report(fn: Callable[..., Any], *args: Tree) -> ResidualReport:
    """What ``fn(*args)`` keeps until backward, call by call; "layer input" are the inputs that carry a gradient.

    Runs the forward pass once, with gradients for every floating-point leaf of the first argument.
    """
    leaves, spec = tree.flatten(args[0])
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in leaves]
    rows: list[Fate] = []
    token = current_report.set(rows)
    try:
        with torch.enable_grad():
            fn(tree.unflatten(inputs, spec), *args[1:])
    finally:
        current_report.reset(token)
    return ResidualReport(tuple(rows))


_Result = tuple[Any, Sequence[Tensor], tree.Spec]  # of a call: outputs, residuals as leaves and structure


@dataclasses.dataclass
class _Plan:
    fn: Callable[..., Any]
    spec: Any
    policy: Policy
    host: offload.Host
    decode_once: bool
    backend: str | None
    out_spec: Any = None


class _Entry(NamedTuple):
    """One recorded call. A place below zero is ~i of what the layer keeps, any other one i of the call's arguments and
    outputs. ``outputs`` has the place of each one, or (shape, dtype) of one that is lost."""

    name: str
    fate: str
    several: bool
    outputs: tuple[Any, ...]
    residuals: tuple[int, ...]  # places; none where they must be rebuilt by running the call
    spec: tree.Spec  # of the residuals


@dataclasses.dataclass(slots=True)
class _Noted:
    """A call while its layer is recorded: in places of an :class:`_Entry`, or the tensors that are not placed yet."""

    name: str
    keep: bool
    several: bool
    outputs: list[Any]
    residuals: list[Any] | None  # None: they must be rebuilt by running the call
    spec: tree.Spec
    reads: set[int]  # storages of the arguments, of other outputs, of residuals that are arguments
    makes: set[int]
    needs: set[int]
    fate: str = "run"

    def entry(self, keep: Callable[[Tensor, str], int]) -> _Entry:
        """With the tensors of a call that is not run again placed by ``keep(tensor, name)``."""
        outputs = self.outputs
        if self.fate == "saved":
            outputs = [keep(o, self.name) if isinstance(o, Tensor) else o for o in outputs]
        residuals = [keep(t, self.name) if isinstance(t, Tensor) else t for t in self.residuals or ()]
        return _Entry(self.name, self.fate, self.several, tuple(outputs), tuple(residuals), self.spec)


class _Record:
    """The tape of a layer's forward pass: notes what every op call read and made, and keeps what the policy names.

    ``leaves`` and ``needs``: of the layer."""

    def __init__(self, policy: Policy, leaves: Sequence[Tensor], needs: Sequence[Any], *, spares: bool = True) -> None:
        self.policy, self.leaves, self.spares = policy, leaves, spares
        self.noted: list[_Noted] = []
        self._made: dict[int, StorageWeakRef] = {}
        self._given = {id(leaf): leaf.untyped_storage()._cdata for leaf in leaves}
        self._needed = {id(leaf): need is True for leaf, need in zip(leaves, needs, strict=True)}
        self._frozen = {self._given[leaf] for leaf, need in self._needed.items() if not need}

    def runs(self, name: str) -> bool:
        return False

    def needs(self, name: str, leaves: Sequence[Tensor]) -> tuple[bool, ...]:
        """Any argument may want a gradient, except the layer's own frozen ones."""
        for leaf in leaves:
            if leaf.requires_grad:
                raise ValueError(
                    f"remat: op {name!r} got a tensor that wants a gradient through a closure; pass it as an argument"
                )
        needed = self._needed
        return tuple([needed[id(leaf)] if id(leaf) in needed else self._may_need(leaf) for leaf in leaves])

    def _may_need(self, t: Tensor) -> bool:
        return t.is_floating_point() and self._storage(t) not in self._frozen

    def __call__(self, name: str, leaves: Sequence[Tensor], run: Callable[[], _Result]) -> _Result:
        out, kept, spec = result = run()
        outputs, count = out if isinstance(out, tuple) else (out,), len(leaves)
        at = {id(o): i for i, o in enumerate(outputs, count)}
        at.update([(id(leaf), i) for i, leaf in enumerate(leaves)])  # what is both is an argument
        residuals: list[Any] = [at.get(id(t), t) for t in kept]
        keep = self.policy.get(name) in (SAVE, OFFLOAD)
        if (spare := tree.places(spec, Spare)) and not self.spares:
            holes = [ABSENT if i in spare else place for i, place in enumerate(residuals)]
            residuals, spec = tree.flatten(tree.unflatten(holes, spec))
            spare = ()
        arguments = [place for place in residuals if place.__class__ is int and place < count]
        rebuilt = len(arguments) + len(spare) < len(residuals)
        self.noted.append(
            _Noted(
                name=name,
                keep=keep,
                several=isinstance(out, tuple),
                outputs=[at[id(o)] if at[id(o)] < count else o if keep else (o.shape, o.dtype) for o in outputs],
                residuals=residuals if keep or not rebuilt else None,
                spec=spec,
                reads=self._storages(leaves),
                makes=self._storages([o for o in outputs if at[id(o)] >= count]),
                needs=self._storages([leaves[i] for i in arguments]),
            )
        )
        return result

    def _storages(self, tensors: Sequence[Tensor]) -> set[int]:
        given = self._given
        return {given[id(t)] if id(t) in given else self._storage(t) for t in tensors}

    def _storage(self, t: Tensor) -> int:
        """Its identity. A weak reference is held, so that none is given out twice while we record."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key not in self._made:
            self._made[key] = StorageWeakRef(storage)
        return key

    def finish(self, final: Sequence[Tensor]) -> list[_Noted]:
        """Reverse liveness: a call runs again only if somebody reads what it makes, or its own backward needs it.

        Raises ValueError for names in the policy that no call of the layer has."""
        names = {call.name for call in self.noted}
        if unknown := sorted(set(self.policy) - names - {INPUT}):
            raise ValueError(f"remat: policy names {unknown}, but the calls of this layer are {sorted(names)}")
        seen_by_ops = set().union(*[call.reads for call in self.noted])
        returned = self._storages(final)
        wanted: set[int] = set()
        for call in reversed(self.noted):
            read_outside_ops = call.makes.isdisjoint(seen_by_ops) and call.makes.isdisjoint(returned)
            if call.keep:
                call.fate = "saved"
            elif not call.makes.isdisjoint(wanted) or read_outside_ops or call.residuals is None:
                call.fate, call.residuals = "run", None
                wanted |= call.reads
            else:
                call.fate = "dead"
            wanted |= call.needs
        return self.noted


class _Replay:
    """The tape of a layer's backward pass: hands out what was saved, runs the rest, in the recorded order."""

    def __init__(self, entries: Sequence[_Entry], tensors: Sequence[Tensor]) -> None:
        self.entries, self.tensors, self.at = entries, tensors, 0

    def _next(self, name: str) -> _Entry:
        if self.at == len(self.entries) or self.entries[self.at].name != name:
            recorded = self.entries[self.at].name if self.at < len(self.entries) else "the end"
            raise RuntimeError(f"remat: replay diverged, forward recorded {recorded!r} where backward calls {name!r}")
        self.at += 1
        return self.entries[self.at - 1]

    def runs(self, name: str) -> bool:
        """For the reference backend: take this call off the tape if it is to be run by plain autograd."""
        run = self.at < len(self.entries) and self.entries[self.at].fate == "run"
        if run:
            self._next(name)
        return run

    def needs(self, name: str, leaves: Sequence[Tensor]) -> tuple[bool, ...]:
        return (False,) * len(leaves)

    def __call__(self, name: str, leaves: Sequence[Tensor], run: Callable[[], _Result]) -> _Result:
        entry = self._next(name)
        if entry.fate == "run":
            return run()
        outputs: list[Tensor] = []
        for place in entry.outputs:
            if place.__class__ is int:
                outputs.append(leaves[place] if place >= 0 else self.tensors[~place].detach())
            else:  # never read; NaN in case that is wrong
                (shape, dtype), where = place, leaves[0].device
                value = float("nan") if dtype.is_floating_point else 0
                outputs.append(torch.full((), value, dtype=dtype, device=where).expand(shape))
        here = (*leaves, *outputs)
        residuals = [here[place] if place >= 0 else self.tensors[~place] for place in entry.residuals]
        return tuple(outputs) if entry.several else outputs[0], residuals, entry.spec


def _kept_by_nobody(t: Tensor, name: str) -> int:
    raise AssertionError(f"remat: {name} keeps a tensor of a tile")


@contextlib.contextmanager
def _taping(tape: _Record | _Replay) -> Iterator[None]:
    token = current_tape.set(tape)
    try:
        yield
    finally:
        current_tape.reset(token)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, *leaves: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[1:]
        tell("layer", "forward")
        inside = [leaf.detach() if need else leaf for leaf, need in zip(leaves, needs, strict=True)]
        tape = _Record(plan.policy, inside, needs)
        with _taping(tape):
            out = plan.fn(*tree.unflatten(inside, plan.spec))
        outputs, plan.out_spec = tree.flatten(out)
        # What is kept: the arguments, then of every saved call its outputs and fresh residuals.
        kept = list(leaves)
        moving = [i for i, (leaf, need) in enumerate(zip(leaves, needs, strict=True)) if need and not leaf.is_leaf]
        away = set(moving) if plan.policy.get(INPUT) == OFFLOAD else set()

        def keep(t: Tensor, name: str) -> int:
            kept.append(t)
            if plan.policy.get(name) == OFFLOAD:
                away.add(len(kept) - 1)
            return ~(len(kept) - 1)

        entries = tuple([call.entry(keep) for call in tape.finish(outputs)])
        ctx.plan, ctx.entries, ctx.away = plan, entries, sorted(away)
        ctx.save_for_backward(*[t for i, t in enumerate(kept) if i not in away])
        ctx.device, ctx.parcel = outputs[0].device, None
        if away:
            tell("layer", "offload", *[kept[i] for i in ctx.away])
            ctx.parcel = plan.host.send([kept[i] for i in ctx.away])
        if (fates := current_report.get()) is not None:
            fate = plan.policy.get(INPUT, SAVE)
            fates.append(Fate(INPUT, fate, sum(leaves[i].nbytes for i in moving)))
            for entry in entries:
                places = [i for i in (*entry.residuals, *entry.outputs) if isinstance(i, int) and i < 0]
                size = sum(kept[~i].nbytes for i in places)
                fate = {"run": RECOMPUTE, "saved": plan.policy.get(entry.name)}.get(entry.fate, entry.fate)
                fates.append(Fate(entry.name, str(fate), size))
        tell("layer", "end")
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            refusal = "remat: the backward of a layer cannot be differentiated again; without remat plain PyTorch's can"
            return differentiable_once(refusal, _Layer.backward, ctx, cotangents)
        tell("layer", "backward")
        plan, kept = ctx.plan, list(ctx.saved_tensors)
        if ctx.away:
            back, here = iter(offload.take(ctx.parcel, ctx.device)), iter(kept)
            kept = [next(back if i in ctx.away else here) for i in range(len(kept) + len(ctx.away))]
        needs = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_() if need else x for x, need in zip(kept, needs, strict=False)]
        given = tuple(ABSENT if ct is None else ct for ct in cotangents)
        # The engine's threads do not see the user's context: the backend of forward is set again here.
        with backend.using(plan.backend), remembering(Memo() if plan.decode_once else None):
            with torch.enable_grad(), _taping(_Replay(ctx.entries, kept)):
                out = plan.fn(*tree.unflatten(inputs, plan.spec))
            del kept
            found = gradients_of(tuple(tree.leaves(out)), [x for x in inputs if x.requires_grad], given)
        gradients = [next(found) if need else ABSENT for need in needs]
        tell("layer", "end")
        return (None, *[None if g is ABSENT else g for g in gradients])


_apply_layer = applied(_Layer)


# ------------------------------------------------------------------------------------------------------------- tiles


def tiled(
    fn: Callable[..., Any], size: int, *, name: str, sums: tuple[bool, ...] = (), decode_once: bool = True
) -> Callable[..., Any]:
    """``fn(w, *rows)`` run on ``size`` rows at a time: one call ``name`` to a policy, which keeps its arguments alone.

    ``fn`` is made of ops and views, and every leaf of ``rows`` and of what it returns has the rows as its first
    dimension, each depending on no other: a token-local function. Rows that it returns as they came are not copied.
    ``sums``, where given, says of each entry of the tuple that ``fn`` returns whether it is a sum over rows instead.
    What is alive in the middle of ``fn``, forward and backward, is that of one tile. Gradients of ``w`` are added up
    over tiles in fp32, in order; those of rows are as without tiles, as far as the products inside give a row the same
    bits among fewer others.
    Backward replays a tile under autograd, but for what nobody needs again (see :func:`remat`). ``decode_once`` as
    there, here for the span of all tiles. Raises ValueError for a size below 1 or an output without the rows."""
    if size < 1:
        raise ValueError(f"tiled: size is {size}, expected at least 1")
    tiles = _Tiles(fn, size, name, sums, decode_once)

    def call(w: Tree, *rows: Tree) -> Any:
        leaves, spec = tree.flatten((w, rows))
        tape, tiles.backend = current_tape.get(), backend.override()
        op_call = Call(name, (tiles.tiled_fwd, tiles.tiled_bwd), spec, {}, tape)
        if torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves):
            out = apply(op_call, *leaves)
        else:
            out = op_call.forward(leaves, tape.needs(name, leaves) if tape else (False,) * len(leaves))[0]
        return tree.unflatten(out, tiles.out_spec)

    return call


class _Tiles:
    """The pair of a tiled function. What it learns in forward (structure, no tensors) is the same in every run."""

    def __init__(self, fn: Callable[..., Any], size: int, name: str, sums: tuple[bool, ...], decode_once: bool) -> None:
        self.fn, self.size, self.name, self.sums, self.decode_once = fn, size, name, sums, decode_once
        self.backend: str | None = None
        self.added: list[bool] = []  # of each tensor that comes out: is it a sum over rows?
        self.passed: list[int | None] = []  # and which one of the rows it is, if any
        self.entries: dict[int, list[_Entry]] = {}  # rows of a tile -> its calls
        self.out_spec: Any = None

    def _tiles(self, rows: Tree) -> Iterator[tuple[slice, Tree]]:
        count = tree.leaves(rows)[0].shape[0]
        for start in range(0, max(count, 1), self.size):
            here = slice(start, min(start + self.size, count))
            yield here, tree.map(lambda t, here=here: t[here].detach(), rows)

    def tiled_fwd(self, w: Tree, rows: Tree, *, needs: Tree) -> tuple[tuple[Tensor, ...], Tree]:
        still, whole, wanted = tree.map(detach, w), [], tree.leaves(needs)
        memo = Memo() if self.decode_once else None
        if memo is not None:
            memo.hold = True
        with torch.no_grad(), remembering(memo):
            for here, part in self._tiles(rows):
                tape = _Record({}, tree.leaves((still, part)), wanted, spares=False)
                with _taping(tape):
                    out = self.fn(still, *part)
                found, self.out_spec = tree.flatten(out)
                self.entries[here.stop - here.start] = [call.entry(_kept_by_nobody) for call in tape.finish(found)]
                if not whole:
                    self.added, whole = self._begin(out, part, here.stop, tree.leaves(rows))
                for target, t, added, passed in zip(whole, found, self.added, self.passed, strict=True):
                    if added:
                        target.add_(t)
                    elif passed is None:
                        target[here] = t
                del out, found, part
        return tuple(whole), (w, rows)

    def _begin(
        self, out: Any, part: Tree, rows: int, given: Sequence[Tensor]
    ) -> tuple[list[bool], list[Tensor]]:  # fmt: skip
        """Room for all rows of what ``part``, ``rows`` of them, gave, and which of it is a sum."""
        of_entries = [(entry, False) for entry in (out if isinstance(out, tuple) else (out,))]
        if self.sums:
            of_entries = list(zip(out, self.sums, strict=True))
        leaves = [(t, added) for entry, added in of_entries for t in tree.leaves(entry)]
        for t, added in leaves:
            if not added and (t.ndim == 0 or t.shape[0] != rows):
                got = f"a tensor of shape {tuple(t.shape)} for {rows} rows"
                raise ValueError(f"tiled: {self.name} returns {got}, expected (rows, ...)")
        parts, count = tree.leaves(part), given[0].shape[0]
        self.passed = [next((i for i, p in enumerate(parts) if p is t), None) for t, _ in leaves]
        whole = [
            given[i] if i is not None else torch.zeros_like(t) if added else t.new_empty((count, *t.shape[1:]))
            for (t, added), i in zip(leaves, self.passed, strict=True)
        ]
        return [added for _, added in leaves], whole

    def tiled_bwd(self, residuals: Tree, cotangents: tuple[Any, ...], *, needs: Tree) -> tuple[Any, Any]:
        (w, rows), (needs_w, needs_rows) = residuals, (tree.leaves(part) for part in needs)
        w_leaves, w_spec = tree.flatten(w)
        dw: list[Any] = [ABSENT] * len(w_leaves)
        row_leaves, row_spec = tree.flatten(rows)
        d_rows = [torch.zeros_like(t) if n is True else ABSENT for t, n in zip(row_leaves, needs_rows, strict=True)]
        count = row_leaves[0].shape[0]
        memo = current_memo.get() or (Memo() if self.decode_once else None)
        with backend.using(self.backend), remembering(memo):
            for here, part in self._tiles(rows):
                if memo is not None:
                    memo.hold = here.stop < count
                still = [t.detach().requires_grad_(n is True) for t, n in zip(w_leaves, needs_w, strict=True)]
                moving, part_spec = tree.flatten(part)
                for t, need in zip(moving, needs_rows, strict=True):
                    t.requires_grad_(need is True)
                entries = self.entries[here.stop - here.start]
                with torch.enable_grad(), _taping(_Replay(entries, ())):
                    out = self.fn(tree.unflatten(still, w_spec), *tree.unflatten(moving, part_spec))
                both = zip(cotangents, self.added, strict=True)
                given = tuple([ct if ct is ABSENT or added else ct[here] for ct, added in both])
                found = gradients_of(tuple(tree.leaves(out)), [t for t in (*still, *moving) if t.requires_grad], given)
                del out
                for i, t in enumerate(still):
                    if t.requires_grad and (g := next(found)) is not ABSENT:
                        dw[i] = g.to(torch.float32, copy=True) if dw[i] is ABSENT else dw[i].add_(g)
                for t, d in zip(moving, d_rows, strict=True):
                    if t.requires_grad and (g := next(found)) is not ABSENT:
                        d[here] = g
        dw = [d if d is ABSENT else d.to(t.dtype) for d, t in zip(dw, w_leaves, strict=True)]
        return tree.unflatten(dw, w_spec), tree.unflatten(d_rows, row_spec)
