"""Vanilla knowledge distillation: the student's next-token distribution follows the teacher's, column by column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from torch import Tensor

from lit_llm.data.batch import DistillationBatch, SparseTargets
from lit_llm.data.teacher_store import TeacherStore
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import HeadTerms, distillation
from lit_llm.losses.sparse_teacher import sparse_distillation
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Optimization
from lit_llm.methods.distillation import Distillation
from lit_llm.methods.on_policy import OnPolicy
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
        on_policy: compare on answers that the student samples. None: on the data alone.
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
        on_policy: Optional[OnPolicy] = None,
        teacher_store: Optional[TeacherStore] = None,
    ) -> None:
        super().__init__(student, teacher, optimization, generation, loss_chunk, on_policy, teacher_store)
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
        compared = self.compared(batch)
        weights = {
            "ce_weight": (1 - self.kd_weight) * self.step_weight(batch, batch.step_tokens),
            "kd_weight": self.kd_weight * self.step_weight(batch, compared.tokens),
        }
        data_loss = 0.0
        if compared.sampled:
            data_loss, weights["ce_weight"] = self.data_loss(batch, weights["ce_weight"]), 0.0
        if batch.teacher_top is None:
            terms = self.loss(compared.batch, self.teacher_hidden(compared.batch), **weights)
        else:
            terms = self.loss_to_top(batch, batch.teacher_top, **weights)

        self.log_step({"kd": terms.kd, "agreement": terms.agree}, terms.tokens)
        if not compared.sampled:
            self.log_step({"ce": terms.ce, "accuracy": terms.correct}, terms.tokens)
        loss = terms.loss + data_loss
        self.log_loss(loss)
        return loss

    def loss(self, batch: DistillationBatch, teacher_TE: Tensor, *, ce_weight: float, kd_weight: float) -> HeadTerms:
        return distillation(
            self.student.hidden(batch.student),
            self.student.head,
            batch.student.target_T,
            teacher_TE,
            self.teacher.head,
            self.divergence,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            chunk_size=self.loss_chunk,
        )

    def loss_terms(self, batch: DistillationBatch) -> dict[str, Callable[[], Tensor]]:
        teacher_TE, weight = self.teacher_hidden(batch), self.kd_weight * self.step_weight(batch, batch.step_tokens)
        terms = {
            "ce": lambda: self.cross_entropy_term(batch, 1 - self.kd_weight),
            "kd": lambda: self.loss(batch, teacher_TE, ce_weight=0.0, kd_weight=weight).loss,
        }
        weights = {"ce": 1 - self.kd_weight, "kd": self.kd_weight}
        return {name: term for name, term in terms.items() if weights[name] > 0}

    def loss_to_top(
        self, batch: DistillationBatch, teacher: SparseTargets, *, ce_weight: float, kd_weight: float
    ) -> HeadTerms:
        """The same against the teacher's largest probabilities, the others merged into one."""
        divergence = self.divergence
        return sparse_distillation(
            self.student.hidden(batch.student),
            self.student.head,
            batch.student.target_T,
            teacher.ids_TK,
            teacher.log_p_TK,
            teacher.log_rest_T,
            shared=min(self.student.head.num_rows, self.teacher.head.num_rows),
            temperature=divergence.temperature,
            scale=divergence.temperature**2 if divergence.scale_by_temperature_squared else 1.0,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            chunk_size=self.loss_chunk,
        )

    def evaluate(self, batch: DistillationBatch, stage: str) -> None:
        hidden = self.evaluated_teacher_hidden(batch, stage)
        terms = self.loss(batch, hidden, ce_weight=1 - self.kd_weight, kd_weight=self.kd_weight)
        means = {"loss": terms.ce, "accuracy": terms.correct, "kd": terms.kd, "agreement": terms.agree}
        self.log_means(stage, means, terms.tokens)
        self.evaluate_teacher(hidden, batch, stage)
