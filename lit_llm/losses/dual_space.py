"""Dual-space distillation: the teacher seen through the student's head, the student through the teacher's.

DSKD v1 arXiv 2406.17328 (equations 4 to 10), v2 with exact token alignment arXiv 2504.11426. With P h_t the projected
teacher and S h_s the projected student, sg = stop gradient:

    z_s = W_s h_s      z_ts = sg(W_s) P h_t      z_t = W_t h_t      z_st = W_t S h_s
    CE      = CE(z_s, gold)                  trains the student
    t2s_ce  = CE(z_ts, label)                trains P;  label: the gold token (v1) or the teacher's prediction (v2)
    t2s_kd  = Div(z_s, sg(z_ts))             trains the student, where the mask allows
    s2t_kd  = Div(z_st, z_t)                 trains S and the student's body

All four logits of a chunk exist together, and only then. Differences from the authors' code: the agreement fraction is
over labelled tokens (theirs can exceed 1), empty sets give 0, predictions without a counterpart are dropped.

Shapes: T supervised student rows, A paired rows, U supervised teacher rows, C rows of a chunk, D and E widths, V and W
vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import Head, automatic_chunk, sum_over_chunks, token_log_probabilities


@dataclass(frozen=True)
class DualSpace:
    """What is compared, masked and divided by; see `Projectors` for the meaning in a config.

    Attributes:
        student_space: divergence of z_s from z_ts.
        teacher_space: divergence of z_st from z_t.
        teacher_target: label of t2s_ce.
        student_mask: rows that count in t2s_kd.
        masked_mean: t2s_kd is divided by the rows that its mask keeps in this call (`agreeing`), or as the other terms.
        agreement_threshold: above this share of agreeing rows nothing is masked.
        spaces: `both`, or only the terms of one.
    """

    student_space: Divergence = Divergence()
    teacher_space: Divergence = Divergence()
    teacher_target: Literal["gold", "teacher"] = "teacher"
    student_mask: Literal["none", "correct", "agree"] = "agree"
    masked_mean: Literal["agreeing", "labelled"] = "agreeing"
    agreement_threshold: float = 1.0
    spaces: Literal["both", "student", "teacher"] = "both"

    @property
    def needs_counts_first(self) -> bool:
        """Whether a weight depends on predictions of the whole call."""
        return self.student_mask != "none" and (self.masked_mean == "agreeing" or self.agreement_threshold < 1)


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


_SUMS = (
    "ce",
    "t2s_ce",
    "t2s_kd",
    "s2t_kd",
    "mapped",
    "masked",
    "correct",
    "t2s_correct",
    "t2s_agree",
    "s2t_agree",
    "agree",
)


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
        projected_student_AE: S h_s of each pair.
        settings: what is compared, masked and divided by.
        ce_weight: of the cross-entropy *sum*, its denominator included.
        kd_weight: of the three distillation terms.
        kd_denominator: what their sums are divided by; None: the mapped pairs of this call, as published for ETA.
        pair_student_A: the student's row of each pair, each row at most once; None: pair a is row a.
        teacher_to_student_W: the student's id of each teacher id, -1 where there is none; None: the same ids.
        chunk_size: rows at a time; None chooses by the vocabularies.

    Raises:
        ValueError: numbers of rows that do not fit.
    """
    num_pairs = teacher_AE.shape[0]
    _check_rows(student_TD, target_T, num_pairs, pair_student_A, projected_teacher_AD, projected_student_AE)
    comparison = _Comparison(settings, student_head.detach(), teacher_head.detach(), teacher_to_student_W)
    paired_AD, gold_A, rest_TD, rest_T = _split(student_TD, target_T, pair_student_A)
    chunk_size = chunk_size or automatic_chunk(2 * student_head.num_rows + 2 * teacher_head.num_rows)

    counts = None
    if settings.needs_counts_first:
        counts = comparison.count(teacher_AE, projected_teacher_AD, gold_A, chunk_size)
    elif kd_denominator is None:
        counts = comparison.count(teacher_AE, None, gold_A, chunk_size)
    weights = _weights(settings, kd_weight, kd_denominator, counts)

    def paired(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Tensor, list[Tensor]]:
        return comparison.terms(*rows, heads[0], ce_weight, weights)

    rows = (paired_AD, gold_A, teacher_AE.detach(), projected_teacher_AD, projected_student_AE)
    loss, sums = sum_over_chunks(paired, rows, (student_head,), len(_SUMS), chunk_size)
    named = dict(zip(_SUMS, sums, strict=True))
    if rest_TD is not None:
        loss = loss + _add_unpaired(named, rest_TD, rest_T, student_head, ce_weight, chunk_size)
    return DualSpaceTerms(loss=loss, tokens=len(target_T), pairs=num_pairs, **named)


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

    The labels of t2s_ce are the gold tokens; the mask `correct` (or `agree`, here the same) keeps the rows where the
    projected teacher predicts them (arXiv 2406.17328, section 3.3). All terms are divided by `kd_denominator`.

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
    _check_rows(student_TD, target_T, len(target_T), None, projected_teacher_TD, projected_teacher_TD)
    fixed_student, fixed_teacher = student_head.detach(), teacher_head.detach()
    weight = kd_weight / kd_denominator

    def student_side(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Tensor, list[Tensor]]:
        student_CD, gold_C, projected_CD = rows
        student_CV, projected_CV = heads[0](student_CD), fixed_student(projected_CD)
        keep_C = torch.ones_like(gold_C, dtype=torch.bool)
        space = _student_space(settings, student_CV, projected_CV, gold_C, gold_C, keep_C)
        loss = ce_weight * space["ce"] + weight * (space["t2s_ce"] + space["t2s_kd"]) * (settings.spaces != "teacher")
        return loss, [space[name] for name in _STUDENT_SUMS]

    def teacher_side(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Tensor, list[Tensor]]:
        teacher_CE, projected_CE = rows
        with torch.no_grad():
            teacher_CW = fixed_teacher(teacher_CE)
        projected_CW = fixed_teacher(projected_CE)
        kd = settings.teacher_space(projected_CW, teacher_CW).sum()
        agree = (projected_CW.argmax(-1) == teacher_CW.argmax(-1)).sum()
        return weight * kd * (settings.spaces != "student"), [kd, agree]

    rows = (student_TD, target_T, projected_teacher_TD)
    loss, sums = sum_over_chunks(student_side, rows, (student_head,), len(_STUDENT_SUMS), chunk_size)
    rows = (teacher_UE.detach(), projected_student_UE)
    other, (s2t_kd, s2t_agree) = sum_over_chunks(teacher_side, rows, (fixed_teacher,), 2, chunk_size)
    named = dict(zip(_STUDENT_SUMS, sums, strict=True), s2t_kd=s2t_kd, s2t_agree=s2t_agree)
    return DualSpaceTerms(loss=loss + other, tokens=len(target_T), pairs=len(target_T), **named)


