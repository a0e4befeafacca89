"""A run that is asked to end stops between two optimizer steps, with a checkpoint, and says so by its exit status."""

import os
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_llm.callbacks.run_record import RunRecord
from lit_llm.callbacks.stop_on_signal import StopOnSignal
from tests.callbacks.small import SmallMethod, rows_of, trainer_in


class SendAt(L.Callback):
    """Sends this process a signal in the middle of a micro-batch, or somewhere else."""

    def __init__(self, micro_batch: int = -1, number: int = signal.SIGTERM, hook: str = "on_before_backward") -> None:
        self.left, self.number = micro_batch, number
        setattr(self, hook, self._count)

    def _count(self, *_) -> None:
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        self.left -= 1


def stopped(folder: Path, *callbacks: L.Callback, **settings) -> tuple[int, SmallMethod]:
    """The exit status of a run."""
    method = SmallMethod()
    checkpoints = ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=100, save_last=True)
    settings = {"enable_checkpointing": True, "max_steps": 6, **settings}
    trainer = trainer_in(folder, [*callbacks, RunRecord(), StopOnSignal(), checkpoints], **settings)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        trainer.fit(method)
    assert signal.getsignal(signal.SIGTERM) == before
    return stop.value.code, method


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_the_step_is_finished_saved_and_logged(tmp_path, number, status):
    code, method = stopped(tmp_path, SendAt(2, number))
    assert code == status
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    for name, value in method.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name])
    assert [row["step"] for row in rows_of(tmp_path) if "train/loss" in row][-1] == 2  # Lightning's count of step 3
    assert '"status": "interrupted"' in (tmp_path / "run/version_0/environment.json").read_text()


def test_micro_batches_that_are_accumulated_belong_to_one_step(tmp_path):
    code, _ = stopped(tmp_path, SendAt(2), accumulate_grad_batches=2, max_steps=4)
    assert code == 143
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_a_signal_during_a_validation_ends_the_run_after_the_next_step(tmp_path):
    code, _ = stopped(tmp_path, SendAt(0, hook="on_validation_batch_start"))
    assert code == 143
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


def test_before_the_first_step_there_is_nothing_to_save_and_the_run_ends_at_once(tmp_path):
    code, _ = stopped(tmp_path, SendAt(0, hook="on_train_start"))
    # the callbacks of a run end with this one, so it listens before a method begins to fill its store
    assert code == 143 and not (tmp_path / "checkpoints/last.ckpt").exists()


def test_the_second_signal_ends_the_run_at_once(tmp_path):
    code, _ = stopped(tmp_path, SendAt(2), SendAt(2))
    assert code == 143 and not (tmp_path / "checkpoints/last.ckpt").exists()
