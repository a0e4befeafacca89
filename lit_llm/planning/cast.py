"""Which models a method runs, in which order, and the tokens that each of them reads.

This is all that a plan knows about a method beside its own `training_step` and `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_llm.data.batch import DistillationBatch, PreferenceBatch, TokenBatch
from lit_llm.methods.align_distil import AlignDistil
from lit_llm.methods.base import Method
from lit_llm.methods.distillation import Distillation
from lit_llm.methods.dpo import DPO
from lit_llm.methods.sft import SFT
from lit_llm.models.language_model import ModelSpec
from lit_llm.planning.bodies import FakeModel, Precision

Batch = DistillationBatch | PreferenceBatch
Reads = Callable[[FakeModel, Any], Sequence[TokenBatch]]


@dataclass(frozen=True)
class FrozenRole:
    """A frozen model of a method.

    Attributes:
        model: in shapes.
        attribute: of the method, which holds it as a `Frozen`.
        reads: what it runs over in a training step; None: it is there, and runs in evaluations only.
        evaluates: what it runs over in an evaluation; None: the same.
    """

    model: FakeModel
    attribute: str
    reads: Reads | None
    evaluates: Reads | None = None


@dataclass(frozen=True)
class Cast:
    """The models of a run.

    Attributes:
        student: the model that is trained.
        reads: what it runs over in a training step.
        evaluates: what it runs over in an evaluation.
        frozen: name -> model, in the order in which they run.
        asked_once: a model that runs over all pairs before training and is then let go; None: none, or the student.
        asks: whether such a pass takes place.
    """

    student: FakeModel
    reads: Reads
    evaluates: Reads
    frozen: dict[str, FrozenRole] = field(default_factory=dict)
    asked_once: FakeModel | None = None
    asks: bool = False


def check_known(method: Method) -> None:
    """See that a plan knows how the method runs its models.

    Raises:
        ValueError: it does not.
    """
    # a subclass of these may do as it likes with its models, a distillation has one teacher
    if type(method) not in (SFT, DPO, AlignDistil) and not isinstance(method, Distillation):
        raise ValueError(
            f"plan does not know how {type(method).__name__} runs its models yet. Run it with --trainer.max_steps=2 and "
            "read throughput/peak_memory_gb in metrics.csv."
        )


def cast_of(method: Method, precision: Precision) -> Cast:
    """The models of a method, in shapes.

    Raises:
        ValueError: a model's config cannot be had.
    """
    if isinstance(method, AlignDistil):
        return _align_distil(method, precision)
    if isinstance(method, DPO):
        return _dpo(method, precision)
    frozen = {}
    if isinstance(method, Distillation):
        frozen["teacher"] = FrozenRole(FakeModel(method.teacher_spec, precision), "frozen_teacher", _teacher_side)
    return Cast(FakeModel(method.student_spec, precision), _student_side, _student_side, frozen)


def _dpo(method: DPO, precision: Precision) -> Cast:
    student = FakeModel(method.student_spec, precision)
    if method.runs_reference:
        reference = FakeModel(method.reference_spec or method.student_spec, precision)
        return Cast(student, pairs, pairs, {"reference": FrozenRole(reference, "frozen_reference", pairs)})
    other = None if method.reference_spec is None else FakeModel(method.reference_spec, precision)
    return Cast(student, pairs, pairs, asked_once=other, asks=method.needs_reference)


def _align_distil(method: AlignDistil, precision: Precision) -> Cast:
    specs: dict[str, tuple[ModelSpec, str]] = {
        "DPO model": (method.dpo_spec, "frozen_teacher"),
        "other model": (method.other_spec, "frozen_other"),
    }
    frozen = {
        name: FrozenRole(FakeModel(spec, precision), attribute, _chosen, _chosen_and_pairs)
        for name, (spec, attribute) in specs.items()
    }
    if method.watch_start:
        frozen["start"] = FrozenRole(FakeModel(method.student_spec, precision), "frozen_start", None, _chosen)
    return Cast(FakeModel(method.student_spec, precision), _chosen, _chosen_and_pairs, frozen, asks=True)


def _student_side(_: FakeModel, batch: DistillationBatch) -> Sequence[TokenBatch]:
    return [batch.student]


def _teacher_side(_: FakeModel, batch: DistillationBatch) -> Sequence[TokenBatch]:
    return [batch.teacher or batch.student]


def _chosen(_: FakeModel, batch: PreferenceBatch) -> Sequence[TokenBatch]:
    return [batch.chosen]


def pairs(model: FakeModel, batch: PreferenceBatch) -> Sequence[TokenBatch]:
    """As `hidden_ofpairs` runs them."""
    return [batch.both] if batch.both is not None and model.branches(batch.both) else [batch.chosen, batch.rejected]


def _chosen_and_pairs(model: FakeModel, batch: PreferenceBatch) -> Sequence[TokenBatch]:
    return [batch.chosen, *pairs(model, batch)]
