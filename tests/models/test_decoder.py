"""What a model refuses: a batch, ids or a policy of another kind, each with one line that says what was expected."""

import pytest
import torch
from oprule import DEVICE
from tiny import VERSIONS, judge, ours

from unsloth_core.models.decoder import Schedule

BATCH = r"loss: batch is a Tensor, expected a Batch of uc.data"
IDS = r"logits: tokens_BT is torch.{}, expected torch.int64 or torch.int32 of shape \(B, T\)"


def test_ids_and_batches_of_another_kind_are_refused():
    model_type, overrides = VERSIONS["smollm2"]
    model, params = ours(judge(model_type, **overrides))
    with pytest.raises(ValueError, match=BATCH):
        model.loss(params, torch.ones(2, 5, dtype=torch.int64, device=DEVICE))
    for ids, got in (
        (torch.ones(5, dtype=torch.int64), r"int64 of shape \(5,\)"),
        (torch.ones(2, 5), r"float32 of shape \(2, 5\)"),
    ):
        with pytest.raises(ValueError, match=IDS.format(got)):
            model.logits(params, ids.to(DEVICE))


def test_a_schedule_is_made_of_a_policy_alone():
    assert Schedule.of({"qkv": "save"}) == Schedule({"qkv": "save"}) and Schedule.of(None) == Schedule()
    with pytest.raises(ValueError, match=r"policy is \['qkv'\], expected a Schedule or a dict from names"):
        Schedule.of(["qkv"])
