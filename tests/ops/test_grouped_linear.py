"""grouped_linear: the op rule over weight nodes in both forms, lopsided plans, exact products on every tile, errors."""

import dataclasses
import importlib
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from oprule import ABSENT, DEVICE, DTYPES, assert_both_refuse, check_op, rand, strided

from unsloth_core import backend, device, tree
from unsloth_core.cost import Cost
from unsloth_core.ops import grouped_linear, nf4
from unsloth_core.reference.nf4 import dequantize as decode
from unsloth_core.remat import residual_report
from unsloth_core.weights import Adapted, LoRA, Stacked

file = importlib.import_module("unsloth_core.ops.grouped_linear")
FACTOR = {torch.float32: 4.0, torch.bfloat16: 2.0, torch.float16: 2.0}  # fp32 sums in other orders: see test_linear.py


def plan_of(n: int, experts: int, slots: int, seed: int, favour: float = 0.0):
    """Gates and plan of random logits; ``favour`` draws tokens to expert 0."""
    logits = rand((n, experts), seed=seed)
    logits[:, 0] += favour
    gates, _, *plan, _, _ = backend.reference("route")(logits, top_k=slots)
    return gates, tuple(plan)


def weight(experts: int, m: int, c: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return rand((experts, m, c), dtype, seed=seed, scale=c**-0.5)


def adapter(experts: int, m: int, c: int, rank: int, dtype: torch.dtype, seed: int) -> LoRA:
    return LoRA(a=weight(experts, rank, c, dtype, seed), b=rand((experts, m, rank), dtype, seed=seed + 1), scale=0.7)


def arguments(combine: bool, n: int, slots: int, m: int, c: int, w, plan, gates, dtype, add: bool):
    if not combine:
        return strided(rand((n, c), dtype, seed=1)), w, plan
    x = strided(rand((n * slots, c), dtype, seed=1))
    return x, w, plan, gates, strided(rand((n, m), dtype, seed=2)) if add else ABSENT


def eager(x, w, plan, gates=ABSENT, add=ABSENT):
    """What a user of PyTorch and PEFT writes: a loop over experts, every product and sum rounded to x's dtype."""
    order, positions, offsets = plan
    base, parts, rows = (w.base, w.parts, w.rows) if isinstance(w, Adapted) else (w, (), ())
    experts = offsets.shape[0] - 1
    stack = base.parts if isinstance(base, Stacked) else [base]
    matrices = [t if isinstance(t, torch.Tensor) else decode(t) for t in stack]
    dense = torch.cat(matrices).to(x.dtype).view(experts, -1, matrices[0].shape[-1])
    if gates is ABSENT:
        x = x[order.long() // positions.shape[1]]
    found = []
    for e, (low, high) in enumerate(itertools.pairwise(offsets.tolist())):
        y = x[low:high] @ dense[e].T
        columns = y.split(rows or y.shape[-1], -1)
        low_rank = [
            0 if p is ABSENT else p.scale * ((x[low:high] @ p.a[e].to(x.dtype).T) @ p.b[e].to(x.dtype).T)
            for p in parts
        ]  # fmt: skip
        found.append(torch.cat([c + u for c, u in zip(columns, low_rank, strict=True)], -1) if parts else y)
    y = torch.cat(found)
    if gates is ABSENT:
        return y
    y = (gates.to(x.dtype).unsqueeze(2) * y[positions.long()]).sum(1)
    return y if add is ABSENT else y + add


@settings(max_examples=6)
@given(
    combine=st.booleans(),
    n=st.sampled_from([1, 3, 13, 17]),
    experts=st.integers(1, 5),
    slots=st.integers(1, 2),
    m=st.sampled_from([1, 7, 33]),
    c=st.sampled_from([1, 16, 35]),
    dtype=st.sampled_from(DTYPES),
    favour=st.sampled_from([0.0, 0.0, 20.0]),
)
@example(combine=False, n=13, experts=5, slots=2, m=33, c=35, dtype=torch.bfloat16, favour=0.0)
@example(combine=True, n=13, experts=5, slots=2, m=33, c=35, dtype=torch.bfloat16, favour=0.0)
@example(combine=False, n=23, experts=3, slots=1, m=16, c=16, dtype=torch.float16, favour=20.0)  # others get none
@example(combine=True, n=0, experts=3, slots=2, m=5, c=7, dtype=torch.float32, favour=0.0)
def test_dense(combine, n, experts, slots, m, c, dtype, favour):
    slots = min(slots, experts)
    gates, plan = plan_of(n, experts, slots, 3, favour)
    w = weight(experts, m, c, dtype, 4)
    args = arguments(combine, n, slots, m, c, w, plan, gates, dtype, n % 2 == 1)
    check_op(grouped_linear, args, factor=FACTOR[dtype], judge=eager)


@pytest.mark.parametrize("combine", [False, True])
@pytest.mark.parametrize(
    ("kind", "ranks", "dtype", "frozen"),
    [
        ("dense", (3, 20), torch.float32, ""),
        ("dense", (0, 16), torch.bfloat16, ".base"),
        ("nf4", (5, 0), torch.float16, ".base"),
        ("stacked", (4, 4), torch.bfloat16, ".a"),
        ("dense", (70, 2), torch.bfloat16, ".b"),
    ],
)
def test_adapted(combine, kind, ranks, dtype, frozen):
    n, experts, slots, rows, c = 9, 3, 2, (12, 20), 32
    m = sum(rows)
    gates, plan = plan_of(n, experts, slots, 5)
    parts = tuple(adapter(experts, r, c, k, dtype, 10 * k) if k else ABSENT for r, k in zip(rows, ranks, strict=True))
    base = weight(experts, m, c, dtype, 6)
    if kind == "nf4":
        base = dataclasses.replace(nf4.quantize(base.view(-1, c)), shape=(experts, m, c))
    if kind == "stacked":  # one part for each expert's matrix, as quantised checkpoints come
        each = [matrix for expert in base.unbind() for matrix in expert.split(rows)]
        base = Stacked(parts=tuple(nf4.quantize(t) if i % 2 else t for i, t in enumerate(each)))
    w = Adapted(base=base, parts=parts, rows=rows)
    check_op(
        grouped_linear,
        arguments(combine, n, slots, m, c, w, plan, gates, dtype, True),
        frozen=lambda path: bool(frozen) and frozen in path,
        factor=FACTOR[dtype],
        judge=eager,
    )


def test_trained_parts_of_a_stack():
    experts, rows, c = 2, (3, 5), 16
    gates, plan = plan_of(7, experts, 1, 5)
    parts = [weight(1, m, c, torch.float32, 20 + i)[0] for i, m in enumerate(rows * experts)]
    check_op(grouped_linear, (rand((7, c), seed=1), Stacked(parts=tuple(parts)), plan))


def exact(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Small integers: every product and sum of them is exact in 16 bits' fp32 accumulator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, (rows, cols), generator=generator).to(torch.bfloat16).to(DEVICE)


def tiles() -> list[tuple[str, bool, int, int]]:
    """(row of the table, weight stored transposed, M, C): ragged sizes for all, whole tiles where TMA may serve."""
    if device.interpreting():
        return [
            (name, t, *size) for name in ("interpreted", "tma") for t in (False, True) for size in ((37, 48), (64, 32))
        ]
    names = list(file.CONFIGS)
    wide = [name for name in names if file.CONFIGS[name].m >= 64 and not name.startswith("fp32")]
    return [(name, False, 330, 520) for name in names] + [(name, t, 256, 128) for name in wide for t in (False, True)]


@pytest.mark.parametrize(("name", "transposed", "m", "c"), tiles())
def test_every_tile_is_exact(name, transposed, m, c):
    """Gathered and straight rows, with adapters, gates and the row sums of their gradient, and without."""
    config = file.CONFIGS["interpreted" if device.interpreting() else name]
    tma = True if name == "tma" else None
    n, experts, slots = (11, 3, 2) if device.interpreting() else (300, 5, 3)
    _, plan = plan_of(n, experts, slots, 7)
    dtype = torch.float32 if name.startswith("fp32") else torch.bfloat16
    P = n * slots
    x, rows = exact(n, c, 1).to(dtype), exact(P, c, 2).to(dtype)
    w = exact(experts * m, c, 3).to(dtype).view(experts, m, c).transpose(1, 2)
    if not transposed:
        w = w.contiguous()
    rank = 64 if m == 256 else 32  # 64 takes the most shared memory
    u, v = exact(P, rank, 4).to(dtype), exact(experts * rank, m, 5).to(dtype).view(experts, rank, m)
    gates = torch.exp2(exact(n, slots, 6).float())
    other = exact(P, m, 8).to(dtype)
    order = plan[0].long()
    bounds = list(itertools.pairwise(plan[2].tolist()))
    for gather, source in ((True, x[order // slots]), (False, rows)):
        plain = torch.cat([source[i:j].double() @ w[e].double() for e, (i, j) in enumerate(bounds)])
        full = plain + torch.cat([u[i:j].double() @ v[e].double() for e, (i, j) in enumerate(bounds)])
        given = {"gather": gather, "config": config, "tma": tma}
        y, dots = file.rows_product(
            x if gather else rows, w, plan, update=(u, v), gates=gates, other=other, **given
        )  # fmt: skip
        assert torch.equal(y, (full * gates.double().reshape(-1)[order, None]).to(dtype))
        assert torch.equal(dots.double().sum(0), (full * other.double()).sum(1))
        y, dots = file.rows_product(x if gather else rows, w, plan, **given)
        assert torch.equal(y, plain.to(dtype)) and dots is ABSENT


@pytest.mark.parametrize("name", list(file.WEIGHT_CONFIGS) if not device.interpreting() else ["interpreted"])
@pytest.mark.parametrize("gathered", [(False, True), (True, False)])
def test_every_tile_of_weight_gradients_is_exact(name, gathered):
    n, experts, slots, m, c = (11, 4, 2, 37, 41) if device.interpreting() else (700, 6, 3, 200, 296)
    _, plan = plan_of(n, experts, slots, 8, favour=1.0)
    dtype = torch.float32 if name.startswith("fp32") else torch.bfloat16
    a, b = (exact(n if g else n * slots, k, k).to(dtype) for g, k in zip(gathered, (m, c), strict=True))
    got = file.weight_product(
        a, b, plan, a_gather=gathered[0], b_gather=gathered[1], dtype=torch.float32, alpha=0.5,
        config=file.WEIGHT_CONFIGS[name],
    )  # fmt: skip
    tokens = plan[0].long() // slots
    sorted_a, sorted_b = (t[tokens] if g else t for t, g in zip((a, b), gathered, strict=True))
    for e, (low, high) in enumerate(itertools.pairwise(plan[2].tolist())):
        wanted = 0.5 * (sorted_a[low:high].double().T @ sorted_b[low:high].double())
        assert torch.equal(got[e].double(), wanted)


def test_tables_pick_rows_that_exist():
    for rows in (1, 64, 1000, 100_000):
        for cols in (16, 32, 64, 128, 4096):
            for dtype in DTYPES:
                assert file.configuration(rows, 8, cols, 64, dtype, DEVICE) in file.CONFIGS.values()
                assert file.weight_configuration(rows, cols, dtype, DEVICE) in file.WEIGHT_CONFIGS.values()


def test_every_row_of_the_tables_is_picked_by_something(monkeypatch):
    monkeypatch.setattr(device, "interpreting", lambda: False)
    picked, of_weights = set(), set()
    for major in (8, 9, 10):
        monkeypatch.setattr(device, "capability", lambda where, major=major: (major, 0))
        for dtype, rows, cols, inner in itertools.product(DTYPES, (8, 200, 9000), *2 * [(16, 32, 64, 330, 1024)]):
            picked.add(id(file.configuration(rows, 8, cols, inner, dtype, DEVICE)))
            of_weights.add(id(file.weight_configuration(inner, cols, dtype, DEVICE)))
    assert [n for n, c in file.CONFIGS.items() if id(c) not in picked] == ["interpreted"]
    assert [n for n, c in file.WEIGHT_CONFIGS.items() if id(c) not in of_weights] == ["interpreted"]


def test_an_expert_without_tokens_gets_zeros_and_a_frozen_one_costs_nothing(monkeypatch):
    gates, plan = plan_of(5, 4, 1, 9, favour=20.0)
    x, w = rand((5, 8), seed=1).requires_grad_(), weight(4, 6, 8, torch.float32, 2).requires_grad_()
    with backend.using("triton"):
        dw = torch.autograd.grad(grouped_linear(x, w, plan).sum(), w)[0]
        assert dw[0].abs().sum() > 0 and (dw[1:] == 0).all()
        monkeypatch.setattr(file, "weight_product", None)
        torch.autograd.grad(grouped_linear(x, w.detach(), plan).sum(), x)
        rows = rand((5, 8), seed=3).requires_grad_()
        report = residual_report(lambda x: grouped_linear(x, w.detach(), plan), x)
        assert [row.bytes for row in report.rows if row.name == "grouped_linear"] == [5 * 6 * 4]
        monkeypatch.setattr(file, "_slots_kernel", None)  # gates without a gradient cost no row sums
        torch.autograd.grad(grouped_linear(rows, w.detach(), plan, gates).sum(), rows)


@pytest.mark.parametrize("strange", ["expanded", "transposed"])
def test_cotangents_of_any_strides(strange):
    gates, plan = plan_of(6, 3, 2, 10)
    w = weight(3, 5, 8, torch.float32, 2)
    dy = rand((6, 5), seed=4)
    dy = dy.sum().expand(6, 5) if strange == "expanded" else dy.T.contiguous().T
    found = []
    for cotangent in (dy, dy.contiguous()):
        inputs = [t.requires_grad_() for t in (rand((12, 8), seed=1), w.clone(), gates.clone())]
        with backend.using("triton"):
            y = grouped_linear(inputs[0], inputs[1], plan, inputs[2])
        found.append(torch.autograd.grad(y, inputs, cotangent))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_padding_rows_of_the_next_expert_do_not_leak():
    """A tile reads on into the next expert's rows and weights: a NaN there stays there."""
    gates, plan = plan_of(40, 3, 1, 11)
    low, high = plan[2][1].item(), plan[2][2].item()
    x, w = rand((40, 16), seed=1), weight(3, 9, 16, torch.float32, 2)
    w[1] = torch.nan
    rows = torch.ones(40, dtype=torch.bool, device=DEVICE)
    rows[low:high] = False
    with backend.using("triton"):
        y = grouped_linear(x, w, plan)
        inputs = [t.requires_grad_() for t in (x[plan[0].long()], gates.clone())]
        dx, dgates = torch.autograd.grad(grouped_linear(inputs[0], w, plan, inputs[1]).sum(), inputs)
    assert torch.isfinite(y[rows]).all() and y[~rows].isnan().all()
    assert torch.isfinite(dx[rows]).all() and torch.isfinite(dgates[plan[0].long()[rows]]).all()


def test_errors():
    gates, plan = plan_of(4, 3, 2, 12)
    x, rows, w = rand((4, 8), seed=1), rand((8, 8), seed=2), weight(3, 5, 8, torch.float32, 3)
    assert_both_refuse(grouped_linear, rows, w, plan, gates[:, :1])
    assert_both_refuse(grouped_linear, rows, w, plan, gates, rand((1, 5), seed=4))
    assert_both_refuse(grouped_linear, x, w.bfloat16(), plan)
    part = adapter(3, 5, 8, 2, torch.float32, 5)
    for args, message in (
        ((rows, w, plan), r"x has shape \(8, 8\), expected \(N, C\) = \(4, 8\)"),
        ((x, w, plan, gates), r"x has shape \(4, 8\), expected \(P = N·T, C\) = \(8, 8\)"),
        ((x, w[:2], plan), r"w has shape \(2, 5, 8\), expected \(E, M, C\) with E = 3"),
        ((x, w[0], plan), r"w has shape \(5, 8\), expected \(E, M, C\)"),
        ((x, Stacked(parts=(w[0], w[1, :2])), plan), r"w has 7 rows, expected E·M with E = 3"),
        ((x, Stacked(parts=(w[0], w[1, :, :4])), plan), r"w has a part of shape \(5, 4\), expected \(M, 8\)"),
        ((x, w, plan, ABSENT, x), "add without gates"),
        ((rows, w, plan, gates.double()), "gates has dtype torch.float64, expected torch.float32"),
        ((x, w, (plan[0][:1], *plan[1:])), r"plan has shapes \(1,\), \(4, 2\), \(4,\), expected \(N·T,\)"),
        ((x, w, (plan[0].long(), *plan[1:])), "plan's order is torch.int64"),
        ((x.double(), w, plan), "x has dtype torch.float64"),
        ((x, Adapted(base=w, parts=(part,), rows=(4,)), plan), r"w.rows is \(4,\) for 1 parts"),
        ((x, Adapted(base=w, parts=(dataclasses.replace(part, a=part.a[0]),), rows=(5,)), plan), r"w.parts\[0\].a"),
        ((x, Adapted(base=w, parts=(dataclasses.replace(part, b=part.b[:, :2]),), rows=(5,)), plan), r"parts\[0\].b"),
    ):
        with backend.using("triton"), pytest.raises(ValueError, match=message):
            grouped_linear(*args)


@pytest.mark.parametrize("name", backend.NAMES)
def test_adapters_with_dropout_are_refused(name):
    _, plan = plan_of(4, 3, 2, 12)
    w = Adapted(
        base=weight(3, 5, 8, torch.float32, 3),
        parts=(adapter(3, 5, 8, 2, torch.float32, 5),),
        key=torch.zeros(1, 2, dtype=torch.int64, device=DEVICE),
        rows=(5,),
        dropout=0.1,
    )
    with backend.using(name), pytest.raises(NotImplementedError, match="adapters of experts have no dropout"):
        grouped_linear(rand((4, 8), seed=1), w, plan)


def test_a_quantised_weight_has_no_gradient():
    _, plan = plan_of(4, 3, 2, 12)
    w = nf4.quantize(rand((12, 64), seed=1), double_quant=False)
    w = dataclasses.replace(w, shape=(3, 4, 64), absmax=w.absmax.requires_grad_())
    with backend.using("triton"), pytest.raises(NotImplementedError, match="NF4 weight has no gradient"):
        tree.map(torch.sum, torch.autograd.grad(grouped_linear(rand((4, 64), seed=2), w, plan).sum(), w.absmax))


def test_cost():
    w = torch.empty(3, 6, 8, dtype=torch.bfloat16)
    assert file.cost(10, w) == Cost(bytes=2 * (10 * 8 + 10 * 6 + 3 * 6 * 8), flops=2 * 10 * 6 * 8)
    part = LoRA(a=torch.empty(3, 2, 8), b=torch.empty(3, 6, 2), scale=1.0)
    adapted = Adapted(base=w, parts=(part,), rows=(6,))
    extra = Cost(bytes=4 * 3 * 2 * (8 + 6), flops=2 * 10 * 2 * (8 + 6))
    assert file.cost(10, adapted) == file.cost(10, w) + extra
