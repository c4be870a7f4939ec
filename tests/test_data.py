"""Packing, targets, masks by character offsets, formats, errors with their place, resuming."""

import json
import sys
import types
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import DEVICE
from tokenizers import decoders, models, pre_tokenizers, trainers

import unsloth_core.data as data
from unsloth_core import tree
from unsloth_core.tokenizer import Tokenizer


class Pairs:
    """A tokenizer small enough to check by eye: a special word, two small letters, or one byte is a token.

    Pairs of letters straddle span boundaries, and the bytes of one character share its offsets, as in a real one.
    """

    SPECIAL = ("<bos>", "<eos>", "<user>", "<assistant>", "<end>")
    vocab_size, bos_id, eos_ids = 300 + 26 * 26, 256, (257, 260)

    def encode(self, text):
        return [self.bos_id, *self.encode_with_offsets(text)[0]]

    def encode_with_offsets(self, text):
        ids, offsets, at = [], [], 0
        while at < len(text):
            special = next((k for k, word in enumerate(self.SPECIAL) if text.startswith(word, at)), None)
            pair = text[at : at + 2]
            if special is not None:
                found, width = [256 + special], len(self.SPECIAL[special])
            elif len(pair) == 2 and pair.isascii() and pair.isalpha() and pair.islower():
                found, width = [300 + 26 * (ord(pair[0]) - 97) + ord(pair[1]) - 97], 2
            else:
                found, width = list(text[at].encode()), 1
            ids += found
            offsets += [(at, at + width)] * len(found)
            at += width
        return ids, offsets

    def render_with_spans(self, messages, *, tools=None):
        text, spans = "<bos>", []
        for message in messages:
            head = f"<{'assistant' if message['role'] == 'assistant' else 'user'}>"
            body = str(message.get("content") or message.get("tool_calls")) + "<end>"
            if message["role"] == "assistant":
                spans.append((len(text) + len(head), len(text) + len(head) + len(body)))
            text += head + body + "\n"
        return text, spans


TOKENIZER = Pairs()
EXAMPLES = Path(__file__).parents[1] / "examples" / "captains_log.jsonl"
CHARACTERS = st.text(st.sampled_from("abcxyz ABC.é漢🙂\n"), max_size=12)


def chat(*turns):
    return {"messages": [{"role": r, "content": c} for r, c in turns]}


def assert_same(a, b):
    assert tree.flatten(a)[1] == tree.flatten(b)[1]
    for (path, x), y in zip(tree.items(a), tree.leaves(b)):
        assert x.dtype == y.dtype and torch.equal(x, y), path


def segments_of(batch):
    """(ids, trained) of every segment that is not empty, read back out of a batch."""
    N = len(batch.tokens_N)
    trained = torch.zeros(N + 1, dtype=torch.bool)
    rows = batch.target_rows_M[batch.target_rows_M < N]
    trained[rows + 1] = True
    bounds = zip(batch.segments.starts_S.tolist(), batch.segments.ends_S.tolist())
    return [(batch.tokens_N[a:b].tolist(), trained[a:b].tolist()) for a, b in bounds if a < b]


def check_batch(batch):
    """What holds for every batch, from the definition of a target alone."""
    N = len(batch.tokens_N)
    segment = torch.full((N,), -1)
    previous = 0
    for s, (a, b) in enumerate(zip(batch.segments.starts_S.tolist(), batch.segments.ends_S.tolist())):
        assert a == previous and a <= b and b - a <= batch.max_len
        assert batch.positions_N[a:b].tolist() == [i % batch.max_position for i in range(b - a)]
        segment[a:b], previous = s, b
    assert previous == N and int(batch.positions_N.max()) < batch.max_position
    rows, targets = batch.target_rows_M.tolist(), batch.targets_M.tolist()
    real = [(r, t) for r, t in zip(rows, targets) if r < N]
    assert rows[: len(real)] == sorted({r for r, _ in real}) and set(rows[len(real) :]) <= {N}
    assert set(targets[len(real) :]) <= {data.IGNORE} and int(batch.count) == len(real)
    for row, target in real:
        assert target == batch.tokens_N[row + 1] and segment[row] == segment[row + 1]


EXAMPLE = st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=20)


