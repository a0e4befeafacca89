"""The commands that need no training run: talk to a model, answer a data set, judge answers, rebuild a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal, Optional


def generate(options: list[str]) -> None:
    """Parse the options of `generate` and run it."""
    _run(talk, "generate", options)


def respond(options: list[str]) -> None:
    """Parse the options of `respond` and run it."""
    from lit_llm.responding import answer_data_set

    _run(answer_data_set, "respond", options)


def judge(options: list[str]) -> None:
    """Parse the options of `judge` and run it."""
    from inspect import getdoc

    from jsonargparse import ArgumentParser

    from lit_llm.judging import judge_answers

    about = getdoc(judge_answers).split("\n\nArgs:")[0]
    parser = ArgumentParser(prog="python -m lit_llm judge", description=about, exit_on_error=False)
    parser.add_function_arguments(judge_answers, as_group=False, skip={"answers", "against", "seeds"})
    parser.add_argument(
        "--answers", nargs="+", required=True, metavar="NAME=MODEL", help="the models that answer, each with a name"
    )
    parser.add_argument(
        "--against", nargs="*", default=[], metavar="NAME", help="those with which the others are compared"
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[10], metavar="SEED", help="one answer to every prompt for each"
    )
    judge_answers(**parser.parse_args(options).as_dict())


def edit(options: list[str]) -> None:
    """Parse the options of `edit` and run it."""
    from lit_llm.fact_editing import edit_fact

    _run(edit_fact, "edit", options)


def ask(options: list[str]) -> None:
    """Parse the options of `ask` and run it."""
    from lit_llm.fact_editing import ask_edited

    _run(ask_edited, "ask", options)


def undo(options: list[str]) -> None:
    """Parse the options of `undo` and run it."""
    from lit_llm.fact_editing import undo_edits

    _run(undo_edits, "undo", options)


def bake(options: list[str]) -> None:
    """Parse the options of `bake` and run it."""
    from lit_llm.baking import bake_edits

    _run(bake_edits, "bake", options)


def layers(options: list[str]) -> None:
    """Parse the options of `layers` and run it."""
    from lit_llm.locating import compare_layers

    _run(compare_layers, "layers", options)


def covariance(options: list[str]) -> None:
    """Parse the options of `covariance` and run it."""
    from lit_llm.locating import measure_covariance

    _run(measure_covariance, "covariance", options)


def paraphrase(options: list[str]) -> None:
    """Parse the options of `paraphrase` and run it."""
    from lit_llm.paraphrasing import paraphrase_facts

    _run(paraphrase_facts, "paraphrase", options)


def as_moe(options: list[str]) -> None:
    """Parse the options of `as_moe` and run it."""
    _run(write_as_moe, "as_moe", options)


def report(options: list[str]) -> None:
    """Parse the options of `report` and run it."""
    _run(rebuild_report, "report", options, as_positional=True)


def talk(
    model: str,
    prompt: Optional[str] = None,
    template: Literal["auto", "alpaca", "plain", "chat", "none"] = "auto",
    system: Optional[str] = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> None:
    """Answer a prompt, or chat line by line when none is given.

    Example: python -m lit_llm generate --model runs/dskd/version_0/model --prompt "Name three colours."

    Args:
        model: a model folder, a hub id, or package:NAME.
        prompt: one prompt. Without it, lines are read from the terminal until an empty one.
        template: how the prompt is written; `auto` is the tokenizer's chat template where it has one, else `alpaca`;
            `none` continues the text as it stands.
        system: system message of the chat template.
        max_new_tokens: length limit of an answer.
        temperature: 0 is greedy.
        top_p: nucleus sampling; 1 is off.
        top_k: sampling among the k best; 0 is off.
        seed: of the sampling.
    """
    from lit_llm.data.templates import render_prompt
    from lit_llm.models.language_model import ModelSpec

    language_model = ModelSpec(source=model).load()
    tokenizer = language_model.tokenizer
    if template == "auto":
        template = "chat" if tokenizer.chat_template else "alpaca"
    for text in [prompt] if prompt is not None else _lines_from_terminal():
        written = text if template == "none" else render_prompt(tokenizer, template, text, system=system)
        ids = tokenizer(written, add_special_tokens=template == "none")["input_ids"]
        pieces = language_model.stream(
            ids, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
        )
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


def write_as_moe(model: str, to: str, dtype: Literal["float32", "bfloat16"] = "float32") -> None:
    """Write a model with experts in an architecture of transformers, for programs that know nothing of lit_llm.

    That takes as many experts in every layer (MoE-LPR, `expand.uniform`), no classifiers, and the attention of Llama, Mistral
    or Qwen3; another model is refused with the reasons. Logits are compared before anything is kept.

    Example: python -m lit_llm as_moe --model RUN/model --to DIR

    Args:
        model: the folder that a run of LayerMoE has left.
        to: the folder, which must not exist.
        dtype: of the weights.
    """
    from lit_llm.models.language_model import ModelSpec
    from lit_llm.models.moe_export import export_moe

    if Path(to).exists():
        raise FileExistsError(f"{to} exists. Choose another folder with --to, or remove it.")
    expanded = ModelSpec(source=model, dtype=dtype).load().eval()
    architecture = export_moe(expanded.transformer, Path(to), expanded.tokenizer)
    sys.stderr.write(f"{to} is a {architecture} model, which AutoModelForCausalLM loads without lit_llm.\n")


def rebuild_report(run: str) -> None:
    """Write report.html of a run folder again, from the files that the run left, also when it was killed.

    Args:
        run: the run folder, e.g. runs/dskd/version_0.
    """
    from lit_llm.callbacks.report import write_report

    if not Path(run).is_dir():
        raise FileNotFoundError(f"No run folder at {run}.")
    sys.stdout.write(f"{write_report(Path(run))}\n")


def _run(function, command: str, options: list[str], as_positional: bool = False) -> None:
    """Call a function with options whose names are those of its arguments; errors are told by `lit_llm.cli`."""
    from inspect import getdoc

    from jsonargparse import auto_cli

    about = getdoc(function).split("\n\nArgs:")[0]
    parser = {"prog": f"python -m lit_llm {command}", "description": about, "exit_on_error": False}
    auto_cli(function, args=options, as_positional=as_positional, **parser)


def _lines_from_terminal():
    sys.stderr.write("An empty line ends the chat.\n")
    while True:
        sys.stderr.write("> ")
        sys.stderr.flush()
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line
