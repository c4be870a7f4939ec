"""From files of examples to packed batches of one static shape.

Three steps, each a function that can be used alone:

* :func:`read_examples` turns a file (JSONL, JSON, Parquet) or a list of dicts into rows (:mod:`.examples`);
* :func:`tokenize` understands every row, renders and encodes it, and marks by character offsets which tokens are
  trained;
* :class:`Batches` packs examples into batches of exactly ``tokens`` tokens and serves batch i as a pure function
  of (examples, seed, i), so a run that was killed goes on at the very next batch.

A batch is a :class:`Batch` (:mod:`.batch`): examples one behind another, and no target crosses a boundary. Best-fit
decreasing within shuffled windows is the method of Ding et al., "Fewer truncations improve language modeling", 2024;
the order comes from a hash of (seed, epoch, index), the same on every machine.
"""

import array
import bisect
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from tqdm import tqdm

from .batch import IGNORE, Batch, check_ids, from_tokens
from .examples import FORMATS, Chat, Message, Row, Source, Text, parse, read_examples, read_rows

__all__ = [
    "FORMATS", "IGNORE", "Batch", "Batches", "Chat", "Encoder", "Examples", "Row", "Source", "Text", "batches",
    "encode", "from_tokens", "pack", "parse", "read_examples", "split", "tokenize",
]  # fmt: skip

Span = tuple[int, int]

WINDOW = 4096  # examples that are packed together: large enough to fill batches, small enough to stay shuffled


class Encoder(Protocol):
    """What is needed of a tokenizer; :class:`unsloth_core.tokenizer.Tokenizer` is one."""

    vocab_size: int
    bos_id: int | None
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Ids with the special tokens that the model expects around a text."""
        ...

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids without special tokens around them, and the characters [start, end) of each."""
        ...

    def render_with_spans(self, messages: Sequence[Message], *, tools: Any = None) -> tuple[str, list[Span]]:
        """A conversation as text, and the spans that the assistant wrote, end-of-turn tokens included."""
        ...


