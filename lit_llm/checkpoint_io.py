"""Checkpoints that are written straight to their file, and how those of any strategy are read."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_llm.storage import complete_file
from lit_llm.zero_checkpoint import is_zero_checkpoint, read_states, read_weights


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to its file piece by piece; the file takes its final name when it is complete.

    Lightning forms the whole checkpoint in memory first: with AdamW three times the trained weights, on top of what the run
    holds. Paths that are no local ones are left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with complete_file(Path(path)) as partial, partial.open("wb") as file:  # a name would lose what the disk says
            torch.save(checkpoint, file)


def read_checkpoint(path: Path, weights: bool = False, verify: bool = False) -> dict[str, Any]:
    """A checkpoint of ours, its tensors left on the disk; nothing in it is run.

    Args:
        path: a file, or a folder that `ZeroStrategy` wrote.
        weights: of a folder too, whose parts are put together in memory; a file has them in any case.
        verify: read all of a file once and compare it with its check sums.

    Raises:
        ValueError: cut off, damaged, or written by something else.
    """
    if path.is_dir():
        if not is_zero_checkpoint(path):
            raise ValueError(
                f"--ckpt_path {path} is a folder, but not one that ZeroStrategy wrote. Name a checkpoint within it."
            )
        return {**read_states(path), "state_dict": read_weights(path)} if weights else read_states(path)
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"--ckpt_path {path} is not a whole checkpoint ({path.stat().st_size:,} bytes; the end is missing).\n"
            f"  Take another file of {path.parent}, or start anew."
        )
    if verify and (damaged := _damaged(path)) is not None:
        raise ValueError(
            f"--ckpt_path {path} is damaged: what it holds is not what was written ({damaged}).\n  Take another file of "
            f"{path.parent}, or start anew."
        )
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        said = str(error).split("\n")[0][:200]
        raise ValueError(
            f"--ckpt_path {path} cannot be read as a checkpoint: {said}\n  Take another file of {path.parent}, or start anew."
        ) from error
    if not isinstance(found, dict) or not {"lit_llm", "state_dict"} <= found.keys():
        raise ValueError(
            f"--ckpt_path {path}: the checkpoint was not written by lit_llm (it has no 'lit_llm' entry).\n  Name one from a "
            f"run's checkpoints folder, or load other weights with model.student.source."
        )
    return found


def _damaged(path: Path) -> str | None:
    """The first part of a checkpoint that differs from its check sum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip()
    # what a flipped bit of a header leads to
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OSError) as error:
        return str(error) or type(error).__name__


def stream_checkpoints(trainer: Trainer) -> None:
    """Let a trainer write its checkpoints so, unless its strategy or its config has its own way of writing them."""
    strategy = trainer.strategy
    # strategies that divide a model write their parts themselves, and refuse a plugin
    if type(strategy) in (SingleDeviceStrategy, DDPStrategy) and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = StreamedCheckpointIO()
