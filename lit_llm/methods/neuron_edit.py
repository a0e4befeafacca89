"""The neuron editor: LU-LAFN (arXiv 2406.16416), its values cached beside a frozen model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Optional

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_llm.data.edit_batch import Kind
from lit_llm.data.edit_requests import Edit as Request
from lit_llm.editing.deltas import Edit, EditSet
from lit_llm.editing.fact_text import index_of
from lit_llm.editing.locate import Locating, overlap
from lit_llm.editing.optimise import Optimising
from lit_llm.editing.triggers import Trigger, unheard
from lit_llm.methods.answers import Generation
from lit_llm.methods.edited_facts import EditedFact, text_of
from lit_llm.methods.editing import ALL, Editing
from lit_llm.methods.neuron_editor import NeuronEditor, NeuronSettings
from lit_llm.models.language_model import ModelSpec
from lit_llm.seeds import run_seed


class NeuronEdit(Editing):
    """Changes facts in all their languages at once through neurons that the languages share (LU-LAFN, arXiv 2406.16416).

    For every fact: neurons that are large for its prompts in each language are located, one vector of values for them is
    optimised over all languages together, and kept in a cache beside the model, which stays as it is, bit for bit. A text
    that is about no edited fact is answered by the base model. The paper's code was never released, and its statistic,
    threshold, loss and trigger are not published; those here are this project's. `data` is `Facts`.

    Args:
        student: the model.
        layers: that are edited, ascending; None: the middle, from 0.44 to 0.67 of the depth.
        locating: which neurons hold a fact.
        optimising: what is added to them.
        trigger: when an edit acts.
        train_on: values are optimised on the bare `prompts`, or on all `paraphrases` as well, for their number times the
            cost.
        neurons: `located` ones, or as many `random` ones: the control for the step of locating.
        seed: of random neurons; `seed_everything` where it is left out.
        generation: answers written freely, to the questions about the first `prompts` facts (`test_prompts` in a test), up to
            four tokens more than the wanted ones have. They are greedy.
        edited_in: languages in which facts are edited; they are asked in all of `data.languages`. None: in all. One of
            them is the control of a single language.
        crossed: kinds of questions whose matrix is measured: every fact is also edited in each language alone, beside the
            edit of all languages, and asked in every language. Editing then takes about twice as long.
        replace: what happens where a fact is edited already: the new edit takes its place, or the run is refused.
        single: each fact is edited in the untouched model and asked under its own edit alone, as published tables of Bi-ZsRE,
            MzsRE, zsRE and CounterFact have it; otherwise all edits of the run are there together.
    """

    def __init__(
        self,
        student: ModelSpec,
        layers: Optional[list[int]] = None,
        locating: Locating = Locating(),
        optimising: Optimising = Optimising(),
        trigger: Trigger = Trigger(),
        train_on: Literal["prompts", "paraphrases"] = "prompts",
        neurons: Literal["located", "random"] = "located",
        seed: Optional[int] = None,
        generation: Generation = Generation(max_new_tokens=16),
        edited_in: Optional[list[str]] = None,
        crossed: Optional[list[Kind]] = None,
        replace: bool = False,
        single: bool = False,
    ) -> None:
        super().__init__(student, generation, edited_in, crossed, replace, single, trigger)
        self.settings = NeuronSettings(layers, locating, optimising, trigger, train_on, neurons, run_seed(seed))
        self.editor: NeuronEditor | None = None
        self._selected: dict[int, list[Tensor]] = {}
        self._selected_in: tuple[str, ...] = ()
        self._unheard: Counter[str] = Counter()

    def configure_model(self) -> None:
        super().configure_model()
        if self.editor is None:
            self.editor = NeuronEditor(self.model.body, self.student.head, self.student.tokenizer, self.settings)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        edits = [fact.edit for fact in self.trainer.datamodule.sets["train"].facts]
        fuzzy = self.settings.trigger.fuzzy
        texts = [text_of(edit.in_languages(self._edited_in(edit))) for edit in edits if self._edited_in(edit)]
        index = index_of([replace(text, fuzzy=fuzzy) for text in texts])
        found = list(unheard(self.student.tokenizer, index, {text.id: text.prompts for text in texts}))
        self._unheard = Counter(prompt.edit for prompt in found)
        if found:
            asked, (first, *_) = sum(len(text.prompts) for text in texts), found
            rank_zero_warn(
                f"On {len(found)} of {asked} prompts their own edits will not act, e.g. {first.edit} in {first.language}, "
                f"{first.prompt!r}: {first.reason}. Correct the subjects, or leave these facts out."
            )

    def _edited_in(self, edit: Request) -> tuple[str, ...]:
        return tuple(code for code in edit.languages if self.edited_in is None or code in self.edited_in)

    @property
    def together(self) -> bool:
        """Always: no value depends on another edit (with `contrast`, on the other facts of the group), and many cost less."""
        return True

    def compute(self, facts: Sequence[EditedFact], edits: EditSet, name: str) -> list[Edit]:
        made = self.editor.edit(facts)
        if name == ALL and made.selected is not None:
            self._selected_in = made.languages
            for layer, selected_FLm in made.selected.items():
                self._selected.setdefault(layer, []).append(selected_FLm)
        return made.edits

    def log_edits(self, made: Sequence[Edit], seconds: float) -> None:
        super().log_edits(made, seconds)
        failed = [edit.fact.id for edit in made if edit.stats["stop"] == "not_finite"]
        if failed:
            rank_zero_warn(f"The loss of {', '.join(failed)} is not finite; these facts stay as they were.")
        silent = sum(self._unheard[edit.fact.id] for edit in made)
        self.log("train/prompts_unheard", torch.tensor(float(silent)), batch_size=1)
        for name in ("filled", "dropped"):
            self.log(f"train/neurons_{name}", torch.tensor(float(sum(edit.stats[name] for edit in made))), batch_size=1)
        for code in sorted({code for edit in made for code in edit.stats["nll"]}):
            found = [edit.stats["nll"][code] for edit in made if code in edit.stats["nll"]]
            self.log(f"train/nll_{code}", torch.tensor(sum(found) / len(found)), batch_size=1)
        for reason, count in Counter(edit.stats["stop"] for edit in made).items():
            self.log(f"train/stopped_{reason}", torch.tensor(count / len(made)), batch_size=1)
        counts = [len(neurons) for edit in made for neurons in edit.neurons.values()]
        self.log("train/neurons_per_layer", torch.tensor(sum(counts) / len(counts)), batch_size=1)

    def more_to_report(self) -> dict[str, Any]:
        """How far languages select the same neurons, by layer; where there are enough facts to compare with."""
        found = {}
        for layer, parts in self._selected.items():
            selected_FLm = torch.cat(parts)
            if len(selected_FLm) >= max(2, selected_FLm.shape[1]):
                of_layer = overlap(selected_FLm)
                found[str(layer)] = {
                    **{"jaccard": of_layer.jaccard_LL.tolist(), "shared": of_layer.pair_LL.tolist()},
                    **{"same_fact": of_layer.same_fact, "different_facts": of_layer.different_facts},
                    "chance": of_layer.chance,
                }
        return {"overlap": {"languages": list(self._selected_in), "layers": found}} if found else {}

    @property
    def words(self) -> str:
        return "LU-LAFN" if self.settings.neurons == "located" else "random neurons"

    # ---------------------------------------------------------------- resume

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        selected = {layer: torch.cat(parts) for layer, parts in self._selected.items()}
        checkpoint["lit_llm"]["selected"] = {"languages": list(self._selected_in), "layers": selected}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        kept = checkpoint["lit_llm"]["selected"]
        self._selected_in = tuple(kept["languages"])
        self._selected = {layer: [selected_FLm] for layer, selected_FLm in kept["layers"].items()}

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "settings": repr(self.settings)}
