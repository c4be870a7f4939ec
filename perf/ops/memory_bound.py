"""Norms, rotations, activations, softmax, dropout, embedding: what waits for memory."""

import functools
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from unsloth_core import backend, random
from unsloth_core import ops as uc

from .case import Case, angles, cost_of


def cases() -> Iterator[Case]:
    """Those of this file."""
    norm, add_norm, rope, glu, embedding = map(cost_of, ("rms_norm", "add_rms_norm", "rope", "glu", "embedding"))
    layer_norm, softmax, dropout, qk_norm = map(cost_of, ("layer_norm", "softmax", "dropout", "qk_norm_rope"))
    gelu = cost_of("gelu")
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
        make=lambda r, N, H, G, K: (r.normal(N, H, K), r.normal(N, G, K), *angles(r, N, K // 2)),
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
            *angles(r, N, K // 2),
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


def _norm_then_rope(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Our three ops in place of the one."""
    return uc.rope(uc.rms_norm(q, wq), uc.rms_norm(k, wk), cos, sin)
