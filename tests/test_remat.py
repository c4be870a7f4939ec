"""remat: a plan never changes the numbers, keeps what it says, and never replays what nobody reads."""

import gc

import pytest
import torch
from oprule import DEVICE
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from unsloth_core import backend, tree
from unsloth_core.autodiff import (
    INPUT,
    OFFLOAD,
    RECOMPUTE,
    SAVE,
    listening,
    value_and_grad,
    vjp,
)
from unsloth_core.ops import nf4
from unsloth_core.ops.add_rms_norm import add_rms_norm
from unsloth_core.ops.glu import glu
from unsloth_core.ops.linear import linear
from unsloth_core.ops.linear_cross_entropy import linear_cross_entropy
from unsloth_core.ops.rms_norm import rms_norm
from unsloth_core.remat import remat, residual_report, tiled
from unsloth_core.tree import ABSENT
from unsloth_core.weights import Adapted, LoRA, Stacked

N, D, F = 6, 8, 16
POLICIES = [{}, {"up": SAVE}, {"act": SAVE}, {"up": SAVE, "down": SAVE}, {"norm": SAVE, "up": RECOMPUTE}]


def layer(w, x):
    h = glu(linear(rms_norm(x, w["norm"], name="norm"), w["up"], name="up"), name="act")
    return linear(h, w["down"], add=x, name="down")


def passing(w, x):
    """The same with the stream through its norm, twice."""
    x, n = add_rms_norm(x, ABSENT, w["norm"], name="norm")
    x, n = add_rms_norm(linear(glu(linear(n, w["up"], name="up"), name="act"), w["down"], add=x), ABSENT, w["norm"])
    return linear(glu(linear(n, w["up"])), w["down"], add=x, name="down")


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


@pytest.mark.parametrize("name", backend.NAMES)
@pytest.mark.parametrize("policy", [{}, {"norm": SAVE}, {"norm": OFFLOAD, "act": SAVE}, {"up": SAVE}, 1, 4], ids=str)
def test_a_stream_that_passes_through_an_op(policy, name):
    """It is an argument and an output: kept once, there for whoever reads it behind a call that does not run again, not
    copied by tiles."""
    x0 = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    layers = remat(passing, policy) if isinstance(policy, dict) else tiled(passing, policy, name="layer")

    def f(ws, through):
        x = x0
        for w in ws:
            x = through(w, x)
        return x.square().mean()

    with backend.using(name):
        value, grads = value_and_grad(f)(weights(), passing)
        value_p, grads_p = value_and_grad(f)(weights(), layers)
    if isinstance(policy, dict):
        assert torch.equal(value, value_p)
    for (path, a), (_, b) in zip(tree.items(grads), tree.items(grads_p), strict=True):
        assert torch.equal(a, b) if isinstance(policy, dict) else torch.allclose(a, b, rtol=1e-5, atol=1e-6), path


def test_tiles_do_not_copy_rows_that_pass_through():
    x = torch.randn(N, D, device=DEVICE)
    fn = tiled(lambda w, x: add_rms_norm(x, ABSENT, w), 2, name="norm")
    through, y = fn(torch.ones(D, device=DEVICE), x)
    assert through.data_ptr() == x.data_ptr() and y.shape == x.shape and torch.equal(through, x)


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
        kept = meter.live() - value.nbytes
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
    with pytest.raises(ValueError, match=r"policy\['up'\] is 'keep', expected 'save' or 'offload' or 'recompute'"):
        remat(layer, {"up": "keep"})
    with pytest.raises(ValueError, match=r"policy\['layer input'\] is 'recompute', expected 'save' or 'offload'"):
        remat(layer, {INPUT: RECOMPUTE})


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


# ---------------------------------------------------------------------------------------------- NF4 decoded once


def quantised(seed=0):
    """A layer as fine-tuned: NF4 (one of them of two parts), adapters on top."""
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: (torch.randn(shape, generator=g) * 0.3).to(DEVICE)  # noqa: E731
    lora = lambda m, c: LoRA(a=make(2, c), b=make(m, 2), scale=0.5)  # noqa: E731
    up = Stacked(parts=(nf4.quantize(make(F, D)), nf4.quantize(make(F, D))))
    return {
        "norm": 1 + make(D),
        "up": Adapted(base=up, parts=(lora(F, D), ABSENT), rows=(F, F)),
        "down": Adapted(base=nf4.quantize(make(D, F)), parts=(lora(D, F),), rows=(D,)),
    }


def trained(ws):
    """The adapters of :func:`quantised` layers."""
    return [{name: w[name].parts for name in ("up", "down")} for w in ws]


def loss_of_adapters(ws, run):
    def f(adapters):
        x = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        for w, parts in zip(ws, adapters, strict=True):
            put = {n: Adapted(base=w[n].base, parts=parts[n], rows=w[n].rows) for n in parts}
            x = run({**w, **put}, x)
        return x.square().mean()

    return f


def decodings(monkeypatch, f, adapters):
    """How often forward and backward of ``f`` launch the kernel that decodes; and value and gradients."""
    count, launch = [0], nf4.device.launch

    def counted(kernel, *args, **options):
        count[0] += kernel is nf4._dequantize_kernel
        return launch(kernel, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nf4.device, "launch", counted)
        patch.setattr(nf4.device, "straight", lambda _: False)  # prepared calls launch without it
        value, pullback = vjp(f, adapters)
        forward = count[0]
        (gradients,) = pullback(torch.ones_like(value))
    return {"forward": forward, "backward": count[0] - forward}, (value, gradients)


