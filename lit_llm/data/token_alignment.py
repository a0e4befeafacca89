"""Which tokens of two tokenizations of one text cover the same stretch of it: exact token alignment (ETA).

The labels at aligned positions continue equal prefixes of the text, so both models answer the same question there
(DSKD v2, arXiv 2504.11426). The default compares byte spans. The released rule compares token strings without their
space markers; it loses everything after the first newline or accent between byte-level and SentencePiece tokenizers
and mispairs runs of spaces. It is kept for reproduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np

from lit_llm.data.vocabulary import (
    TokenSpellings,
    spellings_from_strings,
    token_bytes,
    token_spellings,
    without_markers,
)

__all__ = [
    "Groups",
    "TokenSpellings",
    "align_answers",
    "align_byte_groups",
    "align_byte_spans",
    "align_released",
    "group_answers",
    "spellings_from_strings",
    "token_bytes",
    "token_spellings",
]


def align_answers(
    student_ids: Sequence[int],
    teacher_ids: Sequence[int],
    student: TokenSpellings,
    teacher: TokenSpellings,
    rule: Literal["bytes", "released"] = "bytes",
) -> tuple[list[int], list[int]]:
    """Align the supervised tokens of one example.

    Args:
        student_ids: the student's tokens of the answer, with the end-of-sequence token where the answer is complete.
        teacher_ids: likewise the teacher's.
        rule: `bytes` for `align_byte_spans`, `released` for `align_released`.

    Returns:
        Indices into `student_ids` and into `teacher_ids`, of equal length, both strictly increasing.
    """
    if rule == "released":
        return align_released(
            [student.strings[i] for i in student_ids],
            [teacher.strings[i] for i in teacher_ids],
            student_eos=student.strings[student.eos_id],
            teacher_eos=teacher.strings[teacher.eos_id],
        )
    return align_byte_spans(
        [student.bytes[i] for i in student_ids],
        [teacher.bytes[i] for i in teacher_ids],
        student_ended=_ends(student_ids, student),
        teacher_ended=_ends(teacher_ids, teacher),
    )


class Groups(NamedTuple):
    """Runs of tokens that cover the same bytes on both sides, in the order of the text.

    Attributes:
        student: the first token of each run among the student's.
        teacher: likewise among the teacher's.
        student_pieces: how many of the student's tokens make up each run.
        teacher_pieces: likewise of the teacher's.
    """

    student: list[int]
    teacher: list[int]
    student_pieces: list[int]
    teacher_pieces: list[int]


def group_answers(
    student_ids: Sequence[int], teacher_ids: Sequence[int], student: TokenSpellings, teacher: TokenSpellings
) -> Groups:
    """Group the supervised tokens of one example by `align_byte_groups`; arguments as in `align_answers`."""
    return align_byte_groups(
        [student.bytes[i] for i in student_ids],
        [teacher.bytes[i] for i in teacher_ids],
        student_ended=_ends(student_ids, student),
        teacher_ended=_ends(teacher_ids, teacher),
    )


def align_byte_spans(
    student_tokens: Sequence[bytes | None],
    teacher_tokens: Sequence[bytes | None],
    *,
    student_ended: bool,
    teacher_ended: bool,
) -> tuple[list[int], list[int]]:
    """Pair the tokens that cover the same, non-empty span of the bytes that both sequences have in common.

    Surplus spaces at the start of one side, which SentencePiece adds, are cut off first. Only the common prefix of the
    two byte strings counts. The two end-of-sequence tokens are paired iff the byte strings are identical. Linear in the
    number of tokens and bytes.

    Args:
        student_tokens: the bytes of each token. None stands for a special token, i.e. for unknown bytes: nothing after
            it is paired, except that a final end-of-sequence token stands for no bytes at all.
        teacher_tokens: likewise.
        student_ended: whether the student's last token is the end of the sequence.
        teacher_ended: likewise.

    Returns:
        Indices into the student's and into the teacher's tokens, both strictly increasing.
    """
    text = _common_text(student_tokens, teacher_tokens, student_ended, teacher_ended)
    teacher_index = {span: j for j, span in enumerate(_spans(text.teacher_ends)) if span[0] < span[1] <= text.common}
    pairs = [(i, teacher_index[span]) for i, span in enumerate(_spans(text.student_ends)) if span in teacher_index]
    if text.both_end:
        pairs.append((len(student_tokens) - 1, len(teacher_tokens) - 1))
    return [i for i, _ in pairs], [j for _, j in pairs]


def align_byte_groups(
    student_tokens: Sequence[bytes | None],
    teacher_tokens: Sequence[bytes | None],
    *,
    student_ended: bool,
    teacher_ended: bool,
) -> Groups:
    """Cut both sequences wherever a token of each ends at the same byte, as TRL's GOLD does.

    Surplus spaces, special tokens, different texts and the two ends are treated as in `align_byte_spans`, whose pairs
    are the runs of one token on each side. Tokens behind the last common boundary belong to no run. Linear in the number of
    tokens and bytes; arguments as in `align_byte_spans`.
    """
    text = _common_text(student_tokens, teacher_tokens, student_ended, teacher_ended)
    groups = Groups([], [], [], [])
    i = j = first_i = first_j = boundary = 0
    while i < len(text.student_ends) and j < len(text.teacher_ends):
        student_end, teacher_end = text.student_ends[i], text.teacher_ends[j]
        if min(student_end, teacher_end) > text.common:
            break
        i += student_end <= teacher_end
        j += teacher_end <= student_end
        # a token without bytes of its own, such as a dummy space, begins the next run
        if student_end == teacher_end > boundary:
            _add(groups, first_i, first_j, i - first_i, j - first_j)
            first_i, first_j, boundary = i, j, student_end
    if text.both_end:
        _add(groups, len(student_tokens) - 1, len(teacher_tokens) - 1, 1, 1)
    return groups


def align_released(
    student_tokens: Sequence[str], teacher_tokens: Sequence[str], *, student_eos: str, teacher_eos: str
) -> tuple[list[int], list[int]]:
    """The released rule of DSKD v2: two pointers and the two texts read so far, without any space marker.

    A pair is recorded where both texts are equal and the tokens are equal, or both the end of the sequence. Otherwise
    the side with the shorter text moves on, or both. The same pairs as released in linear time: of the two texts only
    the part by which one is ahead is kept, and whether they have ever differed.

    Args:
        student_tokens: the vocabulary's strings of the tokens, end of sequence included.
        teacher_tokens: likewise.
        student_eos: the string of the student's end-of-sequence token.
        teacher_eos: likewise.

    Returns:
        Indices into the student's and into the teacher's tokens, both strictly increasing.
    """
    student = [without_markers(token) for token in student_tokens]
    teacher = [without_markers(token) for token in teacher_tokens]
    ends = (without_markers(student_eos), without_markers(teacher_eos))
    race, pairs, i, j = _Race(), [], 0, 0
    while i < len(student) and j < len(teacher):
        lead = race.lead
        if lead == 0 and not race.diverged and (student[i] == teacher[j] or (student[i], teacher[j]) == ends):
            pairs.append((i, j))
        if lead <= 0:
            race.extend(student[i], side=1)
            i += 1
        if lead >= 0:
            race.extend(teacher[j], side=-1)
            j += 1
    return [i for i, _ in pairs], [j for _, j in pairs]


class _Race:
    """Two growing texts: by how many characters the student's is ahead, and by which."""

    def __init__(self) -> None:
        self.lead, self.diverged, self._ahead = 0, False, ""

    def extend(self, piece: str, side: Literal[1, -1]) -> None:
        """Append to the text of the student (1) or of the teacher (-1)."""
        if self.diverged:
            pass
        elif self.lead * side >= 0:
            self._ahead += piece
        elif self._ahead.startswith(piece):
            self._ahead = self._ahead[len(piece) :]
        elif piece.startswith(self._ahead):
            self._ahead = piece[len(self._ahead) :]
        else:
            self.diverged = True
        self.lead += side * len(piece)


