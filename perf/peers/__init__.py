"""Other people's implementations of our ops, one adapter file a library: each has ``DISTRIBUTION``, which pip installs,
and ``PEERS``, a mapping from a case of ``perf/ops/`` to what takes that case's arguments. A library that is not there
is a note, never an error; one that changed gets no row, since a peer is checked like we are."""

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

# Importing `unsloth` takes most of a minute and patches torch and transformers: it is measured when it is asked for.
DEFAULT = ("pytorch", "liger", "quack", "bitsandbytes")
NAMES = (*DEFAULT, "unsloth")


@dataclass(frozen=True)
class Peer:
    """``call(*prepare(*args))``. What ``prepare`` does is not timed: the layout that the library would have been given.

    It keeps every argument that gets a gradient in its place, so a peer that writes into its arguments gets copies.
    ``restore`` undoes that layout for a gradient of such an argument, before it is checked."""

    call: Callable[..., Any]
    prepare: Callable[..., tuple[Any, ...]]
    restore: Callable[[Tensor], Tensor] = lambda gradient: gradient

    def __call__(self, *args: Any) -> Any:
        """With arguments that are prepared already."""
        return self.call(*args)


def prepared(fn: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments as ``fn`` takes them."""
    return fn.prepare(*args) if isinstance(fn, Peer) else args


def restored(fn: Callable[..., Any], gradients: Iterable[Tensor]) -> list[Tensor]:
    """Gradients of what ``prepared`` gave, as those of its arguments."""
    return [fn.restore(g) if isinstance(fn, Peer) else g for g in gradients]


def fresh(t: Any) -> Any:
    """A copy that may be written to, a leaf like ``t``."""
    return t.detach().clone().requires_grad_(t.requires_grad)


def load(names: Iterable[str]) -> tuple[dict[str, dict[str, Callable[..., Any]]], list[str]]:
    """Peers by case, named with their version; and a note for each library that is not there."""
    found: dict[str, dict[str, Callable[..., Any]]] = {}
    notes = []
    for name in names:
        try:
            adapter = importlib.import_module(f"{__name__}.{name}")
        except Exception as error:  # libraries look for GPUs, drivers and other libraries when they are imported
            notes.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        distribution = adapter.DISTRIBUTION
        version = f"{name} {importlib.metadata.version(distribution)}" if distribution else "eager"
        for op, fn in adapter.PEERS.items():
            found.setdefault(op, {})[version] = fn
    return found, notes
