"""Golden cases of LayerMoE's losses, routing metrics, similarity and allocation."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_llm.evaluation.language_similarity import UnitVectors, aggregate, measure
from lit_llm.evaluation.routing import RoutedLayer, RoutingStatistics
from lit_llm.losses.routing import expert_slots, group_prior, language_prior, load_balance
from lit_llm.models.allocation import by_budget, by_delta
from tests.golden.golden import Case
from tests.reference.layer_moe_losses import released_group_prior


def check_balance(case: Case) -> None:
    k, sizes = case.hparams["top_k"], case.hparams["num_experts"]
    mask_M = case["attention_mask"].flatten()
    for prefix, kept_M in (("masked", mask_M), ("unmasked", torch.ones_like(mask_M))):
        layers = _layers(case)
        per_layer = torch.stack([load_balance([logits_MN], k, kept_M).mean for logits_MN in layers])
        loss = load_balance(layers, k, kept_M).mean
        slots = torch.tensor([min(k, size) for size in sizes])
        case.check(f"{prefix}.per_layer", per_layer)
        case.check(f"{prefix}.paper_per_layer", per_layer / slots)
        case.check(f"{prefix}.paper_loss", (per_layer / slots).mean())
        case.check(f"{prefix}.loss", loss)
        loss.backward()
        _gradients(case, f"{prefix}.grad", layers)


def check_prior(case: Case) -> None:
    old_M = case["old_mask"].flatten()
    for prefix, form in (("reference", "released"), ("recommended", "exact")):
        layers = _layers(case)
        loss = language_prior(layers, old_M, form).mean
        case.check(f"{prefix}.loss", loss)
        loss.backward()
        _gradients(case, f"{prefix}.grad", layers)
    if "reference.moe_lpr_loss" in case:
        case.check("reference.moe_lpr_loss", language_prior(_layers(case), old_M, "released").mean)
    layers = _layers(case)
    without = language_prior(layers, torch.zeros_like(old_M)).mean
    case.check("recommended.loss_without_old_tokens", without)
    without.backward()
    assert all(logits_MN.grad is not None and not logits_MN.grad.any() for logits_MN in layers)


def check_group_prior(case: Case) -> None:
    layers, group_M, mask_M = _layers(case), case["group"], case["attention_mask"]
    bounds = case.hparams["expert_bounds"]
    loss = group_prior(layers, bounds, group_M, mask_M).mean
    case.check("loss", loss)
    loss.backward()
    _gradients(case, "grad", layers)
    first = _layers(case)[0]
    sets = [list(range(low, high)) for low, high in zip([0, *bounds[0]], bounds[0], strict=False)]
    unused = released_group_prior(first, sets, group_M.tolist(), mask_M.bool().tolist())
    unused.backward()
    case.check("reference.layer0_loss", unused)
    case.check("reference.layer0_grad", first.grad, **case.gradient_tolerance("reference.layer0_grad"))


def check_routing_metrics(case: Case) -> None:
    logits_MN, mask_M, old_M = case["router_logits"], case["attention_mask"].bool(), case["old_mask"].bool()
    k, size = case.hparams["top_k"], case.hparams["num_experts"]
    counts = RoutingStatistics([size], k, groups=[0, 1])
    half = len(logits_MN) // 2
    for rows in (slice(0, half), slice(half, None)):  # a window of two steps
        counts.update([RoutedLayer(logits_MN[rows])], (~old_M[rows]).long(), mask_M[rows])
    found = {name: value_L[0] for name, value_L in counts.compute().layers.items()}
    case.check("tokens_per_expert", expert_slots(logits_MN, k, mask_M))
    case.check("tokens_per_expert", counts.slots_LAN[0].sum(0))
    case.check("mean_probability", counts.prob_LAN[0].sum(0) / counts.tokens_A.sum())
    names = {"cv": "load_cv", "entropy": "load_entropy"}
    for name in case.expected():
        if name not in ("tokens_per_expert", "mean_probability"):
            case.check(name, torch.tensor(found[names.get(name, name)], dtype=torch.float64))


def check_similarity(case: Case) -> None:
    new, old = case.hparams["new_languages"], case.hparams["old_languages"]
    groups = {name: "new" for name in new} | {name: "old" for name in old}
    if "family" in case.hparams:
        means = _means_of_model(case, groups)
    else:
        used = case.hparams.get("tokens_used")
        means = {name: _mean(name, [case[f"hsa.{name}"][:, :used]]) for name in groups}
    report = aggregate(means, groups)
    assert list(report.pairs) == case.hparams["pairs"]
    case.check("pair_similarity", torch.tensor(list(report.pairs.values()), dtype=torch.float64).T)
    for field, values in (("new_new", report.new_new), ("new_old", report.new_old)):
        case.check(f"similarity_{field}", torch.tensor(values, dtype=torch.float64))
    case.check("similarity", torch.tensor(report.similarity, dtype=torch.float64))


def check_allocation(case: Case) -> None:
    if "delta" in case.hparams:
        new, old = (set(case.hparams[f"{group}_languages"]) for group in ("new", "old"))
        pairs = dict(zip(case.hparams["pairs"], case["pair_similarity"].T, strict=True))
        new_new, new_old = (
            torch.stack(
                [value_L for pair, value_L in pairs.items() if set(pair.split("-")) <= kept and kept_pair(pair)]
            )
            for kept, kept_pair in ((new, lambda _: True), (new | old, lambda pair: set(pair.split("-")) & old))
        )
        similarity = (new_new.mean(0) + new_old.mean(0)) / 2
        case.check("similarity_new_new", new_new.mean(0))
        case.check("similarity_new_old", new_old.mean(0))
        case.check("similarity", similarity)
        found = by_delta(similarity.tolist(), case.hparams["delta"])
        case.check("quota", torch.tensor(found.quota, dtype=torch.float64))
        case.check("experts", torch.tensor(found.experts))
        case.check("experts", torch.tensor(by_budget(similarity.tolist(), case.hparams["total"]).experts))
        assert sum(found.new) == case.hparams["new_experts"]
        return
    for name, rules in case.hparams.items():
        similarity = case[f"similarity.{name}"].tolist()
        for i, rule in enumerate(rules["ceil"]):
            found = by_delta(similarity, rule["delta"], rule["min_experts"])
            case.check(f"ceil.{name}.{i}", torch.tensor(found.experts))
            case.check(f"quota.{name}.{i}", torch.tensor(found.quota, dtype=torch.float64))
            assert sum(found.experts) == rule["total"]
        for i, rule in enumerate(rules["budget"]):
            found = by_budget(similarity, rule["total"], rule["min_experts"])
            case.check(f"budget.{name}.{i}", torch.tensor(found.experts))


def _layers(case: Case) -> list[Tensor]:
    return [case.leaf(f"router_logits.{layer}") for layer in range(len(case.hparams["num_experts"]))]


def _gradients(case: Case, prefix: str, layers: list[Tensor]) -> None:
    for layer, logits_MN in enumerate(layers):
        name = f"{prefix}.{layer}"
        case.check(name, logits_MN.grad, **case.gradient_tolerance(name))


def _mean(language: str, pieces: list[Tensor]) -> Tensor:
    """(L, H) from states (L, T, H) that arrive in pieces."""
    layers, _, width = pieces[0].shape
    vectors = UnitVectors(language, layers, width)
    for piece_LTH in pieces:
        for layer in range(layers):
            for half in piece_LTH[layer].tensor_split(2):
                vectors.add(layer, half)
    return vectors.mean_LH


def _means_of_model(case: Case, groups: dict[str, str]) -> dict[str, Tensor]:
    """Mean unit vectors of documents that a tiny decoder reads, its own states compared on the way."""
    model = decoder(case)
    documents = {name: [case[field].tolist() for field in sorted(case.inputs(f"input_ids.{name}."))] for name in groups}
    mlps = [layer.mlp for layer in model.model.layers]
    # transformers' norms compute in single precision also for double weights
    case.loosen(torch.float32)
    for name, texts in documents.items():
        states_LTH = torch.cat([_mlp_inputs(model, mlps, text) for text in texts], 1)
        case.check(f"hsa.{name}", states_LTH[:, : case.hparams["tokens_used"]])
    found, _ = measure(
        model.model, mlps, documents, groups, tokens_per_language=case.hparams["tokens_used"], batch_tokens=24
    )
    return {name: vectors.mean_LH for name, vectors in found.items()}


def _mlp_inputs(model, mlps: list, text: list[int]) -> Tensor:
    """(L, T, H) of one document."""
    seen: list[Tensor] = []
    handles = [mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].detach())) for mlp in mlps]
    model.model(input_ids=torch.tensor([text]))
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


def decoder(case: Case):
    """The tiny decoder of a case, in its precision."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        case.hparams["family"],
        **case.hparams["config"],
        rope_parameters={"rope_type": "default", "rope_theta": case.hparams["rope_theta"]},
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(case.dtype)
    weights = {name.removeprefix("param."): case[name] for name in case.inputs("param.")}
    model.load_state_dict(weights)
    return model.eval()


HANDLERS = {
    "balance_loss": check_balance,
    "lpr_loss": check_prior,
    "group_prior_loss": check_group_prior,
    "routing_metrics": check_routing_metrics,
    "similarity": check_similarity,
    "allocation": check_allocation,
}
