"""metrics.csv over several processes, killed ones among them."""

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_llm.callbacks.metrics_csv import ContinueMetrics, MetricsCsv, MetricsFile
from lit_llm.callbacks.step_axis import StepAxis
from tests.callbacks.small import SmallMethod, rows_of, trainer_in


def callbacks():
    return [StepAxis(), ContinueMetrics()]


def test_it_shares_its_folder_with_a_tensorboard_logger_of_the_same_arguments(tmp_path):
    for version in ("mine", 3, None):
        place = {"save_dir": str(tmp_path), "name": "run", "version": version}
        assert MetricsCsv(**place).log_dir == TensorBoardLogger(**place).log_dir


def test_a_column_that_appears_later_is_empty_in_earlier_rows(tmp_path):
    file = MetricsFile(tmp_path / "metrics.csv")
    file.append({"step": 1, "a": 0.5})
    file.append({"step": 2, "b": 1.0})
    assert file.path.read_text() == "step,a,b\n1,0.5,\n2,,1\n"


def test_a_new_process_appends_to_what_is_there(tmp_path):
    MetricsFile(tmp_path / "metrics.csv").append({"step": 1, "a": 0.5})
    MetricsFile(tmp_path / "metrics.csv").append({"step": 2, "b": 2.0, "a": 0.25})
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b\n1,0.5,\n2,0.25,2\n"


def test_a_row_cut_by_a_killed_process_is_dropped(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a\n1,0.5\n2,0.")
    MetricsFile(tmp_path / "metrics.csv").append({"step": 2, "a": 0.25})
    assert (tmp_path / "metrics.csv").read_text() == "step,a\n1,0.5\n2,0.25\n"


def test_continuing_drops_the_rows_of_later_steps(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a\n1,0.5\n2,0.4\n3,0.3\n")
    assert MetricsFile(tmp_path / "metrics.csv").continue_from(2) == 1
    assert (tmp_path / "metrics.csv").read_text() == "step,a\n1,0.5\n2,0.4\n"


def test_a_new_run_starts_the_file_anew(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,a\n0,0.5\n")
    file = MetricsFile(tmp_path / "metrics.csv")
    file.continue_from(0)
    file.append({"step": 0, "b": 1.0})
    assert (tmp_path / "metrics.csv").read_text() == "step,b\n0,1\n"


def test_values_that_are_not_finite_survive(tmp_path):
    MetricsFile(tmp_path / "metrics.csv").append({"step": 1, "a": float("nan"), "b": float("inf")})
    assert (tmp_path / "metrics.csv").read_text() == "step,a,b\n1,nan,inf\n"


def test_logging_without_a_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="step"):
        MetricsCsv(tmp_path).log_metrics({"a": 1.0})


def test_the_steps_of_a_run_count_finished_optimizer_steps(tmp_path):
    trainer_in(tmp_path, callbacks()).fit(SmallMethod())
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 6]


def test_a_row_is_on_disk_when_the_next_step_begins(tmp_path):
    import lightning as L

    class Look(L.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step:
                assert rows_of(tmp_path)[-1]["step"] == trainer.global_step

    trainer_in(tmp_path, [*callbacks(), Look()]).fit(SmallMethod())


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    first = trainer_in(tmp_path, callbacks(), max_steps=4)
    first.fit(SmallMethod())
    first.save_checkpoint(tmp_path / "at4.ckpt")
    trainer_in(tmp_path, callbacks(), max_steps=6).fit(
        SmallMethod(), ckpt_path=tmp_path / "at4.ckpt", weights_only=False
    )
    trainer_in(tmp_path, callbacks(), max_steps=8).fit(
        SmallMethod(), ckpt_path=tmp_path / "at4.ckpt", weights_only=False
    )
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["step"] for row in rows if "val/loss" in row] == [3, 6]


def test_a_tested_checkpoint_stands_at_its_own_step_and_leaves_the_curve_alone(tmp_path):
    trainer = trainer_in(tmp_path, callbacks())
    trainer.fit(SmallMethod())
    trainer.save_checkpoint(tmp_path / "at6.ckpt")
    before = rows_of(tmp_path)
    trainer_in(tmp_path, [StepAxis()]).test(SmallMethod(), ckpt_path=tmp_path / "at6.ckpt", weights_only=False)
    after = rows_of(tmp_path)
    assert after[:-1] == before
    assert after[-1]["step"] == 6 and "test/loss" in after[-1]
