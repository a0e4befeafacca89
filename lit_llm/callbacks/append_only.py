"""Text files that grow by whole lines and survive a process that is killed while writing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lit_llm.storage import write_atomically, writing


def append_lines(path: Path, text: str) -> None:
    """Append lines in one write. An unfinished line that a killed process left behind is cut off first.

    Args:
        path: the file; it is created where it does not exist.
        text: whole lines, the last one with its line end.

    Raises:
        CannotWrite: the disk did not take them all.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b", buffering=0) as file:
            end = file.seek(0, 2)
            if end and not _ends_a_line(file, end):
                file.truncate(_end_of_last_whole_line(path))
            left = memoryview(text.encode())
            while left:  # the last bytes of a full disk are taken without an error
                left = left[file.write(left) :]


def whole_lines(path: Path) -> list[str]:
    """The lines of a file without line ends; an unfinished last one is left out. A missing file has none."""
    if not path.exists():
        return []
    return path.read_bytes().decode(errors="replace").split("\n")[:-1]


def keep_lines(path: Path, keep: Callable[[str], bool]) -> int:
    """Drop the lines that `keep` refuses; the file is replaced at once or left alone.

    Returns:
        How many lines were dropped.
    """
    lines = whole_lines(path)
    kept = [line for line in lines if keep(line)]
    if len(kept) < len(lines):
        write_atomically(path, "".join(line + "\n" for line in kept))
    return len(lines) - len(kept)


def _ends_a_line(file, end: int) -> bool:
    file.seek(end - 1)
    return file.read(1) == b"\n"


def _end_of_last_whole_line(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1
