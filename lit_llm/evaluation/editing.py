"""Scores of edited facts: reliability, generality, locality and portability by several published protocols.

What is compared: reliability asks the edit prompt, generality a rephrase, portability a question one step further, each for
its answer; locality compares the predictions before and after the edit on an unrelated question.

Shapes: T target positions, Q questions, F facts, L languages.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

F1Formula = Literal["f1", "remake_product"]
ALL = "all"  # the row of facts edited in every language at once
_KINDS = {"rewrite": ("ES", "EM"), "paraphrase": ("PS", "PM"), "neighborhood": ("NS", "NM")}
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SENTENCE_END = re.compile(r"\n|[。！？।]|[.!?](?=\s|$)")
_WITHOUT_SPACES = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


def token_agreement(predicted_T: Tensor, wanted_T: Tensor, question_T: Tensor, questions: int) -> Tensor:
    """(Q,) share of equal tokens of each question; `token_em` of EasyEdit, and locality with another prediction as wanted.

    Args:
        predicted_T: best tokens at the target positions under teacher forcing.
        wanted_T: target tokens, or the predictions of the untouched model at the same positions.
        question_T: the question of each position.
        questions: Q; each has at least one position.
    """
    equal_T = (predicted_T == wanted_T).double()
    total_Q = torch.zeros(questions, dtype=torch.float64, device=equal_T.device)
    counts_Q = total_Q.index_add(0, question_T, torch.ones_like(equal_T))
    return total_Q.index_add(0, question_T, equal_T) / counts_Q


def token_f1(predicted: Sequence, wanted: Sequence, formula: F1Formula = "f1") -> float:
    """F1 between two multisets of tokens: 2PR / (P + R), 0 where nothing is shared, 1 where both are empty.

    Args:
        formula: `remake_product` is P * R, which the released script of ReMaKE prints under the name F1. The one of Bi-ZsRE is
            F1, but divides by zero where nothing is shared; here that is 0.

    Raises:
        ValueError: another formula.
    """
    if formula not in ("f1", "remake_product"):
        raise ValueError(f"formula is {formula!r}; it is f1 or remake_product.")
    if not predicted or not wanted:
        return float(len(predicted) == len(wanted))
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    precision, recall = shared / len(predicted), shared / len(wanted)
    if formula == "remake_product":
        return precision * recall
    return 0.0 if shared == 0 else 2 * precision * recall / (precision + recall)


def normalized(text: str) -> str:
    """Lower case without ASCII punctuation and English articles, white space folded."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def words(text: str) -> list[str]:
    """Words of a normalised text; of scripts that are written without spaces, the characters."""
    return _WITHOUT_SPACES.sub(lambda match: f" {match.group()} ", normalized(text)).split()


def first_sentence(text: str, wanted: str = "") -> str:
    """A generated answer up to its first line break or end of a sentence.

    Args:
        text: as written.
        wanted: the answer; what looks like an end inside of it ("12. Juli", "St. John's") may stand in the text as well, which
            is then cut at one more.
    """
    text = text.strip()
    end = _end_of_answer(text, wanted)
    return text if end is None else text[: end.start()].strip()


def is_finished(text: str, wanted: str = "") -> bool:
    """Whether `first_sentence` is the same however a generated text goes on."""
    text = text.lstrip()
    end = _end_of_answer(text, wanted)
    # a full stop at the end may be the point of a number
    return end is not None and (end.group() not in ".!?" or end.end() < len(text))


def _end_of_answer(text: str, wanted: str) -> re.Match[str] | None:
    wanted = wanted.strip()
    inside = sum(end.end() < len(wanted) for end in _SENTENCE_END.finditer(wanted))
    return next(islice(_SENTENCE_END.finditer(text), inside, None), None)


def ngram_entropy(tokens: Sequence) -> float:
    """Fluency of ROME: mean of 2/3 of the entropy of bigrams and 4/3 of that of trigrams, in bits."""
    return (2 / 3 * _entropy(tokens, 2) + 4 / 3 * _entropy(tokens, 3)) / 2


class MeanScore(Metric):
    """100 times the mean of scores between 0 and 1."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, scores: Tensor) -> None:
        """Add scores of questions, one each."""
        self.total += scores.double().sum()
        self.count += scores.numel()

    def compute(self) -> Tensor:
        """NaN where there were no questions."""
        return 100 * self.total / self.count


class TokenExactMatch(MeanScore):
    """Equal token sequences, as `text_f1_em` compares them: teacher-forced predictions with the answer's tokens."""

    def update(self, predicted: Sequence[Sequence], wanted: Sequence[Sequence]) -> None:
        """Add answers and targets, in pairs."""
        super().update(torch.tensor([float(list(p) == list(w)) for p, w in zip(predicted, wanted, strict=True)]))


class TokenF1(MeanScore):
    """F1 over tokens.

    Args:
        formula: see `token_f1`.
    """

    def __init__(self, formula: F1Formula = "f1", sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute)
        self.formula = formula

    def update(self, predicted: Sequence[Sequence], wanted: Sequence[Sequence]) -> None:
        """Add answers and targets, in pairs."""
        found = [token_f1(p, w, self.formula) for p, w in zip(predicted, wanted, strict=True)]
        super().update(torch.tensor(found, dtype=torch.float64))


