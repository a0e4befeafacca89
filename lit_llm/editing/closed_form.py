"""Updates of down projections in closed form: ROME (arXiv 2202.05262), MEMIT (arXiv 2210.07229), AlphaEdit
(arXiv 2410.02355), and cached neuron values written into the weights.

Every update of a layer is kept as two factors, `left @ right.T`, outputs x inputs, with one column per edited prompt. Sums
and solves are done in float64. The model is changed while an update is computed, because each layer's keys are those of the
model with the lower layers edited, and left as the updates say: undoing is the matter of `deltas`.

Shapes: N edited prompts (columns), d hidden size, m neurons of a layer, U directions that are free to change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.passes import neurons_at
from lit_llm.editing.rows import Row
from lit_llm.editing.values import Request, ValueSettings, optimise_values, outputs_at
from lit_llm.losses.head import Head

_log = logging.getLogger(__name__)


class LowRank(NamedTuple):
    """A change of a down projection: left @ right.T, outputs x inputs.

    Attributes:
        left: (d, N)
        right: (m, N)
    """

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        """(d, m)"""
        return self.left @ self.right.T

    def columns(self, chosen: Sequence[int]) -> LowRank:
        """The part of some of the edited prompts."""
        return LowRank(self.left[:, chosen], self.right[:, chosen])


Inverse = Callable[[Tensor], Tensor]
Covariance = Tensor | Inverse  # second moments (m, m), or what `inverse` makes of them once for many edits


def inverse(covariance_mm: Tensor) -> Inverse:
    """(m, N) x -> C^-1 x for a positive definite C, which is factorised once.

    Raises:
        ValueError: it is not positive definite, even with a millionth of its mean added to the diagonal.
    """
    covariance_mm = covariance_mm.double()
    factor_mm, failed = torch.linalg.cholesky_ex(covariance_mm)
    if failed:
        ridge = 1e-6 * covariance_mm.diagonal().mean()
        _log.warning("A covariance is not positive definite; %.3g is added to its diagonal.", ridge.item())
        added_mm = ridge * torch.eye(len(covariance_mm), dtype=torch.float64, device=covariance_mm.device)
        factor_mm, failed = torch.linalg.cholesky_ex(covariance_mm + added_mm)
    if failed:
        raise ValueError(
            f"A covariance of {len(covariance_mm)} neurons is not positive definite (trace {covariance_mm.trace().item():.3g}), "
            f"even with a millionth of its mean added to the diagonal. Estimate it from more tokens than neurons."
        )
    return lambda right_mN: torch.cholesky_solve(right_mN.double(), factor_mm)


def add_to_weights(body: FeedForwards, updates: Mapping[int, LowRank]) -> None:
    """Add updates to the live weights, in at least float32, rounded once."""
    with torch.no_grad():
        for layer, update in updates.items():
            weight_dm = body.weight(layer)
            wide = torch.promote_types(weight_dm.dtype, torch.float32)
            change_dm = update.dense().to(weight_dm.device)
            weight_dm.copy_((weight_dm.to(wide) + change_dm.to(wide)).to(weight_dm.dtype))


# ROME


def rome_update(
    key_m: Tensor, covariance: Covariance | None, value_d: Tensor, neurons_m: Tensor, output_d: Tensor
) -> LowRank:
    """The rank-one change under which a prompt's neurons give the wanted output exactly.

    Args:
        key_m: mean key over contexts.
        covariance: second moment of neurons over ordinary text; None takes the key as it is, as released
            configurations for 7B models do.
        value_d: the wanted output of the MLP.
        neurons_m: neurons at the bare prompt.
        output_d: what the MLP gives there now, bias included.

    Raises:
        ValueError: the key is orthogonal to the neurons.
    """
    key_m, value_d, neurons_m, output_d = (tensor.double() for tensor in (key_m, value_d, neurons_m, output_d))
    u_m = key_m if covariance is None else _inverse_of(covariance)(key_m[:, None]).squeeze(1)
    u_m = u_m / u_m.norm()
    along = neurons_m @ u_m
    if along.abs() < 1e-4 * neurons_m.norm():
        raise ValueError(
            f"The prompt's neurons have {along.item():.3g} along the key's direction, {neurons_m.norm().item():.3g} in all: an "
            f"update would have to be enormous. Use other contexts, or another layer."
        )
    return LowRank(((value_d - output_d) / along)[:, None], u_m[:, None])


def rome(
    body: FeedForwards,
    head: Head,
    request: Request,
    layer: int,
    covariance: Covariance | None,
    settings: ValueSettings,
) -> dict[int, LowRank]:
    """Edit one request into one layer; a list of requests is applied one after the other.

    Returns:
        The update, which the model has already received.

    Raises:
        ValueError: see `rome_update`.
    """
    value = optimise_values(body, head, [request], layer, "mlp", settings)
    keys_Nm = neurons_at(body, [row.bare() for row in request.rows], [layer])[layer].double()
    update = rome_update(keys_Nm.mean(0), covariance, value.value_Fd[0], keys_Nm[0], value.start_Fd[0])
    add_to_weights(body, {layer: update})
    return {layer: update}


# MEMIT


def memit_keys(covariance: Covariance, keys_mN: Tensor, covariance_weight: float) -> Tensor:
    """(m, N) adjusted keys (weight * C + K K^T)^-1 K, by N x N systems over one factorisation of C."""
    keys_mN = keys_mN.double()
    spread_mN = _inverse_of(covariance)(keys_mN) / covariance_weight
    inner_NN = torch.eye(keys_mN.shape[1], dtype=keys_mN.dtype, device=keys_mN.device) + keys_mN.T @ spread_mN
    return torch.linalg.solve(inner_NN.T, spread_mN.T).T


def memit(
    body: FeedForwards,
    head: Head,
    requests: Sequence[Request],
    layers: Sequence[int],
    covariances: Mapping[int, Covariance],
    settings: ValueSettings,
    *,
    covariance_weight: float = 15_000.0,
) -> dict[int, LowRank]:
    """Edit a batch of requests, spread over layers.

    Returns:
        The updates by layer, one column per request, which the model has already received.

    Raises:
        ValueError: layers out of order, or several of them where a norm follows the MLP.
    """

    def adjusted(layer: int, keys_mN: Tensor) -> Tensor:
        return memit_keys(covariances[layer], keys_mN, covariance_weight)

    return _spread(body, head, requests, layers, settings, adjusted)


# AlphaEdit


class FreeDirections(NamedTuple):
    """Directions of the neurons that ordinary text hardly uses.

    Attributes:
        basis_mU: orthonormal columns.
        largest_kept: the largest second moment along them.
    """

    basis_mU: Tensor
    largest_kept: float

    def projection(self) -> Tensor:
        """(m, m)"""
        return self.basis_mU @ self.basis_mU.T


def free_directions(
    covariance_mm: Tensor, *, threshold: float | None = 0.02, fraction: float | None = None
) -> FreeDirections:
    """Eigenvectors of the second moment with eigenvalues below a threshold.

    Args:
        covariance_mm: uncentred second moment, mean over tokens; the threshold depends on the scale of the neurons.
        threshold: absolute; None where `fraction` is given.
        fraction: instead, this share of the directions, the least used ones.

    Raises:
        ValueError: neither or both are given, or no direction or every one is free.
    """
    if (threshold is None) == (fraction is None):
        raise ValueError(
            f"threshold is {threshold} and fraction {fraction}; give one of the two, and None for the other."
        )
    moments_m, vectors_mm = torch.linalg.eigh(covariance_mm.double())
    free = int((moments_m < threshold).sum()) if fraction is None else round(fraction * len(moments_m))
    _log.info("%d of %d directions are free to change", free, len(moments_m))
    if not 0 < free < len(moments_m):
        raise ValueError(
            f"{free} of {len(moments_m)} directions have a second moment below {threshold if fraction is None else fraction}; "
            f"the moments lie between {moments_m[0].item():.3g} and {moments_m[-1].item():.3g}. Choose a threshold between "
            f"them, or a fraction."
        )
    return FreeDirections(vectors_mm[:, :free], moments_m[free - 1].item())


def alphaedit_keys(free: FreeDirections, keys_mN: Tensor, earlier_mK: Tensor, ridge: float) -> Tensor:
    """(m, N) X with change = R X^T, where (P (K K^T + Q) + ridge I) X R^T = P K R^T, by systems of N + K columns.

    Args:
        free: P = basis basis^T.
        keys_mN: K.
        earlier_mK: keys of earlier batches, Q = earlier earlier^T; (m, 0) for the first.
        ridge: L2 of the published code.
    """
    keys_mN = keys_mN.double()
    inside_UN = free.basis_mU.T @ keys_mN
    all_UK = torch.cat([inside_UN, free.basis_mU.T @ earlier_mK.double()], 1)
    inner_KK = ridge * torch.eye(all_UK.shape[1], dtype=all_UK.dtype, device=all_UK.device) + all_UK.T @ all_UK
    correction_UN = all_UK @ torch.linalg.solve(inner_KK, all_UK.T @ inside_UN)
    return free.basis_mU @ (inside_UN - correction_UN) / ridge


@dataclass
class AlphaEdit:
    """A sequence of batches that change only what ordinary text hardly uses, and leave earlier batches alone.

    Args:
        free: by layer.
        settings: of the values.
        ridge: L2 of the published code: 10 in the authors' settings, 1 in others.

    Attributes:
        earlier: by layer, the keys of the batches so far, (m, K).
    """

    free: Mapping[int, FreeDirections]
    settings: ValueSettings
    ridge: float = 10.0
    earlier: dict[int, Tensor] = field(default_factory=dict)

    def edit(self, body: FeedForwards, head: Head, requests: Sequence[Request]) -> dict[int, LowRank]:
        """Edit the next batch.

        Returns:
            The updates by layer, one column per request, which the model has already received.

        Raises:
            ValueError: as `memit`.
        """
        layers = sorted(self.free)

        def adjusted(layer: int, keys_mN: Tensor) -> Tensor:
            earlier_mK = self.earlier.get(layer, keys_mN[:, :0])
            return alphaedit_keys(self.free[layer], keys_mN, earlier_mK, self.ridge)

        updates = _spread(body, head, requests, layers, self.settings, adjusted)
        for layer in layers:  # keys of the model after the whole batch
            keys_mN = grouped_keys(body, requests, layer)
            self.earlier[layer] = torch.cat([self.earlier.get(layer, keys_mN[:, :0]), keys_mN], 1)
        return updates


# Cached values, written into the weights


@dataclass(frozen=True)
class Bakeable:
    """One edited fact, as the cache holds it, with the prompts where it is to work without the cache.

    Attributes:
        rows: the edit prompts of all languages.
        neurons: by layer.
        values: by layer.
        apply_to_end: whether values are added from the lookup position to the prompt's end, or there alone.
    """

    rows: tuple[Row, ...]
    neurons: Mapping[int, Tensor]
    values: Mapping[int, Tensor]
    apply_to_end: bool


def bake(
    body: FeedForwards,
    facts: Sequence[Bakeable],
    covariances: Mapping[int, Covariance],
    *,
    covariance_weight: float = 15_000.0,
) -> list[dict[int, LowRank]]:
    """Change the weights so that the prompts' neurons give what the cached values would add.

    Each layer has its own values, so nothing is spread; keys are those of the model with the lower layers changed.

    Returns:
        For each fact its part of the updates by layer, which the model has already received.
    """
    layers = sorted({layer for fact in facts for layer in fact.neurons})
    parts: list[dict[int, LowRank]] = [{} for _ in facts]
    for layer in layers:
        weight_dm = body.weight(layer).detach().double()
        keys, added, owner = [], [], []
        here = [(index, fact) for index, fact in enumerate(facts) if layer in fact.neurons]
        for index, fact in here:
            places = _places(fact)
            keys += places
            value_d = weight_dm[:, fact.neurons[layer]] @ fact.values[layer].double()
            added += [value_d] * len(places)
            owner += [index] * len(places)
        keys_mN = neurons_at(body, keys, [layer])[layer].T
        update = LowRank(torch.stack(added, 1), memit_keys(covariances[layer], keys_mN, covariance_weight))
        add_to_weights(body, {layer: update})
        for index, _ in here:
            parts[index][layer] = update.columns([column for column, fact in enumerate(owner) if fact == index])
    return parts


def grouped_keys(body: FeedForwards, requests: Sequence[Request], layer: int) -> Tensor:
    """(m, N) MEMIT's keys: half the bare prompt's, half the mean of the other contexts', as in all released code."""
    rows = [row.bare() for request in requests for row in request.rows]
    neurons_Rm = neurons_at(body, rows, [layer])[layer].double()
    groups = neurons_Rm.split([len(request.rows) for request in requests])
    return torch.stack([group[0] if len(group) == 1 else (group[0] + group[1:].mean(0)) / 2 for group in groups], 1)


