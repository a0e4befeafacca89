"""What a block should put out where the subject ends, so that the model gives the new answer: the values of ROME
(arXiv 2202.05262) and MEMIT (arXiv 2210.07229).

One vector of the hidden size per request, added at the lookup position of all of its rows, the essence prompt's too. The
requests of a batch are optimised together; each follows the path that it would take alone.

Shapes: F requests, N positions of a flattened grid, d hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.passes import MAX_TOKENS, run_until
from lit_llm.editing.row_batches import Item, RowBatch, Share, row_shares
from lit_llm.editing.rows import Row, bunches, padded
from lit_llm.losses.head import Head

Site = Literal["mlp", "block"]


@dataclass(frozen=True)
class ValueSettings:
    """How the value of a request is optimised; defaults are those published for Llama-sized models.

    Args:
        evaluations: of the loss at most; there is one update less.
        learning_rate: of Adam.
        weight_decay: of the value's norm relative to the squared norm of what it is added to.
        clamp: the value's norm is kept within this times the norm of what it is added to.
        kl_weight: of KL(edited || untouched) where the essence prompt's subject ends.
        stop_loss: a request is done when its loss is below.
    """

    evaluations: int = 25
    learning_rate: float = 0.5
    weight_decay: float = 1e-3
    clamp: float = 4.0
    kl_weight: float = 0.0625
    stop_loss: float = 0.05

    def __post_init__(self) -> None:
        for name in ("evaluations", "learning_rate", "clamp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"values.{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("weight_decay", "kl_weight", "stop_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"values.{name} is {getattr(self, name)}; it must not be below 0.")


@dataclass(frozen=True)
class Request:
    """What one closed-form edit is computed from.

    Attributes:
        rows: the bare prompt first, then the same behind other contexts; all with the new answer.
        essence: a prompt about the subject whose predictions are to stay.

    Raises:
        ValueError: no rows, or one without an answer.
    """

    rows: tuple[Row, ...]
    essence: Row

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("A request needs at least its bare prompt.")
        for row in self.rows:
            row.require_target()


class Values(NamedTuple):
    """Of a batch of requests.

    Attributes:
        value_Fd: the wanted output.
        start_Fd: the output of the model as it is, at the bare prompts.
        loss_F: the last loss of each request.
        updates_F: updates made for each.
    """

    value_Fd: Tensor
    start_Fd: Tensor
    loss_F: Tensor
    updates_F: Tensor


def optimise_values(
    body: FeedForwards,
    head: Head,
    requests: Sequence[Request],
    layer: int,
    site: Site,
    settings: ValueSettings,
    *,
    max_tokens: int = MAX_TOKENS,
) -> Values:
    """Find the outputs of a layer's MLP, or of its whole block, under which the model gives the new answers.

    Raises:
        ValueError: no request, or a layer that does not exist.
    """
    if not requests:
        raise ValueError("There is no request to optimise a value for.")
    body.check_layers([layer])
    start_Fd = outputs_at(body, [request.rows[0] for request in requests], layer, site)
    dtype = torch.float64 if body.dtype == torch.float64 else torch.float32
    size_F = start_Fd.to(dtype).norm(dim=-1)
    delta_Fd = torch.zeros(start_Fd.shape, dtype=dtype, device=body.device, requires_grad=True)
    optimizer = torch.optim.Adam([delta_Fd], lr=settings.learning_rate)
    shares = _shares(body, requests, layer, max_tokens)
    running_F = torch.ones(len(requests), dtype=torch.bool, device=body.device)
    updates_F = torch.zeros(len(requests), dtype=torch.int64, device=body.device)
    for evaluation in range(settings.evaluations):
        last = evaluation == settings.evaluations - 1
        with torch.set_grad_enabled(not last):
            loss_F = _backward(body, head, shares, delta_Fd, size_F, layer, site, settings)
        running_F &= torch.isfinite(loss_F) & (loss_F >= settings.stop_loss)
        if last or not running_F.any():
            break
        _step(optimizer, delta_Fd, running_F, settings.clamp * size_F)
        updates_F += running_F
    failed_F = ~torch.isfinite(loss_F)
    value_Fd = start_Fd.to(dtype) + delta_Fd.detach().masked_fill(failed_F[:, None], 0.0)
    return Values(value_Fd, start_Fd, loss_F, updates_F)


@torch.no_grad()
def outputs_at(body: FeedForwards, rows: Sequence[Row], layer: int, site: Site) -> Tensor:
    """(rows, d) output of a layer's MLP or block at the lookup position of each prompt."""
    found = torch.empty(len(rows), body.hidden_size, dtype=body.dtype, device=body.device)
    for chosen in bunches([(len(row.prompt), len(row.prompt)) for row in rows], MAX_TOKENS):
        grid = padded([rows[index].prompt for index in chosen], body.device)
        flat_R = grid.flat([rows[index].lookup for index in chosen])

        def keep(output_Nd: Tensor, chosen=chosen, flat_R=flat_R) -> None:
            found[chosen] = output_Nd[flat_R]

        with _at(body, site, layer, keep):
            run_until(body, grid, layer)
    return found


def _shares(body: FeedForwards, requests: Sequence[Request], layer: int, max_tokens: int) -> list[Share]:
    items: list[Item] = []
    for number, request in enumerate(requests):
        items += [Item(number, at, row, 1 / len(request.rows)) for at, row in enumerate(request.rows)]
        items.append(Item(number, None, request.essence, 1.0))
    return row_shares(body, items, "lookup", layer, max_tokens)


def _backward(body, head: Head, shares, delta_Fd, size_F, layer: int, site: Site, settings: ValueSettings) -> Tensor:
    """(F,) losses; leaves the gradient of their sum in `delta_Fd.grad` where gradients are enabled."""
    delta_Fd.grad = torch.zeros_like(delta_Fd)
    decay_F = settings.weight_decay * delta_Fd.norm(dim=-1) / size_F**2
    if decay_F.requires_grad:
        decay_F.sum().backward()
    total_F = decay_F.detach().clone()

    def hooks(batch: RowBatch):
        def add(output_Nd: Tensor) -> Tensor:
            return output_Nd.index_add(0, batch.lookup_A, delta_Fd[batch.fact_A].to(output_Nd.dtype))

        return _at(body, site, layer, add)

    for share in shares:
        nll_F, kl_F, _ = share.losses(hooks, head.detach(), len(delta_Fd))
        loss_F = nll_F + settings.kl_weight * kl_F
        if loss_F.requires_grad:
            loss_F.sum().backward(inputs=[delta_Fd])
        total_F += loss_F.detach()
    return total_F


def _step(optimizer: torch.optim.Optimizer, delta_Fd: Tensor, running_F: Tensor, limit_F: Tensor) -> None:
    """One update of the requests that are still running, then back into the ball around 0."""
    before_Fd = delta_Fd.detach().clone()
    delta_Fd.grad.masked_fill_(~running_F[:, None], 0.0)
    optimizer.step()
    with torch.no_grad():
        norm_F = delta_Fd.norm(dim=-1)
        shrink_F = torch.where(norm_F > limit_F, limit_F / norm_F, torch.ones_like(norm_F))
        delta_Fd.copy_(torch.where(running_F[:, None], delta_Fd * shrink_F[:, None], before_Fd))


def _at(body: FeedForwards, site: Site, layer: int, change):
    return body.at_outputs({layer: change}) if site == "mlp" else body.at_block_outputs({layer: change})
