"""Adaptive policy distillation against the formula in float64, number by number, and its properties."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_llm.losses.adaptive_policy import (
    AdaptivePolicy,
    AdaptivePolicyTerms,
    adaptive_coefficient,
    adaptive_policy,
    adaptive_policy_values,
    combined_log_probs,
    combined_logits,
    sample_weights,
)
from lit_llm.losses.head import Head
from tests.losses.watch import LargestTensor
from tests.reference import align_distil as reference
from tests.reference.divergences import softmax

T, D, E, F, V = 7, 5, 6, 4, 11
EVERY = [
    {"rule": "adaptive_extrapolation"},
    {"rule": "adaptive_extrapolation", "slope": 3.0, "floor": 0.01, "beta_cap": 0.08},
    {"rule": "adaptive_interpolation", "slope": 2.0},
    {"rule": "fixed_extrapolation", "beta": 0.05},
    {"rule": "fixed_interpolation", "beta": 0.4},
    {"rule": "adaptive_extrapolation", "temperature": 2.0},
    {"rule": "adaptive_interpolation", "temperature": 0.7, "dpo_beta": 0.3},
    {"rule": "adaptive_extrapolation", "temperature": 2.0, "tempered": "teacher"},
    {"rule": "fixed_interpolation", "beta": 0.05, "temperature": 1.5, "tempered": "teacher"},
]
FORMS = ["combined", "decomposed"]


def normal(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def models(policy_rows: int = V, dpo_rows: int = V, other_rows: int = V, tokens: int = T) -> dict:
    return {
        "policy_TD": normal(tokens, D, seed=1).requires_grad_(),
        "policy_head": Head(normal(policy_rows, D, seed=2).requires_grad_()),
        "dpo_TE": normal(tokens, E, seed=3),
        "dpo_head": Head(normal(dpo_rows, E, seed=4)),
        "other_TF": normal(tokens, F, seed=5),
        "other_head": Head(normal(other_rows, F, seed=6)),
        "weight_T": torch.rand(tokens, generator=torch.Generator().manual_seed(7), dtype=torch.float64),
    }


def from_logits(policy_TV: Tensor, dpo_TV: Tensor, other_TV: Tensor, settings: AdaptivePolicy, **options):
    head = Head(torch.eye(policy_TV.shape[1], dtype=policy_TV.dtype))
    options = {"weight_T": torch.ones(len(policy_TV), dtype=policy_TV.dtype), **options}
    return adaptive_policy(policy_TV, head, dpo_TV, head, other_TV, head, settings, **options)


def three_logits(scale: float = 2.0, dtype=torch.float64, vocabulary: int = V) -> list[Tensor]:
    return [scale * normal(T, vocabulary, seed=seed, dtype=dtype) for seed in (11, 12, 13)]


def rows_of_logits(given: dict) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Logits of the three models, cut to the shortest head, position by position."""
    shared = min(given[f"{name}_head"].num_rows for name in ("policy", "dpo", "other"))
    names = (("policy_TD", "policy_head"), ("dpo_TE", "dpo_head"), ("other_TF", "other_head"))
    return [
        tuple((given[head].weight_VD @ given[hidden][t])[:shared] for hidden, head in names)
        for t in range(len(given["weight_T"]))
    ]


