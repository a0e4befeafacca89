"""The line that tells how a run is going."""

import io
import re

import pytest

from lit_llm.callbacks.progress import Progress
from lit_llm.callbacks.throughput import Throughput
from lit_llm.callbacks.validate_at_start import ValidateAtStart
from tests.callbacks.small import SmallMethod, trainer_in


class Terminal(io.StringIO):
    """Somebody is looking."""

    def isatty(self):
        return True


@pytest.fixture
def said(monkeypatch):
    """Lines that rank zero says."""
    lines = []
    monkeypatch.setattr("lit_llm.callbacks.progress.rank_zero_info", lines.append)
    return lines


def shown(folder, progress, **settings):
    trainer_in(folder, [Throughput(), progress, ValidateAtStart()], enable_progress_bar=True, **settings).fit(
        SmallMethod()
    )


def test_away_from_a_terminal_there_is_a_plain_line_every_n_steps(tmp_path, said, capfd):
    shown(tmp_path, Progress(every_n_steps=4), max_steps=10, val_check_interval=5)
    steps = [line.split(":")[0] for line in said if "validation" not in line]
    assert steps == ["step 1/10", "step 4/10", "step 8/10", "step 10/10"]
    assert "\r" not in capfd.readouterr().out


def test_a_line_holds_losses_without_prefix_speed_and_time_left(tmp_path, said):
    shown(tmp_path, Progress(every_n_steps=3))
    line = next(line for line in said if line.startswith("step 3/6:"))
    assert re.fullmatch(r"step 3/6: \d+:\d\d left, [\d,]+ tokens/s, loss [\d.]+, ce [\d.]+", line)


def test_validation_results_have_their_own_line(tmp_path, said):
    shown(tmp_path, Progress(every_n_steps=100))
    lines = [line for line in said if "validation" in line]
    assert [line.split(",")[0] for line in lines] == ["step 0", "step 3", "step 6"]
    assert all("loss " in line and "val/" not in line for line in lines)


def test_a_long_run_gets_about_fifty_lines(tmp_path, said):
    shown(tmp_path, Progress(), max_steps=300, val_check_interval=1000)
    assert 50 <= len(said) <= 53


def test_on_a_terminal_the_bar_runs_over_all_steps(tmp_path, said, monkeypatch):
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    shown(tmp_path, Progress())
    text = terminal.getvalue()
    assert "6/6, 0:00 left" in text and "loss " in text and "tokens/s" in text
    assert "train/" not in text and "v_num" not in text
    assert "step 3, validation: loss " in text
    assert not said


def test_terms_are_chosen_and_ordered_by_the_user(tmp_path, said):
    shown(tmp_path, Progress(terms=("ce", "absent"), every_n_steps=6))
    line = next(line for line in said if line.startswith("step 6/6"))
    assert re.search(r"tokens/s, ce [\d.]+$", line) and "loss" not in line


def test_zero_steps_between_lines_are_refused():
    with pytest.raises(ValueError, match="every_n_steps"):
        Progress(every_n_steps=0)


def test_it_can_be_switched_off_on_a_terminal(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdout", terminal := Terminal())
    progress = Progress()
    progress.disable()
    shown(tmp_path, progress)
    assert "loss" not in terminal.getvalue()
