"""Processes that cost no imports: forked from a server that has them, otherwise as `python` and `torchrun` start them.

Tests that kill processes, or that are about imports themselves, start an interpreter. So does Lightning's own launcher, in
`test_stored_pair.py` and `test_stored_teacher.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PRELOADED = ("lit_llm.training_cli", "lit_llm.methods", "datasets", "transformers.models.llama.modeling_llama")
_LIMIT = 300  # seconds


@dataclass(frozen=True)
class Finished:
    """What processes have left.

    Attributes:
        returncode: -N: ended by signal N; of several, the largest in size.
        stdout: of all, one after the other.
        stderr: likewise.
    """

    returncode: int
    stdout: str
    stderr: str


def preload() -> None:
    """Say what the server imports; nothing starts yet. Loaders of data fork from the same server, so it must be early."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(_PRELOADED))


def run_python(*arguments: object, cwd: Path | None = None, environment: dict[str, str] | None = None) -> Finished:
    """`python ARGUMENTS`: `-m MODULE`, or a script.

    Args:
        cwd: current folder; None: this one.
        environment: added to that of this process.
    """
    return _run([([str(argument) for argument in arguments], environment or {})], cwd)


def fit_in_two_processes(config: Path, *options: str, strategy: str = "ddp") -> Finished:
    """`python -m lit_llm fit` with two processes."""
    command = ["-m", "lit_llm", "fit", "--config", config, *options]
    return in_two_processes(*command, "--trainer.devices=2", f"--trainer.strategy={strategy}")


def in_two_processes(*arguments: object) -> Finished:
    """`python ARGUMENTS` twice, as a launcher starts the processes of one job."""
    command = [str(argument) for argument in arguments]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": str(port)}
    both |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return _run([(command, {**both, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in (0, 1)], None)


def _run(commands: Sequence[tuple[list[str], dict[str, str]]], cwd: Path | None) -> Finished:
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        outputs = [(f"{folder}/{number}.out", f"{folder}/{number}.err") for number in range(len(commands))]
        processes = [
            context.Process(target=_python, args=(command, {**os.environ, **more}, str(cwd or Path.cwd()), files))
            for (command, more), files in zip(commands, outputs, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_LIMIT)
        for process in processes:
            process.kill()
            process.join()
        said = ("".join(Path(files[stream]).read_text() for files in outputs) for stream in (0, 1))
        return Finished(max((process.exitcode for process in processes), key=abs), *said)


def _python(command: list[str], environment: dict[str, str], folder: str, files: tuple[str, str]) -> None:
    """In the new process: what the interpreter does with its command line."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    if threads := environment.get("OMP_NUM_THREADS"):
        import torch

        torch.set_num_threads(int(threads))
    try:
        if command[0] == "-m":
            sys.argv, sys.path[0] = command[1:], folder
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = command, str(Path(command[0]).resolve().parent)
            runpy.run_path(command[0], run_name="__main__")
    except Exception:  # as the interpreter would say it, and not multiprocessing
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
