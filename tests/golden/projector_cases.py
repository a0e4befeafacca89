"""Golden cases of the projectors' closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_llm.models.projector import Fit, ideal_projectors, shared_rows
from tests.golden.alignment_cases import released_overlap, stored_vocabularies
from tests.golden.golden import Case


def check_projector_init(case: Case) -> None:
    student_VD, teacher_WE = case["student_head"], case["teacher_head"]
    ids = (case["student_overlap_ids"], case["teacher_overlap_ids"]) if "student_overlap_ids" in case else (None, None)
    shared = shared_rows(student_VD, teacher_WE, *ids, topk=case.hparams["topk_vocab"])
    to_student, to_teacher = ideal_projectors(student_VD, teacher_WE, shared, rcond=case.hparams.get("rcond"))
    if case.json_file:
        vocabularies = stored_vocabularies(case.folder, case.json_file)
        found = released_overlap(*vocabularies, eos_by_role=False)
        assert {*zip(*(side.tolist() for side in found), strict=True)} == {
            *zip(*(side.tolist() for side in ids), strict=True)
        }
        case.check_scalar("overlap", shared.num)
    if "init.t2s.weight.double" in case:
        _check_cutoff(case, to_student, student_VD, teacher_WE)
    else:
        case.check("init.t2s.weight", to_student.weight)
    if "init.s2t" in case:
        case.check("init.s2t", to_teacher.weight.T)
    if "init.teacher_head_pinv" in case:
        case.check(
            "init.teacher_head_pinv", pseudo_inverse(teacher_WE if ids[1] is None else teacher_WE[ids[1]], to_teacher)
        )


def pseudo_inverse(teacher_KE: Tensor, to_teacher: Fit) -> Tensor:
    """(K, E) as the released code stores it: the pseudo-inverse of the transposed head."""
    return teacher_KE.double() @ to_teacher.gram_inverse


def _check_cutoff(case: Case, to_student: Fit, student_VD: Tensor, teacher_WE: Tensor) -> None:
    """The released single-precision matrix, the double one with its cut-off, and what happens without."""
    case.check("init.t2s.weight", to_student.weight, rtol=1e-3, atol=1e-3 * float(to_student.weight.abs().mean()))
    case.check(
        "init.t2s.weight.double", to_student.weight, rtol=1e-6, atol=1e-6 * float(to_student.weight.abs().mean())
    )
    everything = torch.linalg.pinv(student_VD.double(), rtol=0.0)
    ours = to_student.gram_inverse @ student_VD.double().T
    case.check_scalar("norm_ratio_without_cutoff", everything.norm() / ours.norm(), rtol=1e-6, atol=0.0)
    # rounding errors of one library on one machine: only their size is reproducible
    single, double = case.stored("init.t2s.weight").double(), case.stored("init.t2s.weight.double")
    case.check_scalar("single_vs_double_relative", (single - double).norm() / double.norm(), rtol=0.5, atol=0.0)


HANDLERS = {"projector_init": check_projector_init}
