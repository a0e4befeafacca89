"""Earlier stages of a run: other runs whose models it needs, done first, recognised when they are done already.

    stages:
      dpo: {config: [dpo.yaml]}
      reverse: {config: [dpo.yaml], set: {model.init_args.reverse: true}}
    model:
      init_args:
        dpo: {source: "stage:dpo"}      # its folder `model/`; "stage:dpo/adapters" are its adapters

A stage is a `fit` of its own, in `ROOT/NAME/stages/STAGE/HASH`, where HASH names all that its result depends on: its resolved
config, the content of the data files and weights that it names, and the version of lit_llm. Another config is another
folder, so nothing is overwritten. A stage that was killed goes on from its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

import lit_llm
from lit_llm.callbacks.stop_on_signal import STOPPING
from lit_llm.models.weights import content_digest
from lit_llm.storage import check_name, write_atomically

MACHINE = ("accelerator", "devices", "num_nodes", "strategy")  # say where a stage runs, not what comes out
PREFIX = "stage:"


@dataclass
class Stage:
    """A run that comes before this one.

    Args:
        config: its config files, beside the file that names the stage, or relative to the current folder.
        set: keys and values that override them, such as `model.init_args.reverse: true`; a value `stage:NAME` is the
            model of an earlier stage, `stage:NAME/adapters` its adapters.
    """

    config: list[str]
    set: dict[str, Any] = field(default_factory=dict)


class Stages:
    """The stages of one run, in order.

    Args:
        stages: by name.
        folder: `ROOT/NAME/stages`.
        files: config files of the run; those of stages are looked for beside them.
        resolve: from the options of `fit` to the resolved config as a dictionary.
        inherited: options of `fit` that every stage gets from the run: on which machine.
    """

    def __init__(
        self,
        stages: dict[str, Stage],
        folder: Path,
        files: list[Path],
        resolve: Callable[[list[str]], dict[str, Any]],
        inherited: dict[str, Any],
    ) -> None:
        self.stages, self.folder, self.files = stages, folder, files
        self.resolve, self.inherited = resolve, inherited

    def models(self, run_missing: bool) -> dict[str, str]:
        """What may stand behind `stage:` -> the folder that is meant.

        Args:
            run_missing: run what is not there yet; else it is an error.

        Raises:
            FileNotFoundError: a config file is missing, or a stage has not been run.
            ValueError: a stage that would come before itself, or a name that is a path.
            ChildProcessError: a stage failed.
        """
        models: dict[str, str] = {}
        for number, (name, stage) in enumerate(self.stages.items(), start=1):
            check_name("The name of a stage", name)
            options = self._options(name, stage, models)
            resolved = self.resolve(options)
            self._check_ends(name, self._files(name, stage, self.files), resolved, [_places(self.files)])
            folder = self.folder / name / fingerprint(resolved)[:12]
            title = f"Stage {name} ({number} of {len(self.stages)})"
            if (folder / "stage.json").is_file():
                rank_zero_info(f"{title}: done before, {folder}")
            elif run_missing:
                rank_zero_info(f"{title}: {folder}")
                self._run(title, folder, options)
            else:
                raise FileNotFoundError(
                    f"{title} has not been run with this config: there is no {folder / 'stage.json'}.\n  `fit` runs it."
                )
            models |= {name: str(folder / "model"), f"{name}/adapters": str(folder / "adapters")}
        return models

    def _options(self, name: str, stage: Stage, models: dict[str, str]) -> list[str]:
        options = []
        for file in self._files(name, stage, self.files):
            options += ["--config", str(file)]
        for key, value in {**self.inherited, **stage.set}.items():
            options.append(f"--{key}={_written(referred(value, models))}")
        return options

    @staticmethod
    def _files(name: str, stage: Stage, files: list[Path]) -> list[Path]:
        if not stage.config:
            raise ValueError(f"stages.{name}.config is empty. Name the config file of the stage.")
        return [_found(name, file, [*(place.parent for place in files), Path()]) for file in stage.config]

    def _check_ends(self, name: str, files: list[Path], resolved: dict[str, Any], above: list[set[Path]]) -> None:
        """A run whose stages lead back to it would start itself for ever."""
        if not resolved.get("stages"):
            return
        if _places(files) in above:
            raise ValueError(
                f"stages.{name}.config names {', '.join(map(str, files))}, whose own stages lead back to it. Name the config of "
                f"the stage alone, without `stages`."
            )
        for inner, stage in resolved["stages"].items():
            stage = stage if isinstance(stage, Stage) else Stage(config=stage["config"], set=stage.get("set") or {})
            below = self._files(inner, stage, files)
            options = [text for file in below for text in ("--config", str(file))]
            self._check_ends(inner, below, self.resolve(options), [*above, _places(files)])

    def _run(self, title: str, folder: Path, options: list[str]) -> None:
        place = {"root": folder.parent.parent, "name": folder.parent.name, "version": folder.name}
        command = [sys.executable, "-m", "lit_llm", "fit", *options]
        if (folder / "checkpoints" / "last.ckpt").exists():
            command += ["--ckpt_path", "last"]
        elif folder.exists():
            rmtree(folder)  # killed before its first checkpoint
        command += [f"--run.{name}={value}" for name, value in place.items()]
        status, asked = _status(command)
        if status != 0 and asked:
            raise SystemExit(128 + asked)
        if status != 0:
            raise ChildProcessError(
                f"{title} ended with status {status}; its messages are above, its folder is {folder}.\n"
                f"  The same command goes on from there. The stage alone: {' '.join(['python', *command[1:]])}"
            )
        write_atomically(folder / "stage.json", json.dumps({"command": command[1:]}, indent=2) + "\n")
        if asked:
            raise SystemExit(128 + asked)


def _status(command: list[str]) -> tuple[int, int]:
    """Run a command to its end: its status, and the signal, or 0, that asked this process to end and was passed on."""
    asked = []
    with subprocess.Popen(command) as process:

        def pass_on(number: int, frame: Any) -> None:
            asked.append(number)
            process.send_signal(number)

        ours = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, pass_on) for number in STOPPING} if ours else {}
        try:
            return process.wait(), asked[0] if asked else 0
        except BaseException:
            process.kill()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _found(name: str, file: str, folders: list[Path]) -> Path:
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    places = ", ".join(str(folder.resolve()) for folder in folders)
    raise FileNotFoundError(f"stages.{name}.config names {file!r}, which is in none of: {places}. Correct the name.")


def _places(files: list[Path]) -> set[Path]:
    return {file.resolve() for file in files}


def referred(value: Any, models: dict[str, str]) -> Any:
    """`stage:NAME` replaced by the folder of that stage's model or adapters, also within lists and dictionaries.

    Raises:
        ValueError: no earlier stage of that name.
    """
    if isinstance(value, dict):
        return {key: referred(item, models) for key, item in value.items()}
    if isinstance(value, list):
        return [referred(item, models) for item in value]
    if not isinstance(value, str) or not value.startswith(PREFIX):
        return value
    name = value.removeprefix(PREFIX)
    if name not in models:
        known = ", ".join(models) or "none"
        raise ValueError(f"{value!r} names no earlier stage; there are: {known}. Add it under `stages`.")
    return models[name]


def fingerprint(config: dict[str, Any]) -> str:
    """sha256 of what the result of a run with this resolved config depends on."""
    kept = {key: value for key, value in config.items() if key not in ("run", "config", "ckpt_path", "stages")}
    kept["trainer"] = {key: value for key, value in kept.get("trainer", {}).items() if key not in MACHINE}
    named = sorted({text for text in _texts(kept) if text})
    contents = {text: digest for text in named if (digest := content_digest(text)) is not None}
    parts = [lit_llm.__version__, kept, contents]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _written(value: Any) -> str:
    """As the command line reads it."""
    return value if isinstance(value, str) else json.dumps(value)