@given(examples=st.lists(EXAMPLE, min_size=1, max_size=6), spare=st.integers(0, 9))
def test_a_batch_says_what_its_examples_say(examples, spare):
    pairs = [tuple(map(list, zip(*e))) for e in examples]
    N = sum(map(len, examples)) + spare
    batch = data.Batch.of(pairs, vocab_size=100, tokens=N, segments=8)
    check_batch(batch)
    assert len(batch.tokens_N) == N and len(batch.segments.starts_S) == 8
    expected = [(ids, [False, *mask[1:]]) for ids, mask in pairs]
    filler = [([0] * spare, [False] * spare)] if spare else []
    assert segments_of(batch) == expected + filler


def test_positions_and_their_bound_are_the_examples_not_the_fillers():
    """Or a long filler would change how a batch's examples turn, where that depends on the longest sequence."""
    examples = [(list(range(70)), None), ([1, 2, 3], None)]
    batches = [data.Batch.of(examples, vocab_size=100, tokens=tokens) for tokens in (None, 1000)]
    assert [batch.max_position for batch in batches] == [73, 128] and [batch.max_len for batch in batches] == [73, 1000]
    assert int(batches[1].positions_N.max()) == 127 and batches[1].positions_N[73:75].tolist() == [0, 1]


@given(B=st.integers(1, 4), T=st.integers(1, 70), masked=st.booleans(), seed=st.integers(0, 99))
def test_a_rectangle_is_equal_segments(B, T, masked, seed):
    tokens = np.random.default_rng(seed).integers(0, 50, (B, T))
    mask = np.random.default_rng(seed + 1).random((B, T)) < 0.5 if masked else None
    batch = data.from_tokens(torch.tensor(tokens), mask, vocab_size=50)
    check_batch(batch)
    assert batch.segments.starts_S.tolist() == [T * b for b in range(B)]
    assert batch.tokens_N.tolist() == tokens.ravel().tolist()
    assert int(batch.count) == (B * (T - 1) if mask is None else int(mask[:, 1:].sum()))


def test_batch_is_a_tree_and_moves():
    batch = data.from_tokens([[1, 2, 3]], vocab_size=4)
    moved = batch.to(DEVICE)
    assert all(t.device.type == DEVICE.type for t in tree.leaves(moved))
    assert_same(moved.to("cpu"), batch)
    assert moved.max_len == batch.segments.max_len and batch.count.dtype == torch.float32
    assert batch.tokens_N.dtype == batch.targets_M.dtype == torch.int64
    assert batch.segments.starts_S.dtype == torch.int32


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    most=st.sampled_from([2, 60]),
    seed=st.integers(0, 9),
)
def test_packing_is_a_partition_and_tight(lengths, most, seed):
    lengths = np.array(lengths)
    bins = data.pack(lengths, data._permutation(len(lengths), seed), 40, most)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(lengths[b].sum() <= 40 and len(b) <= most for b in bins)
    if most == 60:  # two bins that are at most half full would have been one
        assert sum(lengths[b].sum() <= 20 for b in bins) <= 1


def test_packing_keeps_bins_open_between_windows(monkeypatch):
    lengths = np.array([5] * 10)
    monkeypatch.setattr(data, "WINDOW", 1)
    assert [len(b) for b in data.pack(lengths, np.arange(10), 20, 9)] == [4, 4, 2]


def rows(n=40):
    """Chats of many lengths, every one different."""
    return [chat(("user", f"{i} " + "a" * (i % 5)), ("assistant", "ab cd " * (i % 7) + str(i))) for i in range(n)]


