"""The kernel toolbox: every op works alone in anyone's PyTorch code, with its hand-derived backward.

``uc.ops.rms_norm(x, w, eps=1e-6)`` takes and returns plain tensors; each file has the formula, the kernels, the
backward and the cost of one op, top to bottom.

``torch.autocast`` changes nothing in them: dtypes are those of the plain call, sums are made in fp32. PyTorch's own
layers do change theirs: on a GPU LayerNorm and softmax return fp32, products half precision. Where the code around an
op counts on that, cast what you pass: ``layer_norm(x.float(), ...)``, ``linear(x.half(), w.half())``."""

from .add_rms_norm import add_rms_norm
from .attention import attention
from .attention_block import attention_block
from .attention_decode import attention_decode
from .cross_entropy import cross_entropy
from .dropout import dropout
from .embedding import embedding
from .gelu import gelu
from .glu import glu
from .glu_linear import glu_linear
from .grouped_linear import grouped_linear
from .layer_norm import layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_logprob import linear_logprob
from .linear_rope import linear_rope
from .qk_norm_rope import qk_norm_rope
from .rms_norm import rms_norm
from .rope import rope
from .route import route
from .softmax import softmax

__all__ = [
    "add_rms_norm",
    "attention",
    "attention_block",
    "attention_decode",
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "glu",
    "glu_linear",
    "grouped_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_logprob",
    "linear_rope",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "route",
    "softmax",
]
