"""Residuals on the host: the same bits come back, one layer ahead, and no step leaves anything behind."""

import gc

import pytest
import torch
from oprule import DEVICE
from tiny import VERSIONS, judge, ours
from torch._subclasses.fake_tensor import FakeTensorMode

from unsloth_core import backend, data, lora, offload, optim, random, tree
from unsloth_core.autodiff import INPUT, OFFLOAD, SAVE, residual_report, value_and_grad
from unsloth_core.models.decoder import Schedule
from unsloth_core.train import make_step

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
