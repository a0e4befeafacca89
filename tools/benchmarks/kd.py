"""Contenders of the suite `kd`: half cross-entropy, half divergence from a teacher with the same vocabulary.

TRL compares with a generalised Jensen-Shannon divergence alone (beta 0.5, temperature 1), so `lit_llm jsd` is measured
beside it; both kinds have a gate of their own.

Shapes: B sequences, L positions, T supervised tokens, V vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from benchmarks.reference_code import load_module
from benchmarks.workload import IGNORED, KD_WEIGHT, TEMPERATURE, Step, Workload, parameters
from lit_llm.losses import fused_head
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.logit_gradient import compile_elementwise


def plain(work: Workload, _: str | None) -> Step:
    """Textbook PyTorch: both models in full, logits of the supervised positions, automatic differentiation."""
    student, teacher = work.student, work.teacher
    target_T = work.tokens.target_T

    def loss() -> Tensor:
        with torch.no_grad():
            teacher_TV = teacher(input_ids=work.ids_BL).logits.flatten(0, 1)[work.tokens.position_T]
        student_TV = student(input_ids=work.ids_BL).logits.flatten(0, 1)[work.tokens.position_T]
        log_q, log_p = log_softmax(student_TV / TEMPERATURE, -1), log_softmax(teacher_TV / TEMPERATURE, -1)
        kd = (log_p.exp() * (log_p - log_q)).sum()
        total = (1 - KD_WEIGHT) * cross_entropy(student_TV, target_T, reduction="sum") + KD_WEIGHT * kd
        total = total / work.supervised
        total.backward()
        return total.detach()

    return Step(loss, parameters(student))


def fused(work: Workload, _: str | None) -> Step:
    """lit_llm."""
    return _ours(work, Divergence(temperature=TEMPERATURE), 1 - KD_WEIGHT, KD_WEIGHT)


def compiled(work: Workload, folder: str | None) -> Step:
    """lit_llm with --compile_loss true."""
    compile_elementwise(True)
    return fused(work, folder)


def store(work: Workload, _: str | None) -> Step:
    """lit_llm with the teacher's hidden states at hand, as from a teacher store."""
    return _ours(work, Divergence(temperature=TEMPERATURE), 1 - KD_WEIGHT, KD_WEIGHT, stored=True)


def fused_jsd(work: Workload, _: str | None) -> Step:
    """lit_llm with TRL's objective."""
    return _ours(work, Divergence(name="generalized_js", temperature=1.0), 0.0, 1.0)


def trl_gkd(work: Workload, _: str | None) -> Step:
    """TRL: what GKDTrainer.compute_loss does with two models, beta 0.5."""
    from trl.experimental.gkd import GKDTrainer

    def loss() -> Tensor:
        student_BLV = work.student(input_ids=work.ids_BL).logits
        with torch.no_grad():
            teacher_BLV = work.teacher(input_ids=work.ids_BL).logits
        total = GKDTrainer.generalized_jsd_loss(
            student_logits=student_BLV[:, :-1],
            teacher_logits=teacher_BLV[:, :-1],
            labels=work.labels_BL[:, :-1],
            beta=0.5,
        )
        total.backward()
        return total.detach()

    return Step(loss, parameters(work.student))


def trl_chunked(work: Workload, _: str | None) -> Step:
    """TRL's chunked divergence on the hidden states of supervised positions, beta 0.5."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    rows = work.tokens.position_T

    def loss() -> Tensor:
        student_TD = work.student.base_model(input_ids=work.ids_BL).last_hidden_state.flatten(0, 1)[rows]
        with torch.no_grad():
            teacher_TE = work.teacher.base_model(input_ids=work.ids_BL).last_hidden_state.flatten(0, 1)[rows]
        divergence_T, _ = ChunkedDivergenceFunction.apply(
            student_TD, work.student.lm_head.weight, None, teacher_TE, work.teacher.lm_head.weight, None, 0.5
        )
        total = divergence_T.sum() / work.supervised
        total.backward()
        return total.detach()

    return Step(loss, parameters(work.student))


def dskd_code(work: Workload, folder: str | None) -> Step:
    """The authors' vanilla KD (a checkout of songmzhang/DSKDv2)."""
    module = load_module(folder, "criterions.various_divergence")
    criterion = module.VariousDivergence(reference_settings())

    def loss() -> Tensor:
        total, _ = criterion(
            SimpleNamespace(student_model=work.student, teacher_model=work.teacher), reference_batch(work), {}
        )
        total.backward()
        return total.detach()

    return Step(loss, parameters(work.student))


def reference_settings() -> SimpleNamespace:
    """The arguments that the authors' criteria read, as in their scripts."""
    return SimpleNamespace(
        kd_rate=KD_WEIGHT,
        kd_temperature=TEMPERATURE,
        teacher_temperature=1.0,
        kd_objective="forward_kl",
        label_smoothing=0.0,
        init_s2t_projector=True,
        topk_vocab=-1,
        t2s_agreement=1.0,
        only_stu_kd=False,
        only_tea_kd=False,
    )


def reference_batch(work: Workload) -> dict:
    """The authors' batch: fixed length, labels already shifted."""
    denominator = torch.tensor(float(work.labels_BL.ne(IGNORED).sum()))
    labels = {"label": work.labels_BL, "loss_denom": denominator}
    tokens = {"input_ids": work.ids_BL, "attention_mask": torch.ones_like(work.ids_BL)}
    return {
        "input_batch": tokens,
        "teacher_input_batch": tokens,
        "label_batch": labels,
        "teacher_label_batch": {"label": work.labels_BL},
    }


def _ours(work: Workload, divergence: Divergence, ce_weight: float, kd_weight: float, stored: bool = False) -> Step:
    student, teacher = work.language_models()
    with torch.no_grad():
        stored_TE = teacher.hidden(work.tokens) if stored else None
    head = teacher.head
    if stored:
        work.teacher.base_model.layers = torch.nn.ModuleList()

    def loss() -> Tensor:
        with torch.no_grad():
            teacher_TE = teacher.hidden(work.tokens) if stored_TE is None else stored_TE
        terms = fused_head.distillation(
            student.hidden(work.tokens),
            student.head,
            work.tokens.target_T,
            teacher_TE,
            head,
            divergence,
            ce_weight=ce_weight / work.supervised,
            kd_weight=kd_weight / work.supervised,
        )
        terms.loss.backward()
        return terms.loss.detach()

    return Step(loss, parameters(work.student))


# name: (contender, gate, needs)
CONTENDERS = {
    "lit_llm": (fused, "kl", None),
    "lit_llm compiled": (compiled, "kl", None),
    "lit_llm store": (store, "kl", None),
    "plain PyTorch": (plain, "kl", None),
    "DSKDv2 code, KD": (dskd_code, "kl", "dskdv2"),
    "lit_llm jsd": (fused_jsd, "jsd", None),
    "TRL GKD": (trl_gkd, "jsd", "trl"),
    "TRL chunked": (trl_chunked, "jsd", "trl"),
}
