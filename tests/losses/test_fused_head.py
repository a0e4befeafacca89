"""Chunked head losses against the plain ones on whole logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_llm.losses.chunks import automatic_chunk, sum_over_chunks
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.fused_head import cross_entropy, distillation, finite_logits, paired_first, token_cross_entropy
from lit_llm.losses.head import Head
from tests.losses.watch import LargestTensor
from tests.reference import distillation as reference

T, D, E, V, W = 10, 5, 6, 13, 11


@pytest.fixture
def models():
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "student_TD": normal(T, D).requires_grad_(),
        "student_head": Head(normal(V, D).requires_grad_()),
        "target_T": torch.randint(0, V, (T,), generator=generator),
        "teacher_TE": normal(T, E),
        "teacher_head": Head(normal(W, E)),
    }


def gradients(loss: Tensor, *tensors: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, tensors))


@pytest.mark.parametrize("chunk_size", [1, 3, 10, 64, None])
def test_cross_entropy_is_the_same_in_any_chunks(models, chunk_size):
    hidden, head, target = models["student_TD"], models["student_head"], models["target_T"]
    logits = hidden @ head.weight_VD.T
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    terms = cross_entropy(hidden, head, target, chunk_size=chunk_size)
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(terms.ce, expected.detach())
    assert terms.tokens == T
    assert terms.correct == (logits.argmax(-1) == target).sum()
    wanted = gradients(expected, hidden, head.weight_VD)
    torch.testing.assert_close(gradients(terms.loss, hidden, head.weight_VD), wanted)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("name", ["forward_kl", "adaptive_kl", "skewed_reverse_kl"])
def test_distillation_is_the_formula_of_the_paper(models, name, chunk_size):
    expected = reference.kd(
        models["student_TD"],
        models["student_head"].weight_VD,
        models["target_T"],
        models["teacher_TE"],
        models["teacher_head"].weight_VD,
        rate=0.3,
        tokens=7.0,
        name=name,
        temperature=2.0,
    )
    terms = distillation(
        **models, divergence=Divergence(name=name), ce_weight=0.7 / 7, kd_weight=0.3 / 7, chunk_size=chunk_size
    )
    trained = models["student_TD"], models["student_head"].weight_VD
    torch.testing.assert_close(terms.loss, expected)
    torch.testing.assert_close(gradients(terms.loss, *trained), gradients(expected, *trained))


def test_bias_scale_and_softcap_belong_to_the_head(models):
    hidden, target = models["student_TD"], models["target_T"]
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    head = Head(models["student_head"].weight_VD, bias, softcap=3.0, scale=0.5)
    logits = 3.0 * torch.tanh((hidden @ head.weight_VD.T + bias) * 0.5 / 3.0)
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    terms = cross_entropy(hidden, head, target, chunk_size=4)
    torch.testing.assert_close(terms.loss, expected)
    trained = hidden, head.weight_VD, bias
    torch.testing.assert_close(gradients(terms.loss, *trained), gradients(expected, *trained))


def test_a_loss_above_scales_the_gradient(models):
    hidden, head = models["student_TD"], models["student_head"]
    plain = gradients(cross_entropy(hidden, head, models["target_T"]).loss, hidden, head.weight_VD)
    scaled = gradients(3 * cross_entropy(hidden, head, models["target_T"]).loss, hidden, head.weight_VD)
    torch.testing.assert_close(scaled, [3 * gradient for gradient in plain])


def test_two_halves_with_one_denominator_add_up_to_the_whole(models):
    def gradient_of(*spans: slice) -> list[Tensor]:
        trained = models["student_TD"], models["student_head"].weight_VD
        cut = ("student_TD", "target_T", "teacher_TE")
        losses = [
            distillation(
                **{**models, **{name: models[name][span] for name in cut}},
                divergence=Divergence(),
                ce_weight=0.5 / T,
                kd_weight=0.5 / T,
            ).loss
            for span in spans
        ]
        return gradients(sum(losses), *trained)

    torch.testing.assert_close(gradient_of(slice(0, 3), slice(3, T)), gradient_of(slice(0, T)))


def test_a_detached_head_gets_no_gradient_and_leaves_the_others_alone(models):
    hidden, head = models["student_TD"], models["student_head"]
    loss = cross_entropy(hidden, head.detach(), models["target_T"], chunk_size=3).loss
    loss.backward()
    assert head.weight_VD.grad is None
    expected = cross_entropy(hidden, head, models["target_T"]).loss
    torch.testing.assert_close(hidden.grad, gradients(expected, hidden)[0])


def test_frozen_hidden_states_still_train_the_head(models):
    hidden, head = models["student_TD"], models["student_head"]
    loss = cross_entropy(hidden.detach(), head, models["target_T"], chunk_size=3).loss
    expected = cross_entropy(hidden, head, models["target_T"]).loss
    torch.testing.assert_close(gradients(loss, head.weight_VD), gradients(expected, head.weight_VD))


def test_without_gradients_none_are_formed(models):
    def operations() -> set[str]:
        with LargestTensor() as watch:
            loss = cross_entropy(models["student_TD"], models["student_head"], models["target_T"], chunk_size=2).loss
        assert loss.requires_grad == torch.is_grad_enabled()
        return {name for name in watch.operations if any(part in name for part in ("backward", "addmm_", "zeros_like"))}

    assert operations()
    with torch.no_grad():
        assert not operations()


def test_no_rows_give_a_loss_of_zero_with_a_gradient_of_zero(models):
    hidden, head = models["student_TD"], models["student_head"]
    terms = cross_entropy(hidden[:0], head, models["target_T"][:0])
    assert terms.loss == 0
    assert terms.tokens == 0
    found = gradients(terms.loss, hidden, head.weight_VD)
    torch.testing.assert_close(found, [torch.zeros_like(hidden), torch.zeros_like(head.weight_VD)])


def test_what_a_function_closes_over_collects_no_gradient(models):
    outside = torch.ones(D, dtype=torch.float64, requires_grad=True)
    rows = (models["student_TD"],)
    loss, _ = sum_over_chunks(lambda pieces, _: ((pieces[0] * outside).sum(), []), rows, (), 0, chunk_size=3)
    loss.backward()
    assert outside.grad is None
    torch.testing.assert_close(models["student_TD"].grad, torch.ones(T, D, dtype=torch.float64))


def test_no_tensor_of_all_tokens_times_the_vocabulary_exists():
    tokens, width, vocabulary, chunk = 96, 4, 501, 8
    hidden = torch.randn(tokens, width, requires_grad=True)
    head = Head(torch.randn(vocabulary, width, requires_grad=True))
    teacher_head = Head(torch.randn(vocabulary, width))
    target = torch.randint(0, vocabulary, (tokens,))
    with LargestTensor() as watch:
        distillation(
            hidden,
            head,
            target,
            hidden.detach(),
            teacher_head,
            Divergence(),
            ce_weight=1.0,
            kd_weight=1.0,
            chunk_size=chunk,
        ).loss.backward()
    assert watch.elements == chunk * vocabulary


def test_gradients_of_half_precision_heads_are_added_up_in_single():
    torch.manual_seed(0)
    hidden = torch.randn(512, 8).bfloat16()
    weight = torch.randn(32, 8).bfloat16()
    target = torch.randint(0, 32, (512,))

    def gradient_of(chunk_size: int, dtype: torch.dtype) -> Tensor:
        head = Head(weight.to(dtype).requires_grad_())
        loss = cross_entropy(hidden.to(dtype), head, target, chunk_size=chunk_size).loss
        return gradients(loss, head.weight_VD)[0]

    exact = gradient_of(512, torch.float64)
    found = gradient_of(4, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    # 128 additions in bfloat16 would lose most digits of the larger sums
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0.1)


def test_autocast_forms_logits_in_half_precision_and_gradients_in_the_weights_own():
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
    target = torch.randint(0, 32, (20,))
    exact = gradients(cross_entropy(hidden, Head(weight), target).loss, hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        terms = cross_entropy(hidden, Head(weight), target, chunk_size=7)
        distillation(hidden, Head(weight), target, hidden, Head(weight), Divergence(), ce_weight=1.0, kd_weight=1.0)
    found = gradients(terms.loss, hidden, weight)
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.float32]
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.1)


def test_logits_that_are_not_finite_count_as_zero():
    logits = torch.tensor([[1.0, torch.inf, 2.0], [torch.nan, 0.5, -torch.inf]])
    torch.testing.assert_close(finite_logits(logits), torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.5, 0.0]]))


def test_finite_logits_whose_sum_overflows_are_kept():
    logits = torch.full((2, 3), 3e38)
    assert torch.equal(finite_logits(logits), logits)


def test_cross_entropy_of_a_token_is_minus_its_log_probability():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    expected = -torch.log(torch.exp(torch.tensor(1.0)) / (1 + torch.e + torch.e**2))
    torch.testing.assert_close(token_cross_entropy(logits, torch.tensor([1]))[0], expected)


def test_paired_rows_come_first_and_no_row_is_lost():
    assert paired_first(torch.tensor([4, 1]), 6).tolist() == [4, 1, 0, 2, 3, 5]


def test_a_chunk_holds_at_least_sixteen_rows_and_shrinks_with_the_vocabulary():
    assert automatic_chunk(10**9) == 16
    assert automatic_chunk(50_000) > automatic_chunk(300_000) > 16


def test_rows_are_cut_into_chunks_of_equal_size():
    fitting = automatic_chunk(50_000)
    assert automatic_chunk(50_000, fitting) == fitting and automatic_chunk(50_000, 10) == 10
    assert automatic_chunk(50_000, fitting + 1) == (fitting + 2) // 2


def test_rows_that_are_not_paired_are_refused_with_their_numbers(models):
    with pytest.raises(ValueError, match=f"{T - 1} target"):
        cross_entropy(models["student_TD"], models["student_head"], models["target_T"][1:])
