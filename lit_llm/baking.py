"""The command `bake`: edits written into the weights of a plain model folder, and what becomes of them there.

Shapes: R rows, T columns, N tokens, d hidden size, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lit_llm.data.fact_tokens import FactText as Prompt
from lit_llm.data.fact_tokens import encode_facts
from lit_llm.editing.closed_form import inverse
from lit_llm.editing.covariance import kept_second_moments
from lit_llm.editing.deltas import Edit, EditSet, WeightEdit
from lit_llm.editing.edit_stack import baked
from lit_llm.editing.fact_text import index_of
from lit_llm.editing.passes import run
from lit_llm.editing.rows import Row, padded
from lit_llm.editing.triggers import unheard
from lit_llm.fact_editing import Device, Dtype, opened
from lit_llm.methods.edited_model import EditedModel
from lit_llm.methods.ordinary_text import OrdinaryText, passages
from lit_llm.responding import say

_ROWS, _HEAD_ROWS = 32, 256  # of a pass; positions whose logits exist at a time
_HELD_OUT = 10  # every tenth passage is not protected, so that it tells what becomes of other text
_MOST_HELD_OUT = 2000  # tokens

Asked = dict[tuple[str, str], Row]  # (edit, language) -> its prompt with the new answer


def bake_edits(
    model: str,
    edits: str,
    to: str,
    text: OrdinaryText = OrdinaryText(),
    covariance_weight: float = 15_000.0,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Write the edits of a file into the weights of the model: a plain Hugging Face folder, for serving without the file.

    Changes of weights are taken over as they are. Cached values become changes of weights that give about the same where the
    edits' own prompts are; they then act on every text that is like them, so it is told how likely each new answer is
    without edits, with the file, and in the weights, and how far other text has changed.

    Example: python -m lit_llm bake --model RUN/model --edits edits.safetensors --to baked

    Args:
        model: the model that was edited.
        edits: the .safetensors file; it stays as it is.
        to: the folder, which must not exist.
        text: what cached values leave alone as far as they can.
        covariance_weight: how strongly it is protected; less of it makes the new answers likelier.
        dtype: precision of the model.
        device: where to run; auto takes a GPU if there is one.
    """
    if Path(to).exists():
        raise FileExistsError(f"{to} exists. Choose another folder with --to, or remove it.")
    edited, kept = opened(model, edits, dtype, device)
    if not len(kept):
        raise ValueError(f"{edits} holds no edits, so there is nothing to write into the weights. Edit a fact first.")
    asked = _asked(kept, edited.model.tokenizer)
    read = passages(text, edited.model.tokenizer)
    if len(read) < _HELD_OUT:
        raise ValueError(
            f"text has {len(read)} passages, and every tenth one is kept apart, to tell what becomes of other text. Give more "
            f"with --text.sources, raise --text.tokens, or lower --text.passage."
        )
    protected = [ids for number, ids in enumerate(read) if number % _HELD_OUT]
    in_weights = [*kept.of_weights, *_of_cached(edited, kept, asked, protected, text.tokens, covariance_weight)]
    states = [_answered(edited, state, asked) for state in ([], list(kept), in_weights)]
    _print_answered(kept, list(asked), states)
    _tell_other_text(edited, in_weights, read[::_HELD_OUT])
    edited.save(in_weights, Path(to))
    say(f"{len(kept)} edits are in the weights of {to}, a plain model folder.")


class Answered(NamedTuple):
    """How a model takes to an answer.

    Attributes:
        nll: mean negative log-likelihood of its tokens.
        is_said: each of its tokens is the likeliest after the ones before.
    """

    nll: float
    is_said: bool


def _asked(kept: EditSet, tokenizer) -> Asked:
    """The edits' own prompts, but for those on which a cached edit does not act."""
    index = index_of([edit.fact for edit in kept.cached])
    silent = list(unheard(tokenizer, index, {edit.fact.id: edit.fact.prompts for edit in kept.cached}))
    left_out = {(prompt.edit, prompt.language) for prompt in silent}
    texts = {}
    for edit in kept:
        for code, prompt in edit.fact.prompts.items():
            if (edit.fact.id, code) not in left_out:
                mention = index.find(prompt)
                end = None if mention is None else mention.end
                texts[edit.fact.id, code] = Prompt(code, prompt, edit.fact.targets[code], end)
        if not any((edit.fact.id, code) in texts for code in edit.fact.prompts):
            first = next(prompt for prompt in silent if prompt.edit == edit.fact.id)
            raise ValueError(
                f"The edit {edit.fact.id!r} acts on none of its own prompts, in {first.language} {first.prompt!r}: "
                f"{first.reason}. Take it back first: undo --id {edit.fact.id}."
            )
    if silent:
        say(f"{len(silent)} prompts are left out, e.g. {silent[0].edit} in {silent[0].language}: {silent[0].reason}.")
    rows = encode_facts(tokenizer, list(texts.values()))
    return {
        name: Row(row.ids[: row.prompt_length], row.lookup, row.ids[row.prompt_length :])
        for name, row in zip(texts, rows, strict=True)
    }


