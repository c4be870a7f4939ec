"""LoRA adapters as a tree of their own: made, put on, merged, and read and written in PEFT's file format.

The adapters of a model are a dict from PEFT module path ("model.layers.0.self_attn.q_proj") to
:class:`~unsloth_core.weights.LoRA`. Those of all experts of a layer are one entry, whose tensors have the expert first;
its path has ``{e}`` in the place of their number ("...experts.{e}.w1"). In files every expert has its own. Everything
else follows from the weight declarations: which modules exist, their shapes, and which rows of a stacked leaf each one
owns. Source: Hu et al. 2021 (arXiv 2106.09685); rsLoRA: Kalajdzievski 2023 (2312.03732).
"""

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import random, tree, weights
from .ops import nf4
from .tree import ABSENT
from .weights import NF4, Adapted, Declaration, LoRA, Stacked

if TYPE_CHECKING:
    from .models.decoder import Model

Adapters = dict[str, LoRA]
Place = tuple[Declaration, int]  # the leaf that a module is stored in, and which of its parts it is
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "dense")
_PREFIX = "base_model.model."
# Of adapter_config.json: what is read, what the tensors show anyway or only training asks for, and the ways to start
# adapters that leave the base weights alone. Any other field must be off.
_PER_MODULE = (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
_HANDLED = {"peft_type", "bias", "init_lora_weights", "use_rslora", *(name for pair in _PER_MODULE for name in pair)}
_HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules inference_mode
    layers_pattern layers_to_transform loftq_config lora_dropout lora_ga_config megatron_config megatron_core
    peft_version qalora_group_size revision target_modules target_parameters task_type
    """.split()
)
_KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")


def init(
    key: Tensor,
    params: Any,
    *,
    rank: int | Mapping[str, int] = 16,
    alpha: float | None = None,
    targets: str | Sequence[str] = "all-linear",
    rslora: bool = False,
) -> Adapters:
    """New adapters: ``a`` uniform in ±1/sqrt(C) as PEFT draws it, ``b`` zero, so that nothing changes yet.

    ``rank``: one for all, or ``{"q_proj": 8, ...}`` by last name (then only those modules are adapted). ``alpha``:
    default the rank; the scale is alpha/rank, with ``rslora`` alpha/sqrt(rank). ``targets``: "all-linear" (every linear
    of the layers), "attention", or a list of last names. A module starts the same whatever the other targets are.
    Raises ValueError for a target that the model does not have, a rank below 1, no key, and no model's weights.
    """
    random.check("lora.init", key)
    modules = _modules("init", params)
    last_names = sorted({path.rpartition(".")[2] for path in modules})
    chosen = _targets(targets, last_names)
    if isinstance(rank, Mapping):
        if unknown := sorted(set(rank) - set(last_names)):
            raise ValueError(f"lora.init: rank names {unknown}, but the model's linears are {last_names}")
        chosen = [name for name in chosen if name in rank]
    adapters = {}
    for i, (path, (declaration, _)) in enumerate(modules.items()):
        name = path.rpartition(".")[2]
        if name not in chosen:
            continue
        r = rank[name] if isinstance(rank, Mapping) else rank
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"lora.init: rank of {name} is {r!r}, expected a positive integer")
        rows, width = declaration.modules[path], declaration.rest[0]
        experts = (declaration.experts,) if declaration.experts else ()
        device = _device(weights.get(params, declaration.path))
        generator = random.generator(random.fold_in(key.cpu(), i))
        a = (torch.rand(*experts, r, width, generator=generator) * 2 - 1) / math.sqrt(width)
        strength = r if alpha is None else alpha
        scale = strength / math.sqrt(r) if rslora else strength / r
        adapters[path] = LoRA(a=a.to(device), b=torch.zeros(*experts, rows, r, device=device), scale=float(scale))
    if not adapters:
        raise ValueError(f"lora.init: targets {targets!r} choose none of the model's linears {last_names}")
    return adapters


def adapt(params: Any, adapters: Adapters, *, dropout: float = 0.0, key: Tensor | None = None) -> Any:
    """The same weights with adapters on: differentiable in the adapters, the base untouched and shared.

    ``dropout``, PEFT's ``lora_dropout``: while training, pass a new ``key`` for every microbatch, and each adapter's
    input is dropped out with a mask of its own. Without a key nothing is.
    Raises ValueError for a module that the model does not have, adapters whose shape does not fit it, or dropout
    outside [0, 1); NotImplementedError for dropout on experts.
    """
    modules = _modules("adapt", params)
    if not 0 <= dropout < 1:
        raise ValueError(f"lora.adapt: dropout is {dropout}, expected 0 <= dropout < 1")
    if missing := sorted(set(adapters) - set(modules)):
        raise ValueError(
            f"lora.adapt: the model has no linear {missing[0]!r} ({len(missing)} such adapters): another model's?"
        )
    by_leaf: dict[weights.Path, list[Any]] = {}
    rows: dict[weights.Path, tuple[int, ...]] = {}
    for path, lora in adapters.items():
        declaration, part = modules[path]
        experts = (declaration.experts,) if declaration.experts else ()
        M, C = declaration.modules[path], declaration.rest[0]
        r = lora.a.shape[-2] if lora.a.ndim > 1 else 0
        if lora.a.shape != (*experts, r, C) or lora.b.shape != (*experts, M, r):
            found = f"a {tuple(lora.a.shape)} and b {tuple(lora.b.shape)}"
            each = f"{experts[0]}, " if experts else ""
            expected = f"({each}r, {C}) and ({each}{M}, r)"
            raise ValueError(f"lora.adapt: {path} is {(M, C)}, but its adapter has {found}, expected {expected}")
        by_leaf.setdefault(declaration.path, [ABSENT] * len(declaration.modules))[part] = lora
        rows[declaration.path] = tuple(declaration.modules.values())
    values = {}
    keys: Any = ()
    dropout = 0.0 if key is None else dropout
    if dropout and key is not None:
        if experts_adapted := [path for path in adapters if modules[path][0].experts]:
            raise NotImplementedError(f"lora.adapt: dropout on experts, here {experts_adapted[0]!r}")
        keys = random.fold_in(key, torch.arange(sum(map(len, rows.values())), device=key.device)[:, None])
    first = 0
    for leaf, parts in by_leaf.items():
        base = weights.get(params, leaf)
        if isinstance(base, Adapted):
            raise ValueError(f"lora.adapt: {'.'.join(map(str, leaf))} carries adapters already; merge them first")
        own = keys[first : first + len(parts)]
        values[leaf] = Adapted(base=base, parts=tuple(parts), rows=rows[leaf], key=own, dropout=dropout)
        first += len(parts)
    return weights.replace(params, values)


def merge(params: Any, adapters: Adapters) -> Any:
    """New dense weights ``round(fp32(W) + scale·B·A)``, rounded once to the base's dtype; an NF4 base is decoded first.

    Merging into 16 bits loses small updates, so train with :func:`adapt` and merge only to export. Raises as that does.
    """
    values = {}
    modules = _modules("merge", params)
    adapted = adapt(params, adapters)
    for declaration in {id(d): d for d, _ in modules.values()}.values():
        node = weights.get(adapted, declaration.path)
        if not isinstance(node, Adapted):
            continue
        merged = []
        for dense, lora in zip(_dense(node.base).view(declaration.shape).split(node.rows, -2), node.parts, strict=True):
            if lora is not ABSENT:
                dense = (dense.float() + lora.scale * (lora.b.float() @ lora.a.float())).to(dense.dtype)
            merged.append(dense)
        values[declaration.path] = merged[0] if len(merged) == 1 else torch.cat(merged, -2)
    return weights.replace(params, values)


def _dense(w: Tensor | NF4 | Stacked) -> Tensor:
    if isinstance(w, Stacked):
        return torch.cat([_dense(part) for part in w.parts])
    return w if isinstance(w, Tensor) else nf4.dequantize(w)


def save(adapters: Adapters, folder: str | os.PathLike[str], model: "Model") -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` as PEFT does, each under a temporary name first.

    ``model`` says which modules exist and where the base came from. Raises ValueError for adapters of another model and
    for what is no model, OSError (disk full, no permission) with the files that were there before still whole.
    """
    config = _peft_config(adapters, model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, lora in adapters.items():
        for kind, t in (("A", lora.a.detach().cpu()), ("B", lora.b.detach().cpu())):
            for name, one in zip(_each(path, len(t) if t.ndim == 3 else 0), t if t.ndim == 3 else [t], strict=True):
                tensors[f"{_PREFIX}{name}.lora_{kind}.weight"] = one.contiguous()
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        try:
            save_file(tensors, Path(temporary) / "adapter_model.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:  # also for a full disk
            raise OSError(f"lora.save: {folder} cannot be written: {error}") from None
        (Path(temporary) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        # safetensors makes files that only their owner reads; the other file's mode is what the user's umask says.
        shutil.copymode(Path(temporary) / "adapter_config.json", Path(temporary) / "adapter_model.safetensors")
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            os.replace(Path(temporary) / name, folder / name)


def load(folder: str | os.PathLike[str], params: Any) -> Adapters:
    """Adapters from a PEFT folder, checked against the model's modules and put on its device, as fp32 leaves.

    Raises ValueError for a truncated file, an unsupported PEFT option (DoRA, biases, modules_to_save, ...), modules
    that the model does not have, an A without its B, and shapes that do not fit.
    """
    folder = Path(folder)
    config_file, tensor_file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for file in (config_file, tensor_file):
        if not file.is_file():
            raise ValueError(f"lora.load: {file} does not exist, expected PEFT's two files in {folder}")
    try:
        config = json.loads(config_file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"lora.load: {config_file} is not JSON: {error}") from None
    _check_supported(config, config_file)
    modules = _modules("load", params)
    single: dict[str, LoRA] = {}
    for name, pair in _read_pairs(tensor_file).items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"lora.load: {tensor_file} has only lora_{next(iter(pair))} of {name}, expected A and B")
        if (fused := _FUSED.fullmatch(name)) and any("{e}" in path for path in modules):
            single |= _of_fused(fused[1], pair["A"], pair["B"], modules, config, tensor_file)
        else:
            single[name] = _of_one(name, pair, config, tensor_file)
    adapters = {}
    for path, (declaration, _) in modules.items():
        names = _each(path, declaration.experts)
        if not (found := [single.pop(name) for name in names if name in single]):
            continue
        if len(found) < len(names) or len({(lora.a.shape, lora.b.shape, lora.scale) for lora in found}) > 1:
            raise ValueError(f"lora.load: {tensor_file} has no adapters of one rank and scale on all experts of {path}")
        a, b = (torch.stack([getattr(lora, k) for lora in found]) if declaration.experts else getattr(found[0], k)
                for k in "ab")  # fmt: skip
        where = _device(weights.get(params, declaration.path))
        a, b = (t.to(device=where, dtype=torch.float32) for t in (a, b))
        adapters[path] = LoRA(a=a, b=b, scale=found[0].scale)
    if single:
        raise ValueError(
            f"lora.load: {tensor_file} has {next(iter(single))!r}, which is no linear of this model: another model's?"
        )
    adapt(params, adapters)  # shapes
    return adapters


def _read_pairs(file: Path) -> dict[str, dict[str, Tensor]]:
    """A and B of every module that the file names."""
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():
                match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])\.weight", key)
                if match is None:
                    raise ValueError(
                        f"lora.load: {file} has {key!r}, which is no linear of this model: another model's?"
                    )
                found.setdefault(match[1], {})[match[2]] = tensors.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"lora.load: {file} is damaged: {error}") from None
    return found


