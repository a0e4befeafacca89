"""How many tokens each process sent to each expert, written down while a run trains."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L


class ExpertCounts(L.Callback):
    """Writes `expert_counts_RANK.json`: for each micro-batch and routed layer the slots of every expert.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.counts: list[list[list[int]]] = []

    def on_train_start(self, trainer, pl_module) -> None:
        routed = pl_module.routed

        def counted(batch):
            nll_T, records = routed(batch)
            self.counts.append([record.counts_N.tolist() for record in records.values()])
            return nll_T, records

        pl_module.routed = counted

    def on_train_end(self, trainer, pl_module) -> None:
        del pl_module.routed
        path = self.folder / f"expert_counts_{trainer.global_rank}.json"
        path.write_text(json.dumps(self.counts))


def read_counts(folder: Path) -> list[list[list[list[int]]]]:
    """By rank, micro-batch, layer and expert."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("expert_counts_*.json"))]
