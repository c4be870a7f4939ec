"""Proof that speed cost nothing: ``python perf/exactness.py --shape llama-3.1-8b-4layers``, or ``--model FILE``.

The same weights, the same first adapters, the same batches, with transformers + PEFT on one side:

* gradients of one batch against float64 (our reference there, checked against transformers in float64): relative norm
  of the error over all adapters, and the median and worst of a single one; ours in bf16 beside transformers' bf16;
* losses of ``--steps`` AdamW steps: ours, transformers' in bf16 with two of its attentions (their distance is how much
  two right programs differ), and transformers' in fp32;
* every policy and schedule: gradients equal, bit for bit, to those of saving everything.

Exit code 1 unless our gradients are no further from float64 than transformers' (give or take 10 %), our losses no
further from its fp32 losses than its own bf16 losses are (or than its two attentions are from each other), and the bits
are equal."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that a plain checkout is enough

from perf import train_step  # noqa: E402
from perf.peers import steps as peers  # noqa: E402
from perf.random_model import random_ids, random_model  # noqa: E402
from unsloth_core import backend, data, load, lora, optim, random, tree  # noqa: E402
from unsloth_core.autodiff import value_and_grad  # noqa: E402
from unsloth_core.load import named_tensors  # noqa: E402
from unsloth_core.lora import Adapters  # noqa: E402
from unsloth_core.models.decoder import Model  # noqa: E402
from unsloth_core.train import make_step  # noqa: E402
from unsloth_core.weights import LoRA  # noqa: E402

# What only moves or recomputes tensors; the gradients must not notice.
POLICIES = ("recompute", "qkv,attn,mid,gate_up", "attn", "attn,mid", "gate_up", "attn=offload,mid=offload")
TRUST = 1e-5  # relative distance at which two float64 gradients (rotation and norms in fp32 in one) are the same
CHANCE = 1.1  # which of two programs that round equally often comes out nearer is chance


def first_adapters(params: Any, rank: int, *, trained: bool) -> Adapters:
    """As a run starts; ``trained``: B is not zero any more, or A would have no gradient."""
    adapters = lora.init(random.key(0), params, rank=rank)
    if not trained:
        return adapters
    generator = torch.Generator().manual_seed(1)

    def moved(one: LoRA) -> LoRA:
        b = 0.01 * torch.randn(one.b.shape, generator=generator).to(one.b.device)
        return LoRA(a=one.a, b=b, scale=one.scale)

    return {path: moved(one) for path, one in adapters.items()}


def wide(params: Any, dtype: torch.dtype) -> Any:
    """The same weights in another dtype."""
    return tree.map(lambda t: t.to(dtype), params)


# ---- gradients


def our_gradients(
    model: Model, params: Any, adapters: Adapters, ids_BT: Tensor, policy: str = "default", using: str | None = None
) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients by path and a or b)."""
    batch = data.from_tokens(ids_BT, vocab_size=model.config.vocab_size).to(params.embed.device)
    schedule = train_step.schedule_of(policy)
    with backend.using(using) if using else contextlib.nullcontext():
        (loss, _), grads = value_and_grad(
            lambda a: model.loss(lora.adapt(params, a), batch, policy=schedule), has_aux=True
        )(adapters)
    return float(loss), {f"{path}.{k}": getattr(g, k) for path, g in grads.items() for k in "ab"}


class Judge:
    """transformers + PEFT with the given weights and adapters."""

    def __init__(
        self, params: Any, adapters: Adapters, raw: dict[str, Any], dtype: torch.dtype, attention: str = "sdpa"
    ) -> None:
        from transformers import AutoConfig

        self.device = params.embed.device
        config = AutoConfig.for_model(**raw)
        base = peers.random_llama(config, self.device, tensors=named_tensors(params), dtype=dtype, attention=attention)
        self.model = peers.with_adapters(base, next(iter(adapters.values())).a.shape[0])
        self.adapters: dict[str, torch.nn.Parameter] = {}
        found = dict(self.model.named_parameters())
        for path, one in adapters.items():
            for letter, value in (("A", one.a), ("B", one.b)):
                parameter = found[f"base_model.model.{path}.lora_{letter}.default.weight"]
                parameter.data = value.detach().to(dtype if dtype == torch.float64 else torch.float32).clone()
                self.adapters[f"{path}.{letter.lower()}"] = parameter
        self.low, self.exact = dtype == torch.bfloat16, dtype == torch.float64

    def loss(self, ids_BT: Tensor) -> Tensor:
        """Of a batch, under autocast if the weights are bf16, as trainers run it; its own loss is in fp32 always."""
        ids = ids_BT.to(self.device)
        if self.exact:
            logits = self.model(input_ids=ids).logits[:, :-1]
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.low):
            return self.model(input_ids=ids, labels=ids).loss

    def gradients(self, ids_BT: Tensor) -> tuple[float, dict[str, Tensor]]:
        """As :func:`our_gradients`."""
        loss = self.loss(ids_BT)
        found = torch.autograd.grad(loss, list(self.adapters.values()))
        return float(loss.detach()), dict(zip(self.adapters, found))

    def losses(self, batches: Sequence[Tensor], lr: float) -> list[float]:
        """One AdamW step a batch."""
        adam = torch.optim.AdamW(self.adapters.values(), lr=lr, weight_decay=0.0)
        found = []
        for ids in batches:
            loss = self.loss(ids)
            loss.backward()
            adam.step()
            adam.zero_grad(set_to_none=True)
            found.append(loss.detach())
        return [float(loss) for loss in found]


