"""Runs of a row are summed up as mean and deviation; what cannot be compared is refused."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.processes import Finished, run_python

ROOT = Path(__file__).resolve().parents[2]


def compare(*arguments: str) -> Finished:
    return run_python(ROOT / "tools" / "compare_runs.py", *arguments, cwd=ROOT)


@pytest.fixture
def runs(tmp_path):
    for name, values in {"kd_0": [9.0, 4.0], "kd_1": [9.0, 4.2], "sft_0": [9.0, 5.0]}.items():
        for version, last in ((0, 99.0), (10, values[1]), (9, 77.0)):
            folder = tmp_path / name / f"version_{version}"
            folder.mkdir(parents=True)
            (folder / "metrics.csv").write_text(f"step,val/loss\n0,{values[0]}\n10,{last}\n")
    return tmp_path


def test_the_newest_version_of_every_seed_is_read(runs):
    done = compare(f"KD={runs}/kd_*", f"SFT={runs}/sft_*", "--metrics", "val/loss")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:] == ["| KD | 2 | 4.10 ± 0.14 |", "| SFT | 1 | 5.00 |"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["KD={}/kd_*"], "has no value of 'val/accuracy'. It has: val/loss"),
        (["KD={}/nothing_*"], "No run folder fits"),
        (["{}/kd_*"], "is not LABEL=PATTERN"),
    ],
)
def test_what_is_missing_is_named(runs, arguments, said):
    done = compare(*(argument.format(runs) for argument in arguments))
    assert done.returncode == 1 and said in done.stderr


def test_runs_of_different_lengths_are_not_compared_by_accident(runs):
    (runs / "kd_1" / "version_10" / "metrics.csv").write_text("step,val/loss\n0,9\n20,4\n")
    refused = compare(f"KD={runs}/kd_*", "--metrics", "val/loss")
    assert refused.returncode == 1 and "ended at step 10" in refused.stderr and "at step 20" in refused.stderr
    assert compare(f"KD={runs}/kd_*", "--metrics", "val/loss", "--any_length").returncode == 0


def test_a_figure_shows_the_mean_of_each_row_at_the_steps_that_all_its_runs_have(runs):
    (runs / "kd_1" / "version_10" / "metrics.csv").write_text("step,val/loss\n0,9\n5,6\n10,4.2\n")
    file = runs / "loss.svg"
    done = compare(f"KD={runs}/kd_*", f"SFT={runs}/sft_*", "--figure", "val/loss", str(file))
    assert done.returncode == 0, done.stderr
    svg = ElementTree.fromstring(file.read_text())
    said = [text.text for text in svg.iter("{http://www.w3.org/2000/svg}title")]
    assert said == ["KD, step 0: 9", "KD, step 10: 4.1", "SFT, step 0: 9", "SFT, step 10: 5"]


def test_a_figure_of_a_metric_that_nobody_logged_is_refused(runs):
    done = compare(f"KD={runs}/kd_*", "--figure", "val/reward", str(runs / "reward.svg"))
    assert done.returncode == 1 and "No step has 'val/reward'" in done.stderr and not (runs / "reward.svg").exists()
