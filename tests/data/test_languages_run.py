"""Continual pre-training on several languages through the command line: a plain method on rows of text."""

import csv

import pytest
import torch
import yaml

from tests.data.test_languages import write_corpus
from tests.tiny import tiny_model_folder
from tests.tiny_runs import fit, tiny_trainer


@pytest.fixture
def config(tmp_path):
    folder = tiny_model_folder(tmp_path / "student", family="gpt2", resid_pdrop=0.1)
    files = {language: write_corpus(tmp_path, language, 80) for language in ("en", "hu", "tr")}
    groups = {"old": {"en": files["en"]}, "new": {"hu": files["hu"], "tr": [files["tr"]]}}
    settings = {
        "seed_everything": 3,
        "model": {
            "class_path": "SFT",
            "init_args": {
                "student": {"source": str(folder)},
                "optimization": {"lr": 1e-2},
                "generation": {"prompts": 2},
            },
        },
        "data": {
            "class_path": "Languages",
            "init_args": {"groups": groups, "stage": 2, "tokens": 4000, "row_length": 32, "batch_size": 2},
        },
        "trainer": tiny_trainer(max_steps=12, accumulate_grad_batches=2, val_check_interval=6),
        "checkpoint": {"every_n_train_steps": 1},
        "run": {"root": str(tmp_path / "runs")},
    }
    path = tmp_path / "cpt.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_plain_method_learns_from_rows_of_text_and_a_killed_run_goes_on_bit_for_bit(config):
    whole = fit(config)
    rows = list(csv.DictReader((config.parent / "runs/cpt/version_0/metrics.csv").open()))
    losses = [float(row["val/loss"]) for row in rows if row.get("val/loss")]
    assert losses[-1] < losses[0] - 0.5
    with pytest.raises(RuntimeError, match="died on purpose"):
        fit(config, "--run.version=killed", "--trainer.callbacks+=tests.tiny_runs.DieAt", "--trainer.callbacks.step=7")
    resumed = fit(config, "--run.version=killed", "--ckpt_path=last")
    ours, theirs = (run.model.student.state_dict() for run in (whole, resumed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
