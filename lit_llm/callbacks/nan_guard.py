"""Stops a run whose loss or gradient is no longer a number, before the optimizer writes it into the weights."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_llm.storage import complete_file

FOLDER = "non_finite"


class NonFiniteLoss(ValueError):
    """The training loss or its gradient is infinite or not a number."""


@dataclass
class NonFinite:
    """What becomes of an optimizer step whose loss or gradient is infinite or not a number.

    Its batch is kept in the run folder either way, `non_finite/step-N.pt`.

    Args:
        action: `stop` the run, or `skip` the step: it counts, and leaves weights and optimizer as they were.
        most: skipped steps of a run, after which it stops all the same; and batches that are kept.
    """

    action: Literal["stop", "skip"] = "stop"
    most: int = 10

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"non_finite.most is {self.most}; it counts steps and must be at least 1.")
        if self.action == "stop" and self.most != type(self).most:
            raise ValueError(
                f"non_finite.most is {self.most}, but non_finite.action is 'stop', which ends at the first one. Set "
                f"non_finite.action: skip, or leave it out."
            )


class NanGuard(L.Callback):
    """Between the backward pass and the optimizer step, raises `NonFiniteLoss`, or skips the step.

    Losses of the micro-batches are kept on the device; they and the norm of the gradient are looked at together, with
    one wait for the device per optimizer step. Several processes decide together. Under ZeRO, where no process has the whole
    gradient, only the loss is looked at; so it is under fp16 loss scaling, where infinite gradients are normal and the scaler
    skips them.

    The micro-batches of a broken step are kept for `torch.load(file, weights_only=True)`: {"step", "losses", "batches"}, a
    batch as a dictionary of its fields; of several processes each keeps its own. Logs `train/skipped_steps`, how many so far,
    where steps may be skipped.

    Reads `examples` of a batch, where it has them, `run_folder` and `step_sums` of the method.

    Args:
        gradients: look at the gradient too, which costs one pass over it.
        non_finite: what is done.
    """

    def __init__(self, gradients: bool = True, non_finite: NonFinite | None = None) -> None:
        self.gradients, self.non_finite = gradients, non_finite or NonFinite()
        self._losses: list[Tensor] = []
        self._batches: list[Any] = []
        self._skipped = 0
        self._folder: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._folder = pl_module.run_folder / FOLDER  # on every rank: finding the folder may communicate
        if self.non_finite.action == "skip" and isinstance(trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                f"non_finite.action is 'skip', but under {type(trainer.strategy).__name__} gradients are DeepSpeed's, which cannot be "
                f"left out of a step here. Leave non_finite out, so that the run stops, or train under ddp."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._skipped = state["skipped"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.automatic_optimization:  # else no optimizer step may come that would let them go
            self._batches.append(batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        losses, batches = self._losses, self._batches
        self._losses, self._batches = [], []
        if not losses:
            return
        values = torch.stack([loss.float() for loss in losses])
        total = values.sum()
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if self.gradients and not scaled:
            total = total + _gradient_norm(optimizer).to(total.device)
        finite = bool(torch.isfinite(total))
        if trainer.world_size > 1:
            finite = trainer.strategy.reduce_boolean_decision(finite, all=True)
        if finite:
            self._log(pl_module)
            return
        kept = self._keep(trainer, values.tolist(), batches)
        examples = [tuple(getattr(batch, "examples", ())) for batch in batches]
        message = _message(trainer, values.tolist(), examples, pl_module.step_sums.here())
        self._skipped += 1
        if self.non_finite.action == "stop" or self._skipped > self.non_finite.most:
            raise NonFiniteLoss(f"{message}{self._way_on()}{kept}")
        if not scaled:  # the scaler skips by itself, and wants to see the gradient
            optimizer.zero_grad(set_to_none=True)
        rank_zero_warn(f"{message}\n  The step is skipped, {self._skipped} of at most {self.non_finite.most}.{kept}")
        self._log(pl_module)

    def _log(self, pl_module: L.LightningModule) -> None:
        if self.non_finite.action == "skip":
            pl_module.log("train/skipped_steps", float(self._skipped), batch_size=1)

    def _keep(self, trainer: L.Trainer, losses: list[float], batches: list[Any]) -> str:
        """Write the batch, and say where."""
        if self._skipped >= self.non_finite.most:
            return ""
        step, rank = trainer.global_step + 1, f"-rank-{trainer.global_rank}" if trainer.world_size > 1 else ""
        file = self._folder / f"step-{step}{rank}.pt"
        with complete_file(file) as partial:
            torch.save({"step": step, "losses": losses, "batches": [_plain(batch) for batch in batches]}, partial)
        return f"\n  The batch is in {file}: torch.load(FILE, weights_only=True)."

    def _way_on(self) -> str:
        if self.non_finite.action == "skip":
            return f"\n  {self.non_finite.most} steps were skipped before (non_finite.most)."
        return "\n  non_finite.action: skip leaves such steps out."


def _plain(value: Any) -> Any:
    """A batch as dictionaries, tuples, numbers and tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).float()  # under FSDP each process has a part


def _message(trainer: L.Trainer, losses: list[float], examples: list[tuple[int, ...]], terms: dict[str, float]) -> str:
    broken = [i for i, loss in enumerate(losses) if loss - loss != 0]  # inf - inf and nan - nan are not 0
    if broken:
        what = f"The training loss is {losses[broken[0]]}, which is not finite,"
    else:
        what = f"The gradient is not finite (the loss is: {', '.join(f'{loss:.4g}' for loss in losses)})"
    ids = sorted({example for i in broken or range(len(examples)) for example in examples[i]})
    return (
        f"{what} at optimizer step {trainer.global_step + 1}; the weights are still those of step "
        f"{trainer.global_step}.\n"
        f"  Terms of the step: {', '.join(f'train/{name} {value:.4g}' for name, value in terms.items()) or 'none were logged'}.\n"
        f"  Lower the learning rate (optimization.lr), lengthen the warm-up or set trainer.gradient_clip_val."
        + (f"\n  If it comes again at this step, look at the training examples {_listed(ids)}." if ids else "")
    )


def _listed(ids: list[int], most: int = 32) -> str:
    return ", ".join(map(str, ids[:most])) + (f" and {len(ids) - most} more" if len(ids) > most else "")
