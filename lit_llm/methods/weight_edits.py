"""Editors that change weights, as baselines: fine-tuning of one layer, ROME, MEMIT and AlphaEdit.

They know of one language each: a fact in several languages is as many requests. ROME takes them one after the other,
fine-tuning goes through those of a fact in turn, epoch by epoch, as released, and MEMIT and AlphaEdit take all requests of a
group at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Optional

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_llm.data.edit_batch import Kind
from lit_llm.data.encoded_facts import FactEncoding, encode_edits
from lit_llm.data.tokenized import begin_ids
from lit_llm.editing.closed_form import AlphaEdit as Sequel
from lit_llm.editing.closed_form import FreeDirections, Inverse, LowRank, free_directions, inverse, memit, rome
from lit_llm.editing.covariance import SecondMoments, kept_second_moments
from lit_llm.editing.deltas import Edit, EditSet, WeightEdit
from lit_llm.editing.fine_tuning import FineTuning, fine_tune
from lit_llm.editing.rows import Row
from lit_llm.editing.values import Request, ValueSettings
from lit_llm.methods.answers import Generation
from lit_llm.methods.edited_facts import EditedFact
from lit_llm.methods.editing import Editing
from lit_llm.methods.ordinary_text import OrdinaryText, passages
from lit_llm.models.language_model import ModelSpec
from lit_llm.seeds import run_seed

_STARTS = ("The", "Therefore", "Because", "I", "You")


class _WeightEditing(Editing):
    """What they share: contexts before prompts, second moments of neurons, edits as changes of weights."""

    def __init__(self, student, layers, contexts, text, seed, generation, edited_in, crossed, replace, single) -> None:
        super().__init__(student, generation, edited_in, crossed, replace, single)
        if contexts is not None and contexts < 0:
            raise ValueError(f"model.contexts is {contexts}; it counts texts before a prompt, at least 0.")
        self.given_layers, self.contexts, self.text, self.seed = layers, contexts, text, run_seed(seed)
        self._contexts: list[str] | None = None
        self._moments: SecondMoments | None = None
        self._inverses: dict[int, Inverse] = {}

    @property
    def layers(self) -> list[int]:
        """That are edited: as given, or those of published editors; of these the last where a norm follows the MLP."""
        body = self.model.body
        if self.given_layers is not None:
            return self.given_layers
        usual = body.default_layers()
        return usual if body.norm_after(usual[0]) is None else usual[-1:]

    def configure_model(self) -> None:
        super().configure_model()
        self.model.body.check_layers(self.layers)

    def compute(self, facts: Sequence[EditedFact], edits: EditSet, name: str) -> list[Edit]:
        self.prepare()
        with self.model.under(edits), self.model.body.restoring(self.layers):
            changes = self.changes(facts, name)
        return [
            WeightEdit(fact.text, type(self).__name__, of_fact) for fact, of_fact in zip(facts, changes, strict=True)
        ]

    def prepare(self) -> None:
        """What is read from the untouched model: contexts and second moments."""
        if self.context_starts():
            self._written_contexts()
        if self.text is not None:
            self.moments()

    @abstractmethod
    def changes(self, facts: Sequence[EditedFact], name: str) -> list[Mapping[int, Any]]:
        """The change of each layer for each fact; the live weights may be changed on the way."""

    # -------------------------------------------------------------- requests

    def requests(self, fact: EditedFact) -> list[Request]:
        """One for each language: the bare prompt, then the same behind contexts."""
        behind = [self._behind(fact, context) for context in self._written_contexts()]
        return [
            Request((rows[0], *(of_context[code] for of_context in behind)), fact.essence[code])
            for code, rows in fact.rows.items()
        ]

    def _behind(self, fact: EditedFact, context: str) -> dict[str, Row]:
        encoding: FactEncoding = self.trainer.datamodule.encoding
        longer = replace(encoding, prompt_format=f"{context}. {encoding.prompt_format}", max_target_tokens=None)
        (encoded,) = encode_edits([fact.edit], longer, self.student.tokenizer).facts
        found = {}
        for row in encoded.rows:
            if row.paraphrase == 0:
                ids, prompt = row.tokens.ids, row.tokens.prompt_length
                found[row.language] = Row(ids[:prompt], row.tokens.lookup, ids[prompt:])
        return found

    def _written_contexts(self) -> list[str]:
        """Texts that the untouched model writes; once in a run, always the same."""
        if self._contexts is None:
            tokenizer = self.student.tokenizer
            starts = self.context_starts()
            found = []
            for number, (start, tokens) in enumerate(starts):
                ids = tokenizer(start, add_special_tokens=False)["input_ids"] if start else []
                first = begin_ids(tokenizer) or ([] if ids else [tokenizer.eos_token_id])
                (new,) = self.student.generate(
                    [[*first, *ids]], max_new_tokens=tokens, temperature=1.0, top_k=5, seed=self.seed + number
                )
                text = start + tokenizer.decode(new, skip_special_tokens=True)
                found.append(" ".join(text.replace("{", "").replace("}", "").split()))
            self._contexts = [text for text in found if text]
        return self._contexts

    def context_starts(self) -> list[tuple[str, int]]:
        """Beginnings of contexts, and how many tokens the model adds: MEMIT's."""
        starts = [(start, 10) for start in _STARTS]
        wanted = len(starts) if self.contexts is None else self.contexts
        return [starts[number % len(starts)] for number in range(wanted)]

    # -------------------------------------------------------- second moments

    def moments(self) -> SecondMoments:
        """Of the untouched model over ordinary text; kept in the cache."""
        if self._moments is None:
            self._moments = kept_second_moments(
                self.model.body,
                passages(self.text, self.student.tokenizer),
                self.layers,
                max_tokens=self.text.tokens,
                model_digest=self.model.digest,
            )
            errors = ", ".join(f"layer {layer} {error:.1%}" for layer, error in self._moments.split_error.items())
            rank_zero_info(f"Second moments over {self._moments.tokens:,} tokens; estimated relative error: {errors}")
        return self._moments

    def inverses(self) -> dict[int, Inverse]:
        if not self._inverses:
            self._inverses = {layer: inverse(moments) for layer, moments in self.moments().moments.items()}
        return self._inverses

    def more_to_report(self) -> dict[str, Any]:
        """How the second moments have converged."""
        if self._moments is None:
            return {}
        curve = {str(layer): points for layer, points in self._moments.curve.items()}
        error = {str(layer): value for layer, value in self._moments.split_error.items()}
        return {"covariance": {"tokens": self._moments.tokens, "split_error": error, "curve": curve}}

    def identity(self) -> dict[str, Any]:
        layers = None if self.model is None else self.layers
        return {**super().identity(), "layers": layers, "settings": repr(self.settings())}

    def settings(self) -> tuple:
        """What else a run that goes on must share."""
        return self.contexts, self.text, self.seed


