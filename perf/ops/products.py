"""Products: dense, with adapters, and by NF4 weights; and NF4 by itself."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unsloth_core import backend
from unsloth_core import ops as uc
from unsloth_core.cost import Cost
from unsloth_core.ops import nf4, nf4_matvec
from unsloth_core.weights import Adapted, LoRA

from .case import RANK, Case, Random, angles, cost_of


def cases() -> Iterator[Case]:
    """Those of this file."""
    linear = cost_of("linear")
    shapes, small, tiny = ((8192, 4096, 4096), (8192, 14336, 4096)), (2048, 4096, 4096), (8, 16, 64)  # tokens, M, C
    yield Case(
        op="linear",  # a weight that is trained: backward is two products
        shapes=shapes,
        small=small,
        tiny=tiny,
        make=lambda r, N, M, C: (r.normal(N, C), r.matrix(M, C)),
        wanted=lambda x, w: [x, w],
        ours=uc.linear,
        peers={"torch": backend.reference("linear")},
        costs=lambda args, N, M, C: {"fwd": linear(N, args[1]), "bwd": linear(N, args[1]) + linear(N, args[1])},
    )

    def lora_costs(args: Any, N: int, M: int, C: int) -> dict[str, Cost]:
        forward = linear(N, args[1])  # dx costs the same; then x is read again, and dA and dB are two thin products
        ranks = RANK * len(args[1].parts)
        return {"fwd": forward, "bwd": forward + Cost(bytes=2 * N * C, flops=2 * N * (ranks * C + RANK * M))}

    def adapted(r: Random, rows: tuple[int, ...], C: int) -> Adapted:
        return Adapted(base=r.matrix(sum(rows), C), parts=tuple(_lora(r, m, C) for m in rows), rows=rows)

    yield Case(
        op="linear_lora",  # the base is frozen
        shapes=shapes,
        small=small,
        tiny=tiny,
        make=lambda r, N, M, C: (r.normal(N, C), adapted(r, (M,), C)),
        wanted=lambda x, w: [x, *(leaf for part in w.parts for leaf in (part.a, part.b))],
        ours=uc.linear,
        peers={"torch": backend.reference("linear")},
        costs=lora_costs,
    )
    yield Case(
        op="linear_lora_qkv",  # three adapters that share an input, on a stack of four, one and one parts in six
        shapes=((8192, 6144, 4096), (2048, 6144, 4096)),
        small=(512, 6144, 4096),
        tiny=(8, 24, 64),
        make=lambda r, N, M, C: (r.normal(N, C), adapted(r, (M * 4 // 6, M // 6, M // 6), C)),
        wanted=lambda x, w: [x, *(leaf for part in w.parts for leaf in (part.a, part.b))],
        ours=uc.linear,
        peers={"torch": backend.reference("linear")},
        costs=lora_costs,
    )
    yield Case(
        op="linear_rope",  # tokens, query heads, key heads, head size, C
        shapes=((4096, 32, 8, 128, 4096),),
        small=(512, 32, 8, 128, 4096),
        tiny=(8, 4, 1, 8, 64),
        make=lambda r, N, H, G, K, C: (r.normal(N, C), r.matrix((H + 2 * G) * K, C), *angles(r, N, K // 2)),
        wanted=lambda x, w, *_: [x],
        ours=_in_heads(uc.linear_rope),
        peers={"torch": _in_heads(backend.reference("linear_rope")), "linear, rope": _linear_then_rope},
        costs=lambda args, N, H, G, K, C: {
            "fwd": cost_of("linear_rope")(N, args[1], H, G, K // 2),
            "bwd": linear(N, args[1]) + Cost(bytes=4 * N * (H + 2 * G) * K, flops=0),
        },
    )
    yield Case(
        op="glu_linear",  # tokens, M, F
        shapes=((4096, 4096, 14336),),
        small=(512, 4096, 14336),
        tiny=(8, 16, 64),
        make=lambda r, N, M, F: (r.normal(N, 2 * F), r.matrix(M, F)),
        wanted=lambda x, w: [x],
        ours=uc.glu_linear,
        peers={
            "torch": backend.reference("glu_linear"),
            "glu, linear": lambda x, w: uc.linear(uc.glu(x), w),
        },
        costs=lambda args, N, M, F: {
            "fwd": cost_of("glu_linear")(N, args[1], F),
            "bwd": linear(N, args[1]) + cost_of("glu")(N, F, 2, backward=True),
        },
    )
    yield Case(
        op="linear_nf4",  # frozen: backward is dx
        shapes=shapes,
        small=small,
        tiny=tiny,
        make=lambda r, N, M, C: (r.normal(N, C), nf4.quantize(r.matrix(M, C))),
        wanted=lambda x, w: [x],
        ours=uc.linear,
        peers={"torch": backend.reference("linear")},
        costs=lambda args, N, M, C: {d: linear(N, args[1]) for d in ("fwd", "bwd")},
    )
    yield Case(
        op="linear_lora_nf4",  # QLoRA: adapters on a base in NF4
        shapes=shapes,
        small=small,
        tiny=tiny,
        make=lambda r, N, M, C: (
            r.normal(N, C),
            Adapted(base=nf4.quantize(r.matrix(M, C)), parts=(_lora(r, M, C),), rows=(M,)),
        ),
        wanted=lambda x, w: [x, *(leaf for part in w.parts for leaf in (part.a, part.b))],
        ours=uc.linear,
        peers={"torch": backend.reference("linear")},
        costs=lora_costs,
        compiles=False,
    )
    yield Case(
        op="nf4_dequantize",  # M, C
        shapes=((14336, 4096), (4096, 4096)),
        small=(256, 4096),
        tiny=(4, 64),
        make=lambda r, M, C: (nf4.quantize(r.matrix(M, C)),),
        ours=nf4.dequantize,
        peers={"torch": backend.reference("nf4.dequantize")},
        costs=lambda args, M, C: {"fwd": nf4.cost(args[0])},
    )
    yield Case(
        op="nf4_quantize",  # M, C
        shapes=((14336, 4096), (4096, 4096)),
        small=(256, 4096),
        tiny=(4, 64),
        make=lambda r, M, C: (r.matrix(M, C),),
        ours=nf4.quantize,
        peers={"torch": lambda t: backend.reference("nf4.quantize")(t, double_quant=True, block=64)},
        costs=lambda args, M, C: {"fwd": nf4.cost(nf4.quantize(args[0]))},  # reads what decoding writes
        compiles=False,
    )
    yield Case(
        op="nf4_matvec",  # tokens, M, C
        shapes=((1, 14336, 4096), (1, 4096, 4096), (8, 14336, 4096)),
        small=(1, 2560, 4096),
        tiny=(2, 8, 64),
        make=lambda r, N, M, C: (r.normal(N, C), nf4.quantize(r.matrix(M, C))),
        ours=nf4_matvec.nf4_matvec,
        peers={
            "torch": backend.reference("nf4_matvec"),
            "decoded": lambda x, w: F.linear(x, nf4.dequantize(w).to(x.dtype)),  # the same by two of the other kernels
        },
        costs=lambda args, N, M, C: {"fwd": nf4_matvec.cost(N, args[1])},
        replay=True,
    )


def _lora(random: Random, M: int, C: int) -> LoRA:
    a = random.normal(RANK, C, scale=C**-0.5, dtype=torch.float32)
    return LoRA(a=a, b=random.normal(M, RANK, scale=0.1, dtype=torch.float32), scale=1.0)


def _in_heads(linear_rope: Callable[..., Any]) -> Callable[..., Any]:
    """linear_rope with four query heads to a key head, each with twice as many channels as there are angles."""

    def call(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        groups = w.shape[0] // (12 * cos.shape[1])
        return linear_rope(x, w, cos, sin, heads=4 * groups, kv_heads=groups)

    return call


def _linear_then_rope(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """linear_rope as three calls."""
    groups = w.shape[0] // (12 * cos.shape[1])
    q, k, v = uc.linear(x, w).unflatten(1, (6 * groups, -1)).split([4 * groups, groups, groups], dim=1)
    return *uc.rope(q, k, cos, sin), v
