"""Golden cases of exact token alignment, and what other golden cases need of the vocabularies that they store."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llm.data.token_alignment import align_answers, align_byte_spans, align_released
from lit_llm.data.vocabulary import (
    TokenSpellings,
    bytes_of,
    released_teacher_to_student_ids,
    shared_tokens,
    spellings_from_strings,
    teacher_to_student_ids,
)

_MARKERS = {"bytelevel": "Ġ", "sentencepiece": "▁"}


def check_eta_alignment(case: dict[str, Any], folder: Path) -> None:
    """Every stored pair list: `reference` (the released rule) and `byte_span` (ours).

    `newer_framework` would be the third implementation of the same author; the file says that it is stored only where
    it differs from `reference`, and it never does, so `reference` covers it.
    """
    stored = json.loads((folder / case["file"]).read_text(encoding="utf-8"))
    compared = 0
    for pair in stored["pairs"]:
        for row in pair["rows"]:
            assert "newer_framework" not in row
            student, teacher = (_tokens(stored, pair[side], row["string"]) for side in ("student", "teacher"))
            released = align_released(
                student["strings"], teacher["strings"], student_eos=student["eos"], teacher_eos=teacher["eos"]
            )
            spans = align_byte_spans(student["bytes"], teacher["bytes"], student_ended=True, teacher_ended=True)
            where = f"{pair['teacher']} -> {pair['student']}, {stored['strings'][row['string']]!r}"
            assert [released[1], released[0]] == row["reference"], where
            assert [spans[1], spans[0]] == row["byte_span"], where
            compared += 1
    assert compared == len(stored["pairs"]) * len(stored["strings"])


HANDLERS = {"eta_alignment": check_eta_alignment}


def stored_vocabularies(folder: Path, json_file: str) -> tuple[TokenSpellings, TokenSpellings]:
    """The student's and the teacher's vocabulary of a case that lists its token strings."""
    stored = json.loads((folder / json_file).read_text(encoding="utf-8"))
    return tuple(
        spellings_from_strings(
            stored[side]["tokens"],
            stored[side]["space_marker"],
            stored[side]["eos_id"],
            unk_id=stored[side].get("unk_id"),
        )
        for side in ("student", "teacher")
    )


def released_overlap(student: TokenSpellings, teacher: TokenSpellings, *, eos_by_role: bool) -> tuple[Tensor, Tensor]:
    """Shared tokens by string. Only the kind `simple_cross_tokenizer_kd` appends the pair of eos tokens."""
    student_K, teacher_K = shared_tokens(student, teacher, mode="string")
    if not eos_by_role or student.eos_id in student_K:
        return student_K, teacher_K
    return (
        torch.cat([student_K, torch.tensor([student.eos_id])]),
        torch.cat([teacher_K, torch.tensor([teacher.eos_id])]),
    )


def released_label_map(student: TokenSpellings, teacher: TokenSpellings, num_teacher_rows: int) -> Tensor:
    """(W,) student label of each teacher prediction in DSKD v2, -1 where it is ignored."""
    return released_teacher_to_student_ids(student, teacher, num_teacher_rows)


def newer_label_map(student: TokenSpellings, teacher: TokenSpellings, num_teacher_rows: int) -> Tensor:
    """(W,) student label of each teacher prediction in the newer framework, -1 where there is none."""
    return teacher_to_student_ids(student, teacher, "string", num_teacher_rows)


def released_pairs(
    student_labels: Sequence[int], teacher_labels: Sequence[int], student: TokenSpellings, teacher: TokenSpellings
) -> tuple[list[int], list[int]]:
    """Aligned indices among the labelled tokens of one sample (or of a flattened batch) by the released rule."""
    return align_answers(student_labels, teacher_labels, student, teacher, rule="released")


def newer_pairs(
    student_labels: Sequence[int], teacher_labels: Sequence[int], student: TokenSpellings, teacher: TokenSpellings
) -> tuple[list[int], list[int]]:
    """Aligned indices as in the newer framework: the rule walks on across samples, for both eos read as one string.

    `lit_llm` aligns each sample by itself, so this exists for the golden cases only.
    """
    sides = ((student_labels, student), (teacher_labels, teacher))
    strings = [["<eos>" if i == side.eos_id else side.strings[i] for i in labels] for labels, side in sides]
    return align_released(*strings, student_eos="<eos>", teacher_eos="<eos>")


def released_pairs_of_batch(
    student_labels_BL: Tensor, teacher_labels_BL: Tensor, student: TokenSpellings, teacher: TokenSpellings
) -> Tensor:
    """(A, 3) rows (sample, teacher position, student position) as stored under `aligned_pairs`; -100 is unlabelled."""
    rows = []
    for sample, (student_L, teacher_L) in enumerate(zip(student_labels_BL, teacher_labels_BL, strict=True)):
        student_at, teacher_at = (labels.ne(-100).nonzero()[:, 0] for labels in (student_L, teacher_L))
        pairs = released_pairs(student_L[student_at].tolist(), teacher_L[teacher_at].tolist(), student, teacher)
        rows += [[sample, int(teacher_at[j]), int(student_at[i])] for i, j in zip(*pairs, strict=True)]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def _tokens(stored: dict[str, Any], name: str, string: int) -> dict[str, Any]:
    sequence, tokenizer = stored["sequences"][name][string], stored["tokenizers"][name]
    assert sequence["ids"][-1] == tokenizer["eos_id"]
    marker = _MARKERS[tokenizer["style"]]
    return {
        "strings": sequence["tokens"],
        "bytes": [bytes_of(token, marker) for token in sequence["tokens"][:-1]] + [None],
        "eos": tokenizer["eos_token"],
    }
