"""Numbers for every token of an answer, for people to look at."""

from __future__ import annotations

from dataclasses import dataclass

_UNFINISHED = "\ufffd"  # what a decoder writes for the bytes of a character that is not complete


@dataclass(frozen=True)
class TokenScores:
    """One answer, token by token.

    Attributes:
        prompt: as the student read it.
        tokens: the text of each token; joined they are the answer, with its end-of-sequence token.
        scores: name -> one number per token.
    """

    prompt: str
    tokens: tuple[str, ...]
    scores: dict[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        lengths = {"tokens": len(self.tokens), **{name: len(values) for name, values in self.scores.items()}}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{count} {name}" for name, count in lengths.items())
            raise ValueError(f"Every token needs its number under every name, but there are {told}.")


def token_pieces(tokenizer, ids: list[int]) -> tuple[str, ...]:
    """The text of each token; joined, what the tokenizer decodes from all of them, special tokens included.

    A character that several tokens make up belongs to the last of them; the others are empty.
    """
    pieces: list[str] = []
    told, text = 0, ""
    for count in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:count], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = text.rstrip(_UNFINISHED) if count < len(ids) else text
        pieces.append(whole[told:])
        told = max(told, len(whole))
    return tuple(pieces)
