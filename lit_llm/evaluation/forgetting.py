"""What each language loses and gains: loss, accuracy and perplexity per language, before and after each stage.

Shapes: A languages.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_llm.storage import write_atomically


class LanguageScore(NamedTuple):
    """Scores of one language, or the mean over several.

    Attributes:
        loss: nats per token.
        accuracy: share of tokens that were the best guess, 0 to 1.
    """

    loss: float
    accuracy: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


class LanguageScores(Metric):
    """Sums of loss and of right guesses for each language, exact over batches and ranks.

    Args:
        languages: their names.
    """

    full_state_update = False
    sums_A3: Tensor

    def __init__(self, languages: Sequence[str]) -> None:
        super().__init__()
        self.languages = list(languages)
        self.add_state("sums_A3", torch.zeros(len(self.languages), 3, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, language: int, loss: Tensor, correct: Tensor, tokens: int | Tensor) -> None:
        """Add tokens of one language.

        Args:
            language: its number.
            loss: sum over the tokens of -log of their probability.
            correct: how many of them were the best guess.
            tokens: their number.
        """
        row_3 = torch.stack([torch.as_tensor(v, device=self.sums_A3.device).double() for v in (loss, correct, tokens)])
        self.sums_A3[language] += row_3

    def compute(self) -> dict[str, LanguageScore]:
        """The scores of every language that has tokens."""
        return {
            name: LanguageScore(loss / tokens, correct / tokens)
            for name, (loss, correct, tokens) in zip(self.languages, self.sums_A3.tolist(), strict=True)
            if tokens
        }


@dataclass
class ForgettingTable:
    """Scores of every language at several moments of one model's life.

    Attributes:
        groups: name -> its languages; the first group holds the original ones.
        moments: (name, language -> score), the first the model as it was.
    """

    groups: dict[str, list[str]]
    moments: list[tuple[str, dict[str, LanguageScore]]] = field(default_factory=list)

    def add(self, moment: str, scores: dict[str, LanguageScore]) -> None:
        """Append a moment, or replace one of the same name."""
        self.moments = [kept for kept in self.moments if kept[0] != moment] + [(moment, scores)]

    def mean(self, scores: dict[str, LanguageScore], group: str) -> LanguageScore | None:
        """The mean over the languages of a group, each weighing the same; None where one has no score."""
        names = self.groups[group]
        if not names or any(name not in scores for name in names):
            return None
        return LanguageScore(
            sum(scores[name].loss for name in names) / len(names),
            sum(scores[name].accuracy for name in names) / len(names),
        )

    def rows(self) -> list[tuple[str, str, list[LanguageScore | None]]]:
        """(group, language, a score for each moment), each group followed by its mean, with the language ""."""
        rows = []
        for group, names in self.groups.items():
            for name in names:
                rows.append((group, name, [scores.get(name) for _, scores in self.moments]))
            rows.append((group, "", [self.mean(scores, group) for _, scores in self.moments]))
        return rows

    def text(self) -> str:
        """A Markdown table: loss, perplexity and accuracy at every moment, and how far the loss moved from the first one."""
        head = ["language", *(name for name, _ in self.moments), "loss moved by"]
        lines = [head, ["---"] * len(head)]
        for group, name, scores in self.rows():
            first, last = scores[0] if scores else None, scores[-1] if scores else None
            moved = f"{last.loss - first.loss:+.3f}" if first and last and len(scores) > 1 else ""
            lines.append([f"{group}: {name or 'mean'}", *map(_cell, scores), moved])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_atomically(path, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> ForgettingTable:
        """Read what `write` wrote."""
        content = json.loads(path.read_text(encoding="utf-8"))
        moments = [
            (name, {language: LanguageScore(*score) for language, score in scores.items()})
            for name, scores in content["moments"]
        ]
        return cls(content["groups"], moments)


def _cell(score: LanguageScore | None) -> str:
    return "" if score is None else f"{score.loss:.3f} (ppl {score.perplexity:.4g}, acc {score.accuracy:.1%})"
