"""Token rewards and the clipped losses of PPO against sums written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_llm.losses.rto import advantages, clipped_policy_loss, clipped_value_loss, log_ratio, token_rewards
from tests.reference import align_distil as reference

B, A = 3, 6


def normal(seed: int) -> Tensor:
    return torch.randn(B, A, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def mask_BA() -> Tensor:
    return (torch.arange(A) < torch.tensor([6, 1, 4])[:, None]).double()


@pytest.mark.parametrize(("discount", "decay"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_advantages_are_discounted_sums_of_surprises(mask_BA, discount, decay):
    reward, value = normal(1), normal(2)
    found = advantages(reward, value, mask_BA, discount=discount, decay=decay)
    for b, length in enumerate(mask_BA.sum(1).int().tolist()):
        rewards, values = reward[b, :length].tolist(), value[b, :length].tolist()
        for t in range(length):
            expected = reference.advantage(rewards, values, t, discount, decay)
            assert float(found.advantage_BA[b, t]) == pytest.approx(expected, rel=1e-9)
            assert float(found.return_BA[b, t]) == pytest.approx(expected + values[t], rel=1e-9)
    assert found.advantage_BA[mask_BA == 0].eq(0).all()


def test_answers_without_tokens_have_no_advantages():
    found = advantages(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0))
    assert found.advantage_BA.shape == found.return_BA.shape == (2, 0)


def test_rewards_are_clipped_before_the_penalty_and_masked(mask_BA):
    dpo, fixed, old = 100 * normal(1), 100 * normal(2), normal(3)
    found = token_rewards(dpo, fixed, old, mask_BA, beta=1.0, kl_coefficient=0.1, clip=(-10.0, 5.0))
    gap = dpo - fixed
    expected = torch.where(gap > 5, 5.0, torch.where(gap < -10, -10.0, gap)) - 0.1 * (old - fixed)
    torch.testing.assert_close(found, expected * mask_BA)
    torch.testing.assert_close(log_ratio(old, fixed, mask_BA), (old - fixed) * mask_BA)


@pytest.mark.parametrize(("advantage", "gain", "flat"), [(1.0, 0.5, True), (-1.0, 0.5, False), (-1.0, -0.5, True)])
def test_the_policy_stops_gaining_outside_the_clip(advantage, gain, flat):
    new = torch.tensor([[gain]], requires_grad=True)
    loss = clipped_policy_loss(new, torch.zeros(1, 1), torch.full((1, 1), advantage), clip=0.2)
    ratio = float(new.detach().exp())
    limited = min(max(ratio, 0.8), 1.2)
    assert float(loss.detach()) == pytest.approx(-min(ratio * advantage, limited * advantage))
    assert (float(torch.autograd.grad(loss.sum(), new)[0]) == 0) == flat


def test_the_critic_pays_for_the_larger_of_two_errors():
    old, new, wanted = torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 0.1]]), torch.full((1, 3), 0.5)
    found = clipped_value_loss(new, old, wanted, clip=0.2)
    expected = [0.5 * max((0.5 - 0.2) ** 2, 0.5**2), 0.5 * max(0.7**2, 1.5**2), 0.5 * 0.4**2]
    assert found[0].tolist() == pytest.approx(expected)
