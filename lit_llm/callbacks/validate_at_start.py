"""A whole validation of the untrained student, so that every curve begins with where the run began."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.loops.utilities import _reset_progress
from lightning.pytorch.utilities.seed import isolate_rng


class ValidateAtStart(L.Callback):
    """Runs one validation before the first step of a new run, logged at step 0. A resumed run has had it.

    Lightning's own sanity check discards its metrics and sees two batches. This runs the same loop in full, inside
    `fit`, and leaves no trace for training: generators of random numbers and the loop's counters are put back.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        epoch_loop = trainer.fit_loop.epoch_loop
        if epoch_loop.batch_progress.total.ready > 0 or not trainer.enable_validation:
            return
        trainer.validating = True
        with isolate_rng():
            epoch_loop.val_loop.run()
        _reset_progress(epoch_loop.val_loop)
        trainer.training = True
        trainer._logger_connector._first_loop_iter = None
