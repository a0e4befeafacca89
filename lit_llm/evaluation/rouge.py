"""Scores of generated answers against references."""

from __future__ import annotations

import string
from abc import abstractmethod

import torch
from torch import Tensor
from torchmetrics import Metric


class _MeanScore(Metric):
    """100 times the mean of a score per answer, the best over its references."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predictions: list[str], references: list[list[str]]) -> None:
        """Add answers; every answer has at least one reference.

        Raises:
            ValueError: numbers that differ, or an answer without references.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} answers, but references of {len(references)}; they go in pairs.")
        for prediction, accepted in zip(predictions, references, strict=True):
            if not accepted:
                raise ValueError(f"The answer {prediction[:60]!r} has no reference to be compared with.")
            self.total += max(self.score(prediction, reference) for reference in accepted)
        self.count += len(predictions)

    def compute(self) -> Tensor:
        return 100 * self.total / self.count.clamp(min=1)

    @abstractmethod
    def score(self, prediction: str, reference: str) -> float:
        """Of one answer against one reference, 0 to 1."""


class RougeL(_MeanScore):
    """ROUGE-L F1 with Porter stemming, as in the evaluation of arXiv 2406.17328."""

    def __init__(self, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute)
        from rouge_score.rouge_scorer import RougeScorer

        self.scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def score(self, prediction: str, reference: str) -> float:
        """F1 between 0 and 1."""
        return self.scorer.score(reference, prediction)["rougeL"].fmeasure


class ExactMatch(_MeanScore):
    """Equal after lower-casing, removing ASCII punctuation and folding white space."""

    def score(self, prediction: str, reference: str) -> float:
        """1 or 0."""
        return float(_plain(prediction) == _plain(reference))


def _plain(text: str) -> str:
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())
