"""attorch's tests: its layers are subclasses of torch.nn's here, and call ours."""

import importlib.util
import sys
from typing import Any

import pytest
import torch
from judging import CHECKOUT, DEVICE, Counts, Replaced, fits, op, skip
from torch import Tensor, nn

from unsloth_core import random
from unsloth_core.segments import Segments

FILES = (
    *("rms_norm", "layer_norm", "glu", "softmax", "cross_entropy_loss", "linear", "dropout"),
    "multi_head_attention",
)
ACTIVATIONS = {"silu": "silu", "gelu": "gelu_erf"}


def _checked(x: Tensor) -> Tensor:
    fits(x.numel())
    return x


def _normed(x: Tensor) -> Tensor:
    if x.dtype == torch.float16 and x.device.type == "cpu":
        skip("an oracle that is off: PyTorch's norms in fp16 on a CPU sum weight gradients in fp16")
    return _checked(x)


def _cast(x: Tensor) -> Tensor:
    """What torch's layer hands to LayerNorm or softmax: on a GPU autocast has them in fp32. Our ops leave dtypes alone,
    so a layer of ours that stands in for torch's does it."""
    return x.float() if torch.is_autocast_enabled(x.device.type) and x.is_cuda else x


class RMSNorm(nn.RMSNorm):
    """``(size, eps, elementwise_affine)``; eps is an fp32 epsilon unless given, as in torch."""

    def __init__(self, size: int, eps: float | None = None, elementwise_affine: bool = True) -> None:
        super().__init__(size, eps, elementwise_affine, device=DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        weight = x.new_ones(x.shape[-1]) if self.weight is None else self.weight
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return op("rms_norm")(_normed(x), weight, eps=eps, casting_mode="gemma")  # rounded once, as in torch


class LayerNorm(nn.LayerNorm):
    """``(size, eps, elementwise_affine, bias)``."""

    def __init__(self, size: int, eps: float = 1e-5, elementwise_affine: bool = True, bias: bool = True) -> None:
        super().__init__(size, eps, elementwise_affine, bias, device=DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        given = {name: t for name, t in (("w", self.weight), ("b", self.bias)) if t is not None}
        return op("layer_norm")(_cast(_normed(x)), **given, eps=self.eps)


class GLU(nn.Module):
    """``(act_func)``: the first half times the activation of the second."""

    def __init__(self, dim: int = -1, act_func: str = "sigmoid") -> None:
        super().__init__()
        self.act_func = act_func

    def forward(self, x: Tensor) -> Tensor:
        if self.act_func not in ACTIVATIONS:
            skip("a gated unit with an activation other than silu and gelu")
        if x.shape[-1] == 1:
            skip("a gated unit of one channel, which the test's own chunk(2) does not halve")
        with torch.autocast(x.device.type, enabled=False):  # PyTorch's cat has no fp16 under a CPU's autocast
            up, gate = _checked(x).chunk(2, -1)
            return op("glu")(torch.cat([gate, up], -1), act=ACTIVATIONS[self.act_func])


class Softmax(nn.Softmax):
    """``(dim)``, the last one."""

    def forward(self, x: Tensor) -> Tensor:
        return op("softmax")(_cast(_checked(x)))


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """``(weight)``: the mean over all rows."""

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.weight is not None:
            skip("weights of classes")
        losses = op("cross_entropy")(_checked(logits), target)
        dtype = torch.float32 if torch.is_autocast_enabled(logits.device.type) else logits.dtype
        return losses.mean().to(dtype)


class Linear(nn.Module):
    """``(in, out, bias, act_func)``; the weight is kept transposed."""

    def __init__(self, rows: int, cols: int, bias: bool = True, act_func: str | None = None) -> None:
        super().__init__()
        like = nn.Linear(rows, cols, bias=bias, device=DEVICE)
        self.weight = nn.Parameter(like.weight.detach().T.contiguous())
        self.bias = None if like.bias is None else nn.Parameter(like.bias.detach())
        self.act_func = act_func

    def forward(self, x: Tensor) -> Tensor:
        if self.act_func is not None:
            skip("an activation inside a product")
        weight, bias = self.weight.T, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
        given = {} if bias is None else {"bias": bias}
        return op("linear")(_checked(x), weight, **given)


class Dropout(nn.Module):
    """``(p)``."""

    def __init__(self, drop_p: float = 0.5) -> None:
        super().__init__()
        self.drop_p = drop_p

    def forward(self, x: Tensor) -> Tensor:
        return op("dropout")(_checked(x), random.key(0, device=x.device), p=self.drop_p)


class MultiheadAttention(nn.MultiheadAttention):
    """``(width, heads, bias, batch_first)``: torch's parameters; products and attention are ours."""

    def __init__(self, width: int, heads: int, bias: bool = True, batch_first: bool = True) -> None:
        super().__init__(width, heads, bias=bias, batch_first=batch_first, device=DEVICE)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        B, T, D = q.shape
        fits(B * T * T * self.num_heads)
        if D // self.num_heads > 256:
            skip("a head of more than 256 channels")
        weights = [*self.in_proj_weight.chunk(3), self.out_proj.weight]
        biases = [None] * 4
        if self.in_proj_bias is not None:
            biases = [*self.in_proj_bias.chunk(3), self.out_proj.bias]
        rows = [t.flatten(0, 1) for t in (q, k, v)]
        if torch.is_autocast_enabled(q.device.type):
            dtype = torch.get_autocast_dtype(q.device.type)
            rows, weights = [t.to(dtype) for t in rows], [t.to(dtype) for t in weights]
            biases = [None if b is None else b.to(dtype) for b in biases]

        def product(i: int, x: Tensor) -> Tensor:
            given: dict[str, Any] = {} if biases[i] is None else {"bias": biases[i]}
            return op("linear")(x, weights[i], **given)

        heads = [product(i, x).unflatten(1, (self.num_heads, -1)) for i, x in enumerate(rows)]
        segments = Segments.uniform(B, T, q.device)
        mixed = op("attention")(*heads, segments, segments, causal=causal)
        return product(3, mixed.flatten(1)).unflatten(0, (B, T))


OURS = {name: value for name, value in vars().items() if isinstance(value, type) and value.__module__ == __name__}

# Before pytest reads the tests: `attorch` has our layers, and of its own modules those without kernels.
package = Replaced("attorch", OURS)
package.__path__ = [str(CHECKOUT / "attorch")]
package.__spec__ = importlib.util.spec_from_loader("attorch", None, is_package=True)
sys.modules["attorch"] = package


def pytest_configure(config: pytest.Config) -> None:
    """Called by pytest when it starts."""
    config.pluginmanager.register(Counts())
    files = [CHECKOUT / "tests" / f"test_{name}_layer{'s' if name == 'softmax' else ''}.py" for name in FILES]
    config.args[:] = [str(file) for file in files if file.is_file()]
