"""AdamW against PyTorch's, purity and donation, schedules, clipping, one launch per step."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from oprule import DEVICE, assert_op_rule, rand
from torch._subclasses.fake_tensor import FakeTensorMode

import unsloth_core.backend as backend
from unsloth_core import checkpoint, device, optim, tree
from unsloth_core.ops.dynamic_map import tables
from unsloth_core.optim import blockwise, multi_tensor
from unsloth_core.tree import ABSENT
from unsloth_core.weights import LoRA

BACKENDS = ("triton", "reference")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = st.sampled_from([0, 1, 2, 17, 127, multi_tensor.TILE - 1, multi_tensor.TILE, 2 * multi_tensor.TILE + 3])
OPTIONS = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def numbers(sizes, dtypes, seed, scale=1.0):
    return [rand((n,), dtype, seed=seed + i, scale=scale) for i, (n, dtype) in enumerate(zip(sizes, dtypes))]


def steps_of_torch(params, grads_by_step, dtype=None, **options):
    """Parameters after torch.optim.AdamW, in ``dtype`` instead of their own if given; and its state."""
    ps = [p.clone().to(dtype or p.dtype).requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(ps, foreach=False, fused=False, **options)
    for grads in grads_by_step:
        for p, g in zip(ps, grads):
            p.grad = g.to(p.dtype)
        optimizer.step()
    return [p.detach() for p in ps], [optimizer.state[p] for p in ps]


def assert_same(a, b):
    assert tree.flatten(a)[1] == tree.flatten(b)[1]
    for (path, x), y in zip(tree.items(a), tree.leaves(b)):
        assert x.dtype == y.dtype and torch.equal(x, y), path


@pytest.mark.parametrize("name", BACKENDS)
@given(sizes=st.lists(SIZES, min_size=1, max_size=4), seed=st.integers(0, 2**20))
@settings(max_examples=8)
def test_fp32_is_torch_adamw_to_an_ulp_per_step(name, sizes, seed):
    params = numbers(sizes, [torch.float32] * len(sizes), seed)
    grads = [numbers(sizes, [torch.float32] * len(sizes), seed + 100 * k + 7) for k in range(3)]
    opt = optim.adamw(lr=2e-3, **OPTIONS)
    with backend.using(name):
        ours, state = params, opt.init(params)
        for g in grads:
            ours, state = opt.update(g, state, ours)
    theirs, states = steps_of_torch(params, grads, lr=2e-3, **OPTIONS)
    truth, _ = steps_of_torch(params, grads, torch.float64, lr=2e-3, **OPTIONS)
    assert int(state.step) == 3
    for i, (p, q, t) in enumerate(zip(ours, theirs, truth)):
        assert_op_rule(p, q, t, f"leaf {i}")
        torch.testing.assert_close(p, q, rtol=6e-7, atol=1e-9)
        torch.testing.assert_close(state.m[i], states[i]["exp_avg"], rtol=6e-7, atol=1e-7)
        torch.testing.assert_close(state.v[i], states[i]["exp_avg_sq"], rtol=6e-7, atol=1e-12)


@pytest.mark.parametrize("name", BACKENDS)
@given(
    leaves=st.lists(st.tuples(SIZES, st.sampled_from(FLOATS), st.sampled_from(FLOATS)), min_size=1, max_size=4),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=8)
def test_any_mixture_of_dtypes_is_rounded_once(name, leaves, seed):
    sizes, p_types, g_types = zip(*leaves)
    params, grads = numbers(sizes, p_types, seed), numbers(sizes, g_types, seed + 50)
    opt = optim.adamw(lr=0.1, **OPTIONS)
    with backend.using(name):
        ours, state = opt.update(grads, opt.init(params), params)
    theirs, _ = steps_of_torch(params, [grads], lr=0.1, **OPTIONS)
    fp32, _ = steps_of_torch(params, [grads], torch.float32, lr=0.1, **OPTIONS)
    truth, _ = steps_of_torch(params, [grads], torch.float64, lr=0.1, **OPTIONS)
    for i, (p, q, exact, t) in enumerate(zip(ours, theirs, fp32, truth)):
        assert_op_rule(p, q, t, f"leaf {i} {p.dtype}")
        eps = torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.float(), exact, rtol=0.51 * eps, atol=1e-6 if eps < 1e-6 else 1e-7)
        assert state.m[i].dtype == state.v[i].dtype == torch.float32


@pytest.mark.parametrize("name", BACKENDS)
def test_donate_writes_in_place_and_otherwise_nothing_is_touched(name):
    sizes, dtypes = (5, 4099, 64), FLOATS
    opt = optim.adamw(optim.cosine(1e-2, 10, warmup=2), weight_decay=0.1, max_norm=0.5)
    grads = [numbers(sizes, dtypes, 100 + k) for k in range(3)]
    with backend.using(name):
        start = numbers(sizes, dtypes, 0)
        ours, state = start, opt.init(start)
        for g in grads:
            before = tree.map(torch.clone, (g, state, ours))
            inputs = (g, state, ours)
            ours, state = opt.update(g, state, ours)
            assert_same(inputs, before)
        mine = numbers(sizes, dtypes, 0)
        given_state = opt.init(mine)
        for g in grads:
            kept, kept_state = opt.update(g, given_state, mine, donate=True)
            assert kept is mine and kept_state is given_state
    assert_same((ours, state), (mine, given_state))


def test_a_donated_buffer_that_autograd_still_needs_is_noticed():
    w = rand((8,), seed=0).requires_grad_()
    loss = (w * w).sum()
    opt = optim.adamw()
    opt.update([torch.ones_like(w)], opt.init([w]), [w], donate=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", BACKENDS)
def test_holes_in_gradients_leave_parameters_alone(name):
    params = {
        "a": LoRA(a=rand((2, 3), seed=1), b=rand((3, 2), seed=2), scale=2.0),
        "b": (rand((4,), seed=3), ABSENT, LoRA(a=rand((1, 3), seed=4), b=rand((2, 1), seed=5), scale=1.0)),
    }
    grads = {
        "a": LoRA(a=ABSENT, b=rand((3, 2), seed=6), scale=2.0),
        "b": (rand((4,), seed=7), ABSENT, ABSENT),
    }
    opt = optim.adamw(lr=0.1, weight_decay=0.5)
    with backend.using(name):
        state = opt.init(params)
        new, state2 = opt.update(grads, state, params)
        full = tree.map(lambda p: rand(tuple(p.shape), seed=9), params)
        opt.update(full, state2, new)
    assert tree.flatten(new)[1] == tree.flatten(params)[1] == tree.flatten(state2.m)[1]
    for path, old in tree.items(params):
        still = path in ("a.a", "b.2.a", "b.2.b")
        assert (dict(tree.items(new))[path] is old) == still, path
        assert (dict(tree.items(state2.v))[path] is dict(tree.items(state.v))[path]) == still, path


def test_gradients_of_any_strides():
    params = [rand((6, 7), seed=0), rand((5, 3), seed=1)]
    grads = [rand((7, 6), seed=2).T, rand((5, 1), seed=3).expand(5, 3)]
    opt = optim.adamw(lr=0.1, max_norm=1.0)
    ours, _ = opt.update(grads, opt.init(params), params)
    assert_same(ours, opt.update([g.contiguous() for g in grads], opt.init(params), params)[0])


def test_an_empty_tree_and_a_tree_of_empty_leaves():
    opt = optim.adamw(max_norm=1.0)
    for params in ({}, [torch.zeros(0, 4, device=DEVICE)]):
        new, state = opt.update(params, opt.init(params), params)
        assert int(state.step) == 1 and len(tree.leaves(new)) == len(params)


def test_no_gradient_at_all():
    params = {"w": rand((3,), seed=0)}
    opt = optim.adamw(max_norm=1.0, weight_decay=0.5)
    new, state = opt.update(ABSENT, opt.init(params), params)
    assert new["w"] is params["w"] and int(state.step) == 1


def count_launches(monkeypatch):
    launched = []
    real = multi_tensor.launch
    monkeypatch.setattr(
        multi_tensor, "launch", lambda k, *args, **kw: (launched.append(k.__name__), real(k, *args, **kw))
    )
    return launched


def test_eight_leaves_of_prime_sizes_are_one_launch(monkeypatch):
    sizes = (2, 3, 101, 1009, 2039, 2053, 4099, 6151)
    dtypes = [FLOATS[i % 3] for i in range(8)]
    params, grads = numbers(sizes, dtypes, 0), numbers(sizes, dtypes, 10)
    opt = optim.adamw()
    state = opt.init(params)
    opt.update(grads, state, params)  # the first step on a GPU also loads what a captured one will need
    launched = count_launches(monkeypatch)
    new, _ = opt.update(grads, state, params)
    assert launched == ["_adamw_kernel"]
    launched.clear()
    optim.global_norm(grads)
    assert launched == ["_square_kernel", "_root_kernel"]
    with backend.using("reference"):
        expected, _ = opt.update(grads, state, params)
    for p, q in zip(new, expected):
        torch.testing.assert_close(p, q, rtol=torch.finfo(p.dtype).eps, atol=1e-7)


@pytest.mark.parametrize("state_dtype", [torch.float32, "8bit"])
def test_views_that_are_not_aligned_to_sixteen_bytes(state_dtype):
    whole = rand((4 * multi_tensor.TILE + 9,), seed=0)
    params, grads = (
        [whole[1 : 2 * multi_tensor.TILE + 4]],
        [whole[2 * multi_tensor.TILE + 5 :][: multi_tensor.TILE * 2 + 3]],
    )
    opt = optim.adamw(lr=0.1, state_dtype=state_dtype)
    ours, _ = opt.update(grads, opt.init(params), params)
    expected, _ = opt.update([grads[0].clone()], opt.init(params), [params[0].clone()])
    assert_same(ours, expected)
    assert torch.equal(optim.global_norm(grads), optim.global_norm([grads[0].clone()]))


LEAST = blockwise.LEAST  # elements of a leaf whose states are stored in 8 bits


def states(opt, params, grads_by_step, donate=False):
    ours, state = tree.map(torch.clone, params), opt.init(params)
    for grads in grads_by_step:
        ours, state = opt.update(grads, state, ours, donate=donate)
    return ours, state


@pytest.mark.parametrize("state_dtype", ["8bit", torch.bfloat16])
@pytest.mark.parametrize("mixed", [False, True])
def test_small_states_are_the_reference_s(state_dtype, mixed):
    """A leaf just under and at the limit, one with a ragged block and a ragged tile; the same kinds, or a mixture."""
    sizes = (17, LEAST - 1, LEAST, LEAST + 389) if mixed else (LEAST, LEAST + 389)
    dtypes = [FLOATS[i % 3] for i in range(len(sizes))] if mixed else [torch.float32] * len(sizes)
    params, grads = numbers(sizes, dtypes, 0), [numbers(sizes, dtypes, 10 * k + 10, scale=10.0**-k) for k in range(3)]
    opt = optim.adamw(lr=1e-2, state_dtype=state_dtype, **OPTIONS)
    with backend.using("triton"):
        ours, state = states(opt, params, grads)
        assert_same((ours, state), states(opt, params, grads, donate=True))
        assert_same((ours, state), states(opt, params, grads))
    with backend.using("reference"):
        theirs, expected = states(opt, params, grads)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2 * torch.finfo(p.dtype).eps, atol=1e-6)
    for (path, a), b in zip(tree.items((state.m, state.v)), tree.leaves((expected.m, expected.v)), strict=True):
        if a.dtype == torch.uint8:  # a last bit of an fp32 sum may take a number past a midpoint
            assert (a.int() - b.int()).abs().max() <= 1 and (a != b).sum() <= 3, path
        else:
            torch.testing.assert_close(a, b, rtol=2**-7 if a.dtype == torch.bfloat16 else 1e-6, atol=1e-9)
    small = [torch.float32 if state_dtype == "8bit" else torch.bfloat16, torch.float32]
    for p, m, v in zip(params, state.m, state.v, strict=True):
        eight = state_dtype == "8bit" and p.numel() >= LEAST
        assert (isinstance(m, optim.Blockwise), isinstance(v, optim.Blockwise)) == (eight, eight)
        assert eight or [m.dtype, v.dtype] == small


def test_8_bit_states_in_bytes():
    """10.06 bytes per bf16 parameter: p twice and g once at 2, and the states read and written."""
    state = optim.adamw(state_dtype="8bit").init([torch.zeros(64, 256, device=DEVICE)])
    assert 6 + 2 * tree.nbytes((state.m, state.v)) / (64 * 256) == pytest.approx(10.06, abs=0.003)


@triton.jit
def _coded(x, codes, absmax, maps, decoded, size, SIGNED: tl.constexpr, TILE: tl.constexpr, ZERO: tl.constexpr,
           LEAST: tl.constexpr, RAGGED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """One tile: codes and absmax of ``x``, and the entries of the codes found there, by the optimizer's own."""
    offsets = multi_tensor._within_blocks(TILE, 256)
    start = tl.program_id(0).to(tl.int64) * TILE
    left = (size - start).to(tl.int32)
    mask = offsets < left if RAGGED else None
    given = tl.load(codes.to(tl.pointer_type(tl.uint8)) + start + offsets, mask, 0 if RAGGED else None).to(tl.int32)
    first = maps if SIGNED else maps + 512
    tl.store(decoded + start + offsets, multi_tensor._entry(first, given), mask)
    numbers = tl.load(x + start + offsets, mask)
    multi_tensor._encode(codes, absmax, first + 256, numbers, start, offsets, left, SIGNED, RAGGED, WIDE,
                         TILE, 256, ZERO, LEAST)  # fmt: skip


