"""Tokenise instruction rows once, in workers, with a cache on disk; say what was truncated, dropped and why."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Optional

from lit_llm.data.minimum_edit import align_minimum_edit, nearest_tokens
from lit_llm.data.templates import render_prompt
from lit_llm.data.token_alignment import align_answers, group_answers, token_spellings
from lit_llm.storage import cache_folder

_FORMAT = 3  # raise it when the meaning of a cached column changes
_ROWS_PER_WORKER = 4000
Alignment = Literal["bytes", "released", "kth", "minimum_edit", "groups"]
_PAIRS, _PIECES = ("pair_student", "pair_teacher"), ("pieces_student", "pieces_teacher")
_DROPPED = ("empty answer", "empty prompt", "prompt too long", "answer too long", "nothing to supervise")


@dataclass(frozen=True)
class Encoding:
    """How text becomes tokens; the fields are those of `Instructions`, where they are documented."""

    template: Literal["alpaca", "plain", "chat"]
    system: Optional[str]
    begin: Literal["auto", "never"]
    supervise: Literal["answers", "all"]
    max_length: int
    max_prompt_length: int
    long_prompts: Literal["keep_end", "drop"]
    long_answers: Literal["cut", "drop"]
    alignment: Alignment


@dataclass(frozen=True)
class Summary:
    """What became of the rows of one part.

    Attributes:
        rows: rows read.
        examples: rows kept.
        tokens: student tokens kept.
        supervised: student tokens that a loss looks at.
        pairs: of those, the ones aligned with the teacher's tokens; None with one tokenizer.
        prompts_cut: prompts that lost their beginning.
        answers_cut: answers that lost their end.
        dropped: reason -> rows.
    """

    rows: int
    examples: int
    tokens: int
    supervised: int
    pairs: Optional[int]
    prompts_cut: int
    answers_cut: int
    dropped: dict[str, int]

    def text(self, name: str) -> str:
        parts = [
            f"{name}: {self.examples:,} examples, {self.tokens:,} tokens, "
            f"{self.supervised:,} supervised ({self.supervised / self.tokens:.0%})"
        ]
        if self.pairs is not None:
            parts.append(f"{self.pairs / self.supervised:.1%} of them aligned with the teacher's tokens")
        if self.prompts_cut or self.answers_cut:
            parts.append(f"cut: {self.prompts_cut:,} prompts, {self.answers_cut:,} answers")
        if self.dropped:
            parts.append("dropped: " + ", ".join(f"{count:,} ({reason})" for reason, count in self.dropped.items()))
        return "; ".join(parts)


@dataclass
class EvaluationPrompt:
    """One prompt to be answered by generation.

    Attributes:
        text: as the student reads it.
        student_ids: its tokens.
        teacher_ids: the teacher's tokens of it; None when both share one tokenizer.
        references: accepted answers.
        checks: constraints that the answer should keep (`evaluation.constraints`); None where the row states none.
    """

    text: str
    student_ids: list[int]
    teacher_ids: Optional[list[int]]
    references: list[str]
    checks: Optional[list[dict[str, Any]]] = None


class TokenizedSet:
    """Tokenised examples, indexed by row; a thin view over an Arrow table that stays on disk."""

    def __init__(self, table, summary: Summary, distinct_teacher: bool) -> None:
        self.table, self.summary, self.distinct_teacher = table, summary, distinct_teacher

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> dict:
        return self.table[row]

    def prompt(self, row: int) -> EvaluationPrompt:
        fields = self.table[row]
        return EvaluationPrompt(
            text=fields["prompt_text"],
            student_ids=fields["student_prompt_ids"],
            teacher_ids=fields["teacher_prompt_ids"] if self.distinct_teacher else None,
            references=fields["references"],
        )

    @cached_property
    def lengths(self) -> list[int]:
        return self.table["num_tokens"][:]

    @cached_property
    def longer_lengths(self) -> list[int]:
        """Tokens of each example as that tokenizer reads it which makes more of them."""
        pairs = zip(self.lengths, self.table["num_teacher_tokens"][:], strict=True)
        return [max(student, teacher) for student, teacher in pairs]

    @cached_property
    def supervised(self) -> list[int]:
        return self.table["num_supervised"][:]

    @cached_property
    def pairs(self) -> list[int]:
        return self.table["num_pairs"][:]


def tokenize_rows(rows, encoding: Encoding, student, teacher, *, workers: int, name: str) -> TokenizedSet:
    """Tokenise rows with columns `prompt`, `response` and, optionally, `context`.

    Args:
        rows: a `datasets.Dataset`.
        encoding: templates, limits and what is supervised.
        student: the student's tokenizer.
        teacher: the teacher's tokenizer where it differs, else None.
        workers: processes; 0 chooses by the number of rows.
        name: of the data, for messages.

    Raises:
        ValueError: every row was dropped (with the reasons), or two tokenizers with `supervise: all`.
    """
    if teacher is not None and encoding.supervise == "all":
        raise ValueError(
            "data.supervise is 'all', but student and teacher have different tokenizers, and prompts are not aligned.\n"
            "  Set data.supervise: answers, or take a teacher with the student's tokenizer."
        )
    encoder = RowEncoder(encoding, student, teacher)
    encoder.prepare()
    encoded = map_cached(rows, encoder, [_FORMAT, asdict(encoding)], (student, teacher), workers=workers, name=name)
    status = encoded["status"][:]
    kept = encoded.select([row for row, reason in enumerate(status) if reason == "kept"])
    dropped = {reason: count for reason in _DROPPED if (count := status.count(reason))}
    if len(kept) == 0:
        raise ValueError(
            f"No usable example is left of the {len(rows)} rows of {name}: "
            + ", ".join(f"{count} dropped ({reason})" for reason, count in dropped.items())
            + f".\n  Limits: max_length {encoding.max_length}, max_prompt_length {encoding.max_prompt_length}. "
            "Raise them, fill the empty answers, or map other columns with data.columns."
        )
    summary = Summary(
        rows=len(rows),
        examples=len(kept),
        tokens=sum(kept["num_tokens"]),
        supervised=sum(kept["num_supervised"]),
        pairs=None if teacher is None else sum(kept["num_pairs"]),
        prompts_cut=sum(kept["prompt_cut"]),
        answers_cut=sum(kept["answer_cut"]),
        dropped=dropped,
    )
    return TokenizedSet(kept, summary, distinct_teacher=teacher is not None)


def map_cached(
    rows, encoder: Callable[[dict], dict], parts: list, tokenizers: tuple, *, workers: int, name: str, features=None
):
    """Encode every row, or find the result of an earlier call in the cache.

    Args:
        rows: a `datasets.Dataset`.
        encoder: from the fields of a row to those of the result; picklable.
        parts: what the result depends on beside rows and tokenizers, as JSON can hold it.
        tokenizers: those that the encoder uses; None is left out.
        workers: processes; 0 chooses by the number of rows.
        name: of the data, for the progress bar.
        features: types of the result's columns, `datasets.Features`; None infers them from the first rows.
    """
    folder = cache_folder() / "tokenized"
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = _fingerprint(rows, parts, tokenizers)
    processes = workers or min(os.cpu_count() or 1, len(rows) // _ROWS_PER_WORKER)
    try:
        return rows.map(
            encoder,
            remove_columns=rows.column_names,
            num_proc=processes if processes > 1 else None,
            new_fingerprint=fingerprint,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            features=features,
            desc=f"Tokenising {name}",
        )
    except UnicodeDecodeError as error:  # JSON is read without a look at its letters
        raise ValueError(
            f"{name} is not UTF-8 ({error}).\n  Convert it: iconv -f LATIN1 -t UTF-8 FILE (or whatever it is)."
        ) from error


def encode_prompt(tokenizer, rules: Encoding, prompt: str, context: str) -> tuple[str, list[int], bool]:
    """The text of a prompt, its tokens (the beginning-of-sequence token included), and whether it lost its beginning."""
    text = render_prompt(tokenizer, rules.template, prompt, context, rules.system)
    prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = begin_ids(tokenizer) if rules.begin == "auto" else []
    if prompt_ids[: len(begin)] == begin:
        prompt_ids = prompt_ids[len(begin) :]
    room = rules.max_prompt_length - len(begin)
    cut = len(prompt_ids) > room
    return text, begin + prompt_ids[max(len(prompt_ids) - room, 0) :], cut


class RowEncoder:
    """Turns one row into tokens, on both sides where tokenizers differ; picklable, so that workers can run it."""

    def __init__(self, encoding: Encoding, student, teacher) -> None:
        self.encoding, self.student, self.teacher = encoding, student, teacher
        self._spellings = self._nearest = None

    def prepare(self) -> None:
        """Leave in the cache what takes long, so that workers find it there."""
        if self.teacher is not None and self.encoding.alignment == "minimum_edit":
            nearest_tokens(token_spellings(self.student), token_spellings(self.teacher))

    def __call__(self, row: dict) -> dict:
        response = row["response"]
        references = [response] if isinstance(response, str) else list(response or [])
        answer = (references or [""])[0] or ""
        prompt, context = row["prompt"] or "", row.get("context") or ""
        student = self._side(self.student, prompt, context, answer)
        teacher = self._side(self.teacher, prompt, context, answer) if self.teacher is not None else _EMPTY_SIDE
        pairs = self._pairs(student, teacher)
        supervised = len(student.ids) - max(student.prompt, 1)
        return {
            "status": self._status(prompt, answer, student, teacher, supervised),
            "prompt_text": student.prompt_text,
            "references": references,
            "student_ids": student.ids,
            "student_prompt": student.prompt,
            "student_prompt_ids": student.prompt_ids,
            "teacher_ids": teacher.ids,
            "teacher_prompt": teacher.prompt,
            "teacher_prompt_ids": teacher.prompt_ids,
            **pairs,
            "num_tokens": len(student.ids),
            "num_teacher_tokens": len(teacher.ids),
            "num_supervised": max(supervised, 0),
            "num_pairs": _num_paired(pairs) if self.teacher is not None else max(supervised, 0),
            "prompt_cut": student.prompt_cut or teacher.prompt_cut,
            "answer_cut": student.answer_cut or teacher.answer_cut,
        }

    def _side(self, tokenizer, prompt: str, context: str, answer: str) -> _Side:
        rules = self.encoding
        text, prompt_ids, prompt_cut = encode_prompt(tokenizer, rules, prompt, context)
        answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = (prompt_ids + answer_ids)[: rules.max_length]
        return _Side(
            ids=ids,
            prompt=0 if rules.supervise == "all" else len(prompt_ids),
            prompt_ids=prompt_ids,
            prompt_text=text,
            prompt_cut=prompt_cut,
            answer_cut=len(ids) < len(prompt_ids) + len(answer_ids),
        )

    def _status(self, prompt: str, answer: str, student: _Side, teacher: _Side, supervised: int) -> str:
        if not answer.strip():
            return "empty answer"
        if not prompt.strip():
            return "empty prompt"
        if self.encoding.long_prompts == "drop" and (student.prompt_cut or teacher.prompt_cut):
            return "prompt too long"
        if self.encoding.long_answers == "drop" and (student.answer_cut or teacher.answer_cut):
            return "answer too long"
        return "kept" if supervised > 0 else "nothing to supervise"

    def _pairs(self, student: _Side, teacher: _Side) -> dict[str, list[int]]:
        """Columns of the paired tokens, as indices among each side's supervised ones."""
        if self.teacher is None:
            return {"pair_student": [], "pair_teacher": []}
        ours, theirs, rule = student.answer, teacher.answer, self.encoding.alignment
        if rule == "kth":
            places = list(range(min(len(ours), len(theirs))))
            return {"pair_student": places, "pair_teacher": places}
        if self._spellings is None:
            self._spellings = token_spellings(self.student), token_spellings(self.teacher)
        if rule == "groups":
            groups = group_answers(ours, theirs, *self._spellings)
            return dict(zip((*_PAIRS, *_PIECES), groups, strict=True))
        if rule == "minimum_edit":
            if self._nearest is None:
                self._nearest = nearest_tokens(*self._spellings).tolist()
            found = align_minimum_edit(student.inputs, teacher.inputs, *self._spellings, self._nearest)
        else:
            found = align_answers(ours, theirs, *self._spellings, rule=rule)
        return dict(zip(_PAIRS, found, strict=True))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_spellings": None, "_nearest": None}


