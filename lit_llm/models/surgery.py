"""Put experts into a decoder of transformers, grow it again, and say what trains (LayerMoE, arXiv 2505.22582).

Nothing is patched: the attribute `mlp` of chosen layers gets another module, and the model the class of its family that
knows about it, so that it is saved and read back as what it is.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from lit_llm.models.dispatch import Dispatch
from lit_llm.models.expansion_plan import BaseModel, ClassifierPlan, ExpansionPlan, LanguageGroup, LayerPlan, MlpNames
from lit_llm.models.experts import Classifier, Gate, RoutedMLP
from lit_llm.models.mlp_kinds import mlp_kind

RouterInit = Literal["fresh", "keep"]


def dense_plan(
    model: nn.Module,
    name: str = "original",
    languages: list[str] | None = None,
    experts_per_token: int = 2,
    renormalise: Literal["released", "always"] = "released",
) -> ExpansionPlan:
    """The plan of a dense model, to be continued by `ExpansionPlan.with_group`. Reads all weights once.

    Args:
        model: a causal language model of transformers.
        name: of the group of languages that it knows.
        languages: that it knows.
        experts_per_token: k of the expanded model.
        renormalise: see `ExpansionPlan`.

    Raises:
        ValueError: a family whose MLPs cannot be replaced, or a model that is expanded already.
    """
    if plan_of(model) is not None:
        raise ValueError("This model is expanded already; continue its plan (`plan_of`) with a further group.")
    layers = decoder_layers(model)
    kind = mlp_kind(layers[0].mlp)
    config = model.config.get_text_config()
    base = BaseModel(config.model_type, config.hidden_size, len(layers), base_fingerprint(model))
    return ExpansionPlan(
        base=base,
        groups=[LanguageGroup(name, list(languages or []))],
        layers=[LayerPlan([1]) for _ in layers],
        mlp=MlpNames(kind.name, [*kind.inputs, kind.output]),
        experts_per_token=experts_per_token,
        renormalise=renormalise,
    )


def expand(
    model: nn.Module,
    plan: ExpansionPlan,
    seed: int = 0,
    router_init: RouterInit = "fresh",
    dispatch: Dispatch = "auto",
) -> nn.Module:
    """Give `model`, in place, the experts that `plan` has and it does not.

    A dense model gets all of them, an expanded one those of the further groups. New experts are copies of the original
    MLP. The model keeps its identity and becomes an instance of its family's expanded class.

    Args:
        model: a causal language model of transformers, dense or expanded.
        plan: what it shall be.
        seed: of new routers and classifiers.
        router_init: for layers that grow again: all rows `fresh`, as released, or `keep` those of older experts. A layer that
            gets no expert in this expansion keeps its router either way.
        dispatch: how rows are multiplied, see `dispatch.backend`.

    Returns:
        The same model.

    Raises:
        ValueError: the plan is for another model, does not continue the model's own, or the family does not fit.
    """
    from lit_llm.models.moe_saving import adopt, check_class

    if hasattr(model, "peft_config"):
        raise ValueError("This model has adapters (lora). Merge them or leave them out before it is expanded.")
    check_class(model)
    check_shape(model, plan)
    if plan_of(model) is None:
        check_base(model, plan)
    generator = torch.Generator().manual_seed(seed)
    insert(model, plan, generator, keep_rows=router_init == "keep", dispatch=dispatch)
    adopt(model, plan)
    return model


def insert(
    model: nn.Module,
    plan: ExpansionPlan,
    generator: torch.Generator,
    keep_rows: bool = False,
    dispatch: Dispatch = "auto",
) -> None:
    """Bring the modules of every layer to what the plan says, without questions."""
    for index, (layer, wanted) in enumerate(zip(decoder_layers(model), plan.layers)):
        if sum(wanted.experts) == 1:
            continue
        if not isinstance(layer.mlp, RoutedMLP):
            renormalise = plan.renormalise == "always" or plan.experts_per_token > 1
            routed = RoutedMLP(layer.mlp, index, plan.experts_per_token, renormalise, dispatch)
            layer.mlp = routed.train(layer.training)
        routed = layer.mlp
        routed.backend = dispatch
        added = [
            group for group, count in enumerate(wanted.experts) if group and count and str(group) not in routed.experts
        ]
        for group in added:
            routed.add_experts(group, wanted.experts[group])
        if added:
            routed.set_router(generator, keep_rows)
        _set_classifier(routed, wanted.classifier, generator)


def add_classifiers(
    model: nn.Module,
    layers: list[int],
    scope: Literal["token", "sequence_sum"] = "token",
    threshold: float = 0.5,
    gate: Gate = "predicted",
    seed: int = 0,
) -> ExpansionPlan:
    """Put fresh classifiers in front of the routers of these layers, and take those of other layers away.

    Args:
        model: an expanded model.
        layers: their indices.
        scope: decide per token, or once per row (for reproduction; not for generation).
        threshold: of the probability that a token is of an original language.
        gate: decide by prediction, or in training by labels.
        seed: of the weights.

    Returns:
        The model's plan, with the classifiers.

    Raises:
        ValueError: the model is dense, or a layer does not exist or has no added expert.
    """
    from lit_llm.models.moe_saving import adopt

    plan = _plan_of_expanded(model).with_classifiers(layers, ClassifierPlan(scope, threshold))
    generator = torch.Generator().manual_seed(seed)
    for index, routed in routed_layers(model).items():
        routed.classifier = None
        _set_classifier(routed, plan.layers[index].classifier, generator, gate)
    adopt(model, plan)
    return plan


def set_trainable(model: nn.Module, stage: Literal[1, 2]) -> list[str]:
    """Train what the stage trains, by the plan, and freeze everything else.

    Stage 1 trains the experts of the newest group and all routers; stage 2 all routers and classifiers.

    Args:
        model: an expanded model.
        stage: 1, post-pretraining on new languages, or 2, review.

    Returns:
        Names of the parameters that train.

    Raises:
        ValueError: the model is dense.
    """
    newest = str(len(_plan_of_expanded(model).groups) - 1)
    model.requires_grad_(False)
    for routed in routed_layers(model).values():
        routed.router.requires_grad_(True)
        if stage == 1 and newest in routed.experts:
            routed.experts[newest].requires_grad_(True)
        if stage == 2 and routed.classifier is not None:
            routed.classifier.requires_grad_(True)
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def plan_of(model: nn.Module) -> ExpansionPlan | None:
    """The plan of an expanded model, None for a dense one."""
    fields = getattr(model.config, "layer_moe", None)
    return None if fields is None else ExpansionPlan.from_dict(fields)


def routed_layers(model: nn.Module) -> dict[int, RoutedMLP]:
    """The routed layers by index of the decoder layer."""
    return {module.layer_index: module for module in model.modules() if isinstance(module, RoutedMLP)}


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model.

    Raises:
        ValueError: they have no `mlp` that takes and gives one tensor.
    """
    name, layers = type(model).__name__, layer_stack(model)
    if not all(isinstance(getattr(layer, "mlp", None), nn.Module) for layer in layers):
        parts = ", ".join(part for part, _ in layers[0].named_children())
        raise ValueError(
            f"The layers of {name} have no module `mlp` (they have {parts}), so there is nothing that experts could "
            f"replace. Families with one are GPT-2, Llama, Mistral, Qwen, Gemma, Phi, OLMo, GPT-NeoX and others."
        )
    inputs = inspect.signature(layers[0].mlp.forward).parameters.values()
    needed = [given.name for given in inputs if given.default is given.empty]
    if len(needed) != 1:
        raise ValueError(
            f"The MLPs of {name} take {len(needed)} inputs ({', '.join(needed)}); experts can replace those that take the "
            f"hidden states alone."
        )
    return layers


