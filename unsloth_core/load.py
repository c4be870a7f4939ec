"""From a Hub id, a folder or a GGUF file to a model and its weights, one tensor at a time, straight to its place."""

import dataclasses
import os
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import hub, tree, weights
from .four_bit import FourBitCheckpoint, four_bit, together
from .models import family_of
from .models.container import text_part
from .models.decoder import Model
from .ops import nf4
from .tree import ABSENT
from .weights import NF4, Declaration, Stacked, declared_leaves

QUANTIZATIONS = (None, "nf4")
PLACES = ("device", "host", "nf4")


def load(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    embed: str = "device",
    head: str = "device",
) -> tuple[Model, Any]:
    """``model, params = load("HuggingFaceTB/SmolLM2-135M-Instruct")``.

    ``source``: a Hub id, a local folder of safetensors, or a ``.gguf`` file; of a multimodal model the text part.
    ``device``, ``dtype``: default cuda and bfloat16 where there is a GPU, else cpu and float32. ``quantize="nf4"``
    stores the linears of all layers in 4 bits (double quantised, part by part, so that each is what bitsandbytes would
    make of it, but all experts of a layer as one); embedding, head, norms and routers stay ``dtype``.
    ``embed``, ``head``: "device", "host" (pinned; for training on a small GPU, which reads what it needs over the
    link) or "nf4". A tied head is the embedding.
    Raises ValueError for a config field that no one handles, for tensors that are missing, left over or misshapen, and
    for a device that is not there;
    NotImplementedError for weights that are stored quantised other than in bitsandbytes' 4 bits (which stay as they
    are, bit for bit) or GGUF: bitsandbytes' 8 bits, GPTQ, FP8, ...
    """
    source = os.fspath(source)
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"load: quantize is {quantize!r}, expected one of {QUANTIZATIONS}")
    for name, place in (("embed", embed), ("head", head)):
        if place not in PLACES:
            raise ValueError(f"load: {name} is {place!r}, expected one of {PLACES}")
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:  # no kind of device that PyTorch has heard of
        device = torch.device("meta")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"load: device is {str(wanted)!r}, expected cuda, cuda:<number> or cpu")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"load: device is {str(device)!r}, but PyTorch sees {count} CUDA devices")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"load: dtype is {dtype!r}, expected bfloat16, float16 or float32")
    checkpoint = text_part(hub.open_checkpoint(source, revision=revision, token=token))
    family = family_of(checkpoint.config)
    config = family.Config.from_hf(checkpoint.config)
    tokenizer = checkpoint.tokenizer()  # before the weights: what is wrong with it shows at once
    params = read_weights(
        checkpoint, family.Weights, config, device=device, dtype=dtype, quantize=quantize, embed=embed, head=head
    )
    return Model(family=family, config=config, tokenizer=tokenizer, source=source), params


def read_weights(
    checkpoint: Any, cls: type, config: Any, *, device: torch.device, dtype: torch.dtype, quantize: str | None = None,
    embed: str = "device", head: str = "device",
) -> Any:  # fmt: skip
    """The weights of class ``cls`` from a checkpoint; all names, shapes and types are checked before any is read."""
    checkpoint = four_bit(checkpoint)
    nodes = checkpoint.nodes if isinstance(checkpoint, FourBitCheckpoint) else {}
    declared = declared_leaves(cls, config)
    _check_names(checkpoint, declared)
    names = set(checkpoint.names)
    total = sum(len(d.names) for d in declared if not names.isdisjoint(d.names))

    with tqdm(total=total, desc="loading", unit="tensor", leave=False, delay=1, disable=None) as progress:

        def make(declaration: Declaration) -> Any:
            if names.isdisjoint(declaration.names) or _is_tied_head(declaration, config.tie_word_embeddings):
                return ABSENT
            place = {"embed": embed, "head": head}.get(str(declaration.path[0]), "device")
            quantised = place == "nf4" or (quantize == "nf4" and declaration.linear)
            in_file = declaration.linear and not nodes.keys().isdisjoint(declaration.names)
            if in_file or quantised and not declaration.experts:
                parts = []
                for name in declaration.names:
                    if declaration.linear and name in nodes:
                        parts.append(tree.map(lambda t: t.to(device, copy=True), nodes[name]))
                    else:
                        dense = checkpoint.tensor(name).to(device=device, dtype=dtype)
                        parts.append(nf4.quantize(dense) if quantised else dense)
                    progress.update()
                if declaration.experts:
                    return together(parts, declaration.shape) or Stacked(parts=tuple(parts))
                return parts[0] if len(parts) == 1 else Stacked(parts=tuple(parts))
            on_host = place == "host" and device.type == "cuda"
            where = torch.device("cpu") if on_host else device
            stacked = torch.empty(declaration.shape, dtype=dtype, device=where, pin_memory=on_host)
            for name, part in zip(declaration.names, weights.split_parts(stacked, declaration.rows), strict=True):
                part.copy_(checkpoint.tensor(name))
                progress.update()
            if quantised:  # one node, not one for each expert: a layer has hundreds, and every node costs launches
                return dataclasses.replace(nf4.quantize(stacked.flatten(0, 1)), shape=declaration.shape)
            return stacked

        return weights.build(cls, config.dims, make, config=config)


def named_tensors(params: Any) -> dict[str, Tensor]:
    """The inverse of reading: checkpoint names to tensors (views of the stacked leaves; NF4 is decoded)."""
    tensors = {}
    for declaration in weights.declarations(type(params), params.config.dims):
        node = weights.get(params, declaration.path)
        if node is not ABSENT:
            if declaration.experts and isinstance(node, NF4):
                node = nf4.dequantize(node)
            parts = weights.split_parts(node, declaration.rows)
            for name, part in zip(declaration.names, parts, strict=True):
                tensors[name] = part if isinstance(part, Tensor) else nf4.dequantize(part)
    return tensors


def _check_names(checkpoint: Any, declared: list[Declaration]) -> None:
    names = set(checkpoint.names)
    expected = {name for d in declared for name in d.names}
    if extra := sorted(names - expected):
        raise ValueError(f"{checkpoint.source}: {len(extra)} tensors that the config has no place for: {_some(extra)}")
    elsewhere = {_kind(d): d.names[0] for d in declared if names.intersection(d.names)}
    for d in declared:
        there = [name in names for name in d.names]
        if not any(there) and d.optional:  # a missing head is a tied one, whatever the flag says
            if _kind(d) in elsewhere:
                raise ValueError(f"{checkpoint.source}: {d.names[0]} is missing, but {elsewhere[_kind(d)]} is there")
            continue
        if not all(there):
            missing = [name for name, found in zip(d.names, there, strict=True) if not found]
            raise ValueError(f"{checkpoint.source}: {len(missing)} tensors are missing: {_some(missing)}")
        for name, rows in zip(d.names, d.rows, strict=True):
            found, wanted = tuple(checkpoint.shape(name)), (rows, *d.rest)
            if found != wanted:
                raise ValueError(f"{checkpoint.source}: {name} has shape {found}, the config says {wanted}")
            if not (dtype := checkpoint.dtype(name)).is_floating_point:
                raise ValueError(f"{checkpoint.source}: {name} has dtype {dtype}, expected floating-point weights")


def _kind(declaration: Declaration) -> weights.Path:
    """The path without the index of the layer: an optional bias is in every layer or in none."""
    return tuple(key for key in declaration.path if isinstance(key, str))


def _is_tied_head(declaration: Declaration, tied: bool) -> bool:
    return tied and declaration.path == ("head",)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
