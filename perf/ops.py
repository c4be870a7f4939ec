"""What ``perf/run.py`` measures: for each op its shapes, arguments, peers and cost. The shapes are those of 8B models.

A peer computes the same from the same arguments. Every op has the peer "torch", its reference under eager autograd,
which is also the oracle; where PyTorch has a call of its own for the op, that is a peer under its own name."""

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.optim.adamw import adamw as torch_adamw

from perf.peers import Peer
from unsloth_core import backend, optim, random, tree
from unsloth_core import ops as uc
from unsloth_core.cost import Cost
from unsloth_core.ops import nf4, nf4_matvec
from unsloth_core.segments import Segments
from unsloth_core.weights import Adapted, LoRA

Shape = tuple[int, ...]
REFERENCE = "torch"  # a peer only in name: written to be exact and not to be fast; PyTorch's own calls have other names
RANK = 16


@dataclass(frozen=True)
class Random:
    """Numbers on one device, the same for a seed."""

    generator: torch.Generator

    @staticmethod
    def seeded(seed: int, device: torch.device) -> "Random":
        """A fresh sequence."""
        return Random(torch.Generator(device).manual_seed(seed))

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal numbers of standard deviation ``scale``."""
        where = self.generator.device
        return torch.randn(shape, generator=self.generator, device=where, dtype=dtype).mul_(scale)

    def ids(self, count: int, below: int) -> Tensor:
        """(count,) int64 in [0, below)."""
        return torch.randint(below, (count,), generator=self.generator, device=self.generator.device)

    def matrix(self, rows: int, cols: int) -> Tensor:
        """A weight that keeps the size of what it multiplies."""
        return self.normal(rows, cols, scale=cols**-0.5)


@dataclass(frozen=True)
class Case:
    """One op.

    ``make(random, *shape)`` gives the arguments that ``ours`` and every peer take; ``wanted(*args)`` the tensors that
    get a gradient; ``costs(args, *shape)`` the directions that are measured, with the least work of each. ``small``
    runs the kernels of the large shapes and is checked against the oracle; ``tiny`` is for ``--smoke``. ``replay``: it
    is timed inside a CUDA graph."""

    op: str
    shapes: tuple[Shape, ...]
    small: Shape
    tiny: Shape
    make: Callable[..., tuple[Any, ...]]
    ours: Callable[..., Any]
    peers: Mapping[str, Callable[..., Any]]
    costs: Callable[..., Mapping[str, Cost]]
    wanted: Callable[..., list[Tensor]] = lambda *args: []
    dtype: torch.dtype = torch.bfloat16
    compiles: bool = True
    replay: bool = False


def cases(device: torch.device) -> list[Case]:
    """Every op, in the order of a forward pass."""
    return [*_memory_bound(), *_losses(), *_products(), *_experts(), *_attention(device), _adamw(), _adamw("8bit")]


def _cost(op: str) -> Callable[..., Cost]:
    """``cost`` of an op file, which the package hides behind the op of the same name."""
    return importlib.import_module(f"unsloth_core.ops.{op}").cost


def _memory_bound() -> Iterator[Case]:
    norm, add_norm, rope, glu, embedding = map(_cost, ("rms_norm", "add_rms_norm", "rope", "glu", "embedding"))
    layer_norm, softmax, dropout, qk_norm = map(_cost, ("layer_norm", "softmax", "dropout", "qk_norm_rope"))
    gelu = _cost("gelu")
    yield Case(
        op="embedding",  # tokens, vocabulary, width
        shapes=((8192, 128256, 4096),),
        small=(256, 2048, 4096),
        tiny=(8, 16, 32),
        make=lambda r, N, V, D: (r.ids(N, V), r.normal(V, D)),
        wanted=lambda ids, w: [w],
        ours=uc.embedding,
        peers={"torch": backend.reference("embedding"), "F.embedding": F.embedding},
        costs=lambda args, N, V, D: {"fwd": embedding(N, V, D, 2), "bwd": embedding(N, V, D, 2, backward=True)},
    )
    yield Case(
        op="rms_norm",  # tokens, width
        shapes=((8192, 4096), (8192, 8192)),
        small=(256, 4096),
        tiny=(4, 32),
        make=lambda r, N, D: (r.normal(N, D), r.normal(D)),
        wanted=lambda x, w: [x, w],
        ours=uc.rms_norm,
        peers={
            "torch": backend.reference("rms_norm"),
            "F.rms_norm": lambda x, w: F.rms_norm(x, w.shape, w, eps=1e-6),
        },
        costs=lambda args, N, D: {"fwd": norm(N, D, 2), "bwd": norm(N, D, 2, backward=True)},
    )
    yield Case(
        op="add_rms_norm",  # tokens, width
        shapes=((8192, 4096), (8192, 8192)),
        small=(256, 4096),
        tiny=(4, 32),
        make=lambda r, N, D: (r.normal(N, D), r.normal(N, D), r.normal(D)),
        wanted=lambda x, res, w: [x, res, w],
        ours=uc.add_rms_norm,
        peers={"torch": backend.reference("add_rms_norm")},
        costs=lambda args, N, D: {"fwd": add_norm(N, D, 2), "bwd": add_norm(N, D, 2, backward=True)},
    )
    yield Case(
        op="layer_norm",  # tokens, width
        shapes=((8192, 4096), (8192, 8192)),
        small=(256, 4096),
        tiny=(4, 32),
        make=lambda r, N, D: (r.normal(N, D), r.normal(D), r.normal(D)),
        wanted=lambda x, w, b: [x, w, b],
        ours=uc.layer_norm,
        peers={
            "torch": backend.reference("layer_norm"),
            "F.layer_norm": lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        },
        costs=lambda args, N, D: {"fwd": layer_norm(N, D, 2), "bwd": layer_norm(N, D, 2, backward=True)},
    )
    yield Case(
        op="rope",  # tokens, query heads, key heads, head size
        shapes=((8192, 32, 8, 128),),
        small=(256, 32, 8, 128),
        tiny=(4, 2, 1, 8),
        make=lambda r, N, H, G, K: (r.normal(N, H, K), r.normal(N, G, K), *_angles(r, N, K // 2)),
        wanted=lambda q, k, cos, sin: [q, k],
        ours=uc.rope,
        peers={"torch": backend.reference("rope")},
        costs=lambda args, N, H, G, K: {d: rope(N, H, G, K, K // 2, 2) for d in ("fwd", "bwd")},
    )
    yield Case(
        op="qk_norm_rope",  # tokens, query heads, key heads, head size
        shapes=((8192, 32, 8, 128),),
        small=(256, 32, 8, 128),
        tiny=(4, 2, 1, 8),
        make=lambda r, N, H, G, K: (
            *(r.normal(N, H, K), r.normal(N, G, K), r.normal(K), r.normal(K)),
            *_angles(r, N, K // 2),
        ),
        wanted=lambda q, k, wq, wk, cos, sin: [q, k, wq, wk],
        ours=uc.qk_norm_rope,
        peers={"torch": backend.reference("qk_norm_rope"), "rms_norm, rope": _norm_then_rope},
        costs=lambda args, N, H, G, K: {
            "fwd": qk_norm(N, H, G, K, K // 2, 2),
            "bwd": qk_norm(N, H, G, K, K // 2, 2, backward=True),
        },
    )
    yield Case(
        op="glu",  # tokens, ffn
        shapes=((8192, 14336),),
        small=(256, 14336),
        tiny=(4, 32),
        make=lambda r, N, F: (r.normal(N, 2 * F),),
        wanted=lambda gate_up: [gate_up],
        ours=uc.glu,
        peers={"torch": backend.reference("glu")},
        costs=lambda args, N, F: {"fwd": glu(N, F, 2), "bwd": glu(N, F, 2, backward=True)},
    )
    yield Case(
        op="gelu",  # tokens, ffn: Falcon-7B's
        shapes=((8192, 18176),),
        small=(256, 18176),
        tiny=(4, 32),
        make=lambda r, N, F: (r.normal(N, F),),
        wanted=lambda x: [x],
        ours=uc.gelu,
        peers={"torch": backend.reference("gelu"), "F.gelu": F.gelu},
        costs=lambda args, N, F: {"fwd": gelu(N, F, 2), "bwd": gelu(N, F, 2, backward=True)},
    )
    for op, shape, small in (("softmax", (8192, 4096), (256, 4096)), ("softmax_wide", (4096, 128256), (64, 128256))):
        yield Case(
            op=op,  # rows, width: whole rows in registers, and rows that are walked
            shapes=(shape,),
            small=small,
            tiny=(4, 40),
            make=lambda r, N, D: (r.normal(N, D),),
            wanted=lambda x: [x],
            ours=uc.softmax,
            peers={"torch": backend.reference("softmax")},
            costs=lambda args, N, D: {"fwd": softmax(N, D, 2), "bwd": softmax(N, D, 2, backward=True)},
        )
    yield Case(
        op="dropout",  # tokens, width; F.dropout draws another mask, so it cannot be checked and is no peer
        shapes=((8192, 4096),),
        small=(256, 4096),
        tiny=(4, 32),
        make=lambda r, N, D: (r.normal(N, D), random.key(0, r.generator.device)),
        wanted=lambda x, key: [x],
        ours=functools.partial(uc.dropout, p=0.1),
        peers={"torch": functools.partial(backend.reference("dropout"), p=0.1)},
        costs=lambda args, N, D: {d: dropout(N, D, 2) for d in ("fwd", "bwd")},
    )


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


def _norm_then_rope(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Our three ops in place of the one."""
    return uc.rope(uc.rms_norm(q, wq), uc.rms_norm(k, wk), cos, sin)


