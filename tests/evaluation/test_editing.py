"""Scores of edited facts: cases that the golden vectors leave out."""

from __future__ import annotations

import math

import pytest
import torch

from lit_llm.evaluation.editing import (
    CounterFact,
    EditMatrix,
    GeneratedExactMatch,
    GeneratedF1,
    MeanScore,
    TokenExactMatch,
    first_sentence,
    is_finished,
    normalized,
    token_agreement,
    token_f1,
    words,
)


def test_agreement_is_the_share_within_each_question():
    predicted, wanted = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1, 9, 3, 9, 9])
    found = token_agreement(predicted, wanted, torch.tensor([0, 0, 0, 1, 1]), 2)
    assert found.tolist() == pytest.approx([2 / 3, 0.0])


@pytest.mark.parametrize(
    ("generated", "kept"),
    [
        (" Lyon.\nIt is", "Lyon"),
        ("Lyon! Or", "Lyon"),
        ("3.14 metres. And", "3.14 metres"),
        ("里昂。而且", "里昂"),
        ("Lyon", "Lyon"),
        ("\n\nLyon\n", "Lyon"),
        ("दिल्ली। और", "दिल्ली"),
    ],
)
def test_a_generated_answer_ends_with_its_first_line_or_sentence(generated, kept):
    assert first_sentence(generated) == kept


@pytest.mark.parametrize(
    "wanted", ["12. Juli 1944", "St. John's College", "J. K. Rowling", "Apple Inc.", "Dr. No\nDr. Yes"]
)
def test_an_answer_that_holds_what_looks_like_an_end_can_be_written(wanted):
    said = f" {wanted}\nIt is. Not"
    assert first_sentence(said, wanted) == wanted.removesuffix(".") and is_finished(said, wanted)
    assert not any(is_finished(said[:end], wanted) for end in range(1 + len(wanted)))
    exact, f1 = GeneratedExactMatch(), GeneratedF1()
    for metric in (exact, f1):
        metric.update([said, f" so {wanted}\n"], [wanted, wanted])
    assert exact.compute() == 50 and 50 < f1.compute() < 100


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("\nLyon", False),
        ("\nLyon\n", True),
        ("里昂。", True),
        ("3.", False),
        ("3.14", False),
        ("Lyon. ", True),
        ("Lyon.\n", True),
    ],
)
def test_an_answer_is_finished_once_nothing_that_follows_can_change_it(text, finished):
    assert is_finished(text) is finished
    if finished:
        assert all(first_sentence(text + more) == first_sentence(text) for more in ("", "5", " x. y", "\n"))


def test_words_are_characters_in_scripts_without_spaces():
    assert words("The Paris, 里昂!") == ["paris", "里", "昂"]
    assert words("") == []
    assert normalized("An  Apple, the day") == "apple day"


def test_free_answers_are_compared_after_normalisation():
    exact, f1 = GeneratedExactMatch(), GeneratedF1()
    generated, wanted = [" the Lyon.\nmore", "New Lyon city"], ["Lyon", "Lyon"]
    exact.update(generated, wanted)
    f1.update(generated, wanted)
    assert exact.compute().item() == 50.0
    assert f1.compute().item() == pytest.approx(100 * (1 + 0.5) / 2)


def test_the_formula_of_a_released_script_is_an_option_by_name():
    assert token_f1(["a", "b"], ["a"]) == pytest.approx(2 / 3)
    assert token_f1(["a", "b"], ["a"], "remake_product") == 0.5
    with pytest.raises(ValueError, match="f1 or remake_product"):
        token_f1(["a"], ["a"], "em")


def test_a_mean_of_nothing_is_not_a_number_and_means_add_up_over_updates():
    metric = MeanScore()
    assert math.isnan(metric.compute().item())
    metric.update(torch.tensor([1.0, 0.0]))
    metric.update(torch.tensor([1.0]))
    assert metric.compute().item() == pytest.approx(200 / 3)


def test_pairs_of_different_numbers_are_an_error():
    with pytest.raises(ValueError):
        TokenExactMatch().update([[1], [2]], [[1]])


def test_a_neighbour_wants_the_true_object_and_prompts_of_one_fact_are_averaged_first():
    metric = CounterFact()
    metric.update("rewrite", torch.tensor([0.1]), torch.tensor([3.0]))
    metric.update("paraphrase", torch.tensor([0.1, 5.0, 5.0, 5.0]), torch.tensor([3.0, 0.1, 0.1, 0.1]))
    metric.update("paraphrase", torch.tensor([0.1]), torch.tensor([3.0]))
    metric.update("neighborhood", torch.tensor([3.0, 0.1]), torch.tensor([0.1, 3.0]))
    found = metric.compute()
    assert (found["ES"].item(), found["PS"].item(), found["NS"].item()) == (100.0, 62.5, 50.0)
    assert found["score"].item() == pytest.approx(3 / (1 / 100 + 1 / 62.5 + 1 / 50))
    with pytest.raises(ValueError, match="rewrite, paraphrase, neighborhood"):
        metric.update("locality", torch.ones(1), torch.ones(1))


def test_facts_edited_in_all_languages_have_a_row_of_their_own():
    matrix = EditMatrix(["en", "de"])
    matrix.update("en", "en", torch.tensor([1.0, 0.0]))
    matrix.update("all", "de", torch.tensor([1.0]))
    found = matrix.compute()
    assert found["matrix"][0, 0].item() == 50.0 and found["matrix"][2, 1].item() == 100.0
    assert math.isnan(found["matrix"][1, 0].item()) and math.isnan(found["cross_language"].item())
    with pytest.raises(ValueError, match="en, de, all"):
        matrix.update("fr", "en", torch.ones(1))
    for languages in (["en", "en"], ["en", "all"]):
        with pytest.raises(ValueError, match="each stands there once"):
            EditMatrix(languages)
