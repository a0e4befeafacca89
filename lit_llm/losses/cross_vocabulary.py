"""Distillation between different vocabularies without projectors: ULD, MinED and KD on the shared tokens.

ULD arXiv 2402.12030 and MinED (FuseLLM, arXiv 2401.10491) as in the code of DSKD (arXiv 2406.17328); shared-vocabulary
KD as in KDFlow (arXiv 2603.01875). Differences from the authors' code: labels and logits are never edited in place
(in float32 theirs makes the MinED term exactly 0), and only supervised rows meet a head.

All take the student's T rows for the cross-entropy and A pairs of rows for the term of the method, walk over both in
one pass, and return sums; the caller's weights hold its denominators.

Shapes: T supervised student rows, A paired rows, U supervised teacher rows, C rows of a chunk, N paired rows of a
chunk (N <= C), K shared tokens, D and E widths, V and W vocabularies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_llm.losses.chunks import sum_over_chunks
from lit_llm.losses.divergence import Divergence, at_least_float32
from lit_llm.losses.fused_head import HeadTerms, finite_logits, paired_first, token_cross_entropy
from lit_llm.losses.head import Head

_NEVER = -1e5
_ALWAYS = 100.0


def uld(
    student_TD: Tensor,
    student_head: Head,
    target_T: Tensor,
    pair_student_A: Tensor,
    teacher_AE: Tensor,
    teacher_head: Head,
    *,
    ce_weight: float,
    kd_weight: float,
    chunk_size: int | None = None,
) -> HeadTerms:
    """Cross-entropy plus the L1 distance of sorted probabilities, the shorter vocabulary padded with 0.

    Args:
        student_TD: the student's hidden states of its supervised rows.
        student_head: trained, or detached.
        target_T: token ids of the data.
        pair_student_A: the student's row of each pair, each row at most once.
        teacher_AE: the teacher's hidden states of each pair; no gradient flows into them.
        teacher_head: frozen.
        ce_weight: of the cross-entropy sum.
        kd_weight: of the distance sum.
        chunk_size: rows at a time; None chooses by the vocabularies.

    Raises:
        ValueError: numbers of rows that do not fit.
    """

    def distance(student_NV: Tensor, teacher_NW: Tensor, _: Tensor) -> Tensor:
        return sorted_distance(student_NV.softmax(-1), teacher_NW.softmax(-1))

    return _with_pairs(
        distance,
        student_TD,
        student_head,
        target_T,
        pair_student_A,
        teacher_AE,
        teacher_head,
        ce_weight,
        kd_weight,
        chunk_size,
    )


def shared_vocabulary(
    student_TD: Tensor,
    student_head: Head,
    target_T: Tensor,
    pair_student_A: Tensor,
    teacher_AE: Tensor,
    teacher_head: Head,
    student_ids_K: Tensor,
    teacher_ids_K: Tensor,
    divergence: Divergence,
    *,
    ce_weight: float,
    kd_weight: float,
    chunk_size: int | None = None,
) -> HeadTerms:
    """Cross-entropy plus a divergence over the shared tokens only, both distributions renormalised over them.

    Args:
        student_ids_K: ids of the shared tokens in the student's vocabulary.
        teacher_ids_K: ids of the same tokens in the teacher's.
        divergence: compares the two restricted distributions.

    The others as in `uld`, with the pairs of an exact alignment.
    """

    def restricted(student_NV: Tensor, teacher_NW: Tensor, _: Tensor) -> Tensor:
        return divergence(student_NV[:, student_ids_K], teacher_NW[:, teacher_ids_K])

    return _with_pairs(
        restricted,
        student_TD,
        student_head,
        target_T,
        pair_student_A,
        teacher_AE,
        teacher_head,
        ce_weight,
        kd_weight,
        chunk_size,
    )


def mined(
    student_TD: Tensor,
    student_head: Head,
    target_T: Tensor,
    pair_student_A: Tensor,
    teacher_AE: Tensor,
    teacher_head: Head,
    student_to_teacher_V: Tensor,
    divergence: Divergence,
    *,
    ce_weight: float,
    kd_weight: float,
    chunk_size: int | None = None,
) -> HeadTerms:
    """Cross-entropy plus a divergence from teacher logits carried into the student's vocabulary.

    Every supervised row has a target: of a pair the teacher's logits, of all others the gold token.

    Args:
        student_to_teacher_V: for each student id the teacher id whose logit it receives, -1 for none; see
            `first_source`.
        divergence: forward_kl as published.

    The others as in `uld`, with the pairs of MinED's time warping.
    """

    def carried(student_CV: Tensor, teacher_NW: Tensor, target_C: Tensor) -> Tensor:
        return divergence(student_CV, mined_target(teacher_NW, target_C, student_to_teacher_V))

    return _with_pairs(
        carried,
        student_TD,
        student_head,
        target_T,
        pair_student_A,
        teacher_AE,
        teacher_head,
        ce_weight,
        kd_weight,
        chunk_size,
        unpaired_too=True,
    )


def sorted_distance(q_TV: Tensor, p_TW: Tensor) -> Tensor:
    """L1 distance of two lists of probabilities, each sorted in descending order, the shorter padded with 0, (T,)."""
    shared = min(q_TV.shape[1], p_TW.shape[1])
    (top_q, tail_q), (top_p, tail_p) = (_top_and_tail(probs, shared) for probs in (q_TV, p_TW))
    return (top_q - top_p).abs().sum(-1) + tail_q + tail_p


def _top_and_tail(p_TV: Tensor, count: int) -> tuple[Tensor, Tensor | int]:
    """The `count` largest in descending order, and the sum of the others, which meet the padding."""
    if 2 * count >= p_TV.shape[1]:  # a selection of most is no cheaper than sorting all
        sorted_TV = p_TV.sort(dim=-1, descending=True).values
        return sorted_TV[:, :count], sorted_TV[:, count:].sum(-1)
    top_TK = p_TV.topk(count, dim=-1).values
    return top_TK, p_TV.sum(-1) - top_TK.sum(-1)


def mined_target(teacher_NW: Tensor, target_C: Tensor, student_to_teacher_V: Tensor) -> Tensor:
    """Logits (C, V): of the first N rows the teacher's, of the others a distribution that is sure of the target."""
    exists_V = student_to_teacher_V >= 0
    carried_NV = teacher_NW[:, student_to_teacher_V.clamp(min=0)].masked_fill(~exists_V, _NEVER)
    rest = target_C[len(teacher_NW) :]
    gold_CV = carried_NV.new_full((len(rest), len(student_to_teacher_V)), _NEVER)
    return torch.cat([carried_NV, gold_CV.scatter(1, rest[:, None], _ALWAYS)])


