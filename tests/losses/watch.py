"""Watches how large the tensors get that a computation creates."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Records the most elements of any tensor that an operation returned, backward included, and the operations.

    Args:
        ignore: shapes that do not count, such as those of the heads.
    """

    def __init__(self, *ignore: tuple[int, ...]) -> None:
        super().__init__()
        self.ignore, self.elements, self.shape = set(ignore), 0, ()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.add(str(func))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and tuple(leaf.shape) not in self.ignore and leaf.numel() > self.elements:
                self.elements, self.shape = leaf.numel(), tuple(leaf.shape)
        return result
