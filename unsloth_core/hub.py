"""Reading checkpoints: from a Hub id, a folder or a .gguf file to a config, named tensors and a tokenizer.

Only safetensors and GGUF are read, never pickle. Every byte is untrusted: the header of a safetensors file is
checked against the file before any tensor is touched (dtype, shape and byte range agree; the ranges tile the
data without gap or overlap; no name twice), and an index can name only files that lie beside it. The library
`safetensors` checks most of that, but its errors do not say which file, what was expected and what was found.

Tensors are views of a memory map, read from disk when they are used: opening a checkpoint costs no memory,
and a model is never held twice. The map is private: writing to a tensor never reaches the file.

Format: https://huggingface.co/docs/safetensors (header: u64 length, JSON, then one buffer of data).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import numpy as np
import torch

from .gguf_reader import open_gguf
from .tokenizer import Tokenizer

__all__ = ["Checkpoint", "SafetensorsCheckpoint", "open_checkpoint"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL_FILES = [  # what is read besides the weights
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    INDEX,
]
MAX_HEADER = 100_000_000  # bytes; the limit of the format
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}


class Checkpoint(Protocol):
    """What every kind of checkpoint offers; tensor names and config are those of Hugging Face."""

    @property
    def source(self) -> str:
        """What was opened, for messages."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, or what it would be."""
        ...

    @property
    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json, {} if there is none."""
        ...

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Data type of what `tensor(name)` returns, without reading it."""
        ...

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU."""
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that comes with the weights."""
        ...


def open_checkpoint(source: str, *, revision: str | None = None, token: str | None = None) -> Checkpoint:
    """Open a Hub id ("org/name"), a local folder of safetensors, or a .gguf file.

    A Hub id is downloaded into the Hub's cache first (a progress bar shows), or taken from the cache when the
    Hub cannot be reached; `revision` is a branch, tag or commit, `token` opens private repositories.
    Raises FileNotFoundError if there is no such checkpoint, ValueError if it is malformed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return SafetensorsCheckpoint.open(path)
    if path.suffix == ".gguf":
        return open_gguf(path)
    if path.exists():
        raise ValueError(f"{source}: expected a folder, a .gguf file or a Hub id, got another kind of file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        raise FileNotFoundError(f"{source}: no such folder or .gguf file, and not a Hub id (org/name) either")
    return SafetensorsCheckpoint.open(_download(source, revision, token), source)


def read_config(source: str, *, revision: str | None = None, token: str | None = None) -> dict[str, Any]:
    """The content of config.json (what it would be, of a .gguf file) of what :func:`open_checkpoint` opens; a folder
    needs no weights for it, and of a Hub id nothing else is downloaded."""
    path = Path(source).expanduser()
    if path.name == "config.json" and path.is_file():
        return _read_object(path)
    if path.is_dir() and (path / "config.json").is_file():
        return _read_object(path / "config.json")
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return open_checkpoint(source, revision=revision, token=token).config  # GGUF, or the error that says what it is
    return _read_object(_fetch(source, revision, token, ["config.json"]) / "config.json")


def _download(repo: str, revision: str | None, token: str | None) -> Path:
    """Folder with the small files and the safetensors of a Hub repository, from the network or the cache."""
    folder = _fetch(repo, revision, token, SMALL_FILES)
    # Exactly the shards that the index names: repositories often hold the same weights in other forms too.
    # The folder is called after the commit, so both downloads see the same one.
    index = folder / INDEX
    weights = sorted(set(_weight_map(index).values())) if index.is_file() else [SINGLE]
    if all((folder / file).is_file() for file in weights):
        return folder
    return _fetch(repo, folder.name, token, [*SMALL_FILES, *weights])


def _fetch(repo: str, revision: str | None, token: str | None, patterns: list[str]) -> Path:
    """Folder with the files of a Hub repository that match."""
    try:
        folder = huggingface_hub.snapshot_download(repo, revision=revision, token=token, allow_patterns=patterns)
    except Exception as error:  # which errors the client raises depends on its version and HTTP library
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise FileNotFoundError(
            f"{repo}: no such folder or file here; as a Hub id it cannot be fetched and is not complete in the local "
            f"cache ({type(error).__name__}: {reason})"
        ) from error
    return Path(folder)


# ---- a folder of safetensors ----


@dataclass(frozen=True)
class _Entry:
    """One tensor in a file: its type, and its bytes as a view of the memory map (uint8, 1-D)."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: torch.Tensor


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """A folder in the layout of the Hub: config.json, safetensors (one file, or shards with an index)."""

    source: str
    folder: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    entries: Mapping[str, _Entry]

    @staticmethod
    def open(folder: Path, source: str | None = None) -> SafetensorsCheckpoint:
        """Read config and headers, and check everything that can be checked without reading tensors.

        Raises FileNotFoundError without config.json, ValueError for anything missing, damaged or outside the folder."""
        source = source or str(folder)
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{source}: no config.json")
        generation = folder / "generation_config.json"
        return SafetensorsCheckpoint(
            source=source,
            folder=folder,
            config=_read_object(folder / "config.json"),
            generation_config=_read_object(generation) if generation.is_file() else {},
            entries=_read_folder(folder, source),
        )

    @property
    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor, without reading it."""
        return self._entry(name).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor: a view of the file, read when it is used (a copy if it is not aligned in the file)."""
        entry = self._entry(name)
        aligned = entry.bytes.storage_offset() % entry.dtype.itemsize == 0
        return (entry.bytes if aligned else entry.bytes.clone()).view(entry.dtype).view(entry.shape)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the same folder."""
        return Tokenizer.from_folder(self.folder)

    def _entry(self, name: str) -> _Entry:
        if name not in self.entries:
            raise ValueError(f"{self.source}: no tensor {name!r} among {len(self.entries)}")
        return self.entries[name]


def _read_folder(folder: Path, source: str) -> dict[str, _Entry]:
    """Every tensor of a folder by name."""
    if (folder / SINGLE).is_file():
        return _without_buffers(_read_header(_inside(folder, SINGLE)))
    if not (folder / INDEX).is_file():
        weights = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        hint = " (pickled weights are never read: convert them to safetensors)" if weights else ""
        raise ValueError(f"{source}: expected {SINGLE} or {INDEX}, got {weights or 'no weights'}{hint}")
    index = _weight_map(folder / INDEX)
    entries: dict[str, _Entry] = {}
    for file in sorted(set(index.values())):
        if not (folder / file).exists():
            raise ValueError(f"{folder / file}: missing; {INDEX} lists it")
        for name, entry in _read_header(_inside(folder, file)).items():
            if name in entries:
                raise ValueError(
                    f"{folder / file}: tensor {name!r} is also in {entries[name].file.name}, expected once"
                )
            if index.get(name) != file:
                listed = f"in {index[name]}" if name in index else "nowhere"
                raise ValueError(f"{folder / file}: holds tensor {name!r}, which {INDEX} lists {listed}")
            entries[name] = entry
    for name, file in index.items():
        if name not in entries:
            raise ValueError(f"{folder / file}: no tensor {name!r}, which {INDEX} lists there")
    return _without_buffers(entries)


def _without_buffers(entries: dict[str, _Entry]) -> dict[str, _Entry]:
    """Drop the rope frequencies that old checkpoints store: they follow from the config."""
    return {name: entry for name, entry in entries.items() if not name.endswith("rotary_emb.inv_freq")}


def _inside(folder: Path, file: str) -> Path:
    """The real path of a file, which must lie in the folder or, for a snapshot in the Hub's cache (whose
    files are links to `../../blobs`), in the cache of the same repository."""
    real, root = (folder / file).resolve(), folder.resolve()
    roots = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(real.is_relative_to(allowed) for allowed in roots):
        raise ValueError(f"{folder / file}: expected a file inside {roots[-1]}, got a link to {real}")
    return real


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index."""
    names = _read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: weight_map: expected {{tensor: file}}, got {str(names)[:60]!r}")
    for name, file in names.items():
        # A plain file name: no folder, so nothing outside is reached; no wildcard, so downloads are exact.
        if not isinstance(file, str) or not re.fullmatch(r"[\w][\w.+-]*\.safetensors", file):
            raise ValueError(f"{index}: tensor {name!r}: expected a .safetensors file beside the index, got {file!r}")
    return names


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ (Python would silently keep the last of two)."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in seen if seen.count(key) > 1)!r} appears twice")
    return value


