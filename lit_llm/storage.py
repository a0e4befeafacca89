"""Where things are kept, and how a file or folder gets its final name only when it is complete."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import disk_usage, rmtree
from tempfile import TemporaryFile, mkdtemp

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


class CannotWrite(OSError):
    """The disk did not take something: it is full, read-only or broken."""


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
def writing(path: Path) -> Iterator[None]:
    """Tell a disk that is full, read-only or broken in one way, whatever library met it.

    Raises:
        CannotWrite: names `path` and what the disk said.
    """
    try:
        yield
    except Exception as error:
        reason = _of_the_disk(error)
        if reason is None:
            raise
        raise CannotWrite(
            f"{path} could not be written: {reason}{_room(path)}.\n  What had that name before is as it was. Make room, or "
            f"name another folder; a run goes on from its last checkpoint with --ckpt_path last."
        ) from error


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A scratch file that takes the name `path` when the block ends well, and vanishes when it does not.

    Raises:
        CannotWrite: the disk did not take it.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = _scratch_folder(path)  # libraries write beside the file that they are given: all of it is in here
    try:
        with writing(path):
            partial = scratch / path.name
            yield partial
            os.replace(partial, path)
    finally:
        rmtree(scratch, ignore_errors=True)


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A scratch folder that takes the name `path` when the block ends well, and vanishes when it does not.

    Whatever had that name is replaced. A kill at the moment of replacing leaves no folder of that name, never half of one.

    Raises:
        CannotWrite: the disk did not take it.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = _scratch_folder(path)
    try:
        with writing(path):
            scratch.chmod(0o755)
            yield scratch
            for file in scratch.rglob("*"):
                file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes files that only their owner may read
            replace_folder(scratch, path)
    finally:
        rmtree(scratch, ignore_errors=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Take away what killed processes had begun to write directly in a folder, under one name or any.

    For the process that is the only one to write there, before it does.
    """
    for partial in folder.glob(".*.partial" if name is None else f".{name}.*.partial"):
        _remove(partial)


def replace_folder(scratch: Path, path: Path) -> None:
    """Give a finished folder its name. Removing what had it takes many steps, so that gets another name first."""
    if not os.path.lexists(path):
        os.replace(scratch, path)
        return
    old = scratch.with_name(f"{scratch.name.removesuffix('.partial')}.old.partial")
    os.replace(path, old)
    try:
        os.replace(scratch, path)
    except OSError:
        os.replace(old, path)
        raise
    _remove(old)


def _scratch_folder(path: Path) -> Path:
    return Path(mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _of_the_disk(error: BaseException) -> str | None:
    """What the disk said, where it is behind an error."""
    seen = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _OF_THE_DISK:
            return os.strerror(seen.errno)
        seen = seen.__cause__ or seen.__context__
    text = str(error)
    if type(error).__name__ == "SafetensorError":  # of Rust, where the number stands in the text only
        number = re.search(r"(?:os error |code: )(\d+)", text)
        return os.strerror(int(number[1])) if number and int(number[1]) in _OF_THE_DISK else None
    if isinstance(error, RuntimeError) and ("PytorchStreamWriter" in text or "inline_container" in text):
        return "the disk did not take all of it"
    return None


def _room(path: Path) -> str:
    there = next((parent for parent in path.absolute().parents if parent.exists()), None)
    return "" if there is None else f" ({disk_usage(there).free / 2**20:,.1f} MiB are free there)"
