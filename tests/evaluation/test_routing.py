"""Routing statistics against their definitions, over windows, languages and ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_llm.evaluation.routing import RoutedLayer, RoutingStatistics
from lit_llm.losses.routing import group_prior
from tests.reference.layer_moe_losses import routing_metrics

M, SIZES, K = 24, (4, 2, 3), 2
LANGUAGES = ["en", "hu", "tr"]  # the first is an original one


def routing(seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(M, n, generator=generator) for n in SIZES]
    return logits, torch.randint(0, 3, (M,), generator=generator), torch.rand(M, generator=generator) < 0.8


def statistics() -> RoutingStatistics:
    return RoutingStatistics(SIZES, K, groups=[0, 1, 1])


def test_every_layer_is_as_the_definitions_say_over_a_window_of_steps():
    logits, language_M, mask_M = routing()
    counts = statistics()
    for span in (slice(0, 5), slice(5, M)):
        counts.update([RoutedLayer(z[span]) for z in logits], language_M[span], mask_M[span])
    found = counts.compute()
    for layer, z in enumerate(logits):
        expected = routing_metrics(z, K, mask_M.tolist(), (language_M == 0).tolist())
        shares = torch.tensor(expected.pop("slots")) / (K * mask_M.sum())
        torch.testing.assert_close(torch.tensor(found.load_shares[layer]), shares)
        expected.pop("prob")
        for name, value in expected.items():
            assert found.layers[name][layer] == pytest.approx(value, abs=1e-6), name


def test_languages_are_told_apart():
    logits, language_M, mask_M = routing()
    counts = statistics()
    counts.update([RoutedLayer(z) for z in logits], language_M, mask_M)
    found = counts.compute().languages
    for a in range(len(LANGUAGES)):
        rows = mask_M & (language_M == a)
        for layer, z in enumerate(logits):
            p_MN = z[rows].softmax(-1)
            slots_M = (z[rows].topk(K).indices == 0).any(-1).float()
            assert found["expert0_prob"][a][layer] == pytest.approx(float(p_MN[:, 0].mean()), abs=1e-6)
            assert found["expert0_top1"][a][layer] == pytest.approx(float((p_MN.argmax(-1) == 0).float().mean()))
            assert found["expert0_share"][a][layer] == pytest.approx(float(slots_M.mean()) / K)


def test_a_language_without_tokens_has_no_numbers_and_scalars_leave_it_out():
    logits, _, mask_M = routing()
    counts = statistics()
    counts.update([RoutedLayer(z) for z in logits], torch.full((M,), 1), mask_M)
    found = counts.compute()
    assert all(math.isnan(value) for value in found.languages["expert0_prob"][0])
    scalars = found.scalars()
    assert "new_prob_expert0" in scalars and not [name for name in scalars if name.startswith(("old_", "classifier"))]


def test_layers_that_cannot_be_out_of_balance_do_not_water_the_mean_down():
    logits, language_M, mask_M = routing()
    counts = statistics()
    counts.update([RoutedLayer(z) for z in logits], language_M, mask_M)
    found = counts.compute()
    assert found.layers["max_violation"][1] == 0
    routed = [found.layers["max_violation"][layer] for layer in (0, 2)]
    assert found.scalars()["max_violation"] == pytest.approx(sum(routed) / 2)
    assert found.scalars()["max_violation_worst"] == max(routed)


def test_classifiers_are_judged_by_class_and_bypasses_are_counted():
    language_M = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    mask_M = torch.tensor([True] * 7 + [False])
    says_old_M = torch.tensor([True, True, True, False, True, False, False, True])
    classifier_M2 = torch.stack([says_old_M.float(), (~says_old_M).float()], -1)
    counts = RoutingStatistics([2, 3], K, groups=[0, 1, 1])
    logits = [torch.randn(8, 2), torch.randn(8, 3)]
    layers = [RoutedLayer(logits[0]), RoutedLayer(logits[1], classifier_M2, says_old_M)]
    counts.update(layers, language_M, mask_M)
    found = counts.compute()
    assert math.isnan(found.layers["classifier_acc_old"][0])
    assert found.layers["classifier_acc_old"][1] == pytest.approx(3 / 4)
    assert found.layers["classifier_acc_new"][1] == pytest.approx(2 / 3)
    assert found.layers["bypass_share"][1] == pytest.approx(4 / 7)
    assert [row[1] for row in found.languages["classifier_acc"]] == pytest.approx([3 / 4, 1 / 2, 1.0])
    assert found.scalars()["classifier_acc_old"] == pytest.approx(3 / 4)


def test_a_bypassed_token_is_load_of_expert_0_alone_whatever_its_router_would_have_chosen():
    z = torch.tensor([[0.0, 5.0, 4.0]]).repeat(2, 1)
    says_old_M2 = torch.tensor([[3.0, 0.0]]).repeat(2, 1)
    counts = RoutingStatistics([3], K, groups=[0])
    language_M, mask_M = torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)
    counts.update([RoutedLayer(z, says_old_M2, torch.tensor([True, True]))], language_M, mask_M)
    found = counts.compute()
    assert found.load_shares == [[1.0, 0.0, 0.0]] and found.layers["dead_experts"] == [2.0]
    assert found.languages["expert0_share"] == [[1.0]] and found.languages["expert0_top1"] == [[0.0]]
    assert found.layers["old_prob_expert0"][0] == pytest.approx(float(z[0].softmax(-1)[0]))
    counts.update([RoutedLayer(z, says_old_M2, torch.tensor([True, False]))], language_M, mask_M)
    assert counts.compute().load_shares[0] == pytest.approx([3 / 5, 1 / 5, 1 / 5])


def test_classifiers_are_judged_at_their_threshold():
    says_old_M2 = torch.tensor([[0.7, 0.3], [0.9, 0.1]]).log()
    counts = RoutingStatistics([2], K, groups=[0, 1])
    layer = RoutedLayer(torch.zeros(2, 2), says_old_M2, torch.tensor([False, True]), threshold=0.8)
    counts.update([layer], torch.tensor([1, 0]), torch.ones(2, dtype=torch.bool))
    found = counts.compute().layers
    assert found["classifier_acc_old"] == [1.0] and found["classifier_acc_new"] == [1.0]


def test_an_expert_without_a_token_is_dead_and_an_empty_window_is_not_a_crash():
    z = torch.zeros(M, 4)
    z[:, :2] = 5.0
    counts = RoutingStatistics([4], K, groups=[0])
    counts.update([RoutedLayer(z)], torch.zeros(M, dtype=torch.int64), torch.ones(M, dtype=torch.bool))
    assert counts.compute().layers["dead_experts"] == [2.0]
    counts.reset()
    assert "old_prob_expert0" not in counts.compute().scalars()


def test_no_step_copies_a_list_to_the_device(monkeypatch):
    logits, language_M, mask_M = routing()
    counts, bounds = statistics(), [[1, 4], [1, 2], [1, 3]]

    def copied(*arguments, **keywords):
        raise AssertionError("torch.tensor of a list waits for the device")

    monkeypatch.setattr(torch, "tensor", copied)
    counts.update([RoutedLayer(z) for z in logits], language_M, mask_M)
    group_prior(logits, bounds, language_M.clamp(max=1), mask_M)


def test_another_number_of_layers_is_refused():
    with pytest.raises(ValueError, match="There are 3 routed layers, but routing of 1 was given"):
        statistics().update([RoutedLayer(torch.zeros(M, 4))], torch.zeros(M).long(), torch.ones(M).bool())


def test_counts_stay_exact_inside_a_module_that_becomes_bfloat16():
    logits, language_M, mask_M = routing()
    counts, expected = statistics(), statistics()
    torch.nn.ModuleList([counts]).to(torch.bfloat16)
    for metric in (counts, expected):
        for _ in range(30):  # more than 256 tokens
            metric.update([RoutedLayer(z) for z in logits], language_M, mask_M)
    assert torch.equal(counts.tokens_A, expected.tokens_A)
    assert counts.compute().layers["load_cv"] == expected.compute().layers["load_cv"]