def _of_one(name: str, pair: dict[str, Tensor], config: dict[str, Any], file: Path) -> LoRA:
    """The adapter of one module."""
    rank, alpha = _of_module(config, name)
    for kind, tensor in pair.items():
        if not tensor.is_floating_point() or tensor.ndim != 2 or tensor.shape[0 if kind == "A" else 1] != rank:
            got = f"{tensor.dtype} {tuple(tensor.shape)}, expected floating point of rank {rank}"
            raise ValueError(f"lora.load: {file} has lora_{kind} of {name} as {got}")
    return LoRA(a=pair["A"], b=pair["B"], scale=_scale(config, rank, alpha))


# transformers 5 holds all experts of a layer as two parameters, and PEFT wraps the adapter of one around the other's.
_FUSED = re.compile(r"(.+)\.mlp\.experts(?:\.base_layer)?")


def _of_fused(
    layer: str, A: Tensor, B: Tensor, modules: Mapping[str, Place], config: dict[str, Any], file: Path
) -> dict[str, LoRA]:
    """PEFT's adapter of all experts, taken apart: A is (E·r, C), expert after expert, B (rows, r·E), rank after rank.

    Which of the layer's two weights it is on, the shapes say. Gate and up both get A, and their rows of B.
    """
    leaves = {id(d): d for path, (d, _) in modules.items() if d.experts and path.startswith(f"{layer}.")}
    for d in leaves.values():
        rows, width, rank = tuple(d.modules.values()), d.rest[0], A.shape[0] // d.experts
        if A.shape != (rank * d.experts, width) or B.shape != (sum(rows), rank * d.experts) or rank == 0:
            continue
        if not (A.is_floating_point() and B.is_floating_point()):
            got = f"{A.dtype} and {B.dtype}, expected floats"
            raise ValueError(f"lora.load: {file} has for the experts of {layer} {got}")
        _, alpha = _of_module(config, f"{layer}.mlp.experts.{'gate_up_proj' if len(rows) == 2 else 'down_proj'}")
        a, b = A.view(d.experts, rank, width), B.view(-1, rank, d.experts)
        return {
            path.replace("{e}", str(e)): LoRA(a=a[e], b=part[..., e], scale=_scale(config, rank, alpha))
            for path, part in zip(d.modules, b.split(rows), strict=True)
            for e in range(d.experts)
        }
    got = f"A {tuple(A.shape)} and B {tuple(B.shape)}"
    raise ValueError(f"lora.load: {file} has for the experts of {layer} {got}, which fit none of this model")


