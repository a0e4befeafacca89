"""Win rates of paired answers, plain and controlled for length, with intervals from a bootstrap over prompts.

Samples of one prompt are drawn together, as one cluster: ten answers to a prompt tell less than ten prompts.

Shapes: N comparisons, P prompts, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_CELLS = 2**21  # numbers of a (resamples, comparisons) table that exist at a time
_NEWTON_STEPS, _HALVINGS, _CONVERGED = 200, 40, 1e-13


class Estimate(NamedTuple):
    """A number and its percentile interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: prompts are drawn with replacement, each with all its samples.

    Args:
        resamples: how often; equal seeds draw equal prompts, so that models are compared on the same draws.
        confidence: share of the resamples inside an interval.
        seed: of the draws.

    Raises:
        ValueError: fewer than 2 resamples, or a confidence outside 0 to 1.
    """

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.resamples < 2:
            raise ValueError(f"resamples is {self.resamples}, but an interval needs at least 2; 1000 is usual.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence is {self.confidence}, but it is a share between 0 and 1, such as 0.95.")


def wins(reward_N: Tensor, other_N: Tensor) -> Tensor:
    """(N,) 1 where the first reward is greater, 0 where the second is, one half where they are equal; float64."""
    return 0.5 * (1 + torch.sign(reward_N.double() - other_N.double()))


def mean(value_N: Tensor, prompt_N: Tensor, bootstrap: Bootstrap = Bootstrap()) -> Estimate:
    """Mean over comparisons or answers; every sample weighs the same.

    Args:
        value_N: the values.
        prompt_N: which prompt each belongs to, any integers.
        bootstrap: how the interval is made. With a single prompt it has no width.

    Raises:
        ValueError: nothing to average, numbers that differ, or values that are not finite.
    """
    _check(value=value_N, prompt=prompt_N)
    value_N = value_N.double()
    return _estimate(lambda weight_RN: _weighted_mean(weight_RN, value_N), prompt_N, bootstrap)


def win_rate(reward_N: Tensor, other_N: Tensor, prompt_N: Tensor, bootstrap: Bootstrap = Bootstrap()) -> Estimate:
    """How often the first of two answers has the greater reward; ties count one half.

    Args:
        reward_N: rewards of the first model's answers.
        other_N: rewards of the second model's answers to the same prompts, paired.
        prompt_N: which prompt each pair belongs to.
        bootstrap: how the interval is made.

    Raises:
        ValueError: as in `mean`.
    """
    _check(reward=reward_N, other=other_N, prompt=prompt_N)
    return mean(wins(reward_N, other_N), prompt_N, bootstrap)


def length_controlled_win_rate(
    reward_N: Tensor,
    other_N: Tensor,
    longer_N: Tensor,
    prompt_N: Tensor,
    bootstrap: Bootstrap = Bootstrap(),
    ridge: float = 0.1,
) -> Estimate:
    """The win rate that a logistic regression expects of answers that are equally long.

        P(win) = sigmoid(a + b tanh(d / std(d))),    d the difference of lengths,    reported: sigmoid(a)

    The length term, its scale (fixed over resamples), soft labels for ties and the evaluation at d = 0 are those of
    AlpacaEval 2 (arXiv 2404.04475). Not the same: there, a third term is the difficulty of each instruction, learned from
    many models, the penalty is L1 on all terms with its strength from cross-validation, answers of two gamed baselines are
    added to the data, and lengths are characters. Here an L2 penalty lies on b alone. Without any difference of lengths
    the result is the plain win rate; it is also where every comparison is won, or lost, and a has no finite value.

    Args:
        reward_N: rewards of the first model's answers.
        other_N: rewards of the second model's answers to the same prompts, paired.
        longer_N: by how much the first model's answer is longer, in any unit.
        prompt_N: which prompt each pair belongs to.
        bootstrap: how the interval is made.
        ridge: the penalty is ridge / 2 * b^2, beside the sum of log-likelihoods.

    Raises:
        ValueError: as in `mean`, or `ridge` is not above 0: wins that length tells apart would have no finite b.
    """
    if not ridge > 0:
        raise ValueError(f"ridge is {ridge}; it must be above 0, or b may grow without bound. 0.1 is weak.")
    _check(reward=reward_N, other=other_N, longer=longer_N, prompt=prompt_N)
    win_N, difference_N = wins(reward_N, other_N), longer_N.double()
    scale = difference_N.std().item() if len(difference_N) > 1 else 0.0
    length_N = torch.tanh(difference_N / scale) if scale > 0 else torch.zeros_like(difference_N)
    return _estimate(lambda weight_RN: _rate_at_zero(weight_RN, win_N, length_N, ridge), prompt_N, bootstrap)


def _estimate(statistic: Callable[[Tensor], Tensor], prompt_N: Tensor, bootstrap: Bootstrap) -> Estimate:
    """A statistic of weighted samples, (R, N) -> (R,), and its interval."""
    prompt_N = torch.unique(prompt_N, return_inverse=True)[1]
    prompts = int(prompt_N.max()) + 1
    generator = torch.Generator().manual_seed(bootstrap.seed)
    drawn_RP = torch.randint(prompts, (bootstrap.resamples, prompts), generator=generator)
    times_RP = torch.zeros(drawn_RP.shape, dtype=torch.float64)
    times_RP.scatter_add_(1, drawn_RP, torch.ones_like(times_RP))
    value = statistic(torch.ones(1, len(prompt_N), dtype=torch.float64)).item()
    chunks = times_RP.split(max(1, _CELLS // len(prompt_N)))
    value_R = torch.cat([statistic(times[:, prompt_N]) for times in chunks])
    tail = (1 - bootstrap.confidence) / 2
    low, high = value_R.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)


def _weighted_mean(weight_RN: Tensor, value_N: Tensor) -> Tensor:
    return (weight_RN @ value_N) / weight_RN.sum(1)


def _rate_at_zero(weight_RN: Tensor, win_N: Tensor, length_N: Tensor, ridge: float) -> Tensor:
    """(R,) sigmoid of the fitted intercept; 0 or 1 where every comparison is lost or won."""
    rate_R = _weighted_mean(weight_RN, win_N)
    open_R = (rate_R > 1e-12) & (rate_R < 1 - 1e-12)
    if open_R.any():
        rate_R = rate_R.clone()
        rate_R[open_R] = torch.sigmoid(_intercept(weight_RN[open_R], win_N, length_N, ridge, rate_R[open_R]))
    return rate_R.clamp(0, 1)


def _intercept(weight_RN: Tensor, win_N: Tensor, length_N: Tensor, ridge: float, rate_R: Tensor) -> Tensor:
    """(R,) by Newton's method; a step that does not raise the objective enough is halved."""
    a_R, b_R = torch.logit(rate_R), torch.zeros_like(rate_R)

    def objective(a_R: Tensor, b_R: Tensor) -> Tensor:
        score_RN = a_R[:, None] + b_R[:, None] * length_N
        fit_RN = win_N * score_RN - torch.nn.functional.softplus(score_RN)
        return (weight_RN * fit_RN).sum(1) - ridge / 2 * b_R**2

    reached_R = objective(a_R, b_R)
    for _ in range(_NEWTON_STEPS):
        a_step_R, b_step_R, gain_R = _newton_step(weight_RN, win_N, length_N, ridge, a_R, b_R)
        size_R = torch.ones_like(a_R)
        slack_R = 1e-14 * reached_R.abs()  # of rounding
        for _ in range(_HALVINGS):
            found_R = objective(a_R + size_R * a_step_R, b_R + size_R * b_step_R)
            enough_R = found_R >= reached_R + 1e-4 * size_R * gain_R - slack_R
            if enough_R.all():
                break
            size_R = torch.where(enough_R, size_R, size_R / 2)
        a_R, b_R, reached_R = a_R + size_R * a_step_R, b_R + size_R * b_step_R, found_R
        if (gain_R <= _CONVERGED * (1 + reached_R.abs())).all():
            break
    return a_R


