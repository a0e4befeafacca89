"""Constraints on an answer that a program can check, and the reward that they make: the share that holds.

They travel as plain data beside a prompt, `[{"kind": "max_words", "value": 20}, {"kind": "include", "words": ["sea"]}]`,
and each kind is one function below, whose keyword arguments are the fields that it needs. A field that is None counts as
absent: tables on disk give every check the fields of all kinds. An answer without a letter or digit passes nothing.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Check = Mapping[str, Any]


def reward(answer: str, checks: Sequence[Check]) -> float:
    """Share of the checks that the answer passes, 0 to 1.

    Raises:
        ValueError: no checks, or one that `validate` refuses.
    """
    results = passed(answer, checks)
    return sum(results) / len(results)


def passed(answer: str, checks: Sequence[Check]) -> list[bool]:
    """Whether the answer passes each of the checks.

    Raises:
        ValueError: no checks, or one that `validate` refuses.
    """
    if not checks:
        raise ValueError("There are no checks, so there is no reward. Give the row checks, or leave it out.")
    calls = [_call(check) for check in checks]
    answer = answer.strip()
    if not any(character.isalnum() for character in answer):
        return [False] * len(calls)
    return [function(answer, **fields) for function, fields in calls]


def validate(checks: Sequence[Check]) -> None:
    """See that every check can be made.

    Raises:
        ValueError: an unknown kind or language, a field that is missing, of another type, or not the kind's.
    """
    for check in checks:
        _call(check)


def max_words(answer: str, *, value: int) -> bool:
    """At most so many words."""
    return len(words_of(answer)) <= value


def min_words(answer: str, *, value: int) -> bool:
    """At least so many words."""
    return len(words_of(answer)) >= value


def between_words(answer: str, *, low: int, high: int) -> bool:
    """From `low` to `high` words, both included."""
    return low <= len(words_of(answer)) <= high


def sentences(answer: str, *, value: int) -> bool:
    """Exactly so many sentences on one line; each ends in `.`, `!` or `?`, followed by a space or the end."""
    ends = re.findall(r"[.!?]+[\"'”’)*]*(?=\s|$)", answer)
    return len(ends) == value and "\n" not in answer and re.search(r"[.!?][\"'”’)*]*$", answer) is not None


def lines(answer: str, *, value: int) -> bool:
    """Exactly so many lines that are not blank."""
    return len(_lines(answer)) == value


def bullets(answer: str, *, value: int) -> bool:
    """Nothing but so many lines that begin with `-`, `*` or `•`."""
    found = _lines(answer)
    return len(found) == value and all(re.match(r"[-*•]\s+\S", line) for line in found)


def numbered(answer: str, *, value: int) -> bool:
    """Nothing but so many lines that begin with `1.` or `1)`, `2.` ..., in order."""
    numbers = [re.match(r"(\d+)[.)]\s+\S", line) for line in _lines(answer)]
    return [match and int(match[1]) for match in numbers] == list(range(1, value + 1))


def comma_items(answer: str, *, value: int) -> bool:
    """One line of so many things with commas between them; `and` may stand before the last."""
    parts = [re.sub(r"^(and|or)\s+", "", part.strip(" .")) for part in re.split(r",|\s+and\s+|\s+or\s+", answer)]
    parts = [part for part in parts if part]
    return "\n" not in answer and "," in answer and len(parts) == value and all(len(p.split()) <= 4 for p in parts)


def lower_case(answer: str) -> bool:
    """No capital letter."""
    return not any(character.isupper() for character in answer)


def upper_case(answer: str) -> bool:
    """No small letter."""
    return not any(character.islower() for character in answer)


def no_comma(answer: str) -> bool:
    """No comma."""
    return "," not in answer


def no_digit(answer: str) -> bool:
    """No digit."""
    return not any(character.isdigit() for character in answer)


def quoted(answer: str) -> bool:
    """The whole answer stands in one pair of double quotation marks."""
    return len(answer) > 2 and answer[0] in '"“' and answer[-1] in '"”' and not re.search(r'["“”]', answer[1:-1])


def starts_with(answer: str, *, text: str) -> bool:
    """Begins with this text, as whole words, capitals aside."""
    return re.match(rf"{re.escape(text)}(?!\w)", answer, re.IGNORECASE) is not None


def ends_with(answer: str, *, text: str) -> bool:
    """Ends with this text, capitals and closing quotation marks aside."""
    return answer.rstrip("\"'”’*").lower().endswith(text.lower())


def include(answer: str, *, words: list[str]) -> bool:
    """Every one of these words, whole, capitals aside."""
    return all(_has(answer, word) for word in words)


def avoid(answer: str, *, words: list[str]) -> bool:
    """None of these words, whole, capitals aside."""
    return not any(_has(answer, word) for word in words)


def json_object(answer: str, *, keys: list[str]) -> bool:
    """A JSON object, perhaps in a fence, with exactly these keys; an empty list asks for no particular ones."""
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", answer, re.DOTALL)
    try:
        found = json.loads(fenced[1] if fenced else answer)
    except json.JSONDecodeError:
        return False
    return isinstance(found, dict) and (not keys or set(found) == set(keys))


def language(answer: str, *, code: str) -> bool:
    """Written in the language: its stop words are at least a tenth of the words and more than any other language's.

    A word that is a stop word of several languages counts for each of them, so short answers that consist of such words
    pass for none.
    """
    said = [word.lower() for word in words_of(answer)]
    counts = {name: sum(word in stops for word in said) for name, stops in _STOP_WORDS.items()}
    ours = counts.pop(code)
    return 10 * ours >= len(said) and ours > max(counts.values())


_KINDS: dict[str, Callable[..., bool]] = {
    function.__name__: function
    for function in (
        *(max_words, min_words, between_words, sentences, lines),
        *(bullets, numbered, comma_items, lower_case, upper_case, no_comma, no_digit, quoted, json_object),
        *(starts_with, ends_with, include, avoid, language),
    )
}

_STOP_WORDS = {
    code: frozenset(words.split())
    for code, words in {
        "en": "the a an and or of to in is are was were it its that this with for on as by from at be has have you he she",
        "fr": "le la les un une des et ou de du en est sont il elle que qui dans pour sur par avec ce cette au aux se pas "
        "je vous nous l d c qu",
        "es": "el la los las un una y o de del en es son que por para con su se al lo como más muy este esta no hay yo",
        "de": "der die das ein eine einen und oder von zu in ist sind es mit für auf als im den dem des nicht sich auch "
        "wird ich sie er",
        "it": "il lo la i gli le un una e o di del della in è sono che per con su si al come più non questo questa da",
        "pt": "o a os as um uma e ou de do da em é são que por para com seu sua se no na ao como mais muito não",
    }.items()
}


def words_of(answer: str) -> list[str]:
    """Runs of letters and digits; an apostrophe or hyphen inside belongs to the word, except in French elisions."""
    return re.findall(r"\b(?:[ldcjmnst]|qu)(?=['’]\w)|\w+(?:[-'’]\w+)*", answer, re.IGNORECASE)


def _lines(answer: str) -> list[str]:
    return [line.strip() for line in answer.splitlines() if line.strip()]


def _has(answer: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE) is not None


def _call(check: Check) -> tuple[Callable[..., bool], dict[str, Any]]:
    """The function of a check and its fields, both looked at."""
    kind = check.get("kind")
    if kind not in _KINDS:
        raise ValueError(f"A check has kind {kind!r}; known are {', '.join(_KINDS)}. Correct the row's checks.")
    fields = {name: value for name, value in check.items() if name != "kind" and value is not None}
    wanted = {
        name: parameter.annotation
        for name, parameter in inspect.signature(_KINDS[kind]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    if set(fields) != set(wanted):
        raise ValueError(
            f"The check {kind} needs {_listed(wanted)}, but the row gives {_listed(fields)}. Correct the row's checks."
        )
    for name, annotation in wanted.items():
        if not _FITS[annotation](fields[name]):
            raise ValueError(f"The check {kind} needs {name} as {annotation}, not {fields[name]!r}.")
    if kind == "language" and fields["code"] not in _STOP_WORDS:
        raise ValueError(
            f"The check language has code {fields['code']!r}; stop words are known for {', '.join(_STOP_WORDS)}."
        )
    return _KINDS[kind], fields


_FITS = {  # by the annotation as written
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "str": lambda value: isinstance(value, str) and bool(value),
    "list[str]": lambda value: isinstance(value, list) and all(isinstance(word, str) and word for word in value),
}


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(names) or "no field"