def by_loops(given: dict, **settings) -> Tensor:
    rows = zip(given["weight_T"], rows_of_logits(given), strict=True)
    return sum(weight * reference.token_loss(*logits, **settings) for weight, logits in rows)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_value_and_gradients_are_those_of_the_formula(settings, form):
    given = models()
    expected = by_loops(given, form=form, **settings)
    leaves = given["policy_TD"], given["policy_head"].weight_VD
    wanted = torch.autograd.grad(expected, leaves)
    terms = adaptive_policy(**given, settings=AdaptivePolicy(**settings), form=form, chunk_size=3)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, leaves), wanted, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_the_readable_definition_is_the_same(settings):
    rows = three_logits()
    settings_, expected = AdaptivePolicy(**settings), {}
    for form in FORMS:
        expected[form] = torch.stack(
            [reference.token_loss(*row, form=form, **settings) for row in zip(*rows, strict=True)]
        )
        found_T = adaptive_policy_values(*rows, settings_, form)
        torch.testing.assert_close(found_T, expected[form], rtol=1e-9, atol=1e-11)
        terms = from_logits(*rows, settings_, form=form)
        torch.testing.assert_close(terms.beta_T * terms.value_T, expected[form], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("settings", EVERY[:5], ids=str)
def test_every_number_of_a_token_is_that_of_the_formula(settings):
    given = models()
    terms = adaptive_policy(**given, settings=AdaptivePolicy(**settings), chunk_size=3)
    dpo_beta = settings.get("dpo_beta", 0.1)
    for t, (z_s, z_d, z_o) in enumerate(rows_of_logits(given)):
        alpha, beta = reference.coefficient(z_d, z_o, **settings)
        z_star = reference.teacher(z_d, z_o, alpha, settings["rule"])
        q, d, o, star = softmax(z_s.detach()), softmax(z_d), softmax(z_o), softmax(z_star)
        expected = {
            "value_T": reference.kl(q, star),
            "tvd_T": reference.tvd(z_d, z_o),
            "alpha_T": alpha,
            "beta_T": beta,
            "expected_reward_T": dpo_beta * reference.expected_gap(q, d, o),
            "dpo_expected_reward_T": dpo_beta * reference.expected_gap(d, d, o),
            "kl_dpo_T": reference.kl(q, d),
            "kl_other_T": reference.kl(q, o),
            "entropy_T": reference.entropy(q),
            "teacher_entropy_T": reference.entropy(star),
            "agree_T": float(z_s.argmax() == z_star.argmax()),
        }
        assert {*expected, "loss"} == set(AdaptivePolicyTerms._fields)
        for name, value in expected.items():
            found = getattr(terms, name)[t]
            torch.testing.assert_close(found, torch.as_tensor(value, dtype=found.dtype), rtol=1e-8, atol=1e-10)


def test_tempering_changes_the_loss_but_not_what_is_told_about_the_models():
    rows = three_logits()
    plain, tempered = (from_logits(*rows, AdaptivePolicy(temperature=temperature)) for temperature in (1.0, 2.0))
    assert not torch.allclose(plain.value_T, tempered.value_T)
    for name in (
        "tvd_T",
        "expected_reward_T",
        "dpo_expected_reward_T",
        "kl_dpo_T",
        "kl_other_T",
        "entropy_T",
        "agree_T",
    ):
        torch.testing.assert_close(getattr(plain, name), getattr(tempered, name))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 64, None])
def test_chunks_do_not_change_anything(chunk_size, form):
    given = models()
    leaves = given["policy_TD"], given["policy_head"].weight_VD
    whole, parts = (
        adaptive_policy(**given, settings=AdaptivePolicy(), form=form, chunk_size=size) for size in (T, chunk_size)
    )
    torch.testing.assert_close(tuple(v for v in parts if v is not None), tuple(v for v in whole if v is not None))
    found, expected = (torch.autograd.grad(terms.loss, leaves) for terms in (parts, whole))
    torch.testing.assert_close(found, expected)


def test_blocks_within_a_chunk_do_not_change_anything(monkeypatch):
    from lit_llm.losses import three_heads

    given = models()
    whole = adaptive_policy(**given, settings=AdaptivePolicy())
    monkeypatch.setattr(three_heads, "_BLOCK_ELEMENTS", 3 * V)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    blocks = adaptive_policy(**given, settings=AdaptivePolicy())
    torch.testing.assert_close(tuple(blocks), tuple(whole))
    leaves = given["policy_TD"], given["policy_head"].weight_VD
    torch.testing.assert_close(*(torch.autograd.grad(terms.loss, leaves) for terms in (blocks, whole)))


