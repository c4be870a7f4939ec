"""cross_entropy: the op rule, class weights, argmax, loss and gradient in one kernel, confident targets, rows that are
not 16-byte aligned, ignored and impossible targets."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oprule import DEVICE, DTYPES, assert_both_refuse, assert_op_rule, check_op, rand, strided
from torch._subclasses.fake_tensor import FakeTensorMode

from unsloth_core import backend, tree
from unsloth_core.ops import logits_row
from unsloth_core.ops.cross_entropy import cost, cross_entropy, loss_and_grad
from unsloth_core.tree import ABSENT

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "label_smoothing": st.sampled_from([0.1, 0.5, 1.0]),
        "z_loss": st.sampled_from([1e-4, 0.01, 0.5]),
        "softcap": st.sampled_from([1.0, 3.0, 30.0]),
        "ignore_index": st.sampled_from([-1, 0]),
    },
)


def targets_for(N: int, V: int, seed: int, ignore_index: int = -100, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.rand(N, generator=generator) < 0.25] = ignore_index
    return targets.to(dtype).to(DEVICE)


@given(
    N=st.sampled_from([1, 3, 5]),
    V=st.sampled_from([2, 16, 97, 240, 1009, 2300]),
    dtype=st.sampled_from(DTYPES),
    options=OPTIONS,
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    apart=st.booleans(),
    index=st.sampled_from([torch.int64, torch.int32]),
    seed=st.integers(0, 99),
)
def test_op_rule(N, V, dtype, options, spread, apart, index, seed):
    logits = rand((N, V), dtype, seed=seed, scale=spread)
    targets = targets_for(N, V, seed, options.get("ignore_index", -100), index)
    check_op(cross_entropy, (strided(logits) if apart else logits, targets), options, seed=seed)


@given(
    N=st.sampled_from([1, 4]),
    V=st.sampled_from([1, 97, 270]),
    dtype=st.sampled_from(DTYPES),
    weight_dtype=st.sampled_from(DTYPES),
    options=OPTIONS,
    apart=st.booleans(),
    seed=st.integers(0, 99),
)
def test_class_weights(N, V, dtype, weight_dtype, options, apart, seed):
    """Weights of any dtype and stride; 0 switches a class off. They are constants, so frozen."""
    weight = rand((V, 2), weight_dtype, seed=seed + 1).abs()
    weight[::3] = 0
    weight = weight[:, 0] if apart else weight[:, 0].contiguous()
    args = (rand((N, V), dtype, seed=seed, scale=3), targets_for(N, V, seed, options.get("ignore_index", -100)), weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits_row, "ONE_PASS_LANES", 32)
        check_op(cross_entropy, args, options, seed=seed, frozen=lambda path: path == "2")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_equal_pytorch(smoothing):
    logits, targets, weight = rand((7, 300), seed=5, scale=4), targets_for(7, 300, 5), rand((300,), seed=6).abs()
    options = {"weight": weight, "label_smoothing": smoothing}
    want = F.cross_entropy(logits, targets, reduction="none", **options)
    truth = F.cross_entropy(logits.double(), targets, reduction="none", **options | {"weight": weight.double()})
    with backend.using("triton"):
        got = cross_entropy(logits, targets, weight, label_smoothing=smoothing)
    assert_op_rule(got, want, truth, "losses")
    mean = F.cross_entropy(logits, targets, **options)
    torch.testing.assert_close(got.sum() / weight[targets[targets >= 0]].sum(), mean)


@pytest.mark.parametrize("lanes", [32, 256])
@pytest.mark.parametrize("V", [1, 129, 1031])
def test_argmax(V, lanes, monkeypatch):
    """The first of equal maxima, wherever the target is; losses and gradients are those without it, to the bit."""
    monkeypatch.setattr(logits_row, "ONE_PASS_LANES", lanes)
    logits, targets = rand((6, V), seed=V).round(decimals=1), targets_for(6, V, V)
    logits[0], targets[:2] = 2.5, V // 2  # all alike: the first, not the target
    logits[1, V // 2 :] = 9.0  # the target is the first of many
    targets[2:4] = torch.tensor([-100, V])
    results = {}
    for name in backend.NAMES:
        with backend.using(name):
            x = logits.clone().requires_grad_()
            losses, argmax = cross_entropy(x, targets, softcap=30.0, return_argmax=True)
            alone = cross_entropy(x, targets, softcap=30.0)
            grads = [torch.autograd.grad(out[4:].sum(), x)[0] for out in (losses, alone)]
        assert torch.equal(losses.nan_to_num(7), alone.nan_to_num(7)) and torch.equal(*(g[4:] for g in grads))
        assert argmax.dtype == torch.int64 and not argmax.requires_grad
        results[name] = argmax
    assert torch.equal(results["triton"], results["reference"])
    assert results["triton"][:4].tolist() == [0, V // 2, -1, -1]
    assert torch.equal(results["triton"][4:] == -1, targets[4:] == -100)


@given(
    N=st.sampled_from([0, 1, 5]),
    V=st.sampled_from([1, 16, 97, 1009]),
    dtype=st.sampled_from(DTYPES),
    options=OPTIONS,
    apart=st.booleans(),
    weighted=st.booleans(),
    given=st.booleans(),
    donate=st.booleans(),
    seed=st.integers(0, 99),
)
def test_loss_and_grad(N, V, dtype, options, apart, weighted, given, donate, seed):
    """What the op gives forward and backward, from one kernel; over the logits only if they are donated."""
    logits = rand((N, V), dtype, seed=seed, scale=3)
    logits = strided(logits) if apart else logits
    targets = targets_for(N, V, seed, options.get("ignore_index", -100))
    weight = rand((V,), seed=seed).abs() if weighted else ABSENT
    g = rand((N,), seed=seed + 1) if given else ABSENT
    with pytest.MonkeyPatch.context() as patch, backend.using("triton"):
        patch.setattr(logits_row, "TWO_PASS_LANES", 32)
        patch.setattr(logits_row, "ONE_PASS_LANES", 32)
        x = logits.detach().requires_grad_()
        want = cross_entropy(x, targets, weight, **options)
        (dx,) = torch.autograd.grad(want, x, torch.ones_like(want) if g is ABSENT else g)
        kept = logits.clone()
        losses, gradient = loss_and_grad(logits, targets, weight, g, donate=donate, **options)
    torch.testing.assert_close(losses, want.detach(), rtol=0, atol=0)
    torch.testing.assert_close(gradient, dx, rtol=0, atol=0)
    assert gradient.dtype == dtype and not gradient.requires_grad
    assert (gradient.data_ptr() == logits.data_ptr()) == (donate or N == 0) and gradient.shape == (N, V)
    assert donate or torch.equal(logits, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lanes", [32, 64, 128, 256, 512, 1024])
def test_every_launch_configuration(lanes, dtype):
    """Each width of tile, where a row is walked once and where it is twice, with rows off a 16-byte boundary."""
    V = lanes * 16 // dtype.itemsize - 3
    V = 2 * V + lanes if lanes == 1024 else V
    logits, targets = rand((3, V), dtype, seed=lanes, scale=3), torch.tensor([1, V - 1, V // 2], device=DEVICE)
    assert logits_row.tiles(logits, 2)["LANES"] == lanes and logits_row.tiles(logits, 1)["LANES"] == min(lanes, 256)
    check_op(cross_entropy, (logits, targets), {"label_smoothing": 0.1})
    plain = backend.reference("cross_entropy.loss_and_grad")
    truth, same = (plain(x, targets, label_smoothing=0.1) for x in (logits.double(), logits))
    for donate in (False, True):
        with backend.using("triton"):
            ours = loss_and_grad(logits.clone(), targets, label_smoothing=0.1, donate=donate)
        for o, p, t in zip(ours, same, truth, strict=True):
            assert_op_rule(o, p, t, f"loss_and_grad, donate={donate}")


@pytest.mark.parametrize("donate", [False, True])
def test_loss_and_grad_of_the_reference(donate):
    logits, targets, g = rand((4, 30), torch.bfloat16, seed=1), targets_for(4, 30, 1), rand((4,), seed=2)
    results = []
    for name in backend.NAMES:
        with backend.using(name):
            mine = logits.clone()
            losses, gradient = loss_and_grad(mine, targets, ABSENT, g, donate=donate, z_loss=0.1)
            assert (gradient.data_ptr() == mine.data_ptr()) == donate
            results.append((losses, gradient))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(("N", "V"), [(0, 5), (1, 1)])
def test_smallest(N, V):
    check_op(cross_entropy, (rand((N, V), seed=1), targets_for(N, V, 1)), {"z_loss": 0.1})


@pytest.mark.parametrize("lanes", [32, 64])
@pytest.mark.parametrize("V", [128, 129, 1024, 1031])
def test_rows_of_many_tiles(V, lanes, monkeypatch):
    """Whole tiles only, a ragged last one, and rows that start at every distance from a 16-byte boundary."""
    monkeypatch.setattr(logits_row, "ONE_PASS_LANES", lanes)
    check_op(cross_entropy, (rand((4, V), seed=V, scale=3), targets_for(4, V, 1)), {"label_smoothing": 0.1})


def relative_bound(margin: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """What fp32 can do with Σ e^(z_j − m) over logits ``spread`` apart, ``margin`` below the maximum m.

    The difference z_j − m is rounded (in two steps, over the lane's maximum): by half an ulp of numbers that add up to
    margin + spread, so that e^ of it moves by 2^-24 (margin + spread). The rest does not grow with the logits: three
    ex2.approx of 2 ulp each in the worst case (tile, lane, row) and an approximate division of 2: 8 ulp of 2^-23.
    """
    return 8 * 2**-23 + 2**-24 * (margin + spread)


def test_confident_targets():
    """p_y − 1 and the loss keep their relative accuracy at any margin; PyTorch's fp32 loses all of it by margin 20."""
    margins = torch.arange(31.0)
    logits = rand((31, 500), seed=3).cpu()
    targets = torch.arange(31) * 16
    logits[torch.arange(31), targets] = 0.0  # so that the largest and the smallest are others
    largest, smallest = logits.max(dim=1).values, logits.min(dim=1).values
    logits[torch.arange(31), targets] = largest + margins
    z = logits.double()
    others = (z - z.gather(1, targets[:, None])).exp().scatter(1, targets[:, None], 0.0).sum(dim=1)
    x = logits.to(DEVICE).requires_grad_()
    with backend.using("triton"):
        losses = cross_entropy(x, targets.to(DEVICE))
        (grad,) = torch.autograd.grad(losses.sum(), x)
    at_target = grad.cpu().gather(1, targets[:, None])[:, 0].double()
    bound = relative_bound(margins, largest - smallest).double()
    for got, want in [(losses.detach().cpu().double(), others.log1p()), (at_target, -others / (1 + others))]:
        error = (got / want - 1).abs()
        assert (error <= bound).all(), f"{(error / bound).max():.2f} of the bound, at margin {(error / bound).argmax()}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_pytorch(dtype):
    logits, targets = rand((6, 300), dtype, seed=5, scale=4), targets_for(6, 300, 5)
    want = F.cross_entropy(logits.float(), targets, reduction="none", label_smoothing=0.2)
    truth = F.cross_entropy(logits.double(), targets, reduction="none", label_smoothing=0.2)
    with backend.using("triton"):
        assert_op_rule(cross_entropy(logits, targets, label_smoothing=0.2), want, truth, "losses")


def test_large_offset():
    """Only differences of logits matter: nothing is lost where all of them are near 1e4."""
    logits, targets = 1e4 + rand((4, 90), seed=1).round(decimals=2), targets_for(4, 90, 2)
    check_op(cross_entropy, (logits, targets), {"label_smoothing": 0.3})


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_ignored_and_impossible_targets(name):
    """Ignored: 0 and no gradient, even beside NaN. Outside [0, V): NaN and a NaN gradient, and nobody else's."""
    logits = rand((6, 70), torch.bfloat16, seed=1)
    targets = torch.tensor([3, -100, 70, -1, 2**31 - 1, 69], device=DEVICE)
    with backend.using(name):
        x = logits.clone().requires_grad_()
        losses = cross_entropy(x, targets, z_loss=0.1)
        (grad,) = torch.autograd.grad(losses, x, torch.ones_like(losses))
    assert losses.isnan().tolist() == [False, False, True, True, True, False]
    assert grad.isnan().all(dim=1).tolist() == grad.isnan().any(dim=1).tolist() == losses.isnan().tolist()
    assert losses[1] == 0 and not grad[1].any()


def test_all_ignored():
    logits, targets = torch.full((3, 40), torch.nan, device=DEVICE), torch.full((3,), -100, device=DEVICE)
    with backend.using("triton"):
        x = logits.requires_grad_()
        losses = cross_entropy(x, targets)
        (grad,) = torch.autograd.grad(losses.sum(), x)
    assert not losses.any() and not grad.any()


def test_masked_vocabulary():
    """−∞ logits are classes that cannot be: the rest is what it would be without them."""
    logits, targets = rand((3, 600), seed=1), torch.tensor([5, 90, 299], device=DEVICE)
    masked = logits.clone()
    masked[:, 300:] = -torch.inf
    masked[0, 4] = -torch.inf
    keep = masked[0] > -torch.inf
    with backend.using("triton"):
        x = masked.requires_grad_()
        losses = cross_entropy(x, targets)
        (grad,) = torch.autograd.grad(losses.sum(), x)
    torch.testing.assert_close(losses[0], F.cross_entropy(logits[0, keep], torch.tensor(4, device=DEVICE)))
    torch.testing.assert_close(losses[1:], F.cross_entropy(logits[1:, :300], targets[1:], reduction="none"))
    assert grad.isfinite().all() and not grad[:, 300:].any()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # e^(2u) may be infinite: NumPy says so in the interpreter
def test_softcap_saturates():
    """Far beyond the cap tanh is flat: gradients vanish like e^(−2u), they are not rounded to zero or NaN early."""
    logits = torch.tensor([[40.0, 0.0, -40.0, 1e4]], device=DEVICE)
    check_op(cross_entropy, (logits, torch.tensor([1], device=DEVICE)), {"softcap": 5.0})


def test_zero_stride_cotangent_and_no_work_without_gradient():
    logits, targets = rand((3, 33), seed=1), targets_for(3, 33, 1)
    nothing, needs = {"needs": (False, False, ABSENT)}, {"needs": (True, False, ABSENT)}
    losses, residuals = cross_entropy.fwd(logits, targets, **nothing)
    assert residuals is ABSENT
    losses, residuals = cross_entropy.fwd(logits, targets, **needs)
    one = torch.ones(1, device=DEVICE)
    a, *_ = cross_entropy.bwd(residuals, one.expand(3), **needs)
    b, *_ = cross_entropy.bwd(residuals, one.repeat(3), **needs)
    assert torch.equal(a, b)
    assert sum(r.nbytes for r in tree.leaves(residuals[2:])) == 3 * 8
    _, residuals = cross_entropy.fwd(logits, targets, return_argmax=True, **needs)
    assert cross_entropy.bwd(residuals, (ABSENT, ABSENT), return_argmax=True, **needs) == (ABSENT, ABSENT, ABSENT)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (
            (torch.zeros(3), torch.zeros(3).long()),
            {},
            "cross_entropy: logits has shape (3,), expected (N, V) with V > 0",
        ),
        (
            (torch.zeros(3, 0), torch.zeros(3).long()),
            {},
            "cross_entropy: logits has shape (3, 0), expected (N, V) with V > 0",
        ),
        (
            (torch.zeros(3, 4), torch.zeros(1).long()),
            {},
            "cross_entropy: targets has shape (1,), expected (N,) = (3,)",
        ),
        (
            (torch.zeros(3, 4), torch.zeros(3)),
            {},
            "cross_entropy: targets has dtype torch.float32, expected torch.int64 or torch.int32",
        ),
        (
            (torch.zeros(3, 4).double(), torch.zeros(3).long()),
            {},
            "cross_entropy: logits has dtype torch.float64, expected float16, bfloat16 or float32",
        ),
        (
            (torch.zeros(4, 3).t(), torch.zeros(3).long()),
            {},
            "cross_entropy: logits has strides (1, 3), expected a last stride of 1",
        ),
        (
            (torch.zeros(3, 4), torch.zeros(3).long()),
            {"label_smoothing": 1.5},
            "cross_entropy: label_smoothing is 1.5, expected 0 to 1",
        ),
        (
            (torch.zeros(3, 4), torch.zeros(3).long()),
            {"z_loss": -1.0},
            "cross_entropy: z_loss is -1.0, expected 0 or more",
        ),
        (
            (torch.zeros(3, 4), torch.zeros(3).long()),
            {"softcap": 0.0},
            "cross_entropy: softcap is 0.0, expected a positive number or None",
        ),
    ],
)
def test_bad_input(args, options, message):
    only_kernels = "float64" in message or "strides" in message
    for name in ("triton",) if only_kernels else ("triton", "reference"):
        with backend.using(name), pytest.raises(ValueError) as error:
            cross_entropy(*[a.to(DEVICE) for a in args], **options)
        assert str(error.value) == message


