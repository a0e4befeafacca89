"""Full disks, read-only folders, damaged files, a process that dies beside another one, clocks and locales.

Each fault is a generator of results: {"during": what was done, "lost": what was lost}.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from random import Random

from forked import Ended, Process, lit_llm, small_disk
from kill_faults import NEWEST, Results, assert_same, kind_of, newest, undisturbed, weights_of
from whole_files import check_run

from lit_llm.checkpoint_io import read_checkpoint
from tests.tiny_runs import store_options, tiny_config

ROOT = Path(__file__).resolve().parents[1]


def full_disk(place: Path, random: Random) -> Results:
    """A disk that is full at any moment of a run with a teacher store; then there is room, and the run goes on."""
    config = _config(place, max_steps=8)
    store = store_options(place)
    whole, _ = undisturbed(place, ["fit", f"--config={config}", f"--run.root={place / 'undisturbed'}", *store])
    size = sum(file.stat().st_size for file in [*place.glob("undisturbed/**/*"), *place.glob("store/**/*")]) // 1024
    disk = place / "disk"
    options = [f"--run.root={disk / 'runs'}", *store_options(disk)]
    while True:
        kilobytes = random.randint(16, max(size, 32))
        with small_disk(disk, kilobytes) as remount:
            end = Process(lit_llm("fit", f"--config={config}", *options), place / "log").end()
            if end.status == 0:  # it was large enough
                continue
            message, folders = end.message(), list((disk / "runs").glob("kd/version_*"))
            assert str(disk) in message and "No space left on device" in message, message
            for folder in folders:
                check_run(folder)
            remount("size=256m")
            goes_on = any((folder / NEWEST).exists() for folder in folders)
            resumed = [*options, *(["--ckpt_path=last"] if goes_on else [])]
            end = Process(lit_llm("fit", f"--config={config}", *resumed), place / "log").end()
            assert end.status == 0, end.said[-2000:]
            assert_same(weights_of(newest(disk / "runs")), whole)
        yield {"during": _named(message, disk), "lost": "nothing"}


def read_only(place: Path, random: Random) -> Results:
    """A run folder that cannot be written to, from the start or from any moment on."""
    config, disk = _config(place, max_steps=200), place / "disk"
    options = ["fit", f"--config={config}", f"--run.root={disk / 'runs'}"]
    while True:
        with small_disk(disk, 64 * 1024) as remount:
            remount("ro")
            message = Process(lit_llm(*options), place / "log").end().message()
            assert "Read-only file system" in message and str(disk) in message, message
            yield {"during": "from the start", "lost": "nothing"}
            remount("rw")
            process = Process(lit_llm(*options), place / "log")
            _wait_for(disk / "runs" / "kd" / "version_0" / NEWEST)
            time.sleep(random.random())
            while (disk / "runs").exists() and not _remounted(remount):
                time.sleep(0.005)  # while a file is open for writing it is refused
            end = process.end()
            message = end.message()
            assert "Read-only file system" in message and str(disk) in message, message
            check_run(disk / "runs" / "kd" / "version_0")
            yield {"during": "in the middle of training", "lost": "0 steps"}


def damaged(place: Path, random: Random) -> Results:
    """A file that is cut off, or has a flipped byte, at any place: one message, which names it."""
    config = _config(place, max_steps=2)
    store = store_options(place)
    fit = ["fit", f"--config={config}", f"--run.root={place / 'runs'}", *store]
    if not (place / "runs").exists():
        end = Process(lit_llm(*fit), place / "log").end()
        assert end.status == 0, end.said[-2000:]
    checkpoint = place / "runs" / "kd" / "version_0" / NEWEST
    shards = sorted(place.glob("store/train/shard-*"))
    weights, rows = place / "student" / "model.safetensors", place / "train.jsonl"
    resume = [*fit, f"--ckpt_path={checkpoint}", "--run.version=again", "--trainer.max_steps=4"]
    anew = [*fit, "--run.version=anew", "--trainer.max_steps=7"]
    kinds = [("checkpoint", checkpoint, resume), ("weights", weights, anew), ("row", rows, anew)]
    while True:
        for kind, file, call in [*kinds, ("shard", random.choice(shards), anew)]:
            for how in ("cut", "flip") if kind in ("checkpoint", "shard") else ("cut",):
                for version in ("again", "anew"):
                    shutil.rmtree(place / "runs" / "kd" / version, ignore_errors=True)
                good = file.read_bytes()
                at = random.randrange(1, len(good) - 1)
                bad = (
                    good[:at]
                    if how == "cut"
                    else good[:at] + bytes([good[at] ^ 1 << random.randrange(8)]) + good[at + 1 :]
                )
                if kind == "row" and good[at - 1 : at] == b"\n":
                    continue  # all lines are whole
                file.write_bytes(bad)
                try:
                    end = Process(lit_llm(*call), place / "log").end()
                finally:
                    file.write_bytes(good)
                yield {"during": f"{kind}, {how}", "lost": _refusal(end, file, how)}


def _refusal(end: Ended, file: Path, how: str) -> str:
    if end.status == 0 and how == "flip":
        return "nothing: a byte that means nothing"
    message = end.message()
    named = file.name in message or (file.suffix == ".safetensors" and file.parent.name in message)
    assert named, f"{file.name} is not in: {message}"
    return "refused"


def lost_process(place: Path, random: Random) -> Results:
    """One of two processes is killed at any moment: the other one ends with a message."""
    config = _config(place, max_steps=2000)
    while True:
        shutil.rmtree(place / "runs", ignore_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        call = ["fit", f"--config={config}", f"--run.root={place / 'runs'}", "--run.version=two", *TWO]
        both = []
        for rank in range(2):
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
            where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "fault"}
            environment = {name: str(value) for name, value in where.items()}
            both.append(Process(lit_llm(*call), place / f"log{rank}", environment))
        last = place / "runs" / "kd" / "two" / NEWEST
        _wait_for(last)
        time.sleep(2 * random.random())
        victim = random.randrange(2)
        frozen = random.random() < 0.5  # it is there, and does nothing any more
        os.kill(both[victim].pid, signal.SIGSTOP if frozen else signal.SIGKILL)
        began = time.monotonic()
        end = both[1 - victim].end()
        seconds = time.monotonic() - began
        both[victim].end(after=0.0)
        assert end.status == 1 and "Another process" in end.message(), end.said[-2000:]
        read_checkpoint(last, verify=True)
        how = "stopped" if frozen else "killed"
        yield {
            "during": f"process {victim} of 2 {how}",
            "lost": f"the other ended within {10 * (int(seconds / 10) + 1)} s",
        }


TWO = (
    "--trainer.devices=2",
    '--trainer.strategy={"class_path":"DDPStrategy","init_args":{"process_group_backend":"gloo","timeout":"0:00:20"}}',
)


def clock(place: Path, random: Random) -> Results:
    """Files from a time when the clock was set back: what is newest is told by numbers, and by names."""
    config = _config(place, max_steps=4)
    fit = ["fit", f"--config={config}", f"--run.root={place / 'runs'}"]
    while True:
        shutil.rmtree(place / "runs", ignore_errors=True)
        for _ in range(2):
            end = Process(lit_llm(*fit), place / "log").end()
            assert end.status == 0, end.said[-2000:]
        newer = place / "runs" / "kd" / "version_1"
        for path in [newer, *newer.rglob("*")]:
            os.utime(path, (10**9, 10**9))  # 2001
        end = Process(lit_llm(*fit, "--ckpt_path=last", "--trainer.max_steps=6"), place / "log").end()
        assert end.status == 0, end.said[-2000:]
        steps = [read_checkpoint(newer.with_name(name) / NEWEST)["global_step"] for name in ("version_0", "version_1")]
        assert steps == [4, 6], steps
        yield {"during": "files of the newer run dated 2001", "lost": "nothing"}


def locale(place: Path, random: Random) -> Results:
    """LC_ALL=C without UTF-8 mode, text and folders that are not ASCII; a whole start of Python."""
    folder = place / "Übung 你好"
    config = _config(folder, max_steps=2)
    rows = [
        {"prompt": f"Wie heißt die Stadt {n}?", "response": f"Es ist 北京 Nummer {n}, naïve 🙂."} for n in range(24)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text, encoding="utf-8")
    while True:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
        call = [sys.executable, "-m", "lit_llm", "fit", "--config", str(config)]
        done = subprocess.run(call, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode(errors="replace")[-2000:]
        check_run(folder / "runs" / "kd" / "version_0")
        yield {"during": "fit", "lost": "nothing"}


def _config(place: Path, max_steps: int) -> Path:
    config = place / "kd.yaml"
    return config if config.exists() else tiny_config(place, "kd", max_steps=max_steps)


def _named(message: str, disk: Path) -> str:
    """What could not be written."""
    file = Path(message.partition(": ")[2].partition(" could not be written")[0])
    name = str(file.relative_to(disk)) if file.is_absolute() and file.is_relative_to(disk) else file.name
    return kind_of(Path(name).name)


def _wait_for(file: Path, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end, f"{file} has not come in {seconds:.0f} s"
        time.sleep(0.02)


def _remounted(remount) -> bool:
    try:
        remount("ro")
    except OSError:
        return False
    return True
