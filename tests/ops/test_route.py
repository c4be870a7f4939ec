"""route: the op rule, the sorted order against PyTorch's sort, ties and NaN, sums over valid tokens, errors."""

import importlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from oprule import ABSENT, DEVICE, DTYPES, assert_both_refuse, assert_same_up_to_order, check_op, rand, strided

from unsloth_core import backend
from unsloth_core.cost import Cost
from unsloth_core.ops import route
from unsloth_core.remat import residual_report

file = importlib.import_module("unsloth_core.ops.route")
INTEGERS = (1, 2, 3, 4, 6)  # experts, order, positions, offsets, counts


@settings(max_examples=10)
@given(
    n=st.sampled_from([1, 2, 17, 40]),
    experts=st.sampled_from([1, 2, 7, 8, 33]),
    top_k=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
    renormalise=st.booleans(),
    valid=st.booleans(),
)
@example(n=0, experts=4, top_k=2, dtype=torch.float32, renormalise=True, valid=True)
@example(n=300, experts=8, top_k=2, dtype=torch.bfloat16, renormalise=True, valid=True)  # more than one program
def test_op_rule(n, experts, top_k, dtype, renormalise, valid):
    statics = {"top_k": min(top_k, experts), "renormalise": renormalise}
    logits = strided(rand((n, experts), dtype, seed=1, scale=2.0))
    check_op(route, (logits, rand((n,), seed=2) > 0 if valid else ABSENT), statics)


def test_plan_sorts_pairs_by_expert_and_token():
    N, E, T = 517, 11, 3
    _, experts, order, positions, offsets, *_ = route(rand((N, E), seed=3), top_k=T)
    by_expert = torch.sort(experts.reshape(-1), stable=True)
    assert torch.equal(order.long(), by_expert.indices)
    assert torch.equal(order[positions.reshape(-1).long()].cpu(), torch.arange(N * T, dtype=torch.int32))
    ends = torch.cumsum(torch.bincount(experts.reshape(-1), minlength=E), 0)
    assert offsets[0] == 0 and torch.equal(offsets[1:].long(), ends)
    assert (experts.sort(dim=1).values.diff(dim=1) > 0).all()  # no expert twice


def test_all_tokens_to_one_expert():
    logits = rand((70, 6), seed=4)
    logits[:, 4] += 100
    gates, experts, order, _, offsets, prob_sums, counts = route(logits, top_k=1)
    assert (experts == 4).all() and (gates == 1).all()
    assert offsets.tolist() == [0, 0, 0, 0, 0, 70, 70] and counts.tolist() == [0, 0, 0, 0, 70, 0]
    assert torch.equal(order.cpu(), torch.arange(70, dtype=torch.int32))
    assert prob_sums[4] == 70


@pytest.mark.parametrize("name", backend.NAMES)
def test_equal_logits_take_the_lowest_expert_and_nan_is_the_largest(name):
    row = [1.0, 3.0, 3.0, 3.0, float("-inf"), 1.0]
    nan = [1.0, float("nan"), 5.0, float("nan"), 0.0, 0.0]
    logits = torch.tensor([row, [2.0] * 6, nan, [float("-inf")] * 6], device=DEVICE)
    with backend.using(name):
        gates, experts, *_ = route(logits, top_k=4)
    assert experts[0].tolist() == [1, 2, 3, 0] and experts[1].tolist() == [0, 1, 2, 3]
    assert experts[2].tolist() == [1, 3, 2, 0] and experts[3].tolist() == [0, 1, 2, 3]
    assert torch.isfinite(gates[:2]).all() and gates[2:].isnan().all()


def test_chunks_of_tokens_add_up():
    logits, valid = rand((90, 8), seed=5), rand((90,), seed=6) > 0
    *_, sums, counts = route(logits, valid, top_k=2)
    parts = [route(logits[part], valid[part], top_k=2) for part in (slice(0, 31), slice(31, 90))]
    assert torch.equal(counts, sum(part[6] for part in parts))
    assert_same_up_to_order(sum(part[5] for part in parts), sums)
    kept = route(logits[valid], top_k=2)
    assert torch.equal(counts, kept[6])
    assert_same_up_to_order(kept[5], sums)


def test_gradient_of_one_output_alone():
    """Also of strange strides: one number for all gates."""
    for chosen in (0, 5):
        found = []
        for name in backend.NAMES:
            logits = rand((9, 5), seed=7).requires_grad_()
            with backend.using(name):
                out = route(logits, top_k=2, renormalise=False)[chosen]
            found.append(torch.autograd.grad(out, logits, torch.ones((), device=DEVICE).expand(out.shape))[0])
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_integers_have_no_gradient_and_residuals_are_arguments_or_outputs():
    logits = rand((9, 5), seed=8).requires_grad_()
    out = route(logits, top_k=2)
    assert [o.requires_grad for o in out] == [i not in INTEGERS for i in range(7)]
    with backend.using("triton"):
        report = residual_report(lambda z: route(z, top_k=2), logits)
    assert [row.bytes for row in report.rows if row.name == "route"] == [sum(o.nbytes for o in out)]


def test_errors():
    logits = rand((4, 3), seed=9)
    valid = torch.ones(4, dtype=torch.bool, device=DEVICE)
    assert_both_refuse(route, logits, valid[:1], top_k=1)
    with backend.using("triton"):
        for args, top_k, message in (
            ((logits[0],), 1, r"logits has shape \(3,\), expected \(N, E\)"),
            ((logits,), 4, r"top_k is 4, expected 1 to E = 3"),
            ((logits,), 0, r"top_k is 0"),
            ((logits.double(),), 1, r"logits has dtype torch.float64"),
            ((logits, valid.int()), 1, r"valid has dtype torch.int32, expected torch.bool"),
        ):
            with pytest.raises(ValueError, match=message):
                route(*args, top_k=top_k)
        with pytest.raises(NotImplementedError, match="E <= 1024"):
            route(logits.new_zeros(1, 1025), top_k=1)


def test_cost():
    assert file.cost(10, 8, 2) == Cost(bytes=10 * 8 * 2 + 16 * 20, flops=8 * 80)
    assert file.cost(10, 8, 2, backward=True) == Cost(bytes=2 * 10 * 8 * 2 + 12 * 20, flops=8 * 80)