def _angles(random: Random, N: int, J: int) -> tuple[Tensor, Tensor]:
    angles = random.normal(N, J, scale=100.0, dtype=torch.float32)
    return angles.cos(), angles.sin()


def _losses() -> Iterator[Case]:
    loss, linear_loss, logprob = map(_cost, ("cross_entropy", "linear_cross_entropy", "linear_logprob"))
    loss_and_grad = importlib.import_module("unsloth_core.ops.cross_entropy").loss_and_grad
    yield Case(
        op="cross_entropy",  # tokens, vocabulary
        shapes=((4096, 128256),),
        small=(64, 128256),
        tiny=(4, 40),
        make=lambda r, N, V: (r.normal(N, V), r.ids(N, V)),
        wanted=lambda logits, targets: [logits],
        ours=uc.cross_entropy,
        peers={
            "torch": backend.reference("cross_entropy"),
            "F.cross_entropy": lambda logits, targets: F.cross_entropy(logits, targets, reduction="none"),
        },
        costs=lambda args, N, V: {"fwd": loss(N, V, 2), "bwd": loss(N, V, 2, backward=True)},
    )
    yield Case(
        op="cross_entropy_loss_and_grad",  # tokens, vocabulary; the cotangent is known, so one kernel gives both
        shapes=((4096, 128256),),
        small=(64, 128256),
        tiny=(4, 40),
        make=lambda r, N, V: (r.normal(N, V), r.ids(N, V)),
        ours=loss_and_grad,
        peers={"torch": backend.reference("cross_entropy.loss_and_grad")},
        costs=lambda args, N, V: {"fwd": loss(N, V, 2, backward=True)},
    )
    yield Case(
        op="linear_cross_entropy",  # tokens, vocabulary, width; the head is frozen, dx is made in the forward pass
        shapes=((8192, 128256, 4096),),
        small=(512, 128256, 4096),
        tiny=(4, 40, 32),
        make=lambda r, N, V, D: (r.normal(N, D), r.matrix(V, D), r.ids(N, V)),
        wanted=lambda x, w, targets: [x],
        ours=uc.linear_cross_entropy,
        peers={"torch": backend.reference("linear_cross_entropy"), **_chunked_of_pytorch()},
        costs=lambda args, N, V, D: {"fwd+bwd": linear_loss(N, D, V, N, 2, dx=True)},
    )
    yield Case(
        op="linear_cross_entropy_low_memory",  # the same in chunks of 512 tokens
        shapes=((8192, 128256, 4096),),
        small=(1024, 128256, 4096),
        tiny=(4, 40, 32),
        make=lambda r, N, V, D: (r.normal(N, D), r.matrix(V, D), r.ids(N, V)),
        wanted=lambda x, w, targets: [x],
        ours=lambda *args: uc.linear_cross_entropy(*args, chunk_logits=2**26),
        peers={"torch": backend.reference("linear_cross_entropy")},
        costs=lambda args, N, V, D: {"fwd+bwd": linear_loss(N, D, V, N, 2, dx=True)},
    )
    yield Case(
        op="linear_logprob",  # tokens, vocabulary, width; the head is frozen, only the log-probability gets a cotangent
        shapes=((8192, 128256, 4096),),
        small=(512, 128256, 4096),
        tiny=(4, 40, 32),
        make=lambda r, N, V, D: (r.normal(N, D), r.matrix(V, D), r.ids(N, V)),
        wanted=lambda x, w, targets: [x],
        ours=lambda *args: uc.linear_logprob(*args)[0],
        peers={"torch": lambda *args: backend.reference("linear_logprob")(*args)[0]},
        costs=lambda args, N, V, D: {"fwd+bwd": logprob(N, D, V, N, 2, dx=True)},
    )