class FineTunedEdit(_WeightEditing):
    """Fine-tuning of one down projection on each fact: FT-L and FT-M, as released with ROME and EasyEdit.

    Args:
        student: the model.
        layer: that is tuned; None: the last one of those of published editors.
        fine_tuning: how; `objective: answer` is FT-M, `prompt_last` with a `bound` FT-L.
        generation: see `NeuronEdit`, also for the rest.
    """

    def __init__(
        self,
        student: ModelSpec,
        layer: Optional[int] = None,
        fine_tuning: FineTuning = FineTuning(),
        generation: Generation = Generation(max_new_tokens=16),
        edited_in: Optional[list[str]] = None,
        crossed: Optional[list[Kind]] = None,
        replace: bool = False,
        single: bool = False,
    ) -> None:
        layers = None if layer is None else [layer]
        super().__init__(student, layers, None, None, 0, generation, edited_in, crossed, replace, single)
        self.fine_tuning = fine_tuning

    @property
    def layers(self) -> list[int]:
        return super().layers[-1:]

    def prepare(self) -> None:
        """Nothing: prompts are tuned on as they are."""

    def changes(self, facts: Sequence[EditedFact], name: str) -> list[Mapping[int, Any]]:
        (layer,) = self.layers
        found = []
        for fact in facts:
            rows = [rows[0] for rows in fact.rows.values()]
            change = fine_tune(self.model.body, self.student.head, rows, layer, self.fine_tuning)
            with torch.no_grad():  # the next fact begins where this one has ended
                weight = self.model.body.weight(layer)
                weight.add_(change.weight.to(weight))
                if change.bias is not None:
                    self.model.body.down(layer).bias.add_(change.bias.to(weight))
            found.append({layer: change})
        return found

    def settings(self) -> tuple:
        return (self.fine_tuning,)


