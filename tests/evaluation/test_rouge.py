"""ROUGE-L and exact match."""

from __future__ import annotations

import pytest
import torch

from lit_llm.evaluation.rouge import ExactMatch, RougeL

ANSWERS = ["the cat sat on the mat", "running fast", "nothing alike", ""]
REFERENCES = [["a cat sat on a mat"], ["he runs fast", "run fast"], ["wholly different words"], ["something"]]
METRICS = [RougeL, ExactMatch]


def scored(metric, answers, references):
    metric.update(answers, references)
    return metric


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence():
    # "cat sat on mat" is 4 of 6 words on both sides
    assert scored(RougeL(), ANSWERS[:1], REFERENCES[:1]).compute().item() == pytest.approx(100 * 4 / 6)


def test_rouge_l_compares_stems():
    assert scored(RougeL(), ["running quickly"], [["runs quick"]]).compute().item() == pytest.approx(50.0)


def test_the_best_reference_counts_whichever_place_it_has():
    for references in (["he runs fast", "run fast"], ["run fast", "he runs fast"]):
        assert scored(RougeL(), ["running fast"], [references]).compute().item() == pytest.approx(100.0)


def test_exact_match_ignores_case_punctuation_and_white_space_only():
    answers = ["  Paris,\nFrance! ", "Paris"]
    assert scored(ExactMatch(), answers, [["paris france"], ["paris france"]]).compute().item() == 50.0


@pytest.mark.parametrize("metric", METRICS)
def test_scores_do_not_depend_on_how_answers_are_split(metric):
    whole = scored(metric(), ANSWERS, REFERENCES).compute()
    parts = metric()
    for answer, references in zip(ANSWERS, REFERENCES, strict=True):
        parts.update([answer], [references])
    assert parts.compute() == whole
    assert whole.dtype == torch.float64


@pytest.mark.parametrize("metric", METRICS)
def test_merging_two_shares_of_unequal_size_gives_the_score_of_the_whole(metric):
    whole = scored(metric(), ANSWERS, REFERENCES).compute()
    merged = scored(metric(), ANSWERS[:1], REFERENCES[:1])
    merged.merge_state(scored(metric(), ANSWERS[1:], REFERENCES[1:]))
    torch.testing.assert_close(merged.compute(), whole)


@pytest.mark.parametrize("metric", METRICS)
def test_two_processes_reduce_to_the_score_of_the_whole(metric):
    whole = scored(metric(), ANSWERS, REFERENCES).compute()
    ours = scored(metric(sync_on_compute=False), ANSWERS[:3], REFERENCES[:3])
    theirs = scored(metric(), ANSWERS[3:], REFERENCES[3:])
    others = iter([theirs.total, theirs.count])  # states are gathered in the order in which they were added
    ours.sync(dist_sync_fn=lambda state, group: [state, next(others)], distributed_available=lambda: True)
    torch.testing.assert_close(ours.compute(), whole)


def test_numbers_that_differ_are_refused():
    with pytest.raises(ValueError, match="2 answers, but references of 1"):
        RougeL().update(["a", "b"], [["a"]])


def test_an_answer_without_references_is_refused():
    with pytest.raises(ValueError, match="'a' has no reference"):
        ExactMatch().update(["a"], [[]])
