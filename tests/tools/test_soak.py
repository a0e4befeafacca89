"""The verdict over a long run's memory."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import soak  # noqa: E402
from forked import Process  # noqa: E402
from soak import verdict  # noqa: E402


@pytest.mark.parametrize(
    ("per_step", "noise", "says"),
    [(0.0, 1.0, "flat"), (0.02, 1.0, "grows"), (0.001, 0.1, "flat"), (-0.02, 1.0, "flat")],
)
def test_memory_that_rises_by_more_than_noise_and_five_percent_is_said_to_grow(per_step, noise, says):
    steps = np.arange(100.0, 2001, 100)
    wobble = noise * np.random.default_rng(0).standard_normal(len(steps))
    found = verdict(np.stack([steps, 500 + per_step * steps + wobble], axis=1), 2000)
    assert found["verdict"] == says
    assert found["slope"] == pytest.approx(100 * per_step, abs=4 * found["error"])


def test_what_comes_in_the_first_tenth_is_not_growth():
    steps = np.arange(100.0, 2001, 100)
    memory = np.where(steps < 200, 300.0, 500.0) + np.sin(steps)
    found = verdict(np.stack([steps, memory], axis=1), 2000)
    assert found["verdict"] == "flat" and found["from"] == 200


def test_three_readings_are_the_fewest_that_are_judged(capsys, monkeypatch):
    steps = np.arange(100.0, soak.LEAST + 1, 100)
    found = verdict(np.stack([steps, 500 + np.sin(steps)], axis=1), soak.LEAST)
    assert np.isfinite(found["error"]) and found["from"] == 100
    monkeypatch.setattr(sys, "argv", ["soak.py", "kd", "--steps", str(soak.LEAST - 1)])
    with pytest.raises(SystemExit, match="2"):
        soak.main()
    assert "--steps is 299" in capsys.readouterr().err


def test_a_process_may_take_as_long_as_its_caller_says(tmp_path):
    with pytest.raises(AssertionError, match="hung for 0 s"):
        Process(lambda: time.sleep(60), tmp_path / "log").end(most=0.2)
    assert Process(lambda: time.sleep(0.4), tmp_path / "log").end(most=60.0).status == 0
