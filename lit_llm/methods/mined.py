"""MinED: the teacher's logits are carried into the student's vocabulary along the smallest edit distances."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from lit_llm.data.batch import DistillationBatch
from lit_llm.data.minimum_edit import nearest_tokens
from lit_llm.data.teacher_store import TeacherStore
from lit_llm.data.vocabulary import token_spellings
from lit_llm.losses.cross_vocabulary import first_source, mined
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import HeadTerms
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Optimization
from lit_llm.methods.cross_vocabulary import CrossVocabulary
from lit_llm.models.language_model import ModelSpec


class MinED(CrossVocabulary):
    """Distil a teacher of another vocabulary: every token gives its logit to the student's token nearest in spelling.

    Loss per token: (1 - kd_weight) cross-entropy + kd_weight divergence from the carried logits where time warping
    pairs one token with one, from a distribution that is sure of the data elsewhere (FuseLLM, arXiv 2401.10491; weights
    as in the code of arXiv 2406.17328). The table of nearest tokens is computed once per pair of vocabularies and kept
    in the cache; warping happens when the data is tokenised.

    Args:
        student: the model that is trained.
        teacher: the frozen model, with another tokenizer.
        kd_weight: share of the divergence; the rest goes to cross-entropy on the data. 0 to 1.
        divergence: forward_kl as published.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabularies.
        teacher_store: keep the teacher's hidden states on disk, so that it runs over the data once. None: it runs live.
    """

    alignments = ("minimum_edit",)

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
        super().__init__(student, teacher, kd_weight, optimization, generation, loss_chunk, teacher_store)
        self.divergence = divergence

    def configure_model(self) -> None:
        self.refuse_one_tokenizer(instead="KD (configs/kd.yaml), which compares every token")
        super().configure_model()
        if not hasattr(self, "student_to_teacher_V"):
            spellings = token_spellings(self.student_tokenizer), token_spellings(self.teacher_tokenizer)
            nearest_W = nearest_tokens(*spellings, self.teacher.vocab_size)
            source_V = first_source(nearest_W, self.student.vocab_size)
            self.register_buffer("student_to_teacher_V", source_V, persistent=False)

    def loss(
        self, batch: DistillationBatch, teacher_hidden: Tensor, *, ce_weight: float, kd_weight: float
    ) -> HeadTerms:
        return mined(
            self.student.hidden(batch.student),
            self.student.head,
            batch.student.target_T,
            batch.pair_student_A,
            teacher_hidden[batch.pair_teacher_A],
            self.teacher.head,
            self.student_to_teacher_V,
            self.divergence,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            chunk_size=self.loss_chunk,
        )
