"""Edited facts as values beside an untouched model, added to its neurons where a text is about them.

A text that is about none of them is answered by the base model bit for bit; a row of a batch that is not, likewise.

Shapes: R rows, T columns, K stored prompts of an edit, N = R * T, d hidden size, m neurons of a layer.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_llm.editing.fact_text import FactText, index_of
from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.passes import run_until
from lit_llm.editing.rows import Apply, Row, padded
from lit_llm.editing.triggers import Mention, Search, Trigger, decoded, mentioned_tokens, pooled


@dataclass(frozen=True, eq=False)
class CachedEdit:
    """Values of one fact's neurons.

    Attributes:
        fact: what it says.
        neurons: by layer, indices, ascending.
        values: by layer, what is added to them.
        apply: where.
        relation_Kd: pooled hidden states of the edit's prompts at the first edited layer (see `relation_vectors`), in half
            precision, as in the file; None: the edit cannot be told from another one of its subject.
        relation_threshold: cosine that a question needs; None: only the subject is looked at.
        stats: numbers to look at.
    """

    fact: FactText
    neurons: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    apply: Apply = "tail"
    relation_Kd: Tensor | None = None
    relation_threshold: float | None = None
    stats: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.relation_Kd is not None:
            object.__setattr__(self, "relation_Kd", self.relation_Kd.half())

    @property
    def layers(self) -> list[int]:
        return sorted(self.neurons)


class Firing(NamedTuple):
    """What the trigger did with one row of the last batch.

    Attributes:
        edit: id of the edit that acts; None: none does.
        mention: the name that was found; None where there was none, or where the edit was chosen from outside.
        cosine: of the question with the nearest stored prompt; None where it was not compared.
    """

    edit: str | None
    mention: Mention | None
    cosine: float | None


class EditCache:
    """Lets edits act on a model while it is open.

    Args:
        body: the model.
        tokenizer: a fast one, of the model; for finding names in token ids.
        edits: all in the same layers.
        trigger: when they act; an edit without a threshold of its own acts by its subject alone.
        search: see `index_of`.

    Attributes:
        firings: of the last batch, one per row.

    Raises:
        ValueError: edits in different layers or beyond the model, ids twice, an edit with a threshold and no vectors, or several
            edits of which an oracle would have to choose.
    """

    def __init__(
        self,
        body: FeedForwards,
        tokenizer,
        edits: Sequence[CachedEdit],
        trigger: Trigger | None = None,
        search: Search | None = None,
    ) -> None:
        self.body, self._tokenizer, self.trigger = body, tokenizer, trigger or Trigger()
        self.edits = {edit.fact.id: edit for edit in edits}
        self.firings: list[Firing] = []
        self._check(edits)
        self._search = search
        self._index = index_of([edit.fact for edit in self.edits.values()], search)
        self._plan: _Plan | None = None

    @contextmanager
    def active(
        self, *, chosen: Sequence[str | None] | None = None, prompt_lengths: Sequence[int] | None = None
    ) -> Iterator[EditCache]:
        """While open, every forward pass of the model, within `generate` too, is edited where the trigger says.

        Args:
            chosen: for each row the id of the edit that acts, or None, whatever the relation says: the oracle, which tells
                the quality of values from that of matching. Tables have to say that it was used. A row whose text does not
                name the subject is edited from its prompt's last token on.
            prompt_lengths: tokens of each row that are the question, where an answer follows in the same row; only they are
                searched and compared.

        Raises:
            ValueError: an id that is not in the cache.
        """
        self._require([name for name in chosen or () if name is not None])
        if not self.edits:
            yield self
            return
        layers = next(iter(self.edits.values())).layers
        with ExitStack() as stack:
            base = self.body.transformer.base_model

            def begin(module, args, kwargs) -> None:
                self._plan = self._begin(module, args, kwargs, chosen, prompt_lengths)

            def compare(module, args, kwargs) -> None:
                self._compare(args[0] if args else kwargs["hidden_states"])

            stack.callback(base.register_forward_pre_hook(begin, with_kwargs=True).remove)
            first = self.body.blocks[layers[0]]
            stack.callback(first.register_forward_pre_hook(compare, with_kwargs=True).remove)
            stack.enter_context(self.body.at_inputs({layer: self._adding(layer) for layer in layers}))
            stack.callback(setattr, self, "_plan", None)
            yield self

    @contextmanager
    def disabled(self, *names: str) -> Iterator[EditCache]:
        """While open, these edits do not act, as if they had never been made.

        Raises:
            ValueError: an id that is not in the cache.
        """
        self._require(names)
        edits, index = self.edits, self._index
        kept = {name: edit for name, edit in edits.items() if name not in names}
        self.edits = kept
        self._index = index_of([edit.fact for edit in kept.values()], self._search)
        try:
            yield self
        finally:
            self.edits, self._index = edits, index

    # at the start of a forward pass

    def _begin(self, module, args, kwargs, chosen, prompt_lengths) -> _Plan:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        ids_RT, past = given.get("input_ids"), given.get("past_key_values")
        offset = 0 if past is None else int(past.get_seq_length())
        if ids_RT is None:
            raise ValueError("Edits look for names in token ids, but the model was given embeddings. Pass input_ids.")
        if offset:
            seen = 0 if self._plan is None else self._plan.rows
            if seen != len(ids_RT):
                raise ValueError(
                    f"{len(ids_RT)} rows go on from kept keys, but the tokens of {seen} rows were seen while the edits were "
                    f"active, so it is not known which edits they belong to. Run the prompts again."
                )
            return self._plan.going_on(offset, ids_RT.shape[1])
        if chosen is None and self.trigger.scope == "oracle":
            chosen = [*self.edits] * len(ids_RT)
        mask_RT = given.get("attention_mask")
        plan = _Plan(len(ids_RT), ids_RT.shape[1], ids_RT.device)
        self.firings = []
        for row, ids_T in enumerate(ids_RT.tolist()):
            real = _real_columns(mask_RT, row, len(ids_T))
            if prompt_lengths is not None:
                real = real[: prompt_lengths[row]]
            self.firings.append(self._consider(plan, row, [ids_T[at] for at in real], real, chosen))
        return plan

    def _consider(self, plan: _Plan, row: int, ids: list[int], columns: list[int], chosen) -> Firing:
        if chosen is not None and chosen[row] is None:
            return Firing(None, None, None)
        text = decoded(self._tokenizer, ids)
        if chosen is not None:
            own = index_of([self.edits[chosen[row]].fact], self._search)
            mention = own.find(text)
            first, last = (
                (len(ids) - 1, len(ids) - 1) if mention is None else mentioned_tokens(self._tokenizer, ids, mention)
            )
            plan.put(row, self.edits[chosen[row]], columns[last], columns[-1])
            return Firing(chosen[row], mention, None)
        mention = self._index.find(text)
        if mention is None:
            return Firing(None, None, None)
        first, last = mentioned_tokens(self._tokenizer, ids, mention)
        if not self._compares(mention):
            edit = self.edits[[name for name in mention.edits if self._by_subject(name)][-1]]  # the newest
            plan.put(row, edit, columns[last], columns[-1])
            return Firing(edit.fact.id, mention, None)
        special = set(self._tokenizer.all_special_ids)  # the first token of a text is much larger than all others
        asked = [columns[at] for at, token in enumerate(ids) if not first <= at <= last and token not in special]
        plan.candidates.append((row, mention, columns[last], columns[-1], asked))
        return Firing(None, mention, None)

    # at the first edited block

    def _compare(self, hidden_RTd: Tensor) -> None:
        """Decide by relation, where names alone do not."""
        plan = self._plan
        if plan is None or not plan.candidates:
            return
        for row, mention, lookup, last, asked in plan.candidates:
            kept_1T = torch.zeros(1, hidden_RTd.shape[1], device=hidden_RTd.device)
            kept_1T[0, asked] = 1
            question_d = pooled(hidden_RTd[row : row + 1].detach(), kept_1T)[0]
            cosine, name = max((self._cosine(question_d, self.edits[name]), name) for name in mention.edits)
            fires = cosine >= self._needed(name)
            if fires:
                plan.put(row, self.edits[name], lookup, last)
            self.firings[row] = Firing(name if fires else None, mention, cosine)
        plan.candidates = []

    def _compares(self, mention: Mention) -> bool:
        """Whether the relation decides: that an edit acts at all, or which of several of one subject, where that is known."""
        known = all(self.edits[name].relation_Kd is not None for name in mention.edits)
        return known and (len(mention.edits) > 1 or not self._by_subject(mention.edits[0]))

    def _by_subject(self, name: str) -> bool:
        return self.trigger.scope == "subject" or self.edits[name].relation_threshold is None

    def _needed(self, name: str) -> float:
        if self._by_subject(name):
            return -1.0
        given = self.trigger.relation_threshold
        return self.edits[name].relation_threshold if given is None else given

    def _cosine(self, question_d: Tensor, edit: CachedEdit) -> float:
        return (edit.relation_Kd.to(question_d) @ question_d).max().item()

    # at the neurons

    def _adding(self, layer: int):
        def add(neurons_Nm: Tensor) -> Tensor | None:
            plan = self._plan
            if plan is None or not plan.edits:
                return None
            at_P, row_P = plan.touched()
            if not len(at_P):
                return None
            added_Rm = torch.zeros(plan.rows, neurons_Nm.shape[1], dtype=torch.float32, device=neurons_Nm.device)
            for row, (edit, _, _) in plan.edits.items():
                index = edit.neurons[layer].to(added_Rm.device)
                added_Rm[row, index] = edit.values[layer].to(added_Rm)
            return neurons_Nm.index_add(0, at_P, added_Rm[row_P].to(neurons_Nm.dtype))

        return add

    def _require(self, names: Sequence[str]) -> None:
        if unknown := sorted(set(names) - self.edits.keys()):
            raise ValueError(f"The cache has no edits {unknown}; it has {', '.join(sorted(self.edits)) or 'none'}.")

    def _check(self, edits: Sequence[CachedEdit]) -> None:
        if len(self.edits) != len(edits):
            raise ValueError(f"{len(edits)} edits have {len(self.edits)} different ids; each needs its own.")
        if self.trigger.scope == "oracle" and len(edits) > 1:
            raise ValueError(
                f"trigger.scope is 'oracle', but {len(edits)} edits are there, e.g. {edits[0].fact.id!r}, and it does not tell "
                f"which of them a text means. Apply one edit at a time, or let names decide (trigger.scope: subject)."
            )
        layers = {tuple(edit.layers) for edit in edits}
        if len(layers) > 1:
            raise ValueError(
                f"Edits that act together are all in the same layers, but these are in {[list(of_edit) for of_edit in sorted(layers)]}. "
                f"Undo some of them, or edit their facts again in the layers of the others."
            )
        for of_edit in layers:
            self.body.check_layers(of_edit)
        for edit in edits:
            self._check_fits(edit)
        for edit in edits:
            if edit.relation_threshold is not None and edit.relation_Kd is None:
                raise ValueError(
                    f"The edit {edit.fact.id!r} acts where a question is as close to its prompts as {edit.relation_threshold:.3f}, "
                    f"but was stored without their hidden states. Edit the fact again."
                )

    def _check_fits(self, edit: CachedEdit) -> None:
        for layer, neurons in edit.neurons.items():
            if len(neurons) != len(edit.values[layer]) or int(neurons.max()) >= self.body.width:
                raise ValueError(
                    f"The edit {edit.fact.id!r} has {len(neurons)} neurons, up to number {int(neurons.max())}, and "
                    f"{len(edit.values[layer])} values in layer {layer}; the model has {self.body.width} neurons there. It "
                    f"belongs to another model."
                )


class _Plan:
    """Which edit acts on which row of a batch, and from which column on; kept while answers are generated."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self.rows, self.columns, self.offset, self.device = rows, columns, 0, device
        self.edits: dict[int, tuple[CachedEdit, int, int]] = {}  # row -> edit, lookup column, the prompt's last column
        self.candidates: list[tuple[int, Mention, int, int, list[int]]] = []

    def put(self, row: int, edit: CachedEdit, lookup: int, last: int) -> None:
        self.edits[row] = (edit, lookup, last)

    def going_on(self, offset: int, columns: int) -> _Plan:
        """The same edits for columns that follow."""
        later = _Plan(self.rows, columns, self.device)
        later.offset, later.edits = offset, self.edits
        return later

    def touched(self) -> tuple[Tensor, Tensor]:
        """Indices into the flattened grid of this pass where values are added, and their rows."""
        at, rows = [], []
        for row, (edit, lookup, last) in self.edits.items():
            first = last if edit.apply == "prompt_last" else lookup
            end = self.offset + self.columns if edit.apply == "tail" else first + 1
            inside = range(max(first, self.offset), min(end, self.offset + self.columns))
            at += [row * self.columns + column - self.offset for column in inside]
            rows += [row] * len(inside)
        return torch.tensor(at, dtype=torch.int64, device=self.device), torch.tensor(
            rows, dtype=torch.int64, device=self.device
        )


