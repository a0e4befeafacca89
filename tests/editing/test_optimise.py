"""Optimised values: the losses of the plain loops, the same for many facts as for each alone, whatever is reused."""

from __future__ import annotations

import pytest
import torch

from lit_llm.editing import row_batches
from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.optimise import FactRows, Optimising, SharedValues, optimise
from lit_llm.editing.passes import neurons_at, run
from lit_llm.editing.rows import Row, padded
from tests.editing import models
from tests.reference import neuron_edit as reference

LAYERS = [1, 2]


def plain_logits(body: FeedForwards, head, chosen, deltas, apply):
    """Of one unpadded row, by the plainest hook."""

    def logits_of(row: Row, edited: bool):
        def add(layer):
            def change(neurons_Nm):
                start = len(row.prompt) - 1 if apply == "prompt_last" else row.lookup
                end = len(neurons_Nm) if apply == "tail" else start + 1
                mask = torch.zeros_like(neurons_Nm)
                mask[start:end] = 1
                dense = torch.zeros(neurons_Nm.shape[1], dtype=neurons_Nm.dtype).index_put(
                    (chosen[layer],), deltas[layer]
                )
                return neurons_Nm + mask * dense

            return change

        with body.at_inputs({layer: add(layer) for layer in chosen} if edited else {}):
            return head(run(body, padded([row.inputs]))[0])

    return logits_of


