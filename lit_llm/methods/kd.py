"""Vanilla knowledge distillation: the student's next-token distribution follows the teacher's, column by column."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from lit_llm.data.batch import DistillationBatch, SparseTargets
from lit_llm.data.teacher_store import TeacherStore
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import HeadTerms, distillation
from lit_llm.losses.sparse_teacher import sparse_distillation
from lit_llm.methods.base import Generation, Optimization
from lit_llm.methods.distillation import Distillation
from lit_llm.models.language_model import ModelSpec


class KD(Distillation):
    """Distil a teacher that shares the student's vocabulary.

    Loss per token: (1 - kd_weight) cross-entropy + kd_weight divergence (arXiv 2406.17328, section 2).

    Args:
        student: the model that is trained.
        teacher: the frozen model.
        kd_weight: share of the divergence; the rest goes to cross-entropy on the data. 0 to 1.
        divergence: how the two distributions are compared, and at which temperature.
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
        divergence: Divergence = Divergence(),
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),
        loss_chunk: Optional[int] = None,
        teacher_store: Optional[TeacherStore] = None,
    ) -> None:
        super().__init__(student, teacher, optimization, generation, loss_chunk, teacher_store)
        if not 0 <= kd_weight <= 1:
            raise ValueError(
                f"model.kd_weight is {kd_weight}; it is a share between 0 (only data) and 1 (only teacher)."
            )
        if teacher_store is not None and teacher_store.top_k is not None and divergence.name != "forward_kl":
            raise ValueError(
                f"model.teacher_store.top_k is {teacher_store.top_k}, but model.divergence.name is {divergence.name!r}, "
                "which needs the teacher's whole distribution. Set divergence.name: forward_kl, or leave top_k out."
            )
        self.kd_weight, self.divergence = kd_weight, divergence

    @property
    def stored_temperature(self) -> float:
        return self.divergence.temperature * self.divergence.teacher_temperature

    def configure_model(self) -> None:
        if self.teacher_tokenizer is not None:
            raise ValueError(
                f"KD compares the two models column by column, but their tokenizers differ: the student's has "
                f"{len(self.student_tokenizer):,} tokens, the teacher's {len(self.teacher_tokenizer):,}.\n"
                f"  Use DSKD (configs/dskd_cross_tokenizer.yaml), which aligns them, or a teacher of the same family."
            )
        super().configure_model()

    def training_step(self, batch: DistillationBatch, batch_idx: int) -> Tensor:
        weight = self.step_weight(batch, batch.step_tokens)
        if batch.teacher_top is None:
            terms = self.loss(batch, self.teacher_hidden(batch), weight)
        else:
            terms = self.loss_to_top(batch, batch.teacher_top, weight)

        means = {"ce": terms.ce, "kd": terms.kd, "agreement": terms.agree, "accuracy": terms.correct}
        self.log_step(means, terms.tokens)
        self.log("train/loss", terms.loss.detach())
        return terms.loss

    def loss(self, batch: DistillationBatch, teacher_TE: Tensor, weight: float) -> HeadTerms:
        return distillation(
            self.student.hidden(batch.student),
            self.student.head,
            batch.student.target_T,
            teacher_TE,
            self.teacher.head,
            self.divergence,
            ce_weight=(1 - self.kd_weight) * weight,
            kd_weight=self.kd_weight * weight,
            chunk_size=self.loss_chunk,
        )

    def loss_to_top(self, batch: DistillationBatch, teacher: SparseTargets, weight: float) -> HeadTerms:
        """The same against the teacher's largest probabilities, the others merged into one."""
        divergence = self.divergence
        return sparse_distillation(
            self.student.hidden(batch.student),
            self.student.head,
            batch.student.target_T,
            teacher.ids_TK,
            teacher.log_p_TK,
            teacher.log_rest_T,
            shared=min(self.student.vocab_size, self.teacher.vocab_size),
            temperature=divergence.temperature,
            scale=divergence.temperature**2 if divergence.scale_by_temperature_squared else 1.0,
            ce_weight=(1 - self.kd_weight) * weight,
            kd_weight=self.kd_weight * weight,
            chunk_size=self.loss_chunk,
        )

    def evaluate(self, batch: DistillationBatch, stage: str) -> None:
        hidden = self.evaluated_teacher_hidden(batch, stage)
        terms = self.loss(batch, hidden, weight=1.0)
        means = {"loss": terms.ce, "accuracy": terms.correct, "kd": terms.kd, "agreement": terms.agree}
        self.log_means(stage, means, terms.tokens)
        self.evaluate_teacher(hidden, batch, stage)
