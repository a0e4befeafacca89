"""Scores of languages, and the table of what was forgotten and learned."""

import math

import pytest
import torch

from lit_llm.evaluation.forgetting import ForgettingTable, LanguageScore, LanguageScores

GROUPS = {"old": ["en", "fr"], "new": ["hu"]}


def table() -> ForgettingTable:
    found = ForgettingTable(GROUPS)
    found.add("start", {"en": LanguageScore(2.0, 0.5), "fr": LanguageScore(3.0, 0.4), "hu": LanguageScore(6.0, 0.1)})
    found.add("stage 1", {"en": LanguageScore(2.5, 0.4), "fr": LanguageScore(3.3, 0.3), "hu": LanguageScore(4.0, 0.2)})
    return found


def test_scores_are_means_over_all_tokens_of_a_language():
    scores = LanguageScores(["en", "hu", "tr"])
    scores.update(0, torch.tensor(6.0), torch.tensor(1), 3)
    scores.update(1, torch.tensor(4.0), torch.tensor(0), 1)
    scores.update(0, torch.tensor(2.0), torch.tensor(2), torch.tensor(5))
    found = scores.compute()
    assert found == {"en": LanguageScore(1.0, 3 / 8), "hu": LanguageScore(4.0, 0.0)}
    assert found["hu"].perplexity == pytest.approx(math.exp(4))


def test_the_table_has_a_row_for_each_language_and_one_for_each_group():
    lines = table().text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "old: en",
        "old: fr",
        "old: mean",
        "new: hu",
        "new: mean",
    ]
    assert "2.500 (ppl 12.18, acc 45.0%)" in lines[4] and lines[4].endswith("| +0.400 |")
    assert lines[5].endswith("| -2.000 |")


def test_a_group_without_all_its_languages_has_no_mean():
    found = table()
    found.add("stage 2", {"en": LanguageScore(2.1, 0.5)})
    assert found.mean(found.moments[-1][1], "old") is None
    assert found.text().splitlines()[4].rstrip(" |").endswith("acc 35.0%)")


def test_a_moment_that_is_measured_again_takes_the_place_of_the_first(tmp_path):
    found = table()
    found.add("stage 1", {"en": LanguageScore(9.0, 0.0)})
    assert [name for name, _ in found.moments] == ["start", "stage 1"]
    found.write(tmp_path / "forgetting.json")
    assert ForgettingTable.read(tmp_path / "forgetting.json") == found