def split(source: Source, fraction: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """(training, held out): ``fraction`` of the rows, but at least one (none if it is 0), chosen by ``seed`` alone.

    Both keep the order of the source. Raises ValueError when nothing would be left to train on.
    """
    rows = read_examples(source)
    held = max(1, round(len(rows) * fraction)) if fraction else 0
    if not 0 <= fraction < 1 or held >= len(rows):
        raise ValueError(f"split: fraction {fraction} of {len(rows)} rows leaves none to train on")
    out = set(_permutation(len(rows), seed)[:held].tolist())
    return [r for i, r in enumerate(rows) if i not in out], [r for i, r in enumerate(rows) if i in out]


# ---- from rows to tokens


def encode(example: Chat | Text, tokenizer: Encoder, train_on: str = "responses") -> tuple[list[int], list[bool]]:
    """(ids, trained) of one example, not cut to any length.

    A conversation goes through the tokenizer's chat template. A plain text gets the model's beginning-of-text
    token, if it uses one, and an end-of-text token, unless they are there. A token is trained if it shares a
    character with what is trained: with ``train_on="responses"`` what the assistant wrote including its
    end-of-turn token, a completion, or a whole document; with ``"all"`` everything.
    """
    if isinstance(example, Chat):
        text, spans = tokenizer.render_with_spans(example.messages, tools=example.tools)
        ids, offsets = tokenizer.encode_with_offsets(text)
        trained = _in_spans(offsets, spans)
    else:
        prompt = example.prompt or ""
        text = prompt + example.body
        ids, offsets = tokenizer.encode_with_offsets(text)
        trained = _in_spans(offsets, [(len(prompt), len(text))])
        bos, eos = tokenizer.encode("")[:1], list(tokenizer.eos_ids[:1])
        if bos == [tokenizer.bos_id] != ids[:1]:
            ids, trained = bos + ids, [False, *trained]
        if eos != ids[-1:]:
            ids, trained = ids + eos, trained + [True] * len(eos)
    return ids, [True] * len(ids) if train_on == "all" else trained


def _in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens share a character with a span; both ascend. A token without characters must lie inside one.

    A character of several bytes may be several tokens: they have the same offsets and are trained together.
    """
    trained, spans, k = [], sorted(spans), 0
    for a, b in offsets:
        while k < len(spans) and spans[k][1] <= a:
            k += 1
        inside = k < len(spans) and (spans[k][0] < b if a < b else spans[k][0] < a)
        trained.append(inside)
    return trained


class Examples:
    """Tokenised examples, end to end in three flat arrays: 5 bytes per token."""

    def __init__(self) -> None:
        self.ids, self.trained, self.ends = array.array("i"), bytearray(), array.array("q", [0])

    def append(self, ids: Sequence[int], trained: Sequence[bool]) -> None:
        """Add one example."""
        self.ids.extend(ids)
        self.trained.extend(trained)
        self.ends.append(len(self.ids))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, trained bool) of example i."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        start, end = self.ends[i], self.ends[i + 1]
        return np.array(self.ids[start:end], np.int32), np.frombuffer(self.trained[start:end], bool)

    @property
    def lengths(self) -> np.ndarray:
        """(E,) int64, tokens of each example."""
        return np.diff(np.array(self.ends, np.int64))


def tokenize(
    source: Source,
    tokenizer: Encoder,
    *,
    max_len: int,
    train_on: Literal["responses", "all"] = "responses",
    vocab_size: int | None = None,
    progress: bool = True,
) -> Examples:
    """Read, render and encode a whole data set, with a progress bar.

    Longer than ``max_len`` tokens: a conversation is cut, a plain ``text`` is split into pieces that overlap by one
    token, so each of its tokens is predicted exactly once. Examples without a trained token are left out; both are
    counted in one warning. Raises ValueError with the place of a row that cannot be used, and if none is left.
    """
    if train_on not in ("responses", "all"):
        raise ValueError(f"tokenize: train_on = {train_on!r}, expected 'responses' or 'all'")
    if max_len < 2:
        raise ValueError(f"tokenize: max_len = {max_len}, expected at least 2")
    vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
    rows, total = read_rows(source)
    examples, cut, empty, seen, first = Examples(), 0, 0, 0, ""
    # disable=None: no bar where nobody watches a terminal; delay: none for small files either
    bar = tqdm(rows, total=total, desc="tokenising", unit=" rows", delay=1, disable=None if progress else True)
    for row in bar:
        seen, first = seen + 1, first or row.place
        try:
            example = parse(row)
            ids, trained = encode(example, tokenizer, train_on)
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        check_ids(np.asarray(ids, np.int64), vocab_size, row.place)
        if isinstance(example, Text) and example.prompt is None:
            starts = range(0, max(1, len(ids) - 1), max_len - 1)
        else:
            starts, cut = range(1), cut + (len(ids) > max_len)
        for start in starts:
            piece, mask = ids[start : start + max_len], trained[start : start + max_len]
            if any(mask[1:]):
                examples.append(piece, mask)
            else:
                empty += 1
    if not len(examples):
        where = f", the first at {first}," if first else ""
        short = f"; {cut} are longer than {max_len} tokens and were cut: more tokens may help" if cut else ""
        raise ValueError(f"data: none of {seen} rows{where} has a token to train on (train_on={train_on!r}){short}")
    if cut or empty:
        warnings.warn(
            f"data: of {seen} rows, {cut} were longer than {max_len} tokens and were cut, "
            f"{empty} had no token to train on and were left out",
            stacklevel=2,
        )
    return examples


# ---- packing


def pack(lengths: np.ndarray, order: np.ndarray, tokens: int, most: int) -> list[list[int]]:
    """Bins of examples, each of at most ``tokens`` tokens and ``most`` examples, every example in one of them.

    Best-fit decreasing: of each window of ``order`` the longest example goes first, into the fullest bin that still has
    room for it; bins stay open for later windows. A pure function.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending
    shortest = int(lengths.min(initial=tokens))
    for start in range(0, len(order), WINDOW):
        window = order[start : start + WINDOW]
        for i in window[np.argsort(-lengths[window], kind="stable")].tolist():
            length = int(lengths[i])
            at = bisect.bisect_left(rooms, (length, -1))
            if at < len(rooms):
                room, b = rooms.pop(at)
            else:
                room, b = tokens, len(bins)
                bins.append([])
            bins[b].append(i)
            if room - length >= shortest and len(bins[b]) < most:
                bisect.insort(rooms, (room - length, b))
    return bins


def _permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n) that is a function of the key alone: indices sorted by their hash (splitmix64)."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))

    state = np.zeros(1, np.uint64)
    for k in key:
        state = mix(state ^ np.array([k & (2**64 - 1)], np.uint64))
    return np.argsort(mix(np.arange(n, dtype=np.uint64) ^ state), kind="stable")


