"""What the compile gate runs: the cases of ``perf/ops``, and what reaches the rest of the launch tables.

Nothing here has a value: tensors are shapes, dtypes and strides. To reach a row of a table, add a shape that picks it.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from perf import ops as perf_ops
from perf.gate_record import Recorder, Row, Target
from perf.ops import Case, Random, Shape
from unsloth_core import ops as uc
from unsloth_core import optim, tree
from unsloth_core.optim import multi_tensor
from unsloth_core.segments import Segments
from unsloth_core.weights import NF4, Adapted, LoRA, Stacked


def _file(op: str) -> Any:
    """The module, which the package hides behind the op of the same name."""
    return importlib.import_module(f"unsloth_core.ops.{op}")


attention = _file("attention")
attention_decode = _file("attention_decode")
attention_hopper = _file("attention_hopper")
attention_hopper_bwd = _file("attention_hopper_bwd")
grouped_linear = _file("grouped_linear")
low_rank = _file("low_rank")
nf4 = _file("nf4")
nf4_matvec = _file("nf4_matvec")
product = _file("product")

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Further shapes for the cases of perf/ops, which make the arguments of them, in bf16.
WIDTHS = (64, 128, 256, 512, 1000, 1024, 2048, 16384, 32768, 65536)  # 1000 is not divisible by 16
SHAPES: dict[str, tuple[Shape, ...]] = {
    "embedding": tuple((N, 1000, D) for N in (50, 256) for D in (64, 128, 256, 1000)),
    "rms_norm": tuple((8192, D) for D in WIDTHS),
    "add_rms_norm": tuple((8192, D) for D in WIDTHS),
    "layer_norm": tuple((8192, D) for D in WIDTHS),
    "softmax": tuple((8192, D) for D in (*WIDTHS, 50257)),
    "qk_norm_rope": ((8192, 8, 1, 256), (8192, 9, 3, 64), (8192, 6, 2, 96)),
    "rope": ((8192, 8, 1, 256), (8192, 9, 3, 64), (8192, 6, 2, 96), (8192, 3, 1, 100)),
    "gelu": tuple((8192, F) for F in (64, 640, 1000, 1280, 1536)),
    "glu": tuple((8192, F) for F in (64, 640, 1000, 1280, 1536)),
    "cross_entropy": tuple((4096, V) for V in (256, 512, 1024, 50257)),
    "linear_cross_entropy": tuple((4096, V, 512) for V in (256, 512, 1024, 2048, 4096, 50257)),
    "linear_logprob": tuple((4096, V, 512) for V in (256, 1024, 50257)),
    "linear": ((24, 4096, 4096), (50, 4096, 4096), (1024, 1536, 512), (300, 300, 300)),
    "linear_lora": ((1, 4096, 4096), (50, 4096, 4096), (1024, 1536, 512), (300, 300, 300)),
    "nf4_dequantize": ((5, 7), (24, 40)),
}
# Without some of the gradients a kernel does less of the same: every subset of them is compiled for one part.
SUBSETS = "sm_90"
# fp16 differs from bf16 in conversions alone, and fp32 products use nothing in which parts differ. So fp16 is compiled
# for one part, fp32 for that and for the one with the least shared memory; both at the first shape of each case in
# perf/ops, and where a table depends on the dtype.
OTHER_DTYPES = {"sm_90": (FP16, FP32), "sm_89": (FP32,)}
WIDE: dict[str, tuple[Shape, ...]] = {  # in fp32
    "rms_norm": tuple((8192, D) for D in (128, 1024, 16384, 32768)),
    "add_rms_norm": tuple((8192, D) for D in (128, 1024, 16384, 32768)),
    "layer_norm": tuple((8192, D) for D in (128, 1024, 16384, 32768)),
    "softmax": tuple((8192, D) for D in (128, 1024, 16384, 32768)),
    "cross_entropy": ((4096, 50257),),
}


def run(recorder: Recorder) -> None:
    """Every call, in the recorder's context."""
    for case in perf_ops.cases(CPU):
        for shape in (*case.shapes, case.small):
            alone = shape == case.shapes[0] and recorder.target.name == SUBSETS
            _case(recorder, case, shape, case.dtype, alone=alone, model=True)
        others = OTHER_DTYPES.get(recorder.target.name, ()) if case.dtype == BF16 else ()
        for dtype in others:
            _case(recorder, case, case.shapes[0], dtype, model=True)
        for shape in SHAPES.get(case.op, ()):
            _case(recorder, case, shape, case.dtype)
        for shape in WIDE.get(case.op, ()) if FP32 in others else ():
            _case(recorder, case, shape, FP32)
    for calls in (_norms, _small_ops, _losses, _products, _experts, _attention, _optimizers):
        calls(functools.partial(_call, recorder), Random.seeded(0, CPU), recorder.target)


