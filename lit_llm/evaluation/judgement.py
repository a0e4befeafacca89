"""What is said of models whose answers to the same prompts were rewarded: a result for machines, tables for people.

Shapes: N answers of a model, the same prompts in the same order for every model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_llm.evaluation.win_rate import Bootstrap, Estimate, length_controlled_win_rate, mean, win_rate


@dataclass(frozen=True)
class JudgedAnswers:
    """The answers of one model.

    Attributes:
        prompt_N: which prompt each answers.
        tokens_N: length in tokens, without the one that ends an answer.
        finished_N: whether it ended within the limit, bool.
        rewards: name of a reward -> its values, (N,); NaN at the prompts for which there is none.
    """

    prompt_N: Tensor
    tokens_N: Tensor
    finished_N: Tensor
    rewards: Mapping[str, Tensor]


def summarise(
    models: Mapping[str, JudgedAnswers], against: Sequence[str], bootstrap: Bootstrap
) -> dict[str, dict[str, Any]]:
    """Means of every model, and its win rates against some of the others under every reward.

    Args:
        models: name -> its answers; answer n of one is compared with answer n of another.
        against: names of models that all others are compared with.
        bootstrap: how intervals are made, the same draws for every number.

    Returns:
        For every name `answers`, `prompts`, `tokens`, `unfinished` (share), `rewards` (reward -> estimate) and `against`
        (other -> reward -> `win_rate` and `length_controlled`); estimates have `value`, `low` and `high`. A reward that no
        prompt has is left out.
    """
    return {
        name: {
            "answers": len(answers.prompt_N),
            "prompts": len(answers.prompt_N.unique()),
            "tokens": mean(answers.tokens_N, answers.prompt_N, bootstrap)._asdict(),
            "unfinished": 1 - answers.finished_N.double().mean().item(),
            "rewards": {
                reward: mean(values_N[given_N], answers.prompt_N[given_N], bootstrap)._asdict()
                for reward, values_N, given_N in _given(answers)
            },
            "against": {other: _compared(answers, models[other], bootstrap) for other in against if other != name},
        }
        for name, answers in models.items()
    }


def _compared(ours: JudgedAnswers, theirs: JudgedAnswers, bootstrap: Bootstrap) -> dict[str, dict[str, Any]]:
    if not torch.equal(ours.prompt_N, theirs.prompt_N):
        raise ValueError(
            f"Answers are compared one by one, but {len(ours.prompt_N)} and {len(theirs.prompt_N)} answers do not belong "
            "to the same prompts in the same order. Give every model the same prompts."
        )
    found = {}
    for reward, values_N, given_N in _given(ours):
        sides = values_N[given_N], theirs.rewards[reward][given_N]
        longer_N, prompt_N = (ours.tokens_N - theirs.tokens_N)[given_N], ours.prompt_N[given_N]
        found[reward] = {
            "win_rate": win_rate(*sides, prompt_N, bootstrap)._asdict(),
            "length_controlled": length_controlled_win_rate(*sides, longer_N, prompt_N, bootstrap)._asdict(),
        }
    return found


def _given(answers: JudgedAnswers):
    """Name, values and where there are values, of every reward that some answer has."""
    for reward, values_N in answers.rewards.items():
        given_N = ~torch.isnan(values_N)
        if given_N.any():
            yield reward, values_N, given_N


def tables(results: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Two Markdown tables of what `summarise` found: a row for a model, and a row for each model that it is compared with.

    Args:
        results: of `summarise`.
        titles: name of a reward -> what people call it.
    """
    rewards = [name for name in titles if name in next(iter(results.values()))["rewards"]]
    rows = [
        [name, *(_number(model["rewards"][reward]) for reward in rewards)]
        + [_number(model["tokens"], 1), f"{model['unfinished']:.1%}"]
        for name, model in results.items()
    ]
    text = _table(["model", *(titles[reward] for reward in rewards), "tokens", "unfinished"], rows)
    kinds = {"win_rate": "win rate", "length_controlled": "length-controlled"}
    columns = [(reward, kind) for reward in rewards for kind in kinds]
    rows = [
        [name, other, *(_share(found[reward][kind]) for reward, kind in columns)]
        for name, model in results.items()
        for other, found in model["against"].items()
    ]
    if rows:
        text += "\n" + _table(["model", "against", *(f"{kinds[k]}, {titles[r]}" for r, k in columns)], rows)
    return text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, ["---"] * len(header), *rows))


def _number(estimate: Mapping[str, float], digits: int = 3) -> str:
    value, low, high = (f"{number:.{digits}f}" for number in Estimate(**estimate))
    return f"{value} [{low}, {high}]"


def _share(estimate: Mapping[str, float]) -> str:
    value, low, high = (f"{number:.1%}" for number in Estimate(**estimate))
    return f"{value} [{low}, {high}]"
