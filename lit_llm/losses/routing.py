"""Losses on routers and router classifiers: load balance, language prior, its extension to several groups, classifier.

MoE-LPR (arXiv 2408.11396) and LayerMoE (arXiv 2505.22582). Every function takes the logits of all its layers and returns
the *sum over tokens* of the mean over layers, with the number of tokens, so that the caller can divide by the tokens of a
whole optimizer step. Values are formed in float32 or more. A set without tokens gives a zero that still depends on the
logits: every router then takes part in every backward pass.

Shapes: M token positions, N experts of a layer (expert 0 is the original MLP), E the same as N for one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_llm.losses.divergence import at_least_float32

PriorForm = Literal["exact", "released"]


class RoutingLoss(NamedTuple):
    """A sum over tokens.

    Attributes:
        loss: the sum, differentiable.
        tokens: how many tokens it runs over, a tensor on the logits' device.
    """

    loss: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean over tokens; 0 where there are none."""
        return self.loss / self.tokens.clamp(min=1)


def load_balance(
    logits: Sequence[Tensor], experts_per_token: int, mask_M: Tensor, load: Sequence[Tensor] | None = None
) -> RoutingLoss:
    """N sum_e f_e P_e per layer: f_e the share of tokens that chose e in any slot, P_e the mean probability.

    The form of the released code, whose balanced value is k, the number of experts per token; the paper's equation is
    this divided by k. f carries no gradient. Where N <= k every token chooses every expert, and the value is the
    constant N. f is of the given tokens: of the micro-batch, unless `load` brings it from elsewhere.

    Args:
        logits: of each layer, (M, N).
        experts_per_token: k.
        mask_M: tokens that count.
        load: of each layer, (N,), f instead of that of the given tokens; sums to min(k, N).

    Raises:
        ValueError: no layers, or rows that do not fit.
    """
    tokens = _counted(logits, mask_M)
    values = []
    for layer, logits_MN in enumerate(logits):
        p_MN = at_least_float32(logits_MN).softmax(-1)
        load_N = expert_load(logits_MN, experts_per_token, mask_M) if load is None else load[layer]
        value_M = p_MN.shape[1] * (p_MN @ load_N.to(p_MN.dtype).detach())
        values.append(_masked_sum(value_M, mask_M))
    return RoutingLoss(torch.stack(values).mean(), tokens)


def balance_per_slot(balance: RoutingLoss, experts: Sequence[int], experts_per_token: int) -> RoutingLoss | None:
    """`load_balance` as it compares between models: divided by k, and without layers where N <= k, so that 1 is balanced.

    Such layers add the constant N per token to the loss, so nothing is computed again.

    Args:
        balance: what `load_balance` gave.
        experts: N of each of its layers.
        experts_per_token: k.

    Returns:
        None where no layer has N > k.
    """
    constant = [size for size in experts if size <= experts_per_token]
    rest = len(experts) - len(constant)
    if rest == 0:
        return None
    total = len(experts) * balance.loss.detach() - sum(constant) * balance.tokens
    return RoutingLoss(total / (rest * experts_per_token), balance.tokens)


def expert_load(logits_MN: Tensor, experts_per_token: int, mask_M: Tensor) -> Tensor:
    """(N,) the share of the tokens that chose each expert, in any of their slots; sums to min(k, N), or is 0 without any."""
    count = mask_M.sum()
    return expert_slots(logits_MN, experts_per_token, mask_M) / count.clamp(min=1)


@torch.no_grad()
def expert_slots(logits_MN: Tensor, experts_per_token: int, mask_M: Tensor) -> Tensor:
    """(N,) how many tokens chose each expert, in at least float32."""
    chosen_Mk = logits_MN.topk(min(experts_per_token, logits_MN.shape[1]), dim=-1).indices
    slots_MN = at_least_float32(torch.zeros_like(logits_MN)).scatter_(1, chosen_Mk, 1.0)
    return mask_M.to(slots_MN.dtype) @ slots_MN


