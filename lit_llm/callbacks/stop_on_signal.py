"""A run that is asked to end: it ends between two optimizer steps, with a checkpoint of the last one."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopOnSignal(L.Callback):
    """SIGTERM and SIGUSR1 let the optimizer step be finished, write `last.ckpt` and end the process with 128 + their number.

    That is 143 for SIGTERM and 138 for SIGUSR1, which SLURM sends with `--signal=USR1@SECONDS`. Before the first step and
    after the last there is nothing to be saved, and the process ends at once; so it does at the second signal. A signal to one
    process of several ends all of them, after the same step.

    Lightning by itself stops between two micro-batches, writes nothing and ends with status 0; under SLURM it writes into the
    current folder from within the signal, which may be in the middle of a step. Its handlers are replaced while it trains.
    """

    def __init__(self) -> None:
        self._trainer: L.Trainer | None = None
        self._signal = 0
        self._saved = self._training = False
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer, self._signal, self._saved, self._training = trainer, 0, False, False
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for (
                number
            ) in STOPPING:  # after Lightning, which has noted what was there before and puts it back at the end
                signal.signal(number, self._asked)
        if trainer.received_sigterm:
            self._leave(signal.SIGTERM)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._leave_if_saved()
        self._training = True

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave_if_saved()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.automatic_optimization and trainer.global_step == self._step:  # accumulating
            return
        self._step = trainer.global_step
        others = trainer.world_size > 1
        if others and not trainer.strategy.reduce_boolean_decision(not self._signal, all=True):
            self._signal = self._signal or signal.SIGTERM  # another process was asked
            self._save(trainer)
        elif self._signal and not others:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._training = False

    def _save(self, trainer: L.Trainer) -> None:
        """The step's numbers are logged after this hook, so the process ends a little later."""
        checkpoints = trainer.checkpoint_callback
        self._saved = True
        if checkpoints is None:
            rank_zero_info("The run writes no checkpoints (trainer.enable_checkpointing), so this stop saves none.")
            return
        path = str(Path(checkpoints.dirpath) / "last.ckpt")
        checkpoints.last_model_path = path
        trainer.save_checkpoint(path)
        rank_zero_info(f"Step {trainer.global_step} is saved in {path}. Continue with --ckpt_path last.")

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self._signal or not self._training:
            self._leave(number)
        self._signal = number
        # logging could be in the middle of a line of its own
        os.write(2, f"\n{signal.Signals(number).name}: ends after this optimizer step, with a checkpoint.\n".encode())

    def _leave_if_saved(self) -> None:
        if self._saved:
            self._leave(self._signal)

    def _leave(self, number: int) -> None:
        self._training = False
        strategy = self._trainer.strategy
        environment = getattr(strategy, "cluster_environment", None)
        if environment is not None and not environment.creates_processes_externally:
            if not self._saved and strategy.launcher is not None and hasattr(strategy.launcher, "kill"):
                strategy.launcher.kill(number)
            if self._trainer.local_rank > 0:  # Lightning's launcher kills the first process if another status is not 0
                raise SIGTERMException(0)
        raise SIGTERMException(128 + number)
