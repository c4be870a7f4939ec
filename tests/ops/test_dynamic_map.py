"""The 8-bit maps and the nearest entry, at every midpoint: the index is monotone, so what holds there holds between."""

import pytest
import torch
import triton
import triton.language as tl
from oprule import DEVICE

from unsloth_core import device
from unsloth_core.ops.dynamic_map import dynamic_map, nearest, tables


@triton.jit
def _nearest_kernel(x, midpoints, out, count, SIGNED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, nearest(tl.load(x + i, mask=i < count, other=0.0), midpoints, SIGNED), mask=i < count)


@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_nearest_is_the_nearest(signed, fusion):
    points, midpoints = tables(DEVICE, signed)
    neighbours = [midpoints]
    for towards in (-2.0, 2.0):
        x = midpoints
        for _ in range(2):
            x = torch.nextafter(x, torch.full_like(x, towards))
            neighbours.append(x)
    odd = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0000001, 1e-38, 1e-45, -1e-45, float("nan")], device=DEVICE)
    x = torch.cat([*neighbours, points, odd])
    x = x if signed else x.abs()
    out = torch.empty_like(x, dtype=torch.int32)
    grid = (device.cdiv(x.numel(), 512),)
    device.launch(
        _nearest_kernel, grid, x, midpoints, out, x.numel(), SIGNED=signed, BLOCK=512, enable_fp_fusion=fusion
    )
    assert torch.equal(out, torch.bucketize(x, midpoints, out_int32=True))
    assert torch.equal(points[out[-points.numel() - 9 : -9].long()], points)


def test_the_unsigned_map():
    points = dynamic_map(signed=False)
    assert points.shape == (256,) and (points.diff() > 0).all()
    assert points[0] == 0 and points[255] == 1
    assert points[1:3].tolist() == pytest.approx([3.25e-7, 7.75e-7])  # 0.325 and 0.775 of the lowest decade
    assert points[254] == pytest.approx(1 - 0.45 / 128)
