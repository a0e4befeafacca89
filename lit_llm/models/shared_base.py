"""Several models that are one base with different adapters: the base is held once.

Shapes: T supervised positions, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_llm.data.batch import TokenBatch
from lit_llm.losses.head import Head
from lit_llm.models.adapter_folder import adapter_folder, add_adapters, base_identity, base_of, differences
from lit_llm.models.adapters import FROZEN
from lit_llm.models.generation import evaluating
from lit_llm.models.language_model import Frozen, LanguageModel, ModelSpec
from lit_llm.models.quantization import keep_base_out_of_checkpoints
from lit_llm.models.sharding import whole_numel

_HELD = ("dtype", "attention", "quantization", "trim_head")


class AdaptedBase(nn.Module):
    """A frozen model that lives in another one: its base under other adapters, or under none.

    It has no weights of its own, so nothing of it is moved, trained or saved.

    Args:
        owner: the model whose base is used; it has adapters.
        adapter: name of the adapters; None: the base as it is.
    """

    def __init__(self, owner: LanguageModel, adapter: str | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "owner", owner)
        self.adapter = adapter
        self.tokenizer = owner.tokenizer

    @property
    def model(self) -> nn.Module:
        return self.owner.model

    @property
    def hidden_size(self) -> int:
        return self.owner.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.owner.vocab_size

    @property
    def num_parameters(self) -> int:
        of_adapters = {None: 0}
        for name, parameter in self.owner.named_parameters():
            key = name.split(".")[-2] if "lora_" in name else None
            of_adapters[key] = of_adapters.get(key, 0) + whole_numel(parameter)
        return of_adapters[None] + (of_adapters[self.adapter] if self.adapter is not None else 0)

    @property
    def head(self) -> Head:
        return self.owner.head

    @property
    def input_embedding(self) -> Tensor:
        return self.owner.input_embedding

    def branches(self, tokens: TokenBatch) -> bool:
        return self.owner.branches(tokens)

    @torch.no_grad()
    def hidden(self, tokens: TokenBatch) -> Tensor:
        """(T, D) last hidden states of the supervised positions."""
        with self._in_use():
            return self.owner.hidden(tokens)

    def generate(self, prompts: list[list[int]], **settings) -> list[list[int]]:
        """Continue prompts; see `LanguageModel.generate`."""
        with self._in_use():
            return self.owner.generate(prompts, **settings)

    def let_go(self) -> None:
        """Remove the adapters from the model that they live in."""
        if self.adapter is not None:
            self.owner.model.delete_adapter(self.adapter)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        with evaluating(self.owner), using(self.owner.model, self.adapter):
            yield


@contextmanager
def using(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Within the block a peft model computes with other adapters, or with none; what is trained stays as it is."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    try:
        for layer in layers:  # peft's own set_adapter would also change which parameters are trained
            layer._disable_adapters = adapter is None
            layer._active_adapter = layer._active_adapter if adapter is None else [adapter]
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled


def frozen_beside(
    student: LanguageModel, ours: ModelSpec, spec: ModelSpec, name: str, must_share: bool = False
) -> Frozen:
    """A frozen model beside one that is trained: in the same base where it is a fine-tune of it, or the base itself.

    Args:
        student: the model that is trained, with or without adapters.
        ours: what it was made from.
        spec: of the frozen model.
        name: of the frozen model in the config, `dpo` for instance.
        must_share: refuse adapters of another base, instead of loading them with it.

    Raises:
        ValueError: with `must_share`, adapters of another base than the student's (each difference with both values), or settings that the
            shared base does not have.
    """
    if is_base(student, ours, spec):
        return Frozen(AdaptedBase(student))
    folder = _fitting_adapters(student, ours, spec, name, must_share)
    if folder is None:
        return Frozen(spec.load())
    keep_base_out_of_checkpoints(student)  # and what lives in it
    add_adapters(student.model, folder, FROZEN + name)
    return Frozen(AdaptedBase(student, FROZEN + name))


def is_base(student: LanguageModel, ours: ModelSpec, spec: ModelSpec) -> bool:
    """Whether a model is what lies under the student's adapters, by content, and is to be held in the same way."""
    if student.base is None or ours.source is None or spec.source is None or spec.lora is not None:
        return False
    same_settings = all(getattr(spec, field) == getattr(ours, field) for field in _HELD)
    return same_settings and not differences(base_identity(spec, student.model), student.base)


def shares_base(student: LanguageModel, ours: ModelSpec, spec: ModelSpec, name: str) -> bool:
    """Whether a frozen model can live in the student's base; arguments and errors as where it must."""
    return is_base(student, ours, spec) or _fitting_adapters(student, ours, spec, name, True) is not None


def _fitting_adapters(
    student: LanguageModel, ours: ModelSpec, spec: ModelSpec, name: str, must_share: bool
) -> Path | None:
    """The folder of adapters on the student's base; None where it is a model of its own."""
    folder = adapter_folder(spec.source)
    if folder is None or student.base is None or ours.source is None:
        return None
    theirs = base_of(folder)
    differing = differences(theirs, student.base)
    if differing and not must_share:
        return None
    if differing:
        raise ValueError(
            f"model.{name}.source ({spec.source}) holds adapters of another base than that of model.student "
            f"({student.base['source']}):\n"
            + "\n".join(
                f"  {field}: adapters {theirs.get(field)!r}, policy {student.base[field]!r}" for field in differing
            )
            + f"\n  Let both start from the same model, or name the merged one: {folder.parent / 'model'}."
        )
    for field in _HELD:
        if getattr(spec, field) != getattr(ours, field):
            raise ValueError(
                f"model.{name}.{field} is {getattr(spec, field)!r} and model.student.{field} is {getattr(ours, field)!r}, but "
                f"both are adapters on one base, which is held once. Set model.{name}.{field} to the second."
            )
    if spec.keep_layers is not None:
        raise ValueError(
            f"model.{name}.keep_layers is {spec.keep_layers}, but its source holds adapters, whose base says which layers it "
            "has. Leave it out."
        )
    return folder
