"""Values for the located neurons: one vector per fact, shared by all of its languages and prompts (arXiv 2406.16416).

All facts of a batch are optimised together. Adam works elementwise and the losses are summed over facts, so every fact
follows the path that it would take alone. The published paper names neither loss nor optimiser; those here are this
project's: negative log-likelihood of the new answer, the divergence from the untouched model where the subject ends, and
decay relative to the neurons' own size.

Shapes: F facts, S edited layers, n neurons of a fact in a layer (padded), R rows with answers, A all rows of a batch, N
positions of its flattened grid, m neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.passes import MAX_TOKENS
from lit_llm.editing.row_batches import Item, RowBatch, Share, row_shares
from lit_llm.editing.rows import Apply, Row
from lit_llm.losses.head import Head


@dataclass(frozen=True)
class Optimising:
    """How values are found.

    Args:
        learning_rate: of Adam; about the root mean square of the located activations is a good start.
        steps: updates at most.
        kl_weight: of KL(edited || untouched) at the lookup position of the essence prompts.
        weight_decay: of the squared norm of a layer's values relative to that of the neurons' own activations.
        clamp: the norm of a layer's values is kept within this times that of the neurons' activations.
        stop_loss: a fact is done when its whole loss is below.
        stop_nll: a fact is done when the loss of the answer is below in every language.
        apply: where values are added: from the lookup position to the end (`tail`), at the lookup position alone, or at the
            prompt's last token alone.
    """

    learning_rate: float = 0.2
    steps: int = 50
    kl_weight: float = 0.0625
    weight_decay: float = 0.01
    clamp: float = 6.0
    stop_loss: float = 0.05
    stop_nll: float = 0.02
    apply: Apply = "tail"

    def __post_init__(self) -> None:
        if self.apply not in ("tail", "lookup", "prompt_last"):
            raise ValueError(f"optimising.apply is {self.apply!r}; it is one of tail, lookup, prompt_last.")
        for name in ("learning_rate", "steps", "clamp"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimising.{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("kl_weight", "weight_decay", "stop_loss", "stop_nll"):
            if getattr(self, name) < 0:
                raise ValueError(f"optimising.{name} is {getattr(self, name)}; it must not be below 0.")


@dataclass(frozen=True)
class FactRows:
    """What one fact is optimised on.

    Attributes:
        rows: prompts with their new answers; the first of a language is its bare prompt.
        language_of_row: 0 to L - 1 for each row.
        essence: one prompt per language about the subject, whose predictions are to stay; empty where `kl_weight` is 0.

    Raises:
        ValueError: a row without an answer, a language without rows, essence prompts of another number.
    """

    rows: tuple[Row, ...]
    language_of_row: tuple[int, ...]
    essence: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            row.require_target()
        if len(self.rows) != len(self.language_of_row) or set(self.language_of_row) != set(range(self.languages)):
            raise ValueError(
                f"{len(self.rows)} rows are of the languages {list(self.language_of_row)}; every row has one, counted from 0 "
                f"without gaps."
            )
        if self.essence and len(self.essence) != self.languages:
            raise ValueError(
                f"A fact in {self.languages} languages has {len(self.essence)} essence prompts; give one for each language."
            )

    @property
    def languages(self) -> int:
        return max(self.language_of_row, default=-1) + 1

    def first_rows(self) -> list[Row]:
        """The bare prompt of each language."""
        return [self.rows[self.language_of_row.index(language)] for language in range(self.languages)]

    def row_weights(self) -> list[float]:
        """Languages weigh the same, and the rows of one language weigh the same."""
        counts = [self.language_of_row.count(language) for language in self.language_of_row]
        return [1 / (self.languages * count) for count in counts]


class FactLosses(NamedTuple):
    """Per fact, detached.

    Attributes:
        total_F: nll + kl_weight * kl + weight_decay * decay.
        nll_F: mean over languages of the mean over their rows.
        kl_F: mean over languages.
        decay_F: sum over layers of the squared norm relative to the activations'.
        nll_rows: of each row of each fact.
    """

    total_F: Tensor
    nll_F: Tensor
    kl_F: Tensor
    decay_F: Tensor
    nll_rows: list[Tensor]


@dataclass
class Optimised:
    """The values of one fact.

    Attributes:
        values: for each layer the values of its neurons, in the order of the neurons.
        stop: why it ended: `loss`, `answer` (the answer is likely in every language), `steps`, or `not_finite`, in which
            case all values are 0.
        steps: updates made.
        loss: the last total loss.
        nll: the last loss of the answer, per language.
    """

    values: dict[int, Tensor]
    stop: Literal["loss", "answer", "steps", "not_finite"] = "steps"
    steps: int = 0
    loss: float = float("nan")
    nll: list[float] = field(default_factory=list)


def optimise(
    body: FeedForwards,
    head: Head,
    facts: Sequence[FactRows],
    neurons: Sequence[Mapping[int, Tensor]],
    optimising: Optimising,
    *,
    reuse: bool = True,
    max_tokens: int = MAX_TOKENS,
) -> list[Optimised]:
    """Optimise the values of several facts together.

    Args:
        body: the model, in eval mode.
        head: its output head.
        facts: what each is optimised on.
        neurons: for each fact and layer the indices of its neurons.
        optimising: losses, steps, where values are added.
        reuse: run what no edit changes only once; False repeats the whole pass in every step.
        max_tokens: padded tokens of one forward pass.

    Raises:
        ValueError: facts without rows, or layers that differ between facts.
    """
    values = SharedValues(body, head, facts, neurons, optimising, reuse=reuse, max_tokens=max_tokens)
    optimizer = torch.optim.Adam([values.delta_FSn], lr=optimising.learning_rate)
    results = [Optimised({}) for _ in facts]
    active = set(range(len(facts)))
    for step in range(optimising.steps + 1):
        losses = values.backward(gradient=step < optimising.steps)
        for fact in sorted(active):
            _note(results[fact], facts[fact], losses, fact, step)
            if _ended(results[fact], optimising) or step == optimising.steps:
                active.discard(fact)
                values.freeze(fact, as_nothing=results[fact].stop == "not_finite")
        if not active:
            break
        values.update(optimizer)
        values.drop_frozen()
    for fact, result in enumerate(results):
        result.values = values.of_fact(fact)
    return results


class SharedValues:
    """The values of a batch of facts, their losses and gradients. Arguments as in `optimise`.

    Attributes:
        delta_FSn: the values, the leaf that is optimised, in at least float32.
        norm_FS: squared norm of the neurons' own activations at the bare prompts, mean over languages.
    """

    def __init__(
        self,
        body: FeedForwards,
        head: Head,
        facts: Sequence[FactRows],
        neurons: Sequence[Mapping[int, Tensor]],
        optimising: Optimising,
        *,
        reuse: bool = True,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        if not facts or len(facts) != len(neurons):
            raise ValueError(
                f"{len(facts)} facts with neurons of {len(neurons)}; there must be one at least, and as many."
            )
        if body.transformer.training:
            raise ValueError(
                "The model is in training mode, so dropout would change what is optimised. Call eval() first."
            )
        self.layers = sorted(neurons[0])
        if any(sorted(of_fact) != self.layers for of_fact in neurons):
            raise ValueError("The facts of a batch must be edited in the same layers. Edit them in separate batches.")
        body.check_layers(self.layers)
        self.body, self.head, self.facts, self.optimising = body, head.detach(), list(facts), optimising
        self._reuse, self._max_tokens = reuse, max_tokens
        dtype = torch.float64 if body.dtype == torch.float64 else torch.float32
        self._index_FSn, self._real_FSn = _padded_indices(neurons, self.layers, body.device)
        self.delta_FSn = torch.zeros(self._index_FSn.shape, dtype=dtype, device=body.device, requires_grad=True)
        self._frozen_F = torch.zeros(len(facts), dtype=torch.bool, device=body.device)
        self._shares = self._make_shares(range(len(facts)), read=True)
        self.norm_FS = self._activation_norms()

    def backward(self, *, gradient: bool = True) -> FactLosses:
        """Losses of all facts that are not dropped; leaves the gradient of their sum in `delta_FSn.grad`.

        Args:
            gradient: whether it is wanted; the last losses need none, which saves half of the work.
        """
        self.delta_FSn.grad = torch.zeros_like(self.delta_FSn)
        nll_rows = [torch.zeros(len(fact.rows), dtype=self.delta_FSn.dtype) for fact in self.facts]
        nll_F, kl_F = self.delta_FSn.new_zeros(2, len(self.facts))
        for share in self._shares:
            with torch.set_grad_enabled(gradient):
                share_nll_F, share_kl_F, row_nll_R = share.losses(self._hooks, self.head, len(self.facts))
            if gradient:
                (share_nll_F + self.optimising.kl_weight * share_kl_F).sum().backward(inputs=[self.delta_FSn])
            nll_F, kl_F = nll_F + share_nll_F.detach(), kl_F + share_kl_F.detach()
            for (fact, row), value in zip(share.places, row_nll_R.cpu(), strict=True):
                nll_rows[fact][row] = value
        decay_F = ((self.delta_FSn**2).sum(-1) / self.norm_FS).sum(-1)
        (self.optimising.weight_decay * decay_F).sum().backward()
        total = nll_F + self.optimising.kl_weight * kl_F + self.optimising.weight_decay * decay_F.detach()
        return FactLosses(total, nll_F, kl_F, decay_F.detach(), nll_rows)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """One step for the facts that are not frozen, then back into the ball that `clamp` allows."""
        before_FSn = self.delta_FSn.detach().clone()
        self.delta_FSn.grad.masked_fill_(self._frozen_F[:, None, None], 0.0)
        optimizer.step()
        with torch.no_grad():
            norm_FS = self.delta_FSn.norm(dim=-1)
            limit_FS = self.optimising.clamp * self.norm_FS.sqrt()
            shrink_FS = torch.where(norm_FS > limit_FS, limit_FS / norm_FS, torch.ones_like(norm_FS))
            self.delta_FSn.mul_(shrink_FS[..., None])
            self.delta_FSn.copy_(torch.where(self._frozen_F[:, None, None], before_FSn, self.delta_FSn))

    def freeze(self, fact: int, *, as_nothing: bool = False) -> None:
        """Leave a fact's values as they are, or at 0, from now on."""
        self._frozen_F[fact] = True
        if as_nothing:
            with torch.no_grad():
                self.delta_FSn[fact] = 0.0

    def drop_frozen(self) -> None:
        """Build the shares anew without frozen facts, once these are half of them."""
        held = {fact for share in self._shares for fact, _ in share.places}
        running = [fact for fact in sorted(held) if not self._frozen_F[fact]]
        if 2 * len(running) <= len(held):
            self._shares = self._make_shares(running)

    def of_fact(self, fact: int) -> dict[int, Tensor]:
        """The values of one fact by layer, without padding."""
        real_Sn = self._real_FSn[fact]
        return {layer: self.delta_FSn.detach()[fact, s][real_Sn[s]].clone() for s, layer in enumerate(self.layers)}

    def _activation_norms(self) -> Tensor:
        """(F, S); the neurons were kept when the batches were built, which saves a pass over the prompts."""
        norm_FS = self.delta_FSn.new_zeros(len(self.facts), len(self.layers))
        languages_F = torch.tensor([fact.languages for fact in self.facts], device=self.body.device)
        for batch in (batch for share in self._shares for batch in share.batches):
            owner_P = batch.neurons_fact_P
            for s, layer in enumerate(self.layers):
                chosen_Pn = batch.neurons.pop(layer).to(norm_FS.dtype).gather(1, self._index_FSn[owner_P, s])
                square_P = (chosen_Pn**2 * self._real_FSn[owner_P, s]).sum(-1)
                norm_FS[:, s].index_add_(0, owner_P, square_P)
        return norm_FS / languages_F[:, None]

    def _make_shares(self, facts: Sequence[int], *, read: bool = False) -> list[Share]:
        items: list[Item] = []
        for fact in facts:
            rows = self.facts[fact]
            bare = [rows.language_of_row.index(language) for language in range(rows.languages)] if read else []
            for at, row in enumerate(zip(rows.rows, rows.row_weights(), strict=True)):
                items.append(Item(fact, at, *row, read=at in bare))
            if self.optimising.kl_weight > 0:
                items += [Item(fact, None, row, 1 / rows.languages) for row in rows.essence]
        first_layer = self.layers[0] if self._reuse else None
        read_layers = self.layers if read else ()
        return row_shares(self.body, items, self.optimising.apply, first_layer, self._max_tokens, read_layers)

    def _hooks(self, batch: RowBatch):
        touched_AC1 = batch.touched_AC[..., None]

        def change(s: int):
            def add(neurons_Nm: Tensor) -> Tensor:
                delta_An = (self.delta_FSn[:, s] * self._real_FSn[:, s])[batch.fact_A]
                delta_ACn = delta_An.to(neurons_Nm.dtype)[:, None] * touched_AC1
                index_ACn = self._index_FSn[batch.fact_A, s][:, None].expand_as(delta_ACn)
                neurons_ACm = neurons_Nm.view(*batch.touched_AC.shape, -1)
                return neurons_ACm.scatter_add(2, index_ACn, delta_ACn).flatten(0, 1)

            return add

        return self.body.at_inputs({layer: change(s) for s, layer in enumerate(self.layers)})


