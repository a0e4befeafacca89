"""What an expanded model is: its groups of languages and the experts of every layer, as `layer_moe.json` has it.

The plan is the only description. Modules, trained parameters and names of saved tensors follow from it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from lit_llm.storage import write_atomically

PLAN_FILE = "layer_moe.json"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class BaseModel:
    """The dense model that is expanded.

    Args:
        model_type: of transformers.
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        fingerprint: sha256 of its parameters, see `surgery.base_fingerprint`.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    fingerprint: str | None = None


@dataclass(frozen=True)
class LanguageGroup:
    """Languages that were added together; the first group is what the dense model knew."""

    name: str
    languages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ClassifierPlan:
    """A classifier in front of a layer's router, see `experts.Classifier`."""

    scope: Literal["token", "sequence_sum"] = "token"
    threshold: float = 0.5


@dataclass(frozen=True)
class LayerPlan:
    """One decoder layer.

    Args:
        experts: experts by group; the first entry is always 1, the original MLP.
        classifier: in front of the router, or None.
    """

    experts: list[int]
    classifier: ClassifierPlan | None = None


@dataclass(frozen=True)
class MlpNames:
    """How the base's MLPs are built: a kind of `mlp_kinds`, and the names of their projections."""

    kind: str
    names: list[str]


@dataclass(frozen=True)
class ExpansionPlan:
    """The plan of an expanded model.

    Args:
        base: the dense model.
        groups: languages in order of addition, the original ones first.
        layers: one entry per decoder layer.
        mlp: how the base's MLPs are built.
        experts_per_token: k; layers with fewer experts use all.
        renormalise: `always` divides the weights of the chosen experts by their sum also for k = 1, where the released
            code does not.
        similarity: of the newest expansion: file, seed, tokens wanted and measured of each language, and what was found.
        allocation: of the newest expansion: rule and value.
        format_version: of the file.

    Raises:
        ValueError: entries that contradict each other.
    """

    base: BaseModel
    groups: list[LanguageGroup]
    layers: list[LayerPlan]
    mlp: MlpNames
    experts_per_token: int = 2
    renormalise: Literal["released", "always"] = "released"
    similarity: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None
    format_version: int = _FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != _FORMAT_VERSION:
            raise ValueError(
                f"The plan has format_version {self.format_version}, and this version of lit_llm reads {_FORMAT_VERSION}. Leave "
                f"format_version out."
            )
        if self.experts_per_token < 1:
            raise ValueError(f"experts_per_token is {self.experts_per_token}; it must be at least 1.")
        if self.experts_per_token == 1 and self.renormalise != "always":
            raise ValueError(
                "experts_per_token is 1 and renormalise is 'released', which scales every output by the router's "
                "probability: the expanded model would not start as the dense one. Set renormalise to 'always', or "
                "experts_per_token to 2."
            )
        if len(self.layers) != self.base.num_layers:
            raise ValueError(f"The plan is for {len(self.layers)} layers, but the model has {self.base.num_layers}.")
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"The plan names a group of languages twice: {', '.join(names)}.")
        for index, layer in enumerate(self.layers):
            self._check_layer(index, layer)

    def _check_layer(self, index: int, layer: LayerPlan) -> None:
        if len(layer.experts) != len(self.groups):
            raise ValueError(
                f"Layer {index} lists experts of {len(layer.experts)} groups ({layer.experts}), but the plan has "
                f"{len(self.groups)} groups."
            )
        if layer.experts[0] != 1 or any(count < 0 for count in layer.experts):
            raise ValueError(
                f"Layer {index} lists the experts {layer.experts}; the first is the original MLP, so 1, and none is "
                f"below 0."
            )
        if layer.classifier is not None and sum(layer.experts) == 1:
            raise ValueError(
                f"Layer {index} has a classifier but no added expert, so there is nothing to decide. Classifiers fit the "
                f"layers {self.routed_layers}."
            )

    # ---------------------------------------------------------------- reading

    @property
    def expert_counts(self) -> list[int]:
        """N of each layer, the original MLP included."""
        return [sum(layer.experts) for layer in self.layers]

    @property
    def routed_layers(self) -> list[int]:
        """Layers that have added experts."""
        return [index for index, count in enumerate(self.expert_counts) if count > 1]

    @property
    def classifier_layers(self) -> list[int]:
        return [index for index, layer in enumerate(self.layers) if layer.classifier is not None]

    def experts_after_group(self, layer: int) -> list[int]:
        """How many experts a layer had after each group was added; the experts of later groups have larger numbers."""
        return list(accumulate(self.layers[layer].experts))

    def extends(self, other: ExpansionPlan) -> bool:
        """Whether this plan is `other` with further groups, and nothing else changed."""
        known = len(other.groups)
        return (
            (self.base, self.mlp, self.experts_per_token, self.renormalise)
            == (other.base, other.mlp, other.experts_per_token, other.renormalise)
            and self.groups[:known] == other.groups
            and all(ours.experts[:known] == theirs.experts for ours, theirs in zip(self.layers, other.layers))
        )

    # --------------------------------------------------------------- changing

    def with_group(
        self,
        name: str,
        languages: list[str],
        experts: list[int],
        similarity: dict[str, Any] | None = None,
        allocation: dict[str, Any] | None = None,
    ) -> ExpansionPlan:
        """The plan with a further group. Classifiers are left out: they are made anew in the review stage.

        Args:
            name: of the group.
            languages: of the group.
            experts: per layer, the original MLP counted, as the allocation gives them: one less is added.
            similarity: what the allocation was computed from.
            allocation: rule and value.

        Raises:
            ValueError: another number of layers, or a 0 in the list.
        """
        if len(experts) != len(self.layers):
            raise ValueError(
                f"The list of experts has {len(experts)} entries, but the model has {len(self.layers)} layers."
            )
        if wrong := [index for index, count in enumerate(experts) if count < 1]:
            raise ValueError(
                f"The list of experts has {experts[wrong[0]]} for layer {wrong[0]}. The original MLP is counted, so 1 "
                f"leaves a layer as it is."
            )
        layers = [LayerPlan([*layer.experts, count - 1]) for layer, count in zip(self.layers, experts)]
        group = LanguageGroup(name, list(languages))
        return replace(self, groups=[*self.groups, group], layers=layers, similarity=similarity, allocation=allocation)

    def with_classifiers(self, layers: list[int], classifier: ClassifierPlan = ClassifierPlan()) -> ExpansionPlan:
        """The plan with classifiers on exactly these layers.

        Raises:
            ValueError: a layer that does not exist or has no added expert.
        """
        if wrong := [layer for layer in layers if not 0 <= layer < len(self.layers)]:
            raise ValueError(
                f"classifier_layers names {wrong}, but the model has the layers 0 to {len(self.layers) - 1}."
            )
        changed = [
            replace(layer, classifier=classifier if index in layers else None)
            for index, layer in enumerate(self.layers)
        ]
        return replace(self, layers=changed)

    # ----------------------------------------------------------------- as JSON

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ExpansionPlan:
        """Read what `to_dict` gave.

        Raises:
            ValueError: missing or unknown fields, or another format.
        """
        if fields.get("format_version") != _FORMAT_VERSION:
            raise ValueError(
                f"The plan has format_version {fields.get('format_version')!r}, and this version of lit_llm reads "
                f"{_FORMAT_VERSION}. Read it with the version that wrote it, or expand the dense model again."
            )
        try:
            layers = [
                LayerPlan(layer["experts"], ClassifierPlan(**layer["classifier"]) if layer.get("classifier") else None)
                for layer in fields["layers"]
            ]
            parts = {
                "base": BaseModel(**fields["base"]),
                "groups": [LanguageGroup(**group) for group in fields["groups"]],
                "layers": layers,
                "mlp": MlpNames(**fields["mlp"]),
            }
            return cls(**{**fields, **parts})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"This is no plan of an expanded model ({PLAN_FILE}): {error}. Take the file that a run left in its folder `model`, "
                f"unchanged."
            ) from error

    def save(self, folder: Path) -> None:
        """Write `layer_moe.json`."""
        write_atomically(Path(folder) / PLAN_FILE, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> ExpansionPlan:
        """Read `layer_moe.json`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no plan.
        """
        file = Path(folder) / PLAN_FILE
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {PLAN_FILE}, so it is no saved expansion. Name a folder that `save_delta` or a run of "
                f"LayerMoE wrote (its `model`)."
            )
        return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
