"""What all editors of facts share: a frozen model, groups of facts instead of steps, questions before and after, undo."""

from __future__ import annotations

import time
import warnings
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lit_llm.data.edit_batch import KINDS, EditBatch, Kind, QuestionBatch
from lit_llm.data.facts import Facts
from lit_llm.editing.deltas import Edit, EditSet
from lit_llm.editing.triggers import Trigger
from lit_llm.evaluation.samples import Sample
from lit_llm.methods.answers import Generation, check_greedy
from lit_llm.methods.base import Method
from lit_llm.methods.edit_scores import EditScores, Question, mean_nll
from lit_llm.methods.edited_answers import Asking, Name, Said, known_already
from lit_llm.methods.edited_facts import EditedFact, edited_facts
from lit_llm.methods.edited_model import EDITS_FILE, EditedModel
from lit_llm.models.language_model import ModelSpec
from lit_llm.models.quantization import keep_base_out_of_checkpoints
from lit_llm.models.weights import model_hash

ALL = "all"


class Editing(Method):
    """Changes facts that a model states, a group of facts at a time; the model itself is frozen.

    A training batch is a group of facts, and writing their edits is one optimizer step. Facts whose new answer the model gives
    already, in every language that is edited, are skipped and counted (`already_known`). Checkpoints hold edits alone.
    Validation and test ask questions about all facts of the data, under the edits that are there: reliability (the prompt
    itself), generality (rephrased), portability (one step further), each for its answer; locality compares what is said of
    unrelated questions with what the untouched model says. Unrelated questions that are themselves edited in the same run
    are not asked.

    Subclasses compute the edits of a group (`compute`).

    Args:
        student: the model.
        generation: answers written freely, to the questions about the first `prompts` facts (`test_prompts` in a test), up to
            four tokens more than the wanted ones have, and never fewer than these. They are greedy.
        edited_in: languages in which facts are edited; they are asked in all of `data.languages`. None: in all.
        crossed: kinds of questions whose matrix is measured: every fact is also edited in each language alone, beside the
            edit of all languages, and asked in every language. Editing then takes about twice as long.
        replace: what happens where a fact is edited already: the new edit takes its place, or the run is refused.
        single: each fact is edited in the untouched model and asked under its own edit alone, as published tables of Bi-ZsRE,
            MzsRE, zsRE and CounterFact have it; otherwise all edits of the run are there together.
        trigger: when cached edits act.
    """

    data_classes = (Facts,)
    compiles_loss = False

    def __init__(
        self,
        student: ModelSpec,
        generation: Generation = Generation(max_new_tokens=16),
        edited_in: Optional[list[str]] = None,
        crossed: Optional[list[Kind]] = None,
        replace: bool = False,
        single: bool = False,
        trigger: Trigger = Trigger(),
    ) -> None:
        if student.lora is not None:
            raise ValueError(
                "model.student.lora is set, but edits change a model's down projections themselves. Leave lora out; for a model "
                "with adapters name its folder as model.student.source, and they are merged."
            )
        if crossed and edited_in is not None:
            raise ValueError(
                f"model.crossed is {crossed}, which edits in each language by turns, but model.edited_in is {edited_in}. Keep one."
            )
        if single and replace:
            raise ValueError(
                "model.replace is true, but with model.single every fact is edited in the untouched model, so there is no "
                "earlier edit to replace. Leave replace out."
            )
        if trigger.scope == "oracle" and not single:
            raise ValueError(
                "model.trigger.scope is 'oracle', which lets an edit act on every text, but the edits of a run are there together. "
                "Set model.single: true, or another scope."
            )
        check_greedy(generation)
        super().__init__(student, generation=generation)
        self.automatic_optimization = False
        self.edited_in, self.crossed, self.replace, self.trigger = edited_in, list(crossed or []), replace, trigger
        self.single = single
        self.written = nn.Parameter(torch.zeros(()), requires_grad=False)  # facts that are edited
        self.model: EditedModel | None = None
        self.edits: EditSet | None = None
        self.alone: dict[str, EditSet] = {}
        self.edit_report: dict[str, Any] | None = None
        self._scores: EditScores | None = None
        self._untouched: dict[Name, Said] = {}
        self._asked_already: set[str] = set()
        self._seconds: list[float] = []
        self.already_known: list[str] = []

    @abstractmethod
    def compute(self, facts: Sequence[EditedFact], edits: EditSet, name: str) -> list[Edit]:
        """The edits of a group of facts; the model is left as it was.

        Args:
            facts: of the group.
            edits: earlier ones, over which these are made.
            name: of `edits`: `all`, or the language in which alone they are made.
        """

    # ---------------------------------------------------------------- models

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.trainer.world_size > 1:
            raise ValueError(
                f"{type(self).__name__} runs in one process, but trainer.devices asks for {self.trainer.world_size}. Set "
                f"trainer.devices: 1; a group of facts is edited at once anyway (data.batch_size)."
            )
        if "mixed" in self.trainer.precision:
            raise ValueError(
                f"trainer.precision is {self.trainer.precision}, which keeps weights that are trained in single precision, but "
                f"{type(self).__name__} trains none. Set trainer.precision: bf16-true, which halves the model and computes edits "
                f"in single precision, or 32-true."
            )

    def configure_model(self) -> None:
        if self.student is not None:
            return
        super().configure_model()
        self.student.requires_grad_(False).eval()
        keep_base_out_of_checkpoints(self.student)
        self.model = EditedModel(self.student, self.trigger)
        self.edits = EditSet(self.model.digest, apart=self.single)
        languages = self._data_languages() if self.crossed and self._trainer is not None else []
        self.alone = {language: EditSet(self.model.digest, apart=self.single) for language in languages}

    def train(self, mode: bool = True) -> Editing:
        """The student stays in eval mode: dropout would change what is edited."""
        super().train(mode)
        if self.student is not None:
            self.student.eval()
        return self

    def _data_languages(self) -> list[str]:
        given = self.trainer.datamodule.languages
        if given is None:
            raise ValueError(
                f"model.crossed is {self.crossed}, but data.languages is not set, so facts may differ in their languages. Name "
                f"the languages, or leave crossed out."
            )
        return list(given)

    def configure_optimizers(self):
        return torch.optim.SGD([self.written], lr=0.0)  # only counts groups; edits are optimised in `compute`

    # -------------------------------------------------------------- training

    def on_fit_start(self) -> None:
        # checkpoints do hold what a group has written; the model is in eval mode on purpose
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        self._check_known()
        if self.trainer.max_epochs != 1:
            raise ValueError(
                f"trainer.max_epochs is {self.trainer.max_epochs}, but a fact is edited once. Set trainer.max_epochs: 1."
            )

    def _check_known(self) -> None:
        """Whether the facts were chosen for this model."""
        listed, source = self.trainer.datamodule.known_list, self.student_spec.source
        if listed is None or listed.get("model") == source or listed["model_hash"] == model_hash(self.student):
            return
        rank_zero_warn(
            f"data.known ({self.trainer.datamodule.known}) lists what {listed.get('model', listed['model_hash'])} knows, but "
            f"{source} is edited, which may not know these facts. Ask it: python tools/known_facts.py {source} --to known.json"
        )

    def training_step(self, batch: EditBatch, batch_idx: int) -> None:
        start = time.perf_counter()
        facts = self._unknown(edited_facts(batch), batch)
        if facts:
            self._edit(facts, start)
        self.log("train/already_known", float(len(self.already_known)), batch_size=1)
        self.written += len(facts)
        self.optimizers().step()

    def _unknown(self, facts: Sequence[EditedFact], batch: EditBatch) -> list[EditedFact]:
        """The facts whose new answer the model does not give already."""
        self._check_languages(facts)
        known = known_already(self.model, self._under(self.edits), batch, self.edited_in)
        self.already_known += [fact.edit.id for number, fact in enumerate(facts) if number in known]
        return [fact for number, fact in enumerate(facts) if number not in known]

    def _edit(self, facts: Sequence[EditedFact], start: float) -> None:
        kept = facts if self.edited_in is None else [fact.within(self.edited_in) for fact in facts]
        made = self._write(self.edits, kept, ALL)
        seconds = time.perf_counter() - start
        self._seconds += [seconds / len(facts)] * len(facts)
        self.log_edits(made, seconds)
        for language, edits in self.alone.items():
            self._write(edits, [fact.within([language]) for fact in facts], language)

    def _write(self, edits: EditSet, facts: Sequence[EditedFact], name: str) -> list[Edit]:
        """All edits of the group, or none."""
        groups = [facts] if self.together else [[fact] for fact in facts]
        made = [edit for group in groups for edit in self.compute(group, self._under(edits, group), name)]
        grown = edits.copy()
        for edit in made:
            grown.add(edit, replace=self.replace)
        for edit in made:
            edits.add(edit, replace=self.replace)
        return made

    @property
    def together(self) -> bool:
        """Whether the facts of a group are edited in one call of `compute`."""
        return not self.single

    def _under(self, edits: EditSet, facts: Sequence[EditedFact] = ()) -> EditSet:
        """The edits over which those of some facts are made: not the ones whose place they take."""
        if self.single:
            return EditSet(edits.base)
        kept = [edit for edit in edits if not (self.replace and any(edit.fact.is_same_question(f.text) for f in facts))]
        return edits if len(kept) == len(edits) else EditSet(edits.base, kept)

    def _check_languages(self, facts: Sequence[EditedFact]) -> None:
        missing = [code for code in self.edited_in or () for fact in facts if code not in fact.languages]
        if missing:
            raise ValueError(
                f"model.edited_in names {missing[0]}, but facts of the data are in {', '.join(facts[0].languages)}. Correct it, "
                f"or data.languages."
            )

    def log_edits(self, made: Sequence[Edit], seconds: float) -> None:
        """Log what a group has cost, and the means of the numbers in the edits' stats."""
        values = {"seconds_per_fact": seconds / len(made)}
        for name in ("loss", "steps"):
            found = [edit.stats[name] for edit in made if name in edit.stats]
            if found:
                values[name] = sum(found) / len(found)
        for name, value in values.items():
            self.log(f"train/{name}", torch.tensor(float(value)), batch_size=1)

    # ------------------------------------------------------------ evaluation

    def validation_step(self, batch: QuestionBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val", self.generation.prompts)

    def test_step(self, batch: QuestionBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test", self.generation.test_prompts)

    def _evaluate(self, batch: QuestionBatch, stage: str, freely: int | None) -> None:
        if self._scores is None:
            self._scores = EditScores(batch.languages, self.crossed if len(self.edits) else ())
            self._asked_already = set() if self.single else self._edited_prompts(stage)
        wanted = [
            row
            for row, kind in enumerate(batch.kind_R.tolist())
            if KINDS[kind] != "locality" or batch.prompts[row] not in self._asked_already
        ]
        kept, rivals = ([row for row in wanted if bool(batch.rival_R[row]) == rival] for rival in (False, True))
        free = {row for row in kept if freely is None or batch.examples[batch.fact_R[row]] < freely}
        asking = Asking(self.model, self._untouched, self.generation, batch)
        asked = self._asked(asking, self.edits, kept, free)
        self._scores.add(asked)
        self._scores.compare(asked, self._asked(asking, self.edits, rivals, set()))
        for language, edits in self.alone.items():
            rows = [row for row in kept if KINDS[batch.kind_R[row]] in self.crossed and len(edits)]
            self._scores.add_crossed(language, self._asked(asking, edits, rows, free))
        self.log(f"{stage}/loss", mean_nll(asked), batch_size=len(batch.ids))

    def _asked(self, asking: Asking, edits: EditSet, rows: Sequence[int], free: set[int]) -> list[Question]:
        """The questions of some rows, under all edits or, for `single`, each under the edit of its own fact."""
        if not self.single or not len(edits):
            return asking.questions(edits, rows, free & set(rows))
        found = []
        for number, fact in enumerate(asking.batch.ids):
            own = [row for row in rows if asking.batch.fact_R[row] == number]
            kept = EditSet(edits.base, [edit for edit in edits if edit.fact.id == fact])
            if self.trigger.scope == "oracle":
                unrelated = [row for row in own if KINDS[asking.batch.kind_R[row]] == "locality"]
                found += asking.questions(EditSet(edits.base), unrelated, free & set(unrelated))
                own = [row for row in own if row not in unrelated]
            found += asking.questions(kept, own, free & set(own))
        return found

    def _edited_prompts(self, stage: str) -> set[str]:
        asked = self.trainer.datamodule.sets["validation" if stage == "val" else "test"]
        return {row.prompt for rows in asked.questions for row in rows if row.kind == "reliability"}

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _finish(self, stage: str) -> None:
        if self._scores is None:
            return
        scores, self._scores = self._scores, None
        if self.trainer.sanity_checking:
            return
        report = scores.report()
        for kind, by_language in report["scores"].items():
            for language, by_protocol in by_language.items():
                of_language = "" if language == ALL else f"_{language}"
                main = "generated" if "generated" in by_protocol else "exact"
                self.log(f"{stage}/{kind}{of_language}", by_protocol[main], batch_size=1)
                if language == ALL:
                    for name, value in by_protocol.items():
                        self.log(f"{stage}/{kind}_{name}", value, batch_size=1)
        for name, value in report["counterfact"].get(ALL, {}).items():
            self.log(f"{stage}/counterfact_{name}", value, batch_size=1)
        for name, value in report["trigger"].items():
            self.log(f"{stage}/trigger/{name}", value, batch_size=1)
        self.edit_report = {**report, "facts": len(self.edits), "already_known": self.already_known}
        self.edit_report |= {"method": self.words, "single": self.single, **self.more_to_report()}
        if self._seconds:
            self.edit_report["seconds_per_fact"] = sum(self._seconds) / len(self._seconds)
        shown = [q for q in scores.asked if q.said is not None and q.kind != "locality"][: self.generation.shown]
        self.samples = [
            Sample(q.prompt, q.wanted_said, {"start": q.said_before or "", "student": q.said}) for q in shown
        ]

    def more_to_report(self) -> dict[str, Any]:
        """What a method adds to the report of an evaluation."""
        return {}

    @property
    def words(self) -> str:
        """What tables call this run."""
        return type(self).__name__

    def predict_step(self, batch: list, batch_idx: int) -> list[dict[str, Any]]:
        if self.single:
            raise ValueError(
                "model.single is true, so a question is asked under the edit of its own fact alone, and what predict answers is "
                "about no fact. Set model.single: false to answer under all edits, or use validate or test."
            )
        with self.model.under(self.edits):
            return super().predict_step(batch, batch_idx)

    # ---------------------------------------------------------------- result

    @property
    def exports(self) -> dict[str, Any]:
        """The file of edits; and, where they are changes of weights, the edited model as a plain folder.

        Changes of weights that were each made alone are no edits of one model, so of these only scores are left.
        """
        if self.single and self.edits.of_weights:
            rank_zero_info(
                "model.single is true: each change of the weights was made alone, so no edited model is written."
            )
            return {}
        if (pair := self.edits.contradiction()) is not None:
            rank_zero_info(
                f"model.single is true, and edits of this run contradict each other ({pair[0].fact.id!r} and "
                f"{pair[1].fact.id!r} are of one subject and relation), so no {EDITS_FILE} is written."
            )
            return {}
        if self.edits.cached:
            rank_zero_info(
                f"{len(self.edits.cached)} edits are cached values beside the model, so no model/ is written. {EDITS_FILE} acts "
                f"on the base: python -m lit_llm ask --model {self.student_spec.source} --edits {self.run_folder / EDITS_FILE}; "
                f"bake instead of ask writes it into weights, which then also act on other texts."
            )
            return {EDITS_FILE: EditSet(self.edits.base, list(self.edits)).save if self.single else self.edits.save}
        return {EDITS_FILE: self.edits.save, "model": self.export}

    def export(self, folder: Path) -> None:
        """Write the edited model as a plain Hugging Face folder.

        Raises:
            ValueError: see `EditedModel.save`.
        """
        self.model.save(list(self.edits), folder)

    # ---------------------------------------------------------------- resume

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        sets = {ALL: self.edits, **self.alone}
        checkpoint["lit_llm"]["edits"] = {name: list(edits.state()) for name, edits in sets.items()}
        checkpoint["lit_llm"]["seconds"] = self._seconds
        checkpoint["lit_llm"]["already_known"] = self.already_known

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        sets = {name: EditSet.from_state(state) for name, state in checkpoint["lit_llm"]["edits"].items()}
        self.edits, self.alone = sets.pop(ALL), sets
        self._seconds = list(checkpoint["lit_llm"]["seconds"])
        self.already_known = list(checkpoint["lit_llm"].get("already_known", []))

    def identity(self) -> dict[str, Any]:
        digest = None if self.model is None else self.model.digest
        return {
            **super().identity(),
            "base": digest,
            "edited_in": self.edited_in,
            "crossed": self.crossed,
            "single": self.single,
        }
