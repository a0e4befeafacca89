"""The editor of neurons on a tiny model, without a run around it."""

from __future__ import annotations

import pytest

from lit_llm.data.edit_batch import collate_edits
from lit_llm.data.edit_requests import Edit, LanguageEdit
from lit_llm.data.encoded_facts import FactEncoding, encode_edits
from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.locate import Locating
from lit_llm.editing.triggers import Trigger
from lit_llm.methods.edited_facts import EditedFact, edited_facts
from lit_llm.methods.neuron_editor import NeuronEditor, NeuronSettings
from lit_llm.models.language_model import LanguageModel, ModelSpec
from tests.tiny import tiny_model_folder

FEW = Locating(min_neurons=8, max_neurons=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LanguageModel:
    folder = tiny_model_folder(tmp_path_factory.mktemp("model"), layers=4, seed=1, initializer_range=0.15)
    return ModelSpec(source=str(folder)).load().eval().requires_grad_(False)


def facts(model: LanguageModel, *edits: Edit) -> list[EditedFact]:
    encoded = encode_edits(edits, FactEncoding(), model.tokenizer)
    return edited_facts(collate_edits(encoded.facts, encoded.languages, model.tokenizer.pad_token_id))


def capital(name: str, subject: str) -> Edit:
    return Edit(name, {"en": LanguageEdit(f"The capital of {subject} is", "the", subject)}, "capital")


def editor(model: LanguageModel, **settings) -> NeuronEditor:
    chosen = {"layers": [1, 2], "locating": FEW, "trigger": Trigger("subject"), **settings}
    return NeuronEditor(FeedForwards(model.transformer), model.head, model.tokenizer, NeuronSettings(**chosen))


def drawn(model: LanguageModel, *edits: Edit, seed: int = 0) -> list[list[int]]:
    located, _ = editor(model, neurons="random", seed=seed).locate(facts(model, *edits))
    return [of_fact[1].neurons.tolist() for of_fact in located]


def test_random_neurons_of_two_facts_of_a_relation_differ_and_those_of_one_fact_stay(model):
    germany, france = capital("capital-DE", "Germany"), capital("capital-FR", "France")
    one, other = drawn(model, germany, france)
    assert len(one) == len(other) == 8 and one != other
    assert drawn(model, france) == [other] and drawn(model, france, germany) == [other, one]
    assert drawn(model, germany, seed=1) != [one]