_STUDENT_SUMS = ("ce", "t2s_ce", "t2s_kd", "mapped", "masked", "correct", "t2s_correct", "t2s_agree", "agree")


class _Weights(NamedTuple):
    """Factors of the three distillation sums, and whether t2s_kd is masked."""

    t2s_ce: float | Tensor
    t2s_kd: float | Tensor
    s2t_kd: float | Tensor
    masked: bool | Tensor


@dataclass(frozen=True)
class _Comparison:
    """The computation of one chunk of pairs."""

    settings: DualSpace
    student_head: Head
    teacher_head: Head
    teacher_to_student_W: Tensor | None

    def terms(
        self,
        student_CD: Tensor,
        gold_C: Tensor,
        teacher_CE: Tensor,
        projected_teacher_CD: Tensor,
        projected_student_CE: Tensor,
        live_head: Head,
        ce_weight: float,
        weights: _Weights,
    ) -> tuple[Tensor, list[Tensor]]:
        """The weighted loss of a chunk and its sums in the order of _SUMS."""
        with torch.no_grad():
            teacher_CW = self.teacher_head(teacher_CE)
            prediction_C = teacher_CW.argmax(-1)
        label_C, keep_C = self.labels(prediction_C, gold_C)
        student_CV, projected_CV = live_head(student_CD), self.student_head(projected_teacher_CD)
        space = _student_space(self.settings, student_CV, projected_CV, label_C, gold_C, keep_C, weights.masked)
        projected_CW = self.teacher_head(projected_student_CE)
        s2t_C = self.settings.teacher_space(projected_CW, teacher_CW)
        space["s2t_kd"] = s2t_C.masked_fill(~keep_C, 0.0).sum()
        space["s2t_agree"] = (projected_CW.argmax(-1) == prediction_C).sum()
        loss = ce_weight * space["ce"]
        if self.settings.spaces != "teacher":
            loss = loss + weights.t2s_ce * space["t2s_ce"] + weights.t2s_kd * space["t2s_kd"]
        if self.settings.spaces != "student":
            loss = loss + weights.s2t_kd * space["s2t_kd"]
        return loss, [space[name] for name in _SUMS]

    def labels(self, prediction_C: Tensor, gold_C: Tensor) -> tuple[Tensor, Tensor]:
        """(C,) labels of t2s_ce and whether a label exists."""
        if self.settings.teacher_target == "gold":
            return gold_C, torch.ones_like(gold_C, dtype=torch.bool)
        label_C = prediction_C if self.teacher_to_student_W is None else self.teacher_to_student_W[prediction_C]
        keep_C = (label_C >= 0) & (label_C < self.student_head.num_rows)
        return label_C.where(keep_C, 0), keep_C

    @torch.no_grad()
    def count(
        self, teacher_AE: Tensor, projected_teacher_AD: Tensor | None, gold_A: Tensor, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        """Mapped pairs, and those that the mask of t2s_kd keeps, before any loss is formed."""
        mapped = masked = torch.zeros((), dtype=torch.int64, device=gold_A.device)
        for start in range(0, len(gold_A), chunk_size):
            span = slice(start, start + chunk_size)
            prediction_C = self.teacher_head(teacher_AE[span]).argmax(-1)
            label_C, keep_C = self.labels(prediction_C, gold_A[span])
            mapped = mapped + keep_C.sum()
            if projected_teacher_AD is not None:
                best_C = self.student_head(projected_teacher_AD[span]).argmax(-1)
                reference_C = gold_A[span] if self.settings.student_mask == "correct" else label_C
                masked = masked + (keep_C & (best_C == reference_C)).sum()
        return mapped, masked


def _student_space(
    settings: DualSpace,
    student_CV: Tensor,
    projected_CV: Tensor,
    label_C: Tensor,
    gold_C: Tensor,
    keep_C: Tensor,
    masked: bool | Tensor = True,
) -> dict[str, Tensor]:
    """CE, t2s_ce, t2s_kd and the counts of one chunk, as sums."""
    log_q_CV, correct = token_log_probabilities(student_CV, gold_C)
    projected_log_CV, _ = token_log_probabilities(projected_CV, label_C)
    best_C = projected_CV.detach().argmax(-1)
    agree_C, correct_C = (best_C == label_C) & keep_C, best_C == gold_C
    counted_C = {"none": keep_C, "agree": agree_C, "correct": correct_C & keep_C}[settings.student_mask]
    counted_C = torch.where(torch.as_tensor(masked, device=keep_C.device), counted_C, keep_C)
    t2s_ce_C = -projected_log_CV.gather(-1, label_C[:, None]).squeeze(-1)
    return {
        "ce": -log_q_CV.gather(-1, gold_C[:, None]).sum(),
        "t2s_ce": t2s_ce_C.masked_fill(~keep_C, 0.0).sum(),
        "t2s_kd": settings.student_space(student_CV, projected_CV).masked_fill(~counted_C, 0.0).sum(),
        "mapped": keep_C.sum(),
        "masked": counted_C.sum(),
        "correct": correct,
        "t2s_correct": correct_C.sum(),
        "t2s_agree": agree_C.sum(),
        "agree": ((student_CV.detach().argmax(-1) == label_C) & keep_C).sum(),
    }


def _weights(
    settings: DualSpace, kd_weight: float, kd_denominator: float | None, counts: tuple[Tensor, Tensor] | None
) -> _Weights:
    if kd_denominator is not None:
        plain = kd_weight / kd_denominator
    else:
        plain = kd_weight / counts[0].clamp(min=1)
    if not settings.needs_counts_first:
        return _Weights(plain, plain, plain, masked=settings.student_mask != "none")
    mapped, agreeing = counts
    is_masked = agreeing <= settings.agreement_threshold * mapped
    own = kd_weight / agreeing.clamp(min=1) if settings.masked_mean == "agreeing" else plain
    return _Weights(plain, torch.where(is_masked, own, plain), plain, is_masked)


def _split(
    student_TD: Tensor, target_T: Tensor, pair_student_A: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Rows of the pairs, and the rows that have no pair and only take part in the cross-entropy."""
    if pair_student_A is None:
        return student_TD, target_T, None, None
    unpaired_T = torch.ones_like(target_T, dtype=torch.bool)
    unpaired_T[pair_student_A] = False
    return student_TD[pair_student_A], target_T[pair_student_A], student_TD[unpaired_T], target_T[unpaired_T]


def _add_unpaired(
    named: dict[str, Tensor], rest_TD: Tensor, rest_T: Tensor, head: Head, ce_weight: float, chunk_size: int
) -> Tensor:
    """Cross-entropy of the rows without a pair; adds their sums to `named` and returns their weighted loss."""

    def chunk(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Tensor, list[Tensor]]:
        hidden_CD, gold_C = rows
        log_q_CV, correct = token_log_probabilities(heads[0](hidden_CD), gold_C)
        ce = -log_q_CV.gather(-1, gold_C[:, None]).sum()
        return ce_weight * ce, [ce, correct]

    loss, (ce, correct) = sum_over_chunks(chunk, (rest_TD, rest_T), (head,), 2, chunk_size)
    named["ce"], named["correct"] = named["ce"] + ce, named["correct"] + correct
    return loss


def _check_rows(student_TD, target_T, num_pairs, pair_student_A, projected_teacher, projected_student) -> None:
    counts = {
        "target": (len(target_T), len(student_TD)),
        "projected teacher": (len(projected_teacher), num_pairs),
        "projected student": (len(projected_student), num_pairs),
        "pair": (num_pairs, len(student_TD) if pair_student_A is None else len(pair_student_A)),
    }
    for name, (rows, expected) in counts.items():
        if rows != expected:
            raise ValueError(f"dual_space: {rows} {name} rows, but {expected} were expected. Rows must be paired.")
