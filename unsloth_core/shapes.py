"""A model of which only shapes exist: the weights that its config declares, as meta tensors or filled by whoever asks.

:class:`Declared` stands where ``load`` has a checkpoint: it has the names and shapes that the config's checkpoint would
have, and makes a tensor when one is read. So stacking, quantising and placing are those of ``load``.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .four_bit import FourBitCheckpoint, StoredSo, stored_so
from .load import read_weights
from .models import family_of
from .models.decoder import Model
from .ops import nf4
from .weights import declared_leaves

META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A family and a config, which can be cut to fewer layers."""

    family: Any
    config: Any
    biases: bool  # of a config that does not say: see weights.declared_leaves
    name: str
    stored: StoredSo | None = None  # of a checkpoint that is in 4 bits already

    @staticmethod
    def of(model: Model | Mapping[str, Any]) -> "Shape":
        """Of a model that is loaded, or of the content of a ``config.json``. Raises ValueError for anything else, and
        NotImplementedError for one whose weights are stored in a way that ``load`` does not read."""
        if isinstance(model, Model):
            return Shape(model.family, model.config, False, model.source or "model")
        if not isinstance(model, Mapping):
            got = f"a {type(model).__name__}"
            raise ValueError(f"plan: model is {got}, expected a Model or the content of a config.json")
        family = family_of(dict(model))
        biases = any(model.get(name) for name in ("attention_bias", "mlp_bias"))
        name = str(model.get("_name_or_path") or model["model_type"])
        return Shape(family, family.Config.from_hf(model), biases, name, stored_so(model, name))

    @property
    def layers(self) -> int:
        """How many there are."""
        return self.config.num_hidden_layers

    def cut(self, layers: int) -> Any:
        """The config with so many layers, the first ones."""
        has = self.config.has
        more = {"has": has[:layers]} if isinstance(has, tuple) else {}
        return dataclasses.replace(self.config, num_hidden_layers=layers, **more)

    @property
    def alike(self) -> bool:
        """Whether every layer has the same leaves."""
        kinds: dict[Any, Any] = {}
        for d in declared_leaves(self.family.Weights, self.config):
            if len(d.path) > 1:
                kinds.setdefault(d.path[1], []).append((d.path[2:], d.shape))
        return all(leaves == kinds[0] for leaves in kinds.values())

    def weights(
        self, layers: int, quantize: str | None, dtype: torch.dtype, *, device: torch.device = META,
        make: "Make | None" = None, embed: str = "device", head: str = "device",
    ) -> Any:  # fmt: skip
        """What ``load`` would read with these options; by default shapes without memory."""
        config = self.cut(layers)
        there = [
            (name, (rows, *d.rest), d.linear)
            for d in declared_leaves(self.family.Weights, config)
            if d.path != ("head",) or not config.tie_word_embeddings
            if not (d.optional and d.path != ("head",)) or self.biases
            for name, rows in zip(d.names, d.rows, strict=True)
        ]
        shapes = {name: shape for name, shape, _ in there}
        checkpoint: Any = Declared(
            shapes, dtype, make or (lambda _, shape: torch.empty(shape, dtype=dtype, device=META))
        )
        if (stored := self.stored) is not None:
            coded = [name for name, _, linear in there if linear and stored.holds(name)]
            nodes = {name: nf4.quantize(checkpoint.tensor(name), double_quant=stored.nested) for name in coded}
            checkpoint = FourBitCheckpoint(checkpoint, nodes)
        options: dict[str, Any] = {"device": device, "dtype": dtype, "quantize": quantize, "embed": embed, "head": head}
        return read_weights(checkpoint, self.family.Weights, config, **options)


Make = Callable[[str, tuple[int, ...]], Tensor]  # a tensor by its name and shape


@dataclasses.dataclass(frozen=True)
class Declared:
    """A checkpoint of shapes, as ``read_weights`` reads one."""

    shapes: dict[str, tuple[int, ...]]
    kind: torch.dtype
    make: Make
    source: str = "config"
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all tensors."""
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one tensor."""
        return self.shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """That of all."""
        return self.kind

    def tensor(self, name: str) -> Tensor:
        """A new one each time."""
        return self.make(name, self.shapes[name])