@pytest.mark.parametrize(
    ("policy", "once", "forward", "backward"),
    [
        # up is of two parts; its recomputation needs it, and dX needs it and down
        ({}, True, 3, 3),
        ({}, False, 3, 5),
        ({"up": SAVE}, True, 3, 3),
        ({"up": SAVE}, False, 3, 3),
    ],
)
def test_a_layer_decodes_each_weight_once_in_either_direction(monkeypatch, policy, once, forward, backward):
    ws = [quantised(0), quantised(1)]
    run = remat(layer, policy, decode_once=once)
    with backend.using("triton"):
        count, found = decodings(monkeypatch, loss_of_adapters(ws, run), trained(ws))
        plain = value_and_grad(loss_of_adapters(ws, layer))(trained(ws))
    # The first layer's x wants no gradient, so its up is not read for dX.
    saved = 2 if policy or not once else 0
    assert count == {"forward": 2 * forward, "backward": 2 * backward - saved}
    for (path, a), (_, b) in zip(tree.items(found), tree.items(plain), strict=True):
        assert torch.equal(a, b), path


def test_what_was_decoded_is_forgotten_with_its_layer(monkeypatch):
    """No more than the two matrices of one layer exist at a time."""
    ws = [quantised(i) for i in range(3)]
    seen, launch = {}, nf4.device.launch

    def watched(kernel, *args, **options):
        if kernel is nf4._dequantize_kernel:
            storage = args[6].untyped_storage()  # what is written
            seen[storage._cdata] = StorageWeakRef(storage)
            gc.collect()
            assert sum(not ref.expired() for ref in seen.values()) <= 2
        return launch(kernel, *args, **options)

    monkeypatch.setattr(nf4.device, "launch", watched)
    monkeypatch.setattr(nf4.device, "straight", lambda _: False)  # prepared calls launch without it
    with backend.using("triton"):
        value_and_grad(loss_of_adapters(ws, remat(layer, {})))(trained(ws))
    assert seen


# --------------------------------------------------------------------------------------------------------- tiles


def mlp(w, x, targets):
    """A token-local function with something to add up."""
    return layer(w, x), linear_cross_entropy(x, w["up"], targets, name="loss")


@pytest.mark.parametrize(
    ("size", "name"), [(1, "reference"), (4, "reference"), (4, "triton"), (N, "reference"), (100, "triton")]
)
def test_tiles_give_the_same_gradients(size, name):
    ws = weights()

    def f(run):
        def of(ws):
            x = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)
            total = 0
            for w in ws:
                x, more = run(w, x, torch.arange(N, device=DEVICE))
                total = total + more
            return x.square().mean() + total

        return of

    with backend.using(name):
        want = value_and_grad(f(mlp))(ws)
        tiles = tiled(mlp, size, name="mlp", sums=(False, True))
        found = value_and_grad(f(tiles))(ws)
        inside = value_and_grad(f(remat(lambda w, x, t: tiles(w, x, t), {"mlp": SAVE})))(ws)
    for (path, a), (_, b), (_, c) in zip(tree.items(want), tree.items(found), tree.items(inside), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-5, atol=2e-6, msg=path)
        assert torch.equal(b, c), path  # with a policy around or without


def test_a_tiled_call_keeps_its_arguments_alone_and_is_never_replayed_for_nothing():
    tiles = tiled(layer, 2, name="mlp")
    heard = []

    def f(ws):
        x = torch.randn(N, D, generator=torch.Generator().manual_seed(1)).to(ws[0]["norm"].device)
        for w in ws:
            x = remat(lambda w, x: tiles(w, x), {})(w, x)
        return x.square().mean()

    report = residual_report(f, weights())
    assert {row.name: row.fate for row in report.rows} == {INPUT: SAVE, "mlp": "dead"}
    assert report.bytes == N * D * 4  # the stream between the two layers
    # On meta tensors, whose backward runs in this thread, where the listener is.
    with backend.using("triton"), listening(lambda phase, op, name, *_: heard.append((phase, name))):
        value_and_grad(f)(tree.map(lambda t: t.to("meta"), weights()))
    for name, forward, backward in (("up", 6 + 6, 6), ("down", 6, 6), ("norm", 6 + 6, 6), ("act", 6 + 6, 6)):
        assert heard.count(("forward", name)) == forward and heard.count(("backward", name)) == backward, name


def test_tiles_decode_each_weight_once_in_either_direction(monkeypatch):
    ws = [quantised(0)]
    with backend.using("triton"):
        count, found = decodings(monkeypatch, loss_of_adapters(ws, tiled(layer, 2, name="mlp")), trained(ws))
        tiles = tiled(layer, 2, name="mlp", decode_once=False)
        each, same = decodings(monkeypatch, loss_of_adapters(ws, tiles), trained(ws))
    assert sum(count.values()) == 3 + 3 and sum(each.values()) == 3 * (3 + 3)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(found), tree.leaves(same), strict=True))


def test_a_tiled_function_that_does_not_keep_its_rows_is_refused():
    x = torch.randn(N, D, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError, match=r"tiled: f returns a tensor of shape \(\) for 2 rows, expected \(rows, ...\)"):
        tiled(lambda w, x: x.sum(), 2, name="f")((), x)
    with pytest.raises(ValueError, match="tiled: size is 0, expected at least 1"):
        tiled(layer, 0, name="f")


def test_offload_is_a_fate_of_its_own():
    report = residual_report(loss({"up": OFFLOAD, INPUT: OFFLOAD}), weights())
    fates = {row.name: row.fate for row in report.rows}
    assert fates["up"] == fates[INPUT] == OFFLOAD and report.bytes == 0


def test_the_backward_of_a_layer_is_not_differentiated_again():
    """Also where the cotangent of the first time is a constant."""
    (w,), x = weights(layers=1), torch.ones(N, D, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(remat(layer, {})(w, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="remat: the backward of a layer cannot be differentiated again"):
        (x.sum() + dx.square().sum()).backward()
