"""What questions about edited facts are scored with, by kind and language, and the report made of it.

Shapes: Q questions, T answer tokens of all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lit_llm.data.edit_batch import KINDS, Kind
from lit_llm.editing.edit_cache import Firing
from lit_llm.evaluation.editing import (
    CounterFact,
    EditMatrix,
    GeneratedExactMatch,
    GeneratedF1,
    MeanScore,
    TokenExactMatch,
    TokenF1,
    first_sentence,
    normalized,
)

PROTOCOLS = {"generated": "written freely", "generated_f1": "F1 of words written freely"}
_OF_COUNTERFACT = {"reliability": "rewrite", "generality": "paraphrase", "locality": "neighborhood"}
PROTOCOLS |= {"tokens": "tokens, teacher-forced", "exact": "all tokens, teacher-forced", "f1": "F1, teacher-forced"}


@dataclass(frozen=True)
class Question:
    """One question with what the model says, and what it should say.

    Attributes:
        fact: id of the edited fact.
        kind: what it tests.
        language: code.
        prompt: as asked.
        answer: the data's answer.
        predicted: best tokens at the answer's positions, the answer's earlier tokens given.
        wanted: the answer's tokens; for locality the untouched model's predictions.
        said: what is written freely, up to its first sentence; None: not asked for.
        nll: mean negative log-likelihood of the answer per token.
        wanted_said: the answer; for locality what the untouched model writes.
        said_before: what the untouched model writes.
        firing: what the trigger did; None where there are no cached edits.
    """

    fact: str
    kind: Kind
    language: str
    prompt: str
    answer: str
    predicted: tuple[int, ...]
    wanted: tuple[int, ...]
    nll: float
    said: str | None = None
    wanted_said: str | None = None
    said_before: str | None = None
    firing: Firing | None = None

    @property
    def right(self) -> dict[str, float]:
        """1 or 0 by each protocol that was asked for: all tokens under teacher forcing, and what is written freely."""
        found = {"exact": float(self.predicted == self.wanted)}
        if self.said is not None:
            said = first_sentence(self.said, self.wanted_said)
            found["generated"] = float(normalized(said) == normalized(self.wanted_said))
        return found


def mean_nll(questions: Sequence[Question]) -> float:
    """Mean over the edited prompts of the new answer's negative log-likelihood per token; NaN where none was asked."""
    found = [question.nll for question in questions if question.kind == "reliability"]
    return sum(found) / len(found) if found else float("nan")


