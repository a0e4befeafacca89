"""Names that a text does not spell as they are, but nearly so: inflected, transcribed or misspelled."""

from __future__ import annotations

import unicodedata
from functools import lru_cache

from lit_llm.folding import fold

SIMILAR = 0.75  # 1 - Levenshtein distance / length of the longer
_SHORTEST = 6


class Windows:
    """Runs of words of one text, compared with names."""

    def __init__(self, text: str) -> None:
        self.text, self.words = text, _words(text)
        self._folded: dict[tuple[int, int], str] = {}

    def most_similar(self, name: str) -> tuple[int, int] | None:
        """The span of the window that is most similar to a folded name, if it is similar enough."""
        count = len(_words(name))
        best, best_key = None, (0.0, 0, 0)
        for size in range(max(count - 1, 1), count + 2):
            for first in range(len(self.words) - size + 1):
                span = self.words[first][0], self.words[first + size - 1][1]
                key = (similarity(self._window(span), name, at_least=SIMILAR), -span[0], span[1] - span[0])
                if key[0] >= SIMILAR and key > best_key:
                    best, best_key = span, key
        return best

    def _window(self, span: tuple[int, int]) -> str:
        if span not in self._folded:
            self._folded[span] = fold(self.text[span[0] : span[1]]).text
        return self._folded[span]


def similar_span(text: str, name: str) -> tuple[int, int] | None:
    """Where words of a text are spelled much like a name, as its inflected forms are; never for names of fewer than six folded
    characters, of which others are a letter away (Iran, Iraq).
    """
    folded = fold(name).text
    return None if len(folded) < _SHORTEST else _windows(text).most_similar(folded)


@lru_cache(maxsize=16)  # a text is compared with one name after the other
def _windows(text: str) -> Windows:
    return Windows(text)


def similarity(first: str, second: str, at_least: float = 0.0) -> float:
    """1 - Levenshtein distance / length of the longer string; 0 at once where it cannot reach `at_least`."""
    longer = max(len(first), len(second))
    if longer == 0:
        return 1.0
    allowed = int((1 - at_least) * longer + 1e-9)
    if abs(len(first) - len(second)) > allowed:
        return 0.0
    previous = list(range(len(second) + 1))
    for row, char in enumerate(first, start=1):
        current = [row]
        for column, other in enumerate(second, start=1):
            substituted = previous[column - 1] + (char != other)
            current.append(min(substituted, previous[column] + 1, current[-1] + 1))
        if min(current) > allowed:
            return 0.0
        previous = current
    return 1 - previous[-1] / longer


def _words(text: str) -> list[tuple[int, int]]:
    """Spans of runs of letters, digits and the marks that belong to them."""
    spans, start = [], None
    for index, char in enumerate(text):
        if char.isalnum() or char == "_" or (start is not None and unicodedata.category(char)[0] == "M"):
            start = index if start is None else start
        elif start is not None:
            spans.append((start, index))
            start = None
    return [*spans, *([] if start is None else [(start, len(text))])]
