"""Checkpoints in folders and from the Hub's cache: what is read equals what `safetensors` wrote, and every
way in which a file can lie gives one clear error."""

import json
import struct

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from unsloth_core import hub
from unsloth_core.hub import open_checkpoint

CONFIG = {"model_type": "llama", "hidden_size": 8}


def write(folder, tensors, name="model.safetensors"):
    """A checkpoint folder with one file of tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder


def shards(folder):
    """A checkpoint of two shards."""
    parts = {
        "model-00001-of-00002.safetensors": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)},
        "model-00002-of-00002.safetensors": {"c": torch.zeros(3, dtype=torch.bfloat16)},
    }
    for file, tensors in parts.items():
        write(folder, tensors, file)
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    set_index(folder, weight_map)
    return folder, weight_map


def set_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw_file(folder, header, data=b""):
    """A safetensors file with any header: a dict, or bytes as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return str(folder)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# ---- reading ----


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
dtypes |= st.sampled_from([torch.float8_e4m3fn, torch.float64, torch.int8])
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 7]), max_size=3)


@given(specs=st.lists(st.tuples(dtypes, shapes), max_size=5), seed=st.integers(0, 99))
def test_every_tensor_comes_back(tmp_path_factory, specs, seed):
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"t{i}": torch.randint(0, 2, shape, generator=generator).to(dtype) for i, (dtype, shape) in enumerate(specs)
    }
    folder = write(tmp_path_factory.mktemp("c"), tensors)
    checkpoint = open_checkpoint(str(folder))
    expected = load_file(folder / "model.safetensors")
    assert checkpoint.names == sorted(expected)
    for name, tensor in expected.items():
        got = checkpoint.tensor(name)
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        assert (checkpoint.dtype(name), checkpoint.shape(name)) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_unaligned_data_in_any_order(tmp_path):
    header = {
        "odd": entry("U8", (1,), (0, 1)),
        "b": entry("F32", (1,), (5, 9)),
        "a": entry("F32", (1,), (1, 5)),
    }
    path = raw_file(tmp_path / "c", header, b"\x07" + struct.pack("<2f", 1.5, -2.5))
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensor("a").item() == 1.5 and checkpoint.tensor("b").item() == -2.5
    assert checkpoint.tensor("odd").item() == 7


def test_folder(tmp_path):
    folder, _ = shards(tmp_path / "c")
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.config == CONFIG and checkpoint.generation_config == {"eos_token_id": [1, 2]}
    assert checkpoint.names == ["a", "b", "c"] and checkpoint.source == str(folder)
    assert torch.equal(checkpoint.tensor("a"), torch.arange(6.0).view(2, 3))
    with pytest.raises(ValueError, match="no tensor 'd'"):
        checkpoint.tensor("d")


def test_stored_rope_frequencies_are_no_weights(tmp_path):
    folder = write(tmp_path / "c", {"w": torch.ones(1), "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert open_checkpoint(str(folder)).names == ["w"]


def test_writing_to_a_tensor_leaves_the_file(tmp_path):
    folder = write(tmp_path / "c", {"w": torch.ones(3)})
    before = (folder / "model.safetensors").read_bytes()
    open_checkpoint(str(folder)).tensor("w").zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    assert torch.equal(open_checkpoint(str(folder)).tensor("w"), torch.ones(3))


def test_a_replaced_file_is_read_anew(tmp_path):
    folder = write(tmp_path / "c", {"w": torch.ones(3)})
    old = open_checkpoint(str(folder))
    save_file({"w": torch.zeros(5)}, folder / "new")
    (folder / "new").rename(folder / "model.safetensors")
    assert open_checkpoint(str(folder)).shape("w") == (5,) and torch.equal(old.tensor("w"), torch.ones(3))


# ---- files that lie ----

GOOD = {"w": entry()}
LIES = [  # header, data, part of the message
    (b"{", b"", "expected JSON"),
    (b"[1]", b"", "expected a JSON object, got list"),
    (b"[" * 100_000, b"", "expected JSON, got RecursionError"),
    (b"\xff\xfe{}", b"", "expected JSON"),
    (
        b'{"w": ' + json.dumps(entry()).encode() + b', "w": ' + json.dumps(entry()).encode() + b"}",
        b"\0" * 8,
        "twice",
    ),
    (GOOD, b"\0" * 7, "expected 8 bytes of data, got 7"),
    (GOOD, b"\0" * 9, "expected 8 bytes of data, got 9"),
    ({"w": entry(dtype="F31")}, b"\0" * 8, "dtype: expected F64 .* got F31"),
    ({"w": entry(dtype=["F32"])}, b"\0" * 8, "dtype: expected"),
    ({"w": entry(shape=(3,))}, b"\0" * 8, r"bytes of F32 \[3\]: expected 12, got 8"),
    ({"w": entry(shape=(-2,))}, b"\0" * 8, "shape: expected"),
    ({"w": entry(shape=(2.0,))}, b"\0" * 8, "shape: expected"),
    ({"w": entry(shape=(2**62, 2**62))}, b"\0" * 8, "bytes of F32"),
    ({"w": entry(offsets=(8, 0))}, b"\0" * 8, "bytes of F32"),
    ({"w": entry(offsets=(0, 8, 9))}, b"\0" * 8, "data_offsets: expected"),
    ({"w": entry(offsets=(4, 12))}, b"\0" * 12, "expected to start at byte 0, got 4"),
    ({"v": entry(), "w": entry(offsets=(4, 12))}, b"\0" * 12, "expected to start at byte 8, got 4"),
    ({"w": entry(offsets=(0, 2**62), shape=(2**60,))}, b"\0" * 8, "bytes of data, got 8"),
    ({"w": "F32"}, b"", "entry: expected"),
    ({"w": {**entry(), "extra": 1}}, b"\0" * 8, "entry: expected"),
]


@pytest.mark.parametrize("header, data, message", LIES)
def test_a_header_that_lies(tmp_path, header, data, message):
    path = raw_file(tmp_path / "c", header, data)
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(path)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 8, struct.pack("<Q", 50) + b"{}"])
def test_a_file_shorter_than_its_header(tmp_path, content):
    raw_file(tmp_path / "c", {})
    (tmp_path / "c" / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors: not safetensors or truncated: header of"):
        open_checkpoint(str(tmp_path / "c"))


@given(cut=st.integers(0, 500))
def test_every_truncation_is_noticed(tmp_path_factory, cut):
    folder = write(tmp_path_factory.mktemp("c"), {"w": torch.ones(20), "v": torch.ones(3)})
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(ValueError, match="model.safetensors"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "*.safetensors", "x.bin", 3])
def test_an_index_that_points_elsewhere(tmp_path, file):
    folder, weight_map = shards(tmp_path / "c")
    set_index(folder, {**weight_map, "c": file})
    with pytest.raises(ValueError, match="index.json: tensor 'c': expected a .safetensors file beside the index, got"):
        open_checkpoint(str(folder))


