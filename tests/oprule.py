"""The op rule: an op may err twice as much as PyTorch itself in the same dtype, plus one unit in the last place.

Truth is the float64 reference evaluated on the already rounded inputs. :func:`check_op` puts one op through the
whole contract: values, every gradient, a subset of gradients, purity, repeatability, linearity in the cotangent,
and honest residuals."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils._pytree as pt
from torch import Tensor

import unsloth_core.backend as backend
from unsloth_core import tree
from unsloth_core.tree import ABSENT
from unsloth_core.weights import NF4

DEVICE = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NORM_SLACK = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23, torch.float64: 2**-52}


def rand(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, seed: int, scale: float = 1.0) -> Tensor:
    """Normal numbers, the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).to(DEVICE)


def strided(t: Tensor) -> Tensor:
    """The same values as a view of a larger tensor: rows lie further apart, the last dimension is still contiguous."""
    big = torch.full([*t.shape[:-1], t.shape[-1] + 8], 7.0, device=t.device).to(t.dtype)
    view = big[..., : t.shape[-1]]
    view.copy_(t)
    return view


def assert_op_rule(ours: Tensor, torch_same: Tensor, t64: Tensor, what: str, factor: float = 2.0) -> None:
    """``max|ours - t64| <= factor·max|torch - t64| + ulp`` and the same for the relative norm; non-finite values
    coincide, and integers are equal."""
    assert ours.shape == t64.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(t64.shape)}"
    assert ours.dtype == torch_same.dtype, f"{what}: dtype {ours.dtype}, PyTorch gives {torch_same.dtype}"
    if not ours.is_floating_point():
        assert torch.equal(ours, t64), f"{what}: integers differ"
        return
    o, p = ours.detach().double(), torch_same.detach().double()
    bad = ~torch.isfinite(t64)
    if bad.any():
        same = torch.equal(o[bad].nan_to_num(12.5), t64[bad].nan_to_num(12.5))
        assert same, f"{what}: non-finite values differ: {o[bad][:4].tolist()}, expected {t64[bad][:4].tolist()}"
    good = ~bad
    o, p, t = o[good], p[good], t64[good]
    if t.numel() == 0:
        return
    assert torch.isfinite(o).all(), f"{what}: {int((~torch.isfinite(o)).sum())} values are not finite"
    if not torch.isfinite(p).all():
        p = torch.where(torch.isfinite(p), p, t)  # PyTorch overflowed, the truth did not: no allowance from there
    largest = t.abs().max()
    ulp = torch.finfo(ours.dtype).eps * torch.exp2(torch.floor(torch.log2(largest))) if largest > 0 else 0.0
    ulp = max(float(ulp), torch.finfo(ours.dtype).smallest_normal)
    # Half a unit is what correct rounding may cost; where PyTorch errs less, in a tensor of few elements, it was lucky.
    error, allowed = float((o - t).abs().max()), factor * max(float((p - t).abs().max()), ulp / 2) + ulp
    assert error <= allowed, f"{what}: max error {error:.3e} > {allowed:.3e} (max|t| {float(largest):.3e})"
    norm = float(t.norm())
    if norm > 0:
        slack = _NORM_SLACK[ours.dtype]
        error, allowed = float((o - t).norm()) / norm, factor * max(float((p - t).norm()) / norm, slack / 2) + slack
        assert error <= allowed, f"{what}: relative norm {error:.3e} > {allowed:.3e}"


# Cotangents as autograd hands them over, made from a dense (A, B, C): one number for everything, and so on.
STRANGE_STRIDES = {
    "expanded": lambda t: t.sum().expand(t.shape),
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "repeated": lambda t: t[:, :1].expand(t.shape),
    "permuted": lambda t: t.permute(2, 1, 0).contiguous().permute(2, 1, 0),
}


def assert_both_refuse(op: Callable[..., Any], *args: Any, **statics: Any) -> None:
    """Kernels and reference raise the same ValueError, where PyTorch would broadcast."""
    messages = []
    for name in backend.NAMES:
        with backend.using(name), pytest.raises(ValueError) as caught:
            op(*args, **statics)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def assert_same_up_to_order(a: Tensor, b: Tensor) -> None:
    """Two fp32 results of one sum: compiled for other strides, lanes hold and add its terms in another order."""
    torch.testing.assert_close(a, b, rtol=2**-18, atol=2**-18 * float(b.abs().max()) if b.numel() else 0.0)


