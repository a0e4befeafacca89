"""FSDP2 for methods with several models: weights divided among processes by torch alone, checkpoints that are single files."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_llm.checkpoint_io import StreamedCheckpointIO
from lit_llm.models.fully_sharded import Step, divide, part_of, whole
from lit_llm.models.language_model import LanguageModel
from lit_llm.models.surgery import layer_stack
from lit_llm.whole_evaluation import WholeEvaluation

_MINUTES = 30


class FsdpStrategy(WholeEvaluation, ModelParallelStrategy):
    """Lightning's FSDP2 strategy, for several models.

    What is trained is divided among all processes: weights, gradients, optimizer states. A decoder layer is gathered when it
    runs; embeddings, head, final norm and projectors once a micro-batch. Frozen models beside it are in no checkpoint, and whole
    on every process unless they are divided too. Models are built whole in main memory, each process for itself, and divided afterwards. During
    evaluation and while answers are sampled every process holds all weights, so that processes may have different numbers of
    batches and tokens.

    Checkpoints are the single files of DDP, so a run may go on with another number of processes, and under DDP. With
    `accelerator: cpu` it runs in plain processes with gloo.

    Args:
        divide_frozen: keep a part of each decoder layer of the frozen models on each process, see `models.divided_frozen`.
        timeout: minutes after which processes stop waiting for each other.
    """

    def __init__(self, divide_frozen: bool = False, timeout: int = _MINUTES) -> None:
        super().__init__(
            save_distributed_checkpoint=False, divide_frozen=divide_frozen, timeout=timedelta(minutes=timeout)
        )
        self.checkpoint_io = StreamedCheckpointIO()
        self._step: Step | None = None

    # ------------------------------------------------------------------ start

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        fits = trainer.state.fn == TrainerFn.FITTING
        if divides := fits and self._step is None:
            self.lightning_module.check_divided(weights=True, frozen=self.divide_frozen, norms=True)
        self.divide_frozen_models(self.device_mesh["data_parallel"])
        if divides:
            self._divide()
        self.model_to_device()
        self.barrier()
        if fits:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if fits:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _divide(self) -> None:
        module = self.lightning_module
        models = [part for part in module.modules() if isinstance(part, LanguageModel)]
        layers = [layer for model in models for layer in layer_stack(model.transformer)]
        self._step = divide(module, layers, self.device_mesh["data_parallel"])

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with self.precision_plugin.train_step_context():
            return self._step(*args, **kwargs)

    # ------------------------------------------------------------ checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """All weights in the first process, none in the others."""
        return self._first(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """That of DDP in the first process, without tensors in the others."""
        state = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return {**state, "state": {index: self._first(moments) for index, moments in state["state"].items()}}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        state = {name: part_of(value, own.get(name, value)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                index: {
                    name: part_of(value, parameters[index]) if _is_like(value, parameters[index]) else value
                    for name, value in moments.items()
                }
                for index, moments in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})
            _optimizers_to_device([optimizer], self.root_device)

    def _first(self, tensors: dict[str, Any]) -> dict[str, Any]:
        found = {}
        for name, value in tensors.items():  # every process takes part in each
            value = whole(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                found[name] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        return found


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
