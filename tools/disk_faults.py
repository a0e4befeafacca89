"""Full disks, read-only folders, damaged files, a process that dies beside another one, clocks and locales.

Each fault is a generator of results: {"during": what was done, "lost": what was lost}.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from forked import Ended, Process, lit_llm, small_disk
from kill_faults import NEWEST, Results, assert_same, kind_of, lost_steps, newest, undisturbed, weights_of
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
            folder = disk / "runs" / "kd" / "version_0"
            check_run(folder)
            lost = lost_steps(folder)
            assert lost <= 1, f"{lost} steps are lost; a checkpoint was due after each"
            yield {"during": "in the middle of training", "lost": f"{lost} steps"}


def damaged(place: Path, random: Random) -> Results:
    """A file that is cut off, or has a flipped byte, at any place: one message, which names it."""
    for good in place.rglob("*.good"):  # of a call that was interrupted
        good.replace(good.with_suffix(""))
    config = _config(place, max_steps=2)
    store = store_options(place)
    fit = ["fit", f"--config={config}", f"--run.root={place / 'runs'}", *store]
    checkpoint = place / "runs" / "kd" / "version_0" / NEWEST
    if not checkpoint.exists():
        shutil.rmtree(place / "runs", ignore_errors=True)
        end = Process(lit_llm(*fit), place / "log").end()
        assert end.status == 0, end.said[-2000:]
    weights, rows = place / "student" / "model.safetensors", place / "train.jsonl"
    again = [*fit, f"--ckpt_path={checkpoint}", "--trainer.max_steps=4"]
    anew = [*fit, "--trainer.max_steps=7"]
    for kind, how in _in_turn(place):
        shard = random.choice(sorted(place.glob("store/train/shard-*.safetensors")))
        file = {"checkpoint": checkpoint, "weights": weights, "row": rows, "shard": shard}[kind]
        version, call = ("again", again) if kind == "checkpoint" else ("anew", anew)
        shutil.rmtree(place / "runs" / "kd" / version, ignore_errors=True)
        good = file.rename(file.with_name(f"{file.name}.good"))
        try:
            file.write_bytes(_damage(good.read_bytes(), how, lines=kind == "row", random=random))
            end = Process(lit_llm(*call, f"--run.version={version}"), place / "log").end()
        finally:
            good.replace(file)
        if end.status == 0 and how == "flip":
            assert_same(weights_of(place / "runs" / "kd" / version), _unharmed(place, version, call))
            lost = "nothing: a byte that means nothing"
        else:
            lost = _refusal(end, kind, file)
        yield {"during": f"{kind}, {how}", "lost": lost}


def _in_turn(place: Path) -> Iterator[tuple[str, str]]:
    """Kinds of damage for ever, in another order each round; goes on after those that are noted."""
    kinds = [("checkpoint", "cut"), ("checkpoint", "flip"), ("weights", "cut"), ("row", "cut")]
    kinds += [("shard", "cut"), ("shard", "flip")]
    noted = place / "results.jsonl"
    done = len(noted.read_text().splitlines()) if noted.exists() else 0
    for number in itertools.count(done):
        turn, at = divmod(number, len(kinds))
        yield Random(turn).sample(kinds, len(kinds))[at]


def _damage(good: bytes, how: str, lines: bool, random: Random) -> bytes:
    """Cut a file off, or flip one bit of it, at any place; of lines, within one."""
    at = random.randrange(1, len(good) - 1)
    while lines and b"\n" in good[at - 1 : at + 1]:  # on both sides of a line's end all lines are whole
        at = random.randrange(1, len(good) - 1)
    return good[:at] if how == "cut" else good[:at] + bytes([good[at] ^ 1 << random.randrange(8)]) + good[at + 1 :]


def _unharmed(place: Path, version: str, call: list[str]) -> dict[str, torch.Tensor]:
    """Weights of the same call with nothing damaged."""
    folder = place / "runs" / "kd" / f"{version}-unharmed"
    shutil.rmtree(folder, ignore_errors=True)
    end = Process(lit_llm(*call, f"--run.version={folder.name}"), place / "log").end()
    assert end.status == 0, end.said[-2000:]
    return weights_of(folder)


def _refusal(end: Ended, kind: str, file: Path) -> str:
    message = end.message()
    named = file.name in message or (kind == "weights" and str(file.parent) in message)
    assert end.status == 1 and named, f"status {end.status}, {file.name} is not in: {message}"
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