def our_losses(model: Model, params: Any, adapters: Adapters, batches: Sequence[Tensor], lr: float) -> list[float]:
    """One AdamW step a batch."""
    adapters = tree.map(torch.clone, adapters)
    optimizer = optim.adamw(lr)
    state = optimizer.init(adapters)
    step = make_step(model, params, optimizer, max_norm=None, policy=None)
    found = []
    for ids in batches:
        batch = data.from_tokens(ids, vocab_size=model.config.vocab_size).to(params.embed.device)
        adapters, state, metrics = step(adapters, state, [batch])
        found.append(metrics["loss"])
    return [float(loss) for loss in found]


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative norm of the difference: of all together, and the median and largest of one."""
    each, difference, size = [], 0.0, 0.0
    for path, want in truth.items():
        d, s = float((found[path].double() - want).norm()), float(want.norm())
        each.append(d / s)
        difference, size = difference + d * d, size + s * s
    each.sort()
    return {"all": (difference / size) ** 0.5, "median": each[len(each) // 2], "worst": each[-1]}


def distance(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """Between two loss curves, relative to the second."""
    each = [abs(x - y) / abs(y) for x, y in zip(a, b)]
    return {"mean": sum(each) / len(each), "largest": max(each)}


# ---- the three proofs


def gradients_hold(model: Model, params: Any, raw: dict[str, Any], rank: int, ids: Tensor) -> Iterator[dict[str, Any]]:
    """Rows of the gradient table; the last says whether it holds."""
    adapters = first_adapters(params, rank, trained=True)
    low = params.embed.dtype
    exact, exact_adapters = wide(params, torch.float64), wide(adapters, torch.float64)
    truth_loss, truth = our_gradients(model, exact, exact_adapters, ids, using="reference")
    truth = {path: g.cpu() for path, g in truth.items()}

    def row(name: str, result: tuple[float, dict[str, Tensor]]) -> dict[str, Any]:
        loss, found = result
        found = {path: g.cpu() for path, g in found.items()}
        return {"gradients": name, "loss_error": abs(loss - truth_loss) / truth_loss, **errors(found, truth)}

    judge64 = Judge(exact, exact_adapters, raw, torch.float64, "eager")
    yield (check := row("transformers float64", judge64.gradients(ids)))
    del judge64, exact, exact_adapters
    _free()
    yield (ours := row(f"ours {low}", our_gradients(model, params, adapters, ids)))
    yield (theirs := row(f"transformers {low}", Judge(params, adapters, raw, low).gradients(ids)))
    holds = check["all"] < TRUST and all(ours[k] <= CHANCE * theirs[k] for k in ("all", "median", "worst"))
    yield {"gradients": "no further from float64 than transformers", "holds": holds}


def losses_hold(
    model: Model, params: Any, raw: dict[str, Any], rank: int, batches: Sequence[Tensor], lr: float
) -> Iterator[dict[str, Any]]:
    """Rows of the loss table; the last says whether it holds."""
    adapters = first_adapters(params, rank, trained=False)
    low = params.embed.dtype
    curves = {f"ours {low}": our_losses(model, params, adapters, batches, lr)}
    for name, dtype, attention in (
        (f"transformers {low} sdpa", low, "sdpa"),
        (f"transformers {low} eager", low, "eager"),
        ("transformers float32", torch.float32, "sdpa"),
    ):
        curves[name] = Judge(params, adapters, raw, dtype, attention).losses(batches, lr)
        _free()
    ours, sdpa, eager, exact = curves.values()
    for name, curve in curves.items():
        every = max(1, len(curve) // 10)
        yield {"losses": name, "steps": len(curve), "curve": [round(x, 5) for x in (*curve[::every], curve[-1])]}
    pairs = {
        "ours - transformers float32": distance(ours, exact),
        "transformers sdpa - transformers float32": distance(sdpa, exact),
        "transformers eager - transformers float32": distance(eager, exact),
        "transformers sdpa - transformers eager": distance(sdpa, eager),
        "ours - transformers sdpa": distance(ours, sdpa),
    }
    for name, found in pairs.items():
        yield {"losses": name, **found}
    own, *theirs, spread, _ = (found["mean"] for found in pairs.values())
    yield {"losses": "no further from float32 than transformers' own", "holds": own <= max(*theirs, spread)}


def policies_hold(model: Model, params: Any, rank: int, ids: Tensor) -> Iterator[dict[str, Any]]:
    """One row for each policy that is tried; the last says whether all are bitwise equal."""
    adapters = first_adapters(params, rank, trained=True)
    everything = ",".join(model.family.SAVED)
    loss, truth = our_gradients(model, params, adapters, ids, everything)
    holds = True
    for policy in ("default", *POLICIES):
        if policy.endswith("offload") and params.embed.device.type != "cuda":
            continue
        other, found = our_gradients(model, params, adapters, ids, policy)
        equal = loss == other and all(torch.equal(found[path], g) for path, g in truth.items())
        holds &= equal
        yield {"policy": policy, "bitwise_equal": equal}
    yield {"policy": f"all equal to {everything}", "holds": holds}


def _free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- the command line


def model_of(o: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Model, Any, dict[str, Any]]:
    """(model, params, config.json): random weights of a shape, or real ones."""
    if o.model is None:
        model, params = random_model(o.shape, device=device, dtype=dtype)
        return model, params, train_step.random_model.raw_config(o.shape)
    from unsloth_core.hub import open_checkpoint

    model, params = load(o.model, device=device, dtype=dtype)
    return model, params, open_checkpoint(o.model).config


def rows_of_ids(o: argparse.Namespace, model: Model) -> list[Tensor]:
    """``--steps`` batches (bs, seq): of the text of ``--text``, over and over, or random ids of a small vocabulary."""
    if o.text is None:
        few = min(model.config.vocab_size, 512)  # so that there is something to learn
        return [random_ids(o.batch, o.seq, few, seed=1 + i % 8) for i in range(o.steps)]
    if model.tokenizer is None:
        raise SystemExit("exactness: --text needs a --model with a tokenizer")
    ids = model.tokenizer.encode(Path(o.text).read_text("utf-8"))
    size = o.batch * o.seq
    whole = [torch.tensor(ids[i : i + size]).view(o.batch, o.seq) for i in range(0, len(ids) - size + 1, size)]
    if not whole:
        raise SystemExit(f"exactness: {o.text} has {len(ids)} tokens, expected at least {size}")
    return [whole[i % len(whole)] for i in range(o.steps)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the three tables; the exit code is 1 if something does not hold."""
    parser = argparse.ArgumentParser(prog="perf/exactness.py", description="Compare training with transformers + PEFT.")
    parser.add_argument("--shape", default="llama-3.1-8b-4layers", help="random weights of this shape")
    parser.add_argument("--model", help="or real weights: a folder, a GGUF file or a Hub id")
    parser.add_argument("--text", help="train on this file's text instead of random ids")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--only", choices=("gradients", "losses", "policies"))
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--commit", help="what was compared, where git cannot say")
    o = parser.parse_args(argv)

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    model, params, raw = model_of(o, device, getattr(torch, o.dtype))
    batches = rows_of_ids(o, model)
    proofs = {
        "gradients": lambda: gradients_hold(model, params, raw, o.rank, batches[0]),
        "policies": lambda: policies_hold(model, params, o.rank, batches[0]),
        "losses": lambda: losses_hold(model, params, raw, o.rank, batches, o.lr),
    }
    about = {"model": Path(o.model).name if o.model else o.shape, "bs": o.batch, "seq": o.seq, "rank": o.rank}
    about |= {"dtype": o.dtype, **train_step.facts(device, o.commit)}
    holds = True
    for name, proof in proofs.items():
        if o.only in (None, name):
            for row in proof():
                holds &= row.get("holds", True)
                print(json.dumps(_rounded(row)), flush=True)
                if o.out is not None:
                    with o.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**about, **_rounded(row)}) + "\n")
    return 0 if holds else 1


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()}


if __name__ == "__main__":
    sys.exit(main())
