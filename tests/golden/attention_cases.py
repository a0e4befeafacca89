"""Golden cases of cross-model attention, v1 and v2."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_llm.losses.divergence import Divergence
from lit_llm.losses.dual_space import DualSpace, dual_space_cma
from lit_llm.models.projector import CrossModelAttention, Scales, scales
from tests.golden.divergence_cases import published
from tests.golden.dual_space_parts import CHUNK, Models, check_module, check_terms, filled
from tests.golden.golden import Case


def check_attention(case: Case) -> None:
    models, hparams, denominator = Models.of(case), case.hparams, case.hparams["loss_denom"]
    is_v1, rate = "t2s.bias" in case, case.hparams["kd_rate"]
    attention = _attention(case, bias=is_v1)
    grid = _Grid.of(case, models, is_v1)
    scores = attention.scores(
        grid.student_ids,
        grid.teacher_ids,
        case["student_embed"],
        case["teacher_embed"],
        grid.scales.key,
        len(grid.labelled_s),
    )
    attended_TD, attended_UE = attention(
        models.student[grid.labelled_s],
        models.teacher[grid.labelled_t],
        scores,
        grid.value_BL[grid.labelled_t],
        case["teacher_embed"],
        grid.scales,
    )
    student_space = published(hparams["kd_objective"], hparams)
    teacher_space = published(hparams["teacher_space_objective"], hparams) if is_v1 else student_space
    if hparams.get("teacher_temperature_used_in") == "student space only":
        student_space = _hotter_teacher(student_space, hparams["teacher_temperature"])
    settings = DualSpace(student_space, teacher_space, "gold", student_mask="correct", masked_mean="labelled")
    target_T = case["student_labels"][grid.labelled_s]
    terms = dual_space_cma(
        models.student[grid.labelled_s],
        target_T,
        models.student_head,
        attended_TD,
        models.teacher[grid.labelled_t],
        models.teacher_head,
        attended_UE,
        settings,
        ce_weight=(1 - rate) / denominator,
        kd_weight=rate,
        kd_denominator=denominator,
        chunk_size=CHUNK,
    )
    terms.loss.backward()
    models.check_gradients(case)
    for name in ("t2s", "s2t", "query"):
        check_module(case, getattr(attention, name), name)
    check_terms(case, terms, denominator, kd_denominator=denominator, t2s_kd_denominator=denominator)
    case.check_scalar("t2s_correct_tokens", terms.t2s_correct)
    _check_scores(case, scores, grid)
    z_ts, z_st = _check_attended_grid(case, models, settings, attended_TD, attended_UE, grid)
    if "max_t2s_prob" in case.scalars():
        case.check_scalar("max_t2s_prob", z_ts.softmax(-1).amax(-1).sum() / denominator)
    if "s2t_acc" in case.scalars():
        hits = z_st.argmax(-1) == case["teacher_labels"][grid.labelled_t]
        case.check_scalar("s2t_acc", hits.double().mean())
        case.check_scalar("t2s_acc", terms.t2s_correct.double() / denominator)


def _attention(case: Case, bias: bool) -> CrossModelAttention:
    widths = case["student_head"].shape[1], case["teacher_head"].shape[1]
    attention = CrossModelAttention(*widths, bias=bias).to(case.dtype)
    for name, projector in attention.named_children():
        filled(case, projector, name)
    return attention


def _hotter_teacher(divergence: Divergence, temperature: float) -> Divergence:
    return replace(divergence, teacher_temperature=temperature)


@dataclass
class _Grid:
    """Padded inputs of cross-model attention, with id 0 where nothing is labelled."""

    labelled_s: Tensor
    labelled_t: Tensor
    student_ids: tuple[Tensor, Tensor, Tensor]
    teacher_ids: tuple[Tensor, Tensor, Tensor]
    value_BL: Tensor
    scales: Scales

    @classmethod
    def of(cls, case: Case, models: Models, is_v1: bool) -> _Grid:
        labelled_s, labelled_t = (case[f"{side}_labels"] != -100 for side in ("student", "teacher"))
        student_BL, student_next_BL = (case[f"student_{name}"].where(labelled_s, 0) for name in ("input_ids", "labels"))
        teacher_BL, teacher_next_BL = (case[f"teacher_{name}"].where(labelled_t, 0) for name in ("input_ids", "labels"))
        value_BL = teacher_next_BL if is_v1 else models.teacher_head(models.teacher).argmax(-1)
        student_ids = (student_BL[labelled_s], student_next_BL[labelled_s], labelled_s.nonzero()[:, 0])
        teacher_ids = (teacher_BL[labelled_t], teacher_next_BL[labelled_t], labelled_t.nonzero()[:, 0])
        padded = scales(models.teacher, teacher_BL, teacher_next_BL, value_BL, case["teacher_embed"])
        return cls(labelled_s, labelled_t, student_ids, teacher_ids, value_BL, padded)


def _check_scores(case: Case, scores: list[Tensor], grid: _Grid) -> None:
    """Stored scores hold -1e5 off the labelled block of a sequence, and weights 0."""
    if "align" not in case:
        return
    block = grid.labelled_s[:, :, None] & grid.labelled_t[:, None, :]
    everywhere = torch.zeros(block.shape, dtype=case.dtype)
    case.check(
        "align", everywhere.masked_scatter(block, torch.cat([s.detach().flatten() for s in scores])), where=block
    )
    to_student = torch.cat([s.detach().softmax(-1).flatten() for s in scores])
    to_teacher = torch.cat([s.detach().T.softmax(-1).flatten() for s in scores])
    case.check("t2s_weight", everywhere.masked_scatter(block, to_student), where=grid.labelled_s)
    case.check("s2t_weight", everywhere.mT.contiguous().masked_scatter(block.mT, to_teacher), where=grid.labelled_t)


def _check_attended_grid(case, models: Models, settings: DualSpace, attended_TD, attended_UE, grid: _Grid):
    """Logits and values per token at the labelled rows; the others are placeholders. Returns z_ts and z_st."""
    z_s, z_ts = models.student_head(models.student[grid.labelled_s]), models.student_head(attended_TD)
    z_t, z_st = models.teacher_head(models.teacher[grid.labelled_t]), models.teacher_head(attended_UE)
    rows = {
        "t2s_logits": (z_ts, grid.labelled_s),
        "s2t_logits": (z_st, grid.labelled_t),
        "tok.t2s_kd": (settings.student_space(z_s, z_ts), grid.labelled_s),
        "tok.s2t_kd": (settings.teacher_space(z_st, z_t), grid.labelled_t),
    }
    for name, (value, labelled) in rows.items():
        case.check(name, _on_grid(value, labelled), where=labelled)
    return z_ts, z_st


def _on_grid(rows: Tensor, labelled_BL: Tensor) -> Tensor:
    grid = rows.new_zeros(*labelled_BL.shape, *rows.shape[1:])
    grid[labelled_BL] = rows.detach()
    return grid


HANDLERS = {"dskd_v1_cma": check_attention, "dskd_v2_cma": check_attention}
