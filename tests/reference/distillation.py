"""The losses of vanilla KD, DSKD and the baselines across vocabularies, token by token in float64.

h: hidden states, W: heads (a row per token), s: student, t: teacher. `sg` stops gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.divergences import cross_entropy, divergence, softmax


def sg(tensor: Tensor) -> Tensor:
    return tensor.detach()


def kd(h_s, W_s, gold, h_t, W_t, *, rate: float, tokens: float, **settings) -> Tensor:
    """arXiv 2406.17328, section 2."""
    total = 0.0
    for i in range(len(gold)):
        z_s, z_t = W_s @ h_s[i], sg(W_t @ h_t[i])
        shared = min(len(z_s), len(z_t))
        total = total + (1 - rate) * cross_entropy(z_s, gold[i])
        total = total + rate * divergence(z_s[:shared], z_t[:shared], **settings)
    return total / tokens


def dskd_v1(h_s, W_s, gold, h_t, W_t, P, S, *, rate: float, tokens: float, **settings) -> Tensor:
    """One tokenizer, arXiv 2406.17328, equations 4 to 10. P and S: functions."""
    total = 0.0
    for i in range(len(gold)):
        z_s, z_t = W_s @ h_s[i], sg(W_t @ h_t[i])
        z_ts, z_st = sg(W_s) @ P(sg(h_t[i])), sg(W_t) @ S(h_s[i])
        temperature = settings.get("temperature", 1.0)
        total = total + (1 - rate) * cross_entropy(z_s, gold[i])
        total = total + rate * cross_entropy(z_ts, gold[i])
        total = total + rate * divergence(z_s, sg(z_ts), **settings)
        total = total + rate * divergence(z_st, z_t, "forward_kl", temperature)
    return total / tokens


def dskd_v2(
    h_s,
    W_s,
    gold,
    h_t,
    W_t,
    P,
    S,
    *,
    rate: float,
    tokens: float,
    pairs=None,
    label_of=None,
    threshold: float = 1.0,
    mask: str = "agree",
    masked_mean: str = "agreeing",
    kd_tokens: float | None = None,
    **settings,
) -> Tensor:
    """One tokenizer, or two with exact token alignment: arXiv 2504.11426.

    pairs: (student row, teacher row); label_of: student id of a teacher id, -1 for none. kd_tokens: what the sums of
    distillation terms are divided by; None: the pairs that have a label, as for two tokenizers.
    """
    pairs = [(i, i) for i in range(len(gold))] if pairs is None else pairs
    label_of = list(range(len(W_t))) if label_of is None else label_of
    ce = sum(cross_entropy(W_s @ h_s[i], gold[i]) for i in range(len(gold)))

    kept = []
    for i, j in pairs:
        label = label_of[int((W_t @ h_t[j]).argmax())]
        if 0 <= label < len(W_s):
            kept.append((i, j, label))
    tokens_kd = kd_tokens if kd_tokens is not None else max(len(kept), 1)

    t2s_ce = s2t_kd = torch.zeros((), dtype=torch.float64)
    everywhere, masked = [], []
    for i, j, label in kept:
        z_s, z_t = W_s @ h_s[i], sg(W_t @ h_t[j])
        z_ts, z_st = sg(W_s) @ P(sg(h_t[j])), sg(W_t) @ S(h_s[i])
        t2s_ce = t2s_ce + cross_entropy(z_ts, label)
        s2t_kd = s2t_kd + divergence(z_st, z_t, **settings)
        everywhere.append(divergence(z_s, sg(z_ts), **settings))
        wanted = {"agree": label, "correct": int(gold[i])}.get(mask)
        if mask != "none" and int(z_ts.argmax()) == wanted:
            masked.append(everywhere[-1])
    if mask == "none" or len(masked) > threshold * len(kept):
        t2s_kd = sum(everywhere) / tokens_kd
    else:
        t2s_kd = sum(masked) / (max(len(masked), 1) if masked_mean == "agreeing" else tokens_kd)
    return (1 - rate) * ce / tokens + rate * (t2s_ce / tokens_kd + t2s_kd + s2t_kd / tokens_kd)


def attention(E_s, E_t, s_in, s_next, t_in, t_next, Q) -> Tensor:
    """Scores of one sequence before the softmax, arXiv 2406.17328, section 3.2; keys are already scaled in E_t."""
    rows = []
    for i in range(len(s_in)):
        q = Q(torch.cat([sg(E_s[s_in[i]]), sg(E_s[s_next[i]])]))
        keys = [torch.cat([sg(E_t[t_in[j]]), sg(E_t[t_next[j]])]) for j in range(len(t_in))]
        rows.append(torch.stack([(q * key).sum() / len(key) ** 0.5 for key in keys]))
    return torch.stack(rows)


def deviation(numbers: Tensor) -> Tensor:
    """Unbiased standard deviation over all entries."""
    flat = numbers.flatten()
    mean = sum(flat) / len(flat)
    return (sum((x - mean) ** 2 for x in flat) / (len(flat) - 1)) ** 0.5


def dskd_cma(
    h_s, W_s, gold, h_ts, h_t, W_t, h_st, *, rate: float, tokens: float, teacher_space: str, **settings
) -> Tensor:
    """Two tokenizers with cross-model attention; h_ts and h_st are the attended states."""
    total = 0.0
    for i in range(len(gold)):
        z_s, z_ts = W_s @ h_s[i], sg(W_s) @ h_ts[i]
        total = total + (1 - rate) * cross_entropy(z_s, gold[i]) + rate * cross_entropy(z_ts, gold[i])
        if int(z_ts.argmax()) == int(gold[i]):
            total = total + rate * divergence(z_s, sg(z_ts), **settings)
    for j in range(len(h_t)):
        temperature = settings.get("temperature", 1.0)
        total = total + rate * divergence(sg(W_t) @ h_st[j], sg(W_t @ h_t[j]), teacher_space, temperature)
    return total / tokens


def uld(z_s, z_t) -> Tensor:
    """Universal logit distance of one pair of tokens, arXiv 2402.12030."""
    return sorted_l1(softmax(z_s), softmax(sg(z_t)))


def mined_target(z_t: Tensor | None, gold: int, student_of_teacher: list[int], num_student: int) -> Tensor:
    """Logits of the student's vocabulary: the first teacher token that maps to each, or all on the gold token."""
    target = torch.full((num_student,), -1e5, dtype=torch.float64)
    if z_t is None:
        target[gold] = 100.0
        return target
    for teacher_id in reversed(range(len(student_of_teacher))):
        if student_of_teacher[teacher_id] >= 0:
            target[student_of_teacher[teacher_id]] = z_t[teacher_id]
    return target


