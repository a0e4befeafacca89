"""Faults, a few times each, by the tool that provokes them; more of them: docs/reliability.md."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from disk_faults import _damage, _in_turn  # noqa: E402
from forked import Ended  # noqa: E402
from kill_faults import _after  # noqa: E402

FAULTS = ("kill-training", "terminate-training", "kill-store", "kill-export", "kill-edits", "damaged", "clock")


@pytest.fixture(scope="module")
def done(once, tmp_path_factory) -> SimpleNamespace:
    """Status, stdout and stderr of the tool; one start of Python serves all faults."""
    return SimpleNamespace(**once("faults", lambda: provoked(tmp_path_factory.mktemp("faults"))))


def provoked(work: Path) -> dict:
    command = [sys.executable, str(ROOT / "tools" / "provoke_faults.py"), *FAULTS, "--count", "2", "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=900)
    return {name: getattr(done, name) for name in ("returncode", "stdout", "stderr")}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_half_written_and_no_more_is_lost_than_promised(fault, done):
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.split(":")[0] in FAULTS)
    line = told.get(fault, f"HARM, no line: {done.stderr[-4000:]}")
    assert line.startswith("2 times") and "HARM" not in line, line


def test_the_tool_ends_well(done):
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_kinds_of_damage_take_turns_and_go_on_where_they_were(tmp_path):
    first = list(itertools.islice(_in_turn(tmp_path), 12))
    assert len(set(first[:6])) == len(set(first[6:])) == 6
    (tmp_path / "results.jsonl").write_text("{}\n" * 5)
    assert list(itertools.islice(_in_turn(tmp_path), 7)) == first[5:]


@pytest.mark.parametrize("seed", range(40))
def test_a_cut_among_lines_leaves_one_that_is_not_whole(seed):
    good = b'{"a": 1}\n{"b": 2}\n'
    cut = _damage(good, "cut", lines=True, random=Random(seed))
    assert good.startswith(cut) and cut.splitlines()[-1] not in good.splitlines()
    flipped = _damage(good, "flip", lines=False, random=Random(seed))
    assert sum(bin(a ^ b).count("1") for a, b in zip(good, flipped, strict=True)) == 1


def test_a_run_that_is_stopped_without_a_checkpoint_has_not_begun(tmp_path):
    (tmp_path / "kd" / "version_0").mkdir(parents=True)
    assert _after(tmp_path, Ended(143, 1.0, ""), 15)["during"] == "before the first step"
