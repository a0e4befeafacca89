"""Supervised fine-tuning: next-token cross-entropy on the answers."""

from __future__ import annotations

from torch import Tensor

from lit_llm.data.batch import DistillationBatch
from lit_llm.data.instructions import Instructions
from lit_llm.data.languages import Languages
from lit_llm.losses.fused_head import cross_entropy
from lit_llm.methods.base import Method


class SFT(Method):
    """Fine-tune one model on answers: the baseline of every distillation, and how a teacher is made.

    With `Languages` as data it is continued pre-training of the whole model: the baseline of LayerMoE.
    """

    data_classes = (Instructions, Languages)

    def training_step(self, batch: DistillationBatch, batch_idx: int) -> Tensor:
        hidden_TD = self.student.hidden(batch.student)
        terms = cross_entropy(hidden_TD, self.student.head, batch.student.target_T, chunk_size=self.loss_chunk)

        self.log_step({"ce": terms.loss, "loss": terms.loss, "accuracy": terms.correct}, terms.tokens)
        return terms.loss * self.step_weight(batch, batch.step_tokens)
