"""Tokenizers: ids and rendered conversations equal those of transformers, offsets tile the text, streamed text is
the decoded text, and hostile files and templates give one clear error."""

import itertools
import json
import random
from collections import Counter

import jinja2
import pytest
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from unsloth_core.tokenizer import Streamer, Tokenizer

CORPUS = [
    "Hello world, how are you? I'm fine; it's 2024 and 31415.",
    "def add(x, y):\n    return x + y\n\n\n",
    "Größe über naïve façade, 日本語のテキスト, 🙂🙃 emoji.",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "system user assistant tool <b>bold</b> & 'quotes' \"double\"",
]
SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
BOS_EOS = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
TEXTS = [*CORPUS, "", " ", "  a  b\t\n", "<|im_start|>user\nhi<|im_end|>\n", "x<s>y </s> z", "\u00a0é\u0301"]

texts = st.text(st.sampled_from("aeé日🙂 \n'1<|>") | st.characters(exclude_categories=["Cs"]), max_size=20)


def byte_level(post=None):
    """A small byte-level BPE, trained here."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if post is not None:
        backend.post_processor = post
    return backend


def folder_of(path, backend, config=None, **files):
    """A tokenizer folder; `files` maps names (with _ for the dot) to objects."""
    path.mkdir(parents=True, exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    if config is not None:
        files["tokenizer_config"] = config
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def reference(path):
    """transformers on the same folder."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(path)


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ours, transformers') of one folder."""
    path = folder_of(tmp_path_factory.mktemp("t") / "t", byte_level(BOS_EOS), NAMES)
    return Tokenizer.from_folder(path), reference(path)


# ---- ids and text ----


@given(text=texts)
def test_ids_and_text_as_transformers(pair, text):
    ours, theirs = pair
    for special in (True, False):
        assert ours.encode(text, special) == theirs.encode(text, add_special_tokens=special)
    ids = ours.encode(text)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_properties(pair):
    ours, theirs = pair
    assert ours.vocab_size == len(theirs) == 400
    assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (0, (1,), 2)
    assert ours.token_to_id("<|im_end|>") == 4 and ours.id_to_token(4) == "<|im_end|>"
    assert ours.token_to_id("no such token") is None and ours.chat_template is None


def test_half_a_surrogate_pair_is_no_text(pair):
    """JSON can spell it, so data files can hold it."""
    text = json.loads('"a \\ud83d b"')
    for encode in (pair[0].encode, pair[0].encode_with_offsets):
        with pytest.raises(ValueError, match=r"text has half a surrogate pair, '\\ud83d' at character 2: no Unicode"):
            encode(text)


@given(text=texts)
def test_offsets_tile_the_text(pair, text):
    ids, offsets = pair[0].encode_with_offsets(text)
    assert ids == pair[0].encode(text, add_special_tokens=False)
    covered = 0
    for start, end in offsets:
        assert start <= covered <= end  # equal to the last one inside a character of several tokens
        covered = end
    assert covered == len(text)


def test_a_trimming_post_processor_does_not_move_offsets(tmp_path):
    path = folder_of(tmp_path, byte_level(processors.ByteLevel(trim_offsets=True)), NAMES)
    _, offsets = Tokenizer.from_folder(path).encode_with_offsets("Hello world")
    assert offsets[-1][1] == 11 and [a for a, _ in offsets[1:]] == [b for _, b in offsets[:-1]]


def test_ids_around_a_text_whatever_the_vocabulary():
    vocab = {"<s>": 0, "</s>": 1, "hello": 2, "world": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), BOS_EOS])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("hello world") == [0, 2, 3, 1] and tokenizer.encode("") == [0, 1]


def test_stored_truncation_and_padding_are_cleared(tmp_path):
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    tokenizer = Tokenizer.from_folder(folder_of(tmp_path, backend, NAMES))
    assert tokenizer.encode("") == [] and len(tokenizer.encode("Hello world, how are you?")) > 5


