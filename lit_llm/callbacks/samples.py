"""Generated answers side by side, for TensorBoard and for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger

from lit_llm.callbacks.append_only import append_lines, keep_lines
from lit_llm.evaluation.samples import Sample


class Samples(L.Callback):
    """After a validation or test, writes the method's samples to TensorBoard and appends them to samples.jsonl.

    A line is {"step", "stage" ("val" or "test"), "prompt", "reference", "answers": {who: text}}. A resumed run drops the
    lines of later steps first.

    Reads of the method: `samples`, a list of `Sample`, and `run_folder`.
    """

    def __init__(self) -> None:
        self._loaded_step = 0

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        path = pl_module.run_folder / "samples.jsonl"  # on every rank: finding the folder may communicate
        if trainer.is_global_zero:
            resumed_at = trainer.global_step
            keep_lines(path, lambda line: resumed_at > 0 and json.loads(line)["step"] <= resumed_at)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        path: Path = pl_module.run_folder / "samples.jsonl"
        if not pl_module.samples or not trainer.is_global_zero:
            return
        # trainer.global_step stays 0 in a process that only tests
        step = max(trainer.global_step, self._loaded_step)
        append_lines(path, "".join(_json_line(sample, step, stage) for sample in pl_module.samples))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text(f"samples/{stage}", markdown_table(pl_module.samples), step)


def markdown_table(samples: list[Sample]) -> str:
    """One row a sample: prompt, reference, and a column for everybody who answered."""
    people = list(dict.fromkeys(who for sample in samples for who in sample.answers))
    rows = [["prompt", "reference", *people], ["---"] * (2 + len(people))]
    for sample in samples:
        rows.append([sample.prompt, sample.reference, *(sample.answers.get(who, "") for who in people)])
    return "\n".join("| " + " | ".join(_cell(text) for text in row) + " |" for row in rows)


def _cell(text: str) -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace("\\", "\\\\").replace("|", "\\|")
    return escaped.replace("\r\n", "\n").replace("\r", "\n").replace("\n", "<br>")


def _json_line(sample: Sample, step: int, stage: str) -> str:
    line = {"step": step, "stage": stage, "prompt": sample.prompt, "reference": sample.reference}
    return json.dumps({**line, "answers": sample.answers}, ensure_ascii=False) + "\n"
