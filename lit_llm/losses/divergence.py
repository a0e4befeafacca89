"""Divergences between the next-token distributions of a student (q) and a teacher (p), one value per token.

Shapes: T tokens, V vocabulary. Formulas: dskd.md of the design, after arXiv 2406.17328 (v1), 2504.11426 (v2) and
2603.01875. Differences from the authors' code: mixtures are formed with logaddexp, so a token that underflows on both
sides gives no NaN; the adaptive KL weighs both halves equally where the two distributions coincide; JS is exact unless
`epsilon` asks for the published 1e-9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Name = Literal[
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "js",
    "generalized_js",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "tvd",
    "top1_ce",
    "hierarchical_ranking",
]


_USED_BY = {
    "skew": ("skewed_forward_kl", "skewed_reverse_kl"),
    "alpha": ("adaptive_kl",),
    "beta": ("generalized_js",),
    "epsilon": ("js",),
}

_NO_PROBABILITY = 1e4


@dataclass(frozen=True)
class Divergence:
    """How two next-token distributions are compared.

    Args:
        name: forward_kl = KL(teacher || student), reverse_kl, symmetric_kl (their mean), js, generalized_js (`beta`),
            skewed_forward_kl and skewed_reverse_kl (`skew`), adaptive_kl (`alpha`), tvd (total variation), top1_ce
            (cross-entropy on the teacher's best token), hierarchical_ranking (order of the top 5,
            without temperature).
        temperature: divides both logits.
        teacher_temperature: divides the teacher's logits once more.
        skew: share of the first distribution in the mixture of a skewed KL.
        alpha: mass of the tail in the adaptive KL.
        beta: weight of the student in the generalized JS.
        epsilon: added inside every logarithm of js; 1e-9 as released, 0 is exact.
        scale_by_temperature_squared: multiply by temperature^2, which keeps the size of gradients.
    """

    name: Name = "forward_kl"
    temperature: float = 2.0
    teacher_temperature: float = 1.0
    skew: float = 0.1
    alpha: float = 0.5
    beta: float = 0.5
    epsilon: float = 0.0
    scale_by_temperature_squared: bool = False

    def __post_init__(self) -> None:
        if self.name not in get_args(Name):
            raise ValueError(f"divergence.name is {self.name!r}; known are {', '.join(get_args(Name))}.")
        for field in ("temperature", "teacher_temperature"):
            if not getattr(self, field) > 0:
                raise ValueError(f"divergence.{field} is {getattr(self, field)}; a temperature is above 0.")
        for field in ("skew", "alpha", "beta"):
            if not 0 < getattr(self, field) < 1:
                raise ValueError(f"divergence.{field} is {getattr(self, field)}; it is a share between 0 and 1.")
        if self.epsilon < 0:
            raise ValueError(f"divergence.epsilon is {self.epsilon}; it is 0 (exact) or a small positive number.")
        if self.name == "hierarchical_ranking" and self.scale_by_temperature_squared:
            raise ValueError(
                "divergence.scale_by_temperature_squared is true, but divergence.name is 'hierarchical_ranking', which "
                "has no temperature. Leave it at false."
            )
        for field, names in _USED_BY.items():
            if getattr(self, field) != type(self).__dataclass_fields__[field].default and self.name not in names:
                raise ValueError(
                    f"divergence.{field} is {getattr(self, field)}, but divergence.name is {self.name!r}, which does not "
                    f"use it. It belongs to {' and '.join(names)}."
                )

    def __call__(self, student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        """The divergence of every token.

        Args:
            student_TV: logits.
            teacher_TV: logits; no gradient flows into them.

        Returns:
            (T,) in float32, or float64 for float64 input. Vocabulary entries where either logit is not finite add 0.
        """
        student_TV, teacher_TV = at_least_float32(student_TV), at_least_float32(teacher_TV.detach())
        if self.name == "hierarchical_ranking":
            return hierarchical_ranking(student_TV.softmax(-1), teacher_TV.softmax(-1))
        finite_TV = None
        if not (all_finite(student_TV) and all_finite(teacher_TV)):
            finite_TV = torch.isfinite(student_TV) & torch.isfinite(teacher_TV)
            student_TV, teacher_TV = _without_probability(student_TV), _without_probability(teacher_TV)
        log_q_TV = log_softmax(student_TV, self.temperature)
        log_p_TV = log_softmax(teacher_TV, self.temperature * self.teacher_temperature)
        value_T = self.from_log_probabilities(log_q_TV, log_p_TV, finite_TV)
        return value_T * self.temperature**2 if self.scale_by_temperature_squared else value_T

    def from_log_probabilities(self, log_q_TV: Tensor, log_p_TV: Tensor, finite_TV: Tensor | None = None) -> Tensor:
        """The same from log-probabilities that are already tempered; `finite_TV` marks the entries that count."""
        if self.name == "adaptive_kl":
            return adaptive_kl(log_q_TV, log_p_TV, self.alpha, finite_TV)
        if self.name == "top1_ce":
            return top1_cross_entropy(log_q_TV, log_p_TV, finite_TV)
        log_q_TV, log_p_TV = _silenced(log_q_TV, finite_TV), _silenced(log_p_TV, finite_TV)
        match self.name:
            case "forward_kl":
                per_entry_TV = forward_kl(log_q_TV, log_p_TV)
            case "reverse_kl":
                per_entry_TV = reverse_kl(log_q_TV, log_p_TV)
            case "symmetric_kl":
                per_entry_TV = 0.5 * (forward_kl(log_q_TV, log_p_TV) + reverse_kl(log_q_TV, log_p_TV))
            case "js":
                per_entry_TV = js(log_q_TV, log_p_TV, self.epsilon)
            case "generalized_js":
                per_entry_TV = generalized_js(log_q_TV, log_p_TV, self.beta)
            case "skewed_forward_kl":
                per_entry_TV = skewed_kl(log_p_TV, log_q_TV, self.skew)
            case "skewed_reverse_kl":
                per_entry_TV = skewed_kl(log_q_TV, log_p_TV, self.skew)
            case "tvd":
                per_entry_TV = 0.5 * (log_q_TV.exp() - log_p_TV.exp()).abs()
            case other:
                raise ValueError(f"{other} is not defined on log-probabilities.")
        return per_entry_TV.sum(-1)


def log_softmax(logits_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """Tempered log-probabilities, (T, V)."""
    return (logits_TV if temperature == 1.0 else logits_TV / temperature).log_softmax(dim=-1)


def forward_kl(log_q_TV: Tensor, log_p_TV: Tensor) -> Tensor:
    """p (log p - log q) per entry, (T, V)."""
    return log_p_TV.exp() * (log_p_TV - log_q_TV)


def reverse_kl(log_q_TV: Tensor, log_p_TV: Tensor) -> Tensor:
    """q (log q - log p) per entry, (T, V)."""
    return log_q_TV.exp() * (log_q_TV - log_p_TV)


def js(log_q_TV: Tensor, log_p_TV: Tensor, epsilon: float = 0.0) -> Tensor:
    """1/2 p log(p/m) + 1/2 q log(q/m) with m = (p+q)/2 per entry, (T, V); `epsilon` inside every logarithm."""
    if epsilon == 0.0:
        return generalized_js(log_q_TV, log_p_TV, beta=0.5)
    p_TV, q_TV = log_p_TV.exp(), log_q_TV.exp()
    log_m_TV = (0.5 * (p_TV + q_TV) + epsilon).log()
    return 0.5 * (p_TV * ((p_TV + epsilon).log() - log_m_TV) + q_TV * ((q_TV + epsilon).log() - log_m_TV))


def generalized_js(log_q_TV: Tensor, log_p_TV: Tensor, beta: float) -> Tensor:
    """beta q log(q/M) + (1-beta) p log(p/M) with M = beta q + (1-beta) p per entry, (T, V)."""
    log_m_TV = log_mixture(log_q_TV, log_p_TV, beta)
    return beta * log_q_TV.exp() * (log_q_TV - log_m_TV) + (1 - beta) * log_p_TV.exp() * (log_p_TV - log_m_TV)


def skewed_kl(log_a_TV: Tensor, log_b_TV: Tensor, skew: float) -> Tensor:
    """a (log a - log(skew a + (1-skew) b)) per entry, (T, V)."""
    return log_a_TV.exp() * (log_a_TV - log_mixture(log_a_TV, log_b_TV, skew))


def log_mixture(log_a_TV: Tensor, log_b_TV: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b) per entry, (T, V)."""
    return torch.logaddexp(log_a_TV + math.log(share), log_b_TV + math.log1p(-share))


