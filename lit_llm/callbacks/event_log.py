"""TensorBoard's event files, on a disk that may be full."""

from __future__ import annotations

import threading
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_llm.storage import CannotWrite, writing

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class EventLog(TensorBoardLogger):
    """Lightning's TensorBoardLogger, with one message that names the folder where the disk does not take an event.

    TensorBoard writes in a thread of its own, which keeps what went wrong there for the next call, and raises it without a
    file's name; the thread's traceback would stand above that message.

    Raises:
        CannotWrite: from whatever writes: its own methods, and those of `experiment`.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer, on rank zero."""
        if self._experiment is None:
            _silence_writer_threads()
            folder = Path(self.log_dir)
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            self._experiment = _summary_writer(folder, **self._kwargs)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with writing(Path(self.log_dir)):  # Lightning makes a ValueError about the value of any error
            super().log_metrics(metrics, step)

    @rank_zero_only
    def save(self) -> None:
        with writing(Path(self.log_dir)):
            super().save()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with nullcontext() if status == "success" else suppress(CannotWrite):  # else it would hide why the run ends
            super().finalize(status)


def _summary_writer(folder: Path, **settings) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # heavy

    class NamedWriter(SummaryWriter):
        """Opens a file again where it was closed, so every file that it opens is wrapped."""

        def _get_file_writer(self):
            with writing(folder):
                file_writer = super()._get_file_writer()
            if not isinstance(file_writer.event_writer, _NamedEvents):
                file_writer.event_writer = _NamedEvents(file_writer.event_writer, folder)
            return file_writer

    return NamedWriter(log_dir=str(folder), **settings)


class _NamedEvents:
    """What all events of a file go through; its errors name the folder."""

    def __init__(self, writer, folder: Path) -> None:
        self._writer, self._folder = writer, folder

    def __getattr__(self, name: str):
        return getattr(self._writer, name)

    def add_event(self, event) -> None:
        with writing(self._folder):
            self._writer.add_event(event)

    def flush(self) -> None:
        with writing(self._folder):
            self._writer.flush()

    def close(self) -> None:
        with writing(self._folder):
            self._writer.close()
            try:
                self._writer.flush()  # its thread has ended, and raises what it met at the last event
            except OSError as error:
                if error.errno is not None:  # else only that the file is closed
                    raise


def _silence_writer_threads() -> None:
    """Let TensorBoard's threads end without a traceback: what they met is raised where the next event is added."""
    before = threading.excepthook
    if getattr(before, "silences_event_writers", False):
        return

    def told(arguments) -> None:
        of_tensorboard = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (of_tensorboard and isinstance(arguments.exc_value, OSError)):
            before(arguments)

    told.silences_event_writers = True
    threading.excepthook = told
