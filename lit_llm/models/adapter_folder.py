"""Adapters on disk, beside the identity of the base that they were trained on.

A folder holds what peft writes (`adapter_config.json`, `adapter_model.safetensors`), the tokenizer, and `base.json`: where
the base came from and what it is, by content. Adapters are only right on the weights that they were trained on; a path
says nothing of these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_llm.models import sources
from lit_llm.models.weights import source_digests, state_digest
from lit_llm.storage import complete_folder

BASE = "base.json"
WEIGHTS = "adapter_model.safetensors"
_COMPARED = ("weights", "config", "keep_layers", "dtype", "quantization")


def base_identity(spec, model: nn.Module) -> dict[str, Any]:
    """What the base of adapters is: hashes of its weight files and of its config, how it is held, where it came from.

    Args:
        spec: the `ModelSpec` that it was made from.
        model: the base, without adapters; its values are hashed where it started at random.
    """
    weights, config = (state_digest(model), None) if spec.source is None else source_digests(spec.source)
    place = None if spec.source is None else spec.source
    if place is not None and Path(place).expanduser().is_dir():
        place = str(Path(place).expanduser().resolve())
    held = {"keep_layers": spec.keep_layers, "dtype": spec.dtype, "quantization": spec.quantization}
    return {"source": place, "weights": weights, "config": config, **held}


def differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """The names in which two bases differ; weights that could not be hashed are like no others."""
    unknown = ours.get("weights") is None
    return [name for name in _COMPARED if theirs.get(name) != ours.get(name) or (name == "weights" and unknown)]


def adapter_folder(source: str | None) -> Path | None:
    """The folder, where a source names adapters; None where it names anything else."""
    place = None if source is None else Path(source).expanduser()
    return place if place is not None and (place / "adapter_config.json").is_file() else None


def base_of(folder: Path) -> dict[str, Any]:
    """What the adapters of a folder were trained on.

    Raises:
        ValueError: the folder does not say.
    """
    file = folder / BASE
    if not file.is_file():
        raise ValueError(
            f"{str(folder)!r} holds adapters, but no {BASE} that tells their base by its content. Merge them into their "
            "base first (peft's merge_and_unload, then save_pretrained), and name the merged folder."
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error}). Write the adapters again, or name a merged model.") from error
    if not isinstance(found, dict) or "source" not in found:
        raise ValueError(
            f"{file} does not say what the base of the adapters is. Write them again, or name a merged model."
        )
    return found


def save_adapters(model: nn.Module, tokenizer, base: dict[str, Any], folder: Path) -> None:
    """Write the trained adapters of a peft model; the folder appears when it is complete and reads back as it is.

    Raises:
        ValueError: what was written differs from the live adapters.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    with complete_folder(Path(folder)) as scratch:
        model.save_pretrained(scratch, selected_adapters=["default"], save_embedding_layers=False)
        (scratch / "README.md").unlink(missing_ok=True)  # a form that nobody filled in
        tokenizer.save_pretrained(scratch)
        (scratch / BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")
        written = load_file(scratch / WEIGHTS)
        different = sorted(live.keys() ^ written.keys())
        different += [name for name in live if name in written and not torch.equal(live[name].cpu(), written[name])]
        if different:
            raise ValueError(
                f"The adapters would not come back as they are: {len(different)} tensors differ, e.g. {different[0]}. "
                f"Nothing was written to {folder}."
            )


def add_adapters(model: nn.Module, folder: Path, name: str) -> None:
    """Put the adapters of a folder beside those of a peft model: frozen, without dropout, not in use.

    Raises:
        ValueError: they do not fit the model.
    """
    from peft import PeftConfig, set_peft_model_state_dict

    settings = PeftConfig.from_pretrained(folder)
    settings.inference_mode, settings.lora_dropout = True, 0.0
    trained = {path for path, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        model.add_adapter(name, settings)
        report = set_peft_model_state_dict(model, _weights(folder), adapter_name=name)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"The adapters in {folder} do not fit {type(model.get_base_model()).__name__}: {error}"
        ) from error
    missing = [path for path in report.missing_keys if f".{name}." in path]
    if missing or report.unexpected_keys:
        raise ValueError(
            f"The adapters in {folder} do not fit {type(model.get_base_model()).__name__}: {len(missing)} tensors are missing, "
            f"{len(report.unexpected_keys)} are not known to it, e.g. {[*missing, *report.unexpected_keys][0]}."
        )
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in trained)


def with_merged_adapters(folder: Path, spec) -> nn.Module:
    """A plain transformers model: the base that the adapters in a folder name, with them merged into its weights.

    Args:
        folder: of the adapters.
        spec: the `ModelSpec` that names it.

    Raises:
        ValueError: the base is not what the adapters were trained on, or was quantised; or the spec has settings that the base
            decides.
    """
    for name in ("keep_layers", "quantization"):
        if getattr(spec, name) is not None:
            raise ValueError(
                f"{name} is {getattr(spec, name)!r}, but the source {folder} holds adapters, which are merged into the base "
                f"that they name. Leave it out, or name the merged folder {folder.parent / 'model'}."
            )
    return _merged(folder, spec.attention, getattr(torch, spec.dtype))


def _merged(folder: Path, attention: str | None, dtype: torch.dtype) -> nn.Module:
    from peft import PeftModel

    base = _loadable_base(folder)
    below = adapter_folder(base["source"])
    if below is not None:
        model = _merged(below, attention, dtype)
    else:
        model = sources.load_model(base["source"], base["keep_layers"], attention, dtype)
    return PeftModel.from_pretrained(model, folder).merge_and_unload()


def _loadable_base(folder: Path) -> dict[str, Any]:
    """The base of a folder of adapters, which is where it was and what it was."""
    base = base_of(folder)
    if base["quantization"] is not None or base["source"] is None:
        why = "started at random" if base["source"] is None else f"was quantised ({base['quantization']})"
        raise ValueError(
            f"The adapters in {folder} have a base that {why}, so it cannot be loaded as a whole. Name the folder `model` "
            "of their run, which holds them merged (model.student.lora.saved: both)."
        )
    for name, now in zip(("weights", "config"), source_digests(base["source"]), strict=True):
        if now != base[name]:
            raise ValueError(
                f"The adapters in {folder} were trained on {base['source']} with the hash {base[name]} ({name}), but what "
                f"is there now has {now}. Restore it, or train the adapters again."
            )
    return base


def _weights(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or missing: {error}\n  Run its stage again.") from error
