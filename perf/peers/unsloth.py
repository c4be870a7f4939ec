"""Unsloth's kernels (its 2026.10.9), called as its models call them.

Importing it patches torch and transformers: rows of other libraries from the same process are to be read with that in
mind. Its rotation and its SwiGLU write into what they are given. Frozen, the weights of its norms of queries and keys
would be fused with the rotation; trained, as here, they are three launches."""

import types
from typing import Any

import torch
import unsloth  # noqa: F401 - has to come before what it patches
from torch import Tensor
from unsloth.kernels import fast_dequantize, fast_gemv, fast_rope_embedding, matmul_lora
from unsloth.kernels import swiglu_DWf_DW_dfg_kernel as swiglu_backward
from unsloth.kernels import swiglu_fg_kernel as swiglu
from unsloth.kernels.cross_entropy_loss import Fast_CrossEntropyLoss
from unsloth.kernels.fast_lora import LoRA_W
from unsloth.kernels.layernorm import Fast_Layernorm
from unsloth.kernels.qk_norm_rope import fast_qk_norm_rope
from unsloth.kernels.rms_layernorm import Fast_RMS_Layernorm

from . import Peer, fresh
from .bitsandbytes import adapted, packed

DISTRIBUTION = "unsloth"


def angles(cos: Tensor, sin: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of cos and sin, in the dtype of the model."""
    cos, sin = (torch.cat([t, t], -1).to(like.dtype) for t in (cos, sin))
    return cos, sin


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """(N, H, K) as a batch of one, heads before tokens; one launch, over q and k."""
    turned = fast_rope_embedding(q[None].transpose(1, 2), k[None].transpose(1, 2), cos, sin)
    return tuple(t.transpose(1, 2)[0] for t in turned)


def qk_norm_rope(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    """A batch of one."""
    norms = (types.SimpleNamespace(weight=w, variance_epsilon=1e-6) for w in (wq, wk))
    return tuple(t.transpose(1, 2)[0] for t in fast_qk_norm_rope(*norms, q[None], k[None], cos, sin))


def halves(gate_up: Tensor) -> tuple[Tensor]:
    """(N, 2F) -> (2, N, F), gate and up behind each other as two products leave them."""
    return (torch.stack(gate_up.detach().chunk(2, -1)).requires_grad_(gate_up.requires_grad),)


class SwiGLU(torch.autograd.Function):
    """(2, N, F) -> (N, F).

    Unsloth calls the kernels from the backward of a whole MLP, which has no more use for gate and up and wants the
    output once more: backward writes the output over the cotangent, the gradient of up over gate, and that of gate over
    up, which is why they are not autograd's to save."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.gate_up = gate_up.detach()
        gate, up = gate_up[:, None]
        return swiglu(gate, up)[0]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        swiglu_backward(dy, *ctx.gate_up)
        return ctx.gate_up


def lora(x: Tensor, w: Any) -> Tensor:
    """A base, dense or packed, and one adapter in fp32."""
    (part,) = w.parts
    base, state = (w.base, None) if isinstance(w.base, Tensor) else w.base
    return LoRA_W.apply(x[None], base, state, part.a, part.b, part.scale)[0]


def matvec(x: Tensor, codes: Tensor, state: Any) -> Tensor:
    """One token in one launch; more are multiplied with the decoded weight."""
    if x.shape[0] == 1:
        return fast_gemv(x[None], codes, state)[0]
    return matmul_lora(x, codes, state, None, None, None)


PEERS = {
    "rms_norm": lambda x, w: Fast_RMS_Layernorm.apply(x, w, 1e-6),
    "layer_norm": lambda x, w, b: Fast_Layernorm.apply(x, w, b, 1e-5),
    "rope": Peer(rope, lambda q, k, cos, sin: (fresh(q), fresh(k), *angles(cos, sin, q))),
    "qk_norm_rope": Peer(qk_norm_rope, lambda q, k, wq, wk, cos, sin: (q, k, wq, wk, *angles(cos, sin, q))),
    "glu": Peer(SwiGLU.apply, halves, lambda gradient: torch.cat([*gradient.flip(0)], -1)),
    "cross_entropy": lambda logits, targets: Fast_CrossEntropyLoss.apply(logits, targets, 0, 0),
    "linear_lora": lora,
    "linear_lora_nf4": Peer(lora, adapted),
    "nf4_dequantize": Peer(fast_dequantize, lambda w: packed(w)),
    "nf4_matvec": Peer(matvec, lambda x, w: (x, *packed(w))),
}