class GeneratedExactMatch(MeanScore):
    """Freely generated answers that equal the target after normalisation, cut by `first_sentence`."""

    def update(self, generated: Sequence[str], wanted: Sequence[str]) -> None:
        """Add answers and targets, in pairs."""
        pairs = zip(generated, wanted, strict=True)
        super().update(torch.tensor([float(normalized(first_sentence(g, w)) == normalized(w)) for g, w in pairs]))


class GeneratedF1(MeanScore):
    """F1 over the words of freely generated answers, cut by `first_sentence`."""

    def update(self, generated: Sequence[str], wanted: Sequence[str]) -> None:
        """Add answers and targets, in pairs."""
        found = [token_f1(words(first_sentence(g, w)), words(w)) for g, w in zip(generated, wanted, strict=True)]
        super().update(torch.tensor(found, dtype=torch.float64))


class CounterFact(Metric):
    """Scores of ROME and MEMIT from the negative log-likelihood per token of the new and the true object.

    `compute` gives ES, PS, NS (shares in percent), EM, PM, NM (differences of probabilities in percent) and `score`, the
    harmonic mean of the first three. Prompts of one fact are averaged first.
    """

    is_differentiable = False
    full_state_update = False

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        for kind in _KINDS:
            self.add_state(f"{kind}_totals", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_facts", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, kind: Literal["rewrite", "paraphrase", "neighborhood"], new_Q: Tensor, true_Q: Tensor) -> None:
        """Add the prompts of one kind of one fact.

        Args:
            kind: `rewrite` and `paraphrase` want the new object, `neighborhood` the true one.
            new_Q: mean negative log-likelihood per token of the new object.
            true_Q: of the true object.

        Raises:
            ValueError: another kind, or no prompts.
        """
        if kind not in _KINDS or new_Q.numel() == 0:
            raise ValueError(f"{new_Q.numel()} prompts of the kind {kind!r}; give some, of {', '.join(_KINDS)}.")
        new_Q, true_Q = new_Q.double(), true_Q.double()
        better_Q, worse_Q = (true_Q, new_Q) if kind == "neighborhood" else (new_Q, true_Q)
        success = (better_Q < worse_Q).double().mean()
        magnitude = ((-better_Q).exp() - (-worse_Q).exp()).mean()
        totals = getattr(self, f"{kind}_totals") + torch.stack([success, magnitude])
        setattr(self, f"{kind}_totals", totals)
        setattr(self, f"{kind}_facts", getattr(self, f"{kind}_facts") + 1)

    def compute(self) -> dict[str, Tensor]:
        scores = {}
        for kind, names in _KINDS.items():
            means = 100 * getattr(self, f"{kind}_totals") / getattr(self, f"{kind}_facts")
            scores |= dict(zip(names, means, strict=True))
        shares = torch.stack([scores[name] for name in ("ES", "PS", "NS")])
        return {**scores, "score": 3 / (1 / shares).sum()}


class EditMatrix(Metric):
    """Scores by the language of the edit and the language of the question, in percent.

    `compute` gives `matrix` ((1 + L) x L: edited in each language, and in all at once; NaN where nothing was asked),
    `same_language` and `cross_language` (means on and off the diagonal), `row_means` and `column_means` of the L x L part.

    Args:
        languages: names of rows and columns; rows may also be "all".

    Raises:
        ValueError: a name twice, or a language called "all".
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, languages: Sequence[str], sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        if len(set(languages)) != len(languages) or ALL in languages:
            raise ValueError(
                f"The languages of a matrix are {list(languages)}; each stands there once, and none is {ALL!r}."
            )
        self.languages = list(languages)
        shape = (len(languages) + 1, len(languages))
        self.add_state("totals", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, edited: str, asked: str, scores: Tensor) -> None:
        """Add scores between 0 and 1 of questions in `asked` about facts edited in `edited`.

        Raises:
            ValueError: a language that the matrix does not have.
        """
        rows = [*self.languages, ALL]
        if edited not in rows or asked not in self.languages:
            raise ValueError(f"Edited in {edited!r}, asked in {asked!r}, but the matrix has {', '.join(rows)}.")
        place = rows.index(edited), self.languages.index(asked)
        self.totals[place] += scores.double().sum()
        self.counts[place] += scores.numel()

    def compute(self) -> dict[str, Tensor]:
        matrix = 100 * self.totals / self.counts
        square = matrix[:-1]
        diagonal = torch.eye(len(square), dtype=torch.bool, device=square.device)
        return {
            "matrix": matrix,
            "same_language": square[diagonal].mean(),
            "cross_language": square[~diagonal].mean(),
            "row_means": square.mean(1),
            "column_means": square.mean(0),
        }


def _entropy(tokens: Sequence, size: int) -> float:
    counts = Counter(tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) + 0.0
