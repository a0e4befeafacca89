"""A method small enough to train in a blink, with the attributes that callbacks read, and a Trainer for it."""

from __future__ import annotations

import csv
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lit_llm.callbacks.metrics_csv import MetricsCsv
from lit_llm.evaluation.samples import Sample
from lit_llm.evaluation.token_scores import TokenScores
from lit_llm.methods.step_sums import StepSums


@dataclass(frozen=True)
class Batch:
    """The parts of a DistillationBatch that callbacks read."""

    values: torch.Tensor
    num_tokens: int = 30
    step_tokens: int = 20
    examples: tuple[int, ...] = (0, 1)

    def to(self, device, non_blocking: bool = False):
        return self


class Batches(Dataset):
    """Fixed batches; `broken` ones hold a value that is not a number."""

    def __init__(self, number: int = 12, broken: tuple[int, ...] = ()) -> None:
        generator = torch.Generator().manual_seed(0)
        self.values = torch.randn(number, 4, 3, generator=generator)
        self.values[list(broken)] = float("nan")

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Batch:
        return Batch(self.values[index], examples=(2 * index, 2 * index + 1))


class Student(nn.Linear):
    """Saves like a LanguageModel."""

    def __init__(self) -> None:
        super().__init__(3, 3)

    @property
    def exports(self):
        return {"model": self.save}

    def save(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        torch.save(self.state_dict(), folder / "weights.pt")


class SmallMethod(L.LightningModule):
    """Squared error with dropout, so that training draws random numbers."""

    teacher = None
    teacher_tokenizer = None
    language_report = None

    def __init__(self, learning_rate: float = 0.1, draws_in_validation: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.student = Student()
        self.dropout = nn.Dropout(0.5)
        self.learning_rate, self.draws_in_validation = learning_rate, draws_in_validation
        self.samples: list[Sample] = []
        self.token_scores: list[TokenScores] = []
        self.histograms: dict[str, torch.Tensor] = {}
        self.validated_at: list[int] = []
        self.step_sums = StepSums()

    @property
    def exports(self):
        return self.student.exports

    def whole_on(self, here: bool):
        return nullcontext()

    @property
    def run_folder(self) -> Path:
        return Path(self.trainer.log_dir or self.trainer.default_root_dir)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss = self.student(self.dropout(batch.values)).square().mean()
        self.step_sums.mean("loss", loss, 1)
        self.step_sums.mean("ce", 2 * loss, 1)
        return loss

    def on_before_optimizer_step(self, optimizer) -> None:
        for name, value in self.step_sums.take(lambda ours: [ours]).items():
            self.log(f"train/{name}", value, batch_size=1)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if self.draws_in_validation:
            torch.rand(5)
        self.log("val/loss", self.student(batch.values).square().mean(), batch_size=1)

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated_at.append(self.global_step)
            self.samples = [Sample("Two | plus\ntwo?", "four", {"student": f"<b>{self.global_step}</b>"})]
            scores = {"alpha": (0.123456789, 2.0), "reward": (-1.0, float(self.global_step))}
            self.token_scores = [TokenScores("Two?", ("fo", "ur"), scores)]
            self.histograms = {"alpha": torch.arange(5.0) + self.global_step, "nothing": torch.zeros(0)}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("test/loss", self.student(batch.values).square().mean(), batch_size=1)

    def on_test_epoch_end(self) -> None:
        self.samples = [Sample("a", "b", {"student": "c"})]
        self.token_scores = [TokenScores("a", ("b",), {"alpha": (1.0,)})]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Batches(), batch_size=None, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(Batches(3), batch_size=None)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(Batches(3), batch_size=None)


def trainer_in(folder: Path, callbacks: list[L.Callback], tensorboard: bool = False, **settings) -> L.Trainer:
    """A Trainer whose run folder is FOLDER/run/version_0."""
    place = {"save_dir": folder, "name": "run", "version": "version_0"}
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    loggers = [TensorBoardLogger(**place)] if tensorboard else []
    return L.Trainer(callbacks=callbacks, logger=[*loggers, MetricsCsv(**place)], **{**defaults, **settings})


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv without their empty cells."""
    with (folder / "run" / "version_0" / "metrics.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
