"""linear_logprob: the op rule with every form of backward, each cotangent alone, confident targets, ignored and
impossible rows, work and residuals, bad input."""

import contextlib
import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oprule import DEVICE, DTYPES, assert_both_refuse, assert_op_rule, check_op, rand, strided
from torch._subclasses.fake_tensor import FakeTensorMode

from unsloth_core import backend
from unsloth_core.ops import logits_row
from unsloth_core.ops.linear_logprob import cost, linear_logprob
from unsloth_core.tree import ABSENT

# The package exports the ops under these names.
module = importlib.import_module("unsloth_core.ops.linear_logprob")
chunk_module = importlib.import_module("unsloth_core.ops.linear_cross_entropy")

# In fp32 the products decide: the same sums in another order, and the cotangents after them instead of before.
FACTOR = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
NEEDS = {"frozen": (True, False, False, False), "trainable": (True, True, False, False)}


OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.5, 0.7, 3.0]),
        "softcap": st.sampled_from([3.0, 30.0]),
        "ignore_index": st.sampled_from([-1, 0]),
        "entropy_grad": st.just(True),
    },
)


@contextlib.contextmanager
def small_chunks():
    """About 2 tokens per chunk (3 with a trainable head) and tiles of 32 lanes: several of everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunk_module, "CHUNK_LOGITS", 2 * 200)
        patch.setattr(chunk_module, "TRAINABLE_ROWS", 3)
        patch.setattr(logits_row, "ONE_PASS_LANES", 32)
        patch.setattr(logits_row, "TWO_PASS_LANES", 32)
        yield


def example(N, D, V, dtype, seed, padded, ignore_index=-100):
    """(x, w, targets[, rows]). Entries are small integers over powers of two, so every logit is exact in 16 bits."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (N, D), generator=generator) / 4
    w = torch.randint(-2, 3, (V, D), generator=generator) / 2
    M = N if padded is None else N + padded
    targets = torch.randint(0, V, (M,), generator=generator)
    targets[torch.rand(M, generator=generator) < 0.2] = ignore_index
    args = [x.to(dtype), w.to(dtype), targets]
    if padded is not None:
        rows = torch.randperm(N, generator=generator)[: N - N // 3]
        rows = torch.cat([rows, torch.full((M - len(rows),), N)])
        args.append(rows[torch.randperm(M, generator=generator)].int())
    return tuple(a.to(DEVICE) for a in args)


@given(
    N=st.sampled_from([1, 3]),
    D=st.sampled_from([8, 24]),
    V=st.sampled_from([3, 64, 270]),
    dtype=st.sampled_from(DTYPES),
    options=OPTIONS,
    padded=st.sampled_from([None, 0, 2]),
    trainable=st.booleans(),
    seed=st.integers(0, 99),
)
def test_op_rule(N, D, V, dtype, options, padded, trainable, seed):
    """All three outputs with a cotangent each: the recomputing forms (the frozen one, announced or not)."""
    args = example(N, D, V, dtype, seed, padded, options.get("ignore_index", -100))
    frozen = (lambda path: False) if trainable else (lambda path: path == "1")
    with small_chunks():
        check_op(linear_logprob, args, options, seed=seed, frozen=frozen, factor=FACTOR[dtype])


def gradients(name, args, trainable, given, **options):
    """dx, or (dx, dw), for cotangents of which some are None, with one backend."""
    with backend.using(name):
        wanted = [a.detach().requires_grad_() for a in args[: 1 + trainable]]
        outs = linear_logprob(*wanted, *args[1 + trainable :], **options)
        pairs = [(o, ct.to(o.dtype)) for o, ct in zip(outs, given, strict=True) if ct is not None]
        return torch.autograd.grad([o for o, _ in pairs], wanted, [ct for _, ct in pairs])


@given(
    V=st.sampled_from([3, 270]),
    dtype=st.sampled_from(DTYPES),
    options=OPTIONS,
    padded=st.sampled_from([None, 1]),
    trainable=st.booleans(),
    chosen=st.sampled_from([(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (1, 1, 0)]),
    seed=st.integers(0, 99),
)
def test_some_cotangents(V, dtype, options, padded, trainable, chosen, seed):
    """Outputs that nobody uses: the op rule for logprob, entropy and lse alone and in pairs."""
    args = example(3, 8, V, dtype, seed, padded, options.get("ignore_index", -100))
    given = [rand((args[2].shape[0],), torch.bfloat16, seed=seed + i) if use else None for i, use in enumerate(chosen)]
    doubles = tuple(a.double() if a.is_floating_point() else a for a in args)
    truth = gradients("reference", doubles, trainable, given, **options)
    same = gradients("reference", args, trainable, given, **options)
    with small_chunks():
        ours = gradients("triton", args, trainable, given, **options)
    for o, s, t in zip(ours, same, truth, strict=True):
        assert_op_rule(o, s, t, f"gradient of {chosen}", FACTOR[dtype])


@pytest.mark.parametrize("form", NEEDS)
def test_cotangents_add_up(form):
    """Backward is linear in each cotangent separately: scaled alone, to the bit; and their gradients add up."""
    trainable = form == "trainable"
    args = example(6, 16, 90, torch.float32, 3, 1)
    given = [rand((7,), seed=i) for i in range(3)]
    with small_chunks():
        every = gradients("triton", args, trainable, given)
        alone = [
            gradients("triton", args, trainable, [ct if i == j else None for j, ct in enumerate(given)])
            for i in range(3)
        ]
        scaled = gradients("triton", args, trainable, [-4 * given[0], None, None])
    assert all(torch.equal(a, -4 * b) for a, b in zip(scaled, alone[0], strict=True))
    for whole, *parts in zip(every, *alone, strict=True):
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize(("N", "D", "V"), [(0, 3, 5), (1, 1, 1), (5, 1, 2)])
@pytest.mark.parametrize("padded", [None, 1])
def test_smallest(N, D, V, padded, entropy_grad):
    args = example(N, D, V, torch.float32, 1, padded)
    options = {"temperature": 0.5, "entropy_grad": entropy_grad}
    check_op(linear_logprob, args, options, factor=FACTOR[torch.float32])
    given = [rand((args[2].shape[0],), seed=2), None, rand((args[2].shape[0],), seed=3)]
    ours, want = (gradients(name, args, False, given, **options)[0] for name in ("triton", "reference"))
    torch.testing.assert_close(ours, want)


def test_strides():
    x, w, targets = rand((9, 8), seed=1), rand((70, 8), seed=2), example(9, 8, 70, torch.float32, 3, None)[2]
    apart = (strided(x), strided(w), torch.stack([targets, targets], dim=1)[:, 0])
    with small_chunks():
        check_op(linear_logprob, apart, factor=FACTOR[torch.float32])
        given = [torch.ones(1, device=DEVICE).expand(9), None, rand((9, 2), seed=4)[:, 0]]
        (ours,) = gradients("triton", apart, False, given)
        (dense,) = gradients("triton", (x, w, targets), False, [None if g is None else g.clone() for g in given])
    torch.testing.assert_close(ours, dense)


def test_confident_targets():
    """The log-probability, the entropy and their gradients keep full relative accuracy at any margin of the target,
    where fp32's z_y − lse has lost all of it by 20: errors as in cross_entropy, 8 ulp and 2^-24 per unit of distance.
    """
    margins, V = torch.arange(31.0), 500
    others = rand((1, V), seed=3).cpu() / 4
    others[0, 7] = 0.0
    # x picks "margin" and "others" out of w's two columns: the logits are exact sums of what stands in both.
    x = torch.stack([margins + others.max(), torch.ones(31)], dim=1)
    w = torch.stack([torch.zeros(V), others[0]], dim=1)
    w[7] = torch.tensor([1.0, 0.0])
    targets = torch.full((31,), 7)
    wide = x.double().requires_grad_(), w.double()
    z = wide[0] @ wide[1].t()
    rest = (z - z[:, 7:8])[:, torch.arange(V) != 7]
    logprob = -rest.exp().sum(dim=1).log1p()
    q = rest + logprob[:, None]
    entropy = -logprob.exp() * logprob - (q.exp() * q).sum(dim=1)
    bound = 8 * 2**-23 + 2**-24 * (margins + others.max() - others.min()).double()
    with backend.using("triton"):
        mine = x.to(DEVICE).requires_grad_()
        outs = linear_logprob(mine, w.to(DEVICE), targets.to(DEVICE))
        grads = [torch.autograd.grad(o.sum(), mine, retain_graph=True)[0].cpu() for o in outs[:2]]
    # The entropy's terms are products of two such numbers, over a third. dz_y is p_y (u_y − entropy), a difference.
    u, H = -logprob.detach(), entropy.detach()
    bounds = {"logprob": (bound, bound), "entropy": (2 * bound, 2 * bound * (1 + (u + H) / (u - H).abs()))}
    for (name, allowed), got, want, grad in zip(bounds.items(), outs, (logprob, entropy), grads, strict=False):
        (truth,) = torch.autograd.grad(want.sum(), wide[0], retain_graph=True)
        value, slope = got.detach().cpu().double() / want.detach() - 1, grad[:, 0].double() / truth[:, 0] - 1
        for what, error, most in (("", value, allowed[0]), (" gradient", slope, allowed[1])):
            worst = (error.abs() / most).max()
            assert worst <= 1, f"{name}{what}: {worst:.2f} of the bound"


def test_certain_of_another():
    """An entropy near 0 because another class is certain: absolute accuracy, never negative beyond rounding."""
    w = torch.zeros(200, 1)
    w[3] = 1.0
    args = (torch.tensor([[25.0]]), w, torch.tensor([5]))
    with backend.using("triton"):
        logprob, entropy, lse = linear_logprob(*[a.to(DEVICE) for a in args])
    torch.testing.assert_close(logprob, torch.full((1,), -25.0, device=DEVICE))
    assert entropy.abs() < 2**-22 and lse == 25


@pytest.mark.parametrize("name", backend.NAMES)
@pytest.mark.parametrize("form", NEEDS)
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_ignored_and_impossible_targets(name, form, entropy_grad):
    """Ignored and padding: 0 and no gradient. Outside [0, V): NaN, and a NaN gradient of that row alone."""
    x, w = rand((7, 8), torch.bfloat16, seed=1), rand((70, 8), torch.bfloat16, seed=2)
    targets = torch.tensor([3, -100, 70, -1, 5, 69, 4], device=DEVICE)
    rows = torch.tensor([0, 1, 2, 3, 7, 5, 6], device=DEVICE)
    with small_chunks(), backend.using(name):
        inputs = [x.clone().requires_grad_(), w.clone().requires_grad_(form == "trainable")]
        outs = linear_logprob(*inputs, targets, rows, entropy_grad=entropy_grad)
        used = outs if entropy_grad else (outs[0], outs[2])
        (dx,) = torch.autograd.grad(sum(o.sum() for o in used), inputs[:1])
    for out in outs:
        assert out.isnan().tolist() == [False, False, True, True, False, False, False]
        assert out[1] == 0 and out[4] == 0
    assert dx.isnan().all(dim=1).tolist() == dx.isnan().any(dim=1).tolist()
    assert dx.isnan().any(dim=1).tolist() == [False, False, True, True, False, False, False]
    assert not dx[1].any() and not dx[4].any() and dx[0].any() and dx[6].any()


@pytest.mark.parametrize("name", backend.NAMES)
def test_impossible_row_is_nan(name):
    x, w, targets, rows = example(5, 8, 30, torch.float32, 7, 1)
    targets, rows = targets.clamp(0), rows.clone()
    rows[0] = 6
    with backend.using(name):
        assert linear_logprob(x, w, targets, rows)[0].isnan().tolist() == [True, False, False, False, False, False]


def test_agrees_with_linear_cross_entropy():
    args = example(5, 16, 811, torch.bfloat16, 4, 1)  # four tiles of a row
    with backend.using("triton"), small_chunks():
        loss = chunk_module.linear_cross_entropy(*args, softcap=5.0)
        logprob, _, _ = linear_logprob(*args, softcap=5.0)
    torch.testing.assert_close(-logprob.sum(), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_widest_tiles(dtype, entropy_grad):
    """A vocabulary for which rows are walked as in production: 1024 lanes, three tiles, the last one ragged."""
    V = 2 * 1024 * 16 // dtype.itemsize + 37
    assert logits_row.tiles(torch.empty(1, V, dtype=dtype), 2)["LANES"] == 1024
    args = example(2, 8, V, dtype, 3, None)
    check_op(linear_logprob, args, {"entropy_grad": entropy_grad}, factor=FACTOR[dtype])
    given = [rand((2,), seed=1), None, rand((2,), seed=2)]
    doubles = tuple(a.double() if a.is_floating_point() else a for a in args)
    (truth,), (same,) = (gradients("reference", a, False, given) for a in (doubles, args))
    (ours,) = gradients("triton", args, False, given, entropy_grad=entropy_grad)
    assert_op_rule(ours, same, truth, "dx", FACTOR[dtype])


def test_chunk_logits():
    args = example(9, 16, 90, torch.float32, 5, 2)
    given = [rand((11,), seed=i) for i in range(3)]
    with backend.using("triton"):
        whole, small = (linear_logprob(*args, chunk_logits=option) for option in (None, 180))
    torch.testing.assert_close(small, whole, rtol=1e-6, atol=1e-6)
    whole, small = (gradients("triton", args, True, given, chunk_logits=option) for option in (None, 180))
    torch.testing.assert_close(small, whole, rtol=1e-5, atol=1e-5)


def test_work_and_residuals_follow_needs(monkeypatch):
    """Products per token chunk, forward and backward, and bytes of residuals, as the docstring says."""
    calls = []
    product = chunk_module.product

    def counted(a, b, out, **options):
        calls.append(a.shape[0] * a.shape[1] * b.shape[1])
        product(a, b, out, **options)

    monkeypatch.setattr(chunk_module, "product", counted)
    monkeypatch.setattr(module, "product", counted)
    x, w, targets, rows = example(6, 8, 100, torch.bfloat16, 9, 0)
    M, ones = targets.shape[0], torch.ones(6, device=DEVICE)
    unit, saved = M * 8 * 100, M * 8 * 2 + 8 * M
    every, first = (ones, ones, ones), (ones, ABSENT, ABSENT)
    for need_x, need_w, entropy_grad, cotangents, products, size in [
        (False, False, False, None, 1, 0),
        (True, False, False, first, 2, saved),
        (True, False, False, (ABSENT, ABSENT, ones), 2, saved),
        (True, False, False, every, 4, saved),
        (True, False, True, every, 3, 0),
        (False, True, False, first, 3, 0),
        (True, True, False, every, 4, 0),
    ]:
        calls.clear()
        needs = {"needs": (need_x, need_w, False, False), "entropy_grad": entropy_grad}
        with small_chunks(), backend.using("triton"):
            _, residuals = linear_logprob.fwd(x, w, targets, rows, **needs)
            if cotangents:
                linear_logprob.bwd(residuals, cotangents, **needs)
        assert sum(calls) == products * unit
        fresh = [r for r in (residuals or ()) if r is not ABSENT and not any(r is t for t in (x, w, targets, rows))]
        assert sum(r.nbytes for r in fresh) == size


X, W, T = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X[0], W, T), {}, "x has shape (4,), expected (N, D)"),
        ((X, W[:, :3], T), {}, "w has shape (5, 3), expected (V, D) with V > 0 and D = 4 > 0"),
        ((X, W.bfloat16(), T), {}, "w has dtype torch.bfloat16, expected that of x, torch.float32"),
        ((X.double(), W.double(), T), {}, "x has dtype torch.float64, expected float16, bfloat16 or float32"),
        ((X, torch.zeros(4, 5).t(), T), {}, "w has strides (1, 5), expected a last stride of 1"),
        ((X, W, T[:2]), {}, "targets has shape (2,), expected (N,) = (3,)"),
        ((X, W, T[:2], T), {}, "rows has shape (3,), expected (M,) = (2,)"),
        ((X, W, T), {"temperature": 0.0}, "temperature is 0.0, expected a positive number"),
        ((X, W, T), {"temperature": float("nan")}, "temperature is nan, expected a positive number"),
        ((X, W, T), {"softcap": -1.0}, "softcap is -1.0, expected a positive number or None"),
        ((X, W, T), {"chunk_logits": 0}, "chunk_logits is 0, expected a positive number or None"),
    ],
)
def test_bad_input(args, options, message):
    args = [a.to(DEVICE) for a in args]
    with backend.using("triton"), pytest.raises(ValueError) as error:
        linear_logprob(*args, **options)
    assert str(error.value) == "linear_logprob: " + message
    if "float64" not in message and "strides" not in message:
        assert_both_refuse(linear_logprob, *args, **options)


def test_reference_under_fake_tensors():
    with FakeTensorMode(), backend.using("reference"):
        x, w = torch.empty(9, 4, requires_grad=True), torch.empty(30, 4, requires_grad=True)
        rows = torch.empty(6, dtype=torch.int32)
        outs = linear_logprob(x, w, torch.empty(6, dtype=torch.int64), rows, temperature=0.5, softcap=3.0)
        sum(o.sum() for o in outs).backward()
        assert x.grad.shape == (9, 4) and w.grad.shape == (30, 4) and outs[0].shape == (6,)


def test_cost():
    assert cost(8, 4, 10, 6, 2).flops == 2 * 6 * 10 * 4
    assert cost(8, 4, 10, 6, 2, dx=True).flops == 2 * 2 * 6 * 10 * 4
    assert cost(8, 4, 10, 6, 2, dx=True, dw=True).flops == 4 * 2 * 6 * 10 * 4
