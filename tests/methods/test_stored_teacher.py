"""Training from a teacher store: what live training gives, without the teacher."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lit_llm.models.language_model import LanguageModel
from lit_llm.models.teacher_head import TeacherHead
from lit_llm.training_cli import TrainingCLI
from tests.tiny import tiny_model_folder
from tests.tiny_runs import assert_identical, fit, store_options, tiny_config, weights

DISTILLATIONS = ("kd", "dskd", "dskd_v1", "dskd_cross", "dskd_cross_cma")
ROOT = Path(__file__).parents[2]


def without_weights(folder: Path) -> None:
    """Leave config and tokenizer of the teacher, so that nothing could load its body."""
    (folder / "teacher" / "model.safetensors").unlink()


@pytest.mark.parametrize("method", DISTILLATIONS)
def test_a_float32_store_trains_the_same_weights_as_the_live_teacher(tmp_path, method):
    config = tiny_config(tmp_path, method)
    live = fit(config)

    filling = fit(config, *store_options(tmp_path))
    without_weights(tmp_path)
    reading = fit(config, *store_options(tmp_path))

    assert_identical(weights(filling), weights(live))
    assert_identical(weights(reading), weights(live))
    for run in (filling, reading):
        assert isinstance(run.model.teacher, TeacherHead)
        for name in ("val/loss", "val/teacher_loss", "val/teacher_rouge_l", "train/loss"):
            assert run.trainer.callback_metrics[name] == live.trainer.callback_metrics[name], name
        assert [sample.answers["teacher"] for sample in run.model.samples] == [
            sample.answers["teacher"] for sample in live.model.samples
        ]


@pytest.mark.parametrize(
    "method", ["kd", "dskd_cross", "uld_cross", "mined_cross", "shared_cross", "gold_cross_hybrid"]
)
def test_a_bfloat16_store_keeps_the_loss_within_a_thousandth(tmp_path, method):
    config = tiny_config(tmp_path, method)
    live = fit(config, "--trainer.max_steps=4")
    stored = fit(config, "--trainer.max_steps=4", *store_options(tmp_path, dtype="bfloat16"))
    for name in ("train/loss", "val/loss", "val/teacher_loss"):
        gap = (live.trainer.callback_metrics[name] - stored.trainer.callback_metrics[name]).abs()
        assert gap < 1e-3, name


def test_an_int8_store_reports_its_error(tmp_path):
    live = fit(tiny_config(tmp_path, "dskd"), "--trainer.max_steps=1")
    stored = fit(tmp_path / "dskd.yaml", "--trainer.max_steps=1", *store_options(tmp_path, dtype="int8"))
    written = json.loads((tmp_path / "store" / "train" / "manifest.json").read_text())["written"]
    assert 0 < written["errors"]["relative_error"]["mean"] <= written["errors"]["relative_error"]["largest"] < 0.02
    gap = (live.trainer.callback_metrics["train/loss"] - stored.trainer.callback_metrics["train/loss"]).abs()
    assert 0 < gap < 0.05


def test_stored_rows_come_through_workers_unchanged(tmp_path):
    config = tiny_config(tmp_path, "dskd_cross", max_steps=3)
    alone = fit(config, *store_options(tmp_path))
    helped = fit(config, *store_options(tmp_path), "--data.init_args.num_workers=2")
    assert_identical(weights(helped), weights(alone))


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_run_that_died_continues_from_a_store_to_the_same_weights(tmp_path, step):
    unbroken = fit(tiny_config(tmp_path / "unbroken", "dskd"), *store_options(tmp_path / "unbroken"))
    config = tiny_config(tmp_path / "broken", "dskd")
    death = ["--trainer.callbacks+=tests.tiny_runs.DieAt", f"--trainer.callbacks.step={step}"]
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, *death, *store_options(tmp_path / "broken"))
    without_weights(tmp_path / "broken")

    resumed = fit(config, "--ckpt_path", "last", *store_options(tmp_path / "broken"))

    assert_identical(weights(resumed), weights(unbroken))


def test_a_checkpoint_of_a_run_with_a_store_holds_nothing_of_the_teacher(tmp_path):
    cli = fit(tiny_config(tmp_path, "dskd", max_steps=1), *store_options(tmp_path))
    checkpoint = torch.load(tmp_path / "runs/dskd/version_0/checkpoints/last.ckpt", weights_only=False)
    assert set(checkpoint["state_dict"]) == set(cli.model.state_dict())
    assert all(name.split(".")[0] in ("student", "t2s", "s2t") for name in checkpoint["state_dict"])


def test_a_second_run_runs_no_body_of_a_teacher(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "dskd")
    fit(config, *store_options(tmp_path))
    widths = []
    run_body = LanguageModel.hidden_grid
    monkeypatch.setattr(
        LanguageModel, "hidden_grid", lambda model, tokens: widths.append(model.hidden_size) or run_body(model, tokens)
    )
    fit(config, *store_options(tmp_path))
    assert set(widths) == {16}  # the student's; the teacher has 32


CHANGES = {
    "teacher": ("teacher.weights", "--model.init_args.teacher.source={other}"),
    "cut": ("teacher.keep_layers", "--model.init_args.teacher.keep_layers=[0]"),
    "template": ("template", "--data.init_args.template=alpaca"),
    "length": ("max_length", "--data.init_args.max_length=40"),
    "data": ("data", "--data.init_args.train={rows}"),
    "dtype": ("dtype", "--model.init_args.teacher_store.dtype=int8"),
    "precision": ("precision", "--trainer.precision=bf16-mixed"),
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled")
    config = tiny_config(folder, "dskd", max_steps=1)
    fit(config, *store_options(folder))
    tiny_model_folder(folder / "other", hidden_size=32, seed=9)
    changed = (folder / "train.jsonl").read_text().replace("saw", "met")
    (folder / "changed.jsonl").write_text(changed)
    return folder, config


@pytest.mark.parametrize("change", CHANGES)
def test_a_store_that_was_written_for_something_else_is_refused_with_both_values(filled, change):
    folder, config = filled
    field, option = CHANGES[change]
    option = option.format(other=folder / "other", rows=folder / "changed.jsonl")
    recorded = json.loads((folder / "store" / "train" / "manifest.json").read_text())["binding"][field]
    with pytest.raises(ValueError, match="written for something else") as refused:
        fit(config, *store_options(folder), option)
    (line,) = [line for line in str(refused.value).splitlines() if line.startswith(f"  {field}:")]
    theirs, ours = line.removeprefix(f"  {field}: store ").split(", config ")
    assert theirs == repr(recorded) and ours != theirs
    assert "teacher_store.folder" in str(refused.value)


def test_validate_reads_the_store_and_test_runs_the_teacher(filled):
    folder, config = filled
    flags = ["--config", str(config), "--ckpt_path", "last", *store_options(folder)]
    validated = TrainingCLI.run(["validate", *flags])
    assert isinstance(validated.model.teacher, TeacherHead)
    tested = TrainingCLI.run(["test", *flags])
    assert isinstance(tested.model.teacher, LanguageModel)
    assert "test/teacher_rouge_l" in tested.trainer.callback_metrics


def test_export_needs_no_body_of_the_teacher_but_refuses_the_head_of_another(tmp_path):
    config = tiny_config(tmp_path, "dskd", max_steps=1)
    options = store_options(tmp_path)
    trained = fit(config, *options)
    flags = ["export", "--config", str(config), "--ckpt_path", "last", *options]
    without_weights(tmp_path)
    TrainingCLI.run([*flags, "--to", str(tmp_path / "out")])
    exported = load_file(tmp_path / "out" / "model.safetensors")
    live = trained.model.student.model.state_dict()
    assert exported and all(torch.equal(value, live[name]) for name, value in exported.items())

    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"of another teacher")
    with pytest.raises(ValueError, match="no readable model"):
        TrainingCLI.run([*flags, "--to", str(tmp_path / "again")])


def test_other_generation_settings_leave_the_teachers_answers_out(tmp_path):
    config = tiny_config(tmp_path, "kd", max_steps=1)
    fit(config, *store_options(tmp_path))
    again = fit(config, *store_options(tmp_path), "--model.init_args.generation.max_new_tokens=3")
    assert "val/rouge_l" in again.trainer.callback_metrics
    assert "val/teacher_rouge_l" not in again.trainer.callback_metrics
    assert all("teacher" not in sample.answers for sample in again.model.samples)


def test_a_teacher_that_starts_at_random_is_recognised_by_its_weights(tmp_path):
    config = tiny_config(tmp_path, "dskd", max_steps=2)
    settings = yaml.safe_load(config.read_text())
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tokenizer = settings["model"]["init_args"]["teacher"]["source"]
    settings["model"]["init_args"]["teacher"] = {"config": {"model_type": "llama", **sizes}, "tokenizer": tokenizer}
    config.write_text(yaml.safe_dump(settings))
    live = fit(config)
    fit(config, *store_options(tmp_path))
    assert_identical(weights(fit(config, *store_options(tmp_path))), weights(live))
    with pytest.raises(ValueError, match=r"teacher\.weights"):
        fit(config, *store_options(tmp_path), "--seed_everything=4")


def test_the_tool_writes_the_store_with_two_processes_and_fit_only_reads(tmp_path):
    config = tiny_config(tmp_path, "dskd_cross", max_steps=2)
    command = [sys.executable, ROOT / "tools" / "cache_teacher.py", "--config", config, *store_options(tmp_path)]
    done = subprocess.run(
        [*command, "--trainer.devices=2", "--trainer.strategy=ddp"], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Teacher store" in done.stderr
    assert not (tmp_path / "runs").exists()
    live = fit(config)
    without_weights(tmp_path)
    assert_identical(weights(fit(config, *store_options(tmp_path))), weights(live))


def test_the_largest_probabilities_train_like_the_whole_distribution_within_their_bound(tmp_path):
    config = tiny_config(tmp_path, "kd", max_steps=1, dropout=0.0)
    live = fit(config)
    stored = fit(config, *store_options(tmp_path, top_k=300))
    written = json.loads((tmp_path / "store" / "train" / "manifest.json").read_text())["written"]
    errors = written["errors"]
    assert 0 < errors["rest_mass"]["mean"] <= errors["rest_mass"]["largest"] < 1
    shortfall = (live.trainer.callback_metrics["train/kd"] - stored.trainer.callback_metrics["train/kd"]).item()
    # the student starts with a rest that is as nearly even as the teacher's
    assert 0 < shortfall < 4 * errors["uniform_tail_error"]["largest"]
    assert stored.trainer.callback_metrics["train/ce"] == live.trainer.callback_metrics["train/ce"]
    assert stored.trainer.callback_metrics["train/agreement"] == live.trainer.callback_metrics["train/agreement"]
    assert "val/teacher_loss" in stored.trainer.callback_metrics


def test_settings_that_cannot_take_effect_are_refused(tmp_path):
    with pytest.raises(ValueError, match="DSKD maps the teacher's hidden states"):
        fit(tiny_config(tmp_path, "dskd"), *store_options(tmp_path, top_k=8))
    config = tiny_config(tmp_path, "kd")
    with pytest.raises(ValueError, match="reverse_kl"):
        fit(config, *store_options(tmp_path, top_k=8), "--model.init_args.divergence.name=reverse_kl")
    with pytest.raises(ValueError, match=r"teacher_store\.top_k is 360"):
        fit(config, *store_options(tmp_path, top_k=360))
    with pytest.raises(ValueError, match=r"teacher\.lora"):
        fit(config, *store_options(tmp_path), "--model.init_args.teacher.lora.rank=2")