def _newton_step(
    weight_RN: Tensor, win_N: Tensor, length_N: Tensor, ridge: float, a_R: Tensor, b_R: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of a and b, and what they would gain if the objective were a plane."""
    rate_RN = torch.sigmoid(a_R[:, None] + b_R[:, None] * length_N)
    error_RN, curve_RN = weight_RN * (win_N - rate_RN), weight_RN * rate_RN * (1 - rate_RN)
    a_slope_R, b_slope_R = error_RN.sum(1), error_RN @ length_N - ridge * b_R
    aa_R, ab_R, bb_R = curve_RN.sum(1), curve_RN @ length_N, curve_RN @ length_N**2 + ridge
    determinant_R = aa_R * bb_R - ab_R**2  # at least ridge * aa_R
    a_step_R = (bb_R * a_slope_R - ab_R * b_slope_R) / determinant_R
    b_step_R = (aa_R * b_slope_R - ab_R * a_slope_R) / determinant_R
    return a_step_R, b_step_R, a_step_R * a_slope_R + b_step_R * b_slope_R


def _check(**columns: Tensor) -> None:
    counts = {name: len(column) for name, column in columns.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            "Every comparison needs all its numbers, but there are "
            + ", ".join(f"{count} of {name}" for name, count in counts.items())
            + ". Give one of each for every comparison."
        )
    if not min(counts.values()):
        raise ValueError("There is nothing to compare: 0 answers. Give at least one.")
    for name, column in columns.items():
        if wrong := int((~torch.isfinite(column)).sum()):
            raise ValueError(f"{wrong} of {len(column)} numbers of {name} are not finite. Leave those answers out.")
