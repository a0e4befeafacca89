"""Suite `editing`: seconds per fact of the shared values of LU-LAFN, facts optimised together and one by one.

Both optimise the same random facts of a random Llama in four languages, for the same number of steps, in turns. A number of
facts whose values differ by more than 1e-4 between the two is void: its rows say so and show no speed.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.optimise import FactRows, Optimised, Optimising, optimise
from lit_llm.editing.rows import Row
from lit_llm.losses.head import Head

_SIZES = {  # hidden size, neurons, layers, vocabulary, steps, numbers of facts
    "A": (512, 2048, 12, 32_000, 5, (1, 8, 16, 64)),
    "B": (2048, 8192, 16, 128_256, 5, (1, 8, 16, 64)),
    "tiny": (32, 64, 4, 128, 2, (1, 4)),
}
_LANGUAGES, _PROMPT, _SUBJECT_END, _ANSWER, _NEURONS = 4, 18, 12, 3, 64
_TOLERANCE = 1e-4


def measure(given: argparse.Namespace) -> list[dict]:
    """Rows of the suite: seconds per fact for each number of facts, together and one by one."""
    torch.set_num_threads(given.threads)
    hidden, width, layers, vocabulary, steps, counts = _SIZES[given.setting]
    body, head = _model(given, hidden, width, layers, vocabulary)
    edited = [layers // 2, layers // 2 + 1]
    optimising = Optimising(steps=steps, kl_weight=0.0, stop_loss=0.0, stop_nll=0.0)
    rows = []
    for count in counts:
        facts = [_fact(number, vocabulary) for number in range(count)]
        neurons = [_neurons(number, width, edited) for number in range(count)]
        seconds: dict[str, list[float]] = {"together": [], "one by one": []}
        for turn in range(given.warmup + given.steps):
            start = time.perf_counter()
            together = optimise(body, head, facts, neurons, optimising)
            middle = time.perf_counter()
            alone = [
                optimise(body, head, [fact], [chosen], optimising)[0]
                for fact, chosen in zip(facts, neurons, strict=True)
            ]
            if turn >= given.warmup:
                seconds["together"].append((middle - start) / count)
                seconds["one by one"].append((time.perf_counter() - middle) / count)
        rows += _rows(count, seconds, _largest_gap(together, alone))
    return rows


def _rows(count: int, seconds: dict[str, list[float]], gap: float) -> list[dict]:
    ours = statistics.median(seconds["together"])
    rows = []
    for name, taken in seconds.items():
        median = statistics.median(taken)
        row = {"contender": f"{count} facts, {name}", "s per fact": median, "gap": gap, "our speed-up": median / ours}
        rows.append(row | {"void": "void", "s per fact": None, "our speed-up": None} if gap > _TOLERANCE else row)
    return rows


def _largest_gap(together: list[Optimised], alone: list[Optimised]) -> float:
    return max(
        (ours.values[layer] - theirs.values[layer]).abs().max().item()
        for ours, theirs in zip(together, alone, strict=True)
        for layer in ours.values
    )


def _model(
    given: argparse.Namespace, hidden: int, width: int, layers: int, vocabulary: int
) -> tuple[FeedForwards, Head]:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(given.device, getattr(torch, given.dtype)).eval().requires_grad_(False)
    return FeedForwards(model), Head(model.get_output_embeddings().weight)


def _fact(number: int, vocabulary: int) -> FactRows:
    generator = torch.Generator().manual_seed(number)

    def row() -> Row:
        ids = torch.randint(3, vocabulary, (_PROMPT + _ANSWER,), generator=generator).tolist()
        return Row(ids[:_PROMPT], _SUBJECT_END, ids[_PROMPT:])

    return FactRows(tuple(row() for _ in range(_LANGUAGES)), tuple(range(_LANGUAGES)))


def _neurons(number: int, width: int, layers: list[int]) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(1000 + number)
    count = min(_NEURONS, width)
    return {layer: torch.randperm(width, generator=generator)[:count].sort().values for layer in layers}
