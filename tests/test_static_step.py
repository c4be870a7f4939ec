"""The whole training step has static shapes and never waits for the device: it runs on fake tensors.

FakeTensorMode has no data, so any ``.item()``, any size that depends on a value, any Python branch on a tensor raises.
"""

import pytest
import torch
from tiny import VERSIONS, judge, ours
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from unsloth_core import backend, data, lora, optim, random, tree
from unsloth_core.autodiff import SAVE
from unsloth_core.train import make_step


def batch(vocab):
    examples = [([1, 5, 7, 2, 9], None), ([3, 4, 8], None)]
    return data.Batch.of(examples, vocab_size=vocab, tokens=16, segments=6)


@pytest.mark.parametrize("policy", [None, {}, {"qkv": SAVE, "attn": SAVE}], ids=str)
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_training_step_on_fake_tensors(policy, quantize):
    model_type, overrides = VERSIONS["smollm2"]
    with torch.device("cpu"):
        model, params = ours(judge(model_type, **overrides), quantize=quantize)
    params = tree.map(lambda t: t.cpu(), params)
    adapters = lora.init(random.key(0), params, rank=2)
    optimizer = optim.adamw(optim.cosine(1e-3, 10, 2))
    state = optimizer.init(adapters)
    one = batch(model.config.vocab_size)
    with backend.using("reference"), FakeTensorMode() as mode:
        fake = lambda t: tree.map(mode.from_tensor, t)  # noqa: E731
        step = make_step(model, fake(params), optimizer, max_norm=1.0, policy=policy)
        new, _, metrics = step(fake(adapters), fake(state), [fake(one), fake(one)])
    assert [t.shape for t in tree.leaves(new)] == [t.shape for t in tree.leaves(adapters)]
    assert metrics["loss"].shape == ()
    with pytest.raises(DataDependentOutputException):
        float(metrics["loss"])


def test_the_mode_does_notice_a_sync():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.ones(3).sum().item()
