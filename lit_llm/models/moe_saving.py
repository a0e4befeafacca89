"""Expanded models on disk: a whole Hugging Face folder, or a delta without the dense model.

A whole folder has `model_type: layer_moe`, all fields of the base's configuration and the plan. Its classes are made from
those of the base's family when they are needed; after `import lit_llm`, plain `AutoModelForCausalLM.from_pretrained`
reads it. A program that does not know the type refuses it, instead of loading the dense model silently.

A delta is the plan and the added tensors: `layers.I.experts.G.NAME`, `layers.I.router.weight`,
`layers.I.classifier.weight`. After a review stage the routers and classifiers alone are enough.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_llm.models import surgery
from lit_llm.models.expansion_plan import ExpansionPlan
from lit_llm.models.experts import ExpertBank, RoutedMLP, Router
from lit_llm.models.mlp_kinds import mlp_kind, stacked_layout
from lit_llm.models.moe_config import MODEL_TYPE
from lit_llm.storage import complete_folder

_TENSORS_FILE = "layer_moe.safetensors"


class ExpandedModel:
    """What the expanded class of a family adds to the family's own."""

    _keep_in_fp32_modules_strict = frozenset({"router", "classifier"})

    def __init__(self, config, *inputs, **kwargs) -> None:
        super().__init__(config, *inputs, **kwargs)
        if config.layer_moe is None:
            raise ValueError(f"A {MODEL_TYPE} configuration needs its plan, `layer_moe`. Make one with surgery.expand.")
        generator = torch.Generator().manual_seed(0)
        surgery.insert(self, ExpansionPlan.from_dict(config.layer_moe), generator)

    def generate(self, *inputs, **kwargs):
        by_row = [
            index
            for index, routed in surgery.routed_layers(self).items()
            if routed.classifier is not None and routed.classifier.scope == "sequence_sum"
        ]
        if by_row:
            raise ValueError(
                f"The classifiers of the layers {by_row} decide once per row, from all of its positions "
                f"(classifier_scope: sequence_sum), and a growing row has no such decision. Generate with "
                f"classifier_scope: token."
            )
        return super().generate(*inputs, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        """Only for tensors that a checkpoint lacks."""
        from transformers import initialization

        if isinstance(module, (ExpertBank, Router)):
            for parameter in module.parameters(recurse=False):
                initialization.normal_(parameter, mean=0.0, std=getattr(self.config, "initializer_range", None) or 0.02)
        else:
            super()._init_weights(module)


@lru_cache
def family_classes(base_model_type: str) -> tuple[type, type]:
    """Configuration and model class of expanded models of one family, known to transformers' Auto classes from then on.

    Raises:
        ValueError: transformers has no causal language model of that type.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known = base_model_type != MODEL_TYPE and base_model_type in CONFIG_MAPPING
    if not known or CONFIG_MAPPING[base_model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"transformers has no causal language model of the type {base_model_type!r}, which the configuration names as "
            f"base_model_type."
        )
    base_config = CONFIG_MAPPING[base_model_type]
    base_model = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    fields = {
        "__module__": __name__,
        "__annotations__": {"base_model_type": "str", "layer_moe": "dict | None"},
        "model_type": MODEL_TYPE,
        "base_model_type": base_model_type,
        "layer_moe": None,
    }
    config_class = type(f"LayerMoe{base_config.__name__}", (base_config,), fields)
    model_class = type(
        f"LayerMoe{base_model.__name__}",
        (ExpandedModel, base_model),
        {"__module__": __name__, "config_class": config_class},
    )
    AutoModelForCausalLM.register(config_class, model_class)
    return config_class, model_class


def check_class(model: nn.Module) -> None:
    """See that a model would come back as what it is.

    Raises:
        ValueError: it is no causal language model that transformers would make for its configuration.
    """
    if isinstance(model, ExpandedModel):
        return
    _, model_class = family_classes(model.config.model_type)
    expected = model_class.__bases__[1]
    if type(model) is not expected:
        raise ValueError(
            f"For a {model.config.model_type} configuration transformers makes {expected.__name__}, but this "
            f"is a {type(model).__name__}, which could not be read back. Load it with AutoModelForCausalLM."
        )


def adopt(model: nn.Module, plan: ExpansionPlan) -> None:
    """Make a model an instance of its family's expanded class, with this plan in its configuration."""
    config = model.config
    if not isinstance(model, ExpandedModel):
        base_model_type = config.model_type
        config_class, model_class = family_classes(base_model_type)
        # the same objects: the parts of the model hold the configuration too
        config.__class__, model.__class__ = config_class, model_class
        config.__dict__.pop("model_type", None)
        config.base_model_type = base_model_type
        wide = set(model._keep_in_fp32_modules_strict or []) | ExpandedModel._keep_in_fp32_modules_strict
        model._keep_in_fp32_modules_strict = wide
    config.layer_moe = plan.to_dict()


def save_delta(model: nn.Module, folder: Path, experts: bool = True) -> None:
    """Write the plan and the added tensors; the folder appears when it is complete.

    Args:
        model: an expanded model.
        folder: where to.
        experts: with the experts, for the dense model; without, for a model that has them (after a review stage).

    Raises:
        ValueError: the model is dense.
    """
    from safetensors.torch import save_file

    plan = surgery.plan_of(model)
    if plan is None:
        raise ValueError(
            f"{type(model).__name__} is dense: it has nothing beyond its base. Save it with save_pretrained."
        )
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in _added_tensors(model)
        if experts or not _is_expert(name)
    }
    with complete_folder(Path(folder)) as scratch:
        plan.save(scratch)
        save_file(tensors, scratch / _TENSORS_FILE, {"experts": _experts_fingerprint(model)})


