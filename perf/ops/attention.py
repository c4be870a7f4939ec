"""Attention in all its forms."""

import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from perf.peers import Peer
from unsloth_core import backend
from unsloth_core import ops as uc
from unsloth_core.cost import Cost
from unsloth_core.segments import Segments

from .case import Case, Random, Shape, Yardstick, cost_of


def cases(device: torch.device) -> Iterator[Case]:
    """Those of this file."""
    attention, block, decode = map(cost_of, ("attention", "attention_block", "attention_decode"))
    on_gpu = device.type == "cuda"

    def batch(r: Random, B: int, T: int, H: int, G: int, K: int) -> tuple[Any, ...]:
        segments = Segments.uniform(B, T, r.generator.device)
        return r.normal(B * T, H, K), r.normal(B * T, G, K), r.normal(B * T, G, K), segments, segments

    def causal(args: Any, B: int, T: int, H: int, G: int, K: int) -> dict[str, Cost]:
        return {d: attention([(T, T)] * B, H, G, K, 2, backward=d == "bwd") for d in ("fwd", "bwd")}

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
            costs=causal,
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
        yardsticks={"ours: full causal": Yardstick(uc.attention, backend.reference("attention"), causal)},
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
    importlib.import_module("torch._functorch.config").donated_buffer = False  # its backward runs many times here
    return torch.compile(flex_attention, dynamic=False)
