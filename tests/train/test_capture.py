"""The step as a CUDA graph: the same bits, one graph for each shape, and plain steps where none can be recorded."""

import contextlib
import dataclasses
import time

import pytest
import torch
from oprule import DEVICE
from tiny import VERSIONS, judge, ours
from tiny_run import AWAY, assert_same_run, make, run, some_batches

from unsloth_core import capture, lora, optim, random, train, tree
from unsloth_core.train import make_step

needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs are recorded and replayed by a GPU alone")


def train_on(groups, *, capture, policy=None, quantize=None, state_dtype=torch.float32):
    """Adapters, states and metrics after a step per group of microbatches; the step itself."""
    model_type, overrides = VERSIONS["smollm2"]
    model, params = ours(judge(model_type, **overrides), quantize=quantize)
    adapters = tree.map(lambda t: t + 0.02, lora.init(random.key(0), params, rank=2))
    optimizer = optim.adamw(optim.cosine(1e-2, 20, 3), weight_decay=0.1, state_dtype=state_dtype)
    state = optimizer.init(adapters)
    step = make_step(model, params, optimizer, max_norm=0.5, policy=policy, capture=capture)
    metrics = []
    for group in groups:
        adapters, state, found = step(adapters, state, group)
        metrics.append(found)
    return (adapters, state, metrics), step


