"""Instruction data: prompts and answers, tokenised once, for methods with one model or with a student and a teacher.

Prompt and answer are tokenised separately without special tokens and the end-of-sequence token is appended to the
answer (arXiv 2406.17328, data of section 4.1). Where the authors keep the first tokens of a prompt that is too long, we
keep its last ones: the cue to answer stands at the end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Optional

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_llm.data.batch import DistillationBatch, SparseTargets, collate_pairs, collate_tokens
from lit_llm.data.planned_data import PlannedData, Split, check_room
from lit_llm.data.rows import check_text
from lit_llm.data.step_sampler import MicroBatch, StepSampler
from lit_llm.data.teacher_store import StoredPart
from lit_llm.data.tokenized import Alignment, Encoding, TokenizedSet, tokenize_rows


class Instructions(PlannedData):
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
        alignment: how tokens of two tokenizers are paired: `bytes` (exact byte spans); `released`, the rule of the code
            of arXiv 2504.11426, for parity; `kth` with k-th; `minimum_edit` (MinED); `groups` that end at one byte.
            None takes the method's; one that the method cannot use is refused.
        batch_size: examples per micro-batch and process (rows, with `pack_to`). None: 8, unless `batch_tokens` is set.
        batch_tokens: padded tokens per micro-batch and process instead: examples of similar length are put together
            until the longest times their number would pass it. With two tokenizers the longer reading counts.
        pack_to: tokens of a row that holds several examples one after the other, none of which sees another. None: one
            example is one row. With two tokenizers both readings of a row stay within it.
        eval_batch_size: examples per batch of validation and test, which are never packed.
        bucket: batches within a window of this many are sorted by length to save padding; 1 turns it off. With
            `batch_tokens` or `pack_to`, examples that share a batch or a row are found within about so many batches.
        drop_last: leave out the training examples that do not fill the last micro-batch. With `batch_tokens` or
            `pack_to` batches are divided instead, and none is left out.
        limit: use only the first rows of every part. None: all.
        num_workers: processes that build batches; 0 builds them in the main process.
        tokenize_workers: processes that tokenise; 0 means one per 4,000 rows, at most the number of cores.
        seed: of the order of training examples; `seed_everything` where it is left out.
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
        alignment: Optional[Alignment] = None,
        batch_size: Optional[int] = None,
        batch_tokens: Optional[int] = None,
        pack_to: Optional[int] = None,
        eval_batch_size: int = 16,
        bucket: int = 8,
        drop_last: bool = True,
        limit: Optional[int] = None,
        num_workers: int = 0,
        tokenize_workers: int = 0,
        seed: Optional[int] = None,
    ) -> None:
        check_room(max_prompt_length, max_length)
        if batch_tokens is not None and batch_size is not None:
            raise ValueError(
                f"data.batch_size ({batch_size}) and data.batch_tokens ({batch_tokens}) both set the size of a "
                f"micro-batch. Keep one, and set the other to null."
            )
        if batch_tokens is not None and pack_to is not None:
            raise ValueError(
                f"data.pack_to ({pack_to}) fills rows with tokens, so data.batch_tokens ({batch_tokens}) has nothing to "
                f"decide. Set data.batch_tokens: null and data.batch_size to the number of rows."
            )
        for name, value in {"batch_tokens": batch_tokens, "pack_to": pack_to}.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}; it counts things and must be at least 1.")
        super().__init__(
            train=train,
            validation=validation,
            test=test,
            columns=columns,
            batch_size=8 if batch_size is None and batch_tokens is None else batch_size,
            eval_batch_size=eval_batch_size,
            bucket=bucket,
            drop_last=drop_last,
            limit=limit,
            num_workers=num_workers,
            tokenize_workers=tokenize_workers,
            seed=seed,
        )
        self.batch_tokens, self.pack_to = batch_tokens, pack_to
        self.alignment = alignment
        self.encoding = Encoding(
            template=template,
            system=system,
            begin=begin,
            supervise=supervise,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            long_prompts=long_prompts,
            long_answers=long_answers,
            alignment=alignment or "bytes",
        )
        self.stored: dict[str, StoredPart] = {}  # what a method has of its teacher on disk, by part

    def _training_sampler(self, examples: TokenizedSet) -> StepSampler:
        if self.batch_tokens is None and self.pack_to is None:
            return super()._training_sampler(examples)
        sampler = self._sampler(
            examples,
            examples.longer_lengths,
            batch_size=self.batch_size,
            batch_tokens=self.batch_tokens,
            pack_to=self.pack_to,
            **self._training_order(),
        )
        rank_zero_info(
            f"train: {len(examples):,} examples in {len(sampler):,} micro-batches per process and epoch, "
            f"{sampler.fill:.0%} of whose tokens are not padding"
        )
        return sampler

    def _batches(self, split: Split) -> InstructionBatches:
        student, teacher = self._tokenizers()
        return InstructionBatches(
            self.sets[split],
            student.pad_token_id,
            None if teacher is None else teacher.pad_token_id,
            self.stored.get(split),
        )

    def _tokenized(self, split: Split) -> TokenizedSet:
        rows = self._rows(split, ("prompt", "response"))
        check_text(rows, self.sources[split], self.columns, ("prompt", "response", "context"), lists=("response",))
        student, teacher = self._tokenizers()
        encoding = replace(self.encoding, alignment=self._alignment(self.trainer.lightning_module))
        return tokenize_rows(rows, encoding, student, teacher, workers=self.tokenize_workers, name=self.sources[split])

    def _alignment(self, method) -> Alignment:
        if self.alignment is None:
            return method.alignments[0]
        if self.alignment not in method.alignments:
            raise ValueError(
                f"data.alignment is {self.alignment!r}, but {type(method).__name__} pairs tokens by "
                f"{' or '.join(map(repr, method.alignments))}.\n  Leave data.alignment out."
            )
        return self.alignment

    def _tokenizers(self):
        """The student's tokenizer and, where it differs, the teacher's, as the method names them."""
        method = self.trainer.lightning_module
        return method.student_tokenizer, method.teacher_tokenizer


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
            [row["student_ids"] for row in rows],
            [row["student_prompt"] for row in rows],
            self.student_pad,
            micro.row_sizes,
        )
        teacher, pairs, pieces = None, (None, None), (None, None)
        if self.teacher_pad is not None:
            teacher = collate_tokens(
                [row["teacher_ids"] for row in rows],
                [row["teacher_prompt"] for row in rows],
                self.teacher_pad,
                micro.row_sizes,
            )
            pairs = collate_pairs(
                student, teacher, [row["pair_student"] for row in rows], [row["pair_teacher"] for row in rows]
            )
            if "pieces_student" in rows[0]:
                pieces = tuple(_joined([row[name] for row in rows]) for name in ("pieces_student", "pieces_teacher"))
        said = None if self.stored is None else self.stored.read(micro.examples)
        sparse = isinstance(said, SparseTargets)
        return DistillationBatch(
            student=student,
            teacher=teacher,
            pair_student_A=pairs[0],
            pair_teacher_A=pairs[1],
            step_tokens=micro.step_tokens,
            step_pairs=micro.step_pairs,
            num_tokens=sum(len(row["student_ids"]) for row in rows),
            examples=micro.examples,
            pieces_student_A=pieces[0],
            pieces_teacher_A=pieces[1],
            teacher_hidden=None if sparse else said,
            teacher_top=said if sparse else None,
        )


def _joined(counts: list[list[int]]) -> Tensor:
    return torch.tensor([count for sequence in counts for count in sequence], dtype=torch.int64)
