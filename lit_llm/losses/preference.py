"""Losses on pairs of a chosen and a rejected answer, from log-probabilities summed over each answer.

Every loss gives one value per pair, never a mean: the caller divides by the pairs of the whole optimizer step. Rewards
are detached. Sums are kept in at least float32, sigmoids are taken as logarithms.

Shapes: T tokens, N pairs or answers, K answers that were not written for their prompt.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lit_llm.losses.divergence import at_least_float32


class PreferenceTerms(NamedTuple):
    """One value per pair.

    Attributes:
        loss_N: differentiable.
        chosen_reward_N: implicit reward of the chosen answer, detached.
        rejected_reward_N: of the rejected answer, detached.
    """

    loss_N: Tensor
    chosen_reward_N: Tensor
    rejected_reward_N: Tensor


class AnswerTerms(NamedTuple):
    """One value per answer: the loss, differentiable, and the implicit reward, detached."""

    loss_N: Tensor
    reward_N: Tensor


def sum_by_sequence(values_T: Tensor, sequence_T: Tensor, num_sequences: int) -> Tensor:
    """Sums over the tokens of each sequence, (N,), in at least float32; 0 for a sequence without tokens.

    Args:
        values_T: per token.
        sequence_T: the sequence of each token, from 0.
        num_sequences: N.
    """
    values_T = at_least_float32(values_T)
    return values_T.new_zeros(num_sequences).index_add(0, sequence_T, values_T)


def mean_by_sequence(values_T: Tensor, sequence_T: Tensor, num_sequences: int) -> Tensor:
    """Means over the tokens of each sequence, (N,); 0 for a sequence without tokens."""
    tokens_N = torch.bincount(sequence_T, minlength=num_sequences)
    return sum_by_sequence(values_T, sequence_T, num_sequences) / tokens_N.clamp(min=1)


def dpo(
    chosen_N: Tensor,
    rejected_N: Tensor,
    reference_chosen_N: Tensor,
    reference_rejected_N: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceTerms:
    """Direct preference optimization (arXiv 2305.18290); label smoothing in the conservative form, a convex mixture.

    Args:
        chosen_N: the policy's log-probability of each chosen answer, summed over its tokens.
        rejected_N: of each rejected answer.
        reference_chosen_N: the reference's, likewise.
        reference_rejected_N: likewise.
        beta: scales the log-ratios.
        label_smoothing: probability that a pair is the wrong way round, below 0.5.
    """
    gained_N, lost_N = _difference(chosen_N, reference_chosen_N), _difference(rejected_N, reference_rejected_N)
    return _sigmoid(beta * (gained_N - lost_N), label_smoothing, beta * gained_N, beta * lost_N)


def ipo(
    chosen_N: Tensor,
    rejected_N: Tensor,
    reference_chosen_N: Tensor,
    reference_rejected_N: Tensor,
    *,
    beta: float,
    chosen_tokens_N: Tensor | None = None,
    rejected_tokens_N: Tensor | None = None,
) -> PreferenceTerms:
    """Identity preference optimization (arXiv 2310.12036): (u - 1 / (2 beta))^2.

    Args:
        chosen_N: the policy's log-probability of each chosen answer, summed over its tokens.
        rejected_N: of each rejected answer.
        reference_chosen_N: the reference's, likewise.
        reference_rejected_N: likewise.
        beta: inverse of twice the wanted margin.
        chosen_tokens_N: tokens of each chosen answer; log-ratios are then averaged over tokens. None: summed, as in the
            AlignDistil code. The two are different losses.
        rejected_tokens_N: likewise.

    Raises:
        ValueError: only one of the two lengths is given.
    """
    if (chosen_tokens_N is None) != (rejected_tokens_N is None):
        raise ValueError("chosen_tokens_N and rejected_tokens_N go together: give both, or none for sums.")
    gained_N, lost_N = _difference(chosen_N, reference_chosen_N), _difference(rejected_N, reference_rejected_N)
    if chosen_tokens_N is not None:
        gained_N, lost_N = gained_N / chosen_tokens_N.clamp(min=1), lost_N / rejected_tokens_N.clamp(min=1)
    loss_N = (gained_N - lost_N - 1 / (2 * beta)) ** 2
    return PreferenceTerms(loss_N, (beta * gained_N).detach(), (beta * lost_N).detach())


def simpo(
    chosen_mean_N: Tensor,
    rejected_mean_N: Tensor,
    *,
    beta: float,
    gamma_beta_ratio: float,
    label_smoothing: float = 0.0,
) -> PreferenceTerms:
    """Simple preference optimization (arXiv 2405.14734), without a reference.

    Args:
        chosen_mean_N: the policy's log-probability of each chosen answer, averaged over its tokens.
        rejected_mean_N: of each rejected answer.
        beta: scales the log-probabilities.
        gamma_beta_ratio: the wanted margin between the two, in units of log-probability per token.
        label_smoothing: as in DPO.
    """
    chosen_N, rejected_N = at_least_float32(chosen_mean_N), at_least_float32(rejected_mean_N)
    margin_N = beta * (chosen_N - rejected_N - gamma_beta_ratio)
    return _sigmoid(margin_N, label_smoothing, beta * chosen_N, beta * rejected_N)


def tdpo1(
    chosen_N: Tensor,
    rejected_N: Tensor,
    reference_chosen_N: Tensor,
    reference_rejected_N: Tensor,
    chosen_kl_N: Tensor,
    rejected_kl_N: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> PreferenceTerms:
    """Token-level DPO, variant 1 (arXiv 2404.11999): the margin loses how much further the rejected answer drifted.

    Args:
        chosen_N: the policy's log-probability of each chosen answer, summed over its tokens.
        rejected_N: of each rejected answer.
        reference_chosen_N: the reference's, likewise.
        reference_rejected_N: likewise.
        chosen_kl_N: KL(reference || policy) summed over the tokens of each chosen answer; a gradient flows into it.
        rejected_kl_N: of each rejected answer, likewise.
        beta: scales the log-ratios.
        label_smoothing: as in DPO.
    """
    gained_N, lost_N = _difference(chosen_N, reference_chosen_N), _difference(rejected_N, reference_rejected_N)
    margin_N = beta * (gained_N - lost_N - (rejected_kl_N - chosen_kl_N))
    return _sigmoid(margin_N, label_smoothing, beta * (gained_N + chosen_kl_N), beta * (lost_N + rejected_kl_N))


def tdpo2(
    chosen_N: Tensor,
    rejected_N: Tensor,
    reference_chosen_N: Tensor,
    reference_rejected_N: Tensor,
    chosen_kl_N: Tensor,
    rejected_kl_N: Tensor,
    *,
    beta: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> PreferenceTerms:
    """Token-level DPO, variant 2: that difference counts `alpha` times, and the chosen answer's KL gets no gradient."""
    gained_N, lost_N = _difference(chosen_N, reference_chosen_N), _difference(rejected_N, reference_rejected_N)
    margin_N = beta * (gained_N - lost_N - alpha * (rejected_kl_N - chosen_kl_N.detach()))
    return _sigmoid(margin_N, label_smoothing, beta * (gained_N + chosen_kl_N), beta * (lost_N + rejected_kl_N))