@needs_cuda
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("policy", [None, {}, AWAY], ids=["default", "recompute", "offload"])
@pytest.mark.parametrize("state_dtype", [torch.float32, "8bit"], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_captured_step_gives_the_same_bits(accumulate, state_dtype, policy, quantize, monkeypatch):
    monkeypatch.setattr(optim.blockwise, "LEAST", 1)
    batches = some_batches(14)
    groups = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    options = {"policy": policy, "quantize": quantize, "state_dtype": state_dtype}
    plain, _ = train_on(groups, capture=False, **options)
    captured, step = train_on(groups, capture=True, **options)
    assert step.graphs >= 2
    for (path, a), (_, b) in zip(tree.items(captured), tree.items(plain), strict=True):
        assert torch.equal(a, b), path


@pytest.mark.skipif(DEVICE.type != "cuda", reason="PyTorch counts the memory of a GPU alone")
@pytest.mark.parametrize("captured", [False, True])
def test_memory_does_not_grow_from_step_to_step(captured):
    batches = some_batches(9)
    model_type, overrides = VERSIONS["smollm2"]
    model, params = ours(judge(model_type, **overrides))
    adapters = lora.init(random.key(0), params, rank=2)
    optimizer = optim.adamw(1e-3)
    state = optimizer.init(adapters)
    step = make_step(model, params, optimizer, max_norm=1.0, policy=None, capture=captured)
    seen = []
    for _ in range(4):
        for batch in batches:
            adapters, state, _ = step(adapters, state, [batch])
        torch.cuda.synchronize()
        time.sleep(0.05)  # autograd's thread hands its result over before it lets go of the last gradients
        stats = torch.cuda.memory_stats()
        names = ("allocated_bytes.all.current", "reserved_bytes.all.current", "allocated_bytes.all.peak")
        seen.append([stats[name] for name in names])
    assert seen[1] == seen[2] == seen[3]


@needs_cuda
def test_a_captured_run_is_an_uncaptured_one(whole, tmp_path):
    assert_same_run(whole[0], run(tmp_path, capture=False), whole[1], tmp_path)


@needs_cuda
def test_a_captured_step_refuses_other_tensors():
    batch = some_batches(1)
    (adapters, state, _), step = train_on([batch, batch], capture=True)
    with pytest.raises(ValueError, match="capture: adapters or state are not the tensors of the first step"):
        step(tree.map(torch.clone, adapters), state, batch)


class Recorded:
    """In place of a CUDA graph, where there is none: replaying runs the step again."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1

    def pool(self):
        return "pool"


class Counter:
    """A step that adds up what it sees, in place."""

    def __init__(self):
        self.calls = 0

    def __call__(self, adapters, state, microbatches):
        self.calls += 1
        state += sum(batch.tokens_N.sum() for batch in microbatches)
        return adapters, state, {"targets": sum(batch.count for batch in microbatches)}


def counted(monkeypatch, step, **options):
    """``Captured(step)`` with graphs that hold nothing, on any device."""
    graphs = []

    @contextlib.contextmanager
    def recording(graph, pool, stream):
        assert pool == ("pool" if graphs else None)
        graphs.append(graph)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(capture.Captured, "_beside", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(capture.Captured, "_check", lambda self, adapters, state: adapters.device)
    captured = capture.Captured(step, **options)
    captured._addresses = [t.data_ptr() for t in state_of(captured)]
    return captured, graphs


ADAPTERS, STATE = torch.zeros(2, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE)


def state_of(_):
    return ADAPTERS, STATE


@pytest.mark.parametrize(
    "error", [RuntimeError("operation not permitted\nwhen capturing"), torch.OutOfMemoryError("no")]
)
def test_what_cannot_be_recorded_runs_as_ever(monkeypatch, error):
    """In the second step of a shape, which would be recorded; or, for want of memory, in the first of another shape."""
    step = Counter()
    captured, _ = counted(monkeypatch, step, strict=False)
    short, long = some_batches(2)[1], some_batches(1)[0]
    captured(ADAPTERS, STATE, [long])
    last = long
    if isinstance(error, torch.OutOfMemoryError):
        captured(ADAPTERS, STATE, [long])
        last = short

    def fails(*args):
        captured.step = step
        raise error

    captured.step, before, calls = fails, STATE.clone(), step.calls
    with pytest.warns(UserWarning, match="^capture: .*; steps run one by one from here on$"):
        captured(ADAPTERS, STATE, [last])
    captured(ADAPTERS, STATE, [long])
    assert step.calls == calls + 2 and captured.graphs == 0
    assert STATE - before == last.tokens_N.sum() + long.tokens_N.sum()
    strict, _ = counted(monkeypatch, fails)
    with pytest.raises(type(error)):
        strict(ADAPTERS, STATE, [long])


@needs_cuda
def test_a_step_that_waits_for_the_device_runs_as_ever():
    model, params = make()
    optimizer, batches = optim.adamw(1e-2), some_batches(4)
    results = []
    for strict in (None, False):
        adapters = tree.map(lambda t: t + 0.02, lora.init(random.key(0), params, rank=2))
        state = optimizer.init(adapters)
        plain = make_step(model, params, optimizer, max_norm=None, policy=None)

        def waits(adapters, state, batches, plain=plain):
            adapters, state, metrics = plain(adapters, state, batches)
            return adapters, state, {"loss": metrics["loss"] + float(metrics["loss"])}

        step = waits if strict is None else capture.Captured(waits, strict=strict)
        with (
            contextlib.nullcontext() if strict is None else pytest.warns(UserWarning, match="capture: the step cannot")
        ):
            for batch in batches:
                adapters, state, metrics = step(adapters, state, [batch])
        results.append((adapters, state, metrics))
    for (path, a), (_, b) in zip(*map(tree.items, results), strict=True):
        assert torch.equal(a, b), path


@needs_cuda
def test_a_run_is_captured_unless_it_is_told_not_to_be(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(train, "Captured", lambda step, **options: made.append(options) or step)
    run(tmp_path / "a")
    run(tmp_path / "b", capture=False)
    run(tmp_path / "c", capture=True)
    assert made == [{"strict": False}, {"strict": True}]


def test_a_graph_for_every_shape_up_to_a_limit(monkeypatch):
    monkeypatch.setattr(capture, "MOST", 2)
    step = Counter()
    captured, graphs = counted(monkeypatch, step)
    short, long, other = some_batches(2)[1], some_batches(1)[0], some_batches(3)[2].to(DEVICE)
    other = dataclasses.replace(other, max_position=128)
    sequence = [[long], [short], [long], [long], [short], [other], [other], [other], [long]]
    for group in sequence:
        _, _, metrics = captured(ADAPTERS, STATE, group)
    # Eager once and recorded once for each of two shapes; the third has no room and runs as ever.
    assert step.calls == 4 + 3 and captured.graphs == 2 and [g.replays for g in graphs] == [3, 1]
    assert float(metrics["targets"]) == float(long.count)


def test_buffers_hold_the_batch_that_is_replayed(monkeypatch):
    captured, _ = counted(monkeypatch, Counter())
    first, second = some_batches(4)[0], some_batches(4)[3]
    for batch in (first, first, second):
        captured(ADAPTERS, STATE, [batch])
    (recording,) = captured._recordings.values()
    for (path, a), b in zip(tree.items(recording.microbatches[0]), tree.leaves(second), strict=True):
        assert torch.equal(a, b), path
    assert not torch.equal(first.tokens_N, second.tokens_N)


def test_a_step_that_is_not_in_place_is_refused(monkeypatch):
    captured, _ = counted(monkeypatch, lambda adapters, state, microbatches: (adapters + 1, state, {}))
    with pytest.raises(ValueError, match="capture: the step returned new tensors for adapters or state"):
        captured(ADAPTERS, STATE, some_batches(1))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the error of a machine without a GPU")
def test_capture_needs_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="make_step: capture, but the weights are on cpu, expected cuda"):
        run(tmp_path / "a", capture=True)
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="capture: adapters or state are on cpu, expected cuda"):
        capture.Captured(Counter())(ADAPTERS, STATE, some_batches(1))
