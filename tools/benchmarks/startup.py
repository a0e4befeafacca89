"""How long a command takes until it can do something, by wall clock, warm disk, in turns."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python -m lit_llm --help": ["-m", "lit_llm", "--help"],
    "python -m lit_llm fit --help": ["-m", "lit_llm", "fit", "--help"],
    "import torch": ["-c", "import torch"],
    "import lightning, transformers.Trainer": ["-c", "import lightning; from transformers import Trainer"],
    "import TRL's GKDTrainer": ["-c", "from trl.experimental.gkd import GKDTrainer"],
}


def measure(given: argparse.Namespace) -> list[dict]:
    """Rows of the suite: median and best seconds of each command."""
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    skipped = {name for name in COMMANDS if "TRL" in name and importlib.util.find_spec("trl") is None}
    for turn in range(1 + given.steps):
        for name, arguments in COMMANDS.items():
            if name in skipped:
                continue
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    rows = [
        {"command": name, "median s": statistics.median(found), "best s": min(found)}
        for name, found in seconds.items()
        if found
    ]
    return rows + [{"command": name, "note": "skipped: pip install trl"} for name in sorted(skipped)]