@given(seed=st.integers(-3, 2**40), shuffle=st.booleans(), tokens=st.sampled_from([64, 97]), n=st.integers(1, 40))
def test_every_epoch_serves_every_example_once_in_static_shapes(seed, shuffle, tokens, n):
    loader = data.batches(rows(n), TOKENIZER, tokens=tokens, epochs=2, seed=seed, shuffle=shuffle)
    expected = []
    for row in rows(n):
        ids, trained = data.encode(data.parse(row), TOKENIZER)
        expected.append((tuple(ids), (False, *trained[1:])))
    served = []
    for batch in loader:
        check_batch(batch)
        assert len(batch.tokens_N) == tokens and len(batch.segments.starts_S) == loader.segments
        assert len(batch.target_rows_M) % (-(-tokens // 8)) == 0 or len(batch.target_rows_M) == tokens
        served += [(tuple(ids), tuple(trained)) for ids, trained in segments_of(batch) if any(trained)]
    assert Counter(served) == Counter(expected * 2)
    assert len(loader) == len(loader.epoch(0)) + len(loader.epoch(1))


@given(start=st.integers(0, 30), seed=st.integers(0, 5))
def test_a_resumed_run_goes_on_at_the_same_batch(start, seed):
    options = {"tokens": 80, "epochs": 3, "seed": seed}
    uninterrupted = list(data.batches(rows(), TOKENIZER, **options))
    resumed = list(data.batches(rows(), TOKENIZER, **options, start=start))
    assert len(resumed) == max(0, len(uninterrupted) - start)
    for a, b in zip(resumed, uninterrupted[start:]):
        assert_same(a, b)


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    assert data._permutation(8, 1, 2).tolist() == [7, 5, 6, 1, 4, 3, 0, 2]
    loader = data.batches(rows(), TOKENIZER, tokens=80, epochs=2, seed=1)
    other = data.batches(rows(), TOKENIZER, tokens=80, epochs=2, seed=2)
    assert loader.epoch(0) != loader.epoch(1) != other.epoch(1)
    still = data.batches(rows(), TOKENIZER, tokens=80, epochs=2, shuffle=False)
    assert still.epoch(0) == still.epoch(1)
    assert_same(loader[1], list(loader)[1])
    with pytest.raises(IndexError, match="batch 999"):
        loader[999]


def trained_text(row, train_on="responses"):
    ids, trained = data.encode(data.parse(row), TOKENIZER, train_on)
    return [i for i, t in zip(ids, trained) if t]


def test_only_responses_and_their_end_are_trained():
    row = chat(("user", "hi"), ("assistant", "ab é."), ("user", "cd"), ("assistant", "xy"))
    xy, end = TOKENIZER.encode_with_offsets("xy")[0], [260]
    assert trained_text(row) == TOKENIZER.encode_with_offsets("ab é.")[0] + end + xy + end
    assert trained_text(row, "all") == TOKENIZER.encode_with_offsets(TOKENIZER.render_with_spans(row["messages"])[0])[0]
    assert trained_text({"prompt": "ab", "completion": " cd"}) == TOKENIZER.encode_with_offsets(" cd")[0] + [257]
    # the pair "bc" holds the first letter of the completion, so it has to be learnt
    assert trained_text({"prompt": "a.b", "completion": "cd"}) == TOKENIZER.encode_with_offsets("bcd")[0] + [257]


def test_documents_begin_and_end_with_their_tokens_once():
    for text in ("ab.", "<bos>ab.", "ab.<eos>", "<bos>ab.<eos>"):
        ids, trained = data.encode(data.parse({"text": text}), TOKENIZER)
        assert ids == [256, *TOKENIZER.encode_with_offsets("ab.")[0], 257]
        assert trained[1:] == [True] * 3


@given(turns=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), CHARACTERS), min_size=1, max_size=5))
def test_masks_are_exact_on_characters(turns):
    messages = chat(*turns)["messages"]
    text, spans = TOKENIZER.render_with_spans(messages)
    ids, trained = data.encode(data.parse({"messages": messages}), TOKENIZER)
    learnt = {c for a, b in spans for c in range(a, b)}
    offsets = TOKENIZER.encode_with_offsets(text)[1]
    assert trained == [any(c in learnt for c in range(a, b)) for a, b in offsets]


@given(
    cuts=st.lists(st.integers(0, 30), max_size=12),
    ends=st.lists(st.integers(0, 30), max_size=8, unique=True),
)
def test_spans_against_a_plain_definition(cuts, ends):
    cuts, ends = sorted([0, *cuts, 30]), sorted(ends)
    offsets = list(zip(cuts, cuts[1:]))  # tiles the text; some tokens have no characters
    spans = list(zip(ends[::2], ends[1::2]))
    expected = [any(s < b and a < e if a < b else s < a < e for s, e in spans) for a, b in offsets]
    assert data._in_spans(offsets, spans) == expected


U, A = "user", "assistant"