@torch.no_grad()
def relation_vectors(
    body: FeedForwards, rows: Sequence[Row], subject_starts: Sequence[int], layer: int, special_ids: Sequence[int] = ()
) -> Tensor:
    """(rows, d) pooled hidden states of prompts where the block `layer` begins, without the subject's tokens.

    Args:
        rows: prompts; `lookup` is the subject's last token.
        subject_starts: index of the subject's first token in each prompt.
        layer: the first edited layer.
        special_ids: tokens that do not count, as `EditCache` leaves out those of its tokenizer.
    """
    grid = padded([row.prompt for row in rows], body.device)
    position_T = torch.arange(grid.ids_RT.shape[1], device=body.device)
    first_R1 = torch.tensor(list(subject_starts), device=body.device)[:, None]
    last_R1 = torch.tensor([row.lookup for row in rows], device=body.device)[:, None]
    kept_RT = (position_T < grid.length_R[:, None]) & ~((position_T >= first_R1) & (position_T <= last_R1))
    kept_RT &= ~torch.isin(grid.ids_RT, torch.tensor(list(special_ids), dtype=torch.int64, device=body.device))
    found: list[Tensor] = []

    def keep(module, args, kwargs) -> None:
        found.append(pooled(args[0] if args else kwargs["hidden_states"], kept_RT))

    handle = body.blocks[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        run_until(body, grid, layer)
    finally:
        handle.remove()
    return found[0]


def _real_columns(mask_RT: Tensor | None, row: int, columns: int) -> list[int]:
    if mask_RT is None or mask_RT.ndim != 2:
        return list(range(columns))
    return mask_RT[row, -columns:].nonzero().flatten().tolist()
