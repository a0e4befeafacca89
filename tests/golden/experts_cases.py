"""Golden cases of the routed layer and of the classifier in front of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_llm.models.experts import Classifier, RoutedMLP, collect_routing
from tests.golden.golden import Case
from tests.models.small_experts import GatedMLP, PlainMLP

_ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}
_NAMES = (
    *("gate_proj.weight", "up_proj.weight", "down_proj.weight"),
    *("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"),
)


def check_forward(case: Case) -> None:
    block = _block(case, renormalise=case.hparams["weights_renormalised"])
    with torch.no_grad():
        block.router.weight.copy_(case["router.weight"])
    x = case.leaf("x")
    with collect_routing(block) as records:
        y = block(x)
    routing = records[0]
    case.check("y", y)
    case.check("router_logits", routing.router_logits_MN)
    case.check("router_probs", routing.router_logits_MN.softmax(-1))
    case.check("topk_index", routing.chosen_Mk)
    case.check("topk_weight", routing.gates_Mk)
    case.check("tokens_per_expert", routing.counts_N)
    if case.hparams["upcycled_copies"]:
        assert torch.equal(y, block.base(x)), "copies give exactly the dense output"
    _check_gradients(case, block, x, (y * case["cotangent"]).sum())


def check_classifier_gate(case: Case) -> None:
    block = _block(case, renormalise=True)
    num_experts, groups = case.hparams["num_experts"], case.hparams["groups"]
    reach = (1, case.hparams.get("old_num_experts", num_experts), num_experts)[:groups]
    usual = groups == 2 and reach[1] == num_experts
    scope = case.hparams["scope"]
    block.classifier = Classifier(case.hparams["hidden_size"], scope, reach=None if usual else reach).to(case.dtype)
    with torch.no_grad():
        block.router.weight.copy_(case["router.weight"])
        block.classifier.weight.copy_(case["classifier.weight"])
    x = case.leaf("x")
    with collect_routing(block) as records:
        y = block(x)
    routing = records[0]
    by_row = scope == "sequence_sum"
    case.check("y", y)
    case.check("classifier_logits", routing.classifier_logits)
    _, judged_M = block.classifier.decide(x, None)
    assert torch.equal(routing.bypass_M, judged_M == 0)
    case.check("group", judged_M.view(x.shape[:2])[:, 0] if by_row else judged_M)
    case.check("mixture_weight", routing.mixture_MN)
    if "router_logits" in case:
        case.check("router_logits", routing.router_logits_MN)
    _check_gradients(case, block, x, (y * case["cotangent"]).sum())

    x = case.leaf("x")
    logits, _ = block.classifier.decide(x, None)
    labels = case["labels"].flatten()
    keep = torch.ones_like(labels, dtype=torch.bool) if by_row else case["attention_mask"].flatten().bool()
    loss = nn.functional.cross_entropy(logits[keep], labels[keep])
    weight_grad, x_grad = torch.autograd.grad(loss, (block.classifier.weight, x))
    case.check("classifier_loss", loss)
    _check_gradient(case, "classifier_loss.grad.classifier.weight", weight_grad)
    _check_gradient(case, "classifier_loss.grad.x", x_grad)


HANDLERS = {"moe_forward": check_forward, "classifier_gate": check_classifier_gate}


def _block(case: Case, renormalise: bool) -> RoutedMLP:
    sizes = case.hparams["hidden_size"], case.hparams["intermediate_size"]
    activation = _ACTIVATIONS.get(case.hparams["activation"], case.hparams["activation"])
    names = [name for name in _NAMES if f"base.{name}" in case]
    base = GatedMLP(*sizes, activation) if "gate_proj.weight" in names else PlainMLP(*sizes, activation)
    base.to(case.dtype).load_state_dict({name: case[f"base.{name}"] for name in names})
    block = RoutedMLP(base, experts_per_token=case.hparams["top_k"], renormalise=renormalise)
    bank = block.add_experts(1, case.hparams["num_experts"] - 1)
    with torch.no_grad():
        for name, value in _stacked(case).items():
            bank.get_parameter(name).copy_(value)
    block.set_router(torch.Generator().manual_seed(0))
    return block.to(case.dtype)


def _stacked(case: Case) -> dict[str, Tensor]:
    new = {name: case[f"new.{name}"] for name in _NAMES if f"new.{name}" in case}
    if "gate_proj.weight" in new:
        return {
            "gate_up_proj": torch.cat([new["gate_proj.weight"], new["up_proj.weight"]], 1),
            "down_proj": new["down_proj.weight"],
        }
    return {
        "in_proj": new["fc1.weight"],
        "in_proj_bias": new["fc1.bias"],
        "out_proj": new["fc2.weight"],
        "out_proj_bias": new["fc2.bias"],
    }


def _check_gradients(case: Case, block: RoutedMLP, x: Tensor, value: Tensor) -> None:
    value.backward()
    bank = block.experts["1"]
    _check_gradient(case, "grad.x", x.grad)
    _check_gradient(case, "grad.router.weight", block.router.weight.grad)
    if "new.gate_proj.weight" in case:
        gate, up = bank.gate_up_proj.grad.chunk(2, dim=1)
        found = {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": bank.down_proj.grad}
    else:
        found = {
            "fc1.weight": bank.in_proj.grad,
            "fc1.bias": bank.in_proj_bias.grad,
            "fc2.weight": bank.out_proj.grad,
            "fc2.bias": bank.out_proj_bias.grad,
        }
    for name, gradient in found.items():
        _check_gradient(case, f"grad.new.{name}", gradient)


def _check_gradient(case: Case, name: str, gradient: Tensor) -> None:
    case.check(name, gradient, **case.gradient_tolerance(name))
