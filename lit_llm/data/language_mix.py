"""How many rows of an epoch each language has: budgets, temperature, and the share of the original languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional, Union

# 50,000 documents of each original language beside 100,000 of each new one: a third where there are equally many languages
RELEASED_OLD_SHARE = 1 / 3


@dataclass(frozen=True)
class Mix:
    """Settings of `Languages` of the same names, where they are documented."""

    tokens: Optional[Union[int, dict[str, int]]]
    temperature: float
    old_share: Optional[float]
    repeat: bool
    row_length: int

    def __post_init__(self) -> None:
        if self.row_length < 2:
            raise ValueError(f"data.row_length is {self.row_length}; a row needs two tokens, one to predict the other.")
        if self.temperature <= 0:
            raise ValueError(f"data.temperature is {self.temperature}; it must be above 0 (1: by size, large: evenly).")
        if self.old_share is not None and not 0 < self.old_share < 1:
            raise ValueError(
                f"data.old_share is {self.old_share}; it is a share of an epoch's tokens, between 0 and 1. Text of the new "
                "languages alone is data.stage: 1."
            )
        if isinstance(self.tokens, dict) and self.old_share is not None:
            raise ValueError(
                f"data.tokens gives every language its number ({self.tokens}), so data.old_share ({self.old_share}) has "
                "nothing to decide. Leave one of them out."
            )
        if isinstance(self.tokens, dict) and self.temperature != 1:
            raise ValueError(
                f"data.tokens gives every language its number ({self.tokens}), so data.temperature ({self.temperature}) "
                "has nothing to decide. Leave one of them out."
            )
        given = self.tokens.values() if isinstance(self.tokens, dict) else [self.tokens]
        if any(number is not None and number < 1 for number in given):
            raise ValueError(f"data.tokens is {self.tokens}; it counts the tokens of an epoch and must be at least 1.")


def rows_of_languages(mix: Mix, available: Mapping[str, int], newest: Sequence[str]) -> dict[str, int]:
    """Rows of an epoch for each language.

    Args:
        mix: the settings.
        available: training tokens that each language of this stage has.
        newest: those of them that are of the newest group; if they are all, nothing is replayed.

    Raises:
        ValueError: a budget names another language or leaves one out, is less than a row, or, without `repeat`, more
            than there is.
    """
    budgets = _budgets(mix, available, newest)
    rows = {}
    for language, tokens in budgets.items():
        rows[language] = int((tokens + 1e-6) // mix.row_length)  # a share of the text may come out a hair below it
        if rows[language] == 0:
            raise ValueError(
                f"{language!r} would have {tokens:,.0f} training tokens, less than one row of data.row_length "
                f"{mix.row_length}. Lower data.row_length, raise data.tokens, or give the language more text."
            )
        needed = rows[language] * mix.row_length
        if not mix.repeat and needed > available[language]:
            raise ValueError(
                f"{language!r} is to have {needed:,} training tokens, but its text has {available[language]:,} and "
                "data.repeat is false.\n  Lower data.tokens, give the language more text, or set data.repeat: true."
            )
    return rows


def _budgets(mix: Mix, available: Mapping[str, int], newest: Sequence[str]) -> dict[str, float]:
    if isinstance(mix.tokens, dict):
        if mix.tokens.keys() != available.keys():
            raise ValueError(
                f"data.tokens gives numbers for {', '.join(mix.tokens)}, but this stage trains on {', '.join(available)}. "
                "Name these, or give one number for all."
            )
        return dict(mix.tokens)
    older = [language for language in available if language not in newest]
    share = (RELEASED_OLD_SHARE if mix.old_share is None else mix.old_share) if older else 0.0
    total = sum(available[language] for language in newest) / (1 - share) if mix.tokens is None else mix.tokens
    parts = ((newest, 1 - share), (older, share))
    return {
        language: total * part * weight
        for languages, part in parts
        for language, weight in _tempered(mix.temperature, {name: available[name] for name in languages}).items()
    }


def _tempered(temperature: float, available: dict[str, int]) -> dict[str, float]:
    """Shares proportional to the size to the power of 1 / temperature."""
    largest = max(available.values(), default=1)
    powers = {language: (size / largest) ** (1 / temperature) for language, size in available.items()}
    return {language: power / sum(powers.values()) for language, power in powers.items()}
