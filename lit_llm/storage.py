"""Where things are kept, and how a file or folder gets its final name only when it is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryFile, mkdtemp


def cache_folder() -> Path:
    """`$LIT_LLM_CACHE`, or the platform's user cache. Safe to delete: everything in it can be made again."""
    if folder := os.environ.get("LIT_LLM_CACHE"):
        return Path(folder)
    from platformdirs import user_cache_path

    return user_cache_path("lit_llm", appauthor=False)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that it exists whole or not at all."""
    with complete_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def check_name(what: str, name: str | None) -> None:
    """See that the name of a folder is one, and no path that leads elsewhere.

    Raises:
        ValueError: it is.
    """
    if name is not None and (name in ("", ".", "..") or set(name) & set("/\\\0")):
        raise ValueError(
            f"{what} is {name!r}, but it names one folder. Leave out slashes; where runs are kept is run.root."
        )


def check_inside(what: str, path: str | None) -> None:
    """See that a relative path stays in its folder.

    Raises:
        ValueError: it does not.
    """
    if path is not None and (Path(path).is_absolute() or ".." in Path(path).parts):
        raise ValueError(f"{what} is {path!r}, which leaves the run folder. Name a file within it.")


def check_writable(folder: Path, what: str) -> None:
    """See that a folder can be made and written to, and leave nothing behind.

    Raises:
        ValueError: it cannot.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with TemporaryFile(dir=there):
            return
    except OSError as error:
        raise ValueError(
            f"Nothing can be written to {folder}: {there} says {error.strerror or error}. Name another folder with {what}."
        ) from error


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A scratch file that takes the name `path` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that takes the name `path` when the block ends well, and vanishes when it does not.

    Whatever had that name is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    scratch.chmod(0o755)
    try:
        yield scratch
        for file in scratch.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes files that only their owner may read
        replace_folder(scratch, path)
    finally:
        rmtree(scratch, ignore_errors=True)


def replace_folder(scratch: Path, path: Path) -> None:
    """Give a finished folder the name `path`; a folder that had it is removed afterwards."""
    if not path.exists():
        os.replace(scratch, path)
        return
    old = Path(mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
    os.replace(path, old)
    os.replace(scratch, path)
    rmtree(old)
