"""Text to token ids and back, and conversations to text: one class over the `tokenizers` library.

A tokenizer comes from a checkpoint folder (`tokenizer.json` and the small files around it) or from the
metadata of a GGUF file (`gguf_tokenizer.py`).

Three decisions that are not obvious:

* The post-processor of `tokenizer.json` is taken off after we have read from it which special ids it puts
  around a text. What it would do besides that is trim blanks off the offsets; without it the offsets of the
  tokens tile the text, so a loss mask made from character spans is exact.
* Everything a chat template can see is rebuilt from plain JSON values, and it runs in jinja2's immutable
  sandbox (`chat_template.py`): templates and messages are downloaded, so both are untrusted.
* The part of a rendered conversation that the assistant wrote is found from `{% generation %}` tags, or, as
  most templates have none, by rendering growing prefixes of the conversation. That second way is right only
  if the template never rewrites earlier turns, which is checked, not assumed.

Formats and rules follow transformers' `tokenization_utils_base.py` and `chat_template_utils.py` (rendered
texts are byte-equal).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from tokenizers import AddedToken

from .chat_template import GENERATION_TAG, TRACE_KEY, Trace, as_message, environment, plain
from .gguf_tokenizer import from_gguf

__all__ = ["Streamer", "Tokenizer"]

Span = tuple[int, int]


class Tokenizer:
    """Encode, decode and apply chat templates.

    `vocab_size` is the largest id plus one, added tokens included; `bos_id` and `pad_id` are None when the
    model has none (`pad_id` falls back to the end token); `eos_ids` are all ids that end a reply.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
        eos_ids: Iterable[int] = (),
        source: str = "tokenizer",
    ):
        """`backend` is owned from now on: its truncation, padding and post-processor are cleared.

        `special` maps the names that templates know ("bos_token", "eos_token", ...) to their text;
        `templates` maps "default", "tool_use", ... to jinja source; `eos_ids` are ids that end a reply
        besides the one of eos_token.
        """
        backend.no_truncation()
        backend.no_padding()
        self.source = source
        self.special = dict(special or {})
        self._templates = dict(templates or {})
        self._compiled: dict[str, jinja2.Template] = {}
        self._prefix, self._suffix = _surrounding_ids(backend)
        backend.post_processor = None  # type: ignore[assignment]
        self.backend = backend

        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.bos_id = self._special_id("bos_token")
        eos = self._special_id("eos_token")
        found = dict.fromkeys(([] if eos is None else [eos]) + list(eos_ids))
        for token_id in found:
            if type(token_id) is not int or not 0 <= token_id < self.vocab_size:
                raise ValueError(f"{source}: end-of-text id is {token_id!r}, expected an int in [0, {self.vocab_size})")
        self.eos_ids: tuple[int, ...] = tuple(found)
        pad = self._special_id("pad_token")
        self.pad_id = pad if pad is not None else (self.eos_ids[0] if self.eos_ids else None)

    # ---- where tokenizers come from ----

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json`, chat templates and `generation_config.json`.

        Raises FileNotFoundError without `tokenizer.json`, ValueError for anything malformed.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: no tokenizer.json (other tokenizer formats are not read)")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises bare Exception
            raise ValueError(f"{path}: not a valid tokenizer.json: {error}") from None
        config = _read_json(folder / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:  # the older layout keeps the names in a file of their own
            config = {**config, **_read_json(folder / "special_tokens_map.json")}
        special = _declared_tokens(backend, config, str(folder / "tokenizer_config.json"))
        return cls(
            backend,
            special=special,
            templates=_templates_of_folder(folder, config),
            eos_ids=_as_ids(_read_json(folder / "generation_config.json").get("eos_token_id")),
            source=str(folder),
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any], *, source: str = "gguf") -> Tokenizer:
        """Rebuild the tokenizer from GGUF metadata (`tokenizer.ggml.*`, `tokenizer.chat_template`).

        Byte-level BPE ("gpt2") and scored sentencepiece BPE ("llama") are supported. Raises
        NotImplementedError for another model or an unknown pre-tokenizer (a wrong one would load and split
        text differently without any sign), ValueError for malformed metadata.
        """
        return from_gguf(cls, metadata, source)

    # ---- text and ids ----

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; with `add_special_tokens`, between the ids the model expects around a text."""
        ids = self._encoding(text).ids
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids of `text` without special tokens around it, and per id the characters [start, end) it covers.

        Tokens that share a character (one character of several bytes) have the same offsets.
        """
        encoding = self._encoding(text)
        return encoding.ids, encoding.offsets

    def _encoding(self, text: str) -> tokenizers.Encoding:
        """Raises ValueError for half a character, which JSON can spell (\\ud83d) and UTF-8 cannot."""
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except TypeError:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = f"{text[error.start]!r} at character {error.start}"
                raise ValueError(f"text has half a surrogate pair, {half}: no Unicode") from None
            raise

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; incomplete UTF-8 becomes U+FFFD (see `Streamer` for decoding piece by piece)."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def decode_stream(self, ids: Iterable[int], skip_special_tokens: bool = True) -> Iterator[str]:
        """Yield the text of `ids` as it becomes known, never cutting a character in half."""
        streamer = Streamer(self, skip_special_tokens)
        for token_id in ids:
            if piece := streamer.push(token_id):
                yield piece
        if piece := streamer.end():
            yield piece

    def token_to_id(self, token: str) -> int | None:
        """Id of one token as the vocabulary spells it, None if there is none."""
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """One token as the vocabulary spells it, None if there is no such id."""
        return self.backend.id_to_token(token_id)

    def _special_id(self, name: str) -> int | None:
        text = self.special.get(name)
        if text is None:
            return None
        token_id = self.backend.token_to_id(text)
        if token_id is None:
            raise ValueError(f"{self.source}: {name} is {text!r}, which is not in the vocabulary")
        return token_id

    # ---- conversations ----

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template, None if the model has none."""
        return self._templates.get("default")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as one text, byte-equal with transformers; encode it without special tokens.

        `messages` are dicts with "role", "content", ...; `tools` are JSON schemas; `kwargs` are further
        variables of the template (`enable_thinking=False`). Raises ValueError if the model has no template,
        or the template fails, refuses the conversation, or tries to leave the sandbox.
        """
        return self._render(messages, add_generation_prompt, tools, kwargs, trace=None)

    def render_with_spans(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[Span]]:
        """The conversation as one text, and the characters [start, end) of it that the assistant wrote.

        With `{% generation %}` tags in the template the spans are what the tags enclose. Otherwise the span
        of reply i is what rendering messages[:i+1] adds to rendering messages[:i] with a generation prompt,
        up to its last end-of-text token (the newline that many templates put after it is never generated).
        Raises ValueError if prefixes of the conversation do not render to prefixes of the text.
        """
        if GENERATION_TAG.search(self._template(tools)[1]):
            trace = Trace()
            text = self._render(messages, False, tools, kwargs, trace)
            for start, end, inside in trace.spans:
                if (got := text[start:end]) != inside:
                    raise ValueError(
                        f"{self.source}: the chat template has a generation tag inside a macro or block, so "
                        f"its place is unknown: expected {inside[:40]!r} at {start}, got {got[:40]!r}"
                    )
            return text, [(start, end) for start, end, _ in trace.spans]

        def render(count: int, prompt: bool) -> str:
            return self._render(messages[:count], prompt, tools, kwargs, trace=None)

        text = render(len(messages), False)
        ends = [token for token in map(self.id_to_token, self.eos_ids) if token]
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before, after = render(i, True), render(i + 1, False)
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"{self.source}: cannot tell which text the assistant wrote in message {i}: the chat "
                    "template rewrites earlier turns or the generation prompt, so a prefix of the "
                    "conversation does not render to a prefix of the text; use one with generation tags"
                )
            reply = after[len(before) :]
            stripped = reply.rstrip()
            if any(stripped.endswith(end) for end in ends):
                reply = stripped
            spans.append((len(before), len(before) + len(reply)))
        return text, spans

    def _template(self, tools: object) -> tuple[str, str]:
        """(name, source) of the template to use: "tool_use" is preferred when there are tools."""
        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        if name not in self._templates:
            got = f"only templates named {sorted(self._templates)}" if self._templates else "none"
            raise ValueError(f"{self.source}: expected a default chat template, got {got}")
        return name, self._templates[name]

    def _render(self, messages, add_generation_prompt, tools, kwargs, trace: Trace | None) -> str:
        name, source = self._template(tools)
        chat = [as_message(message, i) for i, message in enumerate(messages)]
        if tools is not None:
            for tool in tools:
                if not isinstance(tool, Mapping):
                    raise ValueError(f"tools: expected JSON schemas (dicts), got {type(tool).__name__}")
        # A caller's keyword wins over a special token of the same name, as in transformers.
        variables = {
            **self.special,
            **plain(kwargs, "template keywords"),
            "messages": chat,
            "tools": plain(tools, "tools"),
            "documents": plain(kwargs.get("documents"), "documents"),
            "add_generation_prompt": add_generation_prompt,
            TRACE_KEY: trace,
        }
        try:
            template = self._compiled.get(name)
            if template is None:
                template = self._compiled[name] = environment().from_string(source)
            if trace is None:
                return template.render(variables)
            for block in template.generate(variables):
                trace.blocks.append(block)
                trace.length += len(block)
            return "".join(trace.blocks)
        except Exception as error:  # a template is a program: it can fail in any way Python can
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.source}: the {name} chat template failed: {reason}") from error


class Streamer:
    """Turn ids that arrive one by one into text pieces: push each id, then `end()`.

    A piece is held back while it ends in U+FFFD: the bytes of one character may come from several tokens. The
    ids of the last piece are decoded again as context, because some decoders treat the start of a text
    differently (sentencepiece drops the first blank). Together the pieces are the decoded text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []  # context and, from _read on, ids not yet turned into text
        self._read = 0

    def push(self, token_id: int) -> str:
        """The text that became certain with this id, often "" inside a multi-byte character."""
        self._ids.append(token_id)
        return self._advance(final=False)

    def end(self) -> str:
        """What was held back."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        context = self._tokenizer.decode(self._ids[: self._read], self._skip)
        text = self._tokenizer.decode(self._ids, self._skip)
        if len(text) <= len(context) or (text.endswith("\ufffd") and not final):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return text[len(context) :]


# ---- folders ----

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {type(error).__name__}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _as_ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _added_token(value: Any, where: str, special: bool) -> AddedToken:
    """An AddedToken from its JSON forms: a string, or an object with content and flags."""
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise ValueError(f"{where}: expected a string or an object with content, got {str(value)[:60]!r}")
    flags = {"normalized": not special}
    for name in ("single_word", "lstrip", "rstrip", "normalized"):
        if type(value.get(name)) is bool:
            flags[name] = value[name]
    return AddedToken(value["content"], special=special or value.get("special") is True, **flags)


def _declared_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], where: str) -> dict[str, str]:
    """Make sure every token that tokenizer_config.json declares exists; return the named ones as text.

    Order of additions as in transformers: added_tokens_decoder by id, then the named ones, then the others.
    """
    decoder = config.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict) or not all(key.isdecimal() for key in decoder):
        raise ValueError(f"{where}: added_tokens_decoder: expected {{id: token}}, got {str(decoder)[:60]}")
    for key in sorted(decoder, key=int):
        token = _added_token(decoder[key], f"{where}: added_tokens_decoder", special=False)
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
        if (got := backend.token_to_id(token.content)) != int(key):
            raise ValueError(f"{where}: added token {token.content!r}: expected id {key}, got {got}")

    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = {name: config[name] for name in _NAMED if config.get(name) is not None}
    for name, value in config.items():  # models bring names of their own: image_token, ...
        if name.endswith("_token") and name not in _NAMED and isinstance(value, str | dict):
            named[name] = value
    if isinstance(extra, dict):
        named.update(extra)
        extra = []
    if not isinstance(extra, list):
        raise ValueError(f"{where}: extra special tokens: expected a list of tokens, got {str(extra)[:60]}")
    tokens = {name: _added_token(value, f"{where}: {name}", special=True) for name, value in named.items()}
    others = [_added_token(value, f"{where}: additional special tokens", special=True) for value in extra]
    backend.add_special_tokens([*tokens.values(), *others])
    return {name: token.content for name, token in tokens.items()}


def _templates_of_folder(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """Templates by name; files beat the entry in tokenizer_config.json."""
    files = {"default": folder / "chat_template.jinja"}
    files.update({path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))})
    try:
        found = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    except UnicodeDecodeError as error:
        raise ValueError(f"{folder}: chat template is not UTF-8: {error}") from None
    value = config.get("chat_template")
    if found or value is None:
        return found
    entries = [{"name": "default", "template": value}] if isinstance(value, str) else value
    named: dict[str, Any] = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        entry = entry if isinstance(entry, dict) else {}
        named[str(entry.get("name"))] = entry.get("template")
    if not all(isinstance(text, str) for text in named.values()):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: chat_template: expected a string or a list of "
            f"{{name, template}}, got {str(value)[:60]!r}"
        )
    return named


def _surrounding_ids(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The special ids that the post-processor puts before and after a text: seen on the first text with ids."""
    if backend.post_processor is None:
        return [], []
    for token_id in range(backend.get_vocab_size()):
        text = backend.decode([token_id])
        inside = backend.encode(text, add_special_tokens=False).ids
        whole = backend.encode(text, add_special_tokens=True).ids
        for start in range(len(whole) - len(inside) + 1):
            if inside and whole[start : start + len(inside)] == inside:
                return whole[:start], whole[start + len(inside) :]
    raise ValueError("tokenizer: cannot tell which ids its post-processor puts around a text")
