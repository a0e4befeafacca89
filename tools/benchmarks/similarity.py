"""Suite `similarity`: the mean cosine of all pairs of tokens of two languages, streamed and pair by pair.

Both get the same random states of one layer, in turns; a contender whose value differs from float64's by more than 1e-6
is void. The pairwise form is that of the authors' script: unit vectors, the whole matrix of cosines, its mean.

Shapes: M tokens, H hidden size.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lit_llm.evaluation.language_similarity import UnitVectors

_SIZES = {"A": (10_000, 576), "B": (10_000, 2048), "tiny": (64, 8)}
_CHUNK = 1000  # tokens that a forward hands over at a time
_TOLERANCE = 1e-6


def measure(given: argparse.Namespace) -> list[dict]:
    """Rows of the suite: seconds for two languages at one layer, and how far from float64 the value is."""
    torch.set_num_threads(given.threads)
    tokens, width = _SIZES[given.setting]
    generator = torch.Generator().manual_seed(0)
    shared_H = torch.randn(width, generator=generator)
    a_MH, b_MH = (
        (torch.randn(tokens, width, generator=generator) + shared_H).to(given.device, getattr(torch, given.dtype))
        for _ in range(2)
    )
    exact = float(_unit(a_MH.double()).mean(0) @ _unit(b_MH.double()).mean(0))
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    values: dict[str, float] = {}
    for turn in range(given.warmup + given.steps):
        for name, contender in CONTENDERS.items():
            start = time.perf_counter()
            values[name] = float(contender(a_MH, b_MH))
            if turn >= given.warmup:
                seconds[name].append(time.perf_counter() - start)
    ours = statistics.median(seconds["lit_llm, streamed"])
    rows = []
    for name, taken in seconds.items():
        gap = abs(values[name] - exact)
        row = {"contender": name, "median s": statistics.median(taken), "best s": min(taken), "value": values[name]}
        row |= {"gap": gap, "our speed-up": statistics.median(taken) / ours}
        rows.append(row | {"void": "void", "our speed-up": None} if gap > _TOLERANCE else row)
    return rows


def streamed(a_MH: Tensor, b_MH: Tensor) -> Tensor:
    """lit_llm: running sums of unit vectors."""
    means = []
    for language, states_MH in (("a", a_MH), ("b", b_MH)):
        vectors = UnitVectors(language, 1, states_MH.shape[1], states_MH.device)
        for piece_MH in states_MH.split(_CHUNK):
            vectors.add(0, piece_MH)
        vectors.check()
        means.append(vectors.mean_LH[0])
    return means[0] @ means[1]


def pairwise(a_MH: Tensor, b_MH: Tensor) -> Tensor:
    """All cosines at once, in the states' type, as the authors' script has it."""
    return (_unit(a_MH) @ _unit(b_MH).T).mean()


def _unit(states_MH: Tensor) -> Tensor:
    return states_MH / states_MH.norm(dim=1, keepdim=True)


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lit_llm, streamed": streamed,
    "pairwise": pairwise,
}
