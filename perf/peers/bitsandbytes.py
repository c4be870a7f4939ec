"""bitsandbytes' NF4 and its 8-bit AdamW, over the same bytes: our layout is its layout (its 0.50.2)."""

import types
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    get_4bit_type,
    optimizer_update_8bit_blockwise,
    quantize_4bit,
)
from torch import Tensor

from unsloth_core import tree
from unsloth_core.ops.dynamic_map import dynamic_map
from unsloth_core.tree import ABSENT
from unsloth_core.weights import NF4, Nested

from . import Peer

DISTRIBUTION = "bitsandbytes"
Packed = tuple[Tensor, Any]


def packed(w: NF4) -> Packed:
    """Codes as a column, and the state that bitsandbytes keeps beside them."""
    nested = {}
    if w.nested is not ABSENT:
        second = QuantState(absmax=w.nested.absmax_P, code=w.nested.code_256, blocksize=256, dtype=torch.float32)
        nested = {"offset": w.nested.offset, "state2": second}
    code = get_4bit_type("nf4", device=w.codes.device)
    state = QuantState(
        absmax=w.absmax, shape=torch.Size(w.shape), code=code, blocksize=w.block, quant_type="nf4", dtype=w.dtype,
        **nested,
    )  # fmt: skip
    return w.codes.view(-1, 1), state


def linear(x: Tensor, w: Packed) -> Tensor:
    """A product that decodes first, and again in backward."""
    codes, state = w
    return matmul_4bit(x, codes.t(), quant_state=state)


def adapted(x: Tensor, w: Any) -> tuple[Any, ...]:
    """The base as this library keeps it, and the adapters."""
    return x, types.SimpleNamespace(base=packed(w.base), parts=w.parts)


def linear_lora(x: Tensor, w: Any) -> Tensor:
    """With one adapter, as PEFT has it; the adapter is in the dtype of the model."""
    (part,) = w.parts
    return linear(x, w.base) + part.scale * F.linear(F.linear(x, part.a.to(x.dtype)), part.b.to(x.dtype))


def quantize(t: Tensor) -> NF4:
    """Double quantised."""
    codes, state = quantize_4bit(t, quant_type="nf4", compress_statistics=True)
    nested = Nested(absmax_P=state.state2.absmax, code_256=state.state2.code, offset=state.offset)
    return NF4(codes=codes.view(-1), absmax=state.absmax, nested=nested, shape=tuple(t.shape), dtype=t.dtype)


def by_leaf(params: Any, grads: Any, state: Any, counters: Any) -> tuple[Any, ...]:
    """Of each parameter itself, its gradient, codes and absmax of both moments; both maps; the number of the step."""
    m, v = map(tree.leaves, (state.m, state.v))  # codes, absmax, codes, absmax, ...
    rows = zip(*map(tree.leaves, (params, grads)), m[::2], m[1::2], v[::2], v[1::2], strict=True)
    maps = [dynamic_map(counters[0].device, signed=signed) for signed in (True, False)]
    return params, list(rows), maps, int(state.step) + 1


def adamw_8bit(params: Any, rows: Any, maps: Any, step: int) -> Any:
    """A launch for each parameter; it writes into its arguments."""
    for p, g, m, m_absmax, v, v_absmax in rows:
        optimizer_update_8bit_blockwise(
            "adam", g, p, m, v, 0.9, 0.999, 0.0, 0.0, 1e-8, step, 2e-4, *maps, m_absmax, v_absmax, 0.01
        )
    return params


PEERS = {
    "nf4_dequantize": Peer(lambda w: dequantize_4bit(*w), lambda w: (packed(w),)),
    "nf4_quantize": quantize,
    "nf4_matvec": Peer(linear, lambda x, w: (x, packed(w))),  # decodes first unless it is one token
    "linear_nf4": Peer(linear, lambda x, w: (x, packed(w))),
    "linear_lora_nf4": Peer(linear_lora, adapted),
    "adamw_8bit": Peer(adamw_8bit, by_leaf),
}
