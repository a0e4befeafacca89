"""metrics.csv: every logged metric as one row, in a file that outlives the process.

Lightning's CSVLogger deletes the file of an earlier process. Ours goes on with it, so that a resumed run has one curve.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_llm.callbacks.append_only import append_lines, keep_lines, whole_lines
from lit_llm.storage import write_atomically


class MetricsCsv(CSVLogger):
    """Writes metrics.csv into SAVE_DIR/NAME/VERSION, the folder that TensorBoardLogger derives from the same arguments.

    A row is in the file as soon as it was logged. Later processes append; `ContinueMetrics` drops the rows that a
    resumed run is going to write again.

    Args:
        save_dir: folder of all runs.
        name: folder of the runs of one config; None leaves this level out.
        version: folder of this run; a number N means version_N, None the next free one.
    """

    def __init__(
        self,
        save_dir: str | Path,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
    ) -> None:
        super().__init__(save_dir=save_dir, name=name, version=version)

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsFile:
        """The file, on rank zero."""
        if self._experiment is None:
            self._experiment = MetricsFile(Path(self.log_dir) / "metrics.csv")
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if step is None:
            raise ValueError("MetricsCsv.log_metrics got no step. Log through the LightningModule, or pass step=.")
        self.experiment.append({"step": step, **metrics})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml holds the settings."""

    def save(self) -> None:
        """Nothing: rows are written when they are logged."""

    def finalize(self, status: str) -> None:
        """Nothing: rows are written when they are logged."""


class MetricsFile:
    """A CSV file whose columns may appear later; empty where a row has no value.

    Args:
        path: the file; it is created with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._columns: list[str] | None = None

    def append(self, row: dict[str, float]) -> None:
        """Write one row. A column that is new makes the file be rewritten once, atomically."""
        if self._columns is None:
            lines = whole_lines(self.path)
            self._columns = next(csv.reader(lines[:1])) if lines else []
        if new := [name for name in row if name not in self._columns]:
            self._widen(new)
        append_lines(self.path, _csv_line([_written(row.get(name)) for name in self._columns]))

    def continue_from(self, step: int) -> int:
        """Drop the rows of steps after `step`; 0 starts the file anew.

        Returns:
            How many rows were dropped.
        """
        lines = whole_lines(self.path)
        if not lines or (step == 0 and len(lines) == 1):
            return 0
        if step == 0:
            self.path.unlink()
            self._columns = None
            return len(lines) - 1
        column = next(csv.reader(lines[:1])).index("step")
        # values are numbers and never quoted
        return keep_lines(self.path, lambda line: line == lines[0] or int(line.split(",")[column]) <= step)

    def _widen(self, new: list[str]) -> None:
        old_rows = whole_lines(self.path)[1:]
        self._columns = [*self._columns, *new]
        padding = "," * len(new)
        write_atomically(self.path, _csv_line(self._columns) + "".join(f"{row}{padding}\n" for row in old_rows))


class ContinueMetrics(L.Callback):
    """Before a resumed run goes on, takes the rows of later steps out of metrics.csv, so that no step stands twice."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCsv) and trainer.is_global_zero:
                logger.experiment.continue_from(trainer.global_step)


def _written(value: float | None) -> str:
    """Nine digits hold a float32 exactly."""
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{float(value):.9g}"


def _csv_line(cells: list[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()