def first_source(teacher_to_student_W: Tensor, num_student: int) -> Tensor:
    """For each student id the smallest teacher id that maps to it, -1 for none, (V,)."""
    ids_W = torch.arange(len(teacher_to_student_W), device=teacher_to_student_W.device)
    mapped_W = teacher_to_student_W >= 0
    source_V = torch.full((num_student,), len(ids_W), device=ids_W.device)
    source_V.scatter_reduce_(0, teacher_to_student_W[mapped_W], ids_W[mapped_W], reduce="amin")
    return source_V.masked_fill(source_V == len(ids_W), -1)


def _with_pairs(
    compare: Callable[[Tensor, Tensor, Tensor], Tensor],
    student_TD: Tensor,
    student_head: Head,
    target_T: Tensor,
    pair_student_A: Tensor,
    teacher_AE: Tensor,
    teacher_head: Head,
    ce_weight: float,
    kd_weight: float,
    chunk_size: int | None,
    unpaired_too: bool = False,
) -> HeadTerms:
    """Cross-entropy of all rows plus `compare` on the paired ones, or on all."""
    counts = {
        "hidden": len(student_TD),
        "target": len(target_T),
        "pair": len(pair_student_A),
        "teacher": len(teacher_AE),
    }
    if counts["hidden"] != counts["target"] or counts["pair"] != counts["teacher"]:
        raise ValueError(f"Rows do not fit: {counts}. Every hidden row has a target, every pair a teacher row.")
    order_T, fixed = paired_first(pair_student_A, len(target_T)), teacher_head.detach().in_compute_dtype()

    def chunk(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Tensor, list[Tensor]]:
        student_CD, target_C, teacher_NE = rows
        student_CV = finite_logits(heads[0](student_CD))
        with torch.no_grad():
            teacher_NW = at_least_float32(fixed(teacher_NE))
        ce, correct = token_cross_entropy(student_CV, target_C).sum(), (student_CV.argmax(-1) == target_C).sum()
        kd = compare(student_CV if unpaired_too else student_CV[: len(teacher_NE)], teacher_NW, target_C).sum()
        return ce_weight * ce + kd_weight * kd, [ce, correct, kd]

    rows = (student_TD[order_T], target_T[order_T], teacher_AE.detach())
    loss, (ce, correct, kd) = sum_over_chunks(
        chunk, rows, (student_head,), 3, chunk_size, extra_logits=2 * fixed.num_rows
    )
    return HeadTerms(loss, len(target_T), ce, correct, kd)