def test_declared_tokens_exist(tmp_path):
    backend = byte_level()
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "special": True},
        "eos_token": "<new-eos>",
        "additional_special_tokens": ["<tool>", "<|im_end|>"],
        "image_token": "<image>",
        "added_tokens_decoder": {"400": {"content": "<think>", "special": False, "normalized": False}},
        "add_bos_token": True,  # tokenizer.json has the last word
    }
    path = folder_of(tmp_path, backend, config)
    ours, theirs = Tokenizer.from_folder(path), reference(path)
    text = "<s><think>hi</think><tool><image>x<new-eos>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    assert ours.token_to_id("<think>") == 400
    assert ours.eos_ids == (ours.token_to_id("<new-eos>"),) and ours.pad_id == ours.eos_ids[0]
    assert ours.special["image_token"] == "<image>"


def test_older_layout_and_generation_config(tmp_path):
    path = folder_of(tmp_path, byte_level(), {}, special_tokens_map=NAMES, generation_config={"eos_token_id": [4, 1]})
    assert Tokenizer.from_folder(path).eos_ids == (1, 4)
    folder_of(tmp_path, byte_level(), generation_config={"eos_token_id": 3})
    assert Tokenizer.from_folder(path).eos_ids == (1, 3)


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer_config": []}, "tokenizer_config.json: expected a JSON object, got list"),
        ({"tokenizer_config": {"bos_token": 3}}, "tokenizer_config.json: bos_token: expected a string"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "added_tokens_decoder: expected"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"7": {"content": "<s>"}}}},
            "'<s>': expected id 7, got 0",
        ),
        ({"tokenizer_config": {"extra_special_tokens": 3}}, "extra special tokens: expected a list of tokens, got 3"),
        ({"tokenizer_config": {"chat_template": 3}}, "chat_template: expected a string or a list"),
        (
            {"tokenizer_config": {"chat_template": [{"name": "default"}]}},
            "chat_template: expected a string or a",
        ),
        (
            {"generation_config": {"eos_token_id": 400}},
            r"end-of-text id is 400, expected an int in \[0, 400\)",
        ),
        ({"generation_config": {"eos_token_id": "x"}}, "end-of-text id is 'x'"),
    ],
)
def test_files_that_lie(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(folder_of(tmp_path, byte_level(), **files))


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="tokenizer.json: not a valid tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    folder_of(tmp_path, byte_level())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat template is not UTF-8"):
        Tokenizer.from_folder(tmp_path)


# ---- streaming ----


@given(text=texts)
def test_streamed_text_is_the_decoded_text(pair, text):
    ours, _ = pair
    ids = ours.encode(text)
    pieces = list(ours.decode_stream(ids))
    assert "".join(pieces) == ours.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_streaming_holds_back_half_a_character(pair):
    ours, _ = pair
    ids = ours.encode("🙃", add_special_tokens=False)
    streamer = Streamer(ours)
    assert len(ids) > 1 and [streamer.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🙃"]
    assert streamer.push(ids[0]) == "" and streamer.end() == "\ufffd" and streamer.end() == ""


# ---- conversations ----

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
    " + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have these functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message + eos_token }}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + call.name + '", ' + '"parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}" + eos_token }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- eos_token }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
TAGGED = (
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if m.role == 'assistant' %}"
    "<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n{% else %}"
    "<|im_start|>{{ m.role }} {{ ns.n }}\n{{ m.content }}<|im_end|>\n{% endif %}{% if ns.n > 9 %}{% break %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (  # rewrites earlier turns: only the last reply keeps its reasoning
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last and m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EVERYTHING = (
    "{{ messages | tojson }}{{ tools | tojson(ensure_ascii=true, indent=2) }}{{ documents }}{{ bos_token }}"
    "{{ pad_token }}{{ extra | default('none') }}{{ dict(a=1)['a'] }}{{ strftime_now('%Y') }}"
    "{{ messages[0].thinking }}{{ messages | map(attribute='role') | list }}{{ 1 == 1.0 }}{{ unset_token }}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "zephyr": ZEPHYR,
    "mistral": MISTRAL,
    "tagged": TAGGED,
    "thinking": THINKING,
    "everything": EVERYTHING,
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "f<b>", "description": "It's & größer", "parameters": {"type": "object"}},
    }
]
TALK = [
    {"role": "user", "content": "What's <b>2+2</b>?  \n"},
    {"role": "assistant", "content": "4 & größer 🙂", "tool_calls": None},
    {"role": "user", "content": " Thanks"},
    {"role": "assistant", "content": "Bye", "reasoning": "They leave."},
]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "<1>"}}}
TALKS = {
    "talk": TALK,
    "question": TALK[:3],
    "system": [{"role": "system", "content": "Be short."}, *TALK],
    "tools": [
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": [1]},
    ],
}


