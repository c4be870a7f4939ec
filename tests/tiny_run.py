"""A tiny run of ``finetune``: model, examples and options, ways to kill it, and what makes two runs the same."""

import dataclasses
import functools
import json

import tokenizers
import torch
from oprule import DEVICE
from safetensors.torch import load_file
from tiny import VERSIONS, judge, ours

from unsloth_core import checkpoint, lora, train, tree
from unsloth_core.autodiff import INPUT, OFFLOAD, SAVE
from unsloth_core.data import Batch
from unsloth_core.tokenizer import Tokenizer
from unsloth_core.train import finetune

BACKEND = "triton" if DEVICE.type == "cuda" else "reference"
TIMES = ("tokens_per_s", "memory_gib")
AWAY = {INPUT: OFFLOAD, "attn": OFFLOAD, "mid": OFFLOAD, "qkv": SAVE}
RUN = {
    "rank": 2, "targets": ["q_proj", "down_proj"], "tokens": 48, "steps": 7, "accumulate": 2, "lr": 1e-2, "warmup": 2,
    "eval_fraction": 0.2, "eval_every": 3, "save_every": 2, "seed": 1, "weight_decay": 0.1,
}  # fmt: skip


def words():
    """A tokenizer of 97 words, w0 to w96."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return words


@functools.cache  # training changes neither
def make():
    model_type, overrides = VERSIONS["smollm2"]
    model, params = ours(judge(model_type, **overrides))
    return dataclasses.replace(model, tokenizer=Tokenizer(words())), params


def rows(count=30):
    """Examples of different lengths."""

    def text(i, n):
        return " ".join(f"w{(7 * i + 3 * j) % 97}" for j in range(n))

    return [{"prompt": text(i, 2 + i % 3) + " ", "completion": text(i + 5, 3 + i % 7)} for i in range(count)]


def some_batches(count):
    """Microbatches of two or three static shapes: few and many targets, short and long segments."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(count):
        lengths = [2, 3, 2] if i % 3 == 1 else [9, 7, 8, 6, 5]
        examples = [(torch.randint(0, 97, (n,), generator=generator).tolist(), None) for n in lengths]
        found.append(Batch.of(examples, vocab_size=97, tokens=40, segments=8).to(DEVICE))
    return found


def run(output, model=None, examples=None, **more):
    model, params = model or make()
    return finetune(model, params, examples or rows(), progress=False, output=str(output), **{**RUN, **more})


def without_times(history):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in history]


def rows_of(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a, b, output_a, output_b):
    """Adapters, optimizer states and metrics, to the bit."""
    for (path, x), (_, y) in zip(tree.items(a[0]), tree.items(b[0]), strict=True):
        assert torch.equal(x, y), path
    histories = [without_times(h) for h in (a[1], b[1], rows_of(output_a), rows_of(output_b))]
    assert histories[0] == histories[1] == histories[2] == histories[3]
    files = lambda folder: {p.relative_to(folder): p for p in folder.rglob("*.safetensors")}  # noqa: E731
    assert files(output_a).keys() == files(output_b).keys() and len(files(output_a)) == 3  # the adapter, 2 checkpoints
    for name, file in files(output_a).items():
        first, second = load_file(file), load_file(output_b / name)
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first), name


class Killed(BaseException):
    """What no ``except Exception`` may swallow."""


def count_steps(monkeypatch):
    """A list that grows with every step that runs."""
    real, steps = train.make_step, []

    def counting(*args, **kwargs):
        step = real(*args, **kwargs)

        def counted(*arguments):
            steps.append(1)
            return step(*arguments)

        return counted

    monkeypatch.setattr(train, "make_step", counting)
    return steps


def kill_in(monkeypatch, name, call, after=False):
    """The call-th call of a function in train.py kills the run; ``after``: when it has done its work."""
    owner, _, attribute = name.rpartition(".")
    owner = {"": train, "checkpoint": checkpoint, "lora": lora, "json": json}[owner]
    real, calls = getattr(owner, attribute), []

    def killing(*args, **kwargs):
        calls.append(1)
        if len(calls) != call:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise Killed

    monkeypatch.setattr(owner, attribute, killing)
