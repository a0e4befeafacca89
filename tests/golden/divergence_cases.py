"""Golden cases of divergences, cross-entropy and vanilla distillation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import distillation, finite_logits, token_cross_entropy
from lit_llm.losses.head import Head
from tests.golden.golden import Case

_OUR_NAME = {
    "js_divergence": "js",
    "kl": "forward_kl",
    "rkl": "reverse_kl",
    "jsd": "generalized_js",
    "skl": "skewed_forward_kl",
    "srkl": "skewed_reverse_kl",
    "akl": "adaptive_kl",
    "hrl": "hierarchical_ranking",
}


def published(name: str, hparams: dict[str, Any]) -> Divergence:
    """A divergence under its published name and with its published settings."""
    temperature = hparams["temperature"] if "temperature" in hparams else hparams["kd_temperature"]
    assert hparams.get("hrl_topk", 5) == 5, "the published ranking loss always takes the top 5"
    name, epsilon = _OUR_NAME.get(name, name), 1e-9 if name == "js_divergence" else 0.0
    share = {
        "skewed_forward_kl": {"skew": hparams.get("skew_lambda", 0.1)},
        "skewed_reverse_kl": {"skew": hparams.get("skew_lambda", 0.1)},
        "adaptive_kl": {"alpha": hparams.get("adaptive_kl_alpha", 0.5)},
        "generalized_js": {"beta": hparams.get("jsd_beta", 0.5)},
    }.get(name, {})
    return Divergence(name=name, temperature=temperature, epsilon=epsilon, **share)


def check_divergence(case: Case) -> None:
    labelled = case["labels"] != -100 if "labels" in case else None
    for field in case.expected("tok."):
        name, setting = (*field.removeprefix("tok.").split("."), None)[:2]
        divergence = _with_setting(case, name, setting)
        student, value = _per_token(case, divergence, case.dtype)
        case.check(field, value)
        counted = value if labelled is None else value[labelled]
        suffix = field.removeprefix("tok.")
        if f"grad.{suffix}" in case:
            counted.sum().backward()
            case.check(f"grad.{suffix}", student.grad)
        if f"sum.{suffix}" in case.scalars():
            case.check_scalar(f"sum.{suffix}", counted.sum())
        if f"sum_float32.{suffix}" in case.scalars():
            single = _per_token(case, divergence, torch.float32)[1]
            case.check_scalar(f"sum_float32.{suffix}", single[labelled].sum(), **case.tolerance(torch.float32))


def check_cross_entropy(case: Case) -> None:
    labelled = case["labels"] != -100
    logits_TV, target_T = case["logits"][labelled], case["labels"][labelled]
    cleaned_TV = finite_logits(logits_TV)
    total = token_cross_entropy(cleaned_TV, target_T).sum()
    case.check_scalar("sum", total)
    case.check_scalar("mean", total / len(target_T))
    case.check_scalar("correct_tokens_after_cleaning", (cleaned_TV.argmax(-1) == target_T).sum())


def check_vanilla_kd(case: Case) -> None:
    hidden, head, labels = case.leaf("student_hidden"), case.leaf("student_head"), case["labels"]
    labelled, denominator, rate = labels != -100, case.hparams["loss_denom"], case.hparams["kd_rate"]
    terms = distillation(
        hidden[labelled],
        Head(head),
        labels[labelled],
        case["teacher_hidden"][labelled],
        Head(case["teacher_head"]),
        published(case.hparams["kd_objective"], case.hparams),
        ce_weight=(1 - rate) / denominator,
        kd_weight=rate / denominator,
        chunk_size=7,
    )
    terms.loss.backward()
    case.check_scalar("loss", terms.loss)
    case.check_scalar("nll_loss", terms.ce / denominator)
    case.check_scalar("kd_loss", terms.kd / denominator)
    case.check_scalar("accuracy", terms.correct / denominator)
    case.check("grad.student_hidden", hidden.grad)
    case.check("grad.student_head", head.grad)


def _with_setting(case: Case, name: str, setting: str | None) -> Divergence:
    if setting is None:
        return published(name, case.hparams)
    chosen = case.hparams["settings"][setting]
    divergence = published(name, {**case.hparams, **chosen})
    return replace(
        divergence, teacher_temperature=chosen["teacher_temperature"] if chosen["use_teacher_temperature"] else 1.0
    )


def _per_token(case: Case, divergence: Divergence, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    student, teacher = (case[side].to(dtype) for side in ("student_logits", "teacher_logits"))
    student = student.clone().requires_grad_()
    value = divergence(student.flatten(0, -2), teacher.flatten(0, -2))
    return student, value.view(student.shape[:-1])


HANDLERS = {
    "divergence": check_divergence,
    "cross_entropy": check_cross_entropy,
    "vanilla_kd": check_vanilla_kd,
}