def test_chunks_chosen_automatically_are_bounded_and_even():
    from lit_llm.losses.three_heads import even_chunks

    for tokens, vocabulary in ((512, 32_000), (256, 151_936), (1000, 262_144), (7, 11)):
        size = even_chunks(tokens, vocabulary)
        number = -(-tokens // size)
        assert size * vocabulary * 12 <= 192 * 2**20 and number * size - tokens < number
    assert even_chunks(0, 10) == 1 and even_chunks(100, 10**9) <= 16


@pytest.mark.parametrize("rows", [(V, V - 2, V + 3), (V - 1, V, V + 4), (V + 5, V, V)])
def test_padded_heads_are_compared_over_the_shortest(rows):
    given = models(*rows)
    expected = by_loops(given, rule="adaptive_extrapolation")
    leaves = given["policy_TD"], given["policy_head"].weight_VD
    terms = adaptive_policy(**given, settings=AdaptivePolicy(), chunk_size=3)
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(torch.autograd.grad(terms.loss, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("form", FORMS)
def test_frozen_heads_and_frozen_hidden_states_get_no_gradient_and_leave_the_others_alone(form):
    given = models()
    settings, leaves = AdaptivePolicy(), (given["policy_TD"], given["policy_head"].weight_VD)
    expected = torch.autograd.grad(adaptive_policy(**given, settings=settings, form=form).loss, leaves)
    frozen = {**given, "policy_head": given["policy_head"].detach()}
    loss = adaptive_policy(**frozen, settings=settings, form=form, chunk_size=3).loss
    torch.testing.assert_close(torch.autograd.grad(loss, leaves[0])[0], expected[0])
    still = {**given, "policy_TD": given["policy_TD"].detach()}
    loss = adaptive_policy(**still, settings=settings, form=form, chunk_size=3).loss
    torch.testing.assert_close(torch.autograd.grad(loss, leaves[1])[0], expected[1])


def test_softcap_scale_and_bias_belong_to_the_heads():
    given = models()
    bias = normal(V, seed=9)
    for name in ("policy", "dpo", "other"):
        weight_VD = given[f"{name}_head"].weight_VD
        given[f"{name}_head"] = Head(weight_VD, bias.requires_grad_(name == "policy"), softcap=3.0, scale=0.5)
        bias = bias.detach().clone()
    names = (("policy_TD", "policy_head"), ("dpo_TE", "dpo_head"), ("other_TF", "other_head"))
    logits = [3.0 * torch.tanh((given[x] @ given[h].weight_VD.T + given[h].bias_V) / 6.0) for x, h in names]
    expected = (given["weight_T"] * adaptive_policy_values(*logits, AdaptivePolicy())).sum()
    leaves = given["policy_TD"], *given["policy_head"].parameters()
    found = adaptive_policy(**given, settings=AdaptivePolicy(), chunk_size=3).loss
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


def test_a_loss_above_scales_the_gradient_and_the_frozen_models_get_none():
    given = models()
    given["dpo_TE"].requires_grad_(), given["other_head"].weight_VD.requires_grad_()
    once, thrice = (factor * adaptive_policy(**given, settings=AdaptivePolicy()).loss for factor in (1, 3))
    (plain,), (scaled,) = (torch.autograd.grad(loss, given["policy_TD"], retain_graph=True) for loss in (once, thrice))
    torch.testing.assert_close(scaled, 3 * plain)
    once.backward()
    assert given["dpo_TE"].grad is None and given["other_head"].weight_VD.grad is None


def test_without_gradients_the_loss_has_none():
    given = models()
    with torch.no_grad(), LargestTensor() as watch:
        terms = adaptive_policy(**given, settings=AdaptivePolicy(), chunk_size=3)
    assert not terms.loss.requires_grad
    assert not [name for name in watch.operations if "addmm_" in name or "zeros_like" in name]
    torch.testing.assert_close(terms.loss, adaptive_policy(**given, settings=AdaptivePolicy()).loss.detach())


def test_two_halves_add_up_to_the_whole():
    given, settings = models(), AdaptivePolicy()
    cut = ("policy_TD", "dpo_TE", "other_TF", "weight_T")
    halves = [
        adaptive_policy(**{**given, **{name: given[name][span] for name in cut}}, settings=settings).loss
        for span in (slice(0, 3), slice(3, T))
    ]
    whole = adaptive_policy(**given, settings=settings).loss
    (found,), (expected,) = (torch.autograd.grad(loss, given["policy_TD"]) for loss in (sum(halves), whole))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_a_constant_added_to_the_logits_of_a_position_changes_nothing(settings):
    rows, settings = three_logits(), AdaptivePolicy(**settings)
    moved = [side + 7 * normal(T, 1, seed=20 + i) for i, side in enumerate(rows)]
    for form in FORMS:
        found, expected = (
            tuple(v for v in from_logits(*sides, settings, form=form) if v is not None) for sides in (moved, rows)
        )
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    alpha_T = adaptive_coefficient(*rows[1:], settings).alpha_T
    found, expected = (combined_log_probs(*sides[1:], alpha_T, settings) for sides in (moved, rows))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_without_a_slope_the_coefficient_is_the_floor():
    terms = from_logits(*three_logits(), AdaptivePolicy(slope=0.0, floor=0.25))
    torch.testing.assert_close(terms.alpha_T, torch.full((T,), 0.25, dtype=torch.float64))
    fixed = from_logits(*three_logits(), AdaptivePolicy(rule="fixed_extrapolation", beta=0.1 / 0.25))
    torch.testing.assert_close(terms.loss, fixed.loss)


def test_two_models_that_agree_are_the_teacher():
    policy, dpo, _ = three_logits()
    terms = from_logits(policy, dpo, dpo.clone(), AdaptivePolicy())
    assert terms.tvd_T.eq(0).all()
    torch.testing.assert_close(terms.value_T, terms.kl_dpo_T)
    torch.testing.assert_close(terms.beta_T, torch.full((T,), 100.0, dtype=torch.float64))
    assert terms.expected_reward_T.abs().max() < 1e-12


@pytest.mark.parametrize("settings", EVERY[:5], ids=str)
def test_a_policy_that_is_the_teacher_has_no_loss_and_no_gradient(settings):
    settings, (_, dpo, other) = AdaptivePolicy(**settings), three_logits()
    policy = combined_logits(dpo, other, adaptive_coefficient(dpo, other, settings).alpha_T, settings).requires_grad_()
    terms = from_logits(policy, dpo, other, settings)
    assert terms.value_T.abs().max() < 1e-12 and terms.agree_T.eq(1).all()
    torch.testing.assert_close(terms.entropy_T, terms.teacher_entropy_T)
    assert torch.autograd.grad(terms.loss, policy)[0].abs().max() < 1e-10


def test_interpolation_with_the_beta_of_dpo_gives_the_dpo_model():
    policy, dpo, other = three_logits()
    terms = from_logits(policy, dpo, other, AdaptivePolicy(rule="fixed_interpolation", beta=0.1))
    torch.testing.assert_close(terms.value_T, terms.kl_dpo_T)


def test_coefficients_lie_between_floor_and_slope_and_grow_with_the_distance():
    settings = AdaptivePolicy(slope=20.0)
    near, far = (torch.zeros(1, V), torch.full((1, V), -50.0))
    far[:, 0] = 50.0
    opposite = far.roll(1, -1)
    for scale in (0.1, 1.0, 10.0):
        _, dpo, other = three_logits(scale)
        alpha_T = adaptive_coefficient(dpo, other, settings).alpha_T
        assert (alpha_T >= settings.floor).all() and (alpha_T <= settings.slope + settings.floor).all()
    assert float(adaptive_coefficient(near, near, settings).alpha_T) == pytest.approx(1e-3)
    assert float(adaptive_coefficient(far, opposite, settings).alpha_T) == pytest.approx(20.001)


@pytest.mark.parametrize("settings", EVERY, ids=str)
def test_both_forms_have_the_same_gradient(settings):
    given, settings = models(), AdaptivePolicy(**settings)
    leaves = given["policy_TD"], given["policy_head"].weight_VD
    combined, decomposed = (adaptive_policy(**given, settings=settings, form=form) for form in FORMS)
    found, expected = (torch.autograd.grad(terms.loss, leaves) for terms in (decomposed, combined))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)
    assert decomposed.teacher_entropy_T is None and decomposed.agree_T is None


def test_weights_of_zero_leave_a_position_out():
    policy, dpo, other = (side.requires_grad_() for side in three_logits())
    weight_T = torch.tensor([1.0, 0, 1, 0, 0, 1, 1], dtype=torch.float64)
    loss = from_logits(policy, dpo, other, AdaptivePolicy(), weight_T=weight_T).loss
    kept = weight_T > 0
    torch.testing.assert_close(loss, from_logits(policy[kept], dpo[kept], other[kept], AdaptivePolicy()).loss)
    assert torch.autograd.grad(loss, policy)[0][~kept].eq(0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan])
@pytest.mark.parametrize("sides", [(0,), (1,), (2,), (1, 2), (0, 1, 2)], ids=str)
def test_a_logit_that_is_not_finite_takes_its_token_out_of_all_three(form, dtype, value, sides):
    rows = [side.requires_grad_(i == 0) for i, side in enumerate(three_logits(dtype=dtype))]
    kept = torch.arange(V) != 4
    expected = from_logits(*(side[:, kept] for side in rows), AdaptivePolicy(), form=form)
    heads = [Head(torch.eye(V, dtype=dtype), torch.zeros(V, dtype=dtype)) for _ in range(3)]
    for side in sides:
        heads[side].bias_V[4] = value
    pairs = [item for pair in zip(rows, heads, strict=True) for item in pair]
    terms = adaptive_policy(*pairs, AdaptivePolicy(), torch.ones(T, dtype=dtype), form=form, chunk_size=3)
    for found, wanted in zip(terms, expected, strict=True):
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-4 if dtype == torch.float32 else 1e-8, atol=1e-4)
    gradient, wanted = (torch.autograd.grad(loss, rows[0])[0] for loss in (terms.loss, expected.loss))
    torch.testing.assert_close(gradient, wanted, rtol=1e-3 if dtype == torch.float32 else 1e-8, atol=1e-4)
    assert gradient[:, 4].eq(0).all()