class Batches:
    """All batches of a run, in order: ``len(batches)``, ``batches[i]``, and iteration from ``start``.

    ``batches[i]`` is a pure function of examples, options and i. To resume, make the same object with ``start`` set
    to the number of batches already used. Nothing is dropped: the last batch of an epoch has a longer filler, and a
    loss divided by ``count`` weighs it right.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        tokens: int,
        vocab_size: int,
        epochs: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        device: torch.device | str | None = None,
        start: int = 0,
    ):
        longest = int(examples.lengths.max(initial=0))
        if not 0 < longest <= tokens:
            raise ValueError(f"Batches: the longest example has {longest} tokens, expected 1 to {tokens}")
        if epochs < 1 or start < 0:
            raise ValueError(f"Batches: epochs = {epochs}, start = {start}, expected epochs >= 1, start >= 0")
        self.examples, self.tokens, self.vocab_size = examples, tokens, vocab_size
        self.epochs, self.seed, self.shuffle, self.device, self.start = epochs, seed, shuffle, device, start
        self.segments = max(8, tokens // 16)  # static number of segments of a batch, the filler included
        self._packed: dict[int, list[list[int]]] = {}

    def epoch(self, e: int) -> list[list[int]]:
        """Which examples make up each batch of epoch e (packed once, then kept)."""
        if e not in self._packed:
            lengths = self.examples.lengths
            every = np.arange(len(lengths))
            order = _permutation(len(lengths), self.seed, e, 0) if self.shuffle else every
            bins = pack(lengths, order, self.tokens, self.segments - 1)
            if self.shuffle:
                bins = [bins[b] for b in _permutation(len(bins), self.seed, e, 1)]
            self._packed[e] = bins
        return self._packed[e]

    def __len__(self) -> int:
        return sum(len(self.epoch(e)) for e in range(self.epochs))

    def __getitem__(self, i: int) -> Batch:
        rest = i
        for e in range(self.epochs):
            if 0 <= rest < len(self.epoch(e)):
                members = [self.examples[j] for j in self.epoch(e)[rest]]
                batch = Batch.of(members, vocab_size=self.vocab_size, tokens=self.tokens, segments=self.segments)
                return batch if self.device is None else batch.to(self.device)
            rest -= len(self.epoch(e))
        raise IndexError(f"batch {i}, expected 0 to {len(self) - 1}")

    def __iter__(self) -> Iterator[Batch]:
        for i in range(self.start, len(self)):
            yield self[i]


def batches(
    source: Source,
    tokenizer: Encoder,
    *,
    tokens: int = 2048,
    epochs: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    train_on: Literal["responses", "all"] = "responses",
    max_len: int | None = None,
    vocab_size: int | None = None,
    device: torch.device | str | None = None,
    start: int = 0,
    progress: bool = True,
) -> Batches:
    """Packed batches of exactly ``tokens`` tokens, from a file or a list of dicts.

    See :func:`read_examples` for sources, :data:`FORMATS` for the fields of a row, :func:`tokenize` for ``train_on``
    and ``max_len`` (default: ``tokens``), :class:`Batches` for the order and ``start``. Everything is tokenised
    first; ids are checked against ``vocab_size`` (default: the tokenizer's). Raises ValueError as :func:`tokenize`
    does, for options out of range, and without a tokenizer.
    """
    if tokenizer is None:
        raise ValueError("batches: tokenizer is None, expected one such as model.tokenizer")
    if tokens < 2:
        raise ValueError(f"batches: tokens = {tokens}, expected at least 2, one to predict the next from")
    if max_len is not None and max_len > tokens:
        raise ValueError(f"batches: max_len = {max_len}, expected at most tokens = {tokens}")
    vocab_size = tokenizer.vocab_size if vocab_size is None else vocab_size
    options = {"max_len": max_len or tokens, "train_on": train_on, "vocab_size": vocab_size, "progress": progress}
    examples = tokenize(source, tokenizer, **options)
    return Batches(
        examples,
        tokens=tokens,
        vocab_size=vocab_size,
        epochs=epochs,
        seed=seed,
        shuffle=shuffle,
        device=device,
        start=start,
    )
