"""Files of examples, and what each of their rows says: a conversation, a prompt with its completion, or a text.

:func:`read_examples` turns a file (JSONL, JSON, Parquet) or a list of dicts into rows that know their place, for error
messages; :func:`parse` understands a row in whichever of :data:`FORMATS` it is.
"""

import importlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = Mapping[str, Any]
Source = str | Path | Iterable[Mapping[str, Any]]

FORMATS = (
    "messages",
    "conversations",
    "prompt + completion",
    "instruction (+ input) + output (+ system, history)",
    "text",
)


class Row(dict[str, Any]):
    """One example as read, and its ``place`` ("train.jsonl:17") for error messages."""

    place: str


def read_examples(source: Source) -> list[Row]:
    """All rows of a data set.

    ``source``: a path ending in .jsonl (one object per line), .json (a list of objects, or lines as in .jsonl) or
    .parquet; or any iterable of dicts. Raises ValueError, naming file and line, for what is not a JSON object and for a
    file without examples, and ImportError for Parquet without pyarrow.
    """
    return list(read_rows(source)[0])


def read_rows(source: Source) -> tuple[Iterator[Row], int | None]:
    """(rows, read as they are asked for; their number if it is known). Raises as :func:`read_examples` does."""
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


# ---- what a row says


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
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES or not isinstance(turn.get("value"), str):
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
