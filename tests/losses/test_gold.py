"""GOLD's loss over groups of tokens against its formula, group by group in float64."""

from __future__ import annotations

import pytest
import torch

from lit_llm.losses.gold import Hybrid, TokenGroups, gold
from lit_llm.losses.head import Head
from tests.losses.watch import LargestTensor
from tests.reference import distillation as reference
from tests.reference.divergences import cross_entropy

T, U, D, E, V, W = 9, 10, 4, 5, 7, 9
# (student row, pieces, teacher row, pieces); rows 5 of the student and 9 of the teacher are in no group
GROUPS = [(0, 1, 0, 1), (1, 3, 1, 2), (4, 1, 3, 3), (6, 2, 6, 2), (8, 1, 8, 1)]
SHARED = ([0, 2, 3, 6], [8, 1, 4, 7])
WEIGHTS = {"beta": 0.3, "matched": 0.6, "unmatched": 0.9}


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(4)
    student_TD, student_VD, teacher_UE, teacher_WE = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(T, D), (V, D), (U, E), (W, E)]
    )
    targets = [torch.randint(0, size, (rows,), generator=generator) for size, rows in ((V, T), (W, U))]
    return student_TD.requires_grad_(), student_VD.requires_grad_(), targets[0], teacher_UE, teacher_WE, targets[1]


def groups(columns=GROUPS) -> tuple[TokenGroups, TokenGroups]:
    student_A, student_pieces_A, teacher_A, teacher_pieces_A = torch.tensor(columns, dtype=torch.int64).reshape(-1, 4).T
    return TokenGroups(student_A, student_pieces_A), TokenGroups(teacher_A, teacher_pieces_A)


def loss(models, hybrid=None, columns=GROUPS, **settings):
    student_TD, student_VD, target_T, teacher_UE, teacher_WE, target_U = models
    ours, theirs = groups(columns)
    heads = Head(student_VD), Head(teacher_WE)
    rows = (student_TD, heads[0], target_T, ours, teacher_UE, heads[1], target_U, theirs)
    return gold(*rows, hybrid, ce_weight=0.3, kd_weight=0.7, **settings)


def expected(models, shared=None, **weights):
    student_TD, student_VD, target_T, teacher_UE, teacher_WE, target_U = models
    ce = sum(cross_entropy(student_VD @ student_TD[i], target_T[i]) for i in range(T))
    kd = 0.0
    for i, n, j, m in GROUPS:
        ours = [student_VD @ student_TD[row] for row in range(i, i + n)], target_T[i : i + n].tolist()
        theirs = [teacher_WE @ teacher_UE[row] for row in range(j, j + m)], target_U[j : j + m].tolist()
        kd = kd + reference.gold(*ours, *theirs, shared, **weights)
    return ce, kd


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 2, 4, None])
def test_loss_and_gradients_are_those_of_the_formula(models, hybrid, chunk_size):
    ids = [torch.tensor(side) for side in SHARED]
    matching = Hybrid(*ids, 0.3, 0.6, 0.9) if hybrid else None
    terms = loss(models, matching, chunk_size=chunk_size)
    ce, kd = expected(models, list(zip(*SHARED, strict=True)), **WEIGHTS) if hybrid else expected(models)
    torch.testing.assert_close((terms.ce, terms.kd), (ce.detach(), kd.detach()))
    torch.testing.assert_close(terms.loss, 0.3 * ce + 0.7 * kd)
    found, wanted = (torch.autograd.grad(value, models[:2]) for value in (terms.loss, 0.3 * ce + 0.7 * kd))
    torch.testing.assert_close(found, wanted)


def test_the_probability_of_a_piece_carries_a_gradient(models):
    student_TD = models[0]
    (gradient_TD,) = torch.autograd.grad(expected(models)[1], student_TD)
    assert gradient_TD[2].abs().max() > 0, "row 2 is only a piece of the second group"
    (found_TD,) = torch.autograd.grad(loss(models).loss, student_TD)
    assert found_TD[2].abs().max() > 0


def test_groups_of_one_token_are_the_sorted_distance_of_pairs(models):
    from lit_llm.losses.cross_vocabulary import uld

    student_TD, student_VD, target_T, teacher_UE, teacher_WE, _ = models
    pairs = torch.tensor([0, 3, 8]), torch.tensor([1, 2, 9])
    columns = [(int(i), 1, int(j), 1) for i, j in zip(*pairs, strict=True)]
    rows = (student_TD, Head(student_VD), target_T, pairs[0], teacher_UE[pairs[1]], Head(teacher_WE))
    torch.testing.assert_close(loss(models, columns=columns).loss, uld(*rows, ce_weight=0.3, kd_weight=0.7).loss)


def test_no_groups_leave_the_cross_entropy(models):
    terms = loss(models, columns=[])
    assert terms.kd == 0
    torch.testing.assert_close(terms.loss, 0.3 * terms.ce)
    terms.loss.backward()


def test_evaluation_needs_no_gradient(models):
    with torch.no_grad():
        terms = loss(models)
    assert not terms.loss.requires_grad
    torch.testing.assert_close(terms.loss, loss(models).loss.detach())


@pytest.mark.parametrize("hybrid", [False, True])
def test_impossible_pieces_and_certain_tokens_give_finite_gradients(models, hybrid):
    student_TD, student_VD, target_T, teacher_UE, teacher_WE, target_U = models
    sharp = (student_TD.detach() * 400).float().requires_grad_(), student_VD.detach().float().requires_grad_()
    numbers = *sharp, target_T, (teacher_UE * 400).float(), teacher_WE.float(), target_U
    matching = Hybrid(*(torch.tensor(side) for side in SHARED), 0.5, 0.4, 0.6) if hybrid else None
    terms = loss(numbers, matching)
    terms.loss.backward()
    assert torch.isfinite(terms.loss) and all(torch.isfinite(tensor.grad).all() for tensor in sharp)


def test_the_teacher_gets_no_gradient(models):
    models[3].requires_grad_()
    models[4].requires_grad_()
    loss(models).loss.backward()
    assert models[3].grad is None and models[4].grad is None


def test_no_tensor_of_all_tokens_times_the_vocabulary_exists():
    tokens, width, vocabulary, chunk = 96, 4, 501, 8
    student = [torch.randn(rows, width, requires_grad=True) for rows in (tokens, vocabulary)]
    teacher = torch.randn(tokens, width), torch.randn(vocabulary, width)
    target_T = torch.randint(0, vocabulary, (tokens,))
    numbers = *student, target_T, *teacher, target_T
    with LargestTensor() as watch:
        loss(numbers, columns=[(i, 3, i, 2) for i in range(0, tokens, 3)], chunk_size=chunk).loss.backward()
    assert watch.elements == chunk * vocabulary


def test_groups_without_a_counterpart_are_refused_with_their_numbers(models):
    student_TD, student_VD, target_T, teacher_UE, teacher_WE, target_U = models
    ours, theirs = groups()
    theirs = TokenGroups(theirs.first_A[:4], theirs.pieces_A[:4])
    rows = (student_TD, Head(student_VD), target_T, ours, teacher_UE, Head(teacher_WE), target_U, theirs)
    with pytest.raises(ValueError, match="'student_groups': 5, 'teacher_groups': 4"):
        gold(*rows, None, ce_weight=1.0, kd_weight=1.0)
