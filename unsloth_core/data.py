"""From files of examples to packed batches of one static shape.

Three steps, each a function that can be used alone:

* :func:`read_examples` turns a file (JSONL, JSON, Parquet) or a list of dicts into rows that know their place;
* :func:`tokenize` understands every row (a conversation, a prompt with its completion, a document), renders and
  encodes it, and marks by character offsets which tokens are trained;
* :class:`Batches` packs examples into batches of exactly ``tokens`` tokens and serves batch i as a pure function
  of (examples, seed, i), so a run that was killed goes on at the very next batch.

Packing is the only layout: examples lie one behind another, each a segment with positions from 0, and no target
crosses a boundary. Best-fit decreasing within shuffled windows is the method of Ding et al., "Fewer truncations
improve language modeling", 2024; the order comes from a hash of (seed, epoch, index), the same on every machine.
"""

import array
import bisect
import importlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from . import tree
from .segments import Segments
from .tree import pytree, static

Message = Mapping[str, Any]
Source = str | Path | Iterable[Mapping[str, Any]]
Span = tuple[int, int]

IGNORE = -100
WINDOW = 4096  # examples that are packed together: large enough to fill batches, small enough to stay shuffled
FORMATS = (
    "messages",
    "conversations",
    "prompt + completion",
    "instruction (+ input) + output (+ system, history)",
    "text",
)


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


# ---- one batch


