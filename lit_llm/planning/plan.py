"""The plan of a run: parameters, FLOPs, tokens, steps and peak memory by part.

Peak memory of a process is what always stays (framework, weights, gradients, optimizer states, frozen models) and the
highest of the phases of a step. Lightning drops the old gradients just before the backward pass, so they are there
during the forward pass: that is usually the peak.

    teacher, reference, ...  forward passes of the frozen models
    forward                  activations of the student
    loss                     activations and the loss, chunk by chunk
    backward                 activations that go, gradients that come; the old gradients are gone
    evaluation               all models without gradients on an evaluation batch
    export                   the trained model is written and read back
    asking the reference     log-probabilities under the reference, before there are gradients and optimizer states
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lit_llm.methods.align_distil import AlignDistil
from lit_llm.methods.base import Method
from lit_llm.methods.distillation import Distillation
from lit_llm.planning.advice import advice_on, not_counted
from lit_llm.planning.bodies import BodyCost, FakeModel, Precision
from lit_llm.planning.cast import Batch, Cast, cast_of, check_known, pairs
from lit_llm.planning.loss_phase import LossCost, loss_cost
from lit_llm.planning.process import framework_bytes
from lit_llm.planning.tokens import Setup, Tokens, batches_of, counted, largest

_EVALUATION_CACHE_BYTES = 512 * 2**20
_STORE_BYTES = 2  # bf16
_KEPT_SHARE = 0.5  # of the activations: measured, docs/plan.md


@dataclass(frozen=True)
class Plan:
    """What a run will cost.

    Attributes:
        parameters: part -> (parameters, of them trained).
        flops: part -> FLOPs per real token of the data: the student's, of pairs both sides.
        tokens: data and steps.
        always: part -> bytes that stay through the whole run.
        phases: phase -> bytes beside `always` at its highest point.
        store_bytes: size of a store of bf16 hidden states of the frozen models, one epoch; None where there is none.
        notes: what the figures leave out.
        advice: plain sentences.
    """

    parameters: dict[str, tuple[int, int]]
    flops: dict[str, float]
    tokens: Tokens
    always: dict[str, int]
    phases: dict[str, int]
    store_bytes: int | None
    notes: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak_bytes(self) -> int:
        return sum(self.always.values()) + self.phases[self.peak_phase]

    @property
    def flops_per_step(self) -> float:
        return sum(self.flops.values()) * self.tokens.per_step


def make_plan(method: Method, datamodule: Any, setup: Setup) -> Plan:
    """Plan a run of `method` on data that is set up.

    Args:
        method: with its model specs; nothing of it is loaded.
        datamodule: after `setup("fit")`, attached to a trainer.
        setup: of the trainer.

    Raises:
        ValueError: a model's config cannot be had, or the run has no end, or nothing is known of the method.
    """
    check_known(method)
    framework = 0 if setup.on_gpu else framework_bytes(method)  # before anything that a run does without
    precision = Precision.named(setup.precision)
    cast = cast_of(method, precision)
    tokens, batch = counted(datamodule.train_dataloader(), setup, cast)
    cost = _Cost.of(method, cast, batch, precision)
    projectors = _Projectors.of(method, cast)

    trained = cast.student.weight_bytes(trained_only=True)
    activations = cost.student.kept if setup.keeps_freed else 0
    always = {"framework": framework, **_always(cast, cost, projectors)}
    if isinstance(method, Distillation):
        always["teacher states kept for evaluation"] = _evaluation_cache(datamodule, cast)
    always["freed blocks that glibc keeps"] = round(_KEPT_SHARE * activations)
    phases = _phases(cost, trained)
    if (evaluated := largest(batches_of(datamodule.val_dataloader()))) is not None:
        phases["evaluation"] = _evaluation(method, cast, evaluated, precision, cost.loss.scratch, activations)
    phases["export"] = cast.student.weight_bytes() * (1 if method.student_spec.lora is None else 2)
    flops = _flops(cost, cast, batch, projectors, tokens)
    if cast.asks:
        not_yet = trained + always["optimizer states"] + cost.loss.scratch
        phases["asking the reference"], asking_flops = _asking(method, cast, batch, precision, not_yet)
        if "train" in method.reference_parts:
            flops["asking the reference, once"] = asking_flops / batch.num_tokens / tokens.epochs
    plan = Plan(
        parameters=_parameters(cast, projectors),
        flops=flops,
        tokens=tokens,
        always={part: size for part, size in always.items() if size},
        phases=phases,
        store_bytes=_store_bytes(cast, tokens) if isinstance(method, (Distillation, AlignDistil)) else None,
        notes=[*setup.notes, *not_counted(method)],
    )
    return replace(plan, advice=advice_on(plan, method, cost.loss))


@dataclass(frozen=True)
class _Cost:
    """A training step over one micro-batch: bodies and loss."""

    student: BodyCost
    frozen: dict[str, BodyCost]
    loss: LossCost

    @classmethod
    def of(cls, method: Method, cast: Cast, batch: Batch, precision: Precision) -> _Cost:
        frozen = {
            name: role.model.cost(role.reads(role.model, batch), train=False)
            for name, role in cast.frozen.items()
            if role.reads is not None
        }
        student = cast.student.cost(cast.reads(cast.student, batch), train=True)
        return cls(student, frozen, loss_cost(method, cast, batch, precision))


@dataclass(frozen=True)
class _Projectors:
    """Sizes of the maps of a dual-space method; zeros for others."""

    trained: int = 0
    buffer_bytes: int = 0
    flops_per_row: int = 0
    flops_per_step: int = 0

    @property
    def trained_bytes(self) -> int:
        return 4 * self.trained

    @classmethod
    def of(cls, method: Method, cast: Cast) -> _Projectors:
        if not hasattr(method, "projectors"):
            return cls()
        student, teacher = cast.student, cast.frozen["teacher"].model
        settings, d, e = method.settings, student.head.in_features, teacher.head.in_features
        biases = d + e if settings.bias else 0
        if method.uses_attention:
            return cls(
                trained=4 * d * e + 2 * d * e + (2 * e + biases if settings.bias else 0), flops_per_row=24 * d * e
            )
        if settings.student_to_teacher == "trained":
            return cls(trained=2 * d * e + biases, flops_per_row=12 * d * e)
        rows = min(student.head.out_features, teacher.head.out_features)
        return cls(
            trained=d * e + (d if settings.bias else 0),
            buffer_bytes=4 * (e * e + d * e),
            flops_per_row=10 * d * e,
            flops_per_step=2 * rows * d * e + 2 * e * e * d,
        )


def _always(cast: Cast, cost: _Cost, projectors: _Projectors) -> dict[str, int]:
    """Bytes that stay from the first optimizer step on."""
    trained = cast.student.weight_bytes(trained_only=True)
    always = {"student weights": cast.student.weight_bytes(), "student gradients": trained}
    always["optimizer states"] = 2 * (trained + projectors.trained_bytes)
    always |= {f"{name} weights": role.model.weight_bytes() for name, role in cast.frozen.items()}
    always["projectors, their gradients, closed form"] = 2 * projectors.trained_bytes + projectors.buffer_bytes
    return always | {"logits, kept for the next step": cost.loss.scratch}


def _phases(cost: _Cost, gradients: int) -> dict[str, int]:
    """Bytes beside what always stays, at the highest point of each phase. The fused optimizer needs none."""
    phases, held, body, loss = {}, 0, cost.student, cost.loss
    for name, frozen in cost.frozen.items():
        phases[name] = held + frozen.forward_peak
        held += frozen.kept
    phases["forward"] = held + body.forward_peak
    phases["loss"] = held + body.kept + loss.forward_peak
    in_head, in_body = body.kept + loss.backward_peak, body.backward_peak + loss.left
    phases["backward"] = held + max(in_head, in_body) - gradients
    return phases


def _evaluation(method: Method, cast: Cast, batch: Batch, precision: Precision, scratch: int, activations: int) -> int:
    """All models over a batch without gradients, one after the other, then the loss, beside the scratch of training."""
    peak, held = 0, 0
    for role in cast.frozen.values():
        body = role.model.cost((role.evaluates or role.reads)(role.model, batch), train=False)
        peak, held = max(peak, held + body.forward_peak), held + body.kept
    student = cast.student.cost(cast.evaluates(cast.student, batch), train=False)
    loss = loss_cost(method, cast, batch, precision, evaluate=True)
    more_scratch = max(loss.scratch - scratch, 0)
    live = max(peak, held + student.forward_peak, held + loss.forward_peak + more_scratch)
    return max(live, activations + loss.large + more_scratch)


def _asking(method: Method, cast: Cast, batch: Batch, precision: Precision, not_yet: int) -> tuple[int, int]:
    """Bytes and FLOPs of the reference over a batch of pairs, before there are gradients and optimizer states."""
    model = cast.asked_once or cast.student
    extra = 0 if cast.asked_once is None else model.weight_bytes()
    body = model.cost(pairs(model, batch), train=False)
    loss = loss_cost(method, cast, batch, precision, evaluate=True)
    size = extra + max(body.forward_peak, body.kept + loss.forward_peak + loss.scratch) - not_yet
    return max(size, 0), body.forward_flops + loss.flops


def _evaluation_cache(datamodule: Any, cast: Cast) -> int:
    teacher = cast.frozen["teacher"].model
    rows = sum((b.teacher or b.student).num_supervised for b in batches_of(datamodule.val_dataloader()))
    return min(rows * teacher.head.in_features * teacher.head.weight.element_size(), _EVALUATION_CACHE_BYTES)


def _store_bytes(cast: Cast, tokens: Tokens) -> int | None:
    widths = [role.model.head.in_features for role in cast.frozen.values() if role.reads is not None]
    return tokens.teacher_per_epoch * sum(widths) * _STORE_BYTES if widths else None


def _parameters(cast: Cast, projectors: _Projectors) -> dict[str, tuple[int, int]]:
    def parts(name: str, model: FakeModel, trained: int) -> dict[str, tuple[int, int]]:
        found = model.parameters()
        in_head = found.head if trained and model.trains_head else 0
        return {f"{name} body": (found.body, trained - in_head), f"{name} head": (found.head, in_head)}

    rows = parts("student", cast.student, cast.student.parameters().trained)
    for name, role in cast.frozen.items():
        rows |= parts(name, role.model, 0)
    return rows | ({"projectors": (projectors.trained, projectors.trained)} if projectors.trained else {})


def _flops(cost: _Cost, cast: Cast, batch: Batch, projectors: _Projectors, tokens: Tokens) -> dict[str, float]:
    """FLOPs per real token of the measured micro-batch, padding included."""
    flops = {"student forward": cost.student.forward_flops, "student backward": cost.student.backward_flops}
    flops |= {f"{name} forward": body.forward_flops for name, body in cost.frozen.items()}
    flops["heads and losses"] = cost.loss.flops
    if projectors.trained:
        flops["projectors"] = projectors.flops_per_row * batch.student.num_supervised
    per_token = {part: value / batch.num_tokens for part, value in flops.items()}
    if projectors.flops_per_step:
        per_token["closed form"] = projectors.flops_per_step / tokens.per_step
    return per_token
