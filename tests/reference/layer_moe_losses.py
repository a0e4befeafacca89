"""Losses and statistics of MoE-LPR (arXiv 2408.11396) and LayerMoE (arXiv 2505.22582), token by token, in float64."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor


def softmax(z_N: Tensor) -> Tensor:
    e_N = torch.exp(z_N - z_N.detach().max())
    return e_N / e_N.sum()


def chosen(z_N: Tensor, k: int) -> list[int]:
    """The k experts with the largest logits."""
    return sorted(range(len(z_N)), key=lambda e: -float(z_N[e]))[:k]


def balance(layers: list[Tensor], k: int, real: list[bool]) -> list[Tensor]:
    """Per layer: N * sum over experts of (share of tokens that chose it) * (its mean probability)."""
    values = []
    for z_MN in layers:
        rows = [z_N for z_N, is_real in zip(z_MN, real, strict=True) if is_real]
        value = 0.0
        for e in range(z_MN.shape[1]):
            share = sum(e in chosen(z_N, k) for z_N in rows) / len(rows)
            value = value + share * sum(softmax(z_N)[e] for z_N in rows) / len(rows)
        values.append(z_MN.shape[1] * value)
    return values


def prior(layers: list[Tensor], old: list[bool]) -> Tensor:
    """Mean over layers and old tokens of -log p_0."""
    terms = [-torch.log(softmax(z_N)[0]) for z_MN in layers for z_N, o in zip(z_MN, old, strict=True) if o]
    return sum(terms) / len(terms)


def released_prior(layers: list[Tensor], old: list[bool]) -> Tensor:
    """Cross-entropy that takes probabilities for logits; mean within layers of equal N, then over the values of N."""
    by_size: dict[int, list[Tensor]] = {}
    for z_MN in layers:
        for z_N, o in zip(z_MN, old, strict=True):
            if o:
                by_size.setdefault(len(z_N), []).append(-torch.log(softmax(softmax(z_N))[0]))
    return sum(sum(terms) / len(terms) for terms in by_size.values()) / len(by_size)


def group_prior(layers: list[Tensor], bounds: list[list[int]], group: list[int], real: list[bool]) -> Tensor:
    """Mean over layers and real tokens of all groups but the newest of -log (mass on experts below the group's bound)."""
    terms = []
    for z_MN, bound in zip(layers, bounds, strict=True):
        for z_N, g, r in zip(z_MN, group, real, strict=True):
            if r and g < len(bound) - 1:
                terms.append(-torch.log(softmax(z_N)[: bound[g]].sum()))
    return sum(terms) / len(terms)


def released_group_prior(z_MN: Tensor, experts: list[list[int]], group: list[int], real: list[bool]) -> Tensor:
    """The unused alternative of a re-release: sum of -log p_e over the experts of the token's own group."""
    terms = [
        sum(-torch.log(softmax(z_N)[e]) for e in experts[g]) for z_N, g, r in zip(z_MN, group, real, strict=True) if r
    ]
    return sum(terms) / len(terms)


def classifier(layers: list[Tensor], old: list[bool], real: list[bool]) -> Tensor:
    """Mean over layers and rows of -log softmax(c)[0 if old else 1]."""
    terms = [
        -torch.log(softmax(c)[0 if o else 1]) for c_M2 in layers for c, o, r in zip(c_M2, old, real, strict=True) if r
    ]
    return sum(terms) / len(terms)


def pairwise_similarity(u_MH: Tensor, v_MH: Tensor) -> float:
    """Mean cosine over all pairs of rows, pair by pair."""
    total = 0.0
    for u in u_MH.double():
        for v in v_MH.double():
            total += float(u @ v / (u.norm() * v.norm()))
    return total / (len(u_MH) * len(v_MH))


def quotas(similarity: list[float], delta: int) -> list[Fraction]:
    """delta * (1/S_i) / sum_j (1/S_j), as rational numbers."""
    inverse = [1 / Fraction(s) for s in similarity]
    return [delta * w / sum(inverse) for w in inverse]


def experts_of_budget(similarity: list[float], total: int, least: int) -> list[int]:
    """The budget rule by trying every delta at which a quota passes a whole number."""
    experts = [least] * len(similarity)
    while sum(experts) < total:
        waiting = [(Fraction(s) * n, layer) for layer, (s, n) in enumerate(zip(similarity, experts, strict=True))]
        experts[min(waiting)[1]] += 1
    return experts


def routing_metrics(z_MN: Tensor, k: int, real: list[bool], old: list[bool]) -> dict[str, float | list[float]]:
    """What is logged of one layer, over real tokens."""
    rows = [(z_N.double(), o) for z_N, o, r in zip(z_MN, old, real, strict=True) if r]
    n = z_MN.shape[1]
    counts = [sum(e in chosen(z_N, k) for z_N, _ in rows) for e in range(n)]
    mean = sum(counts) / n
    shares = [c / sum(counts) for c in counts]
    p = [(softmax(z_N), o) for z_N, o in rows]
    found: dict[str, float | list[float]] = {
        "slots": counts,
        "prob": [sum(float(q[e]) for q, _ in p) / len(p) for e in range(n)],
        "max_violation": n * max(shares) - 1,
        "load_cv": math.sqrt(sum((c - mean) ** 2 for c in counts) / n) / mean,
        "load_entropy": -sum(s * math.log(s) for s in shares if s > 0) / math.log(n),
        "router_entropy": -sum(float(v) * math.log(float(v)) for q, _ in p for v in q) / len(p) / math.log(n),
        "dead_experts": sum(c == 0 for c in counts),
    }
    for name, wanted in (("old", True), ("new", False)):
        group = [q for q, o in p if o is wanted]
        found[f"{name}_top1_expert0"] = sum(int(q.argmax()) == 0 for q in group) / len(group)
        found[f"{name}_prob_expert0"] = sum(float(q[0]) for q in group) / len(group)
    return found
