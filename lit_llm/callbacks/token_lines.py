"""Answers token by token, for the report."""

from __future__ import annotations

from typing import Any

import lightning as L

from lit_llm.callbacks.evaluation_lines import EvaluationLines


class TokenLines(EvaluationLines):
    """After a validation or test, appends the answers that the method shows token by token to token_scores.jsonl.

    A line is {"step", "stage" ("val" or "test"), "prompt", "tokens": [text], "scores": {name: [number]}}; the tokens
    joined are the answer. A resumed run drops the lines of later steps first.

    Reads of the method: `token_scores`, a list of `TokenScores`, and `run_folder`.
    """

    file_name = "token_scores.jsonl"

    def lines(self, pl_module: L.LightningModule) -> list[dict[str, Any]]:
        return [
            {
                "prompt": answer.prompt,
                "tokens": answer.tokens,
                "scores": {name: [_short(value) for value in values] for name, values in answer.scores.items()},
            }
            for answer in pl_module.token_scores
        ]


def _short(value: float) -> float:
    return float(f"{value:.5g}")
