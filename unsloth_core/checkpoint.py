"""Checkpoints that are whole or absent: written under a temporary name, then renamed in one step.

A checkpoint is a folder ``step-00000030`` of ``state.safetensors`` (every tensor of a tree, by path) and
``state.json``. A kill or a full disk at any moment leaves the ones that were there before untouched.
"""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from . import tree
from .tree import Tree

_NAME = re.compile(r"step-(\d{8,})")


def save(folder: Path, step: int, state: Tree, facts: dict[str, Any], *, keep: int = 2) -> Path:
    """Write the checkpoint of ``step`` below ``folder`` and drop all but the newest ``keep``.

    Raises FileExistsError if there is one of that step, OSError (disk full, no permission) with the older checkpoints
    still in place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    if final.exists():
        raise FileExistsError(f"checkpoint {final} exists already: two runs in one folder?")
    temporary = folder / f".writing-{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        tensors = {path: t.detach().cpu().contiguous() for path, t in tree.items(state)}
        try:
            save_file(tensors, temporary / "state.safetensors")
        except SafetensorError as error:  # also for a full disk
            raise OSError(f"checkpoint {final} cannot be written: {error}") from None
        (temporary / "state.json").write_text(json.dumps({"step": step, **facts}, indent=2) + "\n")
        # safetensors makes files that only their owner reads; the other file's mode is what the user's umask says.
        shutil.copymode(temporary / "state.json", temporary / "state.safetensors")
        for written in (*temporary.iterdir(), temporary):
            _sync(written)
        os.rename(temporary, final)
        _sync(folder)  # the new name is on disk before older checkpoints go
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{old:08d}", ignore_errors=True)
    return final


def newest(folder: Path) -> Path | None:
    """The checkpoint with the highest step, or None."""
    steps = _steps(folder)
    return folder / f"step-{steps[-1]:08d}" if steps else None


def clear(folder: Path) -> None:
    """Drop all checkpoints below ``folder``, so that a kill midway leaves none that looks whole."""
    if folder.is_dir():
        aside = folder.with_name(f".dropped-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        shutil.rmtree(aside)


def facts(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors, and ``step``. Raises ValueError if it cannot be read."""
    try:
        found = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise ValueError(f"checkpoint {path} cannot be read: state.json has no step")
    return found


def load(path: Path, like: Tree) -> Tree:
    """A tree of ``like``'s structure, dtypes and devices. Raises ValueError where they disagree."""
    try:
        tensors = load_file(path / "state.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {path} cannot be read: {error}") from None
    expected = dict(tree.items(like))
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())
        raise ValueError(f"checkpoint {path} belongs to another run: {len(odd)} tensors differ, first {odd[0]!r}")

    def restore(where: str, t: torch.Tensor) -> torch.Tensor:
        found = tensors[where]
        if found.shape != t.shape or found.dtype != t.dtype:
            got, want = f"{found.dtype} {tuple(found.shape)}", f"{t.dtype} {tuple(t.shape)}"
            raise ValueError(f"checkpoint {path} belongs to another run: {where} is {got}, expected {want}")
        return found.to(t.device)

    return tree.map_with_path(restore, like)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name)))


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot, such as some remote ones
            raise
    finally:
        os.close(handle)
