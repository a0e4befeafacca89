"""The three walks over chunks of rows that make up dual-space distillation; see `dual_space`.

Shapes: T supervised student rows, A paired rows, M rows that count in t2s_kd, C rows of a chunk, N of them that count
(N <= C), D and E widths, V and W vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_llm.losses.chunks import sum_over_chunks
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import paired_first
from lit_llm.losses.head import Head
from lit_llm.losses.logit_gradient import Formed, token_terms
from lit_llm.losses.scratch import best_tokens


@dataclass(frozen=True)
class DualSpace:
    """What is compared, masked and divided by; see `Projectors` for the meaning in a config.

    Attributes:
        student_space: divergence of z_s from z_ts.
        teacher_space: divergence of z_st from z_t.
        teacher_target: label of t2s_ce.
        student_mask: rows that count in t2s_kd: all, those where z_ts predicts the data (`correct`) or its label
            (`agree`).
        masked_mean: t2s_kd is divided by the rows that its mask keeps in this call (`agreeing`), or as the other terms.
        agreement_threshold: above this share of agreeing rows nothing is masked.
        spaces: `both`, or only the terms of one; the others are not computed and count as 0.
    """

    student_space: Divergence = field(default_factory=Divergence)
    teacher_space: Divergence = field(default_factory=Divergence)
    teacher_target: Literal["gold", "teacher"] = "teacher"
    student_mask: Literal["none", "correct", "agree"] = "agree"
    masked_mean: Literal["agreeing", "labelled"] = "agreeing"
    agreement_threshold: float = 1.0
    spaces: Literal["both", "student", "teacher"] = "both"


class TeacherSpace(NamedTuple):
    loss: Tensor
    s2t_kd: Tensor
    s2t_agree: Tensor
    label_A: Tensor


class ProjectedTeacher(NamedTuple):
    loss: Tensor
    t2s_ce: Tensor
    best_A: Tensor


class StudentSpace(NamedTuple):
    loss: Tensor
    ce: Tensor
    t2s_kd: Tensor
    masked: Tensor
    correct: Tensor
    agree: Tensor


def teacher_space(
    settings: DualSpace,
    teacher_AE: Tensor,
    teacher_head: Head,
    projected_student_AE: Tensor,
    gold_A: Tensor,
    teacher_to_student_W: Tensor | None,
    num_student: int,
    chunk_size: int | None,
    projected_head: Head | None = None,
) -> TeacherSpace:
    """Sum of Div(z_st, z_t) over the rows that have a label, and the labels of t2s_ce (-1 where there is none)."""
    fixed, label_A = teacher_head.detach().in_compute_dtype(), gold_A.clone()
    projected_fixed = fixed if projected_head is None else projected_head.detach().in_compute_dtype()
    # a data token is always one of the student's, a prediction is where the teacher has no other or further ids
    fits = teacher_to_student_W is None and teacher_head.num_rows <= num_student
    every_row_counts = settings.teacher_target == "gold" or fits

    def chunk(rows: Sequence[Tensor], _: Sequence[Head]) -> tuple[Formed, list[Tensor]]:
        index_C, teacher_CE, projected_CE = rows
        with torch.no_grad():
            teacher_CW = fixed.chunk(teacher_CE, "teacher")
            prediction_C = best_tokens(teacher_CW)
        if settings.teacher_target == "teacher":
            label_A[index_C] = _mapped(prediction_C, teacher_to_student_W, num_student)
        if settings.spaces == "student":
            nothing = projected_CE.new_zeros(())
            return Formed(nothing), [nothing, nothing]
        terms = token_terms(
            projected_fixed.chunk(projected_CE, "student"),
            counted_C=None if every_row_counts else label_A[index_C] >= 0,
            teacher_NS=teacher_CW,
            divergence=settings.teacher_space,
            consume=True,
        )
        return terms.formed, [terms.kd, (terms.best_C == prediction_C).sum()]

    rows = (_indices(teacher_AE), teacher_AE.detach(), projected_student_AE)
    loss, (kd, agree) = sum_over_chunks(chunk, rows, (), 2, chunk_size, extra_logits=2 * fixed.num_rows)
    return TeacherSpace(loss, kd, agree, label_A)


def _mapped(prediction_C: Tensor, teacher_to_student_W: Tensor | None, num_student: int) -> Tensor:
    """The student's id of each prediction, -1 where there is none."""
    label_C = prediction_C if teacher_to_student_W is None else teacher_to_student_W[prediction_C]
    return label_C.masked_fill(label_C >= num_student, -1)