def _padded_indices(neurons: Sequence[Mapping[int, Tensor]], layers: Sequence[int], device) -> tuple[Tensor, Tensor]:
    """Indices (F, S, n) and which of them are real; padding points at neuron 0 and is never added."""
    longest = max(len(of_fact[layer]) for of_fact in neurons for layer in layers)
    index_FSn = torch.zeros(len(neurons), len(layers), longest, dtype=torch.int64, device=device)
    real_FSn = torch.zeros_like(index_FSn, dtype=torch.bool)
    for fact, of_fact in enumerate(neurons):
        for s, layer in enumerate(layers):
            found = of_fact[layer]
            if len(found) == 0:
                raise ValueError(f"Fact {fact} has no neurons in layer {layer}; locate at least one there.")
            index_FSn[fact, s, : len(found)] = found.to(device)
            real_FSn[fact, s, : len(found)] = True
    return index_FSn, real_FSn


def _note(result: Optimised, fact_rows: FactRows, losses: FactLosses, fact: int, step: int) -> None:
    rows = losses.nll_rows[fact]
    language_of_row = torch.tensor(fact_rows.language_of_row)
    result.nll = [rows[language_of_row == language].mean().item() for language in range(fact_rows.languages)]
    result.loss, result.steps = losses.total_F[fact].item(), step


def _ended(result: Optimised, optimising: Optimising) -> bool:
    if not torch.isfinite(torch.tensor(result.loss)):
        result.stop = "not_finite"
    elif result.loss < optimising.stop_loss:
        result.stop = "loss"
    elif max(result.nll) < optimising.stop_nll:
        result.stop = "answer"
    else:
        return False
    return True
