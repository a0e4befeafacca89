"""Golden cases of the dual-space loss: one tokenizer, and two with exact token alignment.

Every case is computed as a method computes it: supervised rows first, then the chunked loss, with a chunk that divides
nothing evenly. Logits and values per token are computed beside it over the whole grid.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lit_llm.losses.dual_space import DualSpace, DualSpaceTerms, dual_space
from lit_llm.losses.fused_head import cross_entropy
from lit_llm.models.projector import (
    ClosedFormStudentToTeacher,
    SharedRows,
    ideal_projectors,
    shared_rows,
)
from tests.golden.alignment_cases import (
    newer_label_map,
    newer_pairs,
    released_label_map,
    released_overlap,
    released_pairs_of_batch,
    stored_vocabularies,
)
from tests.golden.divergence_cases import published
from tests.golden.dual_space_parts import CHUNK, Models, check_module, check_terms, projector
from tests.golden.golden import Case
from tests.golden.projector_cases import pseudo_inverse


def check_v1_same_vocabulary(case: Case) -> None:
    models, labels, denominator = Models.of(case), case["labels"], case.hparams["loss_denom"]
    labelled, rate = labels != -100, case.hparams["kd_rate"]
    assert torch.equal(labelled, case["teacher_labels"] != -100)
    t2s, s2t = projector(case, "t2s"), projector(case, "s2t")
    settings = DualSpace(
        published(case.hparams["kd_objective"], case.hparams),
        published(case.hparams["teacher_space_objective"], case.hparams),
        teacher_target="gold",
        student_mask="none",
    )
    terms = dual_space(
        models.student[labelled],
        labels[labelled],
        models.student_head,
        models.teacher[labelled],
        models.teacher_head,
        t2s(models.teacher[labelled]),
        s2t(models.student[labelled]),
        settings,
        ce_weight=(1 - rate) / denominator,
        kd_weight=rate,
        kd_denominator=denominator,
        chunk_size=CHUNK,
    )
    terms.loss.backward()
    models.check_gradients(case)
    check_module(case, t2s, "t2s")
    check_module(case, s2t, "s2t")
    check_terms(case, terms, denominator, kd_denominator=denominator, t2s_kd_denominator=denominator)
    projected_WL = _check_grid(case, models, settings, t2s(models.teacher), s2t(models.student))
    hits = projected_WL.argmax(-1)[labelled] == case["teacher_labels"][labelled]
    case.check_scalar("s2t_acc", hits.double().sum() / denominator)
    case.check_scalar("t2s_acc", terms.t2s_correct / denominator)


def check_v2_same_vocabulary(case: Case) -> None:
    models, labels, hparams = Models.of(case), case["labels"], case.hparams
    labelled, rate, on_policy = labels != -100, hparams["kd_rate"], hparams["on_policy"]
    shared = shared_rows(models.student_head.weight_VD, models.teacher_head.weight_VD, topk=hparams["topk_vocab"])
    t2s, s2t = projector(case, "t2s"), _closed_form(case, models, shared)
    divergence = published(hparams["kd_objective"], hparams)
    denominator = hparams["loss_denom"]
    kd_denominator = hparams["op_loss_denom"] if on_policy else denominator
    # the released code divides the agreeing tokens by the denominator where ours divides by the labelled tokens
    threshold = hparams["t2s_agreement_threshold"] * denominator / int(labelled.sum())
    settings = DualSpace(divergence, divergence, student_mask="agree", agreement_threshold=threshold)
    if on_policy:
        settings = replace(settings, student_mask="none")
    student_TD, teacher_TE = models.student[labelled], models.teacher[labelled]
    projected_TE = _to_teacher(s2t, models, student_TD)
    terms = dual_space(
        student_TD,
        labels[labelled],
        models.student_head,
        teacher_TE,
        models.teacher_head,
        t2s(teacher_TE),
        projected_TE,
        settings,
        ce_weight=0.0 if on_policy else (1 - rate) / denominator,
        kd_weight=rate,
        kd_denominator=kd_denominator,
        chunk_size=CHUNK,
    )
    loss = terms.loss
    if on_policy:  # the data's own batch, here of the same tensors
        original = cross_entropy(student_TD, models.student_head, labels[labelled], chunk_size=CHUNK)
        loss = loss + (1 - rate) / denominator * original.loss
    loss.backward()
    models.check_gradients(case)
    check_module(case, t2s, "t2s")
    check_terms(
        case,
        terms._replace(loss=loss),
        denominator,
        kd_denominator=kd_denominator,
        t2s_kd_denominator=_divides_t2s_kd(settings, terms, kd_denominator),
    )
    case.check_scalar("t2s_agreement", terms.t2s_agree / kd_denominator)
    case.check_scalar("agreeing_tokens", terms.t2s_agree)
    z_st = _check_grid(case, models, settings, t2s(models.teacher), _to_teacher(s2t, models, models.student))
    if not on_policy:
        teacher_hits = models.teacher_head(teacher_TE).argmax(-1) == labels[labelled]
        case.check_scalar("t_acc", teacher_hits.double().sum() / denominator)
        case.check_scalar("t2s_acc", terms.t2s_correct / denominator)
        # published under this name: whether the student says the same under both heads
        unchanged = z_st.argmax(-1)[labelled] == models.student_head(student_TD).argmax(-1)
        case.check_scalar("s2t_agreement", unchanged.double().sum() / denominator)


def check_v2_eta(case: Case) -> None:
    models, hparams = Models.of(case), case.hparams
    student, teacher = stored_vocabularies(case.folder, case.json_file)
    pairs_A3 = released_pairs_of_batch(case["student_labels"], case["teacher_labels"], student, teacher)
    case.check("aligned_pairs", pairs_A3)
    case.check_scalar("aligned", len(pairs_A3))
    batch_A, teacher_A, student_A = pairs_A3.T
    table_W = released_label_map(student, teacher, models.teacher_head.num_rows)
    shared = _shared_by_string(case, student, teacher)
    t2s, s2t = projector(case, "t2s"), _closed_form(case, models, shared)

    labelled, labels = case["student_labels"] != -100, case["student_labels"]
    row_BL = labelled.flatten().cumsum(0).view_as(labelled) - 1
    teacher_AE = models.teacher[batch_A, teacher_A]
    divergence = published(hparams["kd_objective"], hparams)
    settings = DualSpace(divergence, divergence, agreement_threshold=hparams["t2s_agreement_threshold"])
    denominator, rate = hparams["loss_denom"], hparams["kd_rate"]
    terms = dual_space(
        models.student[labelled],
        labels[labelled],
        models.student_head,
        teacher_AE,
        models.teacher_head,
        t2s(teacher_AE),
        _to_teacher(s2t, models, models.student[batch_A, student_A]),
        settings,
        ce_weight=(1 - rate) / denominator,
        kd_weight=rate,
        kd_denominator=None,
        pair_student_A=row_BL[batch_A, student_A],
        teacher_to_student_W=table_W,
        chunk_size=CHUNK,
    )
    terms.loss.backward()
    models.check_gradients(case)
    check_module(case, t2s, "t2s")
    check_terms(
        case,
        terms,
        denominator,
        kd_denominator=terms.mapped,
        t2s_kd_denominator=_divides_t2s_kd(settings, terms, terms.mapped),
    )
    _check_eta_scalars(case, terms, pairs_A3)
    _check_eta_grid(case, models, settings, t2s, s2t, pairs_A3, table_W)


def check_newer_same_vocabulary(case: Case) -> None:
    models, hparams = Models.of(case), case.hparams
    shared = shared_rows(models.student_head.weight_VD, models.teacher_head.weight_VD, topk=hparams["topk_vocab"])
    t2s, s2t = projector(case, "t2s"), _closed_form(case, models, shared)
    _check_newer(case, models, t2s, s2t, case["labels"], None, None)


def check_newer_eta(case: Case) -> None:
    models = Models.of(case)
    student, teacher = stored_vocabularies(case.folder, case.json_file)
    pairs = newer_pairs(case["student_labels"].tolist(), case["teacher_labels"].tolist(), student, teacher)
    student_A, teacher_A = (torch.tensor(side) for side in pairs)
    case.check("aligned_student", student_A)
    case.check("aligned_teacher", teacher_A)
    table_W = newer_label_map(student, teacher, models.teacher_head.num_rows)
    case.check("teacher_to_student_id", table_W)
    t2s, s2t = projector(case, "t2s"), _closed_form(case, models, _shared_by_string(case, student, teacher))
    _check_newer(case, models, t2s, s2t, case["student_labels"], (student_A, teacher_A), table_W)


def _check_newer(case, models: Models, t2s, s2t, labels_T, pairs, table_W) -> None:
    """Same-vocabulary terms are divided by the average token count, aligned ones by the pairs that are left."""
    hparams, rate, denominator = case.hparams, case.hparams["kd_ratio"], case.hparams["avg_token_num"]
    student_A, teacher_A = pairs if pairs else (slice(None), slice(None))
    divergence = published(hparams["loss_fn"], hparams)
    teacher_AE = models.teacher[teacher_A]
    terms = dual_space(
        models.student,
        labels_T,
        models.student_head,
        teacher_AE,
        models.teacher_head,
        t2s(teacher_AE),
        _to_teacher(s2t, models, models.student[student_A]),
        DualSpace(divergence, divergence),
        ce_weight=(1 - rate) / denominator,
        kd_weight=rate,
        kd_denominator=None if pairs else denominator,
        pair_student_A=student_A if pairs else None,
        teacher_to_student_W=table_W,
        chunk_size=CHUNK,
    )
    terms.loss.backward()
    models.check_gradients(case)
    check_module(case, t2s, "t2s")
    kd_denominator = terms.mapped if pairs else denominator
    check_terms(case, terms, denominator, kd_denominator=kd_denominator, t2s_kd_denominator=terms.masked)
    case.check_scalar("agreeing_tokens", terms.t2s_agree)
    case.check_scalar("t2s_agreement", terms.t2s_agree / kd_denominator)
    if pairs:
        case.check_scalar("aligned", terms.pairs)
        case.check_scalar("mapped", terms.mapped)
        case.check_scalar("align_ratio", terms.mapped / terms.tokens)


def _closed_form(case: Case, models: Models, shared: SharedRows) -> ClosedFormStudentToTeacher:
    """The released initialisation, compared on the way."""
    student_VD, teacher_WE = models.student_head.weight_VD.detach(), models.teacher_head.weight_VD
    to_student, to_teacher = ideal_projectors(student_VD, teacher_WE, shared)
    case.check("init.t2s.weight", to_student.weight)
    if "init.teacher_head_pinv" in case:
        rows_KE = torch.cat([piece_KE for _, piece_KE in shared.pieces(student_VD, teacher_WE)])
        case.check("init.teacher_head_pinv", pseudo_inverse(rows_KE, to_teacher))
    return ClosedFormStudentToTeacher(to_teacher.gram_inverse, shared)


def _shared_by_string(case: Case, student, teacher) -> SharedRows:
    student_K, teacher_K = released_overlap(student, teacher, eos_by_role=False)
    assert torch.equal(student_K, case["student_overlap_ids"])
    heads = case["student_head"], case["teacher_head"]
    return shared_rows(*heads, student_K, teacher_K, topk=case.hparams["topk_vocab"])


def _to_teacher(s2t: ClosedFormStudentToTeacher, models: Models, hidden: Tensor) -> Tensor:
    return s2t(hidden, models.student_head.weight_VD, models.teacher_head.weight_VD, step=0)


def _divides_t2s_kd(settings: DualSpace, terms: DualSpaceTerms, kd_denominator: Tensor | float) -> Tensor | float:
    """The published masked term is a mean of its own; there it is 0 where nothing agrees."""
    if settings.student_mask == "none" or terms.t2s_agree > settings.agreement_threshold * terms.mapped:
        return kd_denominator
    return terms.masked.clamp(min=1)


def _check_grid(
    case: Case, models: Models, settings: DualSpace, projected_teacher: Tensor, projected_student: Tensor
) -> Tensor:
    """Logits and values per token at every position, labelled or not. Returns z_st."""
    z_s, z_ts = models.student_head(models.student), models.student_head(projected_teacher)
    z_t, z_st = models.teacher_head(models.teacher), models.teacher_head(projected_student)
    case.check("t2s_logits", z_ts)
    case.check("s2t_logits", z_st)
    case.check("tok.t2s_kd", settings.student_space(z_s, z_ts))
    case.check("tok.s2t_kd", settings.teacher_space(z_st, z_t))
    return z_st


def _check_eta_scalars(case: Case, terms: DualSpaceTerms, pairs_A3: Tensor) -> None:
    tokens_B = (case["student_labels"] != -100).sum(-1)
    pairs_B = torch.bincount(pairs_A3[:, 0], minlength=len(tokens_B))
    ratio_B = torch.where(tokens_B > 0, pairs_B / tokens_B.clamp(min=1).double(), 1.0)
    case.check_scalar("align_ratio", ratio_B.mean())
    case.check_scalar("mapped", terms.mapped)
    case.check_scalar("agreeing_tokens", terms.t2s_agree)
    case.check_scalar("t2s_agreement", terms.t2s_agree / terms.mapped)
    case.check_scalar("t2s_agreement_ratio", terms.t2s_agree / terms.tokens)


def _check_eta_grid(
    case: Case, models: Models, settings: DualSpace, t2s, s2t, pairs_A3: Tensor, table_W: Tensor
) -> None:
    """Labels, logits and values per token of the mapped pairs, at the student's and the teacher's positions."""
    batch_A, teacher_A, student_A = pairs_A3.T
    label_A = table_W[models.teacher_head(models.teacher[batch_A, teacher_A]).argmax(-1)]
    mapped_A = label_A >= 0
    batch_A, teacher_A, student_A = pairs_A3[mapped_A].T
    labels_BL = torch.full_like(case["student_labels"], -100)
    labels_BL[batch_A, student_A] = label_A[mapped_A]
    case.check("t2s_labels", labels_BL)

    student_AD, teacher_AE = models.student[batch_A, student_A], models.teacher[batch_A, teacher_A]
    z_s, z_ts = models.student_head(student_AD), models.student_head(t2s(teacher_AE))
    z_t, z_st = models.teacher_head(teacher_AE), models.teacher_head(_to_teacher(s2t, models, student_AD))
    hits = z_ts.argmax(-1) == case["student_labels"][batch_A, student_A]
    case.check_scalar("t2s_acc", hits.double().sum() / (case["student_labels"] != -100).sum())
    at_student = torch.zeros_like(labels_BL, dtype=torch.bool).index_put((batch_A, student_A), torch.tensor(True))
    at_teacher = torch.zeros_like(labels_BL, dtype=torch.bool).index_put((batch_A, teacher_A), torch.tensor(True))
    case.check("t2s_logits", _placed(z_ts, at_student, batch_A, student_A))
    case.check("s2t_logits", _placed(z_st, at_teacher, batch_A, teacher_A))
    t2s_kd, s2t_kd = settings.student_space(z_s, z_ts), settings.teacher_space(z_st, z_t)
    case.check("tok.t2s_kd", _placed(t2s_kd, at_student, batch_A, student_A), where=at_student)
    case.check("tok.s2t_kd", _placed(s2t_kd, at_teacher, batch_A, teacher_A), where=at_teacher)


def _placed(rows: Tensor, at_BL: Tensor, batch_A: Tensor, position_A: Tensor) -> Tensor:
    return rows.new_zeros(*at_BL.shape, *rows.shape[1:]).index_put((batch_A, position_A), rows.detach())


HANDLERS = {
    "dskd_v1_same_vocab": check_v1_same_vocabulary,
    "dskd_v2_same_vocab": check_v2_same_vocabulary,
    "dskd_v2_eta": check_v2_eta,
    "dskd_newer_framework_same_vocab": check_newer_same_vocabulary,
    "dskd_newer_framework_eta": check_newer_eta,
}
