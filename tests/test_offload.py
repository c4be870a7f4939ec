"""Residuals on the host come back the same, one layer ahead, and no step leaves anything behind; embedding and head."""

import dataclasses
import gc
import sys

import pytest
import torch
from oprule import DEVICE
from tiny import VERSIONS, judge, ours
from tiny_folder import write_folder
from torch._subclasses.fake_tensor import FakeTensorMode

from unsloth_core import backend, data, lora, offload, optim, random, tree
from unsloth_core.autodiff import INPUT, OFFLOAD, SAVE, value_and_grad
from unsloth_core.load import load, named_tensors
from unsloth_core.models.decoder import Schedule
from unsloth_core.ops import linear_cross_entropy, nf4
from unsloth_core.remat import residual_report
from unsloth_core.train import make_step
from unsloth_core.tree import ABSENT
from unsloth_core.weights import NF4

SMALL = {"vocab_size": 97, "tokens": 16, "segments": 6}
QUICK = None if DEVICE.type == "cuda" else "reference"  # the interpreter takes seconds for a step
EVERYTHING = {INPUT: OFFLOAD, "qkv": OFFLOAD, "attn": OFFLOAD, "mid": OFFLOAD, "gate_up": OFFLOAD}


def model_and_adapters(**more):
    model_type, overrides = VERSIONS["llama-3.1"]
    model, params = ours(judge(model_type, **{**overrides, **more}))
    adapters = lora.init(random.key(0), params, rank=2)
    g = torch.Generator().manual_seed(1)
    return model, params, tree.map(lambda t: t + 0.01 * torch.randn(t.shape, generator=g).to(t.device), adapters)


def batch():
    return data.Batch.of([([1, 5, 7, 2, 9], None), ([3, 4, 8], None)], **SMALL).to(DEVICE)


def parcel(seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g).to(DEVICE) for shape in shapes]


def test_parcels_come_back_as_they_were_and_as_often_as_asked():
    host, sent, parcels = offload.Host(), [], []
    for i in range(5):
        tensors = parcel(i, (7, 3), (2,), (0, 4))
        tensors.append(tensors[0].T)  # another layout of the same numbers
        sent.append([t.clone() for t in tensors])
        parcels.append(host.send(tensors))
        del tensors
    for _ in range(2):
        for want, one in zip(reversed(sent), reversed(parcels), strict=True):
            for a, b in zip(want, offload.take(one, DEVICE), strict=True):
                assert torch.equal(a, b) and a.stride() == b.stride() and b.device == a.device


def test_what_is_on_the_host_is_a_copy():
    host, (t,) = offload.Host(), parcel(0, (4, 4))
    want, first = t.clone(), host.send([t])
    host.send(parcel(1, (4, 4)))  # from here on the first is on the host alone
    t.zero_()
    assert torch.equal(offload.take(first, DEVICE)[0], want)


def test_only_the_last_parcel_stays_on_the_device():
    host = offload.Host()
    parcels = [host.send(parcel(i, (8,))) for i in range(4)]
    assert [one.here is not None for one in parcels] == [False, False, False, True]
    offload.take(parcels[3], DEVICE)
    assert [one.here is not None for one in parcels] == [False, False, True, False]  # the next is on its way


def test_blocks_of_a_host_tensor():
    (t,) = parcel(0, (13, 3))
    host = t.cpu().pin_memory() if DEVICE.type == "cuda" else t
    for rows in (1, 4, 13, 20):
        found = torch.cat([block.clone() for _, block in offload.blocks(host, rows, DEVICE)])
        assert torch.equal(found, t)


