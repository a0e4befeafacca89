"""Rows of preference data, in the shapes that people have, as the turns of a prompt and its answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Turn = dict[str, str]


class UnusableRow(Exception):
    """A row that makes no pair; the text is the reason."""


@dataclass(frozen=True)
class RawPair:
    """The turns of a prompt, the last one the user's, and two answers."""

    turns: list[Turn]
    chosen: str
    rejected: str


def read_pair(row: dict[str, Any]) -> RawPair:
    """The pair of a row of any of these shapes.

    - `prompt`, `chosen`, `rejected` are strings;
    - `chosen` and `rejected` are lists of messages (`role`, `content`) that end with the assistant's answer. The turns
      before it are the prompt, the same on both sides; a `prompt` column is then not looked at. Where the lists hold
      the answer only, the prompt is the `prompt` column, a string or a list of messages;
    - `chosen` and `rejected` are transcripts, `"\\n\\nHuman: ...\\n\\nAssistant: ..."`, and there is no `prompt`.

    Raises:
        UnusableRow: the row makes no pair.
    """
    given = row.get("prompt")
    (before, chosen), (before_rejected, rejected) = (_split(row[side], given) for side in ("chosen", "rejected"))
    if before != before_rejected:
        raise UnusableRow("different turns before the answers")
    turns = _prompt(before, given)
    if not chosen.strip() or not rejected.strip():
        raise UnusableRow("an empty answer")
    if chosen.strip() == rejected.strip():
        raise UnusableRow("identical answers")
    return RawPair(turns, chosen, rejected)


def read_answer(row: dict[str, Any]) -> tuple[list[Turn], str]:
    """The turns of a prompt and the answer of a row whose `answer` has a shape that `chosen` may have in `read_pair`.

    Raises:
        UnusableRow: the row makes no prompt with an answer.
    """
    given = row.get("prompt")
    before, answer = _split(row["answer"], given)
    turns = _prompt(before, given)
    if not answer.strip():
        raise UnusableRow("an empty answer")
    return turns, answer


def _prompt(before: list[Turn], given) -> list[Turn]:
    """The turns of a prompt: those before the answer, or else what the column holds."""
    turns = before or ([{"role": "user", "content": given}] if isinstance(given, str) else _turns(given or []))
    if not turns:
        raise UnusableRow("no prompt" if given is None else "an empty prompt")
    if turns[-1]["role"] != "user":
        raise UnusableRow("a prompt that does not end with the user's turn")
    if not turns[-1]["content"].strip():
        raise UnusableRow("an empty prompt")
    return turns


def _split(side: str | Sequence[dict] | None, given) -> tuple[list[Turn], str]:
    """The turns before the answer, where this side has them, and the answer."""
    if isinstance(side, str):
        if given is not None or not side.lstrip().startswith("Human:"):
            return [], side
        pieces = re.split(r"(?:^|\n\n)\s*(Human|Assistant):", side)[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        turns = [{"role": roles[who], "content": text.strip()} for who, text in zip(pieces[::2], pieces[1::2])]
    else:
        turns = _turns(side or [])
    if not turns:
        return [], ""
    if turns[-1]["role"] != "assistant":
        raise UnusableRow("a last turn that is not the assistant's")
    return turns[:-1], turns[-1]["content"]


def _turns(messages: Sequence[dict]) -> list[Turn]:
    whole = isinstance(messages, list | tuple) and all(map(_is_message, messages))
    if not whole:
        raise UnusableRow("messages without role and content")
    return [{"role": message["role"] or "", "content": message["content"] or ""} for message in messages]


def _is_message(given) -> bool:
    texts = [given.get(name, 0) for name in ("role", "content")] if isinstance(given, dict) else [0]
    return all(text is None or isinstance(text, str) for text in texts)
