"""DeepSpeed's ZeRO (arXiv 1910.02054) for methods with several models, on GPUs, and on a CPU to try it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from lit_llm.checkpoint_io import read_checkpoint
from lit_llm.models.language_model import Frozen
from lit_llm.models.sharding import remember_offload
from lit_llm.storage import replace_folder
from lit_llm.whole_evaluation import WholeEvaluation
from lit_llm.zero_checkpoint import check_processes, tensors_only

_MINUTES = 30


class ZeroStrategy(WholeEvaluation, DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, for several models and for checkpoints that are whole or absent.

    What is trained is divided among processes: optimizer states (stage 1), gradients too (2), weights too (3). Frozen
    models beside it are in no checkpoint, and whole on every process unless they are divided too. Models are built whole in main
    memory, each process for itself, and divided afterwards. During evaluation and while answers are sampled every process holds all weights, so
    that processes may have different numbers of batches and tokens.

    The gradient is clipped as `trainer.gradient_clip_val` says, and not at all without it. Checkpoints are folders, which
    get their names when they are complete; all nodes must see one file system. With `accelerator: cpu` it runs in plain
    processes with gloo: slow, the same numbers, for trying things out.

    Args:
        stage: what is divided: 1, 2 or 3.
        offload_optimizer: keep optimizer states in main memory, and make the optimizer's step there.
        offload_parameters: stage 3: keep the divided weights in main memory.
        whole_below: stage 3: parameters with fewer numbers than this stay whole.
        bucket_size: numbers that are reduced or gathered at a time.
        divide_frozen: keep a part of each decoder layer of the frozen models on each process, see `models.divided_frozen`.
        timeout: minutes after which processes stop waiting for each other.
    """

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        whole_below: int = 100_000,
        bucket_size: int = 200_000_000,
        divide_frozen: bool = False,
        timeout: int = _MINUTES,
    ) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                "trainer.strategy is ZeroStrategy, but the package deepspeed is not installed. Install it with\n"
                "  python -m pip install 'lit_llm[deepspeed]'"
            )
        if offload_parameters and stage != 3:
            raise ValueError(
                f"strategy.offload_parameters is true, but strategy.stage is {stage}, which does not divide the weights. Set "
                f"stage: 3, or leave it out."
            )
        if whole_below != 100_000 and stage != 3:
            raise ValueError(
                f"strategy.whole_below is {whole_below}, but strategy.stage is {stage}, which does not divide the weights. Set "
                f"stage: 3, or leave it out."
            )
        super().__init__(
            stage=stage,
            divide_frozen=divide_frozen,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            reduce_bucket_size=bucket_size,
            allgather_bucket_size=bucket_size,
            logging_batch_size_per_gpu=1,  # for DeepSpeed's own throughput alone, which nothing shows
            timeout=timedelta(minutes=timeout),
        )
        self.config["zero_force_ds_cpu_optimizer"] = False  # offloaded states are updated by torch's fused AdamW
        if stage == 3:
            self.config["zero_optimization"]["stage3_param_persistence_threshold"] = whole_below

    # ------------------------------------------------------------------ start

    def setup_environment(self) -> None:
        if not self._on_cpu:
            super().setup_environment()
            return
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed import ops
        from deepspeed.accelerator import set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())  # also on a machine with GPUs
        ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled now; plain gloo does
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        if not self._on_cpu:
            super().setup_distributed()
            return
        reset_seed()  # the parent compares GPU indices with ranks here
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed compares its index with the rank

    @property
    def _on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    def _get_process_group_backend(self) -> str:
        return "gloo" if self._on_cpu else super()._get_process_group_backend()

    def model_sharded_context(self):
        """Models are built whole: what is computed from their weights (projectors, experts) needs them."""
        return nullcontext()

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer, lr_scheduler=None):
        check = getattr(model, "check_divided", None)
        if check is not None:
            check(weights=self.zero_stage_3, frozen=self.divide_frozen, norms=False)
        self._divide_frozen()
        self._divide(model)
        engine, optimizer = super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)
        if self.zero_stage_3:
            remember_offload(optimizer.parameter_offload)
        return engine, optimizer

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """Evaluation alone needs no engine: every process holds all weights then, as during validation."""
        self._divide_frozen()
        self.model = model.to(self.root_device)

    def _divide_frozen(self) -> None:
        if self.divide_frozen:
            self.divide_frozen_models(init_device_mesh(self.root_device.type, (self.world_size,)))

    def _divide(self, model: nn.Module) -> None:
        """Stage 3: keep a part of every parameter, one after the other, and bring everything else to the device."""
        if not self.zero_stage_3:
            return
        import deepspeed

        # as DeepSpeed does for the other stages: the optimizer's copy is float32
        dtype = self.precision_plugin._desired_dtype
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        offload = self.config["zero_optimization"].get("offload_param", {})
        deepspeed.zero.Init(module=model, config_dict_or_path=self.config, remote_device=offload.get("device"))
        for module in model.modules():
            if isinstance(module, Frozen):
                module.to(self.root_device)
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.root_device)

    # --------------------------------------------------------------- training

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Except at the end of an epoch, where Lightning makes a step of the micro-batches that are left."""
        return not self.lightning_module.trainer.fit_loop.epoch_loop._num_ready_batches_reached()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        # DeepSpeed counts micro-batches over all epochs, the data and Lightning within one
        accumulates = self.lightning_module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(not accumulates)
        return super().training_step(*args, **kwargs)

    def backward(self, closure_loss, optimizer, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Lightning has divided the loss by the micro-batches of a step already, and DeepSpeed would do so again
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer, closure, model=None, **kwargs: Any) -> Any:
        result = super().optimizer_step(optimizer, closure, model, **kwargs)
        norm = self.deepspeed_engine.get_global_grad_norm()  # known only now: before clipping, of all processes
        if norm is not None:
            self.lightning_module.log("train/grad_norm", torch.as_tensor(norm, dtype=torch.float32))
        return result

    # ------------------------------------------------------------ checkpoints

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a folder, every process its part; it takes its name when all are done."""
        folder = Path(self.broadcast(filepath))
        partial = folder.with_name(f".{folder.name}.partial")
        if self.is_global_zero:
            rmtree(partial, ignore_errors=True)
        self.barrier("before a checkpoint")
        super().save_checkpoint(checkpoint, partial, storage_options)
        self.barrier("a checkpoint is complete")
        if self.is_global_zero:
            replace_folder(partial, folder)
        self.barrier("a checkpoint has its name")

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(checkpoint_path)
        if not self._fits:
            return read_checkpoint(path, weights=True)
        check_processes(path, self.world_size)
        with tensors_only(weights_only is not False):
            return super().load_checkpoint(path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if not self._fits:  # else the engine has read its parts
            self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    @property
    def _fits(self) -> bool:
        return self.lightning_module.trainer.state.fn == TrainerFn.FITTING
