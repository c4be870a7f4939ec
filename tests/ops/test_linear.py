"""linear: the op rule over every weight node, exact products on every path and tile, one error per bad input."""

import dataclasses
import importlib
import itertools

import hypothesis.strategies as st
import pytest
import torch
import torch.utils._python_dispatch
from hypothesis import example, given, settings
from oprule import ABSENT, DEVICE, DTYPES, check_op, rand, strided

from unsloth_core import autodiff, backend, device, random, tree
from unsloth_core.cost import Cost
from unsloth_core.ops import low_rank, nf4
from unsloth_core.reference.nf4 import dequantize as decode
from unsloth_core.weights import NF4, Adapted, LoRA, Stacked, shape

ops = importlib.import_module("unsloth_core.ops.linear")  # the file; the package's attribute is the op
products = importlib.import_module("unsloth_core.ops.product")

SIZES = st.sampled_from([1, 2, 7, 16, 31, 33, 64])
# Of an adapter, whose gradients are chains of two products: two fp32 sums of the same numbers in different orders, over
# few elements, where either may be luckier by more than 2. One product alone, test_dense, keeps to 2.
FACTOR = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}
PATHS = ("pointers", "descriptors", "cublas")


def lora(rows: int, c: int, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> LoRA:
    # A scale of few bits would be exact where PyTorch applies it, to a cotangent of eight bits, but not to b.
    return LoRA(a=dense(rank, c, dtype, seed), b=rand((rows, rank), dtype, seed=seed + 1), scale=0.7)


def dense(rows: int, c: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return rand((rows, c), dtype, seed=seed, scale=c**-0.5)


def base_of(kind: str, rows: tuple[int, ...], c: int, dtype: torch.dtype, seed: int):
    """A weight with these rows: one tensor, one NF4, or a stack in which dense and NF4 parts alternate."""
    if kind == "dense":
        return dense(sum(rows), c, dtype, seed)
    if kind == "nf4":
        return nf4.quantize(dense(sum(rows), c, dtype, seed), double_quant=seed % 2 == 0)
    parts = [dense(m, c, dtype, seed + i) for i, m in enumerate(rows)]
    return Stacked(parts=tuple(nf4.quantize(p) if i % 2 else p for i, p in enumerate(parts)))


def eager(x, w, bias=ABSENT, add=ABSENT):
    """What a user of PyTorch and PEFT writes: every product and every sum is rounded to x's dtype."""
    parts, rows = (w.parts, w.rows) if isinstance(w, Adapted) else ((), ())
    base = w.base if isinstance(w, Adapted) else w
    stack = base.parts if isinstance(base, Stacked) else [base]
    matrices = [m if isinstance(m, torch.Tensor) else decode(m) for m in stack]
    y = x @ torch.cat(matrices).to(x.dtype).T
    if bias is not ABSENT:
        y = y + bias
    columns = y.split(rows or y.shape[-1], -1)
    low_rank = [0 if p is ABSENT else p.scale * ((x @ p.a.to(x.dtype).T) @ p.b.to(x.dtype).T) for p in parts]
    if parts:
        y = torch.cat([c + u for c, u in zip(columns, low_rank)], -1)
    return y if add is ABSENT else y + add


@given(n=SIZES, c=SIZES, m=SIZES, dtype=st.sampled_from(DTYPES), bias=st.booleans(), add=st.booleans())
@example(n=0, c=7, m=5, dtype=torch.bfloat16, bias=True, add=True)
@example(n=67, c=131, m=33, dtype=torch.bfloat16, bias=True, add=True)
def test_dense(n, c, m, dtype, bias, add):
    x = strided(rand((n, c), dtype, seed=1))
    args = (x, dense(m, c, dtype, 2), rand((m,), dtype, seed=3) if bias else ABSENT)
    add_ = strided(rand((n, m), dtype, seed=4)) if add else ABSENT
    check_op(ops.linear, (*args, add_))


@given(
    n=SIZES,
    c=SIZES,
    rows=st.lists(SIZES, min_size=1, max_size=3),
    kind=st.sampled_from(["dense", "nf4", "stacked"]),
    ranks=st.lists(st.sampled_from([0, 1, 5, 16, 20]), min_size=3, max_size=3),  # 0: this part has no adapter
    dtype=st.sampled_from(DTYPES),
    frozen=st.sampled_from(["", ".base", ".a", ".b", ".parts"]),
    extras=st.booleans(),
)
@example(67, 33, [31, 7, 64], "stacked", [5, 0, 16], torch.bfloat16, ".base", True)
@example(33, 64, [16, 33, 2], "nf4", [16, 1, 40], torch.float16, "", False)
def test_adapted(n, c, rows, kind, ranks, dtype, frozen, extras):
    # Leaves in x's dtype: of one 16-bit product in a fp32 leaf the rule would allow PyTorch's luck and no rounding.
    parts = tuple(lora(m, c, r, 10 * i, dtype) if r else ABSENT for i, (m, r) in enumerate(zip(rows, ranks)))
    w = Adapted(base=base_of(kind, tuple(rows), c, dtype, n), parts=parts, rows=tuple(rows))
    m = sum(rows)
    bias = rand((m,), dtype, seed=3) if extras else ABSENT
    add = rand((n, m), dtype, seed=4) if extras else ABSENT
    check_op(
        ops.linear,
        (rand((n, c), dtype, seed=1), w, bias, add),
        frozen=lambda path: bool(frozen) and frozen in path,
        factor=FACTOR[dtype],
        judge=eager,
    )


@given(
    n=SIZES,
    ranks=st.lists(st.sampled_from([0, 3, 16]), min_size=2, max_size=2).filter(any),
    p=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from(DTYPES),
    frozen=st.sampled_from([".base", ".a", ".b"]),
)
@settings(max_examples=5)
def test_dropout_of_adapters_inputs(n, ranks, p, dtype, frozen):
    """Each adapter has a mask of its own, the one that ops.dropout makes of its key."""
    rows, c = (9, 17), 24
    parts = tuple(lora(m, c, r, i, dtype) if r else ABSENT for i, (m, r) in enumerate(zip(rows, ranks)))
    keys = torch.stack([random.key(i, DEVICE) for i in range(2)])
    w = Adapted(base=dense(26, c, dtype, 3), parts=parts, rows=rows, key=keys, dropout=p)

    def judge(x, w):
        y = [x @ base.T for base in w.base.split(rows)]
        for i, part in enumerate(w.parts):
            if part is not ABSENT:
                dropped = backend.reference("dropout")(x, keys[i], p=p)
                y[i] = y[i] + part.scale * ((dropped @ part.a.to(x.dtype).T) @ part.b.to(x.dtype).T)
        return torch.cat(y, -1)

    args = (rand((n, c), dtype, seed=1), w)
    check_op(ops.linear, args, frozen=lambda path: frozen in path, factor=FACTOR[dtype], judge=judge)


@pytest.mark.parametrize("frozen", ["", ".base", ".a"])
@pytest.mark.parametrize("ranks", [(16, 5), (0, 20)])
def test_one_pass_over_dy_keeps_the_rule(ranks, frozen, monkeypatch):
    monkeypatch.setattr(low_rank, "BOTH_SIDES", 1)
    dtype, rows = torch.bfloat16, (40, 24)
    parts = tuple(lora(m, 72, r, 6 + i, dtype) if r else ABSENT for i, (m, r) in enumerate(zip(rows, ranks)))
    w = Adapted(base=base_of("dense", rows, 72, dtype, 5), parts=parts, rows=rows)
    args = (rand((2, 65, 72), dtype, seed=1), w, rand((64,), dtype, seed=2), rand((2, 65, 64), dtype, seed=3))
    check_op(ops.linear, args, frozen=lambda path: bool(frozen) and frozen in path, judge=eager)


@pytest.mark.parametrize("path, kind", [("pointers", "dense"), ("descriptors", "stacked"), ("cublas", "stacked")])
def test_every_path_keeps_the_rule(path, kind, monkeypatch):
    monkeypatch.setattr(products, "choose", lambda *_, **__: path)
    dtype = torch.float32 if kind == "dense" else torch.bfloat16
    w = Adapted(base=base_of(kind, (40, 24), 72, dtype, 5), parts=(ABSENT, lora(24, 72, 20, 6)), rows=(40, 24))
    args = (rand((2, 25, 72), dtype, seed=1), w, rand((64,), dtype, seed=2), rand((2, 25, 64), dtype, seed=3))
    check_op(ops.linear, args)


LAUNCHED = [name for name in products.CONFIGS if name != "interpreted" or device.interpreting()]
FORWARD, DX, DW = 2, 0, 1  # which operand is a transposed view: bit 0 the left one, bit 1 the right one


@pytest.mark.parametrize(
    "path, name", [("pointers", n) for n in LAUNCHED] + [("descriptors", n) for n in ("large", "medium", "small")]
)
def test_integers_are_exact_in_every_configuration(path, name):
    """Small integers leave no rounding, so a tile that reads, masks or adds wrongly shows; and the bits never change.

    A wrong configuration is a matter of compiled code, so the interpreter walks each of them only once.
    """
    config = products.CONFIGS[name]
    dtype = torch.float32 if name.startswith("fp32") else torch.bfloat16
    aligned = (config.m + 24, config.n + 40, 2 * config.k + 8)
    ragged = (config.m // 2 + 1, config.n + 3, config.k + 5)  # an odd inner dimension
    cases = list(itertools.product([(dtype, FORWARD), (dtype, DX), (dtype, DW)], (aligned, ragged)))
    cases += [((torch.float16, FORWARD), aligned)] if dtype == torch.bfloat16 else []
    repeats = 20
    if device.interpreting():
        cases, repeats = [((dtype, DW), ragged)], 1
    for ((dtype, layout), (rows, cols, inner)), _ in itertools.product(cases, range(repeats)):
        a = integers(rows, inner, dtype, layout & 1)
        b = integers(inner, cols, dtype, layout & 2)
        c, d = integers(rows, 16, dtype, False), integers(16, cols, dtype, layout & 2)
        bias, add = integers(1, cols, dtype, False)[0], integers(rows, cols, dtype, False)
        want = a.double() @ b.double()
        plain = products.product(a, b, path=path, config=config)  # this one may split its sum
        assert torch.equal(plain, want.to(dtype)), (dtype, layout, rows, cols, inner)
        want += c.double() @ d.double() + bias.double() + add.double()
        all_terms = products.product(
            a, b, bias=bias, add=add, update=(c, d), path=path, config=config, out_dtype=torch.float32
        )
        assert torch.equal(all_terms.double(), want), (dtype, layout, rows, cols, inner)


PASSES = [n for n in low_rank.CONFIGS if n != "both sides" and (n == "interpreted") == device.interpreting()]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("ranks", [(16,), (8,), (33,), (16, 16, 16), (5, 0, 40)])
@pytest.mark.parametrize("n, aligned", [(200, True), (67, False)])
@pytest.mark.parametrize("few", [0, 256])
def test_thin_passes_are_exact_in_every_configuration(name, ranks, n, aligned, few, monkeypatch):
    """Sums of integers up to 200, which every dtype holds: a row, rank or column out of its place shows."""
    config = low_rank.CONFIGS[name]
    monkeypatch.setattr(low_rank, "CONFIGS", dict.fromkeys(low_rank.CONFIGS, config))
    monkeypatch.setattr(low_rank, "FEW", few)
    clear = (low_rank._thin.cache_clear, low_rank._cut.cache_clear)
    [f() for f in clear]
    c = 192 if aligned else 131
    rows = tuple(64 if aligned else 29 for _ in ranks)
    generator = torch.Generator().manual_seed(n)

    def ones(*shape):
        return (torch.rand(shape, generator=generator) * 3 - 1.5).round().to(DEVICE)

    parts = tuple(LoRA(a=ones(r, c), b=ones(m, r), scale=1.0) if r else ABSENT for m, r in zip(rows, ranks))
    which = low_rank.adapters(Adapted(base=ABSENT, parts=parts, rows=rows), (sum(rows), c))
    x, dy = ones(n, c).bfloat16(), ones(n, sum(rows)).bfloat16()
    a, v = torch.zeros(which.width, c, device=DEVICE), torch.zeros(sum(rows), which.width, device=DEVICE)
    low = 0
    for part, start, m, r in zip(which.parts, which.starts, which.rows, which.ranks, strict=True):
        a[low : low + r], v[start : start + m, low : low + r] = part.a, part.b
        low += r
    want_u, want_t = x.double() @ a.double().T, dy.double() @ v.double()
    want_b = [True for _ in which.parts]
    for _ in range(1 if device.interpreting() else 20):
        how = low_rank.cut(which, n, True, want_b, DEVICE)
        u, v_MR = low_rank.forward(which, x)
        t, a_RC, arrived = low_rank.backward(which, dy, how.counters, pack=True)
        assert torch.equal(a_RC.float(), a) and torch.equal(v_MR.float(), v)
        assert torch.equal(u.double(), want_u) and torch.equal(t.double(), want_t)
        da, db = low_rank.gradients(which, x, t, dy, u, arrived, how, want_b)
        assert torch.equal(torch.cat(da).double(), (want_t.T @ x.double())[:low])
        low_i = 0
        for g, start, m, r in zip(db, which.starts, which.rows, which.ranks, strict=True):
            assert torch.equal(g.double(), dy[:, start : start + m].double().T @ want_u[:, low_i : low_i + r])
            low_i += r
    monkeypatch.undo()
    [f() for f in clear]


@pytest.mark.parametrize("rows, ranks", [((64,), (4,)), ((300, 212), (16, 16)), ((29, 7), (33, 5))])
@pytest.mark.parametrize("n, c", [(8, 64), (40, 512), (256, 131)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_thin_passes_over_leaves_give_the_bits_of_packed_ones(n, c, rows, ranks, dtype, monkeypatch):
    if device.interpreting():
        rows = tuple(min(m, 40) for m in rows)
        n, c = min(n, 40), c // 4
    parts = tuple(LoRA(a=rand((r, c), seed=r), b=rand((m, r), seed=m), scale=0.3) for m, r in zip(rows, ranks))
    which = low_rank.adapters(Adapted(base=ABSENT, parts=parts, rows=rows), (sum(rows), c))
    x, dy, found = rand((n, c), dtype, seed=1), rand((sum(rows), n), dtype, seed=2).T, []
    for few in (0, n):
        monkeypatch.setattr(low_rank, "FEW", few)
        found.append((*low_rank.forward(which, x), *low_rank.backward(which, dy, 0, pack=True)[:2]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("ranks, rows", [((16, 16), (768, 768)), ((16,), (600,)), ((1, 16, 5), (64, 300, 7))])
@pytest.mark.parametrize("n", [200, 1024])
def test_both_sides_of_dy_are_exact(ranks, rows, n):
    """t and every dB of one pass, and the packed a, for integers, which leave no rounding; always the same bits."""
    if device.interpreting():
        rows, n = tuple(m // 4 for m in rows), n // 4
    generator = torch.Generator().manual_seed(n)

    def ones(*shape):
        return (torch.rand(shape, generator=generator) * 3 - 1.5).round().to(DEVICE)

    c = 40
    parts = tuple(LoRA(a=ones(r, c), b=ones(m, r), scale=2.0) for m, r in zip(rows, ranks))
    which = low_rank.adapters(Adapted(base=ABSENT, parts=parts, rows=rows), (sum(rows), c))
    big = ones(n, sum(rows) + 16).bfloat16()
    u = torch.zeros(n, which.width, device=DEVICE).bfloat16()
    u[:, : sum(ranks)] = ones(n, sum(ranks))
    for dy in (big[:, 8:-8], big[:, 8:-8].T.contiguous().T):
        for _ in range(1 if device.interpreting() else 10):
            t, a_RC, db = low_rank.both_sides(which, dy, u, pack=True)
            low = start = 0
            for part, m, r, g in zip(parts, rows, ranks, db, strict=True):
                dy_i, ranks_i = dy[:, start : start + m].double(), slice(low, low + r)
                assert torch.equal(t[:, ranks_i].double(), 2 * dy_i @ part.b.double())
                assert torch.equal(g.double(), 2 * dy_i.T @ u[:, ranks_i].double())
                assert torch.equal(a_RC[ranks_i].float(), part.a)
                low, start = low + r, start + m
            assert not t[:, low:].any() and not a_RC[low:].any()


def integers(rows: int, cols: int, dtype: torch.dtype, transposed: int | bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + cols)
    values = torch.randint(-2, 3, (cols, rows) if transposed else (rows, cols), generator=generator)
    values = values.to(dtype).to(DEVICE)
    return values.T if transposed else values


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows, cols, inner", [(5, 3, 1031), (1, 33, 400), (0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_long_sums_and_empty_sides(path, rows, cols, inner):
    a, b = integers(rows, inner, torch.bfloat16, False), integers(inner, cols, torch.bfloat16, True)
    y = products.product(a, b, path=path, alpha=-0.5, out_dtype=torch.float32)
    assert y.dtype == torch.float32 and torch.equal(y.double(), -0.5 * (a.double() @ b.double()))


def test_frozen_weights_cost_no_residual_and_nothing_is_copied():
    x, w = rand((5, 8), seed=1), dense(6, 8, torch.float32, 2)
    with backend.using("triton"):
        _, (kept, node, u) = ops.linear.fwd(x, w, ABSENT, ABSENT, needs=(True, False, ABSENT, ABSENT))
        assert kept is ABSENT and node is w and u is ABSENT
        adapted = Adapted(base=w, parts=(lora(6, 8, 2, 3),), rows=(6,))
        needs = tree.map(lambda _: True, adapted)
        _, (kept, node, u) = ops.linear.fwd(x, adapted, ABSENT, ABSENT, needs=(False, needs, ABSENT, ABSENT))
        assert kept is x and node is adapted and u.value.shape == (5, 16)
        dy, all_needs = rand((5, 6), seed=9), (True, needs, ABSENT, ABSENT)
        with_u = ops.linear.bwd((kept, node, u), dy, needs=all_needs)
        without = ops.linear.bwd((kept, node, dataclasses.replace(u, value=ABSENT)), dy, needs=all_needs)
    assert all(torch.equal(a, b) for a, b in zip(tree.leaves(with_u), tree.leaves(without), strict=True))


@pytest.mark.parametrize("kind, decoding", [("dense", 0), ("nf4", 1), ("stacked", 2)])
@pytest.mark.parametrize("n, fewer", [(48, 1), (300, 0)])
def test_launches_of_an_adapted_weight(kind, decoding, n, fewer, monkeypatch):
    """Three forward and four backward, however many adapters; PyTorch makes tensors and views, no launch. Of few tokens
    one less each."""
    launched, called = [], []
    monkeypatch.setattr(device, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    monkeypatch.setattr(device, "straight", lambda _: False)  # prepared calls launch without it

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    rows = (32, 16, 16)
    parts = tuple(lora(m, 64, 16, i) for i, m in enumerate(rows))
    base = base_of("stacked" if kind == "stacked" else kind, rows, 64, torch.bfloat16, 1)
    if kind == "stacked":
        base = Stacked(parts=tuple(nf4.quantize(dense(m, 64, torch.bfloat16, m)) for m in (32, 32)))
    w = Adapted(base=base, parts=parts, rows=rows)
    trained = LoRA(a=True, b=True, scale=0.7)
    needs = (True, Adapted(base=tree.map(lambda _: False, base), parts=(trained,) * 3, rows=rows), ABSENT, ABSENT)
    x, dy = rand((n, 64), torch.bfloat16, seed=1), rand((n, 64), torch.bfloat16, seed=2)
    nf4.table(x.device)  # made once
    with backend.using("triton"):
        launched.clear()
        with Watch():
            _, residuals = ops.linear_fwd(x, w, needs=needs)
        assert len(launched) == 3 + decoding - fewer, launched
        launched.clear()
        with Watch():
            ops.linear_bwd(residuals, dy, needs=needs)
        assert len(launched) == 4 + decoding - fewer, launched
    assert set(called) <= {"empty", "new_empty", "permute", "view", "split_with_sizes", "detach"}, called


def test_gradient_node_mirrors_the_weight():
    """Only what is needed, and the scale comes along, so that the gradient is a weight of the same kind."""
    w = Adapted(base=dense(6, 8, torch.float32, 1), parts=(lora(4, 8, 2, 2), ABSENT), rows=(4, 2))
    x, dy = rand((5, 8), seed=3), rand((5, 6), seed=4)
    needs = Adapted(base=False, parts=(LoRA(a=False, b=True, scale=0.7), ABSENT), rows=(4, 2))
    with backend.using("triton"):
        needs = (False, needs, ABSENT, True)
        _, residuals = ops.linear.fwd(x, w, ABSENT, dy, needs=needs)
        dx, dw, dbias, dadd = ops.linear.bwd(residuals, dy, needs=needs)
    assert dx is ABSENT and dbias is ABSENT and dadd is dy
    assert dw.base is ABSENT and dw.rows == w.rows and dw.parts[1] is ABSENT
    assert dw.parts[0].a is ABSENT and dw.parts[0].b.shape == (4, 2) and dw.parts[0].scale == 0.7


def test_adapters_may_have_another_dtype_than_x():
    """fp32 leaves under bf16 tokens get fp32 gradients that were never rounded to bf16."""
    part = lora(6, 8, 3, 1)
    w = Adapted(base=dense(6, 8, torch.bfloat16, 2), parts=(part,), rows=(6,))
    x = rand((50, 8), torch.bfloat16, seed=3)
    with backend.using("triton"):
        _, gradients = autodiff.value_and_grad(lambda p: ops.linear(x, p).float().square().sum())(w)
    for g in (gradients.parts[0].a, gradients.parts[0].b):
        assert g.dtype == torch.float32 and not torch.equal(g, g.bfloat16().float())
    assert gradients.base.dtype == torch.bfloat16


def test_nf4_decodes_to_its_own_dtype_first():
    w = nf4.quantize(dense(16, 12, torch.bfloat16, 1))
    x = rand((3, 12), seed=2)
    with backend.using("triton"):
        assert torch.equal(ops.linear(x, w), ops.linear(x, nf4.dequantize(w).float()))


def test_an_nf4_weight_has_no_gradient():
    w = nf4.quantize(dense(4, 8, torch.float32, 1), double_quant=False)
    with backend.using("triton"), pytest.raises(NotImplementedError, match="an NF4 weight has no gradient; freeze it"):
        autodiff.value_and_grad(lambda p: ops.linear(rand((2, 8), seed=2), p).sum())(w)


X = rand((4, 8), seed=1)
W = dense(6, 8, torch.float32, 2)
PART = lora(6, 8, 2, 3)
Q = nf4.quantize(W)
BAD = {
    "x has dtype torch.float64, expected float16, bfloat16 or float32": (X.double(), W.double()),
    f"w is on meta, expected x's device {X.device}": (X, dataclasses.replace(Q, codes=Q.codes.to("meta"))),
    f"bias is on meta, expected x's device {X.device}": (X, W, W[:, 0].to("meta")),
    "x has shape (4, 7), expected (..., C) with C = 8": (X[:, :7], W),
    "x has shape (), expected (..., C) with C = 8": (X[0, 0], W),
    "w has shape (6,), expected (M, C)": (X, W[:, 0]),
    "w has shape (6, 7), expected (M, 8)": (X, Stacked(parts=(W, W[:, :7]))),
    "w has dtype torch.float16, expected torch.float32 like x": (X, W.half()),
    "bias has shape (1,), expected (6,)": (X, W, W[0, :1]),
    "bias has dtype torch.bfloat16, expected torch.float32 like x": (X, W, W[:, 0].bfloat16()),
    "add has shape (1, 6), expected (4, 6)": (X, W, ABSENT, X[:1, :6]),
    "w.rows is (4, 1) for 1 parts, expected 1 numbers with sum 6": (X, Adapted(base=W, parts=(PART,), rows=(4, 1))),
    "w.rows is (5,) for 1 parts, expected 1 numbers with sum 6": (X, Adapted(base=W, parts=(PART,), rows=(5,))),
    "w.parts[0].a has shape (2, 7), expected (2, 8)": (
        X,
        Adapted(base=W, parts=(LoRA(a=PART.a[:, :7], b=PART.b, scale=1.0),), rows=(6,)),
    ),
    "w.key is (1,) torch.float32, expected (1, 2) torch.int64, a key of random for each part": (
        X,
        Adapted(base=W, parts=(PART,), rows=(6,), key=W[0, :1]),
    ),
    "w.dropout is 1.5, expected 0 to 1": (
        X,
        Adapted(base=W, parts=(PART,), rows=(6,), key=random.key(0, DEVICE)[None], dropout=1.5),
    ),
    "w.parts[1].b has shape (6, 2), expected (4, 2)": (X, Adapted(base=W, parts=(ABSENT, PART), rows=(2, 4))),
    "x has shape (2, 3, 8) and strides (8, 16, 1), which no (N, 8) view covers; pass x.contiguous()": (
        rand((3, 2, 8), seed=1).transpose(0, 1),
        W,
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with backend.using("triton"), pytest.raises(ValueError) as error:
        ops.linear(*BAD[message])
    assert str(error.value) == "linear: " + message


@pytest.mark.parametrize("bias, add", [(W[0, :1], ABSENT), (ABSENT, X[:1, :6]), (W[:, 0].half(), ABSENT)])
def test_the_reference_does_not_broadcast_either(bias, add):
    with backend.using("reference"), pytest.raises(ValueError, match="expected"):
        ops.linear(X, W, bias, add)


@pytest.mark.parametrize("w", [W.bfloat16(), Stacked(parts=(W, W.half())), Adapted(base=W.half(), parts=(), rows=())])
def test_neither_promotes_a_weight_of_another_dtype(w):
    for name in backend.NAMES:
        with (
            backend.using(name),
            pytest.raises(ValueError, match=r"linear: w has dtype \S+, expected torch.float32 like x"),
        ):
            ops.linear(X, w)


def test_choice_of_product():
    where = torch.device("cpu")
    assert products.choose(4096, 4096, torch.bfloat16, where, update=False, gradient=False) == (
        "pointers" if device.interpreting() else "cublas"
    )
    assert products.configuration(8, 8, torch.float32, where) in products.CONFIGS.values()


def test_cost():
    assert ops.cost(10, W.bfloat16()) == Cost(bytes=2 * (10 * 8 + 6 * 8 + 10 * 6), flops=2 * 10 * 6 * 8)
    w = Adapted(base=nf4.quantize(W, double_quant=False), parts=(PART,), rows=(6,))
    assert shape(w) == (6, 8) and isinstance(w.base, NF4)
    extra = 4 * (2 * 8 + 6 * 2)
    assert ops.cost(10, w, bias=True, add=True) == Cost(
        bytes=2 * (10 * 8 + 2 * 10 * 6 + 6) + 24 + 4 + extra, flops=2 * 10 * 6 * 8 + 2 * 10 * 2 * (8 + 6)
    )
