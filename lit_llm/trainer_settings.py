"""Settings of `trainer` and `checkpoint` that Lightning would take and then trip over, or take and never use."""

from __future__ import annotations

import math
from typing import Any

_AT_LEAST = {  # (section, name) -> least value, and what turns it off or on
    ("trainer", "accumulate_grad_batches"): (1, "Leave it out for one micro-batch per optimizer step"),
    ("trainer", "max_steps"): (-1, "-1 leaves the end to trainer.max_epochs"),
    ("trainer", "max_epochs"): (-1, "-1 leaves the end to trainer.max_steps"),
    ("trainer", "min_steps"): (0, "Leave it out"),
    ("trainer", "min_epochs"): (0, "Leave it out"),
    ("trainer", "num_nodes"): (1, "Leave it out for one machine"),
    ("trainer", "gradient_clip_val"): (0, "0 turns clipping off"),
    ("trainer", "log_every_n_steps"): (0, "Leave it out to log every step"),
    ("trainer", "check_val_every_n_epoch"): (
        1,
        "Set null to count micro-batches in trainer.val_check_interval instead",
    ),
    ("trainer", "limit_train_batches"): (0, "Leave it out for all"),
    ("trainer", "limit_val_batches"): (0, "0 turns validation off"),
    ("trainer", "limit_test_batches"): (0, "Leave it out for all"),
    ("checkpoint", "every_n_train_steps"): (0, "0 leaves it to checkpoint.every_n_epochs"),
    ("checkpoint", "every_n_epochs"): (0, "Leave it out"),
    ("checkpoint", "save_top_k"): (-1, "-1 keeps all, 0 none but the last"),
}


def check_settings(trainer: Any, checkpoint: Any) -> None:
    """See that counts can be counted to, and that nothing is set that nothing reads.

    Args:
        trainer: the section `trainer` of a resolved config.
        checkpoint: the section `checkpoint`.

    Raises:
        ValueError: a value outside its range, or a setting without one that it depends on.
    """
    sections = {"trainer": trainer, "checkpoint": checkpoint}
    for (section, name), (least, way_out) in _AT_LEAST.items():
        value = sections[section].get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not least <= value < math.inf:
            raise ValueError(f"{section}.{name} is {value}; it must be at least {least}.\n  {way_out}.")
    if trainer.use_distributed_sampler:
        raise ValueError(
            "trainer.use_distributed_sampler is true, but the DataModules divide the data among ranks themselves "
            "(they must know the tokens of a whole optimizer step). Leave it at false."
        )
    if str(trainer.devices) == "0":
        raise ValueError("trainer.devices is 0, and nothing trains on no device. Set 1, or auto for all there are.")
    _check_strategy(trainer.strategy)
    interval = trainer.val_check_interval
    if isinstance(interval, (int, float)) and not interval > 0:
        raise ValueError(
            f"trainer.val_check_interval is {interval}; it is a number of micro-batches, or a share of an epoch.\n"
            f"  trainer.limit_val_batches: 0 turns validation off."
        )
    _check_used(trainer, checkpoint)


def _check_strategy(strategy: Any) -> None:
    name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", ""))
    kind = name.rsplit(".", 1)[-1].lower()
    if kind.startswith("deepspeed"):
        raise ValueError(
            f"trainer.strategy is {name}, which would leave frozen models and heads without weights under stage 3. Add\n"
            f"  --config configs/trainer/deepspeed_z2.yaml (or _z1, _z3), which has lit_llm.zero_strategy.ZeroStrategy."
        )
    if kind.startswith(("fsdp", "modelparallel")) and not name.startswith("lit_llm."):
        raise ValueError(
            f"trainer.strategy is {name}, but the losses here read the weights of heads outside their modules, which it would "
            f"not gather. Add\n  --config configs/trainer/fsdp2.yaml, which has lit_llm.fsdp_strategy.FsdpStrategy."
        )


def _check_used(trainer: Any, checkpoint: Any) -> None:
    if trainer.gradient_clip_algorithm is not None and not trainer.gradient_clip_val:
        raise ValueError(
            f"trainer.gradient_clip_algorithm is {trainer.gradient_clip_algorithm!r}, but trainer.gradient_clip_val is "
            f"{trainer.gradient_clip_val}, so nothing is clipped. Set trainer.gradient_clip_val, or leave both out."
        )
    if checkpoint.monitor is None and checkpoint.mode != "min":
        raise ValueError(
            f"checkpoint.mode is {checkpoint.mode!r}, but checkpoint.monitor is null, so there is nothing to compare. Set "
            f"checkpoint.monitor, e.g. val/loss, or leave checkpoint.mode out."
        )
    if checkpoint.monitor is None and checkpoint.save_top_k not in (-1, 0, 1):
        raise ValueError(
            f"checkpoint.save_top_k is {checkpoint.save_top_k}, but checkpoint.monitor is null, so none is better than another. "
            f"Set checkpoint.monitor, e.g. val/loss, or checkpoint.save_top_k: -1 to keep all."
        )
    rhythms = {name: checkpoint.get(name) for name in ("every_n_train_steps", "every_n_epochs", "train_time_interval")}
    given = {name: value for name, value in rhythms.items() if value}
    if len(given) > 1:
        both = " and ".join(f"checkpoint.{name} ({value})" for name, value in given.items())
        raise ValueError(f"{both} both say when a checkpoint is written. Keep one.")
    if trainer.enable_checkpointing is False:
        raise ValueError(
            "trainer.enable_checkpointing is false, but the section `checkpoint` says how checkpoints are written. Leave it "
            "out; checkpoint.save_top_k: 0 and checkpoint.save_last: false keep none."
        )