def layer_stack(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, whatever they are made of.

    Raises:
        ValueError: there is no list of them.
    """
    count = model.config.get_text_config().num_hidden_layers
    for part in model.base_model.modules():
        if isinstance(part, nn.ModuleList) and len(part) == count:
            return part
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers below its base model.")


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the dense model inside, expanded or not, under the names that they have in the dense model."""
    routed = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, RoutedMLP))
    for name, parameter in model.named_parameters():
        prefix = next((prefix for prefix in routed if name.startswith(prefix)), None)
        if prefix is None:
            yield name, parameter
        elif name.startswith(f"{prefix}base."):
            yield prefix + name.removeprefix(f"{prefix}base."), parameter


def base_fingerprint(model: nn.Module) -> str:
    """sha256 of the dense model's parameters by name, as float32: the same for one checkpoint read in two types."""
    return fingerprint(base_parameters(model))


def fingerprint(parameters: Iterator[tuple[str, Tensor]]) -> str:
    """sha256 of named tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters, key=lambda pair: pair[0]):
        values = tensor.detach().cpu()
        values = values.float() if values.is_floating_point() and values.dtype.itemsize < 4 else values
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _set_classifier(
    routed: RoutedMLP, wanted: ClassifierPlan | None, generator: torch.Generator, gate: Gate = "predicted"
) -> None:
    """A classifier as wanted; one that is so already stays."""
    current = routed.classifier
    if wanted is None:
        routed.classifier = None
    elif current is None or (current.scope, current.threshold) != (wanted.scope, wanted.threshold):
        classifier = Classifier(routed.hidden_size, wanted.scope, wanted.threshold, gate, routed.device)
        classifier.reset(generator)
        routed.classifier = classifier.train(routed.training)


def check_shape(model: nn.Module, plan: ExpansionPlan) -> None:
    """The plan against the model as it is, but for weights.

    Raises:
        ValueError: another family or size, or a plan that does not continue the model's own.
    """
    current = plan_of(model)
    if current is not None:
        _check_groups(current, plan)
        if not plan.extends(current):
            raise ValueError(
                f"The plan does not continue the model's own, which has {current.expert_counts} experts per layer in "
                f"{len(current.groups)} groups. Continue `plan_of(model)` with `with_group`."
            )
    layers = decoder_layers(model)
    if len(layers) != plan.base.num_layers:
        raise ValueError(
            f"The plan is for {plan.base.num_layers} layers, but {type(model).__name__} has {len(layers)}."
        )
    config = model.config.get_text_config()
    family = getattr(config, "base_model_type", None) or config.model_type
    if (family, config.hidden_size) != (plan.base.model_type, plan.base.hidden_size):
        raise ValueError(
            f"The plan is for a {plan.base.model_type} model of width {plan.base.hidden_size}, but this is a {family} model "
            f"of width {config.hidden_size}."
        )
    for index in plan.routed_layers:
        if not isinstance(layers[index].mlp, RoutedMLP):
            kind = mlp_kind(layers[index].mlp)
            if [*kind.inputs, kind.output] != plan.mlp.names:
                raise ValueError(
                    f"The MLP of layer {index} has the projections {[*kind.inputs, kind.output]}, but the plan was made "
                    f"for {plan.mlp.names}."
                )


def check_base(model: nn.Module, plan: ExpansionPlan) -> None:
    """A dense model against the plan's fingerprint.

    Raises:
        ValueError: other weights.
    """
    if plan.base.fingerprint is None:
        return
    found = base_fingerprint(model)
    if found != plan.base.fingerprint:
        raise ValueError(
            f"The plan belongs to another dense model: its fingerprint is {plan.base.fingerprint[:16]}…, that of this one "
            f"{found[:16]}…. Load the model that was expanded, in a type that does not round its weights."
        )


def _check_groups(current: ExpansionPlan, plan: ExpansionPlan) -> None:
    """The groups of a plan against those that the model has.

    Raises:
        ValueError: they come in another order, or are others.
    """
    ours, theirs = [group.name for group in current.groups], [group.name for group in plan.groups]
    if theirs[: len(ours)] != ours:
        raise ValueError(
            f"The plan has the groups {', '.join(theirs)}, but the model was expanded with {', '.join(ours)}. Experts are "
            f"numbered in order of addition, so the order must be the same."
        )


def _plan_of_expanded(model: nn.Module) -> ExpansionPlan:
    plan = plan_of(model)
    if plan is None or not plan.routed_layers:
        raise ValueError(f"{type(model).__name__} is dense: it has no routed layer. Expand it first.")
    return plan