def _scale(config: dict[str, Any], rank: int, alpha: float) -> float:
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _each(path: str, experts: int) -> list[str]:
    """A module's path, or those of its experts."""
    return [path.replace("{e}", str(e)) for e in range(experts)] if experts else [path]


def _modules(function: str, params: Any) -> dict[str, Place]:
    """Every linear of the layers by module path, with the leaf it is stored in and which part of it.

    Raises ValueError for anything but the weights of a model."""
    if not (hasattr(params, "config") and hasattr(params, "layers")):
        got = f"a {type(params).__name__}"
        raise ValueError(f"lora.{function}: params is {got}, expected a model's weights: model, params = uc.load(...)")
    return {
        module: (declaration, part)
        for declaration in weights.declarations(type(params), params.config.dims)
        if declaration.linear and weights.get(params, declaration.path) is not ABSENT
        for part, module in enumerate(declaration.modules)
    }


def _targets(targets: str | Sequence[str], last_names: list[str]) -> list[str]:
    if targets == "all-linear":
        return last_names
    if targets == "attention":
        return [name for name in last_names if name in ATTENTION]
    if isinstance(targets, str):
        expected = f"'all-linear', 'attention' or a list of {last_names}"
        raise ValueError(f"lora.init: targets is {targets!r}, expected {expected}")
    if unknown := sorted(set(targets) - set(last_names)):
        raise ValueError(f"lora.init: targets {unknown} are not among the model's linears {last_names}")
    return list(targets)


