"""Preference data: prompts with a preferred and another answer, for DPO and what is built on it (arXiv 2503.02832)."""

from __future__ import annotations

from typing import Literal, Optional

from torch import Tensor

from lit_llm.data.batch import PreferenceBatch, TokenBatch, collate_branches, collate_tokens
from lit_llm.data.planned_data import PlannedData, Split, check_room
from lit_llm.data.preference_pairs import PairEncoding, PairSet, tokenize_pairs
from lit_llm.data.step_sampler import MicroBatch, StepSampler
from lit_llm.data.teacher_store import StoredPart


class Preferences(PlannedData):
    """Pairs of answers, one preferred to the other.

    Prompt and answers are tokenised separately and the end-of-sequence token is appended to each answer, so every answer
    token, from the first to that one, is supervised.

    Args:
        train: rows to train on: a .jsonl, .jsonl.gz, .json, .parquet or .csv file, a folder written by
            `datasets.save_to_disk`, a hub id (a part of it: `NAME@train[:1000]`), or `demo-preferences:train` for the
            pairs that are shipped; `demo-preferences:judge` are pairs about other topics, for an independent judge.
        validation: rows to evaluate on while training. None: no validation.
        test: rows for the `test` and `predict` subcommands. None: no test.
        columns: our column -> the file's column. Ours are `chosen` and `rejected`, strings or lists of messages that end
            with the answer, and `prompt`, a string or messages, where the answers do not bring their own. Optional:
            `score_chosen`, `score_rejected`, and `checks`, constraints that a program can test.
        template: how a prompt is written: `alpaca`, `plain` or `chat` (the tokenizer's own). Conversations need `chat`.
        system: system message of the `chat` template, where rows have none of their own.
        begin: put the beginning-of-sequence token first: as the tokenizer does by itself (`auto`), or `never`.
        max_length: tokens of a prompt with an answer.
        max_prompt_length: tokens of a prompt.
        long_prompts: `keep_end`: longer ones lose their oldest turns, then the beginning of the last one, never the
            template's header with its system turn; `drop` the pair; or `refuse` the data.
        long_answers: what happens to an answer that passes max_length: `cut` (no end-of-sequence token), `drop` the pair,
            or `cut_with_eos`, as the code of arXiv 2503.02832 does, which teaches to stop there.
        bad_rows: rows that make no pair (identical answers, an empty answer or prompt, different turns before the two
            answers, ...): `refuse` the data, naming them, or `drop` and count them.
        batch_size: pairs per micro-batch and process.
        eval_batch_size: pairs per batch of validation and test.
        bucket: batches within a window of this many are sorted by length to save padding; 1 turns it off.
        drop_last: leave out the training pairs that do not fill the last micro-batch.
        limit: use only the first rows of every part. None: all.
        num_workers: processes that build batches; 0 builds them in the main process.
        tokenize_workers: processes that tokenise; 0 means one per 4,000 rows, at most the number of cores.
        seed: of the order of training pairs; `seed_everything` where it is left out.

    Attributes:
        reference: part -> (N, 2) log-probabilities of the chosen and rejected answers of each of its pairs under a
            reference model. A method that has them puts them here before batches are read, which then carry them.
        stored: part -> name of a frozen model -> its hidden states on disk; likewise.
    """

    def __init__(
        self,
        train: str = "demo-preferences:train",
        validation: Optional[str] = "demo-preferences:validation",
        test: Optional[str] = "demo-preferences:test",
        columns: Optional[dict[str, str]] = None,
        template: Literal["alpaca", "plain", "chat"] = "chat",
        system: Optional[str] = None,
        begin: Literal["auto", "never"] = "auto",
        max_length: int = 512,
        max_prompt_length: int = 256,
        long_prompts: Literal["keep_end", "drop", "refuse"] = "keep_end",
        long_answers: Literal["cut", "drop", "cut_with_eos"] = "cut",
        bad_rows: Literal["refuse", "drop"] = "refuse",
        batch_size: int = 8,
        eval_batch_size: int = 16,
        bucket: int = 8,
        drop_last: bool = True,
        limit: Optional[int] = None,
        num_workers: int = 0,
        tokenize_workers: int = 0,
        seed: Optional[int] = None,
    ) -> None:
        check_room(max_prompt_length, max_length)
        super().__init__(
            train=train,
            validation=validation,
            test=test,
            columns=columns,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            bucket=bucket,
            drop_last=drop_last,
            limit=limit,
            num_workers=num_workers,
            tokenize_workers=tokenize_workers,
            seed=seed,
        )
        self.bad_rows = bad_rows
        self.encoding = PairEncoding(
            template=template,
            system=system,
            begin=begin,
            max_length=max_length,
            max_prompt_length=max_prompt_length,
            long_prompts=long_prompts,
            long_answers=long_answers,
        )
        self.reference: dict[str, Tensor] = {}
        self.stored: dict[str, dict[str, StoredPart]] = {}

    def _tokenized(self, split: Split) -> PairSet:
        return tokenize_pairs(
            self._rows(split, ("chosen", "rejected")),
            self.encoding,
            self._tokenizer(),
            bad_rows=self.bad_rows,
            workers=self.tokenize_workers,
            name=self.sources[split],
        )

    def _sampler(self, examples: PairSet, lengths: list[int], **settings) -> StepSampler:
        return super()._sampler(examples, lengths, other_supervised=examples.rejected_supervised, **settings)

    def _batches(self, split: Split) -> PreferenceBatches:
        method = self.trainer.lightning_module
        return PreferenceBatches(
            self.sets[split],
            self._tokenizer().pad_token_id,
            self.reference,
            split,
            stored=self.stored.get(split, {}),
            shared_prompts=split != "train" or getattr(method, "trains_on_both", True),
        )

    def _tokenizer(self):
        """The policy's; every other model reads the same tokens."""
        method = self.trainer.lightning_module
        if getattr(method, "teacher_tokenizer", None) is not None:
            raise ValueError(
                f"{type(method).__name__} has a teacher with another tokenizer than the student, but pairs are read by "
                f"one tokenizer. Take a teacher with the student's."
            )
        return method.student_tokenizer


