"""A trained model beside two frozen ones: three heads, by chunks of tokens, the gradient formed in the forward pass.

A chunk is large, for the matrix products. What is done element by element goes over a chunk in blocks of a few tokens,
which stay in the processor's cache; only the three logits of a chunk have its size.

Shapes: T tokens, C tokens of a chunk or block, D, E and F widths, V vocabulary, K numbers per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_llm.losses.chunks import sum_over_chunks
from lit_llm.losses.divergence import at_least_float32, exclude_infinite_
from lit_llm.losses.head import Head
from lit_llm.losses.logit_gradient import Formed

_BLOCK_ELEMENTS = 2**18
_CHUNK_BYTES = 160 * 2**20


def sum_over_three_heads(
    block_: Callable[..., list[Tensor]],
    policy_TD: Tensor,
    policy_head: Head,
    frozen: Sequence[tuple[Tensor, Head]],
    weight_T: Tensor,
    num_values: int,
    chunk_size: int | None,
) -> tuple[Tensor, ...]:
    """Add up a loss of a trained and two frozen models.

    Vocabularies padded to different lengths are compared over the shortest one; an entry that is not finite in one model
    is taken out of all three.

    Args:
        block_: called without gradient tracking with (C, V) logits of the three models, the (C,) weights and (2, C, V)
            of spare memory. It leaves the gradient in the policy's logits, may overwrite the rest, and returns (C,)
            numbers: the weighted loss, then K others.
        policy_TD: the trained model's hidden states.
        policy_head: trained, or detached.
        frozen: hidden states and heads of the two others, paired with the policy's row by row.
        weight_T: of each token.
        num_values: K.
        chunk_size: rows at a time; None chooses by the vocabulary.

    Returns:
        The loss, differentiable with respect to the policy, and K detached (T,) tensors.

    Raises:
        ValueError: numbers of rows differ.
    """
    counts = {"policy": len(policy_TD), "weight": len(weight_T)}
    counts |= {"first frozen": len(frozen[0][0]), "second frozen": len(frozen[1][0])}
    if len(set(counts.values())) > 1:
        raise ValueError(
            "Rows must be paired one to one, but there are " + ", ".join(f"{n} {k}" for k, n in counts.items())
        )
    shared = min(policy_head.num_rows, *(head.num_rows for _, head in frozen))
    heads = [head.detach().rows(shared).in_compute_dtype() for _, head in frozen]
    buffers: list[Tensor | None] = [None, None]
    columns: list[Tensor] = []

    def chunk(rows: Sequence[Tensor], live: Sequence[Head]) -> tuple[Formed, list[Tensor]]:
        policy_CD, weight_C, *hidden = rows
        original_CV = live[0](policy_CD)
        policy_CV = at_least_float32(original_CV.detach())
        for i, (head, hidden_CE) in enumerate(zip(heads, hidden, strict=True)):
            # rounding of these logits is amplified by the combination
            buffers[i] = head.wide(hidden_CE, buffers[i])
        sides = [side.to(policy_CV.dtype) for side in buffers]
        columns.append(_blocks(block_, policy_CV, *sides, weight_C.to(policy_CV.dtype)))
        value = columns[-1][0].sum()
        return Formed(value, ((original_CV, policy_CV),) if original_CV.requires_grad else ()), []

    rows = (policy_TD, weight_T.detach(), *(hidden.detach() for hidden, _ in frozen))
    chunk_size = chunk_size or even_chunks(len(policy_TD), shared)
    loss, _ = sum_over_chunks(chunk, rows, (policy_head.rows(shared),), 0, chunk_size)
    values_KT = torch.cat(columns, 1) if columns else at_least_float32(policy_TD.new_zeros(1 + num_values, 0))
    return loss, *values_KT[1:].unbind()


def even_chunks(num_rows: int, vocabulary: int) -> int:
    """Rows of a chunk whose three logits take at most 160 MB, so that all chunks are of about one length.

    A short last chunk would cost its matrix products nearly as much as a long one.
    """
    most = max(16, _CHUNK_BYTES // (3 * 4 * vocabulary))
    return max(1, math.ceil(num_rows / max(1, math.ceil(num_rows / most))))


@torch.no_grad()
def _blocks(block_, policy_CV: Tensor, first_CV: Tensor, second_CV: Tensor, weight_C: Tensor) -> Tensor:
    num_rows, vocabulary = policy_CV.shape
    size = num_rows
    if policy_CV.device.type == "cpu":
        size = min(num_rows, max(torch.get_num_threads(), _BLOCK_ELEMENTS // vocabulary))
    spare = policy_CV.new_empty(2, size, vocabulary)
    found = []
    for start in range(0, num_rows, size):
        span = slice(start, start + size)
        sides = policy_CV[span], first_CV[span], second_CV[span]
        excluded_CV = exclude_infinite_(*sides)
        found.append(torch.stack(block_(*sides, weight_C[span], spare[:, : len(sides[0])])))
        if excluded_CV is not None:
            sides[0].masked_fill_(excluded_CV, 0.0)
    return torch.cat(found, 1)


def softmax_into(logits_CV: Tensor, out_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities into `out_CV`; returns the largest logit of each row and log sum exp above it, (C,) each."""
    torch.softmax(logits_CV, -1, out=out_CV)
    # the largest probability is exp(best - log sum exp): cheaper than another pass of exponentials
    return logits_CV.amax(-1), -out_CV.amax(-1).log()


def mean_(p_CV: Tensor, value_CV: Tensor, out_CV: Tensor) -> Tensor:
    """Expectation of a value, (C,); `out_CV`, which may be one of the two, is used up."""
    return torch.mul(p_CV, value_CV, out=out_CV).sum(-1)
