"""Speed and memory of a run."""

import time

import pytest

from lit_llm.callbacks.metrics_csv import ContinueMetrics
from lit_llm.callbacks.throughput import Throughput
from tests.callbacks.small import SmallMethod, rows_of, trainer_in

NAMES = {
    "throughput/tokens_per_second",
    "throughput/supervised_tokens_per_second",
    "throughput/examples_per_second",
    "throughput/seconds_per_step",
    "throughput/peak_memory_gb",
}


class SlowSteps(SmallMethod):
    """20 ms a step and half a second a validation."""

    def training_step(self, batch, batch_idx):
        time.sleep(0.02)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_end(self):
        time.sleep(0.5)


def test_every_step_logs_all_measures_in_the_proportions_of_the_batch(tmp_path):
    trainer_in(tmp_path, [Throughput()]).fit(SmallMethod())
    for row in (row for row in rows_of(tmp_path) if "train/loss" in row):
        assert NAMES <= set(row)
        tokens = row["throughput/tokens_per_second"]
        assert row["throughput/supervised_tokens_per_second"] == pytest.approx(tokens * 20 / 30)
        assert row["throughput/examples_per_second"] == pytest.approx(tokens * 2 / 30)
        assert row["throughput/seconds_per_step"] == pytest.approx(30 / tokens)
        assert 0.05 < row["throughput/peak_memory_gb"] < 100


def test_time_spent_in_validation_does_not_count(tmp_path):
    trainer_in(tmp_path, [Throughput()], val_check_interval=2).fit(SlowSteps())
    last = [row for row in rows_of(tmp_path) if "train/loss" in row][-1]
    assert 0.02 <= last["throughput/seconds_per_step"] < 0.1


def test_accumulated_batches_count_as_one_step_and_its_supervised_tokens_once(tmp_path):
    trainer_in(tmp_path, [Throughput()], accumulate_grad_batches=2).fit(SmallMethod())
    row = [row for row in rows_of(tmp_path) if "train/loss" in row][-1]
    tokens = row["throughput/tokens_per_second"]
    assert row["throughput/seconds_per_step"] == pytest.approx(60 / tokens)
    assert row["throughput/supervised_tokens_per_second"] == pytest.approx(tokens * 20 / 60)


def test_the_window_forgets_old_steps(tmp_path):
    class SlowAtFirst(SmallMethod):
        def training_step(self, batch, batch_idx):
            time.sleep(0.3 if self.global_step == 0 else 0)
            return super().training_step(batch, batch_idx)

    trainer_in(tmp_path, [Throughput(window=2), ContinueMetrics()]).fit(SlowAtFirst())
    seconds = [row["throughput/seconds_per_step"] for row in rows_of(tmp_path) if "train/loss" in row]
    assert seconds[0] >= 0.3 and seconds[1] >= 0.15 and seconds[-1] < 0.15


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="window"):
        Throughput(window=0)
