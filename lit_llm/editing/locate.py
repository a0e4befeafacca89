"""Which neurons of a layer hold a fact in every language: scores, selection per language, what languages share.

After arXiv 2406.16416, which states that the neurons are those active for one fact whatever the language. The statistic,
the threshold and the rule of combination are not published; those here are this project's (see `Locating`).

Shapes: N prompts, L languages of a fact, F facts, m neurons of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Statistic = Literal["mean_abs", "max_abs", "freq_pos", "contrib", "integrated_gradients"]
Selection = Literal["topk", "ratio", "threshold"]
Combination = Literal["intersection", "vote"]
Position = Literal["subject_last", "prompt_last", "mean"]


@dataclass(frozen=True)
class Locating:
    """How the neurons of a fact are found in one layer.

    Args:
        statistic: of a language's prompts: `mean_abs` and `max_abs` of the neuron, `freq_pos` the share of prompts in which
            it is above 0, `contrib` mean_abs times the norm of its column of the down projection; `integrated_gradients` the
            mean of the prompts' attributions (see `attribution`), for comparison.
        selection: per language: `topk` takes the largest ceil(`top_ratio` * m), `ratio` those above `ratio` times the largest,
            `threshold` those of at least `threshold` (for `freq_pos`).
        top_ratio: of `topk`; what is shared by few neurons carries over to other wordings less often.
        ratio: of `ratio`; 0.3 is the rule of arXiv 2104.08696.
        threshold: of `threshold`.
        combination: `intersection` over the languages, or `vote`: in at least `votes` of them.
        votes: of `vote`; None: three quarters of the languages, rounded up.
        min_neurons: where fewer are left, those of the best worst rank over the languages are added.
        max_neurons: where more are left, those of the best worst rank are kept.
        contrast: subtract from a score its mean over the other facts in the same language, so that neurons that are large
            for every prompt do not count.
        position: where neurons are read: at the subject's last token, at the prompt's last, or their mean from the subject on.
    """

    statistic: Statistic = "mean_abs"
    selection: Selection = "topk"
    top_ratio: float = 0.6
    ratio: float = 0.3
    threshold: float = 0.5
    combination: Combination = "intersection"
    votes: int | None = None
    min_neurons: int = 64
    max_neurons: int = 1024
    contrast: bool = False
    position: Position = "subject_last"

    def __post_init__(self) -> None:
        for field, names in (
            ("statistic", Statistic),
            ("selection", Selection),
            ("combination", Combination),
            ("position", Position),
        ):
            if getattr(self, field) not in get_args(names):
                raise ValueError(
                    f"locating.{field} is {getattr(self, field)!r}; it is one of {', '.join(get_args(names))}."
                )
        if not 0 < self.top_ratio <= 1:
            raise ValueError(
                f"locating.top_ratio is {self.top_ratio}; it is a share of the neurons, above 0 and at most 1."
            )
        if not 1 <= self.min_neurons <= self.max_neurons:
            raise ValueError(
                f"locating.min_neurons is {self.min_neurons} and locating.max_neurons {self.max_neurons}; the first is at least "
                f"1 and at most the second."
            )
        if self.votes is not None and self.votes < 1:
            raise ValueError(f"locating.votes is {self.votes}; it counts languages and must be at least 1.")
        for field in ("ratio", "threshold"):  # each is read by the selection of its name
            if self.selection != field and getattr(self, field) != getattr(Locating, field):
                raise ValueError(
                    f"locating.{field} is {getattr(self, field)}, but locating.selection is {self.selection!r}, which does not "
                    f"use it. Set it to {field}, or leave {field} out."
                )
        if self.statistic == "integrated_gradients" and self.position not in (Locating.position, "prompt_last"):
            raise ValueError(
                f"locating.position is {self.position!r}, but integrated_gradients reads the prompt's last token. Leave it out."
            )
        if self.votes is not None and self.combination != "vote":
            raise ValueError(
                f"locating.votes is {self.votes}, but locating.combination is {self.combination!r}, which does not count them. "
                f"Set it to vote, or leave votes out."
            )


class Located(NamedTuple):
    """Neurons of one fact in one layer.

    Attributes:
        neurons: indices, ascending, int64.
        shared: how many the languages shared before filling up or cutting.
        filled: how many were added to reach `min_neurons`.
        dropped: how many were cut off beyond `max_neurons`.
    """

    neurons: Tensor
    shared: int
    filled: int
    dropped: int


def scores(neurons_Nm: Tensor, language_N: Sequence[int], statistic: Statistic, norm_m: Tensor | None = None) -> Tensor:
    """(L, m) statistic of each language's prompts.

    Args:
        neurons_Nm: neurons of each prompt; its attributions for `integrated_gradients`.
        language_N: the language of each prompt, 0 to L - 1, each at least once.
        norm_m: norms of the columns of the down projection, for `contrib`.

    Raises:
        ValueError: a language without prompts, or `contrib` without norms.
    """
    language = torch.as_tensor(language_N, device=neurons_Nm.device)
    missing = sorted(set(range(int(language.max()) + 1)) - set(language.tolist()))
    if missing:
        raise ValueError(f"Languages {missing} have no prompt to read neurons from; every language needs one.")
    if statistic == "contrib" and norm_m is None:
        raise ValueError("The statistic contrib needs the norms of the down projection's columns.")
    groups = [neurons_Nm[language == index] for index in range(int(language.max()) + 1)]
    match statistic:
        case "mean_abs":
            found = [group.abs().mean(0) for group in groups]
        case "max_abs":
            found = [group.abs().amax(0) for group in groups]
        case "freq_pos":
            found = [(group > 0).to(neurons_Nm.dtype).mean(0) for group in groups]
        case "contrib":
            found = [group.abs().mean(0) * norm_m for group in groups]
        case "integrated_gradients":
            found = [group.mean(0) for group in groups]
    return torch.stack(found)


def contrasted(score_FLm: Tensor) -> Tensor:
    """Each fact's scores minus their mean over the other facts in the same language.

    Raises:
        ValueError: a single fact, which has nothing to be compared with.
    """
    facts = len(score_FLm)
    if facts < 2:
        raise ValueError(
            "locating.contrast compares facts with each other, but there is 1. Leave it out, or edit several."
        )
    return score_FLm - (score_FLm.sum(0, keepdim=True) - score_FLm) / (facts - 1)


def select(score_Lm: Tensor, locating: Locating) -> Tensor:
    """(L, m) bool, which neurons each language selects."""
    match locating.selection:
        case "topk":
            return ranks(score_Lm) < math.ceil(locating.top_ratio * score_Lm.shape[1])
        case "ratio":
            return score_Lm > locating.ratio * score_Lm.amax(-1, keepdim=True)
        case "threshold":
            return score_Lm >= locating.threshold


def combine(selected_Lm: Tensor, score_Lm: Tensor, locating: Locating) -> Located:
    """What the languages share, filled up or cut to the wanted number by the worst rank over languages.

    Raises:
        ValueError: more votes than languages.
    """
    languages, width = selected_Lm.shape
    needed = languages
    if locating.combination == "vote":
        needed = math.ceil(0.75 * languages) if locating.votes is None else locating.votes
    if needed > languages:
        raise ValueError(
            f"locating.votes is {needed}, but the fact has {languages} languages. Ask for at most that many."
        )
    inside_m = selected_Lm.sum(0) >= needed
    worst_m = ranks(score_Lm).amax(0)
    shared = int(inside_m.sum())
    wanted = min(max(shared, locating.min_neurons), locating.max_neurons, width)
    # selected ones first, then by worst rank, then by index: the sort is stable
    order = torch.argsort(worst_m + width * (~inside_m), stable=True)
    neurons = order[:wanted].sort().values
    return Located(neurons, shared, max(0, wanted - shared), max(0, shared - wanted))


def locate(score_Lm: Tensor, locating: Locating) -> Located:
    """`select` and `combine` of one fact in one layer."""
    return combine(select(score_Lm, locating), score_Lm, locating)


def ranks(score_Lm: Tensor) -> Tensor:
    """(L, m) rank of each neuron in its language, 0 the largest; of equal scores the lower index comes first."""
    order_Lm = torch.sort(score_Lm, dim=-1, descending=True, stable=True).indices
    rank_m = torch.arange(score_Lm.shape[1], device=score_Lm.device).expand_as(order_Lm)
    return torch.empty_like(order_Lm).scatter_(-1, order_Lm, rank_m)


def random_neurons(located: Sequence[Located], width: int, seed: int) -> list[Located]:
    """As many neurons as were located, drawn at random: the control for the step of locating."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for found in located:
        neurons = torch.randperm(width, generator=generator)[: len(found.neurons)].sort().values
        drawn.append(found._replace(neurons=neurons.to(found.neurons.device)))
    return drawn


