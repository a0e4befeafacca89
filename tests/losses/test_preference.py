"""Preference losses against their formulas, and what is known about them beforehand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_llm.losses.head import Head
from lit_llm.losses.preference import (
    dpo,
    ipo,
    kto,
    kto_baseline,
    mean_by_sequence,
    paired_kto,
    simpo,
    sum_by_sequence,
    tdpo1,
    tdpo2,
)
from lit_llm.losses.token_log_probs import token_log_probs
from tests.reference import align_distil as reference

N = 5


def normal(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def sums() -> list[Tensor]:
    """Policy's chosen and rejected, reference's chosen and rejected."""
    return [normal(N, seed=i).requires_grad_(i < 2) for i in range(4)]


def same(terms, expected_N: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(terms.loss_N, expected_N, rtol=1e-9, atol=1e-12)
    grads = [torch.autograd.grad(value.sum(), leaves, retain_graph=True) for value in (terms.loss_N, expected_N)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    assert not any(value.requires_grad for value in terms[1:])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_its_formula(sums, smoothing):
    expected = [reference.dpo(*row, beta=0.3, smoothing=smoothing) for row in zip(*sums, strict=True)]
    terms = dpo(*sums, beta=0.3, label_smoothing=smoothing)
    same(terms, torch.stack(expected), *sums[:2])
    torch.testing.assert_close(terms.chosen_reward_N, 0.3 * (sums[0] - sums[2]).detach())
    torch.testing.assert_close(terms.rejected_reward_N, 0.3 * (sums[1] - sums[3]).detach())


def test_a_policy_that_is_its_reference_has_a_dpo_loss_of_log_2_and_no_reward(sums):
    terms = dpo(sums[0], sums[1], sums[0].detach(), sums[1].detach(), beta=0.1)
    torch.testing.assert_close(terms.loss_N, torch.full((N,), math.log(2), dtype=torch.float64))
    assert terms.chosen_reward_N.eq(0).all() and terms.rejected_reward_N.eq(0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_dpo_is_known(sums, smoothing):
    beta, u = 0.3, ((sums[0] - sums[2]) - (sums[1] - sums[3])).detach()
    chosen, rejected = torch.autograd.grad(dpo(*sums, beta=beta, label_smoothing=smoothing).loss_N.sum(), sums[:2])
    torch.testing.assert_close(chosen, -beta * ((1 - smoothing) - torch.sigmoid(beta * u)))
    torch.testing.assert_close(rejected, -chosen)


def test_swapping_the_columns_is_reverse_dpo_and_starts_with_the_opposite_gradient():
    hidden, head = normal(4, 3, seed=1, scale=1.0).requires_grad_(), Head(normal(7, 3, seed=2, scale=1.0))
    log_prob_T = token_log_probs(hidden, head, torch.tensor([0, 3, 6, 2]))
    sums_N = sum_by_sequence(log_prob_T, torch.tensor([0, 0, 1, 1]), 2)
    chosen, rejected = sums_N[:1], sums_N[1:]
    forward = dpo(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1)
    reverse = dpo(rejected, chosen, rejected.detach(), chosen.detach(), beta=0.1)
    found, expected = (
        torch.autograd.grad(terms.loss_N.sum(), hidden, retain_graph=True)[0] for terms in (reverse, forward)
    )
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, -expected)


def test_differences_of_thousands_stay_numbers():
    for sign in (1.0, -1.0):
        chosen = torch.tensor([sign * 5000.0], requires_grad=True)
        zero = torch.zeros(1)
        for terms in (
            dpo(chosen, zero, zero, zero, beta=1.0),
            dpo(chosen, zero, zero, zero, beta=1.0, label_smoothing=0.1),
            simpo(chosen, zero, beta=1.0, gamma_beta_ratio=0.5),
            tdpo1(chosen, zero, zero, zero, zero, zero, beta=1.0),
            kto(chosen, zero, torch.tensor([True]), zero, beta=1.0),
        ):
            (gradient,) = torch.autograd.grad(terms.loss_N.sum(), chosen)
            assert torch.isfinite(terms.loss_N).all() and torch.isfinite(gradient).all()


def test_half_precision_sums_are_compared_in_single():
    rows = [torch.full((1,), value, dtype=torch.bfloat16) for value in (-100.0, -101.0, -100.0, -100.0)]
    assert dpo(*rows, beta=0.1).loss_N.dtype == torch.float32


def test_ipo_is_its_formula_on_sums_and_on_means(sums):
    expected = [reference.ipo(*row, beta=0.2) for row in zip(*sums, strict=True)]
    same(ipo(*sums, beta=0.2), torch.stack(expected), *sums[:2])
    lengths = torch.tensor([1, 2, 5, 3, 4]), torch.tensor([4, 1, 1, 2, 9])
    rows = zip(*sums, *lengths, strict=True)
    expected = [reference.ipo(*row[:4], beta=0.2, tokens_w=row[4], tokens_l=row[5]) for row in rows]
    terms = ipo(*sums, beta=0.2, chosen_tokens_N=lengths[0], rejected_tokens_N=lengths[1])
    same(terms, torch.stack(expected), *sums[:2])
    with pytest.raises(ValueError, match="go together"):
        ipo(*sums, beta=0.2, chosen_tokens_N=lengths[0])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_is_its_formula(sums, smoothing):
    rows = zip(*sums[:2], strict=True)
    expected = [reference.simpo(*row, beta=2.5, ratio=0.5, smoothing=smoothing) for row in rows]
    terms = simpo(*sums[:2], beta=2.5, gamma_beta_ratio=0.5, label_smoothing=smoothing)
    same(terms, torch.stack(expected), *sums[:2])
    torch.testing.assert_close(terms.rejected_reward_N, 2.5 * sums[1].detach())


def test_both_variants_of_token_level_dpo_are_their_formulas(sums):
    kls = [normal(N, seed=7 + i).abs().requires_grad_() for i in range(2)]
    rows = list(zip(*sums, *kls, strict=True))
    first = torch.stack([reference.tdpo(*row, variant=1, beta=0.3) for row in rows])
    same(tdpo1(*sums, *kls, beta=0.3), first, *sums[:2], *kls)
    second = torch.stack([reference.tdpo(*row, variant=2, beta=0.3, alpha=0.7) for row in rows])
    terms = tdpo2(*sums, *kls, beta=0.3, alpha=0.7)
    same(terms, second, *sums[:2], kls[1])
    torch.testing.assert_close(terms.chosen_reward_N, 0.3 * (sums[0] - sums[2] + kls[0]).detach())


def test_only_the_first_variant_trains_through_the_chosen_divergence(sums):
    kls = [normal(N, seed=7 + i).abs().requires_grad_() for i in range(2)]
    first, second = tdpo1(*sums, *kls, beta=0.3), tdpo2(*sums, *kls, beta=0.3, alpha=1.0)
    torch.testing.assert_close(first.loss_N, second.loss_N)
    assert torch.autograd.grad(first.loss_N.sum(), kls[0])[0].abs().min() > 0
    assert torch.autograd.grad(second.loss_N.sum(), kls[0], allow_unused=True)[0] is None


def test_token_level_dpo_without_its_divergence_is_dpo(sums):
    nothing = torch.zeros(N)
    expected = dpo(*sums, beta=0.1, label_smoothing=0.1).loss_N
    torch.testing.assert_close(tdpo1(*sums, nothing, nothing, beta=0.1, label_smoothing=0.1).loss_N, expected)
    found = tdpo2(*sums, nothing + 3, nothing, beta=0.1, alpha=0.0, label_smoothing=0.1)
    torch.testing.assert_close(found.loss_N, expected)


def test_kto_is_its_formula(sums):
    policy, fixed = sums[0], sums[2]
    good = torch.tensor([True, False, True, True, False])
    baseline, weights = torch.tensor(0.4, dtype=torch.float64, requires_grad=True), (1.0, 1.33)
    expected = [
        reference.kto(*row, bool(is_good), 0.4, beta=0.5, weight=weights[0 if is_good else 1])
        for *row, is_good in zip(policy, fixed, good, strict=True)
    ]
    terms = kto(policy, fixed, good, baseline, beta=0.5, desirable_weight=1.0, undesirable_weight=1.33)
    same(terms, torch.stack(expected), policy)
    assert torch.autograd.grad(terms.loss_N.sum(), baseline, allow_unused=True)[0] is None


def test_the_baseline_of_kto_is_a_mean_that_is_never_negative():
    ratio = torch.tensor([1.0, 3.0], requires_grad=True)
    assert kto_baseline(ratio, torch.zeros(2)) == 2.0 and not kto_baseline(ratio, torch.zeros(2)).requires_grad
    assert kto_baseline(-ratio, torch.zeros(2)) == 0.0
    assert kto_baseline(ratio[:0], torch.zeros(0)) == 0.0


def test_paired_kto_takes_the_other_side_as_its_baseline(sums):
    z_w, z_l = (float((sums[i] - sums[i + 2]).detach().mean().clamp(min=0)) for i in (0, 1))
    assert z_w != z_l
    expected = [
        0.5 * reference.kto(w, w_0, True, z_l, beta=0.5, weight=1.2)
        + 0.5 * reference.kto(l, l_0, False, z_w, beta=0.5, weight=0.9)
        for w, l, w_0, l_0 in zip(*sums, strict=True)
    ]
    terms = paired_kto(*sums, beta=0.5, desirable_weight=1.2, undesirable_weight=0.9)
    same(terms, torch.stack(expected), *sums[:2])


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_that_is_no_minority_is_refused(sums, smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing is {smoothing}"):
        dpo(*sums, beta=0.1, label_smoothing=smoothing)


def test_sums_and_means_are_those_of_each_sequence_and_empty_ones_are_zero():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0], requires_grad=True)
    sequence = torch.tensor([0, 2, 0, 2])
    assert sum_by_sequence(values, sequence, 4).tolist() == [4.0, 0.0, 12.0, 0.0]
    assert mean_by_sequence(values, sequence, 4).tolist() == [2.0, 0.0, 6.0, 0.0]
    (gradient,) = torch.autograd.grad(mean_by_sequence(values, sequence, 4)[2], values)
    assert gradient.tolist() == [0.0, 0.5, 0.0, 0.5]
    assert sum_by_sequence(values[:0], sequence[:0], 2).tolist() == [0.0, 0.0]


def test_half_precision_tokens_are_added_up_in_single():
    values = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    found = sum_by_sequence(values, torch.zeros(4096, dtype=torch.int64), 1)
    assert found.dtype == torch.float32 and float(found) == 4096.0
