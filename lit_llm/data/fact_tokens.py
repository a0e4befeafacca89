"""From the texts of a fact to tokens: where the prompt ends, where the answer begins, and where the subject stands.

A prompt and its answer are tokenised together, as the model will read them; published code tokenises them apart, which is
off by one wherever a merge crosses the boundary (arXiv 2202.05262, 2210.07229).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lit_llm.data.edit_requests import Edit, separator
from lit_llm.data.subjects import SubjectMatch, locate_subject
from lit_llm.data.tokenized import begin_ids

Separator = Literal["auto", "space", "none"]


@dataclass(frozen=True)
class FactText:
    """A prompt to be tokenised.

    Attributes:
        language: code; decides what stands between prompt and answer.
        prompt: as the model reads it.
        answer: what is to follow; "" for none.
        subject_end: behind the last character of the subject in the prompt; None: the end of the prompt is looked up.
    """

    language: str
    prompt: str
    answer: str = ""
    subject_end: int | None = None


@dataclass(frozen=True)
class FactRow:
    """A prompt with its answer in tokens.

    Attributes:
        ids: what the tokenizer puts first, the prompt, and the answer; nothing ends it.
        prompt_length: tokens before the answer.
        lookup: position of the last token of the subject, from the start of the row; below prompt_length.
        prompt_ids: the prompt as it is read without an answer. Where `crossed`, `ids` begins differently.
        crossed: a merge joins the end of the prompt with the beginning of the answer.
    """

    ids: tuple[int, ...]
    prompt_length: int
    lookup: int
    prompt_ids: tuple[int, ...]
    crossed: bool

    @property
    def answer_length(self) -> int:
        return len(self.ids) - self.prompt_length


def encode_facts(tokenizer, texts: Sequence[FactText], rule: Separator = "auto") -> list[FactRow]:
    """Tokenise prompts with their answers.

    The answer's tokens are those of `prompt + separator + answer` behind the longest beginning that they share with those
    of `prompt`. The lookup token is the last one whose characters begin before the end of the subject, so the last of
    several where a tokenizer of bytes splits a character.

    Args:
        tokenizer: a fast one.
        texts: what to tokenise.
        rule: see `edit_requests.separator`.

    Raises:
        ValueError: a slow tokenizer, a prompt without tokens, or an answer without tokens of its own.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        raise ValueError(
            f"Subjects are found by the offsets of tokens, which {type(tokenizer).__name__} does not give. Take a fast "
            f"tokenizer (a folder with tokenizer.json)."
        )
    first = begin_ids(tokenizer)
    prompts = tokenizer([text.prompt for text in texts], add_special_tokens=False, return_offsets_mapping=True)
    joined = tokenizer([_joined(text, rule) for text in texts], add_special_tokens=False)["input_ids"]
    return [
        _row(text, first, prompt_ids, offsets, ids)
        for text, prompt_ids, offsets, ids in zip(
            texts, prompts["input_ids"], prompts["offset_mapping"], joined, strict=True
        )
    ]


def _joined(text: FactText, rule: Separator) -> str:
    return text.prompt + separator(text.prompt, text.language, rule) + text.answer if text.answer else text.prompt


def _row(text: FactText, first: list[int], prompt_ids: list[int], offsets: list, ids: list[int]) -> FactRow:
    shared = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids)) if a != b), min(len(prompt_ids), len(ids)))
    if len(first) + shared == 0:
        raise ValueError(f"The prompt {text.prompt!r} has no token before the answer {text.answer!r}. Lengthen it.")
    if text.answer and len(ids) == shared:
        raise ValueError(f"The answer {text.answer!r} has no token of its own after {text.prompt!r}. Choose another.")
    end = len(text.prompt) if text.subject_end is None else text.subject_end
    inside = max((i for i, (begin, _) in enumerate(offsets) if begin < end), default=0)
    return FactRow(
        ids=(*first, *ids),
        prompt_length=len(first) + shared,
        lookup=min(len(first) + inside, len(first) + shared - 1),
        prompt_ids=(*first, *prompt_ids),
        crossed=shared < len(prompt_ids),
    )


def located(edit: Edit, language: str, prompt: str) -> SubjectMatch:
    """Where a prompt in one of the edit's languages names its subject."""
    return locate_subject(prompt, edit.by_language[language].subject, edit.aliases(language))
