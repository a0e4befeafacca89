"""LU-LAFN on a model: locate the neurons of facts, optimise their shared values, make cached edits of them.

Shapes: N prompts, L languages of a fact, F facts, m neurons of a layer, K stored prompts of an edit, d hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Optional

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lit_llm.editing.attribution import integrated_gradients
from lit_llm.editing.edit_cache import CachedEdit, relation_vectors
from lit_llm.editing.fact_text import FactText, index_of
from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.locate import Located, Locating, combine, contrasted, random_neurons, scores, select
from lit_llm.editing.optimise import Optimised, Optimising, optimise
from lit_llm.editing.passes import neurons_at
from lit_llm.editing.rows import Row
from lit_llm.editing.triggers import Trigger, decoded, mentioned_tokens, relation_threshold
from lit_llm.losses.head import Head
from lit_llm.methods.edited_facts import EditedFact


@dataclass(frozen=True)
class NeuronSettings:
    """How facts are edited.

    Args:
        layers: that are edited, ascending; None: the middle, from 0.44 to 0.67 of the depth.
        locating: which neurons hold a fact.
        optimising: what is added to them.
        trigger: when an edit acts.
        train_on: values are optimised on the bare `prompts`, or on all `paraphrases` as well, for their number times the
            cost.
        neurons: `located` ones, or as many `random` ones: the control for the step of locating.
        seed: of random neurons.
    """

    layers: Optional[list[int]] = None
    locating: Locating = Locating()
    optimising: Optimising = Optimising()
    trigger: Trigger = Trigger()
    train_on: Literal["prompts", "paraphrases"] = "prompts"
    neurons: Literal["located", "random"] = "located"
    seed: int = 0


@dataclass
class Edited:
    """Cached edits of some facts, with what was seen on the way.

    Attributes:
        edits: one for each fact.
        selected: layer -> (F, L, m) bool, what each language selects; None where the facts differ in their languages.
    """

    edits: list[CachedEdit]
    selected: dict[int, Tensor] | None = None
    languages: tuple[str, ...] = field(default=())


class NeuronEditor:
    """Edits facts of a model that stays as it is.

    Args:
        body: the model, in eval mode.
        head: its output head.
        tokenizer: its tokenizer.
        settings: see there.

    Raises:
        ValueError: layers that the model does not have.
    """

    def __init__(self, body: FeedForwards, head: Head, tokenizer, settings: NeuronSettings) -> None:
        self.body, self.head, self.tokenizer, self.settings = body, head, tokenizer, settings
        self.layers = body.middle_layers() if settings.layers is None else list(settings.layers)
        body.check_layers(self.layers)

    def edit(self, facts: Sequence[EditedFact]) -> Edited:
        """Edit some facts together; each gets what it would get alone, except under `locating.contrast`.

        Raises:
            ValueError: facts that the settings cannot edit, see `Locating` and `relation_threshold`.
        """
        located, selected = self.locate(facts)
        neurons = [{layer: found.neurons for layer, found in of_fact.items()} for of_fact in located]
        rows = [fact.fact_rows(paraphrases=self.settings.train_on == "paraphrases") for fact in facts]
        results = optimise(self.body, self.head, rows, neurons, self.settings.optimising)
        edits = [self._cached(*parts) for parts in zip(facts, located, results, strict=True)]
        return Edited(edits, selected, facts[0].languages)

    def locate(self, facts: Sequence[EditedFact]) -> tuple[list[dict[int, Located]], dict[int, Tensor] | None]:
        """The neurons of each fact by layer; and what each language selects, where all facts have the same."""
        locating = self.settings.locating
        found = self._read([row for fact in facts for rows in fact.rows.values() for row in rows])
        alike = len({fact.languages for fact in facts}) == 1
        if locating.contrast and not alike:
            raise ValueError(
                "locating.contrast compares facts in the same languages, but those of this batch differ. Set data.languages, or "
                "leave contrast out."
            )
        located: list[dict[int, Located]] = [{} for _ in facts]
        selected = {}
        for layer in self.layers:
            norm_m = self._column_norms(layer)
            of_facts, begin = [], 0
            for fact in facts:
                language_N = [number for number, rows in enumerate(fact.rows.values()) for _ in rows]
                neurons_Nm = found[layer][begin : begin + len(language_N)]
                of_facts.append(scores(neurons_Nm, language_N, locating.statistic, norm_m))
                begin += len(language_N)
            if locating.contrast:
                of_facts = list(contrasted(torch.stack(of_facts)))
            chosen = [select(score_Lm, locating) for score_Lm in of_facts]
            for number, (chosen_Lm, score_Lm) in enumerate(zip(chosen, of_facts, strict=True)):
                located[number][layer] = combine(chosen_Lm, score_Lm, locating)
            if alike:
                selected[layer] = torch.stack(chosen).cpu()
        if self.settings.neurons == "random":
            located = [self._random(fact, of_fact) for fact, of_fact in zip(facts, located, strict=True)]
        return located, selected if alike else None

    def _read(self, rows: Sequence[Row]) -> dict[int, Tensor]:
        """layer -> (N, m) of every prompt."""
        locating = self.settings.locating
        if locating.statistic != "integrated_gradients":
            return neurons_at(self.body, rows, self.layers, position=locating.position)
        attributed = torch.stack([integrated_gradients(self.body, self.head, row) for row in rows])
        return {layer: attributed[:, layer] for layer in self.layers}

    def _column_norms(self, layer: int) -> Tensor | None:
        if self.settings.locating.statistic != "contrib":
            return None
        return self.body.weight(layer).detach().norm(dim=0)

    def _random(self, fact: EditedFact, located: dict[int, Located]) -> dict[int, Located]:
        """The same for a fact whatever else is in its batch."""
        drawn = random_neurons(list(located.values()), self.body.width, _seed_of(self.settings.seed, fact.edit.id))
        return dict(zip(located, drawn, strict=True))

    def _cached(self, fact: EditedFact, located: dict[int, Located], result: Optimised) -> CachedEdit:
        trigger, vectors_Kd, threshold = self.settings.trigger, self.relation_vectors(fact), None
        if trigger.scope == "subject_relation":
            given = trigger.relation_threshold
            threshold = relation_threshold(vectors_Kd) if given is None else given
        else:  # only tells several edits of one subject apart, for which a file need not keep every paraphrase
            vectors_Kd = _mean_by_language(vectors_Kd, [len(rows) for rows in fact.rows.values()])
        stats: dict[str, Any] = {
            "stop": result.stop,
            "steps": result.steps,
            "loss": result.loss,
            "nll": dict(zip(fact.languages, result.nll, strict=True)),
            "shared": {str(layer): found.shared for layer, found in located.items()},
            "filled": sum(found.filled for found in located.values()),
            "dropped": sum(found.dropped for found in located.values()),
        }
        return CachedEdit(
            fact=self._text(fact),
            neurons={layer: found.neurons.cpu() for layer, found in located.items()},
            values={layer: values.float().cpu() for layer, values in result.values.items()},
            apply=self.settings.optimising.apply,
            relation_Kd=vectors_Kd,
            relation_threshold=threshold,
            stats=stats,
        )

    def _text(self, fact: EditedFact) -> FactText:
        return replace(fact.text, fuzzy=self.settings.trigger.fuzzy)

    def relation_vectors(self, fact: EditedFact) -> Tensor:
        """(K, d) of the fact's prompts in all of its languages, without the tokens that the trigger takes for the subject."""
        index = index_of([self._text(fact)])
        rows, starts = [], []
        for row in (row for rows in fact.rows.values() for row in rows):
            mention = index.find(decoded(self.tokenizer, row.prompt))
            first, last = (
                (row.lookup,) * 2 if mention is None else mentioned_tokens(self.tokenizer, row.prompt, mention)
            )
            rows.append(Row(row.prompt, last))
            starts.append(first)
        special = self.tokenizer.all_special_ids
        return relation_vectors(self.body, rows, starts, self.layers[0], special).cpu()


def _mean_by_language(vectors_Kd: Tensor, rows: Sequence[int]) -> Tensor:
    """(L, d), of norm 1; `rows` counts those of each language."""
    return normalize(torch.stack([of_language_Kd.mean(0) for of_language_Kd in vectors_Kd.split(list(rows))]), dim=-1)


def _seed_of(seed: int, name: str) -> int:
    """Of a fact: a hash of all of its id, whose beginning is the relation's and the same in many facts."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7], "little")
