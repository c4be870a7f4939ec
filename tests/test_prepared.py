"""A prepared call gives what the function gives, bit for bit, and only where the contract lets it be prepared."""

import inspect
import sys

import pytest
import torch
from oprule import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

from unsloth_core import autodiff, device, ops, prepared, tree
from unsloth_core.ops import nf4
from unsloth_core.segments import Segments
from unsloth_core.tree import ABSENT
from unsloth_core.weights import Adapted, LoRA


@pytest.fixture
def uses(monkeypatch):
    """Counts what ran without the function."""
    counted = []
    finish = prepared._Writer.finish

    def counting(writer, result):
        again = finish(writer, result)
        return lambda *leaves: (counted.append(1), again(*leaves))[1]

    monkeypatch.setattr(prepared._Writer, "finish", counting)
    return counted


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def cos_sin(tokens, pairs):
    return rand(tokens, pairs), rand(tokens, pairs)


OPS = {  # name: (arguments, which want a gradient, statics)
    "rms_norm": (lambda: (rand(5, 48), rand(48)), (0, 1), {"offset": 1.0}),
    "rms_norm with add": (lambda: (rand(5, 48), rand(48), rand(5, 48)), (0, 2), {}),
    "add_rms_norm": (lambda: (rand(5, 48), rand(5, 48), rand(48)), (0, 1, 2), {}),
    "layer_norm": (lambda: (rand(5, 48), rand(48), rand(48)), (0, 1, 2), {}),
    "softmax": (lambda: (rand(5, 48),), (0,), {}),
    "gelu": (lambda: (rand(5, 48),), (0,), {}),
    "glu": (lambda: (rand(5, 96),), (0,), {"act": "gelu_tanh"}),
    "rope": (lambda: (*rand(5, 6, 16).split((4, 2), 1), *cos_sin(5, 8)), (0, 1), {}),
    "qk_norm_rope": (lambda: (rand(5, 4, 16), rand(5, 2, 16), rand(16), rand(16), *cos_sin(5, 8)), (0, 1, 2, 3), {}),
    "cross_entropy": (lambda: (rand(5, 48), torch.arange(5, device=DEVICE)), (0,), {"z_loss": 0.1}),
    "dropout": (lambda: (rand(5, 48), torch.tensor([1, 2], device=DEVICE)), (0,), {"p": 0.5}),
}


@pytest.mark.parametrize("name", OPS)
def test_later_calls_give_the_bits_of_the_function(name, uses):
    make, wanted, statics = OPS[name]
    op = getattr(ops, name.split()[0])
    for repeat in range(4):
        args = make()
        inputs = [a.detach().requires_grad_() if i in wanted else a for i, a in enumerate(args)]
        out = op(*inputs, **statics)
        outs = out if isinstance(out, tuple) else (out,)
        cotangents = [torch.randn_like(o) for o in outs]
        got = torch.autograd.grad(outs, [inputs[i] for i in wanted], cotangents)
        assert len(uses) == max(0, 2 * (repeat - 1)), "neither the first call nor the second, then all"

        file = sys.modules[op.__module__]
        fwd, bwd = (inspect.unwrap(getattr(file, f"{op.__name__}_{half}")) for half in ("fwd", "bwd"))
        arity = len([p for p in inspect.signature(fwd).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD])
        args += (ABSENT,) * (arity - len(args))
        needs = tuple(ABSENT if a is ABSENT else i in wanted for i, a in enumerate(args))
        plain, residuals = fwd(*args, needs=needs, **statics)
        given = tuple(cotangents) if isinstance(plain, tuple) else cotangents[0]
        gradients = [g for g in bwd(residuals, given, needs=needs, **statics) if g is not ABSENT]
        for ours, theirs in zip((*outs, *got), (*tree.leaves(plain), *gradients), strict=True):
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype


def adapted(base, rows):
    parts = tuple(LoRA(a=rand(2, 16), b=rand(m, 2), scale=0.5) for m in rows)
    return Adapted(base=base, parts=parts, rows=rows)


def packed():
    ends = torch.tensor([0, 5, 9], dtype=torch.int32, device=DEVICE)
    segments = Segments.packed(ends, max_len=5)
    return rand(9, 4, 16), rand(9, 2, 16), rand(9, 2, 16), segments, segments


def in_nf4():
    return rand(16, 16), adapted(nf4.quantize(rand(12, 16), double_quant=False), (8, 4))


def turned():
    return rand(5, 16), adapted(rand(32, 16), (16, 16)), *cos_sin(5, 4)