def kto(
    policy_N: Tensor,
    reference_N: Tensor,
    desirable_N: Tensor,
    baseline: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> AnswerTerms:
    """Kahneman-Tversky optimization (arXiv 2402.01306) of answers that are good or bad by themselves.

    Args:
        policy_N: the policy's log-probability of each answer, summed over its tokens.
        reference_N: the reference's.
        desirable_N: whether the answer is a good one, bool.
        baseline: z_0, one number or one per answer, without gradient; see `kto_baseline`.
        beta: scales the log-ratios.
        desirable_weight: of good answers.
        undesirable_weight: of bad answers.
    """
    ratio_N = _difference(policy_N, reference_N)
    good_N = desirable_N.to(ratio_N.dtype)
    # 1 - sigmoid(x) = sigmoid(-x)
    loss_N = torch.sigmoid(beta * (1 - 2 * good_N) * (ratio_N - baseline.detach()))
    weight_N = desirable_weight * good_N + undesirable_weight * (1 - good_N)
    return AnswerTerms(weight_N * loss_N, (beta * ratio_N).detach())


def kto_baseline(policy_K: Tensor, reference_K: Tensor) -> Tensor:
    """z_0: mean log-ratio of answers, at least 0, detached.

    Args:
        policy_K: of answers paired with another answer's prompt; in paired KTO of the opposite side's answers.
        reference_K: the reference's.
    """
    ratio_K = _difference(policy_K, reference_K).detach()
    return (ratio_K.sum() / max(len(ratio_K), 1)).clamp(min=0)


def paired_kto(
    chosen_N: Tensor,
    rejected_N: Tensor,
    reference_chosen_N: Tensor,
    reference_rejected_N: Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PreferenceTerms:
    """KTO of pairs, mean over both answers of a pair; each side's baseline is the mean log-ratio of the other side.

    The baseline depends on the pairs given together, so here, as in the released code, another split of a batch gives
    another loss. It carries no gradient, as in the paper.
    """
    sides = (chosen_N, reference_chosen_N), (rejected_N, reference_rejected_N)
    settings = {"beta": beta, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    good_N = torch.ones_like(chosen_N, dtype=torch.bool)
    chosen = kto(*sides[0], good_N, kto_baseline(*sides[1]), **settings)
    rejected = kto(*sides[1], ~good_N, kto_baseline(*sides[0]), **settings)
    return PreferenceTerms(0.5 * (chosen.loss_N + rejected.loss_N), chosen.reward_N, rejected.reward_N)


def _difference(policy_N: Tensor, reference_N: Tensor) -> Tensor:
    return at_least_float32(policy_N) - at_least_float32(reference_N.detach())


def _sigmoid(margin_N: Tensor, smoothing: float, chosen_N: Tensor, rejected_N: Tensor) -> PreferenceTerms:
    if not 0 <= smoothing < 0.5:
        raise ValueError(f"label_smoothing is {smoothing}; it is a probability from 0 to below 0.5.")
    loss_N = -logsigmoid(margin_N)
    if smoothing:
        loss_N = (1 - smoothing) * loss_N - smoothing * logsigmoid(-margin_N)
    return PreferenceTerms(loss_N, chosen_N.detach(), rejected_N.detach())
