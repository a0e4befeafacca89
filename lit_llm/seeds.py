"""The seed of a part of a run where it has none of its own."""

from __future__ import annotations

import os


def run_seed(seed: int | None) -> int:
    """`seed`, or where it is None what Lightning's `seed_everything` was called with (0 where it was not)."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
