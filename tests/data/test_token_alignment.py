"""Exact token alignment: against a plain reference on arbitrary text, on hand-made cases and on real tokenizers."""

from __future__ import annotations

import pickle
from itertools import pairwise, product
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lit_llm.data.token_alignment import (
    align_answers,
    align_byte_groups,
    align_byte_spans,
    align_released,
    group_answers,
)
from lit_llm.data.vocabulary import TokenSpellings, token_spellings
from tests import tiny

TOKENIZERS = {"byte_level": tiny.byte_level_tokenizer(), "sentencepiece": tiny.sentencepiece_tokenizer()}
SPELLINGS = {name: token_spellings(tokenizer) for name, tokenizer in TOKENIZERS.items()}
SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"

texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.text("ab é\n\t▁Ġ🙂  ", max_size=40),
    st.lists(st.sampled_from(" ".join(tiny.SENTENCES).split()), max_size=12).map(" ".join),
)
kinds = st.sampled_from(sorted(TOKENIZERS))


def tokens_of(kind: str, text: str) -> list[int]:
    tokenizer = TOKENIZERS[kind]
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def aligned(student: str, teacher: str, text: str) -> list[tuple[int, int]]:
    return align_texts(student, teacher, text, text)


def align_texts(student: str, teacher: str, student_text: str, teacher_text: str) -> list[tuple[int, int]]:
    student_ids, teacher_ids = tokens_of(student, student_text), tokens_of(teacher, teacher_text)
    return list(zip(*align_answers(student_ids, teacher_ids, SPELLINGS[student], SPELLINGS[teacher]), strict=True))


def spans_by_definition(tokens: list[bytes], cut: int) -> list[tuple[int, int]]:
    starts = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    return [(max(s - cut, 0), max(s + len(token) - cut, 0)) for s, token in zip(starts, tokens, strict=True)]


def pairs_by_definition(student: list[bytes], teacher: list[bytes]) -> list[tuple[int, int]]:
    """Section by section what the rule says: quadratic, and without the end of the sequence but for the last line."""
    texts = [b"".join(student), b"".join(teacher)]
    spaces = [len(text) - len(text.lstrip(b" ")) for text in texts]
    cuts = [own - min(spaces) for own in spaces]
    texts = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    spans = [spans_by_definition(side, cut) for side, cut in zip((student, teacher), cuts, strict=True)]
    pairs = [
        (i, j)
        for (i, a), (j, b) in product(enumerate(spans[0]), enumerate(spans[1]))
        if a == b and a[0] < a[1] and texts[0][: a[1]] == texts[1][: a[1]] and a[1] <= min(map(len, texts))
    ]
    return pairs + ([(len(student), len(teacher))] if texts[0] == texts[1] else [])


def released_by_definition(student: list[str], teacher: list[str], ends: tuple[str, str]) -> list[tuple[int, int]]:
    """The released rule with the two growing strings that it speaks of."""
    student, teacher = ([t.replace("▁", "").replace("Ġ", "") for t in side] for side in (student, teacher))
    i = j = 0
    student_text = teacher_text = ""
    pairs = []
    while i < len(student) and j < len(teacher):
        if student_text == teacher_text and (student[i] == teacher[j] or (student[i], teacher[j]) == ends):
            pairs.append((i, j))
        student_is_behind = len(student_text) <= len(teacher_text)
        teacher_is_behind = len(teacher_text) <= len(student_text)
        if student_is_behind:
            student_text, i = student_text + student[i], i + 1
        if teacher_is_behind:
            teacher_text, j = teacher_text + teacher[j], j + 1
    return pairs


@given(texts, kinds, kinds)
@example("Café\n\n  déjà  vu", "byte_level", "sentencepiece")
@example("   ", "byte_level", "sentencepiece")
@example("", "sentencepiece", "byte_level")
@example("a▁b", "sentencepiece", "byte_level")
def test_the_pairs_are_those_of_the_definition(text, student, teacher):
    sides = [[SPELLINGS[kind].bytes[i] for i in tokens_of(kind, text)[:-1]] for kind in (student, teacher)]
    assert aligned(student, teacher, text) == pairs_by_definition(*sides)


@given(texts, texts, kinds, kinds)
def test_pairs_of_different_texts_lie_in_the_common_prefix_and_follow_the_definition(one, other, student, teacher):
    sides = [
        [SPELLINGS[kind].bytes[i] for i in tokens_of(kind, one + tail)[:-1]]
        for kind, tail in ((student, ""), (teacher, other))
    ]
    assert align_texts(student, teacher, one, one + other) == pairs_by_definition(*sides)


@given(texts, kinds, kinds)
def test_pairs_increase_on_both_sides_and_have_equal_bytes(text, student, teacher):
    pairs = aligned(student, teacher, text)
    for (i, j), (k, m) in pairwise(pairs):
        assert i < k and j < m
    student_ids, teacher_ids = tokens_of(student, text), tokens_of(teacher, text)
    for i, j in pairs:
        a, b = SPELLINGS[student].bytes[student_ids[i]], SPELLINGS[teacher].bytes[teacher_ids[j]]
        # None is the end of the sequence; only tokens at the very start may differ, by the surplus space
        assert a == b or ((i == 0 or j == 0) and a.lstrip(b" ") == b.lstrip(b" "))


