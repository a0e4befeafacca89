"""Vanilla knowledge distillation: the student's next-token distribution follows the teacher's, column by column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Optional

from torch import Tensor

from lit_llm.data.batch import DistillationBatch
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import HeadTerms, distillation
from lit_llm.methods.base import Generation, Optimization
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
    ) -> None:
        super().__init__(student, teacher, optimization, generation, loss_chunk, on_policy)
        if not 0 <= kd_weight <= 1:
            raise ValueError(
                f"model.kd_weight is {kd_weight}; it is a share between 0 (only data) and 1 (only teacher)."
            )
        self.kd_weight, self.divergence = kd_weight, divergence

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
        ce_weight = (1 - self.kd_weight) * self.step_weight(batch, batch.step_tokens)
        kd_weight = self.kd_weight * self.step_weight(batch, compared.tokens)
        data_loss = self.data_loss(batch, ce_weight) if compared.sampled else 0.0
        terms = self.loss(
            compared.batch,
            self.teacher_hidden(compared.batch),
            ce_weight=0.0 if compared.sampled else ce_weight,
            kd_weight=kd_weight,
        )

        self.log_step({"kd": terms.kd, "agreement": terms.agree}, terms.tokens)
        if not compared.sampled:
            self.log_step({"ce": terms.ce, "accuracy": terms.correct}, terms.tokens)
        loss = terms.loss + data_loss
        self.log("train/loss", loss.detach())
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

    def evaluate(self, batch: DistillationBatch, stage: str) -> None:
        hidden = self.evaluated_teacher_hidden(batch, stage)
        terms = self.loss(batch, hidden, ce_weight=1 - self.kd_weight, kd_weight=self.kd_weight)
        means = {"loss": terms.ce, "accuracy": terms.correct, "kd": terms.kd, "agreement": terms.agree}
        self.log_means(stage, means, terms.tokens)
        self.evaluate_teacher(hidden, batch, stage)
