"""Attribution to knowledge neurons by integrated gradients (arXiv 2104.08696), as a comparison for locating.

Shapes: S steps of the path, T columns, m neurons of a layer.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.passes import Restarted
from lit_llm.editing.rows import Row, padded
from lit_llm.losses.head import Head
from lit_llm.losses.token_log_probs import token_log_probs


def integrated_gradients(
    body: FeedForwards, head: Head, row: Row, *, steps: int = 20, site: Literal["neuron", "up"] = "neuron"
) -> Tensor:
    """(layers, m) how much each neuron at the prompt's last token adds to the probability of the answer's first token.

    a / S times the sum over s of the gradient where the neurons are s / (S - 1) times what they are.

    Args:
        row: prompt and answer.
        steps: S, both ends included.
        site: `neuron`, the input of the down projection; or `up`, what enters the nonlinearity, as in the knowledge-neuron
            code of EasyEdit, whose scores are not comparable with the others'.

    Raises:
        ValueError: no answer, fewer than two steps, or an architecture without the site.
    """
    row.require_target()
    if steps < 2:
        raise ValueError(f"steps is {steps}, but the path has two ends at least.")
    grid = padded([row.prompt] * steps, body.device)
    columns = grid.ids_RT.shape[1]
    last_S = torch.arange(steps, device=body.device) * columns + columns - 1
    target_S = torch.full((steps,), row.target[0], device=body.device)
    share_S1 = torch.linspace(0, 1, steps, dtype=body.dtype, device=body.device)[:, None]
    return torch.stack(
        [
            _layer_scores(body, head.detach(), Restarted(body, grid, layer), layer, site, last_S, target_S, share_S1)
            for layer in range(body.num_layers)
        ]
    )


def attributed_neurons(score_Lm: Tensor, threshold: float = 0.3) -> list[tuple[int, int]]:
    """(layer, neuron) of all whose score is above a share of the largest of all layers."""
    return [(layer, neuron) for layer, neuron in (score_Lm > threshold * score_Lm.max()).nonzero().tolist()]


def _layer_scores(body, head, run, layer, site, last_S, target_S, share_S1) -> Tensor:
    path = {}

    def replace(values_Nm: Tensor) -> Tensor:
        path["actual_m"] = values_Nm[last_S[0]].detach()
        path["scaled_Sm"] = (share_S1 * path["actual_m"]).requires_grad_()
        return values_Nm.detach().index_copy(0, last_S, path["scaled_Sm"])

    opened = body.at_inputs({layer: replace}) if site == "neuron" else body.at_ups({layer: replace})
    with opened:
        hidden_Sd = run().flatten(0, 1)[last_S]
    probability_S = token_log_probs(hidden_Sd, head, target_S).exp()
    (gradient_Sm,) = torch.autograd.grad(probability_S.sum(), path["scaled_Sm"])
    return path["actual_m"] * gradient_Sm.mean(0)
