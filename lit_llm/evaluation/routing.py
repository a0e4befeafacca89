"""What routers and their classifiers do, by language and layer: counts that add up on the device over a window of steps.

Shapes: M token positions, L routed layers, A languages, G groups of languages, N experts of the layer with most of them
(columns beyond a layer's own experts stay 0), E experts of one layer, k slots of a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

_BALANCE = ("max_violation", "load_cv", "load_entropy", "dead_experts")
_WORST_IS_SMALL = ("load_entropy", "old_top1_expert0", "old_prob_expert0", "classifier_acc_old", "classifier_acc_new")


class RoutedLayer(NamedTuple):
    """What one routed layer did with M positions.

    Attributes:
        logits_ME: router logits.
        classifier_M2: classifier logits, class 0 the original languages; None without a classifier.
        bypass_M: positions sent to expert 0 past the router; None without a classifier.
        threshold: of the classifier's probability of an original language, see `experts.Classifier`.
    """

    logits_ME: Tensor
    classifier_M2: Tensor | None = None
    bypass_M: Tensor | None = None
    threshold: float = 0.5


@dataclass  # not frozen: torchmetrics refuses to hand out frozen ones
class RoutingSummary:
    """Routing over a window, over all languages that were counted; NaN where nothing was.

    Slots are those that experts computed: a bypassed token has one, of expert 0. Top-1, probabilities and the router's entropy
    are the router's own, also of tokens that were sent past it.

    Attributes:
        layers: name -> a number for each routed layer:

            max_violation       N max_e s_e - 1, s_e the share of slots of expert e: 0 is balanced
            load_cv             standard deviation of the slots over their mean
            load_entropy        - sum s ln s / ln N: 1 is balanced
            dead_experts        experts without a slot in the window
            router_entropy      mean of - sum p ln p / ln N: 0 is decided
            old_top1_expert0, old_prob_expert0      over tokens of original languages: stage 2 wants 1
            new_top1_expert0, new_prob_expert0      over the others
            classifier_acc_old, classifier_acc_new, bypass_share    of classifier layers

        languages: name -> for each language a number for each routed layer: expert0_share (of the slots), expert0_top1,
            expert0_prob, classifier_acc, bypass_share.
        load_shares: of each routed layer, the share of the slots that each expert got.
        experts: of each routed layer.
        experts_per_token: slots of a token.
    """

    layers: dict[str, list[float]]
    languages: dict[str, list[list[float]]]
    load_shares: list[list[float]]
    experts: list[int]
    experts_per_token: int

    def scalars(self) -> dict[str, float]:
        """For a log: the mean over layers, and the worst layer of what has one.

        Layers whose router has no choice (N <= k) are left out of the balance's quantities: without bypasses every expert
        has every token. What no layer has a value of is left out.
        """
        found: dict[str, float] = {}
        for name, values in self.layers.items():
            pairs = zip(values, self.experts, strict=True)
            kept = [
                v for v, size in pairs if not math.isnan(v) and (name not in _BALANCE or size > self.experts_per_token)
            ]
            if kept:
                found[name] = sum(kept) / len(kept)
                if name in _BALANCE or name in _WORST_IS_SMALL:
                    found[f"{name}_worst"] = min(kept) if name in _WORST_IS_SMALL else max(kept)
        return found


class RoutingStatistics(Metric):
    """Routing of real tokens by language and layer (MoE-LPR, arXiv 2408.11396; LayerMoE, arXiv 2505.22582).

    `update` never waits for the device; `compute` reduces over ranks. `reset` begins a new window.

    Args:
        experts: of each routed layer, expert 0 included.
        experts_per_token: slots of a token.
        groups: of each language, the number of its group; 0 are the original languages.
    """

    full_state_update = False
    slots_LAN: Tensor
    prob_LAN: Tensor
    sums_LA5: Tensor
    tokens_A: Tensor
    is_new_A: Tensor

    def __init__(self, experts: Sequence[int], experts_per_token: int, groups: Sequence[int]) -> None:
        super().__init__()
        self.experts, self.experts_per_token, self.groups = list(experts), experts_per_token, list(groups)
        layers, languages, most = len(self.experts), len(self.groups), max(self.experts)
        shapes = {
            "slots_LAN": (layers, languages, most),
            "prob_LAN": (layers, languages, most),
            "sums_LA5": (layers, languages, 5),  # best is expert 0, entropy, classifier right, bypassed, classified
            "tokens_A": (languages,),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        # kept on the device: a copy at every step would wait for it
        self.register_buffer("is_new_A", torch.tensor([group > 0 for group in self.groups]), persistent=False)

    def _apply(self, fn, *arguments) -> RoutingStatistics:
        """Follow devices, but stay float64: a method in bfloat16 would stop counting at 256."""

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor.dtype == torch.float64 else moved

        return super()._apply(keep_wide, *arguments)

    @torch.no_grad()
    def update(self, layers: Sequence[RoutedLayer], language_M: Tensor, mask_M: Tensor) -> None:
        """Add M positions.

        Args:
            layers: what each routed layer did.
            language_M: the language of each position, int64; anything at positions that do not count.
            mask_M: real tokens.

        Raises:
            ValueError: another number of layers than there are.
        """
        if len(layers) != len(self.experts):
            raise ValueError(f"There are {len(self.experts)} routed layers, but routing of {len(layers)} was given.")
        language_M = language_M.clamp(0, len(self.groups) - 1)
        of_AM = torch.nn.functional.one_hot(language_M, len(self.groups)).T.to(torch.float64) * mask_M.to(torch.float64)
        is_new_M = self.is_new_A[language_M]
        self.tokens_A += of_AM.sum(1)
        for layer, routed in enumerate(layers):
            self._add(layer, routed, of_AM, is_new_M)

    def _add(self, layer: int, routed: RoutedLayer, of_AM: Tensor, is_new_M: Tensor) -> None:
        log_p_ME = routed.logits_ME.to(torch.float64).log_softmax(-1)
        p_ME, size = log_p_ME.exp(), log_p_ME.shape[1]
        chosen_Mk = p_ME.topk(min(self.experts_per_token, size), dim=-1).indices
        slots_ME = torch.zeros_like(p_ME).scatter_(1, chosen_Mk, 1.0)
        if routed.bypass_M is not None:
            only_first_E = torch.arange(size, device=p_ME.device) == 0
            slots_ME = torch.where(routed.bypass_M[:, None], only_first_E.to(slots_ME.dtype), slots_ME)
        self.slots_LAN[layer, :, :size] += of_AM @ slots_ME
        self.prob_LAN[layer, :, :size] += of_AM @ p_ME
        columns = [chosen_Mk[:, 0] == 0, -(p_ME * log_p_ME).sum(-1)]
        if routed.classifier_M2 is not None:
            says_new_M = routed.classifier_M2.softmax(-1)[:, 0] <= routed.threshold  # as the classifier decides
            columns += [says_new_M == is_new_M, routed.bypass_M, torch.ones_like(is_new_M)]
        sums_MC = torch.stack([column.to(torch.float64) for column in columns], -1)
        self.sums_LA5[layer, :, : len(columns)] += of_AM @ sums_MC

    def compute(self) -> RoutingSummary:
        """What was counted since the last `reset`, over all ranks, as plain numbers."""
        by_language = {name: value_AL.tolist() for name, value_AL in _of_languages(self).items()}
        of_layers = {name: value_L.tolist() for name, value_L in _of_layers(self).items()}
        slots_LN = self.slots_LAN.sum(1)
        shares_LN = (slots_LN / slots_LN.sum(1, keepdim=True)).tolist()
        shares = [share_N[:size] for share_N, size in zip(shares_LN, self.experts, strict=True)]
        return RoutingSummary(of_layers, by_language, shares, self.experts, self.experts_per_token)


def _of_languages(counts: RoutingStatistics) -> dict[str, Tensor]:
    """Name -> (A, L)."""
    tokens_A1, classified_AL = counts.tokens_A[:, None], counts.sums_LA5[:, :, 4].T
    return {
        "expert0_share": counts.slots_LAN[:, :, 0].T / counts.slots_LAN.sum(-1).T,
        "expert0_top1": counts.sums_LA5[:, :, 0].T / tokens_A1,
        "expert0_prob": counts.prob_LAN[:, :, 0].T / tokens_A1,
        "classifier_acc": counts.sums_LA5[:, :, 2].T / classified_AL,
        "bypass_share": counts.sums_LA5[:, :, 3].T / classified_AL,
    }


def _of_layers(counts: RoutingStatistics) -> dict[str, Tensor]:
    """Name -> (L,), see `RoutingSummary`."""
    device = counts.tokens_A.device
    size_L = torch.tensor(counts.experts, dtype=torch.float64, device=device)
    exists_LN = torch.arange(counts.slots_LAN.shape[2], device=device) < size_L[:, None]
    slots_LN = counts.slots_LAN.sum(1)
    mean_L = slots_LN.sum(1) / size_L
    share_LN = slots_LN / slots_LN.sum(1, keepdim=True)
    deviation_LN = torch.where(exists_LN, slots_LN - mean_L[:, None], 0.0)
    found = {
        "max_violation": size_L * share_LN.amax(1) - 1,
        "load_cv": (deviation_LN.square().sum(1) / size_L).sqrt() / mean_L,
        "load_entropy": torch.special.entr(share_LN).sum(1) / size_L.log(),
        "dead_experts": ((slots_LN == 0) & exists_LN).sum(1).to(torch.float64),
        "router_entropy": counts.sums_LA5[:, :, 1].sum(1) / counts.tokens_A.sum() / size_L.log(),
    }
    is_old_A = torch.tensor([group == 0 for group in counts.groups], dtype=torch.float64, device=device)
    for name, of_A in (("old", is_old_A), ("new", 1 - is_old_A)):
        tokens = (counts.tokens_A * of_A).sum()
        found[f"{name}_top1_expert0"] = counts.sums_LA5[:, :, 0] @ of_A / tokens
        found[f"{name}_prob_expert0"] = counts.prob_LAN[:, :, 0] @ of_A / tokens
        found[f"classifier_acc_{name}"] = (counts.sums_LA5[:, :, 2] @ of_A) / (counts.sums_LA5[:, :, 4] @ of_A)
    found["bypass_share"] = counts.sums_LA5[:, :, 3].sum(1) / counts.sums_LA5[:, :, 4].sum(1)
    return found