def test_nearly_certain_models_give_numbers():
    for scale in (50.0, 300.0):
        rows = three_logits(scale, torch.float32)
        rows[0].requires_grad_()
        for form in FORMS:
            terms = from_logits(*rows, AdaptivePolicy(), form=form)
            assert all(torch.isfinite(value).all() for value in terms if value is not None)
            assert torch.isfinite(torch.autograd.grad(terms.loss, rows[0])[0]).all()


def test_single_precision_comes_close():
    double = three_logits(3.0, vocabulary=500)
    single = [side.float() for side in double]
    for form in FORMS:
        exact, found = (from_logits(*rows, AdaptivePolicy(), form=form) for rows in (double, single))
        for name in AdaptivePolicyTerms._fields:
            value, expected = getattr(found, name), getattr(exact, name)
            if value is not None:
                torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token_give_numbers(tokens):
    given = models(tokens=tokens)
    for form in FORMS:
        terms = adaptive_policy(**given, settings=AdaptivePolicy(), form=form)
        assert torch.isfinite(terms.loss) and len(terms.value_T) == len(terms.kl_dpo_T) == tokens
        gradients = torch.autograd.grad(terms.loss, (given["policy_TD"], given["policy_head"].weight_VD))
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert (gradients[1].abs().max() > 0) == (tokens > 0)


