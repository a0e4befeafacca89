"""What a method keeps of an evaluation, as lines of a file of the run folder."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from lit_llm.callbacks.append_only import append_lines, keep_lines


class EvaluationLines(L.Callback, ABC):
    """After a validation or test, appends to a file what the method kept of it, and shows it in TensorBoard.

    A line is a JSON object that begins with {"step", "stage" ("val" or "test")}. A resumed run drops the lines of later
    steps first. Nothing kept: no line, and no file.

    Reads of the method: `run_folder`, and what a subclass names.
    """

    file_name: ClassVar[str]

    def __init__(self) -> None:
        self._loaded_step = 0

    @abstractmethod
    def lines(self, pl_module: L.LightningModule) -> list[dict[str, Any]]:
        """What is to be written, without step and stage."""

    def show(self, experiment, pl_module: L.LightningModule, stage: str, step: int) -> None:
        """Show it in TensorBoard, through a SummaryWriter."""

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = pl_module.run_folder / self.file_name  # on every rank: finding the folder may communicate
        if trainer.is_global_zero:
            resumed_at = trainer.global_step
            keep_lines(path, lambda line: resumed_at > 0 and json.loads(line)["step"] <= resumed_at)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        path = pl_module.run_folder / self.file_name  # on every rank, as above
        if not trainer.is_global_zero or not (lines := self.lines(pl_module)):
            return
        # trainer.global_step stays 0 in a process that only tests
        step = max(trainer.global_step, self._loaded_step)
        written = [json.dumps({"step": step, "stage": stage, **line}, ensure_ascii=False) + "\n" for line in lines]
        append_lines(path, "".join(written))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                self.show(logger.experiment, pl_module, stage, step)