class PreferenceBatches:
    """The finished batch of a `MicroBatch`, for a DataLoader's workers.

    Args:
        examples: the pairs.
        pad_id: any valid id.
        reference: of `Preferences`.
        split: the part.
        stored: name of a frozen model -> its hidden states on disk.
        shared_prompts: collate every prompt with both answers, too.
    """

    def __init__(
        self,
        examples: PairSet,
        pad_id: int,
        reference: dict[str, Tensor],
        split: Split,
        stored: dict[str, StoredPart] | None = None,
        shared_prompts: bool = True,
    ) -> None:
        self.examples, self.pad_id, self.reference, self.split = examples, pad_id, reference, split
        self.stored, self.shared_prompts = stored or {}, shared_prompts

    def __getitem__(self, micro: MicroBatch) -> PreferenceBatch:
        rows = [self.examples[example] for example in micro.examples]
        prompts = [len(row["student_prompt_ids"]) for row in rows]
        chosen, rejected = (
            collate_tokens([[*row["student_prompt_ids"], *row[side]] for row in rows], prompts, self.pad_id)
            for side in ("chosen_ids", "rejected_ids")
        )
        return PreferenceBatch(
            chosen=chosen,
            rejected=rejected,
            step_pairs=micro.step_pairs,
            step_tokens=micro.step_tokens,
            step_rejected_tokens=micro.step_other_tokens,
            num_tokens=int(chosen.length_B.sum() + rejected.length_B.sum()),
            examples=micro.examples,
            both=self._shared(rows) if self.shared_prompts else None,
            reference_B2=self._reference(micro.examples),
            **{f"{name}_hidden": part.read_pairs(micro.examples) for name, part in self.stored.items()},
        )

    def _shared(self, rows: list[dict]) -> TokenBatch:
        columns = ("student_prompt_ids", "chosen_ids", "rejected_ids")
        return collate_branches(*([row[name] for row in rows] for name in columns), self.pad_id)

    def _reference(self, examples: tuple[int, ...]) -> Tensor | None:
        reference_N2 = self.reference.get(self.split)
        if reference_N2 is None:
            return None
        if tuple(reference_N2.shape) != (len(self.examples), 2):
            raise ValueError(
                f"The stored log-probabilities of {self.split} have shape {tuple(reference_N2.shape)}, but the part has "
                f"{len(self.examples)} pairs, so ({len(self.examples)}, 2) is needed. Compute them again."
            )
        return reference_N2[list(examples)]
