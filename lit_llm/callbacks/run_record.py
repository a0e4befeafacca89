"""What a run was made with: environment.json, and the resolved config as text in TensorBoard."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_llm.storage import write_atomically

_PACKAGES = ("lit-llm", "torch", "lightning", "transformers", "peft", "datasets", "tokenizers", "deepspeed")


class RunRecord(L.Callback):
    """Keeps environment.json: {"starts": [...]}, one entry for each process that worked in this run folder.

    An entry holds the stage (`fit`, `validate`, `test`), the step at which it began, the command to reproduce it, time,
    machine, versions, git commit and the sizes of the models. When the process ends, `ended` is added, with `status`
    (`finished`, `interrupted` or `failed`), seconds and, for a failure, the error's first line. An entry without it
    belongs to a process that is still running or was killed.

    Reads of the method: `student`, `teacher` (may be None) and `teacher_words` (its role, for people),
    `teacher_tokenizer` (None: the student's) and `run_folder`.
    """

    def __init__(self) -> None:
        self._path: Path | None = None
        self._entry: dict[str, Any] = {}
        self._began = 0.0
        self._loaded_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._path = pl_module.run_folder / "environment.json"  # on every rank: finding the folder may communicate
        self._entry = {}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded_step = checkpoint["global_step"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module, "fit")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module, "test")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._start(trainer, pl_module, "validate")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end("finished")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end("finished")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._end("finished")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, (KeyboardInterrupt, SIGTERMException)):
            self._end("interrupted")
            return
        first_line = (str(exception).splitlines() or [""])[0]
        with suppress(OSError):  # where nothing can be written, what stopped the run is to be told, not this
            self._end("failed", error=f"{type(exception).__name__}: {first_line}")

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._began = time.monotonic()
        if not trainer.is_global_zero:
            return
        self._entry = {
            "stage": stage,
            "step": max(trainer.global_step, self._loaded_step),
            "command": command_line(sys.argv),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **environment(pl_module.device),
            "processes": trainer.world_size,
            "precision": str(trainer.precision),
            "models": _models(pl_module),
        }
        self._write([*_starts(self._path), self._entry])
        _log_config(trainer, self._path.with_name("config.yaml"))

    def _end(self, status: str, error: str | None = None) -> None:
        if not self._entry:
            return
        earlier = [entry for entry in _starts(self._path) if entry != self._entry]
        ended = {"status": status, "seconds": round(time.monotonic() - self._began, 1)}
        self._entry["ended"] = ended | ({"error": error} if error else {})
        self._write([*earlier, self._entry])
        self._entry = {}

    def _write(self, starts: list[dict[str, Any]]) -> None:
        write_atomically(self._path, json.dumps({"starts": starts}, indent=2) + "\n")


def command_line(argv: list[str]) -> str:
    """The command that starts this process again, quoted for a shell.

    Args:
        argv: as `sys.argv`; what does not come from a script of the user's came from `python -m lit_llm`.
    """
    program, *arguments = argv
    script = Path(program)
    ours = script.suffix != ".py" or script.name == "__main__.py"
    return shlex.join(["python", *(["-m", "lit_llm"] if ours else [program]), *arguments])


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions and git commit."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "devices": _device_names(device),
        "packages": _versions(),
        "git": git_commit(Path(__file__).parents[2]),
    }


def git_commit(folder: Path) -> str | None:
    """The commit of a checkout, with `-dirty` where tracked files differ; None outside a checkout or without git."""
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (FileNotFoundError, subprocess.CalledProcessError):  # no git program, or a repository without a commit
        return None


def _git(folder: Path, *arguments: str) -> str:
    answer = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, encoding="utf-8", check=True)
    return answer.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an optional one
            continue
    return found | {"torch": torch.__version__}  # with its build, such as +cu130


def _device_names(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [platform.processor() or platform.machine()]


def _models(pl_module: L.LightningModule) -> dict[str, Any]:
    sizes = {}
    for name, model in {"student": pl_module.student, "teacher": pl_module.teacher}.items():
        if model is not None:
            # of a teacher whose hidden states are on disk only the head is here
            known = getattr(model, "num_parameters", None)
            sizes[name] = {"parameters": known or sum(parameter.numel() for parameter in model.parameters())}
    if "teacher" in sizes:
        sizes["teacher"]["role"] = pl_module.teacher_words
    sizes["one_tokenizer"] = pl_module.teacher_tokenizer is None
    return sizes


def _starts(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["starts"] if path.exists() else []


def _log_config(trainer: L.Trainer, path: Path) -> None:
    if not path.exists():
        return
    text = "\n".join(f"    {line}" for line in path.read_text(encoding="utf-8").splitlines())
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("config", text, trainer.global_step)