@pytest.mark.parametrize(
    "row, turns",
    [
        (chat((U, "q"), (A, "a")), [(U, "q"), (A, "a")]),
        (chat((U, "q"), (A, "a")) | {"prompt": "q", "id": 7, "text": None}, [(U, "q"), (A, "a")]),
        (
            {"prompt": chat((U, "q"))["messages"], "completion": chat((A, "a"))["messages"]},
            [(U, "q"), (A, "a")],
        ),
        ({"instruction": "do", "input": "it", "output": "ok", "text": "do it ok"}, [(U, "do\nit"), (A, "ok")]),
        ({"instruction": "do", "input": "", "output": "ok"}, [(U, "do"), (A, "ok")]),
        (
            {"instruction": "do", "output": "ok", "system": "be", "history": [["q", "a"], ["r", "b"]]},
            [("system", "be"), (U, "q"), (A, "a"), (U, "r"), (A, "b"), (U, "do"), (A, "ok")],
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "be"},
            [("system", "be"), (U, "q"), (A, "a")],
        ),
    ],
)
def test_chat_formats(row, turns):
    example = data.parse(row)
    assert [(m["role"], m["content"]) for m in example.messages] == turns and example.tools is None


def test_tools_and_calls():
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [("human", "q"), ("function_call", json.dumps(call)), ("observation", "2"), ("gpt", "two")]
    row = {"conversations": [{"from": f, "value": v} for f, v in turns], "tools": json.dumps([{"name": "f"}])}
    example = data.parse(row)
    assert [m["role"] for m in example.messages] == [U, A, "tool", A]
    assert example.messages[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert example.tools == [{"name": "f"}]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "q", "answer": "a"}, r"fields \['answer', 'question'\], expected one of: messages;"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, r"fields \['chosen', 'prompt', 'rejected'\]"),
        ({"text": 3}, r"fields \['text'\]"),
        ("hello", "expected an object with fields, got str"),
        ({"messages": []}, "messages: expected a list of messages"),
        ({"messages": "hi"}, "messages: expected a list of messages, got 'hi'"),
        ({"messages": [{"content": "q"}]}, r"messages\[0\]: expected {role, content}"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content: expected text, got '3'"),
        ({"prompt": "q", "completion": [{"role": "assistant"}]}, "prompt: expected a list of messages, got 'q'"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, r"conversations\[0\]: expected .* one of human"),
        ({"conversations": [{"from": ["human"], "value": "q"}]}, r"conversations\[0\]: expected .* one of human"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, r"conversations\[0\].value: not valid JSON"),
        ({"conversations": 3}, "conversations: expected a list"),
        ({"instruction": "q", "output": 3}, "output: expected text"),
        ({"instruction": "q", "output": "a", "history": ["q"]}, "history: expected text"),
        (chat((U, "q")) | {"tools": 3}, "tools: expected a list of schemas, got int"),
    ],
)
def test_rows_that_are_refused_with_their_place(row, message):
    with pytest.raises(ValueError, match="^example 1: " + message):
        data.batches([*rows(1), row], TOKENIZER)


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_files_give_the_rows_of_the_list(tmp_path):
    lines = [json.dumps(r, ensure_ascii=False) for r in [*rows(3), chat((U, "é"), (A, "漢"))]]
    expected = [json.loads(line) for line in lines]
    jsonl = write(tmp_path, "a.jsonl", "\ufeff" + "\n".join(lines[:2]) + "\n\n" + "\r\n".join(lines[2:]))
    json_list = write(tmp_path, "a.json", "\n [" + ",\n".join(lines) + "]")
    json_lines = write(tmp_path, "b.json", "\n".join(lines))
    for source in (jsonl, str(jsonl), json_list, json_lines, expected, iter(expected)):
        assert data.read_examples(source) == expected
    assert [row.place for row in data.read_examples(jsonl)] == [f"{jsonl}:{n}" for n in (1, 2, 4, 5)]
    assert_same(data.batches(jsonl, TOKENIZER, tokens=256)[0], data.batches(expected, TOKENIZER, tokens=256)[0])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", '{"text": "ab"}\n{"text": \n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "ab"}\n\n{"text": "\xff"}\n', r"a.jsonl:3: not valid JSON: 'utf-8'"),
        ("a.jsonl", '{"text": "abc"}\n3\n', r"a.jsonl:2: expected an object with fields, got int"),
        ("a.jsonl", '{"text": "abc"}\n{"txt": "abc"}\n', r"a.jsonl:2: fields \['txt'\]"),
        ("a.jsonl", "[" * 100000 + "\n", r"a.jsonl:1: not valid JSON"),
        ("a.json", "[1, 2", r"a.json: not valid JSON"),
        ("a.json", '[{"text": "abc"}, 3]', r"a.json: example 1: expected an object"),
        ("a.csv", "text\nabc", r"a.csv: expected a file ending in .jsonl, .json or .parquet"),
        ("a.jsonl", '{"text": "ab"}\n{"text": \n', "a.jsonl:2: not valid JSON: Expecting value: column 9$"),
        ("a.json", '[{"text":\n"ab"},\n3', r"a.json: not valid JSON: .*: line 3, column 2$"),
        ("a.jsonl", "\n", "a.jsonl: no examples in it"),
        ("a.json", "[]", "a.json: no examples in it"),
        ("a.jsonl", json.dumps(chat((U, "q"))), r"none of 1 rows, the first at .*a.jsonl:1, has a token to train on"),
    ],
)
def test_files_that_are_refused_with_their_place(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        data.batches(write(tmp_path, name, text), TOKENIZER)


def test_answers_that_were_cut_off_are_named_as_the_reason():
    row = chat((U, "a long question"), (A, "an answer"))
    with pytest.raises(ValueError, match=r"none of 1 rows, .*; 1 are longer than 4 tokens and were cut: more tokens"):
        data.batches([row], TOKENIZER, tokens=4)


def test_parquet_goes_through_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path, "a.parquet", "not read")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ImportError, match=r"a.parquet: reading Parquet needs pyarrow"):
        data.read_examples(path)

    class File:
        metadata = types.SimpleNamespace(num_rows=3)

        def __init__(self, where):
            if where != path:
                raise ValueError("no magic bytes")

        def iter_batches(self, batch_size):
            for part in (rows(3)[:2], rows(3)[2:]):
                yield types.SimpleNamespace(to_pylist=lambda part=part: part)

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=File))
    found = data.read_examples(path)
    assert found == rows(3) and found[2].place == f"{path}: example 2"
    with pytest.raises(ValueError, match=r"b.parquet: not valid Parquet: no magic bytes"):
        data.read_examples(tmp_path / "b.parquet")


