"""Fine-tuning of one down projection as a baseline for edits: FT-L, bounded and read from the last prompt token alone,
and FT-M, with teacher forcing over the answer.

Shapes: d hidden size, m neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.passes import Restarted
from lit_llm.editing.rows import Row, padded
from lit_llm.losses.head import Head
from lit_llm.losses.token_log_probs import token_log_probs


@dataclass(frozen=True)
class FineTuning:
    """How one layer is tuned.

    Args:
        objective: `prompt_last` (FT-L) reads all answer tokens from the prediction after the prompt; `answer` (FT-M) is
            ordinary teacher forcing.
        learning_rate: of Adam.
        epochs: over the requests at most.
        bound: after each step every weight is kept within this of where it started; None: no bound. Released
            configurations for 7B models have none, whatever the method's name says.
        stop_loss: a request below it makes no step, and an epoch whose mean is below it is the last.
    """

    objective: Literal["prompt_last", "answer"] = "answer"
    learning_rate: float = 5e-4
    epochs: int = 25
    bound: float | None = None
    stop_loss: float = 0.01

    def __post_init__(self) -> None:
        if self.objective not in ("prompt_last", "answer"):
            raise ValueError(f"fine_tuning.objective is {self.objective!r}; it is prompt_last (FT-L) or answer (FT-M).")
        if self.bound is not None and not self.bound > 0:
            raise ValueError(f"fine_tuning.bound is {self.bound}; it is above 0, or null for none.")


class DenseChange(NamedTuple):
    """A change of a down projection.

    Attributes:
        weight: (d, m), outputs x inputs.
        bias: (d,), None where the module has none.
    """

    weight: Tensor
    bias: Tensor | None


def fine_tune(body: FeedForwards, head: Head, rows: Sequence[Row], layer: int, settings: FineTuning) -> DenseChange:
    """Tune the down projection of a layer on rows, one at a time, and take the change out of the model again.

    Weights are kept in at least float32 while they are tuned. The model is left bit for bit as it was.

    Raises:
        ValueError: no rows, a row without an answer, or quantised weights.
    """
    if not rows:
        raise ValueError("There are no rows to tune on.")
    for row in rows:
        row.require_target()
    body.check_layers([layer])
    body.weight(layer)  # refuses quantised weights
    live = list(body.down(layer).parameters())
    with body.restoring([layer]):
        for parameter in live:
            parameter.requires_grad_(True)
        master = _tuned(body, head.detach(), rows, layer, settings, live)
    changes = dict(zip((name for name, _ in body.down(layer).named_parameters()), master, strict=True))
    weight = changes["weight"].T.contiguous() if body.transposed(layer) else changes["weight"]
    return DenseChange(weight, changes.get("bias"))


def _tuned(body, head, rows, layer, settings, live) -> list[Tensor]:
    """The changes of the live parameters, in at least float32."""
    wide = torch.promote_types(body.dtype, torch.float32)
    start = [parameter.detach().to(wide).clone() for parameter in live]
    master = [value.clone().requires_grad_(True) for value in start]
    optimizer = torch.optim.Adam(master, lr=settings.learning_rate)
    examples = [_Example(body, row, layer, settings.objective) for row in rows]
    for _ in range(settings.epochs):
        losses = []
        for example in examples:
            loss = example.loss(head)
            losses.append(loss.item())
            if losses[-1] < settings.stop_loss:
                continue
            for value, gradient in zip(master, torch.autograd.grad(loss, live), strict=True):
                value.grad = gradient.to(wide)
            optimizer.step()
            with torch.no_grad():
                for parameter, value, first in zip(live, master, start, strict=True):
                    if settings.bound is not None:
                        value.copy_(value.clamp(first - settings.bound, first + settings.bound))
                    parameter.copy_(value)
        if sum(losses) / len(losses) < settings.stop_loss:
            break
    return [value.detach() - first for value, first in zip(master, start, strict=True)]


class _Example:
    """One request: blocks below the tuned layer run once."""

    def __init__(self, body: FeedForwards, row: Row, layer: int, objective: str) -> None:
        at_prompt_end = objective == "prompt_last"
        grid = padded([row.prompt if at_prompt_end else row.inputs], body.device)
        self._run = Restarted(body, grid, layer)
        last = len(row.prompt) - 1
        at = [last] * len(row.target) if at_prompt_end else list(range(last, last + len(row.target)))
        self._at_T = torch.tensor(at, device=body.device)
        self._target_T = torch.tensor(row.target, device=body.device)

    def loss(self, head: Head) -> Tensor:
        hidden_Td = self._run().flatten(0, 1)[self._at_T]
        return -token_log_probs(hidden_Td, head, self._target_T).mean()