def _case(recorder: Recorder, case: Case, shape: Shape, dtype: torch.dtype, **options: Any) -> None:
    args = case.make(Random.seeded(0, CPU), *shape)
    args = tuple(_cast(arg, dtype) for arg in args)
    name = f"{case.op} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
    _call(recorder, name, case.ours, args, case.wanted, **options)


def _cast(arg: Any, dtype: torch.dtype) -> Any:
    """bf16 leaves in another dtype, and quantised weights that decode to it."""
    if isinstance(arg, NF4):
        return dataclasses.replace(arg, dtype=dtype)
    if isinstance(arg, Adapted):  # its adapters are fp32
        return dataclasses.replace(arg, base=_cast(arg.base, dtype))
    return tree.map(lambda t: t.to(dtype) if t.dtype == BF16 else t, arg)


def _call(
    recorder: Recorder,
    name: str,
    op: Callable[..., Any],
    args: Sequence[Any],
    wanted: Callable[..., Sequence[Tensor]] = lambda *args: (),
    *,
    alone: bool = False,
    model: bool = False,
    cotangents: Callable[[Sequence[Tensor]], Sequence[Tensor]] = lambda outs: [torch.empty_like(o) for o in outs],
) -> None:
    """Run ``op(*args)`` with all gradients ``wanted``; with ``alone`` also without any, and with each by itself.

    ``model``: these are the shapes of a model, at which loads are expected to be 16 bytes wide."""
    every = range(len(wanted(*args)))
    for chosen in (every, *(((), *((i,) for i in every)) if alone else ())):
        fresh = tree.map(lambda t: t.detach(), tuple(args))
        inputs = [t.requires_grad_() for i, t in enumerate(wanted(*fresh)) if i in chosen]

        def forward_and_backward(fresh: Any = fresh, inputs: Any = inputs) -> None:
            outs = [o for o in tree.leaves(op(*fresh)) if o.requires_grad]
            if inputs:
                torch.autograd.grad(outs, inputs, cotangents(outs), allow_unused=True)

        recorder.run(name, forward_and_backward, model=model)


Calls = Callable[..., None]


def _norms(call: Calls, r: Random, target: Target) -> None:
    N, D = 8192, 4096
    for statics in ({}, {"offset": 1.0, "casting_mode": "gemma"}):
        name, op = f"rms_norm {statics}", functools.partial(uc.rms_norm, **statics)
        call(f"{name} add", op, (r.normal(N, D), r.normal(D), r.normal(N, D)), lambda x, w, add: (x, w, add))
        heads = r.normal(N, 6144).view(N, 48, 128)[:, :32]
        call(f"{name} heads of qkv", op, (heads, r.normal(128)), lambda x, w: (x, w))
        call(f"{name} fp32 weight", op, (r.normal(N, D), r.normal(D, dtype=FP32)), lambda x, w: (x, w))
        op = functools.partial(uc.add_rms_norm, **statics)
        args = (r.normal(N, D), r.normal(N, D), r.normal(D))
        call(f"add_rms_norm {statics}", op, args, lambda x, res, w: (x, res, w))
    args = (r.normal(N, D), r.normal(D))
    call("rms_norm expanded dy", uc.rms_norm, args, lambda x, w: (x, w), cotangents=_expanded)
    call("layer_norm plain", uc.layer_norm, (r.normal(N, D),), lambda x: (x,))
    args = (r.normal(N, D), r.normal(D), r.normal(D), r.normal(N, D))
    call("layer_norm add", uc.layer_norm, args, lambda x, w, b, add: (x, w, b, add))
    args = (r.normal(N, 65536), r.normal(65536), r.normal(N, 65536))
    call("rms_norm long add", uc.rms_norm, args, lambda x, w, add: (x, w, add))