@given(length=st.integers(1, 60), max_len=st.integers(2, 20))
def test_a_long_document_is_split_so_that_every_token_is_predicted_once(length, max_len):
    text = "".join(chr(33 + i) for i in range(length))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        examples = data.tokenize([{"text": text}], TOKENIZER, max_len=max_len)
    whole, _ = data.encode(data.parse({"text": text}), TOKENIZER)
    assert examples.lengths.max() <= max_len
    pieces = [examples[i] for i in range(len(examples))]
    assert whole[:1] + [i for ids, trained in pieces for i in ids[1:][trained[1:]].tolist()] == whole


def test_a_long_conversation_is_cut_and_an_untrained_one_left_out_with_one_warning():
    long = chat((U, "q"), (A, "." * 50))
    late = chat((U, "." * 50), (A, "late"))
    mute = chat((U, "nobody answers"))
    with pytest.warns(UserWarning, match="of 4 rows, 2 were longer than 32 tokens and were cut, 2 had no token"):
        loader = data.batches([long, late, mute, rows(1)[0]], TOKENIZER, tokens=64, max_len=32)
    assert sorted(loader.examples.lengths)[-1] == 32 and len(loader.examples) == 2
    with pytest.raises(ValueError, match="none of 1 rows, the first at example 0, has a token to train on"):
        data.batches([mute], TOKENIZER)
    assert len(data.batches([mute], TOKENIZER, train_on="all")) == 1


