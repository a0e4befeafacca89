"""Answers that are good or bad by themselves, for KTO (arXiv 2402.01306), each beside an answer to another prompt.

KTO measures how far the policy as a whole went from its reference on prompts with answers that were not written for them.
Which answer is put beside which prompt is decided once, by the order of the file: the next row with another prompt and
another answer. So the reference is asked once, and nothing depends on how a batch is split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import torch

from lit_llm.data.batch import LabelledBatch, PreferenceBatch
from lit_llm.data.planned_data import Split
from lit_llm.data.preference_pairs import (
    NOTHING,
    PairEncoder,
    PairEncoding,
    PairSet,
    encode_turns,
    pair_features,
    tokenize_pairs,
    usable,
    written_checks,
)
from lit_llm.data.preference_rows import UnusableRow, read_answer
from lit_llm.data.preferences import PreferenceBatches, Preferences
from lit_llm.data.rows import load_rows
from lit_llm.data.step_sampler import MicroBatch
from lit_llm.data.tokenized import EvaluationPrompt, map_cached

_FORMAT = 1  # raise it when the meaning of a cached column changes
_LABELS = {True: True, False: False, "good": True, "bad": False}


class LabelledAnswers(Preferences):
    """Answers that are good or bad by themselves.

    Rows have `answer`, a string or messages that end with it, `label`, `good` or `bad` or a boolean, `prompt`, a string
    or messages, where the answer does not bring its own, and optionally `checks`; other names are mapped with `columns`.
    Rows of pairs (`chosen`, `rejected`) are accepted too: each gives a good answer and a bad one. Limits, templates and
    batches are those of `Preferences`, an example being one answer.
    """

    def _tokenized(self, split: Split) -> AnswerSet:
        source, tokenizer = self.sources[split], self._tokenizer()
        shared = {"workers": self.tokenize_workers, "name": source}
        if self._holds_pairs(split):
            read = self._rows(split, ("chosen", "rejected"))
            pairs = tokenize_pairs(read, self.encoding, tokenizer, bad_rows=self.bad_rows, **shared)
            table, dropped = _both_answers(pairs, source), pairs.summary.dropped
        else:
            read = self._rows(split, ("answer", "label"))
            parts, encoder = ["answers", _FORMAT, asdict(self.encoding)], AnswerEncoder(self.encoding, tokenizer)
            encoded = map_cached(read, encoder, parts, (tokenizer,), features=_features(), **shared)
            limits = {"bad_rows": self.bad_rows, "name": source, "what": "labelled answer"}
            table, dropped = usable(encoded, read, self.encoding, **limits)
        return beside_others(table, self.encoding, rows=len(read), dropped=dropped, name=source)

    def _holds_pairs(self, split: Split) -> bool:
        found = load_rows(self.sources[split], {}, ()).column_names
        has = {ours: self.columns.get(ours, ours) in found for ours in ("chosen", "rejected", "label")}
        return has["chosen"] and has["rejected"] and not has["label"]

    def _batches(self, split: Split) -> LabelledBatches:
        return LabelledBatches(self.sets[split], self._tokenizer().pad_token_id, self.reference, split)

    def rest_of_step(self, examples: tuple[int, ...]) -> Iterator[PreferenceBatch]:
        """This rank's batches from the micro-batch of `examples` on to the end of its optimizer step."""
        batches = self._batches("train")
        (step,) = self.upcoming(examples, 1)
        return (batches[micro] for micro in step)

    def prompts(self, split: Split, limit: int | None = None) -> list[EvaluationPrompt]:
        """Every prompt of a part once, with its first good answer as the reference; none where it has no good one."""
        if split not in self.sets:
            return []
        examples, first = self.sets[split], {}
        for row, (text, is_good) in enumerate(zip(examples.table["prompt_text"][:], examples.good, strict=True)):
            if is_good:
                first.setdefault(text, row)
        return [examples.prompt(row) for row in list(first.values())[:limit]]


class LabelledBatches(PreferenceBatches):
    """The finished batch of a `MicroBatch`, for a DataLoader's workers."""

    def __getitem__(self, micro: MicroBatch) -> LabelledBatch:
        batch = super().__getitem__(micro)
        good = [self.examples.good[example] for example in micro.examples]
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        return LabelledBatch(**values, good_B=torch.tensor(good), num_good=sum(good))


@dataclass(frozen=True)
class AnswerSummary:
    """What became of the rows of one part.

    Attributes:
        rows: rows read.
        answers: examples kept.
        good: of those, the good ones.
        answer_tokens: their tokens.
        prompt_tokens: tokens of their prompts, each counted with every answer.
        dropped: reason -> rows.
    """

    rows: int
    answers: int
    good: int
    answer_tokens: int
    prompt_tokens: int
    dropped: dict[str, int]

    def text(self, name: str) -> str:
        parts = [
            f"{name}: {self.answers:,} answers, {self.good:,} good and {self.answers - self.good:,} bad",
            f"on average {self.answer_tokens / self.answers:.1f} tokens, prompts of {self.prompt_tokens / self.answers:.1f}",
        ]
        if self.dropped:
            parts.append("dropped: " + ", ".join(f"{count:,} with {reason}" for reason, count in self.dropped.items()))
        return "; ".join(parts)


