"""Rows of equal length out of documents that follow each other, and the batches made of them.

A row holds one language. Documents are put one after the other and cut into rows wherever the row ends, as in the released
code of arXiv 2408.11396; attention runs over the whole row unless documents are isolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from lit_llm.data.batch import LanguageBatch, TokenBatch, collate_tokens
from lit_llm.data.corpora import Corpus
from lit_llm.data.step_sampler import MicroBatch


class Row(NamedTuple):
    """Tokens of one row.

    Attributes:
        ids: token ids.
        starts: places in the row where documents begin; the row's own beginning only if a document begins there.
    """

    ids: list[int]
    starts: list[int]


class Stream:
    """Documents of one language as one long text, cut into rows.

    Args:
        corpus: of the language.
        order: documents by their place in the corpus, in the order of the text; they may come again.
        row_length: tokens of a row.
        num_rows: rows that are used; None: all, the last of which may be shorter, but has two tokens or more.
        limit: tokens after which the text ends, where `num_rows` is None.
    """

    def __init__(
        self, corpus: Corpus, order: np.ndarray, row_length: int, num_rows: int | None = None, limit: int | None = None
    ) -> None:
        self.corpus, self.order, self.row_length = corpus, order, row_length
        self.ends = np.cumsum(corpus.lengths[order])
        self.begins = self.ends - corpus.lengths[order]
        total = int(self.ends[-1]) if len(order) else 0
        if num_rows is None:
            total = total if limit is None else min(total, limit)
            num_rows = total // row_length + (total % row_length > 1)
        self.num_rows, self.total = num_rows, min(total, num_rows * row_length)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        starts = np.arange(self.num_rows) * self.row_length
        return np.minimum(self.total - starts, self.row_length)

    @property
    def inner_starts(self) -> np.ndarray:
        """How many documents begin in each row, its first token left aside."""
        rows, places = np.divmod(self.begins[self.begins < self.total], self.row_length)
        return np.bincount(rows[places > 0], minlength=self.num_rows)[: self.num_rows]

    def row(self, number: int) -> Row:
        begin = number * self.row_length
        end = min(begin + self.row_length, self.total)
        ids, starts = [], []
        document = int(np.searchsorted(self.ends, begin, side="right"))
        while len(ids) < end - begin:
            first = int(self.begins[document])
            if first >= begin:
                starts.append(first - begin)
            ids += self.corpus.ids(int(self.order[document]))[max(begin - first, 0) : end - first]
            document += 1
        return Row(ids, starts)


def training_order(documents: np.ndarray, lengths: np.ndarray, tokens: int, seed: int) -> np.ndarray:
    """Documents in their order, and again in other orders until there are enough tokens.

    Args:
        documents: to draw from, in the order of the first pass.
        lengths: tokens of every document of the corpus.
        tokens: that are needed.
        seed: of the orders of later passes.
    """
    passes, per_pass = [documents], int(lengths[documents].sum())
    for number in range(1, -(-tokens // per_pass)):
        passes.append(np.random.default_rng([seed, number]).permutation(documents))
    order = np.concatenate(passes)
    return order[: int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1]


class RowSet:
    """Rows of several languages, one language after the other.

    Args:
        streams: by the number of their language.
        groups: the number of the group of each language.
        num_groups: how many there are.
        divided: whether the first token of a document is never predicted.
    """

    def __init__(self, streams: dict[int, Stream], groups: Sequence[int], num_groups: int, divided: bool) -> None:
        self.streams, self.groups, self.num_groups = streams, groups, num_groups
        counts = [stream.num_rows for stream in streams.values()]
        self.firsts = np.cumsum([0, *counts])
        self.language = np.repeat(np.array(list(streams), dtype=np.int64), counts)
        self.lengths = np.concatenate([stream.lengths for stream in streams.values()])
        self.supervised = self.lengths - 1
        if divided:
            self.supervised = self.supervised - np.concatenate([stream.inner_starts for stream in streams.values()])

    def __len__(self) -> int:
        return len(self.language)

    @property
    def group_tokens(self) -> list[np.ndarray]:
        """For each group, the tokens of each row that belong to it."""
        group = np.asarray(self.groups)[self.language]
        return [np.where(group == number, self.lengths, 0) for number in range(self.num_groups)]

    def row(self, number: int) -> Row:
        stream = int(np.searchsorted(self.firsts, number, side="right")) - 1
        return list(self.streams.values())[stream].row(number - int(self.firsts[stream]))


class LanguageBatches:
    """The finished batch of a `MicroBatch`, for a DataLoader's workers.

    Args:
        rows: of the set.
        pad_id: any valid id.
        isolate: documents are sequences of their own, none of which sees another.
        begins: every document begins with a token that is not to be predicted.
    """

    def __init__(self, rows: RowSet, pad_id: int, *, isolate: bool, begins: bool) -> None:
        self.rows, self.pad_id, self.isolate, self.begins = rows, pad_id, isolate, begins

    def __getitem__(self, micro: MicroBatch) -> LanguageBatch:
        rows = [self.rows.row(example) for example in micro.examples]
        student = self._isolated(rows) if self.isolate else self._concatenated(rows)
        lengths = [len(row.ids) for row in rows]
        language_B = torch.from_numpy(self.rows.language[list(micro.examples)])
        group_B = torch.tensor(self.rows.groups)[language_B]
        width = student.ids_BL.shape[1]
        padding_BL = torch.arange(width) >= torch.tensor(lengths)[:, None]
        return LanguageBatch(
            student=student,
            language_BL=language_B[:, None].expand(-1, width).masked_fill(padding_BL, -1),
            group_BL=group_B[:, None].expand(-1, width).masked_fill(padding_BL, -1),
            language_T=language_B[student.position_T // width],
            step_tokens=micro.step_tokens,
            step_group_tokens=micro.step_group_tokens,
            num_tokens=sum(lengths),
            examples=micro.examples,
        )

    def _isolated(self, rows: list[Row]) -> TokenBatch:
        pieces, sizes = [], []
        for row in rows:
            cuts = [0, *(start for start in row.starts if start > 0), len(row.ids)]
            pieces += [row.ids[first:last] for first, last in pairwise(cuts)]
            sizes.append(len(cuts) - 1)
        return collate_tokens(pieces, [0] * len(pieces), self.pad_id, sizes)

    def _concatenated(self, rows: list[Row]) -> TokenBatch:
        batch = collate_tokens([row.ids for row in rows], [0] * len(rows), self.pad_id)
        if self.begins:
            starts_BL = torch.zeros(batch.ids_BL.shape, dtype=torch.bool)
            for number, row in enumerate(rows):
                starts_BL[number, row.starts] = True
            kept_T = ~starts_BL.flatten()[batch.position_T + 1]
            batch.position_T, batch.target_T = batch.position_T[kept_T], batch.target_T[kept_T]
            batch.sequence_T = batch.sequence_T[kept_T]
        return batch
