"""Answers token by token."""

import pytest

from lit_llm.evaluation.token_scores import TokenScores, token_pieces


@pytest.mark.parametrize("kind", ["byte_level_tokenizer", "sentencepiece_tokenizer"])
@pytest.mark.parametrize("text", ["Red, green and blue.", "你好 🙂 Grüße\n\n  two", "x", " a"])
def test_the_pieces_joined_are_the_text_that_the_tokenizer_decodes(request, kind, text):
    tokenizer = request.getfixturevalue(kind)
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    pieces = token_pieces(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=False)
    assert pieces[-1] == tokenizer.eos_token and "\ufffd" not in "".join(pieces)


def test_a_character_of_several_tokens_belongs_to_the_last_of_them(byte_level_tokenizer):
    ids = byte_level_tokenizer("ж你", add_special_tokens=False)["input_ids"]
    pieces = token_pieces(byte_level_tokenizer, ids)
    assert len(ids) > 2 and [piece for piece in pieces if piece] == ["ж", "你"] and pieces[-1] == "你"


def test_an_answer_that_was_cut_within_a_character_keeps_what_is_decoded(byte_level_tokenizer):
    ids = byte_level_tokenizer("a ж", add_special_tokens=False)["input_ids"][:-1]
    pieces = token_pieces(byte_level_tokenizer, ids)
    assert "".join(pieces) == byte_level_tokenizer.decode(ids) and pieces[0] == "a"


def test_a_score_that_misses_a_token_is_refused_with_the_counts():
    with pytest.raises(ValueError, match="2 tokens, 1 alpha"):
        TokenScores("p", ("a", "b"), {"alpha": (1.0,)})
