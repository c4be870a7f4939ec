"""Reading what bitsandbytes stored in 4 bits (NF4), as QLoRA's checkpoints on the Hub are.

Beside ``P.weight``, now codes, such a file has ``P.weight.absmax``, perhaps quantised itself (``nested_absmax``,
``nested_quant_map``), the table (``quant_map``), and JSON with the shape (``quant_state.bitsandbytes__nf4``). Together
they are one :class:`~unsloth_core.weights.NF4`, bit for bit. What is stored so, the presence of that JSON says and
never the config: modules that were skipped (routers, heads, what "dynamic" uploads spare) are plain tensors.

Format: bitsandbytes' ``functional.QuantState``; ``transformers``' quantizer_bnb_4bit.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .hub import Checkpoint
from .ops import nf4
from .tokenizer import Tokenizer
from .tree import ABSENT
from .weights import NF4, Nested

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
_OF_STATE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class FourBitCheckpoint:
    """A checkpoint some of whose tensors are NF4, behind the interface of :class:`unsloth_core.hub.Checkpoint`."""

    whole: Checkpoint
    nodes: Mapping[str, NF4]

    @property
    def source(self) -> str:
        """What was opened, for messages."""
        return self.whole.source

    @property
    def config(self) -> dict[str, Any]:
        """That of the checkpoint."""
        return self.whole.config

    @property
    def generation_config(self) -> dict[str, Any]:
        """That of the checkpoint."""
        return self.whole.generation_config

    @property
    def names(self) -> list[str]:
        """Names of the weights, sorted; what belongs to their state is not among them."""
        state = {f"{name}.{part}" for name in self.nodes for part in _OF_STATE}
        return [name for name in self.whole.names if name not in state and not _STATE.fullmatch(name)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight, as it was before it was quantised."""
        return self.nodes[name].shape if name in self.nodes else self.whole.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Data type of what ``tensor(name)`` returns."""
        return self.nodes[name].dtype if name in self.nodes else self.whole.dtype(name)

    def tensor(self, name: str) -> Tensor:
        """One weight, decoded, on the CPU."""
        return nf4.dequantize(self.nodes[name]) if name in self.nodes else self.whole.tensor(name)

    def tokenizer(self) -> Tokenizer:
        """That of the checkpoint."""
        return self.whole.tokenizer()


@dataclasses.dataclass(frozen=True)
class StoredSo:
    """What a config.json says of a checkpoint in bitsandbytes' 4 bits: its bytes can be known before there is one."""

    nested: bool  # absmax is quantised itself
    skipped: tuple[str, ...]  # names of modules, or what they begin or end with, that stay 16-bit

    def holds(self, name: str) -> bool:
        """Whether the weight of a linear is stored in 4 bits; transformers' rule (``should_convert_module``)."""
        module = name.removesuffix(".weight")
        begins = any(f"{module}.".startswith(f"{skip}.") for skip in self.skipped)
        return not begins and not module.endswith(self.skipped)


def stored_so(config: Mapping[str, Any], source: str) -> StoredSo | None:
    """How config.json says that the weights are stored; None: plainly.

    Raises NotImplementedError for weights that are stored quantised in another way than bitsandbytes' 4 bits."""
    stored = config.get("quantization_config")
    if not stored:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored
    if not isinstance(stored, dict) or method != "bitsandbytes" or stored.get("load_in_8bit"):
        kind = f"{method}, 8 bits" if method == "bitsandbytes" else method
        raise NotImplementedError(
            f"{source}: config.json has a quantization_config ({kind}), and of quantised safetensors only "
            'bitsandbytes\' 4 bits can be read; load the original 16-bit weights, with quantize="nf4" for 4 bits'
        )
    skipped = stored.get("llm_int8_skip_modules") or ()
    return StoredSo(bool(stored.get("bnb_4bit_use_double_quant")), tuple(map(str, skipped)))


