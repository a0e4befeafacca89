"""Judged answers become numbers and tables."""

import pytest
import torch

from lit_llm.evaluation.judgement import JudgedAnswers, summarise, tables
from lit_llm.evaluation.win_rate import Bootstrap

NAN = float("nan")
QUICK = Bootstrap(resamples=50)


def answers(judge, checks, tokens=(4, 8, 6, 2), prompts=(0, 1, 0, 1)) -> JudgedAnswers:
    rewards = {"judge": torch.tensor(judge), "checks": torch.tensor(checks)}
    return JudgedAnswers(torch.tensor(prompts), torch.tensor(tokens), torch.tensor([True, True, True, False]), rewards)


def test_prompts_without_a_reward_count_for_the_others_only():
    models = {
        "ours": answers([1.0, 2.0, 3.0, 4.0], [0.5, NAN, 1.0, NAN]),
        "start": answers([0.0, 2.0, 4.0, 0.0], [0.0, NAN, 1.0, NAN]),
    }
    found = summarise(models, ["start"], QUICK)
    ours = found["ours"]
    assert (ours["rewards"]["judge"]["value"], ours["rewards"]["checks"]["value"]) == (2.5, 0.75)
    assert (ours["tokens"]["value"], ours["unfinished"], ours["prompts"], ours["answers"]) == (5, 0.25, 2, 4)
    rates = ours["against"]["start"]
    assert (rates["judge"]["win_rate"]["value"], rates["checks"]["win_rate"]["value"]) == (0.625, 0.75)
    assert found["start"]["against"] == {}


def test_tables_leave_out_a_reward_that_nobody_has_and_comparisons_that_nobody_asked_for():
    models = {"ours": answers([1.0, 2.0, 3.0, 4.0], [NAN] * 4)}
    text = tables(summarise(models, [], QUICK), {"judge": "judge reward", "checks": "ground truth"})
    header, rule, *rows = text.splitlines()
    assert header == "| model | judge reward | tokens | unfinished |" and rule == "| --- | --- | --- | --- |"
    assert len(rows) == 1 and rows[0].startswith("| ours | 2.500 [") and rows[0].endswith("| 25.0% |")


def test_answers_to_other_prompts_are_not_compared():
    models = {"a": answers([0.0] * 4, [0.0] * 4), "b": answers([0.0] * 4, [0.0] * 4, prompts=(1, 0, 1, 0))}
    with pytest.raises(ValueError, match="same prompts in the same order"):
        summarise(models, ["a"], QUICK)