@pytest.mark.parametrize(
    ("schedule", "name"),
    [
        ({"attn": OFFLOAD}, "reference"),
        ({INPUT: OFFLOAD}, "reference"),
        (EVERYTHING, "reference"),
        ({INPUT: OFFLOAD, "attn": SAVE, "gate_up": OFFLOAD}, "triton"),
        (Schedule({INPUT: OFFLOAD, "attn": OFFLOAD}, last=(2, {"attn": SAVE, "mid": OFFLOAD})), "reference"),
    ],
)
def test_gradients_are_those_of_save_to_the_bit(schedule, name):
    model, params, adapters = model_and_adapters(num_hidden_layers=2 if name == "triton" else 4)
    with backend.using(name):
        value = {}
        for key, policy in (("save", {"attn": SAVE}), ("offload", schedule)):
            gradient = value_and_grad(lambda a, p=policy: model.loss(lora.adapt(params, a), batch(), policy=p)[0])
            value[key] = gradient(adapters)
    assert torch.equal(value["save"][0], value["offload"][0])
    for (path, a), (_, b) in zip(tree.items(value["save"][1]), tree.items(value["offload"][1]), strict=True):
        assert torch.equal(a, b), path


def test_backward_twice():
    model, params, adapters = model_and_adapters()
    adapters = tree.map(lambda t: t.requires_grad_(), adapters)
    with backend.using(QUICK):
        loss, _ = model.loss(lora.adapt(params, adapters), batch(), policy=EVERYTHING)
    first = torch.autograd.grad(loss, tree.leaves(adapters), retain_graph=True)
    second = torch.autograd.grad(loss, tree.leaves(adapters))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_report_tells_device_from_host():
    model, params, adapters = model_and_adapters(num_hidden_layers=3)
    with backend.using(QUICK):
        report = residual_report(lambda a: model.loss(lora.adapt(params, a), batch(), policy=EVERYTHING)[0], adapters)
    gone = [row for row in report.rows if row.fate == OFFLOAD]
    assert {row.name for row in gone} == set(EVERYTHING) and sum(row.bytes for row in gone) > 0
    in_layers = [row for row in report.rows if row.name in EVERYTHING]
    assert report.bytes == sum(row.bytes for row in report.rows if row not in in_layers)
    assert "total on the device" in str(report)


@pytest.mark.parametrize("schedule", [EVERYTHING, Schedule({"attn": OFFLOAD, "pre": OFFLOAD, INPUT: OFFLOAD}, tile=5)])
def test_a_step_runs_on_fake_tensors(schedule):
    with torch.device("cpu"):
        model, params, adapters = model_and_adapters()
    params, adapters = tree.map(lambda t: t.cpu(), (params, adapters))
    optimizer = optim.adamw(1e-3)
    state, one = optimizer.init(adapters), batch().to("cpu")
    with backend.using("reference"), FakeTensorMode() as mode:
        fake = lambda t: tree.map(mode.from_tensor, t)  # noqa: E731
        step = make_step(model, fake(params), optimizer, max_norm=1.0, policy=schedule)
        new, _, metrics = step(fake(adapters), fake(state), [fake(one)])
    assert [t.shape for t in tree.leaves(new)] == [t.shape for t in tree.leaves(adapters)]
    assert metrics["loss"].shape == ()


def test_no_step_leaves_anything_behind():
    model, params, adapters = model_and_adapters()
    optimizer = optim.adamw(1e-3)
    state, one = optimizer.init(adapters), batch()
    step = make_step(model, params, optimizer, max_norm=1.0, policy=EVERYTHING)

    def tensors():
        gc.collect()
        alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return len(alive), torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0

    found = []
    for _ in range(4):
        with backend.using(QUICK):
            adapters, state, metrics = step(adapters, state, [one])
        found.append(tensors())
    assert found[1] == found[2] == found[3]
    assert metrics["loss"].isfinite()


# ------------------------------------------------------------------------------------- embedding and head elsewhere


def head_case(V=300, D=64, M=7):
    g = torch.Generator().manual_seed(3)
    x = (torch.randn(M, D, generator=g)).to(DEVICE)
    w = (torch.randn(V, D, generator=g) * 0.2).to(DEVICE)
    return x, w, torch.randint(0, V, (M,), generator=g).to(DEVICE)


def head_losses(x, w, targets, **options):
    x = x.clone().requires_grad_()
    loss = linear_cross_entropy(x, w, targets, **options)
    return loss.detach(), *torch.autograd.grad(loss, x)


