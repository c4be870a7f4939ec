"""Which dtypes the reference takes: those of the kernels, and float64, in which it judges them.

PyTorch promotes and rounds where a kernel would be refused. What runs on a CPU is to run on a GPU too, so here the
same is refused, in the kernels' words.
"""

from typing import Any

import torch
from torch import Tensor

from ..segments import Segments
from ..tree import ABSENT

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_floats(op: str, **named: Any) -> None:
    """Raises ValueError for one that is not floating-point of 16 bits or more."""
    for name, t in named.items():
        if t is not ABSENT and t.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} has dtype {t.dtype}, expected float16, bfloat16 or float32")


def check_angles(op: str, **named: Tensor) -> None:
    """Raises ValueError for tables of cosines and sines that were rounded to 16 bits."""
    for name, t in named.items():
        if t.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{op}: {name} has dtype {t.dtype}, expected float32")


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor, segments: dict[str, Segments], sinks: Any) -> None:
    """Raises ValueError unless shapes fit, queries, keys and values are of one kind, and bounds of segments are
    int32."""
    if q.ndim != 3:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}, expected (N, H, K)")
    if k.ndim != 3 or k.shape[2] != q.shape[2]:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, expected (M, G, {q.shape[2]})")
    if v.shape != k.shape:
        raise ValueError(f"{op}: v has shape {tuple(v.shape)}, expected that of k, {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: {q.shape[1]} query heads, expected a multiple of the {k.shape[1]} key heads")
    check_floats(op, q=q)
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise ValueError(f"{op}: {name} has dtype {t.dtype}, expected that of q, {q.dtype}")
    for name, some in segments.items():
        for end, t in (("starts_S", some.starts_S), ("ends_S", some.ends_S)):
            if t.dtype != torch.int32:
                got = f"dtype {t.dtype} and stride {t.stride()}"
                raise ValueError(f"{op}: {name}.{end} has {got}, expected torch.int32 and (1,)")
    check_floats(op, sinks=sinks)
