"""The model families, one readable file each. Installed and imported as ``unsloth_core.models``."""

import importlib
from types import ModuleType
from typing import Any

if __name__ != "unsloth_core.models":
    # Imported as plain `models` too, every class here would exist twice, and isinstance would lie.
    raise ImportError(f"models: imported as {__name__!r}, expected 'unsloth_core.models'; import that")

# model_type of config.json -> the family file that computes it.
FAMILIES = {
    "falcon": "falcon",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
    "llama": "llama",
    "ministral": "mistral",
    "mistral": "mistral",
    "mixtral": "mistral",
    "phi3": "phi",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "qwen3_moe": "qwen",
}


def family_of(config: dict[str, Any]) -> ModuleType:
    """The family module for a raw ``config.json``. Raises ValueError naming the model types there are."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"config.json: model_type {model_type!r}, supported: {sorted(FAMILIES)}")
    return importlib.import_module(f"{__name__}.{FAMILIES[model_type]}")
