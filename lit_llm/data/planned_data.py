"""What data modules share: parts and their sources, planned optimizer steps, exact resume, prompts for generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, Optional, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_llm.data.rows import load_rows
from lit_llm.data.step_sampler import MicroBatch, StepLoader, StepSampler, check_share
from lit_llm.data.tokenized import EvaluationPrompt
from lit_llm.seeds import run_seed

Split = Literal["train", "validation", "test"]


class ExampleSet(Protocol):
    """Tokenised examples of one part, by index.

    Attributes:
        summary: with a `text(name)` that says what became of the rows.
        lengths: tokens of each example; examples of similar length share a batch.
        supervised: tokens of each example that a step is normalised by.
        pairs: what of each example is counted in `step_pairs`.
    """

    summary: Any
    lengths: list[int]
    supervised: list[int]
    pairs: list[int]

    def __len__(self) -> int: ...

    def prompt(self, row: int) -> EvaluationPrompt: ...


class PlannedData(L.LightningDataModule, ABC):
    """A data module whose micro-batches know the totals of their optimizer step, over accumulation steps and ranks.

    A subclass says how rows become examples (`_tokenized`) and examples a batch (`_batches`). Its constructor documents the
    arguments.
    """

    def __init__(
        self,
        *,
        train: str,
        validation: Optional[str],
        test: Optional[str],
        columns: Optional[dict[str, str]],
        batch_size: Optional[int],
        eval_batch_size: int,
        bucket: int,
        drop_last: bool,
        limit: Optional[int],
        num_workers: int,
        tokenize_workers: int,
        seed: Optional[int],
    ) -> None:
        super().__init__()
        counts = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "bucket": bucket, "limit": limit}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}; it counts things and must be at least 1.")
        check_workers(num_workers, tokenize_workers)
        self.sources = {"train": train, "validation": validation, "test": test}
        self.columns, self.limit = columns or {}, limit
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.bucket, self.drop_last, self.seed = bucket, drop_last, run_seed(seed)
        self.num_workers, self.tokenize_workers = num_workers, tokenize_workers
        self.sets: dict[str, Any] = {}

    @abstractmethod
    def _tokenized(self, split: Split) -> ExampleSet:
        """The examples of a part, from the cache where they are there."""

    @abstractmethod
    def _batches(self, split: Split):
        """Gives the finished batch of a `MicroBatch` by index, in a DataLoader's worker."""

    def prepare_data(self) -> None:
        """One process per node tokenises; the others then find the result in the cache."""
        for split in self._splits_of_stage(None):
            self._tokenized(split)

    def setup(self, stage: str) -> None:
        for split in self._splits_of_stage(stage):
            if split not in self.sets:
                self.sets[split] = self._tokenized(split)
                rank_zero_info(self.sets[split].summary.text(f"{split} ({self.sources[split]})"))

    def train_dataloader(self) -> StepLoader:
        sampler = self._training_sampler(self.sets["train"])
        return StepLoader(self._batches("train"), sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader | list:
        return self.evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader | list:
        return self.evaluation_loader("test")

    def evaluation_loader(self, split: Split) -> DataLoader | list:
        """Every example of a part once, over all ranks, in batches of similar length; [] where the part is not configured."""
        if split not in self.sets:
            return []
        examples = self.sets[split]
        check_share(split, len(examples), self.trainer.world_size)
        sampler = self._sampler(examples, examples.lengths, batch_size=self.eval_batch_size, bucket=len(examples))
        return DataLoader(self._batches(split), sampler=sampler, batch_size=None, generator=torch.Generator())

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.prompts("test"), batch_size=self.eval_batch_size, collate_fn=list)

    def prompts(self, split: Split, limit: int | None = None) -> list[EvaluationPrompt]:
        """Prompts of a part for generated answers, in the file's order, or none when the part was not configured."""
        if split not in self.sets:
            return []
        examples = self.sets[split]
        return [examples.prompt(row) for row in range(len(examples) if limit is None else min(limit, len(examples)))]

    def upcoming(self, examples: tuple[int, ...], steps: int) -> list[list[MicroBatch]]:
        """This rank's micro-batches from that of `examples` on to the end of the `steps`-th optimizer step, by step.

        Args:
            examples: of a micro-batch of the current epoch.
            steps: optimizer steps, the one of `examples` included; the epoch may end before.
        """
        sampler = self.trainer.train_dataloader.sampler
        planned, accumulate = sampler.plan(sampler.epoch), self.trainer.accumulate_grad_batches
        first = [micro.examples for micro in planned].index(examples)
        begin = first - first % accumulate
        ends = [begin + (number + 1) * accumulate for number in range(steps)]
        parts = [planned[max(end - accumulate, first) : end] for end in ends]
        return [part for part in parts if part]

    def _training_sampler(self, examples: ExampleSet) -> StepSampler:
        self._check_enough(examples)
        return self._sampler(examples, examples.lengths, batch_size=self.batch_size, **self._training_order())

    def _training_order(self) -> dict[str, Any]:
        return {
            "accumulate": self.trainer.accumulate_grad_batches,
            "shuffle": True,
            "seed": self.seed,
            "drop_last": self.drop_last,
            "bucket": self.bucket,
        }

    def _check_enough(self, examples: ExampleSet) -> None:
        processes = self.trainer.world_size
        per_step = self.batch_size * processes
        left = len(examples) % per_step
        if not self.drop_last and 0 < left < processes:
            raise ValueError(
                f"data.train has {len(examples)} usable examples, and data.drop_last is false: the last of them are {left} for "
                f"{processes} processes, which must all make every step.\n"
                f"  Set data.drop_last: true, or give {processes - left} examples more or {left} less."
            )
        if self.drop_last and len(examples) < per_step:
            raise ValueError(
                f"data.train has {len(examples)} usable examples, fewer than one micro-batch on every process "
                f"({per_step} = batch_size {self.batch_size} x {processes} processes).\n"
                f"  Lower data.batch_size or set data.drop_last: false."
            )

    def _sampler(self, examples: ExampleSet, lengths: list[int], **settings) -> StepSampler:
        return StepSampler(
            lengths,
            examples.supervised,
            examples.pairs,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            **settings,
        )

    def _rows(self, split: Split, required: tuple[str, ...]):
        """The first `limit` rows of a part's source, with our names."""
        rows = load_rows(self.sources[split], self.columns, required)
        return rows if self.limit is None else rows.select(range(min(self.limit, len(rows))))

    def _splits_of_stage(self, stage: str | None) -> list[Split]:
        wanted = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("test",)}
        splits = wanted[stage or _stage_name(self.trainer)]
        if stage in ("test", "predict") and self.sources["test"] is None:
            told = "test on" if stage == "test" else "predict"
            raise ValueError(f"data.test is not set, so there is nothing to {told}. Name a file, or a shipped part.")
        return [split for split in splits if self.sources[split] is not None]


def check_workers(num_workers: int, tokenize_workers: int) -> None:
    """See that processes can be counted.

    Raises:
        ValueError: a negative number.
    """
    for name, value in {"num_workers": num_workers, "tokenize_workers": tokenize_workers}.items():
        if value < 0:
            raise ValueError(f"data.{name} is {value}; it counts processes. Set 0 to leave it to lit_llm.")


def check_room(max_prompt_length: int, max_length: int) -> None:
    """See that a prompt of the longest kind leaves room for an answer.

    Raises:
        ValueError: it does not.
    """
    for name, value in {"max_prompt_length": max_prompt_length, "max_length": max_length}.items():
        if value < 1:
            raise ValueError(f"data.{name} is {value}; it counts tokens and must be at least 1.")
    if max_prompt_length >= max_length:
        raise ValueError(
            f"data.max_prompt_length ({max_prompt_length}) leaves no room for an answer within data.max_length "
            f"({max_length}). Lower the first or raise the second."
        )


def _stage_name(trainer: L.Trainer) -> str:
    return {"fit": "fit", "validate": "validate", "test": "test", "predict": "predict"}[trainer.state.fn.value]
