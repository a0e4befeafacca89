"""Distributions of values of tokens, in TensorBoard."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger


class Histograms(L.Callback):
    """After a validation, writes the method's histograms to TensorBoard, as `tokens/NAME`.

    Reads of the method: `histograms`, name -> tensor of values on the CPU.
    """

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, values in pl_module.histograms.items():
                    if len(values):  # of none there is no histogram
                        logger.experiment.add_histogram(f"tokens/{name}", values, trainer.global_step)
