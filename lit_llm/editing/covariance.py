"""Second moments of neurons over ordinary text, which closed-form edits protect; how far they have converged; kept on disk.

C = mean over tokens of h h^T, uncentred, accumulated in float64. The text should hold the languages that are edited, in
equal shares of tokens.

Shapes: B sequences, T columns, m neurons of a layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.passes import run_until
from lit_llm.editing.rows import padded
from lit_llm.models.weights import state_digest
from lit_llm.storage import cache_folder, write_atomically

_PRODUCTS_BEFORE_WIDENING = 64  # chunk products are added up on the device this often before they go to float64
_LEAST_BATCHES, _SMALLEST_BATCH = 16, 64


@dataclass
class SecondMoments:
    """Second moments of some layers, and how far they have converged.

    Attributes:
        moments: by layer, (m, m), float64.
        tokens: that they are means of.
        split_error: by layer, the estimated relative error: half the distance between the moments of even and odd batches,
            relative to the whole (Frobenius norms).
        curve: by layer, (tokens, relative change since half as many tokens), for a figure of convergence.
    """

    moments: dict[int, Tensor]
    tokens: int
    split_error: dict[int, float]
    curve: dict[int, list[tuple[int, float]]]


@torch.no_grad()
def second_moments(
    body: FeedForwards,
    texts: Iterable[Sequence[int]],
    layers: Sequence[int],
    *,
    max_tokens: int = 20_000,
    batch_tokens: int = 4096,
    stop_change: float | None = None,
) -> SecondMoments:
    """Run texts and average h h^T over their tokens, all layers in one pass, which ends after the highest.

    Args:
        body: the model.
        texts: token ids of texts, each short enough for the model.
        layers: which.
        max_tokens: stop at this many; the text that reaches it is cut there.
        batch_tokens: padded tokens of a batch; fewer where `max_tokens` would make fewer than 16 batches, from which the
            error is estimated.
        stop_change: stop earlier, once doubling the tokens changed every layer by less than this share.

    Raises:
        ValueError: no tokens.
    """
    body.check_layers(sorted(layers))
    totals = {layer: _Total(body.width, body.device) for layer in layers}
    tokens, batch_tokens = 0, min(batch_tokens, max(_SMALLEST_BATCH, max_tokens // _LEAST_BATCHES))
    for number, batch in enumerate(_batches(texts, max_tokens, batch_tokens)):
        grid = padded(batch, body.device)
        real_N = grid.mask().flatten().bool()
        tokens += int(grid.length_R.sum())

        def add(layer: int, real_N=real_N, number=number):
            return lambda neurons_Nm: totals[layer].add(neurons_Nm[real_N], number % 2)

        with body.at_inputs({layer: add(layer) for layer in layers}):
            run_until(body, grid, max(layers))
        changes = [total.at_doubling(tokens) for total in totals.values()]
        if stop_change is not None and all(change is not None and change < stop_change for change in changes):
            break
    if not tokens:
        raise ValueError("The texts hold no tokens, so neurons have no second moments. Give some ordinary text.")
    return SecondMoments(
        moments={layer: total.sum() / tokens for layer, total in totals.items()},
        tokens=tokens,
        split_error={layer: total.split_error() for layer, total in totals.items()},
        curve={layer: total.curve for layer, total in totals.items()},
    )


def kept_second_moments(
    body: FeedForwards,
    texts: Iterable[Sequence[int]],
    layers: Sequence[int],
    *,
    max_tokens: int = 20_000,
    batch_tokens: int = 4096,
    model_digest: str | None = None,
    folder: Path | None = None,
) -> SecondMoments:
    """`second_moments`, read from the cache where the same model has run over the same tokens.

    Args:
        model_digest: sha256 of the model's weights; None computes it.
        folder: of the cache; None: `covariance` in the project's.

    Raises:
        ValueError: no tokens.
    """
    chosen = list(_cut(texts, max_tokens))
    name = hashlib.sha256(
        json.dumps([model_digest or state_digest(body.transformer), sorted(layers), max_tokens, batch_tokens]).encode()
    )
    for ids in chosen:
        name.update(json.dumps(list(ids)).encode())
    file = (folder or cache_folder() / "covariance") / f"{name.hexdigest()}.safetensors"
    if file.is_file():
        return _read(file, body.device)
    found = second_moments(body, chosen, layers, max_tokens=max_tokens, batch_tokens=batch_tokens)
    write_atomically(file, _as_bytes(found))
    return found


class _Total:
    """Sums of one layer: of even batches, of odd ones, and what they were at the last doubling."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._wide = torch.zeros(2, width, width, dtype=torch.float64, device=device)
        self._recent: list[Tensor | None] = [None, None]
        self._products, self._tokens = 0, [0, 0]
        self._last: tuple[int, Tensor] | None = None
        self.curve: list[tuple[int, float]] = []

    def add(self, neurons_Nm: Tensor, half: int) -> None:
        neurons_Nm = neurons_Nm.to(torch.promote_types(neurons_Nm.dtype, torch.float32))
        product_mm = neurons_Nm.T @ neurons_Nm
        recent = self._recent[half]
        self._recent[half] = product_mm if recent is None else recent.add_(product_mm)
        self._tokens[half] += len(neurons_Nm)
        self._products += 1
        if self._products % _PRODUCTS_BEFORE_WIDENING == 0:
            self._widen()

    def sum(self) -> Tensor:
        self._widen()
        return self._wide.sum(0)

    def at_doubling(self, tokens: int) -> float | None:
        """The relative change since half as many tokens, where the number has doubled just now."""
        if self._last is not None and tokens < 2 * self._last[0]:
            return None
        now_mm = self.sum() / tokens
        change = None if self._last is None else ((now_mm - self._last[1]).norm() / now_mm.norm()).item()
        if change is not None:
            self.curve.append((tokens, change))
        self._last = (tokens, now_mm)
        return change

    def split_error(self) -> float:
        """NaN where there was one batch only."""
        whole = self.sum() / sum(self._tokens)
        if 0 in self._tokens:
            return float("nan")
        even, odd = (self._wide[half] / self._tokens[half] for half in (0, 1))
        return ((even - odd).norm() / 2 / whole.norm()).item()

    def _widen(self) -> None:
        for half, recent in enumerate(self._recent):
            if recent is not None:
                self._wide[half] += recent.double()
        self._recent = [None, None]