def test_ids_outside_the_vocabulary_are_refused_on_the_host():
    with pytest.raises(ValueError, match=r"^example 0: token id 260, expected an id in \[0, 260\)"):
        data.batches(rows(2), TOKENIZER, vocab_size=260)
    for bad, index in ((-1, 1), (7, 1)):
        with pytest.raises(ValueError, match=rf"example {index}: token id {bad}, expected an id in \[0, 7\)"):
            data.from_tokens([[0, 1], [2, bad]], vocab_size=7)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: data.Batch.of([([1], [True]), ([], [])], vocab_size=9), "example 1 has ids of shape"),
        (lambda: data.Batch.of([([1, 2], [True])], vocab_size=9), "example 0 has ids of shape"),
        (lambda: data.Batch.of([([1.5], [True])], vocab_size=9), "expected a list of integers"),
        (lambda: data.Batch.of([([1, 2], None)], vocab_size=9, tokens=1), "2 tokens in 1 examples"),
        (lambda: data.Batch.of([], vocab_size=9), "0 tokens in 0 examples"),
        (lambda: data.Batch.of([([1], None)] * 3, vocab_size=9, segments=2), "3 segments"),
        (lambda: data.from_tokens([1, 2], vocab_size=9), r"expected \(B, T\)"),
        (lambda: data.from_tokens([[1, 2]], [[True]], vocab_size=9), r"expected \(B, T\)"),
        (lambda: data.batches(rows(), TOKENIZER, epochs=0), "epochs = 0"),
        (lambda: data.batches(rows(), TOKENIZER, tokens=0), "batches: tokens = 0, expected at least 2"),
        (lambda: data.batches(rows(), None), "batches: tokenizer is None"),
        (lambda: data.batches(rows(), TOKENIZER, start=-1), "start = -1"),
        (lambda: data.batches(rows(), TOKENIZER, train_on="prompts"), "train_on = 'prompts'"),
        (lambda: data.batches(rows(), TOKENIZER, max_len=1), "max_len = 1"),
        (lambda: data.batches(rows(), TOKENIZER, tokens=64, max_len=65), "max_len = 65"),
        (lambda: data.split(rows(2), 1.0), "fraction 1.0 of 2 rows"),
        (lambda: data.split(rows(2), -0.5), "fraction -0.5 of 2 rows"),
        (lambda: data.split(rows(1), 0.5), "fraction 0.5 of 1 rows"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@given(n=st.integers(2, 50), fraction=st.floats(0.0, 0.5), seed=st.integers(0, 9))
def test_split_is_a_partition_in_file_order(n, fraction, seed):
    everything = [{"i": i} for i in range(n)]
    train, held = data.split(everything, fraction, seed)
    assert sorted(r["i"] for r in train + held) == list(range(n))
    assert len(held) == (max(1, round(n * fraction)) if fraction else 0)
    for part in (train, held):
        assert [r["i"] for r in part] == sorted(r["i"] for r in part)
    assert data.split(everything, fraction, seed) == (train, held)


def test_a_split_row_still_knows_its_place(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "abc"}\n{"txt": "abc"}\n{"text": "abc"}\n')
    parts = data.split(path, 0.4)
    with pytest.raises(ValueError, match=r"a.jsonl:2: fields"):
        for part in parts:
            data.batches(part, TOKENIZER)


@pytest.fixture(scope="module")
def chatml():
    """A real tokenizer: byte-level BPE trained on the shipped examples, and the template of many small models."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = level, decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=level.alphabet(), show_progress=False
    )
    texts = [m["content"] for row in data.read_examples(EXAMPLES) for m in row["messages"]]
    backend.train_from_iterator(texts, trainer)
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return Tokenizer(backend, special={"eos_token": "<|im_end|>"}, templates={"default": template})


def test_the_shipped_examples_with_a_real_tokenizer(chatml):
    examples = data.read_examples(EXAMPLES)
    loader = data.batches(EXAMPLES, chatml, tokens=512, shuffle=False)
    assert len(loader.examples) == len(examples)
    for i, row in enumerate(examples):
        ids, trained = loader.examples[i]
        replies = [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
        assert chatml.decode(ids[trained].tolist(), skip_special_tokens=False) == "".join(replies)
    used = sum(len(loader.examples[i][0]) for i in range(len(examples)))
    assert used > 0.9 * 512 * (len(loader) - 1)
    for batch in loader:
        check_batch(batch)


@given(texts=st.lists(CHARACTERS.filter(str.strip), min_size=2, max_size=4))
def test_a_real_tokenizer_learns_the_reply_in_every_script(chatml, texts):
    row = chat(*zip([U, A] * 2, texts))
    ids, trained = data.encode(data.parse(row), chatml)
    learnt = chatml.decode([i for i, t in zip(ids, trained) if t], skip_special_tokens=False)
    assert learnt == "".join(text + "<|im_end|>" for text in texts[1::2])
