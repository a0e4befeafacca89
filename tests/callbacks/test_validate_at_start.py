"""A validation before the first step, which leaves no trace."""

import pytest
import torch

from lit_llm.callbacks.metrics_csv import ContinueMetrics
from lit_llm.callbacks.step_axis import StepAxis
from lit_llm.callbacks.validate_at_start import ValidateAtStart
from tests.callbacks.small import SmallMethod, rows_of, trainer_in


def fitted(folder, *callbacks, resume=None, **settings) -> SmallMethod:
    torch.manual_seed(1)
    method = SmallMethod(draws_in_validation=True)
    trainer = trainer_in(folder, [StepAxis(), ContinueMetrics(), *callbacks], **settings)
    trainer.fit(method, ckpt_path=resume, weights_only=False if resume else None)
    trainer.save_checkpoint(folder / "end.ckpt")
    return method


def test_the_curve_begins_with_the_whole_validation_set_at_step_0(tmp_path):
    method = fitted(tmp_path, ValidateAtStart())
    rows = [row for row in rows_of(tmp_path) if "val/loss" in row]
    assert [row["step"] for row in rows] == [0, 3, 6] == method.validated_at
    untrained = SmallMethod()
    losses = [untrained.student(batch.values).square().mean() for batch in untrained.val_dataloader()]
    assert rows[0]["val/loss"] == pytest.approx(torch.stack(losses).mean().item())


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"num_sanity_val_steps": 2}])
def test_weights_are_the_same_with_and_without_it(tmp_path, settings):
    torch.manual_seed(0)
    with_it = fitted(tmp_path / "a", ValidateAtStart(), **settings).state_dict()
    without = fitted(tmp_path / "b", **settings).state_dict()
    for name, value in without.items():
        assert torch.equal(value, with_it[name])


def test_the_progress_that_a_checkpoint_holds_is_the_same_with_and_without_it(tmp_path):
    fitted(tmp_path / "a", ValidateAtStart())
    fitted(tmp_path / "b")
    ours, theirs = (torch.load(tmp_path / run / "end.ckpt", weights_only=False) for run in "ab")
    assert ours["loops"]["fit_loop"] == theirs["loops"]["fit_loop"]


def test_a_resumed_run_does_not_validate_before_its_first_step(tmp_path):
    fitted(tmp_path, ValidateAtStart(), max_steps=4)
    resumed = fitted(tmp_path, ValidateAtStart(), resume=tmp_path / "end.ckpt")
    assert resumed.validated_at == [6]


def test_a_resumed_run_ends_where_an_unbroken_one_ends(tmp_path):
    unbroken = fitted(tmp_path / "unbroken", ValidateAtStart()).validated_at
    assert unbroken == [0, 3, 6]
    fitted(tmp_path / "broken", ValidateAtStart(), max_steps=3)
    resumed = fitted(tmp_path / "broken", ValidateAtStart(), resume=tmp_path / "broken" / "end.ckpt")
    assert resumed.validated_at == [6]
    assert [row["step"] for row in rows_of(tmp_path / "broken") if "val/loss" in row] == unbroken


def test_it_stays_away_where_validation_is_off(tmp_path):
    assert fitted(tmp_path, ValidateAtStart(), limit_val_batches=0).validated_at == []
