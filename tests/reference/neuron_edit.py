"""The neuron editor and closed-form edits, written for reading: one row at a time, full logits, dense matrices.

h: neurons (input of the down projection) at a lookup position, delta: values, J: neurons of a fact, C: second moments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def statistics(h: Tensor, languages: list[int], name: str, column_norms: Tensor) -> list[list[float]]:
    """One list of scores per language."""
    scores = []
    for language in range(max(languages) + 1):
        prompts = [h[n] for n in range(len(h)) if languages[n] == language]
        row = []
        for j in range(h.shape[1]):
            values = [prompt[j].item() for prompt in prompts]
            if name == "mean_abs":
                row.append(sum(abs(v) for v in values) / len(values))
            elif name == "max_abs":
                row.append(max(abs(v) for v in values))
            elif name == "freq_pos":
                row.append(sum(v > 0 for v in values) / len(values))
            elif name == "contrib":
                row.append(sum(abs(v) for v in values) / len(values) * column_norms[j].item())
        scores.append(row)
    return scores


def chosen_neurons(scores: list[list[float]], k: int, votes: int, fewest: int, most: int) -> list[int]:
    """Top k per language, at least `votes` of them, filled up or cut by the worst rank."""
    m = len(scores[0])
    ranked = [sorted(range(m), key=lambda j: (-row[j], j)) for row in scores]
    worst = [max(order.index(j) for order in ranked) for j in range(m)]
    inside = [j for j in range(m) if sum(j in order[:k] for order in ranked) >= votes]
    by_rank = sorted(range(m), key=lambda j: (worst[j], j))
    for j in by_rank:
        if len(inside) >= fewest:
            break
        if j not in inside:
            inside.append(j)
    if len(inside) > most:
        inside = sorted(inside, key=lambda j: (worst[j], j))[:most]
    return sorted(inside)


def update_losses(logits_of, fact, kl_weight: float, decay: float, deltas, norms) -> tuple[Tensor, list[Tensor]]:
    """Total loss of one fact and the loss of the answer per row.

    logits_of(ids, lookup, edited) gives the logits of one unpadded row, with the values added where they belong.
    """
    rows = []
    for row in fact.rows:
        logits = logits_of(row, True)
        steps = [logits[len(row.prompt) - 1 + t].log_softmax(-1)[y] for t, y in enumerate(row.target)]
        rows.append(-sum(steps) / len(steps))
    nll = 0.0
    for language in range(fact.languages):
        mine = [rows[r] for r in range(len(rows)) if fact.language_of_row[r] == language]
        nll = nll + sum(mine) / len(mine) / fact.languages
    kl = 0.0
    for row in fact.essence:
        log_p = logits_of(row, True)[row.lookup].log_softmax(-1)
        log_q = logits_of(row, False)[row.lookup].log_softmax(-1)
        kl = kl + (log_p.exp() * (log_p - log_q)).sum() / fact.languages
    wd = sum((deltas[layer] ** 2).sum() / norms[layer] for layer in deltas)
    return nll + kl_weight * kl + decay * wd, rows


def adam(delta: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    """Where the last of a list of gradients leads, the earlier ones having been applied already."""
    first, second = torch.zeros_like(delta), torch.zeros_like(delta)
    for gradient in gradients:
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
    t = len(gradients)
    return delta - lr * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)


def in_ball(delta: Tensor, clamp: float, norm2: float) -> Tensor:
    limit = clamp * math.sqrt(norm2)
    return delta if delta.norm() <= limit else delta * (limit / delta.norm())


def memit_change(K: Tensor, residual: Tensor, C: Tensor, weight: float) -> Tensor:
    """arXiv 2210.07229, equation 14."""
    return residual @ K.T @ torch.linalg.inv(weight * C + K @ K.T)


def alphaedit_change(K: Tensor, residual: Tensor, P: Tensor, Q: Tensor, ridge: float) -> Tensor:
    """arXiv 2410.02355, with the right-hand side of the released code."""
    return torch.linalg.solve(P @ (K @ K.T + Q) + ridge * torch.eye(len(P), dtype=P.dtype), P @ K @ residual.T).T


def rome_change(k: Tensor, C: Tensor, v: Tensor, h: Tensor, o: Tensor) -> Tensor:
    """arXiv 2202.05262, equation 2."""
    u = torch.linalg.inv(C) @ k
    u = u / u.norm()
    return torch.outer((v - o) / (h @ u), u)
