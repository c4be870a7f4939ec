"""Reading ``config.json`` strictly: every field is handled, known to be harmless, or refused by name."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Fields that say nothing about the function the model computes (quantization_config: about its storage, see load.py).
IGNORED = frozenset(
    """
    _name_or_path architectures auto_map bos_token_id dtype eos_token_id initializer_range is_llama_config
    model_type pad_token_id pretraining_tp quantization_config torch_dtype transformers.js_config
    transformers_version unsloth_fixed unsloth_version use_cache
    """.split()
)
# Read by Rotary.from_hf, in both spellings (facts of transformers 4 and 5).
ROTARY = frozenset("rope_theta rope_scaling rope_parameters partial_rotary_factor rope_local_base_freq".split())
_REQUIRED = object()
MOST = 1024  # layers, or experts of one: published are 126 and 512


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of ``count`` experts, ``top_k`` of them for a token, and what their balance adds to the loss."""

    count: int
    top_k: int
    renormalise: bool  # whether the weights of a token's experts are made to sum to 1
    balance_coefficient: float  # router_aux_loss_coef, or 0 where output_router_logits is off

    @property
    def routing(self) -> dict[str, Any]:
        """Options of the op ``route``."""
        return {"top_k": self.top_k, "renormalise": self.renormalise}


class ConfigReader:
    """Hands out the fields of a raw ``config.json``, remembers which, and :meth:`finish` refuses the others.

    Every method raises ValueError, with the field's name, for a value that is not what it hands out."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self._where = f"config.json (model_type {raw.get('model_type')!r})"
        self._taken: set[str] = {*IGNORED, *ROTARY}

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The field, or the default when it is absent or null; without a default ValueError."""
        self._taken.add(name)
        value = self.raw.get(name)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self._where}: field {name!r} is missing")
            return default
        return value

    def size(self, name: str, default: Any = _REQUIRED, *, least: int = 1, most: int = 2**31 - 1) -> int:
        """An integer field, positive unless ``least`` says otherwise."""
        value = self.take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise ValueError(f"{self._where}: field {name!r} is {value!r}, expected {expected}")
        if value > most:
            raise ValueError(f"{self._where}: field {name!r} is {value}, expected at most {most}")
        return value

    def layers(self, default: int) -> int:
        """``num_hidden_layers``, so many that a list of their names fits into memory."""
        return self.size("num_hidden_layers", default, most=MOST)

    def number(self, name: str, default: Any = _REQUIRED) -> float:
        """A finite number above zero."""
        value = self.take(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"{self._where}: field {name!r} is {value!r}, expected a number above zero")
        return float(value)

    def number_or_null(self, name: str, default: float | None) -> float | None:
        """A number above zero, where null means none and only an absent field means the default."""
        if self.raw.get(name, default) is None:
            return self.take(name, None)
        return self.number(name, default)

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """True or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self._where}: field {name!r} is {value!r}, expected true or false")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """A field that may only have one of these values (or be absent or null)."""
        value = self.take(name, None)
        if value is not None and value not in allowed:
            raise ValueError(f"{self._where}: field {name!r} is {value!r}, supported: {list(allowed)}")

    def kv_heads(self, heads: int, default: int, *, name: str = "num_key_value_heads") -> int:
        """How many key/value heads there are, each shared by equally many of ``heads``."""
        kv_heads = self.size(name, default)
        if heads % kv_heads:
            raise ValueError(f"{self._where}: {heads} heads cannot share {kv_heads} key/value heads")
        return kv_heads

    def window(self, default: int | None) -> int | None:
        """``sliding_window``, where null means none and only an absent field means the default."""
        if self.raw.get("sliding_window", default) is None:
            return self.take("sliding_window", None)
        return self.size("sliding_window", default)

    def windows(self, window: int | None, sliding: Sequence[bool]) -> tuple[int | None, ...]:
        """Per layer, the window or None; ``sliding`` says which layers have one where ``layer_types`` does not."""
        names = ("sliding_attention", "full_attention")
        given = self.take("layer_types", [names[0] if slides else names[1] for slides in sliding])
        if not isinstance(given, list) or len(given) != len(sliding) or not all(name in names for name in given):
            expected = f"{len(sliding)} entries of {names}"
            raise ValueError(f"{self._where}: field 'layer_types' is {given!r}, expected {expected}")
        if window is None and names[0] in given:
            raise ValueError(f"{self._where}: field 'layer_types' has sliding layers, but there is no sliding_window")
        return tuple(window if name == names[0] else None for name in given)

    def experts(self, count: int, *, top_k: int, renormalise: bool | None = None) -> Experts:
        """The mixture, with the class defaults given; ``renormalise`` is read from the file unless given here.

        How many there are has two names: publishers write one or the other, transformers 5 always the first.
        """
        name = "num_local_experts" if "num_local_experts" in self.raw else "num_experts"
        coefficient = self.take("router_aux_loss_coef", 0.001) and self.number("router_aux_loss_coef", 0.001)
        found = Experts(
            count=self.size(name, count, most=MOST),
            top_k=self.size("num_experts_per_tok", top_k),
            renormalise=self.flag("norm_topk_prob", False) if renormalise is None else renormalise,
            balance_coefficient=float(coefficient) if self.flag("output_router_logits", False) else 0.0,
        )
        if found.top_k > found.count:
            raise ValueError(f"{self._where}: {found.top_k} experts per token of {found.count} ({name!r})")
        return found

    def layers_among(self, name: str, layers: int) -> list[int]:
        """A list of some layers' indices; default none."""
        value = self.take(name, [])
        if not isinstance(value, list) or not all(type(i) is int and 0 <= i < layers for i in value):
            raise ValueError(f"{self._where}: field {name!r} is {value!r}, expected indices of {layers} layers")
        return value

    def finish(self) -> None:
        """Raises ValueError naming the fields that were neither read nor known to be harmless."""
        if unknown := sorted(set(self.raw) - self._taken):
            raise ValueError(f"{self._where}: fields that no one handles: {', '.join(unknown)}")


def letters(config: Any) -> dict[str, int]:
    """The letters of the weight declarations, for a decoder's config."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return {
        "D": config.hidden_size, "F": config.intermediate_size, "L": config.num_hidden_layers, "V": config.vocab_size,
        "H": heads, "G": kv_heads, "K": size, "Q": heads * size, "R": kv_heads * size,
    }  # fmt: skip
