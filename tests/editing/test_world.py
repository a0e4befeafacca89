"""Edits of a model that knows something: reliable in both languages, in wordings never used, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from lit_llm.editing.locate import Locating, locate, random_neurons, scores
from lit_llm.editing.optimise import FactRows, Optimising, optimise
from lit_llm.editing.passes import neurons_at, run
from lit_llm.editing.rows import padded
from tests.editing import world

LAYERS, EDITED = [0, 1, 2], list(range(0, 12, 2))
OPTIMISING = Optimising(learning_rate=0.2, steps=50, kl_weight=0.0)


def new_answer(entity: int) -> int:
    return (world.true_answer(entity, 0) + 2) % world.ANSWERS


def fact_rows(entity: int, languages: list[int]) -> FactRows:
    rows = [
        world.question(entity, 0, language, 0).with_target([world.answer(new_answer(entity), 0, language)])
        for language in languages
    ]
    return FactRows(tuple(rows), tuple(range(len(languages))))


def located(body, entities: list[int]) -> list[dict[int, torch.Tensor]]:
    locating = Locating(top_ratio=0.4, min_neurons=8)
    neurons = []
    for entity in entities:
        rows = [world.question(entity, 0, language, 0) for language in range(2)]
        found = neurons_at(body, rows, LAYERS)
        neurons.append({at: locate(scores(found[at], [0, 1], "mean_abs"), locating).neurons for at in LAYERS})
    return neurons


@torch.no_grad()
def right(body, head, neurons, results, language: int, wording: int) -> float:
    """Share of the edited facts whose new answer is the best token, in percent."""
    hits = []
    for entity, chosen, result in zip(EDITED, neurons, results, strict=True):
        row = world.question(entity, 0, language, wording)

        def add(layer, row=row, chosen=chosen, result=result):
            def change(h):
                changed = h.clone()
                changed[row.lookup :, chosen[layer]] += result.values[layer]
                return changed

            return change

        with body.at_inputs({layer: add(layer) for layer in LAYERS}):
            best = head(run(body, padded([row.prompt]))[0, -1]).argmax().item()
        hits.append(best == world.answer(new_answer(entity), 0, language))
    return 100 * sum(hits) / len(hits)


@pytest.fixture(scope="module")
def known():
    return world.learned()


def test_one_value_for_all_languages_edits_them_all_in_wordings_never_used(known, capsys):
    body, head = known
    neurons = located(body, EDITED)
    results = optimise(body, head, [fact_rows(entity, [0, 1]) for entity in EDITED], neurons, OPTIMISING)
    reliability = [right(body, head, neurons, results, language, 0) for language in (0, 1)]
    generality = [right(body, head, neurons, results, language, wording) for language in (0, 1) for wording in (1, 2)]
    drawn = [
        {at: random_neurons([_as_located(n)], body.width, seed=entity)[0].neurons for at, n in chosen.items()}
        for entity, chosen in zip(EDITED, neurons, strict=True)
    ]
    control = optimise(body, head, [fact_rows(entity, [0, 1]) for entity in EDITED], drawn, OPTIMISING)
    of_control = [right(body, head, drawn, control, language, 0) for language in (0, 1)]
    with capsys.disabled():
        print(f"\nreliability {reliability}, generality {generality}, random neurons {of_control}")
    assert min(reliability) >= 95
    assert sum(generality) / 4 >= 95


def test_a_value_of_one_language_leaves_the_other_behind(known):
    body, head = known
    neurons = located(body, EDITED)
    results = optimise(body, head, [fact_rows(entity, [0]) for entity in EDITED], neurons, OPTIMISING)
    assert right(body, head, neurons, results, 0, 0) >= 95
    assert right(body, head, neurons, results, 1, 0) <= 75


def _as_located(neurons: torch.Tensor):
    from lit_llm.editing.locate import Located

    return Located(neurons, len(neurons), 0, 0)