class ROME(_WeightEditing):
    """One change of rank one for each fact and language, in one layer (ROME, arXiv 2202.05262).

    Args:
        student: the model.
        layer: that is edited; None: the last one of those of published editors.
        values: how the new output of the layer is found.
        contexts: texts that the model writes and that stand before a prompt in its place; None: 20, ten of 5 tokens and ten
            of 10, as published.
        text: whose second moments weigh the key; None: the key is taken as it is, as released for 7B models.
        seed: of the contexts; `seed_everything` where it is left out.
        generation: see `NeuronEdit`, also for the rest.
    """

    def __init__(
        self,
        student: ModelSpec,
        layer: Optional[int] = None,
        values: ValueSettings = ValueSettings(),
        contexts: Optional[int] = None,
        text: Optional[OrdinaryText] = None,
        seed: Optional[int] = None,
        generation: Generation = Generation(max_new_tokens=16),
        edited_in: Optional[list[str]] = None,
        crossed: Optional[list[Kind]] = None,
        replace: bool = False,
        single: bool = False,
    ) -> None:
        layers = None if layer is None else [layer]
        super().__init__(student, layers, contexts, text, seed, generation, edited_in, crossed, replace, single)
        self.values = values

    @property
    def layers(self) -> list[int]:
        return super().layers[-1:]

    def context_starts(self) -> list[tuple[str, int]]:
        wanted = 20 if self.contexts is None else self.contexts
        return [("", 5 if number < wanted / 2 else 10) for number in range(wanted)]

    def changes(self, facts: Sequence[EditedFact], name: str) -> list[Mapping[int, Any]]:
        (layer,) = self.layers
        covariance = None if self.text is None else self.inverses()[layer]
        found = []
        for fact in facts:
            parts = [
                rome(self.model.body, self.student.head, request, layer, covariance, self.values)[layer]
                for request in self.requests(fact)
            ]
            left, right = (torch.cat([part[side] for part in parts], 1) for side in (0, 1))
            found.append({layer: LowRank(left, right)})
        return found

    def settings(self) -> tuple:
        return (*super().settings(), self.values)


class MEMIT(_WeightEditing):
    """All facts of a group and all their languages in one change of low rank, spread over layers (MEMIT, arXiv 2210.07229).

    Where a norm follows the MLP (Gemma 2 and 3, OLMo 2) one layer is edited.

    Args:
        student: the model.
        layers: that are edited, ascending; None: those of published editors, the last one where a norm follows the MLP.
        values: how the new output of the last layer is found.
        contexts: texts that the model writes and that stand before a prompt in its place; None: 5, as published.
        text: what is protected.
        covariance_weight: how strongly.
        seed: of the contexts; `seed_everything` where it is left out.
        generation: see `NeuronEdit`, also for the rest.
    """

    def __init__(
        self,
        student: ModelSpec,
        layers: Optional[list[int]] = None,
        values: ValueSettings = ValueSettings(),
        contexts: Optional[int] = None,
        text: OrdinaryText = OrdinaryText(),
        covariance_weight: float = 15_000.0,
        seed: Optional[int] = None,
        generation: Generation = Generation(max_new_tokens=16),
        edited_in: Optional[list[str]] = None,
        crossed: Optional[list[Kind]] = None,
        replace: bool = False,
        single: bool = False,
    ) -> None:
        super().__init__(student, layers, contexts, text, seed, generation, edited_in, crossed, replace, single)
        self.values, self.covariance_weight = values, covariance_weight

    def changes(self, facts: Sequence[EditedFact], name: str) -> list[Mapping[int, Any]]:
        requests = [self.requests(fact) for fact in facts]
        updates = memit(
            self.model.body,
            self.student.head,
            [request for of_fact in requests for request in of_fact],
            self.layers,
            self.inverses(),
            self.values,
            covariance_weight=self.covariance_weight,
        )
        return _by_fact(updates, [len(of_fact) for of_fact in requests])

    def settings(self) -> tuple:
        return (*super().settings(), self.values, self.covariance_weight)


