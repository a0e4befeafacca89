"""The commands beside fit, as a user calls them."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from lit_llm.cli import main
from lit_llm.training_cli import TrainingCLI
from tests.processes import in_two_processes
from tests.tiny_runs import fit, tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of DSKD."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder, "dskd", max_steps=2)
    fit(config)
    return config, folder / "runs" / "dskd" / "version_0"


def test_generate_answers_a_prompt(run, capsys):
    main(["generate", "--model", str(run[1] / "model"), "--prompt", "Name the cat.", "--max_new_tokens", "5"])
    assert capsys.readouterr().out.strip("\n")  # an answer, be it blank: the model is hardly trained


def test_generate_chats_until_an_empty_line(run, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nAgain\n\n"))
    main(["generate", "--model", str(run[1] / "model"), "--max_new_tokens", "3"])
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_sampling_with_a_seed_repeats_itself(run, capsys):
    said = []
    for _ in range(2):
        options = ["--prompt", "Name", "--temperature", "1.0", "--seed", "3", "--max_new_tokens", "8"]
        main(["generate", "--model", str(run[1] / "model"), *options])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_export_writes_the_checkpoint_as_a_plain_folder(run, tmp_path):
    config, folder = run
    main(["export", "--config", str(config), "--ckpt_path", "last", "--to", str(tmp_path / "out")])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(folder / "model").state_dict().items():
        assert torch.equal(exported[name], value)


def test_the_config_of_a_run_is_understood_by_every_command(run, tmp_path, capsys):
    kept = str(run[1] / "config.yaml")
    main(["export", "--config", kept, "--ckpt_path", "last", "--to", str(tmp_path / "out")])
    assert (tmp_path / "out" / "config.json").is_file()
    main(["plan", "--config", kept])
    assert "Peak memory" in capsys.readouterr().out


def test_test_reports_loss_agreement_and_rouge_of_both_models(run):
    cli = TrainingCLI.run(["test", "--config", str(run[0]), "--ckpt_path", "last"])
    metrics = cli.trainer.callback_metrics
    for name in ("loss", "accuracy", "agreement", "rouge_l", "teacher_loss", "teacher_rouge_l"):
        assert f"test/{name}" in metrics


def test_validate_gives_the_loss_of_the_end_of_training(run):
    cli = TrainingCLI.run(["validate", "--config", str(run[0]), "--ckpt_path", "last"])
    assert torch.isfinite(cli.trainer.callback_metrics["val/loss"])


def test_predict_writes_an_answer_for_every_test_prompt(run):
    cli = TrainingCLI.run(["predict", "--config", str(run[0]), "--ckpt_path", "last"])
    rows = [json.loads(line) for line in (cli.model.run_folder / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and set(rows[0]) == {"prompt", "references", "answer"}


def test_two_processes_predict_each_answer_once(tmp_path):
    command = ["-m", "lit_llm", "predict", "--config", tiny_config(tmp_path, "sft")]
    done = in_two_processes(*command, "--trainer.devices=2", "--trainer.strategy=ddp")
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.rglob("predictions.jsonl")
    answered = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    assert len(answered) == len(set(answered)) == 4


def test_a_runs_own_config_reproduces_it(run, tmp_path):
    written = yaml.safe_load((run[1] / "config.yaml").read_text())
    assert written["model"]["class_path"].endswith("DSKD")
    again = fit(run[1] / "config.yaml", f"--run.root={tmp_path}", "--run.version=again")
    first = AutoModelForCausalLM.from_pretrained(run[1] / "model").state_dict()
    for name, value in again.model.student.model.state_dict().items():
        assert torch.equal(first[name], value)


def test_later_configs_and_options_win_over_earlier_ones(tmp_path):
    config = tiny_config(tmp_path, "sft", max_steps=3)
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"trainer": {"max_steps": 2}, "data": {"init_args": {"batch_size": 3}}}))
    cli = fit(config, "--config", str(more), "--trainer.max_steps=1")
    assert cli.trainer.global_step == 1 and cli.datamodule.batch_size == 3


def test_values_can_be_written_once_and_referred_to(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "sft", max_steps=1)
    settings = yaml.safe_load(config.read_text())
    settings["vars"] = {"rows": 3}
    settings["data"]["init_args"]["batch_size"] = "${vars.rows}"
    settings["data"]["init_args"]["eval_batch_size"] = "${data.init_args.batch_size}"
    settings["data"]["init_args"]["limit"] = "${oc.env:LIMIT_OF_ROWS,20}"
    config.write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("LIMIT_OF_ROWS", "9")
    data = fit(config).datamodule
    assert (data.batch_size, data.eval_batch_size, data.limit) == (3, 3, 9)


def test_print_config_shows_what_a_run_would_use(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tiny_config(tmp_path, "kd")), "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["init_args"]["kd_weight"] == 0.5
    assert shown["trainer"]["max_steps"] == 8