def projected_teacher(
    settings: DualSpace, projected_AD: Tensor, student_head: Head, label_A: Tensor, chunk_size: int | None
) -> ProjectedTeacher:
    """Sum of CE(z_ts, label) over the rows that have a label, and the best token of every z_ts."""
    fixed, best_A = student_head.detach().in_compute_dtype(), torch.full_like(label_A, -1)

    def chunk(rows: Sequence[Tensor], _: Sequence[Head]) -> tuple[Formed, list[Tensor]]:
        index_C, projected_CD, label_C = rows
        if settings.spaces == "teacher":
            nothing = projected_CD.new_zeros(())
            return Formed(nothing), [nothing]
        has_label_C = label_C >= 0
        terms = token_terms(
            fixed.chunk(projected_CD, "student"), target_C=label_C.clamp(min=0), counted_C=has_label_C, consume=True
        )
        best_A[index_C] = terms.best_C
        return terms.formed, [terms.ce]

    rows = (_indices(projected_AD), projected_AD, label_A)
    loss, (ce,) = sum_over_chunks(chunk, rows, (), 1, chunk_size, extra_logits=fixed.num_rows)
    return ProjectedTeacher(loss, ce, best_A)


def counting(
    settings: DualSpace,
    label_A: Tensor,
    best_A: Tensor,
    gold_A: Tensor,
    kd_weight: float,
    weight: float | Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, float | Tensor]:
    """Which pairs count in t2s_kd (A,), and the factor of their sum."""
    mapped_A = label_A >= 0
    if settings.spaces == "teacher":
        return torch.zeros_like(mapped_A), weight
    if settings.student_mask == "none":
        return mapped_A, weight
    kept_A = mapped_A & (best_A == (gold_A if settings.student_mask == "correct" else label_A))
    is_masked = kept_A.sum() <= settings.agreement_threshold * mapped_A.sum()
    counts_A = kept_A.where(is_masked, mapped_A)
    if settings.masked_mean == "labelled":
        return counts_A, weight
    return counts_A, torch.where(is_masked, kd_weight / kept_A.sum().clamp(min=1).to(dtype), weight)


def student_space(
    settings: DualSpace,
    student_TD: Tensor,
    target_T: Tensor,
    student_head: Head,
    projected_AD: Tensor,
    rows_A: Tensor,
    counts_A: Tensor,
    kd_weight: float | Tensor,
    label_A: Tensor,
    ce_weight: float,
    chunk_size: int | None,
) -> StudentSpace:
    """Weighted sum of CE over all rows and of Div(z_s, z_ts) over the rows that count, which are put first."""
    fixed, label_T = (
        student_head.detach().in_compute_dtype(),
        torch.full_like(target_T, -1).index_copy(0, rows_A, label_A),
    )
    order_T = paired_first(rows_A[counts_A], len(target_T))

    def chunk(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Formed, list[Tensor]]:
        student_CD, gold_C, label_C, projected_ND = rows
        with torch.no_grad():
            projected_NV = fixed.chunk(projected_ND, "teacher")
        terms = token_terms(
            heads[0](student_CD),
            target_C=gold_C,
            ce_weight=ce_weight,
            teacher_NS=projected_NV,
            divergence=settings.student_space,
            kd_weight=kd_weight,
            consume=True,
        )
        return terms.formed, [terms.ce, terms.kd, (terms.best_C == gold_C).sum(), (terms.best_C == label_C).sum()]

    rows = (student_TD[order_T], target_T[order_T], label_T[order_T], projected_AD[counts_A])
    loss, sums = sum_over_chunks(chunk, rows, (student_head,), 4, chunk_size, extra_logits=fixed.num_rows)
    ce, kd, correct, agree = sums
    return StudentSpace(loss, ce, kd, counts_A.sum(), correct, agree)


def _indices(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)