# What transformers 5.23 does to messages before it renders them; 5.17 rendered them as they came.
JUDGE_TIDIES = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)


def tidied(message):
    message = {key: value for key, value in message.items() if value is not None}
    if "reasoning" in message:
        message = {"thinking": message["reasoning"], **message, "reasoning_content": message["reasoning"]}
    return message


def with_template(template, **more):
    return Tokenizer(byte_level(), special=NAMES, templates={"default": template, **more}, source="here")


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendered_as_transformers_does(pair, name):
    ours, theirs = with_template(TEMPLATES[name]), pair[1]
    cases = itertools.product(
        TALKS.values(), (None, TOOLS), ({}, {"add_generation_prompt": True}, {"extra": [1], "pad_token": "<own>"})
    )
    for talk, tools, options in cases:
        options = {**options, "tools": tools}
        given = talk if JUDGE_TIDIES else [tidied(message) for message in talk]
        try:
            expected = theirs.apply_chat_template(given, chat_template=TEMPLATES[name], tokenize=False, **options)
        except (jinja2.TemplateError, TypeError):
            with pytest.raises(ValueError, match="chat template failed"):
                ours.apply_chat_template(talk, **options)
        else:
            assert ours.apply_chat_template(talk, **options) == expected


def test_templates_by_name_and_place(tmp_path):
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    path = folder_of(tmp_path, byte_level(), {**NAMES, "chat_template": named})

    def render():
        ours, theirs = Tokenizer.from_folder(path), reference(path)
        got = tuple(ours.apply_chat_template(TALK, tools=tools) for tools in (None, TOOLS))
        expected = (theirs.apply_chat_template(TALK, tools=t, tokenize=False) for t in (None, TOOLS))
        assert got == tuple(expected)
        return got

    assert render() == ("d", "t")
    (path / "chat_template.jinja").write_text("file")  # files beat the config
    assert render() == ("file", "file") and Tokenizer.from_folder(path).chat_template == "file"
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("file t")
    assert render() == ("file", "file t")


def test_spans_of_generation_tags_as_transformers(pair):
    ours, theirs = with_template(TAGGED), pair[1]
    text, spans = ours.render_with_spans(TALKS["system"])
    assert [text[a:b] for a, b in spans] == ["4 & größer 🙂<|im_end|>", "Bye<|im_end|>"]
    expected = theirs.apply_chat_template(
        TALKS["system"], chat_template=TAGGED, return_assistant_tokens_mask=True, return_dict=True
    )
    ids, offsets = ours.encode_with_offsets(text)
    mask = [int(any(a < end and start < b for a, b in spans)) for start, end in offsets]
    assert (ids, mask) == (expected["input_ids"], expected["assistant_masks"])


@pytest.mark.parametrize(
    "name, replies",
    [
        ("chatml", ["4 & größer 🙂<|im_end|>\n", "Bye<|im_end|>\n"]),
        ("llama3", ["4 & größer 🙂</s>", "Bye</s>"]),
        ("zephyr", ["4 & größer 🙂</s>", "Bye</s>"]),
        ("mistral", ["4 & größer 🙂</s>", "Bye</s>"]),
    ],
)
def test_spans_by_prefixes(name, replies):
    ours = with_template(TEMPLATES[name])
    text, spans = ours.render_with_spans(TALK)
    assert text == ours.apply_chat_template(TALK) and [text[a:b] for a, b in spans] == replies
    assert ours.render_with_spans(TALK[:1])[1] == []


def test_the_newline_after_the_end_token_is_not_the_assistants():
    backend = byte_level()
    ours = Tokenizer(backend, special={"eos_token": "<|im_end|>"}, templates={"default": CHATML})
    text, spans = ours.render_with_spans(TALK)
    assert [text[a:b] for a, b in spans] == ["4 & größer 🙂<|im_end|>", "Bye<|im_end|>"]


def test_spans_need_prefixes_that_stay():
    ours = with_template(THINKING)
    with pytest.raises(ValueError, match="here: cannot tell which text the assistant wrote in message 1: the chat"):
        ours.render_with_spans([TALK[0], {**TALK[1], "reasoning": "Sum."}, *TALK[2:]])
    text, spans = ours.render_with_spans(TALK)  # only the last turn reasons: nothing is rewritten
    assert text[spans[1][0] :] == "<think>They leave.</think>Bye<|im_end|>\n"


