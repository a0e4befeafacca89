"""What an evaluation of edited facts found, for the report and TensorBoard."""

from __future__ import annotations

from typing import Any

import lightning as L

from lit_llm.callbacks.evaluation_lines import EvaluationLines
from lit_llm.callbacks.language_lines import picture, without_nan
from lit_llm.callbacks.samples import cell


class EditLines(EvaluationLines):
    """After a validation or test, appends scores, matrices and answers of edited facts to edits.jsonl.

    A line is {"step", "stage" ("val" or "test"), "method", "single" (whether a fact was asked under its own edit alone),
    "facts" (edited so far), "already_known": [ids of facts that were skipped], "languages": [code], "scores": {kind:
    {language or "all": {protocol: percent}}}, "matrices": {kind: {protocol: {"rows": [language or "all"], "values":
    [[percent]], "same_language", "cross_language" (means on and off the diagonal)}}}, "counterfact": {language: {score: percent}}, "trigger": {event: percent}, "answers": [{"fact", "kind", "language", "prompt", "wanted", "before", "after", "right"}]}
    and, where they are known, "seconds_per_fact" and "overlap": {"languages", "layers": {layer: {"jaccard", "shared",
    "same_fact", "different_facts", "chance"}}} and "covariance": {"tokens", "split_error": {layer: relative error}, "curve":
    {layer: [[tokens, relative change since half as many]]}}, with null for what was not asked. A resumed run drops the lines
    of later steps first.

    Reads of the method: `edit_report` (such a line without step and stage; None: nothing to write), and `run_folder`.
    """

    file_name = "edits.jsonl"

    def lines(self, pl_module: L.LightningModule) -> list[dict[str, Any]]:
        report = getattr(pl_module, "edit_report", None)  # only editors have one
        return [] if report is None else [without_nan(report)]

    def show(self, experiment, pl_module: L.LightningModule, stage: str, step: int) -> None:
        report = pl_module.edit_report
        for kind, by_protocol in report["matrices"].items():
            for protocol, matrix in by_protocol.items():
                shares = [[value / 100 for value in row] for row in matrix["values"]]
                name = f"edit_matrix/{stage}/{kind}_{protocol}"
                experiment.add_image(name, picture(shares), step, dataformats="HWC")
        for layer, found in report.get("overlap", {}).get("layers", {}).items():
            experiment.add_image(
                f"neuron_overlap/{stage}/layer_{layer}", picture(found["jaccard"]), step, dataformats="HWC"
            )
        experiment.add_text(f"edits/{stage}", table(report["answers"]), step)
        if "seconds_per_fact" in report:
            experiment.add_scalar("edits/seconds_per_fact", report["seconds_per_fact"], step)


def table(answers: list[dict[str, Any]], most: int = 40) -> str:
    """Answers before and after as a Markdown table."""
    rows = [["fact", "language", "tests", "question", "wanted", "before", "after"], ["---"] * 7]
    for answer in answers[:most]:
        question = answer["prompt"].splitlines()[-1]
        shown = [answer[name] or "" for name in ("wanted", "before", "after")]
        rows.append([answer["fact"], answer["language"], answer["kind"], question, *shown])
    return "\n".join("| " + " | ".join(cell(text) for text in row) + " |" for row in rows)
