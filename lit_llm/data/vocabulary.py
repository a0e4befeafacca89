"""What the tokens of a vocabulary stand for, and which tokens two vocabularies share.

Shared tokens serve the closed-form projectors of DSKD v2 (arXiv 2504.11426) and turn a teacher's prediction into a
token of the student. The authors compare token strings; we compare bytes by default, which also finds newlines,
accents and other scripts, and order by student id, where theirs follows the random order of a dictionary.

Shapes: K shared tokens, W rows of the teacher's head.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTE_LEVEL_MARKER = "Ġ"
SENTENCEPIECE_MARKER = "▁"


@dataclass(frozen=True)
class TokenSpellings:
    """Every token of one vocabulary, as a string and as the bytes of text that it stands for; cheap to pickle.

    Attributes:
        strings: the vocabulary's own string of each id; "" for ids that are not in use.
        bytes: what each id adds to a text; None for special tokens and ids not in use.
        eos_id: end of sequence.
        bos_id: begin of sequence, if there is one.
        pad_id: padding, if there is one.
        unk_id: stands for unknown text, if there is one.
    """

    strings: tuple[str, ...]
    bytes: tuple[bytes | None, ...]
    eos_id: int
    bos_id: int | None = None
    pad_id: int | None = None
    unk_id: int | None = None

    def __len__(self) -> int:
        return len(self.strings)


def token_spellings(tokenizer: PreTrainedTokenizerFast) -> TokenSpellings:
    """Read the spellings from a fast Hugging Face tokenizer, byte-level BPE or SentencePiece style.

    Raises:
        ValueError: the tokenizer has no eos token, is not a fast one, or is of neither kind (e.g. WordPiece).
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer; token bytes are read from the fast one's tokenizer.json.\n"
            "  Load it with transformers.PreTrainedTokenizerFast, or save the model's folder with a tokenizer.json."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{tokenizer.name_or_path or type(tokenizer).__name__} has no end-of-sequence token.\n"
            "  Set `eos_token` in its tokenizer_config.json."
        )
    to_bytes = _decoder_of(json.loads(tokenizer.backend_tokenizer.to_str()), tokenizer.name_or_path)
    ids = tokenizer.get_vocab()
    strings = [""] * (max(ids.values()) + 1)
    for string, token_id in ids.items():
        strings[token_id] = string
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return TokenSpellings(
        strings=tuple(strings),
        bytes=tuple(to_bytes(s) if s and i not in special else None for i, s in enumerate(strings)),
        eos_id=tokenizer.eos_token_id,
        bos_id=tokenizer.bos_token_id,
        pad_id=tokenizer.pad_token_id,
        unk_id=tokenizer.unk_token_id,
    )


def spellings_from_strings(
    strings: Sequence[str],
    space_marker: Literal["Ġ", "▁"],
    eos_id: int,
    *,
    bos_id: int | None = None,
    pad_id: int | None = None,
    unk_id: int | None = None,
) -> TokenSpellings:
    """The same from a plain list of token strings by id; `space_marker` tells byte-level BPE from SentencePiece."""
    special = {eos_id, bos_id, pad_id, unk_id}
    return TokenSpellings(
        strings=tuple(strings),
        bytes=tuple(None if i in special else bytes_of(s, space_marker) for i, s in enumerate(strings)),
        eos_id=eos_id,
        bos_id=bos_id,
        pad_id=pad_id,
        unk_id=unk_id,
    )


def token_bytes(tokenizer: PreTrainedTokenizerFast) -> list[bytes | None]:
    """The bytes of text behind every token id; None for special tokens."""
    return list(token_spellings(tokenizer).bytes)


def bytes_of(string: str, space_marker: Literal["Ġ", "▁"]) -> bytes:
    """The bytes behind the string of one ordinary token, byte-level (`Ġ`) or SentencePiece style (`▁`)."""
    if space_marker == BYTE_LEVEL_MARKER:
        return _ByteLevel()(string)
    return _SentencePiece(space_marker, byte_fallback=True)(string)


