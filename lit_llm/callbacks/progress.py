"""One line that tells how a run is going: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info

_REFRESH_SECONDS = 0.5
_PLAIN_LINES = 50
_TELL_WAITING = 0.1


class Progress(TQDMProgressBar):
    """Shows optimizer steps of the whole run, time left, tokens per second, loss and its terms.

    Where more than a tenth of the time goes into waiting for data, it says so.

    On a terminal this is a bar that is redrawn at most twice a second, because reading a metric waits for the device.
    Where the output is not a terminal (a log file, a cluster), it is a plain line through logging every few steps.
    Validation results get a line of their own.

    Args:
        terms: names of training metrics that are shown where the method logs them, in this order, without `train/`;
            those logged with `prog_bar=True` follow.
        every_n_steps: optimizer steps between plain lines. None: about 50 lines a run.
    """

    BAR_FORMAT = "{desc} {bar:20} {n_fmt}/{total_fmt}{postfix}"

    def __init__(
        self,
        terms: tuple[str, ...] = (
            "loss",
            "ce",
            "kd",
            "t2s_ce",
            "t2s_kd",
            "s2t_kd",
            "lm",
            "balance",
            "lpr",
            "classifier",
        ),
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"Progress.every_n_steps is {every_n_steps}; it must be at least 1.")
        self.terms, self.every_n_steps = terms, every_n_steps
        self._total: int | None = None
        self._first_step = self._shown_step = 0
        self._began = self._drawn = 0.0

    @property
    def is_terminal(self) -> bool:
        return sys.stdout.isatty()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not self.is_terminal:
            self.disable()

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        steps = trainer.estimated_stepping_batches
        self._total = None if steps == float("inf") else int(steps)
        self._first_step = self._shown_step = trainer.global_step
        self._began = 0.0
        self.train_progress_bar = self.init_train_tqdm()
        self.train_progress_bar.total = self._total
        self.train_progress_bar.n = self._first_step

    def on_train_epoch_start(self, *_: Any) -> None:
        """The bar runs over the whole training, not over an epoch."""

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = self._began or time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._shown_step:
            return
        if self.is_terminal:
            if time.monotonic() - self._drawn > _REFRESH_SECONDS or step == self._total:
                self._draw(trainer, step)
        elif step % self._interval() == 0 or step in (self._first_step + 1, self._total):
            self._shown_step = step
            total = "" if self._total is None else f"/{self._total}"
            rank_zero_info(f"step {step}{total}: {self._text(trainer, step)}")

    def on_train_epoch_end(self, *_: Any) -> None:
        """See on_train_epoch_start."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._draw(trainer, trainer.global_step)
        results = _without_prefix(trainer.callback_metrics, "val/")
        results = {name: value for name, value in results.items() if not name.startswith(("teacher_", "routing/"))}
        if not results:
            return
        line = f"step {trainer.global_step}, validation: " + _joined(results)
        if self.is_terminal:
            self.print(line)
        else:
            rank_zero_info(line)

    def get_metrics(self, *_: Any) -> dict[str, Any]:
        """None in Lightning's words; see `_text`."""
        return {}

    def _draw(self, trainer: L.Trainer, step: int) -> None:
        self._drawn, self._shown_step = time.monotonic(), step
        bar = self.train_progress_bar
        if not bar.disable:
            bar.n = step
            bar.set_postfix_str(self._text(trainer, step))

    def _interval(self) -> int:
        if self.every_n_steps is not None:
            return self.every_n_steps
        return 100 if self._total is None else max(1, self._total // _PLAIN_LINES)

    def _text(self, trainer: L.Trainer, step: int) -> str:
        """What a narrow terminal may cut off comes last."""
        parts = []
        if self._total is not None and step > self._first_step:
            seconds_per_step = (time.monotonic() - self._began) / (step - self._first_step)
            parts.append(f"{_clock((self._total - step) * seconds_per_step)} left")
        if (speed := trainer.progress_bar_metrics.get("throughput/tokens_per_second")) is not None:
            parts.append(f"{speed:,.0f} tokens/s")
        if (waited := float(trainer.callback_metrics.get("throughput/data_wait_share", 0.0))) > _TELL_WAITING:
            parts.append(f"{waited:.0%} waiting for data")
        metrics = _without_prefix(trainer.callback_metrics, "train/")
        shown = {name: metrics[name] for name in self.terms if name in metrics}
        shown |= _without_prefix(trainer.progress_bar_metrics, "train/")
        return ", ".join([*parts, _joined(shown)] if shown else parts)


def _without_prefix(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    return {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name.startswith(prefix)}


def _joined(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