def _cut(texts: Iterable[Sequence[int]], max_tokens: int) -> Iterable[Sequence[int]]:
    left = max_tokens
    for ids in texts:
        if left <= 0:
            return
        if len(ids):
            yield list(ids)[:left]
            left -= min(left, len(ids))


def _batches(texts: Iterable[Sequence[int]], max_tokens: int, batch_tokens: int) -> Iterable[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    for ids in _cut(texts, max_tokens):
        if batch and max(len(ids), *(len(other) for other in batch)) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(ids)
    if batch:
        yield batch


def _as_bytes(found: SecondMoments) -> bytes:
    from safetensors.torch import save

    told = {"tokens": found.tokens, "split_error": found.split_error, "curve": found.curve}
    tensors = {str(layer): moments.cpu().contiguous() for layer, moments in found.moments.items()}
    return save(tensors, metadata={"second_moments": json.dumps(told)})


def _read(file: Path, device: torch.device) -> SecondMoments:
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        told = json.loads(stored.metadata()["second_moments"])
        moments = {int(name): stored.get_tensor(name).to(device) for name in stored.keys()}  # noqa: SIM118
    return SecondMoments(
        moments=moments,
        tokens=told["tokens"],
        split_error={int(layer): value for layer, value in told["split_error"].items()},
        curve={int(layer): [tuple(point) for point in points] for layer, points in told["curve"].items()},
    )
