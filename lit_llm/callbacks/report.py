"""report.html of a run: one file that tells it all, built from what the run folder holds."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L

from lit_llm.callbacks.report_data import read_run
from lit_llm.callbacks.report_page import page
from lit_llm.storage import write_atomically


def write_report(run_folder: Path) -> Path:
    """Write report.html from metrics.csv, samples.jsonl, token_scores.jsonl, config.yaml and environment.json of a run folder.

    Works for any run, also one that was killed: a section whose file is missing says so. Nothing is fetched, neither
    now nor by the page.

    Returns:
        The path of the report.
    """
    path = run_folder / "report.html"
    write_atomically(path, page(read_run(run_folder)))
    return path


class Report(L.Callback):
    """Writes report.html after every validation and at the end of `fit` and `test`, however they end.

    Reads of the method: `run_folder`. Must come after the callbacks that write what it shows.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._folder = pl_module.run_folder  # on every rank: finding the folder may communicate

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
        with suppress(OSError):  # where nothing can be written, what stopped the run is to be told, not this
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        # a failure before setup has no folder yet; a folder that nothing was written into stays unmade
        if trainer.is_global_zero and self._folder is not None and self._folder.is_dir():
            write_report(self._folder)