def test_spans_inside_a_macro_are_refused():
    macro = "{% macro say(m) %}: {% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
    with pytest.raises(ValueError, match="generation tag inside a macro or block"):
        with_template(macro + "{% for m in messages %}{{ say(m) }}{% endfor %}").render_with_spans(TALK)


def test_messages_are_not_changed():
    messages = [{"role": "user", "content": "a", "reasoning": "b", "tool_calls": None}]
    before = json.dumps(messages)
    with_template(EVERYTHING).apply_chat_template(messages)
    assert json.dumps(messages) == before


HOSTILE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace(__init__=1) }}",
    "{{ dict.__subclasses__() }}",
    "{{ range(10000000) | list }}",
    "{% import 'os' as os %}",
    "{% include 'secret' %}",
    "{{ open('x') }}",
]
BROKEN = [
    "{% for %}",
    "{{ 1 / 0 }}",
    "{{ messages[0].content + 1 }}",
    "{{ nothing.at.all }}",
    "{% generation %}x",
]


@pytest.mark.parametrize("template", [*HOSTILE, *BROKEN])
def test_a_template_that_misbehaves(template):
    with pytest.raises(ValueError, match="here: the default chat template failed: "):
        with_template(template).apply_chat_template(TALK)


def test_what_a_template_may_not_get():
    render = with_template("{{ messages[0].content }}").apply_chat_template
    with pytest.raises(ValueError, match=r"messages\[0\]: expected JSON values"):
        render([{"role": "user", "content": object()}])
    with pytest.raises(ValueError, match=r"messages\[0\]: expected a dict, got str"):
        render(["hi"])
    with pytest.raises(ValueError, match=r"tools: expected JSON schemas \(dicts\), got function"):
        render(TALK, tools=[lambda x: x])


def test_no_template(pair):
    with pytest.raises(ValueError, match="expected a default chat template, got none"):
        pair[0].apply_chat_template(TALK)
    with pytest.raises(ValueError, match=r"got only templates named \['rag'\]"):
        Tokenizer(byte_level(), templates={"rag": "x"}).render_with_spans(TALK)


# ---- GGUF ----

PRE = {  # names in GGUF, and the pipeline of the published tokenizer.json
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}
SPLITS = {
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
for _name, _regex in SPLITS.items():
    PRE[_name] = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(_regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def gguf_metadata(backend, name, **more):
    """What the converter writes for a byte-level tokenizer."""
    vocab = sorted(backend.get_vocab(), key=backend.token_to_id)
    model = json.loads(backend.to_str())["model"]
    types = [3 if token in SPECIAL else 1 for token in vocab]
    values = {
        "model": "gpt2",
        "pre": name,
        "tokens": [*vocab, "[PAD400]", "<think>"],
        "token_type": [*types, 5, 4],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "eot_token_id": 4,
        "padding_token_id": 2,
        **more,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None} | {"tokenizer.chat_template": CHATML}


@pytest.mark.parametrize("pre", PRE)
def test_byte_level_from_gguf(pre):
    backend = byte_level()
    backend.pre_tokenizer = PRE[pre]
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    rebuilt = Tokenizer.from_gguf(gguf_metadata(backend, pre))
    bos = [0] if pre in ("llama-bpe", "tekken") else []
    for text in [*TEXTS, "HTTPServer's 12345 getURL/\n\n  x e\u0301"]:
        expected = backend.encode(text, add_special_tokens=False).ids
        assert rebuilt.encode(text, add_special_tokens=False) == expected
        assert rebuilt.encode(text) == bos + expected
        assert rebuilt.decode(expected, False) == backend.decode(expected, skip_special_tokens=False)
    assert rebuilt.encode("<think>")[-1] == 401 == rebuilt.token_to_id("<think>")
    assert rebuilt.token_to_id("[PAD400]") is None and rebuilt.vocab_size == 402
    assert (rebuilt.bos_id, rebuilt.eos_ids, rebuilt.pad_id) == (0, (1, 4), 2)
    assert rebuilt.special == NAMES and rebuilt.apply_chat_template(TALK).startswith("<|im_start|>user\n")


def test_flags_of_gguf():
    metadata = gguf_metadata(byte_level(), "gpt-2", add_bos_token=True, add_eos_token=True)
    assert Tokenizer.from_gguf(metadata).encode("") == [0, 1]
    metadata = gguf_metadata(byte_level(), "llama-bpe", add_bos_token=False)
    assert Tokenizer.from_gguf(metadata).encode("") == []


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"pre": "unheard-of"},
            NotImplementedError,
            "tokenizer.ggml.pre is 'unheard-of', supported: .*smollm",
        ),
        ({"model": "t5"}, NotImplementedError, "tokenizer.ggml.model is 't5', supported: gpt2, llama"),
        ({"model": 3}, ValueError, "tokenizer.ggml.model: expected str, got int"),
        ({"tokens": None}, ValueError, "tokenizer.ggml.tokens: expected an array of str, got none"),
        ({"tokens": "abc"}, ValueError, "tokenizer.ggml.tokens: expected list, got str"),
        (
            {"tokens": ["a", "b", "a"], "token_type": None},
            ValueError,
            "expected distinct tokens, got 'a' at 0 and 2",
        ),
        ({"token_type": [1]}, ValueError, "token_type: expected 402 entries, one per token, got 1"),
        (
            {"merges": ["a b c"]},
            ValueError,
            "merges: expected pairs of tokens whose join is a token, got 'a b c'",
        ),
        ({"merges": [1]}, ValueError, "merges: expected an array of str"),
        ({"bos_token_id": 402}, ValueError, r"bos_token_id: expected an id in \[0, 402\), got 402"),
        ({"model": "llama"}, ValueError, "scores: expected a number per token, got none"),
        ({"model": "llama", "scores": [float("nan")] * 402}, ValueError, "scores: expected a .* got NaN"),
    ],
)
def test_metadata_that_lies(change, error, message):
    with pytest.raises(error, match=message):
        Tokenizer.from_gguf(gguf_metadata(byte_level(), "gpt-2", **change), source="m.gguf")


