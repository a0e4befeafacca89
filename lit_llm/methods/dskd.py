"""Dual-space knowledge distillation, v1 and v2, with one tokenizer or two.

arXiv 2406.17328 (v1), arXiv 2504.11426 (v2). The defaults are v2's; `projectors.version: v1` and the switches beside it
give the earlier method and everything between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, Optional

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lit_llm.data.batch import DistillationBatch
from lit_llm.data.teacher_store import TeacherStore
from lit_llm.data.vocabulary import shared_tokens, teacher_to_student_ids
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.dual_space import DualSpace, DualSpaceTerms, dual_space, dual_space_cma
from lit_llm.losses.head import Head
from lit_llm.methods.answers import Generation
from lit_llm.methods.base import Optimization, without_gradients
from lit_llm.methods.distillation import Distillation
from lit_llm.methods.dskd_settings import Projectors
from lit_llm.methods.on_policy import Compared, OnPolicy
from lit_llm.models.language_model import ModelSpec
from lit_llm.models.projector import (
    ClosedFormStudentToTeacher,
    CrossModelAttention,
    Projector,
    ideal_projectors,
    scales,
    shared_rows,
)


class DSKD(Distillation):
    """Distil in both representation spaces: compare the two models under each other's head.

    Loss: (1 - kd_weight) CE + kd_weight (t2s_ce + t2s_kd + s2t_kd).

    Args:
        student: the model that is trained.
        teacher: the frozen model, of any vocabulary.
        kd_weight: share of the distillation terms; the rest goes to cross-entropy on the data. 0 to 1.
        divergence: compares distributions in the student's space (and in the teacher's, as `projectors` says).
        projectors: the maps between the spaces, and what separates v1 from v2.
        optimization: optimizer and schedule.
        generation: answers generated during evaluation.
        loss_chunk: supervised tokens whose logits exist at a time. None chooses by the vocabularies.
        on_policy: compare on answers that the student samples: without mask, on the teacher's predictions (arXiv
            2504.11426). None: on the data alone.
        teacher_store: keep the teacher's hidden states on disk, so that it runs over the data once. None: it runs live.
    """

    def __init__(
        self,
        student: ModelSpec,
        teacher: ModelSpec,
        kd_weight: float = 0.5,
        divergence: Divergence = Divergence(),
        projectors: Projectors = Projectors(),
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
        if teacher_store is not None and teacher_store.top_k is not None:
            raise ValueError(
                f"model.teacher_store.top_k is {teacher_store.top_k}, but DSKD maps the teacher's hidden states, which "
                "such a store does not hold. Leave top_k out, or use KD."
            )
        self.kd_weight, self.divergence, self.projectors = kd_weight, divergence, projectors
        self.t2s: Projector | None = None
        self.s2t: nn.Module | None = None
        self.attention: CrossModelAttention | None = None

    # ---------------------------------------------------------------- models

    @cached_property
    def settings(self) -> Projectors:
        """The projectors' settings with the preset filled in."""
        return self.projectors.resolved(same_tokenizer=self.teacher_tokenizer is None)

    @property
    def uses_attention(self) -> bool:
        return self.teacher_tokenizer is not None and self.settings.across_tokenizers == "cma"

    @property
    def needs_teacher_embedding(self) -> bool:
        return self.uses_attention

    @cached_property
    def dual_space(self) -> DualSpace:
        """What the loss compares, masks and divides by."""
        same = self.settings.teacher_space == "same"
        kl = Divergence(name="forward_kl", temperature=self.divergence.temperature)
        return DualSpace(
            student_space=self.divergence,
            teacher_space=self.divergence if same else kl,
            teacher_target=self.settings.teacher_target,
            student_mask=self.settings.student_mask,
            masked_mean=self.settings.masked_mean,
            agreement_threshold=self.settings.agreement_threshold,
            spaces=self.settings.spaces,
        )

    @cached_property
    def sampled_dual_space(self) -> DualSpace:
        """The same for sampled answers, where no token is gold and nothing is masked."""
        return replace(self.dual_space, teacher_target="teacher", student_mask="none", agreement_threshold=1.0)

    def configure_model(self) -> None:
        settings = self.settings
        if self.uses_attention and self.rollouts is not None:
            raise ValueError(
                "model.on_policy is set, but projectors.across_tokenizers is 'cma', which learns from gold tokens that "
                "sampled answers do not have. Set across_tokenizers: eta, or leave on_policy out."
            )
        super().configure_model()
        if self.t2s is not None or self.attention is not None:
            return
        if self.uses_attention:
            self.attention = CrossModelAttention(self.student.hidden_size, self.teacher.hidden_size, bias=settings.bias)
            return
        self._build_projectors(settings)
        if self.teacher_tokenizer is not None:
            table_W = teacher_to_student_ids(
                self.student_tokenizer, self.teacher_tokenizer, settings.token_map, self.teacher.vocab_size
            )
            self.register_buffer("teacher_to_student_W", table_W, persistent=False)

    def _build_projectors(self, settings: Projectors) -> None:
        student_VD, teacher_WE = self.student.head.weight_VD.detach(), self.teacher.head.weight_VD
        student_K = teacher_K = None
        if self.teacher_tokenizer is not None:
            student_K, teacher_K = shared_tokens(self.student_tokenizer, self.teacher_tokenizer, settings.token_map)
        shared = shared_rows(
            student_VD,
            teacher_WE,
            student_K,
            teacher_K,
            num_tokens=max(self.student_tokenizer.get_vocab().values()) + 1,
            topk=settings.topk_vocab,
        )
        to_student = to_teacher = None
        if settings.start == "ideal" or settings.student_to_teacher == "closed_form":
            to_student, to_teacher = ideal_projectors(
                student_VD, teacher_WE, shared, rcond=settings.rcond, center_heads=settings.center_heads
            )
            rank_zero_info(
                f"Projectors from {shared.num:,} shared tokens: teacher to student keeps {to_student.kept} directions, "
                f"relative error {to_student.error:.3f}; student to teacher {to_teacher.kept}, {to_teacher.error:.3f}"
            )
        ideal, widths = settings.start == "ideal", (self.teacher.hidden_size, self.student.hidden_size)
        self.t2s = Projector(*widths, bias=settings.bias, start=to_student if ideal else None)
        if settings.student_to_teacher == "closed_form":
            self.s2t = ClosedFormStudentToTeacher(to_teacher.gram_inverse, shared, center_heads=settings.center_heads)
        else:
            self.s2t = Projector(*reversed(widths), bias=settings.bias, start=to_teacher if ideal else None)

    def parameter_groups(self) -> list[dict[str, Any]]:
        trained = self._projector_parameters()
        decay = self.optimization.weight_decay
        return [
            *super().parameter_groups(),
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": decay, "lr": self.settings.lr},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "lr": self.settings.lr},
        ]

    def _projector_parameters(self) -> list[nn.Parameter]:
        modules = [module for module in (self.t2s, self.s2t, self.attention) if module is not None]
        return [parameter for module in modules for parameter in module.parameters()]

    # -------------------------------------------------------------- training

    def training_step(self, batch: DistillationBatch, batch_idx: int) -> Tensor:
        compared = self.compared(batch)
        ce_weight = (1 - self.kd_weight) * self.step_weight(batch, batch.step_tokens)
        data_loss = self.data_loss(batch, ce_weight) if compared.sampled else 0.0
        terms = self.loss(
            compared.batch,
            self.teacher_hidden(compared.batch),
            ce_weight=0.0 if compared.sampled else ce_weight,
            kd_denominator=self._kd_denominator(compared),
            settings=self.sampled_dual_space if compared.sampled else None,
        )

        if not compared.sampled:
            self.log_step({"ce": terms.ce, "accuracy": terms.correct}, terms.tokens)
        self.log_step({"align_ratio": terms.pairs}, terms.tokens)
        self.log_step({"t2s_accuracy": terms.t2s_correct, "s2t_agreement": terms.s2t_agree}, terms.pairs)
        self.log_step({"mapped_ratio": terms.mapped}, terms.pairs)
        mapped = {"t2s_ce": terms.t2s_ce, "s2t_kd": terms.s2t_kd, "t2s_agreement": terms.t2s_agree}
        self.log_step({**mapped, "agreement": terms.agree}, terms.mapped)
        self.log_step({"t2s_kd": terms.t2s_kd}, terms.masked)
        loss = terms.loss + data_loss
        self.log_loss(loss)
        return loss

    def loss(
        self,
        batch: DistillationBatch,
        teacher_hidden: Tensor,
        *,
        ce_weight: float,
        kd_denominator: float | None,
        settings: DualSpace | None = None,
    ) -> DualSpaceTerms:
        """The dual-space loss of a batch, from (T, E) or (U, E) hidden states of the teacher.

        `settings` stand in for those of the config.
        """
        settings = settings or self.dual_space
        if self.uses_attention:
            return self._loss_with_attention(batch, teacher_hidden, ce_weight, kd_denominator, settings)
        student_TD = self.student.hidden(batch.student)
        student_AD, teacher_AE = student_TD, teacher_hidden
        if batch.teacher is not None:
            student_AD, teacher_AE = student_TD[batch.pair_student_A], teacher_hidden[batch.pair_teacher_A]
        projected_student, projected_head = self._student_in_teacher_space(student_AD)
        return dual_space(
            student_TD,
            batch.student.target_T,
            self.student.head,
            teacher_AE,
            self.teacher.head,
            self.t2s(teacher_AE),
            projected_student,
            settings,
            ce_weight=ce_weight,
            kd_weight=self.kd_weight,
            kd_denominator=kd_denominator,
            pair_student_A=batch.pair_student_A,
            teacher_to_student_W=None if batch.teacher is None else self.teacher_to_student_W,
            projected_student_head=projected_head,
            chunk_size=self.loss_chunk,
        )

    def loss_terms(self, batch: DistillationBatch) -> dict[str, Callable[[], Tensor]]:
        hidden, denominator = self.teacher_hidden(batch), self._kd_denominator(self.on_data(batch))

        def space(of: Literal["student", "teacher"]) -> DualSpaceTerms:
            settings = replace(self.dual_space, spaces=of)
            return self.loss(batch, hidden, ce_weight=0.0, kd_denominator=denominator, settings=settings)

        def projected_teacher(terms: DualSpaceTerms) -> Tensor:
            divisor = terms.mapped.clamp(min=1) if denominator is None else denominator
            return terms.t2s_ce * (self.kd_weight / divisor)

        def t2s_ce() -> Tensor:
            with without_gradients(self.student.parameters()):
                terms = space("student")
            return terms.loss - (terms.loss.detach() - projected_teacher(terms))

        def t2s_kd() -> Tensor:
            with without_gradients(self._projector_parameters()):
                terms = space("student")
            return terms.loss - projected_teacher(terms)

        terms: dict[str, Callable[[], Tensor]] = {}
        if self.kd_weight < 1:
            terms["ce"] = lambda: self.cross_entropy_term(batch, 1 - self.kd_weight)
        if self.kd_weight > 0 and self.settings.spaces != "teacher":
            terms |= {"t2s_ce": t2s_ce, "t2s_kd": t2s_kd}
        if self.kd_weight > 0 and self.settings.spaces != "student":
            terms["s2t_kd"] = lambda: space("teacher").loss
        return terms

    def _student_in_teacher_space(self, student_AD: Tensor) -> tuple[Tensor, Head | None]:
        """S h_s, (A, E), to be scored by the teacher's head; or h_s and W_t S, where that takes fewer multiplications."""
        if isinstance(self.s2t, Projector):
            return self.s2t(student_AD), None
        head, teacher_head = self.student.head, self.teacher.head
        # a frozen head (LoRA) gives one S for the whole run
        step = self.global_step if self.student.trains_head else 0
        heads = head.weight_VD.detach(), teacher_head.weight_VD
        if self.s2t.composing_pays(len(student_AD), self.student.hidden_size, self.teacher.hidden_size):
            return student_AD, teacher_head._replace(weight_VD=self.s2t.composed(*heads, step))
        return self.s2t(student_AD, *heads, step), None

    def _loss_with_attention(
        self, batch, teacher_UE, ce_weight: float, kd_denominator: float, settings: DualSpace
    ) -> DualSpaceTerms:
        student, teacher = batch.student, batch.teacher
        student_TD = self.student.hidden(student)
        student_embedding_VD, teacher_embedding_WE = self.student.input_embedding, self.teacher.input_embedding
        student_ids = (student.ids_BL.flatten()[student.position_T], student.target_T, student.sequence_T)
        teacher_ids = (teacher.ids_BL.flatten()[teacher.position_T], teacher.target_T, teacher.sequence_T)
        value_U = teacher.target_T
        if self.settings.teacher_target == "teacher":
            value_U = self._teacher_predictions(teacher_UE)
        deviations = scales(teacher_UE, teacher_ids[0], teacher_ids[1], value_U, teacher_embedding_WE)
        scores = self.attention.scores(
            student_ids, teacher_ids, student_embedding_VD, teacher_embedding_WE, deviations.key, len(student.length_B)
        )
        attended_TD, attended_UE = self.attention(
            student_TD, teacher_UE, scores, value_U, teacher_embedding_WE, deviations
        )
        return dual_space_cma(
            student_TD,
            student.target_T,
            self.student.head,
            attended_TD,
            teacher_UE,
            self.teacher.head,
            attended_UE,
            settings,
            ce_weight=ce_weight,
            kd_weight=self.kd_weight,
            kd_denominator=kd_denominator,
            chunk_size=self.loss_chunk,
        )

    @torch.no_grad()
    def _teacher_predictions(self, teacher_UE: Tensor) -> Tensor:
        return torch.cat([self.teacher.head(piece_CE).argmax(-1) for piece_CE in teacher_UE.split(256)])

    def _kd_denominator(self, compared: Compared) -> float | None:
        """Tokens that the distillation sums are divided by; None: the mapped pairs of the micro-batch, as published."""
        eta = compared.batch.teacher is not None and not self.uses_attention
        if eta and self.settings.masked_mean == "agreeing":
            return None
        return 1 / self.step_weight(compared.batch, compared.pairs if eta else compared.tokens)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        projectors = self._projector_parameters()
        if not isinstance(self.trainer.strategy, DeepSpeedStrategy):  # which has no whole gradients to measure
            self.log("train/projector_grad_norm", self.gradient_norm(projectors))
        if self.settings.gradient_clip is not None:
            nn.utils.clip_grad_norm_(projectors, self.settings.gradient_clip)
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def check_divided(self, weights: bool, frozen: bool, norms: bool) -> None:
        super().check_divided(weights, frozen, norms)
        if self.settings.gradient_clip is not None and not norms:
            raise ValueError(
                f"projectors.gradient_clip is {self.settings.gradient_clip}, but trainer.strategy divides gradients among "
                f"processes, where the projectors' norm is not known. Leave it out; trainer.gradient_clip_val clips all."
            )

    # ------------------------------------------------------------ evaluation

    def evaluate_sampled(self, batch: DistillationBatch) -> None:
        super().evaluate_sampled(batch)
        terms = self.loss(
            batch, self.teacher_hidden(batch), ce_weight=0.0, kd_denominator=1.0, settings=self.sampled_dual_space
        )
        count = terms.mapped.clamp(min=1)
        self.log("val/sampled_t2s_kd", terms.t2s_kd / count)
        self.log("val/sampled_s2t_kd", terms.s2t_kd / count)

    def evaluate(self, batch: DistillationBatch, stage: str) -> None:
        hidden = self.evaluated_teacher_hidden(batch, stage)
        terms = self.loss(batch, hidden, ce_weight=1.0, kd_denominator=1.0)
        self.log_means(stage, {"loss": terms.ce, "accuracy": terms.correct}, terms.tokens)
        mapped = {"agreement": terms.agree, "t2s_agreement": terms.t2s_agree}
        self.log_means(stage, {**mapped, "t2s_ce": terms.t2s_ce, "s2t_kd": terms.s2t_kd}, terms.mapped)
        self.log_means(stage, {"t2s_kd": terms.t2s_kd}, terms.masked)
        self.evaluate_teacher(hidden, batch, stage)