@given(texts, kinds)
def test_a_tokenizer_with_itself_aligns_every_token(text, kind):
    count = len(tokens_of(kind, text))
    assert aligned(kind, kind, text) == [(i, i) for i in range(count)]


@given(texts, texts, kinds, kinds)
def test_exchanging_the_sides_exchanges_the_pairs(one, other, student, teacher):
    there = align_texts(student, teacher, one, other)
    back = align_texts(teacher, student, other, one)
    assert there == [(i, j) for j, i in back]


@given(texts)
def test_the_bytes_of_byte_level_tokens_make_up_the_text(text):
    spellings = SPELLINGS["byte_level"]
    assert b"".join(spellings.bytes[i] for i in tokens_of("byte_level", text)[:-1]) == text.encode()


@given(texts)
def test_the_bytes_of_sentencepiece_tokens_make_up_the_text_after_one_space(text):
    spellings = SPELLINGS["sentencepiece"]
    expected = (" " + text if text else "").replace("▁", " ").encode()
    assert b"".join(spellings.bytes[i] for i in tokens_of("sentencepiece", text)[:-1]) == expected


def groups_by_definition(student: list[bytes], teacher: list[bytes]) -> list[tuple[int, int, int, int]]:
    """Cut at every byte of the common prefix where tokens of both sides end; a run holds what ends in between."""
    texts = [b"".join(student), b"".join(teacher)]
    spaces = [len(text) - len(text.lstrip(b" ")) for text in texts]
    cuts = [own - min(spaces) for own in spaces]
    texts = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    ends = [[b for _, b in spans_by_definition(side, cut)] for side, cut in zip((student, teacher), cuts, strict=True)]
    groups, start, counted = [], 0, [0, 0]
    for boundary in sorted(set(ends[0]) & set(ends[1]) - {0}):
        if texts[0][:boundary] != texts[1][:boundary]:
            break
        pieces = [sum(start < end <= boundary or (start == end == 0) for end in side) for side in ends]
        groups.append((*counted, *pieces))
        counted, start = [a + b for a, b in zip(counted, pieces, strict=True)], boundary
    return groups + ([(len(student), len(teacher), 1, 1)] if texts[0] == texts[1] else [])


def groups_of(student: str, teacher: str, student_text: str, teacher_text: str) -> list[tuple[int, ...]]:
    ids = tokens_of(student, student_text), tokens_of(teacher, teacher_text)
    return list(zip(*group_answers(*ids, SPELLINGS[student], SPELLINGS[teacher]), strict=True))


@given(texts, texts, kinds, kinds)
@example("Café\n\n  déjà  vu", "", "byte_level", "sentencepiece")
@example(" ", "", "byte_level", "sentencepiece")
def test_the_groups_are_those_of_the_definition(one, other, student, teacher):
    sides = [
        [SPELLINGS[kind].bytes[i] for i in tokens_of(kind, text)[:-1]]
        for kind, text in ((student, one), (teacher, one + other))
    ]
    assert groups_of(student, teacher, one, one + other) == groups_by_definition(*sides)


@given(texts, kinds, kinds)
def test_groups_follow_each_other_and_contain_every_pair(text, student, teacher):
    groups = groups_of(student, teacher, text, text)
    for (i, j, n, m), (k, p, _, _) in pairwise(groups):
        assert (i + n, j + m) == (k, p)
    single = {(i, j) for i, j, n, m in groups if n == m == 1}
    assert single <= set(aligned(student, teacher, text))
    assert len(set(aligned(student, teacher, text)) - single) <= 1, "only behind a dummy space"
    if "▁" not in text:  # which SentencePiece reads as a space
        assert groups[-1][:2] == (len(tokens_of(student, text)) - 1, len(tokens_of(teacher, text)) - 1)


def test_a_word_that_both_cut_differently_is_one_group():
    student, teacher = [b"un", b"believ", b"able", b" it", None], [b" unb", b"elievable", b" i", b"t", None]
    groups = align_byte_groups(student, teacher, student_ended=True, teacher_ended=True)
    assert groups == ([0, 3, 4], [0, 2, 4], [3, 1, 1], [2, 2, 1])


def test_what_follows_the_last_common_boundary_is_in_no_group():
    groups = align_byte_groups([b"ab", b"c"], [b"a", b"b", b"cd"], student_ended=False, teacher_ended=False)
    assert groups == ([0], [0], [1], [2])


pieces = st.lists(st.sampled_from(["a", "b", "ab", "aab", "▁a", "Ġa", "▁", "Ġb", "Ċ", "ĠĠ", "ba"]), max_size=12)


