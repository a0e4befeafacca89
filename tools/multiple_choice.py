"""Multiple-choice accuracy of a model, by language: the answer that it finds likeliest is the one it gives.

    python tools/multiple_choice.py MODEL --questions xcopa.jsonl

A line is {"language": "tr", "prompt": "...", "choices": ["...", "..."], "label": 0}: `label` counts from 0. `accuracy` compares
the sums of the log-probabilities of the answers' tokens, `per byte` those sums divided by the answers' length in bytes of UTF-8,
so that long answers are not at a disadvantage. Behind them, half of the 95% interval.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lit_llm.data.batch import collate_tokens
from lit_llm.data.fact_tokens import FactText, encode_facts
from lit_llm.data.language_codes import check_language
from lit_llm.losses.token_log_probs import token_log_probs
from lit_llm.models.language_model import LanguageModel, ModelSpec


@dataclass(frozen=True)
class Question:
    """A question with its answers.

    Attributes:
        language: code.
        prompt: what comes before an answer.
        choices: the answers.
        label: number of the right one.

    Raises:
        ValueError: an unknown language, an empty text, fewer than two different answers, or a label that is none of them.
    """

    language: str
    prompt: str
    choices: tuple[str, ...]
    label: int

    def __post_init__(self) -> None:
        check_language(self.language)
        if not all(text.strip() for text in (self.prompt, *self.choices)):
            raise ValueError("the prompt or an answer is empty. Correct it, or leave the line out.")
        if len(set(self.choices)) < max(2, len(self.choices)):
            raise ValueError(f"the answers are {list(self.choices)}; there must be two different ones or more.")
        if self.label not in range(len(self.choices)):
            raise ValueError(f"label is {self.label}, but the answers are 0 to {len(self.choices) - 1}.")


def main(options: list[str] | None = None) -> None:
    arguments = _parser().parse_args(options)
    questions = read_questions(arguments.questions)
    model = ModelSpec(source=arguments.model, dtype=arguments.dtype).load().eval()
    print(table(questions, log_likelihoods(model, questions, arguments.batch_size)))


def read_questions(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a line that is none, or no line at all.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No questions at {path}. Name a .jsonl file of language, prompt, choices and label.")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            found.append(Question(row["language"], row["prompt"], tuple(row["choices"]), row["label"]))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, line {number}: {reason}") from error
    if not found:
        raise ValueError(f"{path} holds no question. Give a line for each.")
    return found


@torch.inference_mode()
def log_likelihoods(model: LanguageModel, questions: Sequence[Question], batch_size: int = 32) -> list[list[float]]:
    """log p(answer | prompt) of every answer of every question.

    Args:
        model: in eval mode.
        questions: any.
        batch_size: answers at a time.
    """
    texts = [FactText(q.language, q.prompt, choice) for q in questions for choice in q.choices]
    rows = encode_facts(model.tokenizer, texts)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
    found = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        ids, lengths = [rows[i].ids for i in members], [rows[i].prompt_length for i in members]
        tokens = collate_tokens(ids, lengths, model.tokenizer.pad_token_id)
        log_prob_T = token_log_probs(model.hidden(tokens), model.head, tokens.target_T)
        sum_B = log_prob_T.new_zeros(len(members)).index_add(0, tokens.sequence_T, log_prob_T)
        for member, value in zip(members, sum_B.tolist(), strict=True):
            found[member] = value
        print(f"\r{start + len(members)} of {len(order)} answers", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    each = iter(found)
    return [[next(each) for _ in question.choices] for question in questions]


def table(questions: Sequence[Question], likelihoods: Sequence[Sequence[float]]) -> str:
    """Accuracy by language."""
    right: dict[str, list[tuple[bool, bool]]] = {}
    for question, of_answers in zip(questions, likelihoods, strict=True):
        per_byte = [value / len(text.encode()) for value, text in zip(of_answers, question.choices, strict=True)]
        chosen = (max(range(len(values)), key=values.__getitem__) for values in (of_answers, per_byte))
        right.setdefault(question.language, []).append(tuple(number == question.label for number in chosen))
    lines = ["| | questions | accuracy | per byte |", "| --- | --- | --- | --- |"]
    for language, pairs in right.items():
        cells = [_percent([pair[side] for pair in pairs]) for side in (0, 1)]
        lines.append(f"| {language} | {len(pairs)} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _percent(right: Sequence[bool]) -> str:
    share = sum(right) / len(right)
    return f"{100 * share:.1f} ± {196 * math.sqrt(share * (1 - share) / len(right)):.1f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a hub id, a folder, or package:NAME")
    parser.add_argument("--questions", type=Path, required=True, help="a .jsonl file")
    parser.add_argument("--batch_size", type=int, default=32, help="answers at a time")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"multiple_choice: {error}")