def _spread(body, head, requests, layers, settings, adjusted) -> dict[int, LowRank]:
    body.check_layers(layers)
    site = "block" if body.norm_after(layers[-1]) is None else "mlp"
    if site == "mlp" and len(layers) > 1:
        raise ValueError(
            f"{type(body.transformer).__name__} has a norm after its MLP, so what one layer adds does not arrive as it is at the "
            f"next, and an update cannot be spread over layers {list(layers)}. Name one layer."
        )
    value_Fd = optimise_values(body, head, requests, layers[-1], site, settings).value_Fd.double()
    updates: dict[int, LowRank] = {}
    for done, layer in enumerate(layers):
        now_Fd = outputs_at(body, [request.rows[0] for request in requests], layers[-1], site).double()
        residual_dN = (value_Fd - now_Fd).T / (len(layers) - done)
        updates[layer] = LowRank(residual_dN, adjusted(layer, grouped_keys(body, requests, layer)))
        add_to_weights(body, {layer: updates[layer]})
    return updates


def _places(fact: Bakeable) -> list[Row]:
    """The prompts' positions where values are added, each as a row that is read there."""
    if not fact.apply_to_end:
        return [row.bare() for row in fact.rows]
    return [Row(row.prompt, at) for row in fact.rows for at in range(row.lookup, len(row.prompt))]


def _inverse_of(covariance: Covariance) -> Inverse:
    return inverse(covariance) if isinstance(covariance, Tensor) else covariance
