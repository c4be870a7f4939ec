"""What a call of an op costs: its own ``cost`` function, at rates measured on a GPU."""

import dataclasses
import importlib
import math
from typing import Any

from torch import Tensor

from . import tree, weights
from .cost import Cost
from .tree import ABSENT
from .weights import Adapted


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a GPU does in a second, measured; ``attention``: (shortest segment, forward, backward), in FLOP/s."""

    name: str
    product: float
    memory: float  # bytes of element-wise ops
    link: float  # bytes over PCIe, pinned
    decode: float  # bytes of NF4 read and 16-bit written
    attention: tuple[tuple[int, float, float], ...]
    call: float  # seconds that its kernels take to begin and end, above what the bytes and FLOPs of a call of an op do
    host: float  # seconds that a call of an op takes in Python and the driver
    few_logits: float  # share of the loss's time that smaller blocks of logits take more

    def attend(self, length: int, backward: bool) -> float:
        """FLOP/s of attention within segments of ``length`` rows."""
        fits = [rates for rates in self.attention if rates[0] <= length] or [self.attention[0]]
        return fits[-1][2 if backward else 1]


H100 = Rates(
    name="H100 80GB HBM3",
    product=690e12,
    memory=2.9e12,
    link=50e9,
    decode=2.6e12,
    attention=((0, 300e12, 200e12), (2048, 490e12, 340e12), (8192, 690e12, 480e12), (32768, 680e12, 490e12)),
    call=10e-6,
    host=300e-6,
    few_logits=0.055,
)


_DECODED = 1.26  # bytes moved per byte of a decoded matrix: 4 bits are read for 16 written


def seconds(rates: Rates, phase: str, op: str, what: Any, needs: Any) -> float:
    """Of one call that :func:`unsloth_core.autodiff.listening` heard, of any op but attention."""
    if phase == "decode":
        return _DECODED * what[0].nbytes / rates.decode
    per_second = {"bytes_per_s": rates.memory, "flops_per_s": rates.product}
    return sum(cost.seconds(**per_second) for cost in _costs(phase == "backward", op, what, needs))


def op_file(name: str) -> Any:
    """The file of an op; ``ops.<name>`` is the op itself."""
    return importlib.import_module(f"unsloth_core.ops.{name}")


def _costs(backward: bool, op: str, what: Any, needs: Any) -> list[Cost]:
    """The passes of one call, forward (``what``: arguments) or backward (residuals and cotangent)."""
    tensors = [t for t in tree.leaves(what) if isinstance(t, Tensor)]
    y = tree.leaves(what[1])[0] if backward else what[0]
    item, rows = y.element_size(), y.shape[0] if y.ndim else 1
    if op in ("linear", "linear_rope", "glu_linear", "grouped_linear"):
        return _products(backward, op, what, needs, item)
    if op == "linear_cross_entropy":
        if backward:
            return [Cost(bytes=2 * what[0][0].nbytes, flops=0)]
        (N, D), V, M = what[0].shape, what[1].shape[0], what[2].shape[0]
        return [op_file(op).cost(N, D, V, M, item, dx=needs[0] is True, dw=needs[1] is True)]
    if op in ("rms_norm", "add_rms_norm"):
        return [op_file(op).cost(math.prod(y.shape[:-1]), y.shape[-1], item, backward=backward)]
    if op == "glu":
        return [op_file(op).cost(rows, y.shape[-1] // (1 if backward else 2), item, backward=backward)]
    if op == "embedding":
        return [op_file(op).cost(rows, *what[1].shape, what[1].element_size())]
    # Of any other op: everything it is given read once, and as much written as its largest.
    return [Cost(bytes=sum(t.nbytes for t in tensors) + max(t.nbytes for t in tensors), flops=0)]


def _products(backward: bool, op: str, what: Any, needs: Any, item: int) -> list[Cost]:
    """The product; of adapters the narrow passes over x and dy; of a trained weight its gradient; the pass that the op
    makes over the product's output (rope) or input (glu)."""
    w = (what[0] if backward else what)[1]
    *_, m, c = weights.shape(w)
    if op == "grouped_linear":  # rows of the plan: a token has one for each of its experts
        rows = (what[0] if backward else what)[2][0].shape[0]
    elif backward:
        rows = sum(dy.numel() for dy in tree.leaves(what[1])) // m
    else:
        rows = what[0].numel() // (2 * c if op == "glu_linear" else c)
    product, narrow = op_file("grouped_linear" if op == "grouped_linear" else "linear").cost(rows, w, itemsize=item), []
    if isinstance(w, Adapted):
        wide = 2 * c + 2 * m if backward else c
        if isinstance(w.key, Tensor):  # with dropout every adapter has an input, and a gradient of it, of its own
            each = (10 if needs[0] is True else 4) if backward else 3
            wide = each * c * sum(part is not ABSENT for part in w.parts) + 2 * m * backward
        narrow = [Cost(bytes=rows * wide * item, flops=0)]
    if op == "linear_rope":
        narrow.append(Cost(bytes=2 * rows * m * item, flops=0))
    if op == "glu_linear":
        narrow.append(op_file("glu").cost(rows, c, item, backward=backward))
    if not backward:
        return [product, *narrow]
    trained = tree.any(needs[1].base if isinstance(w, Adapted) else needs[1])
    return [product] * (needs[0] is True) + [Cost(bytes=0, flops=2 * rows * m * c)] * trained + narrow
