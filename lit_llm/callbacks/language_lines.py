"""What an evaluation found for each language, for the report and TensorBoard."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import numpy

from lit_llm.callbacks.evaluation_lines import EvaluationLines

_CELL = 16  # pixels
_DARK = numpy.array([31, 98, 208])  # of a full cell; an empty one is white


class LanguageLines(EvaluationLines):
    """After a validation or test, appends scores and routing by language to languages.jsonl.

    A line is {"step", "stage" ("val" or "test"), "groups": {name: [language]}, "languages": [name], "moments": [[name,
    {language: [loss, accuracy]}]], "table": Markdown} and, where the method routes tokens, "routing": {"layers": [index],
    "experts": [number], "by_layer": {name: [number]}, "by_language": {name: [[number]]}, "load_shares": [[share]],
    "parameters": {name: number}}, with null for what was not counted. A resumed run drops the lines of later steps first.

    Reads of the method: `language_report` (such a line without step and stage; None: nothing to write), and `run_folder`.
    """

    file_name = "languages.jsonl"

    def lines(self, pl_module: L.LightningModule) -> list[dict[str, Any]]:
        report = pl_module.language_report
        return [] if report is None else [without_nan(report)]

    def show(self, experiment, pl_module: L.LightningModule, stage: str, step: int) -> None:
        report = pl_module.language_report
        experiment.add_text(f"languages/{stage}", report["table"], step)
        if (routing := report.get("routing")) is None:
            return
        experiment.add_text(f"experts/{stage}", experts_table(routing), step)
        experiment.add_image(
            f"routing/{stage}/load_shares", picture(_padded(routing["load_shares"])), step, dataformats="HWC"
        )
        for name, rows in routing["by_language"].items():
            if any(not math.isnan(value) for row in rows for value in row):
                experiment.add_image(f"routing/{stage}/{name}", picture(rows), step, dataformats="HWC")


def experts_table(routing: dict[str, Any]) -> str:
    """Markdown: experts of each routed layer and their shares of the slots, then the numbers of parameters."""
    lines = ["| layer | experts | share of the slots, expert by expert |", "| --- | --- | --- |"]
    for layer, experts, shares in zip(routing["layers"], routing["experts"], routing["load_shares"], strict=True):
        lines.append(f"| {layer} | {experts} | {', '.join(f'{share:.1%}' for share in shares)} |")
    lines += ["", "| parameters | |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {name} | {number:,} |" for name, number in routing["parameters"].items())])


def _padded(rows: list[list[float]]) -> list[list[float]]:
    most = max(map(len, rows))
    return [[*row, *[math.nan] * (most - len(row))] for row in rows]


def picture(rows: list[list[float]]) -> numpy.ndarray:
    """A heat-map as an image: a row of cells for each row of shares, white 0 and blue 1."""
    shares = numpy.nan_to_num(numpy.array(rows, dtype=float)).clip(0, 1)[..., None]
    cells = (255 + shares * (_DARK - 255)).astype(numpy.uint8)
    return cells.repeat(_CELL, axis=0).repeat(_CELL, axis=1)


def without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
