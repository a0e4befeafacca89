"""Subjects in prompts: every rule, every script, and offsets that point into the original text."""

import gzip
import json
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_llm.data.subjects import HOW, locate_subject
from lit_llm.folding import fold
from lit_llm.similar_names import similarity

SHARED = Path(__file__).parents[3] / "shared" / "data" / "editing"
MZSRE = {  # percent of prompts by rule (exact, folded, aliases, fuzzy, none), of the whole set
    "en": (100, 0, 0, 0, 0),
    "cs": (57.6, 3.8, 21.4, 15.7, 1.5),
    "de": (71.7, 0.9, 22.7, 3.5, 1.1),
    "nl": (55.5, 5.4, 36.7, 1.9, 0.5),
    "es": (50.3, 11.6, 33.9, 3.0, 1.2),
    "fr": (49.7, 11.2, 34.7, 3.6, 0.8),
    "pt": (55.2, 4.6, 37.0, 3.0, 0.3),
    "ru": (48.5, 3.8, 19.0, 21.9, 6.9),
    "th": (18.0, 0.4, 69.2, 4.0, 8.3),
    "tr": (66.8, 3.4, 21.8, 3.9, 4.2),
    "vi": (66.4, 4.3, 23.4, 3.9, 2.0),
    "zh": (100, 0, 0, 0, 0),
}


def found(text, subject, *aliases):
    match = locate_subject(text, subject, aliases)
    return match.how, text[match.start : match.end]


@pytest.mark.parametrize(
    ("text", "subject", "how", "matched"),
    [
        ("What is the capital of France?", "France", "exact", "France"),
        ("关于Paris的问题", "Paris", "exact", "Paris"),  # no word boundary between scripts
        ("ما هي عاصمة وفرنسا؟", "فرنسا", "exact", "فرنسا"),  # a prefix of one letter is written on
        ("फ़्रांस की राजधानी क्या है?", "फ़्रांस", "exact", "फ़्रांस"),
        ("เมืองหลวงของฝรั่งเศสคืออะไร", "ฝรั่งเศส", "exact", "ฝรั่งเศส"),
        ("フランスの首都は", "フランス", "exact", "フランス"),
        ("ﾌﾗﾝｽの首都は", "フランス", "folded", "ﾌﾗﾝｽ"),  # narrow forms
        ("ΑΘΗΝΑΣ πρωτεύουσα", "Αθήνας", "folded", "ΑΘΗΝΑΣ"),  # final sigma, accents, capitals
        ("ISPARTA nerede?", "ısparta", "folded", "ISPARTA"),  # the dotless i
        ("İzmir'in nüfusu", "izmir", "folded", "İzmir"),  # folds to two characters without care
        ("Die STRASSE von Rom", "straße", "folded", "STRASSE"),
        ("Où est Cafe\u0301?", "CAFÉ", "folded", "Cafe\u0301"),  # the mark behind the last letter belongs to it
        ("서울의 인구는", "서울", "exact", "서울"),
    ],
)
def test_a_subject_is_found_in_its_script(text, subject, how, matched):
    assert found(text, subject) == (how, matched)


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("Tehran", "ran"),  # inside a word
        ("caf\u0065\u0301ran", "ran"),  # behind a combining mark, still inside
        ("im Jahr 1747", "47"),  # inside a number
        ("한국", "하"),  # a part of a syllable is no match, although its letters are there
        ("", "Rome"),
        ("Rome", "Lhasa"),
    ],
)
def test_what_only_looks_like_the_subject_is_none(text, subject):
    match = locate_subject(text, subject)
    assert (match.how, match.start, match.end) == ("none", 0, 0)


def test_the_last_occurrence_counts_and_an_ending_may_follow():
    text = "Iran and the Iran of the Iranians"
    assert locate_subject(text, "Iran").start == text.rindex("Iran")
    assert locate_subject("ran past Tehran and Bahran", "ran").start == 0


def test_aliases_come_after_the_subject_and_exact_ones_before_folded_ones():
    assert found("Où est Wolf 359 ?", "Loup 359", "Lobo 359", "Wolf 359") == ("alias_exact", "Wolf 359")
    assert found("wolf 359 und Lobo 359", "Loup 359", "Wolf 359", "Lobo 359") == ("alias_exact", "Lobo 359")
    assert found("wolf 359", "Loup 359", "Wolf 359") == ("alias_folded", "wolf 359")
    assert found("Where is Rome?", None, "Rome") == ("alias_exact", "Rome")
    assert found("Where is Rome?", None) == ("none", "")


def test_inflected_names_are_found_by_similarity():
    assert found("Jaké je rodné město Jima Ena?", "Jim Eno") == ("fuzzy", "Jima Ena")
    assert found("За какую команду выступает Бернардо Лаурейру?", "Бернардо Лаурейро")[0] == "fuzzy"
    assert found("राजधानी दिल्लीी", "दिल्ली")[0] in ("exact", "fuzzy")  # vowel signs do not end a word


@given(st.text(max_size=12), st.text(max_size=12))
def test_similarity_is_levenshteins_and_its_bound_changes_nothing_that_reaches_it(first, second):
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        shorter = distance(a[:-1], b[:-1]) + (a[-1] != b[-1])
        return min(shorter, distance(a[:-1], b) + 1, distance(a, b[:-1]) + 1)

    first, second = first[:5], second[:5]
    expected = 1 - distance(first, second) / max(len(first), len(second), 1)
    assert similarity(first, second) == pytest.approx(expected)
    bounded = similarity(first, second, at_least=0.75)
    assert bounded == pytest.approx(expected) if expected >= 0.75 else bounded < 0.75


@given(st.text(max_size=30))
def test_every_folded_character_knows_where_it_comes_from(text):
    folded = fold(text)
    assert len(folded.text) == len(folded.origin)
    assert folded.origin == sorted(folded.origin)
    assert all(not unicodedata.combining(text[index]) or fold(text[index]).text for index in folded.origin)


@given(st.text(max_size=20), st.text(min_size=1, max_size=8), st.text(max_size=20))
def test_whatever_is_found_is_in_the_text_and_folds_to_the_subject(before, subject, after):
    text = before + " " + subject + " " + after
    match = locate_subject(text, subject)
    assert 0 <= match.start <= match.end <= len(text)
    if match.how == "exact":
        assert text[match.start : match.end] == subject
    if match.how == "folded":
        assert fold(text[match.start : match.end]).text.replace("ı", "i") == fold(subject).text.replace("ı", "i")


@pytest.mark.shared_data
def test_the_shares_of_the_rules_on_mzsre_are_those_of_the_whole_set_within_two_points():
    file = SHARED / "mzsre_test.jsonl.gz"
    if not file.is_file():
        pytest.skip("the shared data is not beside the checkout")
    counts = {language: Counter() for language in MZSRE}
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            facts = json.loads(line)["by_lang"]
            order = sorted(facts, key=lambda code: code != "en")
            for language, fact in facts.items():
                aliases = [facts[code]["subject"] for code in order if code != language]
                aliases = list(dict.fromkeys(name for name in aliases if name != fact["subject"]))
                counts[language][locate_subject(fact["prompt"], fact["subject"], aliases).how] += 1
    for language, shares in MZSRE.items():
        percent = {how: 100 * counts[language][how] / counts[language].total() for how in HOW}
        ours = (
            percent["exact"],
            percent["folded"],
            percent["alias_exact"] + percent["alias_folded"],
            percent["fuzzy"],
            percent["none"],
        )
        assert ours == pytest.approx(shares, abs=2), language
