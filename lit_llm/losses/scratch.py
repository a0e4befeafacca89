"""Memory for the logits of a chunk, used again for the next one.

On a CPU, memory that comes fresh from the operating system costs more at its first touch than the product that is written
to it; buffers of a chunk's size are never kept by the allocator. So they are kept here: a few, each as large as the largest
chunk so far, private to their thread. Other devices have allocators that do this themselves.

Shapes: C rows of a chunk, V vocabulary.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_kept = threading.local()


def scratch(name: str, like: Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor that is overwritten by the next call with the same name: for values that die in a chunk.

    Args:
        name: of the buffer; two tensors that live at the same time need two names.
        like: gives device and, unless they are given, shape and dtype.
        shape: of the tensor.
        dtype: of the tensor.
    """
    shape, dtype = tuple(like.shape) if shape is None else shape, dtype or like.dtype
    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=like.device)
    buffers = _kept.__dict__.setdefault("buffers", {})
    numel = torch.Size(shape).numel()
    buffer = buffers.get((name, dtype))
    if buffer is None or buffer.numel() < numel:
        buffers.pop((name, dtype), None)  # freed before the larger one is made
        buffer = buffers[name, dtype] = torch.empty(numel, dtype=dtype)
    # a tensor of its own, not a view: autograd forbids changing views in place
    return torch.empty(0, dtype=dtype).set_(buffer.untyped_storage(), 0, shape)


def release_scratch() -> None:
    """Give the kept memory of this thread back."""
    _kept.__dict__.clear()


def scratch_bytes() -> int:
    """Size of the kept memory of this thread."""
    return sum(buffer.nbytes for buffer in _kept.__dict__.get("buffers", {}).values())


def best_tokens(logits_CV: Tensor) -> Tensor:
    """(C,) the first of the largest entries of each row, as `argmax`; ten times as fast on a CPU."""
    if logits_CV.device.type != "cpu" or logits_CV.dtype not in (torch.float32, torch.float64):
        return logits_CV.argmax(-1)
    return torch.from_numpy(logits_CV.detach().numpy().argmax(-1))
