"""Distillation from the largest probabilities of a teacher, with the mass of all other tokens as one more outcome.

Forward KL between the two distributions after all tokens outside the kept ones are merged into one:

    sum_k p_k (log p_k - log q_k) + p_rest (log p_rest - log q_rest),   q_rest = 1 - sum_k q_k

By the chain rule the full forward KL is larger by p_rest KL(p | rest, q | rest); the gradient on the student's logits
differs by p_rest (q | rest - p | rest), at most 2 p_rest in L1. Without the last term the student would be free to
leave no mass, or all of it, to the rest.

Shapes: T rows (supervised tokens), C rows of a chunk, D width, V vocabulary, K tokens kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_llm.losses.chunks import sum_over_chunks
from lit_llm.losses.divergence import at_least_float32, log_softmax
from lit_llm.losses.fused_head import HeadTerms, finite_logits, token_cross_entropy
from lit_llm.losses.head import Head


def sparse_forward_kl(log_q_TV: Tensor, ids_TK: Tensor, log_p_TK: Tensor, log_rest_T: Tensor) -> Tensor:
    """KL(teacher || student) with the rest merged, (T,).

    Args:
        log_q_TV: the student's log-probabilities.
        ids_TK: the kept tokens, each once.
        log_p_TK: the teacher's log-probabilities of them.
        log_rest_T: logarithm of the teacher's remaining mass; -inf adds 0.
    """
    log_q_TK = log_q_TV.gather(-1, ids_TK)
    log_q_rest_T = log_q_TV.scatter(-1, ids_TK, -math.inf).logsumexp(-1)
    kept_T = (log_p_TK.exp() * (log_p_TK - log_q_TK)).sum(-1)
    some_T = torch.isfinite(log_rest_T)
    log_rest_T = log_rest_T.masked_fill(~some_T, 0.0)
    return kept_T + torch.where(some_T, log_rest_T.exp() * (log_rest_T - log_q_rest_T), 0.0)


def sparse_distillation(
    student_TD: Tensor,
    student_head: Head,
    target_T: Tensor,
    ids_TK: Tensor,
    log_p_TK: Tensor,
    log_rest_T: Tensor,
    *,
    shared: int,
    temperature: float,
    scale: float = 1.0,
    ce_weight: float,
    kd_weight: float,
    chunk_size: int | None = None,
) -> HeadTerms:
    """Sum over tokens of ce_weight * CE + kd_weight * scale * forward KL to a teacher of which K tokens are known.

    Args:
        student_TD: the student's hidden states.
        student_head: trained, or detached.
        target_T: token ids of the data.
        ids_TK: the teacher's best tokens, best first, each below `shared`.
        log_p_TK: their log-probabilities, at `temperature`.
        log_rest_T: logarithm of the teacher's remaining mass.
        shared: tokens that both models have; the student is compared over these.
        temperature: divides the student's logits.
        scale: multiplies the divergence.
        ce_weight: of cross-entropy, the caller's 1/denominator included.
        kd_weight: of the divergence, likewise.
        chunk_size: rows at a time; None chooses by the vocabulary.

    Raises:
        ValueError: numbers of rows differ.
    """
    counts = {"student": len(student_TD), "teacher": len(ids_TK), "target": len(target_T)}
    if len(set(counts.values())) > 1:
        raise ValueError(f"Rows must be paired one to one, but there are {counts}.")

    def chunk(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Tensor, list[Tensor]]:
        student_CD, target_C, ids_CK, log_p_CK, log_rest_C = rows
        student_CV = finite_logits(heads[0](student_CD))
        log_q_CV = log_softmax(student_CV[:, :shared], temperature)
        ce = token_cross_entropy(student_CV, target_C).sum()
        kd = scale * sparse_forward_kl(log_q_CV, ids_CK, at_least_float32(log_p_CK), at_least_float32(log_rest_C)).sum()
        best_C = student_CV.detach().argmax(-1)
        return ce_weight * ce + kd_weight * kd, [ce, kd, (best_C == target_C).sum(), (best_C == ids_CK[:, 0]).sum()]

    rows = (student_TD, target_T, ids_TK, log_p_TK.detach(), log_rest_T.detach())
    loss, (ce, kd, correct, agree) = sum_over_chunks(chunk, rows, (student_head,), 4, chunk_size, extra_logits=shared)
    return HeadTerms(loss, len(target_T), ce, correct, kd, agree)