NODES = {  # name: (arguments, leaves that want no gradient, statics)
    "attention": (packed, (), {"window": 3}),
    "embedding": (lambda: (torch.arange(100, device=DEVICE) % 7, rand(7, 16)), (), {}),
    "linear": (lambda: (rand(5, 16), adapted(rand(12, 16), (8, 4)), rand(12), rand(5, 12)), (), {}),
    "linear in NF4": (in_nf4, (1, 2), {}),
    "linear_rope": (turned, (6, 7), {"heads": 2, "kv_heads": 1}),
    "glu_linear": (lambda: (rand(5, 32), adapted(rand(12, 16), (12,))), (), {}),
}


@pytest.mark.parametrize("name", NODES)
def test_later_calls_with_nodes_give_the_bits_of_the_function(name, uses, monkeypatch):
    make, frozen, statics = NODES[name]
    op = getattr(ops, name.split()[0])

    def both(args, seed):
        leaves, spec = tree.flatten(args)
        trained = [i not in frozen and t.dtype == torch.float32 for i, t in enumerate(leaves)]
        inputs = [t.detach().requires_grad_(want) for t, want in zip(leaves, trained, strict=True)]
        outs = tree.leaves(op(*tree.unflatten(inputs, spec), **statics))
        torch.manual_seed(seed)
        wanted = [t for t in inputs if t.requires_grad]
        return [*outs, *torch.autograd.grad(outs, wanted, [torch.randn_like(o) for o in outs], allow_unused=True)]

    for repeat in range(4):
        args = make()
        got = both(args, repeat)
        with monkeypatch.context() as patch:
            patch.setattr(device, "straight", lambda _: False)
            want = both(args, repeat)
        for ours, theirs in zip(got, want, strict=True):
            assert ours is theirs is None or torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    assert len(uses) >= 2 * 3, "of each half all but the first call, and what is prepared inside"


def test_kinds_are_told_apart(uses):
    """Shapes, strides, dtypes, statics, needs and holes; all in turn, each three times, with fresh numbers."""
    w = rand(48)
    kinds = [
        (lambda: (rand(5, 48), w), {}),
        (lambda: (rand(4, 48), w), {}),
        (lambda: (rand(5, 64)[:, :48], w), {}),
        (lambda: (rand(2, 3, 48), w), {}),
        (lambda: (rand(5, 48, dtype=torch.bfloat16), w), {}),
        (lambda: (rand(5, 48), w.to(torch.bfloat16)), {}),
        (lambda: (rand(5 * 48 + 1)[1:].view(5, 48), w), {}),
        (lambda: (rand(5, 48), w), {"eps": 0.1}),
        (lambda: (rand(5, 48), w), {"offset": 0.1}),
        (lambda: (rand(5, 48), w, rand(5, 48)), {}),
        (lambda: (rand(5, 48).requires_grad_(), w), {}),
    ]
    plain = inspect.unwrap(sys.modules["unsloth_core.ops.rms_norm"].rms_norm_fwd)
    for _ in range(4):
        for make, statics in kinds:
            args = make()
            bare = [a.detach() for a in args]
            want = plain(*bare, needs=(True, False, ABSENT), **statics)[0]
            got = ops.rms_norm(*args, **statics)
            assert torch.equal(got, want)
            if got.requires_grad:
                got.sum().backward()
                assert args[0].grad is not None
    assert len(uses) == 2 * (len(kinds) + 1)  # of the fourth kind of call, forward and backward


def test_a_gradient_of_other_strides_is_another_kind(uses):
    for _ in range(4):
        x, dy = rand(5, 48).requires_grad_(), rand(48, 5).T
        got = torch.autograd.grad(ops.softmax(x), x, dy)[0]
        torch.testing.assert_close(got, torch.autograd.grad(x.softmax(-1), x, dy)[0])
    for _ in range(4):
        x, dy = rand(5, 48).requires_grad_(), rand(1, 1).expand(5, 48)
        got = torch.autograd.grad(ops.glu(x), x, dy[:, :24])[0]
        a, b = x.chunk(2, -1)
        torch.testing.assert_close(got, torch.autograd.grad(torch.nn.functional.silu(a) * b, x, dy[:, :24])[0])
    assert uses


def halves(x, *, needs, both=False, then=lambda out: None):
    out = torch.empty_like(x)
    then(out)
    return (out.view(-1)[:6], out.view(-1)[6:].view(2, 3)), (x, out if both else ABSENT)


@pytest.mark.parametrize("both", [False, True])
def test_views_of_new_memory_are_returned(both, uses):
    f = prepared.prepared(halves)
    for _ in range(4):
        (a, b), (x, whole) = f(rand(3, 4), needs=(True,), both=both)
        assert a.shape == (6,) and b.shape == (2, 3) and b.data_ptr() == a.data_ptr() + 24
        assert x.shape == (3, 4) and (whole is ABSENT or whole.data_ptr() == a.data_ptr())
    assert len(uses) == 2


