"""Alignment by minimum edit distance (MinED): dynamic time warping over token strings, and nearest tokens.

As in the baseline that the authors of DSKD compare with (arXiv 2406.17328; from FuseLLM,
arXiv 2401.10491): two sequences of token strings are warped onto each other with the edit distance as the cost, and a
teacher's logit belongs to the student's token with the nearest spelling. The authors ship a table of nearest tokens
with their data; we compute it.

Shapes: V student tokens, W rows of the teacher's head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO

import numpy as np
import torch
from torch import Tensor

from lit_llm.data.vocabulary import TokenSpellings, with_one_marker, without_markers
from lit_llm.storage import cache_folder, write_atomically


def align_minimum_edit(
    student_ids: Sequence[int],
    teacher_ids: Sequence[int],
    student: TokenSpellings,
    teacher: TokenSpellings,
    nearest_W: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Pair a student's token with a teacher's if warping maps just that one to it and it is its nearest token.

    Args:
        student_ids: the *input* tokens at the supervised positions of one example.
        teacher_ids: likewise the teacher's.
        nearest_W: the student's token for each teacher token, see `nearest_tokens`.

    Returns:
        Indices into `student_ids`, strictly increasing, and into `teacher_ids`, not decreasing.
    """
    warped = warp([student.strings[i] for i in student_ids], [teacher.strings[i] for i in teacher_ids])
    pairs = [
        (position, matches[0])
        for position, matches in enumerate(warped)
        if len(matches) == 1 and int(nearest_W[teacher_ids[matches[0]]]) == student_ids[position]
    ]
    return [i for i, _ in pairs], [j for _, j in pairs]


def warp(student_tokens: Sequence[str], teacher_tokens: Sequence[str]) -> list[list[int]]:
    """Dynamic time warping with the edit distance of the strings without space markers as the cost.

    On ties the way back prefers the diagonal, then a step of the teacher, then one of the student, as released.

    Returns:
        For each student token the teacher positions that it meets, ascending.
    """
    student, teacher = list(map(without_markers, student_tokens)), list(map(without_markers, teacher_tokens))
    if not student or not teacher:
        return [[] for _ in student]
    total = [[0.0] + [np.inf] * len(student)]
    for teacher_token in teacher:
        above, row = total[-1], [np.inf]
        for i, student_token in enumerate(student):
            row.append(edit_distance(teacher_token, student_token) + min(above[i + 1], row[i], above[i]))
        total.append(row)

    matches: list[list[int]] = [[] for _ in student]
    i, j = len(student), len(teacher)
    while i > 0 and j > 0:
        matches[i - 1].append(j - 1)
        diagonal, teacher_step, student_step = total[j - 1][i - 1], total[j - 1][i], total[j][i - 1]
        if diagonal <= min(teacher_step, student_step):
            i, j = i - 1, j - 1
        elif teacher_step <= student_step:
            j -= 1
        else:
            i -= 1
    return [found[::-1] for found in matches]