def language_prior(logits: Sequence[Tensor], old_M: Tensor, form: PriorForm = "exact") -> RoutingLoss:
    """-log p_0 of the tokens of original languages: they belong to expert 0 (arXiv 2408.11396, eq. 6).

    `released` repeats two properties of the public code: the softmax is applied twice, so that the loss stays above 0 and
    hardly pulls where p_0 is small; and layers are averaged within those of equal N, then over the distinct values of N.

    Args:
        logits: of each layer, (M, N).
        old_M: tokens of original languages; padding is not among them.
        form: `exact` or `released`.

    Raises:
        ValueError: no layers, rows that do not fit, or an unknown form.
    """
    if form not in ("exact", "released"):
        raise ValueError(f"The form of the language prior is {form!r}; there are 'exact' and 'released'.")
    tokens = _counted(logits, old_M)
    sizes = [logits_MN.shape[1] for logits_MN in logits]
    total = 0.0
    for logits_MN, size in zip(logits, sizes, strict=True):
        scores_MN = at_least_float32(logits_MN)
        if form == "released":
            scores_MN = scores_MN.softmax(-1)
        share = 1 / len(sizes) if form == "exact" else 1 / (len(set(sizes)) * sizes.count(size))
        total = total + share * _masked_sum(-scores_MN.log_softmax(-1)[:, 0], old_M)
    return RoutingLoss(total, tokens)


def group_prior(
    logits: Sequence[Tensor], bounds: Sequence[Sequence[int]], group_M: Tensor, mask_M: Tensor
) -> RoutingLoss:
    """-log of the mass on experts that existed when a token's group was trained: the prior for several expansions.

    With one expansion it is the exact `language_prior`. Tokens of the newest group are free and do not count.

    Args:
        logits: of each layer, (M, N).
        bounds: of each layer, how many experts there were after each group was trained; the last is N.
        group_M: the group of each token, 0 the original languages, int64.
        mask_M: tokens that are not padding.

    Raises:
        ValueError: no layers, rows that do not fit, or bounds that do not end at N.
    """
    bound_of = list(bounds)
    for layer, (logits_MN, bound_G) in enumerate(zip(logits, bound_of, strict=True)):
        if bound_G[-1] != logits_MN.shape[1] or list(bound_G) != sorted(bound_G) or bound_G[0] < 1:
            raise ValueError(
                f"Layer number {layer} has {logits_MN.shape[1]} experts, but the bounds of its groups are {list(bound_G)}. "
                f"Give ascending numbers from 1 or more that end at the number of experts."
            )
    newest = len(bound_of[0]) - 1
    older_M = mask_M.bool() & (group_M < newest)
    tokens = _counted(logits, older_M)
    values = []
    for logits_MN, bound_G in zip(logits, bound_of, strict=True):
        scores_MN = at_least_float32(logits_MN)
        bound_M = torch.full_like(group_M, bound_G[newest])
        for group, bound in enumerate(bound_G[:newest]):  # numbers, for a tensor of them would be copied to the device
            bound_M = torch.where(group_M.clamp(min=0) == group, bound, bound_M)
        later_MN = torch.arange(scores_MN.shape[1], device=group_M.device) >= bound_M[:, None]
        allowed_M = scores_MN.masked_fill(later_MN, -torch.inf).logsumexp(-1)
        values.append(_masked_sum(scores_MN.logsumexp(-1) - allowed_M, older_M))
    return RoutingLoss(torch.stack(values).mean(), tokens)


def classifier_loss(logits: Sequence[Tensor], old_M: Tensor, mask_M: Tensor) -> RoutingLoss:
    """-log softmax(c)[label] of classifiers in front of routers (arXiv 2505.22582); class 0 is original languages.

    Args:
        logits: of each classifier layer, (M, 2); a row a token, or a sequence.
        old_M: rows of original languages.
        mask_M: rows that count.

    Raises:
        ValueError: no layers, or rows that do not fit.
    """
    rows = _counted(logits, mask_M)
    label_M1 = (~old_M.bool()).long()[:, None]
    values = [
        _masked_sum(-at_least_float32(logits_M2).log_softmax(-1).gather(1, label_M1).squeeze(1), mask_M)
        for logits_M2 in logits
    ]
    return RoutingLoss(torch.stack(values).mean(), rows)


def _masked_sum(value_M: Tensor, mask_M: Tensor) -> Tensor:
    return torch.where(mask_M.bool(), value_M, 0.0).sum()


def _counted(logits: Sequence[Tensor], mask_M: Tensor) -> Tensor:
    if len(logits) == 0:
        raise ValueError("There are 0 layers to form the loss of. Give the logits of at least one.")
    rows = {len(logits_MN) for logits_MN in logits}
    if rows != {len(mask_M)}:
        raise ValueError(
            f"Every row of logits needs its mask, but layers have {sorted(rows)} rows, the mask {len(mask_M)}."
        )
    return mask_M.bool().sum()
