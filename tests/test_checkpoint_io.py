"""Checkpoints go straight to their file, which is there whole or not at all."""

import tracemalloc

import lightning as L
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lit_llm.checkpoint_io import StreamedCheckpointIO, stream_checkpoints
from tests.tiny_runs import fit, tiny_config

MEGABYTE = 2**20


def traced_peak(save) -> int:
    tracemalloc.start()
    try:
        save()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_checkpoint_is_not_formed_in_memory_first(tmp_path):
    checkpoint = {"weights": torch.randn(4 * MEGABYTE), "step": 3}  # 16 MiB
    file = tmp_path / "new" / "last.ckpt"
    assert traced_peak(lambda: StreamedCheckpointIO().save_checkpoint(checkpoint, file)) < MEGABYTE
    assert traced_peak(lambda: TorchCheckpointIO().save_checkpoint(checkpoint, tmp_path / "theirs")) > 16 * MEGABYTE
    loaded = torch.load(file, weights_only=True)
    assert loaded["step"] == 3 and torch.equal(loaded["weights"], checkpoint["weights"])
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    file = tmp_path / "last.ckpt"
    writer = StreamedCheckpointIO()
    writer.save_checkpoint({"step": 1}, file)
    with pytest.raises(Exception, match="pickle"):
        writer.save_checkpoint({"weights": torch.ones(1000), "bad": (n for n in range(3))}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_runs_write_their_checkpoints_so(tmp_path):
    cli = fit(tiny_config(tmp_path, "sft", max_steps=2))
    assert isinstance(cli.trainer.strategy.checkpoint_io, StreamedCheckpointIO)
    assert torch.load(tmp_path / "runs/sft/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_a_trainer_with_its_own_way_of_writing_keeps_it():
    trainer = L.Trainer(plugins=[AsyncCheckpointIO()], accelerator="cpu", logger=False)
    stream_checkpoints(trainer)
    assert isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO)
