"""environment.json and the config in TensorBoard."""

import json
import shlex
import subprocess

import pytest
import torch

from lit_llm.callbacks.run_record import RunRecord, command_line, git_commit
from lit_llm.callbacks.validate_at_start import ValidateAtStart
from tests.callbacks.small import SmallMethod, trainer_in
from tests.callbacks.test_hf_export import StopAt
from tests.callbacks.test_samples import texts_of


def starts_in(folder):
    return json.loads((folder / "run/version_0/environment.json").read_text())["starts"]


def test_the_record_of_a_finished_run(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/lit_llm", "fit", "--data.train=my file.jsonl"])
    trainer_in(tmp_path, [RunRecord(), ValidateAtStart()]).fit(SmallMethod())
    (start,) = starts_in(tmp_path)
    assert (start["stage"], start["step"], start["processes"]) == ("fit", 0, 1)
    assert start["command"] == "python -m lit_llm fit '--data.train=my file.jsonl'"
    assert start["packages"]["torch"] == torch.__version__
    assert start["models"] == {"student": {"parameters": 12}, "one_tokenizer": True}
    assert start["ended"]["status"] == "finished" and start["ended"]["seconds"] >= 0
    assert {"python", "platform", "cpus", "devices", "started", "git", "precision"} <= set(start)


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [(RuntimeError("broken\nin two"), RuntimeError, "failed"), (KeyboardInterrupt(), SystemExit, "interrupted")],
)
def test_how_a_run_ended_is_recorded(tmp_path, error, raised, status):
    with pytest.raises(raised):
        trainer_in(tmp_path, [RunRecord(), StopAt(error)]).fit(SmallMethod())
    (start,) = starts_in(tmp_path)
    assert start["ended"]["status"] == status
    assert start["ended"].get("error") == ("RuntimeError: broken" if status == "failed" else None)


def test_a_run_that_is_under_way_has_no_end_yet(tmp_path):
    import lightning as L

    class Look(L.Callback):
        def on_train_batch_end(self, *args):
            assert "ended" not in starts_in(tmp_path)[0]

    trainer_in(tmp_path, [RunRecord(), Look()]).fit(SmallMethod())


def test_later_processes_add_to_the_record_with_the_step_at_which_they_began(tmp_path):
    trainer = trainer_in(tmp_path, [RunRecord()], max_steps=4)
    trainer.fit(SmallMethod())
    trainer.save_checkpoint(tmp_path / "at4.ckpt")
    later = {"ckpt_path": tmp_path / "at4.ckpt", "weights_only": False}
    trainer_in(tmp_path, [RunRecord()]).fit(SmallMethod(), **later)
    trainer_in(tmp_path, [RunRecord()]).test(SmallMethod(), **later)
    trainer_in(tmp_path, [RunRecord()]).validate(SmallMethod(), **later)
    starts = starts_in(tmp_path)
    assert [(start["stage"], start["step"]) for start in starts] == [
        ("fit", 0),
        ("fit", 4),
        ("test", 4),
        ("validate", 4),
    ]
    assert all(start["ended"]["status"] == "finished" for start in starts)


def test_the_config_is_readable_in_tensorboard(tmp_path):
    folder = tmp_path / "run/version_0"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model:\n  lr: 0.1\n")
    trainer_in(tmp_path, [RunRecord()], tensorboard=True).fit(SmallMethod())
    assert texts_of(tmp_path, "config/text_summary") == [(0, "    model:\n      lr: 0.1")]


def test_a_script_of_the_users_own_is_started_again_as_such():
    assert command_line(["train it.py", "--fast"]) == "python 'train it.py' --fast"
    assert command_line(["/site-packages/lit_llm/__main__.py", "fit"]) == "python -m lit_llm fit"
    assert shlex.split(command_line(["lit_llm", "fit", "a b", "c'd"]))[-2:] == ["a b", "c'd"]


def test_the_commit_is_marked_when_tracked_files_differ(tmp_path):
    assert git_commit(tmp_path) is None

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    assert git_commit(tmp_path) is None
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    clean = git_commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == clean + "-dirty"
