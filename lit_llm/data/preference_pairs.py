"""Rows of preference data, in the shapes that people have, as tokens of a prompt and of two answers.

A prompt that is too long first loses its oldest turns, always up to a turn of the user; what is then still too long loses
the beginning of its last turn. The template's header stays: the beginning-of-sequence token, the system turn, and the
words that open the user's turn. So does the cue to answer, which stands at the end.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Optional

from lit_llm.data.preference_rows import Turn, UnusableRow, read_pair
from lit_llm.data.templates import render_chat, render_prompt
from lit_llm.data.tokenized import EvaluationPrompt, begin_ids, map_cached

_FORMAT = 1  # raise it when the meaning of a cached column changes
_BAD = (
    "identical answers",
    "an empty answer",
    "an empty prompt",
    "no prompt",
    "different turns before the answers",
    "a last turn that is not the assistant's",
    "a prompt that does not end with the user's turn",
    "messages without role and content",
    "a label that is neither good nor bad",
)
_TOO_LONG = "a prompt that is too long"
_DROPPED = (*_BAD, _TOO_LONG, "an answer that is too long", "answers that are equal when cut")
_NAMED = 5  # rows that a refusal names for each reason


@dataclass(frozen=True)
class PairEncoding:
    """How text becomes tokens; the fields are those of `Preferences`, where they are documented."""

    template: Literal["alpaca", "plain", "chat"]
    system: Optional[str]
    begin: Literal["auto", "never"]
    max_length: int
    max_prompt_length: int
    long_prompts: Literal["keep_end", "drop", "refuse"]
    long_answers: Literal["cut", "drop", "cut_with_eos"]


@dataclass(frozen=True)
class PairSummary:
    """What became of the rows of one part; tokens are supervised ones, of the pairs that were kept.

    Attributes:
        rows: rows read.
        pairs: rows kept.
        chosen_tokens: tokens of the chosen answers.
        rejected_tokens: tokens of the rejected answers.
        prompt_tokens: tokens of the prompts, each counted once.
        chosen_longer: pairs whose chosen answer has more tokens.
        equally_long: pairs whose answers have equally many.
        prompts_cut: prompts that lost turns or their beginning.
        answers_cut: answers, of both sides, that lost their end.
        dropped: reason -> rows.
    """

    rows: int
    pairs: int
    chosen_tokens: int
    rejected_tokens: int
    prompt_tokens: int
    chosen_longer: int
    equally_long: int
    prompts_cut: int
    answers_cut: int
    dropped: dict[str, int]

    def text(self, name: str) -> str:
        parts = [
            f"{name}: {self.pairs:,} pairs",
            f"answers of {self.chosen_tokens:,} (chosen) and {self.rejected_tokens:,} tokens (rejected), on average "
            f"{self.chosen_tokens / self.pairs:.1f} and {self.rejected_tokens / self.pairs:.1f}, prompts of "
            f"{self.prompt_tokens / self.pairs:.1f}",
        ]
        longer, equal = self.chosen_longer / self.pairs, self.equally_long / self.pairs
        parts.append(f"chosen is longer in {longer:.0%} and as long in {equal:.0%}")
        if self.prompts_cut or self.answers_cut:
            parts.append(f"cut: {self.prompts_cut:,} prompts, {self.answers_cut:,} answers")
        if self.dropped:
            parts.append("dropped: " + ", ".join(f"{count:,} with {reason}" for reason, count in self.dropped.items()))
        return "; ".join(parts)


class PairSet:
    """Tokenised pairs, indexed by row; a thin view over an Arrow table that stays on disk."""

    def __init__(self, table, summary: PairSummary) -> None:
        self.table, self.summary = table, summary

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict:
        return self.table[row]

    def prompt(self, row: int) -> EvaluationPrompt:
        fields = self.table[row]
        return EvaluationPrompt(
            text=fields["prompt_text"],
            student_ids=fields["student_prompt_ids"],
            teacher_ids=None,
            references=[fields["chosen_text"]],
            checks=json.loads(fields["checks"]),
        )

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each pair's longer sequence."""
        return self.table["num_longer"][:]

    @cached_property
    def supervised(self) -> list[int]:
        return self.table["num_chosen"][:]

    @cached_property
    def rejected_supervised(self) -> list[int]:
        return self.table["num_rejected"][:]

    @cached_property
    def pairs(self) -> list[int]:
        return [1] * len(self)


