"""Rows of similar shape that an optimisation runs again and again, and the two losses that it reads from them.

Shapes: R rows with answers, E essence rows, A = R + E rows, P rows whose neurons are read, T target positions, C columns
that are run, N = A * C, d hidden size, m neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.passes import Pass, Restarted, Whole
from lit_llm.editing.rows import Apply, Row, bunches, padded
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.head import Head
from lit_llm.losses.token_divergence import log_probs_and_divergence, token_divergence
from lit_llm.losses.token_log_probs import token_log_probs

_AWAY = Divergence(name="reverse_kl", temperature=1.0)  # KL(edited || untouched)
_KEPT_BYTES = 2**28  # of the untouched model's logits; where a batch has more, every step forms them anew
_COLUMNS_APART = 4  # rows that change this much later than others are batched apart


class Item(NamedTuple):
    """One row of one fact.

    Attributes:
        fact: number of the fact.
        place: number of the row in its fact; None for an essence prompt, whose predictions are to stay.
        row: the row.
        weight: of its loss.
        read: whether the untouched model's neurons at its lookup position are kept.
    """

    fact: int
    place: int | None
    row: Row
    weight: float
    read: bool = False


class RowBatch:
    """A pass over some rows, where it is changed, and what is read from it.

    Args:
        body: the model.
        items: the rows.
        apply: where rows are changed.
        first_layer: the first block that is changed; None runs the whole model every time.
        read_layers: whose neurons are kept of the rows that say so.

    Attributes:
        fact_A: the fact of each row.
        places: fact and number of each row with an answer.
        touched_AC: whether values are added there, in the grid that hooks see flattened; padding behind a row may be among
            them, nobody reads it.
        lookup_A: index of each row's lookup position in that grid, flattened.
        neurons: (P, m) by read layer, of the untouched model.
        neurons_fact_P: the facts of their rows.
        target_T, owner_T, length_T: of each position that predicts an answer: the token, the number of its row among those with
            answers, and how many tokens that row has.
        fact_R, weight_R, fact_E, weight_E: the facts of these rows and of the essence prompts, and the weights of their losses.
        base_Ed: the untouched model's hidden states of the essence prompts.
    """

    def __init__(
        self,
        body: FeedForwards,
        items: Sequence[Item],
        apply: Apply,
        first_layer: int | None,
        read_layers: Sequence[int] = (),
    ) -> None:
        rows, device = [item.row for item in items], body.device
        grid = padded([row.inputs for row in rows], device)
        self._device, self._items = device, items
        self._first_column = 0 if first_layer is None else _first_column(items, apply)
        self._columns = grid.ids_RT.shape[1] - self._first_column
        self._dtype = torch.float64 if body.dtype == torch.float64 else torch.float32
        self.fact_A = self._integers([item.fact for item in items])
        self.touched_AC = self._touched(apply)
        self.lookup_A = self._integers([self._flat(at, row.lookup) for at, row in enumerate(rows)])
        self.neurons: dict[int, Tensor] = {}
        self.neurons_fact_P = self._integers([item.fact for item in items if item.read])
        with body.at_inputs({layer: self._reader(layer) for layer in read_layers}):
            self._pass: Pass = (
                Whole(body, grid) if first_layer is None else Restarted(body, grid, first_layer, self._first_column)
            )
        answers = [at for at, item in enumerate(items) if item.place is not None]
        essence = [at for at, item in enumerate(items) if item.place is None]
        self.places = [(items[at].fact, items[at].place) for at in answers]
        self.fact_R, self.weight_R = self.fact_A[answers], self._weights(answers)
        self.fact_E, self.weight_E = self.fact_A[essence], self._weights(essence)
        self._read_answers(answers)
        self._lookup_E = self.lookup_A[essence]
        self.base_Ed = self._pass.base.flatten(0, 1)[self._lookup_E].clone()
        self._pass.base = self._pass.base[:0]  # not needed any more

    @property
    def tokens(self) -> int:
        """That one pass runs, padding included."""
        return len(self._items) * self._columns

    def hidden(self) -> tuple[Tensor, Tensor]:
        """Under the hooks that are open: last hidden states that predict answers, (T, d), and those of essence prompts at
        their lookup positions, (E, d).
        """
        hidden_Nd = self._pass().flatten(0, 1)
        return hidden_Nd[self._at_T], hidden_Nd[self._lookup_E]

    def _reader(self, layer: int):
        """Keeps neurons of the passes of one building: of the columns that run once, then of the others."""
        reading, seen = [(number, item.row.lookup) for number, item in enumerate(self._items) if item.read], 0
        row_P, lookup_P = (self._integers([pair[side] for pair in reading]) for side in (0, 1))

        def keep(neurons_Nm: Tensor) -> None:
            nonlocal seen
            neurons_ACm = neurons_Nm.view(len(self._items), -1, neurons_Nm.shape[-1])
            found_Pm = self.neurons.setdefault(layer, neurons_Nm.new_empty(len(reading), neurons_Nm.shape[-1]))
            here_P = (lookup_P >= seen) & (lookup_P < seen + neurons_ACm.shape[1])
            found_Pm[here_P] = neurons_ACm[row_P[here_P], lookup_P[here_P] - seen]
            seen += neurons_ACm.shape[1]

        return keep

    def _read_answers(self, answers: Sequence[int]) -> None:
        at_T, target_T, owner_T, length_T = [], [], [], []
        for order, at in enumerate(answers):
            row = self._items[at].row
            start = self._flat(at, len(row.prompt) - 1)
            at_T += range(start, start + len(row.target))
            target_T += row.target
            owner_T += [order] * len(row.target)
            length_T += [len(row.target)] * len(row.target)
        tensors = [self._integers(values) for values in (at_T, target_T, owner_T, length_T)]
        self._at_T, self.target_T, self.owner_T, self.length_T = tensors

    def _touched(self, apply: Apply) -> Tensor:
        column_C = torch.arange(self._first_column, self._first_column + self._columns, device=self._device)
        first_A1 = self._integers([item.row.first_changed(apply) for item in self._items])[:, None]
        return column_C >= first_A1 if apply == "tail" else column_C == first_A1

    def _flat(self, at: int, position: int) -> int:
        return at * self._columns + position - self._first_column

    def _integers(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _weights(self, chosen: Sequence[int]) -> Tensor:
        return torch.tensor([self._items[at].weight for at in chosen], dtype=self._dtype, device=self._device)


class Share:
    """Batches whose positions meet the head together: it is read once for all of them, and with a large vocabulary that costs
    more than the passes.

    Args:
        batches: at least one.

    Attributes:
        batches: the same.
        places: fact and number of each row with an answer, over all batches.
    """

    def __init__(self, batches: Sequence[RowBatch]) -> None:
        self.batches = list(batches)
        self.places = [place for batch in batches for place in batch.places]
        self._fact_R, self._weight_R, self._fact_E, self._weight_E, self._target_T, self._length_T, self._base_Ed = (
            torch.cat([getattr(batch, name) for batch in batches])
            for name in ("fact_R", "weight_R", "fact_E", "weight_E", "target_T", "length_T", "base_Ed")
        )
        before = [0, *accumulate(len(batch.places) for batch in batches)]
        self._owner_T = torch.cat([batch.owner_T + rows for batch, rows in zip(batches, before, strict=False)])
        self._base_EV: Tensor | None = None

    def losses(
        self, hooks: Callable[[RowBatch], AbstractContextManager], head: Head, facts: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sums per fact of the loss of answers and of the divergence of essence prompts, (facts,), both
        differentiable; and the loss of each row's answer, detached.

        Args:
            hooks: opens those of a batch.
            head: frozen.
            facts: how many there are.
        """
        hidden = []
        for batch in self.batches:
            with hooks(batch):
                hidden.append(batch.hidden())
        hidden_Td, hidden_Ed = (torch.cat(parts) for parts in zip(*hidden, strict=True))
        base_EV = self._untouched_logits(head)
        if base_EV is not None:
            log_prob_T, kl_E = log_probs_and_divergence(hidden_Td, self._target_T, hidden_Ed, base_EV, head, _AWAY)
        else:
            log_prob_T = token_log_probs(hidden_Td, head, self._target_T)
            kl_E = token_divergence(hidden_Ed, head, self._base_Ed, head, _AWAY)
        nll_R = log_prob_T.new_zeros(len(self.places)).index_add(0, self._owner_T, -log_prob_T / self._length_T)
        nll_F = nll_R.new_zeros(facts).index_add(0, self._fact_R, nll_R * self._weight_R)
        kl_F = nll_R.new_zeros(facts).index_add(0, self._fact_E, kl_E * self._weight_E)
        return nll_F, kl_F, nll_R.detach()

    def _untouched_logits(self, head: Head) -> Tensor | None:
        """What essence prompts are compared with: the same in every step, unless they are too many to be kept."""
        if self._base_EV is None and len(self._base_Ed) * head.num_rows * head.weight_VD.element_size() <= _KEPT_BYTES:
            with torch.no_grad():
                self._base_EV = head.in_compute_dtype()(self._base_Ed)
        return self._base_EV