def gold(z_s, gold_s, z_t, gold_t, shared=None, *, beta=0.5, matched=1.0, unmatched=1.0) -> Tensor:
    """One group of tokens as TRL's GOLD compares it. z: logits of each piece, gold: the token that it predicts.

    shared: pairs (student id, teacher id); None sorts everything.
    """
    sides = []
    for logits, tokens in ((z_s, gold_s), ([sg(z) for z in z_t], gold_t)):
        rest = 1.0
        for z, token in list(zip(logits, tokens, strict=True))[1:]:
            rest = rest * softmax(z)[token]
        sides.append([p * rest for p in softmax(logits[0])])
    q, p = sides
    if shared is None:
        return sorted_l1(q, p)
    js = 0.0
    for i, j in shared:
        m = beta * q[i] + (1 - beta) * p[j]
        js = js + beta * q[i] * torch.log(q[i] / m) + (1 - beta) * p[j] * torch.log(p[j] / m)
    students, teachers = ({pair[side] for pair in shared} for side in (0, 1))
    rest_q = [x for i, x in enumerate(q) if i not in students]
    rest_p = [x for j, x in enumerate(p) if j not in teachers]
    return matched * js + unmatched * sorted_l1(rest_q, rest_p)


def sorted_l1(q: list[Tensor], p: list[Tensor]) -> Tensor:
    """Both in descending order, the shorter one filled with zeros."""
    q, p = (sorted(side, key=lambda x: float(x.detach()), reverse=True) for side in (q, p))
    longest, zero = max(len(q), len(p)), torch.zeros((), dtype=torch.float64)
    q, p = ([*side, *[zero] * (longest - len(side))] for side in (q, p))
    return sum(torch.abs(q_v - p_v) for q_v, p_v in zip(q, p, strict=True))
