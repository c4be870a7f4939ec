"""linear_cross_entropy: the op rule over several chunks, compacted rows, frozen and trainable heads, bad input."""

import contextlib
import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oprule import DEVICE, DTYPES, assert_both_refuse, check_op, rand, strided
from torch._subclasses.fake_tensor import FakeTensorMode

from unsloth_core import backend
from unsloth_core.ops import logits_row
from unsloth_core.ops.linear_cross_entropy import chunk_rows, cost, linear_cross_entropy
from unsloth_core.tree import ABSENT

# The package exports the ops under these names.
module = importlib.import_module("unsloth_core.ops.linear_cross_entropy")

# In fp32 the products decide: the same sums in another order, and the cotangent after them instead of before, so that
# over few elements PyTorch may be luckier by more than 2, though our gradient of the logits is the closer one.
FACTOR = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "label_smoothing": st.sampled_from([0.1, 0.5, 1.0]),
        "z_loss": st.sampled_from([1e-4, 0.01, 0.5]),
        "softcap": st.sampled_from([3.0, 30.0]),
        "ignore_index": st.sampled_from([-1, 0]),
    },
)


@contextlib.contextmanager
def small_chunks():
    """About 2 tokens per chunk (3 with a trainable head) and tiles of 32 lanes: several of everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_LOGITS", 2 * 200)
        patch.setattr(module, "TRAINABLE_ROWS", 3)
        patch.setattr(logits_row, "TWO_PASS_LANES", 32)
        yield


def example(N, D, V, dtype, seed, padded, ignore_index=-100):
    """(x, w, targets[, rows]). Entries are small integers over powers of two, so every logit is exact in 16 bits:
    the one number that comes out is judged by its own arithmetic, not by the luck of roundings that cancel."""
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
    N=st.sampled_from([2, 5]),
    D=st.sampled_from([8, 24]),
    V=st.sampled_from([3, 64, 211]),
    dtype=st.sampled_from(DTYPES),
    options=OPTIONS,
    padded=st.sampled_from([None, 0, 2]),
    trainable=st.booleans(),
    seed=st.integers(0, 99),
)
def test_op_rule(N, D, V, dtype, options, padded, trainable, seed):
    args = example(N, D, V, dtype, seed, padded, options.get("ignore_index", -100))
    frozen = (lambda path: False) if trainable else (lambda path: path == "1")
    with small_chunks():
        check_op(linear_cross_entropy, args, options, seed=seed, frozen=frozen, factor=FACTOR[dtype])


@pytest.mark.parametrize(("N", "D", "V"), [(0, 3, 5), (1, 1, 1), (5, 1, 2)])
@pytest.mark.parametrize("padded", [None, 1])
def test_smallest(N, D, V, padded):
    args = example(N, D, V, torch.float32, 1, padded)
    check_op(linear_cross_entropy, args, {"z_loss": 0.1}, factor=FACTOR[torch.float32])


def test_strides():
    x, w, targets = (rand((9, 8), seed=1), rand((70, 8), seed=2), example(9, 8, 70, torch.float32, 3, None)[2])
    spread = torch.stack([targets, targets], dim=1)[:, 0]
    with small_chunks():
        check_op(linear_cross_entropy, (strided(x), strided(w), spread), factor=FACTOR[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_pytorch(dtype):
    x, w, targets = example(11, 16, 101, dtype, 4, None)
    want = F.cross_entropy((x @ w.t()).float(), targets, reduction="sum", label_smoothing=0.2)
    with backend.using("triton"), small_chunks():
        got = linear_cross_entropy(x, w, targets, label_smoothing=0.2)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


def test_chunks_do_not_change_the_result():
    args = example(13, 16, 90, torch.float32, 5, 2)
    with backend.using("triton"):
        one = linear_cross_entropy(*args)
        with small_chunks():
            torch.testing.assert_close(linear_cross_entropy(*args), one, rtol=1e-6, atol=0)


def test_rows_without_targets_get_no_gradient():
    x, w, targets, rows = example(9, 8, 30, torch.bfloat16, 6, 3)
    with backend.using("triton"):
        xg = x.requires_grad_()
        (dx,) = torch.autograd.grad(linear_cross_entropy(xg, w, targets, rows), xg)
    real = set(rows[(rows < 9) & (targets != -100)].tolist())
    assert {i for i in range(9) if dx[i].any()} == real
    assert dx.shape == x.shape and dx.dtype == x.dtype


@pytest.mark.parametrize("name", ["triton", "reference"])
@pytest.mark.parametrize("which", ["target", "row"])
def test_impossible_input_is_nan(name, which):
    x, w, targets, rows = example(5, 8, 30, torch.float32, 7, 1)
    targets = targets.clamp(0)
    if which == "target":
        targets[int((rows < 5).nonzero()[0])] = 30
    else:
        rows[0] = 6
    with backend.using(name):
        assert linear_cross_entropy(x, w, targets, rows).isnan()


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_all_ignored(name):
    x, w, targets = example(5, 8, 30, torch.float32, 8, None)
    targets = torch.full_like(targets, -100)
    with backend.using(name):
        inputs = x.requires_grad_(), w.requires_grad_()
        loss = linear_cross_entropy(*inputs, targets)
        dx, dw = torch.autograd.grad(loss, inputs)
    assert loss == 0 and not dx.any() and not dw.any()


def test_work_and_residuals_follow_needs(monkeypatch):
    """Products: 1 per chunk for the loss alone, 2 with a frozen head, 3 with a trainable one; residuals to match."""
    calls = []
    product = module.product
    monkeypatch.setattr(module, "product", lambda *a, **k: (calls.append(1), product(*a, **k)))
    x, w, targets, rows = example(12, 8, 200, torch.bfloat16, 9, 0)
    M = targets.shape[0]
    for needs, products, size in [
        ((False, False), 1, 0),
        ((True, False), 2, M * 8 * 2),
        ((False, True), 2, 200 * 8 * 4),
        ((True, True), 3, M * 8 * 2 + 200 * 8 * 4),
    ]:
        calls.clear()
        with small_chunks(), backend.using("triton"):
            _, residuals = linear_cross_entropy.fwd(x, w, targets, rows, needs=(*needs, False, False))
            chunks = -(-M // chunk_rows(M, 200, needs[1]))
        assert chunks > 1 and len(calls) == products * chunks
        fresh = [r for r in (residuals or ()) if r is not ABSENT and r is not w and r is not rows]
        assert sum(r.nbytes for r in fresh) == size


@pytest.mark.parametrize("trainable", [False, True])
def test_chunk_logits(trainable):
    """The option is obeyed, with a trainable head too, and changes nothing but the order of sums."""
    args = example(9, 16, 90, torch.float32, 5, 2)
    results = []
    with backend.using("triton"):
        for option in (None, 180, 1):
            x, w = args[0].clone().requires_grad_(), args[1].clone().requires_grad_(trainable)
            loss = linear_cross_entropy(x, w, *args[2:], chunk_logits=option)
            results.append((loss.detach(), *torch.autograd.grad(loss, (x, w) if trainable else (x,))))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-6)


def test_low_memory_setting():
    """The bytes that the docstring promises: 512 tokens a chunk, so that logits and dx are under 200 MiB."""
    M, V, D = 8192, 128256, 4096
    for option, tokens, mib in ((None, 2048, 565.1), (2**26, 512, 189.4)):
        chunk = chunk_rows(M, V, False, option)
        assert chunk == tokens and (2 * chunk * V + 2 * M * D + 4 * M) / 2**20 <= mib
    assert chunk_rows(M, V, True, 2**26) == 512


def test_chunk_rows():
    assert chunk_rows(8192, 128256, False) == 2048
    assert chunk_rows(8192, 262208, False) == 1024
    assert chunk_rows(8192, 128256, True) == 4096
    assert chunk_rows(2100, 128256, False) == 1152  # two even chunks, in whole tiles
    assert chunk_rows(100, 128256, False) == 100
    assert chunk_rows(0, 128256, False) == 0
    assert chunk_rows(7, 2**30, False) == 1


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
        ((X, W, T, X[:, 0]), {}, "rows has dtype torch.float32, expected torch.int64 or torch.int32"),
        ((X, W[0], T), {}, "w has shape (4,), expected (V, D)"),
        ((X, W[:0], T), {}, "w has shape (0, 4), expected (V, D) with V > 0 and D = 4 > 0"),
        ((X[:, :0], W[:, :0], T), {}, "w has shape (5, 0), expected (V, D) with V > 0 and D = 0 > 0"),
        ((X, W, X[:, 0]), {}, "targets has dtype torch.float32, expected torch.int64 or torch.int32"),
        ((X, W, T[None], T), {}, "targets has shape (1, 3), expected (M,)"),
        ((X, W, T), {"z_loss": -1.0}, "z_loss is -1.0, expected 0 or more"),
        ((X, W, T), {"chunk_logits": 0}, "chunk_logits is 0, expected a positive number or None"),
    ],
)
def test_bad_input(args, options, message):
    args = [a.to(DEVICE) for a in args]
    with backend.using("triton"), pytest.raises(ValueError) as error:
        linear_cross_entropy(*args, **options)
    assert str(error.value) == "linear_cross_entropy: " + message
    if "float64" not in message and "strides" not in message:
        assert_both_refuse(linear_cross_entropy, *args, **options)


def test_reference_under_fake_tensors():
    with FakeTensorMode(), backend.using("reference"):
        x, w = torch.empty(9, 4, requires_grad=True), torch.empty(30, 4, requires_grad=True)
        rows = torch.empty(6, dtype=torch.int32)
        linear_cross_entropy(x, w, torch.empty(6, dtype=torch.int64), rows, label_smoothing=0.1).backward()
        assert x.grad.shape == (9, 4) and w.grad.shape == (30, 4)


def test_cost():
    assert cost(8, 4, 10, 6, 2).flops == 2 * 6 * 10 * 4
    assert cost(8, 4, 10, 6, 2, dx=True, dw=True).flops == 3 * 2 * 6 * 10 * 4