@pytest.mark.parametrize("name", backend.NAMES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_an_nf4_head_is_its_decoded_self(monkeypatch, name, double_quant):
    monkeypatch.setattr(sys.modules["unsloth_core.ops.linear_cross_entropy"], "HEAD_ROWS", 256)  # so that V has two
    x, w, targets = head_case()
    with backend.using(name):
        q = nf4.quantize(w, double_quant=double_quant)
        for rows in (ABSENT, torch.tensor([0, 2, 7, 1, 7, 3, 5], device=DEVICE)):
            want = head_losses(x, nf4.dequantize(q), targets, rows_M=rows)
            for chunk in (None, 600):
                found = head_losses(x, q, targets, rows_M=rows, chunk_logits=chunk)
                for a, b in zip(want, found, strict=True):
                    torch.testing.assert_close(b, a, rtol=3e-6, atol=1e-6)


def test_rows_of_nf4_are_those_of_the_matrix():
    w = nf4.quantize(head_case(V=600)[1])
    parts = [nf4.dequantize(nf4.rows(w, i, min(600, i + 256))) for i in range(0, 600, 256)]
    assert torch.equal(torch.cat(parts), nf4.dequantize(w))
    with pytest.raises(ValueError, match=r"nf4.rows: rows 0 to 100 of \(600, 64\) begin or end in a block of 16384"):
        nf4.rows(w, 0, 100)


def test_a_head_that_cannot_learn_is_refused():
    x, w, targets = head_case()
    q = nf4.quantize(w)
    q = dataclasses.replace(q, nested=dataclasses.replace(q.nested, offset=q.nested.offset.clone().requires_grad_()))
    with backend.using("triton"), pytest.raises(NotImplementedError, match="no gradient for a w that is NF4"):
        linear_cross_entropy(x, q, targets)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["host", "nf4", "device"])
def test_a_model_loads_and_trains_with_them_elsewhere(tmp_path, tied, head):
    """On a CPU the host is where everything is; on a GPU they are pinned, and the loss is the same."""
    folder = str(write_folder(tmp_path / "model", tie_word_embeddings=tied))
    options = {"device": DEVICE, "dtype": torch.float32}
    model, params = load(folder, embed="host", head=head, **options)
    here, same = load(folder, **options)
    away = params.embed if tied or head != "host" else params.head
    assert (away.is_pinned() if DEVICE.type == "cuda" else away.device == DEVICE) and params.norm.device == DEVICE
    if head == "nf4" and not tied:
        same = dataclasses.replace(same, head=nf4.dequantize(params.head))
    trains_alike(model, params, same)


def trains_alike(model, params, same):
    one = data.Batch.of([([1, 5, 7, 2, 9], None), ([3, 4, 8], None)], vocab_size=258, tokens=16, segments=6)
    adapters = tree.map(lambda t: t + 0.01, lora.init(random.key(0), params, rank=2))
    with backend.using(QUICK):
        found, want = (
            value_and_grad(lambda a, p=p: model.loss(lora.adapt(p, a), one)[0])(adapters) for p in (params, same)
        )
    for a, b in zip(tree.leaves(want), tree.leaves(found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_in_nf4_is_its_decoded_self(tmp_path, tied):
    """And so is a head that is tied to it: in training, in logits, and written out again."""
    folder = str(write_folder(tmp_path / "model", tie_word_embeddings=tied, hidden_size=64))
    model, params = load(folder, embed="nf4", device=DEVICE, dtype=torch.float32)
    assert isinstance(params.embed, NF4) and (params.head is ABSENT) == tied
    same = dataclasses.replace(params, embed=nf4.dequantize(params.embed))
    trains_alike(model, params, same)
    ids = torch.tensor([[1, 5, 7, 2], [9, 3, 4, 8]], device=DEVICE)
    with backend.using(QUICK), torch.no_grad():
        torch.testing.assert_close(model.logits(params, ids), model.logits(same, ids), rtol=1e-5, atol=1e-5)
    named = named_tensors(params)
    assert torch.equal(named["model.embed_tokens.weight"], same.embed) and ("lm_head.weight" in named) != tied


def test_a_place_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"load: embed is 'gpu', expected one of \('device', 'host', 'nf4'\)"):
        load(str(tmp_path), embed="gpu")
    with pytest.raises(ValueError, match="load: head is 'disk', expected one of"):
        load(str(tmp_path), head="disk")
