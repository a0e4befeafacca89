"""What the golden cases of the dual-space loss share: the models of a case, its projectors, its terms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_llm.losses.dual_space import DualSpaceTerms
from lit_llm.losses.head import Head
from lit_llm.models.projector import Projector
from tests.golden.golden import Case

CHUNK = 5


@dataclass
class Models:
    """The tensors of both models; the student's are leaves."""

    student: Tensor
    teacher: Tensor
    student_head: Head
    teacher_head: Head

    @classmethod
    def of(cls, case: Case) -> Models:
        heads = Head(case.leaf("student_head")), Head(case["teacher_head"])
        return cls(case.leaf("student_hidden"), case["teacher_hidden"], *heads)

    def check_gradients(self, case: Case) -> None:
        case.check("grad.student_hidden", self.student.grad)
        case.check("grad.student_head", self.student_head.weight_VD.grad)


def projector(case: Case, name: str) -> Projector:
    weight = case[f"{name}.weight"]
    projector = Projector(weight.shape[1], weight.shape[0], bias=f"{name}.bias" in case).to(case.dtype)
    return filled(case, projector, name)


def filled(case: Case, projector: Projector, name: str) -> Projector:
    with torch.no_grad():
        for part, parameter in projector.named_parameters():
            parameter.copy_(case[f"{name}.{part}"])
    return projector


def check_module(case: Case, projector: Projector, name: str) -> None:
    for part, parameter in projector.named_parameters():
        case.check(f"grad.{name}.{part}", parameter.grad)


def check_terms(case: Case, terms: DualSpaceTerms, denominator, *, kd_denominator, t2s_kd_denominator) -> None:
    t2s_ce, s2t_kd = terms.t2s_ce / kd_denominator, terms.s2t_kd / kd_denominator
    t2s_kd = terms.t2s_kd / t2s_kd_denominator
    values = {
        "loss": terms.loss,
        "nll_loss": terms.ce / denominator,
        "ce_loss": terms.ce / denominator,
        "t2s_ce_loss": t2s_ce,
        "t2s_kd_loss": t2s_kd,
        "s2t_kd_loss": s2t_kd,
        "kd_loss": t2s_ce + t2s_kd + s2t_kd,
        "accuracy": terms.correct / denominator,
    }
    for name in values.keys() & {*case.scalars()}:
        case.check_scalar(name, values[name])
