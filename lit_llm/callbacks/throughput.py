"""How fast a run trains and how much memory it takes, measured without waiting for the device."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any

import lightning as L
import torch


class Throughput(L.Callback):
    """Logs speed over a sliding window of optimizer steps, and peak memory.

    The clock stands still from the start of a validation to the next training batch, so that neither evaluation nor
    generated answers nor checkpoints written after them count. On a GPU single steps are launched ahead of their
    execution; over a window the two keep pace.

    Reads of a batch: `num_tokens` (real tokens, prompts included, of this process), `step_tokens` (supervised tokens of
    the whole optimizer step over all processes), `examples`. Tokens and examples of other processes are taken to be as
    many as our own.

    Logs `throughput/tokens_per_second`, `throughput/supervised_tokens_per_second`, `throughput/examples_per_second`,
    `throughput/seconds_per_step` and `throughput/peak_memory_gb` (GiB; GPU: allocated by torch; CPU: largest resident
    size of the process).

    Args:
        window: optimizer steps that are averaged.
    """

    def __init__(self, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"Throughput.window is {window}; it counts optimizer steps and must be at least 1.")
        # seconds, tokens, supervised tokens, examples at the end of each optimizer step, since the start
        self._marks: deque[tuple[float, int, int, int]] = deque([(0.0, 0, 0, 0)], maxlen=window + 1)
        self._seconds = 0.0
        self._clock: float | None = None
        self._tokens = self._supervised = self._examples = 0
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._clock is None:
            self._clock = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read_clock()
        self._clock = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += batch.num_tokens * trainer.world_size
        self._examples += len(batch.examples) * trainer.world_size
        if trainer.global_step == self._step:  # accumulating
            return
        self._step = trainer.global_step
        self._supervised += batch.step_tokens
        self._read_clock()
        self._marks.append((self._seconds, self._tokens, self._supervised, self._examples))
        self._log(pl_module)

    def _read_clock(self) -> None:
        if self._clock is not None:
            now = time.perf_counter()
            self._seconds += now - self._clock
            self._clock = now

    def _log(self, pl_module: L.LightningModule) -> None:
        first, last = self._marks[0], self._marks[-1]
        seconds, tokens, supervised, examples = (after - before for before, after in zip(first, last, strict=True))
        seconds = max(seconds, 1e-9)
        values = {
            "supervised_tokens_per_second": supervised / seconds,
            "examples_per_second": examples / seconds,
            "seconds_per_step": seconds / (len(self._marks) - 1),
        }
        memory = peak_memory_gb(pl_module.device)
        if memory is not None:
            values["peak_memory_gb"] = memory
        # on the host: a copy to the device and back would wait for it
        pl_module.log("throughput/tokens_per_second", torch.tensor(tokens / seconds), prog_bar=True, batch_size=1)
        for name, value in values.items():
            pl_module.log(f"throughput/{name}", torch.tensor(value), batch_size=1)


def peak_memory_gb(device: torch.device) -> float | None:
    """Largest memory so far in GiB: what torch allocated on a GPU, or the resident size of the process.

    None on Windows, where Python cannot tell the latter.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes, but bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
