"""What a run reads: steps, epochs and tokens, counted on the tokenised data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_llm.data.batch import PreferenceBatch
from lit_llm.planning.cast import Batch, Cast

_MOST_BATCHES = 2000


@dataclass(frozen=True)
class Tokens:
    """What passes through the models, counted on the tokenised data.

    Attributes:
        examples: of one epoch.
        micro_batches: of one epoch and process.
        steps: optimizer steps of the run.
        epochs: passes over the data.
        per_step: real student tokens of an optimizer step, all processes; mean.
        supervised_per_step: of those, supervised.
        padded_share: share of the student's positions that is padding.
        teacher_per_epoch: supervised positions of the teacher in one epoch, what a store would hold.
    """

    examples: int
    micro_batches: int
    steps: int
    epochs: float
    per_step: float
    supervised_per_step: float
    padded_share: float
    teacher_per_epoch: int

    @property
    def supervised_share(self) -> float:
        return self.supervised_per_step / self.per_step


@dataclass(frozen=True)
class Setup:
    """What the trainer was configured with.

    Attributes:
        precision: `trainer.precision`.
        accumulate: micro-batches per optimizer step.
        max_steps: -1: no limit.
        max_epochs: None or -1: no limit.
        processes: devices times nodes.
        on_gpu: the run is meant for a GPU, whose memory does not hold the framework.
        keeps_freed: the C library keeps freed blocks of the size of activations.
        notes: what was assumed.
    """

    precision: str | None
    accumulate: int
    max_steps: int
    max_epochs: int | None
    processes: int
    on_gpu: bool
    keeps_freed: bool = False
    notes: list[str] = field(default_factory=list)


def counted(loader: Any, setup: Setup, cast: Cast) -> tuple[Tokens, Batch]:
    """Counts over an epoch, and the largest micro-batch of the run.

    Raises:
        ValueError: the run has no end.
    """
    batches = list(batches_of(loader))
    per_epoch = len(loader.sampler)
    scale = per_epoch / len(batches)
    steps_per_epoch = math.ceil(per_epoch / setup.accumulate)
    limits = [setup.max_steps] if setup.max_steps > 0 else []
    limits += [setup.max_epochs * steps_per_epoch] if setup.max_epochs and setup.max_epochs > 0 else []
    if not limits:
        raise ValueError("Neither trainer.max_steps nor trainer.max_epochs ends the run, so it has no length to plan.")
    steps, per_step = min(limits), setup.accumulate * setup.processes
    runs = [tokens for batch in batches for tokens in cast.reads(cast.student, batch)]
    tokens = Tokens(
        examples=round(sum(len(batch.examples) for batch in batches) * scale * setup.processes),
        micro_batches=per_epoch,
        steps=steps,
        epochs=steps / steps_per_epoch,
        per_step=sum(batch.num_tokens for batch in batches) / len(batches) * per_step,
        supervised_per_step=sum(tokens.num_supervised for tokens in runs) / len(batches) * per_step,
        padded_share=1 - sum(int(t.length_B.sum()) for t in runs) / sum(t.ids_BL.numel() for t in runs),
        teacher_per_epoch=round(sum(map(_stored, batches)) * scale * setup.processes),
    )
    return tokens, largest(batches[: steps * setup.accumulate])


def batches_of(loader: Any) -> Sequence[Batch]:
    """The finished micro-batches of an epoch, without their workers; of a long one the first 2,000."""
    if not hasattr(loader, "dataset"):
        return []
    micro_batches = loader.sampler.plan(0)
    return [loader.dataset[micro] for micro in micro_batches[:_MOST_BATCHES]]


def largest(batches: Sequence[Batch]) -> Batch | None:
    """The micro-batch with the most positions on both sides."""

    def positions(batch: Batch) -> int:
        return sum(side.ids_BL.numel() for side in _sides(batch))

    return max(batches, key=positions, default=None)


def _sides(batch: Batch) -> list:
    if isinstance(batch, PreferenceBatch):
        return [batch.chosen, batch.rejected]
    return [side for side in (batch.student, batch.teacher) if side is not None]


def _stored(batch: Batch) -> int:
    """Supervised positions for which a store would hold hidden states."""
    if isinstance(batch, PreferenceBatch):
        return batch.chosen.num_supervised
    return (batch.teacher or batch.student).num_supervised
