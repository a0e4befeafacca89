"""Edits in the weights of a model: applied and undone over its own numbers, and made of cached values.

Weights are never changed back by subtraction: they are composed anew from the base's own numbers, so undoing is exact in any
order and in any precision.

Shapes: d hidden size, m neurons of a layer, N columns of a low-rank change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_llm.editing.closed_form import Bakeable, Covariance, LowRank, bake
from lit_llm.editing.deltas import WeightEdit
from lit_llm.editing.edit_cache import CachedEdit
from lit_llm.editing.fine_tuning import DenseChange
from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.rows import Row


class EditStack:
    """Changes of weights over a base: the live weights are always the base's plus the changes that are active.

    Args:
        body: the model, as it is before any edit.
    """

    def __init__(self, body: FeedForwards) -> None:
        self.body = body
        self._base: dict[int, list[Tensor]] = {}
        self._active: dict[str, WeightEdit] = {}

    @property
    def active(self) -> list[str]:
        """Ids of the edits that the weights contain."""
        return list(self._active)

    def apply(self, edits: Sequence[WeightEdit]) -> None:
        """Add edits to the live weights.

        Raises:
            ValueError: one is active already, or was computed for other shapes; nothing is changed then.
        """
        for edit in edits:
            if edit.fact.id in self._active:
                raise ValueError(f"The edit {edit.fact.id!r} is active already. Undo it first.")
            for layer, change in edit.changes.items():
                self.body.check_layers([layer])
                _check_shape(self.body, layer, change, edit.fact.id)
        touched = {layer for edit in edits for layer in edit.changes}
        for layer in touched - self._base.keys():
            self._base[layer] = [parameter.detach().cpu().clone() for parameter in self.body.down(layer).parameters()]
        self._active |= {edit.fact.id: edit for edit in edits}
        self._compose(touched)

    def undo(self, name: str | None = None) -> None:
        """Take one edit, or all, out of the live weights.

        Raises:
            ValueError: it is not active.
        """
        if name is not None and name not in self._active:
            raise ValueError(f"The edit {name!r} is not active; active are {', '.join(self._active) or 'none'}.")
        removed = list(self._active.values()) if name is None else [self._active[name]]
        for edit in removed:
            del self._active[edit.fact.id]
        self._compose({layer for edit in removed for layer in edit.changes})

    def base_state(self) -> dict[int, list[Tensor]]:
        """By layer, the untouched parameters of the down projections that edits have touched."""
        return {layer: [value.clone() for value in values] for layer, values in self._base.items()}

    @torch.no_grad()
    def _compose(self, layers: set[int]) -> None:
        for layer in layers:
            for parameter, value in zip(self.body.down(layer).parameters(), self._base[layer], strict=True):
                parameter.copy_(value)
            changes = [edit.changes[layer] for edit in self._active.values() if layer in edit.changes]
            if not changes:
                continue
            _add(self.body.weight(layer), changes)
            biases = [change.bias for change in changes if isinstance(change, DenseChange) and change.bias is not None]
            if biases:
                bias_d = self.body.down(layer).bias
                bias_d.copy_(bias_d.double() + sum(bias.to(bias_d.device, torch.float64) for bias in biases))


def baked(
    body: FeedForwards,
    edits: Sequence[CachedEdit],
    prompts: Mapping[str, Sequence[Row]],
    covariances: Mapping[int, Covariance],
    *,
    covariance_weight: float = 15_000.0,
) -> list[WeightEdit]:
    """Cached edits as changes of weights, for serving without hooks; the model is left as it was.

    What the weights then do to other texts is no longer nothing, as it is with the cache: measure locality again.

    Args:
        prompts: by id, the edit prompts of all languages.
        covariances: by layer, second moments over ordinary text, or their inverses.
        covariance_weight: how strongly ordinary text is protected.

    Raises:
        ValueError: values added at the prompt's last token alone, which has no such form; edits without prompts.
    """
    missing = [edit.fact.id for edit in edits if not prompts.get(edit.fact.id)]
    if missing:
        raise ValueError(f"Edits are written into weights where their prompts are, but there are none for {missing}.")
    for edit in edits:
        if edit.apply == "prompt_last":
            raise ValueError(
                f"The edit {edit.fact.id!r} acts at the prompt's last token, whatever stands there, so no key stands for it in "
                f"the weights. Only edits with apply: tail or lookup can be written into them."
            )
    facts = [Bakeable(tuple(prompts[e.fact.id]), e.neurons, e.values, e.apply == "tail") for e in edits]
    with body.restoring(sorted({layer for edit in edits for layer in edit.layers})):
        parts = bake(body, facts, covariances, covariance_weight=covariance_weight)
    return [WeightEdit(edit.fact, "bake", part) for edit, part in zip(edits, parts, strict=True)]


def _add(weight_dm: Tensor, changes: Sequence[LowRank | DenseChange]) -> None:
    """In float64, rounded once; all changes of low rank are one product, so there is one wide matrix however many they are."""
    total_dm = weight_dm.double()
    low_rank = [change for change in changes if isinstance(change, LowRank)]
    if low_rank:
        left_dN, right_mN = (torch.cat([change[side] for change in low_rank], 1).to(total_dm) for side in (0, 1))
        total_dm.addmm_(left_dN, right_mN.T)
    for change in changes:
        if isinstance(change, DenseChange):
            total_dm += change.weight.to(total_dm.device)
    weight_dm.copy_(total_dm)


def _check_shape(body: FeedForwards, layer: int, change: LowRank | DenseChange, name: str) -> None:
    weight_dm = body.weight(layer)
    shape = (change.left.shape[0], change.right.shape[0]) if isinstance(change, LowRank) else tuple(change.weight.shape)
    if shape != tuple(weight_dm.shape):
        raise ValueError(
            f"The edit {name!r} changes a {shape[0]} x {shape[1]} matrix in layer {layer}, but the model's is "
            f"{weight_dm.shape[0]} x {weight_dm.shape[1]}. It belongs to another model."
        )
