"""Processes that are started, watched and killed: each is forked from this one, which has imported everything already.

A start then costs a fraction of a second, and all that a run does is still done by a process of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_HUNG = 300.0  # seconds


@dataclass(frozen=True)
class Ended:
    """How a process has ended.

    Attributes:
        status: its exit status; of one that a signal has ended, the signal's number below zero.
        seconds: that it has run.
        said: on stdout and stderr.
    """

    status: int
    seconds: float
    said: str

    @property
    def killed(self) -> bool:
        return self.status == -signal.SIGKILL

    def message(self) -> str:
        """The one message of a refused call.

        Raises:
            AssertionError: there is another number of them, or a traceback.
        """
        begins = [match.start() for match in re.finditer(r"(?m)^lit_llm( \w+)?: ", self.said)]
        if len(begins) != 1 or "Traceback" in self.said:
            raise AssertionError(f"{len(begins)} messages, status {self.status}: {self.said[-2000:]}")
        return self.said[begins[0] :]


class Process:
    """A process that runs `work` and ends; what it says goes to a file.

    Args:
        work: its exit status is that of a SystemExit, 0 when it returns, 1 for anything else.
        log: the file.
        environment: added to it.
    """

    def __init__(self, work: Callable[[], object], log: Path, environment: dict[str, str] | None = None) -> None:
        self.log, self._began = log, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run(work, log, environment or {})

    @property
    def seconds(self) -> float:
        """That it has run."""
        return time.monotonic() - self._began

    @property
    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def end(self, after: float | None = None, number: int = signal.SIGKILL, most: float = _HUNG) -> Ended:
        """Wait for the end; send a signal `after` so many seconds, unless it has ended before.

        Args:
            after: seconds; None: send none.
            number: of the signal.
            most: seconds, beyond `after`, until it counts as hung.

        Raises:
            AssertionError: it hangs, and was killed.
        """
        sent = after is None
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            seconds = self.seconds
            if pid:
                return Ended(os.waitstatus_to_exitcode(status), seconds, self.log.read_text(errors="replace"))
            if not sent and seconds >= after:
                os.kill(self.pid, number)
                sent = True
            if seconds > most + (after or 0):
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"hung for {most:.0f} s: {self.log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.002)


def lit_llm(*arguments: object) -> Callable[[], None]:
    """The command line with these arguments, as work of a process."""
    from lit_llm.cli import main

    return lambda: main([str(argument) for argument in arguments])


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[str], None]]:
    """A disk of this size at `folder`; gives a function that mounts it anew with other options (`ro`, `size=4096k`).

    Raises:
        OSError: nothing may be mounted here; it takes root on Linux.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def mount(options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise OSError(f"mount {options} {folder}: {done.stderr.strip()}")

    if shutil.which("mount") is None:
        raise OSError("there is no program mount")
    mount(f"size={kilobytes}k")
    try:
        yield lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _run(work: Callable[[], object], log: Path, environment: dict[str, str]) -> None:
    """In the new process; does not return."""
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.environ.update(environment)
        try:
            work()
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
