"""`respond` writes the answers of a model, can be stopped anywhere, and its file trains a student."""

import json

import pytest

from lit_llm import responding
from lit_llm.cli import main
from lit_llm.data.responses import ResponseFile
from tests.tiny import tiny_model_folder
from tests.tiny_runs import fit, tiny_config, write_rows


@pytest.fixture
def options(tmp_path):
    """A command that samples, so that equal answers are no accident."""
    data, model = write_rows(tmp_path / "rows.jsonl", 10), tiny_model_folder(tmp_path / "teacher", "gpt2", seed=3)
    options = ["respond", "--model", str(model), "--data", str(data), "--template", "plain", "--batch_size", "3"]
    return [*options, "--temperature", "1.0", "--max_new_tokens", "6", "--unfinished", "keep"]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_prompt_is_answered_in_the_order_of_the_data_and_its_reference_is_kept(options, tmp_path):
    main([*options, "--to", str(tmp_path / "out" / "answers.jsonl")])
    given, found = rows_of(tmp_path / "rows.jsonl"), rows_of(tmp_path / "out" / "answers.jsonl")
    assert [(row["prompt"], row["reference"]) for row in found] == [(row["prompt"], row["response"]) for row in given]
    assert len({row["response"] for row in found}) > 5
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "answers.jsonl",
        "answers.jsonl.manifest.json",
    ]


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_stopped_call_goes_on_and_gives_the_same_answers(options, tmp_path, monkeypatch, batches):
    main([*options, "--to", str(tmp_path / "whole.jsonl")])
    broken, append, calls = tmp_path / "broken.jsonl", ResponseFile.append, []

    def dying(self, answers):
        if len(calls) == batches:
            append(self, dict(list(answers.items())[:2]))
            self.partial.write_bytes(self.partial.read_bytes()[:-7])
            raise KeyboardInterrupt
        calls.append(answers)
        append(self, answers)

    monkeypatch.setattr(responding.ResponseFile, "append", dying)
    with pytest.raises(KeyboardInterrupt):
        main([*options, "--to", str(broken)])
    assert not broken.exists()
    monkeypatch.undo()
    main([*options, "--to", str(broken)])
    assert broken.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_another_model_under_the_same_name_is_refused_by_its_weights(options, tmp_path, capfd):
    main([*options, "--to", str(tmp_path / "a.jsonl")])
    tiny_model_folder(tmp_path / "teacher", "gpt2", seed=4)
    with pytest.raises(SystemExit):
        main([*options, "--to", str(tmp_path / "a.jsonl")])
    text = capfd.readouterr().err
    assert "model_hash: there '" in text and "--to" in text and "template" not in text


def test_a_finished_call_is_not_repeated(options, tmp_path, capfd, monkeypatch):
    main([*options, "--to", str(tmp_path / "a.jsonl")])
    monkeypatch.setattr(responding, "answer_all", None)
    main([*options, "--to", str(tmp_path / "a.jsonl")])
    assert "is complete" in capfd.readouterr().err


def test_answers_that_did_not_end_are_left_out_unless_they_are_wanted(options, tmp_path, capfd):
    with pytest.raises(SystemExit):
        main([*options[:-1], "drop", "--max_new_tokens", "1", "--temperature", "0", "--to", str(tmp_path / "a.jsonl")])
    assert "max_new_tokens 1" in capfd.readouterr().err


def test_a_student_trains_on_the_answers(options, tmp_path):
    main([*options, "--to", str(tmp_path / "answers.jsonl")])
    config = tiny_config(tmp_path / "run", "sft", max_steps=2, val_check_interval=2)
    cli = fit(config, f"--data.init_args.train={tmp_path / 'answers.jsonl'}", "--data.init_args.max_length=40")
    assert cli.trainer.global_step == 2