def _dtypes(target: Target) -> tuple[torch.dtype, ...]:
    return (BF16, *OTHER_DTYPES.get(target.name, ()))


def _expanded(outs: Sequence[Tensor]) -> list[Tensor]:
    """What ``y.sum()`` sends back: one number for all."""
    return [o.new_empty(()).expand(o.shape) for o in outs]


def _small_ops(call: Calls, r: Random, target: Target) -> None:
    N = 8192
    call("embedding scale", functools.partial(uc.embedding, scale=64.0), (r.ids(N, 999), r.normal(999, 4096)),
         lambda ids, w: (w,))  # fmt: skip
    call("embedding int32", uc.embedding, (r.ids(N, 999).int(), r.normal(999, 4096)), lambda ids, w: (w,))
    for act in ("gelu_tanh", "gelu_erf", "relu2"):
        call(f"glu {act}", functools.partial(uc.glu, act=act), (r.normal(N, 28672),), lambda x: (x,), model=True)
        part = LoRA(a=r.normal(16, 14336, dtype=FP32), b=r.normal(4096, 16, dtype=FP32), scale=2.0)
        args = (r.normal(N, 28672), Adapted(base=r.normal(4096, 14336), parts=(part,), rows=(4096,)))
        op = functools.partial(uc.glu_linear, act=act)
        call(f"glu_linear {act}", op, args, lambda x, w: (x, *_adapters(w)), model=True)
    call("gelu tanh", functools.partial(uc.gelu, approximate="tanh"), (r.normal(N, 18176),), lambda x: (x,), model=True)
    call("glu expanded dy", uc.glu, (r.normal(N, 28672),), lambda x: (x,), cotangents=_expanded)
    for J in (16, 48):  # partial rotation
        angles = (r.normal(N, J, dtype=FP32), r.normal(N, J, dtype=FP32))
        call(f"rope J={J}", uc.rope, (r.normal(N, 32, 128), r.normal(N, 8, 128), *angles), lambda q, k, *_: (q, k))
        linear_rope = functools.partial(uc.linear_rope, heads=32, kv_heads=8)
        call(f"linear_rope J={J}", linear_rope, (r.normal(N, 512), r.normal(6144, 512), *angles), lambda x, *_: (x,))
    qkv, angles = r.normal(N, 48, 128), (r.normal(N, 64, dtype=FP32), r.normal(N, 64, dtype=FP32))
    call("rope slices", uc.rope, (qkv[:, :32], qkv[:, 32:40], *angles), lambda q, k, *_: (q, k), model=True)


def _losses(call: Calls, r: Random, target: Target) -> None:
    N, V, D = 4096, 128256, 512
    options = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
    for dtype, statics in ((BF16, {"softcap": 30.0}), (BF16, options), (FP32, options)):
        if dtype not in _dtypes(target):
            continue
        args = (r.normal(N, V, dtype=dtype), r.ids(N, V))
        op = functools.partial(uc.cross_entropy, **statics)
        call(f"cross_entropy {dtype} {statics}", op, args, lambda x, t: (x,))
        args = (r.normal(N, D, dtype=dtype), r.normal(V, D, dtype=dtype), r.ids(N, V), r.ids(N, N))
        name, op = f"linear_cross_entropy {dtype} {statics}", functools.partial(uc.linear_cross_entropy, **statics)
        call(name, op, args, lambda x, w, *_: (x, w), alone=target.name == SUBSETS)


