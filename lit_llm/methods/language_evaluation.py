"""Evaluation by language: what a method with one model logs, and the table of what was forgotten.

Shapes: T supervised tokens, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_llm.data.batch import LanguageBatch
from lit_llm.evaluation.forgetting import ForgettingTable, LanguageScore, LanguageScores
from lit_llm.losses.fused_head import HeadTerms, cross_entropy

if TYPE_CHECKING:
    from lit_llm.methods.base import Method

FILE = "forgetting.json"


class LanguageEvaluation:
    """Scores every language over an evaluation and keeps the forgetting table of the run.

    Args:
        method: whose student is evaluated; its data is `Languages`.
        words: what its run is called in the table.
        source: of the student; a run folder's model brings the table of that run along.

    Attributes:
        table: moments of earlier stages, the start of this run, and its latest validation.
    """

    def __init__(self, method: Method, words: str, source: str | None) -> None:
        self.method, self.words = method, words
        data = method.trainer.datamodule
        self.groups = {name: list(members) for name, members in data.groups.items()}
        self.languages = list(data.languages)
        before = Path(source).resolve().parent / FILE if source is not None and Path(source).is_dir() else None
        earlier = ForgettingTable.read(before).moments if before is not None and before.is_file() else []
        self.table = ForgettingTable(self.groups, earlier)
        self._num_earlier = len(earlier)
        self._scores: LanguageScores | None = None

    def add(self, batch: LanguageBatch, hidden_TD: Tensor) -> HeadTerms:
        """Add a batch, and give the sums over all its tokens."""
        head, loss, correct = self.method.student.head, 0.0, 0
        if self._scores is None:
            self._scores = LanguageScores(self.languages).to(hidden_TD.device)
        for language in batch.language_T.unique().tolist():
            rows_T = batch.language_T == language
            target_T = batch.student.target_T[rows_T]
            terms = cross_entropy(hidden_TD[rows_T], head, target_T, chunk_size=self.method.loss_chunk)
            self._scores.update(language, terms.loss.detach(), terms.correct, terms.tokens)
            loss, correct = loss + terms.loss, correct + terms.correct
        return HeadTerms(loss, len(batch.language_T), loss, correct)

    def finish(self, stage: str) -> dict[str, Any] | None:
        """Log the scores of an evaluation that has ended, and give what the callbacks write of it.

        A validation becomes a moment of the table.
        """
        if self._scores is None:
            return None
        scores, method = self._scores.compute(), self.method
        self._scores = None
        if method.trainer.sanity_checking:
            return None
        for name, score in {**scores, **self._means(scores)}.items():
            for kind in ("loss", "accuracy", "perplexity"):
                method.log(f"{stage}/{kind}_{name}", getattr(score, kind), batch_size=1)
        table = self.table
        if stage == "val" and method.trainer.state.fn == "fit":
            self._remember(scores)
        else:
            table = ForgettingTable(self.groups, [(stage, scores)])
        rank_zero_info("\n" + table.text())
        moments = [[name, {key: list(value) for key, value in found.items()}] for name, found in table.moments]
        return {"groups": self.groups, "languages": self.languages, "moments": moments, "table": table.text()}

    def state(self) -> list[Any]:
        """The table's moments, for a checkpoint."""
        return [[name, {key: list(value) for key, value in scores.items()}] for name, scores in self.table.moments]

    def load_state(self, moments: list[Any]) -> None:
        """Go on with the moments of a checkpoint."""
        self.table.moments = [
            (name, {key: LanguageScore(*value) for key, value in scores.items()}) for name, scores in moments
        ]

    def _means(self, scores: dict[str, LanguageScore]) -> dict[str, LanguageScore]:
        means = {group: self.table.mean(scores, group) for group in self.groups}
        return {group: mean for group, mean in means.items() if mean is not None and group not in scores}

    def _remember(self, scores: dict[str, LanguageScore]) -> None:
        step, moments = self.method.global_step, self.table.moments
        start = f"{self.words}, start" if self._num_earlier else "start"
        kept = [m for number, m in enumerate(moments) if number < self._num_earlier or (step and m[0] == start)]
        self.table.moments = [*kept, (f"{self.words}, step {step}" if step else start, scores)]
        path = self.method.run_folder / FILE  # on every rank: finding the folder may communicate
        if self.method.trainer.is_global_zero:
            self.table.write(path)
