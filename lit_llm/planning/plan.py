"""The plan of a run: parameters, FLOPs, tokens, steps and peak memory by part.

Peak memory of a process is what always stays (framework, weights, gradients, optimizer states, frozen models) and the
highest of the phases of a step. Lightning drops the old gradients just before the backward pass, so they are there
during the forward pass: that is usually the peak.

    teacher    the teacher's forward pass
    forward    activations of the student
    loss       activations and the loss, chunk by chunk
    backward   activations that go, gradients that come; the old gradients are gone
    optimizer  temporaries of AdamW
    evaluation both models without gradients on an evaluation batch
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lit_llm.data.batch import DistillationBatch
from lit_llm.methods.base import Method
from lit_llm.planning.bodies import BodyCost, FakeModel, Parameters, Precision
from lit_llm.planning.loss_phase import LossCost, loss_cost

_MOST_BATCHES = 2000
_EVALUATION_CACHE_BYTES = 512 * 2**20
_STORE_BYTES = 2  # bf16


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
class Plan:
    """What a run will cost.

    Attributes:
        parameters: part -> (parameters, of them trained).
        flops: part -> FLOPs per real student token.
        tokens: data and steps.
        always: part -> bytes that stay through the whole run.
        phases: phase -> bytes beside `always` at its highest point.
        store_bytes: size of a store of bf16 hidden states of the teacher; None without a teacher.
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
        notes: what was assumed.
    """

    precision: str | None
    accumulate: int
    max_steps: int
    max_epochs: int | None
    processes: int
    on_gpu: bool
    notes: list[str] = field(default_factory=list)


def make_plan(method: Method, datamodule: Any, setup: Setup) -> Plan:
    """Plan a run of `method` on data that is set up.

    Args:
        method: with its model specs; nothing of it is loaded.
        datamodule: after `setup("fit")`, attached to a trainer.
        setup: of the trainer.

    Raises:
        ValueError: a model's config cannot be had, or the run has no end, or the method learns from pairs of answers.
    """
    if method.on_pairs:
        raise ValueError(
            f"plan does not know how {type(method).__name__} runs its models over pairs of answers yet. Run it with "
            "--trainer.max_steps=2 and read throughput/peak_memory_gb in metrics.csv."
        )
    framework = 0 if setup.on_gpu else _framework_bytes(method)
    precision = Precision.named(setup.precision)
    loader = datamodule.train_dataloader()
    tokens, largest = _counted(loader, setup)
    student = FakeModel(method.student_spec, precision)
    teacher_spec = getattr(method, "teacher_spec", None)
    teacher = None if teacher_spec is None else FakeModel(teacher_spec, precision)
    body = _body_cost(student, largest.student, train=True)
    teacher_body = None if teacher is None else _body_cost(teacher, largest.teacher or largest.student, train=False)
    loss = loss_cost(method, student, teacher, largest, precision)
    projectors = _Projectors.of(method, student, teacher)

    evaluated = _largest(_batches(datamodule.val_dataloader()))
    always = {"framework": framework, "student weights": student.weight_bytes()}
    always |= {"student gradients": student.weight_bytes(trained_only=True)}
    always |= {"optimizer states": 2 * (student.weight_bytes(trained_only=True) + projectors.trained_bytes)}
    if teacher is not None:
        always["teacher weights"] = teacher.weight_bytes()
        always["projectors, their gradients, closed form"] = 2 * projectors.trained_bytes + projectors.buffer_bytes
        always["teacher states kept for evaluation"] = _evaluation_cache(datamodule, teacher)
    always = {part: size for part, size in always.items() if size}
    gradients = student.weight_bytes(trained_only=True)
    phases = _phases(body, teacher_body, loss, gradients, student.largest_trained_bytes())
    if evaluated is not None:
        phases["evaluation"] = _evaluation(method, student, teacher, evaluated, precision)
    plan = Plan(
        parameters=_parameters(student, teacher, projectors),
        flops=_flops(body, teacher_body, loss, largest, projectors, tokens),
        tokens=tokens,
        always=always,
        phases=phases,
        store_bytes=None if teacher is None else tokens.teacher_per_epoch * teacher.head.in_features * _STORE_BYTES,
        notes=setup.notes,
    )
    return replace(plan, advice=advice_on(plan, method, loss))


def advice_on(plan: Plan, method: Method, loss: LossCost) -> list[str]:
    """What could be changed, in plain sentences."""
    advice, total = [], sum(plan.flops.values())
    teacher = plan.flops.get("teacher forward", 0.0)
    if teacher and plan.tokens.epochs > 1:
        advice.append(
            f"The teacher's forward pass is {teacher / total:.0%} of the FLOPs, and the data is read "
            f"{plan.tokens.epochs:.1f} times. A store of its hidden states would take {_gib(plan.store_bytes)} and save "
            f"{teacher / total * (1 - 1 / plan.tokens.epochs):.0%} of all FLOPs; it pays from the second epoch on."
        )
    elif teacher:
        advice.append("The data is read at most once, so a store of the teacher's states would save nothing.")
    if loss.forward_peak - loss.kept > 0.25 * plan.peak_bytes:
        advice.append(
            f"The logits of a chunk take {_gib(loss.forward_peak - loss.kept)} of the peak. Set model.loss_chunk to half "
            "the supervised tokens of a micro-batch or less."
        )
    states = plan.always.get("optimizer states", 0) + plan.always["student weights"]
    if states > 0.5 * plan.peak_bytes and method.student_spec.lora is None:
        advice.append(
            f"Weights and optimizer states of the student are {_gib(states)} of {_gib(plan.peak_bytes)}: "
            "model.student.lora would drop most of the gradients and states."
        )
    activations = plan.phases["forward"]
    if activations > 0.4 * plan.peak_bytes and not method.student_spec.gradient_checkpointing:
        advice.append(
            f"Activations take {_gib(activations)}: model.student.gradient_checkpointing costs about a third more time "
            "and drops most of them, or lower data.batch_size and raise trainer.accumulate_grad_batches."
        )
    if plan.tokens.padded_share > 0.3:
        advice.append(
            f"{plan.tokens.padded_share:.0%} of the positions are padding: raise data.bucket, or lower data.max_length."
        )
    return advice or ["Nothing stands out."]


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
    def of(cls, method: Method, student: FakeModel, teacher: FakeModel | None) -> _Projectors:
        if teacher is None or not hasattr(method, "projectors"):
            return cls()
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


def _counted(loader, setup: Setup) -> tuple[Tokens, DistillationBatch]:
    batches = list(_batches(loader))
    per_epoch = len(loader.sampler)
    scale = per_epoch / len(batches)
    steps_per_epoch = math.ceil(per_epoch / setup.accumulate)
    limits = [setup.max_steps] if setup.max_steps > 0 else []
    limits += [setup.max_epochs * steps_per_epoch] if setup.max_epochs and setup.max_epochs > 0 else []
    if not limits:
        raise ValueError("Neither trainer.max_steps nor trainer.max_epochs ends the run, so it has no length to plan.")
    steps, per_step = min(limits), setup.accumulate * setup.processes
    positions = sum(batch.student.ids_BL.numel() for batch in batches)
    real, supervised = sum(b.num_tokens for b in batches), sum(b.student.num_supervised for b in batches)
    tokens = Tokens(
        examples=round(sum(len(batch.examples) for batch in batches) * scale * setup.processes),
        micro_batches=per_epoch,
        steps=steps,
        epochs=steps / steps_per_epoch,
        per_step=real / len(batches) * per_step,
        supervised_per_step=supervised / len(batches) * per_step,
        padded_share=1 - real / positions,
        teacher_per_epoch=round(
            sum((batch.teacher or batch.student).num_supervised for batch in batches) * scale * setup.processes
        ),
    )
    return tokens, _largest(batches[: steps * setup.accumulate])


def _batches(loader) -> Sequence[DistillationBatch]:
    """The finished micro-batches of an epoch, without their workers; of a long one the first 2,000."""
    if not hasattr(loader, "dataset"):
        return []
    return [loader.dataset[micro] for micro in loader.sampler.plan(0)[:_MOST_BATCHES]]


def _largest(batches: Sequence[DistillationBatch]) -> DistillationBatch | None:
    """The micro-batch with the most positions on both sides."""

    def positions(batch: DistillationBatch) -> int:
        return batch.student.ids_BL.numel() + (0 if batch.teacher is None else batch.teacher.ids_BL.numel())

    return max(batches, key=positions, default=None)


def _body_cost(model: FakeModel, tokens, *, train: bool) -> BodyCost:
    return model.cost(*tokens.ids_BL.shape, tokens.num_supervised, train=train)


def _phases(
    body: BodyCost, teacher: BodyCost | None, loss: LossCost, gradients: int, largest_trained: int
) -> dict[str, int]:
    """Bytes beside what always stays, at the highest point of each phase."""
    phases = {} if teacher is None else {"teacher": teacher.forward_peak}
    held = 0 if teacher is None else teacher.kept
    phases["forward"] = held + body.forward_peak
    phases["loss"] = held + body.kept + loss.forward_peak
    in_head, in_body = body.kept + loss.backward_peak, body.backward_peak + loss.left
    phases["backward"] = held + max(in_head, in_body) - gradients
    phases["optimizer"] = 2 * largest_trained
    return phases


def _evaluation(
    method: Method, student: FakeModel, teacher: FakeModel | None, batch: DistillationBatch, precision: Precision
) -> int:
    ours = _body_cost(student, batch.student, train=False)
    theirs = None if teacher is None else _body_cost(teacher, batch.teacher or batch.student, train=False)
    held = 0 if theirs is None else theirs.kept
    loss = loss_cost(method, student, teacher, batch, precision, evaluate=True)
    return max(0 if theirs is None else theirs.forward_peak, held + ours.forward_peak, held + loss.forward_peak)


def _evaluation_cache(datamodule, teacher: FakeModel) -> int:
    rows = sum((b.teacher or b.student).num_supervised for b in _batches(datamodule.val_dataloader()))
    return min(rows * teacher.head.in_features * teacher.head.weight.element_size(), _EVALUATION_CACHE_BYTES)


def _parameters(student: FakeModel, teacher: FakeModel | None, projectors: _Projectors) -> dict[str, tuple[int, int]]:
    def parts(name: str, model: FakeModel, found: Parameters, trained: int) -> dict[str, tuple[int, int]]:
        in_head = found.head if trained and model.trains_head else 0
        return {f"{name} body": (found.body, trained - in_head), f"{name} head": (found.head, in_head)}

    ours = student.parameters()
    rows = parts("student", student, ours, ours.trained)
    if teacher is not None:
        rows |= parts("teacher", teacher, teacher.parameters(), 0)
    return rows | ({"projectors": (projectors.trained, projectors.trained)} if projectors.trained else {})


def _flops(
    body: BodyCost,
    teacher: BodyCost | None,
    loss: LossCost,
    batch: DistillationBatch,
    projectors: _Projectors,
    tokens: Tokens,
) -> dict[str, float]:
    """FLOPs per real student token of the measured micro-batch, padding included."""
    flops = {"student forward": body.forward_flops, "student backward": body.backward_flops}
    if teacher is not None:
        flops["teacher forward"] = teacher.forward_flops
    flops["heads and losses"] = loss.flops
    if projectors.trained:
        flops["projectors"] = projectors.flops_per_row * batch.student.num_supervised
    per_token = {part: value / batch.num_tokens for part, value in flops.items()}
    if projectors.flops_per_step:
        per_token["closed form"] = projectors.flops_per_step / tokens.per_step
    return per_token


def _framework_bytes(method: Method) -> int:
    """Resident size of this process once everything is imported that a step of training imports."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    from transformers import AutoModelForCausalLM

    for spec in (method.student_spec, getattr(method, "teacher_spec", None)):
        if spec is not None and spec.source is not None:
            from lit_llm.planning.bodies import _config

            AutoModelForCausalLM._model_mapping[type(_config(spec.source))]
    layer = torch.nn.Linear(256, 256)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.randn(256, 256)).square().mean().backward()
    optimizer.step()
    gc.collect()
    return resident_bytes()


def resident_bytes() -> int:
    """Memory of this process that is in use now; where the system does not tell, its maximum so far."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _page_size()
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _page_size() -> int:
    import resource

    return resource.getpagesize()


def _gib(size: float | None) -> str:
    size = size or 0
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