class AlphaEdit(_WeightEditing):
    """MEMIT's changes, kept to directions that ordinary text hardly uses, a sequence of groups (arXiv 2410.02355).

    Args:
        student: the model.
        layers: that are edited, ascending; None: those of published editors, the last one where a norm follows the MLP.
        values: how the new output of the last layer is found.
        contexts: texts that the model writes and that stand before a prompt in its place; None: 5, as published.
        text: what is protected.
        threshold: of the second moment along a free direction, absolute; None where `fraction` is given.
        fraction: instead, this share of the directions is free.
        ridge: L2 of the published code.
        seed: of the contexts; `seed_everything` where it is left out.
        generation: see `NeuronEdit`, also for the rest.
    """

    def __init__(
        self,
        student: ModelSpec,
        layers: Optional[list[int]] = None,
        values: ValueSettings = ValueSettings(),
        contexts: Optional[int] = None,
        text: OrdinaryText = OrdinaryText(),
        threshold: Optional[float] = 0.02,
        fraction: Optional[float] = None,
        ridge: float = 10.0,
        seed: Optional[int] = None,
        generation: Generation = Generation(max_new_tokens=16),
        edited_in: Optional[list[str]] = None,
        crossed: Optional[list[Kind]] = None,
        replace: bool = False,
        single: bool = False,
    ) -> None:
        super().__init__(student, layers, contexts, text, seed, generation, edited_in, crossed, replace, single)
        self.values, self.threshold, self.fraction, self.ridge = values, threshold, fraction, ridge
        self._free: dict[int, FreeDirections] = {}
        self._sequels: dict[str, Sequel] = {}
        self._earlier_keys: dict[str, dict[int, Tensor]] = {}

    def changes(self, facts: Sequence[EditedFact], name: str) -> list[Mapping[int, Any]]:
        if self.single or name not in self._sequels:
            self._sequels[name] = Sequel(self.free(), self.values, self.ridge, self._earlier_keys.get(name, {}))
        requests = [self.requests(fact) for fact in facts]
        flat = [request for of_fact in requests for request in of_fact]
        updates = self._sequels[name].edit(self.model.body, self.student.head, flat)
        return _by_fact(updates, [len(of_fact) for of_fact in requests])

    def free(self) -> dict[int, FreeDirections]:
        """By layer, what ordinary text hardly uses."""
        if not self._free:
            self._free = {
                layer: free_directions(moments, threshold=self.threshold, fraction=self.fraction)
                for layer, moments in self.moments().moments.items()
            }
        return self._free

    def settings(self) -> tuple:
        return (*super().settings(), self.values, self.threshold, self.fraction, self.ridge)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        made = {} if self.single else {name: sequel.earlier for name, sequel in self._sequels.items()}
        checkpoint["lit_llm"]["earlier_keys"] = {**self._earlier_keys, **made}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._earlier_keys = checkpoint["lit_llm"]["earlier_keys"]


def _by_fact(updates: Mapping[int, LowRank], counts: Sequence[int]) -> list[Mapping[int, LowRank]]:
    """The columns of each fact's requests."""
    found, begin = [], 0
    for count in counts:
        columns = list(range(begin, begin + count))
        found.append({layer: update.columns(columns) for layer, update in updates.items()})
        begin += count
    return found