def test_operators_of_pytorch_are_called_again(uses):
    """In their order, with views of arguments and of what they made, in place and with several results."""

    def sums(x, w, *, needs):
        largest, order = torch.sort(x[1:] @ w.T, dim=-1, descending=True)
        order += 1
        largest[0].mul_(2).add_(x[0, : w.shape[0]], alpha=3)
        return (largest, order[:, 1:], torch.cat([x.flatten(), w[0]])), ()

    f = prepared.prepared(sums)
    for repeat in range(4):
        wide = rand(6, 8)
        x, w = wide[repeat : repeat + 3, :4], rand(3, 4)  # which begins elsewhere in its memory every time
        got, want = f(x, w, needs=(False, False))[0], sums(x, w, needs=())[0]
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(got, want, strict=True))
    assert len(uses) == 2


def test_large_memory_is_given_back_as_early_as_can_be(monkeypatch):
    """Where the function may have let go of it; small scratch shares one allocation until the end."""

    def chain(x, *, needs):
        for _ in range(3):
            x = torch.cat([x, x]).mul(0.5).view(-1)[: x.numel()].sin()
        return x, ()

    finish, steps = prepared._Writer.finish, []
    monkeypatch.setattr(prepared._Writer, "finish", lambda w, result: (finish(w, result), steps.extend(w.steps))[0])
    f = prepared.prepared(chain)
    for _ in range(3):
        x = rand(2**18)
        assert torch.equal(f(x, needs=())[0], chain(x, needs=())[0])
    freed = [line for lines in steps for line in lines if line.startswith("del ")]
    assert len(freed) == 8 and len(steps) == 10, "of nine tensors all but the last"


def test_what_a_kernel_asks_for_and_its_tensors_are_addresses(monkeypatch):
    """As on a GPU, where the launcher's function is called; two pieces of scratch lie in one allocation."""
    given = []

    def again(step):
        tensors = [device.Address(t) for t in step.args if isinstance(t, torch.Tensor)]
        return (lambda *words: given.append(words)), (device.STREAM, device.Memory(100), device.Memory(1000), *tensors)

    monkeypatch.setattr(device, "again", again)
    for _ in range(4):
        x, w = rand(5, 48), rand(48)
        y = ops.rms_norm(x, w)
        if given:
            (stream, one, other, *addresses), _ = given.pop(), y
            assert stream == device.current_stream(x.get_device()) and other - one == 512
            assert addresses == [x.data_ptr(), w.data_ptr(), y.data_ptr()]


@pytest.mark.parametrize("direct", [True, False])
def test_memory_that_is_not_filled(direct, uses, monkeypatch):
    """It comes from where code of PyTorch's compiler has it, if that is there: the same tensors, with the same bits."""
    made = []

    def counting(*form):
        made.append(form)
        return known(*form)

    known = prepared._DIRECT[DEVICE.type]
    assert known is not None
    monkeypatch.setattr(prepared, "_DIRECT", {DEVICE.type: counting} if direct else {})
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    for repeat in range(4):
        x, w, dy = rand(5, 48).requires_grad_(), rand(48).requires_grad_(), rand(5, 48)
        y = ops.layer_norm(x, w)
        got = y, *torch.autograd.grad(y, (x, w), dy)
        with monkeypatch.context() as patch:
            patch.setattr(device, "straight", lambda _: False)
            y = ops.layer_norm(x, w)
            want = y, *torch.autograd.grad(y, (x, w), dy)
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        assert all(t.device == x.device and t.is_leaf != t.requires_grad for t in got)
        assert len(made) == (4 * repeat if direct else 0)  # y, statistics, dx, dw
    assert len(uses) == 2 * 3


def test_views_of_lasting_memory(uses, monkeypatch):
    monkeypatch.setattr(device, "LASTING", {})
    ones = device.lasting(torch.ones(3, device=DEVICE))

    def scaled(x, *, needs):
        return x * ones[1:2].expand(2, 4), ()

    f = prepared.prepared(scaled)
    for _ in range(4):
        x = rand(2, 4)
        assert torch.equal(f(x, needs=())[0], x)
    assert len(uses) == 2


@pytest.mark.parametrize("then", [lambda out: out.sum().item(), lambda out: out.nonzero()])
def test_what_depends_on_numbers_is_never_prepared(then, uses):
    f = prepared.prepared(halves)
    for _ in range(4):
        f(rand(3, 4), needs=(True,), then=then)
    assert not uses


