"""Forward KL after all outcomes outside a kept set are merged into one, written out."""

from __future__ import annotations

import math


def merged_forward_kl(q: list[float], p: list[float], kept: list[int]) -> float:
    """sum over kept tokens and the rest of p log(p / q), in double precision."""
    value, rest_q, rest_p = 0.0, 0.0, 0.0
    for token in range(len(p)):
        if token in kept:
            value += p[token] * math.log(p[token] / q[token])
        else:
            rest_q += q[token]
            rest_p += p[token]
    return value + rest_p * math.log(rest_p / rest_q)
