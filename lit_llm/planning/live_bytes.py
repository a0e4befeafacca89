"""Counts the bytes of tensors that are alive, operation by operation; works on real and on fake tensors."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LARGE = 32 * 2**20  # blocks from here on glibc always gets from the system, and gives back at once


class LiveBytes(TorchDispatchMode):
    """Within it, `now` is the size of all storages that were made inside and still exist, and `peak` its maximum.

    Tensors that came to be before do not count; a storage counts once, however many views it has. `large_peak` is the
    maximum over storages of at least `LARGE` bytes alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.history = 0, [0]
        self.large_peak, self._large = 0, 0
        self._sizes: dict[int, int] = {}

    @property
    def peak(self) -> int:
        return max(self.history)

    def begin(self) -> None:
        """Start a new history from here."""
        self.history = [self.now]

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):
        outputs = function(*arguments, **(settings or {}))
        known = None
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                storage = output.untyped_storage()
                key = storage._cdata
                if key in self._sizes:
                    continue
                if known is None:
                    # what an operation hands back without making it
                    known = {t.untyped_storage()._cdata for t in tree_leaves(arguments) if isinstance(t, torch.Tensor)}
                if key not in known:
                    self._add(storage, key)
        return outputs

    def _add(self, storage: torch.UntypedStorage, key: int) -> None:
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.history.append(self.now)
        if self._sizes[key] >= LARGE:
            self._large += self._sizes[key]
            self.large_peak = max(self.large_peak, self._large)
        weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        size = self._sizes.pop(key, 0)
        self.now -= size
        self._large -= size if size >= LARGE else 0
