"""A Markdown table of finished runs: the last value of each metric, mean and standard deviation over the runs of a row.

    python tools/compare_runs.py 'SFT=runs/sft_*' 'KD, forward KL=runs/kd_*' --metrics val/loss val/rouge_l
    python tools/compare_runs.py 'DPO=runs/dpo_*' 'AlignDistil=runs/align_*' --figure val/reward reward.svg

Each argument is LABEL=PATTERN; a pattern names run folders (`runs/NAME`, whose newest version is read, or
`runs/NAME/version_3`), one per seed. A figure shows a metric against optimizer steps, the mean over the runs of a row.
"""

from __future__ import annotations

import argparse
import glob
import statistics
import sys
from pathlib import Path

from lit_llm.callbacks.report_chart import Series, chart_file
from lit_llm.callbacks.report_data import RunData, read_run
from lit_llm.storage import write_atomically

METRICS = ["val/loss", "val/accuracy", "val/rouge_l"]
COLOURS = ["#1f62d0", "#b4540a", "#0b8468", "#a32b87", "#6f6200", "#6a55d8", "#c0392b", "#3f7f93"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="LABEL=PATTERN", help="run folders of one row")
    parser.add_argument("--metrics", nargs="+", default=METRICS, help="columns of metrics.csv")
    parser.add_argument("--any_length", action="store_true", help="allow runs of different numbers of steps")
    parser.add_argument("--figure", nargs=2, metavar=("METRIC", "FILE.svg"), help="draw this metric instead of a table")
    options = parser.parse_args()
    try:
        rows = dict(row_of(row) for row in options.rows)
        if options.figure:
            metric, file = options.figure
            write_atomically(Path(file), chart_file(f"{metric} against optimizer steps", curves(rows, metric)))
        else:
            print(table(rows, options.metrics, options.any_length))
    except (ValueError, OSError) as error:
        sys.exit(f"compare_runs: {error}")


def row_of(argument: str) -> tuple[str, list[RunData]]:
    """The label and the runs that an argument names.

    Raises:
        ValueError: no `=` in it.
        FileNotFoundError: no run folder fits the pattern.
    """
    label, found, pattern = argument.partition("=")
    if not found:
        raise ValueError(f"{argument!r} is not LABEL=PATTERN.")
    folders = [newest_version(Path(path)) for path in sorted(glob.glob(pattern))]
    if not folders:
        raise FileNotFoundError(f"No run folder fits {pattern!r} of the row {label!r}.")
    return label, [read_run(folder) for folder in folders]


def newest_version(folder: Path) -> Path:
    """The folder itself where it holds metrics, else its highest version_N."""
    versions = sorted(folder.glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    return versions[-1] if versions and not (folder / "metrics.csv").exists() else folder


def table(rows: dict[str, list[RunData]], metrics: list[str], any_length: bool = False) -> str:
    """Markdown, one line per row.

    Raises:
        ValueError: a run lacks a metric, or has another number of steps than the first run.
    """
    steps = {run.last_step: run.folder for runs in rows.values() for run in runs}
    if len(steps) > 1 and not any_length:
        (one, first), (other, second) = list(steps.items())[:2]
        raise ValueError(
            f"{first} ended at step {one}, {second} at step {other}. Unequal runs are compared with --any_length only."
        )
    lines = [["", "runs", *metrics], ["---"] * (len(metrics) + 2)]
    lines += [[label, str(len(runs)), *(cell(runs, metric) for metric in metrics)] for label, runs in rows.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def curves(rows: dict[str, list[RunData]], metric: str) -> list[Series]:
    """One curve per row, the mean over its runs at the steps that all of them have.

    Raises:
        ValueError: no such step, or more rows than colours.
    """
    if len(rows) > len(COLOURS):
        raise ValueError(f"{len(rows)} rows, but a figure has {len(COLOURS)} colours. Draw fewer.")
    found = []
    for (label, runs), colour in zip(rows.items(), COLOURS, strict=False):
        values = [dict(run.curve(metric)) for run in runs]
        shared = sorted(set.intersection(*(set(of_run) for of_run in values)))
        if not shared:
            raise ValueError(f"No step has {metric!r} in all runs of the row {label!r}.")
        points = [(step, statistics.fmean(of_run[step] for of_run in values)) for step in shared]
        found.append(Series(label, points, colour))
    return found


def cell(runs: list[RunData], metric: str) -> str:
    """Mean ± standard deviation of the runs' last values; the value alone where there is one run."""
    values = [last_value(run, metric) for run in runs]
    mean = statistics.fmean(values)
    digits = max(0, 3 - len(str(int(abs(mean)))))
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def last_value(run: RunData, metric: str) -> float:
    """Where the run ended.

    Raises:
        ValueError: the metric was not logged, or was never finite.
    """
    value = run.last(metric)
    if value is None:
        known = ", ".join(run.names) or "none: metrics.csv is missing"
        raise ValueError(f"{run.folder} has no value of {metric!r}. It has: {known}")
    return value


if __name__ == "__main__":
    main()
