"""Edits as a test makes them: of low rank, dense, cached."""

from __future__ import annotations

import torch

from lit_llm.editing.closed_form import LowRank
from lit_llm.editing.deltas import WeightEdit
from lit_llm.editing.edit_cache import CachedEdit
from lit_llm.editing.fact_text import FactText
from lit_llm.editing.fine_tuning import DenseChange
from tests.editing import models


def fact(name: str, subject: str = "", relation: str | None = "capital", target: str = "Lyon") -> FactText:
    subject = subject or name.title()
    return FactText(name, {"en": subject}, {"en": f"What is the {relation} of {subject}?"}, {"en": target}, relation)


def low_rank(
    name: str, seed: int = 0, layers: tuple[int, ...] = (1, 2), d: int = 24, m: int = 40, **more
) -> WeightEdit:
    generator = torch.Generator().manual_seed(seed)
    changes = {
        layer: LowRank(torch.randn(d, 2, generator=generator).double(), 0.1 * torch.randn(m, 2, generator=generator))
        for layer in layers
    }
    return WeightEdit(fact(name, **more), "memit", changes, {"loss": 0.5})


def dense(name: str, bias: bool) -> WeightEdit:
    generator = torch.Generator().manual_seed(7)
    weight = 0.1 * torch.randn(24, 40, generator=generator)
    return WeightEdit(fact(name), "ft_m", {2: DenseChange(weight, torch.full((24,), 0.3) if bias else None)})


def cached(name: str, **more) -> CachedEdit:
    (chosen,) = models.neurons(1, [1, 2])
    values = {layer: torch.linspace(-3, 3, len(chosen[layer])) for layer in chosen}
    return CachedEdit(fact(name, **more), chosen, values, "lookup", torch.eye(24)[:2], 0.75, {"stop": "loss"})