@dataclass(frozen=True)
class _Side:
    """One example in the tokens of one model; `prompt` counts the tokens at the start that are not supervised."""

    ids: list[int]
    prompt: int
    prompt_ids: list[int]
    prompt_text: str
    prompt_cut: bool
    answer_cut: bool

    @property
    def answer(self) -> list[int]:
        """The tokens that are predicted."""
        return self.ids[self.prompt :]

    @property
    def inputs(self) -> list[int]:
        """The token before each of them."""
        return self.ids[self.prompt - 1 : -1]


_EMPTY_SIDE = _Side([], 0, [], "", False, False)


def _num_paired(pairs: dict[str, list[int]]) -> int:
    """Of the student's tokens, those in a pair or a group."""
    return sum(pairs["pieces_student"]) if "pieces_student" in pairs else len(pairs["pair_student"])


def begin_ids(tokenizer) -> list[int]:
    """What the tokenizer itself puts before a text, e.g. [bos] for Gemma and nothing for GPT-2."""
    if tokenizer.bos_token_id is None:
        return []
    return [tokenizer.bos_token_id] if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []


def _fingerprint(rows, parts: list, tokenizers: tuple) -> str:
    """Names the cached result by everything that it depends on."""
    parts = [rows._fingerprint, *parts]
    for tokenizer in tokenizers:
        if tokenizer is not None:
            parts.append([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map])
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
