"""The reward of ADPA: the advantage of an aligned teacher over itself before alignment (arXiv 2502.17927).

    -weight sum_v policy(v) A(v),   A(v) = beta (log aligned(v) - log reference(v))

exactly over the vocabulary; the gradient at the logits is -weight policy(v) (A(v) - E_policy[A]). The other half of ADPA
is cross-entropy on chosen answers. Its sibling DCKD is cross-entropy plus forward KL: `fused_head.distillation`.

Shapes: T tokens, C tokens of a block, D, E and F widths, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_llm.losses.head import Head
from lit_llm.losses.logit_gradient import log_softmax_
from lit_llm.losses.three_heads import mean_, softmax_into, sum_over_three_heads


class AdvantageTerms(NamedTuple):
    """The loss, differentiable, and the expected advantage of each token, detached."""

    loss: Tensor
    advantage_T: Tensor


def expected_advantage(
    policy_TD: Tensor,
    policy_head: Head,
    aligned_TE: Tensor,
    aligned_head: Head,
    reference_TF: Tensor,
    reference_head: Head,
    weight_T: Tensor,
    *,
    beta: float = 1.0,
    chunk_size: int | None = None,
) -> AdvantageTerms:
    """Minus the sum of weight_t E_policy[beta (log aligned - log reference)]: the reward of ADPA (arXiv 2502.17927).

    Over the full vocabulary and without the released clamping of advantages.

    Args:
        policy_TD: the student's hidden states on answers that it sampled.
        policy_head: trained, or detached.
        aligned_TE: hidden states of the aligned teacher.
        aligned_head: frozen.
        reference_TF: hidden states of the teacher before alignment.
        reference_head: frozen.
        weight_T: of each token: gamma, and the caller's 1/denominator.
        beta: scales the advantage; the released code leaves it to gamma.
        chunk_size: rows at a time; None chooses by the vocabularies.

    Raises:
        ValueError: numbers of rows differ.
    """

    def block_(*block: Tensor) -> list[Tensor]:
        return _terms_and_gradient_(*block, beta)

    frozen = ((aligned_TE, aligned_head), (reference_TF, reference_head))
    return AdvantageTerms(*sum_over_three_heads(block_, policy_TD, policy_head, frozen, weight_T, 1, chunk_size))


def _terms_and_gradient_(
    policy_CV: Tensor, aligned_CV: Tensor, reference_CV: Tensor, weight_C: Tensor, spare_2CV: Tensor, beta: float
) -> list[Tensor]:
    first_CV, second_CV = spare_2CV
    advantage_CV = log_softmax_(aligned_CV).sub_(log_softmax_(reference_CV))
    softmax_into(policy_CV, first_CV)
    expected_C = mean_(first_CV, advantage_CV, second_CV)
    torch.mul(advantage_CV.sub_(expected_C[:, None]), first_CV, out=policy_CV).mul_((-beta * weight_C)[:, None])
    return [-beta * weight_C * expected_C, beta * expected_C]
