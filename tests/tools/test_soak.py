"""The verdict over a long run's memory."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

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
    memory = np.where(steps <= 200, 300.0, 500.0) + np.sin(steps)
    assert verdict(np.stack([steps, memory], axis=1), 2000)["verdict"] == "flat"
