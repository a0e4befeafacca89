"""A loss that is not a number stops the run before it reaches the weights."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lit_llm.callbacks.nan_guard import NanGuard, NonFinite, NonFiniteLoss
from tests.callbacks.small import Batches, SmallMethod, rows_of, trainer_in


class BreaksAt(SmallMethod):
    """The loss of one micro-batch is infinite."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.trainer.fit_loop.epoch_loop.total_batch_idx == self.batch else loss


class BadGradient(SmallMethod):
    """A finite loss with a gradient that is not a number: the root of zero times zero."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + (self.student.weight * 0).sum().sqrt()


def failure(folder, method, guard=None, **settings) -> str:
    with pytest.raises(NonFiniteLoss) as caught:
        trainer_in(folder, [guard or NanGuard()], **settings).fit(method)
    return str(caught.value)


def test_the_error_names_step_terms_examples_and_what_to_do(tmp_path):
    text = failure(tmp_path, BreaksAt(2))
    assert "optimizer step 3" in text and "inf" in text
    assert "train/loss" in text and "train/ce" in text
    assert "optimization.lr" in text and "examples" in text
    assert issubclass(NonFiniteLoss, ValueError)


def test_weights_are_those_before_the_broken_step(tmp_path):
    method, unbroken = BreaksAt(3), SmallMethod()
    torch.manual_seed(5)
    failure(tmp_path / "broken", method)
    torch.manual_seed(5)
    trainer_in(tmp_path / "unbroken", [], max_steps=3).fit(unbroken)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, method.state_dict()[name])


def test_only_the_examples_of_the_broken_micro_batch_are_named(tmp_path):
    method = SmallMethod()
    method.train_dataloader = lambda: DataLoader(Batches(8, broken=(3,)), batch_size=None)
    text = failure(tmp_path, method, accumulate_grad_batches=2, max_steps=4, val_check_interval=8)
    assert "optimizer step 2" in text and "nan" in text and "examples 6, 7." in text


def test_a_gradient_that_is_not_a_number_stops_the_run_although_the_loss_is_finite(tmp_path):
    method = BadGradient()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    text = failure(tmp_path, method)
    assert "The gradient is not finite" in text and "optimizer step 1" in text
    for name, value in before.items():
        assert torch.equal(value, method.state_dict()[name])


def test_a_healthy_run_is_left_alone(tmp_path):
    trainer = trainer_in(tmp_path, [NanGuard()], accumulate_grad_batches=2)
    trainer.fit(SmallMethod())
    assert trainer.global_step == 6


def test_the_broken_batch_is_kept_to_be_looked_at(tmp_path):
    method = SmallMethod()
    method.train_dataloader = lambda: DataLoader(Batches(8, broken=(3,)), batch_size=None)
    text = failure(tmp_path, method, accumulate_grad_batches=2, max_steps=4, val_check_interval=8)
    file = tmp_path / "run/version_0/non_finite/step-2.pt"
    assert str(file) in text and "non_finite.action: skip" in text
    kept = torch.load(file, weights_only=True)
    assert kept["step"] == 2 and kept["losses"][1] != kept["losses"][1]
    assert [batch["examples"] for batch in kept["batches"]] == [[4, 5], [6, 7]]
    assert kept["batches"][1]["values"].isnan().all() and kept["batches"][0]["values"].isfinite().all()


def test_a_skipped_step_counts_and_leaves_weights_and_optimizer_as_they_were(tmp_path):
    method, seen = BreaksAt(3), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            moments = [value.clone() for state in trainer.optimizers[0].state.values() for value in state.values()]
            seen.append([value.clone() for value in pl_module.state_dict().values()] + moments)

    guard = NanGuard(non_finite=NonFinite(action="skip"))
    with pytest.warns(UserWarning, match="(?s)optimizer step 4.*skipped, 1 of at most 10"):
        trainer = trainer_in(tmp_path, [guard, Watch()], gradient_clip_val=1.0)
        trainer.fit(method)
    assert trainer.global_step == 6
    same = [all(map(torch.equal, before, after)) for before, after in zip(seen, seen[1:], strict=False)]
    assert same == [False, False, True, False, False]
    assert (tmp_path / "run/version_0/non_finite/step-4.pt").is_file()
    assert [row["train/skipped_steps"] for row in rows_of(tmp_path) if "train/loss" in row] == [0, 0, 0, 1, 1, 1]


def test_after_as_many_skipped_steps_as_allowed_the_run_stops(tmp_path):
    text = failure(tmp_path, BadGradient(), NanGuard(non_finite=NonFinite(action="skip", most=2)))
    assert "optimizer step 3" in text and "2 steps were skipped before (non_finite.most)" in text
    assert len(list((tmp_path / "run/version_0/non_finite").iterdir())) == 2


@pytest.mark.parametrize(("settings", "says"), [({"most": 0}, "at least 1"), ({"most": 3}, "action: skip")])
def test_settings_that_cannot_take_effect_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        NonFinite(**settings)