def coded(x, given, signed, tile=multi_tensor.TILE_8BIT, warps=multi_tensor.WARPS_8BIT, wide=4):
    """(codes and absmax of x, entries of ``given``) as the kernel makes them."""
    codes, absmax = given.clone(), torch.full((-(-x.numel() // 256),), torch.nan, device=DEVICE)
    decoded = torch.full_like(x, torch.nan)
    device.launch(
        _coded, (-(-x.numel() // tile),), x, codes.data_ptr(), absmax.data_ptr(), multi_tensor._maps(x.device), decoded,
        x.numel(), SIGNED=signed, TILE=tile, ZERO=blockwise.ZERO, LEAST=blockwise.LEAST_ABSMAX,
        RAGGED=x.numel() % tile != 0, WIDE=wide, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return blockwise.Blockwise(codes=codes, absmax=absmax), decoded


def hard_numbers(signed):
    """For blocks whose absmax is 1: every entry, every midpoint and its neighbours, what underflows when scaled."""
    points, midpoints = tables(DEVICE, signed)
    x = [points, midpoints]
    for towards in (-2.0, 2.0):
        x.append(torch.nextafter(midpoints, torch.full_like(midpoints, towards)))
    x.append(torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-38, -1e-38, 1e-45, -1e-45, 1e-8, -1e-8], device=DEVICE))
    x = torch.cat(x)
    return x if signed else x.abs()


@pytest.mark.parametrize("signed", [True, False])
def test_the_kernel_s_8_bit_numbers_are_the_reference_s_to_the_bit(signed):
    """Every code to its entry and back; ties at midpoints; blocks of any scale, down to subnormal, and of zeros."""
    hard = hard_numbers(signed)
    blocks = torch.nn.functional.pad(hard, (0, -hard.numel() % 255)).view(-1, 255)
    blocks = torch.cat([torch.ones_like(blocks[:, :1]), blocks], 1)  # each has absmax 1
    scales = torch.tensor([1.0, 2.0**-20, 3.7, 1e-30, 2e38, 1e-38, 1e-42, 0.0], device=DEVICE)
    anything = rand((11, 256), seed=3) * 10.0 ** (3 * rand((11, 256), seed=4))
    x = torch.cat(
        [(blocks * scale).reshape(-1) for scale in scales] + [(anything if signed else anything.abs()).view(-1)]
    )
    x = x[: x.numel() - 77]  # a ragged block at the end
    given = torch.arange(x.numel(), device=DEVICE).to(torch.uint8)
    for n in (x.numel(), x.numel() // multi_tensor.TILE_8BIT * multi_tensor.TILE_8BIT):  # ragged, and whole tiles
        for wide in (0, 4):
            ours, entries = coded(x[:n].clone(), given[:n], signed, wide=wide)
            theirs = blockwise.encode(x[:n], signed=signed)
            assert torch.equal(ours.absmax, theirs.absmax)
            wrong = (ours.codes != theirs.codes).nonzero().flatten().tolist()
            assert not wrong, (wrong[:5], x[wrong[:5]].tolist(), ours.codes[wrong[:5]].tolist())
            assert torch.equal(entries, tables(DEVICE, signed)[0][given[:n].long()])


@pytest.mark.parametrize("signed", [True, False])
def test_every_8_bit_code_is_kept_by_decoding_and_encoding(signed):
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(16)
    absmax = torch.logspace(-30, 30, 16, device=DEVICE)
    state = blockwise.Blockwise(codes=codes, absmax=absmax)
    x = blockwise.decode(state, signed=signed)
    assert_same(blockwise.encode(x, signed=signed), state)
    assert_same(coded(x, codes, signed)[0], state)


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_numbers(signed):
    """To the nearest; what is not zero does not become zero where that would harm; zeros stay."""
    x = rand((3, 1367), seed=0) * 10.0 ** rand((3, 1367), seed=1)
    x = x if signed else x.square()
    x[0, :300] = 0.0
    x[1, 5] = -1e-30 if signed else 1e-30
    packed = blockwise.encode(x, signed=signed)
    assert packed.codes.shape == x.shape and packed.absmax.shape == (17,)
    back = blockwise.decode(packed, signed=signed)
    largest = packed.absmax.repeat_interleave(256)[: x.numel()].view(x.shape)
    # Half the widest gap of the highest decade, and the entry -1 that the signed map has not.
    assert ((back - x).abs() <= (0.0071 if signed else 0.0036) * largest).all()
    assert (back[0, :256] == 0).all()
    assert (back[x < 0] < 0).all() if signed else (back[x > 0] > 0).all()
    nothing = blockwise.zeros(x, signed=signed)
    assert (blockwise.decode(nothing, signed=signed) == 0).all()
    assert_same(blockwise.encode(torch.zeros_like(x), signed=signed), nothing)


def test_8_bit_training_follows_fp32():
    """A least-squares problem: the loss falls as far, though every state is rounded at every step."""
    a, b = rand((64, 128), seed=0), rand((64, 64), seed=1)
    losses = {}
    for state_dtype in (torch.float32, torch.bfloat16, "8bit"):
        opt = optim.adamw(lr=2e-2, state_dtype=state_dtype)
        w = {"w": torch.zeros(128, 64, device=DEVICE)}
        state = opt.init(w)
        with backend.using("reference"):
            for _ in range(60):
                w, state = opt.update({"w": a.T @ (a @ w["w"] - b) / 64}, state, w)
        losses[state_dtype] = float((a @ w["w"] - b).square().mean())
    assert losses["8bit"] < 1.2 * losses[torch.float32] and losses[torch.bfloat16] < 1.2 * losses[torch.float32]
    assert losses[torch.float32] < 0.05


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_gradient_that_is_not_finite_skips_its_element_of_8_bit_states(name, bad):
    params, grads = numbers([LEAST + 3], [torch.float32], 0), [numbers([LEAST + 3], [torch.float32], k) for k in (1, 2)]
    opt = optim.adamw(lr=0.1, weight_decay=0.5, state_dtype="8bit")
    with backend.using(name):
        ours, state = opt.update(grads[0], opt.init(params), params)
        poisoned = [grads[1][0].clone()]
        poisoned[0][1000] = bad
        new, after = opt.update(poisoned, state, ours)
        healthy, _ = opt.update(grads[1], state, ours)
        everywhere, kept = opt.update([torch.full_like(params[0], bad)], state, ours)
    others = torch.arange(LEAST + 3, device=DEVICE) != 1000
    assert new[0][1000] == ours[0][1000] and torch.equal(new[0][others], healthy[0][others])
    assert torch.isfinite(after.m[0].absmax).all() and torch.isfinite(after.v[0].absmax).all()
    assert torch.equal(everywhere[0], ours[0])
    assert_same(kept.v, state.v)
    before, now = (blockwise.decode(t.m[0], signed=True) for t in (state, kept))  # rounded once more: the map has no -1
    torch.testing.assert_close(now, before, rtol=0, atol=0.02 * float(before.abs().max()))


def test_8_bit_states_are_saved_and_resumed_to_the_same_bits(tmp_path):
    params = {"x": LoRA(a=rand((16, 300), seed=0), b=rand((5, 16), seed=1), scale=1.0)}
    grads = [tree.map(lambda p, k=k: rand(tuple(p.shape), seed=k), params) for k in range(4)]
    opt = optim.adamw(lr=1e-2, state_dtype="8bit")
    straight = states(opt, params, grads)
    half = states(opt, params, grads[:2])
    path = checkpoint.save(tmp_path, 2, half, {})
    ours, state = checkpoint.load(path, (params, opt.init(params)))
    for g in grads[2:]:
        ours, state = opt.update(g, state, ours)
    assert_same((ours, state), straight)
    with pytest.raises(ValueError, match="belongs to another run"):
        checkpoint.load(path, (params, optim.adamw(lr=1e-2).init(params)))


def test_8_bit_states_are_one_launch_and_capturable(monkeypatch):
    params, grads = numbers((5, LEAST, 5000), FLOATS, 0), numbers((5, LEAST, 5000), FLOATS, 10)
    opt = optim.adamw(state_dtype="8bit")
    with backend.using("triton"):
        state = opt.init(params)
        expected = opt.update(grads, state, params)
        launched = count_launches(monkeypatch)
        assert_same(opt.update(grads, state, params), expected)
    assert launched == ["_adamw_kernel"]
    with FakeTensorMode(), backend.using("reference"):
        params = [torch.randn(70, 80)]
        new, _ = opt.update(params, opt.init(params), params)
        assert new[0].shape == (70, 80)


def test_addresses_can_travel_as_kernel_arguments():
    tensors = [torch.zeros(n, device=DEVICE) for n in range(1, 2 * multi_tensor.ARGUMENTS)]
    addresses = [t.data_ptr() for t in tensors]
    assert multi_tensor._table_by_arguments(addresses, DEVICE).tolist() == addresses


def test_a_captured_step_replays_with_its_own_rate():
    """On a GPU the update is a CUDA graph, elsewhere the same function called again."""
    opt = optim.adamw(optim.linear(0.1, 5, warmup=2), max_norm=1.0, weight_decay=0.1)
    params = [rand((300,), seed=0), rand((5000,), torch.bfloat16, seed=1)]
    grads = [rand((300,), seed=2), rand((5000,), torch.bfloat16, seed=3)]
    expected, expected_state = params, opt.init(params)
    for _ in range(4):
        expected, expected_state = opt.update(grads, expected_state, expected)

    ours = tree.map(torch.clone, params)
    state = opt.init(ours)

    def step():
        opt.update(grads, state, ours, donate=True)

    step()  # the first call compiles, so it stays outside the graph
    if DEVICE.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        step = graph.replay
    for _ in range(3):
        step()
    assert_same((ours, state), (expected, expected_state))


def test_nothing_depends_on_values():
    """Under FakeTensorMode a sync or a data-dependent shape raises."""
    with FakeTensorMode(), backend.using("reference"):
        params = [torch.randn(3, 4), torch.randn(5, dtype=torch.bfloat16)]
        opt = optim.adamw(optim.cosine(1e-3, 100, warmup=5), weight_decay=0.1, max_norm=1.0)
        state = opt.init(params)
        for donate in (False, True):
            new, state = opt.update(params, state, params, donate=donate)
        assert [p.shape for p in new] == [p.shape for p in params] and state.step.dtype == torch.int64


@given(
    shape=st.sampled_from(["linear", "cosine"]),
    peak=st.floats(1e-6, 1.0),
    warmup=st.integers(0, 7),
    decay=st.integers(1, 30),
    final=st.sampled_from([0.0, 1e-5]),
)
def test_schedules_are_their_formulas(shape, peak, warmup, decay, final):
    steps = warmup + decay
    schedule = getattr(optim, shape)(peak, steps, warmup, final)
    rates = [float(schedule(torch.tensor(i))) for i in range(steps + 3)]
    for i, rate in enumerate(rates):
        if i < warmup:
            expected = peak * (i + 1) / warmup
        else:
            t = min((i - warmup) / decay, 1.0)
            down = 1 - t if shape == "linear" else 0.5 * (1 + math.cos(math.pi * t))
            expected = final + (peak - final) * down
        assert math.isclose(rate, expected, rel_tol=1e-9, abs_tol=1e-12)
    assert rates[0] > 0 and math.isclose(rates[warmup], peak) and math.isclose(rates[-1], final, abs_tol=1e-12)
    assert schedule(torch.tensor(0)).dtype == torch.float64


def test_a_schedule_reaches_the_update():
    params, grads = [rand((9,), seed=0)], [rand((9,), seed=1)]
    opt = optim.adamw(optim.linear(0.1, 4, warmup=2))
    ours, state = params, opt.init(params)
    p = params[0].clone().requires_grad_()
    theirs = torch.optim.AdamW([p], lr=0.1, weight_decay=0.0)
    for rate in (0.05, 0.1, 0.1, 0.05):
        ours, state = opt.update(grads, state, ours)
        theirs.param_groups[0]["lr"], p.grad = rate, grads[0]
        theirs.step()
    torch.testing.assert_close(ours[0], p.detach(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", BACKENDS)
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    max_norm=st.sampled_from([0.1, 1.0, 1e6]),
    seed=st.integers(0, 99),
)
@settings(max_examples=8)
def test_global_norm_and_clipping_are_torch_s(name, sizes, max_norm, seed):
    dtypes = [FLOATS[(i + seed) % 3] for i in range(len(sizes))]
    grads = numbers(sizes, dtypes, seed, scale=3.0)
    with backend.using(name):
        norm = optim.global_norm({"g": grads, "hole": ABSENT})
        assert torch.equal(norm, optim.global_norm(grads))
        clipped = [g.float() * optim.clip_factor(norm, max_norm) for g in grads]
    truth = torch.cat([g.double() for g in grads]).norm()
    torch.testing.assert_close(norm.double().to(truth.device), truth, rtol=1e-6, atol=0)
    ps = [torch.zeros_like(g, dtype=torch.float32) for g in grads]
    for p, g in zip(ps, grads):
        p.grad = g.float().clone()  # it scales in place
    torch.nn.utils.clip_grad_norm_(ps, max_norm)
    for c, p in zip(clipped, ps):
        torch.testing.assert_close(c, p.grad, rtol=1e-6, atol=0)

    params = numbers(sizes, [torch.float32] * len(sizes), seed + 40)
    with backend.using(name):
        inside, outside = optim.adamw(lr=0.1, max_norm=max_norm), optim.adamw(lr=0.1)
        a, _ = inside.update(grads, inside.init(params), params)
        b, _ = outside.update(grads, outside.init(params), params, clip=optim.clip_factor(norm, max_norm))
    assert_same(a, b)


def test_what_is_refused():
    x = torch.zeros(2, 3, device=DEVICE)
    opt = optim.adamw(max_norm=1.0)
    state = opt.init({"w": x})
    in_8_bits, y = optim.adamw(state_dtype="8bit"), torch.zeros(17, 256, device=DEVICE)
    short = tree.map(lambda t: t[:16] if t.shape == (17,) else t, in_8_bits.init({"w": y}))  # absmax of 16 blocks
    for call, message in (
        (lambda: opt.init({"w": x.int()}), "'w' is torch.int32, expected one of"),
        (lambda: opt.init({"w": x.double()}), "'w' is torch.float64, expected one of"),
        (lambda: opt.init({"w": 1.0}), "'w' is float, expected one of"),
        (lambda: opt.init({"w": x.T}), "'w' has strides"),
        (lambda: opt.init({"u": x, "w": x}), "'u' and 'w' share memory"),
        (lambda: opt.update({"w": x[:1]}, state, {"w": x}), r"gradient of 'w' is torch.float32 \(1, 3\)"),
        (lambda: opt.update({"w": x.int()}, state, {"w": x}), "gradient of 'w' is torch.int32"),
        (lambda: opt.update({"w": x}, opt.init({}), {"w": x}), "the state has 0 leaves, expected 1"),
        (
            lambda: opt.update({"w": x}, state, {"w": x}, clip=torch.ones(())),
            "clip was given and max_norm is set",
        ),
        (lambda: optim.adamw(betas=(0.9, 1.0)), "betas"),
        (lambda: optim.adamw(eps=-1.0), "eps"),
        (lambda: optim.adamw(lr=-1.0), "rate"),
        (lambda: optim.adamw(max_norm=0.0), "max_norm"),
        (lambda: optim.adamw(state_dtype=torch.float16), "state_dtype = torch.float16, expected one of"),
        (
            lambda: optim.adamw(state_dtype=torch.bfloat16).update({"w": x}, state, {"w": x}),
            "its state torch.float32 .*, a state as state_dtype = torch.bfloat16 makes it",
        ),
        (lambda: in_8_bits.update({"w": y}, short, {"w": y}), r"its state torch.float32 \(16,\) on"),
        (lambda: optim.cosine(1e-3, 5, warmup=5), "steps = 5, expected more than warmup = 5"),
        (lambda: optim.linear(-1e-3, 5), "peak = -0.001"),
        (lambda: optim.clip_factor(x, 0.0), "max_norm = 0.0"),
        (lambda: optim.global_norm([x.int()]), "dtype torch.int32"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert int(state.step) == 0
