"""LayerMoE in two processes: the weights of one, with experts that some process has no token for, resumed, and grown again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.expert_counts import read_counts
from tests.processes import Finished, fit_in_two_processes
from tests.tiny_languages import language_config
from tests.tiny_runs import assert_same_logs, fit, largest_gap

UNVALIDATED = ("--trainer.limit_val_batches=0", "--trainer.val_check_interval=null")
DOUBLE, SINGLE = "--trainer.precision=64-true", "--trainer.precision=32-true"
ROWS = {"row_length": 8}
# a gradient near zero takes Adam a whole step in either direction, so in single precision its rounding would show
CALM = {"optimization": {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-2}}


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """The run folder of a first stage, of one new language."""
    config = language_config(tmp_path_factory.mktemp("first"), 1, groups=TWO, max_steps=2)
    return fit(config, *UNVALIDATED).model.run_folder


TWO, THREE = {"old": ["en"], "new": ["hu"]}, {"old": ["en"], "new": ["hu"], "later": ["tr"]}


def of_one_process(config: Path, *options: str) -> dict[str, Tensor]:
    found = fit(config, *UNVALIDATED, *options, "--data.init_args.batch_size=4").model.state_dict()
    return {name: value.detach().clone() for name, value in found.items()}


def of_two_processes(config: Path, *options: str) -> Finished:
    """Train in two processes, and leave their expert counts beside the config."""
    counts = ("--trainer.callbacks+=tests.expert_counts.ExpertCounts", f"--trainer.callbacks.folder={config.parent}")
    return fit_in_two_processes(config, *UNVALIDATED, *options, "--data.init_args.batch_size=2", *counts)


def last_weights(folder: Path, stage: int) -> dict[str, Tensor]:
    last = folder / "runs" / f"stage{stage}" / "version_0" / "checkpoints" / "last.ckpt"
    return torch.load(last, weights_only=True)["state_dict"]


def check_loads_were_unequal(folder: Path) -> None:
    """In some micro-batch a process had no token for an expert that another one used, and one had a single token."""
    ranks = read_counts(folder)
    assert len(ranks) == 2 and len(ranks[0]) == len(ranks[1])
    pairs = [
        {a, b}
        for ours, theirs in zip(*ranks)
        for layer, other in zip(ours, theirs, strict=True)
        for a, b in zip(layer, other, strict=True)
    ]
    assert any(0 in pair and max(pair) > 0 for pair in pairs) and any(1 in pair for pair in pairs)


# more experts than a process can serve with the 32 slots of its 16 tokens
STAGE_1: dict[str, Any] = {"expand": {"experts": [20, 1, 2]}, "balance_over": "ranks"}


@pytest.mark.parametrize(
    ("stage", "precision", "more", "near"),
    [
        (1, DOUBLE, STAGE_1, 1e-6),
        (1, SINGLE, {**STAGE_1, **CALM, "dispatch": "grouped"}, 1e-4),
        (2, DOUBLE, {"classifier_layers": [2]}, 1e-6),
    ],
    ids=["experts", "grouped in float32", "review"],
)
def test_two_processes_train_the_same_weights_as_one(first, tmp_path, stage, precision, more, near):
    """A row has one language, and ranks have other rows, so loads are unequal; experts that nobody chose take part."""
    source = first / "model" if stage == 2 else None
    settings = {"groups": TWO, "source": source, "model": more, "data": ROWS, "max_steps": 3}
    ours = of_one_process(language_config(tmp_path / "one", stage, **settings), precision)
    done = of_two_processes(language_config(tmp_path / "two", stage, **settings), precision)
    assert done.returncode == 0, done.stderr[-2000:]
    assert largest_gap(last_weights(tmp_path / "two", stage), ours) < near
    assert_same_logs(*(tmp_path / run / "runs" / f"stage{stage}" / "version_0" for run in ("one", "two")), near)
    if stage == 1:
        check_loads_were_unequal(tmp_path / "two")


def test_two_processes_that_died_in_a_second_expansion_resume_to_the_weights_of_one_that_lived(first, tmp_path):
    model = {"expand": {"experts": [4, 2, 1]}, "balance_over": "ranks"}
    settings = {"groups": THREE, "source": first / "model", "model": model, "data": ROWS, "max_steps": 3}
    ours = of_one_process(language_config(tmp_path / "one", 1, **settings), DOUBLE)
    config = language_config(tmp_path / "two", 1, **settings)
    died = ("--trainer.callbacks+=tests.tiny_runs.DieAt", "--trainer.callbacks.step=2")
    assert "died on purpose" in of_two_processes(config, DOUBLE, *died).stderr
    resumed = of_two_processes(config, DOUBLE, "--ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    theirs = last_weights(tmp_path / "two", 1)
    assert largest_gap(theirs, ours) < 1e-6
    assert [theirs[name].shape[0] for name in theirs if ".layers.0." in name and "router" in name] == [3 + 3]
