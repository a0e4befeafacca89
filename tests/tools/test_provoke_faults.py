"""Faults, a few times each, by the tool that provokes them; more of them: docs/reliability.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAULTS = ("kill-training", "terminate-training", "kill-store", "kill-export", "kill-edits", "damaged", "clock")


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> dict[str, str]:
    """What the tool says, by fault; one start of Python serves them all."""
    work = tmp_path_factory.mktemp("faults")
    command = [sys.executable, str(ROOT / "tools" / "provoke_faults.py"), *FAULTS, "--count", "2", "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=900)
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if line.split(":")[0] in FAULTS)
    return {name: told.get(name, done.stdout + done.stderr) for name in FAULTS}


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_half_written_and_no_more_is_lost_than_promised(fault, lines):
    assert "2 times" in lines[fault] and "HARM" not in lines[fault], lines[fault]
