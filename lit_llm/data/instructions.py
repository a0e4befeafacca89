"""Instruction data: prompts and answers, tokenised once, for methods with one model or with a student and a teacher.

Prompt and answer are tokenised separately without special tokens and the end-of-sequence token is appended to the
answer (arXiv 2406.17328, data of section 4.1). Where the authors keep the first tokens of a prompt that is too long, we
keep its last ones: the cue to answer stands at the end.
"""

from __future__ import annotations

from typing import Literal, Optional

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_llm.data.batch import DistillationBatch, SparseTargets, collate_pairs, collate_tokens
from lit_llm.data.rows import load_rows
from lit_llm.data.step_sampler import MicroBatch, StepLoader, StepSampler
from lit_llm.data.teacher_store import StoredPart
from lit_llm.data.tokenized import Encoding, EvaluationPrompt, TokenizedSet, tokenize_rows

Split = Literal["train", "validation", "test"]


class Instructions(L.LightningDataModule):
    """Prompts with answers, for SFT and every kind of distillation.

    Args:
        train: rows to train on: a .jsonl, .jsonl.gz, .json, .parquet or .csv file, a folder written by
            `datasets.save_to_disk`, a hub id (a part of it: `NAME@train[:1000]`), or `demo:train` for the set that is
            shipped.
        validation: rows to evaluate on while training. None: no validation.
        test: rows for the `test` and `predict` subcommands. None: no test.
        columns: our column -> the file's column. Ours are `prompt`, `response` and, optionally, `context`. A response
            that is a list of strings holds several references; the first one is trained on.
        template: how a prompt is written: `alpaca`, `plain` or `chat` (each tokenizer's own).
        system: system message of the `chat` template.
        begin: put the beginning-of-sequence token first: as the tokenizer does by itself (`auto`), or `never`, as in
            the DSKD papers.
        supervise: which tokens are trained on: the `answers`, or `all` of the text.
        max_length: tokens of a whole sequence, the same limit for student and teacher.
        max_prompt_length: tokens of a prompt; longer ones lose their beginning.
        long_prompts: `keep_end`, or `drop` the example.
        long_answers: `cut` at max_length (such an answer gets no end-of-sequence token), or `drop` the example.
        alignment: how tokens of two tokenizers are paired: `bytes` (exact byte spans) or `released`, the rule of the
            authors' code (arXiv 2504.11426), for parity.
        batch_size: examples per micro-batch and process.
        eval_batch_size: the same for validation and test.
        bucket: batches within a window of this many are sorted by length to save padding; 1 turns it off.
        drop_last: leave out the training examples that do not fill the last micro-batch.
        limit: use only the first rows of every part. None: all.
        num_workers: processes that build batches; 0 builds them in the main process.
        tokenize_workers: processes that tokenise; 0 means one per 4,000 rows, at most the number of cores.
        seed: of the order of training examples.
    """

    def __init__(
        self,
        train: str = "demo:train",
        validation: Optional[str] = "demo:validation",
        test: Optional[str] = "demo:test",
        columns: Optional[dict[str, str]] = None,
        template: Literal["alpaca", "plain", "chat"] = "chat",
        system: Optional[str] = None,
        begin: Literal["auto", "never"] = "auto",
        supervise: Literal["answers", "all"] = "answers",
        max_length: int = 512,
        max_prompt_length: int = 256,
        long_prompts: Literal["keep_end", "drop"] = "keep_end",
        long_answers: Literal["cut", "drop"] = "cut",
        alignment: Literal["bytes", "released"] = "bytes",
        batch_size: int = 8,
        eval_batch_size: int = 16,
        bucket: int = 8,
        drop_last: bool = True,
        limit: Optional[int] = None,
        num_workers: int = 0,
        tokenize_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if max_prompt_length >= max_length:
            raise ValueError(
                f"data.max_prompt_length ({max_prompt_length}) leaves no room for an answer within data.max_length "
                f"({max_length}). Lower the first or raise the second."
            )
        for name, value in {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "bucket": bucket}.items():
            if value < 1:
                raise ValueError(f"data.{name} is {value}; it counts things and must be at least 1.")
        self.sources = {"train": train, "validation": validation, "test": test}
        self.columns, self.limit = columns or {}, limit
        self.encoding = Encoding(
            template=template,
            system=system,
            begin=begin,
            supervise=supervise,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            long_prompts=long_prompts,
            long_answers=long_answers,
            alignment=alignment,
        )
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.bucket, self.drop_last, self.seed = bucket, drop_last, seed
        self.num_workers, self.tokenize_workers = num_workers, tokenize_workers
        self.sets: dict[str, TokenizedSet] = {}
        self.stored: dict[str, StoredPart] = {}  # what a method has of its teacher on disk, by part

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
        examples = self.sets["train"]
        per_step = self.batch_size * self.trainer.world_size
        if self.drop_last and len(examples) < per_step:
            raise ValueError(
                f"data.train has {len(examples)} usable examples, fewer than one micro-batch on every process "
                f"({per_step} = batch_size {self.batch_size} x {self.trainer.world_size} processes).\n"
                f"  Lower data.batch_size or set data.drop_last: false."
            )
        sampler = self._sampler(
            examples,
            batch_size=self.batch_size,
            accumulate=self.trainer.accumulate_grad_batches,
            shuffle=True,
            seed=self.seed,
            drop_last=self.drop_last,
            bucket=self.bucket,
        )
        return StepLoader(self._batches("train"), sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader | list:
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader | list:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.prompts("test"), batch_size=self.eval_batch_size, collate_fn=list)

    def prompts(self, split: Split, limit: int | None = None) -> list[EvaluationPrompt]:
        """Prompts of a part for generated answers, in the file's order, or none when the part was not configured."""
        if split not in self.sets:
            return []
        examples = self.sets[split]
        return [examples.prompt(row) for row in range(len(examples) if limit is None else min(limit, len(examples)))]

    def _evaluation_loader(self, split: Split) -> DataLoader | list:
        if split not in self.sets:
            return []
        examples = self.sets[split]
        sampler = self._sampler(examples, batch_size=self.eval_batch_size, bucket=len(examples))
        return DataLoader(self._batches(split), sampler=sampler, batch_size=None, generator=torch.Generator())

    def _sampler(self, examples: TokenizedSet, **settings) -> StepSampler:
        return StepSampler(
            examples.lengths,
            examples.supervised,
            examples.pairs,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            **settings,
        )

    def _batches(self, split: Split) -> InstructionBatches:
        student, teacher = self._tokenizers()
        return InstructionBatches(
            self.sets[split],
            student.pad_token_id,
            None if teacher is None else teacher.pad_token_id,
            self.stored.get(split),
        )

    def _tokenized(self, split: Split) -> TokenizedSet:
        rows = load_rows(self.sources[split], self.columns, ("prompt", "response"))
        if self.limit is not None:
            rows = rows.select(range(min(self.limit, len(rows))))
        student, teacher = self._tokenizers()
        return tokenize_rows(
            rows, self.encoding, student, teacher, workers=self.tokenize_workers, name=self.sources[split]
        )

    def _tokenizers(self):
        """The student's tokenizer and, where it differs, the teacher's, as the method names them."""
        method = self.trainer.lightning_module
        return method.student_tokenizer, method.teacher_tokenizer

    def _splits_of_stage(self, stage: str | None) -> list[Split]:
        wanted = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("test",)}
        splits = wanted[stage or _stage_name(self.trainer)]
        if stage == "test" and self.sources["test"] is None:
            raise ValueError("data.test is not set, so there is nothing to test on. Name a file, or demo:test.")
        return [split for split in splits if self.sources[split] is not None]