def _device(node: Any) -> torch.device:
    return tree.leaves(node)[0].device


def _target_modules(adapters: Adapters, model: "Model") -> list[str]:
    """Last names where every module of that name is adapted, full paths where only some are."""
    declared = weights.declared_leaves(model.family.Weights, model.config)
    modules = {name: d.experts for d in declared if d.linear for name in d.modules}
    if foreign := sorted(set(adapters) - set(modules)):
        raise ValueError(f"lora.save: the model has no linear {foreign[0]!r}: another model's adapters?")
    names = set()
    partial = {path.rpartition(".")[2] for path in modules if path not in adapters}
    for path in adapters:
        last = path.rpartition(".")[2]
        names |= set(_each(path, modules[path])) if last in partial else {last}
    return sorted(names)


def _peft_config(adapters: Adapters, model: "Model") -> dict[str, Any]:
    if not hasattr(model, "source"):
        got = f"a {type(model).__name__}"
        raise ValueError(f"lora.save: model is {got}, expected a Model: model, params = uc.load(...)")
    ranks = {path: lora.a.shape[-2] for path, lora in adapters.items()}
    alphas = {path: lora.scale * ranks[path] for path, lora in adapters.items()}
    alphas = {path: int(alpha) if alpha.is_integer() else alpha for path, alpha in alphas.items()}
    r = max(ranks.values(), key=list(ranks.values()).count)
    alpha = max(alphas.values(), key=list(alphas.values()).count)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,  # the scale is written out as alpha/r, which is what it is
        "use_dora": False,
        "target_modules": _target_modules(adapters, model),
        "rank_pattern": {_pattern_of(path): n for path, n in ranks.items() if n != r},
        "alpha_pattern": {_pattern_of(path): n for path, n in alphas.items() if n != alpha},
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _pattern_of(path: str) -> str:
    """A regular expression for the module, or for those of every expert."""
    return re.escape(path).replace(re.escape("{e}"), r"\d+")


