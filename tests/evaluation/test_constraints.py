"""Constraints that a program can check: each kind passes and fails where a reader would say so."""

import pytest

from lit_llm.evaluation.constraints import _KINDS, passed, reward, validate, words_of

CASES = [  # check, answers that pass, answers that do not
    ({"kind": "max_words", "value": 3}, ["One two three.", "a"], ["One two three four"]),
    ({"kind": "min_words", "value": 3}, ["One, two, three!", "it's a well-known fact"], ["One two"]),
    ({"kind": "between_words", "low": 2, "high": 3}, ["a b", "a b c"], ["a", "a b c d"]),
    (
        {"kind": "sentences", "value": 1},
        ["Rain falls.", "Does it rain?", 'He said "no."', "It cost 3.50 today."],
        ["Rain falls. It is wet.", "Rain falls", "Rain\nfalls.", "One. And a rest"],
    ),
    ({"kind": "sentences", "value": 2}, ["Rain falls. It is wet!"], ["Rain falls."]),
    ({"kind": "lines", "value": 2}, ["a\nb", "a\n\n b"], ["a", "a\nb\nc"]),
    (
        {"kind": "bullets", "value": 2},
        ["- a\n- b", "* a\n\n* **b**"],
        ["- a", "Here:\n- a\n- b", "-a\n-b", "1. a\n2. b"],
    ),
    (
        {"kind": "numbered", "value": 2},
        ["1. a\n2. b", "1) a\n2) b"],
        ["1. a\n3. b", "1. a", "1. a\n2. b\nend", "1. a 2. b"],
    ),
    (
        {"kind": "comma_items", "value": 3},
        ["salt, oil, bread", "Salt, oil and bread.", "salt, oil, and fresh bread"],
        ["salt, oil", "salt oil bread", "salt,\noil, bread", "a very long item of five, b, c"],
    ),
    ({"kind": "lower_case"}, ["no capitals, 3 words"], ["One capital"]),
    ({"kind": "upper_case"}, ["BUY 3 NOW!"], ["BUY NOw"]),
    ({"kind": "no_comma"}, ["one and two"], ["one, two"]),
    ({"kind": "no_digit"}, ["three"], ["3 cats"]),
    ({"kind": "quoted"}, ['"Be kind."', "“Be kind.”"], ["Be kind.", '"Be" kind "now"', '"Be kind']),
    ({"kind": "starts_with", "text": "The"}, ["The sea", "the sea", "The, well"], ["Then the sea", "A the"]),
    ({"kind": "ends_with", "text": "?"}, ["Why?", '"Why?"', "Why? "], ["Why? Because."]),
    ({"kind": "ends_with", "text": "the end"}, ["... The End"], ["The end."]),
    ({"kind": "include", "words": ["sea", "red"]}, ["Red is the Sea."], ["The sea", "The seaside is red"]),
    ({"kind": "avoid", "words": ["sea", "red"]}, ["The seaside"], ["The red house", "Red sea"]),
    (
        {"kind": "json_object", "keys": ["a", "b"]},
        ['{"a": 1, "b": [2]}', '```json\n{"b": 1, "a": 2}\n```'],
        ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', "[1]", '{"a": 1', 'Sure: {"a": 1, "b": 2}'],
    ),
    ({"kind": "json_object", "keys": []}, ['{"any": 1}', '{"x": {}}'], ["1"]),
    (
        {"kind": "language", "code": "fr"},
        ["Le chat est sur la table.", "L'eau est dans le verre."],
        ["The cat is on the table.", "El gato es de la casa y no de una.", "Chat."],
    ),
    ({"kind": "language", "code": "es"}, ["El gato está en la casa y no sale."], ["Le chat est dans la maison."]),
    ({"kind": "language", "code": "de"}, ["Der Hund ist im Haus und er schläft."], ["The dog is in the house."]),
    (
        {"kind": "language", "code": "it"},
        ["Il gatto è nella casa e non esce con gli altri."],
        ["El gato es de una casa."],
    ),
    ({"kind": "language", "code": "pt"}, ["O gato não está em casa com uma mulher."], ["The cat is not at home."]),
    ({"kind": "language", "code": "en"}, ["The cat is on the table."], ["Le chat est sur la table."]),
]


@pytest.mark.parametrize(
    ("check", "good", "bad"), CASES, ids=lambda value: value["kind"] if isinstance(value, dict) else ""
)
def test_a_check_passes_what_keeps_it_and_nothing_else(check, good, bad):
    for answer in good:
        assert passed(answer, [check]) == [True], answer
    for answer in bad:
        assert passed(answer, [check]) == [False], answer


def test_every_kind_has_a_case():
    assert {check["kind"] for check, _, _ in CASES} == set(_KINDS)


def test_the_reward_is_the_share_of_checks_that_hold():
    checks = [{"kind": "max_words", "value": 2}, {"kind": "no_comma"}, {"kind": "ends_with", "text": "!"}]
    assert reward("Yes!", checks) == 1 and reward("Yes, no", checks) == pytest.approx(1 / 3)
    assert passed("a, b, c", checks) == [False] * 3 and reward("a, b, c", checks) == 0


@pytest.mark.parametrize("answer", ["", "  \n", "...", "?!"])
def test_an_answer_that_says_nothing_passes_nothing(answer):
    checks = [{"kind": "max_words", "value": 2}, {"kind": "avoid", "words": ["a"]}, {"kind": "ends_with", "text": "."}]
    assert passed(answer, checks) == [False] * 3


def test_fields_that_a_table_fills_with_none_are_not_there():
    check = {"kind": "max_words", "value": 2, "low": None, "high": None, "words": None, "text": None}
    validate([check])
    assert reward("a b", [check]) == 1


@pytest.mark.parametrize(
    ("check", "words"),
    [
        ({"kind": "rhymes"}, "kind 'rhymes'; known are max_words"),
        ({"value": 3}, "kind None"),
        ({"kind": "max_words"}, "max_words needs value, but the row gives no field"),
        ({"kind": "max_words", "value": 3, "low": 1}, "needs value, but the row gives value, low"),
        ({"kind": "no_comma", "value": 3}, "no_comma needs no field, but the row gives value"),
        ({"kind": "max_words", "value": "3"}, "needs value as int, not '3'"),
        ({"kind": "max_words", "value": True}, "needs value as int, not True"),
        ({"kind": "include", "words": "sea"}, "needs words as .*, not 'sea'"),
        ({"kind": "include", "words": ["sea", ""]}, "needs words as"),
        ({"kind": "ends_with", "text": ""}, "needs text as str"),
        ({"kind": "language", "code": "tlh"}, "'tlh'; stop words are known for en, fr, es"),
    ],
)
def test_a_check_that_cannot_be_made_is_refused_by_name(check, words):
    for call in (lambda: validate([check]), lambda: reward("some answer", [check]), lambda: reward("", [check])):
        with pytest.raises(ValueError, match=words):
            call()


def test_an_empty_list_of_checks_has_no_reward():
    with pytest.raises(ValueError, match="no checks"):
        reward("an answer", [])


def test_words_are_counted_as_a_reader_counts_them():
    assert words_of("Don't touch the well-known 3 cats!") == ["Don't", "touch", "the", "well-known", "3", "cats"]
    assert words_of("L'eau qu'il boit") == ["L", "eau", "qu", "il", "boit"]
    assert words_of("**Bold** - dash — café") == ["Bold", "dash", "café"]