def test_a_link_that_leaves_the_folder(tmp_path):
    write(tmp_path / "elsewhere", {"w": torch.ones(1)})
    folder = write(tmp_path / "c", {"w": torch.ones(1)})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "model.safetensors")
    with pytest.raises(ValueError, match="expected a file inside .* got a link to"):
        open_checkpoint(str(folder))


def test_shards_and_index_must_agree(tmp_path):
    folder, weight_map = shards(tmp_path / "c")
    first, second = sorted(set(weight_map.values()))
    set_index(folder, {**weight_map, "d": second})
    with pytest.raises(ValueError, match=f"{second}: no tensor 'd'"):
        open_checkpoint(str(folder))
    set_index(folder, {"a": first, "c": second})
    with pytest.raises(ValueError, match=f"{first}: holds tensor 'b', which .* lists nowhere"):
        open_checkpoint(str(folder))
    set_index(folder, weight_map)
    save_file({"c": torch.ones(1), "a": torch.ones(1)}, folder / second)
    with pytest.raises(ValueError, match=f"{second}: tensor 'a' is also in {first}"):
        open_checkpoint(str(folder))
    (folder / second).unlink()
    with pytest.raises(ValueError, match=f"{second}: missing"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{", '{"a":1,"a":2}'])
def test_a_broken_index(tmp_path, text):
    folder, _ = shards(tmp_path / "c")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json"):
        open_checkpoint(str(folder))


def test_pickle_is_never_read(tmp_path):
    folder = write(tmp_path / "c", {"w": torch.ones(1)})
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin.*never read: convert them to safetensors"):
        open_checkpoint(str(folder))


def test_what_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        open_checkpoint(str(tmp_path / "empty"))
    (tmp_path / "empty" / "config.json").write_text("{'a': 1}")
    with pytest.raises(ValueError, match="config.json: expected JSON"):
        open_checkpoint(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="got another kind of file"):
        open_checkpoint(str(tmp_path / "empty" / "config.json"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_checkpoint(str(tmp_path / "no.gguf"))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_checkpoint(str(tmp_path / "nothing"))


# ---- the Hub ----


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def cached(cache, repo, files):
    """Put files into the cache as the Hub's client lays them out: links to blobs."""
    commit = "0123456789" * 4
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (root / "blobs").mkdir()
    (root / "snapshots" / commit).mkdir(parents=True)
    for file in files:
        (root / "blobs" / f"blob-{file.name}").write_bytes(file.read_bytes())
        (root / "snapshots" / commit / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    return root


def test_offline_from_the_cache(tmp_path, cache):
    folder, _ = shards(tmp_path / "c")
    root = cached(cache, "org/name", list(folder.iterdir()))
    checkpoint = open_checkpoint("org/name")
    assert checkpoint.source == "org/name" and checkpoint.names == ["a", "b", "c"]
    assert torch.equal(checkpoint.tensor("b"), torch.ones(2))
    # A snapshot may link to the blobs of its own repository, not to those of another one.
    shard = root / "snapshots" / ("0123456789" * 4) / "model-00001-of-00002.safetensors"
    (cache / "other").mkdir()
    shard.resolve().rename(cache / "other" / "blob")
    shard.unlink()
    shard.symlink_to("../../../other/blob")
    with pytest.raises(ValueError, match="expected a file inside .*blobs, got a link to"):
        open_checkpoint("org/name")


def test_neither_network_nor_cache(cache):
    message = "^org/name: no such folder or file here; as a Hub id it cannot be fetched and is not complete"
    with pytest.raises(FileNotFoundError, match=message):
        open_checkpoint("org/name")


def test_only_what_is_needed_is_downloaded(tmp_path, monkeypatch):
    source, weight_map = shards(tmp_path / "c")
    snapshot = tmp_path / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    requests = []

    def download(repo, *, revision, token, allow_patterns):
        requests.append((repo, revision, token))
        for file in source.iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                (snapshot / file.name).write_bytes(file.read_bytes())
        return str(snapshot)

    (source / "pytorch_model.bin").write_bytes(b"")
    (source / "consolidated.safetensors").write_bytes(b"")
    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    assert open_checkpoint("org/name", revision="v1", token="t").names == ["a", "b", "c"]
    # The second request names the commit that the first one found.
    assert requests == [("org/name", "v1", "t"), ("org/name", "commit", "t")]
    expected = {"config.json", "model.safetensors.index.json", *weight_map.values()}
    assert {file.name for file in snapshot.iterdir()} == expected