def tokenize_pairs(
    rows, encoding: PairEncoding, tokenizer, *, bad_rows: Literal["refuse", "drop"], workers: int, name: str
) -> PairSet:
    """Tokenise rows with columns `chosen` and `rejected` and, optionally, `prompt`, scores and `checks`.

    Args:
        rows: a `datasets.Dataset`.
        encoding: templates and limits.
        tokenizer: of the policy, and of every model that it is compared with.
        bad_rows: what happens to rows that make no pair.
        workers: processes; 0 chooses by the number of rows.
        name: of the data, for messages.

    Raises:
        ValueError: rows that make no pair, with `bad_rows: refuse` (reasons, rows and their number); prompts that are too
            long, with `long_prompts: refuse`; or every row was dropped.
    """
    encoder = PairEncoder(encoding, tokenizer)
    parts = ["pairs", _FORMAT, asdict(encoding)]
    encoded = map_cached(rows, encoder, parts, (tokenizer,), workers=workers, name=name, features=pair_features())
    table, dropped = usable(encoded, rows, encoding, bad_rows=bad_rows, name=name)
    longer = [a - b for a, b in zip(table["num_chosen"], table["num_rejected"], strict=True)]
    summary = PairSummary(
        rows=len(rows),
        pairs=len(table),
        chosen_tokens=sum(table["num_chosen"]),
        rejected_tokens=sum(table["num_rejected"]),
        prompt_tokens=sum(table["num_prompt"]),
        chosen_longer=sum(difference > 0 for difference in longer),
        equally_long=sum(difference == 0 for difference in longer),
        prompts_cut=sum(table["prompt_cut"]),
        answers_cut=sum(table["answers_cut"]),
        dropped=dropped,
    )
    return PairSet(table, summary)


def usable(
    encoded, rows, encoding: PairEncoding, *, bad_rows: Literal["refuse", "drop"], name: str, what: str = "pair"
) -> tuple[Any, dict[str, int]]:
    """The rows with the status `kept`, and how many were dropped for each reason.

    Args:
        encoded: rows as an encoder left them, with their `status`.
        rows: as they were read, for messages.
        encoding: with its limits.
        bad_rows: what happens to rows that make no example.
        name: of the data.
        what: a row should make.

    Raises:
        ValueError: as `tokenize_pairs`.
    """
    found: dict[str, list[int]] = {reason: [] for reason in _DROPPED}
    kept = []
    for row, status in enumerate(encoded["status"][:]):
        (kept if status == "kept" else found[status]).append(row)
    refused = [*(_BAD if bad_rows == "refuse" else ()), *([_TOO_LONG] if encoding.long_prompts == "refuse" else ())]
    if bad := {reason: found[reason] for reason in refused if found[reason]}:
        raise ValueError(_refusal(bad, encoding, rows, name, what))
    dropped = {reason: len(members) for reason, members in found.items() if members}
    if not kept:
        raise ValueError(
            f"No usable {what} is left of the {len(rows)} rows of {name}: "
            + ", ".join(f"{count} dropped with {reason}" for reason, count in dropped.items())
            + f".\n  Limits: max_length {encoding.max_length}, max_prompt_length {encoding.max_prompt_length}. "
            "Raise them, or map other columns with data.columns."
        )
    return encoded.select(kept), dropped


def _refusal(bad: dict[str, list[int]], encoding: PairEncoding, rows, name: str, what: str) -> str:
    told = []
    for reason, members in bad.items():
        places = ", ".join(map(str, members[:_NAMED])) + (", ..." if len(members) > _NAMED else "")
        told.append(f"{len(members)} with {reason} (row {places})")
    first = min(members[0] for members in bad.values())
    steps = ["Correct them"]
    if _TOO_LONG in bad:
        steps.append(
            f"raise data.max_prompt_length ({encoding.max_prompt_length}), set data.long_prompts: keep_end or drop"
        )
    if set(bad) - {_TOO_LONG}:
        steps.append("map other columns with data.columns, or leave such rows out with data.bad_rows: drop")
    return (
        f"{sum(map(len, bad.values()))} of the {len(rows)} rows of {name} make no {what}: {'; '.join(told)}; rows count from 0, "
        f"columns are {', '.join(rows.column_names)}.\n"
        f"  Row {first} begins: {_beginning(rows[first])!r}\n  {', '.join(steps)}."
    )


def _beginning(row: dict[str, Any]) -> str:
    return str(row.get("prompt") or row.get("chosen") or row.get("answer"))[:80]


class PairEncoder:
    """Turns one row into tokens; picklable, so that workers can run it."""

    def __init__(self, encoding: PairEncoding, tokenizer) -> None:
        self.encoding, self.tokenizer = encoding, tokenizer

    def __call__(self, row: dict) -> dict:
        try:
            pair = read_pair(row)
        except UnusableRow as problem:
            return {**NOTHING, "status": str(problem)}
        text, prompt_ids, prompt_cut = encode_turns(self.tokenizer, self.encoding, pair.turns)
        room = self.encoding.max_length - len(prompt_ids)
        (chosen, chosen_cut), (rejected, rejected_cut) = (self.answer(a, room) for a in (pair.chosen, pair.rejected))
        answers_cut = chosen_cut + rejected_cut
        return {
            "status": self.status(prompt_cut, answers_cut, chosen == rejected),
            "prompt_text": text,
            "chosen_text": pair.chosen,
            "rejected_text": pair.rejected,
            "student_prompt_ids": prompt_ids,
            "teacher_prompt_ids": [],  # what samples answers reads both; there is one tokenizer
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "num_prompt": len(prompt_ids),
            "num_chosen": len(chosen),
            "num_rejected": len(rejected),
            "num_longer": len(prompt_ids) + max(len(chosen), len(rejected)),
            "prompt_cut": prompt_cut,
            "answers_cut": answers_cut,
            "score_chosen": _number(row.get("score_chosen")),
            "score_rejected": _number(row.get("score_rejected")),
            "checks": written_checks(row),
        }

    def answer(self, answer: str, room: int) -> tuple[list[int], bool]:
        """Tokens of an answer with the one that ends it, and whether it lost its end."""
        end = self.tokenizer.eos_token_id
        ids = [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], end]
        if len(ids) <= room:
            return ids, False
        return ([*ids[: room - 1], end] if self.encoding.long_answers == "cut_with_eos" else ids[:room]), True

    def status(self, prompt_cut: bool, answers_cut: int, equal: bool) -> str:
        if prompt_cut and self.encoding.long_prompts != "keep_end":
            return _TOO_LONG
        if answers_cut and self.encoding.long_answers == "drop":
            return "an answer that is too long"
        return "answers that are equal when cut" if equal else "kept"


