"""Linear maps between the hidden spaces of two models, their closed-form start, and cross-model attention.

Closed form (DSKD v2, arXiv 2504.11426): with A_s and A_t the rows of both heads for K shared tokens, projected states
should give the other model's logits, A_s P h = A_t h and A_t S h = A_s h, so P = A_s^+ A_t and S = A_t^+ A_s. Here
A^+ = (A^T A)^+ A^T by an eigen-decomposition in float64, where the authors' code takes a float32 pseudo-inverse; its
relative cut-off of singular values, max(K, width) * 1.19e-7, stays the default.

Cross-model attention (DSKD v1, arXiv 2406.17328, section 3.2) works on supervised rows only, sequence by sequence, so
nothing has to be masked. The authors normalise over padded tensors with id 0 as a placeholder: `scales` of such grids.

Shapes: T supervised student rows, U supervised teacher rows, K shared tokens, D student width, E teacher width,
V and W vocabularies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_ROWS_AT_A_TIME = 8192
_SMALLEST_RCOND = 1e-7


class SharedRows(NamedTuple):
    """Rows of two heads that stand for the same tokens.

    Attributes:
        student_K: token ids, or None where row k of one head belongs to row k of the other.
        teacher_K: likewise.
        num: K.
    """

    student_K: Tensor | None
    teacher_K: Tensor | None
    num: int

    def pieces(self, student_VD: Tensor, teacher_WE: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A few thousand paired rows at a time, so that no copy of a whole head is made."""
        for start in range(0, self.num, _ROWS_AT_A_TIME):
            span = slice(start, min(start + _ROWS_AT_A_TIME, self.num))
            if self.student_K is None:
                yield student_VD[span], teacher_WE[span]
            else:
                yield student_VD[self.student_K[span]], teacher_WE[self.teacher_K[span]]


class Fit(NamedTuple):
    """A map found by least squares.

    Attributes:
        weight: (out, in), applied as `weight @ hidden`; float64.
        gram_inverse: (out, out) pseudo-inverse of A^T A, with A the head of the space that is mapped into; float64.
        kept: directions above the cut-off, of `out`.
        error: ||A weight - B|| / ||B||, with B the head of the space that is mapped from.
    """

    weight: Tensor
    gram_inverse: Tensor
    kept: int
    error: float


def shared_rows(
    student_VD: Tensor,
    teacher_WE: Tensor,
    student_K: Tensor | None = None,
    teacher_K: Tensor | None = None,
    *,
    num_tokens: int | None = None,
    topk: int = -1,
) -> SharedRows:
    """Which rows of two heads are compared.

    Args:
        student_VD: the student's head.
        teacher_WE: the teacher's head.
        student_K: ids of shared tokens, by rank; None: one tokenizer, equal ids.
        teacher_K: the same tokens' ids in the teacher's vocabulary.
        num_tokens: length of the one tokenizer; rows beyond it are padding.
        topk: use only the first so many; -1: all.

    Raises:
        ValueError: one list without the other, lists of different length, or nothing in common.
    """
    if (student_K is None) != (teacher_K is None) or (student_K is not None and len(student_K) != len(teacher_K)):
        sizes = [None if ids is None else len(ids) for ids in (student_K, teacher_K)]
        raise ValueError(
            f"Shared tokens come in pairs, but there are {sizes[0]} student ids and {sizes[1]} teacher ids."
        )
    if student_K is None:
        num = min(student_VD.shape[0], teacher_WE.shape[0], num_tokens or student_VD.shape[0])
    else:
        num = len(student_K)
    if topk == 0 or topk < -1:
        raise ValueError(f"projectors.topk_vocab is {topk}; it counts tokens, or is -1 for all.")
    if num == 0:
        raise ValueError(
            "The two vocabularies share no token, so there is no closed form. Use projectors.start: random."
        )
    return SharedRows(student_K, teacher_K, num if topk == -1 else min(topk, num))


