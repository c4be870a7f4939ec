"""Rotary position tables: which angle every channel pair of a head turns by, at every position.

Pair ``i < J`` of a head at position p turns by ``p * f_i`` with ``f_i = base^(-2i/R)``, R = 2J rotated
channels. Methods that stretch the context change only the frequencies, and some the length of the turned
vectors: the table holds ``m * cos`` and ``m * sin`` with the attention factor m, so scores grow by m². Tables
are fp32 whatever the model's dtype: the rotation rounds once, at its store, and not the cosine before.

Frequencies are computed in fp32, operation by operation as ``transformers.modeling_rope_utils`` does: far
out, an angle feels the last bit of its frequency. Everything happens on the device of the positions and from
host numbers alone: no copy from the host, no synchronisation, so a table can be part of a captured step.

Sources of ideas: RoPE, Su et al. (arXiv 2104.09864); linear interpolation, Chen et al. (2306.15595); YaRN,
Peng et al. (2309.00071), which also describes dynamic NTK scaling; LongRoPE, Ding et al. (2402.13753); the
llama3 blend is the one of Llama 3.1's published model code.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

# The fields that a rope dict may hold besides the common ones, by type: (required, optional).
_FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "llama3": (
        frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {"original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"}
            | {"mscale_all_dim", "truncate"}
        ),
    ),
    "longrope": (
        frozenset({"short_factor", "long_factor"}),
        frozenset({"original_max_position_embeddings", "attention_factor", "factor"}),
    ),
}
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
_TYPES = tuple(_FIELDS)

# Class defaults of `rope_theta` in transformers, where they are not 10,000.
_BASE = {"mixtral": 1e6, "smollm3": 2e6}
# The other classes ignore `partial_rotary_factor` in their default type and fail on it in the rest.
_PARTIAL = ("phi3",)
# Gemma 3 has one base per layer type, and its flat `rope_scaling` belongs to the full layers only.
# layer type: (top-level field of its base, class default)
_LAYER_TYPES = {"full_attention": ("rope_theta", 1e6), "sliding_attention": ("rope_local_base_freq", 1e4)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """One rope configuration: host numbers only, hashable. The names are those of Hugging Face configs.

    ``head_dim``: K. ``channels``: 2J, how many of the first channels of a head turn. ``attention_factor``: m
    above. ``factor`` is read by linear, dynamic, llama3 and yarn; ``max_position_embeddings`` by dynamic;
    ``original_max_position_embeddings``, the context of the first training, by llama3, yarn and longrope;
    ``low_freq_factor`` and ``high_freq_factor`` by llama3; ``beta_*`` and ``truncate`` by yarn; the lists by
    longrope. Raises ValueError for values without a meaning.
    """

    head_dim: int
    channels: int
    base: float = 10000.0
    rope_type: str = "default"
    attention_factor: float = 1.0
    factor: float = 1.0
    max_position_embeddings: int = 0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in _FIELDS:
            raise ValueError(f"rotary: rope_type is {self.rope_type!r}, expected one of {_TYPES}")
        smallest = 4 if self.rope_type == "dynamic" else 2  # dynamic's exponent is R / (R - 2)
        if self.channels % 2 or not smallest <= self.channels <= self.head_dim:
            raise ValueError(
                f"rotary: {self.channels} rotated channels, expected an even number from {smallest} to "
                f"head_dim = {self.head_dim}"
            )
        if not self.base > 1:
            raise ValueError(f"rotary: rope_theta is {self.base}, expected a number > 1")
        for name in ("factor", "attention_factor", "low_freq_factor", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise ValueError(f"rotary: {name} is {getattr(self, name)}, expected a number > 0")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"rotary: high_freq_factor is {self.high_freq_factor}, expected more than low_freq_factor = "
                f"{self.low_freq_factor}"
            )
        if self.rope_type == "dynamic" and self.max_position_embeddings < 1:
            raise ValueError(
                f"rotary: max_position_embeddings is {self.max_position_embeddings}, expected a number > 0"
            )
        if self.rope_type in ("llama3", "yarn", "longrope") and self.original_max_position_embeddings < 2:
            raise ValueError(
                "rotary: original_max_position_embeddings is "
                f"{self.original_max_position_embeddings}, expected a number > 1"
            )
        if self.rope_type == "longrope":
            for name in ("short_factor", "long_factor"):
                factors = getattr(self, name)
                if len(factors) != self.channels // 2 or not all(f > 0 for f in factors):
                    raise ValueError(
                        f"rotary: {name} has {len(factors)} entries, expected {self.channels // 2} positive"
                    )

    @staticmethod
    def from_hf(config: dict[str, Any], *, head_dim: int, layer_type: str | None = None) -> "Rotary":
        """Read the rope fields of a ``config.json`` (of its text model), as transformers 4 or 5 spells them.

        ``layer_type``: ``"full_attention"`` or ``"sliding_attention"`` for a family whose layers differ
        (Gemma 3), else None. A family completes ``config`` with class defaults it needs
        (``max_position_embeddings``) and takes out of the dict what only it understands (Ministral 3's
        ``llama_4_scaling_beta``). Null counts as absent.

        Rules, those of transformers 5.23: the dict is ``rope_scaling`` if truthy, else ``rope_parameters``;
        ``rope_type`` beats ``type``; ``rope_theta`` and ``partial_rotary_factor`` in the dict beat those
        beside it; ``original_max_position_embeddings`` beside the dict beats the one in it. Raises ValueError
        naming the first field that is unknown for the type, missing, or not a number.
        """
        model_type = config.get("model_type")
        if layer_type is None:
            where, given = _flat_fields(config)
            base = _number(config, "rope_theta", _BASE.get(str(model_type), 10000.0))
        else:
            where, given = _layer_fields(config, layer_type)
            base = _number(config, *_LAYER_TYPES[layer_type])
        given = {name: value for name, value in given.items() if value is not None}

        rope_type = given.get("rope_type", given.get("type", "default"))
        if rope_type == "su" or (rope_type == "yarn" and model_type == "phi3"):
            rope_type = "longrope"  # what early Phi-3 checkpoints called it
        if not isinstance(rope_type, str) or rope_type not in _FIELDS:
            raise ValueError(f"rotary: rope_type in {where} is {rope_type!r}, expected one of {_TYPES}")
        required, optional = _FIELDS[rope_type]
        for name in given:
            if name not in _COMMON | required | optional:
                raise ValueError(f"rotary: unknown field {name!r} in {where} of rope_type {rope_type!r}")
        for name in sorted(required):
            if name not in given:
                raise ValueError(f"rotary: {where} of rope_type {rope_type!r} lacks the field {name!r}")

        partial = _number(given, "partial_rotary_factor", _number(config, "partial_rotary_factor", 1.0))
        values: dict[str, Any] = {
            "head_dim": head_dim,
            "channels": int(head_dim * partial),
            "base": _number(given, "rope_theta", base),
            "rope_type": rope_type,
            "attention_factor": 1.0,
        }
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            if name in given:
                values[name] = _number(given, name, 1.0)
        if rope_type == "dynamic":
            values["max_position_embeddings"] = _integer(config, "max_position_embeddings")
        if rope_type in ("llama3", "yarn", "longrope"):
            values["original_max_position_embeddings"] = _original(config, given)
        if rope_type == "yarn":
            values["beta_fast"] = _number(given, "beta_fast", 0.0) or 32.0
            values["beta_slow"] = _number(given, "beta_slow", 0.0) or 1.0
            values["truncate"] = given.get("truncate", True)
            if not isinstance(values["truncate"], bool):
                raise ValueError(f"rotary: truncate is {values['truncate']!r}, expected true or false")
            values["attention_factor"] = _yarn_attention(given, values["factor"])
        if rope_type == "longrope":
            values["short_factor"] = _numbers(given, "short_factor")
            values["long_factor"] = _numbers(given, "long_factor")
            values["attention_factor"] = _longrope_attention(config, given, _original(config, given))
        if values["channels"] != head_dim and model_type is not None and model_type not in _PARTIAL:
            raise ValueError(
                f"rotary: partial_rotary_factor is {partial}, expected 1: a part of a head turns only in "
                f"{_PARTIAL}, not in {model_type!r}"
            )
        return Rotary(**values)

    def frequencies(
        self, *, max_position: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """f_J, the angle per position of every pair, (J,). ``max_position``: see :meth:`table`."""
        R, base = self.channels, self.base
        exponents = torch.arange(0, R, 2, dtype=torch.int64, device=device).to(dtype) / R
        if self.rope_type == "dynamic":
            length = max(max_position + 1, self.max_position_embeddings)
            stretch = self.factor * length / self.max_position_embeddings - (self.factor - 1)
            return 1.0 / ((base * stretch ** (R / (R - 2))) ** exponents)
        if self.rope_type == "longrope":
            long = max_position + 1 > self.original_max_position_embeddings
            factors = _from_host(self.long_factor if long else self.short_factor, dtype, exponents.device)
            return 1.0 / (factors * base**exponents)
        if self.rope_type == "yarn":
            low, high = self._yarn_range()
            ramp = (torch.arange(R // 2, dtype=dtype, device=device) - low) / (high - low)
            kept = 1 - ramp.clamp(0, 1)
            periods = base**exponents
            return 1.0 / (self.factor * periods) * (1 - kept) + 1.0 / periods * kept
        f_J = 1.0 / (base**exponents)
        if self.rope_type == "linear":
            return f_J / self.factor
        if self.rope_type == "llama3":
            return self._llama3(f_J)
        return f_J

    def outgrown(self, length: int) -> bool:
        """Whether keys that were turned when the longest sequence had one token less are of no use at ``length``.

        So it is with longrope, once: where its other list begins, every angle changes. Dynamic's change at every step,
        but that method leaves the keys there are as they were.
        """
        return self.rope_type == "longrope" and length == self.original_max_position_embeddings + 1

    def table(
        self, positions_N: Tensor, *, max_position: int, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """``(cos_NJ, sin_NJ)``, each (N, J), on the device of ``positions_N`` (N,), int32 or int64.

        ``max_position``: the largest position of the batch, on the host. Dynamic and longrope choose their
        frequencies by it, once for the whole batch; the other types ignore it. In training it is a bound, a
        power of two less one: the same choice for longrope, whose contexts are powers of two, and for dynamic up
        to its context. ``dtype=torch.float64`` is for tests.
        Raises ValueError for positions of another shape or dtype.
        """
        if positions_N.ndim != 1:
            raise ValueError(f"rotary: positions have shape {tuple(positions_N.shape)}, expected (N,)")
        if positions_N.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rotary: positions have dtype {positions_N.dtype}, expected int32 or int64")
        f_J = self.frequencies(max_position=max_position, device=positions_N.device, dtype=dtype)
        angles_NJ = positions_N.to(dtype).unsqueeze(1) * f_J
        return angles_NJ.cos() * self.attention_factor, angles_NJ.sin() * self.attention_factor

    def _yarn_range(self) -> tuple[float, float]:
        """Between which pairs yarn passes from kept frequencies to divided ones."""
        R = self.channels

        def pair(turns: float) -> float:
            """The pair that makes so many turns over the original context."""
            period = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return R * math.log(period) / (2 * math.log(self.base))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, R - 1)
        return low, high + 0.001 if low == high else high

    def _llama3(self, f_J: Tensor) -> Tensor:
        """Pairs that turn often over the original context keep f, slow ones get f / factor, with a blend."""
        original = self.original_max_position_embeddings
        low, high = self.low_freq_factor, self.high_freq_factor
        wavelengths = 2 * math.pi / f_J
        slow = wavelengths > original / low
        divided = torch.where(slow, f_J / self.factor, f_J)
        smooth = (original / wavelengths - low) / (high - low)
        blended = (1 - smooth) * divided / self.factor + smooth * divided
        return torch.where(~(wavelengths < original / high) & ~slow, blended, divided)


def _flat_fields(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The rope dict of a model whose layers all turn alike, and what to call it in errors."""
    where = "rope_scaling" if _dict(config, "rope_scaling") else "rope_parameters"
    given = _dict(config, where)
    for name, value in given.items():
        if isinstance(value, dict):
            raise ValueError(f"rotary: {where} is nested by layer type ({name!r}), expected one dict")
    return where, given


