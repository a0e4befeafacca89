"""Edits and the questions about them: what may not be in them, and what an editor never sees."""

import dataclasses
import typing

import pytest

from lit_llm.data.edit_requests import (
    Edit,
    EditRequest,
    LanguageEdit,
    Question,
    Questions,
    separator,
)
from lit_llm.data.language_codes import check_language


def edit(**by_language):
    entries = by_language or {"en": LanguageEdit("Rome is in", "France", subject="Rome")}
    return Edit("rome", entries, "in")


def test_the_types_that_an_editor_gets_have_no_room_for_questions():
    fields = {field.name for kind in (Edit, LanguageEdit) for field in dataclasses.fields(kind)}
    assert not fields & {field.name for kind in (Questions, EditRequest) for field in dataclasses.fields(kind)}
    assert Questions not in typing.get_type_hints(LanguageEdit).values()
    with pytest.raises(TypeError):
        LanguageEdit("Rome is in", "France", rephrases=("Where is Rome?",))


def test_a_rephrased_question_cannot_be_smuggled_in_as_a_paraphrase():
    given = edit(en=LanguageEdit("Rome is in", "France", subject="Rome", paraphrases=("Where is Rome?",)))
    with pytest.raises(ValueError, match="rome, en: 'Where is Rome[?]' is a paraphrase .* and a rephrased question"):
        EditRequest(given, {"en": Questions(rephrases=("Where is Rome?",))})
    for nearly in ("WHERE is Rome?", " Where is  Rome?\n"):
        with pytest.raises(ValueError, match="remove it from one of them".capitalize()):
            EditRequest(given, {"en": Questions(rephrases=(nearly,))})
    same = edit(en=LanguageEdit("Rome is in", "France", subject="Rome", paraphrases=("Rome is in",)))
    assert EditRequest(same, {"en": Questions(rephrases=("Rome is in",))}).languages == ("en",)


def test_requests_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EditRequest(edit()).edit = None
    with pytest.raises(dataclasses.FrozenInstanceError):
        Question("Where?", "There").answer = "Here"


@pytest.mark.parametrize(
    "make",
    [
        lambda: LanguageEdit(" ", "France"),
        lambda: LanguageEdit("Rome is in", ""),
        lambda: LanguageEdit("Rome is in", "France", subject=""),
        lambda: LanguageEdit("Rome is in", "France", paraphrases=("",)),
        lambda: Question("Where?", " "),
        lambda: Questions(rephrases=("",)),
    ],
)
def test_empty_texts_are_refused(make):
    with pytest.raises(ValueError, match="empty"):
        make()


def test_a_fact_without_a_language_or_a_subject_is_refused():
    with pytest.raises(ValueError, match="rome: no language"):
        Edit("rome", {})
    with pytest.raises(ValueError, match="rome: no language has a subject"):
        Edit("rome", {"en": LanguageEdit("Rome is in", "France")})
    assert Edit("rome", {"en": LanguageEdit("Rome is in", "France")}, names=("Rome",)).aliases("en") == ("Rome",)
    with pytest.raises(ValueError, match="questions in de, but is edited in en"):
        EditRequest(edit(), {"de": Questions()})


def test_aliases_are_the_other_languages_subjects_english_first_each_once():
    def entry(subject):
        return LanguageEdit("x", "y", subject=subject)

    fact = edit(de=entry("Rom"), fr=entry("Rome"), en=entry("Rome"), it=entry("Roma"), ru=entry(None))
    assert fact.aliases("ru") == ("Rome", "Rom", "Roma")
    assert fact.aliases("fr") == ("Rom", "Roma")
    chosen = fact.in_languages(("it", "de"))
    assert chosen.languages == ("it", "de") and chosen.aliases("de") == ("Roma", "Rome")


@pytest.mark.parametrize("code", ["en", "zh", "zh-Hant", "pt-BR", "ceb", "yue", "fil", "arz", "ckb", "hsb"])
def test_codes_of_iso_639_are_languages(code):
    check_language(code)


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("xx", ""),
        ("EN", ""),
        ("english", ""),
        ("", ""),
        ("cz", "cs"),
        ("jp", "ja"),
        ("zho", "zh"),
        ("e1", ""),
        ("eng", "en"),
        ("deu", "de"),
        ("ger", "de"),
        ("qqq", ""),
    ],
)
def test_other_codes_are_refused_and_common_mistakes_are_recognised(code, hint):
    with pytest.raises(ValueError, match=f"{code!r} is not a language code") as refused:
        check_language(code)
    assert not hint or f"Is it {hint}?" in str(refused.value)


@pytest.mark.parametrize(
    ("prompt", "language", "rule", "between"),
    [
        ("Rome is in", "en", "auto", " "),
        ("Rome is in ", "en", "auto", ""),
        ("Rome:\n", "en", "space", ""),
        ("罗马在", "zh", "auto", ""),
        ("罗马在", "zh-Hant", "auto", ""),
        ("ローマは", "ja", "auto", ""),
        ("โรมอยู่ใน", "th", "auto", ""),
        ("로마는", "ko", "auto", " "),
        ("روما في", "ar", "auto", " "),
        ("罗马在", "zh", "space", " "),
        ("Rome is in", "en", "none", ""),
        ("x", "km", "auto", ""),
        ("x", "lo", "auto", ""),
        ("x", "my", "auto", ""),
    ],
)
def test_what_stands_between_prompt_and_answer_depends_on_the_language(prompt, language, rule, between):
    assert separator(prompt, language, rule) == between
