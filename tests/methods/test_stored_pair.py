"""AlignDistil from a store: what live training gives, without the two frozen models; and nothing computed twice."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from lit_llm.models.language_model import LanguageModel
from lit_llm.models.shared_base import AdaptedBase
from lit_llm.models.teacher_head import TeacherHead
from lit_llm.training_cli import TrainingCLI
from tests.tiny import tiny_model_folder
from tests.tiny_runs import assert_identical, fit, store_options, tiny_config, weights

FROZEN = ("teacher", "other")


def assert_close(ours: dict, theirs: dict) -> None:
    """Equal but for what batches of another width round otherwise, over a few steps."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=5e-4, msg=name)


def without_weights(folder: Path) -> None:
    """Leave config and tokenizer of the frozen models, so that nothing could load their bodies."""
    for name in FROZEN:
        (folder / name / "model.safetensors").unlink()


def counted(monkeypatch) -> list[LanguageModel]:
    """From now on, the model of every run of a body."""
    ran, run_body = [], LanguageModel.hidden_grid
    monkeypatch.setattr(
        LanguageModel, "hidden_grid", lambda model, tokens: ran.append(model) or run_body(model, tokens)
    )
    return ran


def test_a_float32_store_trains_the_same_weights_as_the_live_models(tmp_path):
    config = tiny_config(tmp_path, "align")
    live = fit(config)
    filling = fit(config, *store_options(tmp_path))
    without_weights(tmp_path)
    reading = fit(config, *store_options(tmp_path))
    assert_identical(weights(reading), weights(filling))
    assert_close(weights(filling), weights(live))
    compared = ("loss", "kl_start", "reward_margin", "dpo_reward_margin", "contrastive_reward_margin", "alpha_p95")
    for run in (filling, reading):
        assert isinstance(run.model.teacher, TeacherHead) and isinstance(run.model.other, TeacherHead)
        found, wanted = run.trainer.callback_metrics, live.trainer.callback_metrics
        assert found["val/teacher_rouge_l"] == wanted["val/teacher_rouge_l"]
        for name in ("train/loss", *(f"val/{name}" for name in compared)):
            assert found[name].item() == pytest.approx(wanted[name].item(), rel=2e-3, abs=1e-5), name


def test_a_bfloat16_store_keeps_the_loss_within_a_thousandth(tmp_path):
    config = tiny_config(tmp_path, "align", max_steps=4)
    live, stored = fit(config), fit(config, *store_options(tmp_path, dtype="bfloat16"))
    errors = json.loads((tmp_path / "store" / "dpo" / "train" / "manifest.json").read_text())["written"]["errors"]
    assert 0 < errors["relative_error"]["largest"] < 2**-7
    for name in ("train/loss", "val/loss"):
        theirs, ours = (run.trainer.callback_metrics[name].item() for run in (live, stored))
        assert 0 < abs(ours - theirs) < 1e-3 * max(1.0, abs(theirs)), name


def test_from_the_second_run_on_no_frozen_body_is_run_or_loaded(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "align")
    TrainingCLI.run(["cache_teacher", "--config", str(config), *store_options(tmp_path)])
    assert not (tmp_path / "runs").exists()
    ran = counted(monkeypatch)
    method = fit(config, *store_options(tmp_path), "--model.init_args.watch_start=false").model
    assert set(ran) == {method.student}


def test_adapters_leave_the_shared_base_once_the_store_is_filled(tmp_path, monkeypatch):
    stage = tiny_config(tmp_path, "dpo", dropout=0.0, max_steps=4)
    quiet = [
        "--trainer.limit_val_batches=0",
        "--trainer.val_check_interval=null",
        "--model.init_args.student.lora.rank=2",
    ]
    places = {
        name: fit(
            stage, *quiet, f"--model.init_args.reverse={name == 'other'}", f"--run.version={name}"
        ).model.run_folder
        for name in ("dpo", "other")
    }
    options = [f"--model.init_args.{name}.source={place / 'adapters'}" for name, place in places.items()]
    options += ["--model.init_args.student.lora={rank: 4, target_modules: all-linear}"]
    config = tiny_config(tmp_path, "align", dropout=0.0)
    live, filling = fit(config, *options), fit(config, *options, *store_options(tmp_path))
    assert_close(weights(filling), weights(live))
    assert not any(".frozen_" in name for name, _ in filling.model.named_parameters())

    asked, hidden = [], AdaptedBase.hidden
    monkeypatch.setattr(AdaptedBase, "hidden", lambda view, tokens: asked.append(view.adapter) or hidden(view, tokens))
    death = ["--trainer.callbacks+=tests.tiny_runs.DieAt", "--trainer.callbacks.step=5"]
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, *options, *store_options(tmp_path), *death, "--run.version=broken")
    resumed = fit(config, *options, *store_options(tmp_path), "--ckpt_path=last", "--run.version=broken")
    assert_identical(weights(resumed), weights(filling))
    assert set(asked) == {None}  # the start alone
    own_head = resumed.model.student.head.weight_VD
    assert resumed.model.teacher.head.weight_VD.data_ptr() == own_head.data_ptr()


