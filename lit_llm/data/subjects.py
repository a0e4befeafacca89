"""Where the subject of a fact stands in a prompt that need not spell it as the fact does.

In machine-translated sets the subject is literally in as few as 18% of a language's prompts, because subject and question
were translated independently (MzsRE, arXiv 2312.13040); `locate_subject` therefore goes through weaker and weaker rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lit_llm.folding import Folded, begins_inside_word, dotted, end_with_marks, fold
from lit_llm.similar_names import Windows

How = Literal["exact", "folded", "alias_exact", "alias_folded", "fuzzy", "none"]
HOW: tuple[How, ...] = ("exact", "folded", "alias_exact", "alias_folded", "fuzzy", "none")


@dataclass(frozen=True)
class SubjectMatch:
    """How a subject was found.

    Attributes:
        how: the rule, see `locate_subject`.
        start: of the match in the text, in characters; 0 with `none`.
        end: behind its last character; 0 with `none`.
    """

    how: How
    start: int = 0
    end: int = 0


def locate_subject(text: str, subject: str | None, aliases: Sequence[str] = ()) -> SubjectMatch:
    """Find a subject in a text by the first of these rules that finds it.

    1. `exact`: the last occurrence of the string. In scripts with case it must not begin inside a word; an ending may
       follow ("Stadion'un").
    2. `folded`: the same between folded strings, see `lit_llm.folding`.
    3. `alias_exact`, `alias_folded`: both rules for the other names, all exactly before any folded.
    4. `fuzzy`: windows of as many words as the subject has, one fewer or one more; 1 - Levenshtein distance / length of the
       longer is at least 0.75 between folded strings. The most similar, then the leftmost, then the longest. The subject
       first, then its aliases in turn.
    5. `none`.

    Args:
        text: the prompt.
        subject: None: there are only aliases.
        aliases: other names of the subject, in the order in which they are tried.
    """
    page = fold(text)
    names = [(name, fold(name).text) for name in (subject, *aliases) if name is not None]
    own, others = (names[:1], names[1:]) if subject is not None else ([], names)
    for group, prefix in ((own, ""), (others, "alias_")):
        for name, _ in group:
            if (start := _last_occurrence(text, name)) is not None:
                return SubjectMatch(f"{prefix}exact", start, start + len(name))
        for _, name in group:
            if (span := _folded_occurrence(text, page, name)) is not None:
                return SubjectMatch(f"{prefix}folded", *span)
    windows = Windows(text)
    for _, name in names:
        if (span := windows.most_similar(name)) is not None:
            return SubjectMatch("fuzzy", *span)
    return SubjectMatch("none")


def _last_occurrence(text: str, name: str) -> int | None:
    start = text.rfind(name) if name else -1
    while start >= 0 and begins_inside_word(text, start):
        start = text.rfind(name, 0, start + len(name) - 1)
    return start if start >= 0 else None


def _folded_occurrence(text: str, page: Folded, name: str) -> tuple[int, int] | None:
    """The span in the original text; a match may not begin or end inside an original character."""
    folded, name = dotted(page.text), dotted(name)
    start = folded.rfind(name) if name else -1
    while start >= 0:
        end = start + len(name)
        first, last = page.origin[start], page.origin[end - 1]
        whole = (start == 0 or page.origin[start - 1] != first) and page.origin[end : end + 1] != [last]
        if whole and not begins_inside_word(text, first):
            return first, end_with_marks(text, last + 1)
        start = folded.rfind(name, 0, end - 1)
    return None