@pytest.mark.parametrize("form", FORMS)
def test_no_tensor_of_all_tokens_times_the_vocabulary_exists(form):
    tokens, width, vocabulary, chunk = 96, 4, 501, 8
    hidden = [torch.randn(tokens, width, requires_grad=i == 0) for i in range(3)]
    heads = [Head(torch.randn(vocabulary, width, requires_grad=i == 0)) for i in range(3)]
    pairs = [item for pair in zip(hidden, heads, strict=True) for item in pair]
    with LargestTensor() as watch:
        terms = adaptive_policy(*pairs, AdaptivePolicy(), torch.ones(tokens), form=form, chunk_size=chunk)
        terms.loss.backward()
    assert watch.elements <= 2 * chunk * vocabulary


def test_gradients_of_half_precision_heads_are_added_up_in_single():
    torch.manual_seed(0)
    weights = [torch.randn(32, 8).bfloat16() for _ in range(3)]
    hidden = [torch.randn(512, 8).bfloat16() for _ in range(3)]

    def gradient_of(chunk_size: int, dtype: torch.dtype) -> Tensor:
        heads = [Head(weight.to(dtype)) for weight in weights]
        heads[0].weight_VD.requires_grad_()
        pairs = [item for h, head in zip(hidden, heads, strict=True) for item in (h.to(dtype), head)]
        settings = AdaptivePolicy(rule="fixed_extrapolation", beta=0.1)
        loss = adaptive_policy(*pairs, settings, torch.ones(512), chunk_size=chunk_size).loss
        return torch.autograd.grad(loss, heads[0].weight_VD)[0]

    exact, found = gradient_of(512, torch.float64), gradient_of(4, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.1)


