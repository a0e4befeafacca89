"""Config files before they are parsed, and what parsing lets pass: what is wrong is told with its name."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml
from jsonargparse import Namespace

_SECTIONS = {"model", "data", "trainer", "checkpoint", "run", "stages", "vars", "non_finite"}


def check_config_files(options: list[str]) -> None:
    """See that the files of all `--config` options are there and hold YAML mappings.

    Args:
        options: of a command, as given.

    Raises:
        ValueError: no such file, not text, not YAML (with the line), or no mapping.
    """
    for option, following in zip(options, [*options[1:], ""], strict=True):
        name, assigned, value = option.partition("=")
        if name in ("--config", "-c"):
            _check(value if assigned else following)


def _check(name: str) -> None:
    path = Path(name).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else f"is not there (looked in {Path.cwd()})"
        raise ValueError(f"--config {name} {what}. Name a YAML file, e.g. configs/dskd.yaml.")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {name} is no text in UTF-8 ({error}). Name a YAML file.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(
            f"--config {name} is no YAML{where}: {getattr(error, 'problem', None) or error}. Correct the file there or above."
        ) from error
    if not isinstance(found, dict | None):
        raise ValueError(
            f"--config {name} holds a {type(found).__name__}, no mapping. It needs keys such as model:, data: and trainer:."
        )
    for section in set(found or {}) & _SECTIONS:
        value = found[section]
        inner = value.get("init_args", {}) if isinstance(value, dict) else {}
        whole = isinstance(value, dict) or (isinstance(value, str) and section in ("model", "data", "trainer", "run"))
        path = value.get("class_path", "") if isinstance(value, dict) else ""
        if not isinstance(path, str):
            raise ValueError(
                f"--config {name}: `{section}.class_path` is {path!r}. Name a class, such as DSKD or Instructions."
            )
        for key, held in {section: {} if whole else value, f"{section}.init_args": inner}.items():
            if not isinstance(held, dict):
                raise ValueError(
                    f"--config {name}: `{key}` is {held!r}, but it holds settings. Write them below it, or leave it out."
                )


def check_nested(config: Any) -> None:
    """See that settings which hold settings are not null or a number, which the parser lets pass.

    Args:
        config: resolved, with `class_path` and `init_args` of `model` and `data`.

    Raises:
        ValueError: one is.
    """
    for section in ("model", "data"):
        held = config.get(section)
        if held is None or held.get("init_args") is None:
            raise ValueError(f"`{section}` is {held!r}. It needs class_path and init_args, as in configs/sft.yaml.")
        _check_fields(locate(held.class_path), held.init_args, f"{section}.init_args")


def _check_fields(kind: Any, settings: Any, where: str) -> None:
    try:
        hints = typing.get_type_hints(kind if dataclasses.is_dataclass(kind) else kind.__init__)
    except NameError:  # a class of the user's own, with types that only a type checker imports
        return
    for name, value in vars(settings).items():
        hint = hints.get(name)
        choices = typing.get_args(hint)
        if dataclasses.is_dataclass(hint) and not isinstance(value, (Namespace, dict)):
            raise ValueError(
                f"{where}.{name} is {value!r}, but it holds settings. Write them below it, or leave it out for the defaults."
            )
        if value is None and type(None) not in choices and isinstance(hint, type):
            raise ValueError(f"{where}.{name} is null, but it must be a {hint.__name__}. Leave it out for its default.")
        inner = next((part for part in (hint, *choices) if dataclasses.is_dataclass(part)), None)
        if isinstance(value, Namespace) and inner is not None:
            _check_fields(inner, value, f"{where}.{name}")