def apply_delta(model: nn.Module, folder: Path) -> nn.Module:
    """Turn a model, in place, into the one that a delta was saved from.

    Args:
        model: the dense model that was expanded, or one that has its experts already.
        folder: written by `save_delta`.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: no delta there.
        ValueError: it belongs to another base, other experts or another order of groups, or lacks tensors.
    """
    from safetensors import safe_open

    plan = ExpansionPlan.load(folder)
    surgery.check_shape(model, plan)
    with safe_open(Path(folder) / _TENSORS_FILE, "pt") as stored:
        names = set(stored.keys())
        _check_delta(model, plan, names, stored.metadata()["experts"], folder)
        surgery.expand(model, plan)
        with torch.no_grad():
            for name, parameter in _added_tensors(model):
                if name in names:
                    parameter.copy_(stored.get_tensor(name))
    return model


def _check_delta(model: nn.Module, plan: ExpansionPlan, names: set[str], fingerprint: str, folder: Path) -> None:
    """Whether a delta with these tensors is enough for this model."""
    needed, current = set(_tensor_names(model, plan)), surgery.plan_of(model)
    experts = {name for name in needed if _is_expert(name)}
    with_experts = bool(experts & names)
    if not with_experts and (current is None or current.expert_counts != plan.expert_counts):
        raise ValueError(
            f"The delta in {folder} holds routers and classifiers only, for a model with {plan.expert_counts} experts per "
            f"layer. Apply the one with the experts first."
        )
    if missing := sorted((needed if with_experts else needed - experts) - names):
        raise ValueError(f"The delta in {folder} lacks {len(missing)} of its plan's tensors, e.g. {missing[0]}.")
    if not with_experts and fingerprint != _experts_fingerprint(model):
        raise ValueError(
            f"The delta in {folder} holds routers for other experts than this model has: their fingerprints differ. Apply "
            f"the delta with the experts of the same run first."
        )


def _added_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for index, routed in sorted(surgery.routed_layers(model).items()):
        for name, parameter in routed.named_parameters():
            if not name.startswith("base."):
                yield f"layers.{index}.{name}", parameter


def _tensor_names(model: nn.Module, plan: ExpansionPlan) -> Iterator[str]:
    """What a delta with experts must hold for this model."""
    layers = surgery.decoder_layers(model)
    for index in plan.routed_layers:
        layer, mlp = plan.layers[index], layers[index].mlp
        base = mlp.base if isinstance(mlp, RoutedMLP) else mlp
        stacked = stacked_layout(base, mlp_kind(base))
        for group, count in enumerate(layer.experts[1:], start=1):
            if count:
                yield from (f"layers.{index}.experts.{group}.{name}" for name in stacked)
        yield f"layers.{index}.router.weight"
        if layer.classifier is not None:
            yield f"layers.{index}.classifier.weight"


def _is_expert(name: str) -> bool:
    return ".experts." in name


def _experts_fingerprint(model: nn.Module) -> str:
    return surgery.fingerprint((name, tensor) for name, tensor in _added_tensors(model) if _is_expert(name))
