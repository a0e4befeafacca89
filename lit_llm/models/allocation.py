"""How many experts each layer gets: in inverse proportion to how alike languages are there (arXiv 2505.22582), or as told.

Counts include expert 0, the original MLP: a layer with 1 stays dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

_GUARD = Fraction(1, 10**9)  # a quota this little above a whole number is that number


@dataclass(frozen=True)
class Allocation:
    """Experts per layer, and how they were found.

    Attributes:
        rule: `delta`, `new_experts`, `uniform` or `experts`.
        value: delta, the number of new experts, or that of each layer; None for a list.
        experts: of each layer, expert 0 included, but not those of earlier expansions.
        similarity: of each layer; None where no rule looked at it.
        quota: delta's real-valued share of each layer before rounding up; None with other rules.
    """

    rule: str
    value: float | int | None
    experts: list[int]
    similarity: list[float] | None = None
    quota: list[float] | None = None

    @property
    def new(self) -> list[int]:
        """New experts of each layer."""
        return [count - 1 for count in self.experts]

    def text(self, before: Sequence[int] | None = None) -> str:
        """One line a layer, and the total.

        Args:
            before: experts that each layer has already, expert 0 included; None: of a dense model.
        """
        before = [1] * len(self.experts) if before is None else before
        rule = self.rule if self.value is None else f"{self.rule} {self.value:g}"
        lines = [f"Experts per layer ({rule}): {sum(self.new)} new in {len(self.experts)} layers"]
        for layer, (new, known) in enumerate(zip(self.new, before, strict=True)):
            total = known + new
            parts = [f"  layer {layer:>3}: {total} experts" + (" (dense)" if total == 1 else f" ({new} new)")]
            if self.similarity is not None:
                parts.append(f"similarity {self.similarity[layer]:.4f}")
            if self.quota is not None:
                parts.append(f"quota {self.quota[layer]:.3f}")
            lines.append(", ".join(parts))
        return "\n".join(lines)


def by_delta(similarity: Sequence[float], delta: float, min_experts: int = 1) -> Allocation:
    """The published rule: ceil(delta * (1/S_i) / sum_j (1/S_j)) experts, at least `min_experts`.

    Rounding up gives at least 1 and a total of about delta + half the number of layers. Computed in rational numbers, so
    that a quota of exactly 3 does not become 4.

    Args:
        similarity: S of each layer, above 0.
        delta: real-valued experts in total.
        min_experts: of every layer.

    Raises:
        ValueError: a similarity that is not above 0, or delta or min_experts out of range.
    """
    if not 0 < delta < math.inf:
        raise ValueError(f"expand.delta is {delta}; it is the real-valued number of experts in total, above 0.")
    _check(similarity, min_experts)
    weights = [1 / Fraction(value) for value in similarity]
    scale = Fraction(delta) / sum(weights)
    quotas = [scale * weight for weight in weights]
    experts = [max(min_experts, math.ceil(quota - _GUARD)) for quota in quotas]
    return Allocation("delta", delta, experts, list(similarity), [float(quota) for quota in quotas])


def by_budget(similarity: Sequence[float], total: int, min_experts: int = 1) -> Allocation:
    """The same rule with an exact total: one expert after the other to the layer with the smallest S_i n_i.

    This is Adams's apportionment, which rounding up for varying delta amounts to. Ties go to the lower layer.

    Args:
        similarity: S of each layer, above 0.
        total: experts of all layers together, expert 0 of each included.
        min_experts: of every layer.

    Raises:
        ValueError: a similarity that is not above 0, or a total below the minimum of all layers.
    """
    _check(similarity, min_experts)
    layers = len(similarity)
    if total < layers * min_experts:
        raise ValueError(
            f"{total} experts in {layers} layers cannot be at least {min_experts} in each.\n"
            f"  Raise expand.new_experts (to {layers * (min_experts - 1)} or more), or lower expand.min_experts."
        )
    experts, exact = [min_experts] * layers, [Fraction(value) for value in similarity]
    for _ in range(total - layers * min_experts):
        experts[min(range(layers), key=lambda layer: exact[layer] * experts[layer])] += 1
    return Allocation("new_experts", total - layers, experts, list(similarity))


def uniform(layers: int, new_experts: int) -> Allocation:
    """The same number of new experts in every layer, as in MoE-LPR (arXiv 2408.11396).

    Raises:
        ValueError: fewer than one.
    """
    if new_experts < 1:
        raise ValueError(f"expand.uniform is {new_experts}; it counts the new experts of every layer, at least 1.")
    return Allocation("uniform", new_experts, [1 + new_experts] * layers)


def listed(experts: Sequence[int], layers: int) -> Allocation:
    """An explicit list.

    Raises:
        ValueError: another length than the model has layers, a count below 1, or nothing but dense layers.
    """
    if len(experts) != layers:
        raise ValueError(
            f"expand.experts lists {len(experts)} layers, but the model has {layers}. Give one number a layer."
        )
    if wrong := [layer for layer, count in enumerate(experts) if count < 1]:
        raise ValueError(
            f"expand.experts gives layer {wrong[0]} {experts[wrong[0]]} experts, but expert 0, the original MLP, counts: "
            f"1 leaves a layer dense. Raise it to 1 or more."
        )
    if max(experts) == 1:
        raise ValueError("expand.experts is 1 everywhere, so nothing would be added. Give some layers more.")
    return Allocation("experts", None, list(experts))


def classifier_layers(
    wanted: int | Sequence[int] | None, experts: Sequence[int], similarity_new_old: Sequence[float] | None
) -> list[int]:
    """The layers that get a classifier in front of their router.

    Args:
        wanted: their indices; or K: the K routed layers where new languages are most like old ones, which is what the
            classifier tells apart (ties to the lower index); None or 0: none.
        experts: of each layer, expert 0 included.
        similarity_new_old: of each layer; needed for a number.

    Raises:
        ValueError: a layer that stays dense or does not exist, more layers than are routed, or K without similarities.
    """
    routed = [layer for layer, count in enumerate(experts) if count > 1]
    if not wanted:
        return []
    if not isinstance(wanted, int):
        if wrong := sorted(set(wanted) - set(routed)):
            raise ValueError(
                f"classifier_layers names layer {wrong[0]}, which has no router: "
                f"{'it stays dense' if 0 <= wrong[0] < len(experts) else f'the model has {len(experts)} layers'}.\n"
                f"  Routed layers: {', '.join(map(str, routed))}."
            )
        return sorted(set(wanted))
    if wanted < 0 or wanted > len(routed):
        raise ValueError(
            f"classifier_layers is {wanted}, but {len(routed)} layers have a router. Name at most as many."
        )
    if similarity_new_old is None:
        raise ValueError(
            f"classifier_layers is {wanted}, a number of layers, and there is no similarity to choose them by.\n"
            f"  List the layers, or let the similarity be measured or read from a file."
        )
    return sorted(sorted(routed, key=lambda layer: (-similarity_new_old[layer], layer))[:wanted])


def _check(similarity: Sequence[float], min_experts: int) -> None:
    if min_experts < 1:
        raise ValueError(f"expand.min_experts is {min_experts}; expert 0, the original MLP, is always there. Set 1.")
    for layer, value in enumerate(similarity):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(
                f"The similarity of layer {layer} is {value}, but the rule divides by it: it must be above 0. List the "
                f"experts by hand (expand.experts), or take the same number everywhere (expand.uniform)."
            )
