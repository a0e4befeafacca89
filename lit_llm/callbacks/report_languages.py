"""Figures and tables of the report for runs that add languages: similarity, experts, routing, forgetting."""

from __future__ import annotations

from typing import Any

from lit_llm.callbacks.report_chart import Series, line_chart
from lit_llm.callbacks.report_heat_map import heat_map

_COLOURS = [f"var(--c{i})" for i in range(1, 9)]


def similarity_figures(report: dict[str, Any]) -> list[str]:
    """Similarity of languages per layer: the aggregates as curves, and every pair as a heat-map.

    Args:
        report: the content of similarity.json.
    """
    curves = {"S": report["similarity"], "new-new": report["new_new"], "new-old": report["new_old"]}
    series = [
        Series(name, [(float(layer), value) for layer, value in enumerate(values)], colour)
        for (name, values), colour in zip(curves.items(), _COLOURS, strict=False)
        if values
    ]
    pairs = report["pairs"]
    layers = [str(layer) for layer in range(len(report["similarity"]))]
    return [
        line_chart(
            "Similarity of languages by layer", series, note="Mean cosine of MLP inputs; S decides the experts."
        ),
        heat_map("Similarity of pairs by layer", list(pairs), layers, list(pairs.values())),
    ]
