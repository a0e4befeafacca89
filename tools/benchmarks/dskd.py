"""Contenders of the suite `dskd`: DSKD v2 with one vocabulary, forward KL, the published mask.

Shapes: B sequences, L positions, T supervised tokens, D and E widths, V vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, log_softmax

from benchmarks.kd import reference_batch, reference_settings
from benchmarks.reference_code import load_module
from benchmarks.workload import KD_WEIGHT, TEMPERATURE, Step, Workload, closed_form, parameters
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.dual_space import DualSpace, dual_space
from lit_llm.losses.logit_gradient import compile_elementwise
from lit_llm.models.projector import ClosedFormStudentToTeacher, ideal_projectors, shared_rows


def plain(work: Workload, _: str | None) -> Step:
    """Textbook PyTorch: logits of the supervised positions in full, automatic differentiation."""
    student, teacher, rows = work.student, work.teacher, work.tokens.position_T
    teacher_WE = teacher.lm_head.weight
    to_student = _projector(closed_form(teacher_WE, student.lm_head.weight.detach()))
    gram_inverse_EE = torch.linalg.pinv((teacher_WE.T @ teacher_WE).double(), hermitian=True).float()

    def divergence(student_TV: Tensor, teacher_TV: Tensor) -> Tensor:
        log_q, log_p = log_softmax(student_TV / TEMPERATURE, -1), log_softmax(teacher_TV / TEMPERATURE, -1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    def loss() -> Tensor:
        with torch.no_grad():
            teacher_TE = teacher.base_model(input_ids=work.ids_BL).last_hidden_state.flatten(0, 1)[rows]
            teacher_TV = linear(teacher_TE, teacher_WE)
        student_TD = student.base_model(input_ids=work.ids_BL).last_hidden_state.flatten(0, 1)[rows]
        student_VD = student.lm_head.weight
        student_TV = linear(student_TD, student_VD)
        projected_TV = linear(to_student(teacher_TE), student_VD.detach())
        map_ED = gram_inverse_EE @ (teacher_WE.T @ student_VD.detach())
        mapped_TV = linear(linear(student_TD, map_ED), teacher_WE)
        label_T = teacher_TV.argmax(-1)
        agree_T = projected_TV.argmax(-1) == label_T
        t2s_ce = cross_entropy(projected_TV, label_T, reduction="sum") / work.supervised
        t2s_kd = (divergence(student_TV, projected_TV.detach()) * agree_T).sum() / agree_T.sum().clamp(min=1)
        s2t_kd = divergence(mapped_TV, teacher_TV).sum() / work.supervised
        ce = cross_entropy(student_TV, work.tokens.target_T, reduction="sum") / work.supervised
        total = (1 - KD_WEIGHT) * ce + KD_WEIGHT * (t2s_ce + t2s_kd + s2t_kd)
        total.backward()
        return total.detach()

    return Step(loss, parameters(student, to_student))


def fused(work: Workload, _: str | None) -> Step:
    """lit_llm."""
    return _ours(work, stored=False)


def compiled(work: Workload, folder: str | None) -> Step:
    """lit_llm with --compile_loss true."""
    compile_elementwise(True)
    return fused(work, folder)


def store(work: Workload, _: str | None) -> Step:
    """lit_llm with the teacher's hidden states at hand, as from a teacher store."""
    return _ours(work, stored=True)


def dskd_code(work: Workload, folder: str | None) -> Step:
    """The authors' criterion (a checkout of songmzhang/DSKDv2), the ideal start of its projectors given."""
    module = load_module(folder, "criterions.dual_space_kd_v2")
    settings = reference_settings()
    teacher_VE, student_VD = work.teacher.lm_head.weight, work.student.lm_head.weight.detach()
    to_student = _projector(closed_form(teacher_VE, student_VD))
    distiller = SimpleNamespace(
        student_model=work.student,
        teacher_model=work.teacher,
        t2s_projector=to_student,
        part_teacher_head_pinv=_pseudo_inverse(teacher_VE),
        args=settings,
    )
    criterion = module.DualSpaceKDV2(settings)

    def loss() -> Tensor:
        total, _ = criterion(distiller, reference_batch(work), {})
        total.backward()
        return total.detach()

    return Step(loss, parameters(work.student, to_student))


