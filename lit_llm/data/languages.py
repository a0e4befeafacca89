"""Running text in several languages, in groups: original ones and those to be added (arXiv 2408.11396, 2505.22582)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Optional, Union

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_llm.data.corpora import Corpus, load_corpus
from lit_llm.data.language_mix import Mix, rows_of_languages
from lit_llm.data.language_rows import LanguageBatches, RowSet, Stream, training_order
from lit_llm.data.planned_data import Split, check_workers
from lit_llm.data.step_sampler import StepLoader, StepSampler, check_share
from lit_llm.data.tokenized import EvaluationPrompt, begin_ids
from lit_llm.seeds import run_seed

Sources = Union[str, list[str]]
_PACKAGED = "package-text:software"
DEFAULT_GROUPS = {"old": dict.fromkeys(("en", "es", "fr"), _PACKAGED), "new": dict.fromkeys(("hu", "tr"), _PACKAGED)}
_PROMPT_TOKENS, _REFERENCE_TOKENS = 24, 64


class Languages(L.LightningDataModule):
    """Monolingual corpora of several languages, packed into rows, for continual pre-training and for adding languages.

    Every language is validated on in both stages. The order of a corpus's documents depends on their text and `split_seed`
    alone; its first `validation_share` is held out, the rest is trained on in that order. Stage 2 begins at the other end of that order, so that its text
    is another than that of stage 1 where there is enough.

    Args:
        groups: name of the group -> language -> where its text is; the first group has the original languages, the last
            one is to be added. A source is a .txt or .txt.gz file with one passage a line; a .jsonl, .jsonl.gz, .json,
            .parquet or .csv file, or a folder written by `datasets.save_to_disk`, with a column `text`;
            `hub:NAME@split`; `package-text:software` (docs/languages.md) or `package-text:NAME==VERSION` of any wheel with
            message catalogues; or a list of these. None: packaged text, English, Spanish and French as original languages,
            Hungarian and Turkish as new ones.
        stage: 1 trains on the newest group alone, 2 on all groups.
        tokens: training tokens of an epoch: of all languages together, or language -> tokens. None: as many as the newest
            group has, and what `old_share` adds.
        temperature: languages of a group have shares in proportion to their size to the power of 1 / temperature: 1 by
            size, large evenly.
        old_share: share of the tokens of stage 2 that is text of older groups. None: a third, as released where old and new
            languages are equally many.
        repeat: whether a language may go through its text again to fill its share, in another order.
        validation: language -> source of text that is evaluated on. For others documents are held out of their corpus.
        validation_share: share of the documents of a corpus that is held out.
        validation_tokens: tokens evaluated of each language; None: all that is held out.
        test: language -> source, for the `test` and `predict` subcommands. None: no test.
        limit: use so many documents of each language only.
        columns: {text: NAME}, where the column with text has another name.
        row_length: tokens of a row; the released recipes have 1024 in stage 1, 512 in stage 2.
        isolate_documents: no document sees another one in its row, and none predicts the next one's beginning. As released,
            rows are plain text to the model.
        begin: put the beginning-of-sequence token before each document: as the tokenizer does by itself (`auto`), or
            `never`, as released. It is never predicted.
        batch_size: rows per micro-batch and process.
        eval_batch_size: rows per batch of validation and test.
        num_workers: processes that build batches; 0 builds them in the main process.
        tokenize_workers: processes that tokenise; 0 means one per 4,000 documents, at most the number of cores.
        split_seed: of what is held out and of the order of documents; the same for both stages.
        seed: of the order of rows; `seed_everything` where it is left out.
    """

    def __init__(
        self,
        groups: Optional[dict[str, dict[str, Sources]]] = None,
        stage: Literal[1, 2] = 1,
        tokens: Optional[Union[int, dict[str, int]]] = None,
        temperature: float = 1.0,
        old_share: Optional[float] = None,
        repeat: bool = True,
        validation: Optional[dict[str, Sources]] = None,
        validation_share: float = 0.1,
        validation_tokens: Optional[int] = 4096,
        test: Optional[dict[str, Sources]] = None,
        limit: Optional[int] = None,
        columns: Optional[dict[str, str]] = None,
        row_length: int = 512,
        isolate_documents: bool = False,
        begin: Literal["auto", "never"] = "auto",
        batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        tokenize_workers: int = 0,
        split_seed: int = 0,
        seed: Optional[int] = None,
    ) -> None:
        super().__init__()
        self.groups = DEFAULT_GROUPS if groups is None else groups
        self.languages = _languages(self.groups)
        self.group_names = list(self.groups)
        self.stage = stage
        self.mix = Mix(tokens, temperature, old_share, repeat, row_length)
        self.held_out = {"validation": validation or {}, "test": test or {}}
        self.validation_share, self.validation_tokens = validation_share, validation_tokens
        self.limit = limit
        self.columns, self.isolate_documents, self.begin = columns or {}, isolate_documents, begin
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.tokenize_workers, self.split_seed, self.seed = tokenize_workers, split_seed, run_seed(seed)
        self.corpora: dict[str, Corpus] = {}
        self.sets: dict[str, RowSet] = {}
        self._training: dict[str, np.ndarray] = {}  # documents of each language that may be trained on
        self._evaluated: dict[str, dict[str, tuple[Corpus, np.ndarray]]] = {}
        self._check()

    @property
    def group_of(self) -> list[int]:
        """The number of the group of each of `languages`."""
        return [number for number, members in enumerate(self.groups.values()) for _ in members]

    @property
    def newest(self) -> list[str]:
        """Languages of the group that is added."""
        return list(self.groups[self.group_names[-1]])

    @property
    def trained(self) -> list[str]:
        """Languages whose text this stage trains on."""
        return self.newest if self.stage == 1 else self.languages

    def prepare_data(self) -> None:
        """One process per node fetches and tokenises; the others then find the result in the cache."""
        for language in self.languages:
            self._corpus(language, self._sources(language))
        for sources in self.held_out.values():
            for language, source in sources.items():
                self._corpus(language, source)

    def setup(self, stage: str) -> None:
        if stage in ("test", "predict") and not self.held_out["test"]:
            told = "test on" if stage == "test" else "predict"
            raise ValueError(f"data.test is not set, so there is nothing to {told}. Name a source for each language.")
        if self.sets:
            return
        for language in self.languages:
            self.corpora[language] = self._corpus(language, self._sources(language))
        self._divide()
        rows = rows_of_languages(self.mix, {name: self._available(name) for name in self.trained}, self.newest)
        self.sets["train"] = self._rows({name: self._training_stream(name, number) for name, number in rows.items()})
        for split, found in self._evaluated.items():
            limit = self.validation_tokens if split == "validation" else None
            streams = {name: Stream(*held, self.mix.row_length, limit=limit) for name, held in found.items()}
            self.sets[split] = self._rows(streams)
        rank_zero_info(self._statistics(rows))

    def train_dataloader(self) -> StepLoader:
        rows, trainer = self.sets["train"], self.trainer
        per_step = self.batch_size * trainer.world_size
        if len(rows) < per_step:
            raise ValueError(
                f"An epoch has {len(rows)} rows of {self.mix.row_length} tokens, fewer than one micro-batch on every process "
                f"({per_step} = batch_size {self.batch_size} x {trainer.world_size} processes).\n  Lower data.batch_size or "
                "data.row_length, or raise data.tokens."
            )
        sampler = self._sampler(
            "train",
            batch_size=self.batch_size,
            accumulate=trainer.accumulate_grad_batches,
            shuffle=True,
            seed=self.seed,
            drop_last=True,
        )
        return StepLoader(self._batches("train"), sampler, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader | list:
        return self.evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader | list:
        return self.evaluation_loader("test")

    def evaluation_loader(self, split: Split) -> DataLoader | list:
        """Every row of a part once, over all ranks, one language after the other; [] where the part is not configured."""
        if split not in self.sets:
            return []
        check_share(split, len(self.sets[split]), self.trainer.world_size)
        sampler = self._sampler(split, batch_size=self.eval_batch_size)
        return DataLoader(self._batches(split), sampler=sampler, batch_size=None, generator=torch.Generator())

    def predict_dataloader(self) -> DataLoader:
        return DataLoader(self.prompts("test"), batch_size=self.eval_batch_size, collate_fn=list)

    def prompts(self, split: Split, limit: int | None = None) -> list[EvaluationPrompt]:
        """Beginnings of documents that are evaluated on, to be continued, the languages in turn."""
        found = self._evaluated.get(split, {})
        most = max((len(documents) for _, documents in found.values()), default=0)
        turns = [
            (corpus, int(documents[number]))
            for number in range(most if limit is None else min(most, limit))
            for corpus, documents in found.values()
            if number < len(documents)
        ]
        return [self._prompt(corpus, document) for corpus, document in turns[:limit]]

    def documents(self, language: str, tokens: int | None = None) -> Iterator[list[int]]:
        """Documents of a language that may be trained on, without the end-of-sequence token.

        Args:
            language: its code.
            tokens: ends with the document that reaches so many; None: where there are no more.
        """
        for number in self._training[language]:
            if tokens is not None and tokens <= 0:
                return
            ids = self.corpora[language].ids(int(number))[:-1]
            tokens = None if tokens is None else tokens - len(ids)
            yield ids

    def _check(self) -> None:
        if self.stage == 2 and len(self.groups) == 1:
            raise ValueError(
                f"data.stage is 2, which trains on old and new languages, but data.groups has one group "
                f"({self.group_names[0]!r}). Add the original languages as the first group, or set data.stage: 1."
            )
        if self.stage == 1 and self.mix.old_share is not None:
            raise ValueError(
                f"data.old_share is {self.mix.old_share}, but data.stage is 1, which trains on the newest group alone. Leave "
                "data.old_share out, or set data.stage: 2."
            )
        for split, sources in self.held_out.items():
            unknown = [language for language in sources if language not in self.languages]
            if unknown:
                raise ValueError(
                    f"data.{split} names {', '.join(unknown)}, but data.groups has {', '.join(self.languages)}."
                )
        if self.held_out["test"] and len(self.held_out["test"]) < len(self.languages):
            missing = [language for language in self.languages if language not in self.held_out["test"]]
            raise ValueError(f"data.test has no source for {', '.join(missing)}. Name one, or leave data.test out.")
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"data.validation_share is {self.validation_share}; it is a share of a corpus, between 0 and 1."
            )
        counts = {"batch_size": self.batch_size, "eval_batch_size": self.eval_batch_size}
        for name, value in {**counts, "validation_tokens": self.validation_tokens, "limit": self.limit}.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}; it counts things and must be at least 1.")
        check_workers(self.num_workers, self.tokenize_workers)
        if set(self.columns) - {"text"}:
            raise ValueError(f"data.columns is {self.columns}; the one column that is read is `text`: {{text: NAME}}.")

    def _sources(self, language: str) -> Sources:
        return next(members[language] for members in self.groups.values() if language in members)

    def _corpus(self, language: str, sources: Sources) -> Corpus:
        return load_corpus(
            [sources] if isinstance(sources, str) else sources,
            language,
            self.trainer.lightning_module.student_tokenizer,
            columns=self.columns,
            begin=self.begin,
            order_seed=self.split_seed,
            workers=self.tokenize_workers,
        )

    def _divide(self) -> None:
        """Say which documents are trained on and which are held out."""
        self._evaluated = {split: {} for split, sources in self.held_out.items() if sources or split == "validation"}
        for language, corpus in self.corpora.items():
            every = np.arange(len(corpus.documents))[: self.limit]
            for split in self._evaluated:
                if source := self.held_out[split].get(language):
                    named = self._corpus(language, source)
                    self._evaluated[split][language] = named, np.arange(len(named.documents))[: self.limit]
            held = 0
            if language not in self._evaluated["validation"]:
                held = max(1, round(self.validation_share * len(every)))
                self._evaluated["validation"][language] = corpus, every[:held]
            self._training[language] = every[held:]
            if held == len(every):
                raise ValueError(
                    f"The corpus of {language!r} has {len(every)} document(s): with {held} held out none is left to train on. "
                    "Divide it into more lines, or name other text for it under data.validation."
                )

    def _available(self, language: str) -> int:
        return int(self.corpora[language].lengths[self._training[language]].sum())

    def _training_stream(self, language: str, rows: int) -> Stream:
        corpus, documents = self.corpora[language], self._training[language]
        documents = documents if self.stage == 1 else documents[::-1]
        order = training_order(documents, corpus.lengths, rows * self.mix.row_length, self.split_seed)
        return Stream(corpus, order, self.mix.row_length, num_rows=rows)

    def _rows(self, streams: dict[str, Stream]) -> RowSet:
        numbered = {self.languages.index(language): stream for language, stream in streams.items()}
        return RowSet(numbered, self.group_of, len(self.groups), divided=self.isolate_documents or self._begins)

    @property
    def _begins(self) -> bool:
        return self.begin == "auto" and bool(begin_ids(self.trainer.lightning_module.student_tokenizer))

    def _batches(self, split: Split) -> LanguageBatches:
        pad_id = self.trainer.lightning_module.student_tokenizer.pad_token_id
        return LanguageBatches(self.sets[split], pad_id, isolate=self.isolate_documents, begins=self._begins)

    def _sampler(self, split: Split, **settings) -> StepSampler:
        rows = self.sets[split]
        return StepSampler(
            rows.lengths.tolist(),
            rows.supervised.tolist(),
            [0] * len(rows),
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            group_tokens=[tokens.tolist() for tokens in rows.group_tokens],
            **settings,
        )

    def _prompt(self, corpus: Corpus, document: int) -> EvaluationPrompt:
        tokenizer, ids = self.trainer.lightning_module.student_tokenizer, corpus.ids(document)[:-1]
        cut = min(_PROMPT_TOKENS, max(len(ids) // 2, 1))
        prompt, reference = ids[:cut], ids[cut : cut + _REFERENCE_TOKENS]
        return EvaluationPrompt(tokenizer.decode(prompt), prompt, None, [tokenizer.decode(reference)])

    def _statistics(self, rows: dict[str, int]) -> str:
        lines = [f"Text by language, stage {self.stage}:"]
        lines.append(
            f"  {'language':<10}{'group':<10}{'documents':>10}{'left out':>10}{'tokens':>12}{'per byte':>10}"
            f"{'to train':>12}{'trained on':>12}{'passes':>8}{'evaluated':>11}"
        )
        for number, language in enumerate(self.languages):
            corpus, available = self.corpora[language], self._available(language)
            trained = rows.get(language, 0) * self.mix.row_length
            evaluated = self.sets["validation"].streams[number].total
            lines.append(
                f"  {language:<10}{self.group_names[self.group_of[number]]:<10}{len(corpus.documents):>10,}"
                f"{corpus.left_out:>10,}{corpus.num_tokens:>12,}{corpus.num_tokens / corpus.num_bytes:>10.3f}"
                f"{available:>12,}{trained:>12,}{trained / available:>8.2f}{evaluated:>11,}"
            )
        return "\n".join(lines)


def _languages(groups: dict[str, dict[str, Sources]]) -> list[str]:
    """All languages in the order of the groups.

    Raises:
        ValueError: no group, an empty one, or a language in two.
    """
    if not groups or not all(groups.values()):
        raise ValueError(f"data.groups is {groups}; it needs at least one group, and every group a language.")
    languages = [language for members in groups.values() for language in members]
    for language in languages:
        homes = [name for name, members in groups.items() if language in members]
        if len(homes) > 1:
            raise ValueError(
                f"{language!r} is in the groups {' and '.join(map(repr, homes))} of data.groups. A language is either there "
                "already or added; keep one."
            )
    return languages