def test_two_processes_fill_and_train_like_one(tmp_path):
    options = ["--data.init_args.bucket=1", "--trainer.limit_val_batches=0", "--trainer.precision=64-true"]
    one = tiny_config(tmp_path / "one", "align", dropout=0.0, max_steps=3)
    fit(one, "--data.init_args.batch_size=4", *options)
    two = tiny_config(tmp_path / "two", "align", dropout=0.0, max_steps=3)
    command = [sys.executable, "-m", "lit_llm", "fit", "--config", str(two), "--data.init_args.batch_size=2", *options]
    command += [*store_options(tmp_path), "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    folders = [tmp_path / which / "runs/align/version_0/checkpoints/last.ckpt" for which in ("one", "two")]
    ours, theirs = (torch.load(folder, weights_only=False)["state_dict"] for folder in folders)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=1e-5)  # the store is in single precision


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filled")
    config = tiny_config(folder, "align", max_steps=1)
    fit(config, *store_options(folder))
    tiny_model_folder(folder / "another", hidden_size=32, seed=9)
    (folder / "changed.jsonl").write_text((folder / "train.jsonl").read_text().replace("saw", "met"))
    return folder, config


CHANGES = {
    "dpo": ("teacher.weights", "--model.init_args.dpo.source={folder}/another"),
    "other": ("teacher.weights", "--model.init_args.other.source={folder}/another"),
    "data": ("data", "--data.init_args.train={folder}/changed.jsonl"),
    "length": ("max_length", "--data.init_args.max_length=40"),
    "dtype": ("dtype", "--model.init_args.teacher_store.dtype=int8"),
    "precision": ("precision", "--trainer.precision=bf16-mixed"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_store_that_was_written_for_something_else_is_refused_with_both_values(filled, change):
    folder, config = filled
    field, option = CHANGES[change]
    which = "other" if change == "other" else "dpo"
    recorded = json.loads((folder / "store" / which / "train" / "manifest.json").read_text())["binding"][field]
    with pytest.raises(ValueError, match=f"store/{which}/train was written for something else") as refused:
        fit(config, *store_options(folder), option.format(folder=folder))
    (line,) = [line for line in str(refused.value).splitlines() if line.startswith(f"  {field}:")]
    theirs, ours = line.removeprefix(f"  {field}: store ").split(", config ")
    assert theirs == repr(recorded) and ours != theirs


def test_validate_reads_the_store_and_test_runs_the_models(filled):
    folder, config = filled
    flags = ["--config", str(config), "--ckpt_path", "last", *store_options(folder)]
    validated = TrainingCLI.run(["validate", *flags])
    assert isinstance(validated.model.other, TeacherHead) and "val/kl_dpo" in validated.trainer.callback_metrics
    tested = TrainingCLI.run(["test", *flags])
    assert isinstance(tested.model.other, LanguageModel) and "test/kl_dpo" in tested.trainer.callback_metrics


def test_settings_of_a_store_that_cannot_take_effect_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher_store\.folder .* and model\.on_policy is set"):
        fit(tiny_config(tmp_path, "align_sampled"), *store_options(tmp_path))
    with pytest.raises(ValueError, match=r"teacher_store\.top_k is 8"):
        fit(tiny_config(tmp_path, "align"), *store_options(tmp_path, top_k=8))


def test_a_run_asks_each_model_once_for_what_does_not_change(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_LLM_CACHE", str(tmp_path / "cache"))
    ran = counted(monkeypatch)
    method = fit(tiny_config(tmp_path, "align")).model
    runs = Counter(ran)
    steps, validations = 8, 3  # one at the start, two on the way, one batch each
    assert runs[method.student] == steps + validations + 1  # once as its own reference on held-out pairs
    assert runs[method.teacher] == runs[method.other] == steps + 1
    assert runs[method.frozen_start.model] == 1


def test_what_a_method_does_not_read_of_pairs_is_not_collated(tmp_path):
    for name, wanted in (("align", False), ("dpo", True)):
        data = fit(tiny_config(tmp_path / name, name), "--trainer.max_steps=1").datamodule
        assert (next(iter(data.train_dataloader())).both is not None) == wanted
        assert next(iter(data.val_dataloader())).both is not None


def test_values_of_frozen_models_are_computed_again_where_they_would_fill_the_memory(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, "align")
    kept = fit(config)
    monkeypatch.setattr("lit_llm.methods.frozen_pair._KEPT_BYTES", 100)
    again = fit(config)
    assert not again.model.frozen_pair._hidden and kept.model.frozen_pair._hidden
    for name, value in kept.trainer.callback_metrics.items():
        if name.startswith("val/"):
            assert again.trainer.callback_metrics[name] == value, name
