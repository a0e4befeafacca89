"""What the baselines across vocabularies share: cross-entropy on the data beside one term on paired tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Optional

import torch
from torch import Tensor

from lit_llm.data.batch import DistillationBatch
from lit_llm.data.teacher_store import TeacherStore
from lit_llm.losses.fused_head import HeadTerms
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Optimization
from lit_llm.methods.distillation import Distillation
from lit_llm.models.language_model import ModelSpec


class CrossVocabulary(Distillation, ABC):
    """A student that learns from the data and, at paired tokens, from a teacher of another vocabulary.

    Loss: ((1 - kd_weight) CE + kd_weight KD) / n, both sums over tokens of the optimizer step, n its supervised tokens of
    the student, all accumulation steps and ranks together. Subclasses write `loss`.

    Args:
        student: the model that is trained.
        teacher: the frozen model.
        kd_weight: share of the term on paired tokens; the rest goes to cross-entropy on the data. 0 to 1.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabularies.
        teacher_store: keep the teacher's hidden states on disk, so that it runs over the data once. None: it runs live.
    """

    def __init__(
        self,
        student: ModelSpec,
        teacher: ModelSpec,
        kd_weight: float = 0.5,
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),
        loss_chunk: Optional[int] = None,
        teacher_store: Optional[TeacherStore] = None,
    ) -> None:
        super().__init__(student, teacher, optimization, generation, loss_chunk, teacher_store=teacher_store)
        if teacher_store is not None and teacher_store.top_k is not None:
            raise ValueError(
                f"model.teacher_store.top_k is {teacher_store.top_k}, but {type(self).__name__} needs the teacher's whole "
                "distribution. Leave top_k out."
            )
        if not 0 <= kd_weight <= 1:
            raise ValueError(
                f"model.kd_weight is {kd_weight}; it is a share between 0 (only data) and 1 (only teacher)."
            )
        self.kd_weight = kd_weight

    @abstractmethod
    def loss(
        self, batch: DistillationBatch, teacher_hidden: Tensor, *, ce_weight: float, kd_weight: float
    ) -> HeadTerms:
        """The weighted sums of a batch, from (U, E) hidden states of the teacher."""

    def refuse_one_tokenizer(self, instead: str) -> None:
        """Raise a ValueError that names another method, if student and teacher share their tokenizer."""
        if self.teacher_tokenizer is None:
            raise ValueError(
                f"{type(self).__name__} is for two tokenizers, but student and teacher share one of "
                f"{len(self.student_tokenizer):,} tokens.\n  Use {instead}."
            )

    def training_step(self, batch: DistillationBatch, batch_idx: int) -> Tensor:
        weight = self.step_weight(batch, batch.step_tokens)
        terms = self.loss(
            batch,
            self.teacher_hidden(batch),
            ce_weight=(1 - self.kd_weight) * weight,
            kd_weight=self.kd_weight * weight,
        )

        self.log_step({"ce": terms.ce, "kd": terms.kd, "accuracy": terms.correct}, terms.tokens)
        self.log_step({"align_ratio": self.num_paired(batch)}, terms.tokens)
        self.log_loss(terms.loss)
        return terms.loss

    def loss_terms(self, batch: DistillationBatch) -> dict[str, Callable[[], Tensor]]:
        hidden, weight = self.teacher_hidden(batch), self.kd_weight * self.step_weight(batch, batch.step_tokens)
        terms: dict[str, Callable[[], Tensor]] = {}
        if self.kd_weight < 1:
            terms["ce"] = lambda: self.cross_entropy_term(batch, 1 - self.kd_weight)
        if self.kd_weight > 0:
            terms["kd"] = lambda: self.loss(batch, hidden, ce_weight=0.0, kd_weight=weight).loss
        return terms

    def evaluate(self, batch: DistillationBatch, stage: str) -> None:
        hidden = self.evaluated_teacher_hidden(batch, stage)
        terms = self.loss(batch, hidden, ce_weight=1 - self.kd_weight, kd_weight=self.kd_weight)
        means = {"loss": terms.ce, "accuracy": terms.correct, "kd": terms.kd}
        self.log_means(stage, {**means, "align_ratio": self.num_paired(batch)}, terms.tokens)
        self.evaluate_teacher(hidden, batch, stage)

    def num_paired(self, batch: DistillationBatch) -> Tensor:
        """How many of the student's supervised tokens are in a pair, or in a group of tokens."""
        if batch.pieces_student_A is not None:
            return batch.pieces_student_A.sum()
        rows = batch.student.target_T if batch.pair_student_A is None else batch.pair_student_A
        return torch.tensor(len(rows), device=self.device)