def row_shares(
    body: FeedForwards,
    items: Sequence[Item],
    apply: Apply,
    first_layer: int | None,
    max_tokens: int,
    read_layers: Sequence[int] = (),
) -> list[Share]:
    """Rows in batches of similar ones, and these in shares: columns before the first changed one run once, so rows that
    change early and late go apart, and meet again at the head. A share has no more tokens than a batch may have. Arguments as
    in `RowBatch`.
    """
    reuse = first_layer is not None
    alike: dict[int, list[Item]] = {}
    for item in items:
        alike.setdefault(_first_column([item], apply) // _COLUMNS_APART if reuse else 0, []).append(item)
    batches = [
        RowBatch(body, [group[index] for index in chosen], apply, first_layer, read_layers)
        for group in alike.values()
        for chosen in bunches([(0, len(item.row.inputs)) for item in group], max_tokens)
    ]
    return [Share(together) for together in _together(batches, max_tokens)]


def _together(batches: Sequence[RowBatch], max_tokens: int) -> Iterator[list[RowBatch]]:
    """Neighbours with at most so many tokens; a single batch may have more."""
    found: list[RowBatch] = []
    for batch in batches:
        if found and sum(other.tokens for other in found) + batch.tokens > max_tokens:
            yield found
            found = []
        found.append(batch)
    if found:
        yield found


def _first_column(items: Sequence[Item], apply: Apply) -> int:
    """Before it, nothing is changed and nothing is read."""
    looked_up = [item.row.lookup for item in items if item.place is None]
    return min([item.row.first_changed(apply) for item in items] + looked_up)
