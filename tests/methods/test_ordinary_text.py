"""Text that edits of weights leave alone."""

from __future__ import annotations

from lit_llm.methods.ordinary_text import OrdinaryText, passages
from tests.tiny import byte_level_tokenizer
from tests.tiny_languages import write_corpora


def test_languages_take_turns_in_equal_shares_so_that_every_beginning_has_all(tmp_path):
    tokenizer, sources = byte_level_tokenizer(), write_corpora(tmp_path)
    alone = {
        code: passages(OrdinaryText({code: path}, tokens=500, passage=40), tokenizer) for code, path in sources.items()
    }
    mixed = passages(OrdinaryText(sources, tokens=1500, passage=40), tokenizer)
    owner = {tuple(ids): code for code, found in alone.items() for ids in found}
    assert sorted(map(tuple, mixed)) == sorted(tuple(ids) for found in alone.values() for ids in found)
    for share in (0.25, 0.5, 0.75):
        begun = [owner[tuple(ids)] for ids in mixed[: round(share * len(mixed))]]
        assert all(abs(begun.count(code) - share * len(found)) <= 1 for code, found in alone.items())
