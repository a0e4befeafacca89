"""Questions about edited facts, put to a model under some edits.

Shapes: R rows of a batch, L padded positions, T answer tokens of some rows, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lit_llm.data.batch import TokenBatch
from lit_llm.data.edit_batch import KINDS, EditBatch, QuestionBatch
from lit_llm.editing.deltas import EditSet
from lit_llm.editing.edit_cache import Firing
from lit_llm.editing.fact_text import index_of
from lit_llm.editing.triggers import decoded
from lit_llm.evaluation.editing import first_sentence, is_finished
from lit_llm.losses.token_log_probs import best_tokens
from lit_llm.methods.answers import Generation
from lit_llm.methods.edit_scores import Question
from lit_llm.methods.edited_model import EditedModel

_MORE_TOKENS = 4  # than a question's answer has, for what is written freely
_NOT_NAMED = Firing(None, None, None)


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


Name = tuple[
    tuple[int, ...], tuple[int, ...], int
]  # a question: its prompt; prompt and answer; tokens before the answer


class Asking:
    """Puts the questions of a batch to a model.

    Args:
        model: the model.
        untouched: what it says without edits, by token ids (see `Name`); filled on the way, so that it is asked once.
        generation: of answers that are written freely.
        batch: the questions.
    """

    def __init__(
        self, model: EditedModel, untouched: dict[Name, Said], generation: Generation, batch: QuestionBatch
    ) -> None:
        self.model, self.batch, self._untouched, self._generation = model, batch, untouched, generation
        self._answers: list[list[int]] = [[] for _ in batch.prompts]
        for row, target in zip(batch.rows.sequence_T.tolist(), batch.rows.target_T.tolist(), strict=True):
            self._answers[row].append(target)
        both = zip(batch.rows.ids_BL.tolist(), batch.rows.length_B.tolist(), strict=True)
        self._names: list[Name] = [
            (tuple(prompt), tuple(ids[:length]), length - len(answer))
            for prompt, (ids, length), answer in zip(batch.prompt_ids, both, self._answers, strict=True)
        ]

    def questions(self, edits: EditSet, rows: Sequence[int], free: set[int]) -> list[Question]:
        """What the model says to these rows under some edits.

        Args:
            edits: none of them: the untouched model.
            rows: of the batch.
            free: rows that are also answered freely.
        """
        before = self._before(rows, free)
        now = self._now(edits, rows, free, before) if len(edits) else before
        return [self._question(row, row in free, *said) for row, *said in zip(rows, now, before, strict=True)]

    def _question(self, row: int, is_free: bool, now: Said, before: Said) -> Question:
        batch, kind = self.batch, KINDS[self.batch.kind_R[row]]
        is_locality = kind == "locality"
        return Question(
            fact=batch.ids[batch.fact_R[row]],
            kind=kind,
            language=batch.languages[batch.language_R[row]],
            prompt=batch.prompts[row],
            answer=batch.answers[row],
            predicted=now.predicted,
            wanted=before.predicted if is_locality else tuple(self._answers[row]),
            nll=now.nll,
            said=now.text if is_free else None,
            wanted_said=(before.text or "") if is_locality else batch.answers[row],
            said_before=before.text if is_free else None,
            firing=now.firing,
        )

    def _before(self, rows: Sequence[int], free: set[int]) -> list[Said]:
        known, names = self._untouched, self._names
        once, freely = self._distinct(rows, free)
        new = [row for row in once if names[row] not in known or (row in freely and known[names[row]].text is None)]
        known |= self._said(EditSet(self.model.digest), new, freely)
        return [known[names[row]] for row in rows]

    def _now(self, edits: EditSet, rows: Sequence[int], free: set[int], before: Sequence[Said]) -> list[Said]:
        """What the untouched model says stands for rows on which no edit can act."""
        names = [self._names[row] for row in rows]
        named = about_a_subject(self.model, edits, names)
        said = {
            name: as_before._replace(firing=_NOT_NAMED)
            for name, as_before in zip(names, before, strict=True)
            if name not in named
        }
        once, freely = self._distinct([row for row in rows if self._names[row] in named], free)
        said |= self._said(edits, once, freely)
        return [said[name] for name in names]

    def _distinct(self, rows: Sequence[int], free: set[int]) -> tuple[list[int], set[int]]:
        """One row for each question, and those among them that any of the rows wants answered freely."""
        first: dict[Name, int] = {}
        for row in rows:
            first.setdefault(self._names[row], row)
        return list(first.values()), {first[self._names[row]] for row in rows if row in free}

    def _said(self, edits: EditSet, rows: Sequence[int], free: set[int]) -> dict[Name, Said]:
        if not rows:
            return {}
        tokens, head = _chosen(self.batch.rows, rows), self.model.model.head
        with self.model.under(edits, self.batch.prompt_length_R[list(rows)].tolist()) as cache:
            hidden_TD = self.model.model.hidden(tokens)
            firings = [None] * len(rows) if cache is None else cache.firings
        best_T, log_prob_T = best_tokens(hidden_TD, head, tokens.target_T)
        counts = torch.bincount(tokens.sequence_T, minlength=len(rows)).tolist()
        texts = self._written(edits, [row for row in rows if row in free])
        parts = zip(rows, best_T.split(counts), log_prob_T.split(counts), firings, strict=True)
        return {
            self._names[row]: Said(tuple(best.tolist()), texts.get(row), -log_prob.mean().item(), firing)
            for row, best, log_prob, firing in parts
        }

    def _written(self, edits: EditSet, rows: list[int]) -> dict[int, str]:
        """row -> what is written freely, cut by `first_sentence`."""
        if not rows:
            return {}
        model = self.model.model
        limits, wanted = [self._limit(row) for row in rows], [self.batch.answers[row] for row in rows]

        def ends(number: int, new: list[int]) -> bool:
            # its own limit, whatever it is asked beside: what is said before and after an edit is compared
            text = model.tokenizer.decode(new, skip_special_tokens=True)
            return len(new) >= limits[number] or is_finished(text, wanted[number])

        with self.model.under(edits):
            ids = model.generate(
                [list(self.batch.prompt_ids[row]) for row in rows],
                max_new_tokens=max(limits),
                batch_size=self._generation.batch_size,
                until=ends,
            )
        texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return {row: first_sentence(text, self.batch.answers[row]) for row, text in zip(rows, texts, strict=True)}

    def _limit(self, row: int) -> int:
        """Tokens of what is written freely; where it is compared with the answer, there is always room for that."""
        length = len(self._answers[row])
        limit = min(self._generation.max_new_tokens, length + _MORE_TOKENS)
        return limit if KINDS[self.batch.kind_R[row]] == "locality" else max(limit, length + 1)


@torch.no_grad()
def known_already(
    model: EditedModel, edits: EditSet, batch: EditBatch, languages: Sequence[str] | None = None
) -> set[int]:
    """Facts of a batch whose new answer the model gives greedily under some edits, in all of their languages.

    Args:
        languages: that count; None: all of each fact.

    Returns:
        Their numbers in the batch.
    """
    bare = (batch.paraphrase_R == 0).nonzero()[:, 0].tolist()
    rows = [row for row in bare if languages is None or batch.languages[batch.language_R[row]] in languages]
    tokens, facts = _chosen(batch.rows, rows), batch.fact_R[rows].tolist()
    with model.under(edits, batch.prompt_length_R[rows].tolist()):
        hidden_TD = model.model.hidden(tokens)
    best_T, _ = best_tokens(hidden_TD, model.model.head, tokens.target_T)
    wrong = set(tokens.sequence_T[best_T != tokens.target_T].tolist())
    return set(facts) - {facts[at] for at in wrong}


def about_a_subject(model: EditedModel, edits: EditSet, names: Sequence[Name]) -> set[Name]:
    """The questions on which an edit may act: cached edits act on none that does not name one of their subjects."""
    if edits.of_weights or model.trigger.scope == "oracle":
        return set(names)
    index, tokenizer = index_of([edit.fact for edit in edits.cached]), model.model.tokenizer
    asked = {name: {name[0], name[1][: name[2]]} for name in names}  # alike unless a merge joins prompt and answer
    return {name for name, texts in asked.items() if any(index.find(decoded(tokenizer, text)) for text in texts)}


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
