"""Low-rank adapters (LoRA, arXiv 2106.09685) around a transformers model, by peft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

FROZEN = "frozen_"  # begins the name of adapters that stay as they are, beside those that are trained


@dataclass
class Lora:
    """Low-rank adapters on a frozen base (peft).

    Args:
        rank: of the update matrices.
        alpha: the update is scaled by alpha / rank.
        dropout: on the adapters' input.
        target_modules: names of the layers that are adapted, or `all-linear` (all but the head); None: peft's choice
            for the architecture.
        saved: what a run leaves: `merged`, a plain model in `model/`; `adapters`, small, in `adapters/` with the identity of
            their base; or `both`.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: Literal["all-linear"] | list[str] | None = None
    saved: Literal["both", "merged", "adapters"] = "both"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1. Leave `lora` out for full training.")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha is {self.alpha}; it must be above 0, or the adapters would do nothing.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; it is a probability below 1.")
        if self.target_modules == []:
            raise ValueError("lora.target_modules is empty. Name at least one layer, or leave it out.")


def with_adapters(model: nn.Module, lora: Lora) -> nn.Module:
    """A peft model around `model`, in which only the adapters are trained.

    Raises:
        ValueError: a name that fits no layer, or that of the head or of the embedding: losses take their weights
            as they are, so adapters on them would be passed by.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    _check_names(model, lora.target_modules)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # how GPT-2 keeps its weights
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ValueError(
            f"lora.target_modules {lora.target_modules} does not fit {type(model).__name__}: {error}\n"
            f"  Its layers are called: {', '.join(_layer_names(model))}."
        ) from error


def _check_names(model: nn.Module, names: str | list[str] | None) -> None:
    if names is None or names == "all-linear":
        return
    modules = dict(model.named_modules())
    shared = (model.get_output_embeddings(), model.get_input_embeddings())
    for name in names:
        found = [module for path, module in modules.items() if path == name or path.endswith(f".{name}")]
        if not found:
            raise ValueError(
                f"lora.target_modules names {name!r}, but {type(model).__name__} has no such layer.\n"
                f"  Its layers are called: {', '.join(_layer_names(model))}."
            )
        if any(module is other for module in found for other in shared):
            raise ValueError(
                f"lora.target_modules names {name!r}, the head or the embedding, which stay as they are under adapters. "
                f"Leave it out, or train without `lora`."
            )


def _layer_names(model: nn.Module) -> list[str]:
    shared = (model.get_output_embeddings(), model.get_input_embeddings())
    layers = [
        (path, module)
        for path, module in model.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim == 2
    ]
    return sorted({path.rsplit(".", 1)[-1] for path, module in layers if all(module is not other for other in shared)})
