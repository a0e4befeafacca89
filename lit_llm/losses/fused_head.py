"""Output head and loss together, by chunks of tokens: cross-entropy, and distillation column by column.

Every chunk is differentiated at its logits in closed form (`logit_gradient`), in the forward pass.

Shapes: T rows (supervised tokens), C rows of a chunk, D and E widths, V and W vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_llm.losses.chunks import sum_over_chunks
from lit_llm.losses.divergence import Divergence, all_finite, at_least_float32
from lit_llm.losses.head import Head
from lit_llm.losses.logit_gradient import Formed, token_terms
from lit_llm.losses.scratch import best_tokens


class HeadTerms(NamedTuple):
    """Sums over rows. `loss` is weighted and differentiable, the others are detached.

    Attributes:
        loss: the weighted sum.
        tokens: number of rows.
        ce: cross-entropy with the data.
        correct: rows whose best token is the data's.
        kd: divergence from the teacher.
        agree: rows where student and teacher have the same best token.
    """

    loss: Tensor
    tokens: int
    ce: Tensor
    correct: Tensor
    kd: Tensor | None = None
    agree: Tensor | None = None


def cross_entropy(hidden_TD: Tensor, head: Head, target_T: Tensor, *, chunk_size: int | None = None) -> HeadTerms:
    """Sum over tokens of -log softmax(head(hidden))[target].

    Args:
        hidden_TD: last hidden states of supervised tokens.
        head: a detached one gets no gradient.
        target_T: token ids.
        chunk_size: rows at a time; None chooses by the vocabulary.

    Raises:
        ValueError: rows and targets differ in number.
    """
    _same_rows(hidden=hidden_TD, target=target_T)

    def chunk(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Formed, list[Tensor]]:
        hidden_CD, target_C = rows
        terms = token_terms(heads[0](hidden_CD), target_C=target_C, consume=True)
        return terms.formed, [terms.ce, (terms.best_C == target_C).sum()]

    loss, (ce, correct) = sum_over_chunks(chunk, (hidden_TD, target_T), (head,), 2, chunk_size)
    return HeadTerms(loss, len(target_T), ce, correct)


def distillation(
    student_TD: Tensor,
    student_head: Head,
    target_T: Tensor,
    teacher_TE: Tensor,
    teacher_head: Head,
    divergence: Divergence,
    *,
    ce_weight: float,
    kd_weight: float,
    chunk_size: int | None = None,
) -> HeadTerms:
    """Sum over tokens of ce_weight * CE + kd_weight * divergence(student, teacher): vanilla KD (arXiv 2406.17328, eq. 3).

    Vocabularies of one tokenizer that are padded to different lengths are compared over the shorter one.

    Args:
        student_TD: the student's hidden states, row t the same position as row t of the teacher.
        student_head: trained, or detached.
        target_T: token ids of the data.
        teacher_TE: the teacher's hidden states; no gradient flows into them.
        teacher_head: frozen.
        divergence: compares the two distributions.
        ce_weight: of cross-entropy, the caller's 1/denominator included.
        kd_weight: of the divergence, likewise.
        chunk_size: rows at a time; None chooses by the vocabularies.

    Raises:
        ValueError: numbers of rows differ.
    """
    _same_rows(student=student_TD, teacher=teacher_TE, target=target_T)
    shared = min(student_head.num_rows, teacher_head.num_rows)
    teacher_head = teacher_head.detach().rows(shared).in_compute_dtype()

    def chunk(rows: Sequence[Tensor], heads: Sequence[Head]) -> tuple[Formed, list[Tensor]]:
        student_CD, teacher_CE, target_C = rows
        with torch.no_grad():
            teacher_CV = teacher_head.chunk(teacher_CE, "teacher")
            teacher_best_C = best_tokens(teacher_CV)
        terms = token_terms(
            heads[0](student_CD),
            target_C=target_C,
            ce_weight=ce_weight,
            teacher_NS=teacher_CV,
            divergence=divergence,
            kd_weight=kd_weight,
            consume=True,
        )
        hits = [(terms.best_C == target_C).sum(), (terms.best_C == teacher_best_C).sum()]
        return terms.formed, [terms.ce, terms.kd, *hits]

    rows = (student_TD, teacher_TE.detach(), target_T)
    loss, (ce, kd, correct, agree) = sum_over_chunks(chunk, rows, (student_head,), 4, chunk_size, extra_logits=shared)
    return HeadTerms(loss, len(target_T), ce, correct, kd, agree)


def finite_logits(logits_TV: Tensor) -> Tensor:
    """Logits in at least float32; one that is not finite counts as 0, as in the published code's cross-entropy."""
    logits_TV = at_least_float32(logits_TV)
    return logits_TV if all_finite(logits_TV) else logits_TV.masked_fill(~torch.isfinite(logits_TV), 0.0)


def token_cross_entropy(logits_TV: Tensor, target_T: Tensor) -> Tensor:
    """-log softmax(logits)[target] of every row, (T,)."""
    return -logits_TV.log_softmax(-1).gather(-1, target_T[:, None]).squeeze(-1)


def paired_first(pair_A: Tensor, num_rows: int) -> Tensor:
    """An order of all rows that starts with the paired ones, so that pairs and rows can be walked over together."""
    unpaired = torch.ones(num_rows, dtype=torch.bool, device=pair_A.device)
    unpaired[pair_A] = False
    return torch.cat([pair_A, unpaired.nonzero().squeeze(1)])


def _same_rows(**tensors: Tensor) -> None:
    counts = {name: tensor.shape[0] for name, tensor in tensors.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            "Rows must be paired one to one, but there are " + ", ".join(f"{n} {k}" for k, n in counts.items())
        )