def _layer_fields(config: dict[str, Any], layer_type: str) -> tuple[str, dict[str, Any]]:
    """One layer type's dict in ``rope_parameters``; flat ``rope_scaling`` is added to that of full layers."""
    if layer_type not in _LAYER_TYPES:
        raise ValueError(f"rotary: layer_type is {layer_type!r}, expected one of {tuple(_LAYER_TYPES)}")
    nested = _dict(config, "rope_parameters")
    for name in nested:
        if name not in _LAYER_TYPES:
            raise ValueError(f"rotary: unknown field {name!r} in rope_parameters, expected only {tuple(_LAYER_TYPES)}")
    given = dict(_dict(nested, layer_type))
    if layer_type == "full_attention":
        given |= _dict(config, "rope_scaling")
    return f"the rope fields of {layer_type}", given


def _dict(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"rotary: {name} is {value!r}, expected an object of rope fields")
    return value or {}


def _number(fields: dict[str, Any], name: str, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e30 < value < 1e30:
        raise ValueError(f"rotary: {name} is {value!r}, expected a finite number")
    return float(value)


def _numbers(fields: dict[str, Any], name: str) -> tuple[float, ...]:
    value = fields[name]
    if not isinstance(value, list | tuple):
        raise ValueError(f"rotary: {name} is {value!r}, expected a list of numbers")
    return tuple(_number({name: entry}, name, math.nan) for entry in value)


def _integer(fields: dict[str, Any], name: str) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"rotary: {name} is {value!r}, expected a whole number")
    return value