def _weights(r: Random, M: int, C: int) -> Iterator[tuple[str, Any, Callable[[Any], list[Tensor]]]]:
    """(name, weight, its trained leaves): adapters on parts, of several ranks, on dense and on quantised weights."""

    def lora(m: int, rank: int) -> LoRA:
        return LoRA(a=r.normal(rank, C, dtype=FP32), b=r.normal(m, rank, dtype=FP32), scale=2.0)

    dense, half = r.normal(M, C), r.normal(M // 2, C)
    for rank in (8, 64, 128):
        parts = (lora(M // 2, rank), lora(M // 2, rank))
        yield f"two adapters of rank {rank}", Adapted(base=dense, parts=parts, rows=(M // 2, M // 2)), _adapters
    rows = (M // 2, M // 4, M // 4)
    parts = tuple(lora(m, 16) for m in rows)
    yield "three adapters", Adapted(base=dense, parts=parts, rows=rows), _adapters
    yield "half of it NF4", Stacked(parts=(nf4.quantize(half), half)), lambda w: []


def _adapters(w: Adapted) -> list[Tensor]:
    return [leaf for part in w.parts for leaf in (part.a, part.b)]


def _products(call: Calls, r: Random, target: Target) -> None:
    N, M, C = 8192, 4096, 4096
    for name, w, trained in _weights(r, M, C):
        for rows in (N, 1):
            args = (r.normal(rows, C), w, r.normal(M), r.normal(rows, M))
            wanted = lambda x, w, bias, add, trained=trained: (x, *trained(w), bias)  # noqa: E731
            call(f"linear {rows} {name}", uc.linear, args, wanted)
            call(f"glu_linear {rows} {name}", uc.glu_linear, (r.normal(rows, 2 * C), *args[1:]), wanted)
            if name == "three adapters":
                dropped = dataclasses.replace(w, key=torch.stack([r.ids(2, 1000)] * 3), dropout=0.1)
                call(f"linear {rows} {name} with dropout", uc.linear, (args[0], dropped, *args[2:]), wanted)
        if name == "two adapters of rank 64":
            for rows in (N, 1):
                args = tuple(_cast(arg, FP32) for arg in (r.normal(rows, C), w, r.normal(M), r.normal(rows, M)))
                wanted = lambda x, w, bias, add, trained=trained: (x, *trained(w), bias)  # noqa: E731
                call(f"linear {rows} {name} fp32", uc.linear, args, wanted)
    # Products that linear leaves to cuBLAS; tests and measurements run ours.
    for dtype, rows, cols, inner in (
        *((BF16, *size, inner) for size in ((4096, 4096), (1536, 2048), (512, 512)) for inner in (4096, 1000)),
        *((BF16, *size, 1000) for n in (16, 32, 64) for size in ((n, 4096), (4096, n))),
        *((FP32, *size, 4096) for size in ((16, 4096), (4096, 16), (4096, 4096)) if FP32 in _dtypes(target)),
    ):
        a, b = r.normal(rows, inner, dtype=dtype), r.normal(inner, cols, dtype=dtype)
        update = (r.normal(rows, 16, dtype=dtype), r.normal(16, cols, dtype=dtype))
        for path in ("pointers", "descriptors")[: 2 if target.capability[0] == 9 and dtype == BF16 else 1]:
            call(f"product {rows}x{cols}x{inner} {path}", functools.partial(product.product, path=path), (a, b))
            op = functools.partial(product.product, path=path, update=update)
            call(f"product {rows}x{cols}x{inner} {path} update", op, (a, b))
    for dtype in _dtypes(target):
        for nested in (True, False):
            w = nf4.quantize(r.normal(4096, 4096, dtype=dtype), double_quant=nested)
            call(f"nf4 {dtype} nested={nested}", nf4.dequantize, (w,), model=True)

    for dtype in _dtypes(target):
        for M, C in ((14336, 4096), (4096, 14336), (1024, 2048), (512, 576)):
            for tokens in (1, 3, 8):
                for nested in (True, False) if tokens == 1 else (True,):
                    args = (
                        r.normal(tokens, C, dtype=dtype),
                        nf4.quantize(r.normal(M, C, dtype=dtype), double_quant=nested),
                    )
                    name = f"nf4_matvec {tokens}x{M}x{C} nested={nested}"
                    call(name, nf4_matvec.nf4_matvec, args, model=M == 14336)
    args = (r.normal(1, 4096), nf4.quantize(r.normal(4096, 4096)), r.normal(4096), r.normal(1, 4096))
    call("nf4_matvec bias add", nf4_matvec.nf4_matvec, args)
    args = (r.normal(1, 14336), nf4.quantize(r.normal(512, 14336)))
    call("nf4_matvec split", nf4_matvec.nf4_matvec, args)


def _experts(call: Calls, r: Random, target: Target) -> None:
    for E, valid in ((8, False), (8, True), (60, False)):
        op = functools.partial(uc.route, top_k=2, renormalise=not valid)
        args = (r.normal(4096, E), *((r.normal(4096) > 0,) if valid else ()))
        call(f"route of {E} valid={valid}", op, args, lambda logits, *valid: (logits,))
    E, T, M, C = 8, 2, 1024, 512
    for dtype in _dtypes(target):
        for tokens in (8, 128, 4096):
            gates, _, *plan, _, _ = uc.route(r.normal(tokens, E), top_k=T)
            forms = {"gather": (r.normal(tokens, C, dtype=dtype),)}
            forms["combine"] = (r.normal(tokens * T, C, dtype=dtype), gates, r.normal(tokens, M, dtype=dtype))
            for name, w, trained in _expert_weights(r, E, M, C, dtype, every_rank=tokens > 8):
                for form, (x, *more) in forms.items():
                    wanted = lambda x, w, plan, *more, trained=trained: (x, *trained(w), *more)  # noqa: E731
                    args = (x, w, tuple(plan), *more)
                    call(f"grouped_linear {form} {tokens} {dtype} {name}", uc.grouped_linear, args, wanted)
    # Operands that TMA cannot address, or whose last step reaches into the next expert.
    for tokens in (128, 4096):
        _, _, *plan, _, _ = uc.route(r.normal(tokens, E), top_k=T)
        for M, C in ((1000, 1000), (520, 1024)):
            args = (r.normal(tokens, C), r.normal(E, M, C), tuple(plan))
            call(f"grouped_linear {tokens} {M}x{C}", uc.grouped_linear, args, lambda x, w, plan: (x, w))


def _expert_weights(
    r: Random, E: int, M: int, C: int, dtype: torch.dtype, *, every_rank: bool
) -> Iterator[tuple[str, Any, Callable[[Any], list[Tensor]]]]:
    """(name, weight, its trained leaves)."""
    yield "trained", r.normal(E, M, C, dtype=dtype), lambda w: [w]
    for rank in (8, 32, 64) if dtype == BF16 and every_rank else (8,):
        part = LoRA(a=r.normal(E, rank, C, dtype=FP32), b=r.normal(E, M, rank, dtype=FP32), scale=2.0)
        yield f"rank {rank}", Adapted(base=r.normal(E, M, C, dtype=dtype), parts=(part,), rows=(M,)), _adapters


def _attention(call: Calls, r: Random, target: Target) -> None:
    one, packed, cache = (Segments.uniform(4, length, CPU) for length in (1, 512, 8192))
    softcap = {"window": 100, "softcap": 50.0}
    for dtype, sizes in ((BF16, (64, 80, 96, 128, 192, 256, 33, 100, 200)), (FP32, (64, 128, 256))):
        for K in sizes if dtype in _dtypes(target) else ():
            q, k, v = (r.normal(2048, heads, K, dtype=dtype) for heads in (8, 2, 2))
            whole = K in (64, 128, 256) and dtype == BF16
            portable = {"return_lse": True, "scale": -0.1}  # what the kernel for Hopper does not take
            more = ({"causal": False},) if K == 128 else ()
            more = (softcap, *more) if whole else ()
            if dtype == BF16 and (K == 128 or (K in (64, 96, 256) and target.name == "sm_90")):
                more = (*more, portable)
            for statics in ({}, *more):
                op = functools.partial(uc.attention, **statics)
                call(f"attention {K} {statics}", op, (q, k, v, packed, packed), lambda q, k, v, *_: (q, k, v))
            if K in (80, 128, 256) and dtype == BF16 and target.name == "sm_90":  # enough for Hopper's backward kernel
                long, args = Segments.uniform(1, 8192, CPU), [r.normal(8192, heads, K) for heads in (32, 8, 8)]
                for statics in ({}, softcap):
                    op = functools.partial(uc.attention, **statics)
                    call(f"attention {K} long {statics}", op, (*args, long, long), lambda q, k, v, *_: (q, k, v))
            if K == 64:
                args = (q, k, v, packed, packed, r.normal(8, dtype=FP32))
                call(f"attention {K} sinks", uc.attention, args, lambda *args: (*args[:3], args[-1]))
            q, k, v = (r.normal(*shape, K, dtype=dtype) for shape in ((4, 8), (4 * 8192, 2), (4 * 8192, 2)))
            call(f"attention {K} decode", uc.attention, (q, k, v, one, cache))
            call(f"attention {K} decode, one part", uc.attention, (q, k, v, one, Segments.uniform(4, 100, CPU)))
            pages = torch.zeros(4, 512, dtype=torch.int32)
            paged = functools.partial(attention_decode.attention_decode, page=16)
            call(f"attention_decode {K} paged", paged, (q, k, v, one, cache, pages, r.normal(8)))


def _optimizers(call: Calls, r: Random, target: Target) -> None:
    for dtypes in ((FP32,), (BF16,), (BF16, FP32)):
        leaves = [r.normal(4096, 16, dtype=dtype) for dtype in dtypes]
        call(f"global_norm {dtypes}", optim.global_norm, (leaves,))
        for state in (FP32, BF16, "8bit"):
            adamw = optim.adamw(max_norm=1.0, state_dtype=state)

            def update(*leaves: Tensor, adamw: Any = adamw) -> Any:
                return adamw.update(list(leaves), adamw.init(list(leaves)), list(leaves))[0]

            call(f"adamw {dtypes} {state}", update, leaves)
            call(f"adamw {dtypes} {state} unaligned", update, [r.normal(4097, dtype=dtype)[1:] for dtype in dtypes])
            if state == "8bit":
                call(f"adamw {dtypes} {state} and small", update, [*leaves, r.normal(17, dtype=FP32)])
    call("addresses under capture", lambda: multi_tensor._table_by_arguments([2**40] * 3, CPU), ())


def rows(target: Target) -> Iterator[Row]:
    """The launch tables of a target: each row has to be reached."""
    lower: dict[tuple[torch.dtype, str], int] = {}
    for (dtype, kind, size), launch in attention.configurations(target.capability).items():
        if dtype == FP16 or dtype not in _dtypes(target):  # fp16 has the rows of bf16
            continue
        low = lower.get((dtype, kind), 0)
        lower[dtype, kind] = size
        where = {"dtype": "bf16" if dtype == BF16 else "fp32", "HEAD": range(low + 1, size + 1)}
        where["TMA"] = kind == "sm_90"
        for column, kernel, names in (
            ("forward", "attention._forward", {"BM": "queries", "BN": "keys"}),
            ("dkdv", "attention._dkdv", {"BM": "queries", "BN": "keys"}),
            ("dq", "attention._dq", {"BM": "queries", "BN": "keys"}),
        ):
            tiles = getattr(launch, column)
            facts = {**where, **tiles.options(), **{name: getattr(tiles, field) for name, field in names.items()}}
            yield Row(f"attention.TABLE[{kind!r}, {size}].{column} {dtype}", kernel, facts)
    for K, block in attention_hopper.TABLE.items() if target.capability == (9, 0) else ():
        pieces = dict(zip(("K1", "K2"), attention_hopper.pieces(K), strict=True))
        facts = {"dtype": "bf16", **pieces, "BN": block.keys, "SLOTS": block.slots, "OWN_O": block.own_o}
        yield Row(f"attention_hopper.TABLE[{K}]", "attention_hopper._forward", facts)
    for K, block in attention_hopper_bwd.TABLE.items() if target.capability == (9, 0) else ():
        pieces = dict(zip(("K1", "K2"), attention_hopper.pieces(K), strict=True))
        facts = {"BF16": True, **pieces, "BM": block.queries, "BN": block.keys}
        facts |= {"SLOTS": block.slots, "DO_SLOTS": block.do_slots, "HELD": block.held}
        yield Row(f"attention_hopper_bwd.TABLE[{K}]", "attention_hopper_bwd._backward", facts)
    for (kind, size), tiles in attention_decode.TABLE.items():
        for dtype in _dtypes(target):
            if dtype != FP16 and kind == attention_decode.kind(dtype, target.capability):
                facts = {"dtype": "bf16" if dtype == BF16 else "fp32", "BN": tiles.keys}
                facts |= {"HEAD": range(1 if size <= 128 else 129, size + 1)}
                facts |= {"num_warps": tiles.warps, "num_stages": tiles.stages}
                yield Row(f"attention_decode.TABLE[{kind!r}, {size}] {dtype}", "attention_decode._attend", facts)
    hopper = {"large", "medium", "few", "few ragged"}  # of grouped_linear's tables
    for table, kernel in (("CONFIGS", "_rows_kernel"), ("WEIGHT_CONFIGS", "_weight_kernel")):
        for name, config in getattr(grouped_linear, table).items():
            here = name not in hopper if target.capability[0] != 9 else "portable" not in name
            if name != "interpreted" and here and (FP32 in _dtypes(target) or not name.startswith("fp32")):
                facts = {"BLOCK_M": config.m, "BLOCK_N": config.n, "BLOCK_K": config.k}
                facts |= {"num_warps": config.warps, "num_stages": config.stages}
                yield Row(f"grouped_linear.{table}[{name!r}]", f"grouped_linear.{kernel}", facts)
    for name, config in product.CONFIGS.items():
        if name != "interpreted" and (FP32 in _dtypes(target) or not name.startswith("fp32")):
            facts = {"BLOCK_M": config.m, "BLOCK_N": config.n, "BLOCK_K": config.k}
            facts |= {"num_warps": config.warps, "num_stages": config.stages}
            yield Row(f"product.CONFIGS[{name!r}]", "product._product_kernel", facts)
    for name, thin in low_rank.CONFIGS.items():
        of = {"gradients": ("_gradients_kernel",), "both sides": ("_both_sides_kernel",)}
        few = ("_u_and_v_kernel", "_t_and_a_kernel")
        thin_passes = few if "few" in name else ("_u_kernel", "_t_kernel", *few)
        for kernel in of.get(name, thin_passes) if name != "interpreted" else ():
            inner = "BLOCK_C" if name in of else "BLOCK_K"
            facts = {"BLOCK_N": thin.tokens, inner: thin.inner, "num_warps": thin.warps, "num_stages": thin.stages}
            if inner == "BLOCK_K" and target.name == "sm_89":  # less shared memory: fewer stages
                facts["num_stages"] = min(thin.stages, 2)
            yield Row(f"low_rank.CONFIGS[{name!r}]", f"low_rank.{kernel}", facts)
