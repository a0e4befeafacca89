"""The commands `edit`, `ask` and `undo`: one fact from the command line, in as many languages as are given.

Edits are kept in a file beside the base model, which is never written to.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Optional, Union, get_args

import torch

from lit_llm.data.edit_batch import collate_edits
from lit_llm.data.edit_requests import Edit, LanguageEdit
from lit_llm.data.encoded_facts import Advice, FactEncoding, encode_edits
from lit_llm.data.fact_tokens import FactText as Prompt
from lit_llm.data.fact_tokens import encode_facts
from lit_llm.data.language_codes import check_language
from lit_llm.editing.deltas import EditSet
from lit_llm.editing.fact_text import FactText, index_of
from lit_llm.editing.locate import Locating
from lit_llm.editing.optimise import Optimising
from lit_llm.editing.triggers import Trigger, unheard
from lit_llm.evaluation.editing import first_sentence
from lit_llm.methods.edited_facts import EditedFact, edited_facts
from lit_llm.methods.edited_model import EditedModel
from lit_llm.methods.neuron_editor import NeuronEditor, NeuronSettings
from lit_llm.models.language_model import LanguageModel, ModelSpec
from lit_llm.responding import chosen_device, say

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]


def edit_fact(
    model: str,
    edits: str,
    subject: dict[str, str],
    prompt: dict[str, str],
    target: dict[str, str],
    relation: Optional[str] = None,
    id: Optional[str] = None,
    layers: Optional[list[int]] = None,
    locating: Locating = Locating(),
    optimising: Optimising = Optimising(),
    trigger: Trigger = Trigger(scope="subject"),
    max_target_tokens: Optional[int] = None,
    target_end: str = "\n",
    replace: bool = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Change one fact in a model, in all languages that are given at once, and add it to a file of edits.

    Texts are given by language, as JSON or with one option each. The subject stands in every prompt as it is spelled; what
    the model should say after the prompt is the target. A bad request changes nothing.

    Example: python -m lit_llm edit --model RUN/model --edits edits.safetensors --subject.en Malta --prompt.en "The capital of
    Malta is" --target.en Oslo --subject.de Malta --prompt.de "Die Hauptstadt von Malta ist" --target.de Oslo

    Args:
        model: a model folder, a hub id, or package:NAME.
        edits: the .safetensors file; it is made where there is none.
        subject: language -> what the fact is about.
        prompt: language -> the beginning of a sentence about it.
        target: language -> what is to come next.
        relation: what the prompts ask of the subject, e.g. capital: another edit of the same subject and relation is refused.
        id: names the edit, for `undo`. None: made of subject and relation.
        layers: that are edited, ascending; None: those of the edits in the file, else the middle, 0.44 to 0.67 of the depth.
        locating: which neurons hold the fact.
        optimising: what is added to them.
        trigger: when the edit acts: wherever its subject is named, or only where the question is close to its prompts.
        max_target_tokens: refuse a target of more tokens, those of target_end among them. None: any.
        target_end: what comes after the target, so that the answer ends there; empty: nothing is said of it.
        replace: an edit of the same subject and relation is replaced, not refused.
        dtype: precision of the model.
        device: where to run; auto takes a GPU if there is one.
    """
    request = _request(subject, prompt, target, relation, id)
    if trigger.scope == "oracle":
        raise ValueError(
            "trigger.scope is 'oracle', which is for scores: such an edit would act on every text. Set another."
        )
    if trigger.scope == "subject_relation" and len(prompt) < 2 and trigger.relation_threshold is None:
        raise ValueError(
            "trigger.scope is 'subject_relation', which compares a question with the prompts of an edit, but there is 1 prompt. "
            "Give another language, set trigger.relation_threshold, or trigger.scope: subject."
        )
    edited, kept = opened(model, edits, dtype, device, must_exist=False)
    fact = _encoded(
        request,
        edited.model,
        FactEncoding(missing_subjects="refuse", max_target_tokens=max_target_tokens, target_end=target_end),
    )
    if layers is None and kept.cached:
        layers = kept.cached[0].layers
    settings = NeuronSettings(layers, locating, optimising, trigger)
    editor = NeuronEditor(edited.body, edited.model.head, edited.model.tokenizer, settings)
    text = dataclasses.replace(fact.text, fuzzy=trigger.fuzzy)
    _check_heard(_with(kept, text, editor.layers, replace), fact, edited.model.tokenizer)
    with edited.under(kept.of_weights):
        (made,) = editor.edit([fact]).edits
    if made.stats["stop"] == "not_finite":
        raise ValueError(
            f"The loss of the edit is not finite, so nothing was changed. Lower optimising.learning_rate "
            f"({optimising.learning_rate})."
        )
    kept.add(made, replace=replace)
    kept.save(Path(edits))
    told = ", ".join(f"{code} {value:.3f}" for code, value in made.stats["nll"].items())
    say(f"Edit {made.fact.id!r} is in {edits}: {made.stats['steps']} steps, loss of the answer {told}.")
    if max(made.stats["nll"].values()) > 1:
        say("The new answer is still unlikely. More optimising.steps, or another optimising.learning_rate, may help.")
    _print_answers(edited, kept, [(code, text) for code, text in prompt.items()], max_new_tokens=12)


