"""Scores, selection and combination against plain loops; what cannot be located is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.editing.locate import (
    Located,
    Locating,
    combine,
    contrasted,
    locate,
    overlap,
    random_neurons,
    ranks,
    scores,
    select,
)
from tests.reference import neuron_edit as reference

H = torch.randn(8, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LANGUAGES = [0, 1, 2, 0, 1, 2, 2, 0]
NORMS = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("statistic", ["mean_abs", "max_abs", "freq_pos", "contrib"])
def test_statistics_are_those_of_the_plain_loops(statistic):
    wanted = torch.tensor(reference.statistics(H, LANGUAGES, statistic, NORMS), dtype=torch.float64)
    torch.testing.assert_close(scores(H, LANGUAGES, statistic, NORMS), wanted)


def test_attributions_count_with_their_sign():
    found = scores(H, LANGUAGES, "integrated_gradients")
    torch.testing.assert_close(found[1], (H[1] + H[4]) / 2)
    assert (found < 0).any()


# few different values, so that ties are common
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=12, max_size=12), min_size=1, max_size=4),
    st.floats(0.05, 1.0),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(0, 8),
)
def test_chosen_neurons_are_those_of_the_plain_loops(rows, top_ratio, votes, fewest, more):
    votes = min(votes, len(rows))
    locating = Locating(
        top_ratio=top_ratio, combination="vote", votes=votes, min_neurons=fewest, max_neurons=fewest + more
    )
    found = locate(torch.tensor(rows, dtype=torch.float64), locating)
    wanted = reference.chosen_neurons(rows, math.ceil(top_ratio * 12), votes, fewest, fewest + more)
    assert found.neurons.tolist() == wanted
    assert len(wanted) == found.shared + found.filled - found.dropped


def test_of_equal_scores_the_lower_index_ranks_first():
    assert ranks(torch.tensor([[1.0, 3.0, 3.0, 0.0, 1.0]])).tolist() == [[2, 0, 1, 4, 3]]


def test_the_ratio_is_of_the_largest_score_of_the_language_and_a_threshold_is_met_by_equality():
    score = torch.tensor([[1.0, 0.3, 0.31, 0.0], [10.0, 2.9, 3.0, 3.1]])
    by_ratio = select(score, Locating(selection="ratio", ratio=0.3))
    assert by_ratio.tolist() == [[True, False, True, False], [True, False, False, True]]
    by_threshold = select(score, Locating(selection="threshold", threshold=0.3))
    assert by_threshold[0].tolist() == [True, True, True, False]


def test_without_a_number_three_quarters_of_the_languages_vote():
    selected = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0], [0, 0]]).bool()
    found = combine(selected, torch.rand(5, 2), Locating(combination="vote", min_neurons=1))
    assert (found.neurons.tolist(), found.shared) == ([0], 1)
    every = combine(selected, torch.rand(5, 2), Locating(min_neurons=1))
    assert (every.shared, every.filled) == (0, 1)


def test_contrast_takes_out_what_is_large_for_every_fact():
    score = torch.zeros(3, 2, 4)
    score[..., 0] = 10.0
    score[1, :, 2] = 5.0
    found = contrasted(score)
    assert found[0, 0].tolist() == [0.0, 0.0, -2.5, 0.0]
    assert found[1, 1].tolist() == [0.0, 0.0, 5.0, 0.0]
    with pytest.raises(ValueError, match="there is 1"):
        contrasted(score[:1])


def test_random_neurons_are_as_many_others_for_another_seed():
    located = [Located(torch.arange(9), 9, 0, 0), Located(torch.arange(4), 2, 2, 0)]
    drawn, again, others = (random_neurons(located, 500, seed) for seed in (1, 1, 2))
    assert [len(found.neurons) for found in drawn] == [9, 4]
    assert torch.equal(drawn[0].neurons, again[0].neurons) and not torch.equal(drawn[0].neurons, others[0].neurons)
    assert torch.equal(drawn[0].neurons, drawn[0].neurons.unique())
    assert not torch.equal(drawn[0].neurons, located[0].neurons)


def test_overlap_tells_facts_from_chance():
    selected = torch.zeros(4, 3, 100, dtype=torch.bool)
    for fact in range(4):
        selected[fact, :, 10 * fact : 10 * fact + 8] = True  # shared by the languages of one fact
        selected[fact, :, 90:92] = True  # large for every prompt
    found = overlap(selected)
    assert (found.same_fact, found.different_facts) == (10.0, 2.0)
    assert found.chance == pytest.approx(100 * 0.1**3)
    assert found.pair_LL.tolist() == [[10.0] * 3] * 3 and found.jaccard_LL[0, 1] == 1.0
    with pytest.raises(ValueError, match="at least 3 facts"):
        overlap(selected[:2])


def test_a_language_without_prompts_and_missing_norms_are_refused():
    with pytest.raises(ValueError, match=r"Languages \[1\]"):
        scores(H[:2], [0, 2], "mean_abs")
    with pytest.raises(ValueError, match="norms"):
        scores(H, LANGUAGES, "contrib")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"statistic": "median"}, "mean_abs, max_abs, freq_pos, contrib, integrated_gradients"),
        ({"selection": "best"}, "topk, ratio, threshold"),
        ({"combination": "union"}, "intersection, vote"),
        ({"position": "first"}, "subject_last"),
        ({"top_ratio": 0.0}, "top_ratio is 0.0"),
        ({"min_neurons": 9, "max_neurons": 8}, "min_neurons is 9"),
        ({"votes": 2}, "does not count"),
        ({"votes": 0, "combination": "vote"}, "votes is 0"),
        ({"ratio": 0.5}, "ratio is 0.5, but locating.selection is 'topk'"),
        ({"threshold": 0.7, "selection": "ratio"}, "threshold is 0.7, but locating.selection is 'ratio'"),
        (
            {"statistic": "integrated_gradients", "position": "mean"},
            "integrated_gradients reads the prompt's last token",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        Locating(**settings)


def test_more_votes_than_languages_are_refused():
    locating = Locating(combination="vote", votes=3)
    with pytest.raises(ValueError, match="2 languages"):
        combine(torch.ones(2, 4).bool(), torch.ones(2, 4), locating)
