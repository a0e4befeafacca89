"""ULD, MinED and shared-vocabulary KD against their formulas, token by token in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import pad

from lit_llm.losses.cross_vocabulary import (
    first_source,
    mined,
    mined_target,
    shared_vocabulary,
    sorted_distance,
    uld,
)
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.head import Head
from tests.losses.watch import LargestTensor
from tests.reference import distillation as reference
from tests.reference.divergences import cross_entropy, divergence

T, U, D, E, V, W = 9, 8, 4, 5, 7, 10
PAIRS = [(0, 0), (2, 1), (3, 3), (5, 4), (8, 7)]
NEAREST = [3, 0, 3, -1, 6, 1, 0, 2, -1, 6]
SHARED = ([0, 2, 3, 6], [9, 1, 4, 7])


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(2)
    normal = [
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in [(T, D), (V, D), (U, E), (W, E)]
    ]
    student_TD, student_VD = (tensor.requires_grad_() for tensor in normal[:2])
    return student_TD, student_VD, torch.randint(0, V, (T,), generator=generator), *normal[2:]


def arguments(models):
    student_TD, student_VD, target_T, teacher_UE, teacher_WE = models
    student_A, teacher_A = torch.tensor(PAIRS).T
    return student_TD, Head(student_VD), target_T, student_A, teacher_UE[teacher_A], Head(teacher_WE)


def assert_same(models, terms, kd, chunk_size) -> None:
    student_TD, student_VD, target_T = models[:3]
    ce = sum(cross_entropy(student_VD @ student_TD[i], target_T[i]) for i in range(T))
    expected = 0.3 * ce + 0.7 * kd
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close((terms.ce, terms.kd), (ce.detach(), kd.detach()))
    found, wanted = (torch.autograd.grad(loss, [student_TD, student_VD]) for loss in (terms.loss, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_uld_is_the_distance_of_sorted_probabilities(models, chunk_size):
    student_TD, student_VD, _, teacher_UE, teacher_WE = models
    terms = uld(*arguments(models), ce_weight=0.3, kd_weight=0.7, chunk_size=chunk_size)
    kd = sum(reference.uld(student_VD @ student_TD[i], teacher_WE @ teacher_UE[j]) for i, j in PAIRS)
    assert_same(models, terms, kd, chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_shared_vocabulary_compares_the_renormalised_distributions(models, chunk_size):
    student_TD, student_VD, _, teacher_UE, teacher_WE = models
    ids = [torch.tensor(side) for side in SHARED]
    settings = {"name": "reverse_kl", "temperature": 2.0}
    terms = shared_vocabulary(
        *arguments(models), *ids, Divergence(**settings), ce_weight=0.3, kd_weight=0.7, chunk_size=chunk_size
    )
    kd = sum(
        divergence((student_VD @ student_TD[i])[ids[0]], (teacher_WE @ teacher_UE[j])[ids[1]], **settings)
        for i, j in PAIRS
    )
    assert_same(models, terms, kd, chunk_size)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_mined_carries_teacher_logits_or_is_sure_of_the_gold_token(models, chunk_size):
    student_TD, student_VD, target_T, teacher_UE, teacher_WE = models
    source_V = first_source(torch.tensor(NEAREST), V)
    terms = mined(
        *arguments(models), source_V, Divergence(temperature=2.0), ce_weight=0.3, kd_weight=0.7, chunk_size=chunk_size
    )
    kd, teacher_of = 0.0, dict(PAIRS)
    for i in range(T):
        z_t = teacher_WE @ teacher_UE[teacher_of[i]] if i in teacher_of else None
        target = reference.mined_target(z_t, int(target_T[i]), NEAREST, V)
        log_q, log_p = ((z / 2).log_softmax(-1) for z in (student_VD @ student_TD[i], target))
        kd = kd + (log_p.exp() * (log_p - log_q)).sum()
    assert_same(models, terms, kd, chunk_size)


def test_the_mined_target_shares_no_memory_with_anything(models):
    teacher_NW, target_C = torch.randn(2, W), torch.tensor([1, 2, 3])
    before = teacher_NW.clone()
    mined_target(teacher_NW, target_C, first_source(torch.tensor(NEAREST), V)).fill_(0.0)
    assert torch.equal(teacher_NW, before)


def test_the_first_teacher_token_that_maps_to_a_student_token_gives_its_logit():
    assert first_source(torch.tensor(NEAREST), V).tolist() == [1, 5, 7, 0, -1, -1, 4]


def test_sorted_distance_pads_the_shorter_vocabulary_with_zeros():
    q_TV, p_TW = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.5, 0.1, 0.4]])
    torch.testing.assert_close(sorted_distance(q_TV, p_TW), torch.tensor([0.3 + 0.2 + 0.1]))


@pytest.mark.parametrize(("narrow", "wide"), [(5, 64), (64, 5), (40, 64)])
def test_sorted_distance_of_a_much_wider_vocabulary_is_that_of_padded_sorted_lists(narrow, wide):
    generator = torch.Generator().manual_seed(wide)
    q_TV = torch.randn(7, narrow, dtype=torch.float64, generator=generator).softmax(-1).requires_grad_()
    p_TW = torch.randn(7, wide, dtype=torch.float64, generator=generator).softmax(-1).requires_grad_()
    lists = [pad(p.sort(-1, descending=True).values, (0, 64 - p.shape[1])) for p in (q_TV, p_TW)]
    expected_T = (lists[0] - lists[1]).abs().sum(-1)

    distance_T = sorted_distance(q_TV, p_TW)
    torch.testing.assert_close(distance_T, expected_T, rtol=1e-12, atol=1e-14)
    for found, expected in zip(
        torch.autograd.grad(distance_T.sum(), (q_TV, p_TW)),
        torch.autograd.grad(expected_T.sum(), (q_TV, p_TW)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_no_pairs_leave_the_cross_entropy(models):
    student_TD, head, target_T, student_A, teacher_AE, teacher_head = arguments(models)
    terms = uld(student_TD, head, target_T, student_A[:0], teacher_AE[:0], teacher_head, ce_weight=0.3, kd_weight=0.7)
    assert terms.kd == 0
    torch.testing.assert_close(terms.loss, 0.3 * terms.ce)


def test_the_teacher_gets_no_gradient(models):
    *_, teacher_UE, teacher_WE = models
    teacher_UE.requires_grad_()
    teacher_WE.requires_grad_()
    uld(*arguments(models), ce_weight=0.3, kd_weight=0.7).loss.backward()
    assert teacher_UE.grad is None
    assert teacher_WE.grad is None


def test_no_tensor_of_all_tokens_times_the_vocabulary_exists():
    tokens, width, vocabulary, chunk = 96, 4, 501, 8
    student_TD, student_VD = (
        torch.randn(tokens, width, requires_grad=True),
        torch.randn(vocabulary, width, requires_grad=True),
    )
    head, teacher_head = Head(student_VD), Head(torch.randn(vocabulary, width))
    rows = torch.arange(0, tokens, 2)
    target_T = torch.randint(0, vocabulary, (tokens,))
    with LargestTensor() as watch:
        uld(
            student_TD, head, target_T, rows, torch.randn(len(rows), width), teacher_head,
            ce_weight=1.0, kd_weight=1.0, chunk_size=chunk,
        ).loss.backward()  # fmt: skip
    assert watch.elements == chunk * vocabulary


def test_rows_that_do_not_fit_are_refused_with_their_numbers(models):
    student_TD, head, target_T, student_A, teacher_AE, teacher_head = arguments(models)
    with pytest.raises(ValueError, match="'pair': 4, 'teacher': 5"):
        uld(student_TD, head, target_T, student_A[1:], teacher_AE, teacher_head, ce_weight=0.3, kd_weight=0.7)
