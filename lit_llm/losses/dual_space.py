"""Dual-space distillation: the teacher seen through the student's head, the student through the teacher's.

DSKD v1 arXiv 2406.17328 (equations 4 to 10), v2 with exact token alignment arXiv 2504.11426. With P h_t the projected
teacher and S h_s the projected student, sg = stop gradient:

    z_s = W_s h_s      z_ts = sg(W_s) P h_t      z_t = W_t h_t      z_st = W_t S h_s
    CE      = CE(z_s, gold)                  trains the student
    t2s_ce  = CE(z_ts, label)                trains P;  label: the gold token (v1) or the teacher's prediction (v2)
    t2s_kd  = Div(z_s, sg(z_ts))             trains the student, where the mask allows
    s2t_kd  = Div(z_st, z_t)                 trains S and the student's body

Three walks over chunks of rows: z_t with z_st, then z_ts, whose predictions decide which rows the mask keeps and what is
divided by what, then z_s, with z_ts formed anew for the rows that count. Differences from the authors' code: the
agreement fraction is over labelled tokens (theirs can exceed 1), empty sets give 0, predictions without a counterpart
are dropped.

Shapes: T supervised student rows, A paired rows, U supervised teacher rows, M rows that count in t2s_kd, C rows of a
chunk, N of them that count (N <= C), D and E widths, V and W vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import Head, paired_first, sum_over_chunks
from lit_llm.losses.logit_gradient import Formed, token_terms


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


class DualSpaceTerms(NamedTuple):
    """Sums over rows. `loss` is weighted and differentiable; the others are detached and not divided by anything.

    Attributes:
        loss: the weighted total.
        ce, t2s_ce, t2s_kd, s2t_kd: the four terms.
        tokens: supervised student rows.
        pairs: rows that were compared with the teacher.
        mapped: pairs whose label exists in the student's vocabulary.
        masked: rows that count in t2s_kd.
        correct: student predictions that hit the data (of `tokens`).
        t2s_correct: projected-teacher predictions that hit the data (of `pairs`).
        t2s_agree: projected-teacher predictions that hit their label (of `mapped`).
        s2t_agree: projected-student predictions that hit the teacher's (of `pairs`).
        agree: student predictions that hit the label, i.e. the teacher's prediction (of `mapped`).
    """

    loss: Tensor
    ce: Tensor
    t2s_ce: Tensor
    t2s_kd: Tensor
    s2t_kd: Tensor
    tokens: int
    pairs: int
    mapped: Tensor
    masked: Tensor
    correct: Tensor
    t2s_correct: Tensor
    t2s_agree: Tensor
    s2t_agree: Tensor
    agree: Tensor


def dual_space(
    student_TD: Tensor,
    target_T: Tensor,
    student_head: Head,
    teacher_AE: Tensor,
    teacher_head: Head,
    projected_teacher_AD: Tensor,
    projected_student_AE: Tensor,
    settings: DualSpace,
    *,
    ce_weight: float,
    kd_weight: float,
    kd_denominator: float | None,
    pair_student_A: Tensor | None = None,
    teacher_to_student_W: Tensor | None = None,
    projected_student_head: Head | None = None,
    chunk_size: int | None = None,
) -> DualSpaceTerms:
    """DSKD over paired rows: one tokenizer, or two with exact token alignment.

    Args:
        student_TD: the student's hidden states.
        target_T: token ids of the data.
        student_head: trained or detached; only z_s trains it.
        teacher_AE: the teacher's hidden states of each pair.
        teacher_head: frozen.
        projected_teacher_AD: P h_t of each pair.
        projected_student_AE: S h_s of each pair; with `projected_student_head`, h_s itself.
        settings: what is compared, masked and divided by.
        ce_weight: of the cross-entropy *sum*, its denominator included.
        kd_weight: of the three distillation terms.
        kd_denominator: what their sums are divided by; None: the mapped pairs of this call, as published for ETA.
        pair_student_A: the student's row of each pair, each row at most once; None: pair a is row a.
        teacher_to_student_W: the student's id of each teacher id, -1 where there is none; None: the same ids.
        projected_student_head: W_t S, where it is cheaper to multiply the two first; None: the teacher's head.
        chunk_size: rows at a time; None chooses by the vocabularies.

    Raises:
        ValueError: numbers of rows that do not fit.
    """
    rows_A = torch.arange(len(target_T), device=target_T.device) if pair_student_A is None else pair_student_A
    _check_rows(student_TD, target_T, rows_A, teacher_AE, projected_teacher_AD, projected_student_AE)
    gold_A = target_T[rows_A]

    teacher = _teacher_space(
        settings,
        teacher_AE,
        teacher_head,
        projected_student_AE,
        gold_A,
        teacher_to_student_W,
        student_head.num_rows,
        chunk_size,
        projected_student_head,
    )
    projected = _projected_teacher(settings, projected_teacher_AD, student_head, teacher.label_A, chunk_size)
    mapped = (teacher.label_A >= 0).sum().clamp(min=1).to(teacher.loss.dtype)
    weight = kd_weight / (mapped if kd_denominator is None else kd_denominator)
    student = _student_space(
        settings,
        student_TD,
        target_T,
        student_head,
        projected_teacher_AD.detach(),
        rows_A,
        *_counting(settings, teacher.label_A, projected.best_A, gold_A, kd_weight, weight, teacher.loss.dtype),
        teacher.label_A,
        ce_weight,
        chunk_size,
    )
    return _collect(student, projected, teacher, weight, gold_A, tokens=len(target_T))


def dual_space_cma(
    student_TD: Tensor,
    target_T: Tensor,
    student_head: Head,
    projected_teacher_TD: Tensor,
    teacher_UE: Tensor,
    teacher_head: Head,
    projected_student_UE: Tensor,
    settings: DualSpace,
    *,
    ce_weight: float,
    kd_weight: float,
    kd_denominator: float,
    chunk_size: int | None = None,
) -> DualSpaceTerms:
    """DSKD with cross-model attention: every student row has an attended teacher state and the other way round.

    A student's row has no prediction of the teacher, so the labels of t2s_ce are always the gold tokens, and the masks
    `correct` and `agree` are the same (arXiv 2406.17328, section 3.3). In the result `pairs` are the student's rows, and
    `s2t_agree` is of the teacher's.

    Args:
        student_TD: the student's hidden states of its supervised rows.
        target_T: token ids of the data.
        student_head: trained or detached.
        projected_teacher_TD: teacher states attended by each student row, in the student's width.
        teacher_UE: the teacher's hidden states of its supervised rows.
        teacher_head: frozen.
        projected_student_UE: student states attended by each teacher row, in the teacher's width.
        settings: divergences, mask and spaces.
        ce_weight: of the cross-entropy sum, its denominator included.
        kd_weight: of the three distillation terms.
        kd_denominator: what their sums are divided by: the student's tokens.
        chunk_size: rows at a time; None chooses by the vocabularies.

    Raises:
        ValueError: numbers of rows that do not fit.
    """
    rows_T = torch.arange(len(target_T), device=target_T.device)
    _check_rows(student_TD, target_T, rows_T, projected_teacher_TD, projected_teacher_TD, projected_teacher_TD)
    _check_rows(teacher_UE, teacher_UE, teacher_UE, teacher_UE, projected_student_UE, projected_student_UE)
    all_U = torch.zeros(len(teacher_UE), dtype=torch.int64, device=target_T.device)
    settings = replace(settings, teacher_target="gold")

    teacher = _teacher_space(settings, teacher_UE, teacher_head, projected_student_UE, all_U, None, 1, chunk_size)
    projected = _projected_teacher(settings, projected_teacher_TD, student_head, target_T, chunk_size)
    weight = kd_weight / kd_denominator
    student = _student_space(
        settings,
        student_TD,
        target_T,
        student_head,
        projected_teacher_TD.detach(),
        rows_T,
        *_counting(settings, target_T, projected.best_A, target_T, kd_weight, weight, teacher.loss.dtype),
        target_T,
        ce_weight,
        chunk_size,
    )
    return _collect(student, projected, teacher._replace(label_A=target_T), weight, target_T, tokens=len(target_T))


class _TeacherSpace(NamedTuple):
    loss: Tensor
    s2t_kd: Tensor
    s2t_agree: Tensor
    label_A: Tensor


class _ProjectedTeacher(NamedTuple):
    loss: Tensor
    t2s_ce: Tensor
    best_A: Tensor


class _StudentSpace(NamedTuple):
    loss: Tensor
    ce: Tensor
    t2s_kd: Tensor
    masked: Tensor
    correct: Tensor
    agree: Tensor


def _teacher_space(
    settings: DualSpace,
    teacher_AE: Tensor,
    teacher_head: Head,
    projected_student_AE: Tensor,
    gold_A: Tensor,
    teacher_to_student_W: Tensor | None,
    num_student: int,
    chunk_size: int | None,
    projected_head: Head | None = None,
) -> _TeacherSpace:
    """Sum of Div(z_st, z_t) over the rows that have a label, and the labels of t2s_ce (-1 where there is none)."""
    fixed, label_A = teacher_head.detach().in_compute_dtype(), gold_A.clone()
    projected_fixed = fixed if projected_head is None else projected_head.detach().in_compute_dtype()
    # a data token is always one of the student's, a prediction is where the teacher has no other or further ids
    fits = teacher_to_student_W is None and teacher_head.num_rows <= num_student
    every_row_counts = settings.teacher_target == "gold" or fits

    def chunk(rows: Sequence[Tensor], _: Sequence[Head]) -> tuple[Formed, list[Tensor]]:
        index_C, teacher_CE, projected_CE = rows
        with torch.no_grad():
            teacher_CW = fixed(teacher_CE)
            prediction_C = teacher_CW.argmax(-1)
        if settings.teacher_target == "teacher":
            label_A[index_C] = _mapped(prediction_C, teacher_to_student_W, num_student)
        if settings.spaces == "student":
            nothing = projected_CE.new_zeros(())
            return Formed(nothing), [nothing, nothing]
        terms = token_terms(
            projected_fixed(projected_CE),
            counted_C=None if every_row_counts else label_A[index_C] >= 0,
            teacher_NS=teacher_CW,
            divergence=settings.teacher_space,
            consume=True,
        )
        return terms.formed, [terms.kd, (terms.best_C == prediction_C).sum()]

    rows = (_indices(teacher_AE), teacher_AE.detach(), projected_student_AE)
    loss, (kd, agree) = sum_over_chunks(chunk, rows, (), 2, chunk_size, extra_logits=2 * fixed.num_rows)
    return _TeacherSpace(loss, kd, agree, label_A)


def _mapped(prediction_C: Tensor, teacher_to_student_W: Tensor | None, num_student: int) -> Tensor:
    """The student's id of each prediction, -1 where there is none."""
    label_C = prediction_C if teacher_to_student_W is None else teacher_to_student_W[prediction_C]
    return label_C.masked_fill(label_C >= num_student, -1)


