"""remat: a plan never changes the numbers, keeps what it says, and never replays what nobody reads."""

import gc

import pytest
import torch
from oprule import DEVICE
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from unsloth_core import backend, tree
from unsloth_core.autodiff import RECOMPUTE, SAVE, remat, residual_report, value_and_grad
from unsloth_core.ops.glu import glu
from unsloth_core.ops.linear import linear
from unsloth_core.ops.rms_norm import rms_norm
from unsloth_core.tree import ABSENT

N, D, F = 6, 8, 16
POLICIES = [{}, {"up": SAVE}, {"act": SAVE}, {"up": SAVE, "down": SAVE}, {"norm": SAVE, "up": RECOMPUTE}]


def layer(w, x):
    h = glu(linear(rms_norm(x, w["norm"], name="norm"), w["up"], name="up"), name="act")
    return linear(h, w["down"], add=x, name="down")


def weights(seed=0, layers=2):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: (torch.randn(shape, generator=g) * 0.3).to(DEVICE)  # noqa: E731
    return [{"norm": 1 + make(D), "up": make(2 * F, D), "down": make(D, F)} for _ in range(layers)]


def loss(policy):
    x0 = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def f(ws):
        x = x0
        for w in ws:
            x = remat(layer, policy)(w, x)
        return x.square().mean()

    return f


@pytest.mark.parametrize("name", backend.NAMES)
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_policy_gives_the_bits_of_none(policy, name):
    with backend.using(name):
        value, grads = value_and_grad(loss(None))(weights())
        value_p, grads_p = value_and_grad(loss(policy))(weights())
    assert torch.equal(value, value_p)
    for (path, a), (_, b) in zip(tree.items(grads), tree.items(grads_p), strict=True):
        assert torch.equal(a, b), path


def test_the_last_product_is_never_replayed_and_the_report_says_so():
    report = residual_report(loss({"up": SAVE}), weights())
    fates = {row.name: (row.fate, row.bytes) for row in report.rows}
    assert fates["up"] == (SAVE, N * 2 * F * 4)
    assert fates["down"] == ("dead", 0)
    assert fates["norm"][0] == "dead" or fates["norm"][0] == RECOMPUTE
    assert fates["act"][0] == RECOMPUTE  # dW of down reads it
    assert "up" in str(report) and report.bytes == sum(row.bytes for row in report.rows)


class Meter(TorchDispatchMode):
    """Storages met while it is on, but for the given ones; ``live()`` are the bytes of those that still exist."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree.leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return out

    def live(self):
        return sum(size for key, (ref, size) in self.seen.items() if not ref.expired() and key not in self.known)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_kept_bytes_are_what_the_report_says(policy):
    """What lives between forward and backward, measured from outside."""
    ws = tree.map(lambda t: t.requires_grad_(), weights())
    reported = residual_report(loss(policy), weights())
    gc.collect()
    f = loss(policy)
    with Meter(tree.leaves(ws)) as meter:
        value = f(ws)
        gc.collect()
        kept = meter.live() - value.nbytes - N * D * 4  # x0, which f holds
    input_of_square = N * D * 4  # f itself keeps the last layer's output
    # A saved layer output is also what the next layer, or f, keeps: one tensor that the report counts in both places.
    twice = 2 * N * D * 4 if policy.get("down") == SAVE else 0
    assert kept == reported.bytes + input_of_square - twice


def test_backward_twice_is_equal():
    ws = tree.map(lambda t: t.requires_grad_(), weights())
    value = loss({"up": SAVE})(ws)
    first = torch.autograd.grad(value, tree.leaves(ws), retain_graph=True)
    second = torch.autograd.grad(value, tree.leaves(ws))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_frozen_leaves_cost_no_gradient():
    ws = weights()
    trained = ws[0]["norm"].clone().requires_grad_()
    value = loss({})([{**ws[0], "norm": trained}, ws[1]])
    (g,) = torch.autograd.grad(value, trained)
    (full,) = [v for p, v in tree.items(value_and_grad(loss({}))(weights())[1]) if p == "0.norm"]
    assert torch.equal(g, full)


def test_a_typo_in_the_policy_is_refused():
    with pytest.raises(ValueError, match=r"remat: policy names \['upp'\], but the calls of this layer are"):
        value_and_grad(loss({"upp": SAVE}))(weights())
    with pytest.raises(ValueError, match=r"remat: policy\['up'\] is 'keep', expected 'save' or 'offload' or 'recompute'"):
        remat(layer, {"up": "keep"})


def test_a_closure_that_wants_a_gradient_is_refused():
    w = weights()[0]["norm"].requires_grad_()
    x = torch.randn(N, D, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match="remat: op 'rms_norm' got a tensor that wants a gradient through a closure"):
        remat(lambda x: rms_norm(x, w), {})(x)


def test_nested_remat_is_refused():
    x = torch.randn(N, D, device=DEVICE, requires_grad=True)
    inner = remat(lambda x: rms_norm(x, torch.ones(D, device=DEVICE)), {})
    with pytest.raises(ValueError, match="remat: called inside another remat"):
        remat(lambda x: inner(x.detach().requires_grad_()), {})(x)


def test_without_gradients_a_layer_just_runs():
    w, x = weights()[0], torch.randn(N, D, device=DEVICE)
    assert torch.equal(remat(layer, {"up": SAVE})(w, x), layer(w, x))
    assert remat(layer, None) is layer and ABSENT is not None