def sentencepiece_vocab():
    """A scored vocabulary: pieces by frequency, better ones with higher scores, as in sentencepiece's BPE."""
    counts = Counter()
    for text in CORPUS[:4]:
        text = "▁" + text.replace(" ", "▁")
        for size in range(2, 6):
            counts.update(text[i : i + size] for i in range(len(text) - size + 1))
    pieces = [piece for piece, _ in counts.most_common(150)]
    # Like a trained vocabulary: every piece can be reached by joins, and no two scores are equal.
    reachable = sorted(set("".join(CORPUS[:2])) - set(" ") | {"▁"})
    known = set(reachable)
    for piece in sorted(pieces, key=len):
        if any(piece[:k] in known and piece[k:] in known for k in range(1, len(piece))):
            known.add(piece)
    joined = [piece for piece in pieces if piece in known and len(piece) > 1]
    random.Random(0).shuffle(joined)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *joined, *reachable]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(joined) + len(reachable))]
    scores = [0.0, 0.0, 0.0, *[0.0] * 256, *(float(-i) for i in range(len(joined) + len(reachable)))]
    return tokens, types, scores


def sentencepiece_encode(text, tokens, scores):
    """The algorithm itself: join the neighbours whose join has the best score, leftmost first."""
    vocab = {token: i for i, token in enumerate(tokens)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joins = [(scores[vocab[a + b]], -i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in vocab]
        if not joins:
            break
        at = -max(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    ids = []
    for part in parts:
        ids += [vocab[part]] if part in vocab else [vocab[f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids


def test_sentencepiece_from_gguf():
    tokens, types, scores = sentencepiece_vocab()
    values = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    tokenizer = Tokenizer.from_gguf(metadata)
    for text in [*CORPUS, "the fox jumps", "  two  blanks ", "日本 🙂", "dog\n\tfox"]:
        ids = sentencepiece_encode(text, tokens, scores)
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert "".join(tokenizer.decode_stream(tokenizer.encode(text))) == text
    assert (
        tokenizer.encode("a</s>")[-1] == 2 and tokenizer.eos_ids == (2,) and tokenizer.special["unk_token"] == "<unk>"
    )
    without = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.add_space_prefix": False})
    assert (
        without.encode("fox", False) != tokenizer.encode("fox", False) and without.decode(without.encode(" x")) == " x"
    )
