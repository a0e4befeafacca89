"""What methods share that distil a policy from frozen models on preference pairs: the models, sampled answers, resume.

Shapes: B pairs, 2B answers (first the chosen ones), T supervised tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_llm.data.batch import PreferenceBatch, TokenBatch
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Optimization
from lit_llm.methods.distillation import same_tokenizer
from lit_llm.methods.on_policy import OnPolicy, Rollouts
from lit_llm.methods.preference import PreferenceMethod, sums_of_answers
from lit_llm.models.frozen import check_frozen
from lit_llm.models.language_model import Frozen, LanguageModel, ModelSpec
from lit_llm.models.quantization import keep_base_out_of_checkpoints
from lit_llm.models.shared_base import AdaptedBase, frozen_beside
from lit_llm.models.teacher_head import TeacherHead


class PreferenceDistillation(PreferenceMethod):
    """A policy that learns from the next-token distributions of one or two frozen models on the answers of pairs.

    Attributes:
        keeps_start: whether the policy as it starts is kept beside the others, as `frozen_start`.
        one_base: whether adapters of another base than the policy's are refused, as a mistake.

    Args:
        student: the policy that is trained.
        teachers: name in the config -> frozen model, one or two: `teacher` and `other`.
        on_policy: learn on answers that are sampled. None: on those of the data.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabulary.
    """

    reference_parts = ("validation", "test")
    keeps_start = False
    one_base = False

    def __init__(
        self,
        student: ModelSpec,
        teachers: dict[str, ModelSpec],
        on_policy: OnPolicy | None,
        optimization: Optimization,
        generation: Generation,
        loss_chunk: int | None,
    ) -> None:
        super().__init__(student, None, optimization, generation, loss_chunk)
        for name, spec in teachers.items():
            check_frozen(name, spec)
        self.teacher_specs = teachers
        self.rollouts = None if on_policy is None else Rollouts(on_policy, self)
        self.frozen_other: Frozen | None = None
        self.frozen_start: Frozen | None = None
        self._frozen_log_probs: dict[tuple, tuple[Tensor, ...]] = {}

    def configure_model(self) -> None:
        if self.frozen_teacher is None:
            self._check_tokenizers()
        super().configure_model()
        if self.frozen_teacher is not None:
            return
        has_base = self.student.base is not None
        if has_base and self.student_spec.source is not None:
            keep_base_out_of_checkpoints(self.student)  # whatever adapters live in it, for now or for the whole run
        self.frozen_teacher, *others = map(self.frozen_model, self.teacher_specs)
        if others:
            (self.frozen_other,) = others
        if self.keeps_start:
            self.frozen_start = Frozen(AdaptedBase(self.student) if has_base else self.student_spec.load())

    def frozen_model(self, name: str) -> Frozen:
        """One of the frozen models, in the policy's base where it can be."""
        spec = self.teacher_specs[name]
        return frozen_beside(self.student, self.student_spec, spec, name, must_share=self.one_base)

    @property
    def other(self) -> LanguageModel | TeacherHead:
        return self.frozen_other.model

    def _check_tokenizers(self) -> None:
        for name, spec in self.teacher_specs.items():
            if not same_tokenizer(self.student_tokenizer, spec.load_tokenizer()):
                raise ValueError(
                    f"model.{name} ({spec.source}) has another tokenizer than model.student ({self.student_spec.source}), "
                    f"but {type(self).__name__} compares the models column by column. Take models that started from one."
                )

    def check_divided(self, weights: bool, frozen: bool, norms: bool) -> None:
        super().check_divided(weights, frozen, norms)
        if (weights or frozen) and self.rollouts is not None:
            self.rollouts.check_divided()

    # -------------------------------------------------------------- training

    def learned_on(self, batch: PreferenceBatch) -> tuple[TokenBatch, int]:
        """The answers that a micro-batch of training is compared on, chosen or sampled, and their tokens in the whole step.

        Called once for each micro-batch, in order, on every rank.
        """
        if self.rollouts is None:
            return batch.chosen, batch.step_tokens
        compared = self.rollouts.compared(batch)
        self.log_step({"on_policy": float(compared.sampled)}, 1)
        return compared.batch.student if compared.sampled else batch.chosen, compared.tokens

    # ------------------------------------------------------------ evaluation

    def log_order(self, stage: str, name: str, reward_2B: Tensor) -> None:
        """Log how a reward of chosen and rejected answers orders the pairs of a batch."""
        margin_B = reward_2B[0] - reward_2B[1]
        sums = {f"{name}reward_margin": margin_B.sum(), f"{name}reward_accuracy": (margin_B > 0).sum()}
        self.log_means(stage, sums, len(margin_B))

    def of_frozen(self, batch: PreferenceBatch, stage: str) -> tuple[Tensor, ...]:
        """(T,) each: log-probabilities of the tokens of all answers under the frozen models, which are asked once."""
        key = (stage, batch.examples)
        if key not in self._frozen_log_probs:
            frozen = (holder.model for holder in (self.frozen_teacher, self.frozen_other) if holder is not None)
            self._frozen_log_probs[key] = tuple(self.answer_token_log_probs(model, batch) for model in frozen)
        return self._frozen_log_probs[key]

    def contrast(self, batch: PreferenceBatch, stage: str) -> Tensor:
        """(2, B) log teacher - log other of the answers."""
        teacher_T, other_T = self.of_frozen(batch, stage)
        return sums_of_answers(teacher_T - other_T, batch)

    def on_validation_epoch_end(self) -> None:
        if self.rollouts is not None and not self.trainer.sanity_checking:
            batch = self.rollouts.of_validation()
            if batch is not None:
                self.evaluate_sampled(batch.student)
                self._log_lengths(batch.student)
        super().on_validation_epoch_end()

    def evaluate_sampled(self, tokens: TokenBatch) -> None:
        """Log what the method knows of answers that the policy samples to validation prompts, beside their lengths."""

    def _log_lengths(self, tokens: TokenBatch) -> None:
        samples = len(tokens.length_B)
        self.log("val/sampled_tokens", tokens.num_supervised / samples)
        ended = (tokens.target_T == self.student_tokenizer.eos_token_id).sum() / samples
        self.log("val/sampled_cut", 1 - ended)

    # ---------------------------------------------------------------- resume

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.rollouts is not None:
            checkpoint["lit_llm"]["rollouts"] = self.rollouts.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.rollouts is not None:
            self.rollouts.load_state(checkpoint["lit_llm"].get("rollouts", {}))
