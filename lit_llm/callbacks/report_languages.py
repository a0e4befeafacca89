"""Figures and tables of the report for runs that add languages: similarity, experts, routing, forgetting."""

from __future__ import annotations

import math
from html import escape
from itertools import cycle
from typing import Any

from lit_llm.callbacks.report_chart import Series, line_chart, number
from lit_llm.callbacks.report_data import RunData
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
        for (name, values), colour in zip(curves.items(), cycle(_COLOURS))
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


def language_section(run: RunData) -> str:
    """What a run did for each language; empty for runs on other data."""
    line = next((line for line in reversed(run.languages or []) if line["stage"] == "val"), None)
    parts = []
    if line is not None:
        parts += [f"<h3>What was learned and forgotten <small>after {line['step']:,} steps</small></h3>"]
        parts += [_forgetting(line)]
    if run.expansion is not None:
        parts += ["<h3>Experts</h3>", _parameters(run.expansion["parameters"]), _experts(run)]
    figures = similarity_figures(run.similarity) if run.similarity is not None else []
    if line is not None:
        figures += [*_curves(run, line), *_routing(line.get("routing"), line["languages"])]
    figures = [figure for figure in figures if figure]
    return "".join(parts) + (f"<div class=figures>{''.join(figures)}</div>" if figures else "")


def _forgetting(line: dict[str, Any]) -> str:
    moments = line["moments"]
    head = "".join(f"<th>{escape(name)}</th>" for name, _ in moments)
    rows = []
    for group, members in line["groups"].items():
        for language in members:
            rows.append(_score_row(f"{language} <small>{escape(group)}</small>", [s.get(language) for _, s in moments]))
        means = [_mean([s.get(language) for language in members]) for _, s in moments]
        rows.append(_score_row(f"<b>mean of {escape(group)}</b>", means))
    note = "Loss in nats per token, perplexity and share of tokens guessed right, on text that nobody trained on."
    return (
        f"<div class=scroll><table class=headline><thead><tr><th></th>{head}<th>loss moved by</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div><p class=note>{note}</p>"
    )


def _score_row(name: str, scores: list[list[float] | None]) -> str:
    cells = "".join(f"<td>{_score(score)}</td>" for score in scores)
    first, last = (scores[0], scores[-1]) if scores else (None, None)
    moved = f"{last[0] - first[0]:+.3f}" if first and last and len(scores) > 1 else "–"
    return f"<tr><th>{name}</th>{cells}<td>{moved}</td></tr>"


def _score(score: list[float] | None) -> str:
    if score is None:
        return "–"
    loss, accuracy = score
    return f"{loss:.3f} <small>ppl {number(math.exp(min(loss, 700)))}, {accuracy:.1%}</small>"


def _mean(scores: list[list[float] | None]) -> list[float] | None:
    known = [score for score in scores if score is not None]
    return [sum(column) / len(known) for column in zip(*known, strict=True)] if len(known) == len(scores) > 0 else None


def _parameters(counts: dict[str, int]) -> str:
    words = {
        "total": "parameters",
        "dense": "of the dense model",
        "added": "added",
        "trained": "trained in this stage",
        "active": "used by one token",
        "active_bypassed": "used by a token that all classifiers keep at expert 0",
    }
    shown = {
        name: told for name, told in words.items() if name != "active_bypassed" or counts[name] != counts["active"]
    }
    items = "".join(f"<div><dt>{told}</dt><dd>{_millions(counts[name])}</dd></div>" for name, told in shown.items())
    return f"<dl class=facts>{items}</dl>"


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def _experts(run: RunData) -> str:
    plan = run.expansion["plan"]
    groups = [group["name"] for group in plan["groups"]]
    head = "".join(f"<th>{escape(name)}</th>" for name in groups[1:])
    rows = []
    for layer, entry in enumerate(plan["layers"]):
        added = "".join(f"<td>{count}</td>" for count in entry["experts"][1:])
        measured = "–" if run.similarity is None else f"{run.similarity['similarity'][layer]:.4f}"
        classifier = "–" if entry["classifier"] is None else f"per {escape(entry['classifier']['scope'])}"
        rows.append(
            f"<tr><th>{layer}</th>{added}<td>{sum(entry['experts'])}</td><td>{measured}</td><td>{classifier}</td></tr>"
        )
    return (
        "<details><summary>experts of each layer</summary><div class=scroll><table class=headline><thead><tr><th>layer</th>"
        f"{head}<th>in all</th><th>similarity</th><th>classifier</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "</div></details>"
    )


def _curves(run: RunData, line: dict[str, Any]) -> list[str]:
    losses = {f"val/loss_{language}": language for language in line["languages"]}
    balance = {"max_violation": "mean", "max_violation_worst": "worst layer"}
    prior = {"old_prob_expert0": "old languages", "new_prob_expert0": "new languages"}
    classifier = {
        "classifier_acc_old": "old languages",
        "classifier_acc_new": "new languages",
        "bypass_share": "bypassed",
    }
    entropy = {"load_entropy": "of the load", "router_entropy": "of the router"}
    return [
        _figure(run, "Validation loss by language", losses),
        _figure(run, "Load in training: largest share above an even one", _of(balance)),
        _figure(run, "Entropy in training, 1 is even", _of(entropy)),
        _figure(run, "Probability of expert 0 in training", _of(prior)),
        _figure(run, "Classifiers in training: share judged right", _of(classifier)),
    ]


def _of(names: dict[str, str]) -> dict[str, str]:
    return {f"train/routing/{name}": words for name, words in names.items()}


def _figure(run: RunData, title: str, metrics: dict[str, str]) -> str:
    logged = [name for name in metrics if run.curve(name)]
    series = [Series(metrics[name], run.curve(name), colour) for name, colour in zip(logged, cycle(_COLOURS))]
    return line_chart(title, series) if series else ""


_MAPS = {
    "expert0_share": "Share of slots that expert 0 got, by language and layer",
    "expert0_prob": "Probability of expert 0, by language and layer",
    "classifier_acc": "Classifier: share judged right, by language and layer",
    "bypass_share": "Sent past the router, by language and layer",
}


def _routing(routing: dict[str, Any] | None, languages: list[str]) -> list[str]:
    if routing is None:
        return []
    layers = [str(layer) for layer in routing["layers"]]
    figures = []
    for name, title in _MAPS.items():
        values = _numbers(routing["by_language"][name])
        seen = [j for j in range(len(layers)) if any(math.isfinite(row[j]) for row in values)]
        if seen:
            shown = [[row[j] for j in seen] for row in values]
            figures.append(heat_map(title, languages, [layers[j] for j in seen], shown, ends=(0.0, 1.0)))
    most = max(routing["experts"])
    shares = [[row[e] if e < len(row) else math.nan for row in _numbers(routing["load_shares"])] for e in range(most)]
    title = "Load: share of the slots of each expert, by layer"
    figures.append(heat_map(title, [f"expert {e}" for e in range(most)], layers, shares, ends=(0.0, 1.0)))
    return figures


def _numbers(rows: list[list[float | None]]) -> list[list[float]]:
    return [[math.nan if value is None else value for value in row] for row in rows]