def four_bit(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its 4-bit tensors put together; one without any as it is.

    Raises NotImplementedError for weights that are stored quantised in another way, ValueError for states that lie.
    """
    stored_so(checkpoint.config, checkpoint.source)
    states = [match for name in checkpoint.names if (match := _STATE.fullmatch(name))]
    there = set(checkpoint.names)
    nodes = {match[1]: _node(checkpoint, match[1], match[2], there) for match in states}
    return FourBitCheckpoint(checkpoint, nodes) if nodes else checkpoint


def _node(checkpoint: Checkpoint, name: str, kind: str, there: set[str]) -> NF4:
    """The weight called ``name``; nothing but the small JSON is read yet."""
    where = f"{checkpoint.source}: {name}"
    if kind != "nf4":
        raise NotImplementedError(f"{where} is stored as {kind}, supported: nf4")
    state = _state(checkpoint, f"{name}.quant_state.bitsandbytes__{kind}", where)
    rows, columns = state["shape"]
    nested = "nested_blocksize" in state
    wanted = [name, *(f"{name}.{part}" for part in _OF_STATE[: 4 if nested else 2])]
    if missing := [tensor for tensor in wanted if tensor not in there]:
        raise ValueError(f"{where} has a quant_state, but there is no {missing[0]}")
    codes, absmax, table, *more = map(checkpoint.tensor, wanted)
    if table.dtype != torch.float32 or not torch.equal(table, nf4.table(torch.device("cpu"))):
        raise ValueError(f"{where} has another quant_map than NF4's 16 numbers")
    node = NF4(
        codes=codes.reshape(-1).view(torch.uint8),  # any bnb_4bit_quant_storage: the same bytes
        absmax=absmax,
        nested=ABSENT,
        shape=(rows, columns),
        dtype=_DTYPES[state["dtype"]],
        block=state["blocksize"],
    )
    if nested:
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        node = dataclasses.replace(node, nested=Nested(absmax_P=more[0], code_256=more[1], offset=offset))
    try:
        nf4.check(name, node)
    except ValueError as error:
        raise ValueError(f"{checkpoint.source}: {error}") from None
    return node


def _state(checkpoint: Checkpoint, key: str, where: str) -> dict[str, Any]:
    """The JSON of one weight, every field checked."""
    raw = checkpoint.tensor(key)
    try:
        state = json.loads(bytes(raw.tolist())) if raw.dtype == torch.uint8 and raw.numel() < 4096 else None
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ValueError(f"{where} has a quant_state that is not a JSON object")

    def size(value: object) -> bool:
        return type(value) is int and 0 < value < 2**31

    shape, nested = state.get("shape"), "nested_blocksize" in state
    good = {
        "shape": isinstance(shape, list) and len(shape) == 2 and all(map(size, shape)),
        "dtype": isinstance(state.get("dtype"), str) and state["dtype"] in _DTYPES,
        "quant_type": state.get("quant_type") == "nf4",
        "blocksize": size(state.get("blocksize")),
        "nested_blocksize": not nested or state["nested_blocksize"] == nf4.NESTED_BLOCK,
        "nested_dtype": not nested or state.get("nested_dtype") == "float32",
        "nested_offset": not nested
        or isinstance(state.get("nested_offset"), int | float) and math.isfinite(state["nested_offset"]),
    }  # fmt: skip
    if wrong := [field for field, fits in good.items() if not fits]:
        raise ValueError(f"{where} has a quant_state with {wrong[0]} {state.get(wrong[0])!r}")
    return state


def together(parts: list[Any], shape: tuple[int, ...]) -> NF4 | None:
    """One node of matrices below each other, as those of all experts are; None where their blocks do not fit together.

    Each matrix has an offset of its own, so absmax is decoded: the same numbers, in 4 bytes for each block of 64.
    """
    first = parts[0]
    if not all(isinstance(part, NF4) and (part.dtype, part.block) == (first.dtype, first.block) for part in parts):
        return None
    if any(math.prod(part.shape) % first.block for part in parts):
        return None
    absmax = []
    for part in parts:
        a = part.absmax
        if part.nested is not ABSENT:
            scale = part.nested.absmax_P.repeat_interleave(nf4.NESTED_BLOCK)[: a.numel()]
            a = part.nested.code_256[a.int()] * scale
            a = a + part.nested.offset  # a second rounding, as bitsandbytes has it
        absmax.append(a)
    codes = torch.cat([part.codes.reshape(-1) for part in parts])
    return NF4(codes=codes, absmax=torch.cat(absmax), shape=shape, dtype=first.dtype, block=first.block)
