"""Config files before they are parsed: what is wrong with one is told with its name."""

from __future__ import annotations

from pathlib import Path

import yaml


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
