"""An expanded model in the architecture of an MoE of transformers, where the shapes allow it.

Most do not: those architectures have one number of experts, a router without bias cannot keep tokens from experts that
only fill up, and nothing there stands for a classifier. A uniform expansion of some families (MoE-LPR, arXiv 2408.11396)
fits, and then programs that know nothing of lit_llm can run it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from lit_llm.models import surgery
from lit_llm.models.expansion_plan import ExpansionPlan
from lit_llm.models.mlp_kinds import stacked_layout
from lit_llm.storage import complete_folder

_TARGETS = {"llama": "mixtral", "mistral": "mixtral", "qwen3": "qwen3_moe"}
_KEEPS_DENSE_LAYERS = {"qwen3_moe"}


def export_moe(model: nn.Module, folder: Path, tokenizer=None) -> str:
    """Write an expanded model as a Mixtral or Qwen3-MoE folder, after comparing logits.

    Args:
        model: an expanded model.
        folder: where to; it appears when it is complete.
        tokenizer: written beside it.

    Returns:
        The model type of the folder.

    Raises:
        ValueError: no architecture fits, with all reasons.
    """
    plan = surgery.plan_of(model)
    if plan is None:
        raise ValueError(f"{type(model).__name__} is dense. Save it with save_pretrained.")
    if reasons := _obstacles(plan):
        raise ValueError(_refusal("; ".join(reasons)))
    exported = _exported(model, plan)
    tokens_BL = torch.arange(1, 17, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.no_grad():
        training = model.training
        ours, theirs = model.eval()(tokens_BL).logits.float(), exported.eval()(tokens_BL).logits.float()
        model.train(training)
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    difference = (ours - theirs).abs().max().item()
    if not difference <= tolerance * ours.abs().max().item():
        raise ValueError(
            _refusal(f"logits of {type(exported).__name__} with the same weights differ by up to {difference:.3g}")
        )
    with complete_folder(Path(folder)) as scratch:
        exported.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
    return exported.config.model_type


def _obstacles(plan: ExpansionPlan) -> list[str]:
    """Why this plan fits no other architecture."""
    target, counts = _TARGETS.get(plan.base.model_type), plan.expert_counts
    if target is None:
        return [
            f"there is no MoE for the attention and norms of {plan.base.model_type} (only for {', '.join(_TARGETS)})"
        ]
    reasons = []
    if target in _KEEPS_DENSE_LAYERS:
        counts = [count for count in counts if count > 1]
    if len(set(counts)) > 1:
        reasons.append(
            f"layers have {min(counts)} to {max(counts)} experts where {target} has one number, and its router, which has no "
            f"bias, would also choose experts that only fill up"
        )
    if plan.classifier_layers:
        reasons.append(f"{target} has nothing for the classifiers of the layers {plan.classifier_layers}")
    if max(counts, default=1) < plan.experts_per_token:
        reasons.append(
            f"{plan.experts_per_token} experts per token are more than the {max(counts, default=1)} that there are"
        )
    if plan.mlp.kind != "gated":
        reasons.append(f"{target} has gated MLPs, not {plan.mlp.kind} ones")
    return reasons


def _refusal(reason: str) -> str:
    return (
        f"This model cannot be exported to another architecture: {reason}. Save it with save_pretrained: after "
        f"`import lit_llm`, AutoModelForCausalLM reads it."
    )


def _exported(model: nn.Module, plan: ExpansionPlan) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    target = CONFIG_MAPPING[_TARGETS[plan.base.model_type]]
    config = model.config.get_text_config()
    known = {name: value for name, value in copy.deepcopy(vars(config)).items() if name in target.__dataclass_fields__}
    for name in ("architectures", "dtype", "transformers_version", "num_experts_per_tok"):
        known.pop(name, None)
    settings = target(**(known | _moe_fields(target.model_type, config, plan)))
    exported = AutoModelForCausalLM.from_config(
        settings, dtype=model.dtype, attn_implementation=config._attn_implementation
    )
    try:
        exported.to(model.device).load_state_dict(_renamed(model))
    except RuntimeError as error:
        raise ValueError(_refusal(" ".join(str(error).split("\n")[:2]))) from error
    exported.generation_config = copy.deepcopy(model.generation_config)
    return exported


def _moe_fields(target: str, config, plan: ExpansionPlan) -> dict:
    experts = {"num_experts_per_tok": plan.experts_per_token, "output_router_logits": False}
    count = max(plan.expert_counts)
    if target == "mixtral":
        window = getattr(config, "sliding_window", None)
        return {**experts, "num_local_experts": count, "sliding_window": window, "router_jitter_noise": 0.0}
    return {
        **experts,
        "num_experts": count,
        "moe_intermediate_size": config.intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, number in enumerate(plan.expert_counts) if number == 1],
    }


def _renamed(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors under the names of the MoE, experts of all groups in one stack."""
    state = {}
    prefixes = {f"{name}.": part for name, part in model.named_modules() if isinstance(part, surgery.RoutedMLP)}
    for name, tensor in model.state_dict().items():
        if not name.startswith(tuple(prefixes)):
            state[name] = tensor
    for prefix, routed in prefixes.items():
        state[f"{prefix}gate.weight"] = routed.router.weight.detach()
        base = stacked_layout(routed.base, routed.kind)
        for name, parts in base.items():
            stacks = [torch.cat(parts)[None], *(bank.get_parameter(name) for bank in routed.experts.values())]
            state[f"{prefix}experts.{name}"] = torch.cat(stacks).detach()
    return state