@torch.no_grad()
def ideal_projectors(
    student_VD: Tensor,
    teacher_WE: Tensor,
    shared: SharedRows,
    *,
    rcond: float | None = None,
    center_heads: bool = False,
) -> tuple[Fit, Fit]:
    """The maps teacher -> student (D, E) and student -> teacher (E, D) that reproduce logits best.

    Args:
        student_VD: the student's head.
        teacher_WE: the teacher's head.
        shared: which rows are compared.
        rcond: singular values below `rcond` times the largest are dropped; None: max(K, width) * 1.19e-7.
        center_heads: subtract each column's mean over the K tokens first. A constant added to all logits changes no
            distribution, so the fit is better where it matters; the papers do not do it.

    Raises:
        ValueError: a cut-off that the method cannot resolve.
    """
    if rcond is not None and not _SMALLEST_RCOND <= rcond < 1:
        raise ValueError(
            f"projectors.rcond is {rcond}; it is a share of the largest singular value, and Gram matrices in float64 "
            f"resolve {_SMALLEST_RCOND} to 1. Leave it out for the default."
        )
    student_DD, teacher_EE, cross_ED = _grams(student_VD, teacher_WE, shared, center_heads)
    to_student = _fit(student_DD, teacher_EE, cross_ED.T, shared.num, rcond)
    to_teacher = _fit(teacher_EE, student_DD, cross_ED, shared.num, rcond)
    return to_student, to_teacher


class _NeverHalf(nn.Module):
    """Follows devices and float64, but keeps its numbers where the models around it turn to half precision."""

    def _apply(self, fn, recurse: bool = True):
        def full(tensor: Tensor) -> Tensor:
            moved = fn(tensor[:0])
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else fn(tensor)

        return super()._apply(full, recurse)


class Projector(_NeverHalf, nn.Linear):
    """A trained map between hidden spaces.

    Its weights stay in float32 when the models are in half precision; the output has the input's dtype.

    Args:
        in_width: of the space that is mapped from.
        out_width: of the space that is mapped into.
        bias: with a bias (v1).
        start: closed-form weight; None: PyTorch's random start.

    Raises:
        ValueError: a start whose shape is another one.
    """

    def __init__(self, in_width: int, out_width: int, *, bias: bool = False, start: Fit | None = None) -> None:
        super().__init__(in_width, out_width, bias=bias, dtype=torch.float32)
        if start is None:
            return
        if start.weight.shape != self.weight.shape:
            raise ValueError(f"The start is {tuple(start.weight.shape)}, the projector {tuple(self.weight.shape)}.")
        with torch.no_grad():
            self.weight.copy_(start.weight)
            if bias:
                self.bias.zero_()

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(hidden.to(self.weight.dtype), self.weight, self.bias).to(hidden.dtype)


class ClosedFormStudentToTeacher(_NeverHalf):
    """S = (A_t^T A_t)^+ A_t^T A_s from the *current* student head, without parameters (v2).

    Nothing of it enters a checkpoint. The student's body gets a gradient through `hidden`, its head and S get none. S is
    formed in at least float32, whatever precision the models have.

    Args:
        teacher_gram_inverse_EE: of `ideal_projectors`, the second fit.
        shared: which rows are compared.
        center_heads: as in `ideal_projectors`.
    """

    def __init__(self, teacher_gram_inverse_EE: Tensor, shared: SharedRows, *, center_heads: bool = False) -> None:
        super().__init__()
        # not a buffer: converting the module to half precision must not reach it
        self._gram_inverse_EE = teacher_gram_inverse_EE
        self.register_buffer("student_K", shared.student_K, persistent=False)
        self.register_buffer("teacher_K", shared.teacher_K, persistent=False)
        self.num_shared, self.center_heads = shared.num, center_heads
        self._map_ED: Tensor | None = None
        self._composed_WD: Tensor | None = None
        self._step: int | None = None

    def forward(self, hidden_TD: Tensor, student_VD: Tensor, teacher_WE: Tensor, step: int) -> Tensor:
        """(T, D) -> (T, E).

        Args:
            hidden_TD: the student's hidden states.
            student_VD: its head as it is now.
            teacher_WE: the teacher's head.
            step: optimizer steps so far. S is formed anew when this number changes; pass a constant for a frozen head.
        """
        self._refresh(student_VD, teacher_WE, step)
        return linear(hidden_TD, self._map_ED.to(hidden_TD.dtype))

    @torch.no_grad()
    def composed(self, student_VD: Tensor, teacher_WE: Tensor, step: int) -> Tensor:
        """W_t S, (W, D): scores the student's own states under the teacher's head, in the teacher's dtype.

        Fewer multiplications than S first and the head then, as soon as `composing_pays`. Arguments as in `forward`.
        """
        self._refresh(student_VD, teacher_WE, step)
        if self._composed_WD is None:
            self._composed_WD = teacher_WE @ self._map_ED.to(teacher_WE.dtype)
        return self._composed_WD

    def composing_pays(self, rows: int, student_width: int, teacher_width: int) -> bool:
        """Whether W_t S, formed once, costs less than the width it saves forward and backward over so many rows."""
        return 2 * rows * (teacher_width - student_width) > student_width * teacher_width

    def _refresh(self, student_VD: Tensor, teacher_WE: Tensor, step: int) -> None:
        if self._map_ED is None or self._step != step or self._map_ED.device != student_VD.device:
            self._map_ED, self._step, self._composed_WD = self.weight(student_VD, teacher_WE), step, None

    @torch.no_grad()
    def weight(self, student_VD: Tensor, teacher_WE: Tensor) -> Tensor:
        """S, (E, D), in float32, or float64 for a student in float64."""
        device, dtype = student_VD.device, torch.float64 if student_VD.dtype == torch.float64 else torch.float32
        shared = SharedRows(self.student_K, self.teacher_K, self.num_shared)
        cross_ED = torch.zeros(teacher_WE.shape[1], student_VD.shape[1], dtype=dtype, device=device)
        sum_D, sum_E = cross_ED.new_zeros(student_VD.shape[1]), cross_ED.new_zeros(teacher_WE.shape[1])
        with torch.autocast(device.type, enabled=False):
            for student_KD, teacher_KE in shared.pieces(student_VD, teacher_WE):
                student_KD, teacher_KE = student_KD.to(dtype), teacher_KE.to(dtype)
                cross_ED.addmm_(teacher_KE.T, student_KD)
                if self.center_heads:
                    sum_D, sum_E = sum_D + student_KD.sum(0), sum_E + teacher_KE.sum(0)
            self._gram_inverse_EE = self._gram_inverse_EE.to(device, dtype)
            return self._gram_inverse_EE @ (cross_ED - torch.outer(sum_E, sum_D) / shared.num)


