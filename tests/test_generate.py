"""Generation: greedy equals transformers', sampling draws from the distribution it says, options are checked."""

import dataclasses
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import DEVICE
from tiny import VERSIONS, judge, ours

from unsloth_core import backend, random
from unsloth_core.generate import Sampler, generate, stream


class Letters:
    """A tokenizer whose token i is the character chr(32 + i)."""

    eos_ids: tuple[int, ...] = ()

    def encode(self, text, add_special_tokens=True):
        return [ord(c) - 32 for c in text]

    def decode(self, ids):
        return "".join(chr(32 + i) for i in ids)

    def decode_stream(self, ids):
        yield from (chr(32 + i) for i in ids)

    def apply_chat_template(self, messages, *, add_generation_prompt):
        assert add_generation_prompt
        return "".join(m["content"] for m in messages) + ">"


@pytest.fixture(scope="module")
def loaded():
    model_type, overrides = VERSIONS["llama-3.1"]
    hf = judge(model_type, **overrides)
    model, params = ours(hf)
    return hf, dataclasses.replace(model, tokenizer=Letters()), params


@pytest.fixture(autouse=True)
def _fast():
    with backend.using(None if DEVICE.type == "cuda" else "reference"):
        yield


def hf_greedy(hf, ids, count):
    out = hf.generate(torch.tensor([ids], device=DEVICE), max_new_tokens=count, do_sample=False)
    return out[0, len(ids) :].tolist()


def test_greedy_equals_transformers_for_a_batch_of_unequal_prompts(loaded):
    hf, model, params = loaded
    prompts = ["Hello", "a", "Why is it so?"]
    texts = generate(model, params, prompts, max_new_tokens=12)
    assert texts == [Letters().decode(hf_greedy(hf, Letters().encode(p), 12)) for p in prompts]


def test_messages_go_through_the_template_and_streaming_gives_the_same_text(loaded):
    _, model, params = loaded
    chat = [{"role": "user", "content": "Hi"}]
    (text,) = generate(model, params, [chat], max_new_tokens=9)
    assert text == generate(model, params, ["Hi>"], max_new_tokens=9)[0]
    assert "".join(stream(model, params, chat, max_new_tokens=9)) == text


def test_a_sequence_stops_at_its_end_token_and_the_others_go_on(loaded):
    _, model, params = loaded
    free = generate(model, params, ["Hello", "abc"], max_new_tokens=10)
    ending = Letters()
    ending.eos_ids = (ord(free[0][3]) - 32,)
    stopping = dataclasses.replace(model, tokenizer=ending)
    stopped = generate(stopping, params, ["Hello", "abc"], max_new_tokens=10)
    end = free[0][3]
    assert stopped == [text.split(end)[0] for text in free]


@given(st.integers(0, 1000), st.sampled_from([None, 1, 3, 50]), st.sampled_from([None, 0.2, 0.9, 1.0]))
def test_samples_stay_among_the_allowed_tokens(seed, top_k, top_p):
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(seed))
    chosen = Sampler(temperature=0.7, top_k=top_k, top_p=top_p, key=random.key(seed))(logits, step=seed)
    for row, token in zip(logits / 0.7, chosen.tolist(), strict=True):
        order = row.argsort(descending=True).tolist()[: top_k or 40]
        p = row[order].softmax(-1)
        allowed = [t for t, before in zip(order, (p.cumsum(-1) - p).tolist(), strict=True) if before < (top_p or 1.0)]
        assert token in allowed


def test_frequencies_are_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20000, 4)
    sample = Sampler(temperature=1.0, top_k=None, top_p=None, key=random.key(0))
    counts = torch.bincount(sample(logits, step=0), minlength=4) / 20000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.012, rtol=0)
    assert torch.equal(sample(logits, step=1), sample(logits, step=1))
    assert not torch.equal(sample(logits, step=1), sample(logits, step=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0}, "pass key=uc.random.key"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1, expected at least 0"),
    ],
)
def test_bad_options(loaded, options, message):
    _, model, params = loaded
    with pytest.raises(ValueError, match=message):
        generate(model, params, ["a"], **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error_and_no_text(loaded, temperature):
    _, model, params = loaded
    broken = dataclasses.replace(params, norm=torch.full_like(params.norm, float("nan")))
    with pytest.raises(ValueError, match="generate: logits of token 1 after prompt 0 are NaN"):
        generate(model, broken, ["a"], max_new_tokens=2, temperature=temperature, key=random.key(0))


def test_a_warning_where_the_context_ends(loaded):
    _, model, params = loaded
    context = model.config.max_position_embeddings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, params, ["ab"], max_new_tokens=4)
    with pytest.warns(UserWarning, match=f"exceed the model's context of {context} "):
        generate(model, params, ["ab"], max_new_tokens=context)


def test_prompts_without_tokens_and_models_without_tokenizer_are_refused(loaded):
    _, model, params = loaded
    with pytest.raises(ValueError, match="prompt '' has no tokens"):
        generate(model, params, [""])
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        generate(dataclasses.replace(model, tokenizer=None), params, ["a"])
    with pytest.raises(ValueError, match="generate: model is a Weights, expected a Model: model, params = "):
        generate(params, model, ["a"])
    with pytest.raises(ValueError, match="generate: prompts is the string 'ab', expected a list of prompts"):
        generate(model, params, "ab")
    for prompt in (3, {"role": "user", "content": "a"}):
        with pytest.raises(ValueError, match="generate: prompt is .*, expected a string or a list of messages"):
            generate(model, params, [prompt])
    assert generate(model, params, []) == [] and generate(model, params, ["a"], max_new_tokens=0) == [""]
