"""Minimum-edit alignment against plain definitions."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.data.minimum_edit import align_minimum_edit, edit_distance, first_teacher_ids, nearest_tokens, warp
from lit_llm.data.vocabulary import spellings_from_strings, with_one_marker

words = st.text("abc▁", max_size=6)


def distance_by_definition(a: str, b: str) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        same = distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(same, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(a), len(b))


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path))
    return tmp_path


@given(words, words)
def test_edit_distance_is_the_textbook_one(a, b):
    assert edit_distance(a, b) == distance_by_definition(a, b)


@given(st.lists(words, min_size=1, max_size=12, unique=True), st.lists(words, min_size=1, max_size=12, unique=True))
def test_the_nearest_token_is_the_first_of_the_smallest_distance(tmp_path_factory, student_words, teacher_words):
    student, teacher = (
        spellings_from_strings(["a", *(word for word in side if word not in ("", "a")), "</s>"], "▁", 0)
        for side in (student_words, teacher_words)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        found = nearest_tokens(student, teacher)
    for i, string in enumerate(teacher.strings[1:], 1):
        spelled = [with_one_marker(s) for s in student.strings]
        distances = [distance_by_definition(with_one_marker(string), s) for s in spelled[1:]]
        assert found[i] == 1 + distances.index(min(distances))
    assert found[0] == 0, "the end of the sequence is its own counterpart"


def test_the_table_of_nearest_tokens_is_kept_and_padded(empty_cache, monkeypatch):
    student = spellings_from_strings(["Ġhouse", "cat", "<|eot|>"], "Ġ", 2)
    teacher = spellings_from_strings(["cats", "▁house", "</s>"], "▁", 2)
    assert nearest_tokens(student, teacher, 5).tolist() == [1, 0, 2, -1, -1]
    monkeypatch.setattr("lit_llm.data.minimum_edit._nearest", None)
    assert nearest_tokens(student, teacher).tolist() == [1, 0, 2]


def test_the_first_teacher_token_of_each_student_token_is_the_lowest():
    assert first_teacher_ids(torch.tensor([2, 0, 2, -1, 0]), 4).tolist() == [1, -1, 0, -1]


def test_warping_equal_sequences_is_the_identity():
    assert warp(["▁the", "▁cat"], ["Ġthe", "Ġcat"]) == [[0], [1]]


def test_warping_meets_every_token_of_both_sides():
    assert warp(["ab", "cd"], ["a", "b", "cd"]) == [[0, 1], [2]]
    assert warp(["a", "b", "cd"], ["ab", "cd"]) == [[0], [0], [1]]


def test_only_tokens_that_meet_one_nearest_token_are_aligned():
    student = spellings_from_strings(["ab", "cd", "xy", "<|eot|>"], "Ġ", 3)
    teacher = spellings_from_strings(["a", "b", "cd", "xz", "</s>"], "▁", 4)
    nearest = [0, 0, 1, 1, 3]
    # "ab" meets two tokens; "xy" meets "xz", whose nearest token is another
    assert align_minimum_edit([0, 1, 2, 3], [0, 1, 2, 3, 4], student, teacher, nearest) == ([1, 3], [2, 4])


def test_an_empty_side_has_no_pairs():
    assert warp([], ["a"]) == []
    assert warp(["a"], []) == [[]]
