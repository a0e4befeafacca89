"""Divergences, entry by entry, as the papers write them: q the student, p the teacher.

Slow on purpose. Every number is a float64 scalar that autograd can follow, so values and gradients can be compared.
"""

from __future__ import annotations

import torch
from torch import Tensor


def softmax(logits: Tensor, temperature: float = 1.0) -> list[Tensor]:
    powers = [torch.exp((z - logits.detach().max()) / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def cross_entropy(logits: Tensor, target: int) -> Tensor:
    return -torch.log(softmax(logits)[target])


def forward_kl(q, p, **_):
    return sum(p_v * torch.log(p_v / q_v) for q_v, p_v in zip(q, p, strict=True))


def reverse_kl(q, p, **_):
    return sum(q_v * torch.log(q_v / p_v) for q_v, p_v in zip(q, p, strict=True))


def symmetric_kl(q, p, **_):
    return 0.5 * (forward_kl(q, p) + reverse_kl(q, p))


def js(q, p, epsilon=0.0, **_):
    total = 0.0
    for q_v, p_v in zip(q, p, strict=True):
        m_v = (p_v + q_v) / 2
        total = total + 0.5 * p_v * torch.log((p_v + epsilon) / (m_v + epsilon))
        total = total + 0.5 * q_v * torch.log((q_v + epsilon) / (m_v + epsilon))
    return total


def generalized_js(q, p, beta=0.5, **_):
    total = 0.0
    for q_v, p_v in zip(q, p, strict=True):
        m_v = beta * q_v + (1 - beta) * p_v
        total = total + beta * q_v * torch.log(q_v / m_v) + (1 - beta) * p_v * torch.log(p_v / m_v)
    return total


def skewed_forward_kl(q, p, skew=0.1, **_):
    return sum(p_v * torch.log(p_v / (skew * p_v + (1 - skew) * q_v)) for q_v, p_v in zip(q, p, strict=True))


def skewed_reverse_kl(q, p, skew=0.1, **_):
    return sum(q_v * torch.log(q_v / (skew * q_v + (1 - skew) * p_v)) for q_v, p_v in zip(q, p, strict=True))


def adaptive_kl(q, p, alpha=0.5, **_):
    """The tail: the smallest teacher probabilities that together hold at most alpha."""
    gap = {"head": 0.0, "tail": 0.0}
    mass = 0.0
    for p_v, q_v in sorted((float(p_v.detach()), float(q_v.detach())) for p_v, q_v in zip(p, q, strict=True)):
        mass += p_v
        gap["tail" if mass <= alpha else "head"] += abs(p_v - q_v)
    if gap["head"] + gap["tail"] == 0:
        return 0.5 * forward_kl(q, p) + 0.5 * reverse_kl(q, p)
    share = gap["head"] / (gap["head"] + gap["tail"])
    return share * forward_kl(q, p) + (1 - share) * reverse_kl(q, p)


def tvd(q, p, **_):
    return 0.5 * sum(torch.abs(q_v - p_v) for q_v, p_v in zip(q, p, strict=True))


def top1_ce(q, p, **_):
    best = max(range(len(p)), key=lambda v: float(p[v]))
    return -p[best] * torch.log(q[best])


def hierarchical_ranking(q, p, **_):
    """The authors' index-wise comparison of student and teacher probabilities included."""
    teacher_top = sorted(range(len(p)), key=lambda v: -float(p[v]))[:5]
    student_top = sorted(range(len(q)), key=lambda v: -float(q[v].detach()))[:5]
    q_t, q_s, p_s = [q[v] for v in teacher_top], [q[v] for v in student_top], [p[v] for v in student_top]
    total = sum(torch.relu(q_i - q_t[0]) for q_i in q_t)
    for i in range(5):
        for j in range(5):
            if q_s[i] > p_s[j]:
                total = total + torch.relu(q_s[j] - q_t[i])
    return total


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "symmetric_kl": symmetric_kl,
    "js": js,
    "generalized_js": generalized_js,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "tvd": tvd,
    "top1_ce": top1_ce,
    "hierarchical_ranking": hierarchical_ranking,
}


def divergence(
    student: Tensor, teacher: Tensor, name: str, temperature: float = 1.0, teacher_temperature: float = 1.0, **settings
) -> Tensor:
    """Of one token, from logits; the ranking loss ignores temperatures."""
    if name == "hierarchical_ranking":
        temperature = teacher_temperature = 1.0
    q, p = softmax(student, temperature), softmax(teacher.detach(), temperature * teacher_temperature)
    return DIVERGENCES[name](q, p, **settings)
