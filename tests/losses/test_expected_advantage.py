"""The reward of ADPA against its formula, and that DCKD is cross-entropy plus forward KL."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_llm.losses.divergence import Divergence
from lit_llm.losses.expected_advantage import expected_advantage
from lit_llm.losses.fused_head import distillation
from lit_llm.losses.head import Head
from tests.losses.watch import LargestTensor
from tests.reference import align_distil as reference
from tests.reference.divergences import cross_entropy, softmax

T, D, E, V = 6, 5, 4, 9


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def given() -> dict:
    return {
        "policy_TD": normal(T, D, seed=1).requires_grad_(),
        "policy_head": Head(normal(V + 2, D, seed=2).requires_grad_()),
        "aligned_TE": normal(T, E, seed=3),
        "aligned_head": Head(normal(V, E, seed=4)),
        "reference_TF": normal(T, E, seed=5),
        "reference_head": Head(normal(V + 1, E, seed=6)),
        "weight_T": torch.linspace(0.1, 0.9, T, dtype=torch.float64),
    }


def by_loops(given: dict) -> Tensor:
    """E_policy[log aligned - log reference] of every token, over the shortest vocabulary."""
    names = (("policy_TD", "policy_head"), ("aligned_TE", "aligned_head"), ("reference_TF", "reference_head"))
    sides = [[softmax((given[head].weight_VD @ h)[:V]) for h in given[hidden]] for hidden, head in names]
    return torch.stack([reference.expected_gap(*row) for row in zip(*sides, strict=True)])


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_value_and_gradient_are_those_of_the_formula(given, chunk_size, beta):
    expected_T = beta * by_loops(given)
    expected = -(given["weight_T"] * expected_T).sum()
    terms = expected_advantage(**given, beta=beta, chunk_size=chunk_size)
    torch.testing.assert_close(terms.advantage_T, expected_T.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(terms.loss, expected)
    leaves = given["policy_TD"], given["policy_head"].weight_VD
    found, wanted = (torch.autograd.grad(loss, leaves) for loss in (terms.loss, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_frozen_head_passes_the_same_gradient_on(given):
    frozen = {**given, "policy_head": given["policy_head"].detach()}
    grads = [
        torch.autograd.grad(expected_advantage(**side, chunk_size=4).loss, given["policy_TD"])[0]
        for side in (given, frozen)
    ]
    torch.testing.assert_close(*grads)


def test_equal_teachers_have_no_advantage(given):
    given |= {"reference_TF": given["aligned_TE"], "reference_head": given["aligned_head"]}
    terms = expected_advantage(**given)
    assert terms.loss == 0 and torch.autograd.grad(terms.loss, given["policy_TD"])[0].eq(0).all()


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_logit_that_is_not_finite_takes_its_token_out(given, value):
    kept = torch.arange(V) != 3
    smaller = dict(given)
    for name in ("policy", "aligned", "reference"):
        smaller[f"{name}_head"] = Head(given[f"{name}_head"].weight_VD[:V][kept])
    bias = torch.zeros(V, dtype=torch.float64)
    bias[3] = value
    given["aligned_head"] = Head(given["aligned_head"].weight_VD, bias)
    found, expected = expected_advantage(**given), expected_advantage(**smaller)
    torch.testing.assert_close(found.advantage_T, expected.advantage_T)
    torch.testing.assert_close(*(torch.autograd.grad(x.loss, given["policy_TD"]) for x in (found, expected)))


def test_no_token_gives_a_loss_of_zero_and_no_large_tensor_is_made(given):
    cut = ("policy_TD", "aligned_TE", "reference_TF", "weight_T")
    terms = expected_advantage(**{**given, **{name: given[name][:0] for name in cut}})
    assert terms.loss == 0 and len(terms.advantage_T) == 0
    tokens, vocabulary, chunk = 96, 501, 8
    hidden, head = torch.randn(tokens, 4, requires_grad=True), Head(torch.randn(vocabulary, 4, requires_grad=True))
    with LargestTensor() as watch:
        weight_T = torch.ones(tokens)
        expected_advantage(hidden, head, hidden, head, hidden, head, weight_T, chunk_size=chunk).loss.backward()
    assert watch.elements <= 2 * chunk * vocabulary


def test_dckd_is_distillation_with_forward_kl(given):
    target_T, alpha = torch.tensor([1, 0, 5, 5, 8, 2]), 0.1
    head, teacher = given["policy_head"], given["aligned_head"]
    expected = 0.0
    for h, e, y in zip(given["policy_TD"], given["aligned_TE"], target_T, strict=True):
        z_s, z_t = head.weight_VD @ h, teacher.weight_VD @ e
        expected = expected + (cross_entropy(z_s, y) + alpha * reference.kl(softmax(z_t), softmax(z_s[:V]))) / T
    terms = distillation(
        given["policy_TD"],
        head,
        target_T,
        given["aligned_TE"],
        teacher,
        Divergence(name="forward_kl", temperature=1.0),
        ce_weight=1 / T,
        kd_weight=alpha / T,
    )
    torch.testing.assert_close(terms.loss, expected)
    leaves = given["policy_TD"], head.weight_VD
    torch.testing.assert_close(*(torch.autograd.grad(loss, leaves) for loss in (terms.loss, expected)))
