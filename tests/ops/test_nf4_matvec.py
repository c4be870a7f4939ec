"""A few tokens times an NF4 matrix: the op rule, every path and configuration, and what linear makes of it."""

import importlib
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from oprule import ABSENT, DEVICE, DTYPES, assert_both_refuse, assert_op_rule, rand, strided

from unsloth_core import backend, ops
from unsloth_core.cost import Cost
from unsloth_core.ops import nf4
from unsloth_core.ops import nf4_matvec as file
from unsloth_core.ops.nf4_matvec import Config, nf4_matvec
from unsloth_core.weights import NF4, Adapted, LoRA, Stacked

linear_file = importlib.import_module("unsloth_core.ops.linear")  # the package's attribute is the op


def weight(m: int, c: int, dtype: torch.dtype = torch.bfloat16, *, nested: bool = True, block: int = 64) -> NF4:
    return nf4.quantize(rand((m, c), dtype, seed=m, scale=c**-0.5), double_quant=nested, block=block)


def assert_right(y: torch.Tensor, x: torch.Tensor, w: NF4, bias=ABSENT, add=ABSENT) -> None:
    """The op rule against float64 and what PyTorch's user writes in x's dtype."""
    dense = nf4.dequantize(w)
    t64, same = x.double() @ dense.double().T, x @ dense.to(x.dtype).T
    for addend in (bias, add):
        if addend is not ABSENT:
            t64, same = t64 + addend.double(), same + addend
    assert_op_rule(y, same.to(y.dtype), t64, "nf4_matvec")


@given(
    n=st.integers(1, 8),
    m=st.sampled_from([1, 2, 5, 7]),
    c=st.sampled_from([32, 96, 160]),
    dtype=st.sampled_from(DTYPES),
    nested=st.booleans(),
    block=st.sampled_from([32, 64, 256]),
    more=st.booleans(),
)
@example(n=1, m=4, c=256, dtype=torch.bfloat16, nested=True, block=64, more=False)  # whole programs, no mask
@example(n=8, m=5, c=160, dtype=torch.float32, nested=True, block=64, more=True)  # blocks that begin within a row
def test_products(n, m, c, dtype, nested, block, more):
    w = weight(m, c, dtype, nested=nested, block=block)
    x = strided(rand((n, c), dtype, seed=1))
    bias = rand((2 * m,), dtype, seed=2)[::2] if more else ABSENT
    add = rand((m, n), dtype, seed=3).T if more else ABSENT
    with backend.using("triton"):
        y = nf4_matvec(x, w, bias, add)
        assert torch.equal(nf4_matvec(x, w, bias, add), y)
    assert_right(y, x, w, bias, add)
    with backend.using("reference"):
        assert_right(nf4_matvec(x, w, bias, add), x, w, bias, add)


def test_fp32_weights_under_16_bit_tokens():
    w, x = weight(5, 96, torch.float32), rand((2, 96), torch.bfloat16, seed=1)
    with backend.using("triton"):
        assert_right(nf4_matvec(x, w), x, w)


CONFIGS = [Config(*c) for c in itertools.product((1, 2, 4, 8), (1, 2, 4), (4, 8), (1, 3)) if c[0] * c[2] <= 32]


@pytest.mark.parametrize(
    "config", CONFIGS if DEVICE.type == "cuda" else [Config(4, 2, 2, 3), Config(1, 1, 8, 1)], ids=str
)
def test_every_launch_configuration(config):
    """Whatever configuration() returns and the parts that it never would; masked, and in whole programs."""
    for (m, c), n, dtype in itertools.product(((7, 288), (8, 512 * config.warps * config.chunks)), (1, 2), DTYPES[:2]):
        w, x = weight(m, c, dtype), rand((n, c), dtype, seed=1)
        bias, add = rand((m,), dtype, seed=2), rand((n, m), dtype, seed=3)
        with backend.using("triton"):
            assert_right(nf4_matvec(x, w, bias, add, config=config), x, w, bias, add)


