"""bitsandbytes' NF4, over the same bytes: our layout is its layout (its 0.50.2)."""

from typing import Any

import torch
from bitsandbytes import matmul_4bit
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type
from torch import Tensor

from unsloth_core.tree import ABSENT
from unsloth_core.weights import NF4

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


PEERS = {
    "nf4_dequantize": Peer(lambda w: dequantize_4bit(*w), lambda w: (packed(w),)),
    "linear_nf4": Peer(linear, lambda x, w: (x, packed(w))),
}
