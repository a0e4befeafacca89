"""Suite `editing`: seconds per fact of the shared values of LU-LAFN, facts optimised together, one by one, one by one with a
pass for each language, and one by one with whole passes, as other editors do; and of ROME and MEMIT beside EasyEdit's, where
the folder of its checkout is given.

All edit the same random Llama, in turns, with the same number of updates for all contenders. LU-LAFN's facts have four
languages; the gap is the distance of a layer's values, relative to their norm, and 1e-4 is allowed: Adam makes rounding of
gradients near 0 larger. For the others see `easyedit`. A number of facts with a larger gap is void: its rows say so and show no
speed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import easyedit
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
    """Rows of the suite: seconds per fact for each number of facts.

    Raises:
        SystemExit: a folder that is no checkout of EasyEdit, an unknown part of the suite, or one that lacks its folder;
            CPU time of several threads or of a GPU.
    """
    parts, clock = _parts(given), _clock(given)
    torch.set_num_threads(given.threads)
    model = _model(given)
    body, head = FeedForwards(model), Head(model.get_output_embeddings().weight)
    updates, counts = _SIZES[given.setting][-2:]
    rows = _values(given, body, head, updates, given.facts or counts, clock) if "values" in parts else []
    methods = [part for part in parts if part != "values"]
    if methods:
        comparison = easyedit.Comparison(given.easyedit, model, body, head, updates)
        for method in methods:
            for count in given.facts or [count for count in counts if count <= easyedit.MOST_FACTS]:
                measured = comparison.measure(method, count, given.warmup, given.steps, clock)
                rows += _rows(count, measured.seconds, measured.gap, easyedit.TOLERANCE)
    unit = "CPU s per fact" if given.cpu_seconds else "s per fact"
    return [{unit if name == "s per fact" else name: value for name, value in row.items()} for row in rows]


def _parts(given: argparse.Namespace) -> list[str]:
    if given.easyedit:
        easyedit.check_folder(given.easyedit)
    possible = ["values", *(("ROME", "MEMIT") if given.easyedit else ())]
    unknown = [name for name in given.only or () if name not in possible]
    if unknown:
        told = "" if given.easyedit else "; ROME and MEMIT need --easyedit CHECKOUT"
        raise SystemExit(f"bench: --only names {', '.join(unknown)}, but here are {', '.join(possible)}{told}.")
    return [name for name in possible if not given.only or name in given.only]


def _clock(given: argparse.Namespace) -> Callable[[], float]:
    if given.cpu_seconds and (given.threads != 1 or given.device != "cpu"):
        raise SystemExit(
            f"bench: --cpu-seconds with {given.threads} threads on {given.device}, but CPU time is that of a free machine for "
            f"one thread on a CPU alone. Add --threads 1 --device cpu, or leave it out."
        )
    return time.process_time if given.cpu_seconds else time.perf_counter


def _values(given: argparse.Namespace, body: FeedForwards, head: Head, updates: int, counts, clock) -> list[dict]:
    edited = [body.num_layers // 2, body.num_layers // 2 + 1]
    vocabulary = body.transformer.config.vocab_size
    optimising = Optimising(steps=updates, kl_weight=0.0, stop_loss=0.0, stop_nll=0.0)
    rows = []
    for count in counts:
        facts = [_fact(number, vocabulary) for number in range(count)]
        neurons = [_neurons(number, body.width, edited) for number in range(count)]

        def alone(facts=facts, neurons=neurons, **how) -> list[Optimised]:
            pairs = zip(facts, neurons, strict=True)
            return [optimise(body, head, [fact], [chosen], optimising, **how)[0] for fact, chosen in pairs]

        contenders = {
            "together": partial(optimise, body, head, facts, neurons, optimising),
            "one by one": alone,
            "one by one, each language": partial(alone, max_tokens=1),
            "one by one, whole passes": partial(alone, reuse=False),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        results: dict[str, list[Optimised]] = {}
        for turn in range(given.warmup + given.steps):
            for name, edit in contenders.items():
                start = clock()
                results[name] = edit()
                if turn >= given.warmup:
                    seconds[name].append((clock() - start) / count)
        together, *others = results.values()
        rows += _rows(count, seconds, max(_largest_gap(together, other) for other in others), _TOLERANCE)
    return rows


def _rows(count: int, seconds: dict[str, list[float]], gap: float, tolerance: float) -> list[dict]:
    """One row per contender, ours first; void where the gap is above the tolerance, or no number."""
    ours = statistics.median(next(iter(seconds.values())))
    rows = []
    for name, taken in seconds.items():
        median = statistics.median(taken)
        row = {"contender": f"{count} facts, {name}", "s per fact": median, "gap": gap, "our speed-up": median / ours}
        void = {} if gap <= tolerance else {"void": "void", "s per fact": None, "our speed-up": None}
        rows.append(row | void)
    return rows


def _largest_gap(together: list[Optimised], alone: list[Optimised]) -> float:
    return max(
        ((ours.values[layer] - theirs.values[layer]).norm() / ours.values[layer].norm()).item()
        for ours, theirs in zip(together, alone, strict=True)
        for layer in ours.values
    )


def _model(given: argparse.Namespace) -> LlamaForCausalLM:
    hidden, width, layers, vocabulary = _SIZES[given.setting][:4]
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
    return LlamaForCausalLM(config).to(given.device, getattr(torch, given.dtype)).eval().requires_grad_(False)


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