class Scales(NamedTuple):
    """Standard deviations that cross-model attention divides by, each one number for a whole tensor."""

    key: Tensor
    hidden: Tensor
    value: Tensor


def scales(hidden: Tensor, input_ids: Tensor, next_ids: Tensor, value_ids: Tensor, embedding_WE: Tensor) -> Scales:
    """Standard deviations (unbiased) of the teacher's keys, hidden states and value embeddings.

    Args:
        hidden: (..., E) hidden states: of the supervised rows, or of the padded grid for parity with v1's code.
        input_ids: (...) token at each position; the released code puts id 0 where nothing is supervised.
        next_ids: (...) token that follows.
        value_ids: (...) token whose embedding joins the value.
        embedding_WE: the teacher's input embedding.
    """
    keys = torch.cat([embedding_WE[input_ids], embedding_WE[next_ids]], dim=-1)
    return Scales(*(_deviation(tensor.detach()) for tensor in (keys, hidden, embedding_WE[value_ids])))


class CrossModelAttention(nn.Module):
    """Learned soft alignment of two tokenisations: attention between the tokens of student and teacher.

    Args:
        student_width: D.
        teacher_width: E.
        bias: of the query and of both projectors (v1; v2 has none).
    """

    def __init__(self, student_width: int, teacher_width: int, *, bias: bool = True) -> None:
        super().__init__()
        self.query = Projector(2 * student_width, 2 * teacher_width, bias=bias)
        self.t2s = Projector(teacher_width, student_width, bias=bias)
        self.s2t = Projector(student_width, teacher_width, bias=bias)

    def forward(
        self,
        student_TD: Tensor,
        teacher_UE: Tensor,
        scores: list[Tensor],
        value_U: Tensor,
        teacher_embedding_WE: Tensor,
        scales: Scales,
    ) -> tuple[Tensor, Tensor]:
        """The teacher as the student's rows attend to it (T, D), and the student as the teacher's rows do (U, E).

        Args:
            student_TD: the student's hidden states of supervised rows.
            teacher_UE: the teacher's.
            scores: of `self.scores`, per sequence (T_b, U_b).
            value_U: ids whose embedding joins the teacher's hidden state: the gold next token (v1) or the teacher's
                prediction (v2).
            teacher_embedding_WE: the teacher's input embedding.
            scales: what hidden states and embeddings are divided by.

        A row of a sequence without supervised tokens on the other side attends to nothing and becomes 0.
        """
        embedding_UE = _wide(teacher_embedding_WE.detach()[value_U])
        value_UE = _wide(teacher_UE.detach()) / scales.hidden + embedding_UE / scales.value
        to_student_UD, to_teacher_TE = _wide(self.t2s(value_UE)), _wide(self.s2t(student_TD))
        teacher_parts = to_student_UD.split([piece.shape[1] for piece in scores])
        student_parts = to_teacher_TE.split([piece.shape[0] for piece in scores])
        attended_TD = [score.softmax(-1) @ part for score, part in zip(scores, teacher_parts, strict=True)]
        attended_UE = [score.T.softmax(-1) @ part for score, part in zip(scores, student_parts, strict=True)]
        return torch.cat(attended_TD).to(student_TD.dtype), torch.cat(attended_UE).to(teacher_UE.dtype)

    def scores(
        self,
        student_ids: tuple[Tensor, Tensor, Tensor],
        teacher_ids: tuple[Tensor, Tensor, Tensor],
        student_embedding_VD: Tensor,
        teacher_embedding_WE: Tensor,
        key_scale: Tensor,
        num_sequences: int,
    ) -> list[Tensor]:
        """Attention scores of each sequence (T_b, U_b), in at least float32.

        Args:
            student_ids: (T,) token at each supervised row, (T,) token that follows, (T,) its sequence, ascending.
            teacher_ids: the same of the teacher, (U,).
            student_embedding_VD: input embedding; no gradient.
            teacher_embedding_WE: likewise.
            key_scale: what the keys are divided by.
            num_sequences: B.
        """
        query_T = self.query(_token_pairs(student_embedding_VD, student_ids))
        key_U = _token_pairs(teacher_embedding_WE, teacher_ids) / key_scale
        queries = _wide(query_T).split(_lengths(student_ids[2], num_sequences))
        keys = key_U.split(_lengths(teacher_ids[2], num_sequences))
        return [query @ key.T / math.sqrt(key.shape[1]) for query, key in zip(queries, keys, strict=True)]


