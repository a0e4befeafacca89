"""Golden cases of the baselines between vocabularies: ULD, MinED, KD on shared tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_llm.data.minimum_edit import align_minimum_edit
from lit_llm.losses.cross_vocabulary import first_source, mined, mined_target, shared_vocabulary, uld
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import HeadTerms
from lit_llm.losses.head import Head
from tests.golden.alignment_cases import newer_pairs, released_overlap, stored_vocabularies
from tests.golden.divergence_cases import published
from tests.golden.golden import Case

_CHUNK = 5


def check_uld(case: Case) -> None:
    hidden, head = case.leaf("student_hidden"), case.leaf("student_head")
    labelled_s, labelled_t = (case[f"{side}_labels"] != -100 for side in ("student", "teacher"))
    student_A, teacher_A = _kth_with_kth(labelled_s, labelled_t)
    denominator, rate = case.hparams["loss_denom"], case.hparams["kd_rate"]
    terms = uld(
        hidden[labelled_s],
        Head(head),
        case["student_labels"][labelled_s],
        student_A,
        case["teacher_hidden"][labelled_t][teacher_A],
        Head(case["teacher_head"]),
        ce_weight=(1 - rate) / denominator,
        kd_weight=rate / denominator,
        chunk_size=_CHUNK,
    )
    _check(case, terms, denominator, "uld_loss", hidden, head)


def check_mined(case: Case) -> None:
    hidden, head, teacher_head = case.leaf("student_hidden"), case.leaf("student_head"), Head(case["teacher_head"])
    labels, labelled = case["student_labels"], case["student_labels"] != -100
    nearest_W = case["teacher_to_student_ids"]
    pairs_A3 = _warped_pairs(case, nearest_W)
    batch_A, student_A, teacher_A = pairs_A3.T
    source_V = first_source(nearest_W, len(head))
    teacher_AE, denominator, rate = (
        case["teacher_hidden"][batch_A, teacher_A],
        case.hparams["loss_denom"],
        case.hparams["kd_rate"],
    )
    row_BL = labelled.flatten().cumsum(0).view_as(labelled) - 1
    terms = mined(
        hidden[labelled],
        Head(head),
        labels[labelled],
        row_BL[batch_A, student_A],
        teacher_AE,
        teacher_head,
        source_V,
        Divergence("forward_kl", temperature=case.hparams["kd_temperature"]),
        ce_weight=(1 - rate) / denominator,
        kd_weight=rate / denominator,
        chunk_size=_CHUNK,
    )
    _check(case, terms, denominator, "forward_kl", hidden, head)
    case.check_scalar("one_hot_positions", len(row_BL[labelled]) - len(pairs_A3))

    target_BLV = torch.zeros(*labels.shape, len(head), dtype=case.dtype)
    target_BLV[labelled] = mined_target(
        case["teacher_hidden"].new_zeros(0, teacher_head.num_rows), labels[labelled], source_V
    )
    target_BLV[batch_A, student_A] = mined_target(teacher_head(teacher_AE), labels[batch_A, student_A], source_V)
    case.check("aligned_teacher_logits", target_BLV, where=labelled)


def check_shared_vocabulary(case: Case) -> None:
    hidden, head = case.leaf("student_hidden"), case.leaf("student_head")
    vocabularies = stored_vocabularies(case.folder, case.json_file)
    student_K, teacher_K = released_overlap(*vocabularies, eos_by_role=True)
    case.check("student_overlap_ids", student_K)
    case.check("teacher_overlap_ids", teacher_K)
    pairs = newer_pairs(case["student_labels"].tolist(), case["teacher_labels"].tolist(), *vocabularies)
    student_A, teacher_A = (torch.tensor(side) for side in pairs)
    case.check("aligned_student", student_A)
    case.check("aligned_teacher", teacher_A)
    denominator, rate = case.hparams["avg_token_num"], case.hparams["kd_ratio"]
    terms = shared_vocabulary(
        hidden,
        Head(head),
        case["student_labels"],
        student_A,
        case["teacher_hidden"][teacher_A],
        Head(case["teacher_head"]),
        student_K,
        teacher_K,
        published(case.hparams["loss_fn"], case.hparams),
        ce_weight=(1 - rate) / denominator,
        kd_weight=rate / denominator,
        chunk_size=_CHUNK,
    )
    _check(case, terms, denominator, "kd_loss", hidden, head)


def _check(case: Case, terms: HeadTerms, denominator: float, kd_name: str, hidden: Tensor, head: Tensor) -> None:
    terms.loss.backward()
    case.check_scalar("loss", terms.loss)
    case.check_scalar("nll_loss" if "nll_loss" in case.scalars() else "ce_loss", terms.ce / denominator)
    case.check_scalar(kd_name, terms.kd / denominator)
    if "accuracy" in case.scalars():
        case.check_scalar("accuracy", terms.correct / denominator)
    case.check("grad.student_hidden", hidden.grad)
    case.check("grad.student_head", head.grad)


def _kth_with_kth(*labelled: Tensor) -> tuple[Tensor, ...]:
    """(A,) rows among the labelled ones of each side: the k-th of a sample with the k-th."""
    sides = [(mask.flatten().cumsum(0).view_as(mask) - 1) for mask in labelled]
    rows = [
        [side[sample][mask[sample]] for sample in range(len(mask))] for side, mask in zip(sides, labelled, strict=True)
    ]
    lengths = [min(map(len, samples)) for samples in zip(*rows, strict=True)]
    return tuple(torch.cat([rows_i[:n] for rows_i, n in zip(side, lengths, strict=True)]) for side in rows)


def _warped_pairs(case: Case, nearest_W: Tensor) -> Tensor:
    """(A, 3) rows (sample, student position, teacher position) of the *input* tokens at labelled positions."""
    vocabularies = stored_vocabularies(case.folder, case.json_file)
    pairs = []
    for sample in range(len(case["student_labels"])):
        at_s, at_t = ((case[f"{side}_labels"][sample] != -100).nonzero()[:, 0] for side in ("student", "teacher"))
        ids = (case["student_input_ids"][sample][at_s].tolist(), case["teacher_input_ids"][sample][at_t].tolist())
        found = align_minimum_edit(*ids, *vocabularies, nearest_W.tolist())
        pairs += [[sample, int(at_s[i]), int(at_t[j])] for i, j in zip(*found, strict=True)]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 3)


HANDLERS = {
    "uld": check_uld,
    "mined": check_mined,
    "simple_cross_tokenizer_kd": check_shared_vocabulary,
}
