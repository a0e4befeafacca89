"""Distillation over groups of tokens that end at the same byte, as in TRL's GOLD (General Online Logit Distillation).

From the description of TRL's experimental GOLD trainer. A group's distribution is that of its first token, multiplied by
the conditional probabilities of the other tokens of the text; it need not sum to 1. Differences: probabilities of pieces
are not clamped but kept as logarithms, and every token is scored at the position that predicts it.

A group's rows may lie in different chunks, so the work is done in three walks: the pieces' log-probabilities; the groups,
which also gives the gradient for those log-probabilities; the cross-entropy of all rows, which passes that gradient on.

Shapes: T supervised student rows, U supervised teacher rows, A groups, P rows of pieces (all but the first of a group),
C rows of a chunk, K shared tokens, D and E widths, V and W vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_llm.losses.chunks import automatic_chunk, sum_over_chunks
from lit_llm.losses.cross_vocabulary import sorted_distance
from lit_llm.losses.divergence import at_least_float32, generalized_js
from lit_llm.losses.fused_head import HeadTerms, finite_logits, token_cross_entropy
from lit_llm.losses.head import Head


class TokenGroups(NamedTuple):
    """Runs of consecutive supervised rows.

    Attributes:
        first_A: the first row of each group.
        pieces_A: how many rows each group has, at least 1.
    """

    first_A: Tensor
    pieces_A: Tensor

    def later_rows(self) -> tuple[Tensor, Tensor]:
        """(P,) the rows behind the first ones, (P,) the group of each."""
        later_A = self.pieces_A - 1
        group_P = torch.arange(len(later_A), device=later_A.device).repeat_interleave(later_A)
        place_P = torch.arange(len(group_P), device=later_A.device) - (later_A.cumsum(0) - later_A)[group_P]
        return self.first_A[group_P] + 1 + place_P, group_P


class Hybrid(NamedTuple):
    """Tokens that are compared with each other; the rest is compared by rank.

    Attributes:
        student_ids_K: ids of the shared tokens in the student's vocabulary.
        teacher_ids_K: ids of the same tokens in the teacher's.
        beta: weight of the student in the mixture of the generalised JS.
        matched_weight: of the shared tokens' divergence.
        unmatched_weight: of the sorted L1 distance of the rest.
    """

    student_ids_K: Tensor
    teacher_ids_K: Tensor
    beta: float
    matched_weight: float
    unmatched_weight: float


def gold(
    student_TD: Tensor,
    student_head: Head,
    target_T: Tensor,
    student_groups: TokenGroups,
    teacher_UE: Tensor,
    teacher_head: Head,
    teacher_target_U: Tensor,
    teacher_groups: TokenGroups,
    hybrid: Hybrid | None,
    *,
    ce_weight: float,
    kd_weight: float,
    chunk_size: int | None = None,
) -> HeadTerms:
    """Cross-entropy of all rows plus the distance of every group.

    Args:
        student_TD: the student's hidden states of its supervised rows.
        student_head: trained, or detached.
        target_T: token ids of the data.
        student_groups: rows of the student, no row in two groups.
        teacher_UE: the teacher's hidden states of its own supervised rows; no gradient flows into them.
        teacher_head: frozen.
        teacher_target_U: the data in the teacher's tokens.
        teacher_groups: the same groups in the teacher's rows.
        hybrid: shared tokens; None compares all by rank.
        ce_weight: of the cross-entropy sum.
        kd_weight: of the sum of distances.
        chunk_size: rows at a time; None chooses by the vocabularies.

    Raises:
        ValueError: numbers of rows or groups that do not fit.
    """
    _check(hidden=student_TD, target=target_T)
    _check(teacher=teacher_UE, teacher_target=teacher_target_U)
    _check(student_groups=student_groups.first_A, teacher_groups=teacher_groups.first_A)
    fixed = teacher_head.detach().in_compute_dtype()
    scale_s_A = _log_scale(student_TD, student_head.detach().in_compute_dtype(), target_T, student_groups, chunk_size)
    scale_t_A = _log_scale(teacher_UE, fixed, teacher_target_U, teacher_groups, chunk_size)
    scale_s_A.requires_grad_(torch.is_grad_enabled())

    def distances(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Tensor, list[Tensor]]:
        student_CD, scale_s_C, teacher_CE, scale_t_C = rows
        log_q_CV = finite_logits(heads[0](student_CD)).log_softmax(-1) + scale_s_C[:, None]
        with torch.no_grad():
            log_p_CW = at_least_float32(fixed(teacher_CE)).log_softmax(-1) + scale_t_C[:, None]
        kd = group_distance(log_q_CV, log_p_CW, hybrid).sum()
        return kd_weight * kd, [kd]

    first_t_A = teacher_groups.first_A
    rows = (student_TD[student_groups.first_A], scale_s_A, teacher_UE.detach()[first_t_A], scale_t_A)
    kd_loss, (kd,) = sum_over_chunks(
        distances, rows, (student_head,), 1, chunk_size, extra_logits=student_head.num_rows + 3 * fixed.num_rows
    )

    passed_on_T = torch.zeros(len(target_T), dtype=scale_s_A.dtype, device=target_T.device)
    if kd_loss.requires_grad:
        (gradient_A,) = torch.autograd.grad(kd_loss, scale_s_A, retain_graph=True)
        later_P, group_P = student_groups.later_rows()
        passed_on_T[later_P] = -gradient_A[group_P]

    def likelihoods(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Tensor, list[Tensor]]:
        student_CD, target_C, passed_on_C = rows
        logits_CV = finite_logits(heads[0](student_CD))
        ce_C = token_cross_entropy(logits_CV, target_C)
        # adds a gradient and no value: the value is in the groups' distances
        pieces = (passed_on_C * (ce_C - ce_C.detach())).sum()
        return ce_weight * ce_C.sum() + pieces, [ce_C.sum(), (logits_CV.argmax(-1) == target_C).sum()]

    rows = (student_TD, target_T, passed_on_T)
    ce_loss, (ce, correct) = sum_over_chunks(likelihoods, rows, (student_head,), 2, chunk_size)
    return HeadTerms(ce_loss + kd_loss, len(target_T), ce, correct, kd)


def group_distance(log_q_AV: Tensor, log_p_AW: Tensor, hybrid: Hybrid | None) -> Tensor:
    """The distance of two log-distributions, which need not sum to 1, (A,)."""
    if hybrid is None:
        return sorted_distance(log_q_AV.exp(), log_p_AW.exp())
    matched_AK = generalized_js(log_q_AV[:, hybrid.student_ids_K], log_p_AW[:, hybrid.teacher_ids_K], hybrid.beta)
    rest_q, rest_p = _others(log_q_AV, hybrid.student_ids_K).exp(), _others(log_p_AW, hybrid.teacher_ids_K).exp()
    return hybrid.matched_weight * matched_AK.sum(-1) + hybrid.unmatched_weight * sorted_distance(rest_q, rest_p)


@torch.no_grad()
def _log_scale(hidden_TD: Tensor, head: Head, target_T: Tensor, groups: TokenGroups, chunk_size: int | None) -> Tensor:
    """Sum of log-probabilities of each group's tokens behind the first, (A,)."""
    later_P, group_P = groups.later_rows()
    scale_A = at_least_float32(hidden_TD.new_zeros(len(groups.first_A)))
    size = chunk_size or automatic_chunk(head.num_rows)
    for rows_C, group_C in zip(later_P.split(size), group_P.split(size), strict=True):
        ce_C = token_cross_entropy(finite_logits(head(hidden_TD[rows_C])), target_T[rows_C])
        scale_A.index_add_(0, group_C, -ce_C.to(scale_A.dtype))
    return scale_A


def _others(log_AV: Tensor, ids_K: Tensor) -> Tensor:
    """The columns that are not listed."""
    rest_V = torch.ones(log_AV.shape[1], dtype=torch.bool, device=log_AV.device)
    rest_V[ids_K] = False
    return log_AV[:, rest_V]


def _check(**tensors: Tensor) -> None:
    counts = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"Rows do not fit: {counts}. Every hidden row has a target, every group a counterpart.")