class Overlap(NamedTuple):
    """How far languages select the same neurons in one layer.

    Attributes:
        pair_LL: mean over facts of the neurons that two languages share; the diagonal is how many one selects.
        jaccard_LL: the same relative to what either selects.
        same_fact: mean number of neurons shared by all languages of a fact.
        different_facts: the same for groups put together from different facts, one language each.
        chance: expected number if languages selected independently.
    """

    pair_LL: Tensor
    jaccard_LL: Tensor
    same_fact: float
    different_facts: float
    chance: float


def overlap(selected_FLm: Tensor) -> Overlap:
    """Overlap of the selections of several facts in one layer; the layers to edit have the largest excess of `same_fact`.

    Raises:
        ValueError: fewer facts than languages, or a single one: groups of different facts could not be put together.
    """
    facts, languages, width = selected_FLm.shape
    if facts < max(2, languages):
        raise ValueError(
            f"The overlap of {facts} facts in {languages} languages has no groups of different facts to be compared with; give "
            f"at least {max(2, languages)} facts."
        )
    chosen = selected_FLm.double()
    pair_FLL = chosen @ chosen.transpose(1, 2)
    size_FL = chosen.sum(-1)
    either_FLL = size_FL[:, :, None] + size_FL[:, None, :] - pair_FLL
    mixed = torch.stack([selected_FLm[:, language].roll(language, 0) for language in range(languages)], 1)
    return Overlap(
        pair_LL=pair_FLL.mean(0),
        jaccard_LL=(pair_FLL / either_FLL.clamp(min=1)).mean(0),
        same_fact=selected_FLm.all(1).sum(-1).double().mean().item(),
        different_facts=mixed.all(1).sum(-1).double().mean().item(),
        chance=(width * (size_FL / width).prod(-1)).mean().item(),
    )