@pytest.mark.parametrize("n", [1, 3, 4, 5, 8] if DEVICE.type == "cuda" else [3])
@pytest.mark.parametrize("m, c", [(4096, 4096), (1024, 2080), (96, 8192)] if DEVICE.type == "cuda" else [(4, 224)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_of_models(n, m, c, dtype):
    w, x = weight(m, c, dtype), rand((n, c), dtype, seed=1)
    with backend.using("triton"):
        assert_right(nf4_matvec(x, w), x, w)


def test_configurations_fill_the_device_and_keep_x_in_registers():
    where = DEVICE
    for n, m, c, dtype in itertools.product((1, 2, 5, 8), (1, 128, 4096, 14336), (32, 2048, 14336), DTYPES):
        config = file.configuration(n, m, c, dtype, where)
        assert config.splits == 1 or config._replace(splits=1) in CONFIGS or DEVICE.type != "cuda"
        assert 1 <= config.splits <= -(-c // (256 * config.warps * config.chunks))
        assert config.rows * n <= 16


def test_into_columns_of_a_matrix():
    w, x = weight(5, 64), rand((2, 64), torch.bfloat16, seed=1)
    for name, dtype in itertools.product(backend.NAMES, (torch.bfloat16, torch.float32)):
        y = torch.full((2, 9), 3.0, dtype=dtype, device=DEVICE)
        with backend.using(name):
            assert nf4_matvec(x, w, out=y[:, 2:7]).data_ptr() == y[:, 2:7].data_ptr()
            assert torch.equal(y[:, 2:7].bfloat16(), nf4_matvec(x, w))
        assert (y[:, :2] == 3).all() and (y[:, 7:] == 3).all()


def adapters(rows: tuple[int, ...], c: int) -> tuple[LoRA, ...]:
    return tuple(
        LoRA(a=rand((2, c), seed=i, scale=c**-0.5), b=rand((m, 2), seed=9 + i), scale=0.7) for i, m in enumerate(rows)
    )


@pytest.mark.parametrize("kind", ["nf4", "stacked", "adapted", "adapted stack"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_multiplies_few_tokens_without_decoding(kind, dtype, monkeypatch):
    """Every weight node over NF4, with everything that linear adds; many tokens and gradients still decode."""
    rows, c = (4, 3), 96
    stack = Stacked(parts=tuple(weight(m, c, dtype) for m in rows))
    base = weight(7, c, dtype) if "stack" not in kind else stack
    w = Adapted(base=base, parts=adapters(rows, c), rows=rows) if "adapted" in kind else base
    x, bias, add = (rand(s, dtype, seed=i) for i, s in enumerate(((1, 3, c), (7,), (1, 3, 7))))
    with backend.using("triton"):
        decoded = ops.linear(x.clone().requires_grad_(), w, bias, add).detach()
        reference = backend.reference("linear")(x, w, bias, add)
        with monkeypatch.context() as patch:
            patch.setattr(linear_file, "dense", lambda *_, **__: pytest.fail("decoded"))
            y = ops.linear(x, w, bias, add)
    assert y.shape == (1, 3, 7) and y.dtype == dtype
    ulps = 8 if dtype == torch.float32 else 2  # fp32: another order of sums; 16 bit: weights not rounded, rounded once
    for other in (decoded, reference):
        atol = ulps * torch.finfo(dtype).eps * float(reference.abs().max())
        torch.testing.assert_close(y, other, rtol=0, atol=atol)


def test_linear_decodes_what_this_cannot_take():
    odd, mixed = weight(4, 48), Stacked(parts=(weight(4, 64), rand((2, 64), torch.bfloat16, seed=1)))
    for w, x in ((odd, rand((2, 48), torch.bfloat16, seed=2)), (mixed, rand((2, 64), torch.bfloat16, seed=2))):
        with backend.using("triton"):
            y = ops.linear(x, w)
        torch.testing.assert_close(y, backend.reference("linear")(x, w), rtol=2**-7, atol=2**-7)


X, W = rand((2, 64), seed=1), weight(4, 64, torch.float32)
TAKES = "expected 1 to 8 rows of whole groups of 32, contiguous, aligned to two elements, codes to 4 bytes, and w to"
BAD = {
    "nf4_matvec: x has shape (2, 32), expected (N, 64)": (X[:, :32], W),
    "nf4_matvec: x has dtype torch.float64, expected float16, bfloat16 or float32": (X.double(), W),
    f"nf4_matvec: x is torch.float32 (0, 64), strides (64, 1), and w decodes to torch.float32; {TAKES}": (X[:0], W),
    f"nf4_matvec: x is torch.float32 (9, 64), strides (64, 1), and w decodes to torch.float32; {TAKES}": (
        rand((9, 64), seed=1),
        W,
    ),
    f"nf4_matvec: x is torch.float32 (2, 64), strides (65, 1), and w decodes to torch.float32; {TAKES}": (
        rand((2, 65), seed=1)[:, :64],
        W,
    ),
    f"nf4_matvec: x is torch.float32 (2, 64), strides (1, 2), and w decodes to torch.float32; {TAKES}": (
        rand((64, 2), seed=1).T,
        W,
    ),
    f"nf4_matvec: x is torch.float32 (2, 64), strides (64, 1), and w decodes to torch.float16; {TAKES}": (
        X,
        weight(4, 64, torch.float16),
    ),
    "nf4_matvec: bias has shape (1,), expected (4,)": (X, W, X[0, :1]),
    "nf4_matvec: add has shape (1, 4), expected (2, 4)": (X, W, ABSENT, X[:1, :4]),
    f"nf4_matvec: add is on meta, expected x's device {X.device}": (X, W, ABSENT, X[:, :4].to("meta")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    assert_both_refuse(nf4_matvec, *BAD[message])
    with pytest.raises(ValueError) as error:
        nf4_matvec(*BAD[message])
    assert str(error.value).startswith(message)


def test_what_else_is_refused():
    with pytest.raises(ValueError, match=r"nf4_matvec: out has strides \(1, 2\), expected contiguous rows"):
        nf4_matvec(X, W, out=torch.empty(4, 2, device=DEVICE).T)
    with pytest.raises(NotImplementedError, match="nf4_matvec: has no gradient; use linear"):
        nf4_matvec(X.clone().requires_grad_(), W)


def test_cost():
    assert file.cost(2, weight(4, 64)) == Cost(bytes=128 + 4 + 4 + 4 * 256 + 4 + 2 * 68 * 2, flops=2 * 2 * 4 * 64)
