"""The report's heat-maps: answers with their tokens on a ground that shows a number, which the pointer tells."""

from __future__ import annotations

import math
from html import escape
from typing import Any, NamedTuple

from lit_llm.callbacks.report_chart import number
from lit_llm.callbacks.report_data import RunData

_MOST_TOKENS = 300  # of an answer: a page with more becomes heavy
_STRONGEST = 0.6  # opacity of a ground under text that must stay readable
_SATURATED = 0.98  # share of the numbers within the scale


class Score(NamedTuple):
    """How a score of tokens is shown.

    Attributes:
        words: above the answer.
        name: short, for the pointer.
        signed: colours on both sides of 0; else from 0 on.
    """

    words: str
    name: str
    signed: bool


_SCORES = {
    "alpha": Score("Coefficient: how far the teacher goes beyond the DPO model", "alpha", False),
    "reward": Score("Reward: DPO model against the other model", "reward", True),
    "kl_dpo": Score("KL of the policy to the DPO model", "KL to the DPO model", False),
}
_DRAWN = ("alpha", "reward")


def token_section(run: RunData) -> str:
    """The answers of the last validation and test, token by token; empty where the run kept none."""
    parts = []
    for stage, words in (("test", "test"), ("val", "validation")):
        lines = [line for line in run.token_scores or [] if line["stage"] == stage]
        if lines:
            last = max(line["step"] for line in lines)
            shown = [line for line in lines if line["step"] == last]
            limits = {name: _limit(shown, name) for name in _DRAWN if any(name in line["scores"] for line in shown)}
            parts.append(f"<h3>Preferred answers of {words} data <small>after {last:,} steps</small></h3>")
            parts.append("".join(_scale(_SCORES[name], limit) for name, limit in limits.items()))
            parts += [_answer(line, limits) for line in shown]
    return "".join(parts)


def _limit(lines: list[dict[str, Any]], name: str) -> float:
    """Where the scale ends: beyond almost all sizes, so that one outlier does not make the rest pale."""
    sizes = sorted(abs(value) for line in lines for value in line["scores"].get(name, []) if math.isfinite(value))
    return (sizes[math.ceil(_SATURATED * len(sizes)) - 1] if sizes else 0.0) or 1.0


def _scale(score: Score, limit: float) -> str:
    """The legend: a ramp with numbers at its ends."""
    ends = (f"-{number(limit)}", "0", number(limit)) if score.signed else ("0", "", number(limit))
    kind = "ramp signed" if score.signed else "ramp"
    side = ", below 0 also underlined" if score.signed else ""
    return (
        f"<p class=scale><b>{escape(score.name)}</b> {ends[0]} <i class='{kind}'></i> {ends[2]} or beyond"
        f"<small>{escape(side)}</small></p>"
    )


def _answer(line: dict[str, Any], limits: dict[str, float]) -> str:
    tokens, scores = line["tokens"][:_MOST_TOKENS], line["scores"]
    titles = [_title(scores, index) for index in range(len(tokens))]
    rows = []
    for name, limit in limits.items():
        if name in scores:
            spans = "".join(map(_token, tokens, scores[name], [limit] * len(tokens), titles))
            rows.append(f"<h4>{escape(_SCORES[name].words)}</h4><p class=heat>{spans}</p>")
    left_out = len(line["tokens"]) - len(tokens)
    note = f"<p class=note>{left_out:,} more tokens are not shown.</p>" if left_out else ""
    return f"<article><p class=prompt>{escape(line['prompt'])}</p>{''.join(rows)}{note}</article>"


def _title(scores: dict[str, list[float]], index: int) -> str:
    told = [f"{_SCORES[name].name if name in _SCORES else name} {number(v[index])}" for name, v in scores.items()]
    return escape(", ".join(told))


def _token(text: str, value: float, limit: float, title: str) -> str:
    # a line end, or a piece of a character, would have no ground to show
    visible = escape(text).replace("\n", "↵\n") or "·"
    strength = _STRONGEST * min(abs(value) / limit, 1.0) if math.isfinite(value) else 0.0
    below = " class=below" if value < 0 else ""
    return f'<span{below} style="--x:{strength:.2f}" title="{title}">{visible}</span>'