def test_logits_of_half_precision_frozen_models_are_not_rounded():
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 64).bfloat16(), torch.randn(9000, 64).bfloat16()
    head, buffer = Head(weight), torch.empty(20, 9000)
    exact = hidden.float() @ weight.float().T
    with torch.autocast("cpu", torch.bfloat16):
        found = head.wide(hidden, buffer)
    assert found is buffer and found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    capped = Head(weight, torch.ones(9000).bfloat16(), softcap=5.0, scale=0.1)
    torch.testing.assert_close(capped.wide(hidden), 5 * torch.tanh((exact + 1) * 0.1 / 5), rtol=1e-5, atol=1e-5)


def test_autocast_forms_logits_in_half_precision_and_gradients_in_the_weights_own():
    single = {
        name: Head(value.weight_VD.detach().float()) if isinstance(value, Head) else value.detach().float()
        for name, value in models(tokens=40).items()
    }
    leaves = single["policy_TD"].requires_grad_(), single["policy_head"].weight_VD.requires_grad_()
    settings = AdaptivePolicy(rule="fixed_extrapolation", beta=0.1)
    exact = torch.autograd.grad(adaptive_policy(**single, settings=settings).loss, leaves)
    with torch.autocast("cpu", torch.bfloat16):
        loss = adaptive_policy(**single, settings=settings, chunk_size=7).loss
    found = torch.autograd.grad(loss, leaves)
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.float32]
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("reduction", "weights", "count"),
    [
        ("sample_mean", [1 / 3, 1, 1 / 3, 1 / 3], 2),
        ("sum", [1, 1, 1, 1], 2),
        ("token_mean", [1, 1, 1, 1], 4),
    ],
)
def test_tokens_weigh_what_the_reduction_says_and_empty_sequences_do_not_count(reduction, weights, count):
    found = sample_weights(torch.tensor([0, 2, 0, 0]), 4, reduction)
    assert found.weight_T.tolist() == pytest.approx(weights) and int(found.count) == count


def test_a_batch_of_empty_sequences_has_no_weights():
    found = sample_weights(torch.zeros(0, dtype=torch.int64), 3)
    assert len(found.weight_T) == 0 and int(found.count) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "fixed"}, "known are"),
        ({"beta": 0.1}, "adaptive rules do not use beta"),
        ({"rule": "fixed_extrapolation"}, "Set beta"),
        ({"rule": "fixed_extrapolation", "beta": 0.1, "slope": 3.0}, "do not use slope"),
        ({"rule": "fixed_interpolation", "beta": 0.1, "floor": 0.1}, "do not use floor"),
        ({"rule": "fixed_interpolation", "beta": 0.1, "beta_cap": 1.0}, "do not use beta_cap"),
        ({"dpo_beta": 0.0}, "dpo_beta is 0.0"),
        ({"slope": -1.0}, "slope is -1.0"),
        ({"floor": 0.0}, "floor is 0.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"beta_cap": -1.0}, "beta_cap is -1.0"),
        ({"tempered": "teacher"}, "divides by nothing"),
        ({"tempered": "student", "temperature": 2.0}, "known are"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaptivePolicy(**settings)


def test_rows_forms_and_reductions_that_do_not_fit_are_refused():
    given = models()
    with pytest.raises(ValueError, match=f"{T - 1} weight"):
        adaptive_policy(**{**given, "weight_T": given["weight_T"][1:]}, settings=AdaptivePolicy())
    with pytest.raises(ValueError, match="combined, decomposed"):
        adaptive_policy(**given, settings=AdaptivePolicy(), form="other")
    with pytest.raises(ValueError, match="sample_mean, sum, token_mean"):
        sample_weights(torch.zeros(1, dtype=torch.int64), 1, "mean")