@pytree
class Batch:
    """A packed batch of N tokens, M of them (after padding) with a target.

    ``tokens_N``, ``positions_N``: int64. ``segments``: the examples, then one filler segment without targets up to
    N, then empty ones. ``target_rows_M``: rows whose hidden state predicts a target, ascending, padding N;
    ``targets_M``: the token ids they predict, padding -100. ``count``: number of real targets, fp32 scalar.
    ``valid_N``: bool, false in the filler.
    ``max_position``: host bound, every position is smaller. N and the number of segments are constant for a run,
    M is a multiple of N/8, the bounds are powers of two: so shapes hardly ever change.
    """

    tokens_N: Tensor
    positions_N: Tensor
    segments: Segments
    target_rows_M: Tensor
    targets_M: Tensor
    count: Tensor
    valid_N: Tensor
    max_position: int = static()

    @property
    def max_len(self) -> int:
        """Host bound on the length of a segment."""
        return self.segments.max_len

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; the copy to a GPU is asynchronous."""
        device = torch.device(device)

        def move(t: Tensor) -> Tensor:
            if device.type == "cuda" and t.device.type == "cpu":
                return t.pin_memory().to(device, non_blocking=True)
            return t.to(device)

        return tree.map(move, self)

    @staticmethod
    def of(
        examples: Sequence[tuple[Any, Any]],
        *,
        vocab_size: int,
        tokens: int | None = None,
        segments: int | None = None,
    ) -> "Batch":
        """Pack examples, in this order, into one batch.

        Each example is (ids, trained): ``trained[i]`` says whether token i is a target (predicted from token i - 1
        of the same example; the first token never is); None trains all. ``tokens``: N, by default just enough;
        ``segments``: their static number, by default just enough. Raises ValueError for an id outside
        [0, vocab_size), an empty example, or what does not fit.
        """
        lengths = [len(ids) for ids, _ in examples]
        N = sum(lengths) if tokens is None else tokens
        if sum(lengths) > N or N < 1:
            raise ValueError(f"Batch: {sum(lengths)} tokens in {len(lengths)} examples, expected 1 to {N}")
        tokens_N, positions_N = np.zeros(N, np.int64), np.zeros(N, np.int64)
        trained_N = np.zeros(N, bool)
        cu = [0]
        for index, (ids, trained) in enumerate(examples):
            here, n = slice(cu[-1], cu[-1] + lengths[index]), lengths[index]
            ids = np.asarray(ids)
            _check_ids(ids, vocab_size, f"Batch: example {index}")
            trained = np.ones(n, bool) if trained is None else np.asarray(trained, bool)
            if n == 0 or trained.shape != ids.shape:
                raise ValueError(
                    f"Batch: example {index} has ids of shape {ids.shape} and a mask of shape {trained.shape}, "
                    "expected equal lengths > 0"
                )
            tokens_N[here], positions_N[here], trained_N[here] = ids, np.arange(n), trained
            trained_N[here.start] = False  # nothing precedes it
            cu.append(here.stop)
        if cu[-1] < N:
            positions_N[cu[-1] :] = np.arange(N - cu[-1])
            cu.append(N)
        capacity = len(cu) - 1 if segments is None else segments
        if len(cu) - 1 > capacity:
            raise ValueError(f"Batch: {len(cu) - 1} segments with the filler, expected at most {capacity}")
        longest = min(N, max(64, _power_of_two(int(max(np.diff(cu))))))

        rows = np.flatnonzero(trained_N) - 1
        step = -(-N // 8)
        M = min(N, max(1, -(-len(rows) // step)) * step)
        rows_M, targets_M = np.full(M, N, np.int64), np.full(M, IGNORE, np.int64)
        rows_M[: len(rows)], targets_M[: len(rows)] = rows, tokens_N[rows + 1]
        cu_seqlens = torch.tensor(cu + [N] * (capacity + 1 - len(cu)), dtype=torch.int32)
        return Batch(
            tokens_N=torch.from_numpy(tokens_N),
            positions_N=torch.from_numpy(positions_N),
            segments=Segments.packed(cu_seqlens, max_len=longest),
            target_rows_M=torch.from_numpy(rows_M),
            targets_M=torch.from_numpy(targets_M),
            count=torch.tensor(float(len(rows))),
            valid_N=torch.arange(N) < sum(lengths),
            max_position=longest,
        )


def from_tokens(tokens_BT: Any, mask_BT: Any = None, *, vocab_size: int) -> Batch:
    """A (B, T) array of ids as a batch of B segments of T tokens.

    ``mask_BT``: which tokens are targets (default: all but the first of each row). Raises as :meth:`Batch.of` does.
    """
    tokens_BT = np.asarray(tokens_BT)
    mask_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else np.asarray(mask_BT, bool)
    if tokens_BT.ndim != 2 or mask_BT.shape != tokens_BT.shape:
        raise ValueError(
            f"from_tokens: shapes {tokens_BT.shape} and mask {mask_BT.shape}, expected (B, T) and the same"
        )
    return Batch.of(list(zip(tokens_BT, mask_BT, strict=True)), vocab_size=vocab_size)


def _check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{where}: ids are {ids.dtype} of shape {ids.shape}, expected a list of integers")
    if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise ValueError(f"{where}: token id {bad}, expected an id in [0, {vocab_size})")


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


# ---- rows


class Row(dict[str, Any]):
    """One example as read, and its ``place`` ("train.jsonl:17") for error messages."""

    place: str


def read_examples(source: Source) -> list[Row]:
    """All rows of a data set.

    ``source``: a path ending in .jsonl (one object per line), .json (a list of objects, or lines as in .jsonl) or
    .parquet; or any iterable of dicts. Raises ValueError, naming file and line, for what is not a JSON object and for a
    file without examples, and ImportError for Parquet without pyarrow.
    """
    return list(_read(source)[0])


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


def _read(source: Source) -> tuple[Iterator[Row], int | None]:
    """(rows, read as they are asked for; their number if it is known)"""
    if not isinstance(source, str | Path):
        count = len(source) if isinstance(source, Sized) else None
        return (_row(row, getattr(row, "place", f"example {i}")) for i, row in enumerate(source)), count
    path = Path(source)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path}: expected a file ending in .jsonl, .json or .parquet")
    with path.open("rb") as file:
        lines, start = 0, b""
        for line in file:
            lines, start = lines + bool(line.strip()), start or line.removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.suffix == ".json" and start.startswith(b"["):
        rows = _parse_json(path.read_bytes(), str(path))
        if not rows:
            raise ValueError(f"{path}: no examples in it")
        return (_row(row, f"{path}: example {i}") for i, row in enumerate(rows)), len(rows)
    if not lines:
        raise ValueError(f"{path}: no examples in it")
    return _read_lines(path), lines


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place}: expected an object with fields, got {type(value).__name__}")
    row = Row(value)
    row.place = place
    return row


def _read_lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _row(_parse_json(line.rstrip(), f"{path}:{number}"), f"{path}:{number}")


def _parse_json(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if text.count(b"\n") else ""  # one line: ``where`` has its number
        raise ValueError(f"{where}: not valid JSON: {error.msg}: {line}column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # of UTF-8 the first
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def _read_parquet(path: Path) -> tuple[Iterator[Row], int]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from None
    try:
        file = parquet.ParquetFile(path)
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise ValueError(f"{path}: not valid Parquet: {error}") from None
    if not file.metadata.num_rows:
        raise ValueError(f"{path}: no examples in it")
    rows = (row for group in file.iter_batches(batch_size=1024) for row in group.to_pylist())
    return (_row(row, f"{path}: example {i}") for i, row in enumerate(rows)), file.metadata.num_rows


# ---- from rows to conversations and texts


@dataclass(frozen=True)
class Chat:
    """A conversation, for the tokenizer's chat template; ``tools``: JSON schemas or None."""

    messages: list[Message]
    tools: list[Any] | None


