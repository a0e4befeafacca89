"""Losses on routers against their formulas, token by token in float64, and what they do at the edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_llm.losses.routing import (
    balance_per_slot,
    classifier_loss,
    expert_load,
    group_prior,
    language_prior,
    load_balance,
)
from tests.reference import layer_moe_losses as reference

SIZES = (3, 2, 5, 3)
M = 11
REAL = [True, True, False, True, True, True, True, False, True, True, True]
OLD = [True, False, False, True, True, False, False, False, True, False, True]
GROUP = [0, 1, 0, 2, 0, 1, 2, 1, 0, 1, 2]
BOUNDS = [[1, 2, 3], [1, 1, 2], [1, 3, 5], [1, 3, 3]]


def layers(sizes=SIZES, dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(M, n, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_() for n in sizes]


def assert_same(ours, expected: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, expected)
    found, wanted = (torch.autograd.grad(value, leaves) for value in (ours, expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_load_balance_is_the_share_of_choices_times_the_mean_probability(k):
    z = layers()
    expected = sum(reference.balance(z, k, REAL)) / len(z)
    assert_same(load_balance(z, k, torch.tensor(REAL)).mean, expected, z)


def test_layers_where_every_token_uses_every_expert_do_not_pull():
    z = layers((2, 2))
    found = load_balance(z, 2, torch.tensor(REAL))
    found.loss.backward()
    torch.testing.assert_close(found.mean, torch.tensor(2.0, dtype=torch.float64))
    assert all(logits.grad.abs().max() < 1e-15 for logits in z)


def test_a_load_from_elsewhere_makes_parts_of_a_batch_add_up_to_the_whole():
    z, mask = layers(), torch.tensor(REAL)
    load = [expert_load(logits, 2, mask) for logits in z]
    whole = load_balance(z, 2, mask)
    parts = [load_balance([logits[span] for logits in z], 2, mask[span], load) for span in (slice(0, 4), slice(4, M))]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    assert sum(int(part.tokens) for part in parts) == int(whole.tokens) == sum(REAL)


def test_the_exact_prior_is_cross_entropy_with_expert_zero():
    z = layers()
    assert_same(language_prior(z, torch.tensor(OLD)).mean, reference.prior(z, OLD), z)


def test_the_released_prior_takes_the_softmax_twice_and_weighs_rare_sizes_more():
    z = layers()
    assert_same(language_prior(z, torch.tensor(OLD), "released").mean, reference.released_prior(z, OLD), z)


def test_the_released_prior_hardly_pulls_where_it_should_most():
    for form, pull in (("exact", 0.999), ("released", 0.00146)):
        z = torch.tensor([[0.001, 0.999]], dtype=torch.float64).log().requires_grad_()
        language_prior([z], torch.tensor([True]), form).loss.backward()
        assert float(-z.grad[0, 0]) == pytest.approx(pull, rel=0.02)


def test_the_group_prior_is_the_mass_on_experts_that_a_group_knew():
    z = layers()
    found = group_prior(z, BOUNDS, torch.tensor(GROUP), torch.tensor(REAL))
    assert_same(found.mean, reference.group_prior(z, BOUNDS, GROUP, REAL), z)


def test_with_one_expansion_the_group_prior_is_the_language_prior():
    z, old = layers(), torch.tensor(OLD)
    found = group_prior(z, [[1, n] for n in SIZES], (~old).long(), torch.tensor(REAL))
    torch.testing.assert_close(found.loss, language_prior(z, old & torch.tensor(REAL)).loss)


def test_the_classifier_loss_is_cross_entropy_with_class_zero_for_old_languages():
    z = layers((2, 2))
    found = classifier_loss(z, torch.tensor(OLD), torch.tensor(REAL))
    assert_same(found.mean, reference.classifier(z, OLD, REAL), z)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, none: load_balance(z, 2, none),
        lambda z, none: language_prior(z, none),
        lambda z, none: language_prior(z, none, "released"),
        lambda z, none: group_prior(z, BOUNDS, torch.tensor(GROUP), none),
        lambda z, none: classifier_loss([logits[:, :2] for logits in z], none, none),
    ],
    ids=["balance", "prior", "released prior", "group prior", "classifier"],
)
def test_no_tokens_give_a_zero_that_reaches_every_router(loss):
    z = layers()
    found = loss(z, torch.zeros(M, dtype=torch.bool))
    found.loss.backward()
    assert found.loss == 0 and found.mean == 0 and found.tokens == 0
    assert all(logits.grad is not None and not logits.grad.any() for logits in z)


def test_half_precision_logits_are_compared_in_single_precision():
    z = layers(dtype=torch.bfloat16)
    for found in (load_balance(z, 2, torch.tensor(REAL)), language_prior(z, torch.tensor(OLD))):
        assert found.loss.dtype == torch.float32
    single = [logits.detach().float() for logits in z]
    torch.testing.assert_close(
        language_prior(z, torch.tensor(OLD)).loss, language_prior(single, torch.tensor(OLD)).loss
    )


def test_what_does_not_fit_is_refused_with_its_numbers():
    z = layers()
    with pytest.raises(ValueError, match="layers have \\[11\\] rows, the mask 3"):
        language_prior(z, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="0 layers"):
        language_prior([], torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="'double'"):
        language_prior(z, torch.tensor(OLD), "double")
    with pytest.raises(
        ValueError, match="Layer number 1 has 2 experts, but the bounds of its groups are \\[1, 2, 3\\]"
    ):
        group_prior(z, [[1, 2, 3]] * 4, torch.tensor(GROUP), torch.tensor(REAL))


def test_the_balance_to_be_read_is_divided_by_k_and_leaves_out_layers_without_a_choice():
    generator = torch.Generator().manual_seed(3)
    logits = [torch.randn(12, size, generator=generator) for size in (4, 2, 3)]
    mask_M = torch.rand(12, generator=generator) < 0.7
    balance = load_balance(logits, 2, mask_M)
    found = balance_per_slot(balance, [4, 2, 3], 2)
    torch.testing.assert_close(found.mean, load_balance([logits[0], logits[2]], 2, mask_M).mean / 2)
    even = load_balance([torch.eye(4)], 1, torch.ones(4))
    assert balance_per_slot(even, [4], 1).mean == pytest.approx(1.0)
    assert balance_per_slot(load_balance([logits[1]], 2, mask_M), [2], 2) is None
