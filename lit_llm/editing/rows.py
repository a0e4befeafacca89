"""Prompts as token ids, with the position where an edit looks; padded grids of them, and batches of similar ones.

Shapes: R rows, T columns (padded positions).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Apply = Literal["tail", "lookup", "prompt_last"]


@dataclass(frozen=True)
class Row:
    """One prompt, and its answer where there is one.

    Attributes:
        prompt: token ids.
        lookup: index in `prompt` of the subject's last token, or of whatever token stands for it.
        target: token ids of the answer.

    Raises:
        ValueError: an empty prompt, or a lookup position outside of it.
    """

    prompt: tuple[int, ...]
    lookup: int
    target: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", tuple(self.prompt))
        object.__setattr__(self, "target", tuple(self.target))
        if not 0 <= self.lookup < len(self.prompt):
            raise ValueError(
                f"The lookup position is {self.lookup}, but the prompt has {len(self.prompt)} tokens. It counts from 0, "
                f"within the prompt."
            )

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads under teacher forcing: all but the answer's last token."""
        return self.prompt + self.target[:-1]

    def bare(self) -> Row:
        """The prompt alone."""
        return Row(self.prompt, self.lookup)

    def with_target(self, target: Sequence[int]) -> Row:
        """The same prompt with another answer."""
        return Row(self.prompt, self.lookup, tuple(target))

    def first_changed(self, apply: Apply) -> int:
        """The first position that an edit touches."""
        return len(self.prompt) - 1 if apply == "prompt_last" else self.lookup

    def require_target(self) -> None:
        """Raises ValueError where there is no answer to edit towards."""
        if not self.target:
            raise ValueError(
                "A row has no target tokens. Give the new answer, and see that the tokenizer leaves tokens of it after the "
                "prompt."
            )


@dataclass
class Grid:
    """Rows padded to one length.

    Attributes:
        ids_RT: token ids, int64.
        length_R: real tokens of each row, int64.
        start_R: columns of padding before each row, int64: 0 where padding is on the right.
    """

    ids_RT: Tensor
    length_R: Tensor
    start_R: Tensor

    @property
    def is_left_padded(self) -> bool:
        return bool(self.start_R.any())

    def columns(self, position_R: Sequence[int] | Tensor) -> Tensor:
        """(R,) columns of positions that count from each row's first token."""
        return self.start_R + torch.as_tensor(position_R, device=self.start_R.device)

    def flat(self, position_R: Sequence[int] | Tensor) -> Tensor:
        """(R,) the same as indices into the flattened grid."""
        rows_R = torch.arange(len(self.ids_RT), device=self.start_R.device)
        return rows_R * self.ids_RT.shape[1] + self.columns(position_R)

    def mask(self) -> Tensor:
        """(R, T) int64, 1 at real tokens."""
        column_T = torch.arange(self.ids_RT.shape[1], device=self.ids_RT.device)
        after_RT = column_T >= self.start_R[:, None]
        return (after_RT & (column_T < (self.start_R + self.length_R)[:, None])).long()


def padded(
    sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu", side: Literal["right", "left"] = "right"
) -> Grid:
    """A grid of token ids; padding is id 0, which no real position sees."""
    length_R = torch.tensor([len(sequence) for sequence in sequences])
    longest = int(length_R.max())
    ids_RT = torch.zeros(len(sequences), longest, dtype=torch.int64)
    start_R = longest - length_R if side == "left" else torch.zeros_like(length_R)
    for ids_T, sequence, start in zip(ids_RT, sequences, start_R.tolist(), strict=True):
        ids_T[start : start + len(sequence)] = torch.tensor(sequence)
    return Grid(ids_RT.to(device), length_R.to(device), start_R.to(device))


def bunches(costs: Sequence[tuple[int, int]], max_tokens: int) -> Iterator[list[int]]:
    """Indices of items in batches of similar ones, each of at most `max_tokens` columns times rows.

    Args:
        costs: for each item what it is sorted by first, and its length.
        max_tokens: a single item may exceed it.
    """
    order = sorted(range(len(costs)), key=lambda index: (costs[index], index))
    batch: list[int] = []
    longest = 0
    for index in order:
        longest_then = max(longest, costs[index][1])
        if batch and longest_then * (len(batch) + 1) > max_tokens:
            yield batch
            batch, longest_then = [], costs[index][1]
        batch.append(index)
        longest = longest_then
    if batch:
        yield batch
