"""Stops a run whose loss or gradient is no longer a number, before the optimizer writes it into the weights."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn


class NonFiniteLoss(ValueError):
    """The training loss or its gradient is infinite or not a number."""


class NanGuard(L.Callback):
    """Raises `NonFiniteLoss` between the backward pass and the optimizer step.

    Losses of the micro-batches are kept on the device; they and the norm of the gradient are looked at together, with
    one wait for the device per optimizer step. The gradient is the same on all ranks of DDP, so that all of them stop. Of
    DeepSpeed's only the losses are looked at, those of all ranks.
    Under fp16 loss scaling only the loss is looked at: there, infinite gradients are normal and the scaler skips them.

    Reads `examples` of a batch, where it has them.

    Args:
        gradients: look at the gradient too, which costs one pass over it.
    """

    def __init__(self, gradients: bool = True) -> None:
        self.gradients = gradients
        self._losses: list[Tensor] = []
        self._examples: list[tuple[int, ...]] = []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._examples.append(tuple(getattr(batch, "examples", ())))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        losses, examples = self._losses, self._examples
        self._losses, self._examples = [], []
        if not losses:
            return
        values = torch.stack([loss.float() for loss in losses])
        total = values.sum()
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if self.gradients and not scaled:
            total = total + _gradient_norm(optimizer).to(total.device)
        if isinstance(
            trainer.strategy, DeepSpeedStrategy
        ):  # where no process has the gradient, and all must stop together
            total = trainer.strategy.reduce(total, reduce_op="sum")
        if not torch.isfinite(total):
            raise NonFiniteLoss(_message(trainer, values.tolist(), examples))


def _gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients).float() if gradients else torch.zeros(())


def _message(trainer: L.Trainer, losses: list[float], examples: list[tuple[int, ...]]) -> str:
    broken = [i for i, loss in enumerate(losses) if loss - loss != 0]  # inf - inf and nan - nan are not 0
    if broken:
        what = f"The training loss is {losses[broken[0]]}, which is not finite,"
    else:
        what = f"The gradient is not finite (the loss is: {', '.join(f'{loss:.4g}' for loss in losses)})"
    ids = sorted({example for i in broken or range(len(examples)) for example in examples[i]})
    terms = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}
    return (
        f"{what} at optimizer step {trainer.global_step + 1}; the weights are still those of step "
        f"{trainer.global_step}.\n"
        f"  Last terms: {', '.join(f'{name} {value:.4g}' for name, value in terms.items()) or 'none were logged'}.\n"
        f"  Lower the learning rate (optimization.lr), lengthen the warm-up or set trainer.gradient_clip_val."
        + (f"\n  If it comes again at this step, look at the training examples {_listed(ids)}." if ids else "")
    )


def _listed(ids: list[int], most: int = 32) -> str:
    return ", ".join(map(str, ids[:most])) + (f" and {len(ids) - most} more" if len(ids) > most else "")