class InstructionBatches:
    """The finished batch of a `MicroBatch`, for a DataLoader's workers."""

    def __init__(
        self,
        examples: TokenizedSet,
        student_pad: int,
        teacher_pad: int | None,
        stored: StoredPart | None = None,
    ) -> None:
        self.examples, self.student_pad, self.teacher_pad = examples, student_pad, teacher_pad
        self.stored = stored

    def __getitem__(self, micro: MicroBatch) -> DistillationBatch:
        rows = [self.examples[example] for example in micro.examples]
        student = collate_tokens(
            [row["student_ids"] for row in rows], [row["student_prompt"] for row in rows], self.student_pad
        )
        teacher = pair_student_A = pair_teacher_A = None
        if self.teacher_pad is not None:
            teacher = collate_tokens(
                [row["teacher_ids"] for row in rows], [row["teacher_prompt"] for row in rows], self.teacher_pad
            )
            pair_student_A, pair_teacher_A = collate_pairs(
                student, teacher, [row["pair_student"] for row in rows], [row["pair_teacher"] for row in rows]
            )
        said = None if self.stored is None else self.stored.read(micro.examples)
        sparse = isinstance(said, SparseTargets)
        return DistillationBatch(
            student=student,
            teacher=teacher,
            pair_student_A=pair_student_A,
            pair_teacher_A=pair_teacher_A,
            step_tokens=micro.step_tokens,
            step_pairs=micro.step_pairs,
            num_tokens=sum(len(row["student_ids"]) for row in rows),
            examples=micro.examples,
            teacher_hidden=None if sparse else said,
            teacher_top=said if sparse else None,
        )


def _stage_name(trainer: L.Trainer) -> str:
    return {"fit": "fit", "validate": "validate", "test": "test", "predict": "predict"}[trainer.state.fn.value]
