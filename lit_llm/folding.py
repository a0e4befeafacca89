"""Text without accents, case and widths, with a map back to the original characters."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

_CASED = ("Lu", "Ll", "Lt")


class Folded(NamedTuple):
    """A folded text.

    Attributes:
        text: folded.
        origin: index into the original of each of its characters, ascending.
    """

    text: str
    origin: list[int]


def fold(text: str) -> Folded:
    """NFKD without combining marks, casefolded: accents, case, widths and ligatures make no difference.

    Combining marks are characters of a nonzero combining class. Vowel signs (Devanagari, Bengali, Thai) have class 0 and
    stay: without them a word would be another one.
    """
    pieces = [
        "".join(c for c in unicodedata.normalize("NFKD", char) if not unicodedata.combining(c)).casefold()
        for char in text
    ]
    origin = [index for index, piece in enumerate(pieces) for _ in piece]
    return Folded("".join(pieces), origin)


def dotted(folded: str) -> str:
    """The dotless i of Turkish as i, for its capital is I; as long as before."""
    return folded.replace("ı", "i")


def begins_inside_word(text: str, start: int) -> bool:
    """Whether a word of a script with case, or a number, goes on at `start` that began before."""
    before = start - 1
    while before >= 0 and unicodedata.combining(text[before]):
        before -= 1
    if before < 0:
        return False
    here, there = unicodedata.category(text[start]), unicodedata.category(text[before])
    return (here in _CASED and there in (*_CASED, "Nd")) or (here == there == "Nd")


def end_with_marks(text: str, end: int) -> int:
    """`end` behind the combining marks of the last character, which folding removes."""
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return end
