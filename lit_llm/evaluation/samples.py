"""Answers side by side, for people to read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One prompt with its reference and the answers of several models.

    Attributes:
        prompt: as the student read it.
        reference: the answer of the data.
        answers: who ("start", "student", "teacher") -> answer.
    """

    prompt: str
    reference: str
    answers: dict[str, str]
