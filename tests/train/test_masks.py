"""Dropout of adapters: masks are a function of key, step and microbatch, whatever is recomputed or resumed."""

import shutil

import pytest
import torch
from oprule import DEVICE
from tiny_run import AWAY, make, run, without_times

from unsloth_core import lora, optim, random, tree
from unsloth_core.autodiff import SAVE
from unsloth_core.data import Batch
from unsloth_core.train import make_step


def dropped_out(policy=None, p=0.5, seed=1, steps=2, key=True):
    """Adapters and losses after some steps of two microbatches each, all of the same tokens."""
    model, params = make()
    batch = Batch.of([(list(range(20)), None)], vocab_size=97, tokens=24, segments=2).to(DEVICE)
    adapters = tree.map(lambda t: t + 0.1, lora.init(random.key(0), params, rank=2))
    optimizer = optim.adamw(0.0)
    state = optimizer.init(adapters)
    masks = random.key(seed) if key else None
    step = make_step(model, params, optimizer, max_norm=None, policy=policy, dropout=p, key=masks)
    seen = []
    for batches in [[batch]] * steps + [[batch, batch]]:
        adapters, state, metrics = step(adapters, state, batches)
        seen.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return seen


def test_masks_are_those_of_key_step_and_microbatch():
    plain, seen = dropped_out(p=0.0), dropped_out()
    assert plain == dropped_out(p=0.0, key=False) and plain[0] == plain[1]
    assert len({loss for loss, _ in seen}) == 3  # another mask in every step; the parameters stay
    assert seen[2][0] != dropped_out(steps=3)[2][0]  # half of it is of another microbatch's mask
    assert seen == dropped_out() and seen != dropped_out(seed=2)
    assert seen[0] != plain[0]


@pytest.mark.parametrize("policy", [{"qkv": SAVE, "attn": SAVE}, AWAY, {}], ids=["saved", "offload", "recompute"])
def test_what_is_recomputed_has_the_same_masks(policy):
    assert dropped_out(policy, steps=1) == dropped_out(dict.fromkeys(make()[0].family.SAVED, SAVE), steps=1)


def test_a_run_with_dropout_goes_on_with_the_same_masks(tmp_path):
    whole = run(tmp_path / "a", dropout=0.3)
    assert without_times(whole[1]) != without_times(run(tmp_path / "b")[1])
    folder = tmp_path / "c"
    shutil.copytree(tmp_path / "a", folder)
    last = sorted((folder / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)
    (folder / "adapter_model.safetensors").unlink()
    again = run(folder, dropout=0.3)
    for (path, x), (_, y) in zip(tree.items(whole[0]), tree.items(again[0]), strict=True):
        assert torch.equal(x, y), path


def test_dropout_is_refused_without_a_key_and_out_of_range(tmp_path):
    with pytest.raises(ValueError, match="make_step: dropout is 0.5, but no key was given"):
        dropped_out(key=False)
    with pytest.raises(ValueError, match="finetune: dropout is 1.0, expected 0 <= dropout < 1"):
        run(tmp_path, dropout=1.0)
