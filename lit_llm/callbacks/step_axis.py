"""One meaning of "step" for all metrics: the optimizer steps that the measured weights have behind them.

Lightning counts from zero and logs the validation after n steps at n - 1, where the training loss of step n stands too,
and results of `test` at 0. Here the start is 0, step n is n, and a tested checkpoint stands at its own step.
"""

from __future__ import annotations

from typing import Any

import lightning as L


class StepAxis(L.Callback):
    """Logs `step`, which Lightning takes as the x-axis of everything that is logged at the same time."""

    def __init__(self) -> None:
        self._loaded_step = 0

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        pl_module.log("step", float(trainer.global_step), batch_size=1)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_evaluated_step(trainer, pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._log_evaluated_step(trainer, pl_module)

    def _log_evaluated_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # trainer.global_step stays 0 in a process that only tests
        step = max(trainer.global_step, self._loaded_step)
        pl_module.log("step", float(step), batch_size=1, reduce_fx="max", sync_dist=True)
