"""Edits as small files over an untouched base: add, list, take out.

An edit is either values of cached neurons or a change of down projections, most often of low rank. A file names the base by
the hash of its weights and is refused on another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llm.editing.closed_form import LowRank
from lit_llm.editing.edit_cache import CachedEdit
from lit_llm.editing.fact_text import FactText
from lit_llm.editing.fine_tuning import DenseChange
from lit_llm.editing.hooks import FeedForwards
from lit_llm.models.weights import state_digest
from lit_llm.storage import write_atomically

_FORMAT = 1


@dataclass(frozen=True, eq=False)
class WeightEdit:
    """A change of down projections for one fact.

    Attributes:
        fact: what it says.
        method: that computed it.
        changes: by layer; rounded to float32, the precision of the file, so that an edit is the same before and after it.
        stats: numbers to look at.
    """

    fact: FactText
    method: str
    changes: Mapping[int, LowRank | DenseChange]
    stats: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rounded = {
            layer: type(change)(*(None if tensor is None else tensor.detach().float() for tensor in change))
            for layer, change in self.changes.items()
        }
        object.__setattr__(self, "changes", rounded)


Edit = CachedEdit | WeightEdit


class EditSet:
    """The edits over one base, in the order in which they were made.

    Args:
        base: hash of the base's weights, see `base_digest`.
        edits: to begin with.
        apart: they are never on the model together, so several of one subject and relation are no contradiction.

    Attributes:
        history: edits that others have replaced, the oldest first.
    """

    def __init__(self, base: str, edits: Sequence[Edit] = (), *, apart: bool = False) -> None:
        self.base, self.apart, self.history = base, apart, []
        self._edits: dict[str, Edit] = {}
        for edit in edits:
            self.add(edit)

    def __iter__(self) -> Iterator[Edit]:
        return iter(self._edits.values())

    def __len__(self) -> int:
        return len(self._edits)

    def __contains__(self, name: str) -> bool:
        return name in self._edits

    @property
    def cached(self) -> list[CachedEdit]:
        return [edit for edit in self if isinstance(edit, CachedEdit)]

    @property
    def of_weights(self) -> list[WeightEdit]:
        return [edit for edit in self if isinstance(edit, WeightEdit)]

    def copy(self) -> EditSet:
        """The same edits in a set of its own."""
        copied = EditSet(self.base, apart=self.apart)
        copied._edits, copied.history = dict(self._edits), list(self.history)
        return copied

    def add(self, edit: Edit, *, replace: bool = False) -> None:
        """Add an edit.

        Args:
            replace: take the place of an edit of the same subject and relation, which goes to the history.

        Raises:
            ValueError: there is one already and `replace` is not asked for; the id belongs to another fact; or cached values in
                other layers than those of the cached edits that are there.
        """
        same = [] if self.apart else self._same_question(edit)
        if same and not replace:
            raise ValueError(
                f"{_question(same[0].fact)} is edited already, to {_targets(same[0].fact)} (edit {same[0].fact.id!r}); the new "
                f"answer would be {_targets(edit.fact)}. Undo that edit, or ask for it to be replaced."
            )
        if edit.fact.id in self._edits and self._edits[edit.fact.id] not in same:
            other = self._edits[edit.fact.id].fact
            raise ValueError(
                f"The id {edit.fact.id!r} belongs to {_question(other)}, and the new edit is of {_question(edit.fact)}. Choose "
                f"another id."
            )
        _check_layers(edit, [other for other in self.cached if other not in same])
        for other in same:
            self.history.append(self._edits.pop(other.fact.id))
        self._edits[edit.fact.id] = edit

    def contradiction(self) -> tuple[Edit, Edit] | None:
        """Two edits of one subject and relation, which only a set of edits that stay apart may have."""
        if not self.apart:
            return None
        pairs = ((other, edit) for edit in self for other in self._same_question(edit) if other is not edit)
        return next(pairs, None)

    def _same_question(self, edit: Edit) -> list[Edit]:
        return [other for other in self if other.fact.is_same_question(edit.fact)]

    def remove(self, name: str | None = None) -> list[Edit]:
        """Take out one edit, or all; returns what was taken out.

        Raises:
            ValueError: no edit of that name.
        """
        if name is not None and name not in self._edits:
            raise ValueError(f"There is no edit {name!r}; there are {', '.join(self._edits) or 'none'}.")
        removed = list(self) if name is None else [self._edits[name]]
        for edit in removed:
            del self._edits[edit.fact.id]
        return removed

    def save(self, file: Path) -> None:
        """Write all edits, the history too; the file is there whole or not at all."""
        from safetensors.torch import save

        told, tensors = self.state()
        tensors["format"] = torch.tensor([_FORMAT])  # a file without edits still holds a tensor
        write_atomically(Path(file), save(tensors, metadata={"edits": told}))

    def state(self) -> tuple[str, dict[str, Tensor]]:
        """All of it as JSON and tensors, for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        told = {
            "format": _FORMAT,
            "base": self.base,
            "apart": self.apart,
            "edits": [_describe(edit, f"{number}", tensors) for number, edit in enumerate(self)],
            "history": [_describe(edit, f"history.{number}", tensors) for number, edit in enumerate(self.history)],
        }
        return json.dumps(told, ensure_ascii=False), tensors

    @classmethod
    def from_state(cls, state: tuple[str, dict[str, Tensor]]) -> EditSet:
        """What `state` has given."""
        return cls._restored(json.loads(state[0]), state[1])

    @classmethod
    def load(cls, file: Path, *, base: str | None = None, force: bool = False) -> EditSet:
        """Read edits.

        Args:
            base: hash of the model that they are to act on; None does not ask.
            force: cached values are read for another base as well. Changes of weights never are.

        Raises:
            ValueError: not such a file, or edits of another base.
        """
        told, tensors = _read(Path(file))
        edits = cls._restored(told, tensors)
        if base not in (None, edits.base) and (not force or edits.of_weights):
            raise ValueError(
                f"{file} holds edits of a base with the weights {edits.base}, but this model's are {base}. Load the model "
                f"that was edited"
                + ("." if edits.of_weights else ", or try cached values on this one: ask --force true.")
            )
        return edits

    @classmethod
    def _restored(cls, told: dict[str, Any], tensors: Mapping[str, Tensor]) -> EditSet:
        edits = cls(told["base"], apart=told.get("apart", False))
        for number, described in enumerate(told["edits"]):
            edit = _restore(described, f"{number}", tensors)
            edits._edits[edit.fact.id] = edit
        edits.history = [_restore(d, f"history.{number}", tensors) for number, d in enumerate(told["history"])]
        return edits


