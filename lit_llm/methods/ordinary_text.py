"""Text that edits of weights are to leave alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from lit_llm.data.corpora import load_corpus

_PACKAGED = "package-text:software"


@dataclass(frozen=True)
class OrdinaryText:
    """Text whose neurons closed-form edits leave alone as far as they can; it should hold the languages that are edited.

    Args:
        sources: language -> source, as `Languages.groups` has them. None: packaged text in English, Spanish and French.
        tokens: of all languages together, in equal shares; more than a layer has neurons.
        passage: tokens of a passage at most.
    """

    sources: Optional[dict[str, str]] = None
    tokens: int = 20_000
    passage: int = 256


def passages(text: OrdinaryText, tokenizer) -> list[list[int]]:
    """Token ids of passages; languages take turns, so that any beginning of them has all.

    Raises:
        FileNotFoundError: no such source.
        ValueError: one that cannot be read, or that is empty.
    """
    sources = text.sources or dict.fromkeys(("en", "es", "fr"), _PACKAGED)
    share, by_language = text.tokens // len(sources), []
    for language, source in sources.items():
        corpus = load_corpus([source], language, tokenizer, columns={}, begin="auto", order_seed=0, workers=0)
        left, found = share, []
        for number in range(len(corpus.documents)):
            if left <= 0:
                break
            found.append(corpus.ids(number)[: min(text.passage, left)])
            left -= len(found[-1])
        by_language.append(found)
    return _in_turn(by_language)


def _in_turn(lists: Sequence[list[list[int]]]) -> list[list[int]]:
    """Evenly mixed: a passage comes when the same share of the passages of its language has come before it."""
    placed = [((at + 0.5) / len(items), item) for items in lists for at, item in enumerate(items)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]
