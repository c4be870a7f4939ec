"""The tokenizer inside a GGUF file, which holds vocabulary and merges but only *names* the pre-tokenizer.

Rules: llama.cpp's `llama-vocab.cpp` (pre-tokenizers by name, scored vocabularies).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"  # words split where case rises
_CAMEL = rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+%s|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*%s"


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), behavior="isolated"), byte_level])


_LLAMA3 = _split(_WORD + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST)
_QWEN2 = _split(_WORD + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _REST)
_TEKKEN = _split(_CAMEL % ("", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST)
_GPT4O = _split(_CAMEL % ((f"{_CONTRACTION}?",) * 2) + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _REST)
_DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])

# tokenizer.ggml.pre -> (pre-tokenizer, normalizer, whole words in the vocabulary skip the merges)
_PRE: dict[str, tuple[pre_tokenizers.PreTokenizer, normalizers.Normalizer | None, bool]] = {
    **dict.fromkeys(("default", "gpt-2"), (_GPT2, None, False)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (_DIGITS, None, False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), (_LLAMA3, None, True)),
    "dbrx": (_LLAMA3, None, False),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (_QWEN2, normalizers.NFC(), False)),
    "tekken": (_TEKKEN, None, True),
    "gpt-4o": (_GPT4O, None, False),
}
_ADDS_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")  # unless the file says otherwise
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5


class _Metadata:
    """Typed access to untrusted metadata, `tokenizer.ggml.*`. Raises ValueError for other types or sizes."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values, self.source = values, source

    def error(self, key: str, expected: object, got: object) -> ValueError:
        return ValueError(f"{self.source}: tokenizer.ggml.{key}: expected {expected}, got {got}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(f"tokenizer.ggml.{key}", default)
        if value is not default and type(value) is not kind:
            raise self.error(key, kind.__name__, type(value).__name__)
        return value

    def array(self, key: str, kind: type, length: int | None = None) -> list[Any]:
        """A list of `kind`, [] if the key is absent."""
        values = self.get(key, list, [])
        if values and length is not None and len(values) != length:
            raise self.error(key, f"{length} entries, one per token", len(values))
        if any(type(value) is not kind for value in values):
            raise self.error(key, f"an array of {kind.__name__}", "other entries")
        return values

    def token_id(self, key: str, count: int) -> int | None:
        """An id below `count`, None if the key is absent."""
        token_id = self.get(key, int)
        if token_id is not None and not 0 <= token_id < count:
            raise self.error(key, f"an id in [0, {count})", token_id)
        return token_id


def from_gguf(cls: type[Tokenizer], metadata: Mapping[str, Any], source: str) -> Tokenizer:
    """See :meth:`.tokenizer.Tokenizer.from_gguf`."""
    meta = _Metadata(metadata, source)
    tokens = meta.array("tokens", str)
    if not tokens:
        raise meta.error("tokens", "an array of str", "none")
    types = meta.array("token_type", int, len(tokens)) or [1] * len(tokens)
    vocab: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if types[i] == _UNUSED:  # rows that only pad the embedding: nothing may encode to them
            continue
        if token in vocab:
            raise meta.error("tokens", "distinct tokens", f"{token!r} at {vocab[token]} and {i}")
        vocab[token] = i

    model = meta.get("model", str)
    if model == "gpt2":
        backend, adds_bos = _byte_level_backend(meta, vocab)
    elif model == "llama":
        backend, adds_bos = _sentencepiece_backend(meta, vocab, types), True
    else:
        raise NotImplementedError(f"{meta.source}: tokenizer.ggml.model is {model!r}, supported: gpt2, llama")
    for kind, special in ((_UNKNOWN, True), (_CONTROL, True), (_USER_DEFINED, False)):
        added = [token for token, i in vocab.items() if types[i] == kind and token]
        backend.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])

    special = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = meta.token_id(f"{key}_token_id", len(tokens))
        if token_id is not None and types[token_id] != _UNUSED:
            special[f"{name}_token"] = tokens[token_id]
    turn_ends = [meta.token_id(key, len(tokens)) for key in ("eot_token_id", "eom_token_id")]

    templates = {}
    for key, value in meta.values.items():
        if key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."):
            if not isinstance(value, str):
                raise ValueError(f"{meta.source}: {key}: expected str, got {type(value).__name__}")
            templates[key.removeprefix("tokenizer.chat_template").removeprefix(".") or "default"] = value

    ends = [token_id for token_id in turn_ends if token_id is not None]
    tokenizer = cls(backend, special=special, templates=templates, eos_ids=ends, source=meta.source)
    if meta.get("add_bos_token", bool, adds_bos) and tokenizer.bos_id is not None:
        tokenizer._prefix = [tokenizer.bos_id]
    if meta.get("add_eos_token", bool, False) and "eos_token" in special:
        tokenizer._suffix = [vocab[special["eos_token"]]]
    return tokenizer


def _byte_level_backend(meta: _Metadata, vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    pre = meta.get("pre", str, "default")
    if pre not in _PRE:
        raise NotImplementedError(f"{meta.source}: tokenizer.ggml.pre is {pre!r}, supported: {', '.join(sorted(_PRE))}")
    merges: list[tuple[str, str]] = []
    for merge in meta.array("merges", str):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise meta.error("merges", "pairs of tokens whose join is a token", repr(merge))
        merges.append((left, right))
    pre_tokenizer, normalizer, whole_words = _PRE[pre]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizer  # type: ignore[assignment]
    if normalizer is not None:
        backend.normalizer = normalizer  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return backend, pre in _ADDS_BOS


def _sentencepiece_backend(meta: _Metadata, vocab: dict[str, int], types: list[int]) -> tokenizers.Tokenizer:
    """Sentencepiece joins the neighbours whose join has the best score; written as merges, that is every way
    to cut a token into two tokens, best score first."""
    scores = meta.array("scores", float, len(types))
    if not scores or any(math.isnan(score) for score in scores):
        raise meta.error("scores", "a number per token", "NaN" if scores else "none")
    merges = []
    for token in sorted((t for t, i in vocab.items() if types[i] == 1), key=lambda t: -scores[vocab[t]]):
        cuts = ((token[:k], token[k:]) for k in range(1, len(token)))
        cuts = [(left, right) for left, right in cuts if left in vocab and right in vocab]
        merges += sorted(cuts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    unknown = meta.token_id("unknown_token_id", len(types)) or 0
    names = {i: token for token, i in vocab.items()}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=names.get(unknown), fuse_unk=True, byte_fallback=True)
    )
    blanks = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if meta.get("add_space_prefix", bool, True):
        blanks = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
        steps.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = blanks  # type: ignore[assignment]
    backend.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    return backend
