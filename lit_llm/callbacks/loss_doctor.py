"""Does every term of the loss pull? Size and gradient norm of each, measured now and then beside the training."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

_SMALL = 0.01


class LossDoctor(L.Callback):
    """Before the first step and then every few, measures each weighted term of the loss on one micro-batch.

    Logs at the step whose weights were measured: `doctor/TERM` (weighted size), `doctor/TERM_grad_norm` (norm of its own
    gradient on the student) and `doctor/TERM_projector_grad_norm` (on what else is trained), the latter two where the
    gradient reaches. Warns once when one term is below 1% of another, by size or by gradient on the student.

    A measurement costs about as much time as one step per term and, for a moment, the memory of one more set of
    gradients; other steps cost nothing. Dropout is that of the step itself. Weights, gradients and generators of random
    numbers stay as they are, so a run with the doctor ends with the same weights as one without. Only the first process
    measures, its own micro-batch.

    Reads of the method: `loss_terms(batch)`, name -> function that gives the differentiable term, and `student`.

    Args:
        every_n_steps: optimizer steps between measurements; 0: only before the first step.

    Raises:
        ValueError: a negative number of steps, or a strategy that divides the weights among processes.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 0:
            raise ValueError(f"LossDoctor.every_n_steps is {every_n_steps}; it counts optimizer steps, 0 or more.")
        self.every_n_steps = every_n_steps
        self._measured_step: int | None = None
        self._has_warned = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        if stage == "fit" and (not whole or isinstance(trainer.strategy, DeepSpeedStrategy)):
            raise ValueError(
                f"LossDoctor runs the student by itself, but trainer.strategy is {type(trainer.strategy).__name__}, which "
                "divides its weights among processes. Take LossDoctor out of trainer.callbacks, or use one device or ddp."
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step == 0 or (self.every_n_steps > 0 and step % self.every_n_steps == 0)
        # the first micro-batch of a step only
        if not due or step == self._measured_step:
            return
        self._measured_step = step
        if trainer.is_global_zero:
            sizes, norms, other_norms = _measure(trainer, pl_module, batch)
            _log(trainer, sizes, norms, other_norms)
            self._warn(step, sizes, norms)

    def _warn(self, step: int, sizes: dict[str, float], norms: dict[str, float]) -> None:
        found = [
            text for what, values in (("size", sizes), ("gradient norm", norms)) if (text := _imbalance(what, values))
        ]
        if not found or self._has_warned:
            return
        self._has_warned = True
        rank_zero_warn(
            f"LossDoctor at step {step}: {'; '.join(found)}.\n"
            "  The weaker term hardly trains anything beside the other. Shift the weights (model.kd_weight, "
            "model.divergence.temperature), leave the term out if it is not wanted (projectors.spaces), or look at "
            "doctor/* in metrics.csv whether it grows by itself."
        )


def _measure(
    trainer: L.Trainer, method: L.LightningModule, batch: Any
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Size, norm of the gradient on the student, and on everything else that is trained, by term."""
    student = [parameter for parameter in method.student.parameters() if parameter.requires_grad]
    inside = set(map(id, student))
    others = [p for p in method.parameters() if p.requires_grad and id(p) not in inside]
    sizes, norms, other_norms = {}, {}, {}
    with isolate_rng(), trainer.precision_plugin.train_step_context():
        terms = method.loss_terms(batch)
    for name, term in terms.items():
        with isolate_rng(), trainer.precision_plugin.train_step_context():
            value = term()
        gradients = torch.autograd.grad(value, [*student, *others], allow_unused=True)
        sizes[name] = value.detach()
        for kept, part in ((norms, gradients[: len(student)]), (other_norms, gradients[len(student) :])):
            if reached := [gradient for gradient in part if gradient is not None]:
                kept[name] = nn.utils.get_total_norm(reached)
        del gradients, value
    return _numbers(sizes), _numbers(norms), _numbers(other_norms)


def _numbers(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _log(trainer: L.Trainer, sizes: dict[str, float], norms: dict[str, float], other_norms: dict[str, float]) -> None:
    metrics = {f"doctor/{name}": value for name, value in sizes.items()}
    metrics |= {f"doctor/{name}_grad_norm": value for name, value in norms.items()}
    metrics |= {f"doctor/{name}_projector_grad_norm": value for name, value in other_norms.items()}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)


def _imbalance(what: str, values: dict[str, float]) -> str | None:
    """In words, the smallest of several values where it is below 1% of the largest."""
    if len(values) < 2:
        return None
    small, large = min(values, key=lambda name: abs(values[name])), max(values, key=lambda name: abs(values[name]))
    if abs(values[small]) >= _SMALL * abs(values[large]):
        return None
    share = abs(values[small]) / abs(values[large])
    return f"the {what} of {small} is {values[small]:.3g}, {100 * share:.2g}% of that of {large}, {values[large]:.3g}"
