"""Which edited fact a text is about: its subject by name, and its relation by the hidden states of the question.

The published paper does not say what triggers the cached values; subject and relation are this project's choice.

Shapes: R rows, T columns, K stored prompts of an edit, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_llm.folding import begins_inside_word, dotted, end_with_marks, fold

_SHORTEST, _SHORTEST_CJK = 4, 2  # folded characters of a name that triggers, where the edit has a longer one
_CJK = (("\u1100", "\u11ff"), ("\u2e80", "\u9fff"), ("\uac00", "\ud7af"))
_MARGIN = 0.02
_UNFINISHED = "\ufffd"  # what a decoder writes for the bytes of a character that is not complete

Search = Callable[[str, str], "tuple[int, int] | None"]


@dataclass(frozen=True)
class Trigger:
    """When a cached edit acts.

    Args:
        scope: `subject_relation`: the subject is named, and the question is close enough to the edit's prompts. `subject`:
            it is named; such an edit also changes the subject's other facts, so tables have to say that it was used. Of
            several edits of one subject the one with the nearest prompts acts, where they are known, else the newest. `oracle`:
            on every text, for runs that ask each fact's questions under its own edit (`single`) and unrelated ones under none:
            what the values are worth, whatever finds them. Tables have to say that it was used.
        relation_threshold: cosine that the question needs; None: each edit's own (see `relation_threshold`).
        fuzzy: where no name is found as it is, take words that are spelled much like one (`similar_span`): inflected names,
            which Russian and Czech are full of. A scan over all names of such edits.

    Raises:
        ValueError: a threshold where none is used.
    """

    scope: Literal["subject_relation", "subject", "oracle"] = "subject_relation"
    relation_threshold: float | None = None
    fuzzy: bool = False

    def __post_init__(self) -> None:
        if self.scope not in ("subject_relation", "subject", "oracle"):
            raise ValueError(f"trigger.scope is {self.scope!r}; it is subject_relation, subject or oracle.")
        if self.scope != "subject_relation" and self.relation_threshold is not None:
            raise ValueError(
                f"trigger.relation_threshold is {self.relation_threshold}, but trigger.scope is {self.scope!r}, which compares "
                f"no relation. Leave it out."
            )
        if self.scope == "oracle" and self.fuzzy:
            raise ValueError(
                "trigger.fuzzy is set, but trigger.scope is 'oracle', which looks for no name. Leave it out."
            )


class Mention(NamedTuple):
    """A name found in a text.

    Attributes:
        edits: the edits whose subject has this name.
        start: of the name in the text, in characters.
        end: behind its last character.
    """

    edits: tuple[str, ...]
    start: int
    end: int


class SubjectIndex:
    """Finds the subjects of many edits in a text at once.

    Args:
        names: the names of each edit's subject, in all languages. Names of fewer than four characters (two in Chinese,
            Japanese and Korean) are left out where the edit has a longer one: common words are spelled like them.
        search: where no name is found as it is, this is asked for each name: (text, name) -> span. A scan over all names;
            None: no such step.
        searched: edits for whose names it is asked; None: all.
    """

    def __init__(
        self,
        names: Mapping[str, Sequence[str]],
        search: Search | None = None,
        searched: Container[str] | None = None,
    ) -> None:
        self._edits: dict[str, list[str]] = {}
        self._looked_for: dict[str, list[str]] = {}
        self._names: list[tuple[str, str]] = []
        self._search = search
        for edit, own in names.items():
            folded = {name: dotted(fold(name).text) for name in own}
            long_enough = {name: text for name, text in folded.items() if len(text) >= _shortest(text)}
            for name, text in (long_enough or folded).items():
                if text and edit not in self._edits.setdefault(text, []):
                    self._edits[text].append(edit)
                    if searched is None or edit in searched:
                        self._names.append((edit, name))
                    self._looked_for.setdefault(edit, []).append(name)
        self._lengths: dict[str, list[int]] = {}  # by first character, the longest first
        for text in self._edits:
            lengths = self._lengths.setdefault(text[0], [])
            if len(text) not in lengths:
                lengths.append(len(text))
        for lengths in self._lengths.values():
            lengths.sort(reverse=True)

    def looked_for(self, edit: str) -> list[str]:
        """The names of an edit that are not left out."""
        return self._looked_for.get(edit, [])

    def find(self, text: str) -> Mention | None:
        """The longest name in the text; of equally long ones the last."""
        folded, origin = fold(text)
        folded = dotted(folded)
        best: tuple[int, int] | None = None
        for start, char in enumerate(folded):
            for length in self._lengths.get(char, ()):
                if best is not None and length < best[0]:
                    break
                fits = start + length <= len(folded) and folded[start : start + length] in self._edits
                if fits and _is_whole(text, origin, start, length):
                    best = length, start
                    break
        if best is None:
            return self._searched(text)
        length, start = best
        end = end_with_marks(text, origin[start + length - 1] + 1)
        return Mention(tuple(self._edits[folded[start : start + length]]), origin[start], end)

    def _searched(self, text: str) -> Mention | None:
        for edit, name in self._names if self._search is not None else ():
            if (span := self._search(text, name)) is not None:
                return Mention((edit,), *span)
        return None


class Unheard(NamedTuple):
    """A prompt of an edit on which the edit does not act.

    Attributes:
        edit: its id.
        language: of the prompt.
        prompt: as it was given.
        reason: what the trigger finds there instead, in words.
    """

    edit: str
    language: str
    prompt: str
    reason: str


def unheard(tokenizer, index: SubjectIndex, prompts: Mapping[str, Mapping[str, str]]) -> Iterator[Unheard]:
    """The prompts on which their own edits would never act, whatever values they have.

    Locating a subject allows more than the trigger does: misspelled names, and short ones.

    Args:
        tokenizer: of the model; the trigger reads what it makes of a prompt.
        index: of the subjects of all edits that act together.
        prompts: by edit and language.
    """
    for edit, by_language in prompts.items():
        for language, prompt in by_language.items():
            mention = index.find(decoded(tokenizer, tokenizer(prompt)["input_ids"]))
            if mention is None:
                looked_for = ", ".join(repr(name) for name in index.looked_for(edit))
                yield Unheard(
                    edit, language, prompt, f"its trigger looks for {looked_for} and finds none of them there"
                )
            elif edit not in mention.edits:
                others = ", ".join(repr(name) for name in mention.edits)
                yield Unheard(
                    edit, language, prompt, f"the longest name there is that of the edit {others}, which acts"
                )


def decoded(tokenizer, ids: Sequence[int]) -> str:
    """The text that names are looked for in."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def mentioned_tokens(tokenizer, ids: Sequence[int], mention: Mention) -> tuple[int, int]:
    """First and last token of a name in `decoded` ids: the last is the first one with which the text reaches its end."""
    whole = decoded(tokenizer, ids)
    return tuple(_reaching(tokenizer, ids, whole, end) for end in (mention.start + 1, mention.end))


