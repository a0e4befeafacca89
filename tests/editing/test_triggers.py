"""Names of subjects in texts of several scripts, and the cosine that a question needs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_llm.data.fact_files import read_requests
from lit_llm.editing.fact_text import FactText, index_of
from lit_llm.editing.triggers import SubjectIndex, Trigger, pooled, relation_threshold, unheard
from tests import tiny

SHARED = Path(__file__).parents[3] / "shared" / "data" / "editing"


def index(**names: list[str]) -> SubjectIndex:
    return SubjectIndex(names)


def found(index: SubjectIndex, text: str) -> tuple | None:
    mention = index.find(text)
    return None if mention is None else (mention.edits, text[mention.start : mention.end])


@pytest.mark.parametrize(
    ("name", "text", "matched"),
    [
        ("Tamás Giák", "De quelle ville est Tamas Giak ?", "Tamas Giak"),
        ("Tamas Giak", "De quelle ville est Tamás Giák ?", "Tamás Giák"),
        ("De bosbrand", "Het kunstwerk De Bosbrand is van wie?", "De Bosbrand"),
        ("Christoph von Stadion", "Christoph von Stadion'un doğum tarihi ne?", "Christoph von Stadion"),
        ("巴黎", "关于巴黎的问题", "巴黎"),
        ("İstanbul", "istanbul nerede?", "istanbul"),
        ("Ισπανία", "Ποια είναι η πρωτεύουσα της ΙΣΠΑΝΙΑΣ;", "ΙΣΠΑΝΙΑ"),
        ("भारत", "भारत की राजधानी क्या है?", "भारत"),
        ("ประเทศไทย", "เมืองหลวงของประเทศไทยคืออะไร", "ประเทศไทย"),
        ("Straße", "Wo ist die STRASSE?", "STRASSE"),
    ],
)
def test_a_name_is_found_whatever_its_case_and_accents(name, text, matched):
    assert found(index(fact=[name]), text) == (("fact",), matched)


def test_a_name_does_not_begin_inside_a_word():
    assert found(index(fact=["lands"]), "The Netherlands") is None
    assert found(index(fact=["2006"]), "in 12006") is None
    assert found(index(fact=["Iran"]), "Iranian questions") == (("fact",), "Iran")


def test_the_longest_name_wins_and_of_equally_long_ones_the_last():
    names = index(city=["New York"], times=["New York Times"], other=["Old York"])
    assert found(names, "Who owns the New York Times?") == (("times",), "New York Times")
    mention = names.find("New York, or Old York?")
    assert (mention.edits, mention.start) == (("other",), 13)


def test_a_name_at_the_end_of_a_text_is_found_where_a_longer_one_begins_alike():
    assert found(index(fact=["Spain", "Spanien"]), "Tell me about Spain") == (("fact",), "Spain")
    assert found(index(niger=["Niger"], nigeria=["Nigeria"]), "the river Niger") == (("niger",), "Niger")
    assert found(index(fact=["Spanien"]), "Tell me about Spa") is None


def test_one_name_may_belong_to_several_edits():
    assert index(a=["Paris"], b=["PARIS", "París"]).find("paris?").edits == ("a", "b")


def test_short_names_trigger_only_where_there_is_no_other():
    assert found(index(fact=["var", "Variety"]), "bir soru var") is None
    assert found(index(fact=["Oz"]), "Where is Oz?") == (("fact",), "Oz")
    assert found(index(fact=["日", "日本国"]), "日が出る") is None
    assert found(index(fact=["日本", "Japan"]), "日本の首都") == (("fact",), "日本")


def test_a_folded_name_does_not_split_a_character():
    assert found(index(fact=["xfiles"]), "xfi") is None
    assert found(index(fact=["gref"]), "Gre\ufb01t") is None  # the ligature fi would have to be cut


def test_where_no_name_is_found_as_it_is_a_search_is_asked_for_each():
    asked = []

    def search(text, name):
        asked.append(name)
        return (4, 9) if name == "Robb" else None

    names = SubjectIndex({"a": ["Eno Eno"], "b": ["Robb"]}, search)
    assert names.find("xxx Robbb").edits == ("b",) and names.find("ask Eno Eno").edits == ("a",)
    assert names.find("ask Jim").edits == ("b",)
    assert asked == ["Eno Eno", "Robb"]


def test_inflected_names_of_fuzzy_edits_are_found_and_short_ones_never():
    def fact(name: str, subject: str, fuzzy: bool) -> FactText:
        return FactText(name, {"ru": subject}, {}, {}, fuzzy=fuzzy)

    edits = index_of([fact("moscow", "Москва", True), fact("iran", "Иран", True), fact("samara", "Самара", False)])
    assert found(edits, "Какая река течёт в Москве?") == (("moscow",), "Москве")
    assert found(edits, "Столица Москва") == (("moscow",), "Москва")
    assert found(edits, "Столица Ирака") is None  # Iraq
    assert found(edits, "Кто живёт в Самаре?") is None  # not asked for
    text = "Где живёт Samarra?"
    assert found(index_of([fact("samara", "Samara", True)]), text) == (("samara",), "Samarra")


def test_pooling_is_the_direction_of_the_mean_over_kept_tokens():
    hidden = torch.tensor([[[3.0, 0.0], [9.0, 9.0], [0.0, 4.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    kept = torch.tensor([[1, 0, 1], [0, 0, 0]])
    assert torch.allclose(pooled(hidden, kept), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_the_threshold_is_what_the_least_similar_prompt_reaches():
    vectors = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=-1)
    wanted = (vectors[1] @ vectors[2]).item() - 0.02
    assert relation_threshold(vectors) == pytest.approx(wanted)
    with pytest.raises(ValueError, match="there is 1"):
        relation_threshold(vectors[:1])


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="subject_relation, subject or oracle"):
        Trigger(scope="router")
    with pytest.raises(ValueError, match="compares no relation"):
        Trigger(scope="subject", relation_threshold=0.5)
    with pytest.raises(ValueError, match="looks for no name"):
        Trigger(scope="oracle", fuzzy=True)


def test_prompts_on_which_their_own_edits_never_act_are_found_with_the_reason():
    names = {"us": ["United States", "USA"], "york": ["York"], "new": ["New York City"], "oslo": ["Oslo"]}
    prompts = {
        "us": {"en": "The United States lie in", "de": "Die USA liegen in"},
        "york": {"en": "A river near New York City is"},
        "oslo": {"en": "Osslo is in"},
        "new": {"en": "new york city is in"},
    }
    short, longer, misspelled = unheard(tiny.byte_level_tokenizer(), SubjectIndex(names), prompts)
    assert (short.edit, short.language) == ("us", "de") and "looks for 'United States' and finds none" in short.reason
    assert longer.edit == "york" and "that of the edit 'new'" in longer.reason
    assert misspelled.prompt == "Osslo is in"


FOUND = {  # percent of MzsRE's 743 edit prompts and rephrases in which their fact is found, with all facts at once
    **{"en": (100, 100), "cs": (82.8, 80.5), "de": (95.4, 96.6), "nl": (97.6, 96.6), "es": (95.7, 96.4)},
    **{"fr": (95.4, 94.9), "pt": (96.6, 96.4), "ru": (71.2, 69.6), "th": (87.6, 88.6), "tr": (91.9, 92.3)},
    **{"vi": (93.9, 93.7), "zh": (99.9, 99.7)},
}


@pytest.mark.shared_data
def test_subjects_of_a_real_set_are_found_as_often_as_published_and_in_hardly_any_unrelated_question():
    file = SHARED / "mzsre_test.jsonl.gz"
    if not file.is_file():
        pytest.skip("the shared data is not beside the checkout")
    requests = read_requests(file, "drop").requests  # four fifths of them
    names = {
        request.id: [*(fact.subject for fact in request.edit.by_language.values() if fact.subject), *request.edit.names]
        for request in requests
    }
    whole = SubjectIndex(names)

    def share(asked: list[tuple[str, str]]) -> float:
        mentions = [(fact, whole.find(text)) for fact, text in asked]
        return 100 * sum(mention is not None and fact in mention.edits for fact, mention in mentions) / len(asked)

    for code, (prompts, rephrases) in FOUND.items():
        edits = [(request.id, request.edit.by_language[code].prompt) for request in requests]
        others = [(request.id, text) for request in requests for text in request.questions[code].rephrases]
        unrelated = [q.prompt for request in requests for q in request.questions[code].locality]
        assert share(edits) == pytest.approx(prompts, abs=1) and share(others) == pytest.approx(rephrases, abs=1), code
        assert sum(whole.find(text) is not None for text in unrelated) <= 0.012 * len(unrelated), code
