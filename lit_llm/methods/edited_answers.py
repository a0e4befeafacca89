"""Questions about edited facts, put to a model under some edits.

Shapes: R rows of a batch, L padded positions, T answer tokens of some rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lit_llm.data.batch import TokenBatch
from lit_llm.data.edit_batch import KINDS, QuestionBatch
from lit_llm.editing.deltas import EditSet
from lit_llm.editing.edit_cache import Firing
from lit_llm.evaluation.editing import first_sentence
from lit_llm.losses.token_log_probs import token_log_probs
from lit_llm.methods.answers import Generation
from lit_llm.methods.edit_scores import Question
from lit_llm.methods.edited_model import EditedModel, fired

_MORE_TOKENS = 4  # than the longest wanted answer has, for one that is written freely
_HEAD_ROWS = 256  # positions whose logits exist at a time


class Said(NamedTuple):
    """What a model says to one question.

    Attributes:
        predicted: best tokens at the answer's positions, the answer's earlier tokens given.
        text: what it writes freely; None: not asked for.
        nll: mean negative log-likelihood of the answer per token.
        firing: what the trigger did; None where there are no cached edits.
    """

    predicted: tuple[int, ...]
    text: str | None
    nll: float
    firing: Firing | None = None


class Asking:
    """Puts the questions of a batch to a model.

    Args:
        model: the model.
        untouched: (prompt, answer) -> what it says without edits; filled on the way, so that it is asked once.
        generation: of answers that are written freely.
        batch: the questions.

    Attributes:
        loss: mean negative log-likelihood, per token of an answer, of the new answers to the prompts themselves, of the
            latest `questions`; NaN where none was asked.
    """

    def __init__(
        self, model: EditedModel, untouched: dict[tuple[str, str], Said], generation: Generation, batch: QuestionBatch
    ) -> None:
        self.model, self.batch, self._untouched, self._generation = model, batch, untouched, generation
        self.loss = float("nan")
        self._answers: list[list[int]] = [[] for _ in batch.prompts]
        for row, target in zip(batch.rows.sequence_T.tolist(), batch.rows.target_T.tolist(), strict=True):
            self._answers[row].append(target)

    def questions(self, edits: EditSet, rows: Sequence[int], free: set[int]) -> list[Question]:
        """What the model says to these rows under some edits.

        Args:
            edits: none of them: the untouched model.
            rows: of the batch.
            free: rows that are also answered freely.
        """
        before = self._before(rows, free)
        now = self._said(edits, rows, free) if len(edits) else before
        about = [said.nll for row, said in zip(rows, now, strict=True) if self._kind(row) == "reliability"]
        self.loss = sum(about) / len(about) if about else float("nan")
        return [self._question(*parts) for parts in zip(rows, now, before, strict=True)]

    def _kind(self, row: int) -> str:
        return KINDS[self.batch.kind_R[row]]

    def _question(self, row: int, now: Said, before: Said) -> Question:
        batch, kind = self.batch, self._kind(row)
        is_locality = kind == "locality"
        return Question(
            fact=batch.ids[batch.fact_R[row]],
            kind=kind,
            language=batch.languages[batch.language_R[row]],
            prompt=batch.prompts[row],
            answer=batch.answers[row],
            predicted=now.predicted,
            wanted=before.predicted if is_locality else tuple(self._answers[row]),
            said=now.text,
            wanted_said=(before.text or "") if is_locality else batch.answers[row],
            said_before=before.text,
            firing=now.firing,
        )

    def _before(self, rows: Sequence[int], free: set[int]) -> list[Said]:
        known = self._untouched
        names = [(self.batch.prompts[row], self.batch.answers[row]) for row in rows]
        new = [
            row
            for row, name in zip(rows, names, strict=True)
            if name not in known or (row in free and known[name].text is None)
        ]
        for row, said in zip(new, self._said(EditSet(self.model.digest), new, free), strict=True):
            known[self.batch.prompts[row], self.batch.answers[row]] = said
        return [known[name] for name in names]

    def _said(self, edits: EditSet, rows: Sequence[int], free: set[int]) -> list[Said]:
        if not rows:
            return []
        tokens, head = _chosen(self.batch.rows, rows), self.model.model.head
        with self.model.under(edits, self.batch.prompt_length_R[list(rows)].tolist()) as caches:
            hidden_TD = self.model.model.hidden(tokens)
            firings = fired(caches, len(rows)) if caches else [None] * len(rows)
        best_T = torch.cat([head(part_TD).argmax(-1) for part_TD in hidden_TD.split(_HEAD_ROWS)])
        nll_T = -token_log_probs(hidden_TD, head, tokens.target_T)
        counts = torch.bincount(tokens.sequence_T, minlength=len(rows)).tolist()
        texts = self._written(edits, [row for row in rows if row in free])
        return [
            Said(tuple(best.tolist()), texts.get(row), nll.mean().item(), firing)
            for row, best, nll, firing in zip(rows, best_T.split(counts), nll_T.split(counts), firings, strict=True)
        ]

    def _written(self, edits: EditSet, rows: list[int]) -> dict[int, str]:
        """row -> what is written freely, up to its first sentence."""
        if not rows:
            return {}
        longest = max(len(self._answers[row]) for row in rows)
        with self.model.under(edits):
            ids = self.model.model.generate(
                [list(self.batch.prompt_ids[row]) for row in rows],
                max_new_tokens=min(self._generation.max_new_tokens, longest + _MORE_TOKENS),
                batch_size=self._generation.batch_size,
            )
        texts = self.model.model.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return {row: first_sentence(text) for row, text in zip(rows, texts, strict=True)}


def _chosen(tokens: TokenBatch, rows: Sequence[int]) -> TokenBatch:
    """Some rows of a batch, with their answers' positions in the order of the rows."""
    index_R = torch.as_tensor(list(rows), device=tokens.ids_BL.device)
    length_R = tokens.length_B[index_R]
    old, longest = tokens.ids_BL.shape[1], int(length_R.max())
    parts = [(tokens.sequence_T == row).nonzero()[:, 0] for row in rows]
    at_T = torch.cat(parts)
    sequence_T = torch.repeat_interleave(
        torch.arange(len(rows), device=at_T.device), torch.tensor([len(part) for part in parts], device=at_T.device)
    )
    return TokenBatch(
        ids_BL=tokens.ids_BL[index_R, :longest],
        length_B=length_R,
        position_T=tokens.position_T[at_T] % old + sequence_T * longest,
        target_T=tokens.target_T[at_T],
        sequence_T=sequence_T,
    )
