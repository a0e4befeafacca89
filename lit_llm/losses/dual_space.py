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

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lit_llm.losses.dual_space_walks import (
    DualSpace,
    ProjectedTeacher,
    StudentSpace,
    TeacherSpace,
    counting,
    projected_teacher,
    student_space,
    teacher_space,
)
from lit_llm.losses.head import Head

__all__ = ["DualSpace", "DualSpaceTerms", "dual_space", "dual_space_cma"]


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

    teacher = teacher_space(
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
    projected = projected_teacher(settings, projected_teacher_AD, student_head, teacher.label_A, chunk_size)
    mapped = (teacher.label_A >= 0).sum().clamp(min=1).to(teacher.loss.dtype)
    weight = kd_weight / (mapped if kd_denominator is None else kd_denominator)
    student = student_space(
        settings,
        student_TD,
        target_T,
        student_head,
        projected_teacher_AD.detach(),
        rows_A,
        *counting(settings, teacher.label_A, projected.best_A, gold_A, kd_weight, weight, teacher.loss.dtype),
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

    teacher = teacher_space(settings, teacher_UE, teacher_head, projected_student_UE, all_U, None, 1, chunk_size)
    projected = projected_teacher(settings, projected_teacher_TD, student_head, target_T, chunk_size)
    weight = kd_weight / kd_denominator
    student = student_space(
        settings,
        student_TD,
        target_T,
        student_head,
        projected_teacher_TD.detach(),
        rows_T,
        *counting(settings, target_T, projected.best_A, target_T, kd_weight, weight, teacher.loss.dtype),
        target_T,
        ce_weight,
        chunk_size,
    )
    return _collect(student, projected, teacher._replace(label_A=target_T), weight, target_T, tokens=len(target_T))


def _collect(
    student: StudentSpace,
    projected: ProjectedTeacher,
    teacher: TeacherSpace,
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