class EditScores:
    """Scores of questions by kind and language, and matrices over the language of the edit.

    Args:
        languages: of the data.
        crossed: kinds with matrices.

    Attributes:
        matrices: kind -> protocol -> matrix; `exact` of all questions, `generated` of those that are answered freely.
    """

    def __init__(self, languages: Sequence[str], crossed: Sequence[Kind] = ()) -> None:
        self.languages = list(languages)
        self._scores: dict[tuple[Kind, str], dict[str, MeanScore]] = {}
        self.matrices = {
            kind: {protocol: EditMatrix(self.languages, sync_on_compute=False) for protocol in ("generated", "exact")}
            for kind in crossed
        }
        self._counterfact: dict[str, CounterFact] = {}
        self._trigger: Counter[str] = Counter()
        self.asked: list[Question] = []

    def add(self, questions: Sequence[Question]) -> None:
        """Add questions asked under the edits of all languages."""
        for question in questions:
            metrics = self._scores.setdefault((question.kind, question.language), _metrics())
            self._update(metrics, question)
            if question.firing is not None:
                self._trigger[_what_happened(question)] += 1
        self.add_crossed("all", questions)
        self.asked += questions

    def compare(self, questions: Sequence[Question], rivals: Sequence[Question]) -> None:
        """Add the likelihoods of answers beside those of their rivals, all of some facts: the same questions, answered otherwise."""
        own = {(q.fact, q.kind, q.language, q.prompt): q.nll for q in questions}
        pairs: dict[tuple[str, Kind, str], list[tuple[float, float]]] = {}
        for rival in rivals:
            nll = own[rival.fact, rival.kind, rival.language, rival.prompt]
            new_and_true = (rival.nll, nll) if rival.kind == "locality" else (nll, rival.nll)
            pairs.setdefault((rival.fact, rival.kind, rival.language), []).append(new_and_true)
        for (_, kind, language), found in pairs.items():
            new_Q, true_Q = torch.tensor(found, dtype=torch.float64).unbind(1)
            metric = self._counterfact.setdefault(language, CounterFact(sync_on_compute=False))
            metric.update(_OF_COUNTERFACT[kind], new_Q, true_Q)

    def add_crossed(self, edited: str, questions: Sequence[Question]) -> None:
        """Add questions asked under the edits of one language to the matrices."""
        for question in questions:
            if of_kind := self.matrices.get(question.kind):
                for protocol, right in question.right.items():
                    of_kind[protocol].update(edited, question.language, torch.tensor([right]))

    def _update(self, metrics: dict[str, MeanScore], question: Question) -> None:
        pair = [list(question.predicted)], [list(question.wanted)]
        equal = [float(a == b) for a, b in zip(question.predicted, question.wanted, strict=True)]
        metrics["tokens"].update(torch.tensor([sum(equal) / len(equal)]))
        metrics["exact"].update(*pair)
        metrics["f1"].update(*pair)
        if question.said is not None:
            said = [question.said], [question.wanted_said]
            metrics["generated"].update(*said)
            metrics["generated_f1"].update(*said)

    def compute(self) -> dict[Kind, dict[str, dict[str, float]]]:
        """kind -> language -> protocol -> percent, `all` among the languages for the mean over them."""
        found: dict[Kind, dict[str, dict[str, float]]] = {}
        for kind in KINDS:
            by_language = {}
            for language in self.languages:
                if (kind, language) in self._scores:
                    metrics = self._scores[kind, language]
                    by_language[language] = {
                        name: metric.compute().item() for name, metric in metrics.items() if metric.count > 0
                    }
            if by_language:
                found[kind] = {**by_language, "all": _mean(list(by_language.values()))}
        return found

    def counterfact(self) -> dict[str, dict[str, float]]:
        """language -> CounterFact's scores, `all` among the languages for the mean over them; empty without rivals."""
        found = {code: self._counterfact[code].compute() for code in self.languages if code in self._counterfact}
        scores = {
            code: {name: value.item() for name, value in of_code.items() if value.isfinite()}
            for code, of_code in found.items()
        }
        return {**scores, "all": _mean(list(scores.values()))} if scores else {}

    def trigger(self) -> dict[str, float]:
        """Shares of questions in percent: which of the subject's were caught, missed or taken for another fact's, and which
        unrelated ones were edited. Empty without cached edits.
        """
        shares = {}
        for group, events in (
            ("about", ("hit", "miss", "wrong")),
            ("unrelated", ("unrelated_edited", "unrelated_left")),
        ):
            total = sum(self._trigger[event] for event in events)
            if total:
                kept = events if group == "about" else events[:1]
                shares |= {event: 100 * self._trigger[event] / total for event in kept}
        return shares

    def report(self) -> dict[str, Any]:
        """Everything, for the callbacks that write it; see `callbacks.edit_lines`."""
        matrices = {
            kind: {
                protocol: {"rows": [*self.languages, "all"], **_matrix(matrix)}
                for protocol, matrix in of_kind.items()
                if matrix.counts.any()
            }
            for kind, of_kind in self.matrices.items()
        }
        return {
            "languages": self.languages,
            "scores": self.compute(),
            "counterfact": self.counterfact(),
            "matrices": matrices,
            "trigger": self.trigger(),
            "answers": [
                {
                    **{"fact": q.fact, "kind": q.kind, "language": q.language, "prompt": q.prompt},
                    **{
                        "wanted": q.wanted_said,
                        "before": q.said_before,
                        "after": q.said,
                        "right": bool(q.right["generated"]),
                    },
                }
                for q in self.asked
                if q.said is not None
            ],
        }


def _metrics() -> dict[str, MeanScore]:
    made = {"tokens": MeanScore, "exact": TokenExactMatch, "f1": TokenF1}
    made |= {"generated": GeneratedExactMatch, "generated_f1": GeneratedF1}
    return {name: kind(sync_on_compute=False) for name, kind in made.items()}


def _matrix(matrix: EditMatrix) -> dict[str, Any]:
    found = matrix.compute()
    return {"values": found["matrix"].tolist()} | {
        f"{name}_language": found[f"{name}_language"].item() for name in ("same", "cross")
    }


def _mean(scores: list[dict[str, float]]) -> dict[str, float]:
    names = {name: None for score in scores for name in score}
    return {name: sum(s[name] for s in scores if name in s) / sum(name in s for s in scores) for name in names}


def _what_happened(question: Question) -> str:
    acting = question.firing.edit
    if question.kind == "locality":
        return "unrelated_left" if acting is None else "unrelated_edited"
    return "miss" if acting is None else "hit" if acting == question.fact else "wrong"
