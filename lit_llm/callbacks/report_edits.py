"""The section of the report for runs that edit facts: scores, matrices of languages, overlap of neurons, answers."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from lit_llm.callbacks.report_chart import number
from lit_llm.callbacks.report_data import RunData
from lit_llm.callbacks.report_heat_map import heat_map

_KINDS = {
    "reliability": "the edited question",
    "generality": "worded anew",
    "locality": "unrelated: as before the edit",
    "portability": "one step further",
}
_PROTOCOLS = {"generated": "written freely", "exact": "teacher-forced", "tokens": "tokens, teacher-forced"}
_EVENTS = {
    "hit": "questions about an edited subject that its edit answers",
    "miss": "that no edit answers",
    "wrong": "that another fact's edit answers",
    "unrelated_edited": "unrelated questions that an edit answers",
}
_ANSWERS = 60  # shown at most


def edit_section(run: RunData) -> str:
    """What became of edited facts; empty for runs that edit none."""
    lines = [line for line in run.edits or [] if line["facts"]] or (run.edits or [])
    if not lines:
        return ""
    line = lines[-1]
    start = next((other for other in run.edits if other["step"] == 0 and other["stage"] == line["stage"]), None)
    alone = ", each asked under its own edit alone" if line.get("single") else ""
    figures = [*_matrices(line), *_overlap(line)]
    return (
        f"<h3>{line['facts']} facts{alone}, {escape(line['method'])} <small>after {line['step']:,} steps</small></h3>"
        + _facts(line)
        + _scores(line, start)
        + (f"<div class=figures>{''.join(figures)}</div>" if figures else "")
        + _covariance(line)
        + _answers(line)
    )


def _facts(line: dict[str, Any]) -> str:
    facts = []
    if line.get("seconds_per_fact") is not None:
        facts.append(("seconds per fact", f"{line['seconds_per_fact']:.2f}"))
    if known := line.get("already_known"):
        facts.append(("facts not edited, since the model says so already", str(len(known))))
    facts += [(_EVENTS[name], f"{value:.1f}%") for name, value in line["trigger"].items()]
    of_counterfact = line.get("counterfact", {}).get("all", {})
    facts += [
        (f"CounterFact {name}", f"{of_counterfact[name]:.1f}%") for name in ("ES", "PS", "NS") if name in of_counterfact
    ]
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f"<dl class=facts>{items}</dl>" if facts else ""


def _scores(line: dict[str, Any], start: dict[str, Any] | None) -> str:
    """A row for each kind of question and way of asking: every language, their mean, and the mean before the edits."""
    languages = line["languages"]
    head = "".join(f"<th>{escape(name)}</th>" for name in languages)
    rows = []
    for kind, by_language in line["scores"].items():
        for protocol, words in _PROTOCOLS.items():
            if protocol not in by_language["all"]:
                continue
            cells = "".join(f"<td>{_percent(by_language.get(name, {}).get(protocol))}</td>" for name in languages)
            before = None if start is None else start["scores"].get(kind, {}).get("all", {}).get(protocol)
            rows.append(
                f"<tr><th>{kind} <small>{_KINDS[kind]}, {words}</small></th><td>{_percent(before)}</td>{cells}"
                f"<td><b>{_percent(by_language['all'][protocol])}</b></td></tr>"
            )
    return (
        f"<div class=scroll><table class=headline><thead><tr><th>percent right</th><th>before</th>{head}<th>all</th></tr>"
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _matrices(line: dict[str, Any]) -> list[str]:
    note = (
        "A row for the language of the edit, a column for the language of the question; all: edited in every language."
    )
    return [
        heat_map(
            f"{kind.capitalize()} by language, {_PROTOCOLS[protocol]}, percent",
            matrix["rows"],
            line["languages"],
            _numbers(matrix["values"]),
            ends=(0.0, 100.0),
            note=f"{note} Mean where asked in the language of the edit: {_percent(matrix.get('same_language'))}, in another: "
            f"{_percent(matrix.get('cross_language'))}.",
        )
        for kind, by_protocol in line["matrices"].items()
        for protocol, matrix in by_protocol.items()
    ]


def _overlap(line: dict[str, Any]) -> list[str]:
    found = line.get("overlap") or {"layers": {}}
    figures = []
    for layer, of_layer in found["layers"].items():
        same, different = number(of_layer["same_fact"]), number(of_layer["different_facts"])
        note = (
            f"Share of the neurons of either language that both select, mean over facts. All languages share {same} neurons for "
            f"one fact, {different} for a mixture of facts; by chance it would be {number(of_layer['chance'])}."
        )
        title = f"Neurons that two languages select, layer {layer}"
        languages = found["languages"]
        figures.append(heat_map(title, languages, languages, _numbers(of_layer["jaccard"]), ends=(0.0, 1.0), note=note))
    return figures


def _covariance(line: dict[str, Any]) -> str:
    """How far the second moments of closed-form editors have converged, a row for each layer."""
    found = line.get("covariance")
    if found is None:
        return ""
    doublings = sorted({tokens for points in found["curve"].values() for tokens, _ in points})
    head = "".join(f"<th>at {tokens:,}</th>" for tokens in doublings)
    rows = []
    for layer, error in found["split_error"].items():
        changes = dict(found["curve"].get(layer, []))
        cells = "".join(f"<td>{_share(changes.get(tokens))}</td>" for tokens in doublings)
        rows.append(f"<tr><th>layer {layer}</th><td>{_share(error)}</td>{cells}</tr>")
    return (
        f"<details><summary>second moments of neurons over {found['tokens']:,} tokens</summary><div class=scroll>"
        f"<table class=plain><thead><tr><th></th><th>estimated error</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></div><p class=note>Estimated relative error: half the distance between the moments of even and of odd "
        "batches. Behind it, the relative change since half as many tokens.</p></details>"
    )


def _answers(line: dict[str, Any]) -> str:
    if not line["answers"]:
        return ""
    rows = []
    for answer in line["answers"][:_ANSWERS]:
        question = answer["prompt"].splitlines()[-1]
        mark = "✓" if answer["right"] else "✗"
        shown = "".join(f"<td>{escape(answer[name] or '')}</td>" for name in ("wanted", "before", "after"))
        rows.append(
            f"<tr><th>{escape(question)} <small>{escape(answer['language'])}, {answer['kind']}, {escape(answer['fact'])}"
            f"</small></th>{shown}<td>{mark}</td></tr>"
        )
    more = len(line["answers"]) - len(rows)
    rest = f"<p class=note>{more} more are in edits.jsonl.</p>" if more > 0 else ""
    return (
        "<details open><summary>answers before and after</summary><div class=scroll><table class=plain><thead><tr>"
        "<th>question</th><th>wanted</th><th>before</th><th>after</th><th></th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>{rest}</details>"
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _numbers(rows: list[list[float | None]]) -> list[list[float]]:
    return [[math.nan if value is None else value for value in row] for row in rows]
