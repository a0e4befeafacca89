"""Speed and memory of a run."""

import time

import pytest
from torch.utils.data import DataLoader

from lit_llm.callbacks.metrics_csv import ContinueMetrics
from lit_llm.callbacks.throughput import Throughput
from tests.callbacks.small import Batches, SmallMethod, rows_of, trainer_in

NAMES = {
    "throughput/tokens_per_second",
    "throughput/supervised_tokens_per_second",
    "throughput/examples_per_second",
    "throughput/seconds_per_step",
    "throughput/peak_memory_gb",
    "throughput/hours_left",
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


class SlowLoader(DataLoader):
    """Says, as our loader does, how long one has waited for it: 30 ms a batch."""

    seconds_waited = 0.0

    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(0.03)
            self.seconds_waited += 0.03
            yield batch


def test_waiting_for_data_is_told_as_a_share_of_the_time_without_validations(tmp_path):
    method = SlowSteps()
    method.train_dataloader = lambda: SlowLoader(Batches(), batch_size=None)
    trainer_in(tmp_path, [Throughput(), ContinueMetrics()], val_check_interval=2).fit(method)
    rows = [row for row in rows_of(tmp_path) if "train/loss" in row]
    waited = [
        row["throughput/data_wait_share"] * row["throughput/seconds_per_step"] * n for n, row in enumerate(rows, 1)
    ]
    # what comes before the first step and between a validation and the next one is not of the time that is measured
    assert waited == pytest.approx([0, 0.03, 0.03, 0.06, 0.06, 0.09], abs=1e-6)


def test_a_loader_that_does_not_say_how_long_one_waits_gives_no_share(tmp_path):
    trainer_in(tmp_path, [Throughput()]).fit(SmallMethod())
    assert not [row for row in rows_of(tmp_path) if "throughput/data_wait_share" in row]


def test_time_left_falls_to_nothing(tmp_path):
    trainer_in(tmp_path, [Throughput()]).fit(SlowSteps())
    left = [row["throughput/hours_left"] for row in rows_of(tmp_path) if "train/loss" in row]
    assert left[-1] == 0 and all(hours * 3600 > 0.02 for hours in left[:-1]) and left[0] * 3600 > 5 * 0.02


def test_utilisation_counts_the_products_of_a_step_where_the_peak_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr("lit_llm.callbacks.throughput._peak_flops", lambda *_: 1e6)
    trainer_in(tmp_path, [Throughput(), ContinueMetrics()], accumulate_grad_batches=2).fit(SmallMethod())
    rows = [row for row in rows_of(tmp_path) if "train/loss" in row]
    assert "throughput/model_flops_utilisation" not in rows[0]
    # forward and gradient of the weight, (4, 3) x (3, 3) each, in each of two micro-batches
    flops = 2 * 2 * (2 * 4 * 3 * 3)
    last = rows[-1]
    expected = flops / 60 * last["throughput/tokens_per_second"] / 1e6
    assert last["throughput/model_flops_utilisation"] == pytest.approx(expected)


def test_on_a_cpu_no_peak_is_made_up(tmp_path):
    trainer_in(tmp_path, [Throughput()]).fit(SmallMethod())
    assert not [row for row in rows_of(tmp_path) if "throughput/model_flops_utilisation" in row]


def test_an_empty_window_is_refused():
    with pytest.raises(ValueError, match="window"):
        Throughput(window=0)
