"""Checkpoints that are written straight to their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lit_llm.storage import complete_file


class StreamedCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to its file piece by piece; the file takes its final name when it is complete.

    Lightning forms the whole checkpoint in memory first: with AdamW three times the trained weights, on top of what the run
    holds. Paths that are no local ones are left to it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with complete_file(Path(path)) as partial:
            torch.save(checkpoint, partial)


def stream_checkpoints(trainer: Trainer) -> None:
    """Let a trainer write its checkpoints so, unless its strategy or its config has its own way of writing them."""
    strategy = trainer.strategy
    # strategies that divide a model write their parts themselves, and refuse a plugin
    if type(strategy) in (SingleDeviceStrategy, DDPStrategy) and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = StreamedCheckpointIO()
