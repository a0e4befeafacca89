"""How fast a run trains and how much memory it takes, measured without waiting for the device."""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch.utils.flop_counter import FlopCounterMode


class _Totals(NamedTuple):
    """Since the start of the process."""

    seconds: float = 0.0
    tokens: int = 0
    supervised: int = 0
    examples: int = 0
    waited: float = 0.0


class Throughput(L.Callback):
    """Logs speed over a sliding window of optimizer steps, and peak memory.

    The clock stands still from the start of a validation to the next training batch, so that neither evaluation nor
    generated answers nor checkpoints written after them count. On a GPU single steps are launched ahead of their
    execution; over a window the two keep pace.

    Reads of a batch: `num_tokens` (real tokens, prompts included, of this process), `step_tokens` (supervised tokens of
    the whole optimizer step over all processes), `examples`. Tokens and examples of other processes are taken to be as
    many as our own. Reads of the data loader, where it has it: `seconds_waited`.

    Logs, as `throughput/NAME`:

    - `tokens_per_second`, `supervised_tokens_per_second`, `examples_per_second`, `seconds_per_step`;
    - `data_wait_share`: of the time, how much the process waited until the data loader had a batch;
    - `hours_left`, at the pace of this process so far with its validations, where the number of steps is known;
    - `peak_memory_gb` (GiB; GPU: allocated by torch; CPU: largest resident size of the process);
    - `model_flops_utilisation`, where the peak of the device in the precision of the run is known to Lightning (its data
      sheet, dense matrix products): the matrix products that the second optimizer step of the process calls for, by torch's
      counter, per token, times tokens per second, by the peak of all processes. What gradient checkpointing computes twice
      is counted twice. On a CPU and on unknown devices it is left out.

    Args:
        window: optimizer steps that are averaged.
    """

    def __init__(self, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"Throughput.window is {window}; it counts optimizer steps and must be at least 1.")
        # at the end of each optimizer step
        self._marks: deque[_Totals] = deque([_Totals()], maxlen=window + 1)
        self._now = _Totals()
        self._clock: float | None = None
        self._waited_at = 0.0
        self._step = self._first_step = 0
        self._total: int | None = None
        self._began = 0.0
        self._flops = _StepFlops()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = self._first_step = trainer.global_step
        steps = trainer.estimated_stepping_batches
        self._total = None if steps == float("inf") else int(steps)
        self._flops.peak = _peak_flops(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._began = self._began or time.monotonic()
        if self._clock is None:
            self._clock = time.perf_counter()
            self._waited_at = _seconds_waited(trainer) or 0.0
        if trainer.global_step == self._first_step + 1:  # what is compiled is compiled in the first
            self._flops.begin()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._read_clock(trainer)
        self._clock = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._flops.end(batch.num_tokens)
        self._now = self._now._replace(
            tokens=self._now.tokens + batch.num_tokens * trainer.world_size,
            examples=self._now.examples + len(batch.examples) * trainer.world_size,
        )
        if trainer.global_step == self._step:  # accumulating
            return
        self._step = trainer.global_step
        self._now = self._now._replace(supervised=self._now.supervised + batch.step_tokens)
        self._read_clock(trainer)
        self._marks.append(self._now)
        self._log(trainer, pl_module)

    def on_exception(self, *_: Any) -> None:
        self._flops.end(0)

    def _read_clock(self, trainer: L.Trainer) -> None:
        if self._clock is not None:
            now, waited = time.perf_counter(), _seconds_waited(trainer) or 0.0
            seconds, share = self._now.seconds + now - self._clock, self._now.waited + waited - self._waited_at
            self._now = self._now._replace(seconds=seconds, waited=share)
            self._clock, self._waited_at = now, waited

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        window = _Totals(*(after - before for before, after in zip(self._marks[0], self._marks[-1], strict=True)))
        seconds = max(window.seconds, 1e-9)
        values = {
            "supervised_tokens_per_second": window.supervised / seconds,
            "examples_per_second": window.examples / seconds,
            "seconds_per_step": seconds / (len(self._marks) - 1),
            "data_wait_share": None if _seconds_waited(trainer) is None else window.waited / seconds,
            "hours_left": self._hours_left(),
            "model_flops_utilisation": self._flops.utilisation(window.tokens / seconds / trainer.world_size),
            "peak_memory_gb": peak_memory_gb(pl_module.device),
        }
        # on the host: a copy to the device and back would wait for it
        speed = torch.tensor(window.tokens / seconds)
        pl_module.log("throughput/tokens_per_second", speed, prog_bar=True, batch_size=1)
        for name, value in values.items():
            if value is not None:
                pl_module.log(f"throughput/{name}", torch.tensor(value), batch_size=1)

    def _hours_left(self) -> float | None:
        if self._total is None:
            return None
        per_step = (time.monotonic() - self._began) / (self._step - self._first_step)
        return max(self._total - self._step, 0) * per_step / 3600


class _StepFlops:
    """Matrix products of one optimizer step, counted where the device's peak is known.

    Attributes:
        peak: FLOPs per second of the device; None: unknown, and nothing is counted.
    """

    def __init__(self) -> None:
        self.peak: float | None = None
        self._counter: FlopCounterMode | None = None
        self._counted = self._tokens = 0

    def begin(self) -> None:
        if self.peak is not None:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def end(self, tokens: int) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._counted, self._tokens = self._counted + self._counter.get_total_flops(), self._tokens + tokens
            self._counter = None

    def utilisation(self, tokens_per_second: float) -> float | None:
        if not self._tokens:
            return None
        return self._counted / self._tokens * tokens_per_second / self.peak


def _peak_flops(trainer: L.Trainer, pl_module: L.LightningModule) -> float | None:
    """Of the device, in the precision of the matrix products."""
    if pl_module.device.type != "cuda":
        return None
    trained = next((p.dtype for p in pl_module.parameters() if p.requires_grad), torch.float32)
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return get_available_flops(pl_module.device, mixed.get(str(trainer.precision), trained))


def _seconds_waited(trainer: L.Trainer) -> float | None:
    return getattr(trainer.train_dataloader, "seconds_waited", None)


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