def shared_tokens(
    student: PreTrainedTokenizerFast | TokenSpellings,
    teacher: PreTrainedTokenizerFast | TokenSpellings,
    mode: Literal["bytes", "string"] = "bytes",
) -> tuple[Tensor, Tensor]:
    """Tokens that both vocabularies have, in the order of the student's ids.

    Args:
        mode: `bytes` compares the text behind the tokens and pairs eos, bos and pad by their role. Where several ids
            stand for the same bytes, those with equal strings are paired; if there are none, one token of each side.
            `string` compares strings with `Ġ` read as `▁`, special tokens included, as released.

    Returns:
        (K,) ids of the student, ascending, and (K,) ids of the teacher, int64.

    Raises:
        ValueError: nothing is shared.
    """
    student, teacher = _spellings(student), _spellings(teacher)
    pairs = _pairs_by_string(student, teacher) if mode == "string" else _pairs_by_bytes(student, teacher)
    if not pairs:
        raise ValueError(
            f"The student's {len(student)} tokens and the teacher's {len(teacher)} have none in common by {mode}.\n"
            "  Check that both tokenizers belong to their models."
        )
    ids_K2 = torch.tensor(sorted(pairs), dtype=torch.int64)
    return ids_K2[:, 0].clone(), ids_K2[:, 1].clone()


def teacher_to_student_ids(
    student: PreTrainedTokenizerFast | TokenSpellings,
    teacher: PreTrainedTokenizerFast | TokenSpellings,
    mode: Literal["bytes", "string"] = "bytes",
    num_teacher_rows: int | None = None,
) -> Tensor:
    """The student's token for each row of the teacher's head, -1 where there is none.

    Several teacher tokens may have the same counterpart. eos, bos and pad are mapped by their role in both modes.

    Args:
        num_teacher_rows: rows of the teacher's head (W), padding included; default: the tokenizer's length.

    Returns:
        (W,) int64.
    """
    student, teacher = _spellings(student), _spellings(teacher)
    if mode == "string":
        found = {teacher_id: student_id for student_id, teacher_id in _pairs_by_string(student, teacher)}
    else:
        found = _counterparts(teacher, student)
    by_role = _pairs_by_role(student, teacher)
    for role_id in _role_ids(teacher):
        found.pop(role_id, None)
    found |= {teacher_id: student_id for student_id, teacher_id in by_role}
    return _table(found, num_teacher_rows or len(teacher))


def released_teacher_to_student_ids(
    student: PreTrainedTokenizerFast | TokenSpellings,
    teacher: PreTrainedTokenizerFast | TokenSpellings,
    num_teacher_rows: int | None = None,
) -> Tensor:
    """The map of the released DSKD v2: the teacher's raw string looked up among the student's, eos mapped to eos.

    What is unknown becomes the student's unk token, which for GPT-2 is the end of the text, or -1 without one.

    Returns:
        (W,) int64.
    """
    student, teacher = _spellings(student), _spellings(teacher)
    student_ids = {string: i for i, string in enumerate(student.strings) if string}
    unknown = -1 if student.unk_id is None else student.unk_id
    found = {i: student_ids.get(string, unknown) for i, string in enumerate(teacher.strings)}
    found[teacher.eos_id] = student.eos_id
    return _table(found, num_teacher_rows or len(teacher))


class _ByteLevel:
    """Byte-level BPE writes each byte as one printable character; a token with any other character is plain text."""

    def __init__(self) -> None:
        self._byte_of = _byte_level_table()

    def __call__(self, string: str) -> bytes:
        try:
            return bytes([self._byte_of[character] for character in string])
        except KeyError:
            return string.encode()


class _SentencePiece:
    """SentencePiece writes a space as a marker and a byte that has no token of its own as `<0xNN>`."""

    def __init__(self, marker: str, byte_fallback: bool) -> None:
        self._marker, self._byte_fallback = marker, byte_fallback

    def __call__(self, string: str) -> bytes:
        if self._byte_fallback and is_byte_fallback(string):
            return bytes([int(string[3:5], 16)])
        return string.replace(self._marker, " ").encode()


def is_byte_fallback(string: str) -> bool:
    """Whether a token string has the form `<0xNN>`."""
    if len(string) != 6 or not string.startswith("<0x") or string[5] != ">":
        return False
    return all(character in "0123456789ABCDEFabcdef" for character in string[3:5])


def without_markers(string: str) -> str:
    """A token string without any space marker of either kind, as the released code compares them."""
    return string.replace(SENTENCEPIECE_MARKER, "").replace(BYTE_LEVEL_MARKER, "")


def with_one_marker(string: str) -> str:
    """A token string with `▁` for either kind of space marker."""
    return string.replace(BYTE_LEVEL_MARKER, SENTENCEPIECE_MARKER)


