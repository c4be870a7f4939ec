"""A tiny random model as a folder of files: what ``uc.load`` and the command line read."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from safetensors.torch import save_file
from tiny import checkpoint_of, judge
from tokenizers import decoders, models, pre_tokenizers

START, END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}" + START + "{{ m.role }}\n{{ m.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}" + START + "assistant\n{% endif %}"
)  # fmt: skip


def write_folder(folder: Path, *, template: str | None = CHATML, **overrides: Any) -> Path:
    """A Llama of two layers over single bytes, with a ChatML template (or none)."""
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([START, END])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": END} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    checkpoint = checkpoint_of(judge("llama", **{"vocab_size": 258, "max_position_embeddings": 512, **overrides}))
    (folder / "config.json").write_text(json.dumps(checkpoint.config))
    save_file({name: t.cpu().contiguous() for name, t in checkpoint.tensors.items()}, folder / "model.safetensors")
    return folder
