"""Tokenising and aligning the shipped demonstration data, on one core: examples and tokens per second."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

from benchmarks.reference_code import load_module
from lit_llm.data.rows import load_rows
from lit_llm.data.token_alignment import align_answers, token_spellings
from lit_llm.data.tokenized import Encoding, RowEncoder
from lit_llm.models.sources import load_tokenizer


def measure(given: argparse.Namespace) -> list[dict]:
    """Rows of the suite, in turns.

    Raises:
        SystemExit: no tokenizers were named.
    """
    if not given.tokenizers:
        raise SystemExit("The suite `data` needs --tokenizers STUDENT TEACHER: folders, hub ids or package:NAME.")
    student, teacher = (load_tokenizer(source) for source in given.tokenizers)
    rows = list(load_rows("demo:train", {}, ("prompt", "response")))
    answers = [row["response"] if isinstance(row["response"], str) else row["response"][0] for row in rows]
    ours, theirs = (tokenizer(answers, add_special_tokens=False)["input_ids"] for tokenizer in (student, teacher))
    pairs = list(zip(ours, theirs, strict=True))
    seconds: dict[str, list[float]] = {}
    contenders = _contenders(given, student, teacher, rows, answers, pairs)
    for turn in range(1 + given.steps):  # the first warms up
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            if turn:
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    tokens = sum(map(len, ours)) + sum(map(len, theirs))
    return [
        {
            "work": name,
            "examples/s": len(rows) / statistics.median(found),
            "tokens of both sides/s": tokens / statistics.median(found),
        }
        for name, found in seconds.items()
    ]


def _contenders(given, student, teacher, rows, answers, pairs) -> dict[str, Callable[[], object]]:
    encoding = Encoding("plain", None, "never", "answers", 512, 256, "keep_end", "cut", "bytes")
    encoder = RowEncoder(encoding, student, teacher)
    spellings = token_spellings(student), token_spellings(teacher)
    found = {
        "both tokenizers alone, text by text": lambda: [(student(text), teacher(text)) for text in answers],
        "lit_llm: template, tokens of both sides, pairs": lambda: [encoder(row) for row in rows],
        "lit_llm: pairs by bytes": lambda: [align_answers(a, b, *spellings) for a, b in pairs],
        "lit_llm: pairs by the released rule": lambda: [
            align_answers(a, b, *spellings, rule="released") for a, b in pairs
        ],
    }
    if given.kdflow:
        align = load_module(given.kdflow, "kdflow.algorithms.dskd").DSKD._align_sequences
        authors = SimpleNamespace(teacher_tokenizer=teacher, student_tokenizer=student)
        texts = [(teacher.convert_ids_to_tokens(b), student.convert_ids_to_tokens(a)) for a, b in pairs]
        found["KDFlow code: pairs"] = lambda: [align(authors, theirs, ours) for theirs, ours in texts]
    return found