def check_op(
    op: Callable[..., Any],
    args: tuple[Any, ...],
    statics: dict[str, Any] | None = None,
    *,
    seed: int = 0,
    frozen: Callable[[str], bool] = lambda path: False,
    factor: float = 2.0,
    judge: Callable[..., Any] | None = None,
) -> None:
    """Put ``op(*args, **statics)`` through the contract. ``frozen(path)`` names leaves that never get a gradient.

    ``judge``: what PyTorch's user would write in the same dtype, where the reference is kinder to itself than that.
    Paths are those of ``tree.items(args)``, for instance "0" for the first argument and "1.parts.0.a" inside a weight.
    """
    statics = statics or {}
    paths = [path for path, _ in _items(args)]
    can = [_differentiable(leaf) and not frozen(path) for path, leaf in _items(args)]
    reference = backend.reference(op.__name__)

    out64, grads64, cotangents = _run(lambda *a: reference(*a, **statics), _map(_to_double, args), can, seed, None)
    same, same_grads, _ = _run(lambda *a: (judge or reference)(*a, **statics), args, can, seed, cotangents)

    before = [_bytes(t) for t in tree.leaves(args)]
    with backend.using("triton"):
        ours, grads, _ = _run(lambda *a: op(*a, **statics), args, can, seed, cotangents, linear=True)
        subset = [c and random.Random(seed + i).random() < 0.5 for i, c in enumerate(can)]
        _, some_grads, _ = _run(lambda *a: op(*a, **statics), args, subset, seed, cotangents)
        needs = _unflatten_needs(args, can)
        again, residuals = op.fwd(*args, needs=needs, **statics)
    assert [_bytes(t) for t in tree.leaves(args)] == before, f"{op.__name__}: an argument was written to"

    for i, (o, p, t) in enumerate(zip(ours, same, out64, strict=True)):
        assert_op_rule(o, p, t, f"{op.__name__} output {i}", factor)
    for o, a in zip(ours, again if isinstance(again, tuple) else (again,), strict=True):
        assert _bytes(o) == _bytes(a), f"{op.__name__}: two runs differ"
    for path, got, p, t in zip(paths, grads, same_grads, grads64, strict=True):
        if t is not None:
            assert got is not None, f"{op.__name__}: no gradient for argument {path}"
            assert_op_rule(got, p, t, f"{op.__name__} gradient of {path}", factor)
    for path, got, want, p, t in zip(paths, some_grads, subset, same_grads, grads64, strict=True):
        if want and t is not None:
            assert_op_rule(got, p, t, f"{op.__name__} gradient of {path} alone", factor)
    _check_residuals(op.__name__, residuals, args, again if isinstance(again, tuple) else (again,))


def _check_residuals(name: str, residuals: Any, args: Any, outputs: tuple[Tensor, ...]) -> None:
    given = [t for t in tree.leaves(args) if isinstance(t, Tensor)]
    for r in tree.leaves(residuals):
        if any(r is t for t in (*given, *outputs)):
            continue
        for t in given:
            copies = r.numel() > 1 and r.shape == t.shape and r.dtype == t.dtype and torch.equal(r, t)
            assert not copies, f"{name}: a residual is a copy of an argument"
        for t in (*given, *outputs):
            shares = r.numel() > 0 and r.untyped_storage().data_ptr() == t.untyped_storage().data_ptr()
            assert not shares, f"{name}: a residual is a view of an argument or output"


def _run(f, args, can, seed, cotangents, linear=False):
    """Outputs, gradients per leaf (None where not wanted) and cotangents; with ``linear`` backward runs twice,
    doubled."""
    leaves, spec = _flatten(args)
    inputs = [x.detach().requires_grad_() if want else x for x, want in zip(leaves, can, strict=True)]
    out = f(*pt.tree_unflatten(inputs, spec))
    outs = out if isinstance(out, tuple) else (out,)
    if cotangents is None:
        generator = torch.Generator().manual_seed(seed + 1)
        cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device) for o in outs]
    wanted = [x for x, want in zip(inputs, can, strict=True) if want]
    pairs = [(o, ct) for o, ct in zip(outs, cotangents, strict=True) if o.requires_grad]
    if not wanted or not pairs:
        return [o.detach() for o in outs], [None] * len(leaves), cotangents
    roots, cts = [o for o, _ in pairs], [_rounded(ct, args).to(o.dtype) for o, ct in pairs]
    got = torch.autograd.grad(roots, wanted, cts, retain_graph=linear, allow_unused=True)
    if linear:
        twice = torch.autograd.grad(roots, wanted, [2 * ct for ct in cts], allow_unused=True)
        for a, b in zip(got, twice, strict=True):
            assert (a is None and b is None) or _twice(a, b), "backward is not linear in the cotangent"
    each = iter(got)
    return [o.detach() for o in outs], [next(each) if want else None for want in can], cotangents


def _twice(a: Tensor, b: Tensor) -> bool:
    """b == 2a: to the bit, but for fp16, where small numbers inside a kernel lose bits on their way to zero."""
    if a.dtype == torch.float16 and a.numel():
        return torch.allclose(2 * a.double(), b.double(), rtol=2**-9, atol=2**-9 * float(b.double().abs().max()))
    return _bytes(2 * a) == _bytes(b)


def _rounded(ct: Tensor, args: Any) -> Tensor:
    """A cotangent that every dtype in play holds exactly: eight bits are left of it."""
    return ct.to(torch.bfloat16).to(torch.float64)


def _to_double(leaf: Any) -> Any:
    if isinstance(leaf, NF4):
        return backend.reference("nf4.dequantize")(leaf).double()
    return leaf.double() if leaf.is_floating_point() else leaf


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _is_nf4(node: Any) -> bool:
    return isinstance(node, NF4)


def _flatten(args: Any):
    return pt.tree_flatten(args, is_leaf=_is_nf4)


def _items(args: Any) -> list[tuple[str, Any]]:
    found = pt.tree_flatten_with_path(args, is_leaf=_is_nf4)[0]
    return [(".".join(str(getattr(k, "name", getattr(k, "idx", None))) for k in keys), leaf) for keys, leaf in found]


def _map(fn, args: Any) -> Any:
    return pt.tree_map(fn, args, is_leaf=_is_nf4)


def _unflatten_needs(args: Any, can: list[bool]) -> Any:
    leaves, spec = _flatten(args)
    values = [
        tree.map(lambda _: False, leaf) if _is_nf4(leaf) else want for leaf, want in zip(leaves, can, strict=True)
    ]
    return pt.tree_unflatten(values, spec)


def _bytes(t: Tensor) -> bytes:
    return t.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).numpy().tobytes()


__all__ = [
    "ABSENT",
    "DEVICE",
    "DTYPES",
    "STRANGE_STRIDES",
    "assert_both_refuse",
    "assert_op_rule",
    "assert_same_up_to_order",
    "check_op",
    "rand",
    "strided",
]
