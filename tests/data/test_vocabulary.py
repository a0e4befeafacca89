"""What tokens stand for, and which of them two vocabularies share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_llm.data.vocabulary import (
    TokenSpellings,
    bytes_of,
    released_teacher_to_student_ids,
    shared_tokens,
    spellings_from_strings,
    teacher_to_student_ids,
    token_bytes,
    token_spellings,
)

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizers"


def byte_level(*strings: str, **roles: int) -> TokenSpellings:
    return spellings_from_strings([*strings, "<|eot|>"], "Ġ", len(strings), **roles)


def sentencepiece(*strings: str, **roles: int) -> TokenSpellings:
    return spellings_from_strings([*strings, "</s>"], "▁", len(strings), **roles)


def pairs(student: TokenSpellings, teacher: TokenSpellings, mode: str = "bytes") -> list[tuple[str, str]]:
    student_ids, teacher_ids = shared_tokens(student, teacher, mode)
    return [(student.strings[s], teacher.strings[t]) for s, t in zip(student_ids, teacher_ids, strict=True)]


def test_byte_level_strings_decode_by_the_byte_table():
    assert bytes_of("Ġthe", "Ġ") == b" the"
    assert bytes_of("Ċ", "Ġ") == b"\n"
    assert bytes_of("Ã©", "Ġ") == "é".encode()
    assert bytes_of("two words", "Ġ") == b"two words", "no byte is written as a space, so this is an added token"


def test_sentencepiece_strings_decode_by_marker_and_byte_tokens():
    assert bytes_of("▁the", "▁") == b" the"
    assert bytes_of("<0x0A>", "▁") == b"\n"
    assert bytes_of("é", "▁") == "é".encode()
    assert bytes_of("<0xZZ>", "▁") == b"<0xZZ>"


def test_bytes_of_a_tokenizer_are_none_for_special_tokens_only(byte_level_tokenizer, sentencepiece_tokenizer):
    for tokenizer in (byte_level_tokenizer, sentencepiece_tokenizer):
        found = token_bytes(tokenizer)
        assert len(found) == len(tokenizer)
        assert {i for i, content in enumerate(found) if content is None} == set(tokenizer.all_special_ids)


def test_byte_level_tokens_cover_every_byte_once(byte_level_tokenizer):
    found = token_bytes(byte_level_tokenizer)
    assert {content for content in found if content and len(content) == 1} == {bytes([byte]) for byte in range(256)}


def test_added_tokens_that_are_not_special_are_text():
    from tests.tiny import byte_level_tokenizer

    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["<tool>", "   "])
    assert token_bytes(tokenizer)[-2:] == [b"<tool>", b"   "]


@pytest.mark.parametrize(("byte_fallback", "newline"), [(True, b"\n"), (False, b"<0x0A>")])
def test_a_unigram_tokenizer_with_metaspace_is_read_as_sentencepiece(byte_fallback, newline):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁a", -1.0), ("<0x0A>", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
    assert token_bytes(wrapped) == [None, None, b" a", newline]


def test_a_wordpiece_tokenizer_is_refused_with_its_parts():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[UNK]")
    with pytest.raises(ValueError, match=r"neither byte-level BPE.*\n.*WordPiece"):
        token_spellings(wrapped)


def test_a_tokenizer_without_an_end_is_refused():
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import byte_level_tokenizer

    wrapped = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        token_spellings(wrapped)


def test_bytes_find_newlines_and_accents_that_strings_miss():
    student, teacher = byte_level("Ċ", "Ã©", "Ġthe"), sentencepiece("▁the", "é", "<0x0A>")
    assert pairs(student, teacher) == [("Ċ", "<0x0A>"), ("Ã©", "é"), ("Ġthe", "▁the"), ("<|eot|>", "</s>")]
    assert pairs(student, teacher, "string") == [("Ġthe", "▁the")]


def test_shared_tokens_come_in_the_order_of_the_students_ids():
    student_ids, teacher_ids = shared_tokens(byte_level("c", "a", "b"), sentencepiece("a", "b", "x", "c"))
    assert student_ids.tolist() == [0, 1, 2, 3]
    assert teacher_ids.tolist() == [3, 0, 1, 4]


def test_where_ids_share_bytes_equal_strings_are_paired_and_a_byte_token_comes_last():
    llama_like = sentencepiece("<0x41>", "A", "<0x20>", "▁")
    assert pairs(llama_like, llama_like)[:4] == [(s, s) for s in ("<0x41>", "A", "<0x20>", "▁")]
    gpt_like = byte_level("A", "Ġ")
    assert pairs(llama_like, gpt_like)[:2] == [("A", "A"), ("▁", "Ġ")]
    assert pairs(gpt_like, llama_like)[:2] == [("A", "A"), ("Ġ", "▁")]


def test_a_literal_marker_of_the_other_kind_is_not_a_space():
    student, teacher = byte_level("Ġ"), sentencepiece("Ġ", "▁")
    assert pairs(student, teacher) == [("Ġ", "▁"), ("<|eot|>", "</s>")]
    assert pairs(student, teacher, "string") == [("Ġ", "▁")]


def test_special_tokens_are_paired_by_role_and_only_once():
    student = TokenSpellings(("a", "<e>"), (b"a", None), eos_id=1, bos_id=1, pad_id=1)
    teacher = TokenSpellings(("<s>", "a", "</s>"), (None, b"a", None), eos_id=2, bos_id=0, pad_id=2)
    assert pairs(student, teacher) == [("a", "a"), ("<e>", "</s>")]
    assert teacher_to_student_ids(student, teacher).tolist() == [-1, 0, 1]


def test_vocabularies_without_a_common_token_are_refused():
    with pytest.raises(ValueError, match="2 tokens and the teacher's 2 have none in common by string"):
        shared_tokens(byte_level("a"), sentencepiece("b"), "string")


def test_the_teachers_map_covers_the_padded_rows_of_its_head():
    student, teacher = byte_level("Ġa", "b"), sentencepiece("b", "<0x62>", "▁a", "c")
    assert teacher_to_student_ids(student, teacher, num_teacher_rows=8).tolist() == [1, 1, 0, -1, 2, -1, -1, -1]
    assert teacher_to_student_ids(student, teacher, "string", 8).tolist() == [1, -1, 0, -1, 2, -1, -1, -1]


def test_the_released_map_sends_unknown_tokens_to_unk():
    teacher = sentencepiece("b", "▁a")
    assert released_teacher_to_student_ids(byte_level("Ġa", "b"), teacher, 4).tolist() == [1, -1, 2, -1]
    assert released_teacher_to_student_ids(byte_level("Ġa", "b", unk_id=2), teacher, 4).tolist() == [1, 2, 2, -1]


def test_a_vocabulary_shares_all_its_text_with_itself(byte_level_tokenizer, sentencepiece_tokenizer):
    for tokenizer in (byte_level_tokenizer, sentencepiece_tokenizer):
        student_ids, teacher_ids = shared_tokens(tokenizer, tokenizer)
        assert torch.equal(student_ids, teacher_ids)
        text = [i for i, content in enumerate(token_bytes(tokenizer)) if content is not None]
        assert set(text) <= set(student_ids.tolist())
        assert teacher_to_student_ids(tokenizer, tokenizer)[text].tolist() == text


def test_a_shared_token_has_the_same_bytes_on_both_sides(byte_level_tokenizer, sentencepiece_tokenizer):
    student, teacher = token_spellings(byte_level_tokenizer), token_spellings(sentencepiece_tokenizer)
    student_ids, teacher_ids = shared_tokens(student, teacher)
    assert all(student.bytes[s] == teacher.bytes[t] for s, t in zip(student_ids, teacher_ids, strict=True))
    assert len(student_ids) > 256


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("student", "teacher", "by_string", "by_bytes"),
    # counted in DSKD's own setting for Llama 2, whose tokenizer TinyLlama shares; one more by bytes: eos, by its role
    [("gpt2", "tinyllama", 17_830, 18_207 + 1), ("tinyllama", "mistral", 24_184, None)],
)
def test_real_vocabularies_share_the_published_number_of_tokens(student, teacher, by_string, by_bytes):
    from transformers import PreTrainedTokenizerFast

    if not SHARED.is_dir():
        pytest.skip("shared/data/tokenizers is not beside this checkout")
    sides = [token_spellings(PreTrainedTokenizerFast.from_pretrained(SHARED / name)) for name in (student, teacher)]
    assert len(shared_tokens(*sides, "string")[0]) == by_string
    if by_bytes is not None:
        assert len(shared_tokens(*sides)[0]) == by_bytes
