"""Text from a model: prefill all prompts as one packed buffer, then one token per sequence and step from a static
cache."""

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import random
from .cache import Cache
from .models.decoder import Model, head_logits, hidden_cached
from .segments import Segments

Prompt = str | list[dict[str, Any]]


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Tensor | None = None,
) -> list[str]:
    """Continue every prompt until its end token or ``max_new_tokens``; the new text only.

    A prompt is a string (continued as it stands) or a list of chat messages (rendered with the model's template).
    Greedy at ``temperature=0``; otherwise temperature, then ``top_k``, then ``top_p`` (smallest set of at least
    that mass), drawn with ``key`` (needed then). The cache holds ``max_new_tokens`` from the start; where they pass the
    model's context a warning says so, and generation goes on. Raises ValueError for an empty prompt, for options
    out of range, and when logits are NaN."""
    if isinstance(prompts, str):  # a sequence of prompts of one letter
        raise ValueError(f"generate: prompts is the string {prompts[:40]!r}, expected a list of prompts")
    ids = [encode_prompt(model, prompt) for prompt in prompts]
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, key=key)
    new: list[list[int]] = [[] for _ in ids]
    for step in _steps(model, params, ids, max_new_tokens, sampler):
        for tokens, token in zip(new, step, strict=True):
            if token is not None:
                tokens.append(token)
    return [_tokenizer(model).decode(tokens) for tokens in new]


def stream(
    model: Model,
    params: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Tensor | None = None,
) -> Iterator[str]:
    """Like :func:`generate` for one prompt, piece by piece as text becomes whole (a character may take several
    tokens)."""
    tokenizer = _tokenizer(model)
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, key=key)
    steps = _steps(model, params, [encode_prompt(model, prompt)], max_new_tokens, sampler)
    yield from tokenizer.decode_stream(step[0] for step in steps if step[0] is not None)


def encode_prompt(model: Model, prompt: Prompt) -> list[int]:
    """Token ids of a prompt; chat messages are rendered with the generation prompt appended.

    Raises ValueError for a prompt without tokens, or that is neither text nor messages."""
    tokenizer = _tokenizer(model)
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    elif not isinstance(prompt, Sequence):
        raise ValueError(f"generate: prompt is {str(prompt)[:60]}, expected a string or a list of messages")
    else:
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ValueError(f"generate: prompt {prompt!r} has no tokens")
    return ids


class Sampler:
    """Logits (B, V) to token ids (B,); the same key and step give the same draw on every device."""

    def __init__(self, *, temperature: float, top_k: int | None, top_p: float | None, key: Tensor | None) -> None:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"generate: temperature is {temperature}, expected 0 (greedy) or a number above it")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k is {top_k}, expected at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"generate: top_p is {top_p}, expected 0 < top_p <= 1")
        if temperature > 0 and key is None:
            raise ValueError("generate: temperature > 0 draws at random: pass key=uc.random.key(seed)")
        self.temperature, self.top_k, self.top_p, self.key = temperature, top_k, top_p, key

    def __call__(self, logits_BV: Tensor, step: int) -> Tensor:
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        sorted_BV, ids_BV = (logits_BV.float() / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            sorted_BV, ids_BV = sorted_BV[:, : self.top_k], ids_BV[:, : self.top_k]
        p_BV = sorted_BV.softmax(-1)
        if self.top_p is not None:
            before_BV = p_BV.cumsum(-1) - p_BV  # the mass in front of a token decides; the first always stays
            p_BV = torch.where(before_BV < self.top_p, p_BV, 0.0)
        cumulative_BV = p_BV.cumsum(-1)
        assert self.key is not None
        generator = random.generator(random.fold_in(self.key.cpu(), step))
        u_B1 = torch.rand(len(logits_BV), 1, generator=generator).to(logits_BV.device)
        choice_B1 = torch.searchsorted(cumulative_BV, u_B1 * cumulative_BV[:, -1:], right=True)
        last_B1 = ((p_BV > 0).sum(-1, keepdim=True) - 1).clamp(min=0)  # u·total may round up to the total; NaN: none
        return ids_BV.gather(-1, torch.minimum(choice_B1, last_B1)).squeeze(-1)


@torch.no_grad()
def _steps(
    model: Model, params: Any, ids: list[list[int]], max_new_tokens: int, sampler: Sampler
) -> Iterator[list[int | None]]:
    """One new token per sequence and step, None for those that have ended."""
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens}, expected at least 0")
    if not max_new_tokens or not ids:
        return
    cfg, device, dtype = model.config, params.norm.device, params.embed.dtype
    lengths = [len(tokens) for tokens in ids]
    capacity = max(lengths) + max_new_tokens
    if capacity > cfg.max_position_embeddings:
        warnings.warn(
            f"generate: {max(lengths)} tokens of prompt and up to {max_new_tokens} new ones exceed the model's context "
            f"of {cfg.max_position_embeddings} (max_position_embeddings); text beyond it may make no sense",
            stacklevel=3,
        )
    one_each = Segments.uniform(len(ids), 1, device)
    ends, done = set(_tokenizer(model).eos_ids), [False] * len(ids)
    ropes = {model.family.spec(cfg, i).rope for i in range(cfg.num_hidden_layers)}
    sequences = [list(tokens) for tokens in ids]  # and what followed, also after an end token
    for step in range(max_new_tokens):
        length = max(lengths) + step
        if step == 0 or any(rope.outgrown(length) for rope in ropes):  # the cache is empty, or no longer true
            cache = Cache.empty(
                cfg.num_hidden_layers, len(ids), capacity, cfg.num_key_value_heads, cfg.head_dim, dtype=dtype,
                device=device,
            )  # fmt: skip
            tokens_N, positions_N, q_segments = _packed(sequences, device)
            last_B = q_segments.ends_S - 1
        # The length of now, not the capacity: long-context rotations depend on it, and text would on max_new_tokens.
        x_ND, cache = hidden_cached(
            model.family, params, tokens_N, positions_N, q_segments, cache, max_position=length - 1
        )
        logits_BV = head_logits(params, x_ND[last_B])
        # -1 where there is no number to choose by: seen with the ids on the host, so it costs no wait of its own
        tokens_N = torch.where(logits_BV.isnan().any(-1), -1, sampler(logits_BV, step))
        new: list[int | None] = []
        for i, token in enumerate(tokens_N.tolist()):
            if token < 0:
                raise ValueError(
                    f"generate: logits of token {step + 1} after prompt {i} are NaN: weights or adapter are damaged, "
                    f"or {dtype} is too narrow for this model"
                )
            sequences[i].append(token)
            done[i] = done[i] or token in ends
            new.append(None if done[i] else token)
        yield new
        if all(done):
            return
        positions_N, q_segments, last_B = cache.lengths_B.long(), one_each, torch.arange(len(ids), device=device)


def _packed(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Segments]:
    """Tokens and positions of whole sequences, one behind the other, and their segments."""
    lengths = [len(tokens) for tokens in sequences]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    tokens_N = torch.tensor([t for tokens in sequences for t in tokens], device=device)
    positions_N = torch.cat([torch.arange(n) for n in lengths]).to(device)
    return tokens_N, positions_N, Segments.packed(cu, max_len=max(lengths))


def _tokenizer(model: Model) -> Any:
    if not isinstance(model, Model):
        got = f"a {type(model).__name__}"
        raise ValueError(f"generate: model is {got}, expected a Model: model, params = uc.load(...)")
    if model.tokenizer is None:
        raise ValueError(
            "generate: this model has no tokenizer; load one with the model, or call model.logits yourself"
        )
    return model.tokenizer
