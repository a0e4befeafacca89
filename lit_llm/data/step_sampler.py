"""Which examples make up which micro-batch of which optimizer step, on which rank.

One object plans the whole epoch from a seed, so every rank knows how many supervised tokens the *whole* optimizer step
holds (all accumulation steps, all ranks) before its first backward pass, and a resumed run keeps the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


@dataclass(frozen=True)
class MicroBatch:
    """The examples of one micro-batch and the totals of the optimizer step that it belongs to.

    Attributes:
        examples: indices into the dataset.
        step_tokens: supervised student tokens of the whole optimizer step, all ranks.
        step_pairs: aligned pairs of the whole optimizer step, all ranks.
    """

    examples: tuple[int, ...]
    step_tokens: int
    step_pairs: int


class StepSampler(Sampler[MicroBatch]):
    """Plans an epoch of optimizer steps.

    Args:
        lengths: tokens of each example (padding is decided by the longest of a micro-batch).
        supervised: supervised student tokens of each example.
        pairs: aligned pairs of each example.
        batch_size: examples per micro-batch and rank.
        accumulate: micro-batches per optimizer step.
        rank: this process.
        world_size: number of processes.
        shuffle: a new order for each epoch; otherwise the file's order.
        seed: of the order.
        drop_last: leave out the examples that do not fill a micro-batch on every rank.
        bucket: examples are sorted by length within windows of this many micro-batches before they are cut into
            micro-batches, which saves padding; 1 turns it off. The order of micro-batches stays random.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        supervised: Sequence[int],
        pairs: Sequence[int],
        *,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        bucket: int = 1,
    ) -> None:
        self.lengths, self.supervised, self.pairs = lengths, supervised, pairs
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.seed, self.drop_last, self.bucket = shuffle, seed, drop_last, bucket
        self.epoch, self.position = 0, 0

    def __iter__(self) -> Iterator[MicroBatch]:
        yield from self.plan(self.epoch)[self.position :]

    def __len__(self) -> int:
        rows, per_round = len(self.lengths), self.batch_size * self.world_size
        return rows // per_round if self.drop_last else -(-rows // per_round)

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch; the same epoch again keeps the position inside it (a resumed run)."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def plan(self, epoch: int) -> list[MicroBatch]:
        """This rank's micro-batches of one epoch, in order."""
        rounds = self._rounds(epoch)
        planned = []
        for start in range(0, len(rounds), self.accumulate):
            step = rounds[start : start + self.accumulate]
            members = [example for micro_batches in step for micro in micro_batches for example in micro]
            tokens = sum(self.supervised[example] for example in members)
            pairs = sum(self.pairs[example] for example in members)
            planned += [MicroBatch(tuple(micro[self.rank]), tokens, pairs) for micro in step if micro[self.rank]]
        return planned

    def _rounds(self, epoch: int) -> list[list[list[int]]]:
        """Rounds in order; a round is one micro-batch for every rank."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        rows = len(self.lengths)
        order = torch.randperm(rows, generator=generator).tolist() if self.shuffle else list(range(rows))
        per_round = self.batch_size * self.world_size
        if self.drop_last:
            order = order[: rows // per_round * per_round]
        if self.bucket > 1:
            window = per_round * self.bucket
            order = [
                example
                for start in range(0, len(order), window)
                for example in sorted(order[start : start + window], key=lambda i: self.lengths[i])
            ]
        rounds = [order[start : start + per_round] for start in range(0, len(order), per_round)]
        if self.shuffle and self.bucket > 1:
            rounds = [rounds[i] for i in torch.randperm(len(rounds), generator=generator).tolist()]
        # strided, so that the ranks of a length-sorted round carry about the same number of tokens
        return [[members[rank :: self.world_size] for rank in range(self.world_size)] for members in rounds]


class StepLoader(DataLoader):
    """A DataLoader over micro-batches that remembers how many it has handed out, so that a run resumes mid-epoch.

    The dataset is indexed with a `MicroBatch` and returns the finished batch, so collation happens in the workers.
    """

    def __init__(self, dataset: Dataset, sampler: StepSampler, *, num_workers: int = 0) -> None:
        super().__init__(
            dataset,
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else every start of an epoch draws from the generator that dropout uses
            multiprocessing_context="forkserver" if num_workers > 0 else None,
        )

    def __iter__(self):
        for batch in super().__iter__():
            self.sampler.position += 1
            yield batch
        if self.sampler.position >= len(self.sampler):
            self.sampler.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "position": self.sampler.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.epoch, self.sampler.position = state["epoch"], state["position"]