def pooled(hidden_RTd: Tensor, kept_RT: Tensor) -> Tensor:
    """(R, d) mean over the kept tokens, of norm 1; 0 where none is kept."""
    weight_RT = kept_RT.to(torch.float32)
    total_Rd = torch.einsum("rt,rtd->rd", weight_RT, hidden_RTd.float())
    return torch.nn.functional.normalize(total_Rd, dim=-1)


def relation_threshold(vectors_Kd: Tensor) -> float:
    """The cosine that a question needs to be about the relation of some prompts: the lowest that one of them has with the
    most similar other one, less 0.02.

    Raises:
        ValueError: a single prompt, which has nothing to be compared with.
    """
    if len(vectors_Kd) < 2:
        raise ValueError(
            "The threshold of a relation comes from an edit's own prompts, and there is 1. Give paraphrases or several "
            "languages, or set trigger.relation_threshold or trigger.scope: subject."
        )
    cosine_KK = vectors_Kd @ vectors_Kd.T
    cosine_KK.fill_diagonal_(-torch.inf)
    return cosine_KK.amax(-1).min().item() - _MARGIN


def _reaching(tokenizer, ids: Sequence[int], whole: str, characters: int) -> int:
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        text = decoded(tokenizer, ids[:middle])
        if not whole.startswith(text):
            text = text.rstrip(_UNFINISHED)
        low, high = (low, middle) if len(text) >= characters else (middle + 1, high)
    return low - 1


def _shortest(text: str) -> int:
    cjk = any(low <= char <= high for char in text for low, high in _CJK)
    return _SHORTEST_CJK if cjk else _SHORTEST


def _is_whole(text: str, origin: Sequence[int], start: int, length: int) -> bool:
    """A match may not begin inside a word of a script with case, nor split an original character."""
    first, last = origin[start], origin[start + length - 1]
    splits = (start > 0 and origin[start - 1] == first) or list(origin[start + length : start + length + 1]) == [last]
    return not splits and not begins_inside_word(text, first)
