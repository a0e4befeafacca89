"""The texts of an edit, and how its subject is found in others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from lit_llm.editing.triggers import Search, SubjectIndex
from lit_llm.folding import dotted, fold
from lit_llm.similar_names import similar_span


@dataclass(frozen=True)
class FactText:
    """What an edit says, for people and for the trigger.

    Attributes:
        id: name of the edit.
        relation: its kind, e.g. `capital`; None where it is not known, and prompts are compared instead.
        subjects: by language.
        prompts: by language.
        targets: the new answers by language.
        aliases: other names of the subject.
        fuzzy: whether words that are only spelled much like a name are taken for it.
    """

    id: str
    subjects: dict[str, str]
    prompts: dict[str, str]
    targets: dict[str, str]
    relation: str | None = None
    aliases: tuple[str, ...] = ()
    fuzzy: bool = False

    def names(self) -> list[str]:
        return [*dict.fromkeys((*self.subjects.values(), *self.aliases))]

    def is_same_question(self, other: FactText) -> bool:
        """Whether both edit one relation of one subject: they share a name of it, of whatever language, and the relation; where
        one has no relation, a prompt.
        """
        if not _share_one(self.names(), other.names()):
            return False
        if self.relation is not None and other.relation is not None:
            return _plain(self.relation) == _plain(other.relation)
        return _share_one(self.prompts.values(), other.prompts.values())


def index_of(facts: Iterable[FactText], search: Search | None = None) -> SubjectIndex:
    """Finds the subjects of edits that act together.

    Args:
        facts: of the edits.
        search: asked for every name where none is found as it is; None: `similar_span` for the names of `fuzzy` edits.
    """
    facts = list(facts)
    names = {fact.id: fact.names() for fact in facts}
    if search is not None:
        return SubjectIndex(names, search)
    return SubjectIndex(names, similar_span, {fact.id for fact in facts if fact.fuzzy})


def _share_one(texts: Iterable[str], others: Iterable[str]) -> bool:
    return not {_plain(text) for text in texts}.isdisjoint(_plain(text) for text in others)


@lru_cache(maxsize=100_000)  # an edit is compared with all earlier ones
def _plain(text: str) -> str:
    return " ".join(dotted(fold(text).text).split())
