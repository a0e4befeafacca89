"""The routed layer of LayerMoE in float64, one token and one expert at a time (arXiv 2505.22582, sections 5, 6 and 8).

Shapes: M tokens, H hidden size, N experts, k chosen per token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Expert = Callable[[Tensor], Tensor]


def routed_layer(
    x_MH: Tensor,
    router_NH: Tensor,
    experts: list[Expert],
    k: int,
    renormalise: bool = True,
    alone_M: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = sum over chosen experts of g_e E_e(x), and the weights (M, N); every expert sees every token.

    Args:
        alone_M: tokens that use expert 0 alone, with weight one.
    """
    outputs_NMH = torch.stack([expert(x_MH) for expert in experts])
    mixture = []
    for token, x_H in enumerate(x_MH):
        weights_N = torch.zeros(len(experts), dtype=x_MH.dtype)
        if alone_M is not None and alone_M[token]:
            weights_N[0] = 1.0
        else:
            scores_N = (router_NH @ x_H).exp()
            probability_N = scores_N / scores_N.sum()
            chosen = sorted(range(len(experts)), key=lambda e: -probability_N[e].item())[: min(k, len(experts))]
            total = sum(probability_N[e] for e in chosen) if renormalise else 1.0
            weights_N = torch.stack(
                [probability_N[e] / total if e in chosen else torch.zeros_like(x_H[0]) for e in range(len(experts))]
            )
        mixture.append(weights_N)
    mixture_MN = torch.stack(mixture)
    y_MH = torch.stack(
        [sum(mixture_MN[m, e] * outputs_NMH[e, m] for e in range(len(experts))) for m in range(len(x_MH))]
    )
    return y_MH, mixture_MN


def token_gate(x_MH: Tensor, classifier_2H: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Logits (M, 2), and which tokens are judged to be of an original language."""
    logits_M2 = x_MH @ classifier_2H.T
    return logits_M2, logits_M2.softmax(-1)[:, 0] > threshold


def row_gate(x_BTH: Tensor, classifier_2H: Tensor) -> tuple[Tensor, Tensor]:
    """The released gate: logits (B, 2) of the plain sum over positions, and the decision repeated for every position."""
    logits_B2 = torch.stack([classifier_2H @ row_TH.sum(0) for row_TH in x_BTH])
    old_B = logits_B2.argmax(-1) == 0
    return logits_B2, old_B[:, None].expand(x_BTH.shape[:2]).flatten()