def base_digest(body: FeedForwards) -> str:
    """sha256 of all weights of a model as it is; to be taken before it is edited."""
    return state_digest(body.transformer)


def _check_layers(edit: Edit, others: Sequence[CachedEdit]) -> None:
    """Which edit a text means is decided at the first layer of all of them; in layers of their own two could act at once."""
    if isinstance(edit, CachedEdit) and others and edit.layers != others[0].layers:
        raise ValueError(
            f"The edit {edit.fact.id!r} is in the layers {edit.layers}, but those that are there, e.g. "
            f"{others[0].fact.id!r}, are in {others[0].layers}. Edit in these layers, or keep the edit in another file."
        )


def _question(fact: FactText) -> str:
    return f"{next(iter(fact.subjects.values()), fact.id)!r} ({fact.relation or 'no relation given'})"


def _targets(fact: FactText) -> str:
    return ", ".join(repr(target) for target in dict.fromkeys(fact.targets.values()))


# the file


def _describe(edit: Edit, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the header says of an edit; its tensors are added to `tensors` under the prefix."""
    told: dict[str, Any] = {"fact": asdict(edit.fact), "stats": dict(edit.stats)}
    if isinstance(edit, CachedEdit):
        for layer in edit.layers:
            tensors[f"{prefix}.{layer}.neurons"] = edit.neurons[layer].to("cpu", torch.int32).contiguous()
            tensors[f"{prefix}.{layer}.values"] = edit.values[layer].detach().cpu().contiguous()
        if edit.relation_Kd is not None:
            tensors[f"{prefix}.relation"] = edit.relation_Kd.detach().cpu().contiguous()
        return told | {
            "kind": "cached",
            "layers": edit.layers,
            "apply": edit.apply,
            "relation_threshold": edit.relation_threshold,
        }
    low_rank = {layer: isinstance(change, LowRank) for layer, change in edit.changes.items()}
    for layer, change in edit.changes.items():
        for name, tensor in zip(change._fields, change, strict=True):
            if tensor is not None:
                tensors[f"{prefix}.{layer}.{name}"] = tensor.cpu().contiguous()
    return told | {"kind": "weights", "method": edit.method, "low_rank": low_rank}


def _restore(told: dict[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> Edit:
    fact = FactText(**{**told["fact"], "aliases": tuple(told["fact"]["aliases"])})
    if told["kind"] == "cached":
        return CachedEdit(
            fact,
            neurons={layer: tensors[f"{prefix}.{layer}.neurons"].long() for layer in told["layers"]},
            values={layer: tensors[f"{prefix}.{layer}.values"] for layer in told["layers"]},
            apply=told["apply"],
            relation_Kd=tensors.get(f"{prefix}.relation"),
            relation_threshold=told["relation_threshold"],
            stats=told["stats"],
        )
    changes: dict[int, LowRank | DenseChange] = {}
    for layer, low_rank in told["low_rank"].items():
        if low_rank:
            changes[int(layer)] = LowRank(tensors[f"{prefix}.{layer}.left"], tensors[f"{prefix}.{layer}.right"])
        else:
            changes[int(layer)] = DenseChange(
                tensors[f"{prefix}.{layer}.weight"], tensors.get(f"{prefix}.{layer}.bias")
            )
    return WeightEdit(fact, told["method"], changes, told["stats"])


def _read(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ValueError(f"{file} does not exist; there are no edits to read. Edit a fact first.")
    try:
        with safe_open(file, "pt") as stored:
            told = json.loads((stored.metadata() or {}).get("edits", "null"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is not a file of edits: {error}.") from error
    if told is None or told["format"] != _FORMAT:
        found = "none" if told is None else told["format"]
        raise ValueError(f"{file} has edits in the format {found}, but this version reads format {_FORMAT}.")
    return told, tensors
