"""Batches for editing and for asking: typed apart, so that a rephrased question cannot be edited.

Shapes: R rows (a prompt with its answer each), S essence prompts, L padded positions. Indices of facts and languages point
into the tuples of the batch. Rows are padded on the right.

Batches, and what they hold, are meant as read-only, but not declared `frozen`: see `lit_llm.data.batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_llm.data.batch import TokenBatch, _Movable, collate_tokens
from lit_llm.data.edit_requests import Edit
from lit_llm.data.fact_tokens import FactRow
from lit_llm.data.subjects import How

Kind = Literal["reliability", "generality", "locality", "portability"]
KINDS: tuple[Kind, ...] = ("reliability", "generality", "locality", "portability")


@dataclass(frozen=True)
class EditRow:
    """A prompt of an edit with its new target.

    Attributes:
        language: code.
        paraphrase: 0 for the prompt itself, k for its k-th paraphrase.
        how: how the subject was found in it.
        tokens: of both.
    """

    language: str
    paraphrase: int
    how: How
    tokens: FactRow


@dataclass(frozen=True)
class EncodedEdit:
    """An edit in tokens. It is made of an `Edit` alone.

    Attributes:
        edit: what was encoded.
        rows: its prompts, by language, the prompt itself before its paraphrases.
        essence: language -> "SUBJECT is a", looked up at the subject.
    """

    edit: Edit
    rows: tuple[EditRow, ...]
    essence: dict[str, FactRow]


@dataclass
class EditBatch(_Movable):
    """Facts to edit, in all of their languages.

    Attributes:
        rows: prompts with their new targets; the targets are what is supervised.
        fact_R: of each row, into `edits`.
        language_R: of each row, into `languages`.
        paraphrase_R: 0 for the prompt itself, k for its k-th paraphrase.
        lookup_R: position of the subject's last token; the last of the prompt where no subject was found.
        prompt_length_R: tokens before the target.
        essence: "SUBJECT is a" of each fact and language; nothing is supervised.
        essence_fact_S: into `edits`.
        essence_language_S: into `languages`.
        essence_lookup_S: position of the subject's last token.
        edits: the facts' texts.
        languages: codes, the same in every batch of a data set.
        found: how the subject of each row was found.
        step_tokens: target tokens of the prompts themselves, of the whole optimizer step.
        num_tokens: real tokens of `rows`.
        examples: indices of the facts in their data set.
    """

    rows: TokenBatch
    fact_R: Tensor
    language_R: Tensor
    paraphrase_R: Tensor
    lookup_R: Tensor
    prompt_length_R: Tensor
    essence: TokenBatch
    essence_fact_S: Tensor
    essence_language_S: Tensor
    essence_lookup_S: Tensor
    edits: tuple[Edit, ...]
    languages: tuple[str, ...]
    found: tuple[How, ...]
    step_tokens: int
    num_tokens: int
    examples: tuple[int, ...]


@dataclass(frozen=True)
class QuestionRow:
    """A question about an edited fact.

    Attributes:
        kind: what it tests.
        language: code.
        prompt: as the model reads it.
        answer: what is compared with.
        how: how the edited subject was found in it; None for locality, which is about something else.
        tokens: of both.
        is_rival: the same question with the answer that should be less likely, to be compared with.
    """

    kind: Kind
    language: str
    prompt: str
    answer: str
    how: How | None
    tokens: FactRow
    is_rival: bool = False


@dataclass
class QuestionBatch(_Movable):
    """All questions about some facts, fact by fact.

    Attributes:
        rows: questions with their answers; the answers are what is supervised.
        kind_R: what a row tests, into KINDS.
        fact_R: the fact that it is about, into `ids`.
        language_R: into `languages`.
        lookup_R: position of the edited subject's last token; the last of the prompt where it was not found; -1 for
            locality.
        prompt_length_R: tokens before the answer.
        rival_R: whether a row is there for the likelihood of its answer alone, see `QuestionRow`.
        prompts: texts.
        answers: texts.
        prompt_ids: prompts as they are read before an answer is generated; differ from `rows` where a merge joins both.
        ids: the facts' ids.
        languages: codes, the same in every batch of a data set.
        num_tokens: real tokens of `rows`.
        examples: indices of the facts in their data set.
    """

    rows: TokenBatch
    kind_R: Tensor
    fact_R: Tensor
    language_R: Tensor
    lookup_R: Tensor
    prompt_length_R: Tensor
    rival_R: Tensor
    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    prompt_ids: tuple[tuple[int, ...], ...]
    ids: tuple[str, ...]
    languages: tuple[str, ...]
    num_tokens: int
    examples: tuple[int, ...]


def collate_edits(
    facts: Sequence[EncodedEdit],
    languages: tuple[str, ...],
    pad_id: int,
    *,
    step_tokens: int = 0,
    examples: tuple[int, ...] = (),
) -> EditBatch:
    """A batch of facts.

    Args:
        facts: at least one.
        languages: codes, among them those of the facts.
        pad_id: any valid id.
        step_tokens: see `EditBatch`.
        examples: likewise.
    """
    flat = [(number, row) for number, fact in enumerate(facts) for row in fact.rows]
    essence = [(number, code, row) for number, fact in enumerate(facts) for code, row in fact.essence.items()]
    tokens = [row.tokens for _, row in flat]
    rows = _collate(tokens, pad_id)
    return EditBatch(
        rows=rows,
        fact_R=torch.tensor([number for number, _ in flat]),
        language_R=torch.tensor([languages.index(row.language) for _, row in flat]),
        paraphrase_R=torch.tensor([row.paraphrase for _, row in flat]),
        lookup_R=torch.tensor([row.lookup for row in tokens]),
        prompt_length_R=torch.tensor([row.prompt_length for row in tokens]),
        essence=_collate([row for _, _, row in essence], pad_id),
        essence_fact_S=torch.tensor([number for number, _, _ in essence]),
        essence_language_S=torch.tensor([languages.index(code) for _, code, _ in essence]),
        essence_lookup_S=torch.tensor([row.lookup for _, _, row in essence]),
        edits=tuple(fact.edit for fact in facts),
        languages=languages,
        found=tuple(row.how for _, row in flat),
        step_tokens=step_tokens,
        num_tokens=int(rows.length_B.sum()),
        examples=examples,
    )


def collate_questions(
    facts: Sequence[tuple[str, Sequence[QuestionRow]]],
    languages: tuple[str, ...],
    pad_id: int,
    examples: tuple[int, ...] = (),
) -> QuestionBatch:
    """A batch of questions.

    Args:
        facts: ids of facts with the questions about them, at least one.
        languages: codes, among them those of the questions.
        pad_id: any valid id.
        examples: see `QuestionBatch`.
    """
    flat = [(number, row) for number, (_, questions) in enumerate(facts) for row in questions]
    asked = [row for _, row in flat]
    rows = _collate([row.tokens for row in asked], pad_id)
    return QuestionBatch(
        rows=rows,
        kind_R=torch.tensor([KINDS.index(row.kind) for row in asked]),
        fact_R=torch.tensor([number for number, _ in flat]),
        language_R=torch.tensor([languages.index(row.language) for row in asked]),
        lookup_R=torch.tensor([-1 if row.how is None else row.tokens.lookup for row in asked]),
        prompt_length_R=torch.tensor([row.tokens.prompt_length for row in asked]),
        rival_R=torch.tensor([row.is_rival for row in asked]),
        prompts=tuple(row.prompt for row in asked),
        answers=tuple(row.answer for row in asked),
        prompt_ids=tuple(row.tokens.prompt_ids for row in asked),
        ids=tuple(name for name, _ in facts),
        languages=languages,
        num_tokens=int(rows.length_B.sum()),
        examples=examples,
    )


def _collate(rows: Sequence[FactRow], pad_id: int) -> TokenBatch:
    return collate_tokens([row.ids for row in rows], [row.prompt_length for row in rows], pad_id)
