"""Two answers behind one prompt know nothing of each other, in every supported family."""

from __future__ import annotations

import pytest
import torch

from lit_llm.data.batch import collate_branches, collate_tokens
from lit_llm.models.language_model import LanguageModel, Lora, ModelSpec
from tests.models.test_packing import FAMILIES, NO_DROPOUT, gradients
from tests.tiny import tiny_model_folder

PROMPTS = [[5, 6, 7, 8], [9], [10, 11]]
FIRST = [[20, 21, 22], [23, 24, 25, 26, 27], [28]]
SECOND = [[30, 31], [32], [33, 34, 35, 36]]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    settings = NO_DROPOUT if request.param == "gpt2" else {}
    return tiny_model_folder(tmp_path_factory.mktemp(request.param), request.param, layers=4, **settings)


def both():
    return collate_branches(PROMPTS, FIRST, SECOND, 0)


def alone(answers):
    ids = [[*prompt, *answer] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    return collate_tokens(ids, list(map(len, PROMPTS)), 0)


def test_rows_hold_prompt_and_answers_and_both_begin_where_the_prompt_ends():
    tokens = both()
    assert tokens.ids_BL[1].tolist() == [9, 23, 24, 25, 26, 27, 32, 0, 0]
    assert tokens.position_ids_RL[1, :7].tolist() == [0, 1, 2, 3, 4, 5, 1]
    assert tokens.branch_RL[1, :7].tolist() == [0, 1, 1, 1, 1, 1, 2]
    assert tokens.longest == 7 and tokens.length_B.tolist() == [9, 7, 7]
    answers = [alone(FIRST), alone(SECOND)]
    assert tokens.target_T.tolist() == [*answers[0].target_T.tolist(), *answers[1].target_T.tolist()]
    assert tokens.sequence_T.tolist() == [*answers[0].sequence_T.tolist(), *(answers[1].sequence_T + 3).tolist()]
    width = tokens.ids_BL.shape[1]
    firsts = [tokens.position_T[(tokens.sequence_T == n).nonzero()[0]].item() for n in (0, 3)]
    assert firsts == [3, 3] and tokens.position_T[(tokens.sequence_T == 4).nonzero()[0]].item() == width


def loaded(folder, attention) -> LanguageModel:
    if attention == "sdpa" and "gemma2" in str(folder):
        pytest.skip("transformers has no sdpa for Gemma 2: it caps attention scores")
    return ModelSpec(source=str(folder), attention=attention).load().double()


# with a mask of its own attention rounds in another order, partly in float32
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_hidden_states_and_gradients_are_those_of_each_answer_alone(folder, attention):
    model = loaded(folder, attention)
    assert model.branches(both())
    assert_same(model, 1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_first_answer_changes_nothing_of_the_second(folder, attention):
    model = loaded(folder, attention)
    other = collate_branches(PROMPTS, [[token + 17 for token in answer] for answer in FIRST], SECOND, 0)
    firsts = sum(map(len, FIRST))
    with torch.no_grad():
        ours, theirs = model.hidden(both()), model.hidden(other)
    assert torch.equal(ours[firsts:][1:2], theirs[firsts:][1:2]) and not torch.equal(ours[:firsts], theirs[:firsts])
    torch.testing.assert_close(ours[firsts:], theirs[firsts:], rtol=0, atol=1e-12)


def test_it_goes_with_gradient_checkpointing_and_adapters(folder):
    spec = ModelSpec(source=str(folder), attention="eager", gradient_checkpointing=True, lora=Lora(rank=2))
    assert_same(spec.load().double(), 1e-4)


def test_a_window_that_is_too_short_and_another_architecture_run_the_prompt_twice(tmp_path):
    mistral = tiny_model_folder(tmp_path / "mistral", "mistral", sliding_window=4)
    assert not ModelSpec(source=str(mistral)).load().branches(both())
    model = ModelSpec(source=str(tiny_model_folder(tmp_path / "llama", "llama"))).load()
    assert model.branches(both())
    model.transformer.config.model_type = "something_new"
    assert not model.branches(both())


def assert_same(model: LanguageModel, tolerance: float) -> None:
    together = model.hidden(both())
    apart = torch.cat([model.hidden(alone(answers)) for answers in (FIRST, SECOND)])
    torch.testing.assert_close(together, apart, rtol=tolerance, atol=tolerance)
    ours, theirs = gradients(model, together), gradients(model, apart)
    assert ours.keys() == theirs.keys() and ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)
