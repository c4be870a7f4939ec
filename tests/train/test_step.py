"""Accumulated gradients are those of one batch, clipped by their whole norm; evaluation weighs every target alike."""

import math

import pytest
import torch
from oprule import DEVICE, assert_op_rule
from tiny_run import make

from unsloth_core import backend, lora, optim, random, train, tree
from unsloth_core.autodiff import value_and_grad
from unsloth_core.data import Batch
from unsloth_core.train import make_step


def gradients_only():
    """An optimizer that changes nothing: the step returns the gradients in place of the adapters."""
    return optim.Optimizer(lambda params: (), lambda grads, state, params, *, clip, donate: (grads, state))


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("policy", [None, {}], ids=["default", "recompute"])
def test_accumulated_gradients_are_those_of_one_batch(parts, policy):
    model, params = make()
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 9, (10,), generator=generator).tolist()  # microbatches with few and with many targets
    examples = [(torch.randint(0, 97, (n,), generator=generator).tolist(), None) for n in lengths]
    batch = lambda some: Batch.of(some, vocab_size=97, tokens=80, segments=12).to(DEVICE)  # noqa: E731
    adapters = tree.map(lambda t: t + 0.05, lora.init(random.key(0), params, rank=2))

    def one_batch(dtype, device=DEVICE):
        base, start = (tree.map(lambda x: x.to(device, dtype), t) for t in (params, adapters))
        with backend.using("reference"):
            found = value_and_grad(lambda t: model.loss(lora.adapt(base, t), batch(examples))[0])(start)
        return tree.map(lambda x: x.to(DEVICE), found)

    # What one fp32 run errs is made before the sum, and much of it is luck: of layer 0's down_proj.a PyTorch is 2.7 to
    # 4.5 units of its largest entry off on an H100, in whatever parts it adds, and 12 on a CPU. The worse counts.
    loss64, grads64 = one_batch(torch.float64)
    devices = {DEVICE, torch.device("cpu")}
    (loss32, grads32), *others = [one_batch(torch.float32, device) for device in devices]
    worse = lambda t64, *ways: max(ways, key=lambda t: float((t.double() - t64).abs().max()))  # noqa: E731
    loss32 = worse(loss64, loss32, *[loss for loss, _ in others])
    grads32 = tree.map(worse, grads64, grads32, *[grads for _, grads in others])
    step = make_step(model, params, gradients_only(), max_norm=None, policy=policy)
    grads, state, metrics = step(adapters, (), [batch(examples[i::parts]) for i in range(parts)])
    assert state == () and float(metrics["targets"]) == sum(lengths) - len(lengths)
    assert_op_rule(metrics["loss"], loss32, loss64, "loss")
    norm = math.sqrt(sum(float(g.square().sum()) for g in tree.leaves(grads64)))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    for (path, g), g32, g64 in zip(tree.items(grads), tree.leaves(grads32), tree.leaves(grads64), strict=True):
        assert_op_rule(g, g32, g64, path)


@pytest.mark.parametrize("factor, clipped", [(0.5, True), (2.0, False), (float("inf"), False), (None, False)])
def test_clipping_by_the_norm_of_the_whole_gradient(factor, clipped):
    model, params = make()
    batch = lambda ids: Batch.of([(ids, None)], vocab_size=97, tokens=16, segments=3).to(DEVICE)  # noqa: E731
    batches = [batch([1, 5, 7, 2]), batch([9, 4, 4])]
    adapters = lora.init(random.key(0), params, rank=2)
    seen = []

    def update(grads, state, params, *, clip, donate):
        seen.append(clip)
        return params, state

    spy = optim.Optimizer(lambda params: (), update)
    _, _, metrics = make_step(model, params, spy, max_norm=None, policy=None)(adapters, (), batches)
    assert seen == [None]
    norm = float(metrics["grad_norm"])
    if factor is not None:
        make_step(model, params, spy, max_norm=factor * norm, policy=None)(adapters, (), batches)
        assert float(seen[1]) == pytest.approx(factor if clipped else 1.0, rel=1e-4)


def test_evaluation_weighs_every_target_alike():
    model, params = make()
    examples = [([1, 2, 3, 4, 5, 6, 7], None), ([9, 8], None), ([5, 5, 5], None)]
    batch = lambda some: Batch.of(some, vocab_size=97, tokens=16, segments=4).to(DEVICE)  # noqa: E731
    one = train.evaluate(model, params, [batch(examples)])
    three = train.evaluate(model, params, [batch([e]) for e in examples])
    assert isinstance(one, float) and one == pytest.approx(three, rel=1e-5)
    assert one == pytest.approx(float(model.loss(params, batch(examples))[0]), rel=1e-6)
