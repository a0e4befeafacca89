"""How an epoch's rows are divided among languages."""

import pytest

from lit_llm.data.language_mix import Mix, rows_of_languages

AVAILABLE = {"en": 80_000, "es": 20_000, "hu": 40_000, "tr": 10_000}


def rows(available=AVAILABLE, newest=("hu", "tr"), **settings):
    options = {"tokens": None, "temperature": 1.0, "old_share": None, "repeat": True, "row_length": 100}
    return rows_of_languages(Mix(**{**options, **settings}), available, newest)


def test_without_a_budget_new_text_is_used_once_and_old_text_makes_a_third():
    assert rows() == {"hu": 400, "tr": 100, "en": 200, "es": 50}
    assert rows({"hu": 40_000, "tr": 10_000}) == {"hu": 400, "tr": 100}


def test_a_share_of_old_text_is_a_share_of_the_tokens():
    found = rows(old_share=0.2, tokens=100_000)
    assert (found["en"] + found["es"]) / sum(found.values()) == pytest.approx(0.2)
    assert sum(found.values()) == 1000


def test_temperature_moves_shares_within_a_group_from_size_to_equality():
    ratios = [found["hu"] / found["tr"] for found in (rows(temperature=t, tokens=10**6) for t in (0.5, 1, 2, 1e9))]
    assert ratios == pytest.approx([16, 4, 2, 1], rel=0.01)


def test_a_budget_for_every_language_is_kept():
    budget = {"en": 1000, "es": 2050, "hu": 30_000, "tr": 40_000}
    assert rows(tokens=budget) == {"en": 10, "es": 20, "hu": 300, "tr": 400}


def test_a_budget_beyond_the_text_is_refused_where_nothing_may_come_again():
    with pytest.raises(ValueError, match="'tr' is to have 40,000 training tokens, but its text has 10,000"):
        rows(tokens={"en": 1000, "es": 2000, "hu": 30_000, "tr": 40_000}, repeat=False)
    assert rows(AVAILABLE | {"en": 10**6}, repeat=False)["tr"] == 100
