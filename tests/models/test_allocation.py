"""Experts per layer: the published rule, its budget form, and lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.models.allocation import by_budget, by_delta, classifier_layers, listed, uniform
from tests.reference.layer_moe_losses import experts_of_budget, quotas

SIMILARITIES = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=12)


@given(SIMILARITIES, st.integers(1, 60))
def test_the_published_rule_rounds_shares_of_delta_up(similarity, delta):
    found = by_delta(similarity, delta)
    for count, quota, share in zip(found.experts, found.quota, quotas(similarity, delta), strict=True):
        assert quota == pytest.approx(float(share), rel=1e-12)
        assert count >= 1 and share - 1e-9 <= count < share + 1


@given(SIMILARITIES, st.integers(1, 3), st.integers(0, 40))
def test_a_budget_is_spent_to_the_last_expert_as_trying_every_delta_would(similarity, least, more):
    total = least * len(similarity) + more
    found = by_budget(similarity, total, least)
    assert sum(found.experts) == total and found.experts == experts_of_budget(similarity, total, least)
    larger = by_budget(similarity, total + 1, least).experts
    assert all(a <= b for a, b in zip(found.experts, larger, strict=True))


@pytest.mark.parametrize(("layers", "each"), [(3, 3), (6, 5), (7, 2), (11, 9)])
def test_equal_layers_get_equal_shares_although_floats_are_a_little_above(layers, each):
    assert by_delta([0.3] * layers, layers * each).experts == [each] * layers


def test_ties_go_to_the_lower_layer():
    assert by_budget([0.5, 0.5, 0.5], 5).experts == [2, 2, 1]


def test_uniform_and_listed_counts():
    assert uniform(3, 5).experts == [6, 6, 6] and uniform(3, 5).new == [5, 5, 5]
    assert listed([1, 4, 2], 3).experts == [1, 4, 2]


def test_the_text_has_a_line_for_each_layer():
    lines = by_delta([0.2, 0.9], 4).text().splitlines()
    assert lines == [
        "Experts per layer (delta 4): 3 new in 2 layers",
        "  layer   0: 4 experts (3 new), similarity 0.2000, quota 3.273",
        "  layer   1: 1 experts (dense), similarity 0.9000, quota 0.727",
    ]


def test_the_text_of_a_second_expansion_has_totals_with_the_experts_of_the_first():
    lines = listed([3, 1, 1], 3).text(before=[4, 2, 1]).splitlines()
    assert lines == [
        "Experts per layer (experts): 2 new in 3 layers",
        "  layer   0: 6 experts (2 new)",
        "  layer   1: 2 experts (0 new)",
        "  layer   2: 1 experts (dense)",
    ]


def test_classifiers_go_where_new_languages_are_most_like_old_ones():
    experts, new_old = [3, 1, 2, 2, 3], [0.1, 0.9, 0.4, 0.5, 0.4]
    assert classifier_layers(2, experts, new_old) == [2, 3]  # layer 1 is dense, 2 wins the tie with 4
    assert classifier_layers([4, 0], experts, None) == [0, 4]
    assert classifier_layers(None, experts, None) == classifier_layers(0, experts, new_old) == []


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: by_delta([0.3, -0.1], 4), "similarity of layer 1 is -0.1"),
        (lambda: by_budget([0.3, float("nan")], 4), "similarity of layer 1 is nan"),
        (lambda: by_delta([0.3], 0), "expand.delta is 0"),
        (lambda: by_delta([0.3], float("inf")), "expand.delta is inf"),
        (lambda: by_budget([0.3, 0.2], 3, 2), "3 experts in 2 layers cannot be at least 2"),
        (lambda: by_budget([0.3], 3, 0), "expand.min_experts is 0"),
        (lambda: uniform(4, 0), "expand.uniform is 0"),
        (lambda: listed([2, 2], 3), "lists 2 layers, but the model has 3"),
        (lambda: listed([2, 0], 2), "gives layer 1 0 experts"),
        (lambda: listed([1, 1], 2), "1 everywhere"),
        (lambda: classifier_layers([1], [2, 1], None), "layer 1, which has no router: it stays dense"),
        (lambda: classifier_layers([5], [2, 1], None), "layer 5, which has no router: the model has 2 layers"),
        (lambda: classifier_layers(2, [2, 1], [0.1, 0.2]), "classifier_layers is 2, but 1 layers have a router"),
        (lambda: classifier_layers(1, [2, 2], None), "no similarity to choose them by"),
    ],
)
def test_what_makes_no_sense_is_refused(work, said):
    with pytest.raises(ValueError, match=said.replace(".", r"\.")):
        work()