@given(pieces, pieces, st.booleans(), st.booleans())
@example(["a", "b"], ["ab"], True, True)
def test_the_released_rule_gives_the_pairs_of_its_definition(student, teacher, student_ended, teacher_ended):
    student = student + ["</s>"] * student_ended
    teacher = teacher + ["<|end|>"] * teacher_ended
    found = align_released(student, teacher, student_eos="</s>", teacher_eos="<|end|>")
    assert list(zip(*found, strict=True)) == released_by_definition(student, teacher, ("</s>", "<|end|>"))


def test_the_released_rule_loses_what_follows_an_accent_and_ours_does_not():
    student, teacher = tokens_of("byte_level", "Café is on\nit"), tokens_of("sentencepiece", "Café is on\nit")
    sides = SPELLINGS["byte_level"], SPELLINGS["sentencepiece"]
    released, ours = (align_answers(student, teacher, *sides, rule=rule)[0] for rule in ("released", "bytes"))
    assert set(released) < set(ours)
    assert len(student) - 1 in ours
    assert len(student) - 1 not in released


def test_a_cut_answer_pairs_its_common_part_and_no_end():
    whole, cut = [b"The", b" cat", b" sat", None], [b" The", b" cat", b" s"]
    assert align_byte_spans(whole, cut, student_ended=True, teacher_ended=False) == ([0, 1], [0, 1])


def test_both_ends_are_paired_only_after_identical_text():
    def ends(student: list[bytes], teacher: list[bytes]) -> bool:
        pairs = align_byte_spans([*student, None], [*teacher, None], student_ended=True, teacher_ended=True)
        return (len(student), len(teacher)) in zip(*pairs, strict=True)

    assert ends([b"a", b"b"], [b"ab"])
    assert ends([b" "], [])
    assert not ends([b"a"], [b"a", b"b"])
    assert not ends([b"a "], [b"a"])


def test_nothing_after_a_special_token_inside_an_answer_is_paired():
    student, teacher = [b"a", None, b"b", None], [b"a", b"b", None]
    assert align_byte_spans(student, teacher, student_ended=True, teacher_ended=True) == ([0], [0])


def test_surplus_leading_spaces_shift_and_clip_the_longer_side():
    student, teacher = [b"   ", b"a", b" b"], [b" ", b"a", b" ", b"b"]
    assert align_byte_spans(student, teacher, student_ended=False, teacher_ended=False) == ([0, 1], [0, 1])


def test_empty_sequences_have_no_pairs():
    assert align_byte_spans([], [], student_ended=False, teacher_ended=False) == ([], [])
    assert align_released([], ["a"], student_eos="</s>", teacher_eos="</s>") == ([], [])


def test_spellings_travel_to_worker_processes():
    for spellings in SPELLINGS.values():
        assert pickle.loads(pickle.dumps(spellings)) == spellings


def real_tokenizer(name: str) -> tuple[object, TokenSpellings]:
    if not (SHARED / name).is_dir():
        pytest.skip(f"shared/data/tokenizers/{name} is not beside this checkout")
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(SHARED / name)
    return tokenizer, token_spellings(tokenizer)


REAL_TEXTS = (
    *tiny.SENTENCES,
    "naïve café résumé coöperate façade",
    "你好，世界。今天天气很好。",
    "double  spaces   and    more     gaps",
    "It cost €5, £4 or ¥600 — roughly the same…",
)


@pytest.mark.shared_data
@pytest.mark.parametrize("teacher", ["mistral", "tinyllama", "smollm2"])
@pytest.mark.parametrize("student", ["gpt2", "tinyllama"])
def test_real_tokenizers_align_more_by_bytes_than_by_the_released_rule(student, teacher):
    (student_tokenizer, student_spellings), (teacher_tokenizer, teacher_spellings) = map(
        real_tokenizer, (student, teacher)
    )
    tokens, counts = 0, {"bytes": 0, "released": 0}
    for text in REAL_TEXTS:
        student_ids, teacher_ids = (
            [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            for tokenizer in (student_tokenizer, teacher_tokenizer)
        )
        tokens += len(student_ids)
        for rule in counts:
            pairs = align_answers(student_ids, teacher_ids, student_spellings, teacher_spellings, rule=rule)
            counts[rule] += len(pairs[0])
            if rule == "bytes":
                assert pairs[0][-1:] == [len(student_ids) - 1], "the text is the same, so both ends are paired"
    shares = {rule: count / tokens for rule, count in counts.items()}
    assert shares["bytes"] >= shares["released"]
    assert shares["bytes"] > 0.45
    if student == teacher:
        assert shares == {"bytes": 1.0, "released": 1.0}


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["gpt2", "smollm2", "mistral", "tinyllama"])
def test_the_bytes_of_real_tokens_make_up_the_text(name):
    tokenizer, spellings = real_tokenizer(name)
    for text in REAL_TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        joined = b"".join(spellings.bytes[i] for i in ids)
        assert joined in (text.encode(), b" " + text.encode())
