"""Shards of a teacher store as files: opened, and compared with their check sums."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def readable(file: Path) -> Any:
    """The opened file, as safetensors has it.

    Raises:
        ValueError: cut off, damaged where the file describes itself, or missing.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or missing: {error}\n  Delete it; the next run writes this one shard anew."
        ) from error


def whole_tensors(shard: Any, file: Path) -> dict[str, Tensor]:
    """The tensors of an opened shard as views of the file, all of which is read once.

    Raises:
        ValueError: they are not what was written.
    """
    tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118  not a dictionary
    written = (shard.metadata() or {}).get("crc32")  # older stores have none
    if written is not None and written != (found := check_sum(tensors)):
        raise ValueError(
            f"{file} is damaged: its check sum is {found}, but {written} was written.\n  Delete it; the next run writes this "
            f"one shard anew."
        )
    return tensors


def check_sum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of all bytes, by name."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"
