"""The text model inside a multimodal checkpoint, as if it had been published alone; the other parts stay unread."""

import dataclasses
import re
from typing import Any

from torch import Tensor

from unsloth_core.hub import Checkpoint
from unsloth_core.tokenizer import Tokenizer

# model_type of the container -> that of its text model, where the file does not say.
CONTAINERS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
# Both spellings of transformers 4 and 5: (prefix in the checkpoint, prefix of the text model alone).
_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
_OTHER_PARTS = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


@dataclasses.dataclass(frozen=True)
class TextPart:
    """A checkpoint's text model behind the interface of :class:`unsloth_core.hub.Checkpoint`."""

    whole: Checkpoint
    config: dict[str, Any]
    stored: dict[str, str]  # name of the text model alone -> name in the checkpoint

    @property
    def source(self) -> str:
        """What was opened, for messages."""
        return self.whole.source

    @property
    def generation_config(self) -> dict[str, Any]:
        """That of the checkpoint."""
        return self.whole.generation_config

    @property
    def names(self) -> list[str]:
        """Names of the text model's tensors, sorted."""
        return sorted(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self.whole.shape(self.stored[name])

    def dtype(self, name: str) -> Any:
        """Data type of a tensor, without reading it."""
        return self.whole.dtype(self.stored[name])

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        return self.whole.tensor(self.stored[name])

    def tokenizer(self) -> Tokenizer:
        """That of the checkpoint."""
        return self.whole.tokenizer()


def text_part(checkpoint: Checkpoint) -> Checkpoint:
    """The text model of a multimodal checkpoint; any other checkpoint as it is.

    Raises ValueError for a container without a text model, and for two tensors that would have one name.
    """
    config = text_config(checkpoint.config, checkpoint.source)
    if config is checkpoint.config:
        return checkpoint
    stored: dict[str, str] = {}
    for name in checkpoint.names:
        if _OTHER_PARTS.match(name):
            continue
        alone = next((new + name.removeprefix(old) for old, new in _PREFIXES if name.startswith(old)), name)
        if alone in stored:
            raise ValueError(f"{checkpoint.source}: {name} and {stored[alone]} are one tensor of the text model")
        stored[alone] = name
    return TextPart(checkpoint, config, stored)


def text_config(outer: dict[str, Any], source: str) -> dict[str, Any]:
    """config.json of the text model inside a multimodal one; any other as it is. Raises ValueError without one."""
    model_type = outer.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONTAINERS:
        return outer
    inner = outer.get("text_config")
    if not isinstance(inner, dict):
        raise ValueError(f"{source}: text_config of a {model_type} model is {inner!r}, expected an object")
    # What the container says about all of its parts.
    shared = {name: outer[name] for name in ("tie_word_embeddings", "quantization_config") if name in outer}
    return {"model_type": CONTAINERS[model_type], **shared, **inner}
