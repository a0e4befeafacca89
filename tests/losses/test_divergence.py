"""Divergences against their definition, entry by entry in float64."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
import torch

from lit_llm.losses.divergence import Divergence
from tests.reference import divergences as reference

NAMES = get_args(get_type_hints(Divergence)["name"])
SHARES = {
    "skewed_forward_kl": {"skew": 0.3},
    "skewed_reverse_kl": {"skew": 0.3},
    "adaptive_kl": {"alpha": 0.8},
    "generalized_js": {"beta": 0.2},
}


def logits(num_tokens=6, vocabulary=13, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(2, num_tokens, vocabulary, generator=generator, dtype=torch.float64)


def value_and_gradient(function, student_TV, teacher_TV):
    student_TV = student_TV.clone().requires_grad_()
    value_T = function(student_TV, teacher_TV)
    return value_T.detach(), torch.autograd.grad(value_T.sum(), student_TV)[0]


def by_definition(divergence: Divergence):
    settings = {field.name: getattr(divergence, field.name) for field in fields(divergence)}
    squared = settings.pop("scale_by_temperature_squared")

    def function(student_TV, teacher_TV):
        pairs = zip(student_TV, teacher_TV, strict=True)
        value_T = torch.stack([reference.divergence(z_s, z_t, **settings) for z_s, z_t in pairs])
        return value_T * settings["temperature"] ** 2 if squared else value_T

    return function


def test_every_divergence_has_a_reference():
    assert set(NAMES) == set(reference.DIVERGENCES)


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 2.0, "teacher_temperature": 1.5}], ids=str)
@pytest.mark.parametrize(("name", "share"), [*((name, {}) for name in NAMES), *SHARES.items()], ids=str)
def test_value_and_gradient_are_those_of_the_definition(name, share, settings):
    divergence = Divergence(name=name, **share, **settings)
    expected = value_and_gradient(by_definition(divergence), *logits())
    found = value_and_gradient(divergence, *logits())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_comes_close(name):
    divergence = Divergence(name=name)
    expected = value_and_gradient(divergence, *logits())
    found = value_and_gradient(divergence, *logits().float())
    assert found[0].dtype == torch.float32
    torch.testing.assert_close([t.double() for t in found], list(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"top1_ce", "hierarchical_ranking"}))
def test_equal_distributions_have_no_divergence(name):
    student_TV = logits()[0]
    value_T, gradient_TV = value_and_gradient(Divergence(name=name), student_TV, student_TV)
    torch.testing.assert_close(value_T, torch.zeros_like(value_T), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_TV, torch.zeros_like(gradient_TV), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_logit_far_above_the_rest_gives_no_nan(name):
    student_TV, teacher_TV = logits().float()
    student_TV[:, 3] += 200.0
    teacher_TV[:, 5] += 200.0
    value_T, gradient_TV = value_and_gradient(Divergence(name=name, temperature=1.0), student_TV, teacher_TV)
    assert torch.isfinite(value_T).all()
    assert torch.isfinite(gradient_TV).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"hierarchical_ranking"}))
def test_an_entry_that_is_not_finite_on_either_side_contributes_nothing(name, bad):
    student_TV, teacher_TV = logits()
    student_TV[0, 4], teacher_TV[1, 7] = bad, bad
    value_T, gradient_TV = value_and_gradient(Divergence(name=name), student_TV, teacher_TV)
    assert torch.isfinite(value_T).all()
    assert torch.isfinite(gradient_TV).all()
    untouched_T, _ = value_and_gradient(Divergence(name=name), *logits())
    torch.testing.assert_close(value_T[2:], untouched_T[2:])


def test_forward_kl_leaves_out_the_entry_that_the_student_excludes():
    student_TV, teacher_TV = logits(num_tokens=1)
    student_TV[0, 4] = -torch.inf
    log_q_V, log_p_V = student_TV[0].log_softmax(-1), teacher_TV[0].log_softmax(-1)
    rest = [v for v in range(13) if v != 4]
    expected = (log_p_V.exp() * (log_p_V - log_q_V))[rest].sum()
    torch.testing.assert_close(Divergence(temperature=1.0)(student_TV, teacher_TV)[0], expected)


def test_forward_kl_gradient_is_the_difference_of_the_two_distributions():
    student_TV, teacher_TV = logits()
    _, gradient_TV = value_and_gradient(Divergence(temperature=2.0), student_TV, teacher_TV)
    expected_TV = ((student_TV / 2).softmax(-1) - (teacher_TV / 2).softmax(-1)) / 2
    torch.testing.assert_close(gradient_TV, expected_TV)


def test_epsilon_of_js_is_the_published_form():
    divergence = Divergence(name="js", epsilon=1e-3)
    expected = value_and_gradient(by_definition(divergence), *logits())
    torch.testing.assert_close(value_and_gradient(divergence, *logits()), expected)
    assert not torch.allclose(expected[0], Divergence(name="js")(*logits()), rtol=1e-4)


def test_scaling_by_the_squared_temperature():
    plain, scaled = (Divergence(temperature=3.0, scale_by_temperature_squared=on) for on in (False, True))
    torch.testing.assert_close(scaled(*logits()), 9 * plain(*logits()))


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_the_teacher(name):
    student_TV, teacher_TV = (side.clone().requires_grad_() for side in logits())
    Divergence(name=name)(student_TV, teacher_TV).sum().backward()
    assert teacher_TV.grad is None
    assert student_TV.grad is not None


def test_half_precision_is_compared_in_single():
    student_TV, teacher_TV = logits().bfloat16()
    value_T = Divergence()(student_TV, teacher_TV)
    assert value_T.dtype == torch.float32
    torch.testing.assert_close(value_T, Divergence()(student_TV.float(), teacher_TV.float()))


@pytest.mark.parametrize("name", NAMES)
def test_no_token_gives_no_value(name):
    assert Divergence(name=name)(torch.zeros(0, 13), torch.zeros(0, 13)).shape == (0,)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("temperature", 0.0),
        ("teacher_temperature", -1.0),
        ("skew", 1.0),
        ("alpha", 0.0),
        ("beta", 1.5),
        ("epsilon", -1e-9),
    ],
)
def test_a_setting_without_meaning_is_refused_by_name(setting, value):
    with pytest.raises(ValueError, match=f"divergence.{setting} is {value}"):
        Divergence(**{setting: value})


@pytest.mark.parametrize(("setting", "value"), [("skew", 0.2), ("alpha", 0.3), ("beta", 0.7), ("epsilon", 1e-9)])
def test_a_setting_that_the_divergence_does_not_use_is_refused(setting, value):
    with pytest.raises(ValueError, match=f"divergence.{setting} is {value}, but divergence.name is 'forward_kl'"):
        Divergence(name="forward_kl", **{setting: value})


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'kl'; known are forward_kl"):
        Divergence(name="kl")


def test_a_loss_without_temperature_refuses_to_be_scaled_by_it():
    with pytest.raises(ValueError, match="scale_by_temperature_squared is true.*hierarchical_ranking"):
        Divergence(name="hierarchical_ranking", scale_by_temperature_squared=True)
