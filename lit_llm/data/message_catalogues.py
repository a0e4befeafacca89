"""Prose out of message catalogues (gettext's .po and .mo): whole sentences, joined into passages.

Most messages of a program are labels. What is kept are sentences: finished by punctuation, of some length, mostly letters,
translated by a person (no fuzzy entry), and free of placeholders, since what will stand there is not known. Entries with
plural forms are left out too, for the right form depends on a number.
"""

from __future__ import annotations

import html
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_PLACEHOLDER = re.compile(
    r"%\(\w+\)|(?<!\d)%[-+ #0]?[\d.]*[a-zA-Z]\b|\$\{?\w|\{[^{}]*\}|\{%"  # %(name)s, %s, $name, ${name}, {name}, {{ name }}, {% tag %}
)
_FINISHED = re.compile(r"[.!?…。！？।؟።։][\"'”’»)」』]*$")
_FEWEST_CHARACTERS, _FEWEST_LETTERS = 20, 0.7
_DENSE = re.compile(r"[\u1100-\u11ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f]")  # a few characters say much
_FIELD = re.compile(r'(msgctxt|msgid_plural|msgid|msgstr)(?:\[\d+\])?\s*(".*")$')
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


@dataclass(frozen=True)
class Message:
    """One translated message.

    Attributes:
        source: in the program's own language.
        translation: empty where there is none.
        place: the file of the program that it first comes from; empty where the catalogue does not say.
    """

    source: str
    translation: str
    place: str = ""


def read_po(text: str) -> list[Message]:
    """The messages of a .po file in its order, without header, fuzzy and obsolete ones, and those with plural forms."""
    messages: list[Message] = []
    fields: dict[str, str] = {}
    place, fuzzy, field = "", False, ""

    def finish() -> None:
        if fields.get("msgid") and "msgstr" in fields and "msgid_plural" not in fields and not fuzzy:
            messages.append(Message(fields["msgid"], fields["msgstr"], place))

    for line in map(str.strip, text.splitlines()):
        found = _FIELD.match(line)
        if "msgstr" in fields and (line.startswith("#") or (found and found[1] in ("msgctxt", "msgid"))):
            finish()
            fields, place, fuzzy = {}, "", False
        if line.startswith("#:") and not place:
            place = line[2:].strip().split(":")[0]
        elif line.startswith("#,"):
            fuzzy = "fuzzy" in line
        elif found:
            field = found[1]
            fields[field] = fields.get(field, "") + _unquoted(found[2])
        elif line.startswith('"') and field:
            fields[field] += _unquoted(line)
    finish()
    return messages


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[1]), text[1:-1])


def read_mo(content: bytes) -> list[Message]:
    """The messages of a .mo file, sorted by source as they are there, without header and those with plural forms.

    Raises:
        ValueError: not a .mo file.
    """
    magic = content[:4]
    if magic not in (b"\xde\x12\x04\x95", b"\x95\x04\x12\xde"):
        raise ValueError("not a .mo file: its first four bytes are not those of the format")
    order = "<" if magic == b"\xde\x12\x04\x95" else ">"
    number, sources, translations = struct.unpack_from(f"{order}3I", content, 8)
    messages = []
    for row in range(number):
        texts = []
        for table in (sources, translations):
            length, offset = struct.unpack_from(f"{order}2I", content, table + 8 * row)
            texts.append(content[offset : offset + length].decode())
        source = texts[0].rpartition("\x04")[2]  # a context may stand before it
        if source and "\x00" not in source:
            messages.append(Message(source, texts[1]))
    return messages


def sentences(text: str) -> str | None:
    """A message as prose, without markup and on one line; None where it is not some finished sentences."""
    plain = " ".join(html.unescape(_TAG.sub("", text)).split())
    if _PLACEHOLDER.search(plain) or not _FINISHED.search(plain):
        return None
    dense = len(_DENSE.findall(plain))
    letters = sum(
        character.isalpha() or character.isspace() or "\u0900" <= character <= "\u0e7f" for character in plain
    )
    if len(plain) + 2 * dense < _FEWEST_CHARACTERS or letters < _FEWEST_LETTERS * len(plain):
        return None
    return plain


def passages(texts: Iterable[tuple[str, str]], length: int = 600) -> list[str]:
    """Join sentences that follow each other.

    Args:
        texts: place and sentences, in order. Where the place changes, a passage ends if it has a third of the length.
        length: characters after which a passage ends.
    """
    made: list[str] = []
    current, here = "", None
    for place, text in texts:
        if current and (len(current) >= length or (place != here and len(current) >= length // 3)):
            made.append(current)
            current = ""
        current, here = f"{current} {text}".strip(), place
    return [*made, current] if current else made