def test_bad_weights_and_cotangents():
    logits, targets, weight = rand((3, 4), seed=1), torch.zeros(3, dtype=torch.int64, device=DEVICE), rand((4,), seed=2)
    assert_both_refuse(cross_entropy, logits, targets, weight[:1])
    assert_both_refuse(cross_entropy, logits, targets, weight[None])
    for name in backend.NAMES:
        with backend.using(name):
            with pytest.raises(NotImplementedError, match="no gradient for weight; detach it"):
                cross_entropy(logits, targets, weight.clone().requires_grad_())
            with pytest.raises(ValueError, match=r"cotangents has shape \(4,\), expected \(N,\) = \(3,\)"):
                loss_and_grad(logits, targets, ABSENT, weight)
            with pytest.raises(ValueError, match=r"loss_and_grad: weight has shape \(3,\), expected \(V,\) = \(4,\)"):
                loss_and_grad(logits, targets, weight[:3])


def test_reference_under_fake_tensors():
    with FakeTensorMode(), backend.using("reference"):
        x = torch.empty(5, 11, requires_grad=True)
        args = x, torch.empty(5, dtype=torch.int64), torch.empty(11)
        losses, _ = cross_entropy(*args, label_smoothing=0.1, z_loss=0.1, softcap=2.0, return_argmax=True)
        losses.sum().backward()
        assert x.grad.shape == (5, 11)


def test_cost():
    assert cost(10, 100, 2).bytes == 2000 + 160
    assert cost(10, 100, 2, backward=True).bytes == 4000 + 160
