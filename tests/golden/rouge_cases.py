"""Golden cases of ROUGE-L and exact match: every row by itself and the corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lit_llm.evaluation.rouge import ExactMatch, RougeL


def check_evaluation_metric(case: dict[str, Any], folder: Path) -> None:
    """The corpus score is stored rounded to four decimals, the rows are not."""
    stored = json.loads((folder / case["file"]).read_text(encoding="utf-8"))
    tolerance = case["tolerance"]["float64"]
    rouge, exact = RougeL(), ExactMatch()
    for row in stored["rows"]:
        # forward gives the score of this row alone and adds it to the corpus
        of_row = {metric: metric([row["prediction"]], [row["references"]]).item() / 100 for metric in (rouge, exact)}
        assert of_row[rouge] == pytest.approx(row["rougeL_f"], rel=tolerance["rtol"], abs=tolerance["atol"]), row[
            "prediction"
        ]
        assert of_row[exact] == float(row["exact_match"]), row["prediction"]
    assert round(rouge.compute().item(), 4) == stored["corpus"]["rougeL"] == case["expected_scalars"]["rougeL"]
    assert exact.compute().item() == stored["corpus"]["exact_match"] == case["expected_scalars"]["exact_match"]


HANDLERS = {"evaluation_metric": check_evaluation_metric}
