"""One packed batch: examples one behind another on a single axis, each a segment with positions from 0.

Packing is the only layout: a (B, T) array is a batch of B segments. Whatever changes from step to step is a tensor,
whatever shapes and launches depend on is a host integer, and both hardly ever change: so a step can be a CUDA graph.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import tree
from .segments import Segments
from .tree import pytree, static

IGNORE = -100


@pytree
class Batch:
    """A packed batch of N tokens, M of them (after padding) with a target.

    ``tokens_N``, ``positions_N``: int64. ``segments``: the examples, then one filler segment without targets up to
    N, then empty ones. ``target_rows_M``: rows whose hidden state predicts a target, ascending, padding N;
    ``targets_M``: the token ids they predict, padding -100. ``count``: number of real targets, fp32 scalar.
    ``valid_N``: bool, false in the filler.
    ``max_position``: host bound, every position is smaller; the examples' own, which the filler's positions keep to.
    N and the number of segments are constant for a run, M is a multiple of N/8, the bounds are powers of two: so shapes
    hardly ever change.
    """

    tokens_N: Tensor
    positions_N: Tensor
    segments: Segments
    target_rows_M: Tensor
    targets_M: Tensor
    count: Tensor
    valid_N: Tensor
    max_position: int = static()

    @property
    def max_len(self) -> int:
        """Host bound on the length of a segment."""
        return self.segments.max_len

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device; the copy to a GPU is asynchronous."""
        device = torch.device(device)

        def move(t: Tensor) -> Tensor:
            if device.type == "cuda" and t.device.type == "cpu":
                return t.pin_memory().to(device, non_blocking=True)
            return t.to(device)

        return tree.map(move, self)

    @staticmethod
    def of(
        examples: Sequence[tuple[Any, Any]],
        *,
        vocab_size: int,
        tokens: int | None = None,
        segments: int | None = None,
    ) -> "Batch":
        """Pack examples, in this order, into one batch.

        Each example is (ids, trained): ``trained[i]`` says whether token i is a target (predicted from token i - 1
        of the same example; the first token never is); None trains all. ``tokens``: N, by default just enough;
        ``segments``: their static number, by default just enough. Raises ValueError for an id outside
        [0, vocab_size), an empty example, or what does not fit.
        """
        lengths = [len(ids) for ids, _ in examples]
        N = sum(lengths) if tokens is None else tokens
        if sum(lengths) > N or N < 1:
            raise ValueError(f"Batch: {sum(lengths)} tokens in {len(lengths)} examples, expected 1 to {N}")
        tokens_N, positions_N = np.zeros(N, np.int64), np.zeros(N, np.int64)
        trained_N = np.zeros(N, bool)
        cu = [0]
        for index, (ids, trained) in enumerate(examples):
            here, n = slice(cu[-1], cu[-1] + lengths[index]), lengths[index]
            ids = np.asarray(ids)
            check_ids(ids, vocab_size, f"Batch: example {index}")
            trained = np.ones(n, bool) if trained is None else np.asarray(trained, bool)
            if n == 0 or trained.shape != ids.shape:
                raise ValueError(
                    f"Batch: example {index} has ids of shape {ids.shape} and a mask of shape {trained.shape}, "
                    "expected equal lengths > 0"
                )
            tokens_N[here], positions_N[here], trained_N[here] = ids, np.arange(n), trained
            trained_N[here.start] = False  # nothing precedes it
            cu.append(here.stop)
        # By the examples alone: a rotation that depends on the longest sequence (longrope) must not feel the filler.
        farthest = _bound(max(lengths, default=1), N)
        if cu[-1] < N:
            positions_N[cu[-1] :] = np.arange(N - cu[-1]) % farthest
            cu.append(N)
        capacity = len(cu) - 1 if segments is None else segments
        if len(cu) - 1 > capacity:
            raise ValueError(f"Batch: {len(cu) - 1} segments with the filler, expected at most {capacity}")

        rows = np.flatnonzero(trained_N) - 1
        step = -(-N // 8)
        M = min(N, max(1, -(-len(rows) // step)) * step)
        rows_M, targets_M = np.full(M, N, np.int64), np.full(M, IGNORE, np.int64)
        rows_M[: len(rows)], targets_M[: len(rows)] = rows, tokens_N[rows + 1]
        cu_seqlens = torch.tensor(cu + [N] * (capacity + 1 - len(cu)), dtype=torch.int32)
        return Batch(
            tokens_N=torch.from_numpy(tokens_N),
            positions_N=torch.from_numpy(positions_N),
            segments=Segments.packed(cu_seqlens, max_len=_bound(int(max(np.diff(cu))), N)),
            target_rows_M=torch.from_numpy(rows_M),
            targets_M=torch.from_numpy(targets_M),
            count=torch.tensor(float(len(rows))),
            valid_N=torch.arange(N) < sum(lengths),
            max_position=farthest,
        )


def from_tokens(tokens_BT: Any, mask_BT: Any = None, *, vocab_size: int) -> Batch:
    """A (B, T) array of ids as a batch of B segments of T tokens.

    ``mask_BT``: which tokens are targets (default: all but the first of each row). Raises as :meth:`Batch.of` does.
    """
    tokens_BT = np.asarray(tokens_BT)
    mask_BT = np.ones(tokens_BT.shape, bool) if mask_BT is None else np.asarray(mask_BT, bool)
    if tokens_BT.ndim != 2 or mask_BT.shape != tokens_BT.shape:
        raise ValueError(
            f"from_tokens: shapes {tokens_BT.shape} and mask {mask_BT.shape}, expected (B, T) and the same"
        )
    return Batch.of(list(zip(tokens_BT, mask_BT, strict=True)), vocab_size=vocab_size)


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Raises ValueError unless ``ids`` is a list of integers in [0, vocab_size)."""
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise ValueError(f"{where}: ids are {ids.dtype} of shape {ids.shape}, expected a list of integers")
    if ids.size and not (0 <= ids.min() and ids.max() < vocab_size):
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise ValueError(f"{where}: token id {bad}, expected an id in [0, {vocab_size})")


def _bound(n: int, most: int) -> int:
    """A number of at least n that hardly ever changes."""
    return min(most, max(64, 1 << (n - 1).bit_length()))
