"""A plain Hugging Face folder that comes back as it was written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lit_llm.models import generation
from lit_llm.storage import complete_folder


def save_model(model: nn.Module, tokenizer, num_tokens: int, folder: Path) -> None:
    """Write config, safetensors, generation settings and tokenizer; the folder appears when it is complete.

    Args:
        model: a plain transformers model.
        tokenizer: that belongs to it.
        num_tokens: ids from here on are never to be generated.
        folder: whatever had that name is replaced.

    Raises:
        ValueError: the reloaded weights differ.
    """
    generation.settle_defaults(model, tokenizer, num_tokens)
    with complete_folder(folder) as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        _check_saved(model, scratch)


def _check_saved(model: nn.Module, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    live = model.state_dict()
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).state_dict()
    different = sorted(live.keys() ^ reloaded.keys())
    different += [name for name in live if name in reloaded and not _same_bits(live[name], reloaded[name])]
    if different:
        raise ValueError(
            f"The model would not come back as it is: after saving, {len(different)} tensors differ, e.g. "
            f"{different[0]}. Nothing was written to {folder.parent}."
        )


def _same_bits(ours: Tensor, theirs: Tensor) -> bool:
    ours, theirs = (tensor.detach().cpu().contiguous() for tensor in (ours, theirs))
    same_kind = (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    return same_kind and torch.equal(ours.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8))
