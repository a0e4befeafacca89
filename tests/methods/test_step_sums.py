"""What is logged of a step: over its micro-batches, and over processes that may have gathered different names."""

from __future__ import annotations

import pytest
import torch

from lit_llm.methods.step_sums import StepSums
from tests.tiny_runs import fit, tiny_config


def gathered(*parts: tuple[float, int]) -> StepSums:
    sums = StepSums()
    for total, count in parts:
        sums.mean("ce", torch.tensor(total), count)
        sums.total("loss", torch.tensor(total))
        sums.largest("most", torch.tensor(total))
    return sums


def test_means_are_of_all_tokens_totals_add_up_and_the_largest_is_that_of_all():
    sums = gathered((6.0, 2), (1.0, 5))
    assert sums.here() == {"ce": 1.0, "loss": 7.0, "most": 6.0}
    found = sums.take(lambda ours: [ours])
    assert {name: float(value) for name, value in found.items()} == {"ce": 1.0, "loss": 7.0, "most": 6.0}
    assert sums.take(lambda ours: [ours]) == {}


def test_processes_are_joined_by_name_also_where_only_one_has_it():
    other = gathered((3.0, 1), (20.0, 2))
    other.mean("on_policy", 1.0, 1)
    found = gathered((6.0, 2), (1.0, 5)).take(lambda ours: [ours, other._found])
    assert {name: float(value) for name, value in found.items()} == {
        "ce": 3.0,
        "loss": 30.0,
        "most": 20.0,
        "on_policy": 1.0,
    }


def test_nothing_to_count_is_nothing_and_what_nobody_wants_is_forgotten():
    sums = gathered((0.0, 0))
    assert float(sums.take(lambda ours: [ours])["ce"]) == 0.0
    sums = gathered((1.0, 1))
    assert sums.take(None) == {} and sums.here() == {}


@pytest.mark.parametrize("method", ["sft", "dskd", "align"])
def test_a_step_in_parts_logs_the_loss_of_the_whole_step(tmp_path, method):
    options = ["--trainer.precision=64-true", "--trainer.max_steps=1", "--trainer.val_check_interval=4"]
    options += ["--data.init_args.bucket=1"]
    if method == "dskd":
        options.append("--model.init_args.projectors.masked_mean=labelled")
    whole = fit(tiny_config(tmp_path / "whole", method, dropout=0.0), *options, "--data.init_args.batch_size=4")
    parts = [*options, "--data.init_args.batch_size=1", "--trainer.accumulate_grad_batches=4"]
    split = fit(tiny_config(tmp_path / "split", method, dropout=0.0), *parts)
    ours, theirs = ({n: float(v) for n, v in run.trainer.callback_metrics.items()} for run in (split, whole))
    names = [name for name in theirs if name.startswith("train/")]
    assert "train/loss" in names
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-7), name