def _projected_teacher(
    settings: DualSpace, projected_AD: Tensor, student_head: Head, label_A: Tensor, chunk_size: int | None
) -> _ProjectedTeacher:
    """Sum of CE(z_ts, label) over the rows that have a label, and the best token of every z_ts."""
    fixed, best_A = student_head.detach().in_compute_dtype(), torch.full_like(label_A, -1)

    def chunk(rows: Sequence[Tensor], _: Sequence[Head]) -> tuple[Formed, list[Tensor]]:
        index_C, projected_CD, label_C = rows
        if settings.spaces == "teacher":
            nothing = projected_CD.new_zeros(())
            return Formed(nothing), [nothing]
        has_label_C = label_C >= 0
        terms = token_terms(fixed(projected_CD), target_C=label_C.clamp(min=0), counted_C=has_label_C, consume=True)
        best_A[index_C] = terms.best_C
        return terms.formed, [terms.ce]

    rows = (_indices(projected_AD), projected_AD, label_A)
    loss, (ce,) = sum_over_chunks(chunk, rows, (), 1, chunk_size, extra_logits=fixed.num_rows)
    return _ProjectedTeacher(loss, ce, best_A)


def _counting(
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


def _student_space(
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
) -> _StudentSpace:
    """Weighted sum of CE over all rows and of Div(z_s, z_ts) over the rows that count, which are put first."""
    fixed, label_T = (
        student_head.detach().in_compute_dtype(),
        torch.full_like(target_T, -1).index_copy(0, rows_A, label_A),
    )
    order_T = paired_first(rows_A[counts_A], len(target_T))

    def chunk(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Formed, list[Tensor]]:
        student_CD, gold_C, label_C, projected_ND = rows
        with torch.no_grad():
            projected_NV = fixed(projected_ND)
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
    return _StudentSpace(loss, ce, kd, counts_A.sum(), correct, agree)


def _collect(
    student: _StudentSpace,
    projected: _ProjectedTeacher,
    teacher: _TeacherSpace,
    weight: float | Tensor,
    gold_A: Tensor,
    tokens: int,
) -> DualSpaceTerms:
    mapped_A, dtype = teacher.label_A >= 0, student.loss.dtype
    return DualSpaceTerms(
        loss=student.loss + weight * (projected.loss + teacher.loss),
        ce=student.ce,
        t2s_ce=projected.t2s_ce,
        t2s_kd=student.t2s_kd,
        s2t_kd=teacher.s2t_kd,
        tokens=tokens,
        pairs=len(gold_A),
        mapped=mapped_A.sum(dtype=dtype),
        masked=student.masked.to(dtype),
        correct=student.correct,
        t2s_correct=(projected.best_A == gold_A).sum(dtype=dtype),
        t2s_agree=((projected.best_A == teacher.label_A) & mapped_A).sum(dtype=dtype),
        s2t_agree=teacher.s2t_agree,
        agree=student.agree,
    )


def _indices(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device)


def _check_rows(student_TD, target_T, rows_A, teacher_AE, projected_teacher, projected_student) -> None:
    counts = {
        "target": (len(target_T), len(student_TD)),
        "teacher": (len(teacher_AE), len(rows_A)),
        "projected teacher": (len(projected_teacher), len(rows_A)),
        "projected student": (len(projected_student), len(rows_A)),
    }
    for name, (rows, expected) in counts.items():
        if rows != expected:
            raise ValueError(f"dual_space: {rows} {name} rows, but {expected} were expected. Rows must be paired.")
