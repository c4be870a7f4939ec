"""Fine-tuning: a pure step, and the loop around it that measures, evaluates, saves and resumes.

The step is a function of adapters, optimizer state and microbatches; all that happens to files is in :func:`finetune`.
"""

import dataclasses
import hashlib
import json
import math
import os
import statistics
import sys
import time
import tomllib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from tqdm import tqdm

from . import checkpoint, data, lora, optim, random, tree
from .autodiff import Policy, value_and_grad
from .capture import Captured
from .data import Batch
from .lora import Adapters
from .models.decoder import Model, Schedule

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZER_STATES = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": "8bit"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run is made of; the fields of ``--config run.toml`` and of ``uc.finetune``."""

    output: str = "runs/finetune"  # folder for adapter, metrics.jsonl, loss.png, run.toml and checkpoints
    rank: int | dict[str, int] = 16  # or by name, {"q_proj": 8, ...}; then only those are adapted
    alpha: float | None = None  # None: the rank, so the scale is 1
    rslora: bool = False
    targets: str | list[str] = "all-linear"
    dropout: float = 0.0  # of each adapter's input, while training
    lr: float = 2e-4
    schedule: str = "linear"
    warmup: int = 5  # steps
    weight_decay: float = 0.0
    optimizer_states: str = "fp32"  # how AdamW stores its two moments: fp32, bf16 (the first of them) or 8bit
    max_norm: float = 1.0  # of the gradient; inf: no clipping
    steps: int | None = None  # None: as many as the epochs hold
    epochs: int = 1
    tokens: int = 2048  # per microbatch
    accumulate: int = 1  # microbatches per step
    train_on: str = "responses"
    eval_fraction: float = 0.0
    eval_every: int = 50
    save_every: int = 100
    seed: int = 0
    capture: bool | None = None  # the step as a CUDA graph, with the same bits; None: on a GPU, where it can be one

    def __post_init__(self) -> None:
        if isinstance(self.output, os.PathLike):
            object.__setattr__(self, "output", os.fspath(self.output))
        if isinstance(self.targets, tuple):
            object.__setattr__(self, "targets", list(self.targets))
        for name, value in dataclasses.asdict(self).items():
            _check_type("finetune", name, value)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"finetune: schedule is {self.schedule!r}, expected one of {SCHEDULES}")
        if self.optimizer_states not in OPTIMIZER_STATES:
            got, expected = repr(self.optimizer_states), tuple(OPTIMIZER_STATES)
            raise ValueError(f"finetune: optimizer_states is {got}, expected one of {expected}")
        if self.train_on not in ("responses", "all"):
            raise ValueError(f"finetune: train_on is {self.train_on!r}, expected 'responses' or 'all'")
        if self.tokens < 2:
            raise ValueError(f"finetune: tokens is {self.tokens}, expected at least 2, one to predict the next from")
        for name in ("lr", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"finetune: {name} is {getattr(self, name)}, expected a number of at least 0")
        ranks = list(self.rank.values()) if isinstance(self.rank, dict) else [self.rank]
        if not ranks or not all(type(r) is int and r >= 1 for r in ranks):
            raise ValueError(f"finetune: rank is {self.rank}, expected at least 1")
        for name in ("epochs", "accumulate", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"finetune: {name} is {getattr(self, name)}, expected at least 1")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"finetune: steps is {self.steps}, expected at least 1")
        if not self.max_norm > 0:
            raise ValueError(f"finetune: max_norm is {self.max_norm}, expected more than 0 (inf: no clipping)")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"finetune: alpha is {self.alpha}, expected a number above 0")
        if self.warmup < 0:
            raise ValueError(f"finetune: warmup is {self.warmup}, expected at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"finetune: dropout is {self.dropout}, expected 0 <= dropout < 1")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"finetune: eval_fraction is {self.eval_fraction}, expected 0 <= eval_fraction < 1")

    @staticmethod
    def from_toml(file: str | os.PathLike[str]) -> dict[str, Any]:
        """The options of a TOML file. Raises ValueError naming an unknown one, or a value of the wrong type."""
        try:
            values = tomllib.loads(Path(file).read_text("utf-8"))
        except ValueError as error:  # of TOML or of UTF-8
            raise ValueError(f"{file}: {error}") from None
        for name, value in values.items():
            _check_type(str(file), name, value)
        return values

    def to_toml(self) -> str:
        """Every option as a TOML file that :meth:`from_toml` reads back; None, always a default, is left out."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items())


def _check_type(where: str, name: str, value: Any) -> None:
    """Raises ValueError unless Options has such a field and the value is of its type; an integer is a float too."""
    types = get_type_hints(Options)
    if name not in types:
        raise ValueError(f"{where}: unknown option {name!r}, expected one of {sorted(types)}")
    allowed = get_args(types[name]) or (types[name],)
    number = isinstance(value, int) and not isinstance(value, bool) and float in allowed
    if not number and not any(type(value) is getattr(t, "__origin__", t) for t in allowed):
        names = " or ".join(str(t) if hasattr(t, "__origin__") else t.__name__ for t in allowed)
        raise ValueError(f"{where}: {name} is {value!r}, expected {names.replace('NoneType', 'None')}")


def _toml(value: Any) -> str:
    """JSON writes these values as TOML does, but for tables, its infinity, its pairs of surrogates, a bare delete."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_toml(k)} = {_toml(v)}' for k, v in value.items())} }}"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


Step = Callable[[Adapters, Any, Sequence[Batch]], tuple[Adapters, Any, dict[str, Tensor]]]


def make_step(
    model: Model,
    params: Any,
    optimizer: optim.Optimizer,
    *,
    max_norm: float | None,
    policy: Schedule | Policy | None,
    dropout: float = 0.0,
    key: Tensor | None = None,
    capture: bool | None = False,
) -> Step:
    """``step(adapters, state, microbatches) -> (adapters, state, metrics)``, without a host sync.

    Gradients of the microbatches are summed in fp32, each loss divided by the number of targets of all of them: the
    gradient of one large batch. ``adapters`` and ``state`` are donated. metrics: ``loss``, ``grad_norm``, ``targets``,
    0-d. ``dropout`` of the adapters' inputs needs a ``key``, into which ``state.step`` and the number of the microbatch
    are folded: the same masks whatever is recomputed, captured or resumed. ``capture``: as a CUDA graph, the same
    results to the bit (see :mod:`unsloth_core.capture` for what is static then); ValueError on a CPU. None: on a GPU,
    and where no graph can be recorded, a warning says why and steps run one by one.
    """
    device = params.norm.device
    if capture and device.type != "cuda":
        raise ValueError(f"make_step: capture, but the weights are on {device}, expected cuda")
    if dropout and key is None:
        raise ValueError(f"make_step: dropout is {dropout}, but no key was given, from which masks are made")
    base_key = key.to(device) if dropout and key is not None else None

    def loss(adapters: Adapters, batch: Batch, count: Tensor, key: Tensor | None) -> tuple[Tensor, Any]:
        adapted = lora.adapt(params, adapters, dropout=dropout, key=key)
        return model.loss(adapted, batch, count=count, policy=policy)

    gradient = value_and_grad(loss, has_aux=True)

    def step(adapters: Adapters, state: Any, microbatches: Sequence[Batch]) -> tuple[Adapters, Any, dict[str, Tensor]]:
        count = torch.stack([batch.count for batch in microbatches]).sum()
        own = None if base_key is None else random.fold_in(base_key, state.step)
        keys = [None if own is None else random.fold_in(own, i) for i in range(len(microbatches))]
        (loss, _), grads = gradient(adapters, microbatches[0], count, keys[0])
        if len(microbatches) > 1:
            total = tree.map(lambda g: g.float(), grads)
            for batch, key in zip(microbatches[1:], keys[1:], strict=True):
                (more, _), grads = gradient(adapters, batch, count, key)
                loss = loss + more
                total = tree.map(lambda sum_, g: sum_ + g.float(), total, grads)
            grads = tree.map(lambda sum_, leaf: sum_.to(leaf.dtype), total, adapters)
        norm = optim.global_norm(grads)
        clip = None if max_norm is None else optim.clip_factor(norm, max_norm)
        adapters, state = optimizer.update(grads, state, adapters, clip=clip, donate=True)
        return adapters, state, {"loss": loss, "grad_norm": norm, "targets": count}

    return Captured(step, strict=capture is True) if capture is not False and device.type == "cuda" else step


@torch.no_grad()
def evaluate(model: Model, params: Any, batches: Sequence[Batch], *, policy: Schedule | Policy | None = None) -> float:
    """Mean loss per target token over batches; ``policy`` as in training, for its tiles."""
    sums = [model.loss(params, batch, policy=policy)[1] for batch in batches]
    return float(sum(s["loss_sum"] for s in sums) / sum(s["count"] for s in sums))


def finetune(
    model: Model,
    params: Any,
    examples: data.Source,
    *,
    policy: Schedule | Policy | None = None,
    resume: bool = True,
    progress: bool = True,
    **options: Any,
) -> tuple[Adapters, list[dict[str, float]]]:
    """Train LoRA adapters on a file (or list) of examples; returns them and one row of metrics per step.

    ``options`` are the fields of :class:`Options`. Written to ``output``: ``run.toml`` (the options), ``metrics.jsonl``
    (step, loss, lr, grad_norm, targets, tokens_per_s, memory_gib, and eval_loss where measured), ``loss.png``, the
    adapter in PEFT's format, and checkpoints. A run that finds a checkpoint of its own in ``output`` goes on from there
    and ends with the same bits as one that was never stopped; ``resume=False`` starts over. Raises ValueError for bad
    options or data, for a checkpoint of a run with other options, data or weights, for an ``output`` with an adapter
    and no checkpoint, and when loss or gradient is not finite (earlier checkpoints stay). Warns of examples that are
    longer than the model's context.
    """
    if unknown := sorted(set(options) - {field.name for field in dataclasses.fields(Options)}):
        raise ValueError(f"finetune: unknown option {unknown[0]!r}, expected the fields of Options")
    o = Options(**options)
    if not isinstance(model, Model):
        got = f"a {type(model).__name__}"
        raise ValueError(f"finetune: model is {got}, expected a Model: model, params = uc.load(...)")
    if model.tokenizer is None:
        raise ValueError(
            "finetune: this model has no tokenizer; load one with the model, or write the loop with make_step"
        )
    output = Path(o.output)
    if resume:
        refuse_to_replace(output)
    training, held_out = data.split(data.read_examples(examples), o.eval_fraction, o.seed)
    device = params.norm.device
    more = {"tokens": o.tokens, "train_on": o.train_on, "device": device, "progress": progress}
    more["vocab_size"] = model.config.vocab_size
    batches = data.batches(training, model.tokenizer, epochs=o.epochs, seed=o.seed, **more)
    held_out_batches = list(data.batches(held_out, model.tokenizer, shuffle=False, **more)) if held_out else []
    context, longest = model.config.max_position_embeddings, int(batches.examples.lengths.max())
    if longest > context:
        warnings.warn(
            f"finetune: examples of up to {longest} tokens exceed the model's context of {context} "
            "(max_position_embeddings), where it may learn little; fewer tokens (--tokens) cut them",
            stacklevel=2,
        )
    steps = o.steps or max(len(batches) // o.accumulate, 1)

    rates = {
        "constant": lambda: optim.constant(o.lr),
        "linear": lambda: optim.linear(o.lr, steps, min(o.warmup, steps - 1)),
        "cosine": lambda: optim.cosine(o.lr, steps, min(o.warmup, steps - 1)),
    }
    rate = rates[o.schedule]()
    state_dtype = OPTIMIZER_STATES[o.optimizer_states]
    optimizer = optim.adamw(rate, weight_decay=o.weight_decay, state_dtype=state_dtype)
    masks = random.fold_in(random.key(o.seed), 1)
    step_fn = make_step(
        model, params, optimizer, max_norm=o.max_norm, policy=policy, dropout=o.dropout, key=masks, capture=o.capture
    )
    adapters = lora.init(random.key(o.seed), params, rank=o.rank, alpha=o.alpha, targets=o.targets, rslora=o.rslora)
    state = optimizer.init(adapters)
    history: list[dict[str, float]] = []
    identity = {**dataclasses.asdict(o), "output": None, "capture": None, "total_steps": steps}
    tokenised = batches.examples
    contents = (tokenised.ids, tokenised.trained, tokenised.ends)
    identity["data"] = hashlib.sha256(b"".join(map(bytes, contents))).hexdigest()
    identity["model"] = f"{model.source}, {tree.nbytes(params)} bytes of {params.embed.dtype}"
    newest = checkpoint.newest(output / "checkpoints") if resume else None
    if newest is not None:
        facts = checkpoint.facts(newest)
        made = facts.get("options") or {}
        if changed := sorted(k for k in identity if made.get(k) != identity[k]):
            raise ValueError(
                f"finetune: {newest} was made with another {' and '.join(changed)}; choose another output folder, "
                "or do not resume (resume=False, --no-resume)"
            )
        adapters, state = checkpoint.load(newest, (adapters, state))
        history = _read_metrics(output / "metrics.jsonl", facts["step"])
    else:
        checkpoint.clear(output / "checkpoints")  # of a run that is started over: they would pass for this one's

    output.mkdir(parents=True, exist_ok=True)
    _write(output / "run.toml", o.to_toml())
    rarely = 0.1 if sys.stderr.isatty() else 10.0  # seconds: in a log every refresh stays
    bar = tqdm(
        total=steps, initial=len(history), desc="fine-tuning", unit="step", mininterval=rarely, disable=not progress
    )
    _rewrite_metrics(output / "metrics.jsonl", history)
    with bar, (output / "metrics.jsonl").open("a") as log:
        for i in range(len(history), steps):
            started = time.perf_counter()
            micro = [batches[(i * o.accumulate + j) % len(batches)] for j in range(o.accumulate)]
            adapters, state, metrics = step_fn(adapters, state, micro)
            row = {"step": i + 1, **{name: float(value) for name, value in metrics.items()}}  # waits for the device
            row["lr"] = float(rate(torch.tensor(i)))
            row["tokens_per_s"] = sum(len(b.tokens_N) for b in micro) / (time.perf_counter() - started)
            row["memory_gib"] = _memory_gib(device)
            if held_out_batches and ((i + 1) % o.eval_every == 0 or i + 1 == steps):
                row["eval_loss"] = evaluate(model, lora.adapt(params, adapters), held_out_batches, policy=policy)
            history.append(row)
            log.write(json.dumps(row) + "\n")
            log.flush()
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                raise ValueError(
                    f"finetune: at step {i + 1} the loss is {row['loss']} and the gradient's norm {row['grad_norm']}: "
                    "nothing can be learnt from here on, and no adapter was written; try a lower lr, or bfloat16 for "
                    "float16"
                )
            speed = f"{row['tokens_per_s']:.0f} tok/s, {row['memory_gib']:.1f} GiB"
            bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed}", refresh=False)
            bar.update()
            if (i + 1) % o.save_every == 0 and i + 1 < steps:
                os.fsync(log.fileno())  # a checkpoint without its rows cannot be gone on from
                checkpoint.save(output / "checkpoints", i + 1, (adapters, state), {"options": identity})
    try:
        plot_loss(history, output / "loss.png")
    finally:  # last, because an adapter says that its run is finished; and whatever happens to a picture
        lora.save(adapters, output, model)
    return adapters, history


def refuse_to_replace(output: Path) -> None:
    """Raises ValueError where an adapter is and no checkpoint that led to it: a finished run, shorter than
    ``save_every`` steps, or somebody else's adapter. To train once more is to lose it."""
    if (file := output / "adapter_model.safetensors").exists() and checkpoint.newest(output / "checkpoints") is None:
        raise ValueError(
            f"finetune: {file} is there already, of a run that is finished; choose another output folder, or replace "
            "it (resume=False, --no-resume)"
        )


def plot_loss(history: list[dict[str, float]], file: str | os.PathLike[str]) -> None:
    """The loss of every step, its running mean, and the evaluation loss, as a picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss per target token")
    steps, losses = [row["step"] for row in history], [row["loss"] for row in history]
    axes.plot(steps, losses, color="0.75", linewidth=1, label="each step")
    window = max(5, len(losses) // 20)
    means = [statistics.fmean(losses[max(0, i - window + 1) : i + 1]) for i in range(len(losses))]
    axes.plot(steps, means, color="C0", label=f"mean of {window}")
    measured = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    if measured:
        axes.plot(*zip(*measured, strict=True), "o-", color="C1", label="held out")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def _read_metrics(file: Path, steps: int) -> list[dict[str, float]]:
    """The first ``steps`` rows; a kill may have left later rows, or half of one, behind."""
    rows = []
    for line in file.read_text().splitlines()[:steps] if file.is_file() else []:
        rows.append(json.loads(line))
    if len(rows) != steps:
        raise ValueError(f"finetune: {file} has {len(rows)} rows, but the checkpoint is of step {steps}")
    return rows


def _rewrite_metrics(file: Path, history: list[dict[str, float]]) -> None:
    _write(file, "".join(json.dumps(row) + "\n" for row in history))


def _write(file: Path, text: str) -> None:
    """All of it or nothing: a full disk leaves what was there."""
    temporary = file.with_name(f".writing-{file.name}")
    try:
        temporary.write_text(text, "utf-8")
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _memory_gib(device: torch.device) -> float:
    """Peak memory: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
