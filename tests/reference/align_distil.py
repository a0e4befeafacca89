"""Preference losses and adaptive policy distillation, number by number in float64 (arXiv 2503.02832 and its sources).

z: logits of one position, s: policy, d: DPO model, o: other model. w and l: chosen and rejected answer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.divergences import forward_kl, softmax


def log_prob(z: Tensor, token: int) -> Tensor:
    return torch.log(softmax(z)[token])


def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
    return forward_kl(q, p)


def entropy(p: list[Tensor]) -> Tensor:
    return -sum(p_v * torch.log(p_v) for p_v in p)


def expected_gap(p: list[Tensor], d: list[Tensor], o: list[Tensor]) -> Tensor:
    """sum_v p (log d - log o)."""
    return sum(p_v * (torch.log(d_v) - torch.log(o_v)) for p_v, d_v, o_v in zip(p, d, o, strict=True))


def tvd(z_d: Tensor, z_o: Tensor) -> Tensor:
    return 0.5 * sum(abs(p_v - q_v) for p_v, q_v in zip(softmax(z_d), softmax(z_o), strict=True))


def coefficient(z_d, z_o, *, rule, dpo_beta=0.1, beta=None, slope=20.0, floor=1e-3, beta_cap=None):
    """alpha_t and beta_t, section 3.3."""
    if "fixed" in rule:
        return dpo_beta / beta, beta
    alpha = slope * tvd(z_d, z_o) + floor
    return alpha, dpo_beta / alpha if beta_cap is None else min(dpo_beta / alpha, beta_cap)


def teacher(z_d, z_o, alpha, rule) -> Tensor:
    """Logits: z_d + alpha (z_d - z_o), or alpha z_d + (1 - alpha) z_o."""
    if "extrapolation" in rule:
        return torch.stack([d + alpha * (d - o) for d, o in zip(z_d, z_o, strict=True)])
    return torch.stack([alpha * d + (1 - alpha) * o for d, o in zip(z_d, z_o, strict=True)])


def token_loss(z_s, z_d, z_o, *, form="combined", temperature=1.0, tempered="both", **settings) -> Tensor:
    """beta_t KL(policy || teacher), or the same as an anchor and a reward."""
    rule = settings["rule"]
    alpha, beta = coefficient(z_d, z_o, **settings)
    q = softmax(z_s, temperature if tempered == "both" else 1.0)
    if form == "combined":
        return beta * kl(q, softmax(teacher(z_d, z_o, alpha, rule), temperature))
    anchor = softmax(z_d if "extrapolation" in rule else z_o, temperature)
    return beta * kl(q, anchor) - beta * alpha * expected_gap(q, softmax(z_d), softmax(z_o)) / temperature


def dpo(w, l, ref_w, ref_l, *, beta, smoothing=0.0) -> Tensor:
    u = (w - ref_w) - (l - ref_l)
    return -(1 - smoothing) * torch.log(sigmoid(beta * u)) - smoothing * torch.log(sigmoid(-beta * u))


def ipo(w, l, ref_w, ref_l, *, beta, tokens_w=1, tokens_l=1) -> Tensor:
    return ((w - ref_w) / tokens_w - (l - ref_l) / tokens_l - 1 / (2 * beta)) ** 2


def simpo(mean_w, mean_l, *, beta, ratio, smoothing=0.0) -> Tensor:
    margin = beta * (mean_w - mean_l - ratio)
    return -(1 - smoothing) * torch.log(sigmoid(margin)) - smoothing * torch.log(sigmoid(-margin))


def tdpo(w, l, ref_w, ref_l, kl_w, kl_l, *, variant, beta, alpha=1.0) -> Tensor:
    u = (w - ref_w) - (l - ref_l)
    if variant == 1:
        return -torch.log(sigmoid(beta * (u - (kl_l - kl_w))))
    return -torch.log(sigmoid(beta * (u - alpha * (kl_l - kl_w.detach()))))


def kto(policy, reference, desirable: bool, z_0: float, *, beta, weight) -> Tensor:
    d = policy - reference
    return weight * (1 - sigmoid(beta * (d - z_0 if desirable else z_0 - d)))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def advantage(rewards: list[float], values: list[float], at: int, discount: float, decay: float) -> float:
    """sum_k (gamma lambda)^k delta_{t+k} of one answer."""
    total = 0.0
    for t in range(at, len(rewards)):
        after = values[t + 1] if t + 1 < len(values) else 0.0
        total += (discount * decay) ** (t - at) * (rewards[t] + discount * after - values[t])
    return total
