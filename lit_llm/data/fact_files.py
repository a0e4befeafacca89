"""Edit requests from files: one JSON object a line, in the schema of docs/facts.md."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_llm.data.edit_requests import Edit, EditRequest, LanguageEdit, Question, Questions, taught
from lit_llm.data.language_codes import check_language

COUNTRIES = "facts:countries"
_TOP = {"id", "dataset", "relation", "names", "by_lang"}
_LANGUAGE = {"subject", "prompt", "target_new", "target_old", "paraphrases", "rephrase", "locality", "portability"}
_LANGUAGE |= {"subject_span"}  # of the shared sets; positions are found anew
_NAMED = 5  # lines that a refusal names for each reason
_EMPTY, _SAME = "an empty text", "a new target that is the old one"
_TWICE, _CLASH = "a prompt that an earlier line has", "a prompt that an earlier line has, with another target"
_ID, _TAUGHT = "an id that an earlier line has", "a paraphrase that is a question of the test"


@dataclass(frozen=True)
class FactFile:
    """What was read.

    Attributes:
        requests: in the file's order.
        dropped: reason -> lines.
    """

    requests: list[EditRequest]
    dropped: dict[str, int]


def resolve_source(source: str) -> Path:
    """The file of a source: `facts:countries`, which is made on first use, or a path.

    Raises:
        ValueError: of what is packaged there is nothing of that name.
        FileNotFoundError: no such file.
    """
    if source == COUNTRIES:
        from lit_llm.data.packaged_facts import country_facts

        return country_facts()
    if source.startswith("facts:"):
        raise ValueError(
            f"{source} does not exist. Packaged facts are {COUNTRIES}; else name a .jsonl or .jsonl.gz file."
        )
    if not Path(source).is_file():
        raise FileNotFoundError(
            f"No file of facts at {source} (looked in {Path.cwd()}).\n"
            f"  Correct data.source (.jsonl or .jsonl.gz), or use the packaged facts: {COUNTRIES}."
        )
    return Path(source)


def read_requests(path: Path, bad_rows: Literal["refuse", "drop"] = "refuse") -> FactFile:
    """Read a `.jsonl` or `.jsonl.gz` file of edit requests.

    Args:
        path: of the file.
        bad_rows: what happens to lines that are no usable request: an empty text, a new target that is the old one, a
            prompt or an id that an earlier line has: `refuse` the file, naming them, or `drop` and count them. A line
            that is not in the schema is refused in any case.

    Raises:
        ValueError: not JSON, an unknown or missing field, an unknown language or one given twice (each with its line);
            bad lines with `refuse`; or no line that is usable.
    """
    requests, bad = [], {}
    seen: dict[tuple, str] = {}
    ids: set[str] = set()
    total = 0
    for number, line in _lines(path):
        total += 1
        try:
            request = _request(_parsed(line), f"line-{number}")
            _check_new(request, seen, ids)
        except _Unusable as problem:
            bad.setdefault(str(problem), []).append(number)
            continue
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        requests.append(request)
        ids.add(request.id)
    if bad and bad_rows == "refuse":
        raise ValueError(_refusal(path, bad, total))
    dropped = {reason: len(numbers) for reason, numbers in bad.items()}
    if not requests:
        told = ", ".join(f"{count} dropped with {reason}" for reason, count in dropped.items()) or "it is empty"
        raise ValueError(f"{path} holds no usable edit request: {told}.")
    return FactFile(requests, dropped)


def as_row(request: EditRequest) -> dict[str, Any]:
    """The line of a file that reads as this request."""
    by_language = {}
    for code, fact in request.edit.by_language.items():
        asked = request.questions.get(code, Questions())
        entry = {"subject": fact.subject, "prompt": fact.prompt, "target_new": fact.target_new}
        entry |= {
            "target_old": fact.target_old,
            "paraphrases": list(fact.paraphrases),
            "rephrase": list(asked.rephrases),
        }
        for name in ("locality", "portability"):
            entry[name] = [{"prompt": question.prompt, "answer": question.answer} for question in getattr(asked, name)]
        by_language[code] = {name: value for name, value in entry.items() if value}
    row = {"id": request.id, "relation": request.relation, "names": list(request.edit.names), "by_lang": by_language}
    return {name: value for name, value in row.items() if value}


class _Unusable(Exception):
    """A line in the schema that makes no request; the text is the reason."""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path} could not be read as lines of UTF-8: {error}") from error


def _parsed(line: str) -> dict[str, Any]:
    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:
            raise ValueError(f"{repeated[0]!r} is given twice. Keep one.")
        return dict(pairs)

    try:
        row = json.loads(line, object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:
        raise ValueError(f"not a line of JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"a request is a JSON object, not a {type(row).__name__}.")
    return row


def _request(row: dict[str, Any], name: str) -> EditRequest:
    if "language" in row and "by_lang" not in row:  # one language, written flat
        top = {key: row[key] for key in _TOP & row.keys()}
        row = {**top, "by_lang": {row["language"]: {k: v for k, v in row.items() if k not in _TOP | {"language"}}}}
    _check_fields(row, _TOP, {"by_lang"}, "a request")
    if not isinstance(row["by_lang"], dict) or not row["by_lang"]:
        raise ValueError(f"by_lang is {row['by_lang']!r}; it maps language codes to objects.")
    edits, questions = {}, {}
    for language, entry in row["by_lang"].items():
        check_language(language)
        if not isinstance(entry, dict):
            raise ValueError(f"by_lang.{language} is a {type(entry).__name__}, not an object.")
        _check_fields(entry, _LANGUAGE, {"prompt", "target_new"}, f"by_lang.{language}")
        edits[language], questions[language] = _edit(entry, language), _questions(entry, language)
        if taught(edits[language], questions[language]):
            raise _Unusable(_TAUGHT)
    edit = Edit(str(row.get("id") or name), edits, _text(row.get("relation"), "relation"), _texts(row, "names"))
    return EditRequest(edit, questions)


def _check_fields(row: dict[str, Any], known: set[str], required: set[str], where: str) -> None:
    if missing := sorted(required - row.keys()):
        raise ValueError(f"{where} has no {', '.join(missing)}; it has: {', '.join(row)}.")
    if unknown := sorted(row.keys() - known):
        raise ValueError(f"{where} has an unknown field {', '.join(unknown)}; known are {', '.join(sorted(known))}.")


def _edit(entry: dict[str, Any], language: str) -> LanguageEdit:
    texts = {name: _text(entry.get(name), f"{language}.{name}") for name in ("subject", "target_old")}
    required = {name: _text(entry[name], f"{language}.{name}") for name in ("prompt", "target_new")}
    if None in required.values():
        raise _Unusable(_EMPTY)
    if texts["target_old"] == required["target_new"]:
        raise _Unusable(_SAME)
    return LanguageEdit(**texts, **required, paraphrases=_texts(entry, "paraphrases", language))


def _questions(entry: dict[str, Any], language: str) -> Questions:
    asked = {}
    for name in ("locality", "portability"):
        asked[name] = []
        for question in entry.get(name) or []:
            if not isinstance(question, dict) or question.keys() != {"prompt", "answer"}:
                raise ValueError(f"{language}.{name} holds {question!r}; questions are objects with prompt and answer.")
            texts = {key: _text(text, f"{language}.{name}.{key}") for key, text in question.items()}
            if None in texts.values():
                raise _Unusable(_EMPTY)
            asked[name].append(Question(**texts))
    return Questions(_texts(entry, "rephrase", language), tuple(asked["locality"]), tuple(asked["portability"]))


def _texts(entry: dict[str, Any], name: str, language: str | None = None) -> tuple[str, ...]:
    """A list of texts; a single one may stand without its list."""
    given, where = entry.get(name) or [], name if language is None else f"{language}.{name}"
    if not isinstance(given, (str, list)):
        raise ValueError(f"{where} is {given!r}, not a text or a list of texts.")
    texts = tuple(_text(text, where) for text in ([given] if isinstance(given, str) else given))
    if None in texts:
        raise _Unusable(_EMPTY)
    return texts


def _text(value: Any, where: str) -> str | None:
    """A text, or None where there is none."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where} is {value!r}, not a text.")
    if not value.strip():
        raise _Unusable(_EMPTY)
    return value


def _check_new(request: EditRequest, seen: dict[tuple, str], ids: set[str]) -> None:
    if request.id in ids:
        raise _Unusable(_ID)
    keys = {(code, fact.subject, fact.prompt): fact.target_new for code, fact in request.edit.by_language.items()}
    known = [(key, target) for key, target in keys.items() if key in seen]
    if len(known) == len(keys):
        raise _Unusable(_TWICE if all(seen[key] == target for key, target in known) else _CLASH)
    seen.update(keys)


def _refusal(path: Path, bad: dict[str, list[int]], total: int) -> str:
    told = []
    for reason, numbers in bad.items():
        places = ", ".join(map(str, numbers[:_NAMED])) + (", ..." if len(numbers) > _NAMED else "")
        told.append(f"{len(numbers)} with {reason} (line {places})")
    return (
        f"{sum(map(len, bad.values()))} of the {total} lines of {path} are no usable request: {'; '.join(told)}.\n"
        f"  Correct them, or leave them out with data.bad_rows: drop."
    )