def _byte_level_table() -> dict[str, int]:
    """GPT-2's table from characters to bytes: printable ones stand for themselves, the rest are moved up by 256."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _decoder_of(tokenizer: dict, name: str) -> _ByteLevel | _SentencePiece:
    parts = [*_parts(tokenizer["pre_tokenizer"]), *_parts(tokenizer["decoder"])]
    if any(part["type"] == "ByteLevel" for part in parts):
        return _ByteLevel()
    markers = {part["replacement"] for part in parts if part["type"] == "Metaspace"}
    markers |= {p["pattern"].get("String") for p in parts if p["type"] == "Replace" and p["content"] == " "}
    if tokenizer["model"]["type"] in ("BPE", "Unigram") and len(markers) == 1:
        fallback = tokenizer["model"].get("byte_fallback") or any(part["type"] == "ByteFallback" for part in parts)
        return _SentencePiece(markers.pop(), byte_fallback=bool(fallback))
    raise ValueError(
        f"Cannot tell which bytes the tokens of {name or 'this tokenizer'} stand for: it is neither byte-level BPE (a "
        f"ByteLevel part) nor SentencePiece style (a Metaspace part, or a Replace into spaces).\n"
        f"  Its model is {tokenizer['model']['type']} with the parts {sorted({part['type'] for part in parts})}.\n"
        "  Use a student and a teacher that share one tokenizer, or another teacher."
    )


def _parts(node: dict | None) -> Iterator[dict]:
    """A component of a tokenizer, or those inside a sequence of them."""
    if node is None:
        return
    yield node
    for child in [*node.get("pretokenizers", ()), *node.get("decoders", ())]:
        yield from _parts(child)


def _spellings(side: PreTrainedTokenizerFast | TokenSpellings) -> TokenSpellings:
    return side if isinstance(side, TokenSpellings) else token_spellings(side)


def _ids_by_string(side: TokenSpellings) -> dict[str, int]:
    """Ids by string with one marker for spaces; a token that needs no rewriting goes first, then the lower id."""
    ids: dict[str, int] = {}
    for rewritten in (False, True):
        for i, string in enumerate(side.strings):
            if string and (BYTE_LEVEL_MARKER in string) == rewritten:
                ids.setdefault(with_one_marker(string), i)
    return ids


def _pairs_by_string(student: TokenSpellings, teacher: TokenSpellings) -> list[tuple[int, int]]:
    student_ids, teacher_ids = _ids_by_string(student), _ids_by_string(teacher)
    return [(i, teacher_ids[string]) for string, i in student_ids.items() if string in teacher_ids]


def _pairs_by_bytes(student: TokenSpellings, teacher: TokenSpellings) -> list[tuple[int, int]]:
    """Mutual counterparts, one to one, then the special tokens by role."""
    to_student, to_teacher = _counterparts(teacher, student), _counterparts(student, teacher)
    pairs = [(s, t) for s, t in to_teacher.items() if to_student[t] == s]
    return pairs + _pairs_by_role(student, teacher)


def _counterparts(source: TokenSpellings, target: TokenSpellings) -> dict[int, int]:
    """For each id of `source` the id of `target` with the same bytes: of the same string if there is one, else the
    one that is not a byte fall-back (those are never produced where another token exists), else the lowest.
    """
    same: dict[tuple[bytes, str], int] = {}
    best: dict[bytes, int] = {}
    for fallback in (False, True):
        for i, (string, content) in enumerate(zip(target.strings, target.bytes, strict=True)):
            if content and is_byte_fallback(string) == fallback:
                same.setdefault((content, with_one_marker(string)), i)
                best.setdefault(content, i)
    found = {}
    for i, (string, content) in enumerate(zip(source.strings, source.bytes, strict=True)):
        if content and content in best:
            found[i] = same.get((content, with_one_marker(string)), best[content])
    return found


def _role_ids(side: TokenSpellings) -> tuple[int, ...]:
    return tuple(i for i in (side.eos_id, side.bos_id, side.pad_id) if i is not None)


def _pairs_by_role(student: TokenSpellings, teacher: TokenSpellings) -> list[tuple[int, int]]:
    """eos with eos, bos with bos, pad with pad; a token that already has a partner (GPT-2's only one) keeps it."""
    pairs: list[tuple[int, int]] = []
    for role in ("eos_id", "bos_id", "pad_id"):
        s, t = getattr(student, role), getattr(teacher, role)
        if s is None or t is None or any(s == pair[0] or t == pair[1] for pair in pairs):
            continue
        pairs.append((s, t))
    return pairs


def _table(found: dict[int, int], num_rows: int) -> Tensor:
    return torch.tensor([found.get(i, -1) for i in range(num_rows)], dtype=torch.int64)