def encode_turns(tokenizer, rules: PairEncoding, turns: list[Turn]) -> tuple[str, list[int], bool]:
    """The text of a prompt, its tokens within the limit (see the top of this file), and whether it lost something.

    Raises:
        ValueError: several turns without `template: chat`, two system messages, or a limit that the template's own words
            fill.
    """
    text = _render(tokenizer, rules, turns)
    ids, limit = _tokens(tokenizer, rules, text), rules.max_prompt_length
    if len(ids) <= limit:
        return text, ids, False
    system, rest = (turns[:1], turns[1:]) if turns[0]["role"] == "system" else ([], turns)
    while len(ids) > limit and (later := [i for i, turn in enumerate(rest) if turn["role"] == "user" and i > 0]):
        rest = rest[later[0] :]
        ids = _tokens(tokenizer, rules, _render(tokenizer, rules, [*system, *rest]))
    if len(ids) > limit:
        probes = [_render(tokenizer, rules, [*system, {"role": "user", "content": content}]) for content in "XY"]
        header = _tokens(tokenizer, rules, os.path.commonprefix(probes))
        cue = tokenizer(_common_end(probes), add_special_tokens=False)["input_ids"]
        if len(header) + len(cue) >= limit:
            raise ValueError(
                f"data.max_prompt_length is {limit}, but the template's own words, with the system message, take "
                f"{len(header) + len(cue)} tokens. Raise the first, or shorten data.system."
            )
        ids = header + ids[len(header) - limit :]
    return text, ids, True


def _render(tokenizer, rules: PairEncoding, turns: list[Turn]) -> str:
    if len(turns) == 1:
        return render_prompt(tokenizer, rules.template, turns[0]["content"], system=rules.system)
    if rules.template != "chat":
        raise ValueError(
            f"A row holds a conversation of {len(turns)} turns before the answer ({', '.join(t['role'] for t in turns)}), "
            f"but data.template is {rules.template!r}, which has room for one. Set data.template: chat."
        )
    if rules.system is not None:
        if turns[0]["role"] == "system":
            raise ValueError(
                f"data.system is {rules.system!r}, but a row has a system message of its own: "
                f"{turns[0]['content'][:60]!r}. Leave data.system out, or remove those of the rows."
            )
        turns = [{"role": "system", "content": rules.system}, *turns]
    return render_chat(tokenizer, turns)


def _tokens(tokenizer, rules: PairEncoding, text: str) -> list[int]:
    begin = begin_ids(tokenizer) if rules.begin == "auto" else []
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids if ids[: len(begin)] == begin else begin + ids


def _common_end(texts: list[str]) -> str:
    return os.path.commonprefix([text[::-1] for text in texts])[::-1]


def _number(value) -> float | None:
    return None if value is None else float(value)


def written_checks(row: dict[str, Any]) -> str:
    """The checks of a row as JSON. Arrow gives every check the fields of all; those that it does not have are None."""
    checks = row.get("checks") or []
    return json.dumps([{name: v for name, v in check.items() if v is not None} for check in checks] or None)


_COLUMNS = {  # of the result, by type
    "string": ("status", "prompt_text", "chosen_text", "rejected_text", "checks"),
    "ids": ("student_prompt_ids", "teacher_prompt_ids", "chosen_ids", "rejected_ids"),
    "int64": ("num_prompt", "num_chosen", "num_rejected", "num_longer", "answers_cut"),
    "bool": ("prompt_cut",),
    "float64": ("score_chosen", "score_rejected"),
}
NOTHING: dict[str, Any] = {
    name: {"string": "", "ids": [], "int64": 0, "bool": False, "float64": None}[kind]
    for kind, names in _COLUMNS.items()
    for name in names
}


def pair_features():
    from datasets import Features, Value
    from datasets import Sequence as Column

    types = {kind: Column(Value("int64")) if kind == "ids" else Value(kind) for kind in _COLUMNS}
    return Features({name: types[kind] for kind, names in _COLUMNS.items() for name in names})
