"""FT-L and FT-M: what moves, what is bounded, and that the model is given back."""

from __future__ import annotations

import pytest
import torch

from lit_llm.editing.attribution import attributed_neurons, integrated_gradients
from lit_llm.editing.fine_tuning import FineTuning, fine_tune
from lit_llm.editing.passes import run
from lit_llm.editing.rows import Row, padded
from tests.editing import models

ROWS = [fact.rows[0] for fact in models.facts(3)]


def answer_loss(body, head, rows) -> float:
    total = 0.0
    for row in rows:
        with torch.no_grad():
            logits = head(run(body, padded([row.inputs]))[0])
        at = torch.arange(len(row.target)) + len(row.prompt) - 1
        total -= logits[at].log_softmax(-1)[torch.arange(len(at)), list(row.target)].mean().item()
    return total / len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_the_change_lowers_the_loss_and_the_model_is_left_as_it_was(family, dtype):
    body, head = models.body_and_head(family, dtype=dtype)
    before = {name: value.clone() for name, value in body.transformer.state_dict().items()}
    start = answer_loss(body, head, ROWS)
    change = fine_tune(body, head, ROWS, 1, FineTuning(learning_rate=0.02, epochs=8))
    assert change.weight.shape == (24, 40) and change.weight.dtype == torch.float32
    assert (change.bias is not None) == (family == "gpt2")
    assert all(torch.equal(value, before[name]) for name, value in body.transformer.state_dict().items())
    with torch.no_grad():
        body.weight(1).copy_((body.weight(1).float() + change.weight).to(dtype))
        if change.bias is not None:
            body.down(1).bias.add_(change.bias)
    assert answer_loss(body, head, ROWS) < start - 0.3


def test_no_weight_leaves_its_bound_and_some_reach_it():
    body, head = models.body_and_head("gpt2")
    change = fine_tune(body, head, ROWS, 1, FineTuning("prompt_last", learning_rate=0.01, epochs=5, bound=0.012))
    for tensor in (change.weight, change.bias):
        assert tensor.abs().max().item() == pytest.approx(0.012, rel=1e-4)
    free = fine_tune(body, head, ROWS, 1, FineTuning("prompt_last", learning_rate=0.01, epochs=5))
    assert free.weight.abs().max() > 0.02


def test_requests_that_are_done_make_no_step():
    body, head = models.body_and_head("llama")
    change = fine_tune(body, head, ROWS, 1, FineTuning(stop_loss=100.0))
    assert not change.weight.any()


def test_the_two_objectives_differ_for_answers_of_several_tokens_only():
    body, head = models.body_and_head("llama")
    long = [row for row in ROWS if len(row.target) > 1][:1]
    short = [long[0].with_target(long[0].target[:1])]
    settings = {"epochs": 2, "learning_rate": 0.01}
    of = {
        (kind, objective): fine_tune(body, head, rows, 1, FineTuning(objective, **settings)).weight
        for kind, rows in (("long", long), ("short", short))
        for objective in ("prompt_last", "answer")
    }
    torch.testing.assert_close(of["short", "prompt_last"], of["short", "answer"])
    assert (of["long", "prompt_last"] - of["long", "answer"]).abs().max() > 1e-3


def test_settings_and_rows_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="FT-L"):
        FineTuning("everything")
    with pytest.raises(ValueError, match="bound is 0"):
        FineTuning(bound=0.0)
    body, head = models.body_and_head()
    with pytest.raises(ValueError, match="no rows"):
        fine_tune(body, head, [], 1, FineTuning())
    with pytest.raises(ValueError, match="no target"):
        fine_tune(body, head, [Row((1, 2), 0)], 1, FineTuning())


def test_attributions_add_up_to_the_change_of_probability_along_the_path():
    body, head = models.body_and_head("llama", dtype=torch.float64)
    row, layer = ROWS[0], 2
    found = integrated_gradients(body, head, row, steps=400)
    assert found.shape == (4, 40)
    probability = {}
    last = len(row.prompt) - 1
    for scale in (0.0, 1.0):

        def scaled(h, scale=scale):
            return h.index_copy(0, torch.tensor([last]), scale * h[last : last + 1])

        with torch.no_grad(), body.at_inputs({layer: scaled}):
            logits = head(run(body, padded([row.prompt]))[0, last])
        probability[scale] = logits.softmax(-1)[row.target[0]].item()
    assert found[layer].sum().item() == pytest.approx(probability[1.0] - probability[0.0], rel=0.02, abs=1e-5)


def test_attributed_neurons_are_above_a_share_of_the_largest_of_all_layers():
    assert attributed_neurons(torch.tensor([[1.0, 0.2], [0.31, -2.0]])) == [(0, 0), (1, 0)]
    body, head = models.body_and_head("phi3")
    with pytest.raises(ValueError, match="together with the gated values"):
        integrated_gradients(body, head, ROWS[0], site="up")
    with pytest.raises(ValueError, match="two ends"):
        integrated_gradients(body, head, ROWS[0], steps=1)
