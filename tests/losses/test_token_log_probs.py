"""Log-probabilities of tokens against the plain ones on whole logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_llm.losses.head import Head
from lit_llm.losses.token_log_probs import LogProbsWithKL, best_tokens, token_log_probs, token_log_probs_with_kl
from tests.losses.watch import LargestTensor
from tests.reference import align_distil as reference
from tests.reference.divergences import softmax

T, D, E, V = 7, 5, 4, 11
GENERATOR_SEED = 3


def normal(*shape: int, seed: int = GENERATOR_SEED, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def given() -> dict:
    return {
        "hidden_TD": normal(T, D, seed=1).requires_grad_(),
        "head": Head(normal(V, D, seed=2).requires_grad_()),
        "target_T": torch.tensor([0, 10, 3, 3, 7, 1, 9]),
    }


def with_kl(given: dict, rows: int = V, **options) -> LogProbsWithKL:
    return token_log_probs_with_kl(**given, **{**other(rows), **options})


def other(rows: int = V) -> dict:
    return {"reference_TE": normal(T, E, seed=4), "reference_head": Head(normal(rows, E, seed=5))}


def weighted(value_T: Tensor) -> Tensor:
    """A sum that weighs every token differently, as sequences of a preference loss do."""
    return (torch.linspace(-1.0, 2.0, len(value_T), dtype=value_T.dtype) * value_T).sum()


def same_gradients(found: Tensor, expected: Tensor, *tensors: Tensor) -> None:
    grads = (torch.autograd.grad(loss, tensors, retain_graph=True) for loss in (found, expected))
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def by_loops(given: dict) -> Tensor:
    head = given["head"]
    rows = zip(given["hidden_TD"], given["target_T"], strict=True)
    return torch.stack([reference.log_prob(head.weight_VD @ h, y) for h, y in rows])


def kl_by_loops(given: dict, rows: int) -> Tensor:
    shared, head = min(V, rows), given["head"].weight_VD
    frozen = other(rows)
    pairs = zip(given["hidden_TD"], frozen["reference_TE"], strict=True)
    return torch.stack(
        [
            reference.kl(softmax((frozen["reference_head"].weight_VD @ e)[:shared]), softmax((head @ h)[:shared]))
            for h, e in pairs
        ]
    )


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64, None])
def test_values_and_gradients_are_those_of_the_formula_in_any_chunks(given, chunk_size):
    found_T, expected_T = token_log_probs(**given, chunk_size=chunk_size), by_loops(given)
    torch.testing.assert_close(found_T, expected_T, rtol=1e-10, atol=1e-12)
    same_gradients(weighted(found_T), weighted(expected_T), given["hidden_TD"], given["head"].weight_VD)


@pytest.mark.parametrize("chunk_size", [3, None])
def test_a_frozen_head_gives_the_same_gradient_to_the_hidden_states(given, chunk_size):
    frozen = {**given, "head": given["head"].detach()}
    found_T, expected_T = token_log_probs(**frozen, chunk_size=chunk_size), by_loops(given)
    same_gradients(weighted(found_T), weighted(expected_T), given["hidden_TD"])


def test_with_a_frozen_head_the_backward_pass_only_scales_rows(given):
    value = weighted(token_log_probs(**{**given, "head": given["head"].detach()}, chunk_size=3))
    with LargestTensor() as watch:
        value.backward()
    assert watch.elements <= T * D
    assert not [name for name in watch.operations if "mm" in name]


def test_frozen_hidden_states_still_train_the_head(given):
    found_T = token_log_probs(**{**given, "hidden_TD": given["hidden_TD"].detach()}, chunk_size=3)
    same_gradients(weighted(found_T), weighted(by_loops(given)), given["head"].weight_VD)


@pytest.mark.parametrize("trained", [True, False])
def test_bias_scale_and_softcap_belong_to_the_head(given, trained):
    bias = normal(V, seed=8).requires_grad_()
    head = Head(given["head"].weight_VD, bias, softcap=3.0, scale=0.5)
    logits = 3.0 * torch.tanh((given["hidden_TD"] @ head.weight_VD.T + bias) * 0.5 / 3.0)
    expected_T = logits.log_softmax(-1).gather(-1, given["target_T"][:, None]).squeeze(-1)
    head = head if trained else head.detach()
    found_T = token_log_probs(given["hidden_TD"], head, given["target_T"], chunk_size=3)
    torch.testing.assert_close(found_T, expected_T)
    leaves = (given["hidden_TD"], head.weight_VD, bias) if trained else (given["hidden_TD"],)
    same_gradients(weighted(found_T), weighted(expected_T), *leaves)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("rows", [V, V - 2, V + 3])
@pytest.mark.parametrize("chunk_size", [3, None])
def test_the_divergence_from_the_reference_is_that_of_the_formula(given, trained, rows, chunk_size):
    given["target_T"] = given["target_T"].clamp(max=V - 3)
    expected = weighted(kl_by_loops(given, rows)) + 3 * weighted(by_loops(given).flip(0))
    used = given if trained else {**given, "head": given["head"].detach()}
    terms = with_kl(used, rows, chunk_size=chunk_size)
    torch.testing.assert_close(terms.kl_T, kl_by_loops(given, rows), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(terms.log_prob_T, by_loops(given), rtol=1e-9, atol=1e-12)
    found = weighted(terms.kl_T) + 3 * weighted(terms.log_prob_T.flip(0))
    leaves = (given["hidden_TD"], given["head"].weight_VD) if trained else (given["hidden_TD"],)
    same_gradients(found, expected, *leaves)


def test_the_reference_scores_the_tokens_on_the_way(given):
    terms = with_kl(given, V + 3, chunk_size=3)
    frozen = other(V + 3)
    expected_T = token_log_probs(frozen["reference_TE"], frozen["reference_head"], given["target_T"])
    torch.testing.assert_close(terms.reference_log_prob_T, expected_T)
    assert not terms.reference_log_prob_T.requires_grad


@pytest.mark.parametrize("trained", [True, False])
def test_only_one_of_the_two_may_be_used(given, trained):
    used = given if trained else {**given, "head": given["head"].detach()}
    same_gradients(weighted(with_kl(used).kl_T), weighted(kl_by_loops(given, V)), given["hidden_TD"])
    same_gradients(weighted(with_kl(used).log_prob_T), weighted(by_loops(given)), given["hidden_TD"])


def test_a_policy_that_is_its_reference_diverges_by_nothing(given):
    head = given["head"].detach()
    terms = token_log_probs_with_kl(**given, reference_TE=given["hidden_TD"], reference_head=head)
    torch.testing.assert_close(terms.kl_T, torch.zeros(T, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(terms.kl_T.sum(), given["hidden_TD"])
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_without_gradients_none_are_formed(given):
    with torch.no_grad(), LargestTensor() as watch:
        found_T = token_log_probs(**given, chunk_size=3)
    assert not found_T.requires_grad
    assert not [name for name in watch.operations if "scatter" in name or "exp_" in name]
    torch.testing.assert_close(found_T, by_loops(given).detach())


def test_no_rows_give_no_values_and_a_gradient_of_zero(given):
    empty = {**given, "hidden_TD": given["hidden_TD"][:0], "target_T": given["target_T"][:0]}
    terms = token_log_probs_with_kl(**empty, reference_TE=torch.zeros(0, E), reference_head=other()["reference_head"])
    assert [len(value) for value in terms] == [0, 0, 0]
    found = torch.autograd.grad(terms.log_prob_T.sum() + terms.kl_T.sum(), given["head"].weight_VD)[0]
    assert found.eq(0).all()
    assert len(token_log_probs(empty["hidden_TD"], given["head"].detach(), empty["target_T"])) == 0


@pytest.mark.parametrize("trained", [True, False])
def test_no_tensor_of_all_tokens_times_the_vocabulary_exists(trained):
    tokens, width, vocabulary, chunk = 96, 4, 501, 8
    hidden, target = torch.randn(tokens, width, requires_grad=True), torch.randint(0, vocabulary, (tokens,))
    head = Head(torch.randn(vocabulary, width, requires_grad=trained))
    frozen = Head(torch.randn(vocabulary, width))
    with LargestTensor() as watch:
        terms = token_log_probs_with_kl(hidden, head, target, hidden, frozen, chunk_size=chunk)
        (terms.log_prob_T.sum() + terms.kl_T.sum()).backward()
    assert watch.elements == chunk * vocabulary


@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("trained", [True, False])
def test_a_logit_that_is_not_finite_takes_its_token_out(given, value, trained):
    bias = torch.zeros(V, dtype=torch.float64)
    bias[5] = value
    head = Head(given["head"].weight_VD, bias)
    kept = torch.arange(V) != 5
    smaller = Head(given["head"].weight_VD[kept])
    moved_T = given["target_T"] - (given["target_T"] > 5).long()
    found_T = token_log_probs(given["hidden_TD"], head if trained else head.detach(), given["target_T"], chunk_size=3)
    expected_T = token_log_probs(given["hidden_TD"], smaller, moved_T)
    torch.testing.assert_close(found_T, expected_T)
    same_gradients(weighted(found_T), weighted(expected_T), given["hidden_TD"])
    frozen = other(V)
    frozen["reference_head"] = Head(frozen["reference_head"].weight_VD, bias.flip(0))
    terms = token_log_probs_with_kl(**{**given, "head": head}, **frozen)
    assert torch.isfinite(torch.stack(terms)).all()
    gradients = torch.autograd.grad(weighted(terms.kl_T), (given["hidden_TD"], given["head"].weight_VD))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_a_target_without_probability_still_gives_numbers(given):
    bias = torch.zeros(V, dtype=torch.float64)
    bias[3] = -math.inf
    found_T = token_log_probs(given["hidden_TD"], Head(given["head"].weight_VD, bias), given["target_T"])
    assert (found_T[2:4] < -9000).all()
    gradients = torch.autograd.grad(found_T.sum(), (given["hidden_TD"], given["head"].weight_VD))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_gradients_of_half_precision_heads_are_added_up_in_single():
    torch.manual_seed(0)
    hidden, weight = torch.randn(512, 8).bfloat16(), torch.randn(32, 8).bfloat16()
    target = torch.randint(0, 32, (512,))

    def gradient_of(chunk_size: int, dtype: torch.dtype) -> Tensor:
        head = Head(weight.to(dtype).requires_grad_())
        return torch.autograd.grad(
            token_log_probs(hidden.to(dtype), head, target, chunk_size=chunk_size).sum(), head.weight_VD
        )[0]

    exact, found = gradient_of(512, torch.float64), gradient_of(4, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("trained", [True, False])
def test_autocast_of_the_forward_pass_holds_in_the_backward_pass(trained):
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(32, 8, requires_grad=trained)
    target = torch.randint(0, 32, (20,))
    exact_T = token_log_probs(hidden, Head(weight), target)
    with torch.autocast("cpu", torch.bfloat16):
        found_T = token_log_probs(hidden, Head(weight), target, chunk_size=7)
    with LargestTensor() as watch:
        found = torch.autograd.grad(weighted(found_T), [hidden, weight] if trained else [hidden])
    exact = torch.autograd.grad(weighted(exact_T), [hidden, weight] if trained else [hidden])
    assert found_T.dtype == torch.float32 and all(gradient.dtype == torch.float32 for gradient in found)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)
    assert trained == ("aten._to_copy.default" in watch.operations)


def test_rows_that_are_not_paired_are_refused_with_their_numbers(given):
    with pytest.raises(ValueError, match=f"{T - 1} target"):
        token_log_probs(given["hidden_TD"], given["head"], given["target_T"][1:])
    with pytest.raises(ValueError, match=f"{T - 2} reference"):
        with_kl(given, reference_TE=normal(T - 2, E))


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_best_token_comes_from_the_same_logits(given, chunk_size):
    best_T, log_prob_T = best_tokens(**given, chunk_size=chunk_size)
    assert torch.equal(best_T, given["head"](given["hidden_TD"]).argmax(-1))
    torch.testing.assert_close(log_prob_T, token_log_probs(**given).detach())
    assert not log_prob_T.requires_grad
