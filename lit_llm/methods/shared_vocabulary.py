"""Knowledge distillation on the tokens that two vocabularies share."""

from __future__ import annotations

from typing import Literal, Optional

from torch import Tensor

from lit_llm.data.batch import DistillationBatch
from lit_llm.data.teacher_store import TeacherStore
from lit_llm.data.vocabulary import shared_tokens
from lit_llm.losses.cross_vocabulary import shared_vocabulary
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import HeadTerms
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Optimization
from lit_llm.methods.cross_vocabulary import CrossVocabulary
from lit_llm.models.language_model import ModelSpec


class SharedVocabularyKD(CrossVocabulary):
    """Distil a teacher of another vocabulary where tokens cover the same bytes, over the tokens that both have.

    Loss per token: (1 - kd_weight) cross-entropy + kd_weight divergence of the two distributions, each renormalised over
    the shared tokens (the simple method of KDFlow, arXiv 2603.01875, whose documentation prefers it to DSKD).

    Args:
        student: the model that is trained.
        teacher: the frozen model, with another tokenizer.
        kd_weight: share of the divergence; the rest goes to cross-entropy on the data. 0 to 1.
        divergence: how the two distributions are compared, and at which temperature.
        token_map: which tokens two vocabularies share: by `bytes`, or by `string` as released.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabularies.
        teacher_store: keep the teacher's hidden states on disk, so that it runs over the data once. None: it runs live.
    """

    alignments = ("bytes", "released")

    def __init__(
        self,
        student: ModelSpec,
        teacher: ModelSpec,
        kd_weight: float = 0.5,
        divergence: Divergence = Divergence(),
        token_map: Literal["bytes", "string"] = "bytes",
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),
        loss_chunk: Optional[int] = None,
        teacher_store: Optional[TeacherStore] = None,
    ) -> None:
        super().__init__(student, teacher, kd_weight, optimization, generation, loss_chunk, teacher_store)
        self.divergence, self.token_map = divergence, token_map

    def configure_model(self) -> None:
        self.refuse_one_tokenizer(instead="KD (configs/kd.yaml), which is the same there")
        super().configure_model()
        if not hasattr(self, "shared_student_K"):
            shared = shared_tokens(self.student_tokenizer, self.teacher_tokenizer, self.token_map)
            for name, ids_K in zip(("shared_student_K", "shared_teacher_K"), shared, strict=True):
                self.register_buffer(name, ids_K, persistent=False)

    def loss(
        self, batch: DistillationBatch, teacher_hidden: Tensor, *, ce_weight: float, kd_weight: float
    ) -> HeadTerms:
        return shared_vocabulary(
            self.student.hidden(batch.student),
            self.student.head,
            batch.student.target_T,
            batch.pair_student_A,
            teacher_hidden[batch.pair_teacher_A],
            self.teacher.head,
            self.shared_student_K,
            self.shared_teacher_K,
            self.divergence,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            chunk_size=self.loss_chunk,
        )