def _chunked_of_pytorch() -> dict[str, Callable[..., Any]]:
    """PyTorch's own loss in chunks, which 2.13 has."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}
    options = torch.nn.LinearCrossEntropyOptions()
    return {
        "F.linear_cross_entropy": lambda x, w, targets: F.linear_cross_entropy(
            x, w, targets, reduction="sum", options=options
        )
    }


def _products() -> Iterator[Case]:
    linear = _cost("linear")
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
        make=lambda r, N, H, G, K, C: (r.normal(N, C), r.matrix((H + 2 * G) * K, C), *_angles(r, N, K // 2)),
        wanted=lambda x, w, *_: [x],
        ours=_in_heads(uc.linear_rope),
        peers={"torch": _in_heads(backend.reference("linear_rope")), "linear, rope": _linear_then_rope},
        costs=lambda args, N, H, G, K, C: {
            "fwd": _cost("linear_rope")(N, args[1], H, G, K // 2),
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
            "fwd": _cost("glu_linear")(N, args[1], F),
            "bwd": linear(N, args[1]) + _cost("glu")(N, F, 2, backward=True),
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


def _experts() -> Iterator[Case]:
    """A mixture of experts, in the shapes of Mixtral 8x7B (2 of 8 experts) and Qwen3-30B-A3B (8 of 128)."""
    route, grouped = map(_cost, ("route", "grouped_linear"))

    def routed(by: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
        def chosen(logits: Tensor) -> tuple[Tensor, Tensor]:
            out = by(logits, top_k=_slots(logits.shape[1]))
            return out[0], out[5]  # what has a gradient

        return chosen

    yield Case(
        op="route",  # tokens, experts
        shapes=((8192, 8), (32768, 128)),
        small=(512, 128),
        tiny=(8, 4),
        make=lambda r, N, E: (r.normal(N, E),),
        wanted=lambda logits: [logits],
        ours=routed(uc.route),
        peers={"torch": routed(backend.reference("route")), "topk": _top_k_and_sorts},
        costs=lambda args, N, E: {
            "fwd": route(N, E, 2, top_k=_slots(E)),
            "bwd": route(N, E, 2, top_k=_slots(E), backward=True),
        },
    )

    def plan(r: Random, N: int, E: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        gates, _, *in_order, _, _ = uc.route(r.normal(N, E), top_k=_slots(E))
        return gates, tuple(in_order)

    def weight(r: Random, E: int, M: int, C: int) -> Tensor:
        return r.matrix(E * M, C).view(E, M, C)

    def make_gather(r: Random, N: int, E: int, M: int, C: int) -> tuple[Any, ...]:
        return r.normal(N, C), weight(r, E, M, C), plan(r, N, E)[1]

    def make_combine(r: Random, N: int, E: int, M: int, C: int) -> tuple[Any, ...]:
        gates, in_order = plan(r, N, E)
        return r.normal(N * _slots(E), C), weight(r, E, M, C), in_order, gates, r.normal(N, M)

    def make_layer(r: Random, N: int, E: int, D: int, F: int) -> tuple[Any, ...]:
        gates, in_order = plan(r, N, E)
        return r.normal(N, D), weight(r, E, 2 * F, D), weight(r, E, D, F), in_order, gates

    def layer(x: Tensor, gate_up: Tensor, down: Tensor, plan: Any, gates: Tensor) -> Tensor:
        return uc.grouped_linear(uc.glu(uc.grouped_linear(x, gate_up, plan)), down, plan, gates, x)

    def one(args: Any, N: int, E: int, M: int, C: int) -> dict[str, Cost]:
        return dict.fromkeys(("fwd", "bwd"), grouped(N * _slots(E), args[1]))

    def both(args: Any, N: int, E: int, D: int, F: int) -> dict[str, Cost]:
        work = grouped(N * _slots(E), args[1]) + grouped(N * _slots(E), args[2])
        return {"fwd": work, "bwd": work}

    yield Case(
        op="grouped_linear",  # gathering: tokens, experts, M, C; frozen experts
        shapes=((8192, 8, 28672, 4096), (32768, 128, 1536, 2048)),
        small=(1024, 8, 1536, 512),
        tiny=(8, 4, 16, 16),
        make=make_gather,
        wanted=lambda x, w, plan: [x],
        ours=uc.grouped_linear,
        peers={"torch": _expert_by_expert, "_grouped_mm": _grouped_mm},
        costs=one,
        compiles=False,
    )
    yield Case(
        op="grouped_linear_combine",  # tokens, experts, M, C; frozen experts, a trained router
        shapes=((8192, 8, 4096, 14336), (32768, 128, 2048, 768)),
        small=(1024, 8, 1536, 512),
        tiny=(8, 4, 16, 16),
        make=make_combine,
        wanted=lambda x, w, plan, gates, add: [x, gates],
        ours=uc.grouped_linear,
        peers={"torch": _expert_by_expert, "_grouped_mm": _grouped_mm},
        costs=one,
        compiles=False,
    )
    yield Case(
        op="grouped_linear_layer",  # gate and up, SwiGLU, down, residual: tokens, experts, width, ffn
        shapes=((8192, 8, 4096, 14336), (32768, 128, 2048, 768)),
        small=(1024, 8, 512, 768),
        tiny=(8, 4, 16, 16),
        make=make_layer,
        wanted=lambda x, gate_up, down, plan, gates: [x, gates],
        ours=layer,
        peers={"torch": _layer_by(_expert_by_expert), "_grouped_mm": _layer_by(_grouped_mm)},
        costs=both,
        compiles=False,
    )


def _slots(experts: int) -> int:
    """Experts of each token in the models that have so many."""
    return 2 if experts <= 8 else 8


def _top_k_and_sorts(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Gates and sorted order as PyTorch's users make them; the order is dropped, the sums over tokens are kept."""
    probs = torch.softmax(logits, -1, dtype=torch.float32)
    gates, experts = probs.topk(_slots(logits.shape[1]), -1)
    order = experts.flatten().argsort(stable=True)
    order.argsort()
    F.one_hot(experts.flatten(), logits.shape[1]).sum(0).cumsum(0)
    return gates / gates.sum(-1, keepdim=True), probs.sum(0)


