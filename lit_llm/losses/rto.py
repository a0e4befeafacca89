"""Token rewards inside PPO: what RTO (arXiv 2404.18922) and the AlignDistil code's PPO compute from log-probabilities.

Per-token values, never means; columns outside the mask are 0.

Shapes: B answers, A positions of an answer (padded on the right).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """Of every position: how much better than expected, before whitening, and what the critic should have said."""

    advantage_BA: Tensor
    return_BA: Tensor


def log_ratio(log_prob_BA: Tensor, reference_BA: Tensor, mask_BA: Tensor) -> Tensor:
    """log policy - log reference of the sampled tokens, (B, A): a one-sample estimate of the KL."""
    return (log_prob_BA - reference_BA) * mask_BA


def token_rewards(
    dpo_BA: Tensor,
    reference_BA: Tensor,
    old_BA: Tensor,
    mask_BA: Tensor,
    *,
    beta: float,
    kl_coefficient: float,
    clip: tuple[float, float] = (-10.0, 10.0),
) -> Tensor:
    """Clipped beta (log dpo - log reference) minus the penalty for leaving the reference, (B, A).

    Args:
        dpo_BA: the DPO model's log-probabilities of the sampled tokens.
        reference_BA: the starting model's.
        old_BA: the sampling policy's.
        mask_BA: 1 at sampled tokens.
        beta: scales the reward.
        kl_coefficient: of the penalty.
        clip: limits of the reward, before the penalty.
    """
    reward_BA = (beta * (dpo_BA - reference_BA)).clamp(*clip)
    return reward_BA * mask_BA - kl_coefficient * log_ratio(old_BA, reference_BA, mask_BA)


def advantages(
    reward_BA: Tensor, value_BA: Tensor, mask_BA: Tensor, *, discount: float = 1.0, decay: float = 0.95
) -> Advantages:
    """Generalised advantage estimation (arXiv 1506.02438), from the last position to the first.

    Args:
        reward_BA: per token.
        value_BA: the critic's, when the answer was sampled.
        mask_BA: 1 at sampled tokens.
        discount: gamma.
        decay: lambda.
    """
    reward_BA, value_BA = reward_BA * mask_BA, value_BA * mask_BA
    last_B = next_value_B = torch.zeros_like(reward_BA[:, 0]) if reward_BA.shape[1] else reward_BA.new_zeros(0)
    columns = []
    for at in reversed(range(reward_BA.shape[1])):
        surprise_B = reward_BA[:, at] + discount * next_value_B - value_BA[:, at]
        last_B = surprise_B + discount * decay * last_B
        next_value_B = value_BA[:, at]
        columns.append(last_B)
    advantage_BA = torch.stack(columns[::-1], 1) if columns else torch.zeros_like(reward_BA)
    return Advantages(advantage_BA, advantage_BA + value_BA)


def clipped_policy_loss(new_BA: Tensor, old_BA: Tensor, advantage_BA: Tensor, *, clip: float = 0.2) -> Tensor:
    """PPO's surrogate of every token (arXiv 1707.06347), to be minimised, (B, A)."""
    ratio_BA = (new_BA - old_BA).exp()
    return -torch.minimum(ratio_BA * advantage_BA, ratio_BA.clamp(1 - clip, 1 + clip) * advantage_BA)


def clipped_value_loss(new_BA: Tensor, old_BA: Tensor, return_BA: Tensor, *, clip: float = 0.2) -> Tensor:
    """Half the squared error of the critic, the larger of the clipped and the plain one, (B, A)."""
    clipped_BA = old_BA + (new_BA - old_BA).clamp(-clip, clip)
    return 0.5 * torch.maximum((clipped_BA - return_BA) ** 2, (new_BA - return_BA) ** 2)
