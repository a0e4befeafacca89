"""Names the weights of a model by their content, without building it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_llm.models import sources
from lit_llm.storage import cache_folder, write_atomically

if TYPE_CHECKING:
    from lit_llm.models.language_model import LanguageModel

_BLOCK = 2**22


def source_digests(source: str) -> tuple[str | None, str | None]:
    """sha256 of a source's weight files and of its config.json, each None where this machine does not have it.

    Nothing is downloaded, except that a package is made. A file is read once: its hash is kept in the cache under
    its path, size and time of change.

    A folder of adapters stands for what it adds to its base: the hash of its weights covers the identity of the base.

    Args:
        source: a hub id, a local folder, or `package:NAME`.
    """
    folder = _local_folder(source)
    if folder is None:
        return None, None
    if (folder / "adapter_config.json").is_file():
        return _adapter_digests(folder)
    files = _weight_files(folder)
    weights = hashlib.sha256("\n".join(_file_digest(file) for file in files).encode()).hexdigest() if files else None
    config = folder / "config.json"
    return weights, _config_digest(config) if config.is_file() else None


def model_hash(model: LanguageModel) -> str:
    """Names a model by its weights and its tokenizer."""
    digest = _state_hash(model.model)
    tokenizer = model.tokenizer
    digest.update(json.dumps([tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]).encode())
    return digest.hexdigest()[:16]


def state_digest(model: nn.Module, leave_out: str | None = None) -> str:
    """sha256 of names, types, shapes and values of all parameters and buffers but those with `leave_out` in their name."""
    return _state_hash(model, leave_out).hexdigest()


def content_digest(path: str) -> str | None:
    """sha256 of a file, or of the weights and the config of a model's folder; None where the text names neither."""
    place = Path(path)
    if len(path) > 1000 or "\n" in path:
        return None
    if place.is_file():
        return _file_digest(place)
    if (place / "config.json").is_file() or (place / "adapter_config.json").is_file():
        return hashlib.sha256(json.dumps(source_digests(path)).encode()).hexdigest()
    return None


def _state_hash(model: nn.Module, leave_out: str | None = None):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if leave_out is not None and leave_out in name:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        copied = tensor.detach().to("cpu", copy=True)  # memory that numpy has seen cannot be let go by FSDP
        digest.update(copied.contiguous().view(-1).view(torch.uint8).numpy())
    return digest


def _local_folder(source: str) -> Path | None:
    place = Path(sources.locate(source))
    if place.is_dir():
        return place
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read, or none when some are not there."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = [
                folder / file
                for file in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            ]
        else:
            files = [folder / name]
        if all(file.is_file() for file in files):
            return files
    return []


def _adapter_digests(folder: Path) -> tuple[str, str]:
    base = folder / "base.json"
    parts = [_file_digest(folder / "adapter_model.safetensors")]
    if base.is_file():
        # where it came from is not what it is
        parts.append({**json.loads(base.read_text(encoding="utf-8")), "source": None})
    settings = {
        **json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")),
        "base_model_name_or_path": None,
    }
    weights, config = (
        hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for part in (parts, settings)
    )
    return weights, config


def _file_digest(file: Path) -> str:
    real = file.resolve()
    state = real.stat()
    name = hashlib.sha256(f"{real} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
    kept = cache_folder() / "sha256" / name
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    digest = hashlib.sha256()
    with real.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    write_atomically(kept, digest.hexdigest())
    return digest.hexdigest()


def _config_digest(file: Path) -> str:
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields.pop("transformers_version", None)  # says who wrote it, not what it means
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