def _grams(student_VD: Tensor, teacher_WE: Tensor, shared: SharedRows, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A_s^T A_s, A_t^T A_t and A_t^T A_s in float64."""
    student_D = student_VD.new_zeros(student_VD.shape[1], dtype=torch.float64)
    teacher_E = teacher_WE.new_zeros(teacher_WE.shape[1], dtype=torch.float64)
    if center:
        for student_KD, teacher_KE in shared.pieces(student_VD, teacher_WE):
            student_D += student_KD.double().sum(0) / shared.num
            teacher_E += teacher_KE.double().sum(0) / shared.num
    student_DD = student_D.new_zeros(len(student_D), len(student_D))
    teacher_EE = teacher_E.new_zeros(len(teacher_E), len(teacher_E))
    cross_ED = student_D.new_zeros(len(teacher_E), len(student_D))
    for student_KD, teacher_KE in shared.pieces(student_VD, teacher_WE):
        student_KD, teacher_KE = student_KD.double() - student_D, teacher_KE.double() - teacher_E
        student_DD.addmm_(student_KD.T, student_KD)
        teacher_EE.addmm_(teacher_KE.T, teacher_KE)
        cross_ED.addmm_(teacher_KE.T, student_KD)
    return student_DD, teacher_EE, cross_ED


def _fit(into: Tensor, source: Tensor, cross: Tensor, num_rows: int, rcond: float | None) -> Fit:
    """Least squares from Gram matrices: `into` A^T A, `source` B^T B, `cross` A^T B."""
    if rcond is None:
        rcond = max(num_rows, into.shape[0]) * torch.finfo(torch.float32).eps
    square, direction = torch.linalg.eigh(into)
    kept = square > rcond**2 * square[-1]
    inverse = (direction[:, kept] / square[kept]) @ direction[:, kept].T
    weight = inverse @ cross
    residual = source.trace() - 2 * (weight * cross).sum() + (weight * (into @ weight)).sum()
    return Fit(weight, inverse, int(kept.sum()), math.sqrt(max(float(residual / source.trace()), 0.0)))


def _token_pairs(embedding: Tensor, ids: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    embedding = embedding.detach()
    return _wide(torch.cat([embedding[ids[0]], embedding[ids[1]]], dim=-1))


def _lengths(sequence: Tensor, num_sequences: int) -> list[int]:
    return torch.bincount(sequence, minlength=num_sequences).tolist()


def _deviation(tensor: Tensor) -> Tensor:
    return _wide(tensor).std()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
