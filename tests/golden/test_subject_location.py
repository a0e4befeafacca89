"""Golden subject locations of the neuron editor's family: whatever the index lists is compared."""

from __future__ import annotations

import json

from lit_llm.data.subjects import locate_subject
from tests.golden.golden import family_folder


def test_every_listed_subject_is_found_where_the_index_says():
    index = json.loads((family_folder("neuron_edit") / "index.json").read_text(encoding="utf-8"))
    cases = index["subject_location"]
    assert cases
    for case in cases:
        assert case.keys() == {"text", "subject", "aliases", "how", "span", "matched"}, "a case of another kind"
        match = locate_subject(case["text"], case["subject"], case["aliases"])
        assert match.how == case["how"], case
        assert (None if match.how == "none" else [match.start, match.end]) == case["span"], case
        assert case["span"] is None or case["text"][match.start : match.end] == case["matched"]