def _check_supported(config: Any, where: Path) -> None:
    """Raises ValueError for anything that makes adapters mean more, or something else, than their two tensors."""
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"lora.load: {where} has peft_type {found!r}, expected 'LORA'")
    if config.get("bias") not in (None, "none"):
        raise ValueError(f"lora.load: {where} has bias = {config['bias']!r}, supported: 'none'")
    if config.get("init_lora_weights") not in (None, True, False, *_KEEPS_BASE):
        way = config["init_lora_weights"]
        raise ValueError(f"lora.load: {where} has init_lora_weights = {way!r}, which changed the base weights")
    for name in sorted(config.keys() - _HANDLED - _HARMLESS):
        if config[name]:
            raise ValueError(f"lora.load: {where} has {name} = {config[name]!r}, which is not supported")
    ranks, alphas = ([config.get(field), *_pattern(config, name, where).values()] for field, name in _PER_MODULE)
    if not all(type(r) is int and r > 0 for r in ranks):
        raise ValueError(f"lora.load: {where} has ranks {ranks}, expected positive integers")
    if not all(type(alpha) in (int, float) and math.isfinite(alpha) for alpha in alphas):
        raise ValueError(f"lora.load: {where} has lora_alpha {alphas}, expected finite numbers")


def _pattern(config: dict[str, Any], name: str, where: Path) -> dict[str, Any]:
    """A field that maps regular expressions to numbers; one that could take long to match is refused."""
    patterns = config.get(name) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"lora.load: {where} has {name} = {patterns!r}, expected an object")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            raise ValueError(f"lora.load: {where} has {pattern!r} in {name}, which is no regular expression") from None
        if len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+{]", pattern):
            raise ValueError(f"lora.load: {where} has {pattern!r} in {name}, too many repetitions")
    return patterns


def _of_module(config: dict[str, Any], path: str) -> tuple[int, float]:
    """(rank, alpha). PEFT's rule: the first pattern that matches the end of a path, from a dot or the start, wins."""
    found = []
    for field, name in _PER_MODULE:
        patterns = config.get(name) or {}
        matching = (value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", path))
        found.append(next(matching, config[field]))
    return found[0], found[1]