def adaptive_kl(log_q_TV: Tensor, log_p_TV: Tensor, alpha: float, finite_TV: Tensor | None = None) -> Tensor:
    """Forward and reverse KL, weighted by the gap |p - q| in the teacher's head and tail, (T,)."""
    forward_weight_T, reverse_weight_T = adaptive_weights(log_q_TV, log_p_TV, alpha)
    log_q_TV, log_p_TV = _silenced(log_q_TV, finite_TV), _silenced(log_p_TV, finite_TV)
    forward_T, reverse_T = forward_kl(log_q_TV, log_p_TV).sum(-1), reverse_kl(log_q_TV, log_p_TV).sum(-1)
    return forward_weight_T * forward_T + reverse_weight_T * reverse_T


@torch.no_grad()
def adaptive_weights(log_q_TV: Tensor, log_p_TV: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The shares of forward and reverse KL in the adaptive one, (T,) each; they carry no gradient.

    The tail holds the smallest teacher probabilities up to a mass of `alpha`.
    """
    p_TV = log_p_TV.exp()
    sorted_TV, order_TV = p_TV.sort(dim=-1)
    gap_TV = (p_TV - log_q_TV.exp()).abs().gather(-1, order_TV)
    tail_TV = sorted_TV.cumsum(-1) <= alpha
    tail_T = (gap_TV * tail_TV).sum(-1)
    head_T = (gap_TV * ~tail_TV).sum(-1)
    total_T = head_T + tail_T
    head_weight_T = torch.where(total_T > 0, head_T / total_T.where(total_T > 0, 1.0), 0.5)
    return head_weight_T, 1 - head_weight_T


def top1_cross_entropy(log_q_TV: Tensor, log_p_TV: Tensor, finite_TV: Tensor | None = None) -> Tensor:
    """-p log q at the teacher's best token, (T,)."""
    best_T1 = log_p_TV.argmax(-1, keepdim=True)
    value_T1 = -(log_p_TV.gather(-1, best_T1).exp() * log_q_TV.gather(-1, best_T1))
    if finite_TV is not None:
        value_T1 = value_T1.masked_fill(~finite_TV.gather(-1, best_T1), 0.0)
    return value_T1.squeeze(-1)


def hierarchical_ranking(q_TV: Tensor, p_TV: Tensor, k: int = 5) -> Tensor:
    """Hinges on the order of the top k, (T,): arXiv 2603.01875's code, index-wise comparison included."""
    teacher_top_TK = p_TV.topk(k, dim=-1).indices
    student_top_TK = q_TV.topk(k, dim=-1).indices
    q_at_teacher_TK, q_at_student_TK = q_TV.gather(-1, teacher_top_TK), q_TV.gather(-1, student_top_TK)
    p_at_student_TK = p_TV.gather(-1, student_top_TK)
    order_T = (q_at_teacher_TK - q_at_teacher_TK[:, :1]).clamp(min=0).sum(-1)
    intruder_TKK = (q_at_student_TK[:, None, :] - q_at_teacher_TK[:, :, None]).clamp(min=0)
    counted_TKK = q_at_student_TK[:, :, None] > p_at_student_TK[:, None, :]
    return order_T + (intruder_TKK * counted_TKK).sum((-1, -2))


def all_finite(logits: Tensor) -> bool:
    """Whether no logit is infinite or NaN. One reading pass: such a logit makes the sum so, and it may also overflow."""
    return bool(torch.isfinite(logits.detach().sum())) or bool(torch.isfinite(logits).all())


def exclude_infinite_(*logits_TV: Tensor) -> Tensor | None:
    """Take entries that are not finite on any side out of all the distributions, in place.

    They become finite numbers so far below the best entry of their row that they carry no probability, and differences
    and products of them stay finite. A row without a single finite entry becomes NaN.

    Args:
        logits_TV: one tensor per model, of one shape.

    Returns:
        The entries, bool; None where all are finite.
    """
    if all(all_finite(side) for side in logits_TV):
        return None
    finite_TV = torch.isfinite(logits_TV[0])
    for side in logits_TV[1:]:
        finite_TV &= torch.isfinite(side)
    for side in logits_TV:
        best_T1 = side.masked_fill(~finite_TV, -math.inf).amax(-1, keepdim=True)
        side.copy_(torch.where(finite_TV, side, best_T1 - _NO_PROBABILITY))
    return ~finite_TV


def at_least_float32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _silenced(log_TV: Tensor, finite_TV: Tensor | None) -> Tensor:
    # equal on both sides, such entries add 0 to every divergence, and no NaN to its gradient
    return log_TV if finite_TV is None else log_TV.masked_fill(~finite_TV, 0.0)


def _without_probability(logits_TV: Tensor) -> Tensor:
    # one infinite or undefined logit must not make the whole row undefined
    return logits_TV.masked_fill(~torch.isfinite(logits_TV), -math.inf)
