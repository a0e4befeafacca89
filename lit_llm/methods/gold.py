"""GOLD, TRL's General Online Logit Distillation, on given answers: groups of tokens that end at the same byte."""

from __future__ import annotations

from typing import Optional

from torch import Tensor

from lit_llm.data.batch import DistillationBatch
from lit_llm.data.teacher_store import TeacherStore
from lit_llm.data.vocabulary import shared_tokens
from lit_llm.losses.fused_head import HeadTerms
from lit_llm.losses.gold import Hybrid, TokenGroups, gold
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Optimization
from lit_llm.methods.cross_vocabulary import CrossVocabulary
from lit_llm.models.language_model import ModelSpec


class GOLD(CrossVocabulary):
    """Distil a teacher of another vocabulary group by group; a group is the shortest run that ends alike on both sides.

    The distribution of a group is that of its first token times the probabilities of its other tokens. Loss:
    (1 - kd_weight) cross-entropy + kd_weight distance, which is the L1 distance of sorted probabilities or, with
    `hybrid`, generalised JS on the tokens that both vocabularies have plus the sorted distance on the rest. From the
    GOLD trainer of TRL (P. Patino et al., "Unlocking On-Policy Distillation for Any Model Family", 2025), where kd_weight
    is 1, answers are the student's own, end tokens are left out and the mean is over groups, then samples.

    Args:
        student: the model that is trained.
        teacher: the frozen model, with another tokenizer.
        kd_weight: share of the distance; the rest goes to cross-entropy on the data. 0 to 1.
        hybrid: compare shared tokens with each other and only the rest by rank.
        beta: weight of the student in the mixture of the generalised JS (1 - beta in TRL); 0 to 1, without its ends.
        matched_weight: of the shared tokens' term; None: their share of the teacher's vocabulary.
        unmatched_weight: of the rest's term; None: what is left to 1.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabularies.
        teacher_store: keep the teacher's hidden states on disk, so that it runs over the data once. None: it runs live.
    """

    alignments = ("groups",)

    def __init__(
        self,
        student: ModelSpec,
        teacher: ModelSpec,
        kd_weight: float = 0.5,
        hybrid: bool = False,
        beta: float = 0.5,
        matched_weight: Optional[float] = None,
        unmatched_weight: Optional[float] = None,
        optimization: Optimization = Optimization(),
        generation: Generation = Generation(),
        loss_chunk: Optional[int] = None,
        teacher_store: Optional[TeacherStore] = None,
    ) -> None:
        super().__init__(student, teacher, kd_weight, optimization, generation, loss_chunk, teacher_store)
        weights = {"matched_weight": matched_weight, "unmatched_weight": unmatched_weight}
        given = [name for name, weight in weights.items() if weight is not None] + ["beta"] * (beta != 0.5)
        if given and not hybrid:
            raise ValueError(f"model.{given[0]} is set, but model.hybrid is false, which does not use it. Set hybrid.")
        if (matched_weight is None) != (unmatched_weight is None):
            raise ValueError(
                f"model.matched_weight is {matched_weight} and model.unmatched_weight is {unmatched_weight}; set both, "
                "or neither for the share of the vocabulary that is matched."
            )
        if any(weight is not None and weight < 0 for weight in weights.values()):
            raise ValueError(f"model.matched_weight and model.unmatched_weight are at least 0, not {weights}.")
        if not 0 < beta < 1:
            raise ValueError(f"model.beta is {beta}; it is a share between 0 and 1.")
        self.hybrid, self.beta = hybrid, beta
        self.matched_weight, self.unmatched_weight = matched_weight, unmatched_weight

    def configure_model(self) -> None:
        self.refuse_one_tokenizer(
            instead="ULD (configs/uld.yaml), or KD with divergence.name: generalized_js in place of hybrid: true"
        )
        super().configure_model()
        if self.hybrid and not hasattr(self, "shared_student_K"):
            shared = shared_tokens(self.student_tokenizer, self.teacher_tokenizer)
            for name, ids_K in zip(("shared_student_K", "shared_teacher_K"), shared, strict=True):
                self.register_buffer(name, ids_K, persistent=False)

    @property
    def matching(self) -> Hybrid | None:
        """The shared tokens and their weights; None without `hybrid`."""
        if not self.hybrid:
            return None
        share = len(self.shared_teacher_K) / self.teacher.vocab_size
        matched, unmatched = self.matched_weight, self.unmatched_weight
        if matched is None:
            matched, unmatched = share, 1 - share
        return Hybrid(self.shared_student_K, self.shared_teacher_K, self.beta, matched, unmatched)

    def loss(
        self, batch: DistillationBatch, teacher_hidden: Tensor, *, ce_weight: float, kd_weight: float
    ) -> HeadTerms:
        return gold(
            self.student.hidden(batch.student),
            self.student.head,
            batch.student.target_T,
            TokenGroups(batch.pair_student_A, batch.pieces_student_A),
            teacher_hidden,
            self.teacher.head,
            batch.teacher.target_T,
            TokenGroups(batch.pair_teacher_A, batch.pieces_teacher_A),
            self.matching,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            chunk_size=self.loss_chunk,
        )
