"""Forward KL against the largest probabilities of a teacher and the mass of the rest."""

import math

import pytest
import torch

from lit_llm.data.teacher_store import encode_top_k
from lit_llm.losses.divergence import Divergence
from lit_llm.losses.head import Head
from lit_llm.losses.sparse_teacher import sparse_distillation, sparse_forward_kl
from tests.reference.sparse_teacher import merged_forward_kl

T, V, D = 7, 23, 5


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top(log_p_TV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    log_p_TK, ids_TK = log_p_TV.topk(k)
    return ids_TK, log_p_TK, log_p_TV.scatter(-1, ids_TK, -math.inf).logsumexp(-1)


@pytest.mark.parametrize("k", [1, 4, 22])
def test_it_is_the_forward_kl_of_the_distributions_with_the_rest_merged(k):
    log_q_TV, log_p_TV = logits(1).log_softmax(-1), logits(2).log_softmax(-1)
    ids_TK, log_p_TK, log_rest_T = top(log_p_TV, k)
    ours_T = sparse_forward_kl(log_q_TV, ids_TK, log_p_TK, log_rest_T)
    for t in range(T):
        theirs = merged_forward_kl(log_q_TV[t].exp().tolist(), log_p_TV[t].exp().tolist(), ids_TK[t].tolist())
        assert ours_T[t].item() == pytest.approx(theirs, rel=1e-10)


def test_the_full_forward_kl_is_larger_by_the_rest_mass_times_the_kl_within_the_rest():
    log_q_TV, log_p_TV = logits(1).log_softmax(-1), logits(2).log_softmax(-1)
    full_T = (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)
    ids_TK, log_p_TK, log_rest_T = top(log_p_TV, 4)
    outside_TV = torch.ones(T, V, dtype=torch.bool).scatter(-1, ids_TK, False)
    inner_p_TV = log_p_TV.masked_fill(~outside_TV, -math.inf).log_softmax(-1)
    inner_q_TV = log_q_TV.masked_fill(~outside_TV, -math.inf).log_softmax(-1)
    inner_T = (inner_p_TV.exp() * (inner_p_TV - inner_q_TV).masked_fill(~outside_TV, 0.0)).sum(-1)
    sparse_T = sparse_forward_kl(log_q_TV, ids_TK, log_p_TK, log_rest_T)
    torch.testing.assert_close(full_T - sparse_T, log_rest_T.exp() * inner_T)


def test_the_gradient_differs_from_the_full_one_by_at_most_twice_the_rest_mass():
    log_p_TV = logits(2).log_softmax(-1)
    ids_TK, log_p_TK, log_rest_T = top(log_p_TV, 4)
    student_TV = logits(1).requires_grad_()
    (full_TV,) = torch.autograd.grad(Divergence(temperature=1.0)(student_TV, log_p_TV).sum(), student_TV)
    sparse_T = sparse_forward_kl(student_TV.log_softmax(-1), ids_TK, log_p_TK, log_rest_T)
    (sparse_TV,) = torch.autograd.grad(sparse_T.sum(), student_TV)
    gap_T = (full_TV - sparse_TV).abs().sum(-1)
    assert (gap_T > 0).all() and (gap_T <= 2 * log_rest_T.exp() + 1e-12).all()


def test_the_chunked_loss_and_its_gradients_are_those_of_the_plain_one():
    generator = torch.Generator().manual_seed(5)
    hidden_TD = torch.randn(T, D, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(V + 3, D, generator=generator, dtype=torch.float64, requires_grad=True)
    target_T = torch.randint(V, (T,), generator=generator)
    ids_TK, log_p_TK, log_rest_T = top((logits(2) / 2.0).log_softmax(-1), 4)

    student_TV = hidden_TD @ weight_VD.T
    ce = -student_TV.log_softmax(-1)[torch.arange(T), target_T].sum()
    log_q_TV = (student_TV[:, :V] / 2.0).log_softmax(-1)
    kd = 4.0 * sparse_forward_kl(log_q_TV, ids_TK, log_p_TK, log_rest_T).sum()
    plain = 0.3 * ce + 0.7 * kd
    plain_gradients = torch.autograd.grad(plain, (hidden_TD, weight_VD))

    terms = sparse_distillation(
        hidden_TD,
        Head(weight_VD),
        target_T,
        ids_TK,
        log_p_TK,
        log_rest_T,
        shared=V,
        temperature=2.0,
        scale=4.0,
        ce_weight=0.3,
        kd_weight=0.7,
        chunk_size=3,
    )
    torch.testing.assert_close(terms.loss, plain)
    torch.testing.assert_close(terms.kd, kd.detach())
    for ours, theirs in zip(torch.autograd.grad(terms.loss, (hidden_TD, weight_VD)), plain_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert terms.agree == (student_TV.argmax(-1) == ids_TK[:, 0]).sum()


def test_a_teacher_without_remaining_mass_gives_finite_values_and_gradients():
    student_TV = logits(1).requires_grad_()
    ids_TK = torch.arange(3).expand(T, 3)
    log_p_TK = torch.full((T, 3), math.log(1 / 3), dtype=torch.float64)
    value_T = sparse_forward_kl(student_TV.log_softmax(-1), ids_TK, log_p_TK, torch.full((T,), -math.inf).double())
    value_T.sum().backward()
    assert torch.isfinite(value_T).all() and torch.isfinite(student_TV.grad).all()


def test_the_stored_form_is_the_top_of_the_distribution_and_reports_what_it_leaves_out():
    log_p_TV = logits(2).log_softmax(-1)
    tensors, measures = encode_top_k(log_p_TV.float(), 4)
    ids_TK, log_p_TK, log_rest_T = top(log_p_TV, 4)
    assert torch.equal(tensors["ids"].long(), ids_TK)
    torch.testing.assert_close(tensors["log_p"].double(), log_p_TK, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tensors["log_rest"].double(), log_rest_T, rtol=1e-5, atol=1e-5)
    # a student that spreads the rest evenly, and is right about everything else
    even_TV = (log_rest_T[:, None] - math.log(V - 4)).expand(T, V).scatter(-1, ids_TK, log_p_TK)
    short_T = (log_p_TV.exp() * (log_p_TV - even_TV)).sum(-1)
    torch.testing.assert_close(measures["uniform_tail_error"].double(), short_T, rtol=1e-4, atol=1e-5)


def test_rows_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="one to one"):
        sparse_distillation(
            torch.zeros(3, D),
            Head(torch.zeros(V, D)),
            torch.zeros(3, dtype=torch.int64),
            *(torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1), torch.zeros(2)),
            shared=V,
            temperature=1.0,
            ce_weight=1.0,
            kd_weight=1.0,
        )
