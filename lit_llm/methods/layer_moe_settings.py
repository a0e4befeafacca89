"""Settings of LayerMoE that say how a model grows: what is measured, and how many experts each layer gets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, Optional

_RULES = ("new_experts", "delta", "uniform", "experts")


@dataclass
class Similarity:
    """How alike the languages are in each layer, measured before anything is changed (arXiv 2505.22582).

    Args:
        file: read this report (tools/language_similarity.py writes one) instead of measuring.
        tokens_per_language: measured of each language.
        skip_special_tokens: let them not count: the first token of a text is the same vector in all languages.
        max_length: of a document; the rest is left out.
        batch_tokens: positions run at a time.
    """

    file: Optional[str] = None
    tokens_per_language: int = 100_000
    skip_special_tokens: bool = True
    max_length: int = 1024
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        for name in ("tokens_per_language", "max_length", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"similarity.{name} is {getattr(self, name)}; it counts tokens and must be at least 1."
                )


@dataclass
class Expand:
    """How many experts each layer gets; exactly one of the first four is set.

    Every rule counts one expansion: where the student was expanded before, the experts of earlier groups are not counted,
    and what is added is one less than the number of each layer.

    Args:
        new_experts: in all layers together, by the published rule with an exact total.
        delta: the paper's parameter: real-valued experts in total, expert 0 counted, each layer's share rounded up.
        uniform: new experts in every layer, as in MoE-LPR (arXiv 2408.11396).
        experts: of each layer, expert 0 counted: 1 adds none to a layer.
        min_experts: of every layer, for `new_experts` and `delta`.
        experts_per_token: k, slots of a token; decided once, when a dense model is expanded.
        router_init: when a layer grows again: all rows `fresh`, as released, or `keep` those of older experts. A layer that
            gets none keeps its router either way.
        seed: of new routers; `seed_everything` where it is left out.
    """

    new_experts: Optional[int] = None
    delta: Optional[float] = None
    uniform: Optional[int] = None
    experts: Optional[list[int]] = None
    min_experts: int = 1
    experts_per_token: int = 2
    router_init: Literal["fresh", "keep"] = "fresh"
    seed: Optional[int] = None

    def __post_init__(self) -> None:
        given = [name for name in _RULES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expand sets {' and '.join(given) or 'none'} of {', '.join(_RULES)}, which each decide the experts per layer."
                f" Set exactly one."
            )
        if self.new_experts is not None and self.new_experts < 1:
            raise ValueError(f"expand.new_experts is {self.new_experts}; it counts experts and must be at least 1.")
        if self.min_experts != 1 and not self.by_similarity:
            raise ValueError(
                f"expand.min_experts is {self.min_experts}, but expand.{given[0]} decides the experts of every layer. "
                f"Leave min_experts out."
            )
        if self.experts_per_token < 2:
            raise ValueError(
                f"expand.experts_per_token is {self.experts_per_token}; with one expert a token the weights are not "
                f"divided by their sum, so the model would not start as the dense one. Set 2 or more."
            )

    @property
    def by_similarity(self) -> bool:
        """Whether the rule looks at similarities."""
        return self.new_experts is not None or self.delta is not None

    def overlay(self, experts: list[int]) -> dict:
        """These settings with the experts as a list, for a config that repeats a run without measuring."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**kept, **dict.fromkeys(_RULES), "min_experts": 1, "experts": experts}