def _text_of(tokens: Sequence[bytes | None], ended: bool) -> tuple[list[bytes], bool]:
    """The tokens up to the first one of unknown bytes, and whether that is all there is before the end."""
    body = list(tokens[:-1] if ended else tokens)
    if None not in body:
        return body, True
    return body[: body.index(None)], False


def _leading_spaces(text: bytes) -> int:
    return len(text) - len(text.lstrip(b" "))


def _common_prefix(a: bytes, b: bytes) -> int:
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return int(np.argmax(np.frombuffer(a, np.uint8, length) != np.frombuffer(b, np.uint8, length)))


class _CommonText(NamedTuple):
    """Where the tokens of both sides end, in bytes after the surplus spaces; the length of the common prefix; and
    whether both sequences end after one and the same text.
    """

    student_ends: list[int]
    teacher_ends: list[int]
    common: int
    both_end: bool


def _common_text(student_tokens, teacher_tokens, student_ended: bool, teacher_ended: bool) -> _CommonText:
    student, student_known = _text_of(student_tokens, student_ended)
    teacher, teacher_known = _text_of(teacher_tokens, teacher_ended)
    student_text, teacher_text = b"".join(student), b"".join(teacher)
    surplus = _leading_spaces(student_text) - _leading_spaces(teacher_text)
    student_cut, teacher_cut = max(surplus, 0), max(-surplus, 0)
    student_text, teacher_text = student_text[student_cut:], teacher_text[teacher_cut:]
    ended, known = student_ended and teacher_ended, student_known and teacher_known
    return _CommonText(
        student_ends=[max(end - student_cut, 0) for end in accumulate(map(len, student))],
        teacher_ends=[max(end - teacher_cut, 0) for end in accumulate(map(len, teacher))],
        common=_common_prefix(student_text, teacher_text),
        both_end=ended and known and student_text == teacher_text,
    )


def _spans(ends: list[int]) -> zip[tuple[int, int]]:
    """Half-open byte spans of tokens that end at `ends`."""
    return zip([0, *ends], ends)


def _add(groups: Groups, *values: int) -> None:
    for column, value in zip(groups, values, strict=True):
        column.append(value)


def _ends(ids: Sequence[int], spellings: TokenSpellings) -> bool:
    return len(ids) > 0 and ids[-1] == spellings.eos_id
