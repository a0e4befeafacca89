"""Speed and memory of our steps beside those of others, as ratios from one run.

    python tools/bench.py dskd --setting A --dskdv2 CHECKOUT --kdflow CHECKOUT
    python tools/bench.py kd --setting B                  # TRL takes part where it is installed: pip install trl
    python tools/bench.py aligndistil --setting A
    python tools/bench.py moe --setting A             # B: 16,384 tokens and up to 64 experts, for a GPU: --device cuda
    python tools/bench.py similarity --steps 5
    python tools/bench.py editing --setting A --steps 3 --easyedit CHECKOUT
    python tools/bench.py startup
    python tools/bench.py data --tokenizers STUDENT TEACHER

Every contender lives in a process of its own; steps are taken in turns, so that a busy machine hurts all alike. A
contender whose loss differs from plain PyTorch's by more than 1e-5, or whose gradient norm by more than 1e-4 (relative),
is void: its row says so and shows no speed. A training step is forward and backward, without the optimizer.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

STEPPED = ("kd", "dskd", "aligndistil")
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.worker:
        from benchmarks.worker import serve

        serve(json.loads(given.worker))
        return 0
    if given.suite in STEPPED:
        if given.warmup < 1:
            raise SystemExit(
                f"bench: --warmup is {given.warmup}, but memory is measured in these steps. Give at least 1."
            )
        rows = stepped(given)
    else:
        rows = importlib.import_module(f"benchmarks.{given.suite}").measure(given)
    print("\n" + table(rows))
    if given.out:
        with open(given.out, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"suite": given.suite, **row}) + "\n" for row in rows)
    return 1 if any(row.get("void") for row in rows) else 0


def stepped(given: argparse.Namespace) -> list[dict]:
    """Rows of a suite of training steps, in the order of its contenders."""
    from benchmarks.workload import SETTINGS

    suite = importlib.import_module(f"benchmarks.{given.suite}").CONTENDERS
    folders = {"dskdv2": given.dskdv2, "kdflow": given.kdflow}
    workers, skipped = {}, {}
    for name, (_, _, needs) in suite.items():
        if given.only and name not in given.only:
            continue
        if needs == "trl" and importlib.util.find_spec("trl") is None:
            skipped[name] = "skipped: pip install trl"
        elif needs in folders and not folders[needs]:
            skipped[name] = f"skipped: --{needs} CHECKOUT"
        else:
            workers[name] = Worker(given, name, folders.get(needs))
    measured: dict[str, list[dict]] = {name: [] for name in workers}
    for turn in range(given.warmup + given.steps):
        for name, worker in workers.items():
            answer = worker.step("memory" if turn < given.warmup else "time")
            measured[name].append(answer | {"timed": turn >= given.warmup})
    for worker in workers.values():
        worker.stop()
    rows = [_row(name, steps, SETTINGS[given.setting].positions) for name, steps in measured.items()]
    _judge(rows, {name: gate for name, (_, gate, _) in suite.items()})
    return rows + [{"contender": name, "note": note} for name, note in skipped.items()]


class Worker:
    """A contender in its own process; see `benchmarks.worker`."""

    def __init__(self, given: argparse.Namespace, name: str, folder: str | None) -> None:
        task = {"suite": given.suite, "contender": name, "setting": given.setting, "folder": folder}
        task |= {"threads": given.threads, "device": given.device, "dtype": given.dtype}
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, given.suite, "--worker", json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def step(self, kind: str) -> dict:
        """One step that is timed, or whose memory is measured."""
        self.process.stdin.write(kind + "\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise RuntimeError(f"The process of {self.name!r} ended with status {self.process.wait()}; its error is above.")


def table(rows: list[dict]) -> str:
    """Rows as Markdown, with the columns that any of them has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_shown(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _row(name: str, steps: list[dict], positions: int) -> dict:
    seconds = [step["seconds"] for step in steps if step["timed"]]
    return {
        "contender": name,
        "tokens/s": positions / statistics.median(seconds),
        "best s/step": min(seconds),
        "median s/step": statistics.median(seconds),
        "extra MB": max(step["extra_bytes"] for step in steps) / 1e6,
        "loss": steps[-1]["loss"],
        "gradient norm": steps[-1]["gradient_norm"],
    }


def _judge(rows: list[dict], gates: dict[str, str]) -> None:
    """Compare every row with the reference of its gate (plain PyTorch, or the first), and with our speed."""
    for row in rows:
        peers = [other for other in rows if gates[other["contender"]] == gates[row["contender"]]]
        standard = next((other for other in peers if other["contender"] == "plain PyTorch"), peers[-1])
        ours = peers[0]
        loss_gap = abs(row["loss"] - standard["loss"]) / abs(standard["loss"])
        gradient_gap = abs(row["gradient norm"] - standard["gradient norm"]) / standard["gradient norm"]
        row["loss gap"], row["gradient gap"] = loss_gap, gradient_gap
        if loss_gap > LOSS_TOLERANCE or gradient_gap > GRADIENT_TOLERANCE:
            row["void"] = "void"
            row["tokens/s"] = row["best s/step"] = row["median s/step"] = None
        else:
            row["our speed-up"] = row["median s/step"] / ours["median s/step"] if ours["median s/step"] else None
            row["our share of memory"] = ours["extra MB"] / row["extra MB"]


def _shown(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=(*STEPPED, "moe", "similarity", "editing", "startup", "data"))
    parser.add_argument("--setting", default="A", help="sizes: A (32,000 tokens), B (151,936) or tiny")
    parser.add_argument("--steps", type=int, default=8, help="measured steps per contender")
    parser.add_argument("--warmup", type=int, default=2, help="steps before that, at least 1, which measure memory")
    parser.add_argument("--only", nargs="*", help="names of contenders; of the suite `editing`: values, ROME, MEMIT")
    parser.add_argument("--facts", nargs="*", type=int, help="numbers of facts, of the suite `editing`")
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="of the suite `editing`: not the time passed; for a busy machine"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--dskdv2", help="folder of a checkout of songmzhang/DSKDv2")
    parser.add_argument("--kdflow", help="folder of a checkout of songmzhang/KDFlow")
    parser.add_argument("--easyedit", help="folder of a checkout of zjunlp/EasyEdit, of the suite `editing`")
    parser.add_argument("--tokenizers", nargs=2, metavar=("STUDENT", "TEACHER"), help="of the suite `data`")
    parser.add_argument("--out", help="append the rows as JSON lines")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
