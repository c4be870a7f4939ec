"""NF4: bit-exact in both directions, judged by an oracle that searches the nearest entry in float64."""

import dataclasses
import importlib.util
import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from oprule import ABSENT, DEVICE, DTYPES, rand

from unsloth_core import backend, tree
from unsloth_core.cost import Cost
from unsloth_core.ops import nf4
from unsloth_core.ops.dynamic_map import dynamic_map
from unsloth_core.reference import nf4 as reference
from unsloth_core.weights import NF4, Nested

SHAPES = st.tuples(st.sampled_from([1, 2, 3, 7, 16, 67]), st.sampled_from([1, 3, 8, 61, 64, 130]))


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), nested=st.booleans(), block=st.sampled_from([32, 64, 128]))
@example(shape=(7, 61), dtype=torch.bfloat16, nested=True, block=64)  # odd length, ragged last block
@example(shape=(131, 256), dtype=torch.float16, nested=True, block=64)  # 524 blocks: ragged nested blocks
@example(shape=(16, 256), dtype=torch.bfloat16, nested=True, block=64)  # whole programs, no mask
@example(shape=(0, 64), dtype=torch.float32, nested=False, block=64)
def test_decoding_is_exact(shape, dtype, nested, block):
    """Any codes, any statistics: kernel, reference and the formula in float64 with its roundings agree bit for bit."""
    n = math.prod(shape)
    blocks = -(-n // block)
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(0, 256, ((n + 1) // 2,), generator=generator, dtype=torch.uint8).to(DEVICE)
    absmax, state = rand((blocks,), seed=1).abs() * 0.05, ABSENT
    if nested:
        absmax = torch.randint(0, 256, (blocks,), generator=generator, dtype=torch.uint8).to(DEVICE)
        scales = rand((-(-blocks // 256),), seed=2).abs() * 0.03
        state = Nested(absmax_P=scales, code_256=dynamic_map(DEVICE), offset=rand((), seed=3).abs() * 0.05)
    w = NF4(codes=codes, absmax=absmax, nested=state, shape=shape, dtype=dtype, block=block)
    with backend.using("triton"):
        ours = nf4.dequantize(w)
    want = decode(w)
    assert ours.dtype == dtype and ours.shape == shape
    assert torch.equal(ours, want) and torch.equal(reference.dequantize(w), want)


def decode(w: NF4) -> torch.Tensor:
    """Element by element in float64; a product of two fp32 numbers is exact there, so ``.float()`` rounds it once."""
    table = torch.tensor(nf4.TABLE, dtype=torch.float32, device=DEVICE).double()
    i = torch.arange(math.prod(w.shape), device=DEVICE)
    code = torch.where(i % 2 == 0, w.codes[i // 2] // 16, w.codes[i // 2] % 16).long()
    scale = w.absmax
    if w.nested is not ABSENT:
        q = torch.arange(scale.numel(), device=DEVICE) // 256
        product = (w.nested.code_256.double()[scale.long()] * w.nested.absmax_P.double()[q]).float()
        scale = (product.double() + w.nested.offset.double()).float()
    return (table[code] * scale.double()[i // w.block]).float().to(w.dtype).view(w.shape)


def nearest(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """Index of the nearest entry, the lower one of two at equal distance."""
    return (x.double()[:, None] - code.double()[None, :]).abs().argmin(1)


@given(shape=SHAPES, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), block=st.sampled_from([64, 128]))
@example(shape=(7, 61), dtype=torch.float32, seed=0, block=64)
@example(shape=(0, 3), dtype=torch.float32, seed=0, block=64)
def test_codes_are_the_nearest(shape, dtype, seed, block):
    t = rand(shape, dtype, seed=seed, scale=0.02)
    w = nf4.quantize(t, double_quant=False, block=block)
    flat = t.reshape(-1).float()
    i = torch.arange(flat.numel(), device=DEVICE)
    absmax = torch.stack([b.abs().max() for b in flat.split(block)]) if flat.numel() else flat
    assert torch.equal(w.absmax, absmax) and (w.shape, w.dtype, w.block) == (shape, dtype, block)
    got = torch.stack([w.codes >> 4, w.codes & 15], 1).view(-1)[: flat.numel()].long()
    assert torch.equal(got, nearest(flat * (1.0 / absmax)[i // block], torch.tensor(nf4.TABLE, device=DEVICE)))
    # No entry is further from its neighbour's midpoint than half the widest gap, 0.152, of absmax (and one rounding).
    error = (nf4.dequantize(w).double() - t.double()).abs().view(-1)
    assert (error <= (0.152 + 2.0**-8) * absmax.double()[i // block]).all()


@pytest.mark.parametrize("blocks", [1, 100, 512, 700])
def test_double_quantisation(blocks):
    """absmax minus its mean, to the nearest of 256 points in blocks of 256."""
    t = rand((blocks, 64), seed=blocks, scale=0.02)
    single, double = nf4.quantize(t, double_quant=False), nf4.quantize(t)
    centred = single.absmax - single.absmax.mean()
    scales = torch.stack([b.abs().max() for b in centred.split(256)])
    assert torch.equal(double.codes, single.codes) and torch.equal(double.nested.offset, single.absmax.mean())
    assert torch.equal(double.nested.absmax_P, scales)
    scaled = centred * (1.0 / scales.clamp(min=1e-38)).repeat_interleave(256)[:blocks]
    assert torch.equal(double.absmax.long(), nearest(scaled, double.nested.code_256))


def test_values_checked_by_hand():
    t = torch.zeros(1, 64, device=DEVICE)
    t[0, :6] = torch.tensor([-2.0, 2.0, 0.0, 1.0, -0.1, 0.07958029955625534])
    w = nf4.quantize(t, double_quant=False)
    # over absmax 2: -1, 1, 0, 0.5 (midpoint of entries 12 and 13: 0.5017), -0.05 (midpoint -0.0455), 0.0398 (0.0398)
    assert w.codes[:3].tolist() == [0x0F, 0x7C, 0x67] and w.absmax.tolist() == [2.0]
    # A midpoint takes the lower entry: the last value above is half of entry 8, exactly between entries 7 and 8.
    assert nf4.dequantize(w)[0, :6].tolist() == pytest.approx([-2.0, 2.0, 0.0, 0.8814197, -0.1821001, 0.0])
    assert w.codes[3:].unique().tolist() == [0x77]


@given(
    shape=SHAPES,
    dtype=st.sampled_from(DTYPES),
    block=st.sampled_from(nf4.BLOCKS),
    nested=st.booleans(),
    odd=st.sampled_from([0.0, float("nan"), float("inf"), -float("inf"), 1e-42]),
)
@example(shape=(67, 256), dtype=torch.bfloat16, block=32, nested=True, odd=0.0)  # 536 blocks: ragged nested blocks
@example(shape=(3, 4099), dtype=torch.float16, block=4096, nested=True, odd=1e-42)
@example(shape=(0, 64), dtype=torch.float32, block=64, nested=False, odd=0.0)
def test_kernels_and_reference_quantise_to_the_same_bits(shape, dtype, block, nested, odd):
    """Also where the last block is ragged, a block is all zeros or tiny, or holds a number that is none."""
    t = rand(shape, dtype, seed=block, scale=0.02)
    t.view(-1)[:block] *= 0 if odd in (0.0, 1e-42) else 1
    t.view(-1)[: max(1, block // 3)] += odd
    found = []
    for name in backend.NAMES:
        with backend.using(name):
            found.append(nf4.quantize(t, double_quant=nested, block=block))
    ours, theirs = found
    for a, b in zip(tree.leaves(ours), tree.leaves(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


# What bitsandbytes 0.50 makes of BY_BITSANDBYTES in blocks of 64, the last one ragged.
BY_BITSANDBYTES = rand((5, 30), torch.bfloat16, seed=3, scale=0.02)
CODES = (
    "68b514bc83e5ad6a5c05268b8ac64268755153407992ab325633c3cdb9d9dd7b5c8e2499567f"
    "3777d6212759567628a4969849322b59988b812c778c48756355ba6266551abae61390db18"
)
ABSMAX, OFFSET, NESTED = [0.04443359375, 0.0625, 0.03857421875], 0.0485026054084301, 0.0139973945915699


@pytest.mark.parametrize("name", backend.NAMES)
def test_bitsandbytes(name):
    """Its codes and statistics, as it gave them once, and as it gives them where it is installed."""
    with backend.using(name):
        w, single = nf4.quantize(BY_BITSANDBYTES), nf4.quantize(BY_BITSANDBYTES, double_quant=False)
    assert bytes(w.codes.tolist()).hex() == CODES and single.absmax.tolist() == ABSMAX
    assert w.nested.offset.item() == pytest.approx(OFFSET, rel=2**-23)  # the order of a sum differs between devices
    assert w.nested.absmax_P.tolist() == pytest.approx([NESTED], rel=2**-20)
    if importlib.util.find_spec("bitsandbytes"):
        bitsandbytes = importlib.import_module("bitsandbytes.functional")
        for shape, block in itertools.product([(5, 128), (64, 1024)], nf4.BLOCKS[:4]):
            t = rand(shape, torch.bfloat16, seed=block, scale=0.02).cpu()
            codes, state = bitsandbytes.quantize_4bit(t, blocksize=block, compress_statistics=True, quant_type="nf4")
            with backend.using(name if DEVICE.type == "cpu" else "reference"):
                w = nf4.quantize(t, block=block)
            assert torch.equal(w.codes, codes.view(-1)) and torch.equal(w.nested.offset, state.offset)
            assert torch.equal(w.nested.absmax_P, state.state2.absmax)
            # Its CPU library takes a neighbour within 1e-5 of a midpoint; its other backends take the nearest.
            assert (w.absmax.int() - state.absmax.int()).abs().max() <= 1


def test_zeros_encode_zeros():
    w = nf4.quantize(torch.zeros(2, 64, device=DEVICE))
    assert w.codes.unique().tolist() == [0x77] and torch.equal(nf4.dequantize(w), torch.zeros(2, 64, device=DEVICE))


def test_dynamic_map():
    points = dynamic_map()
    assert points.shape == (256,) and (points.diff() > 0).all()
    assert points[127] == 0 and points[255] == 1 and points[0] == pytest.approx(-0.99296874)
    assert torch.equal(points[:127], -points[128:255].flip(0))
    assert points[128:130].tolist() == pytest.approx([5.5e-7, 3.25e-6])  # 0.55 * 1e-6, then 0.325 * 1e-5


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_into_rows_of_a_buffer(name):
    w = nf4.quantize(rand((5, 24), torch.bfloat16, seed=1))
    buffer = torch.full((9, 24), 3.0, dtype=torch.bfloat16, device=DEVICE)
    with backend.using(name):
        nf4.dequantize(w, out=buffer[3:8])
        assert torch.equal(buffer[3:8], nf4.dequantize(w))
    assert (buffer[:3] == 3).all() and (buffer[8:] == 3).all()


def test_codes_that_are_not_aligned_words():
    w = nf4.quantize(rand((3, 64), seed=1))
    shifted = torch.cat([w.codes[:1], w.codes])[1:]
    moved = NF4(codes=shifted, absmax=w.absmax, nested=w.nested, shape=w.shape, dtype=w.dtype)
    with backend.using("triton"):
        assert shifted.data_ptr() % 4 and torch.equal(nf4.dequantize(moved), nf4.dequantize(w))


def test_repeats_bitwise():
    w = nf4.quantize(rand((64, 512), torch.bfloat16, seed=1))
    with backend.using("triton"):
        first = nf4.dequantize(w)
        assert all(torch.equal(nf4.dequantize(w), first) for _ in range(20 if DEVICE.type == "cuda" else 2))


W = nf4.quantize(rand((4, 64), seed=1))


def broken(**fields) -> NF4:
    return dataclasses.replace(W, **fields)


FOR = " for shape (4, 64) in blocks of 64"
BAD = {
    "block = 48, expected one of (32, 64, 128, 256, 512, 1024, 2048, 4096)": broken(block=48),
    f"absmax is on meta, expected codes's device {W.codes.device}": broken(absmax=W.absmax.to("meta")),
    "codes is torch.uint8 (127,), expected contiguous torch.uint8 with 128 elements" + FOR: broken(codes=W.codes[:127]),
    "codes is torch.int8 (128,), expected contiguous torch.uint8 with 128 elements" + FOR: broken(
        codes=W.codes.view(torch.int8)
    ),
    "absmax is torch.uint8 (4,), expected contiguous torch.float32 with 4 elements" + FOR: broken(nested=ABSENT),
    "absmax is torch.uint8 (3,), expected contiguous torch.uint8 with 4 elements" + FOR: broken(absmax=W.absmax[:3]),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_broken_weights(message, name):
    with backend.using(name), pytest.raises(ValueError) as error:
        nf4.dequantize(BAD[message])
    assert str(error.value) == f"dequantize: {message}"


def test_bad_input():
    cases = {
        "quantize: t has shape (64,), expected (M, C)": lambda: nf4.quantize(rand((64,), seed=1)),
        "quantize: t has dtype torch.float64, expected float16, bfloat16 or float32": lambda: nf4.quantize(
            rand((1, 64), torch.float64, seed=1)
        ),
        f"quantize: block = 48, expected one of {nf4.BLOCKS}": lambda: nf4.quantize(rand((1, 64), seed=1), block=48),
        "dequantize: out is torch.float32 (4, 64), strides (1, 4); expected contiguous torch.float32 (4, 64)": lambda: (
            nf4.dequantize(W, out=torch.empty(64, 4, device=DEVICE).T)
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError) as error:
            call()
        assert str(error.value) == message


def test_cost():
    assert nf4.cost(W) == Cost(bytes=128 + 4 + 4 + 4 * 256, flops=256)
    assert nf4.cost(broken(nested=ABSENT)) == Cost(bytes=128 + 16 + 4 * 256, flops=256)