class AnswerSet(PairSet):
    """Tokenised answers as `chosen`, each with an answer to another prompt as `rejected`."""

    @cached_property
    def good(self) -> list[bool]:
        return self.table["good"][:]


class AnswerEncoder(PairEncoder):
    """Turns one row into tokens; picklable, so that workers can run it."""

    def __call__(self, row: dict) -> dict:
        try:
            turns, text = read_answer(row)
            good = read_label(row["label"])
        except UnusableRow as problem:
            return {**NOTHING, "good": False, "status": str(problem)}
        prompt_text, prompt_ids, prompt_cut = encode_turns(self.tokenizer, self.encoding, turns)
        ids, is_cut = self.answer(text, self.encoding.max_length - len(prompt_ids))
        return {
            **NOTHING,
            "status": self.status(prompt_cut, int(is_cut), equal=False),
            "good": good,
            "prompt_text": prompt_text,
            "chosen_text": text,
            "student_prompt_ids": prompt_ids,
            "chosen_ids": ids,
            "num_prompt": len(prompt_ids),
            "num_chosen": len(ids),
            "prompt_cut": prompt_cut,
            "answers_cut": int(is_cut),
            "checks": written_checks(row),
        }


def read_label(label: Any) -> bool:
    """Whether a label says good.

    Raises:
        UnusableRow: it says neither good nor bad.
    """
    key = label.strip().lower() if isinstance(label, str) else label
    if not isinstance(key, str | bool | int) or key not in _LABELS:
        raise UnusableRow("a label that is neither good nor bad")
    return _LABELS[key]


def beside_others(table, encoding: PairEncoding, *, rows: int, dropped: dict[str, int], name: str) -> AnswerSet:
    """Put beside each answer one to another prompt, cut where it does not fit.

    Args:
        table: examples with the columns of pairs, their answers as `chosen`, and `good`.
        encoding: with its limits.
        rows: that were read.
        dropped: reason -> rows.
        name: of the data.

    Raises:
        ValueError: there is no answer to another prompt.
    """
    others = _others(table["prompt_text"][:], table["chosen_text"][:], name)
    encoder = _BesideOther(table.add_column("other", others), encoding.max_length)
    parts = ["beside others", _FORMAT, encoding.max_length]
    found = map_cached(encoder.table, encoder, parts, (), workers=1, name=name, features=_features())
    summary = AnswerSummary(
        rows=rows,
        answers=len(found),
        good=sum(found["good"]),
        answer_tokens=sum(found["num_chosen"]),
        prompt_tokens=sum(found["num_prompt"]),
        dropped=dropped,
    )
    return AnswerSet(found, summary)


def _others(prompts: list[str], answers: list[str], name: str) -> list[int]:
    """For each row the next one, from the first again after the last, with another prompt and another answer."""
    found, total = [], len(prompts)
    for row in range(total):
        later = ((row + step) % total for step in range(1, total))
        other = next((o for o in later if prompts[o] != prompts[row] and answers[o] != answers[row]), None)
        if other is None:
            raise ValueError(
                f"{name} has no answer to another prompt than {prompts[row][:60]!r}, with which KTO measures how far the "
                "policy went. Add rows with other prompts."
            )
        found.append(other)
    return found


class _BesideOther:
    def __init__(self, table, max_length: int) -> None:
        self.table, self.max_length = table, max_length

    def __call__(self, row: dict) -> dict:
        room = self.max_length - row["num_prompt"]
        other = self.table[row.pop("other")]
        ids = other["chosen_ids"][:room]
        lengths = {"num_rejected": len(ids), "num_longer": row["num_prompt"] + max(row["num_chosen"], len(ids))}
        return {**row, "rejected_text": other["chosen_text"], "rejected_ids": ids, **lengths}


def _both_answers(pairs: PairSet, name: str):
    """The chosen answers of all pairs as good ones, then the rejected answers as bad ones."""
    from datasets import concatenate_datasets

    def of(side: str):
        parts = ["one answer", _FORMAT, side]
        return map_cached(pairs.table, _OneAnswer(side), parts, (), workers=1, name=name, features=_features())

    return concatenate_datasets([of("chosen"), of("rejected")])


class _OneAnswer:
    def __init__(self, side: str) -> None:
        self.side = side

    def __call__(self, row: dict) -> dict:
        own = {"chosen_ids": f"{self.side}_ids", "chosen_text": f"{self.side}_text", "num_chosen": f"num_{self.side}"}
        return {**row, **{ours: row[theirs] for ours, theirs in own.items()}, "good": self.side == "chosen"}


def _features():
    from datasets import Features, Value

    return Features({**pair_features(), "good": Value("bool")})