@lru_cache(maxsize=1 << 20)
def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions that turn one string into the other (Levenshtein)."""
    if a == b:
        return 0
    row = list(range(len(b) + 1))
    for i, character in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (character != other))
    return row[-1]


def nearest_tokens(student: TokenSpellings, teacher: TokenSpellings, num_teacher_rows: int | None = None) -> Tensor:
    """The student's token with the smallest edit distance to each teacher token, both kinds of space marker alike.

    On ties the lower id; eos is mapped to eos. Slow for real vocabularies (minutes), but only once: the table is kept
    in the cache folder.

    Args:
        num_teacher_rows: rows of the teacher's head (W); default: the tokenizer's length.

    Returns:
        (W,) int64, -1 for rows without a token.
    """
    num_rows = num_teacher_rows or len(teacher)
    key = json.dumps([student.strings, teacher.strings, student.eos_id, teacher.eos_id])
    path = cache_folder() / "nearest_tokens" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    if not path.exists():
        buffer = BytesIO()
        np.save(buffer, _nearest(student, teacher))
        write_atomically(path, buffer.getvalue())
    found = torch.from_numpy(np.load(path))[:num_rows]
    return torch.cat([found, torch.full((num_rows - len(found),), -1)])


def first_teacher_ids(nearest_W: Tensor, num_student_rows: int) -> Tensor:
    """For each student token the lowest teacher id whose nearest token it is.

    Args:
        nearest_W: (W,) as from `nearest_tokens`.
        num_student_rows: rows of the student's head (V).

    Returns:
        (V,) int64, -1 where no teacher token maps.
    """
    first_V = torch.full((num_student_rows,), -1)
    for teacher_id in reversed(range(len(nearest_W))):
        if nearest_W[teacher_id] >= 0:
            first_V[nearest_W[teacher_id]] = teacher_id
    return first_V


def _nearest(student: TokenSpellings, teacher: TokenSpellings) -> np.ndarray:
    index = _SpellingIndex(student)
    nearest = np.full(len(teacher), -1, dtype=np.int64)
    for i, string in enumerate(teacher.strings):
        if string:
            nearest[i] = index.nearest(string)
    nearest[teacher.eos_id] = student.eos_id
    return nearest


class _SpellingIndex:
    """The tokens of a vocabulary for look-ups by edit distance.

    Two strings of m and n characters, c of them in common, are at least max(m, n) - c apart. Only tokens for which this
    bound does not exceed the best distance are compared, those of one length in a few array operations.
    """

    def __init__(self, vocabulary: TokenSpellings) -> None:
        self._exact: dict[str, int] = {}
        for i, string in enumerate(vocabulary.strings):
            if string and i != vocabulary.eos_id:
                self._exact.setdefault(with_one_marker(string), i)
        self._ids = np.array(list(self._exact.values()))
        self._lengths = np.array([len(spelling) for spelling in self._exact], dtype=np.int16)
        self._codes = np.zeros((len(self._ids), int(self._lengths.max())), dtype=np.int32)
        with_character: dict[tuple[str, int], list[int]] = {}
        for row, spelling in enumerate(self._exact):
            self._codes[row, : len(spelling)] = [ord(character) for character in spelling]
            for occurrence in _occurrences(spelling):
                with_character.setdefault(occurrence, []).append(row)
        self._with_character = {occurrence: np.array(rows) for occurrence, rows in with_character.items()}

    def nearest(self, string: str) -> int:
        spelling = with_one_marker(string)
        if spelling in self._exact:
            return self._exact[spelling]
        common = np.zeros_like(self._lengths)
        for occurrence in _occurrences(spelling):
            common[self._with_character.get(occurrence, [])] += 1
        bound = np.maximum(self._lengths, len(spelling)) - common
        pattern, best, level = [ord(character) for character in spelling], (len(spelling) + len(self._codes[0]), -1), 0
        while level <= best[0]:
            rows = np.flatnonzero(bound == level)
            for length in np.unique(self._lengths[rows]):
                alike = rows[self._lengths[rows] == length]
                distance = _edit_distances(pattern, self._codes[alike, :length].T)
                closest = int(distance.min())
                best = min(best, (closest, int(self._ids[alike][distance == closest].min())))
            level += 1
        return best[1]


def _occurrences(spelling: str) -> list[tuple[str, int]]:
    """Its characters, numbered where they repeat."""
    return [(character, spelling[:i].count(character)) for i, character in enumerate(spelling)]


def _edit_distances(pattern: list[int], codes: np.ndarray) -> np.ndarray:
    """Edit distances of one string to many of one length, a row of the usual table for all of them at once."""
    length, tokens = codes.shape
    steps = np.arange(length + 1, dtype=np.int16)[:, None]
    row = np.broadcast_to(steps, (length + 1, tokens)).copy()
    for i, code in enumerate(pattern, 1):
        following = np.empty_like(row)
        following[0] = i
        np.minimum(row[1:] + 1, row[:-1] + (codes != code), out=following[1:])
        # insertions: the minimum over all earlier columns plus one per column in between
        row = np.minimum.accumulate(following - steps, axis=0) + steps
    return row[-1]