@dataclass(frozen=True)
class Text:
    """Plain text. ``prompt`` is given but not learnt; None makes ``body`` a document, which may be split."""

    prompt: str | None
    body: str


def parse(row: Mapping[str, Any]) -> Chat | Text:
    """What a row says, whichever of :data:`FORMATS` it is in; fields that are None are absent, others ignored.

    Raises ValueError for a row in no known format, naming its fields, and for malformed messages.
    """
    row = {k: v for k, v in row.items() if v is not None}
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
    elif "conversations" in row:
        messages = _sharegpt(row)
    elif {"prompt", "completion"} <= row.keys():
        if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
            return Text(row["prompt"], row["completion"])
        messages = [*_messages(row["prompt"], "prompt"), *_messages(row["completion"], "completion")]
    elif {"instruction", "output"} <= row.keys():
        messages = _alpaca(row)
    elif isinstance(row.get("text"), str):
        return Text(None, row["text"])
    else:
        raise ValueError(f"fields {sorted(map(str, row))}, expected one of: {'; '.join(FORMATS)}")
    tools = row.get("tools") or None
    if isinstance(tools, str):
        tools = _parse_json(tools.encode(), "tools") or None
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"tools: expected a list of schemas, got {type(tools).__name__}")
    return Chat(messages, tools)


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{field}: expected a list of messages, got {str(value)[:60]!r}")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"{field}[{i}]: expected {{role, content}}, got {str(message)[:60]!r}")
        if not isinstance(message.get("content", ""), str | list | tuple | None):
            raise ValueError(f"{field}[{i}].content: expected text, got {str(message['content'])[:60]!r}")
    return list(value)


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}


def _sharegpt(row: Mapping[str, Any]) -> list[Message]:
    turns, messages = row["conversations"], []
    if not isinstance(turns, list | tuple) or not turns:
        raise ValueError(f"conversations: expected a list of {{from, value}}, got {str(turns)[:60]!r}")
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for i, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in _SHAREGPT_ROLES or not isinstance(turn.get("value"), str):
            expected = ", ".join(_SHAREGPT_ROLES)
            raise ValueError(
                f"conversations[{i}]: expected {{from, value}} with from one of {expected}; got {str(turn)[:60]!r}"
            )
        message: dict[str, Any] = {"role": _SHAREGPT_ROLES[speaker], "content": turn["value"]}
        if speaker == "function_call":
            calls = _parse_json(turn["value"].encode(), f"conversations[{i}].value")
            calls = calls if isinstance(calls, list) else [calls]
            message |= {"content": "", "tool_calls": [{"type": "function", "function": c} for c in calls]}
        messages.append(message)
    return messages


def _alpaca(row: Mapping[str, Any]) -> list[Message]:
    strings = {"system": "", "input": "", **row}
    history = row.get("history", [])
    wrong = [k for k in ("instruction", "input", "output", "system") if not isinstance(strings[k], str)]
    pairs = isinstance(history, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(t, str) for t in pair) for pair in history
    )
    if wrong or not pairs:
        raise ValueError(f"{wrong[0] if wrong else 'history'}: expected text (history: pairs of text)")
    question = "\n".join(filter(None, (strings["instruction"], strings["input"])))
    messages: list[Message] = [{"role": "system", "content": strings["system"]}] if strings["system"] else []
    for user, assistant in [*history, (question, strings["output"])]:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages


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
    rows, total = _read(source)
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
        _check_ids(np.asarray(ids, np.int64), vocab_size, row.place)
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
        raise ValueError(f"data: none of {seen} rows{where} has a token to train on (train_on={train_on!r})")
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
    first; ids are checked against ``vocab_size`` (default: the tokenizer's).
    """
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
