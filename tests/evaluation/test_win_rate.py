"""Win rates and their intervals against values known on paper."""

import math

import pytest
import torch

from lit_llm.evaluation.win_rate import Bootstrap, length_controlled_win_rate, mean, win_rate, wins

QUICK = Bootstrap(resamples=200)


def outcomes(*groups: tuple[int, int, float]):
    """Rewards of both sides and length differences from (wins, losses, length difference)."""
    won = torch.tensor([float(won) for w, n, _ in groups for won in [1] * w + [0] * n])
    longer = torch.tensor([length for w, n, length in groups for _ in range(w + n)])
    return won, torch.full_like(won, 0.5), longer, torch.arange(len(won))


def test_ties_count_one_half():
    ours, theirs = torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert wins(ours, theirs).tolist() == [0.5, 1, 1, 0]
    assert win_rate(ours, theirs, torch.arange(4), QUICK).value == 2.5 / 4


def test_the_two_sides_of_a_win_rate_add_up_to_one():
    ours, theirs, longer, prompts = outcomes((5, 3, 2.0), (2, 7, -1.0), (1, 1, 0.0))
    for rate, back in (
        (win_rate(ours, theirs, prompts, QUICK), win_rate(theirs, ours, prompts, QUICK)),
        (
            length_controlled_win_rate(ours, theirs, longer, prompts, QUICK),
            length_controlled_win_rate(theirs, ours, -longer, prompts, QUICK),
        ),
    ):
        assert [rate.value, rate.low, rate.high] == pytest.approx([1 - back.value, 1 - back.high, 1 - back.low])


def test_the_interval_of_many_prompts_is_that_of_the_normal_distribution():
    ours, theirs, _, prompts = outcomes((240, 160, 0.0))
    found = win_rate(ours, theirs, prompts, Bootstrap(resamples=4000))
    half = 1.96 * math.sqrt(0.6 * 0.4 / 400)
    assert found.value == pytest.approx(0.6)
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=0.08)


def test_more_samples_of_the_same_prompts_with_the_same_outcome_tell_nothing_more():
    ours, theirs, longer, prompts = outcomes((9, 3, 2.0), (1, 3, -1.0))
    repeated = [column.repeat_interleave(10) for column in (ours, theirs, longer, prompts)]
    one, ten = win_rate(ours, theirs, prompts, QUICK), win_rate(*repeated[:2], repeated[3], QUICK)
    assert tuple(ten) == pytest.approx(tuple(one))
    as_prompts = win_rate(*repeated[:2], torch.arange(160), QUICK)
    assert as_prompts.high - as_prompts.low < 0.5 * (one.high - one.low)


def test_intervals_repeat_themselves_and_follow_the_seed():
    values, prompts = torch.arange(20.0) ** 2, torch.arange(20) // 2
    first, again, other = (mean(values, prompts, Bootstrap(50, seed=seed)) for seed in (1, 1, 2))
    assert first == again and first.value == other.value and first[1:] != other[1:]


def test_samples_of_one_prompt_are_drawn_together():
    # two prompts whose samples cancel each other: every resample has a mean of one half
    found = mean(torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([7, 7, 3, 3]), QUICK)
    assert tuple(found) == (0.5, 0.5, 0.5)


def test_length_is_taken_out_as_on_paper():
    # two lengths: the regression meets both shares, and its middle is the mean of their logits
    ours, theirs, longer, prompts = outcomes((8, 4, 1.0), (1, 3, -1.0))
    found = length_controlled_win_rate(ours, theirs, longer, prompts, QUICK, ridge=1e-9)
    assert found.value == pytest.approx(1 / (1 + math.sqrt(1.5)), abs=1e-6)
    assert win_rate(ours, theirs, prompts, QUICK).value == pytest.approx(9 / 16)


def test_the_scale_of_lengths_and_its_tanh_are_those_of_alpaca_eval():
    ours, theirs, longer, prompts = outcomes((5, 3, 2.0), (2, 7, -1.0), (4, 1, 9.0), (3, 3, 0.0))
    found = length_controlled_win_rate(ours, theirs, longer, prompts, QUICK, ridge=0.3)
    in_words = length_controlled_win_rate(ours, theirs, longer * 5.5, prompts, QUICK, ridge=0.3)
    assert tuple(found) == pytest.approx(tuple(in_words))
    # the gradient of the penalised log-likelihood, written out, vanishes at the intercept with its best slope
    x, y, a = torch.tanh(longer / longer.std()).double(), wins(ours, theirs), math.log(found.value / (1 - found.value))
    slopes = torch.linspace(-3, 3, 600_001, dtype=torch.float64)
    at = slopes[_objective(a, slopes[::1000], x, y).argmax() * 1000]
    fine = at + torch.linspace(-0.02, 0.02, 4001, dtype=torch.float64)
    b = fine[_objective(a, fine, x, y).argmax()]
    assert (y - torch.sigmoid(a + b * x)).sum().item() == pytest.approx(0, abs=1e-3)


def _objective(a, slopes, x, y):
    score = a + slopes[:, None] * x
    return (y * score - torch.nn.functional.softplus(score)).sum(1) - 0.15 * slopes**2


def test_without_a_difference_of_lengths_it_is_the_win_rate_itself():
    for length in (0.0, 3.0):
        ours, theirs, longer, prompts = outcomes((7, 5, length))
        found = length_controlled_win_rate(ours, theirs, longer, prompts, QUICK)
        plain = win_rate(ours, theirs, prompts, QUICK)
        assert tuple(found) == pytest.approx(tuple(plain), abs=1e-9)


@pytest.mark.parametrize("groups", [[(6, 0, 1.0), (6, 0, -2.0)], [(0, 6, 1.0), (0, 6, -2.0)], [(1, 0, 5.0)]])
def test_all_won_or_all_lost_is_one_or_zero(groups):
    ours, theirs, longer, prompts = outcomes(*groups)
    assert tuple(length_controlled_win_rate(ours, theirs, longer, prompts, QUICK)) == (ours[0], ours[0], ours[0])


@pytest.mark.parametrize(
    "groups",
    [
        [(20, 0, 1.0), (0, 20, -1.0)],  # length tells everything
        [(1, 0, 30.0), (0, 500, -1.0)],
        [(499, 0, 1.0), (0, 1, 1.0), (0, 1, -400.0)],
    ],
)
def test_wins_that_length_tells_apart_give_numbers(groups):
    ours, theirs, longer, prompts = outcomes(*groups)
    found = length_controlled_win_rate(ours, theirs, longer, prompts, QUICK)
    assert 0 <= found.low <= found.value <= found.high <= 1
    if len(groups) == 2 and groups[0][0] == groups[1][1]:
        assert found.value == pytest.approx(0.5, abs=1e-6)


def test_what_cannot_be_compared_is_refused():
    one, two = torch.ones(1), torch.ones(2)
    with pytest.raises(ValueError, match="2 of reward, 1 of other"):
        win_rate(two, one, two, QUICK)
    with pytest.raises(ValueError, match="nothing to compare"):
        mean(one[:0], one[:0], QUICK)
    with pytest.raises(ValueError, match="1 of 2 numbers of value are not finite"):
        mean(torch.tensor([1.0, math.nan]), two, QUICK)
    with pytest.raises(ValueError, match="ridge is 0"):
        length_controlled_win_rate(two, two, two, two, QUICK, ridge=0)
    with pytest.raises(ValueError, match="resamples is 1"):
        Bootstrap(resamples=1)
    with pytest.raises(ValueError, match="confidence is 95"):
        Bootstrap(confidence=95)