def _parse_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected JSON, got {type(error).__name__}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_object(path: Path) -> dict[str, Any]:
    return _parse_object(path.read_bytes(), str(path))


def _read_header(file: Path) -> dict[str, _Entry]:
    """Tensors of one safetensors file; reads its header alone."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{file}: not safetensors or truncated: header of {length} bytes, file of {size} bytes")
        header = _parse_object(stream.read(length), f"{file}: header")
    header.pop("__metadata__", None)
    items = [(*_parse_entry(file, name, item), name) for name, item in header.items()]
    data = torch.from_numpy(np.memmap(file, np.uint8, mode="c"))[8 + length :]
    entries, end = {}, 0
    for start, stop, dtype, shape, name in sorted(items, key=lambda item: item[:2]):
        if start != end:
            raise ValueError(f"{file}: tensor {name!r}: expected to start at byte {end}, got {start}")
        end = stop
        entries[name] = _Entry(file, dtype, shape, data[start:stop])
    if end != len(data):
        raise ValueError(f"{file}: truncated or padded: expected {end} bytes of data, got {len(data)}")
    return entries


def _parse_entry(file: Path, name: str, item: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]]:
    """(first byte, byte after the last, dtype, shape) of one entry of a header."""

    def error(what: str, expected: object, got: object) -> ValueError:
        return ValueError(f"{file}: tensor {name!r}: {what}: expected {expected}, got {str(got)[:60]}")

    def sizes(value: object) -> bool:
        return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)

    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        raise error("entry", "dtype, shape, data_offsets", item)
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise error("dtype", " ".join(DTYPES), dtype)
    if not sizes(shape):
        raise error("shape", "a list of sizes", shape)
    if not sizes(offsets) or len(offsets) != 2:
        raise error("data_offsets", "[start, end]", offsets)
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise error(f"bytes of {dtype} {shape}", expected, offsets[1] - offsets[0])
    return offsets[0], offsets[1], DTYPES[dtype], tuple(shape)
