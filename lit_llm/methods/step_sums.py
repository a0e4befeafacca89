"""What training logs of one optimizer step: gathered over its micro-batches and, at its end, over all processes.

Without processes nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["mean", "total", "largest"]


class _Found(NamedTuple):
    kind: Kind
    value: Tensor | float
    count: Tensor | float = 0

    def join(self, other: _Found) -> _Found:
        if self.kind == "largest":
            value = max(self.value, other.value) if isinstance(self.value, float) else self.value.maximum(other.value)
            return self._replace(value=value)
        return self._replace(value=self.value + other.value, count=self.count + other.count)

    def result(self) -> Tensor | float:
        if self.kind != "mean":
            return self.value
        return self.value / (self.count.clamp(min=1) if isinstance(self.count, Tensor) else max(self.count, 1))


class StepSums:
    """Sums by name. Processes may have gathered different names."""

    def __init__(self) -> None:
        self._found: dict[str, _Found] = {}

    def mean(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """A mean: the sums of all micro-batches over their counts, 0 where there is nothing to count."""
        self._join(name, _Found("mean", _detached(total), _detached(count)))

    def total(self, name: str, value: Tensor | float) -> None:
        """What adds up."""
        self._join(name, _Found("total", _detached(value)))

    def largest(self, name: str, value: Tensor | float) -> None:
        """The largest of all."""
        self._join(name, _Found("largest", _detached(value)))

    def here(self) -> dict[str, float]:
        """Of this process, so far."""
        return {name: float(found.result()) for name, found in self._found.items()}

    def take(self, of_all_ranks: Callable[[Any], list[Any]] | None) -> dict[str, Tensor | float]:
        """Of all micro-batches and processes; what follows begins anew.

        Args:
            of_all_ranks: gives the objects of all processes, in the order of their ranks; None: nobody wants the results.
        """
        ours, self._found = self._found, {}
        if of_all_ranks is None:
            return {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ours = _read(ours)
        merged: dict[str, _Found] = {}
        for of_rank in of_all_ranks(ours):
            for name, found in of_rank.items():
                merged[name] = merged[name].join(found) if name in merged else found
        return {name: found.result() for name, found in merged.items()}

    def _join(self, name: str, found: _Found) -> None:
        self._found[name] = self._found[name].join(found) if name in self._found else found


def _detached(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value


def _read(found: dict[str, _Found]) -> dict[str, _Found]:
    """The same in numbers, read from the device at once."""
    tensors = [number for one in found.values() for number in one[1:] if isinstance(number, Tensor)]
    numbers = iter(torch.stack([tensor.double() for tensor in tensors]).tolist() if tensors else [])
    return {
        name: _Found(one.kind, *(next(numbers) if isinstance(n, Tensor) else float(n) for n in one[1:]))
        for name, one in found.items()
    }
