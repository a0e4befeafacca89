"""The callbacks of an ordinary run, together."""

import json

import pytest

from lit_llm.callbacks import default_callbacks
from tests.callbacks.small import SmallMethod, rows_of, trainer_in


def names(**settings) -> list[str]:
    return [type(callback).__name__ for callback in default_callbacks(**settings)]


def test_a_run_leaves_everything_that_a_run_folder_promises(tmp_path):
    trainer_in(tmp_path, default_callbacks(progress_bar=False), tensorboard=True).fit(SmallMethod())
    folder = tmp_path / "run/version_0"
    files = {path.name for path in folder.iterdir()}
    assert {"metrics.csv", "samples.jsonl", "environment.json", "report.html", "model"} <= files
    assert not [name for name in files if name.endswith(".partial")]
    assert [row["step"] for row in rows_of(tmp_path) if "val/loss" in row] == [0, 3, 6]
    assert json.loads((folder / "environment.json").read_text())["starts"][0]["ended"]["status"] == "finished"


def test_evaluating_commands_neither_guard_nor_export():
    evaluating = ["Progress", "StepAxis", "RunRecord", "Samples", "TokenLines", "LanguageLines", "EditLines", "Report"]
    assert names(stage="test") == evaluating == names(stage="validate")
    assert names(stage="predict") == ["Progress"]
    assert names(stage="export") == []


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_the_progress_bar_can_be_left_out(stage):
    assert "Progress" not in names(stage=stage, progress_bar=False)


def test_progress_shows_what_throughput_measured_and_the_report_comes_after_its_sources():
    order = names(stage="fit")
    assert order.index("Throughput") < order.index("Progress")
    sources = ("StepAxis", "RunRecord", "Samples", "TokenLines", "LanguageLines", "EditLines", "HfExport")
    assert max(map(order.index, sources)) < order.index("Report")
    assert order[-1] == "ValidateAtStart"
