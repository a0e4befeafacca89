"""Which examples make up which micro-batch of which optimizer step, on which rank.

One object plans the whole epoch from a seed, so every rank knows how many supervised tokens the *whole* optimizer step
holds (all accumulation steps, all ranks) before its first backward pass, and a resumed run keeps the same order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_llm.data.packing import Grouping, Limit, packed_rows, padded_groups


@dataclass(frozen=True)
class MicroBatch:
    """The examples of one micro-batch and the totals of the optimizer step that it belongs to.

    Attributes:
        examples: indices into the dataset.
        step_tokens: supervised student tokens of the whole optimizer step, all ranks.
        step_pairs: aligned pairs of the whole optimizer step, all ranks.
        row_sizes: how many of the examples stand in each row, in order; None: every example has its own row.
        step_other_tokens: supervised tokens of the other answers of the whole optimizer step, where examples have two.
        step_group_tokens: tokens of the whole optimizer step by group, where examples belong to groups.
    """

    examples: tuple[int, ...]
    step_tokens: int
    step_pairs: int
    row_sizes: tuple[int, ...] | None = None
    step_other_tokens: int = 0
    step_group_tokens: tuple[int, ...] = ()


class StepSampler(Sampler[MicroBatch]):
    """Plans an epoch of optimizer steps.

    Args:
        lengths: tokens of each example (padding is decided by the longest of a micro-batch); where two models read it,
            those of the longer side if there is a limit of tokens.
        supervised: supervised student tokens of each example.
        pairs: aligned pairs of each example.
        batch_size: rows per micro-batch and rank: examples, or packed rows with `pack_to`; None with `batch_tokens`.
        accumulate: micro-batches per optimizer step.
        rank: this process.
        world_size: number of processes.
        shuffle: a new order for each epoch; otherwise the file's order.
        seed: of the order.
        drop_last: leave out the examples that do not fill a micro-batch on every rank.
        bucket: examples are sorted by length within windows of this many micro-batches before they are cut into
            micro-batches, which saves padding; 1 turns it off. The order of micro-batches stays random. With a limit of
            tokens, groups are formed within such windows.
        batch_tokens: padded tokens of a micro-batch, instead of `batch_size`.
        pack_to: tokens of a row that holds several examples; None: one example is one row.
        other_supervised: supervised tokens of the other answer of each example, where it has two.
        group_tokens: for each group of examples, the tokens of each example that belong to it.

    With `batch_tokens` or `pack_to` every epoch has the same number of micro-batches, all examples take part, and
    `drop_last` has nothing to drop.

    Raises:
        ValueError: an example is longer than the limit of tokens, or there are fewer examples than ranks.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        supervised: Sequence[int],
        pairs: Sequence[int],
        *,
        batch_size: int | None = None,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        bucket: int = 1,
        batch_tokens: int | None = None,
        pack_to: int | None = None,
        other_supervised: Sequence[int] | None = None,
        group_tokens: Sequence[Sequence[int]] = (),
    ) -> None:
        self.other_supervised, self.group_tokens = other_supervised, group_tokens
        self.lengths, self.supervised, self.pairs = lengths, supervised, pairs
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.seed, self.drop_last, self.bucket = shuffle, seed, drop_last, bucket
        self.epoch, self.position = 0, 0
        self._planned: tuple[int, list[MicroBatch]] | None = None
        self.packed = pack_to is not None
        self.grouping: Grouping | None = None
        if pack_to is not None or batch_tokens is not None:
            packing, budget = ("data.pack_to", pack_to, packed_rows), ("data.batch_tokens", batch_tokens, padded_groups)
            self.grouping = Grouping(
                lengths,
                Limit(*(packing if self.packed else budget)),
                self._order(self._generator(0)),
                per_rank=batch_size if self.packed else 1,
                world_size=world_size,
                bucket=bucket,
            )

    def __iter__(self) -> Iterator[MicroBatch]:
        yield from self.plan(self.epoch)[self.position :]

    def __len__(self) -> int:
        """The micro-batches of the rank that has most; without `drop_last` others may have one less."""
        if self.grouping is not None:
            return self.grouping.num_rounds
        rows, per_round = len(self.lengths), self.batch_size * self.world_size
        return rows // per_round if self.drop_last else -(-rows // per_round)

    @property
    def fill(self) -> float:
        """Share of the tokens of epoch 0 on this rank that are not padding."""
        real = padded = 0
        for micro in self.plan(0):
            lengths, rows = iter(self.lengths[example] for example in micro.examples), []
            for size in micro.row_sizes or [1] * len(micro.examples):
                rows.append(sum(islice(lengths, size)))
            real, padded = real + sum(rows), padded + max(rows) * len(rows)
        return real / padded

    def set_epoch(self, epoch: int) -> None:
        """Begin another epoch; the same epoch again keeps the position inside it (a resumed run)."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def plan(self, epoch: int) -> list[MicroBatch]:
        """This rank's micro-batches of one epoch, in order; the last epoch that was asked for is remembered."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = epoch, self._plan(epoch)
        return self._planned[1]

    def _plan(self, epoch: int) -> list[MicroBatch]:
        rounds = self._rounds(epoch)
        planned = []
        for start in range(0, len(rounds), self.accumulate):
            step = rounds[start : start + self.accumulate]
            members = [example for ranks in step for rows in ranks for row in rows for example in row]
            counts = (self.supervised, self.pairs, self.other_supervised or ())
            totals = tuple(sum(count[example] for example in members) if count else 0 for count in counts)
            groups = tuple(sum(count[example] for example in members) for count in self.group_tokens)
            planned += [self._micro_batch(ranks[self.rank], *totals, groups) for ranks in step if ranks[self.rank]]
        return planned

    def _micro_batch(
        self, rows: list[list[int]], tokens: int, pairs: int, other_tokens: int, groups: tuple[int, ...]
    ) -> MicroBatch:
        sizes = tuple(len(row) for row in rows) if self.packed else None
        examples = tuple(example for row in rows for example in row)
        return MicroBatch(examples, tokens, pairs, sizes, other_tokens, groups)

    def _rounds(self, epoch: int) -> list[list[list[list[int]]]]:
        """Rounds in order; a round is one micro-batch for every rank, a micro-batch is rows of examples."""
        generator = self._generator(epoch)
        order = self._order(generator)
        if self.grouping is None:
            return [self._strided(rows) for rows in self._rounds_of_rows(order, generator)]
        rounds = self.grouping.rounds(order, lambda number: self._permutation(number, generator))
        if self.packed:
            return [self._strided(rows) for rows in rounds]
        return [[[[example] for example in group] for group in groups] for groups in rounds]

    def _strided(self, rows: list[list[int]]) -> list[list[list[int]]]:
        """The rows of each rank; strided, so that those of a length-sorted round carry about the same number of tokens."""
        return [rows[rank :: self.world_size] for rank in range(self.world_size)]

    def _generator(self, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)

    def _order(self, generator: torch.Generator) -> list[int]:
        return self._permutation(len(self.lengths), generator)

    def _permutation(self, number: int, generator: torch.Generator) -> list[int]:
        return torch.randperm(number, generator=generator).tolist() if self.shuffle else list(range(number))

    def _rounds_of_rows(self, order: list[int], generator: torch.Generator) -> list[list[list[int]]]:
        per_round = self.batch_size * self.world_size
        if self.drop_last:
            order = order[: len(order) // per_round * per_round]
        if self.bucket > 1:
            window = per_round * self.bucket
            order = [
                example
                for start in range(0, len(order), window)
                for example in sorted(order[start : start + window], key=lambda i: self.lengths[i])
            ]
        rounds = [[[i] for i in order[start : start + per_round]] for start in range(0, len(order), per_round)]
        if self.shuffle and self.bucket > 1:
            rounds = [rounds[i] for i in torch.randperm(len(rounds), generator=generator).tolist()]
        return rounds


def batches_here(loader: DataLoader) -> int:
    """How many batches of its next epoch a loader has in this process; its length is that of the process that has most.

    Raises:
        ValueError: nobody knows.
    """
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, StepSampler):
        return len(sampler.plan(sampler.epoch))
    try:
        return len(loader)
    except TypeError as error:  # also of a loader whose data has none
        raise ValueError(
            f"The {type(loader).__name__} to evaluate has no length, so processes could not wait for each other. Give it one, or "
            f"leave out strategy.divide_frozen."
        ) from error


def check_share(part: str, examples: int, processes: int) -> None:
    """See that every process has something to evaluate.

    Raises:
        ValueError: there are fewer examples than processes.
    """
    if examples < processes:
        raise ValueError(
            f"data.{part} has {examples} usable examples for {processes} processes, and each must evaluate one. Add examples, or "
            f"lower trainer.devices."
        )


class StepLoader(DataLoader):
    """A DataLoader over micro-batches that remembers how many it has handed out, so that a run resumes mid-epoch.

    The dataset is indexed with a `MicroBatch` and returns the finished batch, so collation happens in the workers.

    Attributes:
        seconds_waited: that the process has spent here until a batch was ready, since the start.
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
        self.seconds_waited = 0.0

    def __iter__(self):
        asked = time.perf_counter()
        for batch in super().__iter__():
            self.sampler.position += 1
            self.seconds_waited += time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()
        if self.sampler.position >= len(self.sampler):
            self.sampler.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "position": self.sampler.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.sampler.epoch, self.sampler.position = state["epoch"], state["position"]
