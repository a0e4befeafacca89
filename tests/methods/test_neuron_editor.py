"""The editor of neurons on a tiny model, without a run around it."""

from __future__ import annotations

import pytest
import torch

from lit_llm.data.edit_batch import collate_edits
from lit_llm.data.edit_requests import Edit, LanguageEdit
from lit_llm.data.encoded_facts import FactEncoding, encode_edits
from lit_llm.editing.edit_cache import EditCache
from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.locate import Locating
from lit_llm.editing.optimise import Optimising
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


def test_a_fact_keeps_one_vector_in_half_precision_for_each_language_where_the_subject_alone_triggers_it(model):
    texts = {"en": "The capital of Malta is", "de": "Die Hauptstadt von Malta ist"}
    paraphrases = tuple(f"{word} Malta is" for word in ("Now", "But", "So"))
    malta = Edit("malta", {code: LanguageEdit(text, "the", "Malta", None, paraphrases) for code, text in texts.items()})
    quick = Optimising(steps=2)
    stored = {}
    for scope in ("subject", "subject_relation"):
        (made,) = editor(model, trigger=Trigger(scope), optimising=quick).edit(facts(model, malta)).edits
        stored[scope] = made.relation_Kd
        assert made.relation_Kd.dtype == torch.float16
    every_Kd = stored["subject_relation"].float()
    assert stored["subject"].shape == (2, 32) and every_Kd.shape == (8, 32)
    means = torch.nn.functional.normalize(every_Kd.view(2, 4, 32).mean(1), dim=-1)
    torch.testing.assert_close(stored["subject"].float(), means, atol=1e-3, rtol=1e-2)


def test_edits_of_one_subject_are_still_told_apart_by_the_stored_vectors(model):
    settings = {"optimising": Optimising(steps=2)}
    colour = Edit(
        "colour", {"en": LanguageEdit("Name three colours that are found in France", "the", "France")}, "colour"
    )
    both = editor(model, **settings).edit(facts(model, capital("capital", "France"), colour)).edits
    cache = EditCache(FeedForwards(model.transformer), model.tokenizer, both, Trigger("subject"))
    for edit in both:
        ids = model.tokenizer(edit.fact.prompts["en"], return_tensors="pt")["input_ids"]
        with torch.no_grad(), cache.active():
            model.transformer(input_ids=ids)
        assert cache.firings[0].edit == edit.fact.id


def test_an_editor_without_layers_takes_the_middle(model):
    assert editor(model, layers=None).layers == [2, 3]
