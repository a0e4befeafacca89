"""Does memory stay flat over a long run? Trains a tiny model, reads the resident memory every 100 steps, fits a line.

    python tools/soak.py kd dskd dpo --steps 2000

One line for each method: memory after the first tenth and at the end, slope of the line through everything from
there on, and a verdict: `grows` where the line rises by more than 5% of the memory over the run and by more than twice its
uncertainty. Status 1 where one grows. Methods: those of tests/tiny_runs.py, the two stages of LayerMoE (layer_moe_1, layer_moe_2)
and neuron_edit, whose step is one fact and whose edits stay.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

import lightning as L  # noqa: E402
import numpy as np  # noqa: E402
from forked import Process, lit_llm  # noqa: E402

from tests.tiny_edits import edit_config, write_facts  # noqa: E402
from tests.tiny_languages import language_config  # noqa: E402
from tests.tiny_runs import METHODS, tiny_config  # noqa: E402

ALL = (*METHODS, "layer_moe_1", "layer_moe_2", "neuron_edit")

EVERY = 100
LEAST = 3 * EVERY  # a line and its uncertainty take three points
LIMIT = 0.05
HUNG = 3600.0  # seconds


class ResidentMemory(L.Callback):
    """Appends "step MiB" to a file every few optimizer steps.

    Args:
        file: where to.
        every: steps.
    """

    def __init__(self, file: str, every: int = EVERY) -> None:
        self.file, self.every = Path(file), every

    def on_train_batch_end(self, trainer: L.Trainer, *_) -> None:
        if trainer.global_step % self.every == 0:
            with self.file.open("a") as file:
                file.write(f"{trainer.global_step} {resident()}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", choices=ALL, metavar="METHOD")
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    if options.steps < LEAST:
        parser.error(
            f"--steps is {options.steps}, but memory is read every {EVERY} steps and a line takes three readings. Take {LEAST} or more."
        )
    grows = False
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("LIT_LLM_CACHE", str(Path(scratch) / "cache"))
        for method in options.methods:
            found = soak(Path(scratch) / method, method, options.steps)
            grows |= found["verdict"] != "flat"
            print(
                f"{method}: {found['first']:.0f} MiB after {found['from']:.0f} steps, {found['last']:.0f} MiB after "
                f"{options.steps}; {found['slope']:+.3f} +- {found['error']:.3f} MiB per 100 steps: {found['verdict']}",
                flush=True,
            )
    sys.exit(int(grows))


def soak(place: Path, method: str, steps: int) -> dict:
    """Train, and judge the memory of the process."""
    file = place / "memory.txt"
    config = _config(place, method, steps)
    often = ["--trainer.limit_val_batches=2", f"--trainer.val_check_interval={steps // 10}"]
    options = [*often, "--trainer.callbacks+=soak.ResidentMemory", f"--trainer.callbacks.file={file}"]
    call = lit_llm("fit", f"--config={config}", *options, "--checkpoint.every_n_train_steps=100")
    _run(call, place)
    return verdict(np.loadtxt(file), steps)


def _config(place: Path, method: str, steps: int) -> Path:
    if method == "layer_moe_2":
        first = language_config(place / "first", 1, max_steps=2, val_check_interval=2)
        _run(lit_llm("fit", f"--config={first}"), place)
        (model,) = (place / "first" / "runs").rglob("model")
        return language_config(place, 2, source=model, max_steps=steps)
    if method == "layer_moe_1":
        return language_config(place, 1, max_steps=steps)
    if method == "neuron_edit":
        config = edit_config(place, data={"batch_size": 1}, crossed=None)
        write_facts(place / "facts.jsonl", steps)
        return config
    return tiny_config(place, method, max_steps=steps)


def _run(call, place: Path) -> None:
    end = Process(call, place / "log").end(most=HUNG)
    if end.status:
        raise RuntimeError(f"a run in {place} ended with {end.status}: {end.said[-2000:]}")


def verdict(samples: np.ndarray, steps: int) -> dict:
    """Of rows (step, MiB): a line through those from the end of the first tenth on."""
    settled = samples[samples[:, 0] >= steps // 10]
    (slope, _), covariance = np.polyfit(settled[:, 0], settled[:, 1], 1, cov=True)
    error, last = float(np.sqrt(covariance[0, 0])), settled[-1, 1]
    grows = slope > 2 * error and slope * steps > LIMIT * last
    first = settled[0, 1]
    return {
        "from": settled[0, 0],
        "first": first,
        "last": last,
        "slope": slope * 100,
        "error": error * 100,
        "verdict": "grows" if grows else "flat",
    }


def resident() -> float:
    """MiB of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