def kdflow_code(work: Workload, folder: str | None) -> Step:
    """KDFlow's loss path (a checkout of songmzhang/KDFlow): hidden states in, its compiled losses, no chunks."""
    algorithm = load_module(folder, "kdflow.algorithms.dskd").DSKD
    losses = load_module(folder, "kdflow.loss")
    kd = SimpleNamespace(kd_ratio=KD_WEIGHT, dskd_topk_vocab=-1, dskd_token_align="eta", kd_temperature=TEMPERATURE)
    kd.jsd_beta = kd.skew_lambda = kd.adaptive_alpha = kd.hrl_topk = None
    teacher_VE, student_VD = work.teacher.lm_head.weight, work.student.lm_head.weight.detach()
    to_student = _projector(closed_form(teacher_VE, student_VD))
    ours = SimpleNamespace(
        t2s_projector=to_student,
        student_lm_head=student_VD.clone(),
        teacher_lm_head=work.teacher.lm_head,
        part_teacher_head_pinv=_pseudo_inverse(teacher_VE),
        loss_fn=losses.build_loss_fn("kl", SimpleNamespace(kd=kd)),
        args=SimpleNamespace(kd=kd),
    )
    mask_BL = work.labels_BL.ne(-100)
    compute_cross_entropy = load_module(folder, "kdflow.loss.cross_entropy").compute_cross_entropy
    labels_T = work.labels_BL[mask_BL]

    def loss() -> Tensor:
        with torch.no_grad():
            teacher_TE = work.teacher.base_model(input_ids=work.ids_BL).last_hidden_state[mask_BL]
            teacher_TV = work.teacher.lm_head(teacher_TE)
        student_TD = work.student.base_model(input_ids=work.ids_BL).last_hidden_state[mask_BL]
        student_TV = work.student.lm_head(student_TD)
        found = algorithm._compute_dskd_loss(
            ours,
            student_TD,
            teacher_TE,
            student_TV,
            teacher_TV,
            work.ids_BL,
            work.ids_BL,
            mask_BL,
            mask_BL,
            work.supervised,
        )
        ce = compute_cross_entropy(student_TV, labels_T, reduction="sum") / work.supervised
        total = (1 - KD_WEIGHT) * ce + KD_WEIGHT * found["kd_loss"]
        total.backward()
        return total.detach()

    return Step(loss, parameters(work.student, to_student))


def _ours(work: Workload, stored: bool) -> Step:
    student, teacher = work.language_models()
    student_VD, teacher_WE = work.student.lm_head.weight, work.teacher.lm_head.weight
    shared = shared_rows(student_VD.detach(), teacher_WE)
    ideal, back = ideal_projectors(student_VD.detach(), teacher_WE, shared)
    to_student = _projector(ideal.weight)
    to_teacher = ClosedFormStudentToTeacher(back.gram_inverse, shared)
    divergence = Divergence(temperature=TEMPERATURE)
    settings, steps = DualSpace(divergence, divergence), iter(range(10**9))
    with torch.no_grad():
        stored_TE = teacher.hidden(work.tokens) if stored else None
    head = teacher.head
    if stored:
        work.teacher.base_model.layers = nn.ModuleList()

    def loss() -> Tensor:
        with torch.no_grad():
            teacher_TE = teacher.hidden(work.tokens) if stored_TE is None else stored_TE
        student_TD = student.hidden(work.tokens)
        heads, step = (student_VD.detach(), teacher_WE), next(steps)
        if to_teacher.composing_pays(work.supervised, *to_student.weight.shape):
            mapped, mapped_head = student_TD, head._replace(weight_VD=to_teacher.composed(*heads, step))
        else:
            mapped, mapped_head = to_teacher(student_TD, *heads, step), None
        terms = dual_space(
            student_TD,
            work.tokens.target_T,
            student.head,
            teacher_TE,
            head,
            to_student(teacher_TE),
            mapped,
            settings,
            ce_weight=(1 - KD_WEIGHT) / work.supervised,
            kd_weight=KD_WEIGHT,
            kd_denominator=work.supervised,
            projected_student_head=mapped_head,
        )
        terms.loss.backward()
        return terms.loss.detach()

    return Step(loss, parameters(work.student, to_student))


def _projector(weight_DE: Tensor) -> nn.Linear:
    layer = nn.Linear(*reversed(weight_DE.shape), bias=False, device=weight_DE.device)
    with torch.no_grad():
        layer.weight.copy_(weight_DE)
    return layer


def _pseudo_inverse(head_VE: Tensor) -> Tensor:
    """(V, E) in the authors' orientation, by float64 least squares so that all contenders use one map."""
    head = head_VE.double()
    return (head @ torch.linalg.pinv(head.T @ head, hermitian=True)).to(head_VE.dtype)


# name: (contender, gate, needs)
CONTENDERS = {
    "lit_llm": (fused, "dskd", None),
    "lit_llm compiled": (compiled, "dskd", None),
    "lit_llm store": (store, "dskd", None),
    "plain PyTorch": (plain, "dskd", None),
    "DSKDv2 code": (dskd_code, "dskd", "dskdv2"),
    "KDFlow loss path": (kdflow_code, "dskd", "kdflow"),
}