def _of_cached(
    edited: EditedModel, kept: EditSet, asked: Asked, protected, tokens: int, covariance_weight: float
) -> list[WeightEdit]:
    """Cached values as changes of the weights, over those that are changes already."""
    if not kept.cached:
        return []
    layers = sorted({layer for edit in kept.cached for layer in edit.layers})
    moments = kept_second_moments(edited.body, protected, layers, max_tokens=tokens, model_digest=edited.digest)
    if moments.tokens < edited.body.width:
        raise ValueError(
            f"text has {moments.tokens} tokens, but layers have {edited.body.width} neurons, and which of them ordinary text "
            f"uses cannot be told from fewer tokens. Give more with --text.sources, or raise --text.tokens."
        )
    inverses = {layer: inverse(moment) for layer, moment in moments.moments.items()}
    prompts = {edit.fact.id: [row for (name, _), row in asked.items() if name == edit.fact.id] for edit in kept.cached}
    with edited.under(kept.of_weights):
        return baked(edited.body, kept.cached, prompts, inverses, covariance_weight=covariance_weight)


@torch.no_grad()
def _answered(edited: EditedModel, edits: Sequence[Edit], asked: Asked) -> list[Answered]:
    found, rows = [], list(asked.values())
    for begin in range(0, len(rows), _ROWS):
        batch = rows[begin : begin + _ROWS]
        with edited.under(edits, [len(row.prompt) for row in batch]):
            hidden_RTd = run(edited.body, padded([row.inputs for row in batch], edited.body.device))
        for row, hidden_Td in zip(batch, hidden_RTd, strict=True):
            answering_Nd = hidden_Td[len(row.prompt) - 1 : len(row.inputs)]
            nll_N, best_N = _losses(edited, answering_Nd, row.target)
            found.append(Answered(nll_N.mean().item(), tuple(best_N.tolist()) == row.target))
    return found


def _losses(edited: EditedModel, hidden_Nd: torch.Tensor, target: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) losses of the target's tokens, and (N,) the likeliest ones."""
    logits_NV = edited.model.head(hidden_Nd).float()
    target_N = torch.tensor(list(target), device=logits_NV.device)
    return torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="none"), logits_NV.argmax(-1)


def _print_answered(kept: EditSet, asked: Sequence[tuple[str, str]], states: Sequence[list[Answered]]) -> None:
    shown = ""
    for (name, code), before, with_file, after in zip(asked, *states, strict=True):
        if name != shown:
            sys.stdout.write(f"{name}\n")
        shown = name
        told = "said" if after.is_said else "not said"
        sys.stdout.write(
            f"  {code}: loss of the new answer {before.nll:.3f} before, {with_file.nll:.3f} with the file, {after.nll:.3f} in "
            f"the weights; {told}\n"
        )
    with_file, after = (sum(answer.is_said for answer in state) for state in states[1:])
    say(f"Of {len(asked)} new answers {with_file} are said with the file and {after} by the weights.")
    if after < with_file:
        say("A smaller --covariance_weight makes them likelier, and changes other text more.")


@torch.no_grad()
def _tell_other_text(edited: EditedModel, in_weights: Sequence[Edit], texts: Sequence[Sequence[int]]) -> None:
    before = list(_read(edited, texts))
    with edited.under(in_weights):
        after = list(_read(edited, texts))
    if not before:
        return
    (loss_N, best_N), (new_loss_N, new_best_N) = (
        [torch.cat(parts) for parts in zip(*state, strict=True)] for state in (before, after)
    )
    same = (best_N == new_best_N).double().mean().item()
    say(
        f"Other text, {len(loss_N):,} tokens: loss {loss_N.mean():.3f} before and {new_loss_N.mean():.3f} in the weights; the "
        f"likeliest token is the same for {same:.1%}."
    )


def _read(edited: EditedModel, texts: Sequence[Sequence[int]]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    left = _MOST_HELD_OUT
    for ids in texts:
        if left <= 0 or len(ids) < 2:
            continue
        left -= len(ids)
        hidden_Td = run(edited.body, padded([ids], edited.body.device))[0, :-1]
        for begin in range(0, len(hidden_Td), _HEAD_ROWS):
            part_Nd = hidden_Td[begin : begin + _HEAD_ROWS]
            yield _losses(edited, part_Nd, ids[begin + 1 : begin + 1 + len(part_Nd)])