def _original(config: dict[str, Any], given: dict[str, Any]) -> int:
    """Length of the original context; Phi-3 keeps it beside the dict, and its class default is 4096."""
    name = "original_max_position_embeddings"
    if config.get(name) is not None:
        return _integer(config, name)
    if config.get("model_type") == "phi3":
        return 4096
    return _integer(given, name) if name in given else _integer(config, "max_position_embeddings")


def _yarn_attention(given: dict[str, Any], factor: float) -> float:
    if "attention_factor" in given:
        return _number(given, "attention_factor", 1.0)

    def scale(k: float) -> float:
        return 0.1 * k * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, all_dim = _number(given, "mscale", 0.0), _number(given, "mscale_all_dim", 0.0)
    return scale(mscale) / scale(all_dim) if mscale and all_dim else scale(1.0)


def _longrope_attention(config: dict[str, Any], given: dict[str, Any], original: int) -> float:
    if "attention_factor" in given:
        return _number(given, "attention_factor", 1.0)
    if "factor" in given:
        factor = _number(given, "factor", 1.0)
    else:
        factor = _integer(config, "max_position_embeddings") / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _from_host(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A device tensor of host numbers, which travel as kernel arguments.

    ``torch.tensor(values, device="cuda")`` copies from pageable memory: it waits for the device and cannot be
    captured.
    """
    out = torch.ones(len(values), dtype=dtype, device=device)
    torch._foreach_mul_(list(out.unbind()), list(values))  # pyright: ignore[reportPrivateImportUsage]
    return out
