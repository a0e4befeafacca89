"""What a model says to questions: the same whatever they are asked beside, and whatever was reused."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from lit_llm.data.edit_batch import QuestionRow, collate_questions
from lit_llm.data.fact_tokens import FactText, encode_facts
from lit_llm.editing.deltas import EditSet
from lit_llm.editing.edit_cache import CachedEdit
from lit_llm.editing.fact_text import FactText as Fact
from lit_llm.methods import edited_answers
from lit_llm.methods.answers import Generation
from lit_llm.methods.edited_answers import Asking
from lit_llm.methods.edited_model import EditedModel
from lit_llm.models.language_model import ModelSpec
from tests.tiny import byte_level_tokenizer, tiny_model_folder

QUESTIONS = [
    ("reliability", "Oslo is in", "Peru"),
    ("generality", "The town of Oslo is in", "Peru"),
    ("locality", "A river near Rome and the sea", "Nile"),
    ("locality", "The longest of all rivers", "the Mississippi river in North America, they say"),
    ("locality", "A river near Rome and the sea", "Nile"),
    ("portability", "In Oslo they speak", "so"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_model_folder(
        tmp_path_factory.mktemp("model"),
        tokenizer=byte_level_tokenizer(),
        hidden_size=32,
        layers=3,
        seed=1,
        initializer_range=0.15,
    )
    return EditedModel(ModelSpec(source=str(folder)).load().eval())


def asking(model, questions=QUESTIONS, untouched=None, **generation) -> Asking:
    texts = [FactText("en", prompt, answer) for _, prompt, answer in questions]
    tokens = encode_facts(model.model.tokenizer, texts)
    rows = [QuestionRow(*parts[:1], "en", *parts[1:], None, row) for parts, row in zip(questions, tokens, strict=True)]
    batch = collate_questions([("oslo", rows)], ("en",), 0)
    settings = Generation(**{"max_new_tokens": 20, **generation})
    return Asking(model, {} if untouched is None else untouched, settings, batch)


def edited(model) -> EditSet:
    neurons, values = torch.arange(16), torch.full((16,), 3.0)
    fact = Fact("oslo", {"en": "Oslo"}, {"en": "Oslo is in"}, {"en": "Peru"})
    edits = EditSet(model.digest)
    edits.add(CachedEdit(fact, {1: neurons}, {1: values}))
    return edits


def test_how_long_an_answer_may_be_does_not_depend_on_what_is_asked_beside_it(model):
    together, alone = asking(model), asking(model)
    rows = list(range(len(QUESTIONS)))
    with_all = together.questions(edited(model), rows, set(rows))
    for row in rows:
        (found,) = alone.questions(edited(model), [row], {row})
        assert (found.said, found.said_before) == (with_all[row].said, with_all[row].said_before)


@pytest.mark.parametrize("batch_size", [2, 32])
def test_questions_that_name_no_edited_subject_are_answered_by_the_untouched_model(model, monkeypatch, batch_size):
    rows = list(range(len(QUESTIONS)))
    reused = asking(model, batch_size=batch_size)
    ours = reused.questions(edited(model), rows, {0, 1, 2, 3})
    monkeypatch.setattr(edited_answers, "about_a_subject", lambda model, edits, names: set(names))
    plain = asking(model, batch_size=batch_size)
    theirs = plain.questions(edited(model), rows, {0, 1, 2, 3})
    assert [q.nll for q in ours] == pytest.approx([q.nll for q in theirs], rel=1e-5)
    assert ours == [replace(theirs, nll=ours.nll) for theirs, ours in zip(theirs, ours, strict=True)]
    assert [question.firing.edit for question in ours] == ["oslo", "oslo", None, None, None, "oslo"]
    assert any(question.said != question.said_before for question in ours)


def test_only_questions_that_name_a_subject_run_again_and_each_runs_once(model, monkeypatch):
    passed, written = [], []
    hidden, generate = model.model.hidden, model.model.generate
    monkeypatch.setattr(model.model, "hidden", lambda tokens: passed.append(len(tokens.ids_BL)) or hidden(tokens))
    monkeypatch.setattr(model.model, "generate", lambda ids, **k: written.append(len(ids)) or generate(ids, **k))
    asking(model).questions(edited(model), range(len(QUESTIONS)), {0, 2, 3, 4})
    assert passed == [5, 3]  # one question stands there twice; three name Oslo
    assert written == [3, 1]


def test_a_question_that_is_not_asked_freely_has_no_text_even_where_it_is_known(model):
    question = asking(model)
    (asked,) = question.questions(EditSet(model.digest), [0], {0})
    (again,) = question.questions(EditSet(model.digest), [0], set())
    assert asked.said is not None and again.said is None and again.said_before is None


def test_texts_are_those_of_answers_that_run_to_their_limit(model, monkeypatch):
    model = EditedModel(deepcopy(model.model))
    model.model.transformer.lm_head.weight.data[model.model.tokenizer("\n")["input_ids"][-1]] *= 3  # more line breaks
    rows = list(range(len(QUESTIONS)))
    ended = asking(model).questions(edited(model), rows, set(rows))
    assert any(len(question.said) < 4 for question in ended)
    monkeypatch.setattr(edited_answers, "is_finished", lambda text, wanted: False)
    assert ended == asking(model).questions(edited(model), rows, set(rows))


def test_an_answer_longer_than_the_limit_has_room_and_what_is_only_compared_with_before_has_not(model, monkeypatch):
    long, written = "the Mississippi river in North America, they say", []
    generate = model.model.generate
    monkeypatch.setattr(edited_answers, "is_finished", lambda text, wanted: False)
    monkeypatch.setattr(model.model, "generate", lambda ids, **k: written.append(generate(ids, **k)) or written[-1])
    about_and_unrelated = [("reliability", "Oslo is", long), ("locality", "Rome is", long)]
    asking(model, about_and_unrelated, max_new_tokens=8).questions(EditSet(model.digest), [0, 1], {0, 1})
    (row,) = encode_facts(model.model.tokenizer, [FactText("en", "Oslo is", long)])
    assert [len(new) for new in written[0]] == [len(row.ids) - row.prompt_length + 1, 8]
