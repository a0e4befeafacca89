"""Universal logit distillation: sorted probabilities are compared, so that no token needs a counterpart."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_llm.data.batch import DistillationBatch
from lit_llm.losses.cross_vocabulary import uld
from lit_llm.losses.fused_head import HeadTerms
from lit_llm.methods.cross_vocabulary import CrossVocabulary


class ULD(CrossVocabulary):
    """Distil a teacher of any vocabulary: the k-th token of an answer learns from the teacher's k-th.

    Loss per token: (1 - kd_weight) cross-entropy + kd_weight L1 distance of the two sorted lists of probabilities
    (arXiv 2402.12030; weights and pairs as in the code of arXiv 2406.17328). With one tokenizer k-th with k-th is the
    same token.

    Args:
        student: the model that is trained.
        teacher: the frozen model.
        kd_weight: share of the distance; the rest goes to cross-entropy on the data. 0 to 1.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabularies.
        teacher_store: keep the teacher's hidden states on disk, so that it runs over the data once. None: it runs live.
    """

    alignments = ("kth",)

    def loss(
        self, batch: DistillationBatch, teacher_hidden: Tensor, *, ce_weight: float, kd_weight: float
    ) -> HeadTerms:
        pair_student_A, pair_teacher_A = batch.pair_student_A, batch.pair_teacher_A
        if batch.teacher is None:
            pair_student_A = pair_teacher_A = torch.arange(len(teacher_hidden), device=teacher_hidden.device)
        return uld(
            self.student.hidden(batch.student),
            self.student.head,
            batch.student.target_T,
            pair_student_A,
            teacher_hidden[pair_teacher_A],
            self.teacher.head,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            chunk_size=self.loss_chunk,
        )
