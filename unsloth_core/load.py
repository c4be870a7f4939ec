"""From a Hub id, a folder or a GGUF file to a model and its weights: one tensor at a time, straight to where it will live."""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import hub, weights
from .models import family_of
from .models.decoder import Model
from .ops import nf4
from .tree import ABSENT
from .weights import Declaration, Stacked

QUANTIZATIONS = (None, "nf4")


def load(
    source: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> tuple[Model, Any]:
    """``model, params = load("HuggingFaceTB/SmolLM2-135M-Instruct")``.

    ``source``: a Hub id, a local folder of safetensors, or a ``.gguf`` file. ``device``, ``dtype``: default cuda and bfloat16
    where there is a GPU, else cpu and float32. ``quantize="nf4"`` stores the linears of all layers in 4 bits (double
    quantised, part by part, so that each is what bitsandbytes would make of it); embedding, head and norms stay ``dtype``.
    Raises ValueError for a config field that no one handles, and for tensors that are missing, left over or misshapen.
    """
    if quantize not in QUANTIZATIONS:
        raise ValueError(f"load: quantize is {quantize!r}, expected one of {QUANTIZATIONS}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    checkpoint = hub.open_checkpoint(source, revision=revision, token=token)
    family = family_of(checkpoint.config)
    config = family.Config.from_hf(checkpoint.config)
    params = read_weights(checkpoint, family.Weights, config, device=device, dtype=dtype, quantize=quantize)
    return Model(family=family, config=config, tokenizer=checkpoint.tokenizer(), source=source), params


def read_weights(
    checkpoint: Any, cls: type, config: Any, *, device: torch.device, dtype: torch.dtype, quantize: str | None = None
) -> Any:
    """The weights tree of class ``cls`` from a checkpoint's tensors, all names and shapes checked before any is read."""
    declared = weights.declarations(cls, config.dims)
    _check_names(checkpoint, declared)
    names = set(checkpoint.names)
    total = sum(len(d.names) for d in declared if d.names[0] in names)

    with tqdm(total=total, desc="loading", unit="tensor", leave=False, delay=1) as progress:

        def make(declaration: Declaration) -> Any:
            if declaration.names[0] not in names or _is_tied_head(declaration, config.tie_word_embeddings):
                return ABSENT
            in_layers = isinstance(declaration.path[0], str) and len(declaration.path) > 1
            if quantize == "nf4" and in_layers and declaration.rest:
                parts = []
                for name in declaration.names:
                    parts.append(nf4.quantize(checkpoint.tensor(name).to(device=device, dtype=dtype)))
                    progress.update()
                return parts[0] if len(parts) == 1 else Stacked(parts=tuple(parts))
            stacked = torch.empty(declaration.shape, dtype=dtype, device=device)
            for name, part in zip(declaration.names, stacked.split(declaration.rows), strict=True):
                part.copy_(checkpoint.tensor(name))
                progress.update()
            return stacked

        return weights.build(cls, config.dims, make, config=config)


def named_tensors(params: Any) -> dict[str, Tensor]:
    """The inverse of reading: checkpoint names to tensors (views of the stacked leaves; NF4 parts are decoded)."""
    tensors = {}
    for declaration in weights.declarations(type(params), params.config.dims):
        node = weights.get(params, declaration.path)
        if node is not ABSENT:
            parts = weights.split_parts(node, declaration.rows)
            for name, part in zip(declaration.names, parts, strict=True):
                tensors[name] = part if isinstance(part, Tensor) else nf4.dequantize(part)
    return tensors


def _check_names(checkpoint: Any, declared: list[Declaration]) -> None:
    names = set(checkpoint.names)
    expected = {name for d in declared for name in d.names}
    if extra := sorted(names - expected):
        raise ValueError(f"{checkpoint.source}: {len(extra)} tensors that the config has no place for: {_some(extra)}")
    for d in declared:
        there = [name in names for name in d.names]
        if not any(there) and d.optional:  # a missing head is a tied one, whatever the flag says
            continue
        if not all(there):
            missing = [name for name, found in zip(d.names, there, strict=True) if not found]
            raise ValueError(f"{checkpoint.source}: {len(missing)} tensors are missing: {_some(missing)}")
        for name, rows in zip(d.names, d.rows, strict=True):
            found, wanted = tuple(checkpoint.shape(name)), (rows, *d.rest)
            if found != wanted:
                raise ValueError(f"{checkpoint.source}: {name} has shape {found}, the config says {wanted}")


def _is_tied_head(declaration: Declaration, tied: bool) -> bool:
    return tied and declaration.path == ("head",)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
