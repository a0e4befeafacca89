"""Checkpoints of ZeRO: folders with a part for every process, read without running anything that stands in them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

TAG = "checkpoint"  # the folder within the folder, as Lightning calls it
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def is_zero_checkpoint(path: Path) -> bool:
    """Whether a path is a folder that ZeRO wrote."""
    return (path / TAG).is_dir() and any((path / TAG).glob("*model_states.pt"))


def read_states(path: Path) -> dict[str, Any]:
    """What a checkpoint of ZeRO says beside weights and optimizer: the same keys as in a checkpoint of one file.

    Raises:
        ValueError: cut off, damaged, or written by something else.
    """
    part = sorted((path / TAG).glob("*model_states.pt"))[0]
    try:
        found = torch.load(part, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"--ckpt_path {path}: {part.relative_to(path)} cannot be read: {_first_line(error)}\n"
            f"  Take another checkpoint of {path.parent}, or start anew."
        ) from error
    if not isinstance(found, dict) or "lit_llm" not in found:
        raise ValueError(
            f"--ckpt_path {path}: the checkpoint was not written by lit_llm (it has no 'lit_llm' entry).\n  Name one from a "
            f"run's checkpoints folder, or load other weights with model.student.source."
        )
    return found


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of all processes put together, on the CPU; what was trained in float32.

    Raises:
        ValueError: deepspeed is not installed, or a part is missing or damaged.
    """
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ValueError(
            f"{path} is a checkpoint of DeepSpeed, which is not installed. Install it with\n"
            "  python -m pip install 'lit_llm[deepspeed]'"
        ) from error
    try:
        with tensors_only():
            found = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=TAG)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, OSError) as error:
        raise ValueError(
            f"--ckpt_path {path}: the parts of the weights cannot be put together: {_first_line(error)}\n"
            f"  Take another checkpoint of {path.parent}."
        ) from error
    whole = read_states(path)["module"]  # stage 1 divides what is trained alone, and puts nothing else together
    return {**{name: value for name, value in whole.items() if name not in found and value.numel()}, **found}


def check_processes(path: Path, world_size: int) -> None:
    """See that a run has as many processes as the one that wrote a checkpoint.

    Raises:
        ValueError: it has not, or this is no checkpoint of ZeRO.
    """
    if not is_zero_checkpoint(path):
        raise ValueError(
            f"--ckpt_path {path} is not a folder that ZeroStrategy wrote, but trainer.strategy is ZeroStrategy. Resume with the "
            f"strategy that the run began with, or write the model with `export` and name it in model.student.source."
        )
    parts = len(list((path / TAG).glob("*optim_states.pt")))
    if parts != world_size:
        raise ValueError(
            f"--ckpt_path {path} was written by {parts} processes, but this run has {world_size}, and optimizer states are "
            f"divided among them.\n  Resume with {parts} processes (trainer.devices times trainer.num_nodes), or write the "
            f"model with `export` and start from it with model.student.source."
        )


@contextmanager
def tensors_only(safe: bool = True) -> Iterator[None]:
    """Within the block `torch.load` reads tensors and plain values, and the few records of DeepSpeed, wherever it is called.

    DeepSpeed asks for pickles as they are, which could run code.

    Args:
        safe: False: as they are, for who asked for it (`--weights_only=false`).
    """
    if not safe:
        yield
        return
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_records()):
            yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _records() -> list[type]:
    """Classes without behaviour of their own that stand in DeepSpeed's files."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0][:200]