def test_which_tensors_are_one_is_part_of_a_kind(uses):
    """Also when the same arguments come apart in between, and when one is a view of another."""
    x, w, other = rand(5, 48), rand(48), rand(5, 48)
    for _ in range(4):
        for a, b in ((x, x), (x, x.view(5, 48)), (x, other), (other, x)):
            assert torch.equal(ops.add_rms_norm(a, b, w)[0], a + b)
    assert len(uses) == 14 - 2


def test_arguments_without_memory_are_never_prepared(uses):
    for _ in range(4):
        assert ops.rms_norm(rand(0, 48), rand(48)).shape == (0, 48)
    assert not uses
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(4):
            assert ops.rms_norm(torch.empty(5, 48, device=DEVICE), torch.empty(48, device=DEVICE)).shape == (5, 48)
    assert not uses


def test_nodes_are_arguments_too(uses):
    """An adapter as argument, residual and gradient: told apart by its statics, and handed back as it came."""

    def half(w, *, needs):
        return torch.empty_like(w.a), (w, LoRA(a=w.a, b=torch.empty_like(w.b), scale=w.scale))

    f = prepared.prepared(half)
    for scale in (1.0, 2.0):
        for _ in range(4):
            w = LoRA(a=rand(2, 3), b=rand(4, 2), scale=scale)
            _, (same, other) = f(w, needs=(tree.map(lambda _: True, w),))
            assert same.a is w.a and same.b is w.b and same.scale == scale
            assert other.a is w.a and other.b is not w.b and other.scale == scale
    assert len(uses) == 4


def test_a_prepared_function_inside_another_is_seen_through(uses):
    """Its launches are the other's too."""

    def twice(x, *, needs):
        return softmax(softmax(x, needs=needs)[0], needs=needs)[0], ()

    softmax = sys.modules["unsloth_core.ops.softmax"].softmax_fwd
    for _ in range(4):
        softmax(rand(5, 48), needs=(True,))
    f = prepared.prepared(twice)
    for _ in range(4):
        x = rand(5, 48)
        torch.testing.assert_close(f(x, needs=(True,))[0], x.softmax(-1).softmax(-1))
    assert len(uses) == 2 + 2 + 2  # of softmax alone; inside the first call; the last two


def test_forgetting(uses):
    for _ in range(3):
        ops.softmax(rand(5, 48))
    assert len(uses) == 1
    prepared.forget()
    ops.softmax(rand(5, 48))
    assert len(uses) == 1


def test_a_profiler_hears_of_every_launch(monkeypatch):
    monkeypatch.setattr(device, "_INTERPRETING", False)
    monkeypatch.setattr(device, "_current", lambda: 1)
    assert device.straight(1) and not device.straight(0)
    device._KNOBS.launch_enter_hook.add(print)
    try:
        assert not device.straight(1)
    finally:
        device._KNOBS.launch_enter_hook.remove(print)


@pytest.mark.parametrize("gradients, budget", [(False, 17), (True, 60)])
def test_python_calls_of_an_op(gradients, budget, monkeypatch):
    """What a call costs the host, as a number that any machine can count: calls of Python functions in this thread. Of
    forward and backward PyTorch's own ``grad`` makes about 27; on a GPU backward's are another thread's."""
    monkeypatch.setattr(device, "again", lambda step: (divmod, (7, 1)))  # what is launched is not the host's
    x, w, dy = rand(5, 48).requires_grad_(gradients), rand(48).requires_grad_(gradients), rand(5, 48)
    calls = []

    def op():
        y = ops.rms_norm(x, w, eps=1e-5)
        if gradients:
            torch.autograd.grad(y, (x, w), dy)

    for _ in range(3):
        op()
    sys.setprofile(lambda frame, event, _: calls.append(frame.f_code.co_qualname) if event == "call" else None)
    try:
        op()
    finally:
        sys.setprofile(None)
    assert len(calls) <= budget, calls


def test_a_decoded_weight_is_not_prepared_within_a_layer(uses):
    """There it may have been decoded by an earlier call."""
    w = nf4.quantize(rand(64, 64))

    def step():
        x = rand(16, 64).requires_grad_()  # too many to be multiplied with the codes
        with torch.autograd.set_multithreading_enabled(False):  # in the context of this thread, as a layer's is
            ops.linear(x, w).sum().backward()

    for _ in range(4):
        with autodiff.remembering(autodiff.Memo()):
            step()
    assert len(uses) == 1, "nf4.dequantize alone, which is prepared by itself"
    for _ in range(4):
        step()
    assert len(uses) == 1 + 2 * 2
    with autodiff.remembering(autodiff.Memo()):
        step()
    assert len(uses) == 1 + 2 * 2 + 1
