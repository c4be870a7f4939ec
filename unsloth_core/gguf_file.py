"""The container of a GGUF file: metadata and tensors, every size checked against the file.

It is parsed here and not by `gguf.GGUFReader`, for two reasons. That one trusts the file: a
shape whose product wraps around, or a tensor outside the file, gives a wrong view or an unrelated error. And
it makes an object for every string of the vocabulary, which takes 20 times as long. The blocks are decoded by
`gguf.quants.dequantize`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

__all__ = ["PLAIN", "StoredTensor", "parse"]

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMS = 4


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: type, shape (outermost dimension first) and bytes, uint8 [rows, bytes of a row]."""

    type: str
    shape: tuple[int, ...]
    rows: np.ndarray

    def decode(self, rows: np.ndarray) -> torch.Tensor:
        """Rows of bytes -> the tensor."""
        if self.type in PLAIN:
            return torch.from_numpy(np.require(rows, requirements="C")).view(PLAIN[self.type]).view(self.shape)
        with np.errstate(all="ignore"):  # infinite or NaN block scales: the file's values, not our mistake
            return torch.from_numpy(dequantize(rows, GGMLQuantizationType[self.type])).view(self.shape)


class _Cursor:
    """Reads little-endian values one after the other. Raises ValueError, with file and place, for one that is not what
    it should be or would lie past the end of the file."""

    def __init__(self, path: Path, data: memoryview):
        self.path, self.data, self.at = path, data, 0

    def skip(self, count: int, what: str) -> int:
        """Position of the next `count` bytes."""
        at = self.at
        if count > len(self.data) - at:
            raise ValueError(
                f"{self.path}: truncated: {what} needs {count} bytes at {at}, the file has {len(self.data)}"
            )
        self.at = at + count
        return at

    def unpack(self, code: str, what: str) -> Any:
        """One value of a struct code."""
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str) -> str:
        """u64 length, UTF-8."""
        length = self.unpack("Q", what)
        at = self.skip(length, what)
        try:
            return str(self.data[at : at + length], "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {what} at {at}: expected UTF-8, got {error.reason}") from None

    def value(self, kind: int, what: str) -> Any:
        """A metadata value: int, float, bool, str or a list of one of these."""
        if kind in SCALARS:
            return self.unpack(SCALARS[kind], what)
        if kind == STRING:
            return self.string(what)
        if kind != ARRAY:
            raise ValueError(f"{self.path}: {what}: expected a value type in 0...12, got {kind}")
        kind, count = self.unpack("I", what), self.unpack("Q", what)
        if kind == STRING:  # every string takes 8 bytes or more: an absurd count ends at the end of the file
            return [self.string(what) for _ in range(count)]
        if kind not in SCALARS:
            raise ValueError(f"{self.path}: {what}: expected an array of scalars or strings, got type {kind}")
        size = struct.calcsize(f"<{SCALARS[kind]}")
        at = self.skip(count * size, what)
        return np.frombuffer(self.data, np.dtype(SCALARS[kind]).newbyteorder("<"), count, at).tolist()


def parse(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """Metadata and tensors, every size checked against the file. Raises ValueError for what is no GGUF or damaged."""
    if path.stat().st_size < 24:
        raise ValueError(f"{path}: expected a GGUF file, got {path.stat().st_size} bytes")
    data = np.memmap(path, np.uint8, mode="c")  # private: tensors are writable views that never reach the file
    cursor = _Cursor(path, data.data)
    magic = bytes(cursor.data[cursor.skip(4, "magic") : cursor.at])
    if magic != b"GGUF":
        raise ValueError(f"{path}: expected the magic b'GGUF', got {magic!r}")
    version = cursor.unpack("I", "version")
    if version & 0xFFFF == 0:
        raise ValueError(f"{path}: expected a little-endian file, got a big-endian one")
    if version not in (2, 3):
        raise ValueError(f"{path}: expected GGUF version 2 or 3, got {version}")
    n_tensors, n_keys = cursor.unpack("Q", "tensor count"), cursor.unpack("Q", "key count")

    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string("metadata key")
        if key in metadata:
            raise ValueError(f"{path}: metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.unpack("I", f"type of {key!r}"), f"value of {key!r}")
    infos: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for _ in range(n_tensors):
        name = cursor.string("tensor name")
        if name in infos:
            raise ValueError(f"{path}: tensor {name!r} appears twice")
        n_dims = cursor.unpack("I", f"dimensions of {name!r}")
        if not 1 <= n_dims <= MAX_DIMS:
            raise ValueError(f"{path}: tensor {name!r}: expected 1...{MAX_DIMS} dimensions, got {n_dims}")
        dims = [cursor.unpack("Q", f"dimensions of {name!r}") for _ in range(n_dims)]
        kind = cursor.unpack("I", f"type of {name!r}")
        if kind not in GGMLQuantizationType.__members__.values():
            raise ValueError(f"{path}: tensor {name!r}: unknown block type {kind}")
        offset = cursor.unpack("Q", f"offset of {name!r}")
        infos[name] = (GGMLQuantizationType(kind).name, tuple(reversed(dims)), offset)

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"{path}: general.alignment: expected a power of two, got {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return metadata, _locate(path, data, start, alignment, infos)


def _locate(
    path: Path,
    data: np.ndarray,
    start: int,
    alignment: int,
    infos: dict[str, tuple[str, tuple[int, ...], int]],
) -> dict[str, StoredTensor]:
    """The bytes of every tensor: inside the file, aligned, without overlap."""
    tensors, end, before = {}, 0, ""
    for name, (kind, shape, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        if 0 in shape or shape[-1] % block:
            raise ValueError(
                f"{path}: tensor {name!r} has shape {shape}, expected rows of a multiple of {block} ({kind})"
            )
        n_rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * block_bytes
        if offset % alignment or offset < end:
            raise ValueError(
                f"{path}: tensor {name!r}: expected an offset that is a multiple of {alignment} and at least "
                f"{end} (the end of {before!r}), got {offset}"
            )
        end, before = offset + n_rows * row_bytes, name
        if start + end > len(data):
            raise ValueError(f"{path}: truncated: tensor {name!r} ends at byte {start + end}, the file has {len(data)}")
        tensors[name] = StoredTensor(kind, shape, data[start + offset : start + end].reshape(n_rows, row_bytes))
    return tensors
