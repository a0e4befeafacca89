"""Learning-rate schedules over optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Callable


def learning_rate_factor(settings, *, peak: float, total_steps: float) -> Callable[[int], float]:
    """The factor on `peak` at an optimizer step, for `LambdaLR`.

    Args:
        settings: schedule, warmup_steps, warmup_ratio, final_lr (see `Optimization`).
        peak: learning rate of the parameter group; `final_lr` is the same absolute floor for all groups.
        total_steps: optimizer steps of the whole run.

    Raises:
        ValueError: a decaying schedule without a known end, or a warm-up longer than the run.
    """
    if settings.schedule != "constant" and not math.isfinite(total_steps):
        raise ValueError(
            f"optimization.schedule is {settings.schedule!r}, which needs a known number of steps, but neither "
            "trainer.max_steps nor trainer.max_epochs ends the run. Set one, or schedule: constant."
        )
    warmup = settings.warmup_steps or (round(settings.warmup_ratio * total_steps) if settings.warmup_ratio else 0)
    if warmup >= total_steps:
        raise ValueError(
            f"The warm-up of {warmup} steps is as long as the run of {total_steps:.0f} steps. "
            "Lower optimization.warmup_steps or raise trainer.max_steps."
        )
    floor = min(settings.final_lr / peak, 1.0)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if settings.schedule == "constant":
            return 1.0
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        decay = 0.5 * (1 + math.cos(math.pi * progress)) if settings.schedule == "cosine" else 1 - progress
        return floor + (1 - floor) * decay

    return factor
