"""What could be changed about a run, in plain sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_llm.methods.base import Method
from lit_llm.methods.sft import SFT
from lit_llm.planning.loss_phase import LossCost

if TYPE_CHECKING:
    from lit_llm.planning.plan import Plan


def advice_on(plan: Plan, method: Method, loss: LossCost) -> list[str]:
    """What could be changed, in plain sentences."""
    advice, total = [], sum(plan.flops.values())
    teacher = plan.flops.get("teacher forward", 0.0)
    if teacher and plan.tokens.epochs > 1:
        advice.append(
            f"The teacher's forward pass is {teacher / total:.0%} of the FLOPs, and the data is read "
            f"{plan.tokens.epochs:.1f} times. A store of its hidden states would take {gib(plan.store_bytes)} and save "
            f"{teacher / total * (1 - 1 / plan.tokens.epochs):.0%} of all FLOPs; it pays from the second epoch on."
        )
    elif teacher:
        advice.append("The data is read at most once, so a store of the teacher's states would save nothing.")
    logits = loss.forward_peak - loss.kept + loss.scratch
    if logits > 0.25 * plan.peak_bytes:
        advice.append(
            f"The logits of a chunk take {gib(logits)} of the peak. Set model.loss_chunk to half "
            "the supervised tokens of a micro-batch or less."
        )
    states = plan.always.get("optimizer states", 0) + plan.always["student weights"]
    if states > 0.5 * plan.peak_bytes and method.student_spec.lora is None:
        advice.append(
            f"Weights and optimizer states of the student are {gib(states)} of {gib(plan.peak_bytes)}: "
            "model.student.lora would drop most of the gradients and states."
        )
    activations = plan.phases["forward"]
    if activations > 0.4 * plan.peak_bytes and not method.student_spec.gradient_checkpointing:
        advice.append(
            f"Activations take {gib(activations)}: model.student.gradient_checkpointing costs about a third more time "
            "and drops most of them, or lower data.batch_size and raise trainer.accumulate_grad_batches."
        )
    if plan.tokens.padded_share > 0.3:
        advice.append(
            f"{plan.tokens.padded_share:.0%} of the positions are padding: raise data.bucket, or lower data.max_length."
        )
    return advice or ["Nothing stands out."]


def not_counted(method: Method) -> list[str]:
    """Parts of a run of this method that the figures leave out."""
    notes = []
    if method.generation.prompts:
        notes.append("keys and values of the answers that are generated in an evaluation (model.generation)")
    if getattr(method, "rollouts", None) is not None:
        notes.append("the sampling of the student's own answers; in the loss, the data's answers stand for them")
    if method.student_spec.lora is not None and not isinstance(method, SFT):
        notes.append("that frozen models on the student's own base are not held again: each counts as a whole model")
    if getattr(method, "store", None) is not None or getattr(method, "stores", None):
        notes.append(
            "that frozen models are neither run nor held once the store is complete: this is the run that writes it"
        )
    return notes


def gib(size: float | None) -> str:
    size = size or 0
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