def ask_edited(
    model: str,
    edits: str,
    prompt: Union[list[str], str],
    language: str = "en",
    max_new_tokens: int = 24,
    force: bool = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Ask a model before and after its edits, side by side.

    Example: python -m lit_llm ask --model RUN/model --edits edits.safetensors --prompt "The capital of Malta is"

    Args:
        model: the model that was edited, as it was then.
        edits: the .safetensors file.
        prompt: the beginning of a sentence, or a question; several as a JSON list.
        language: of the prompts.
        max_new_tokens: length limit of an answer.
        force: try cached values on another base than they were made on, such as a model trained further. Changes of weights
            are refused in any case.
        dtype: precision of the model.
        device: where to run; auto takes a GPU if there is one.
    """
    check_language(language)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    edited, kept = opened(model, edits, dtype, device, force=force)
    _print_answers(edited, kept, [(language, text) for text in prompts], max_new_tokens)


def undo_edits(
    model: str,
    edits: str,
    id: Optional[str] = None,
    all: bool = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Take back one edit, or all; the model then answers as before them, bit for bit. Without --id and --all: list them.

    Example: python -m lit_llm undo --model RUN/model --edits edits.safetensors --id malta-capital

    Args:
        model: the model that was edited.
        edits: the .safetensors file.
        id: of the edit.
        all: take back all of them.
        dtype: precision of the model.
        device: where to check; auto takes a GPU if there is one.
    """
    if id is not None and all:
        raise ValueError(f"--id {id} takes back one edit and --all takes back all of them. Give one of the two.")
    if id is None and not all:
        _list(EditSet.load(Path(edits)))
        return
    edited, kept = opened(model, edits, dtype, device)
    removed = kept.remove(id)
    probes = [text for edit in removed for text in edit.fact.prompts.values()]
    with edited.under(kept):
        remaining = _logits(edited.model, probes)
    same = len(kept) > 0 or torch.equal(remaining, _logits(edited.model, probes))
    if not same:  # cannot happen unless the hooks are broken; then the file is left alone
        raise ValueError("The model does not answer as before the edits once they are removed. Nothing was changed.")
    kept.save(Path(edits))
    say(f"Took back {', '.join(edit.fact.id for edit in removed)}; {len(kept)} edits are left in {edits}.")


def _request(subject, prompt, target, relation, name) -> Edit:
    for code in {**subject, **prompt, **target}:
        check_language(code)
        missing = [
            what for what, given in (("prompt", prompt), ("target", target)) if not (given.get(code) or "").strip()
        ]
        if missing:
            raise ValueError(
                f"There is no {' and no '.join(missing)} in {code} (given: {', '.join({**subject, **prompt, **target})}). Give "
                f"--{missing[0]}.{code}, or leave the language out."
            )
    if not prompt:
        raise ValueError(
            "There is nothing to edit. Give --subject.en, --prompt.en and --target.en, or other languages."
        )
    texts = {code: LanguageEdit(prompt[code], target[code], subject.get(code)) for code in prompt}
    first = next(iter(subject.values()), "")
    words = re.findall(r"\w+", f"{first} {relation or ''}".lower())
    return Edit(name or "-".join(words) or "edit", texts, relation)


def _encoded(request: Edit, model: LanguageModel, encoding: FactEncoding) -> EditedFact:
    advice = Advice(
        "Shorten the target, or raise --max_target_tokens.", "Give --subject in that language as the prompt spells it."
    )
    encoded = encode_edits([request], encoding, model.tokenizer, name="the command line", advice=advice)
    (fact,) = edited_facts(collate_edits(encoded.facts, encoded.languages, model.tokenizer.pad_token_id))
    return fact


def _with(kept: EditSet, fact: FactText, layers: list[int], replace: bool) -> EditSet:
    """The edits with this one, without values yet: what adding would refuse is refused before anything is computed."""
    from lit_llm.editing.edit_cache import CachedEdit

    grown = EditSet.from_state(kept.state())
    grown.add(CachedEdit(fact, dict.fromkeys(layers, torch.empty(0)), {}), replace=replace)
    return grown


def _check_heard(edits: EditSet, fact: EditedFact, tokenizer) -> None:
    for found in unheard(tokenizer, index_of([edit.fact for edit in edits.cached]), {fact.text.id: fact.text.prompts}):
        raise ValueError(
            f"The edit would not act on its own prompt in {found.language}, {found.prompt!r}: {found.reason}. Nothing was "
            f"changed. Give --subject.{found.language} in full and as the prompt spells it."
        )


def opened(
    model: str, edits: str, dtype: str, device: str, must_exist: bool = True, force: bool = False
) -> tuple[EditedModel, EditSet]:
    """A model and its file of edits; with `force`, cached values act on whatever base it is.

    Raises:
        FileNotFoundError: there is no file and there must be one.
        ValueError: edits of another base.
    """
    if must_exist and not Path(edits).is_file():
        raise FileNotFoundError(f"There is no file of edits at {edits}. Edit a fact first, or correct --edits.")
    language_model = ModelSpec(source=model, dtype=dtype).load().eval().requires_grad_(False)
    language_model.to(chosen_device(device))
    edited = EditedModel(language_model)
    if not Path(edits).is_file():
        return edited, EditSet(edited.digest)
    base = EditSet.load(Path(edits)).base
    made_in = None if force or base == edited.digest else _dtype_of(model, base, dtype)
    if made_in is not None:
        raise ValueError(
            f"The edits of {edits} were made in {made_in}, but this model is loaded in {dtype}, where its weights are other "
            f"numbers. Give --dtype {made_in}."
        )
    if force and base != edited.digest:
        say(f"The edits of {edits} were made on weights {base}; these are {edited.digest}. Forced onto them.")
    return edited, EditSet.load(Path(edits), base=edited.digest, force=force)


def _dtype_of(model: str, base: str, loaded: str) -> str | None:
    """The precision in which the model has the weights that a file of edits names; None: in none of them."""
    for dtype in get_args(Dtype):
        if dtype != loaded and EditedModel(ModelSpec(source=model, dtype=dtype).load()).digest == base:
            return dtype
    return None


@torch.no_grad()
def _print_answers(edited: EditedModel, edits: EditSet, asked: Sequence[tuple[str, str]], max_new_tokens: int) -> None:
    texts = [Prompt(code, text) for code, text in asked]
    prompts = [list(row.prompt_ids) for row in encode_facts(edited.model.tokenizer, texts)]
    before = _answers(edited.model, prompts, max_new_tokens)
    acting: list[str | None] = []
    after = []
    for ids in prompts:
        with edited.under(edits) as cache:
            after += _answers(edited.model, [ids], max_new_tokens)
            edited.model.transformer.base_model(
                input_ids=torch.tensor([ids], device=edited.body.device), use_cache=False
            )
            acting.append(None if cache is None else cache.firings[0].edit)
    everywhere = [edit.fact.id for edit in edits.of_weights]
    for (_, text), old, new, name in zip(asked, before, after, acting, strict=True):
        which = ", ".join([*([name] if name else []), *everywhere]) or "none"
        sys.stdout.write(f"{text}\n  before: {old}\n  after:  {new}\n  edit:   {which}\n")


def _answers(model: LanguageModel, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    found = model.generate(prompts, max_new_tokens=max_new_tokens)
    texts = model.tokenizer.batch_decode(found, skip_special_tokens=True)
    return [first_sentence(text) for text in texts]


@torch.no_grad()
def _logits(model: LanguageModel, texts: Sequence[str]) -> torch.Tensor:
    found = []
    for text in texts:
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"].to(model.transformer.device)
        hidden_TD = model.transformer.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        found.append(model.head(hidden_TD[-1:]))
    return torch.cat(found)


def _list(edits: EditSet) -> None:
    for edit in edits:
        texts = "; ".join(f"{code}: {text} -> {edit.fact.targets[code]}" for code, text in edit.fact.prompts.items())
        sys.stdout.write(f"{edit.fact.id}\n  {texts}\n")
    say(f"{len(edits)} edits. Take one back with --id ID, or all with --all.")
