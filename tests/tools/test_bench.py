"""The bench runs its contenders in processes of their own, compares their numbers, and voids those that are wrong."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from tests.processes import Finished, run_python

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))


def bench(*arguments: str) -> Finished:
    return run_python(ROOT / "tools" / "bench.py", *arguments, cwd=ROOT)


STEP = ["lit_llm", "lit_llm store", "plain PyTorch"]
LOSS = ["lit_llm loss", "plain loss, answers only", "plain loss"]


@pytest.mark.parametrize(("suite", "names"), [("kd", STEP), ("dskd", STEP), ("aligndistil", STEP + LOSS)])
def test_ours_and_plain_pytorch_agree_and_the_others_say_what_they_need(suite, names, tmp_path):
    out = tmp_path / "rows.jsonl"
    done = bench(
        *(suite, "--setting", "tiny", "--steps", "2", "--warmup", "1", "--threads", "1", "--out", str(out)),
        *("--only", *names),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["contender"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert set(rows) == set(names)
    for row in rows.values():
        assert row["loss gap"] < 1e-5 and row["gradient gap"] < 1e-4 and row["tokens/s"] > 0 and "void" not in row
    assert all(row["our speed-up"] == 1 for name, row in rows.items() if name in ("lit_llm", "lit_llm loss"))


def test_a_contender_that_computes_something_else_is_void():
    import bench as module

    rows = [
        {"contender": "lit_llm", "loss": 1.0, "gradient norm": 2.0, "tokens/s": 5.0, "median s/step": 1.0},
        {"contender": "plain PyTorch", "loss": 1.0, "gradient norm": 2.0, "tokens/s": 5.0, "median s/step": 2.0},
        {"contender": "wrong loss", "loss": 1.0001, "gradient norm": 2.0, "tokens/s": 9.0, "median s/step": 0.1},
        {"contender": "wrong gradient", "loss": 1.0, "gradient norm": 2.001, "tokens/s": 9.0, "median s/step": 0.1},
    ]
    rows = [{**row, "best s/step": row["median s/step"], "extra MB": 1.0} for row in rows]
    module._judge(rows, {row["contender"]: "kl" for row in rows})
    assert [row.get("void") for row in rows] == [None, None, "void", "void"]
    assert rows[2]["tokens/s"] is None and rows[1]["our speed-up"] == 2.0


def test_similarity_is_streamed_faster_than_by_pairs_and_is_the_same(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = bench("similarity", "--setting", "tiny", "--steps", "2", "--threads", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["contender"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert set(rows) == {"lit_llm, streamed", "pairwise"}
    assert all(row["gap"] < 1e-6 and row["our speed-up"] > 0 for row in rows.values())
    assert rows["lit_llm, streamed"]["value"] == pytest.approx(rows["pairwise"]["value"], abs=1e-6)


def test_the_routed_layer_gives_what_the_released_loop_gives(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = bench("moe", "--setting", "tiny", "--steps", "2", "--threads", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["experts"] for row in rows} == {2, 5} and len(rows) == 8
    assert all(row["gap"] < 1e-5 for row in rows if row["contender"].startswith("lit_llm"))
    assert all(row["our speed-up"] > 0 and "void" not in row for row in rows)


def test_a_missing_checkout_is_said_by_row():
    done = bench(
        "dskd", "--setting", "tiny", "--steps", "1", "--warmup", "1", "--threads", "1", "--only", "DSKDv2 code"
    )
    assert done.returncode == 0 and "skipped: --dskdv2 CHECKOUT" in done.stdout


def test_a_bench_without_a_step_that_measures_memory_is_refused():
    done = bench("dskd", "--setting", "tiny", "--steps", "1", "--warmup", "0", "--threads", "1")
    assert done.returncode != 0 and "--warmup is 0" in done.stderr


def test_facts_edited_together_get_the_values_that_they_get_alone(tmp_path):
    out = tmp_path / "rows.jsonl"
    done = bench("editing", "--setting", "tiny", "--steps", "1", "--threads", "1", "--out", str(out))
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ways = ("together", "one by one", "one by one, each language", "one by one, whole passes")
    assert [row["contender"] for row in rows] == [f"{count} facts, {way}" for count in (1, 4) for way in ways]
    assert all(row["gap"] <= 1e-4 and row["s per fact"] > 0 for row in rows)


def test_a_folder_without_easyedit_is_refused_before_anything_is_measured(tmp_path):
    done = bench("editing", "--setting", "tiny", "--steps", "1", "--threads", "1", "--easyedit", str(tmp_path))
    assert done.returncode != 0 and done.stdout == "" and "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert f"--easyedit is {tmp_path}" in line and "rome_main.py is missing" in line and "zjunlp/EasyEdit" in line


def test_a_part_that_needs_easyedit_is_refused_without_it():
    done = bench("editing", "--setting", "tiny", "--only", "ROME")
    assert done.returncode != 0 and "ROME and MEMIT need --easyedit CHECKOUT" in done.stderr


def test_the_cpu_time_of_several_threads_is_refused():
    from benchmarks.editing import _clock

    with pytest.raises(SystemExit, match="--cpu-seconds with 2 threads on cpu"):
        _clock(argparse.Namespace(cpu_seconds=True, threads=2, device="cpu"))


@pytest.mark.parametrize("gap", [2e-3, float("nan")])
def test_edits_that_differ_are_void_and_show_no_speed(gap):
    from benchmarks.editing import _rows

    right, wrong = (_rows(8, {"ours": [1.0, 3.0, 1.0], "theirs": [4.0, 4.0, 4.0]}, g, 1e-3) for g in (1e-3, gap))
    assert [row["our speed-up"] for row in right] == [1.0, 4.0] and not any("void" in row for row in right)
    assert all(row["void"] == "void" and row["s per fact"] is None and row["our speed-up"] is None for row in wrong)
