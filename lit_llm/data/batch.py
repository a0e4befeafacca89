"""Typed batches: what travels from the data workers to a method.

Shapes: B sequences, L padded positions, T supervised positions of the whole batch (flattened),
U the same on the teacher's side, A aligned pairs of supervised positions, R rows: one for each sequence, or fewer where
rows are packed with several sequences, E the teacher's width, K tokens kept of a distribution.

They are meant as read-only, but not declared `frozen`: Lightning's precision plugins refuse frozen dataclasses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


class _Movable:
    """Lets Lightning move a dataclass to a device through `.to`."""

    def to(self, device: torch.device | str, non_blocking: bool = False):
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device, non_blocking=non_blocking) if hasattr(value, "to") else value
        return type(self)(**moved)


@dataclass
class TokenBatch(_Movable):
    """Right-padded sequences of one tokenizer and the positions that a loss looks at.

    Attributes:
        ids_BL: token ids, int64; (R, L) where rows are packed.
        length_B: real tokens of each sequence, int64; what lies beyond is padding.
        position_T: supervised positions as indices into the flattened [B * L] grid, ascending, int64. The hidden state
            at such a position predicts the *next* token.
        target_T: that next token, int64.
        sequence_T: the sequence each supervised position belongs to, int64.
        position_ids_RL: packed rows only: the position of each token in its own sequence, int64; 0 at padding. Attention
            stays within a sequence, which begins wherever the position is not one more than the last. None: one
            sequence in each row.
        longest: tokens of the longest sequence; known where `position_ids_RL` is.
        branch_RL: rows with two answers to one prompt only: 0 for the prompt, 1 and 2 for the answers, int8. A token sees
            the prompt and what came before it in its own answer. Supervised positions are then those of all first answers,
            followed by those of all second ones (sequences B to 2B - 1).
    """

    ids_BL: Tensor
    length_B: Tensor
    position_T: Tensor
    target_T: Tensor
    sequence_T: Tensor
    position_ids_RL: Tensor | None = None
    longest: int | None = None
    branch_RL: Tensor | None = None

    @property
    def num_supervised(self) -> int:
        return self.position_T.numel()


@dataclass
class SparseTargets(_Movable):
    """The largest probabilities of a next-token distribution, best first.

    Attributes:
        ids_TK: tokens, int64.
        log_p_TK: their log-probabilities.
        log_rest_T: logarithm of the mass of all other tokens.
    """

    ids_TK: Tensor
    log_p_TK: Tensor
    log_rest_T: Tensor


@dataclass
class DistillationBatch(_Movable):
    """One text as the student and as the teacher read it.

    Attributes:
        student: the batch in the student's tokens.
        teacher: the batch in the teacher's tokens; None when both share one tokenizer.
        pair_student_A: for each aligned pair the row among the student's supervised positions (0..T-1); None when both
            share one tokenizer (row t is paired with row t).
        pair_teacher_A: likewise among the teacher's (0..U-1).
        step_tokens: the student's supervised tokens of the whole optimizer step: all accumulation steps, all ranks.
        step_pairs: the aligned pairs of the whole optimizer step.
        num_tokens: real (not padding) tokens of this batch on the student's side, prompts included.
        examples: indices of the examples in their dataset.
        pieces_student_A: where pairs are groups of tokens, how many of the student's tokens make up each; the pair names
            the first. None where every pair is one token.
        pieces_teacher_A: likewise the teacher's.
        teacher_hidden: (T, E) or, with two tokenizers, (U, E) last hidden states of the teacher, where a store has
            them; None: the teacher is to be run.
        teacher_top: its largest probabilities instead, where a store keeps only these.
    """

    student: TokenBatch
    teacher: TokenBatch | None
    pair_student_A: Tensor | None
    pair_teacher_A: Tensor | None
    step_tokens: int
    step_pairs: int
    num_tokens: int
    examples: tuple[int, ...]
    pieces_student_A: Tensor | None = None
    pieces_teacher_A: Tensor | None = None
    teacher_hidden: Tensor | None = None
    teacher_top: SparseTargets | None = None


@dataclass
class PreferenceBatch(_Movable):
    """Pairs of answers to one prompt each; sequence b of both sides begins with the same prompt.

    Attributes:
        chosen: B prompts with the answers that are preferred.
        rejected: the same prompts with the other answers.
        step_pairs: pairs of the whole optimizer step: all accumulation steps, all ranks.
        step_tokens: supervised tokens of the step's chosen answers.
        step_rejected_tokens: those of its rejected answers.
        num_tokens: real (not padding) tokens of this batch, both sides, prompts counted twice.
        examples: indices of the pairs in their dataset.
        both: every prompt once, with both of its answers behind it.
        reference_B2: (B, 2) log-probabilities of the chosen and the rejected answers under a reference model, summed
            over supervised tokens, float32, where a method has stored them; else None.
        is_swapped: whether `both` begins with the rejected answers.
    """

    chosen: TokenBatch
    rejected: TokenBatch
    step_pairs: int
    step_tokens: int
    step_rejected_tokens: int
    num_tokens: int
    examples: tuple[int, ...]
    both: TokenBatch | None = None
    reference_B2: Tensor | None = None
    is_swapped: bool = False

    def swapped(self) -> PreferenceBatch:
        """The same pairs with the preference turned around."""
        return replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            step_tokens=self.step_rejected_tokens,
            step_rejected_tokens=self.step_tokens,
            reference_B2=None if self.reference_B2 is None else self.reference_B2.flip(1),
            is_swapped=not self.is_swapped,
        )


@dataclass
class LanguageBatch(_Movable):
    """Rows of text in several languages.

    Attributes:
        student: the rows; `hidden` of a language model takes it.
        language_BL: (B, L) number of the language of each token, in the order of `Languages.languages`; an
            end-of-sequence token has that of the document before it; -1 at padding. int64.
        group_BL: (B, L) number of its group, 0 for the original languages; -1 at padding. int64.
        language_T: (T,) number of the language of each predicted token, int64.
        step_tokens: supervised tokens of the whole optimizer step: all accumulation steps, all ranks.
        step_group_tokens: real tokens of the whole optimizer step, by group.
        num_tokens: real (not padding) tokens of this batch.
        examples: indices of the rows in their set.
    """

    student: TokenBatch
    language_BL: Tensor
    group_BL: Tensor
    language_T: Tensor
    step_tokens: int
    step_group_tokens: tuple[int, ...]
    num_tokens: int
    examples: tuple[int, ...]

    @property
    def teacher(self) -> None:
        """Nobody else reads these rows."""
        return None


def collate_tokens(
    ids: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    pad_id: int,
    row_sizes: Sequence[int] | None = None,
) -> TokenBatch:
    """Pad sequences on the right and list the supervised positions.

    Args:
        ids: the tokens of each sequence: prompt, answer and, where the answer is complete, the end-of-sequence token.
        prompt_lengths: how many tokens at the start of each sequence are not to be predicted. 0 supervises everything
            but the first token, which nothing predicts.
        pad_id: any valid id; padding is told by `length_B`, never by comparing ids.
        row_sizes: how many sequences stand in each row, in order; None: one each, not packed.
    """
    lengths = [len(sequence) for sequence in ids]
    rows, starts = _places(lengths, row_sizes)
    width = max(start + length for start, length in zip(starts, lengths, strict=True))
    ids_RL = torch.full((rows[-1] + 1, width), pad_id, dtype=torch.int64)
    position_ids_RL = torch.zeros_like(ids_RL)
    position, target, sequence_of = [], [], []
    for number, (sequence, prompt_length) in enumerate(zip(ids, prompt_lengths, strict=True)):
        tokens, row, start = torch.as_tensor(sequence, dtype=torch.int64), rows[number], starts[number]
        ids_RL[row, start : start + len(tokens)] = tokens
        position_ids_RL[row, start : start + len(tokens)] = torch.arange(len(tokens))
        first = max(prompt_length, 1)
        position.append(torch.arange(first - 1, len(tokens) - 1) + row * width + start)
        target.append(tokens[first:])
        sequence_of.append(torch.full((len(tokens) - first,), number, dtype=torch.int64))
    return TokenBatch(
        ids_BL=ids_RL,
        length_B=torch.tensor(lengths),
        position_T=torch.cat(position),
        target_T=torch.cat(target),
        sequence_T=torch.cat(sequence_of),
        position_ids_RL=None if row_sizes is None else position_ids_RL,
        longest=None if row_sizes is None else max(lengths),
    )


def _places(lengths: Sequence[int], row_sizes: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """Row and first column of each sequence."""
    rows, starts, number = [], [], 0
    for row, size in enumerate([1] * len(lengths) if row_sizes is None else row_sizes):
        start = 0
        for length in lengths[number : number + size]:
            rows.append(row)
            starts.append(start)
            start += length
        number += size
    return rows, starts


def collate_branches(
    prompts: Sequence[Sequence[int]], first: Sequence[Sequence[int]], second: Sequence[Sequence[int]], pad_id: int
) -> TokenBatch:
    """Rows of a prompt with two answers, so that the prompt is run once; see `TokenBatch.branch_RL`.

    Args:
        prompts: tokens of each prompt, at least one.
        first: tokens of each first answer.
        second: tokens of each second answer.
        pad_id: any valid id.
    """
    triples = list(zip(prompts, first, second, strict=True))
    lengths = [sum(map(len, triple)) for triple in triples]
    width = max(lengths)
    ids_RL = torch.full((len(triples), width), pad_id, dtype=torch.int64)
    position_ids_RL, branch_RL = torch.zeros_like(ids_RL), torch.zeros(ids_RL.shape, dtype=torch.int8)
    supervised: list[list[tuple[Tensor, Tensor, int]]] = [[], []]
    for row, (prompt, *answers) in enumerate(triples):
        start = len(prompt)
        ids_RL[row, :start], position_ids_RL[row, :start] = torch.as_tensor(prompt), torch.arange(start)
        for side, answer in enumerate(answers):
            tokens, span = torch.as_tensor(answer, dtype=torch.int64), slice(start, start + len(answer))
            ids_RL[row, span], branch_RL[row, span] = tokens, side + 1
            position_ids_RL[row, span] = torch.arange(len(prompt), len(prompt) + len(answer))
            # the last token of the prompt predicts the first of both answers
            places = torch.cat([torch.tensor([len(prompt) - 1]), torch.arange(start, start + len(answer) - 1)])
            supervised[side].append((places + row * width, tokens, row + side * len(triples)))
            start += len(answer)
    flat = [*supervised[0], *supervised[1]]
    return TokenBatch(
        ids_BL=ids_RL,
        length_B=torch.tensor(lengths),
        position_T=torch.cat([places for places, _, _ in flat]),
        target_T=torch.cat([tokens for _, tokens, _ in flat]),
        sequence_T=torch.cat([torch.full((len(tokens),), number) for _, tokens, number in flat]),
        position_ids_RL=position_ids_RL,
        longest=int(position_ids_RL.max()) + 1,
        branch_RL=branch_RL,
    )


def collate_pairs(
    student: TokenBatch,
    teacher: TokenBatch,
    pair_student: Sequence[Sequence[int]],
    pair_teacher: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """Aligned pairs of a batch from those of its sequences.

    Args:
        student: the batch of the student, with T supervised rows.
        teacher: the batch of the teacher, with U supervised rows.
        pair_student: for each sequence, the indices of aligned tokens among its own supervised tokens.
        pair_teacher: likewise on the teacher's side.

    Returns:
        (A,) rows among the student's T, (A,) rows among the teacher's U.
    """
    return _shifted(student, pair_student), _shifted(teacher, pair_teacher)


def _shifted(batch: TokenBatch, pairs: Sequence[Sequence[int]]) -> Tensor:
    per_sequence_B = torch.bincount(batch.sequence_T, minlength=len(pairs))
    start_B = per_sequence_B.cumsum(0) - per_sequence_B
    return torch.cat([torch.as_tensor(rows, dtype=torch.int64) + start_B[i] for i, rows in enumerate(pairs)])
