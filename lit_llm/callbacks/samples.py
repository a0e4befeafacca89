"""Generated answers side by side, for TensorBoard and for the report."""

from __future__ import annotations

from typing import Any

import lightning as L

from lit_llm.callbacks.evaluation_lines import EvaluationLines
from lit_llm.evaluation.samples import Sample


class Samples(EvaluationLines):
    """After a validation or test, writes the method's samples to TensorBoard and appends them to samples.jsonl.

    A line is {"step", "stage" ("val" or "test"), "prompt", "reference", "answers": {who: text}}. A resumed run drops the
    lines of later steps first.

    Reads of the method: `samples`, a list of `Sample`, and `run_folder`.
    """

    file_name = "samples.jsonl"

    def lines(self, pl_module: L.LightningModule) -> list[dict[str, Any]]:
        return [
            {"prompt": sample.prompt, "reference": sample.reference, "answers": sample.answers}
            for sample in pl_module.samples
        ]

    def show(self, experiment, pl_module: L.LightningModule, stage: str, step: int) -> None:
        experiment.add_text(f"samples/{stage}", markdown_table(pl_module.samples), step)


def markdown_table(samples: list[Sample]) -> str:
    """One row a sample: prompt, reference, and a column for everybody who answered."""
    people = list(dict.fromkeys(who for sample in samples for who in sample.answers))
    rows = [["prompt", "reference", *people], ["---"] * (2 + len(people))]
    for sample in samples:
        rows.append([sample.prompt, sample.reference, *(sample.answers.get(who, "") for who in people)])
    return "\n".join("| " + " | ".join(cell(text) for text in row) + " |" for row in rows)


def cell(text: str) -> str:
    """A text that stays within its cell of a Markdown table."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\").replace("|", "\\|")
    return escaped.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "<br>")
