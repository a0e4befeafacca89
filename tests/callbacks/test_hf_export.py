"""The trained student in the run folder."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_llm.callbacks.hf_export import HfExport
from tests.callbacks.small import SmallMethod, trainer_in


class StopAt(L.Callback):
    """Ends training at step 2: by asking the trainer, or with an error."""

    def __init__(self, error=None) -> None:
        self.error = error

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            if self.error:
                raise self.error
            trainer.should_stop = True


@pytest.mark.parametrize("callbacks", [[], [StopAt()]])
def test_the_model_is_written_when_training_ends_well(tmp_path, callbacks):
    method = SmallMethod()
    trainer_in(tmp_path, [HfExport(), *callbacks]).fit(method)
    written = torch.load(tmp_path / "run/version_0/model/weights.pt")
    for name, value in method.student.state_dict().items():
        assert torch.equal(value, written[name])


def test_a_run_that_failed_writes_no_model(tmp_path):
    with pytest.raises(RuntimeError):
        trainer_in(tmp_path, [HfExport(), StopAt(RuntimeError("broken"))]).fit(SmallMethod())
    assert not (tmp_path / "run/version_0/model").exists()


def test_an_interrupted_run_writes_no_model_but_says_how_to_get_one(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lit_llm.callbacks.hf_export.rank_zero_info", said.append)
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "checkpoints", every_n_train_steps=1, save_last=True)
    with pytest.raises(SystemExit):
        trainer = trainer_in(tmp_path, [StopAt(KeyboardInterrupt()), HfExport(), checkpoint], enable_checkpointing=True)
        trainer.fit(SmallMethod())
    assert not (tmp_path / "run/version_0/model").exists()
    assert f"export --config {tmp_path}/run/version_0/config.yaml" in said[0]
    assert f"--ckpt_path {tmp_path}/checkpoints/last.ckpt" in said[0]