def _expert_by_expert(x: Tensor, w: Tensor, plan: Any, gates: Any = None, add: Any = None) -> Tensor:
    """The loop of transformers, whose bounds the host reads."""
    order, positions, offsets = plan
    if gates is None:
        x = x[order.long() // positions.shape[1]]
    bounds = offsets.tolist()
    y = torch.cat([x[low:high] @ w[e].T for e, (low, high) in enumerate(itertools.pairwise(bounds))])
    return y if gates is None else _weighted(y, plan, gates, add)


def _grouped_mm(x: Tensor, w: Tensor, plan: Any, gates: Any = None, add: Any = None) -> Tensor:
    """PyTorch's grouped product, composed by hand."""
    order, positions, offsets = plan
    if gates is None:
        x = x[order.long() // positions.shape[1]]
    y = torch._grouped_mm(x, w.transpose(1, 2), offs=offsets[1:])
    return y if gates is None else _weighted(y, plan, gates, add)


def _weighted(y: Tensor, plan: Any, gates: Tensor, add: Any) -> Tensor:
    order, positions, _ = plan
    gate = gates.flatten()[order.long()].unsqueeze(1).to(y.dtype)
    return add.index_add(0, order.long() // positions.shape[1], y * gate)


def _layer_by(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def layer(x: Tensor, gate_up: Tensor, down: Tensor, plan: Any, gates: Tensor) -> Tensor:
        gate, up = product(x, gate_up, plan).chunk(2, -1)
        return product(F.silu(gate) * up, down, plan, gates, x)

    return layer


def _attention(device: torch.device) -> Iterator[Case]:
    attention, block, decode = map(_cost, ("attention", "attention_block", "attention_decode"))
    on_gpu = device.type == "cuda"

    def batch(r: Random, B: int, T: int, H: int, G: int, K: int) -> tuple[Any, ...]:
        segments = Segments.uniform(B, T, r.generator.device)
        return r.normal(B * T, H, K), r.normal(B * T, G, K), r.normal(B * T, G, K), segments, segments

    def sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments, _: Segments) -> Tensor:
        batched = [t.unflatten(0, (-1, segments.max_len)).transpose(1, 2) for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def by(kernel: SDPBackend, call: Callable[..., Tensor] = sdpa) -> Callable[..., Tensor]:
        def chosen(*args: Any) -> Tensor:
            with sdpa_kernel(kernel):
                return call(*args)

        return chosen

    def both(call: Callable[..., Tensor] = sdpa) -> dict[str, Callable[..., Tensor]]:
        flash, cudnn = by(SDPBackend.FLASH_ATTENTION, call), by(SDPBackend.CUDNN_ATTENTION, call)
        return {"sdpa": call, **({"sdpa flash": flash, "sdpa cudnn": cudnn} if on_gpu else {})}

    heads: dict[str, tuple[tuple[Shape, ...], Shape]] = {  # causal: batch, length, query heads, key heads, head size
        "attention": (
            ((1, 8192, 32, 8, 128), (2, 2048, 32, 8, 128), (1, 16384, 32, 8, 128), (1, 32768, 32, 8, 128)),
            (2, 512, 32, 8, 128),
        ),
        "attention_head_64": (((1, 8192, 32, 8, 64),), (2, 512, 32, 8, 64)),
        "attention_head_96": (((1, 4096, 32, 32, 96),), (2, 512, 32, 32, 96)),
        "attention_head_256": (((1, 8192, 16, 8, 256),), (2, 512, 16, 8, 256)),
    }
    for name, (shapes, small) in heads.items():
        yield Case(
            op=name,
            shapes=shapes,
            small=small,
            tiny=(2, 8, 2, 1, 16),
            make=batch,
            wanted=lambda q, k, v, *segments: [q, k, v],
            ours=uc.attention,
            peers={"torch": backend.reference("attention"), **both()},
            costs=lambda args, B, T, H, G, K: {
                "fwd": attention([(T, T)] * B, H, G, K, 2),
                "bwd": attention([(T, T)] * B, H, G, K, 2, backward=True),
            },
        )

    def packed(r: Random, S: int, N: int, H: int, G: int, K: int) -> tuple[Any, ...]:
        ends = torch.tensor([0, *itertools.accumulate(mixed(S, N))], dtype=torch.int32, device=r.generator.device)
        segments = Segments.packed(ends, max_len=max(mixed(S, N)))
        return r.normal(N, H, K), r.normal(N, G, K), r.normal(N, G, K), segments, segments

    def mixed(S: int, N: int) -> list[int]:
        """S lengths from 1 to 2S - 1 parts of N, as a loader finds them: in no order."""
        parts = [(7 * s % S) * 2 + 1 for s in range(S)]
        lengths = [N * part // sum(parts) for part in parts]
        return [*lengths[:-1], N - sum(lengths[:-1])]

    def by_lengths(q: Tensor, k: Tensor, v: Tensor, segments: Segments, _: Segments) -> Tensor:
        cu = torch.cat([segments.starts_S[:1], segments.ends_S])
        options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
        return varlen.varlen_attn(q, k, v, cu, cu, segments.max_len, segments.max_len, window_size=(-1, 0), **options)  # type: ignore[return-value]

    def flex(window: int | None) -> Peer:
        def prepare(q: Tensor, k: Tensor, v: Tensor, segments: Segments, _: Segments) -> tuple[Any, ...]:
            number = torch.searchsorted(segments.ends_S, torch.arange(len(q), device=q.device), right=True)

            def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                near = i - j < (2**30 if window is None else window)
                return (number[i] == number[j]) & (i >= j) & near

            return q, k, v, create_block_mask(visible, None, None, len(q), len(k), device=q.device)

        def call(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
            batched = [t.transpose(0, 1)[None] for t in (q, k, v)]
            return _flex()(*batched, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

        return Peer(call, prepare)

    yield Case(
        op="attention_packed",  # segments, their tokens together, query heads, key heads, head size
        shapes=((16, 16384, 32, 8, 128),),
        small=(4, 1024, 32, 8, 128),
        tiny=(3, 16, 2, 1, 16),
        make=packed,
        wanted=lambda q, k, v, *segments: [q, k, v],
        ours=uc.attention,
        peers={
            "torch": backend.reference("attention"),
            **({"varlen": by_lengths, "flex": flex(None)} if on_gpu else {}),
        },
        costs=lambda args, S, N, H, G, K: {
            "fwd": attention([(n, n) for n in mixed(S, N)], H, G, K, 2),
            "bwd": attention([(n, n) for n in mixed(S, N)], H, G, K, 2, backward=True),
        },
    )
    window = 4096
    yield Case(
        op="attention_window",  # batch, length, query heads, key heads, head size
        shapes=((1, 32768, 32, 8, 128),),
        small=(1, 6144, 4, 1, 128),
        tiny=(2, 8, 2, 1, 16),
        make=batch,
        wanted=lambda q, k, v, *segments: [q, k, v],
        ours=functools.partial(uc.attention, window=window),
        peers={
            "torch": functools.partial(backend.reference("attention"), window=window),
            **({"flex": flex(window)} if on_gpu else {}),
        },
        costs=lambda args, B, T, H, G, K: {
            "fwd": attention([(T, T)] * B, H, G, K, 2, window=window),
            "bwd": attention([(T, T)] * B, H, G, K, 2, window=window, backward=True),
        },
    )

    def chunk(r: Random, C: int, N: int, H: int, G: int, K: int) -> tuple[Any, ...]:
        segments = Segments.uniform(1, N, r.generator.device)
        return r.normal(C, H, K), r.normal(N, G, K), r.normal(N, G, K), segments

    yield Case(
        op="attention_block",  # rows of the last chunk, of all, query heads, key heads, head size
        shapes=((4096, 32768, 32, 8, 128),),
        small=(256, 1024, 32, 8, 128),
        tiny=(4, 16, 2, 1, 16),
        make=chunk,
        wanted=lambda q, k, v, segments: [q, k, v],
        ours=uc.attention_block,
        peers={"torch": backend.reference("attention_block")},
        costs=lambda args, C, N, H, G, K: {
            "fwd": block([(C, N)], H, G, K, 2),
            "bwd": block([(C, N)], H, G, K, 2, backward=True),
        },
    )

    def cache(r: Random, B: int, T: int, H: int, G: int, K: int) -> tuple[Any, ...]:
        one, whole = (Segments.uniform(B, n, r.generator.device) for n in (1, T))
        return r.normal(B, H, K), r.normal(B * T, G, K), r.normal(B * T, G, K), one, whole

    def one_query(q: Tensor, k: Tensor, v: Tensor, _: Segments, segments: Segments) -> Tensor:
        batched = [t.unflatten(0, (len(q), -1)).transpose(1, 2) for t in (k, v)]
        return F.scaled_dot_product_attention(q[:, :, None], *batched, enable_gqa=True)[:, :, 0]

    yield Case(
        op="attention_decode",  # sequences with one query each, keys of each, query heads, key heads, head size
        shapes=((1, 32768, 32, 8, 128), (32, 4096, 32, 8, 128)),
        small=(2, 1024, 32, 8, 128),
        tiny=(2, 16, 2, 1, 16),
        make=cache,
        ours=uc.attention_decode,
        peers={"torch": backend.reference("attention_decode"), **both(one_query)},
        costs=lambda args, B, T, H, G, K: {"fwd": decode(B, 1, T, H, G, K, 2)},
        compiles=False,
    )


@functools.cache
def _flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=False)


def _adamw(states: str = "fp32") -> Case:
    options = {"lr": 2e-4, "weight_decay": 0.01}
    eight = states == "8bit"
    optimizer = optim.adamw(**options, state_dtype="8bit" if eight else torch.float32)

    def make(r: Random, L: int, rank: int, D: int, F: int) -> tuple[Any, ...]:
        """Parameters, gradients, state, and the counters that PyTorch keeps per parameter."""
        matrices = {"q": (D, D), "k": (D // 4, D), "v": (D // 4, D), "o": (D, D)}
        matrices |= {"gate": (F, D), "up": (F, D), "down": (D, F)}

        def adapters() -> dict[str, LoRA]:
            return {
                f"{i}.{name}": LoRA(
                    a=r.normal(rank, cols, dtype=torch.float32), b=r.normal(rows, rank, dtype=torch.float32), scale=1.0
                )
                for i in range(L)
                for name, (rows, cols) in matrices.items()
            }

        params, grads, m, v = (adapters() for _ in range(4))
        step = torch.full((), 3, dtype=torch.int64, device=r.generator.device)
        counters = tuple(step.float().repeat(len(tree.leaves(params))).unbind())
        state = optim.AdamWState(step=step, m=m, v=tree.map(torch.square, v))
        if eight:  # that of a first step: codes of every size
            state = optimizer.update(m, optimizer.init(params), params)[1]
        return params, grads, state, counters

    def ours(params: Any, grads: Any, state: Any, counters: Any) -> Any:
        params, state = optimizer.update(grads, state, params)
        # Two fp32 sums that differ in the last bit may lie on two sides of a midpoint: codes are not compared.
        return params if eight else (params, state.m, state.v)

    def reference(*args: Any) -> Any:
        with backend.using("reference"):
            return ours(*args)

    def fused(params: Any, grads: Any, state: Any, counters: Any) -> Any:
        """PyTorch's one launch over all parameters; it writes into its arguments."""
        torch_adamw(
            *(tree.leaves(t) for t in (params, grads, state.m, state.v)), [], list(counters), fused=True,
            amsgrad=False, beta1=0.9, beta2=0.999, eps=1e-8, maximize=False, **options,
        )  # fmt: skip
        return params, state.m, state.v

    def costs(args: Any, *shape: int) -> dict[str, Cost]:
        n = sum(p.numel() for p in tree.leaves(args[0]))
        state = args[2]  # p, g, m, v read and p, m, v written
        return {"fwd": Cost(bytes=12 * n + 2 * tree.nbytes((state.m, state.v)), flops=15 * n)}

    return Case(
        op="adamw_8bit" if eight else "adamw",  # adapters of all seven products: layers, rank, width, ffn
        shapes=((32, RANK, 4096, 14336),),
        # As many leaves, for host time depends on their number; and all of them large enough for 8-bit states.
        small=(32, RANK, 1024, 3584) if eight else (32, RANK, 64, 224),
        tiny=(1, RANK, 256, 272) if eight else (1, 2, 32, 48),
        make=make,
        ours=ours,
        peers={"torch": reference} if eight else {"torch": reference, "fused": fused},
        costs=costs,
        dtype=torch.float32,
        compiles=False,
    )
