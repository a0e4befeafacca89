"""Runs in two processes that cost no imports: forked from a server that has them, joined as `torchrun` joins its own.

Lightning's own launcher, which starts the second process from the command line of the first, is used by
`test_stored_pair.py` and `test_stored_teacher.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

_PRELOADED = [
    "datasets",
    "lit_llm.training_cli",
    "lit_llm.methods",
    "torchmetrics",
    "transformers.models.llama.modeling_llama",
]
_LIMIT = 300  # seconds


@dataclass(frozen=True)
class Finished:
    """What two processes have left.

    Attributes:
        returncode: the largest of theirs; -N: ended by signal N.
        stderr: of both, one after the other.
    """

    returncode: int
    stderr: str


def fit_in_two_processes(config: Path, *options: str) -> Finished:
    """`python -m lit_llm fit` under DDP with two processes."""
    command = ["fit", "--config", str(config), *options, "--trainer.devices=2", "--trainer.strategy=ddp"]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        files = [Path(folder) / f"{rank}.txt" for rank in (0, 1)]
        free.close()
        ranks = [
            context.Process(target=_run, args=(command, rank, port, dict(os.environ), os.getcwd(), str(file)))
            for rank, file in enumerate(files)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(_LIMIT)
        for rank in ranks:
            if rank.is_alive():
                rank.kill()
                rank.join()
        codes = [rank.exitcode for rank in ranks]
        return Finished(max(codes, key=abs), "\n".join(file.read_text() for file in files if file.exists()))


def _run(command: list[str], rank: int, port: int, environment: dict[str, str], folder: str, output: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_RUN_ID"] = f"test-{port}"
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)

    import torch

    from lit_llm.cli import main

    torch.set_num_threads(1)
    try:
        main(command)
    except Exception:  # as the interpreter would end, and not multiprocessing
        traceback.print_exc()
        sys.exit(1)