@pytest.mark.parametrize("apply", ["tail", "lookup", "prompt_last"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3_text"])
def test_two_updates_are_those_of_the_plain_loops(family, apply):
    body, head = models.body_and_head(family, dtype=torch.float64)
    (fact,), (chosen,) = models.facts(1, languages=3), models.neurons(1, LAYERS)
    optimising = Optimising(learning_rate=0.3, kl_weight=0.5, weight_decay=0.2, clamp=0.4, apply=apply)
    values = SharedValues(body, head, [fact], [chosen], optimising)
    optimizer = torch.optim.Adam([values.delta_FSn], lr=0.3)
    norms = {}
    found = [neurons_at(body, [row], LAYERS) for row in fact.first_rows()]
    for layer in LAYERS:
        norms[layer] = sum((h[layer][0, chosen[layer]] ** 2).sum().item() for h in found) / 3
    deltas = {layer: torch.zeros(len(chosen[layer]), dtype=torch.float64, requires_grad=True) for layer in LAYERS}
    gradients = {layer: [] for layer in LAYERS}
    for _ in range(2):
        logits_of = plain_logits(body, head, chosen, deltas, apply)
        total, rows = reference.update_losses(logits_of, fact, 0.5, 0.2, deltas, norms)
        losses = values.backward()
        torch.testing.assert_close(losses.total_F[0], total.detach())
        torch.testing.assert_close(losses.nll_rows[0], torch.stack(rows).detach())
        for layer, gradient in zip(LAYERS, torch.autograd.grad(total, list(deltas.values())), strict=True):
            gradients[layer].append(gradient)
            moved = reference.adam(deltas[layer].detach(), gradients[layer], 0.3)
            deltas[layer] = reference.in_ball(moved, 0.4, norms[layer]).requires_grad_()
        values.update(optimizer)
        for layer in LAYERS:
            torch.testing.assert_close(values.of_fact(0)[layer], deltas[layer].detach())


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "opt", "bloom"])
def test_facts_together_get_the_values_that_each_gets_alone(family):
    body, head = models.body_and_head(family)
    facts, chosen = models.facts(6), models.neurons(6, LAYERS)
    optimising = Optimising(steps=8, learning_rate=0.1)
    together = optimise(body, head, facts, chosen, optimising, max_tokens=60)
    for fact, neurons, batched in zip(facts, chosen, together, strict=True):
        (alone,) = optimise(body, head, [fact], [neurons], optimising)
        assert (batched.stop, batched.steps) == (alone.stop, alone.steps)
        assert batched.loss == pytest.approx(alone.loss, abs=1e-4)
        for layer in LAYERS:
            torch.testing.assert_close(batched.values[layer], alone.values[layer], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("apply", ["tail", "lookup", "prompt_last"])
def test_what_runs_once_makes_no_difference(apply):
    body, head = models.body_and_head("llama", dtype=torch.float64)
    facts, chosen = models.facts(5), models.neurons(5, LAYERS)
    optimising = Optimising(steps=6, apply=apply)
    quick = optimise(body, head, facts, chosen, optimising)
    plain = optimise(body, head, facts, chosen, optimising, reuse=False)
    for one, other in zip(quick, plain, strict=True):
        assert one.steps == other.steps
        for layer in LAYERS:
            torch.testing.assert_close(one.values[layer], other.values[layer])


def test_predictions_to_keep_are_formed_once_or_in_every_step_with_the_same_values(monkeypatch):
    body, head = models.body_and_head("llama", dtype=torch.float64)
    facts, chosen = models.facts(3), models.neurons(3, LAYERS)
    optimising = Optimising(steps=5, kl_weight=0.5)
    kept = optimise(body, head, facts, chosen, optimising)
    monkeypatch.setattr(row_batches, "_KEPT_BYTES", 0)
    anew = optimise(body, head, facts, chosen, optimising)
    for one, other in zip(kept, anew, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-12)
        for layer in LAYERS:
            torch.testing.assert_close(one.values[layer], other.values[layer], rtol=1e-12, atol=1e-14)


def test_an_answer_becomes_likely_and_a_fact_that_is_done_stops_while_others_go_on():
    body, head = models.body_and_head("llama")
    head = head._replace(weight_VD=8 * head.weight_VD)  # a random head is too small to be sure of anything
    single = [FactRows((fact.rows[0].with_target(fact.rows[0].target[:1]),), (0,)) for fact in models.facts(5)]
    chosen = models.neurons(5, LAYERS, each=30)
    optimising = Optimising(learning_rate=0.2, steps=40, clamp=60.0, weight_decay=0.0)
    found = optimise(body, head, single, chosen, optimising)
    assert {result.stop for result in found} <= {"loss", "answer"}
    assert len({result.steps for result in found}) > 1, "facts should end at different steps"
    values = SharedValues(body, head, single, chosen, optimising)
    with torch.no_grad():
        for fact, result in enumerate(found):
            for s, layer in enumerate(LAYERS):
                values.delta_FSn[fact, s, : len(result.values[layer])] = result.values[layer]
    losses = values.backward().nll_F.tolist()
    assert losses == pytest.approx([result.nll[0] for result in found], abs=1e-5), "values are those of the last loss"
    assert max(losses) < 0.05


def test_a_fact_without_finite_loss_gets_no_values_and_the_rest_goes_on():
    body, head = models.body_and_head("llama")
    facts, chosen = models.facts(3), models.neurons(3, LAYERS)
    poisoned = 60
    with torch.no_grad():
        body.transformer.get_input_embeddings().weight[poisoned] = float("nan")
    clean = [
        FactRows(tuple(Row([min(t, 59) for t in r.prompt], r.lookup, [min(t, 59) for t in r.target]) for r in fact.rows),
                 fact.language_of_row)
        for fact in facts
    ]  # fmt: skip
    first = clean[1].rows[0]
    bad = FactRows(
        (Row((poisoned, *first.prompt[1:]), first.lookup, first.target), *clean[1].rows[1:]), clean[1].language_of_row
    )
    found = optimise(body, head, [clean[0], bad, clean[2]], chosen, Optimising(steps=3))
    assert [result.stop == "not_finite" for result in found] == [False, True, False]
    assert all(not values.any() for values in found[1].values.values())
    (alone,) = optimise(body, head, [clean[2]], [chosen[2]], Optimising(steps=3))
    torch.testing.assert_close(found[2].values[1], alone.values[1], atol=1e-5, rtol=1e-4)


def test_the_model_gets_no_gradients_and_stays_as_it_is():
    body, head = models.body_and_head("llama")
    body.transformer.requires_grad_(True)
    before = {name: value.clone() for name, value in body.transformer.state_dict().items()}
    optimise(body, head, models.facts(2), models.neurons(2, LAYERS), Optimising(steps=2))
    assert all(parameter.grad is None for parameter in body.transformer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in body.transformer.state_dict().items())


def test_rows_in_half_precision_get_values_in_float32():
    body, head = models.body_and_head("llama", dtype=torch.bfloat16)
    found = optimise(body, head, models.facts(2), models.neurons(2, LAYERS), Optimising(steps=3))
    assert found[0].values[1].dtype == torch.float32 and found[0].values[1].any()


def test_facts_are_refused_that_cannot_be_optimised():
    (fact,) = models.facts(1)
    with pytest.raises(ValueError, match="no target tokens"):
        FactRows((Row((1, 2), 0),), (0,))
    with pytest.raises(ValueError, match="without gaps"):
        FactRows(fact.rows, (0, 0, 2, 2))
    with pytest.raises(ValueError, match="one for each language"):
        FactRows(fact.rows, fact.language_of_row, fact.essence[:1])
    body, head = models.body_and_head("llama")
    with pytest.raises(ValueError, match="same layers"):
        optimise(body, head, [fact, fact], [*models.neurons(1, [1]), *models.neurons(1, [2])], Optimising())
    with pytest.raises(ValueError, match="no neurons in layer 2"):
        optimise(body, head, [fact], [{1: torch.tensor([3]), 2: torch.tensor([], dtype=torch.int64)}], Optimising())
    with pytest.raises(ValueError, match="in training mode"):
        body.transformer.train()
        optimise(body, head, [fact], models.neurons(1, [1]), Optimising())


@pytest.mark.parametrize("settings", [{"apply": "all"}, {"steps": 0}, {"clamp": 0.0}, {"kl_weight": -1.0}])
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=f"optimising.{next(iter(settings))} is"):
        Optimising(**settings)
